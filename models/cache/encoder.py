"""The cache of an encoder's output, which a decoder's every token sees whole."""

from collections.abc import Collection

import numpy as np

from ...kernels.cells import load, store, width
from ...kernels.errors import ToyllmError
from .causal import Commit, Shift, check_sequence
from .config import CacheConfig, NotSupported, check_batch, check_config, check_rows, check_size, check_sizes


class EncoderCache:
    """Keys and values of an input, of any number of rows: given once, they are there for every later pass, without a mask.

    `cached` says whether it holds an input. That has a place in the sequence all the same, the positions of the pass that stored it:
    when one of these is removed, it is gone. There is one sequence only. Arguments as of all caches; memory is taken as it is needed.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        max_sequences: int = 1,
        capacity: int = 1,
        max_batch: int = 1,
        dtype: str = "f32",
        shift: Shift | None = None,
    ) -> None:
        check_sizes(layers=layers, kv_heads=kv_heads, head_dim=head_dim)
        check_sizes(max_sequences=max_sequences, capacity=capacity, max_batch=max_batch)
        width(head_dim, dtype)  # raises for what is no dtype
        if max_sequences > 1:
            raise NotSupported(f"max_sequences {max_sequences}: an encoder's cache holds one sequence")
        del shift  # without positions, there is nothing to shift
        self.layers, self.kv_heads, self.head_dim, self.capacity, self.dtype = layers, kv_heads, head_dim, capacity, dtype
        self._config, self._used, self._layer = CacheConfig(), False, 0
        self._stored: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by layer: keys and values [n, G, W]
        self._sequence, self._positions = 0, np.empty(0, np.int64)  # of what is stored
        self._pass: tuple[int, np.ndarray] | None = None
        self._reserved = False

    @property
    def cached(self) -> bool:
        """Whether an input is stored."""
        return bool(self._stored)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values stored."""
        return sum(array.nbytes for pair in self._stored.values() for array in pair)

    def length(self, sequence: int = 0) -> int:
        """None of its rows has a position."""
        del sequence
        return 0

    def next_position(self, sequence: int = 0) -> int | None:
        """None of its rows has a position."""
        del sequence

    def positions(self, sequence: int = 0) -> np.ndarray:
        """None of its rows has a position: int64 [0]."""
        del sequence
        return np.empty(0, np.int64)

    def can_resume(self, sequence: int, position: int) -> bool:
        """Every position sees all of it."""
        check_sequence(sequence)
        check_size("position", position, 0)
        return True

    def set_config(self, config: CacheConfig) -> None:
        """Say what `get` returns. Raises NotSupported once the cache is in use."""
        self.prepare_config(config)()

    def prepare_config(self, config: CacheConfig) -> Commit:
        """As `CausalCache.prepare_config`."""
        check_config(config, self._used)
        return lambda: setattr(self, "_config", config)

    def start_forward(self, positions: object, sequences: object, reserve: bool = False) -> None:
        """Begin a pass; with `reserve` it stores nothing. Raises NotSupported for a second sequence."""
        self.prepare_forward(*check_batch(positions, sequences), reserve)()

    def prepare_forward(self, positions: np.ndarray, sequences: np.ndarray, reserve: bool = False) -> Commit:
        """As `CausalCache.prepare_config`."""
        sequence = int(sequences[0])
        if (sequences != sequence).any() or (self.cached and sequence != self._sequence):
            raise NotSupported("an encoder's cache holds one sequence, not several")

        def commit() -> None:
            self._pass, self._reserved, self._used = (sequence, positions), reserve, True

        return commit

    def set_layer(self, layer: int) -> None:
        """Choose the layer that `put` and `get` mean."""
        if not 0 <= layer < self.layers:
            raise ToyllmError(f"layer {layer}: expected 0 to {self.layers - 1}")
        self._layer = layer

    def set_causal(self, enabled: bool = True, except_: Collection[int] = ()) -> None:
        """Everything is seen in any case."""

    def prepare_causal(self, enabled: bool, except_: Collection[int]) -> Commit:
        """As `CausalCache.prepare_config`."""
        del enabled, except_
        return lambda: None

    def put(self, key: np.ndarray, value: np.ndarray) -> None:
        """Store an input's keys and values of the layer, f32 [n, G, Dh] both, in place of what was there. Raises ToyllmError."""
        if self._pass is None:
            raise ToyllmError("put: expected start_forward before it")
        key = check_rows("key", key, None, self.kv_heads, self.head_dim)
        value = check_rows("value", value, len(key), self.kv_heads, self.head_dim)
        if self._reserved:
            return
        key, value = (store(rows.copy(), self.dtype) for rows in (key, value))
        self._stored[self._layer] = (key, value)
        self._sequence, self._positions = self._pass

    def get(self) -> tuple[np.ndarray, np.ndarray, None]:
        """The layer's keys and values as they were given, f32 [n, G, Dh], and no mask; with `reserve` zeros, `capacity` of them.

        Raises ToyllmError where the layer has none.
        """
        if self._reserved:
            key = value = np.zeros((self.capacity, self.kv_heads, self.head_dim), np.float32)
        elif self._layer in self._stored:
            key, value = (load(rows, self.head_dim).copy() for rows in self._stored[self._layer])
        else:
            raise ToyllmError(f"get: the encoder's cache holds no input in layer {self._layer}")
        return key, np.ascontiguousarray(value.transpose(1, 2, 0)) if self._config.permuted_v else value, None

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Raises NotSupported: there is one sequence."""
        self.prepare_copy(source, target, length)

    def prepare_copy(self, source: int, target: int, length: int) -> Commit:
        """As `CausalCache.prepare_config`."""
        del source, target, length
        raise NotSupported("copy_prefix: an encoder's cache holds one sequence")

    def remove(self, sequence: int, begin: int, end: int | None = None) -> None:
        """Empty the cache, where positions from `begin` up to `end`, or to the last, have one at which its input was stored."""
        self.prepare_remove(sequence, begin, end)()

    def prepare_remove(self, sequence: int, begin: int, end: int | None = None) -> Commit:
        """As `CausalCache.prepare_config`."""
        check_sequence(sequence)
        check_size("begin", begin, 0)
        if end is not None:
            check_size("end", end, begin)

        def commit() -> None:
            if not self.cached or sequence != self._sequence:
                return
            if ((self._positions >= begin) & (end is None or self._positions < end)).any():
                self._stored = {}
            elif end is not None:
                self._positions = np.where(self._positions >= end, self._positions - (end - begin), self._positions)

        return commit
