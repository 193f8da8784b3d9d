"""Caches that know positions: all of a sequence up to the query's own, a window of them, or a chunk."""

import copy
from collections.abc import Callable, Collection

import numpy as np

from ...kernels.cells import DTYPES, load, store, width
from ...kernels.errors import ToyllmError
from .cells import ENDLESS, Cells
from .config import MOST, CacheConfig, NotSupported, check_batch, check_config, check_rows, check_size, check_sizes

Shift = Callable[[int, np.ndarray, np.ndarray], np.ndarray]  # (layer, key f32 [n, G, Dh], offsets int64 [n]): the keys that much later
Commit = Callable[[], None]  # does what was found possible, and cannot fail


class CausalCache:
    """A query sees the positions of its own sequence up to its own. Nothing is forgotten.

    The pool has max_sequences · capacity cells; `max_batch` is what a window's is made for. `dtype` is one of kernels.cells.DTYPES;
    `shift(layer, key, offsets)` gives keys f32 [n, G, Dh] as they would be at positions by `offsets` int64 [n] higher (here always
    below 0); without it `remove` cannot move positions. `poison` fills what is stored with NaN, so that reading a cell that was never
    written cannot go unnoticed. Raises ToyllmError for sizes that are none.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        max_sequences: int,
        capacity: int,
        max_batch: int,
        dtype: str = "f32",
        shift: Shift | None = None,
        *,
        poison: bool = False,
    ) -> None:
        check_sizes(layers=layers, kv_heads=kv_heads, head_dim=head_dim)
        check_sizes(max_sequences=max_sequences, capacity=capacity, max_batch=max_batch)
        W = width(head_dim, dtype)
        self.layers, self.kv_heads, self.head_dim = layers, kv_heads, head_dim
        self.max_sequences, self.capacity, self.max_batch = max_sequences, capacity, max_batch
        self.dtype, self._shift, self._config, self._used = dtype, shift, CacheConfig(), False
        self._cells = self._make_cells()
        shape = (layers, kv_heads, self._cells.count, W)
        self._keys, self._values = (np.empty(shape, DTYPES[dtype]) for _ in range(2))
        if poison:
            for array in (self._keys, self._values):
                array[...] = store(np.full(head_dim, np.nan, np.float32), dtype)
        self._layer, self._where = 0, np.empty(0, np.int64)

    def _make_cells(self) -> Cells:
        return Cells(self.max_sequences * self.capacity, self.max_sequences)

    # ---- what is stored -----------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, whether touched yet or not."""
        return self._keys.nbytes + self._values.nbytes

    def length(self, sequence: int = 0) -> int:
        """How many positions a sequence has had, those that a window has forgotten included."""
        return self._cells.length(sequence)

    def next_position(self, sequence: int = 0) -> int | None:
        """The position behind the last one stored; None while the sequence is empty, when any may come."""
        last = self._cells.last(sequence)
        return None if last is None else last + 1

    def positions(self, sequence: int = 0) -> np.ndarray:
        """The positions stored of a sequence, int64 [n] in order."""
        return self._cells.positions(sequence).copy()

    def can_resume(self, sequence: int, position: int) -> bool:
        """Whether a sequence can go on at a position: all that it would see before it is stored, as far as a window reaches."""
        check_sequence(sequence)
        check_size("position", position, 0)
        window = self._cells.window
        return window is None or self._cells.complete(sequence, max(0, position - window + 1), position)

    # ---- a forward pass -----------------------------------------------------------------------------------------------------

    def set_config(self, config: CacheConfig) -> None:
        """Say what `get` returns. Raises NotSupported once the cache is in use."""
        self.prepare_config(config)()

    def prepare_config(self, config: CacheConfig) -> Commit:
        """Each `prepare_` finds whether its operation can be done, raises if not, and returns what does it."""
        check_config(config, self._used)
        return lambda: setattr(self, "_config", config)

    def start_forward(self, positions: object, sequences: object, reserve: bool = False) -> None:
        """Take a cell for each token of a batch: its positions and sequences, integers from 0, [T] each, in any order.

        A window first forgets, of each sequence of the batch, positions below its lowest one here - memory + 1; of others, where cells
        run short, those below their next one - memory + 1. With `reserve` nothing is stored, neither here nor by `put`: the pass only
        shows the largest sizes there are. Raises CacheFull.
        """
        self.prepare_forward(*check_batch(positions, sequences), reserve)()

    def prepare_forward(self, positions: np.ndarray, sequences: np.ndarray, reserve: bool = False) -> Commit:
        """See `prepare_config`."""
        if reserve:
            return lambda: self._reserve(len(positions))
        plan = self._cells.plan(positions, sequences)

        def commit() -> None:
            cells = self._cells
            cells.take(plan)
            new, self._used = cells.new, True
            tokens = len(new)
            first = int(new[0])
            run = tokens == 1 or (int(new[-1]) - first == tokens - 1 and bool((new[1:] - new[:-1] == 1).all()))
            self._where = slice(first, first + tokens) if run else new

        return commit

    def _reserve(self, tokens: int) -> None:
        self._cells.reserve(tokens)
        self._used = True

    def check_room(self, positions: object, sequences: object, most: int) -> None:
        """Raise CacheFull where passes of `most` of these tokens after each other would not all find room; changes nothing."""
        positions, sequences = check_batch(positions, sequences)
        trial = copy.deepcopy(self._cells)
        for first in range(0, len(positions), most):
            trial.take(trial.plan(positions[first : first + most], sequences[first : first + most]))

    def set_layer(self, layer: int) -> None:
        """Choose the layer that `put`, `get`, `keys` and `values` mean."""
        if not 0 <= layer < self.layers:
            raise ToyllmError(f"layer {layer}: expected 0 to {self.layers - 1}")
        self._layer = layer

    def set_causal(self, enabled: bool = True, except_: Collection[int] = ()) -> None:
        """For this pass, let queries see later positions of their sequence too, unless `enabled`; those of `except_` contrariwise.

        `except_` names tokens by their index in the batch. Windows hold as they did, downwards, and chunks.
        """
        self.prepare_causal(enabled, except_)()

    def prepare_causal(self, enabled: bool, except_: Collection[int]) -> Commit:
        """See `prepare_config`."""
        tokens, indices = len(self._cells.new), list(except_)
        for index in indices:
            if check_size("except_", index, 0) >= tokens:
                raise ToyllmError(f"except_ {index}: expected indices of the batch, 0 to {tokens - 1}")
        lifted = np.full(tokens, not enabled)
        lifted[indices] = enabled
        return lambda: None if self._cells.reserved else self._cells.look(lifted if lifted.any() else None)

    def put(self, key: np.ndarray, value: np.ndarray) -> None:
        """Store the batch's keys and values of the layer, f32 [T, G, Dh] each. Raises ToyllmError for another shape."""
        tokens = len(self._cells.new)
        key = check_rows("key", key, tokens, self.kv_heads, self.head_dim)
        value = check_rows("value", value, tokens, self.kv_heads, self.head_dim)
        if not self._cells.reserved:
            self._keys[self._layer][:, self._where] = self._stored(key)
            self._values[self._layer][:, self._where] = self._stored(value)

    def get(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All keys and values of the layer that the batch sees, f32 [history, G, Dh], and what each token sees, bool [T, history].

        In no order, each cell once; or as `set_config` has it. With `reserve` as many as there are cells, and nothing is seen.
        """
        cells, visible = self._cells.history()
        n, tokens, c = len(cells), len(visible), self._config
        padded = -(-n // c.padding) * c.padding
        rows = []
        for stored in (self.keys, self.values):
            out = np.zeros((padded, self.kv_heads, self.head_dim), np.float32)
            if not self._cells.reserved:
                out[:n] = self._f32(stored, cells)
            rows.append(out)
        mask = np.zeros((-(-tokens // c.mask_batch_padding) * c.mask_batch_padding, padded), bool)
        mask[:tokens, :n] = visible
        if np.dtype(c.mask_dtype).kind == "f":
            mask = np.where(mask, 0, -np.inf).astype(c.mask_dtype)
        value = np.ascontiguousarray(rows[1].transpose(1, 2, 0)) if c.permuted_v else rows[1]
        return rows[0], value, mask

    def _stored(self, rows: np.ndarray) -> np.ndarray:
        """Keys or values f32 [n, G, Dh] as stored, [G, n, W]."""
        return (rows if self.dtype == "f32" else store(rows, self.dtype)).swapaxes(0, 1)

    def _f32(self, stored: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Keys or values [G, C, W] of these cells, f32 [n, G, Dh]."""
        return load(stored[:, cells], self.head_dim).swapaxes(0, 1)

    # ---- sequences ----------------------------------------------------------------------------------------------------------

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Make `target` a copy of the positions of `source` below `length`, in the same cells; what it held before is gone."""
        self.prepare_copy(source, target, length)()

    def prepare_copy(self, source: int, target: int, length: int) -> Commit:
        """See `prepare_config`."""
        check_sequence(source)
        check_sequence(target)
        check_size("length", length, 0)
        return lambda: self._cells.copy(source, target, min(length, MOST))

    def remove(self, sequence: int, begin: int, end: int | None = None) -> None:
        """Remove positions from `begin` up to `end`, or to the last; those behind `end` move down by end - begin, their keys shifted.

        Raises NotSupported where positions would have to move and there is no `shift`, or another sequence shares them.
        """
        self.prepare_remove(sequence, begin, end)()

    def prepare_remove(self, sequence: int, begin: int, end: int | None = None) -> Commit:
        """See `prepare_config`."""
        check_sequence(sequence)
        begin = min(check_size("begin", begin, 0), MOST)
        end = ENDLESS if end is None else min(check_size("end", end, begin), ENDLESS)
        if begin == end:
            return lambda: None
        behind, onto, _ = self._cells.close_up(sequence, begin, end)
        keys = self._shifted(sequence, behind, begin - end) if len(behind) else []

        def move() -> None:
            for layer, rows in enumerate(keys):
                self._keys[layer][:, onto] = rows
                self._values[layer][:, onto] = self._values[layer][:, behind]

        return lambda: self._cells.cut(sequence, begin, end, move)

    def _shifted(self, sequence: int, cells: np.ndarray, offset: int) -> list[np.ndarray]:
        """The keys of these cells, moved by `offset` positions, as stored [G, n, W], a layer each."""
        what = f"remove: positions of sequence {sequence} behind those removed would have to move"
        if self._shift is None:
            raise NotSupported(f"{what}, and this cache has no shift; remove up to the end instead")
        if self._cells.shared(cells):
            raise NotSupported(f"{what}, and another sequence shares them")
        offsets, keys = np.full(len(cells), offset, np.int64), []
        for layer in range(self.layers):
            moved = self._shift(layer, np.ascontiguousarray(self._f32(self._keys[layer], cells)), offsets)
            rows = check_rows(f"shift of layer {layer}", moved, len(cells), self.kv_heads, self.head_dim)
            keys.append(self._stored(rows))
        return keys

    def state(self, sequence: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is stored of a sequence: positions int64 [n] in order, keys and values [L, G, n, W] as stored; copies."""
        cells = self._cells.stored(sequence)
        return self.positions(sequence), self._keys[:, :, cells], self._values[:, :, cells]

    def restore(self, sequence: int, positions: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
        """Make a sequence hold what `state` has given, and nothing else; a window takes it to have begun at position 0.

        Raises ToyllmError for positions out of order and arrays of another shape or dtype, CacheFull for more than cells are free.
        """
        self.prepare_restore(sequence, positions, keys, values)()

    def prepare_restore(self, sequence: int, positions: np.ndarray, keys: np.ndarray, values: np.ndarray) -> Commit:
        """See `prepare_config`."""
        check_sequence(sequence)
        if np.shape(positions) != (0,):
            positions, _ = check_batch(positions, positions)
        positions = np.array(positions, np.int64)
        if (np.diff(positions) < 0).any():
            raise ToyllmError("positions: expected them in order")
        L, G, _, W = self._keys.shape
        for name, given in (("keys", keys), ("values", values)):
            if np.shape(given) != (L, G, len(positions), W) or given.dtype != self._keys.dtype:
                found = f"{given.dtype} {list(given.shape)}" if isinstance(given, np.ndarray) else type(given).__name__
                raise ToyllmError(f"{name}: expected {self._keys.dtype} {[L, G, len(positions), W]}, found {found}")
        self._cells.check_fill(sequence, len(positions))

        def fill(cells: np.ndarray) -> None:
            self._keys[:, :, cells], self._values[:, :, cells] = keys, values
            self._used = True

        return lambda: self._cells.fill(sequence, positions, fill)

    # ---- what attention reads -----------------------------------------------------------------------------------------------

    @property
    def keys(self) -> np.ndarray:
        """Keys of the layer, as stored [G, C, W]."""
        return self._keys[self._layer]

    @property
    def values(self) -> np.ndarray:
        """Values of the layer, as stored [G, C, W]."""
        return self._values[self._layer]

    @property
    def cells(self) -> np.ndarray:
        """Cells int32 [·]: query t of the batch sees cells[begin[t] : end[t]]."""
        return self._cells.cells

    @property
    def begin(self) -> np.ndarray:
        """The first place in `cells` that each query sees, int64 [T]."""
        return self._cells.begin

    @property
    def end(self) -> np.ndarray:
        """The place in `cells` behind the last one that each query sees, int64 [T]."""
        return self._cells.end

    @property
    def adjoining(self) -> bool:
        """Whether the cells that any query sees are neighbours."""
        return self._cells.adjoining

    @property
    def origin(self) -> int:
        """Of the batch's first sequence: the index of a position in it, less its place in `cells`."""
        return self._cells.origin


class SlidingWindowCache(CausalCache):
    """A query sees the last `window` positions of its own sequence, its own included.

    Positions `memory` (at least the window, which it is if not given) or more behind are forgotten; more than the window lets a sequence
    step back. The pool has max_sequences · memory + max_batch cells: room for max_sequences that go on by max_batch tokens in all.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        max_sequences: int,
        capacity: int,
        max_batch: int,
        dtype: str = "f32",
        shift: Shift | None = None,
        *,
        window: int,
        memory: int | None = None,
        poison: bool = False,
    ) -> None:
        self.window = check_size("window", window)
        self.memory = check_size("memory", window if memory is None else memory, window)
        super().__init__(layers, kv_heads, head_dim, max_sequences, capacity, max_batch, dtype, shift, poison=poison)

    def _make_cells(self) -> Cells:
        return Cells(self.max_sequences * self.memory + self.max_batch, self.max_sequences, window=self.window, memory=self.memory)


class ChunkedCache(CausalCache):
    """A query sees the positions of its own sequence up to its own that are of its chunk: p // chunk is the same. Nothing is forgotten."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        max_sequences: int,
        capacity: int,
        max_batch: int,
        dtype: str = "f32",
        shift: Shift | None = None,
        *,
        chunk: int,
        poison: bool = False,
    ) -> None:
        self.chunk = check_size("chunk", chunk)
        super().__init__(layers, kv_heads, head_dim, max_sequences, capacity, max_batch, dtype, shift, poison=poison)

    def _make_cells(self) -> Cells:
        return Cells(self.max_sequences * self.capacity, self.max_sequences, chunk=self.chunk)


def check_sequence(sequence: object) -> None:
    """Raise ToyllmError for what numbers no sequence."""
    check_size("sequence", sequence, 0)
