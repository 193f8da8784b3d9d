"""Rows of f32 rounded to how a KV cache stores them, and the rounding of a block to 8 bits: plain loops that run anywhere.

What bf16 and Q8_0 are is said in `kernels.dtypes` and `kernels.q8`, the layout of a row in `kernels.cells`. A row costs less than a
microsecond: a decode step rounds one of each head in each layer.
"""

import numpy as np

from .elementary import bf16_bits, f16_bits, value
from .jit import inline, kernel
from .simd.q8 import LEAST

BLOCK = 32  # numbers that share a scale
LARGEST, SMALLEST = np.float32(127), np.float32(LEAST)
ZERO, HALF, ONE, INFINITY = (np.float32(n) for n in (0, 0.5, 1, np.inf))
SIZE = np.int32(0x7FFFFFFF)  # the bits of an f32 but its sign


@inline
def round_block(w, values):
    """The integers of one block of stored weights, up to 32; returns d in f32. Plain loops: any processor runs them, and plain Python."""
    largest = np.int32(0)
    for k in range(len(w)):
        largest = max(largest, np.int32(np.float32(value(w[k])).view(np.int32) & SIZE))  # as integers: NaN above infinity above all numbers
    d = np.int32(largest).view(np.float32) / LARGEST
    inverse = ONE / d if SMALLEST <= d < INFINITY else ZERO
    for k in range(len(w)):
        scaled = value(w[k]) * inverse if inverse else ZERO
        whole = np.trunc(scaled)
        rest = scaled - whole
        values[k] = np.int8(whole + (rest >= HALF) - (rest <= -HALF))
    return d


@kernel
def bf16_rows(rows, out):
    """Rows f32 [n, Dh] as bits of bf16, u16 [n, Dh]. Unchecked."""
    for i in range(rows.shape[0]):
        for d in range(rows.shape[1]):
            out[i, d] = bf16_bits(rows[i, d])


@kernel
def q8_rows(rows, out):
    """Rows f32 [n, Dh] as cells of a KV cache, i8 [n, Dh + 2 · ⌈Dh / 32⌉]: integers, then scales (kernels.cells). Unchecked."""
    n, Dh = rows.shape
    for i in range(n):
        for b in range((Dh + BLOCK - 1) // BLOCK):
            first, last = b * BLOCK, min((b + 1) * BLOCK, Dh)
            scale = f16_bits(round_block(rows[i, first:last], out[i, first:last]))
            out[i, Dh + 2 * b] = np.uint8(scale & np.uint16(0xFF)).view(np.int8)
            out[i, Dh + 2 * b + 1] = np.uint8(scale >> np.uint16(8)).view(np.int8)
