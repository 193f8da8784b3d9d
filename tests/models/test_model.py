"""A loaded model: one forward for prefill and decode, one sequence or many; what it refuses; how much context fits."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models import model as module
from toyllm.models.cache import CacheFull
from toyllm.models.model import RESERVE, Model

BASELINE = str(Path(__file__).parent / "goldens" / "gpt2" / "baseline")
V, P, L, D = 97, 64, 3, 24
IDS = np.random.default_rng(0).integers(0, V, 40)


@pytest.fixture(scope="module")
def model() -> Model:
    return toyllm.load(BASELINE)


def alone(model: Model, ids: np.ndarray, first: int = 0) -> np.ndarray:
    """Logits [T, V] of ids from position `first` on, in a cache of their own."""
    T = len(ids)
    return model.forward(ids, np.arange(first, first + T), np.zeros(T, int), model.new_cache(T), all_logits=True)


def test_logits_are_one_row_a_token_in_f32(model: Model) -> None:
    logits = model.logits(IDS.tolist())
    assert (logits.shape, logits.dtype) == ((40, V), np.float32)
    np.testing.assert_array_equal(logits, alone(model, IDS))


def test_only_the_last_token_goes_through_the_head_unless_all_are_asked_for(model: Model) -> None:
    last = model.forward(IDS, np.arange(40), np.zeros(40, int), model.new_cache())
    assert last.shape == (1, V)
    np.testing.assert_array_equal(last, alone(model, IDS)[-1:])


def test_the_result_goes_where_it_is_wanted(model: Model) -> None:
    out = np.full((1, V), np.nan, np.float32)
    assert model.forward(IDS, np.arange(40), np.zeros(40, int), model.new_cache(), out=out) is out
    np.testing.assert_array_equal(out, alone(model, IDS)[-1:])


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 39, 40])
def test_the_last_n_go_through_the_head_where_the_result_has_n_rows(n: int) -> None:
    model = toyllm.load(BASELINE, prefill_chunk=7)
    out = np.full((n, V), np.nan, np.float32)
    model.forward(IDS, np.arange(40), np.zeros(40, int), model.new_cache(), out=out)
    np.testing.assert_array_equal(out, alone(model, IDS)[40 - n :])


@pytest.mark.parametrize(
    "out",
    [
        np.empty(V, np.float32),
        np.empty((2, V), np.float32),
        np.empty((1, V), np.float64),
        np.empty((1, 2 * V), np.float32)[:, ::2],
    ],
)
def test_a_result_that_cannot_be_written_is_refused_before_anything_runs(model: Model, out: np.ndarray) -> None:
    cache = model.new_cache()
    with pytest.raises(ToyllmError, match="out: expected"):
        model.forward([1], [0], [0], cache, out=out)
    assert cache.length() == 0


def test_two_sequences_decoded_together_give_each_bit_for_bit_what_it_gives_alone(model: Model) -> None:
    a, b = IDS[:20], IDS[20:33]
    cache = model.new_cache(sequences=2)
    found: dict[int, list[np.ndarray]] = {0: [], 1: []}
    prompts = ([*a[:7], *b[:3]], [*range(7), *range(3)], [0] * 7 + [1] * 3)
    for row, sequence in zip(model.forward(*prompts, cache, all_logits=True), prompts[2], strict=True):
        found[sequence].append(row)
    for step in range(13):
        batch = [(0, a, 7 + step)] * (7 + step < len(a)) + [(1, b, 3 + step)] * (3 + step < len(b))
        tokens, positions, sequences = [ids[at] for _, ids, at in batch], [at for _, _, at in batch], [s for s, _, _ in batch]
        rows = model.forward(tokens, positions, sequences, cache, all_logits=True)
        for row, sequence in zip(rows, sequences, strict=True):
            found[sequence].append(row)
    np.testing.assert_array_equal(found[0], alone(model, a))
    np.testing.assert_array_equal(found[1], alone(model, b))


def test_prompt_and_decode_of_three_sequences_share_a_pass(model: Model) -> None:
    """In an order that ends in a cell where a run of neighbours would."""
    a, b, c = IDS[:63], IDS[3:12], IDS[5:20]
    a = np.resize(a, 63)
    cache = model.new_cache(64, sequences=3)
    for sequence, ids in ((0, a[:62]), (2, c[:14])):
        model.forward(ids, np.arange(len(ids)), np.full(len(ids), sequence), cache)
    tokens, positions, sequences = [a[62], c[14], *b[:1]], [62, 14, 0], [0, 2, 1]
    rows = model.forward(tokens, positions, sequences, cache, all_logits=True)
    np.testing.assert_array_equal(rows[0], alone(model, a)[62])
    np.testing.assert_array_equal(rows[1], alone(model, c)[14])
    np.testing.assert_array_equal(rows[2], alone(model, b)[0])
    following = model.forward([b[1], c[0]], [1, 15], [1, 2], cache, all_logits=True)
    np.testing.assert_array_equal(following[0], alone(model, b)[1])
    np.testing.assert_array_equal(following[1], alone(model, np.append(c, c[0]))[15])


@pytest.mark.parametrize("chunk", [1, 2, 7, 39, 40, 1000])
def test_the_size_of_a_pass_changes_no_logits(model: Model, chunk: int) -> None:
    np.testing.assert_array_equal(toyllm.load(BASELINE, prefill_chunk=chunk).logits(IDS.tolist()), model.logits(IDS.tolist()))


def test_buffers_grow_with_the_first_long_prompt_and_stay(model: Model) -> None:
    fresh = toyllm.load(BASELINE)
    short, long = fresh.logits([1]), fresh.logits(IDS.tolist())
    buffers = fresh._buffers
    np.testing.assert_array_equal(fresh.logits([1]), short)
    np.testing.assert_array_equal(long, model.logits(IDS.tolist()))
    assert fresh._buffers is buffers


@pytest.mark.parametrize(
    ("tokens", "positions", "sequences", "message"),
    [
        ([], [], [], r"the same length of at least 1, found shapes \[0\], \[0\], \[0\]"),
        ([1, 2], [0], [0, 0], r"found shapes \[2\], \[1\], \[2\]"),
        ([1], [0], [], r"found shapes \[1\], \[1\], \[0\]"),
        ([[1]], [[0]], [[0]], r"found shapes \[1, 1\]"),
        ([V], [0], [0], rf"token id {V} \(number 1 of 1\): expected 0 to {V - 1}"),
        ([1, -1], [0, 1], [0, 0], r"token id -1 \(number 2 of 2\)"),
        ([1.7], [0], [0], "tokens: expected integers of 64 bits, found float64"),
        ([2**64], [0], [0], "tokens: expected integers of 64 bits, found object"),
        ([2**63], [0], [0], "token id -"),
        ([True], [0], [0], "tokens: expected integers of 64 bits, found bool"),
        (["1"], [0], [0], "tokens: expected integers of 64 bits, found <U1"),
        ([1], [0.0], [0], "positions: expected integers"),
        ([1], [0], [np.nan], "sequences: expected integers"),
        ([1], [P], [0], f"positions: expected 0 to {P - 1}, found {P} to {P}"),
        ([1], [-1], [0], f"positions: expected 0 to {P - 1}, found -1 to -1"),
        ([1, 2], [0, 2], [0, 0], "sequence 0: expected positions from 0 on"),
        ([1], [0], [-1], "sequences: expected a list of at least one integer, all from 0 on"),
    ],
)
def test_a_batch_that_does_not_fit_is_one_line_and_changes_nothing(
    model: Model, tokens: list[int], positions: list[int], sequences: list[int], message: str
) -> None:
    cache = model.new_cache()
    with pytest.raises(ToyllmError, match=message) as refused:
        model.forward(tokens, positions, sequences, cache)
    assert "\n" not in str(refused.value)
    assert cache.length() == 0


def test_a_full_cache_refuses_and_goes_on_as_if_never_asked(model: Model) -> None:
    cache = model.new_cache(3)
    model.forward(IDS[:2], [0, 1], [0, 0], cache)
    with pytest.raises(CacheFull, match="the KV cache is full: 2 more positions, 1 of 3 cells are free"):
        model.forward(IDS[2:4], [2, 3], [0, 0], cache)
    assert cache.length() == 2
    np.testing.assert_array_equal(model.forward(IDS[2:3], [2], [0], cache)[0], alone(model, IDS[:3])[2])


@pytest.mark.parametrize("ids", [[], [0] * (P + 1)])
def test_logits_take_what_the_model_has_positions_for(model: Model, ids: list[int]) -> None:
    with pytest.raises(ToyllmError, match=f"ids: expected 1 to {P}, found {len(ids)}"):
        model.logits(ids)
    assert model.logits([0] * P).shape == (P, V)


def test_watchers_see_every_pass_and_change_nothing(model: Model) -> None:
    seen: list[str] = []
    cache = model.new_cache()
    logits = model.forward(IDS, np.arange(40), np.zeros(40, int), cache, taps=lambda name, array: seen.append(name))
    assert seen[0] == "embed"
    assert seen[-1] == "logits"
    assert len(seen) == len(set(seen))
    np.testing.assert_array_equal(logits, alone(model, IDS)[-1:])


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_pass_without_tokens_is_refused(chunk: int) -> None:
    with pytest.raises(ToyllmError, match=f"--prefill-chunk {chunk}: expected at least 1"):
        toyllm.load(BASELINE, prefill_chunk=chunk)


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_that_the_process_does_not_have_are_refused(threads: int) -> None:
    with pytest.raises(ToyllmError, match=f"--threads {threads}: expected 1 to"):
        toyllm.load(BASELINE, threads=threads)


def test_an_unknown_backend_is_refused_with_those_there_are() -> None:
    with pytest.raises(ToyllmError, match=r"--backend sse: expected auto or one of .*numpy"):
        toyllm.load(BASELINE, backend="sse")


# How much context fits


@pytest.fixture
def free(model: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Say how many bytes are available beside the weights and the reserve."""
    weights = sum(path.stat().st_size for path in model.checkpoint.shards)

    def free(amount: int | None) -> None:
        monkeypatch.setattr(module, "available_memory", lambda: None if amount is None else amount + weights + RESERVE)

    return free


