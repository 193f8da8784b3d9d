"""The KV cache: keys and values of the tokens seen so far, for one sequence or many.

Layout: keys and values are f32 or bf16 [L, G, C, Dh]. Each sequence owns a slab of neighbouring cells, in order of position: all of its
positions (`CausalCache`), or a ring of the latest (`SlidingWindowCache`). Attention streams them: the kernels need no gather.

A forward pass calls `start_forward` once, then for each layer `set_layer`, `put`, and reads `keys`, `values` (of that layer) with
`cells`, `begin`, `end` and `adjoining`: query t sees cells[begin[t]:end[t]], in position order; `adjoining` says that those
are neighbours.
"""

from collections.abc import Sequence

import numpy as np

from ..kernels.dtypes import BF16, to_bf16
from ..kernels.errors import ToyllmError

BLOCK = 64  # attention cuts keys in blocks of this many, counted from the sequence's first position
DTYPES = {"f32": np.dtype(np.float32), "bf16": BF16}


def whole_blocks(capacity: int) -> int:
    """Cells of a slab for so many positions."""
    return -(-capacity // BLOCK) * BLOCK


class CacheFull(ToyllmError):  # noqa: N818 - named for what it says
    """A sequence has no free cell left; nothing of the batch was stored."""


class CausalCache:
    """A query sees the positions of its own sequence up to its own."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, max_sequences: int, capacity: int, dtype: str = "f32", poison: bool = False
    ) -> None:
        self._slab = self._slab_for(capacity)
        shape = (layers, kv_heads, max_sequences * self._slab, head_dim)
        self._keys, self._values = (np.empty(shape, DTYPES[dtype]) for _ in range(2))
        if poison:  # so that reading a cell that was never written cannot go unnoticed
            for array in (self._keys, self._values):
                array[...] = np.array(np.nan, np.float32) if dtype == "f32" else to_bf16(np.array([np.nan]))[0]
        self.capacity, self.max_sequences = capacity, max_sequences
        self.cells = np.arange(shape[2], dtype=np.int32)
        self.adjoining = True
        self.origin = 0  # the index of a sequence's position, less its place in `cells`; as of the last pass
        self._stored = np.zeros(max_sequences, np.int64)  # positions seen, a sequence
        self._first = np.zeros(max_sequences, np.int64)  # the first of them, a sequence
        self._new = self.begin = self.end = np.empty(0, np.int64)
        self.set_layer(0)

    def _slab_for(self, capacity: int) -> int:
        return whole_blocks(capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, whether touched yet or not."""
        return self._keys.nbytes + self._values.nbytes

    def length(self, sequence: int = 0) -> int:
        """How many positions of a sequence have been seen."""
        return int(self._stored[sequence])

    def next_position(self, sequence: int = 0) -> int | None:
        """The position that follows the stored ones; None while the sequence is empty, when any may come."""
        return int(self._first[sequence] + self._stored[sequence]) if self._stored[sequence] else None

    def can_resume(self, length: int, sequence: int = 0) -> bool:
        """Whether a sequence can go on behind its first `length` positions: all that the next one sees is stored."""
        return 0 <= length <= self._stored[sequence]

    def truncate(self, length: int, sequence: int = 0) -> bool:
        """Forget all of a sequence but its first `length` positions. False, and nothing has changed, where it could not go on there."""
        if not self.can_resume(length, sequence):
            return False
        self._stored[sequence] = length
        return True

    def start_forward(self, positions: np.ndarray, sequences: np.ndarray) -> None:
        """Take a cell for each token of the batch (int64 [T] both; a sequence's tokens in order).

        An empty sequence may start at any position. Raises CacheFull where a sequence has no room, ToyllmError where a position does
        not follow the stored ones; then nothing has changed.
        """
        self.take(sequences, *self.plan(positions, sequences))

    def plan(self, positions: np.ndarray, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `take` needs for a batch that fits; raises as `start_forward` does, and changes nothing.

        Each token's index in its sequence, int64 [T], and how many positions each sequence will have seen, and the first of them.
        """
        indices = np.empty(len(positions), np.int64)
        stored, first = self._stored.copy(), self._first.copy()
        for sequence in dict.fromkeys(sequences.tolist()):
            if not 0 <= sequence < self.max_sequences:
                raise ToyllmError(f"sequence {sequence}: expected 0 to {self.max_sequences - 1}")
            mine = np.flatnonzero(sequences == sequence)
            if stored[sequence] == 0:
                first[sequence] = positions[mine[0]]
            index = positions[mine] - first[sequence]
            if index[0] != stored[sequence] or (np.diff(index) != 1).any():
                expected = int(first[sequence] + stored[sequence])
                raise ToyllmError(f"sequence {sequence}: expected positions from {expected} on, one after the other")
            if index[-1] >= self.capacity:
                raise CacheFull(f"sequence {sequence}: {index[-1] + 1} positions do not fit a KV cache of {self.capacity}")
            indices[mine] = index
            stored[sequence] += len(mine)
        return indices, stored, first

    def take(self, sequences: np.ndarray, indices: np.ndarray, stored: np.ndarray, first: np.ndarray) -> None:
        """Take the cells of a batch that `plan` has found to fit."""
        self._stored, self._first = stored, first
        self._place(sequences, indices)

    def _place(self, sequences: np.ndarray, indices: np.ndarray) -> None:
        self._new = sequences * self._slab + indices
        self.begin, self.end = sequences * self._slab, self._new + 1
        self.origin = -int(self.begin[0])

    def set_layer(self, layer: int) -> None:
        """Choose the layer that `put`, `keys` and `values` mean."""
        self.keys, self.values = self._keys[layer], self._values[layer]

    def put(self, key: np.ndarray, value: np.ndarray) -> None:
        """Store this batch's keys and values of the layer, f32 [T, G, Dh] each."""
        cells = self._new
        where = slice(cells[0], cells[-1] + 1) if len(cells) == 1 or (np.diff(cells) == 1).all() else cells
        for store, new in ((self.keys, key), (self.values, value)):
            rows = new.swapaxes(0, 1)
            store[:, where] = to_bf16(rows) if store.dtype == BF16 else rows


class SlidingWindowCache(CausalCache):
    """A query sees the last `window` positions of its own sequence, its own included. Keeps a ring of window + max_batch - 1 cells."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        max_sequences: int,
        capacity: int,
        window: int,
        max_batch: int,
        dtype: str = "f32",
        poison: bool = False,
    ) -> None:
        self.window, self._max_batch = window, max_batch
        self._ring = min(window + max_batch - 1, capacity)
        super().__init__(layers, kv_heads, head_dim, max_sequences, capacity, dtype, poison)
        self._lost = np.zeros(max_sequences, np.int64)  # positions overwritten when a sequence last stepped back

    def _slab_for(self, capacity: int) -> int:
        del capacity
        return self._ring

    def plan(self, positions: np.ndarray, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As every cache's; a ring also refuses more tokens of a sequence at once than it was made for."""
        most = max(sequences.tolist().count(sequence) for sequence in set(sequences.tolist()))
        if most > self._max_batch and self._ring < self.capacity:
            raise ToyllmError(f"{most} tokens of a sequence in one pass: expected at most {self._max_batch}, which the ring was made for")
        return super().plan(positions, sequences)

    def can_resume(self, length: int, sequence: int = 0) -> bool:
        """As every cache's; and nothing that the next position sees has been overwritten."""
        return super().can_resume(length, sequence) and max(0, length - self.window + 1) >= min(length, self._overwritten(sequence))

    def truncate(self, length: int, sequence: int = 0) -> bool:
        """As every cache's; what was overwritten before the step back stays so."""
        lost = self._overwritten(sequence)
        done = super().truncate(length, sequence)
        if done:
            self._lost[sequence] = lost if length else 0
        return done

    def _overwritten(self, sequence: int) -> int:
        """How many of a sequence's first positions are no longer stored."""
        return max(int(self._lost[sequence]), int(self._stored[sequence]) - self._ring)

    def _place(self, sequences: np.ndarray, indices: np.ndarray) -> None:
        self._new = sequences * self._ring + indices % self._ring
        self.begin, self.end = np.empty_like(indices), np.empty_like(indices)
        parts, at, self.adjoining = [], 0, True
        for sequence in dict.fromkeys(sequences.tolist()):
            mine = indices[sequences == sequence]
            low = max(0, int(mine[0]) - self.window + 1)
            base = low - low % BLOCK  # blocks are cut at the same positions whatever the ring has forgotten
            index = np.arange(base, base - (base - mine[-1] - 1) // BLOCK * BLOCK)  # whole blocks; what lies behind is not seen
            parts.append((sequence * self._ring + index % self._ring).astype(np.int32))
            self.begin[sequences == sequence] = at + np.maximum(0, mine - self.window + 1) - base
            self.end[sequences == sequence] = at + mine - base + 1
            self.adjoining &= low // self._ring == int(mine[-1]) // self._ring
            self.origin = base - at
            at += len(index)
        self.cells = np.concatenate(parts)


class WrapperCache:
    """Several caches as one, for models whose layers differ: layer i is the cache and the layer within it that `layers[i]` names."""

    def __init__(self, caches: Sequence[CausalCache], layers: Sequence[tuple[int, int]]) -> None:
        self.caches, self._layers = tuple(caches), tuple(layers)
        self.set_layer(0)

    @property
    def nbytes(self) -> int:
        """Bytes of all members."""
        return sum(cache.nbytes for cache in self.caches)

    def length(self, sequence: int = 0) -> int:
        """How many positions of a sequence have been seen."""
        return self.caches[0].length(sequence)

    def next_position(self, sequence: int = 0) -> int | None:
        """The position that follows the stored ones; None while the sequence is empty."""
        return self.caches[0].next_position(sequence)

    def can_resume(self, length: int, sequence: int = 0) -> bool:
        """Whether all members can."""
        return all(cache.can_resume(length, sequence) for cache in self.caches)

    def truncate(self, length: int, sequence: int = 0) -> bool:
        """As each member's: all of them, or none."""
        return self.can_resume(length, sequence) and all(cache.truncate(length, sequence) for cache in self.caches)

    def start_forward(self, positions: np.ndarray, sequences: np.ndarray) -> None:
        """As each member's: one refuses before any has changed."""
        plans = [cache.plan(positions, sequences) for cache in self.caches]
        for cache, plan in zip(self.caches, plans, strict=True):
            cache.take(sequences, *plan)

    def set_layer(self, layer: int) -> None:
        """Choose the layer that `put`, `keys` and `values` mean."""
        member, own = self._layers[layer]
        self.member = self.caches[member]
        self.member.set_layer(own)

    def __getattr__(self, name: str):
        if name == "member":  # not there yet, as while one is being copied
            raise AttributeError(name)
        return getattr(self.member, name)
