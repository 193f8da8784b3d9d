"""Caches of sliding layers, alone and beside whole ones, against a model that is a list of positions a sequence."""

import copy
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toyllm.kernels.dtypes import BF16, widen
from toyllm.kernels.errors import ToyllmError
from toyllm.models.cache import BLOCK, CacheFull, CausalCache, SlidingWindowCache, WrapperCache, whole_blocks

L, G, DH = 2, 2, 3
SEQUENCES = 2

Batch = tuple[list[int], list[int]]  # positions, sequences


class Plain:
    """What a cache should know: each sequence's positions, with the number that each token's key is made of."""

    def __init__(self, capacity: int, max_batch: int) -> None:
        self.capacity, self.max_batch = capacity, max_batch
        self.seen: list[list[tuple[int, int]]] = [[] for _ in range(SEQUENCES)]  # (position, number)
        self.tokens = 0

    def refuses(self, batch: Batch) -> type[ToyllmError] | None:
        """The error that a batch deserves, if any."""
        after = [[position for position, _ in seen] for seen in self.seen]
        for position, sequence in zip(*batch, strict=True):
            if after[sequence] and position != after[sequence][-1] + 1:
                return ToyllmError
            after[sequence].append(position)
        if any(len(positions) > self.capacity for positions in after):
            return CacheFull
        return None

    def store(self, batch: Batch) -> list[list[int]]:
        """The numbers that each token of the batch sees, in position order, were the window endless."""
        visible = []
        for position, sequence in zip(*batch, strict=True):
            self.tokens += 1
            self.seen[sequence].append((position, self.tokens))
            visible.append([number for _, number in self.seen[sequence]])
        return visible


def keys_of(numbers: Any, layer: int) -> np.ndarray:
    """f32 [n, G, DH] that tell number, layer, head and element; bf16 rounds them."""
    offsets = np.arange(G * DH, dtype=np.float32).reshape(G, DH) / 64
    return np.asarray(numbers, np.float32)[:, None, None] * (layer + 1) + offsets


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return values if dtype == "f32" else values.astype(ml_dtypes.bfloat16).astype(np.float32)


def start(cache: Any, batch: Batch) -> None:
    cache.start_forward(np.array(batch[0], np.int64), np.array(batch[1], np.int64))


def check_batch(cache: Any, dtype: str, visible: list[list[int]], windows: list[int | None]) -> None:
    """Store the batch's keys in every layer; then each token must find in its cells the keys that it should see, and no other."""
    own = [numbers[-1] for numbers in visible]
    for layer in range(len(windows)):
        cache.set_layer(layer)
        cache.put(keys_of(own, layer), -keys_of(own, layer))
    for layer, window in enumerate(windows):
        cache.set_layer(layer)
        for t, numbers in enumerate(visible):
            cells = cache.cells[cache.begin[t] : cache.end[t]]
            expected = rounded(keys_of(numbers[-window:] if window else numbers, layer), dtype).swapaxes(0, 1)
            np.testing.assert_array_equal(widen(cache.keys[:, cells]), expected)
            np.testing.assert_array_equal(widen(cache.values[:, cells]), -expected)
            first = len(numbers) - len(cells)  # the index in its sequence of the first position seen
            assert cache.begin[t] % BLOCK == first % BLOCK, "blocks of attention are cut at the same positions whatever is kept"
            if cache.adjoining:
                assert (np.diff(cells) == 1).all()


@st.composite
def batches(draw: st.DrawFn, max_batch: int) -> list[tuple[str, Any]]:
    """Steps: a batch that follows, made when it is known what came before; one that may not; a sequence that steps back."""
    count = st.integers(1, max_batch)
    follow = st.tuples(
        st.just("follow"), st.lists(st.tuples(st.integers(0, SEQUENCES - 1), count, st.integers(0, 99)), min_size=1, max_size=3)
    )
    wild = st.tuples(
        st.just("wild"), st.lists(st.tuples(st.integers(0, 12), st.integers(0, SEQUENCES - 1)), min_size=1, max_size=max_batch)
    )
    back = st.tuples(st.just("back"), st.tuples(st.integers(0, SEQUENCES - 1), st.integers(0, 6)))
    return draw(st.lists(st.one_of(follow, follow, back, wild), min_size=1, max_size=25))


def following(plain: Plain, parts: list[tuple[int, int, int]], rng: np.random.Generator) -> Batch:
    """Each named sequence gets its number of tokens, from where it stands (an empty one: from the third number), all interleaved."""
    counts = {sequence: (n, p) for sequence, n, p in parts}
    nexts = {s: plain.seen[s][-1][0] + 1 if plain.seen[s] else p for s, (_, p) in counts.items()}
    order = rng.permutation([s for s, (n, _) in counts.items() for _ in range(n)]).tolist()
    positions = []
    for sequence in order:
        positions.append(nexts[sequence])
        nexts[sequence] += 1
    return positions, order


