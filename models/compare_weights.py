"""Two checkpoints held against each other, weight by weight.

The bytes of a weight are read first, a few megabytes of both at a time: where all are equal, that is all it costs. What differs there, or
is stored otherwise (another dtype, MXFP4 against a matrix), is read once more as values, from the memory map in small pieces that are
given back: memory stays flat, and no expert tensor is ever expanded.
"""

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.dtypes import bits, to_bf16, to_f16, widen
from ..kernels.errors import ToyllmError
from .check_values import CHUNK, index_of
from .checkpoint import DTYPES, Tensor, brief
from .compare import Difference, Tally
from .compare_match import Side, Weight, match_weights, open_sides
from .location import ModelFiles
from .tensor_values import MXFP4, PIECE, cuts

MAPPED = 256  # pieces after which the pages of the memory map that they were read through are given back
ROUND = {"BF16": to_bf16, "F16": to_f16}
FLOATS = {"F32", *ROUND}
DERIVED = {"n_inner": "inner", "layer_types": "sliding"}  # settings that may be left to others -> what comes of them

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StoredBytes:
    """Where the bytes of two tensors that are stored alike differ."""

    name: str  # of the first
    differing: int  # bytes
    bits: int
    place: tuple[int, ...] | None  # the first element with such a byte, in the tensor's own shape; None where its dtype is not read
    experts: tuple[int, ...]  # those with such bytes


STATUS = {
    "same": "equal bit for bit",
    "bits": "other bits for the same values: zeros of another sign, or other NaN",
    "dtype": "another dtype, the same values",
    "rounded": "another dtype, the values rounded to it",
    "values": "other values",
    "bytes": "other bytes, of a dtype whose values are not read",
    "shape": "another shape",
    "only a": "only in A",
    "only b": "only in B",
}


@dataclass(frozen=True)
class Pair:
    """A weight of one checkpoint and the same one of the other, and how they differ."""

    a: Weight | None
    b: Weight | None
    status: str = "same"  # one of STATUS
    stored: tuple[StoredBytes, ...] = ()
    difference: Difference | None = None  # of the values, where they were read
    experts: tuple[int, ...] = ()  # those that differ
    rounded: str = ""  # "a" or "b": its values are the other's, rounded to its dtype

    @property
    def weight(self) -> Weight:
        """The one that is there, a's if both are."""
        weight = self.a or self.b
        if weight is None:
            raise ValueError("a pair of no weights")
        return weight

    def departs(self, rtol: float, atol: float) -> bool:
        """Whether the values differ beyond the tolerances; without any, bits of one dtype too. What has no values is to be the same."""
        if self.difference is None or (self.status == "bits" and not (rtol or atol)):
            return self.status != "same"
        return self.difference.exceeds(rtol, atol)


@dataclass(frozen=True)
class Report:
    """Two checkpoints compared."""

    pairs: tuple[Pair, ...]  # in the order of the architecture
    settings: tuple[tuple[str, Any, Any], ...]  # of config.json, as the models run: those that differ, with a's value and b's
    nbytes: int  # of all tensors of both

    def agrees(self, rtol: float, atol: float) -> bool:
        """Whether no weight departs and the configurations make one model of them; token ids in those do not matter to it."""
        return not any(p.departs(rtol, atol) for p in self.pairs) and all(key.endswith("_token_id") for key, _, _ in self.settings)


def compare_checkpoints(a: ModelFiles, b: ModelFiles, progress: Progress | None = None) -> Report:
    """Compare two checkpoints, calling progress(bytes done, bytes in all).

    Raises ToyllmError for models of two architectures, and for files that cannot be read.
    """
    sides = open_sides(a, b)
    matched = match_weights(*sides)
    total = sum(size_of(pair) for pair in matched)
    pairs, done = [], 0
    with open_files(sides) as files:
        for pair in matched:

            def advance(share: float, done: int = done, size: int = size_of(pair)) -> None:
                if progress:
                    progress(done + int(share * size), total)

            pairs.append(compare_pair(*pair, files, sides, advance))
            done += size_of(pair)
            advance(1)
    return Report(tuple(pairs), changed_settings(*sides), sum(t.nbytes for s in sides for t in s.checkpoint.tensors.values()))


def size_of(pair: tuple[Weight | None, Weight | None]) -> int:
    """Bytes to read of a pair: none where there is nothing to hold them against."""
    a, b = pair
    return a.nbytes + b.nbytes if a and b else 0


@contextmanager
def open_files(sides: tuple[Side, Side]) -> Iterator[dict[Path, FileIO]]:
    """The files of both, to read from. Raises ToyllmError where one cannot be read."""
    with ExitStack() as stack:
        files: dict[Path, FileIO] = {}
        for path in (path for side in sides for path in side.checkpoint.shards):
            try:
                files[path] = stack.enter_context(FileIO(path))
            except OSError as error:
                raise ToyllmError(f"{path}: cannot be read ({error.strerror})") from error
        yield files


def changed_settings(a: Side, b: Side) -> tuple[tuple[str, Any, Any], ...]:
    """Where the configurations differ; a default is as good as the same value written down."""
    names = [DERIVED.get(f.name, f.name) for f in fields(a.config)] if a.config else []
    return tuple((name, x, y) for name in names if (x := getattr(a.config, name)) != (y := getattr(b.config, name)))


