"""Caches by tables: what is stored where, what each token sees of it then, and what is refused without a change."""

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toyllm.kernels import attention
from toyllm.kernels.cells import load
from toyllm.kernels.errors import ToyllmError
from toyllm.models import cache as module
from toyllm.models.cache import (
    BLOCK,
    CacheConfig,
    CacheFull,
    CausalCache,
    ChunkedCache,
    EncoderCache,
    NotSupported,
    SlidingWindowCache,
    WrapperCache,
)

reading = runpy.run_path(str(Path(__file__).parent / "cache_reading.py"))
L, G, DH, MOVED = (reading[name] for name in ("L", "G", "DH", "MOVED"))
forward, put, rows, seen, shift = (reading[name] for name in ("forward", "put", "rows", "seen", "shift"))

SIZES: dict[str, Any] = {"layers": L, "kv_heads": G, "head_dim": DH, "max_sequences": 3, "capacity": 16, "max_batch": 16, "shift": shift}


def causal(**sizes: Any) -> CausalCache:
    return CausalCache(**SIZES | sizes)


def sliding(window: int, **sizes: Any) -> SlidingWindowCache:
    return SlidingWindowCache(**SIZES | {"window": window} | sizes)


def chunked(chunk: int, **sizes: Any) -> ChunkedCache:
    return ChunkedCache(**SIZES | {"chunk": chunk} | sizes)


def wrapper(window: int = 3, **sizes: Any) -> WrapperCache:
    return WrapperCache([sliding(window, **sizes), causal(**sizes)])


Step = tuple[list[int], list[int], list[list[int]]]  # positions, sequences, the numbers seen: 100 · sequence + position

# Each case: a cache, and what is done: batches with what their tokens see, or an operation
TABLES: dict[str, tuple[Callable[[], Any], list[Step | Callable[[Any], None]]]] = {
    "causal: those before, and itself": (
        causal,
        [
            ([0, 1, 2], [0, 0, 0], [[0], [0, 1], [0, 1, 2]]),
            ([3], [0], [[0, 1, 2, 3]]),
            ([4, 5], [0, 0], [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]),
        ],
    ),
    "causal: its own sequence only": (
        causal,
        [
            ([0, 0, 1, 1, 2], [0, 1, 0, 1, 1], [[0], [100], [0, 1], [100, 101], [100, 101, 102]]),
            ([2, 3], [0, 1], [[0, 1, 2], [100, 101, 102, 103]]),
        ],
    ),
    "causal: in any order": (causal, [([2, 0, 1], [0, 0, 0], [[0, 1, 2], [0], [0, 1]]), ([4, 3], [0, 0], [[0, 1, 2, 3, 4], [0, 1, 2, 3]])]),
    "causal: before what is stored": (causal, [([5, 6], [0, 0], [[5], [5, 6]]), ([2], [0], [[2]]), ([6], [0], [[2, 5, 6, 6]])]),
    "causal: gaps": (causal, [([3, 7], [0, 0], [[3], [3, 7]]), ([5], [0], [[3, 5]]), ([1000], [0], [[3, 5, 7, 1000]])]),
    "causal: any number is a sequence": (causal, [([0, 0], [70_000, 0], [[7_000_000], [0]]), ([1], [70_000], [[7_000_000, 7_000_001]])]),
    "causal: more than a sequence's share": (
        lambda: causal(max_sequences=2, capacity=2),
        [([0, 1, 2, 3], [5] * 4, [[500], [500, 501], [500, 501, 502], [500, 501, 502, 503]])],
    ),
    "window: as many in all": (
        lambda: sliding(3),
        [
            ([0, 1, 2, 3, 4], [0] * 5, [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]),
            ([5], [0], [[3, 4, 5]]),
            ([6, 7], [0, 0], [[4, 5, 6], [5, 6, 7]]),
        ],
    ),
    "window: of one": (lambda: sliding(1), [([0, 1], [0, 0], [[0], [1]]), ([2], [0], [[2]])]),
    "window: of positions, not of tokens": (
        lambda: sliding(3),
        [([0, 1, 4], [0, 0, 0], [[0], [0, 1], [4]]), ([5, 6], [0, 0], [[4, 5], [4, 5, 6]])],
    ),
    "window: of each sequence": (
        lambda: sliding(2),
        [
            ([0, 1, 2, 8, 9], [0, 0, 0, 1, 1], [[0], [0, 1], [1, 2], [108], [108, 109]]),
            ([3, 10], [0, 1], [[2, 3], [109, 110]]),
        ],
    ),
    "window: memory is not seen": (
        lambda: sliding(2, memory=5),
        [([0, 1, 2, 3], [0] * 4, [[0], [0, 1], [1, 2], [2, 3]]), ([4], [0], [[3, 4]])],
    ),
    "chunks: the query's own": (
        lambda: chunked(4),
        [
            ([0, 1, 2, 3, 4, 5], [0] * 6, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [4], [4, 5]]),
            ([6, 7, 8], [0] * 3, [[4, 5, 6], [4, 5, 6, 7], [8]]),
            ([2], [1], [[102]]),
        ],
    ),
    "chunks: of one": (lambda: chunked(1), [([0, 1], [0, 0], [[0], [1]])]),
    "causal: a prefix is shared, then each goes on": (
        causal,
        [
            ([0, 1, 2, 3], [0] * 4, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]),
            lambda cache: cache.copy_prefix(0, 1, 2),
            ([3, 4], [1, 0], [[0, 1, 103], [0, 1, 2, 3, 4]]),
            lambda cache: cache.copy_prefix(1, 0, 4),
            ([4], [0], [[0, 1, 4, 103]]),
        ],
    ),
    "causal: a copy of nothing is empty": (
        causal,
        [([0, 1], [1, 1], [[100], [100, 101]]), lambda cache: cache.copy_prefix(0, 1, 9), ([0], [1], [[100]])],
    ),
    "causal: a sequence copied to itself is cut": (
        causal,
        [([0, 1, 2], [0] * 3, [[0], [0, 1], [0, 1, 2]]), lambda cache: cache.copy_prefix(0, 0, 2), ([5], [0], [[0, 1, 5]])],
    ),
    "causal: the source may go": (
        causal,
        [
            ([0, 1], [0, 0], [[0], [0, 1]]),
            lambda cache: cache.copy_prefix(0, 1, 2),
            lambda cache: cache.remove(0, 0),
            ([2, 0], [1, 0], [[0, 1, 102], [0]]),
        ],
    ),
    "window: a prefix is shared": (
        lambda: sliding(3),
        [
            ([0, 1, 2, 3], [0] * 4, [[0], [0, 1], [0, 1, 2], [1, 2, 3]]),
            lambda cache: cache.copy_prefix(0, 1, 4),
            ([4, 4], [0, 1], [[2, 3, 4], [2, 3, 104]]),
            ([5, 5], [0, 1], [[3, 4, 5], [3, 104, 105]]),
        ],
    ),
    "causal: the end is removed": (
        lambda: causal(shift=None),
        [
            ([0, 1, 2, 3], [0] * 4, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]),
            lambda cache: cache.remove(0, 2),
            ([2], [0], [[0, 1, 2]]),
            lambda cache: cache.remove(0, 1, 3),
            ([9], [0], [[0, 9]]),
            lambda cache: cache.remove(0, 0, 1000),
            ([4], [0], [[4]]),
        ],
    ),
    "causal: what is removed from the middle moves the rest": (
        causal,
        [
            ([0, 1, 2, 3, 4], [0] * 5, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
            lambda cache: cache.remove(0, 1, 3),  # 3 and 4 are at 1 and 2 now
            ([1], [0], [[0, 1, 3]]),
            ([3], [0], [[0, 1, 3, 3, 4]]),
        ],
    ),
    "chunks: what moves changes its chunk": (
        lambda: chunked(4),
        [
            ([0, 1, 2, 3, 4, 5], [0] * 6, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [4], [4, 5]]),
            lambda cache: cache.remove(0, 1, 3),  # 3, 4, 5 are at 1, 2, 3
            ([3, 4], [0, 0], [[0, 3, 3, 4, 5], [4]]),
        ],
    ),
    "window: moved within it": (
        lambda: sliding(3),
        [
            ([0, 1, 2, 3], [0] * 4, [[0], [0, 1], [0, 1, 2], [1, 2, 3]]),
            lambda cache: cache.remove(0, 1, 2),  # 2 and 3 are at 1 and 2
            ([3], [0], [[2, 3, 3]]),
        ],
    ),
    "wrapper: begins with its first": (wrapper, [([0, 1, 2, 3], [0] * 4, [[0], [0, 1], [0, 1, 2], [1, 2, 3]]), ([4], [0], [[2, 3, 4]])]),
}