def state(cache: Any) -> tuple:
    return tuple((cache.length(s), cache.next_position(s)) for s in range(SEQUENCES))


KINDS = ["ring", "ring first", "ring last"]


def make(kind: str, capacity: int, window: int, max_batch: int, dtype: str) -> tuple[Any, list[int | None]]:
    """A poisoned cache of a kind, and the window of each of its layers."""
    ring = SlidingWindowCache(L, G, DH, SEQUENCES, capacity, window, max_batch, dtype, poison=True)
    if kind == "ring":
        return ring, [window] * L
    whole = CausalCache(1, G, DH, SEQUENCES, capacity, dtype, poison=True)
    if kind == "ring first":
        return WrapperCache((ring, whole), [(0, 0), (1, 0), (0, 1)]), [window, None, window]
    return WrapperCache((whole, ring), [(1, 0), (0, 0), (1, 1)]), [window, None, window]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_sees_the_last_positions_of_its_own_sequence(kind: str, data: st.DataObject) -> None:
    window, max_batch = data.draw(st.sampled_from([1, 2, 3, 3, 5, 70])), data.draw(st.integers(1, 9))
    capacity, dtype = data.draw(st.sampled_from([4, 30, 200])), data.draw(st.sampled_from(["f32", "bf16"]))
    (cache, windows), plain, rng = make(kind, capacity, window, max_batch, dtype), Plain(capacity, max_batch), np.random.default_rng(0)
    for what, step in data.draw(batches(max_batch)):
        if what == "back":
            sequence, by = step
            length = max(0, len(plain.seen[sequence]) - by)
            if cache.truncate(length, sequence):
                del plain.seen[sequence][length:]
            else:
                assert by >= 1
            assert state(cache)[sequence][0] == len(plain.seen[sequence])
            continue
        batch = following(plain, step, rng) if what == "follow" else ([p for p, _ in step], [s for _, s in step])
        expected, before = plain.refuses(batch), state(cache)
        if expected is None:
            start(cache, batch)
            check_batch(cache, dtype, plain.store(batch), windows)
            assert [cache.length(s) for s in range(SEQUENCES)] == [len(seen) for seen in plain.seen]
        else:
            with pytest.raises(expected):
                start(cache, batch)
            assert state(cache) == before


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("window", [1, 5, 64, 128])
def test_a_long_sequence_goes_round_the_ring_many_times(window: int, chunk: int) -> None:
    cache, plain = SlidingWindowCache(L, G, DH, 1, 10_000, window, chunk, poison=True), Plain(10_000, chunk)
    assert cache.keys.shape[1] == window + chunk - 1
    for first in range(40, 40 + 3 * (window + chunk), chunk):
        batch = list(range(first, first + chunk)), [0] * chunk
        start(cache, batch)
        check_batch(cache, "f32", plain.store(batch), [window] * L)


def test_cells_adjoin_but_where_the_ring_is_joined() -> None:
    cache = SlidingWindowCache(1, G, DH, 1, 100, window=4, max_batch=1)
    found = []
    for p in range(9):
        start(cache, ([p], [0]))
        found.append((cache.adjoining, cache.cells[cache.begin[0] : cache.end[0]].tolist()))
    cells = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 0]]
    assert found == [((np.diff(c) == 1).all(), c) for c in cells]


def test_a_ring_refuses_more_at_once_than_it_was_made_for_unless_it_holds_everything() -> None:
    cache = SlidingWindowCache(1, G, DH, 2, 100, window=4, max_batch=3)
    start(cache, ([0, 1, 0, 1, 2], [0, 0, 1, 1, 1]))  # as many as it was made for, of each sequence
    with pytest.raises(ToyllmError, match=r"^4 tokens of a sequence in one pass: expected at most 3, which the ring was made for$"):
        start(cache, ([2, 3, 4, 5], [0] * 4))
    assert [cache.length(s) for s in (0, 1)] == [2, 3]
    small = SlidingWindowCache(1, G, DH, 1, 6, window=4, max_batch=3)
    assert small.keys.shape[1] == 6
    start(small, (list(range(6)), [0] * 6))
    assert small.length() == 6


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_where_one_cache_refuses_none_changes(order: tuple[int, int]) -> None:
    members = (SlidingWindowCache(1, G, DH, 1, 100, window=4, max_batch=3), CausalCache(1, G, DH, 1, 8))
    cache = WrapperCache([members[i] for i in order], [(0, 0), (1, 0)])
    start(cache, ([5, 6, 7], [0] * 3))
    for positions in ([8, 9, 10, 11], [9], [7]):
        with pytest.raises(ToyllmError):
            start(cache, (positions, [0] * len(positions)))
    start(cache, ([8, 9, 10], [0] * 3))
    with pytest.raises(CacheFull):  # the ring has room for it
        start(cache, ([11, 12, 13], [0] * 3))
    assert [member.length() for member in members] == [6, 6]
    assert [member.next_position() for member in members] == [11, 11]