# ---- one weight -------------------------------------------------------------------------------------------------------------


def compare_pair(a: Weight | None, b: Weight | None, files: Mapping[Path, FileIO], sides: tuple[Side, Side], advance: Any) -> Pair:
    """Compare the two, calling advance(share done, 0 to 1)."""
    if a is None or b is None:
        return Pair(a, b, "only b" if a is None else "only a")
    if a.shape != b.shape:
        return Pair(a, b, "shape")
    stored = ()
    if a.kind == b.kind and [t.shape for t in a.stored] == [t.shape for t in b.stored]:
        stored = tuple(compare_bytes(a, b, files, advance))
        if not stored:
            return Pair(a, b)
    if not {a.kind, b.kind} <= {*DTYPES, MXFP4}:
        return Pair(a, b, "bytes", stored)
    difference, experts, rounded = compare_values(a, b, sides, advance)
    experts = tuple(sorted({expert for found in stored for expert in found.experts})) if stored else experts
    if difference.differing:
        return Pair(a, b, "rounded" if rounded else "values", stored, difference, experts, rounded)
    return Pair(a, b, "bits" if a.kind == b.kind else "dtype", stored, difference, experts)


def compare_bytes(a: Weight, b: Weight, files: Mapping[Path, FileIO], advance: Callable[[float], None]) -> Iterator[StoredBytes]:
    """Where the stored bytes of two weights of one dtype and shape differ; nothing for tensors in which they do not."""
    scratch, done = np.empty((2, CHUNK), np.uint8), 0
    for s, t in zip(a.stored, b.stored, strict=True):
        differing = changed = 0
        first, experts = None, set[int]()
        share = s.nbytes // a.experts if a.experts else 0  # an expert's bytes
        for begin in range(0, s.nbytes, CHUNK):
            x, y = scratch[:, : min(CHUNK, s.nbytes - begin)]
            read_into(x, files[s.path], s, begin)
            read_into(y, files[t.path], t, begin)
            if not same(x, y):
                apart = np.bitwise_xor(x, y)
                differing, changed = differing + int(np.count_nonzero(apart)), changed + int(np.bitwise_count(apart).sum(dtype=np.int64))
                first = begin + int((apart != 0).argmax()) if first is None else first
                touched = range(begin // share, (begin + len(x) - 1) // share + 1) if share else ()
                experts |= {e for e in touched if apart[max(e * share - begin, 0) : (e + 1) * share - begin].any()}
            done += 2 * len(x)
            advance(done / (a.nbytes + b.nbytes))
        if first is not None:
            place = index_of(first // DTYPES[s.dtype].itemsize, s.shape) if s.dtype in DTYPES else None
            yield StoredBytes(s.name, differing, changed, place, tuple(sorted(experts)))


def same(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two runs of bytes are equal, eight at a time where they are so many."""
    whole = len(x) // 8 * 8
    return np.array_equal(x[:whole].view(np.uint64), y[:whole].view(np.uint64)) and np.array_equal(x[whole:], y[whole:])


def read_into(run: np.ndarray, file: FileIO, t: Tensor, begin: int) -> None:
    """Fill a run of bytes from byte `begin` of a tensor on. Raises ToyllmError where the file ends before, or fails."""
    filled = 0
    while filled < len(run):
        try:
            count = os.preadv(file.fileno(), [run[filled:].data], t.offset + begin + filled)
        except OSError as error:
            raise ToyllmError(f"{t.path}: cannot be read ({error.strerror})") from error
        if not count:
            raise ToyllmError(f"{t.path}: changed while open: it ends within tensor {brief(t.name)}")
        filled += count


def compare_values(
    a: Weight, b: Weight, sides: tuple[Side, Side], advance: Callable[[float], None]
) -> tuple[Difference, tuple[int, ...], str]:
    """The values of two weights: how they differ, in which experts, and which one's are the other's rounded to its dtype, if one's are."""
    tally, experts = Tally(), set[int]()
    rounded = {name for name, weight in (("a", a), ("b", b)) if weight.kind in ROUND and {a.kind, b.kind} <= FLOATS and a.kind != b.kind}
    for number, at in enumerate(cuts(a.shape, PIECE)):
        x, y = a.values.read(at), b.values.read(at)
        origin = tuple(part.start for part in at)
        apart = tally.add(x, y, origin)
        if apart is not None and a.experts:
            experts |= {int(e) + sum(origin[:1]) for e in np.flatnonzero(apart.reshape(len(apart), -1).any(1))}
        if "a" in rounded and not np.array_equal(bits(ROUND[a.kind](widen(y))), bits(np.ascontiguousarray(x))):
            rounded.remove("a")
        if "b" in rounded and not np.array_equal(bits(ROUND[b.kind](widen(x))), bits(np.ascontiguousarray(y))):
            rounded.remove("b")
        if number % MAPPED == MAPPED - 1:
            give_back(sides)
            advance(tally.elements / a.values.size)
    give_back(sides)
    return tally.result(), tuple(sorted(experts)), min(rounded, default="")


def give_back(sides: tuple[Side, Side]) -> None:
    """Let go of the pages that were read through the memory maps: the system's cache keeps them, this process does not."""
    for side in sides:
        for mapped in side.checkpoint.maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)
