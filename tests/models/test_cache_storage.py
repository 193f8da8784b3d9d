"""How keys and values lie in a cache, and what attention reads of them."""

import copy
import runpy
from pathlib import Path

import numpy as np
import pytest

from toyllm.kernels.cells import load, store
from toyllm.models.cache import (
    BLOCK,
    CacheFull,
    WrapperCache,
)

reading = runpy.run_path(str(Path(__file__).parent / "cache_reading.py"))
L, G, DH, causal, sliding, chunked, wrapper, forward, put = (
    reading[name] for name in ("L", "G", "DH", "causal", "sliding", "chunked", "wrapper", "forward", "put")
)


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


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q8"])
def test_what_moves_is_stored_anew_in_its_dtype(dtype: str) -> None:
    cache = causal(dtype=dtype)
    cache.start_forward([0, 1, 2, 3], [0] * 4)
    for layer in range(L):
        cache.set_layer(layer)
        cache.put(*np.random.default_rng(layer).standard_normal((2, 4, G, DH), np.float32))
    _, before, values = cache.state(0)
    cache.remove(0, 0, 2)
    _, after, same = cache.state(0)
    np.testing.assert_array_equal(same, values[:, :, 2:])
    for layer in range(L):
        old = load(before[layer][:, 2:], DH).swapaxes(0, 1)
        moved = store(reading["shift"](layer, old, np.full(2, -2)), dtype).swapaxes(0, 1)
        np.testing.assert_array_equal(after[layer], moved)