@pytest.mark.parametrize("case", TABLES)
def test_each_token_sees_what_it_should(case: str) -> None:
    make, steps = TABLES[case]
    cache = make()
    for step in steps:
        if callable(step):
            step(cache)
        else:
            assert forward(cache, step[0], step[1]) == step[2]


def test_a_block_is_what_attention_takes_it_for() -> None:
    assert module.BLOCK == attention.BLOCK


# ---- causality lifted -------------------------------------------------------------------------------------------------------

ALL = [[0, 1, 2, 3]] * 4
DOWN = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("make", "enabled", "except_", "expected"),
    [
        (causal, True, (), DOWN),
        (causal, False, (), ALL),
        (causal, True, (0, 2), [ALL[0], DOWN[1], ALL[2], DOWN[3]]),
        (causal, False, [1], [ALL[0], DOWN[1], ALL[2], ALL[3]]),
        (lambda: sliding(2), False, (), [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3], [2, 3]]),
        (lambda: chunked(2), False, (), [[0, 1], [0, 1], [2, 3], [2, 3]]),
        (lambda: chunked(2), True, (2,), [[0], [0, 1], [2, 3], [2, 3]]),
        (wrapper, False, (), [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3]]),
    ],
)
def test_causality_is_lifted_for_a_pass_only(make: Callable[[], Any], enabled: bool, except_: Any, expected: list[list[int]]) -> None:
    cache = make()
    cache.start_forward([0, 0, 1, 2, 3], [1, 0, 0, 0, 0])
    put(cache, [100, 0, 1, 2, 3])
    cache.set_causal(enabled, except_=[i + 1 for i in except_])
    assert seen(cache)[1:] == expected
    assert seen(cache)[0] == [100], "no other sequence"
    cache.set_causal()
    assert seen(cache)[1] == [0], "and back again"
    cache.set_causal(enabled, except_)
    assert forward(cache, [4, 5], [0, 0])[0][-1] == 4, "for one pass"


