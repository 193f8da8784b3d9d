"""Storage formats of weights as NumPy dtypes, and their exact widening to f32.

A weight keeps the dtype it was stored with, so that an array says by itself how its bytes read. NumPy has no bfloat16
and Numba no half precision on processors, so both travel as records of one 16-bit field: `w["bits"]` are the raw bits.
"""

import numpy as np

F32 = np.dtype("<f4")
F16 = np.dtype([("f16", "<u2")])
BF16 = np.dtype([("bf16", "<u2")])

NAMES = {F32: "f32", F16: "f16", BF16: "bf16"}


def bits(array: np.ndarray) -> np.ndarray:
    """The raw 16-bit patterns of an F16 or BF16 array, as a view."""
    return array.view(np.uint16)


def widen(array: np.ndarray) -> np.ndarray:
    """The exact f32 values of an array stored as F32, F16 or BF16. F32 comes back as it is, the others as a new array.

    bfloat16 is the upper half of an f32; half precision is IEEE 754 binary16, subnormals, infinities and NaN included.
    """
    if array.dtype == BF16:
        return (bits(array).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if array.dtype == F16:
        return array.view(np.float16).astype(np.float32)
    return array


def to_bf16(array: np.ndarray) -> np.ndarray:
    """f32 values rounded to bfloat16, nearest even, NaN kept NaN (as ml_dtypes rounds)."""
    u = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    quiet = ((u >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    is_nan = (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, quiet, rounded).view(BF16)


def to_f16(array: np.ndarray) -> np.ndarray:
    """f32 values rounded to half precision, nearest even."""
    return np.ascontiguousarray(array, np.float32).astype(np.float16).view(F16)
