"""The legs of tests/fuzz in small: the same inputs, drawn by hypothesis, so that what breaks something is made small before it is shown."""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..fuzz.__main__ import LEGS, main
from ..fuzz.leg import Find, Leg, Trial, run, scratch_folder

LONG = {"configs": 10, "kernels": 8, "weights": 2, "batches": 2, "sessions": 8, "cards": 20, "tokenizers": 20}  # trials; of others 60


@pytest.fixture(scope="module")
def trials() -> Iterator[dict[str, Trial]]:
    """Each leg, made ready."""
    with scratch_folder() as folder:
        for name in LEGS:
            (folder / name).mkdir()
        yield {name: leg.prepare(folder / name) for name, leg in LEGS.items()}


@pytest.mark.parametrize("name", LEGS)
def test_no_input_breaks(name: str, trials: dict[str, Trial]) -> None:
    @settings(max_examples=LONG.get(name, 60), deadline=None, derandomize=True, database=None)
    @given(st.randoms(use_true_random=False))
    def one(rng: Random) -> None:
        assert trials[name](rng)

    one()


def breaks_on_tens(rng: Random) -> str:
    drawn = rng.randrange(100)
    if drawn % 10 == 0:
        raise Find(f"{drawn} is broken")
    return "fine"


BROKEN = Leg("breaks on every tenth number", lambda folder: breaks_on_tens)


def test_a_find_is_counted_and_can_be_had_again_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEGS, "broken", BROKEN)
    result = run(BROKEN, 3, range(200))
    assert result.ended["fine"] + len(result.finds) == 200
    assert 5 < len(result.finds) < 50
    number, error = next(iter(result.finds.items()))
    assert main(["broken", "--seed", "3", "--count", "200"]) == 1
    out = capsys.readouterr().out
    assert f"200 trials in 0.0 s, {len(result.finds)} finds" in out
    assert f"--only {number}: Find: {error}" in out
    assert main(["broken", "--seed", "3", "--only", str(number)]) == 1
    assert f"Find: {error}" in capsys.readouterr().err
    fine = next(n for n in range(200) if n not in result.finds)
    assert main(["broken", "--seed", "3", "--only", str(fine)]) == 0
    assert main(["broken", "--seed", "3", "--first", str(fine), "--count", "1"]) == 0
