"""The KV cache: keys and values of the tokens seen so far, for one sequence or many.

Layout: keys and values are f32 [L, G, C, Dh]; each sequence owns `capacity` neighbouring cells (rounded up to whole
attention blocks), filled in order of position, so that attention streams them and the kernels need no gather.
"""

import numpy as np

from ..kernels.errors import ToyllmError

BLOCK = 64  # attention cuts keys in blocks of this many cells


class CacheFull(ToyllmError):  # noqa: N818 - named for what it says
    """A sequence has no free cell left; nothing of the batch was stored."""


class CausalCache:
    """Keys and values for causal attention: a query sees the positions of its own sequence up to its own.

    A forward pass calls `start_forward` once, then for each layer `set_layer`, `put` and reads `keys`, `values` (of that layer, f32
    [G, C, Dh]) with `cells`, `begin` and `end`: query t sees cells[begin[t]:end[t]], in position order.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, max_sequences: int, capacity: int) -> None:
        self.capacity, self.max_sequences = capacity, max_sequences
        self._slab = -(-capacity // BLOCK) * BLOCK
        shape = (layers, kv_heads, max_sequences * self._slab, head_dim)
        self._keys, self._values = (np.empty(shape, np.float32) for _ in range(2))
        self.cells = np.arange(shape[2], dtype=np.int32)
        self._stored = np.zeros(max_sequences, np.int64)  # cells in use, a sequence
        self._first = np.zeros(max_sequences, np.int64)  # position of the first cell, a sequence
        self._new = self.begin = self.end = np.empty(0, np.int64)
        self.set_layer(0)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, whether touched yet or not."""
        return self._keys.nbytes + self._values.nbytes

    def length(self, sequence: int = 0) -> int:
        """How many positions of a sequence are stored."""
        return int(self._stored[sequence])

    def next_position(self, sequence: int = 0) -> int | None:
        """The position that follows the stored ones; None while the sequence is empty, when any may come."""
        return int(self._first[sequence] + self._stored[sequence]) if self._stored[sequence] else None

    def start_forward(self, positions: np.ndarray, sequences: np.ndarray) -> None:
        """Take a cell for each token of the batch (int64 [T] both; a sequence's tokens in order).

        An empty sequence may start at any position. Raises CacheFull where a sequence has no room, ToyllmError where a position does
        not follow the stored ones; then nothing has changed.
        """
        new = np.empty(len(positions), np.int64)
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
            new[mine] = sequence * self._slab + index
            stored[sequence] += len(mine)
        self._stored, self._first, self._new = stored, first, new
        self.begin, self.end = sequences * self._slab, new + 1

    def set_layer(self, layer: int) -> None:
        """Choose the layer that `put`, `keys` and `values` mean."""
        self.keys, self.values = self._keys[layer], self._values[layer]

    def put(self, key: np.ndarray, value: np.ndarray) -> None:
        """Store this batch's keys and values of the layer, f32 [T, G, Dh] each."""
        cells = self._new
        where = slice(cells[0], cells[-1] + 1) if (np.diff(cells) == 1).all() else cells
        self.keys[:, where] = key.swapaxes(0, 1)
        self.values[:, where] = value.swapaxes(0, 1)
