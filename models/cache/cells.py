"""Which cells of the pool hold which positions of which sequences: what all caches that know positions share.

One table has a row a sequence with its cells, sorted by position; its rows laid end to end are the `cells` that attention reads, and
nothing has to be gathered. Where a window moves on, a row's first places become free, and what follows is moved there now and then.

Each sequence would have its cells adjoin: it takes the one behind its last, else one in its own part of the pool, else the longest
free run. A cell that several sequences hold is free when the last of them gives it back.

An interrupt inside an operation leaves every sequence as it was or as it shall be, or, where what it holds is moved or restored, without
that: a cell is counted as taken before a row names it and until none does, and a row that has to be written anew is written elsewhere,
then takes the old one's place. Cells that nobody holds in the end are found before a cache is called full.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from .config import CacheFull

BLOCK = 64  # attention cuts keys in blocks of this many places
WIDTH = 4 * BLOCK  # places of a row to begin with; short rows keep the sequences of a batch close together
ENDLESS = np.iinfo(np.int64).max


@dataclass(slots=True)
class Row:
    """A sequence's row: places first ... last - 1 are its stored positions, in order."""

    number: int
    home: int  # its part of the pool
    first: int = 0
    last: int = 0
    before: int = 0  # a place's index in the sequence, less the place: a multiple of BLOCK
    run: int = 0  # from this place on the cells are neighbours


