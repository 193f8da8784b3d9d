"""Positions removed from a cache, and sequences saved and restored: what is left then, and what is refused without a change."""

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toyllm.kernels.errors import ToyllmError
from toyllm.models.cache import (
    CacheFull,
    CausalCache,
    NotSupported,
    WrapperCache,
)

reading = runpy.run_path(str(Path(__file__).parent / "cache_reading.py"))
L, G, DH, causal, sliding, chunked, wrapper, forward, put, rows, seen = (
    reading[name] for name in ("L", "G", "DH", "causal", "sliding", "chunked", "wrapper", "forward", "put", "rows", "seen")
)

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


def test_what_moves_keeps_its_cells_together() -> None:
    """Through many removals from the middle of a full cache, with another sequence beside it."""
    cache = causal(capacity=30)
    forward(cache, [0, 1], [4, 4])
    for round_ in range(20):
        while len(cache.positions(0)) < 30:
            cache.start_forward([cache.next_position(0) or 0], [0])
            put(cache, [cache.next_position(0) - 1])
            assert cache.adjoining, round_
        cache.remove(0, 3, 12)
        assert len(cache.positions(0)) == 21
