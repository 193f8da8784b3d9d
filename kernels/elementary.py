"""Scalar functions that kernels inline: widening and rounding of stored numbers, and exp, which LLVM turns into vector code.

Under NUMBA_DISABLE_JIT they run as plain Python.
"""

import numpy as np
from numba import types
from numba.extending import overload

from .dtypes import BF16
from .jit import inline

# exp(x) = 2^n · e^r with n = round(x / ln 2), r = x − n·ln 2 in two parts (Cody and Waite), |r| ≤ ln 2 / 2.
LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
# Adding 1.5 · 2^23 leaves the rounded integer in the low bits of an f32.
ROUND = np.float32(12582912.0)
ROUND_BITS = np.int32(0x4B400000)
# Beyond these the result is 0 or infinity: the power of two would leave the exponent's eight bits.
LOWEST, HIGHEST = np.float32(-86.98), np.float32(88.72283)
# e^r ≈ 1 + r + r²·P(r), P by least squares on Chebyshev nodes of the relative error (Cephes expf's degree).
P0, P1, P2, P3, P4, P5 = (
    np.float32(c) for c in (5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4)
)
HALF, ONE, TWO = np.float32(0.5), np.float32(1.0), np.float32(2.0)
ODD = np.uint32(1)
ZERO, INFINITY = np.float32(0.0), np.float32(np.inf)


@inline
def exp(x):
    """e^x for an f32, within 2 units in the last place; 0 below −86.98, infinity above 88.7, NaN stays NaN."""
    shifted = x * LOG2_E + ROUND
    n = shifted - ROUND
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = ((((P5 * r + P4) * r + P3) * r + P2) * r + P1) * r + P0
    y = (p * r) * r + r + ONE
    # 2^n as 2 · 2^(n−1): at n = 128 the exponent field alone would already read infinity
    power = np.int32((np.float32(shifted).view(np.int32) - ROUND_BITS + np.int32(126)) << np.int32(23)).view(np.float32)
    y = y * power * TWO
    y = ZERO if x < LOWEST else y
    return INFINITY if x > HIGHEST else y


@inline
def bf16_value(bits):
    """The f32 with these 16 upper bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inline
def bf16_bits(x):
    """The upper 16 bits of an f32, rounded to nearest, ties to even; NaN stays NaN (as `dtypes.to_bf16`)."""
    u = np.float32(x).view(np.uint32)
    rounded = np.uint32((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & ODD)) >> np.uint32(16))
    quiet = np.uint32((u >> np.uint32(16)) | np.uint32(0x40))
    return np.uint16(quiet if np.uint32(u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)


F16_SCALE = np.float32(2.0**112)  # moves the exponent's bias from 15 to 127


@inline
def f16_value(bits):
    """The f32 of an IEEE half: the product makes subnormals normal; all-ones exponents are infinity and NaN."""
    magnitude = np.uint32((np.uint32(bits) & np.uint32(0x7FFF)) << np.uint32(13))
    scaled = np.float32(np.uint32(magnitude).view(np.float32) * F16_SCALE).view(np.uint32)
    special = np.uint32(0x7F800000) if magnitude >= np.uint32(0x0F800000) else np.uint32(0)
    return np.uint32(scaled | special | np.uint32((np.uint32(bits) & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)


@inline
def f16_bits(x):
    """The IEEE half nearest to an f32, as its bits, ties to even; NaN stays NaN, and what is too large becomes infinity."""
    u = np.float32(x).view(np.uint32)
    size = np.uint32(u & np.uint32(0x7FFFFFFF))
    if size >= np.uint32(0x47800000):
        half = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else np.uint32(0x7C00)
    elif size < np.uint32(0x38800000):  # subnormal: beside 0.5 an f32 has the steps of such a half
        half = np.uint32(np.float32(size.view(np.float32) + HALF).view(np.uint32) - np.uint32(0x3F000000))
    else:
        half = np.uint32(np.uint32(size - np.uint32(0x38000000) + np.uint32(0xFFF) + ((size >> np.uint32(13)) & ODD)) >> np.uint32(13))
    return np.uint16(half | ((u >> np.uint32(16)) & np.uint32(0x8000)))


def value(item):
    """One stored weight (f32, or a record of f16 or bf16 bits) as f32."""
    if isinstance(item, np.void):
        return bf16_value(item["bf16"]) if item.dtype == BF16 else f16_value(item["f16"])
    return item


@overload(value)
def _value(item):
    if isinstance(item, types.Record):
        return (lambda item: bf16_value(item["bf16"])) if "bf16" in item.fields else (lambda item: f16_value(item["f16"]))
    return lambda item: item


def scale_at(row, place):
    """The scale at a place of a row of a KV cache in 8 bits (kernels.cells); 1 in other rows."""
    return f16_value(row[place : place + 2].view(np.uint16)[0]) if row.dtype == np.int8 else ONE


@overload(scale_at)
def _scale_at(row, place):  # noqa: ARG001 - an overload's arguments are those of the function
    if row.dtype == types.int8:
        return lambda row, place: f16_value((np.uint16(np.uint8(row[place + 1])) << np.uint16(8)) | np.uint16(np.uint8(row[place])))
    return lambda row, place: ONE  # noqa: ARG005