Group = tuple[int, np.ndarray, np.ndarray | slice]  # a sequence, its positions in a batch, and which of the batch these are
Drop = tuple[int, Row, int]  # a sequence, its row, and how many of its first places it forgets


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch that fits."""

    tokens: int
    groups: Sequence[Group]
    drops: Sequence[Drop]


def groups_of(positions: np.ndarray, sequences: np.ndarray) -> list[Group]:
    """A batch by sequences, in the order in which they come."""
    every = sequences.tolist()
    different = dict.fromkeys(every)
    if len(different) == 1:
        return [(every[0], positions, slice(None))]
    if len(different) == len(every):
        return [(s, positions[t : t + 1], slice(t, t + 1)) for t, s in enumerate(every)]
    where = {s: np.flatnonzero(sequences == s) for s in different}
    return [(s, positions[mine], mine) for s, mine in where.items()]


class Cells:
    """A pool of `count` cells, `parts` sequences meant to share it; with a window, a chunk, or neither."""

    def __init__(self, count: int, parts: int, window: int | None = None, memory: int | None = None, chunk: int | None = None) -> None:
        self.count, self.free = count, count
        self.window, self.memory, self.chunk = window, memory, chunk
        self._parts = parts
        self._owners = np.zeros(count, np.int32)  # sequences that hold a cell
        self._tables = np.zeros((1, WIDTH), np.int32), np.zeros((1, WIDTH), np.int64)  # cells, and their positions
        self._rows: dict[int, Row] = {}  # of the sequences that hold anything
        self._groups: Sequence[Group] = ()
        self.rest()

    @property
    def _table(self) -> np.ndarray:
        return self._tables[0]

    @property
    def _positions(self) -> np.ndarray:
        return self._tables[1]

    # ---- what is stored -----------------------------------------------------------------------------------------------------

    def positions(self, sequence: int) -> np.ndarray:
        """The positions stored of a sequence, int64 [n] in order; a view."""
        row = self._rows.get(sequence)
        return self._positions[row.number, row.first : row.last] if row else np.empty(0, np.int64)

    def stored(self, sequence: int) -> np.ndarray:
        """Their cells, int32 [n]; a view."""
        row = self._rows.get(sequence)
        return self._table[row.number, row.first : row.last] if row else np.empty(0, np.int32)

    def length(self, sequence: int) -> int:
        """How many positions a sequence has had, those forgotten since included."""
        row = self._rows.get(sequence)
        return row.before + row.last if row and row.last > row.first else 0

    def last(self, sequence: int) -> int | None:
        """The last position stored; None of an empty sequence."""
        row = self._rows.get(sequence)
        return int(self._positions[row.number, row.last - 1]) if row and row.last > row.first else None

    def shared(self, cells: np.ndarray) -> bool:
        """Whether another sequence holds one of these too."""
        return bool((self._owners[cells] > 1).any())

    def complete(self, sequence: int, begin: int, end: int) -> bool:
        """Whether all positions from `begin` up to `end` are stored."""
        if begin >= end:
            return True
        mine = self.positions(sequence)
        low, high = mine.searchsorted((begin, end))
        return bool(high - low >= end - begin and len(np.unique(mine[low:high])) == end - begin)

    # ---- a batch ------------------------------------------------------------------------------------------------------------

    def plan(self, positions: np.ndarray, sequences: np.ndarray) -> Plan:
        """What `take` needs for a batch that fits. Raises CacheFull where it does not; changes nothing."""
        groups, drops = groups_of(positions, sequences), []
        if self.memory is not None:
            drops = self._left_behind({s: int(mine.min()) for s, mine, _ in groups})
        tokens = len(positions)
        if self.free < tokens and self.free + self._freed(drops) < tokens:
            if self.memory is not None:  # those that wait keep what their next position sees
                waiting = self._rows.keys() - {s for s, _, _ in groups}
                drops += self._left_behind({s: (self.last(s) or 0) + 1 for s in waiting})
            self._count()
            free = self.free + self._freed(drops)
            if free < tokens:
                raise CacheFull(f"the KV cache is full: {tokens} more positions, {free} of {self.count} cells are free")
        return Plan(tokens, groups, drops)

    def _left_behind(self, lowest: dict[int, int]) -> list[Drop]:
        """What sequences forget that go on at these positions."""
        drops = []
        for sequence, position in lowest.items():
            row = self._rows.get(sequence)
            if row:
                n = int(self._positions[row.number, row.first : row.last].searchsorted(position - self.memory + 1))  # type: ignore[operator]
                if n:
                    drops.append((sequence, row, n))
        return drops

    def _freed(self, drops: Iterable[Drop]) -> int:
        """How many cells are free after it that are not free before."""
        cells = [self._table[row.number, row.first : row.first + n] for _, row, n in drops]
        return self._last_owned(np.concatenate(cells)) if cells else 0

    def _last_owned(self, cells: np.ndarray) -> int:
        """How many cells are free once each of these, an owner's each time, has been given back."""
        owners = self._owners[cells]
        if (owners == 1).all():
            return len(cells)
        different, times = np.unique(cells, return_counts=True)
        return int((self._owners[different] == times).sum())

    def take(self, plan: Plan) -> None:
        """Take a cell a token."""
        for _, row, n in plan.drops:
            cells = self._table[row.number, row.first : row.first + n]
            row.first += n
            self._give_back(cells)
        self.new = np.empty(plan.tokens, np.int64)  # each token's cell
        for sequence, positions, where in plan.groups:
            self.new[where] = self._add(sequence, positions)
        self._drop_empty(plan.drops)
        self._groups, self.reserved = plan.groups, False
        self.look(None)

    def _drop_empty(self, drops: Iterable[Drop]) -> None:
        """End sequences that have forgotten all."""
        for sequence, _, _ in drops:
            row = self._rows[sequence]
            if row.first == row.last:
                del self._rows[sequence]

    def _add(self, sequence: int, positions: np.ndarray) -> np.ndarray:
        """Cells for positions of a sequence, int64 [n], which it now holds."""
        n, row = len(positions), self._rows.get(sequence) or self._begin(sequence)
        last = self._positions[row.number, row.last - 1] if row.last > row.first else -1
        follows = positions[0] >= last and (n == 1 or bool((positions[1:] >= positions[:-1]).all()))
        cells = self._allocate(row, n)
        if not follows:
            return self._insert(sequence, row, positions, cells)
        if row.last + n > self._table.shape[1]:
            row = self._make_place(sequence, row, n)
        place = slice(row.last, row.last + n)
        self._table[row.number, place] = cells
        self._positions[row.number, place] = positions
        if n > 1 and not neighbours(cells):
            row.run = run_start(self._table[row.number, : row.last + n], row.first)
        elif row.last == row.first or cells[0] != self._table[row.number, row.last - 1] + 1:
            row.run = row.last
        row.last += n
        return cells

    def _insert(self, sequence: int, row: Row, positions: np.ndarray, cells: np.ndarray) -> np.ndarray:
        """Positions that come in any order, or before others of the row; each one's cell."""
        order = positions.argsort(kind="stable")
        own = np.empty(len(cells), np.int64)
        own[order] = cells
        every = np.concatenate((self.positions(sequence), positions[order]))
        where = np.concatenate((self.stored(sequence), cells))
        order = every.argsort(kind="stable")
        self._write(sequence, row.before + row.first, where[order], every[order])
        return own

    def _allocate(self, row: Row, n: int) -> np.ndarray:
        """So many free cells, of which there are enough; neighbours if there are any."""
        if row.last > row.first:
            behind = int(self._table[row.number, row.last - 1]) + 1
            if n == 1 and behind < self.count and not self._owners[behind]:
                self.free, self._owners[behind] = self.free - 1, 1
                return np.array((behind,), np.int64)
            starts = (behind, self._home(row) + row.before + row.last)
        else:
            starts = (self._home(row) + row.before + row.last,)
        self.free -= n
        for start in starts:
            if start + n <= self.count and not self._owners[start : start + n].any():
                self._owners[start : start + n] = 1
                return np.arange(start, start + n)
        cells = self._spread(n)
        self._owners[cells] = 1
        return cells

    def _spread(self, n: int) -> np.ndarray:
        """Free cells in the longest run, or in several, the longest first."""
        free = np.flatnonzero(self._owners == 0)
        edges = np.concatenate(([0], np.flatnonzero(np.diff(free) != 1) + 1, [len(free)]))
        lengths = np.diff(edges)
        longest = int(lengths.argmax())
        if lengths[longest] >= n:
            # In its middle: at its beginning it would be in the way of the sequence that ends before it.
            at = int(edges[longest]) + (int(lengths[longest] - n) // 2 if free[edges[longest]] else 0)
            return free[at : at + n]
        order = lengths.argsort(kind="stable")[::-1]
        return np.concatenate([free[edges[i] : edges[i + 1]] for i in order])[:n]

    def _home(self, row: Row) -> int:
        """Where a row's part of the pool begins."""
        return row.home % self._parts * (self.count // self._parts)

    def _give_back(self, cells: np.ndarray) -> None:
        """One sequence holds these no longer."""
        owners = self._owners[cells] - 1
        self._owners[cells] = owners
        self.free += len(cells) - int(np.count_nonzero(owners))

    def _count(self) -> None:
        """Count who holds what anew."""
        held = [self.stored(s) for s in self._rows]
        owners = np.bincount(np.concatenate(held), minlength=self.count) if held else np.zeros(self.count)
        self._owners = owners.astype(np.int32)
        self.free = int(np.count_nonzero(self._owners == 0))

    # ---- what the batch sees ------------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """No batch is under way."""
        self._groups, self.reserved = (), False
        self.new = self.begin = self.end = np.empty(0, np.int64)
        self.cells, self.adjoining, self.origin = self._table.reshape(-1), True, 0

    def reserve(self, tokens: int) -> None:
        """A batch of so many tokens that stores nothing and sees nothing, over all cells that there are."""
        self.rest()
        self.reserved = True
        self.new = self.begin = self.end = np.zeros(tokens, np.int64)

    def look(self, lifted: np.ndarray | None) -> None:
        """Find what each token of the batch sees: `begin` and `end` int64 [T], places in `cells`.

        `lifted` bool [T] names those that see later positions of their sequence too. `adjoining` is whether all seen are neighbours in
        their sequences; `origin`, of the first sequence, an index in it less its place.
        """
        tokens = len(self.new)
        self.begin, self.end = np.empty(tokens, np.int64), np.empty(tokens, np.int64)
        self.adjoining = True
        width = self._table.shape[1]
        for sequence, positions, where in self._groups:
            row = self._rows[sequence]
            low, high = self._seen(row, positions, None if lifted is None else lifted[where])
            at = row.number * width
            self.begin[where], self.end[where] = at + low, at + high
            self.adjoining &= bool((low if isinstance(low, int) else low.min()) >= row.run)
        if self._groups:
            row = self._rows[self._groups[0][0]]
            self.origin = row.before - row.number * width
        self.cells = self._table.reshape(-1)

    def _seen(self, row: Row, positions: np.ndarray, lifted: np.ndarray | None) -> tuple[int | np.ndarray, int | np.ndarray]:
        """Of these positions, the places that each sees: from the first number up to the second."""
        stored = self._positions[row.number, row.first : row.last]
        low: int | np.ndarray = row.first
        if self.window is not None:
            low = row.first + stored.searchsorted(positions - (self.window - 1))
        elif self.chunk is not None:
            low = row.first + stored.searchsorted(positions - positions % self.chunk)
        last = positions
        if lifted is not None:
            last = np.where(lifted, ENDLESS if self.chunk is None else positions - positions % self.chunk + (self.chunk - 1), positions)
        elif len(positions) == 1 and stored[-1] == positions[0]:
            return low, row.last
        return low, row.first + stored.searchsorted(last, "right")

    def history(self) -> tuple[np.ndarray, np.ndarray]:
        """All cells that a token of the batch sees, int32 [n], and which of them each does, bool [T, n]."""
        if self.reserved:
            return np.arange(self.count, dtype=np.int32), np.zeros((len(self.new), self.count), bool)
        pieces = [self.cells[self.begin[where].min() : self.end[where].max()] for _, _, where in self._groups]
        cells = np.unique(np.concatenate(pieces)) if pieces else np.empty(0, np.int32)
        mask = np.zeros((len(self.new), len(cells)), bool)
        for seen, begin, end in zip(mask, self.begin, self.end, strict=True):
            seen[cells.searchsorted(self.cells[begin:end])] = True
        anyone = mask.any(0)
        return (cells, mask) if anyone.all() else (cells[anyone], mask[:, anyone])

    # ---- sequences ----------------------------------------------------------------------------------------------------------

    def copy(self, source: int, target: int, length: int) -> None:
        """`target` holds what `source` does before position `length`, in the same cells, and nothing else."""
        n = int(self.positions(source).searchsorted(length))
        cells, positions = self.stored(source)[:n].copy(), self.positions(source)[:n].copy()
        index = self._rows[source].before + self._rows[source].first if n else 0
        self._owners[cells] += 1
        self._replace(target, index, cells, positions)

    def fill(self, sequence: int, positions: np.ndarray, store: Callable[[np.ndarray], None]) -> None:
        """New cells for positions in order, which are then all that the sequence holds. `check_fill` comes before.

        `store(cells)` is called before the sequence holds them.
        """
        index = int(positions[0]) if self.window is not None and len(positions) else 0  # a window has forgotten those before
        self._replace(sequence, 0, np.empty(0, np.int64), positions[:0])
        if not len(positions):
            return
        cells = self._allocate(self._begin(sequence), len(positions))
        store(cells)
        self._write(sequence, index, cells, positions)
        self.rest()

    def check_fill(self, sequence: int, n: int) -> None:
        """Raise CacheFull where so many positions do not fit in place of a sequence's own."""
        self._count()
        free = self.free + self._last_owned(self.stored(sequence))
        if free < n:
            raise CacheFull(f"the KV cache is full: {n} positions to restore, {free} of {self.count} cells are free")

    def close_up(self, sequence: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `cut` does to cells: those behind `end`, those that hold the same positions afterwards, and those given back.

        What is behind moves into the cells that are cut, so that neighbours stay neighbours, unless another sequence holds these.
        """
        cells = self.stored(sequence)
        low, high = (int(i) for i in self.positions(sequence).searchsorted((begin, end)))
        behind = cells[high:].copy()
        if low < high and self.shared(cells[low:high]):
            return behind, behind, cells[low:high].copy()
        return behind, cells[low : low + len(behind)].copy(), cells[low + len(behind) :].copy()

    def cut(self, sequence: int, begin: int, end: int, move: Callable[[], None]) -> None:
        """A sequence loses positions from `begin` up to `end`; those behind move down by as many, in cells as `close_up` has it.

        `move()` is called to move what these cells hold, while the sequence holds neither.
        """
        row = self._rows.get(sequence)
        if not row or row.first == row.last:
            self._rows.pop(sequence, None)
            return
        stored, cells = self.positions(sequence), self.stored(sequence)
        low, high = (int(i) for i in stored.searchsorted((begin, end)))
        index, oldest = row.before + row.first, int(stored[0])
        index -= max(0, min(end, oldest) - max(begin, oldest - index))  # what was forgotten is cut too
        _, onto, gone = self.close_up(sequence, begin, end)
        if low:
            last = row.first + low
            if row.run >= last:
                row.run = run_start(self._table[row.number, :last], row.first)
            row.last = last
        else:
            del self._rows[sequence]
        if high < len(stored):
            move()
            kept = np.concatenate((stored[:low], stored[high:] - (end - begin)))
            self._write(sequence, index, np.concatenate((cells[:low], onto)), kept)
        self._give_back(gone)
        self.rest()

    def _replace(self, sequence: int, index: int, cells: np.ndarray, positions: np.ndarray) -> None:
        """A sequence holds these cells, its own already, in place of those that it did; its first is number `index`."""
        gone = self.stored(sequence).copy()
        if len(cells):
            self._write(sequence, index, cells, positions)
        else:
            self._rows.pop(sequence, None)
        self._give_back(gone)
        self.rest()

    # ---- rows ---------------------------------------------------------------------------------------------------------------

    def _begin(self, sequence: int) -> Row:
        """A row for a sequence that has none."""
        home = first_without(row.home for row in self._rows.values())
        row = self._rows[sequence] = Row(self._unused(), home)
        return row

    def _unused(self) -> int:
        """The number of a row that is nobody's."""
        number = first_without(row.number for row in self._rows.values())
        if number == len(self._table):
            self._tables = tuple(np.concatenate((table, np.zeros_like(table))) for table in self._tables)  # type: ignore[assignment]
        return number

    def _write(self, sequence: int, index: int, cells: np.ndarray, positions: np.ndarray) -> Row:
        """A sequence's row anew; its first is number `index` of the sequence."""
        first, old = index % BLOCK, self._rows.get(sequence)
        last = first + len(cells)
        self._widen(last)
        number = self._unused()
        self._table[number, first:last] = cells
        self._positions[number, first:last] = positions
        home = old.home if old else first_without(row.home for row in self._rows.values())
        run = run_start(self._table[number, :last], first)
        row = self._rows[sequence] = Row(number, home, first, last, index - first, run)
        return row

    def _make_place(self, sequence: int, row: Row, n: int) -> Row:
        """Room for n places more at the end: in front, where half of the row is free, else in longer rows."""
        width = self._table.shape[1]
        if 2 * row.first >= width and row.last - row.first + BLOCK + n <= width:
            return self._write(sequence, row.before + row.first, self.stored(sequence), self.positions(sequence))
        self._widen(row.last + n)
        return row

    def _widen(self, width: int) -> None:
        """Rows of at least so many places."""
        more = width - self._table.shape[1]
        if more > 0:
            more = -(-max(more, self._table.shape[1]) // BLOCK) * BLOCK
            self._tables = tuple(np.pad(table, ((0, 0), (0, more))) for table in self._tables)  # type: ignore[assignment]


def first_without(taken: Iterable[int]) -> int:
    """The lowest number that is not taken."""
    numbers = set(taken)
    return next(n for n in count() if n not in numbers)


def neighbours(cells: np.ndarray) -> bool:
    """Whether each cell is the one behind the one before."""
    return int(cells[-1]) - int(cells[0]) == len(cells) - 1 and bool((cells[1:] - cells[:-1] == 1).all())


def run_start(cells: np.ndarray, first: int) -> int:
    """The place, from `first` on, from which all cells up to the last are neighbours."""
    breaks = np.flatnonzero(np.diff(cells[first:]) != 1)
    return first + (int(breaks[-1]) + 1 if len(breaks) else 0)
