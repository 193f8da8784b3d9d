"""GPT-OSS passes: however tokens are cut into passes, kept, mixed and decoded beside others, the logits are the same bits."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.kernels.cells import DTYPES
from toyllm.kernels.errors import ToyllmError
from toyllm.models import gpt2, gpt_oss
from toyllm.models.cache import CacheFull
from toyllm.models.model import Model

GOLDENS = Path(__file__).parent / "goldens"
CASES = ["baseline", "window_16", "all_full", "all_sliding", "odd", "experts_bf16", "original"]
IDS = np.random.default_rng(11).integers(0, 97, 90)
T = len(IDS)


@functools.cache
def load(case: str = "baseline", **settings: Any) -> Model:
    return toyllm.load(str(GOLDENS / "gpt_oss" / case), **settings)


def fed(model: Model, ids: np.ndarray, cuts: list[int], start: int = 0, cache: Any = None, sequence: int = 0) -> np.ndarray:
    """Logits [T, V] of ids fed in pieces that end at `cuts` and at the end, from position `start`."""
    cache = model.new_cache(len(ids)) if cache is None else cache
    ends = [*cuts, len(ids)]
    logits = []
    for first, last in zip([0, *ends], ends, strict=False):
        positions = np.arange(start + first, start + last)
        logits.append(model.forward(ids[first:last], positions, np.full(last - first, sequence), cache, all_logits=True))
    return np.concatenate(logits)


@functools.cache
def whole(case: str = "baseline", **settings: Any) -> np.ndarray:
    """One pass over all ids."""
    return fed(load(case, **settings), IDS, [])


@pytest.mark.parametrize("case", CASES)
def test_any_prompt_then_decode_is_one_pass_for_every_prefix(case: str) -> None:
    """Far beyond the windows of 5 and 16, a token at a time from each prefix on."""
    assert np.isfinite(whole(case)).all()
    for prefix in [1, 2, 4, 5, 6, 15, 16, 17, 63, 64, 65, T - 1]:
        ids = IDS[: min(T, prefix + 24)]
        np.testing.assert_array_equal(fed(load(case), ids, list(range(prefix, len(ids)))), whole(case)[: len(ids)])


@pytest.mark.parametrize("case", ["baseline", "window_16"])
def test_a_pass_after_every_prefix_is_one_pass(case: str) -> None:
    for prefix in range(1, T):
        np.testing.assert_array_equal(fed(load(case), IDS, [prefix]), whole(case))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 64, 512])
def test_the_size_of_a_pass_changes_no_logits(case: str, chunk: int) -> None:
    """It is also what windows are made for: the smaller, the sooner they forget."""
    model = load(case, prefill_chunk=chunk)
    np.testing.assert_array_equal(fed(model, IDS, []), whole(case))
    np.testing.assert_array_equal(fed(model, IDS, [3, 4, 20, 71]), whole(case))


def test_random_cuts_change_no_logits() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        chunk = int(rng.integers(1, 20))
        cuts = np.unique(rng.integers(1, T, rng.integers(0, 12))).tolist()
        np.testing.assert_array_equal(fed(load(prefill_chunk=chunk), IDS, cuts), whole())


@pytest.mark.parametrize("case", ["baseline", "all_full", "original"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_cell_is_read_before_it_is_written(case: str, dtype: str) -> None:
    for chunk in (5, 512):
        poisoned = load(case, poison_cache=True, cache_dtype=dtype, prefill_chunk=chunk)
        found = fed(poisoned, IDS, [30, 31, 32, 80])
        np.testing.assert_array_equal(found, whole(case, cache_dtype=dtype))
        assert np.isfinite(found).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt2_reads_no_cell_before_it_is_written(dtype: str) -> None:
    folder, ids = str(GOLDENS / "gpt2" / "baseline"), IDS[:60]
    plain = fed(toyllm.load(folder, cache_dtype=dtype), ids, [])
    poisoned = toyllm.load(folder, poison_cache=True, cache_dtype=dtype, prefill_chunk=13)
    np.testing.assert_array_equal(fed(poisoned, ids, [30, 31, 32]), plain)
    assert np.isfinite(plain).all()


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 3e-2), ("q8", 0.4)])
def test_a_narrower_cache_is_close_and_not_the_same(dtype: str, most: float) -> None:
    exact, rounded = whole(), whole(cache_dtype=dtype)
    worst = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 0 < worst < most  # reached: 1.4e-2 and 0.2; this model is made to react


@pytest.mark.parametrize("case", ["baseline", "original", "odd"])
def test_all_algorithms_give_the_same_bits(case: str) -> None:
    for moe in ("single", "grouped", "all"):
        np.testing.assert_array_equal(whole(case, moe=moe), whole(case))
    generous = load(case, moe="budget", tokens_per_expert_ratio=100.0)
    np.testing.assert_array_equal(fed(generous, IDS, []), whole(case))
    assert generous.kernels.mixing.ran == {"all"}


def test_the_algorithm_that_ran_is_known() -> None:
    model = toyllm.load(str(GOLDENS / "gpt_oss" / "baseline"))
    fed(model, IDS[:5], [4])
    assert model.kernels.mixing.ran == {"grouped", "single"}
    assert model.kernels.mixing.dropped == 0


def test_a_tight_budget_drops_pairs_and_says_how_many() -> None:
    model = toyllm.load(str(GOLDENS / "gpt_oss" / "baseline"), moe="budget", tokens_per_expert_ratio=0.5)
    found = fed(model, IDS, [])
    assert model.kernels.mixing.ran == {"budget"}
    layers, k, E, budget = 3, 4, 8, 24  # .5 · 90 · 4/8 = 22.5
    assert layers * (T * k - E * budget) <= model.kernels.mixing.dropped < layers * T * k
    assert np.isfinite(found).all()
    assert not np.array_equal(found, whole())


@pytest.mark.parametrize("backend", ["portable", "numpy"])
@pytest.mark.parametrize("case", ["baseline", "experts_bf16", "odd"])
def test_plain_backends_agree(case: str, backend: str) -> None:
    found = fed(load(case, backend=backend), IDS[:20], [12, 13])
    assert np.abs(found - whole(case)[:20]).max() / np.abs(whole(case)).max() < 5e-4
    exact = fed(load(case, exact=True), IDS[:20], [])
    assert np.abs(found - exact).max() / np.abs(exact).max() < 1e-5


def test_sequences_decoded_together_give_each_what_it_gives_alone() -> None:
    """Three of different lengths, two of them beyond the window, prompts and single tokens in the same passes."""
    model = load(prefill_chunk=16)
    ids = [IDS[:40], IDS[20:31], IDS[31:90]]
    cache, found, at = model.new_cache(64, sequences=3), [[], [], []], [0, 0, 0]
    rng = np.random.default_rng(2)
    while any(at[s] < len(ids[s]) for s in range(3)):
        batch = [(s, i) for s in rng.permutation(3) for i in range(at[s], min(at[s] + int(rng.integers(0, 6)), len(ids[s])))]
        if not batch:
            continue
        rows = model.forward([ids[s][i] for s, i in batch], [i for _, i in batch], [s for s, _ in batch], cache, all_logits=True)
        for (s, _), row in zip(batch, rows, strict=True):
            found[s].append(row)
            at[s] += 1
    for s in range(3):
        np.testing.assert_array_equal(found[s], fed(model, ids[s], []))


def test_a_sequence_may_start_anywhere_in_a_block() -> None:
    for start in (1, 63, 64, 900):
        together = fed(load(), IDS, [], start)
        np.testing.assert_array_equal(fed(load(prefill_chunk=7), IDS, [2, 50], start), together)
        assert not np.array_equal(together, whole()), "positions matter"


def test_a_full_cache_refuses_and_goes_on_as_if_never_asked() -> None:
    model = load(prefill_chunk=8)
    cache = model.new_cache(20)
    first = fed(model, IDS[:18], [], cache=cache)
    with pytest.raises(CacheFull, match=r"^the KV cache is full: 3 more positions, 2 of 20 cells are free$"):
        model.forward(IDS[18:21], [18, 19, 20], [0, 0, 0], cache)
    with pytest.raises(ToyllmError, match=r"^sequence 0: expected positions from 18 on"):
        model.forward(IDS[19:20], [19], [0], cache)
    rest = model.forward(IDS[18:20], [18, 19], [0, 0], cache, all_logits=True)
    np.testing.assert_array_equal(np.concatenate([first, rest]), whole()[:20])


def test_stepping_back_within_what_is_kept_is_as_if_never_gone() -> None:
    model = load(prefill_chunk=8)
    cache = model.new_cache(T, keep=5)  # before 32, where the last pass begins, and the window
    fed(model, IDS[:40], [32], cache=cache)
    assert [cache.can_resume(0, position) for position in (26, 27, 36, 40)] == [False, True, True, True]
    cache.remove(0, 36)
    rows = model.forward(IDS[36:40], np.arange(36, 40), np.zeros(4, int), cache, all_logits=True)
    np.testing.assert_array_equal(rows, whole()[36:40])


def test_activations_can_be_watched_in_any_sequence() -> None:
    model = load(prefill_chunk=16)
    cache = model.new_cache(64, sequences=2)
    fed(model, IDS[:9], [], cache=cache)
    seen: list[dict[str, np.ndarray]] = []
    for sequence, kept in ((1, cache), (0, model.new_cache(64))):
        fed(model, IDS[:30], [10, 20], cache=kept, sequence=sequence)
        seen.append({})
        model.forward(IDS[30:32], [30, 31], [sequence] * 2, kept, lambda name, array: seen[-1].update({name: array.copy()}))
    assert seen[0].keys() == seen[1].keys()
    for name, array in seen[0].items():
        np.testing.assert_array_equal(array, seen[1][name], err_msg=name)
    assert seen[0]["blocks.0.attn.scores"].shape == (8, 2, 32)


def families() -> list[tuple[Any, Any]]:
    loaded = [load(case).config for case in CASES]
    return [(gpt_oss, c) for c in loaded] + [(gpt2, toyllm.load(str(GOLDENS / "gpt2" / "baseline")).config)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_memory_is_as_computed_beforehand(chunk: int, dtype: str) -> None:
    for family, config in families():
        for capacity in (1, 5, 63, 64, 65, 700):
            for sequences, keep in ((1, 0), (3, 0), (1, 10), (3, 1000)):
                cache = family.make_cache(config, sequences, capacity, chunk, dtype, keep=keep)
                assert cache.nbytes == family.cache_bytes(config, capacity, chunk, dtype, sequences, keep)


def test_sliding_layers_of_the_20b_stay_small() -> None:
    """2 · 8 · 64 values a cell in bf16: on twelve layers a window of 128 and a pass of 512 positions, on twelve all of them."""
    of_20b = gpt_oss.Config()
    assert gpt_oss.cache_bytes(of_20b, 4096, 512, "bf16") == 2048 * 12 * (640 + 4096)
    assert gpt_oss.cache_bytes(of_20b, 131072, 512, "bf16") == 2048 * 12 * (640 + 131072)
    assert gpt_oss.cache_bytes(of_20b, 4096, 512, "bf16", 8, 256) == 2048 * 12 * (8 * 384 + 512 + 8 * 4096)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe": "sparse"}, "--moe sparse: expected one of auto, single, grouped, all, budget"),
        ({"tokens_per_expert_ratio": 0.0}, "--tokens-per-expert-ratio 0.0: expected a number above 0"),
        ({"cache_dtype": "f16"}, "--cache-dtype f16: expected f32 or bf16 or q8"),
        ({"prefill_chunk": 0}, "--prefill-chunk 0: expected at least 1"),
    ],
)
def test_settings_that_are_none_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ToyllmError) as refused:
        toyllm.load(str(GOLDENS / "gpt_oss" / "baseline"), **settings)
    assert str(refused.value) == message