def test_both_members_of_a_wrapper_are_lifted() -> None:
    cache = wrapper(window=2)
    cache.start_forward([0, 1, 2], [0] * 3)
    put(cache, [0, 1, 2])
    cache.set_causal(False)
    assert [seen(cache, kind)[1] for kind in (0, 1)] == [[0, 1, 2], [0, 1, 2]]
    assert [seen(cache, kind)[2] for kind in (0, 1)] == [[1, 2], [0, 1, 2]]


# ---- where a sequence can go on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "yes", "no"),
    [
        (causal, range(99), ()),
        (lambda: chunked(2), range(99), ()),
        (lambda: sliding(3), (0, 9, 10, 11), (1, 2, 8, 12, 13)),  # 7 ... 10 are stored
        (lambda: sliding(3, memory=5), (0, 7, 8, 9, 10, 11), (1, 6, 12)),  # 5 ... 10
        (lambda: sliding(1), range(99), ()),
        (wrapper, (0, 9, 10, 11), (1, 2, 8, 12)),
    ],
)
def test_a_sequence_can_go_on_where_all_that_is_seen_is_stored(make: Callable[[], Any], yes: Any, no: Any) -> None:
    cache = make()
    for batch in ([0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10]):
        forward(cache, batch, [4] * len(batch))
    assert all(cache.can_resume(4, position) for position in yes)
    assert not any(cache.can_resume(4, position) for position in no)
    assert cache.can_resume(7, 0), "an empty one from the start"


def test_what_is_forgotten_depends_on_the_lowest_position_of_a_batch() -> None:
    cache = sliding(3, memory=4, max_sequences=2)
    forward(cache, [0, 1, 2, 3, 4, 5], [0] * 6)
    assert cache.positions(0).tolist() == [0, 1, 2, 3, 4, 5]
    forward(cache, [7, 6], [0, 0])
    assert cache.positions(0).tolist() == [3, 4, 5, 6, 7]
    forward(cache, [0], [1])
    assert cache.positions(0).tolist() == [3, 4, 5, 6, 7], "others keep theirs"
    assert (cache.length(0), cache.next_position(0), cache.next_position(9)) == (8, 8, None)


def test_others_forget_what_they_will_not_see_where_cells_run_short() -> None:
    cache = sliding(2, memory=3, max_sequences=2, max_batch=4)  # 10 cells
    forward(cache, list(range(6)), [0] * 6)
    forward(cache, list(range(4)), [1] * 4)
    assert [len(cache.positions(s)) for s in (0, 1)] == [6, 4]
    forward(cache, [0, 1], [2, 2])
    assert [cache.positions(s).tolist() for s in (0, 1, 2)] == [[4, 5], [2, 3], [0, 1]]
    with pytest.raises(CacheFull, match=r"^the KV cache is full: 7 more positions, 4 of 10 cells are free$"):
        forward(cache, list(range(2, 9)), [2] * 7)
    assert [cache.positions(s).tolist() for s in (0, 1, 2)] == [[4, 5], [2, 3], [0, 1]]


def test_so_many_sequences_and_so_large_batches_always_fit_a_window() -> None:
    cache, rng, at = sliding(3, memory=4, max_sequences=4, max_batch=7), np.random.default_rng(0), [0, 0, 0, 0]
    for _ in range(300):
        batch = rng.integers(0, 4, rng.integers(1, 8)).tolist()
        positions = [at[s] + batch[:t].count(s) for t, s in enumerate(batch)]
        numbers = forward(cache, positions, batch)
        assert [n[-1] % 100 if p < 100 else p for n, p in zip(numbers, positions, strict=True)] == positions or max(at) >= 100
        for s in batch:
            at[s] += 1


# ---- room -------------------------------------------------------------------------------------------------------------------


def test_a_full_cache_takes_nothing_of_a_batch() -> None:
    cache = causal(max_sequences=2, capacity=3)
    assert forward(cache, [0, 1, 0, 1], [0, 0, 1, 1])[-1] == [100, 101]
    before = cache.begin.copy(), cache.end.copy()
    with pytest.raises(CacheFull, match=r"^the KV cache is full: 3 more positions, 2 of 6 cells are free$"):
        cache.start_forward([2, 3, 2], [0, 0, 1])
    assert [cache.positions(s).tolist() for s in (0, 1)] == [[0, 1], [0, 1]]
    assert seen(cache) == [[0], [0, 1], [100], [100, 101]], "the last batch still stands"
    np.testing.assert_array_equal((cache.begin, cache.end), before)
    assert forward(cache, [2, 2], [0, 1]) == [[0, 1, 2], [100, 101, 102]]


def test_room_in_pieces_is_room() -> None:
    cache = causal(max_sequences=2, capacity=6)
    for p in range(6):
        forward(cache, [p, p], [0, 1])
    cache.remove(0, 0)
    for p in range(5, -1, -2):
        cache.remove(1, p, p + 1)
    assert forward(cache, list(range(9)), [7] * 9)[-1] == list(range(700, 709))
    with pytest.raises(CacheFull):
        forward(cache, [9], [7])