def test_stepping_back_twice_does_not_reach_what_was_overwritten() -> None:
    cache, plain = SlidingWindowCache(L, G, DH, 1, 100, window=3, max_batch=4), Plain(100, 4)  # a ring of 6
    for first in range(0, 20, 4):
        plain.store((list(range(first, first + 4)), [0] * 4))
        start(cache, (list(range(first, first + 4)), [0] * 4))
    assert not cache.can_resume(15)  # 13 lies where 19 does
    assert cache.truncate(18)
    assert not cache.can_resume(15)
    start(cache, ([18], [0]))
    assert not cache.can_resume(15)
    assert not cache.truncate(15)
    assert cache.truncate(16)
    assert cache.truncate(0)
    start(cache, ([50, 51, 52, 53], [0] * 4))
    assert cache.truncate(3)


def test_a_cache_can_be_copied() -> None:
    """To go on in two ways from one prompt."""
    cache, windows = make("ring first", 30, 3, 4, "f32")
    plain = Plain(30, 4)
    start(cache, ([0, 1, 2], [0] * 3))
    check_batch(cache, "f32", plain.store(([0, 1, 2], [0] * 3)), windows)
    other, plainly = copy.deepcopy(cache), copy.deepcopy(plain)
    for c, p in ((cache, plain), (other, plainly)):
        p.tokens += 10 * (c is other)
        start(c, ([3], [0]))
        check_batch(c, "f32", p.store(([3], [0])), windows)


def test_an_unknown_name_is_an_attribute_error() -> None:
    cache, _ = make("ring first", 30, 3, 4, "f32")
    with pytest.raises(AttributeError, match="nothing"):
        cache.nothing  # noqa: B018


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_storage_is_of_the_dtype_and_rounds_to_the_nearest(dtype: str) -> None:
    cache = SlidingWindowCache(1, 1, 4, 1, 10, 4, 2, dtype)
    start(cache, ([0, 1], [0, 0]))
    values = np.float32([[1 + 2**-8, 1 + 2**-7 + 2**-8, -3.14159, 1e-40], [65536.1, -np.inf, 3.4e38, 0.1]])[:, None]
    cache.put(values, values[::-1])
    assert cache.keys.dtype == (BF16 if dtype == "bf16" else np.float32)
    np.testing.assert_array_equal(widen(cache.keys[0, :2]), rounded(values, dtype)[:, 0])
    np.testing.assert_array_equal(widen(cache.values[0, :2]), rounded(values[::-1], dtype)[:, 0])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("poison", [False, True])
def test_poison_is_nan_in_every_cell(dtype: str, poison: bool) -> None:
    for cache in (SlidingWindowCache(1, G, DH, 2, 100, 4, 3, dtype, poison), CausalCache(1, G, DH, 2, 100, dtype, poison)):
        start(cache, ([0], [1]))
        assert np.isnan(widen(cache.keys)).all() == np.isnan(widen(cache.values)).all() == poison
        cache.put(np.ones((1, G, DH), np.float32), np.ones((1, G, DH), np.float32))
        own = cache.cells[cache.end - 1]
        assert (widen(cache.keys[:, own]) == 1).all()


@pytest.mark.parametrize(("dtype", "item"), [("f32", 4), ("bf16", 2)])
@pytest.mark.parametrize(("capacity", "window", "max_batch"), [(1000, 128, 512), (64, 128, 512), (1, 1, 1), (65, 5, 7)])
def test_bytes_are_those_of_the_ring(dtype: str, item: int, capacity: int, window: int, max_batch: int) -> None:
    ring = SlidingWindowCache(L, G, DH, SEQUENCES, capacity, window, max_batch, dtype)
    whole = CausalCache(L, G, DH, SEQUENCES, capacity, dtype)
    cell = 2 * item * L * G * DH * SEQUENCES
    assert ring.nbytes == cell * min(window + max_batch - 1, capacity)
    assert whole.nbytes == cell * whole_blocks(capacity)
    assert WrapperCache((ring, whole), [(0, 0)]).nbytes == ring.nbytes + whole.nbytes
