"""Caches by tables: what each token of a batch sees, where a sequence can go on, and when there is no room."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toyllm.kernels import attention
from toyllm.models import cache as module
from toyllm.models.cache import (
    CacheFull,
)

reading = runpy.run_path(str(Path(__file__).parent / "cache_reading.py"))
causal, sliding, chunked, wrapper, forward, put, seen = (
    reading[name] for name in ("causal", "sliding", "chunked", "wrapper", "forward", "put", "seen")
)

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