def test_a_shared_cell_is_taken_once_and_free_when_nobody_holds_it() -> None:
    cache = causal(max_sequences=1, capacity=4)
    forward(cache, [0, 1, 2], [0] * 3)
    for target in (1, 2, 3):
        cache.copy_prefix(0, target, 3)
    forward(cache, [3], [2])
    with pytest.raises(CacheFull):
        cache.start_forward([3], [0])
    for sequence in (0, 1, 3):
        cache.remove(sequence, 0)
        with pytest.raises(CacheFull):
            cache.start_forward([0], [9])
    cache.remove(2, 1)
    assert forward(cache, [0, 1, 2], [9] * 3)[-1] == [900, 901, 902]


def test_a_window_frees_shared_cells_once() -> None:
    cache = sliding(1, max_sequences=2, max_batch=4)  # 6 cells
    forward(cache, [0, 1, 2, 3], [0] * 4)
    cache.copy_prefix(0, 1, 4)
    assert forward(cache, [4, 4, 5, 5, 6, 6], [0, 1] * 3)[-1] == [106]


# ---- removal ----------------------------------------------------------------------------------------------------------------


def test_what_moves_is_shifted_in_every_layer_and_values_are_not() -> None:
    cache = causal()
    forward(cache, list(range(6)), [0] * 6)
    cache.remove(0, 1, 3)
    cache.start_forward([4], [0])
    put(cache, [4])
    for layer in range(L):
        cache.set_layer(layer)
        cells = cache.cells[cache.begin[0] : cache.end[0]]
        moved = [0, -2, -2, -2, 0]
        np.testing.assert_array_equal(cache.keys[:, cells].swapaxes(0, 1), rows([0, 3, 4, 5, 4], layer, moved))
        np.testing.assert_array_equal(cache.values[:, cells].swapaxes(0, 1), -rows([0, 3, 4, 5, 4], layer))
    assert cache.positions(0).tolist() == [0, 1, 2, 3, 4]


def refuse(layer: int, key: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    if layer:
        raise ToyllmError("it cannot be turned")
    return key + 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: causal(shift=None), NotSupported, "remove: positions of sequence 0 behind those removed would have to move"),
        (lambda: causal(shift=refuse), ToyllmError, "it cannot be turned"),
        (lambda: causal(shift=lambda layer, key, offsets: key[:-1]), ToyllmError, r"shift of layer 0: expected \[3, 2, 3\]"),
        (lambda: WrapperCache([sliding(9), causal(shift=None)]), NotSupported, "this cache has no shift"),
        (lambda: WrapperCache([causal(shift=None), sliding(9)]), NotSupported, "this cache has no shift"),
    ],
)
def test_a_removal_that_is_refused_changes_nothing(make: Callable[[], Any], error: type[ToyllmError], message: str) -> None:
    cache = make()
    forward(cache, list(range(6)), [0] * 6)
    kept = copy.deepcopy(cache)
    with pytest.raises(error, match=message):
        cache.remove(0, 1, 3)
    for kind in range(len(getattr(cache, "caches", "1"))):
        assert seen(cache, kind) == seen(kept, kind)
    assert forward(cache, [6], [0]) == [[0, 1, 2, 3, 4, 5, 6]]


def test_what_is_shared_cannot_move_but_can_be_removed() -> None:
    cache = causal()
    forward(cache, [0, 1, 2, 3], [0] * 4)
    cache.copy_prefix(0, 1, 3)
    with pytest.raises(NotSupported, match="and another sequence shares them"):
        cache.remove(0, 0, 1)
    with pytest.raises(NotSupported):
        cache.remove(1, 1, 2)
    cache.remove(0, 1, 3)  # only 3 moves, which is its own
    assert cache.positions(0).tolist() == [0, 1]
    assert forward(cache, [3], [1]) == [[0, 1, 2, 103]]
    cache.remove(0, 0)
    cache.remove(1, 0, 1)
    assert cache.positions(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("begin", "end"), [(0, 0), (3, 3), (9, 12), (9, None), (7, 7)])
def test_to_remove_nothing_changes_nothing(begin: int, end: int | None) -> None:
    cache = causal(shift=None)
    forward(cache, [0, 1, 2, 3], [0] * 4)
    cache.remove(0, begin, end)
    cache.remove(5, 0)
    assert cache.positions(0).tolist() == [0, 1, 2, 3]


def test_a_gap_removed_moves_what_is_behind_it() -> None:
    cache = causal()
    forward(cache, [0, 10, 11], [0] * 3)
    cache.remove(0, 4, 9)
    assert cache.positions(0).tolist() == [0, 5, 6]


# ---- what get returns -------------------------------------------------------------------------------------------------------


def test_history_is_padded_and_values_turned_as_configured() -> None:
    cache, plain = causal(), causal()
    cache.set_config(CacheConfig(padding=8, permuted_v=True, mask_dtype=np.float32, mask_batch_padding=4))
    forward(plain, [0, 1, 2], [0] * 3)
    cache.start_forward([0, 1, 2], [0] * 3)
    put(cache, [0, 1, 2])
    (key, value, mask), (plain_key, plain_value, plain_mask) = cache.get(), plain.get()
    assert (key.shape, value.shape, mask.shape) == ((8, G, DH), (G, DH, 8), (4, 8))
    assert (key.dtype, value.dtype, mask.dtype) == (np.float32,) * 3
    np.testing.assert_array_equal(key[:3], plain_key)
    np.testing.assert_array_equal(value.transpose(2, 0, 1)[:3], plain_value)
    np.testing.assert_array_equal(mask[:3, :3], np.where(plain_mask, 0, -np.inf))
    assert (mask[3:] == -np.inf).all()
    assert (mask[:, 3:] == -np.inf).all()
    assert not key[3:].any()


