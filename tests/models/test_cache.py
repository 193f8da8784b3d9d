"""The KV cache: which cells a batch gets, what it refuses without changing, and where keys and values end up."""

import numpy as np
import pytest

from toyllm.kernels import attention
from toyllm.kernels.errors import ToyllmError
from toyllm.models import cache as module
from toyllm.models.cache import BLOCK, CacheFull, CausalCache

L, G, DH = 2, 3, 4


def start(cache: CausalCache, positions: list[int], sequences: list[int]) -> None:
    cache.start_forward(np.array(positions, np.int64), np.array(sequences, np.int64))


def visible(cache: CausalCache) -> list[list[int]]:
    """The cells that each token of the batch sees."""
    return [cache.cells[b:e].tolist() for b, e in zip(cache.begin, cache.end, strict=True)]


def test_a_block_is_what_attention_takes_it_for() -> None:
    assert module.BLOCK == attention.BLOCK


def test_a_query_sees_the_cells_of_its_own_sequence_up_to_its_own() -> None:
    cache = CausalCache(L, G, DH, 2, BLOCK)
    start(cache, [0, 0, 1, 2, 1], [0, 1, 0, 0, 1])
    assert visible(cache) == [[0], [BLOCK], [0, 1], [0, 1, 2], [BLOCK, BLOCK + 1]]
    start(cache, [2, 3], [1, 0])
    assert visible(cache) == [[BLOCK, BLOCK + 1, BLOCK + 2], [0, 1, 2, 3]]
    assert [cache.length(s) for s in (0, 1)] == [4, 3]
    assert [cache.next_position(s) for s in (0, 1)] == [4, 3]


def test_an_empty_sequence_may_start_at_any_position() -> None:
    cache = CausalCache(L, G, DH, 2, 8)
    assert cache.next_position() is None
    start(cache, [100, 7, 101], [1, 0, 1])
    assert visible(cache) == [[BLOCK], [0], [BLOCK, BLOCK + 1]]
    assert [cache.next_position(s) for s in (0, 1)] == [8, 102]
    start(cache, [8], [0])
    assert visible(cache) == [[0, 1]]


@pytest.mark.parametrize(
    ("positions", "sequences"),
    [
        ([4], [0]),  # a gap
        ([2], [0]),  # once more
        ([0], [0]),  # from the start
        ([3, 5], [0, 0]),  # a gap inside
        ([4, 3], [0, 0]),  # out of order
        ([3, 3], [0, 0]),  # twice
        ([0, 2], [1, 1]),  # a gap in a sequence that was empty
        ([3, 0], [0, 2]),  # no such sequence, behind one that fits
        ([3, 0], [0, -1]),
    ],
)
def test_a_batch_that_does_not_follow_is_refused_and_changes_nothing(positions: list[int], sequences: list[int]) -> None:
    cache = CausalCache(L, G, DH, 2, 8)
    start(cache, [0, 1, 2], [0, 0, 0])
    with pytest.raises(ToyllmError, match=r"^sequence -?\d: expected ") as refused:
        start(cache, positions, sequences)
    assert not isinstance(refused.value, CacheFull)
    assert [cache.length(s) for s in (0, 1)] == [3, 0]
    assert visible(cache) == [[0], [0, 1], [0, 1, 2]], "the last batch still stands"
    start(cache, [3, 50], [0, 1])


def test_a_full_sequence_refuses_the_whole_batch_and_changes_nothing() -> None:
    cache = CausalCache(L, G, DH, 2, 4)
    start(cache, [0, 1, 2], [1, 1, 1])
    with pytest.raises(CacheFull, match=r"^sequence 1: 5 positions do not fit a KV cache of 4$"):
        start(cache, [0, 3, 4], [0, 1, 1])
    assert [cache.length(s) for s in (0, 1)] == [0, 3]
    assert cache.next_position(0) is None
    start(cache, [9, 3], [0, 1])
    assert [cache.length(s) for s in (0, 1)] == [1, 4]


def test_capacity_counts_positions_stored_not_their_numbers() -> None:
    cache = CausalCache(L, G, DH, 1, 2)
    start(cache, [1000, 1001], [0, 0])
    with pytest.raises(CacheFull):
        start(cache, [1002], [0])


BATCHES = {
    "one token": [(0, 0)],
    "a prompt": [(0, i) for i in range(5)],
    "side by side": [(s, i) for i in range(3) for s in (0, 1, 2)],
    "one after the other": [(s, i) for s in (2, 0, 1) for i in range(3)],
    "a whole block and the first of the next": [(0, i) for i in range(BLOCK)] + [(1, 0)],
    "ends where a run would": [(0, BLOCK - 2), (2, 0), (1, 0)],  # cells 62, 128, 64: last − first + 1 = 3 tokens, yet no run
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_keys_and_values_are_stored_in_the_cells_that_their_sequence_reads(batch: list[tuple[int, int]]) -> None:
    cache = CausalCache(L, G, DH, 3, BLOCK)
    for sequence in range(3):  # what came before
        before = next(i for s, i in [*batch, (sequence, 0)] if s == sequence)
        if before:
            start(cache, list(range(before)), [sequence] * before)
    start(cache, [i for _, i in batch], [s for s, _ in batch])
    rng = np.random.default_rng(0)
    keys, values = rng.standard_normal((2, L, len(batch), G, DH), np.float32)
    for layer in range(L):
        cache.set_layer(layer)
        cache.put(keys[layer], values[layer])
    for layer in range(L):
        cache.set_layer(layer)
        own = cache.cells[cache.end - 1]
        np.testing.assert_array_equal(cache.keys[:, own], keys[layer].swapaxes(0, 1))
        np.testing.assert_array_equal(cache.values[:, own], values[layer].swapaxes(0, 1))


def test_sequences_never_share_a_block_and_bytes_are_counted() -> None:
    cache = CausalCache(L, G, DH, 3, BLOCK + 1)
    start(cache, [0, 0, 0], [0, 1, 2])
    assert (cache.begin % BLOCK == 0).all()
    assert cache.nbytes == 2 * L * G * DH * 4 * 3 * 2 * BLOCK