def test_a_context_beyond_the_models_is_refused(model: Model) -> None:
    for wanted in (0, -1, P + 1):
        with pytest.raises(ToyllmError, match=f"--context {wanted}: expected 1 to {P}, the positions this model knows"):
            model.context_for(wanted)


def test_the_context_is_the_models_where_it_fits_or_nobody_knows(model: Model, free: Callable[[int | None], None]) -> None:
    for amount in (None, 10**9):
        free(amount)
        assert [model.context_for(wanted) for wanted in (None, 1, 10, P)] == [P, 1, 10, P]


def test_a_context_that_does_not_fit_is_reduced_and_said_or_refused_if_asked_for(
    model: Model, free: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("toyllm"), "propagate", True)
    monkeypatch.setattr(model.family, "cache_bytes", lambda config, context, *others: 1000 * context)
    free(10_999)
    with caplog.at_level(logging.INFO, "toyllm"):
        assert model.context_for(None) == 10
    figures = "the KV cache takes 0.00 GB, 0.00 GB are free beside the weights"
    assert f"context reduced from {P} to 10: {figures}" in caplog.text
    assert model.context_for(10) == 10
    with pytest.raises(ToyllmError, match=f"--context 11: {figures}; try --context 10"):
        model.context_for(11)


def test_where_not_one_position_fits_there_is_no_context_to_try(model: Model, free: Callable[[int | None], None]) -> None:
    for amount in (0, -(10**12)):
        free(amount)
        for wanted in (None, 1, P):
            with pytest.raises(ToyllmError, match="no context fits in memory: the KV cache takes"):
                model.context_for(wanted)