def test_a_configuration_comes_before_the_first_pass() -> None:
    for cache in (causal(), wrapper(), EncoderCache(L, G, DH)):
        cache.set_config(CacheConfig(padding=4))
        cache.set_config(CacheConfig(padding=2))
        cache.start_forward([0], [0])
        with pytest.raises(NotSupported, match="set_config"):
            cache.set_config(CacheConfig())
    cache = wrapper()
    cache.caches[1].start_forward([0], [0])
    with pytest.raises(NotSupported):
        cache.set_config(CacheConfig(padding=4))
    cache.caches[0].start_forward([0], [0])
    assert len(cache.caches[0].get()[0]) == 1, "the other member has not changed"


@pytest.mark.parametrize("make", [causal, lambda: sliding(3), lambda: chunked(8), wrapper])
def test_a_reserved_pass_has_the_largest_sizes_and_leaves_nothing(make: Callable[[], Any]) -> None:
    cache = make()
    forward(cache, [0, 1], [0, 0])
    cache.start_forward(list(range(500)), [1] * 500, reserve=True)
    cells = 3 * 3 + 16 if isinstance(cache, SlidingWindowCache | WrapperCache) else 3 * 16
    put(cache, list(range(500)))
    if isinstance(cache, WrapperCache):
        cache.set_layer_type(0)
    key, value, mask = cache.get()
    assert (key.shape, value.shape, mask.shape) == ((cells, G, DH), (cells, G, DH), (500, cells))
    with pytest.raises(ToyllmError):
        cache.put(rows([1], 0), rows([1], 0))
    cache.set_causal(False)
    assert [len(cache.positions(s)) for s in (0, 1)] == [2, 0]
    assert forward(cache, [2], [0]) == [[0, 1, 2]]


# ---- the encoder's ----------------------------------------------------------------------------------------------------------


def test_an_encoder_holds_an_input_until_its_position_is_removed() -> None:
    cache = EncoderCache(L, G, DH, 1, 16, 4)
    assert not cache.cached
    cache.start_forward([3], [0])
    put_input(cache, 7)
    assert cache.cached
    assert cache.nbytes == 2 * L * 7 * G * DH * 4
    for p in (4, 5):
        cache.start_forward([p], [0])
        for layer in range(L):
            cache.set_layer(layer)
            key, value, mask = cache.get()
            np.testing.assert_array_equal(key, rows(range(7), layer))
            np.testing.assert_array_equal(value, -rows(range(7), layer))
            assert mask is None
    assert cache.can_resume(0, 5)
    cache.remove(0, 4)
    cache.remove(0, 0, 3)
    assert cache.cached, "it moved to 0"
    cache.remove(0, 0, 1)
    assert not cache.cached
    with pytest.raises(ToyllmError, match="holds no input"):
        cache.get()
    assert cache.nbytes == 0


def put_input(cache: EncoderCache, n: int) -> None:
    for layer in range(L):
        cache.set_layer(layer)
        cache.put(rows(range(n), layer), -rows(range(n), layer))


def test_an_encoder_has_one_sequence() -> None:
    with pytest.raises(NotSupported, match="holds one sequence"):
        EncoderCache(L, G, DH, 2)
    cache = EncoderCache(L, G, DH)
    with pytest.raises(NotSupported):
        cache.start_forward([0, 0], [0, 1])
    with pytest.raises(NotSupported):
        cache.copy_prefix(0, 1, 1)
    cache.start_forward([0], [3])
    put_input(cache, 2)
    with pytest.raises(NotSupported):
        cache.start_forward([1], [4])
    cache.start_forward([1], [3])
    assert cache.cached


def test_a_reserved_pass_leaves_an_encoder_as_it_is() -> None:
    cache = EncoderCache(L, G, DH, 1, 9)
    cache.start_forward([0], [0], reserve=True)
    put_input(cache, 4)
    assert not cache.cached
    assert cache.get()[0].shape == (9, G, DH)


# ---- several as one ---------------------------------------------------------------------------------------------------------


def test_layers_and_their_types_are_chosen_in_any_order() -> None:
    cache = wrapper()
    cache.start_forward([0], [0])
    for kind, layer in ((0, 0), (1, 0), (0, 1), (1, 1)):
        if layer:
            cache.set_layer(layer)
            cache.set_layer_type(kind)
        else:
            cache.set_layer_type(kind)
            cache.set_layer(layer)
        cache.put(rows([10 * kind], layer), rows([10 * kind], layer))
    assert [int(member._keys[layer, 0, member.cells[member.begin[0]], 0]) for member in cache.caches for layer in range(L)] == [
        0,
        0,
        10,
        10,
    ]
    cache.start_forward([1], [0])
    assert cache.chosen is cache.caches[0]


