"""Caches for tests; how these store in one, and read what each token of a batch sees: through `get`, and as attention does."""

from typing import Any

import numpy as np

from toyllm.kernels.cells import load
from toyllm.models.cache import BLOCK, CausalCache, ChunkedCache, SlidingWindowCache, WrapperCache

L, G, DH = 2, 2, 3
MOVED = 1024.0  # what a key changes by when it moves by a position


def shift(layer: int, key: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """A shift whose result tells by how much keys have moved, and in which layer."""
    assert key.dtype == np.float32
    assert key.shape == (len(offsets), G, DH)
    return key + np.float32(MOVED + layer) * offsets[:, None, None].astype(np.float32)


SIZES: dict[str, Any] = {"layers": L, "kv_heads": G, "head_dim": DH, "max_sequences": 3, "capacity": 16, "max_batch": 16, "shift": shift}


def causal(**sizes: Any) -> CausalCache:
    return CausalCache(**SIZES | sizes)


def sliding(window: int, **sizes: Any) -> SlidingWindowCache:
    return SlidingWindowCache(**SIZES | {"window": window} | sizes)


def chunked(chunk: int, **sizes: Any) -> ChunkedCache:
    return ChunkedCache(**SIZES | {"chunk": chunk} | sizes)


def wrapper(window: int = 3, **sizes: Any) -> WrapperCache:
    return WrapperCache([sliding(window, **sizes), causal(**sizes)])


def rows(numbers: Any, layer: int, moved: Any = 0) -> np.ndarray:
    """f32 [n, G, DH] that tell a token's number, the layer, head and element, and how far it has moved."""
    first = np.asarray(numbers, np.float32) + layer / 8 + (MOVED + layer) * np.asarray(moved, np.float32)
    return first[:, None, None] + np.arange(G * DH, dtype=np.float32).reshape(G, DH) / 64


def members(cache: Any) -> list[tuple[Any, Any]]:
    """What puts and gets for each kind of layer, and the cache that it means; a wrapper's are chosen in turn."""
    return [(cache, member) for member in cache.caches] if isinstance(cache, WrapperCache) else [(cache, cache)]


def choose(cache: Any, kind: int, layer: int) -> None:
    if isinstance(cache, WrapperCache):
        cache.set_layer_type(kind)
    cache.set_layer(layer)


def put(cache: Any, numbers: list[int]) -> None:
    """Store a batch's keys and values, which tell each token's number, in all layers."""
    for kind, _ in enumerate(members(cache)):
        for layer in range(L):
            choose(cache, kind, layer)
            cache.put(rows(numbers, layer), -rows(numbers, layer))


def seen(cache: Any, kind: int = 0) -> list[list[int]]:
    """The numbers of the tokens that each token of the batch sees, sorted; layers, keys, values and the two ways to read them agree."""
    member = members(cache)[kind][1]
    found = []
    for layer in range(L):
        choose(cache, kind, layer)
        key, value, mask = cache.get()
        assert mask.dtype == bool
        assert mask.shape == (len(member.begin), len(key))
        assert mask.any(0).all(), "no cell that nobody sees"
        numbers = np.rint(-value[:, 0, 0] - layer / 8).astype(int)
        np.testing.assert_array_equal(value, -rows(numbers, layer))
        assert isinstance(member, CausalCache)
        for t, visible in enumerate(mask):
            cells = member.cells[member.begin[t] : member.end[t]]
            stored = [load(array[:, cells], DH).swapaxes(0, 1) for array in (member.keys, member.values)]
            gotten = [key[visible], value[visible]]
            order, other = (np.lexsort((pair[0][:, 0, 0], pair[1][:, 0, 0])) for pair in (stored, gotten))
            for a, b in zip(stored, gotten, strict=True):
                np.testing.assert_array_equal(a[order], b[other])
            if member.adjoining:
                assert (np.diff(cells) == 1).all()
        found.append([sorted(numbers[visible].tolist()) for visible in mask])
    assert all(layer == found[0] for layer in found)
    assert (members(cache)[kind][1].cells.dtype, member.begin.dtype, member.end.dtype) == (np.int32, np.int64, np.int64)
    return found[0]


def forward(cache: Any, positions: list[int], sequences: list[int]) -> list[list[int]]:
    """Run a batch whose tokens' numbers are 100 · sequence + position, and say what each sees."""
    cache.start_forward(positions, sequences)
    put(cache, [100 * s + p for p, s in zip(positions, sequences, strict=True)])
    return seen(cache)


def block_places(cache: CausalCache) -> list[int]:
    """The place in a block of the first cell that each token sees."""
    return (cache.begin % BLOCK).tolist()
