"""The tensors of a cut checkpoint: where the values of each come from in the source, read and converted piece by piece.

    kept        rows of stored tensors, one after another: whole tensors, the experts that stay, q, k and v out of or into one tensor
    converted   the same in another float dtype: exact where that one is wider, else rounded to nearest even, and counted
    decoded     experts [E, in, out] out of MXFP4 blocks [E, out, in/32, 16] and scales [E, out, in/32]; bf16 and f32 hold every value
    encoded     the way back, only where each value comes out the same, to the sign of a zero

MXFP4 can write some blocks in more than one way. Here the largest value of a block is 4 or 6 times its scale, as the OCP specification has
it: the scale is 2^(⌊log₂ max|x|⌋ − 2), not below 2^-127, and of a block of zeros its byte is 1. Blocks so written come back byte for byte
from `decoded` and `encoded`; others come back with the same values.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..kernels.dtypes import to_bf16, to_f16, widen
from ..kernels.errors import ToyllmError
from ..kernels.fp4 import BLOCK, dequantize_reference
from .checkpoint import Checkpoint, Tensor, brief
from .tensor_values import MXFP4

PIECE = 2**20  # elements at a time: some megabytes, whatever a tensor takes
FLOATS = ("F32", "F16", "BF16")
EXACT = {("F16", "F32"), ("BF16", "F32"), (MXFP4, "F32"), (MXFP4, "BF16")}  # conversions that no value is changed by
ZERO_SCALE = 1  # of a block of zeros: 2^-126, as 2^-127 is subnormal, which some readers of the byte lose


@dataclass
class Rounding:
    """What conversions have changed so far."""

    values: int = 0  # converted to a dtype that does not hold all of the other's
    changed: int = 0
    largest: float = 0.0  # relative change of a value


Pieces = Callable[[Rounding], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Rows:
    """Rows of a stored tensor: runs of its first axis. None takes all of it."""

    tensor: Tensor
    runs: tuple[range, ...] | None = None


@dataclass(frozen=True)
class Made:
    """One tensor of the result; `pieces` gives its values in row-major order."""

    key: str  # ours, with the new layer's number; empty for a buffer
    name: str
    source: str  # the dtype that it comes from, "MXFP4" too
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    home: Path  # the source's file in which its values, or the first of them, are
    pieces: Pieces

    @property
    def becomes(self) -> str:
        """The dtype that it comes to, "MXFP4" for its blocks and scales."""
        return MXFP4 if self.key.endswith((".blocks", ".scales")) else self.dtype


# ---- rows, and other dtypes -------------------------------------------------------------------------------------------------


def kept(checkpoint: Checkpoint, parts: Sequence[Rows], dtype: str) -> Pieces:
    """Rows of tensors, one after another, in a dtype."""

    def pieces(rounding: Rounding) -> Iterator[np.ndarray]:
        for part in parts:
            for first, piece in stored(checkpoint, part):
                yield piece if part.tensor.dtype == dtype else converted(piece, dtype, part.tensor, first, rounding)

    return pieces


def stored(checkpoint: Checkpoint, part: Rows) -> Iterator[tuple[int, np.ndarray]]:
    """Rows as they are mapped, flat, some at a time, each with the flat index of its first value in the whole tensor."""
    array = checkpoint.array(part.tensor.name)
    width = array[0].size if array.ndim and len(array) else 1  # of a row
    for run in part.runs or (range(array.size // width),):
        for first in range(run.start * width, run.stop * width, PIECE):
            yield first, array.reshape(-1)[first : min(first + PIECE, run.stop * width)]


def converted(piece: np.ndarray, dtype: str, tensor: Tensor, first: int, rounding: Rounding) -> np.ndarray:
    """A flat piece of a tensor, from its flat index `first` on, in another float dtype. Raises ToyllmError where one becomes infinite."""
    narrowed, over = narrow(widen(piece), dtype, (tensor.dtype, dtype) in EXACT, rounding)
    if over is not None:
        index = [int(i) for i in np.unravel_index(first + over, tensor.shape)]
        raise too_large(f"{tensor.path}: tensor {brief(tensor.name)}", index, float(widen(piece)[over]), dtype)
    return narrowed


def too_large(what: str, index: list[int], value: float, dtype: str) -> ToyllmError:
    """The line for a value that another dtype has no room for."""
    return ToyllmError(f"{what}: {value:g} at {index} is beyond what {dtype} holds; choose a dtype with a wider range")


def narrow(values: np.ndarray, dtype: str, exact: bool, rounding: Rounding) -> tuple[np.ndarray, int | None]:
    """f32 values in a dtype, and the flat index of the first finite one that is beyond it. What is not `exact` is counted."""
    if dtype == "F32":
        return np.ascontiguousarray(values, np.float32), None
    with np.errstate(over="ignore", under="ignore"):
        narrowed = to_bf16(values) if dtype == "BF16" else to_f16(values)
    if exact:
        return narrowed, None
    back = widen(narrowed)
    changed = np.flatnonzero((back != values) & ~np.isnan(values))
    rounding.values += values.size
    rounding.changed += changed.size
    if changed.size:
        before, after = values.ravel()[changed].astype(np.float64), back.ravel()[changed]
        over = np.flatnonzero(np.isinf(after))
        if over.size:
            return narrowed, int(changed[over[0]])
        rounding.largest = max(rounding.largest, float(np.abs(after / before - 1).max()))
    return narrowed, None


# ---- MXFP4 ------------------------------------------------------------------------------------------------------------------


def decoded(checkpoint: Checkpoint, blocks: Tensor, scales: Tensor, experts: Sequence[int], dtype: str) -> Pieces:
    """These experts [in, out], one after another, out of their blocks and scales."""

    def pieces(rounding: Rounding) -> Iterator[np.ndarray]:
        codes, exponents = checkpoint.array(blocks.name), checkpoint.array(scales.name)
        rows, n = scales.shape[1:]
        step = max(1, PIECE // max(rows * BLOCK, 1))
        for e in experts:
            for first in range(0, n, step):
                at = (e, slice(None), slice(first, first + step))
                values = dequantize_reference(codes[at], exponents[at])
                require_finite(values, exponents[at], scales, e, first)
                narrowed, over = narrow(np.ascontiguousarray(values.T), dtype, (MXFP4, dtype) in EXACT, rounding)
                if over is not None:
                    column, row = divmod(over, rows)
                    index = [e, row, first * BLOCK + column]
                    raise too_large(f"{blocks.path}: {brief(blocks.name)} decoded", index, float(values[row, column]), dtype)
                yield narrowed

    return pieces


def require_finite(values: np.ndarray, exponents: np.ndarray, scales: Tensor, e: int, first: int) -> None:
    """Raise ToyllmError where decoded values [rows, 32 n] are NaN, or exceed f32."""
    if np.isfinite(values).all():
        return
    row, block = (int(i) for i in np.argwhere(~np.isfinite(values.reshape(*exponents.shape, BLOCK)).all(axis=-1))[0])
    where = f"{scales.path}: tensor {brief(scales.name)}: scale {exponents[row, block]} at {[e, row, first + block]}"
    raise ToyllmError(f"{where} makes values that are not finite numbers; `toyllm check` lists what is damaged")


def encoded(checkpoint: Checkpoint, dense: Tensor, experts: Sequence[int], part: str) -> Pieces:
    """The blocks or the scales of these experts, one after another, out of matrices [in, out].

    Raises ToyllmError, with the blocks, for the first value that does not come out the same.
    """

    def pieces(_: Rounding) -> Iterator[np.ndarray]:
        array = checkpoint.array(dense.name)
        columns, rows = dense.shape[1:]
        step = max(1, PIECE // max(columns, 1))
        for e in experts:
            for first in range(0, rows, step):
                values = np.ascontiguousarray(widen(array[e, :, first : first + step]).T)
                scales = scale_bytes(values)
                if part == "scales":
                    yield scales
                    continue
                blocks = encode(values, scales)
                same = dequantize_reference(blocks, scales).view(np.uint32) == values.view(np.uint32)
                if not same.all():
                    row, column = (int(i) for i in np.argwhere(~same)[0])
                    raise not_mxfp4(dense, e, first + row, values[row], column)
                yield blocks

    return pieces


def scale_bytes(values: np.ndarray) -> np.ndarray:
    """The scales u8 [N, n] of f32 [N, 32 n]: those with which a block's largest value is 4 or 6."""
    largest = np.abs(values).reshape(len(values), -1, BLOCK).max(axis=-1)
    exponents = np.clip(np.frexp(largest)[1] - 3, -127, 127)  # frexp's own exponent is one more than the logarithm's floor
    return np.where(largest > 0, exponents + 127, ZERO_SCALE).astype(np.uint8)