def test_a_layer_that_the_chosen_member_lacks_is_refused() -> None:
    cache = WrapperCache([causal(layers=1), causal(layers=4)])
    cache.start_forward([0], [0])
    cache.set_layer(3)
    for call in (cache.get, lambda: cache.put(rows([0], 0), rows([0], 0))):
        with pytest.raises(ToyllmError, match="layer 3: the chosen cache has 1"):
            call()
    cache.set_layer_type(1)
    cache.put(rows([0], 0), rows([0], 0))
    for i in (4, -1):
        with pytest.raises(ToyllmError, match=f"layer {i}: expected 0 to 3"):
            cache.set_layer(i)
    with pytest.raises(ToyllmError, match="layer type 2: expected 0 to 1"):
        cache.set_layer_type(2)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_where_one_member_cannot_start_none_has(order: tuple[int, int]) -> None:
    pair = (sliding(3, max_sequences=1), causal(max_sequences=1, capacity=4))
    cache = WrapperCache([pair[i] for i in order])
    forward(cache, [0, 1, 2], [0] * 3)
    with pytest.raises(CacheFull):
        cache.start_forward([3, 4], [0, 0])
    assert [member.positions(0).tolist() for member in cache.caches] == [[0, 1, 2]] * 2
    forward(cache, [3], [0])
    assert sorted(member.positions(0).tolist() for member in cache.caches) == [[0, 1, 2, 3], [1, 2, 3]]


def test_an_encoder_beside_another_refuses_copies_for_both() -> None:
    cache = WrapperCache([EncoderCache(L, G, DH), causal(max_sequences=1)])
    cache.start_forward([0, 1], [0, 0])
    put_input(cache, 5)
    cache.set_layer_type(1)
    put_input(cache, 2)
    assert cache.caches[0].cached
    for call in (
        lambda: cache.copy_prefix(0, 1, 1),
        lambda: cache.start_forward([0], [1]),
        lambda: cache.state(0),
        lambda: cache.restore(0, []),
    ):
        with pytest.raises(NotSupported):
            call()
    assert (cache.positions(0).tolist(), cache.length(), cache.next_position(), cache.length(1)) == ([0, 1], 2, 2, 0)
    cache.remove(0, 0)
    assert not cache.caches[0].cached


# ---- saved and restored -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8"])
@pytest.mark.parametrize("make", [causal, lambda **sizes: sliding(3, **sizes), lambda **sizes: chunked(4, **sizes)])
def test_what_is_saved_is_restored_to_the_bit(make: Callable[..., CausalCache], dtype: str) -> None:
    cache, other = make(dtype=dtype), make(dtype=dtype)
    rng = np.random.default_rng(0)
    for batch in (range(5), range(5, 9)):
        cache.start_forward(list(batch), [2] * len(batch))
        for layer in range(L):
            cache.set_layer(layer)
            cache.put(*rng.standard_normal((2, len(batch), G, DH), np.float32))
    saved = cache.state(2)
    assert saved[1].shape == (L, G, len(cache.positions(2)), cache.keys.shape[2])
    other.start_forward([7, 8, 9], [5] * 3)  # something else
    other.restore(5, *saved)
    for array, again in zip(saved, other.state(5), strict=True):
        np.testing.assert_array_equal(array, again)
    for which, sequence in ((cache, 2), (other, 5)):
        which.start_forward([9], [sequence])
    assert [reading["block_places"](which) for which in (cache, other)] == [reading["block_places"](cache)] * 2
    for array, again in zip(cache.state(2), other.state(5), strict=True):
        np.testing.assert_array_equal(
            array[..., :-1] if array.ndim == 1 else array[:, :, :-1], again[..., :-1] if array.ndim == 1 else again[:, :, :-1]
        )


def test_several_are_restored_all_or_none() -> None:
    cache, other = wrapper(), WrapperCache([sliding(3), causal(max_sequences=1, capacity=4)])
    forward(cache, list(range(6)), [0] * 6)
    saved = cache.state(0)
    forward(other, [0], [1])
    with pytest.raises(CacheFull, match="6 positions to restore, 3 of 4 cells are free"):
        other.restore(0, saved)
    with pytest.raises(ToyllmError, match="expected one a member, 2, found 1"):
        other.restore(0, saved[:1])
    assert [len(member.positions(0)) for member in other.caches] == [0, 0]
    whole = wrapper()
    whole.restore(9, saved)
    assert forward(whole, [6], [9]) == [[4, 5, 906]]


def bad(positions: Any = (0, 1), keys: Any = None, values: Any = None) -> tuple[Any, Any, Any]:
    plain = np.zeros((L, G, 2, DH), np.float32)
    return positions, plain if keys is None else keys, plain if values is None else values


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (bad(positions=[1, 0]), "positions: expected them in order"),
        (bad(positions=[-1, 0]), "positions: expected a list of at least one integer, all from 0 on"),
        (bad(positions=[0.5, 1]), "positions: expected"),
        (bad(positions=[[0, 1]]), "positions: expected"),
        (bad(positions=[0, 2**63]), "positions: expected"),
        (bad(positions=[0]), r"keys: expected float32 \[2, 2, 1, 3\], found float32 \[2, 2, 2, 3\]"),
        (bad(keys=np.zeros((L, G, 2, DH))), "keys: expected float32"),
        (bad(values=np.zeros((L, G, 2, DH + 1), np.float32)), "values: expected"),
        (bad(values=[0]), "values: expected .* found list"),
    ],
)
def test_a_state_that_is_none_is_refused_and_changes_nothing(state: tuple[Any, Any, Any], message: str) -> None:
    cache = causal()
    forward(cache, [0, 1, 2], [0] * 3)
    with pytest.raises(ToyllmError, match=message) as refused:
        cache.restore(0, *state)
    assert "\n" not in str(refused.value)
    assert seen(cache) == [[0], [0, 1], [0, 1, 2]]


