"""Stepping back in a KV cache: allowed exactly where all that the next position sees is still stored."""

from itertools import product

import numpy as np
import pytest

from toyllm.models.cache import CausalCache, SlidingWindowCache, WrapperCache

CAPACITY = 12


def put(cache: CausalCache, positions: list[int], mark: float = 0) -> None:
    """Store positions of sequence 0; a key is its position, and the mark says when it was stored."""
    cache.start_forward(np.array(positions), np.zeros(len(positions), np.int64))
    key = (np.array(positions, np.float32) + mark).reshape(-1, 1, 1)
    cache.put(key, key)


def seen(cache: CausalCache) -> list[float]:
    """The keys that the last position of the last batch sees."""
    return cache.keys[0, cache.cells[cache.begin[-1] : cache.end[-1]], 0].tolist()


def test_a_causal_cache_steps_back_anywhere() -> None:
    for length in range(6):
        cache = CausalCache(1, 1, 1, 1, CAPACITY)
        put(cache, [0, 1, 2, 3, 4])
        assert cache.truncate(length)
        assert (cache.length(), cache.next_position()) == (length, length or None)
        put(cache, [length], mark=0.5)
        assert seen(cache) == [*range(length), length + 0.5]


@pytest.mark.parametrize(("window", "most"), [*product((1, 2, 3, 4, 20), (1, 2, 3))])
def test_a_ring_steps_back_exactly_as_far_as_it_remembers(window: int, most: int) -> None:
    refused = 0
    for stored, length in ((n, m) for n in range(CAPACITY) for m in range(n + 1)):
        cache = SlidingWindowCache(1, 1, 1, 1, CAPACITY, window, most, poison=True)
        for i in range(0, stored, most):
            put(cache, list(range(i, min(i + most, stored))))
        kept = set(cache.keys[0, :, 0].tolist())
        needed = range(max(0, length - window + 1), length)
        assert cache.can_resume(length) == cache.truncate(length) == (set(needed) <= kept), (stored, length)
        if cache.length() == length:
            put(cache, [length], mark=0.5)
            assert seen(cache) == [*needed, length + 0.5]
        else:
            refused += 1
            put(cache, [stored])
            assert seen(cache) == [*range(max(0, stored - window + 1), stored + 1)], "refused, it has not changed"
    assert refused or window == 20 or window == 1, "or the ring forgot nothing"


def test_several_caches_step_back_together_or_not_at_all() -> None:
    ring, whole = SlidingWindowCache(1, 1, 1, 1, CAPACITY, 2, 2), CausalCache(1, 1, 1, 1, CAPACITY)
    cache = WrapperCache((whole, ring), [(0, 0), (1, 0)])
    for i in range(8):
        cache.start_forward(np.array([i]), np.zeros(1, np.int64))
    assert not cache.truncate(5)
    assert (whole.length(), ring.length()) == (8, 8)
    assert cache.truncate(6)
    assert (whole.length(), ring.length()) == (6, 6)
    assert cache.truncate(0)
    assert (whole.length(), ring.length(), cache.next_position()) == (0, 0, None)


def test_only_what_was_seen_can_be_kept_and_only_the_sequence_named_changes() -> None:
    cache = CausalCache(1, 1, 1, 2, CAPACITY)
    cache.start_forward(np.array([0, 1, 0]), np.array([0, 0, 1]))
    assert not cache.truncate(3)
    assert not cache.truncate(-1)
    assert not cache.truncate(2, sequence=1)
    assert cache.truncate(1)
    assert (cache.length(0), cache.length(1)) == (1, 1)
