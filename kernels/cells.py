"""Cells of a KV cache: how the keys and values of a position are stored, and what is read back.

    f32    as they are
    bf16   rounded to nearest, ties to even                           (`dtypes.to_bf16`)
    q8     i8 [W], W = Dh + 2 · ⌈Dh / 32⌉: Dh integers in blocks of 32, the last perhaps shorter, then an f16 scale for each block

The integers and scales are those of `kernels.q8` (GGUF's Q8_0): a number comes back off by at most 1/223 of the largest of its block,
more where that is below 0.0078, and as 0 where it is below 3.8e-6. NaN stays NaN in f32 and bf16. In q8 a NaN or an infinity makes all
of its block NaN, and a block whose largest number is above 8.3e6 comes back as infinities and NaN: poison shows, wherever it lies.

Planning and reading need no compiler.
"""

import numpy as np

from .checks import check_array, check_number
from .dtypes import BF16, F32, bits, widen
from .errors import ToyllmError

BLOCK = 32  # numbers that share a scale
I8 = np.dtype(np.int8)
DTYPES = {"f32": F32, "bf16": BF16, "q8": I8}  # --cache-dtype, and what NumPy calls the elements of a cell


def width(Dh: int, dtype: str) -> int:
    """W, the elements of a stored row of Dh numbers. Raises ToyllmError for a dtype that is none."""
    check_number("Dh", Dh, whole=True)
    if dtype not in DTYPES:
        raise ToyllmError(f"--cache-dtype {dtype}: expected {' or '.join(DTYPES)}")
    return Dh + 2 * -(-Dh // BLOCK) if dtype == "q8" else Dh


def cell_bytes(Dh: int, dtype: str) -> int:
    """Bytes of a stored row of Dh numbers."""
    return width(Dh, dtype) * DTYPES[dtype].itemsize


def store(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Rows f32 [..., Dh] as cells hold them: [..., W] of DTYPES[dtype]; for f32 the same array. Raises ToyllmError on other arrays."""
    *outer, Dh = check_array("rows", rows, (None,) * max(1, np.ndim(rows)), contiguous=False)
    W = width(Dh, dtype)
    if dtype == "f32":
        return rows
    from .rounding import bf16_rows, q8_rows  # in time for the first token, not for a command that only plans

    out = np.empty((*outer, W), DTYPES[dtype])
    if out.size:
        flat = np.ascontiguousarray(rows).reshape(-1, Dh)
        if dtype == "bf16":
            bf16_rows(flat, bits(out).reshape(-1, Dh))
        else:
            q8_rows(flat, out.reshape(-1, W))
    return out


def load(stored: np.ndarray, Dh: int) -> np.ndarray:
    """The f32 numbers [..., Dh] of stored rows [..., W]; f32 comes back as the same array. Raises ToyllmError on other arrays."""
    *_, W = check_array("stored", stored, (None,) * max(1, np.ndim(stored)), tuple(DTYPES.values()), contiguous=False)
    wanted = width(Dh, "q8" if stored.dtype == I8 else "f32")
    if wanted != W:
        raise ToyllmError(f"stored: expected rows of {wanted} elements for {Dh} numbers, found {W}")
    if stored.dtype != I8:
        return widen(stored)
    scales = np.ascontiguousarray(stored[..., Dh:]).view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):  # 0 · ∞, of a block that is no numbers
        return stored[..., :Dh] * np.repeat(scales, BLOCK, -1)[..., :Dh]