def test_nothing_saved_is_nothing_restored() -> None:
    cache = causal()
    forward(cache, [0, 1], [3, 3])
    cache.restore(3, *cache.state(1))
    assert cache.positions(3).tolist() == []
    assert forward(cache, [0], [3]) == [[300]]


# ---- arguments --------------------------------------------------------------------------------------------------------------


def nothing(cache: CausalCache) -> None:
    """A call that is right."""


BAD: dict[str, tuple[Callable[[CausalCache], Any], str]] = {
    "no tokens": (lambda c: c.start_forward([], []), "positions: expected a list of at least one integer, all from 0 on"),
    "other numbers of them": (lambda c: c.start_forward([1, 2], [0]), "positions and sequences: expected as many of both, found 2 and 1"),
    "negative positions": (lambda c: c.start_forward([-1], [0]), "positions: expected"),
    "negative sequences": (lambda c: c.start_forward([1], [-1]), "sequences: expected"),
    "fractions": (lambda c: c.start_forward([1.5], [0]), "positions: expected"),
    "text": (lambda c: c.start_forward("ab", [0]), "positions: expected"),
    "ragged": (lambda c: c.start_forward([[1], [1, 2]], [0]), "positions: expected"),
    "nothing at all": (lambda c: c.start_forward(None, None), "positions: expected"),
    "too far": (lambda c: c.start_forward([2**64], [0]), "positions: expected"),
    "far": (lambda c: c.start_forward([2**63 - 1], [0]), "positions: expected"),
    "a batch of another size": (
        lambda c: c.put(rows([1], 0), rows([1], 0)),
        r"key: expected \[3, 2, 3\], a row a token of the batch, found \[1, 2, 3\]",
    ),
    "values of another size": (lambda c: c.put(rows([1] * 3, 0), rows([1], 0)), "value: expected"),
    "keys of other heads": (lambda c: c.put(np.zeros((3, G + 1, DH), np.float32), rows([1] * 3, 0)), "key: expected"),
    "keys that are none": (lambda c: c.put("keys", rows([1] * 3, 0)), "key: expected an array of numbers"),
    "no such layer": (lambda c: c.set_layer(L), f"layer {L}: expected 0 to {L - 1}"),
    "a layer from behind": (lambda c: c.set_layer(-1), "layer -1: expected 0 to 1"),
    "outside the batch": (lambda c: c.set_causal(False, [3]), "except_ 3: expected indices of the batch, 0 to 2"),
    "before the batch": (lambda c: c.set_causal(True, [-1]), "except_ -1: expected an integer from 0 on"),
    "resume before": (lambda c: c.can_resume(0, -1), "position -1: expected an integer from 0 on"),
    "resume nobody": (lambda c: c.can_resume(-3, 1), "sequence -3: expected an integer from 0 on"),
    "copy to nobody": (lambda c: c.copy_prefix(0, -1, 1), "sequence -1: expected an integer from 0 on"),
    "copy less than nothing": (lambda c: c.copy_prefix(0, 1, -1), "length -1: expected an integer from 0 on"),
    "remove before": (lambda c: c.remove(0, -1), "begin -1: expected an integer from 0 on"),
    "remove backwards": (lambda c: c.remove(0, 3, 2), "end 2: expected an integer from 3 on"),
    "no configuration": (lambda c: CacheConfig(padding=0), "padding 0: expected an integer from 1 on"),
    "no mask": (lambda c: CacheConfig(mask_dtype=np.int32), "mask_dtype <class 'numpy.int32'>: expected bool or a float dtype"),
    "no dtype": (lambda c: CacheConfig(mask_dtype="what"), "mask_dtype 'what': expected bool or a float dtype"),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments_that_make_no_sense_are_one_line_and_change_nothing(case: str) -> None:
    call, message = BAD[case]
    cache = causal()
    forward(cache, [0, 1, 2], [0] * 3)
    with pytest.raises(ToyllmError, match=message) as refused:
        call(cache)
    assert "\n" not in str(refused.value)
    assert seen(cache) == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: causal(layers=0), "layers 0: expected an integer from 1 on"),
        (lambda: causal(capacity=2.5), "capacity 2.5: expected an integer from 1 on"),
        (lambda: causal(max_batch=True), "max_batch True: expected"),
        (lambda: causal(dtype="f16"), "f16: expected"),
        (lambda: sliding(0), "window 0: expected an integer from 1 on"),
        (lambda: sliding(5, memory=4), "memory 4: expected an integer from 5 on"),
        (lambda: chunked(0), "chunk 0: expected an integer from 1 on"),
        (lambda: EncoderCache(L, G, DH, dtype="f16"), "f16: expected"),
        (lambda: EncoderCache(0, G, DH), "layers 0: expected"),
        (lambda: WrapperCache([]), "expected at least one cache"),
    ],
)
def test_sizes_that_are_none_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ToyllmError, match=message):
        make()


