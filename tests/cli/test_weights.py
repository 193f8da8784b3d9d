"""`--weights q8` from the command line: told in settings, memory and bench, shown while it takes long, refused with --exact."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from toyllm.cli import output
from toyllm.models import quantise

SHORT = ("generate", "Once", "--max-tokens", "3", "--temperature", "0")


def test_the_settings_say_how_weights_are_held(toyllm: Any) -> None:
    found = [json.loads(toyllm(*SHORT, "--json", *more).out)["settings"]["weights"] for more in ((), ("--weights", "q8"))]
    assert found == ["stored", "q8"]


def test_the_environment_asks_for_it_and_the_memory_shows_it(toyllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOYLLM_WEIGHTS", "q8")
    code, _, err = toyllm(*SHORT, "--stats")
    assert code == 0
    header, first, layer, *_ = [line.split() for line in err[err.index("memory ") :].splitlines()]
    assert header == ["memory", "weights", "quantised", "widened", "cache", "work", "status"]
    assert first == ["input", "2,359,296", "-", "-", "-", "-", "allocated"]
    assert layer[:4] == ["layer", "0", "6,656", "835,584"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--exact",), "error: --exact is f32 throughout, --weights q8 is not: drop one of them\n"),
        (("--weights", "q4"), "error: --weights q4: expected stored or q8\n"),
    ],
)
def test_what_contradicts_is_refused_in_one_line(toyllm: Any, options: tuple[str, ...], said: str) -> None:
    assert toyllm(*SHORT, "--weights", "q8", *options) == (1, "", said)


def test_progress_shows_where_it_takes_long_behind_the_reading(toyllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    open_bars: list[str] = []

    @contextmanager
    def bar(label: str) -> Iterator[Any]:
        open_bars.append(label)
        yield lambda done, total: told.append(f"{label}: {done} of {total}")
        open_bars.remove(label)

    monkeypatch.setattr(output, "byte_bar", bar)
    assert toyllm(*SHORT, "--weights", "q8").code == 0
    assert told == []
    monkeypatch.setattr(quantise, "QUIET", -1)
    assert toyllm(*SHORT, "--weights", "q8").code == 0
    assert told[-1] == "quantising tales-gpt2: 11534336 of 11534336"
    assert open_bars == []


def test_bench_counts_the_bytes_that_are_read(toyllm: Any) -> None:
    run = ("bench", "-p", "0", "-n", "1", "-r", "1")
    stored, found = (json.loads(toyllm(*run, "--json", *more).out)["tests"][0] for more in ((), ("--weights", "q8")))
    copies = 6 * 835_584 + 1_114_112
    assert found["weight_bytes"] == stored["weight_bytes"] - 11_534_336 + copies + 2 * 256  # and a row of the embedding
    assert found["flops"] == stored["flops"]
    assert "; dense weights in 8 bits\n" in toyllm(*run, "--weights", "q8").out
    assert "8 bits" not in toyllm(*run).out


def test_a_run_in_8_bits_is_scored_against_one_as_stored(toyllm: Any) -> None:
    outcome = toyllm("score", "--prompt", "Once upon a time there was a poor man.", "--json", "--against-options", "--weights q8")
    assert outcome.code == 0
    against = json.loads(outcome.out)["against"]
    assert against["settings"]["weights"] == "q8"
    assert 0 < against["kl_mean"] < 1e-3