def encode(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """f32 [N, 32 n] as blocks u8 [N, n, 16] under their scales u8 [N, n], wherever MXFP4 has these values.

    Elsewhere the result stands for something else: decode it to know.
    """
    exponents = scales.astype(np.int32) - 127
    signed = values.reshape(*scales.shape, BLOCK)
    with np.errstate(all="ignore"):
        doubled = np.minimum(np.nan_to_num(np.ldexp(np.abs(signed), 1 - exponents[..., None])), 15).astype(np.uint8)
    codes = CODE_OF_DOUBLED[doubled] | np.signbit(signed).astype(np.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


# Twice a value, whole, to its code, or to the next below that has one.
CODE_OF_DOUBLED = np.array([0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7], np.uint8)


def not_mxfp4(dense: Tensor, e: int, row: int, values: np.ndarray, lost: int) -> ToyllmError:
    """The line for a block of a row's f32 values that MXFP4 has not, one of which, number `lost` of the row, does not come out the same.

    A value that no scale helps, whose first digits are neither 1 nor 1.5, is named before those that are too small beside the largest.
    """
    start = lost - lost % BLOCK
    block = values[start : start + BLOCK]
    hopeless = np.flatnonzero(~np.isin(np.abs(np.frexp(block)[0]), (0, 0.5, 0.75)))
    column = start + int(hopeless[0]) if hopeless.size else lost
    why = (
        "MXFP4 has no such value" if hopeless.size else f"MXFP4 has no such value beside {np.abs(block).max():g}, the largest of its block"
    )
    where = f"{dense.path}: tensor {brief(dense.name)}: {values[column]:g} at {[e, column, row]}"
    return ToyllmError(f"{where}: {why}; these weights can only be rounded to it, which cut does not do: leave out --expert-dtype mxfp4")