# ---- storage, and what attention reads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "cell"), [("f32", 4 * DH), ("bf16", 2 * DH), ("q8", DH + 2)])
def test_bytes_are_those_of_the_cells(dtype: str, cell: int) -> None:
    nbytes = 2 * L * G * cell
    assert causal(dtype=dtype).nbytes == nbytes * 3 * 16
    assert chunked(4, dtype=dtype).nbytes == nbytes * 3 * 16
    assert sliding(4, dtype=dtype).nbytes == nbytes * (3 * 4 + 16)
    assert sliding(4, memory=9, dtype=dtype).nbytes == nbytes * (3 * 9 + 16)
    assert wrapper(4, dtype=dtype).nbytes == nbytes * (3 * 4 + 16 + 3 * 16)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8"])
def test_poison_shows_wherever_nothing_was_written(dtype: str) -> None:
    for poison in (False, True):
        cache = causal(dtype=dtype, poison=poison)
        cache._keys[...] = cache._keys if poison else np.zeros_like(cache._keys)
        cache.start_forward([0, 1], [0, 0])
        assert np.isnan(load(cache.keys, DH)).all() == poison
        assert np.isnan(cache.get()[0]).all() == poison
        cache.put(np.ones((2, G, DH), np.float32), np.ones((2, G, DH), np.float32))
        assert np.isfinite(cache.get()[0]).all()


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8"])
def test_what_is_read_is_what_its_dtype_keeps(dtype: str) -> None:
    from toyllm.kernels.cells import store

    cache = causal(dtype=dtype)
    given = np.random.default_rng(0).standard_normal((2, 5, G, DH)).astype(np.float32)
    cache.start_forward([4, 2, 0, 1, 3], [0] * 5)
    cache.put(*given)
    key, value, mask = cache.get()
    order = mask.sum(1).argsort()  # the first sees one
    cells = np.array([np.flatnonzero(mask[order[i]] & ~(mask[order[i - 1]] if i else np.zeros(5, bool)))[0] for i in range(5)])
    np.testing.assert_array_equal(key[cells], load(store(given[0], dtype), DH)[order])
    np.testing.assert_array_equal(value[cells], load(store(given[1], dtype), DH)[order])


@pytest.mark.parametrize("window", [None, 1, 5, 64, 70])
@pytest.mark.parametrize("pass_", [1, 3, 64])
def test_blocks_are_cut_at_the_same_positions_whatever_is_kept_and_however_it_came(window: int | None, pass_: int) -> None:
    sizes = {"max_sequences": 2, "capacity": 400, "max_batch": 128}
    cache = sliding(window, **sizes) if window else causal(**sizes)
    for begin in range(0, 300, pass_):
        at = list(range(begin, begin + pass_)) * 2
        sequences = [0] * pass_ + [5] * pass_
        cache.start_forward([900 + p for p in at], sequences)  # they need not begin at 0
        assert reading["block_places"](cache) == [max(0, p + 1 - (window or 1000)) % BLOCK for p in at]
    assert len(cache.cells) <= 4 * 512, "rows of a window do not grow"


def test_one_sequence_keeps_its_cells_together_and_a_window_mostly() -> None:
    cache = causal(max_sequences=1, capacity=300)
    for p in range(300):
        cache.start_forward([p], [0])
        assert cache.adjoining
    cache, together = sliding(8, max_sequences=1, max_batch=56), 0
    for p in range(1000):
        cache.start_forward([p], [0])
        together += cache.adjoining
    assert 850 < together < 1000


def test_sequences_that_go_on_together_keep_their_cells_together() -> None:
    cache = causal(max_sequences=4, capacity=50)
    for p in range(50):
        cache.start_forward([p] * 4, [3, 9, 1, 0])
        assert cache.adjoining
    cache.remove(9, 0)
    for p in range(50):
        cache.start_forward([p], [77])
        assert cache.adjoining
    cache, together = sliding(8, max_sequences=4, max_batch=32), 0
    for p in range(1000):
        cache.start_forward([p] * 4, [3, 9, 1, 0])
        together += cache.adjoining
    assert together > 500


def test_a_cache_can_be_copied() -> None:
    """To go on in two ways from one prompt."""
    cache = wrapper()
    forward(cache, [0, 1, 2], [0] * 3)
    other = copy.deepcopy(cache)
    assert forward(cache, [3], [0]) == [[1, 2, 3]]
    assert forward(other, [4], [0]) == [[2, 4]]
    assert forward(cache, [4], [0]) == [[2, 3, 4]]


def test_room_is_checked_for_passes_to_come_and_nothing_changes() -> None:
    cache = WrapperCache([sliding(3, max_sequences=1, max_batch=4), causal(max_sequences=1, capacity=20)])
    forward(cache, [0, 1], [0, 0])
    cache.check_room(range(2, 20), [0] * 18, 4)
    with pytest.raises(CacheFull):
        cache.check_room(range(2, 21), [0] * 19, 4)
    with pytest.raises(CacheFull):
        cache.check_room(range(2, 20), [0] * 18, 10)  # more at once than the window was made for
    assert forward(cache, [2], [0]) == [[0, 1, 2]]
