"""Tensors to look at: the weights of a checkpoint, or arrays, read where they are asked for and nowhere else.

A weight stays in the memory map until `Values.read` takes a part of it, so that a slice of a file of any size costs its own bytes. Weights
in MXFP4 are there three times: their blocks and their scales as they are stored, and decoded, under the name that the two share.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..kernels.dtypes import BF16, F16, F32, bits
from ..kernels.fp4 import BLOCK, dequantize_reference
from .checkpoint import DTYPES, Checkpoint
from .tensor_slice import Axis, resolve_slice

MXFP4 = "MXFP4"
PIECE = 2**16  # elements read at a time: they stay in a core's cache
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Fetch = Callable[[tuple[range, ...]], np.ndarray]  # positions of every axis -> the values there, as they are stored


@dataclass(frozen=True)
class Values:
    """A tensor, or a part of it, whose values are read on demand."""

    name: str
    kind: str  # the stored dtype as safetensors spells it, or "MXFP4"
    whole: tuple[int, ...]  # the shape of the whole tensor
    nbytes: int  # of the whole tensor, as stored
    dtype: np.dtype  # of the arrays that `read` gives
    axes: tuple[Axis, ...]  # which part
    fetch: Fetch

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        return tuple(len(axis) for axis in self.axes if isinstance(axis, range))

    @property
    def size(self) -> int:
        """Elements of the part."""
        return math.prod(self.shape)

    def read(self, at: Sequence[slice] = ()) -> np.ndarray:
        """The part's values at these slices of its axes (those left out whole), as stored; nothing else is read. Perhaps a view."""
        slices = itertools.chain(at, itertools.repeat(slice(None)))
        ranges = [range(axis, axis + 1) if isinstance(axis, int) else axis[next(slices)] for axis in self.axes]
        shape = [len(r) for r, axis in zip(ranges, self.axes, strict=True) if isinstance(axis, range)]
        return self.fetch(tuple(ranges)).reshape(shape) if all(ranges) else np.empty(shape, self.dtype)

    def part(self, text: str | None) -> "Values":
        """The part of the whole tensor that a slice in text takes; see `resolve_slice`. None takes all."""
        return self if text is None else replace(self, axes=resolve_slice(text, self.whole, self.name))

    def pieces(self, limit: int = PIECE) -> Iterator[np.ndarray]:
        """All values in row-major order, at most `limit` at a time: arrays that follow one another."""
        for at in cuts(self.shape, limit):
            yield self.read(at)


def cuts(shape: tuple[int, ...], limit: int) -> Iterator[tuple[slice, ...]]:
    """Slices that cut a shape, in row-major order, into contiguous parts of at most `limit` elements."""
    if 0 in shape:
        return
    axis, inner = len(shape), 1  # axes from `axis` on are taken whole
    while axis and inner * shape[axis - 1] <= limit:
        axis -= 1
        inner *= shape[axis]
    if not axis:
        yield ()
        return
    step = max(1, limit // inner)
    for lead in itertools.product(*(range(n) for n in shape[: axis - 1])):
        for start in range(0, shape[axis - 1], step):
            yield (*(slice(i, i + 1) for i in lead), slice(start, start + step))


def of_array(name: str, array: np.ndarray) -> Values:
    """An array as a tensor to look at."""
    kind = NAMES.get(array.dtype, array.dtype.name)
    return Values(name, kind, array.shape, array.nbytes, array.dtype, whole_axes(array.shape), fetch_from(array))


def weights(checkpoint: Checkpoint) -> dict[str, Values]:
    """Every tensor of a checkpoint by its name, in file order; after the blocks of MXFP4 weights, the decoded ones."""
    found: dict[str, Values] = {}
    for name, tensor in checkpoint.tensors.items():
        dtype, axes = DTYPES.get(tensor.dtype, np.dtype(np.void)), whole_axes(tensor.shape)
        found[name] = Values(name, tensor.dtype, tensor.shape, tensor.nbytes, dtype, axes, fetch_stored(checkpoint, name))
        stem = name[: -len("_blocks")]
        if name.endswith(("_blocks", ".blocks")) and (parts := mxfp4_parts(checkpoint, stem)):
            found[stem] = mxfp4_weight(checkpoint, stem, *parts)
    return found


def mxfp4_weight(checkpoint: Checkpoint, name: str, blocks: str, scales: str) -> Values:
    """The decoded weight, f32 [..., 32 n], of stored blocks u8 [..., n, 16] and scales u8 [..., n]."""
    *rows, n = checkpoint.tensors[scales].shape
    shape = (*rows, n * BLOCK)
    nbytes = checkpoint.tensors[blocks].nbytes + checkpoint.tensors[scales].nbytes
    return Values(name, MXFP4, shape, nbytes, F32, whole_axes(shape), fetch_decoded(checkpoint, blocks, scales))


def mxfp4_parts(checkpoint: Checkpoint, name: str) -> tuple[str, str] | None:
    """The names of the blocks and the scales of an MXFP4 weight; None where `name` is none, or is stored itself."""
    for mark in "_.":
        parts = f"{name}{mark}blocks", f"{name}{mark}scales"
        if name in checkpoint.tensors or not all(part in checkpoint.tensors for part in parts):
            continue
        blocks, scales = (checkpoint.tensors[part] for part in parts)
        if blocks.dtype == scales.dtype == "U8" and scales.shape and blocks.shape == (*scales.shape, BLOCK // 2):
            return parts
    return None


def whole_axes(shape: Sequence[int]) -> tuple[Axis, ...]:
    """Every position of every axis."""
    return tuple(range(n) for n in shape)


def fetch_from(array: np.ndarray) -> Fetch:
    """Reads from an array, as views of it."""
    return lambda ranges: array[tuple(as_slice(r) for r in ranges)]


def fetch_stored(checkpoint: Checkpoint, name: str) -> Fetch:
    """Reads from a stored tensor, as views of the memory map."""
    return lambda ranges: fetch_from(checkpoint.array(name))(ranges)


def fetch_decoded(checkpoint: Checkpoint, blocks: str, scales: str) -> Fetch:
    """Reads from MXFP4 weights: the blocks that hold the wanted positions are decoded, and no others."""

    def fetch(ranges: tuple[range, ...]) -> np.ndarray:
        held, inside = blocks_of(ranges[-1])
        at = (*(as_slice(r) for r in ranges[:-1]), held)
        return dequantize_reference(checkpoint.array(blocks)[at], checkpoint.array(scales)[at])[..., as_slice(inside)]

    return fetch


def blocks_of(columns: range) -> tuple[slice, range]:
    """The blocks that hold these positions, and where the positions are inside them."""
    first, last = min(columns[0], columns[-1]) // BLOCK, max(columns[0], columns[-1]) // BLOCK
    return slice(first, last + 1), range(columns.start - first * BLOCK, columns.stop - first * BLOCK, columns.step)


def as_slice(positions: range) -> slice:
    """The slice that takes these positions; a stop before the first position has no number there."""
    return slice(positions.start, positions.stop if positions.stop >= 0 else None, positions.step)


def patterns(array: np.ndarray) -> np.ndarray:
    """The bits of each element as an unsigned integer of its size."""
    return bits(array) if array.dtype in (BF16, F16) else array.view(f"u{array.dtype.itemsize}")
