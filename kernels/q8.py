"""Weights in 8 bits: integers in blocks of 32 that share a scale, as GGUF's Q8_0. Made from stored weights, and products with them.

    d              = max |w[32 b : 32 b + 32, j]| / 127           in f32
    values[j, k]   = round(w[k, j] · (1 / d)), k in block b       halves away from zero; 0 in a block of zeros
    scales[j, b]   = d                                            rounded to f16
    w'[k, j]       = values[j, k] · scales[j, b]                  exact in f32

values i8 [N, K filled up to blocks with 0], scales f16 [N, blocks]: 8.5 bits a weight. Source: ggml, quantize_row_q8_0_ref; the integers
and scales are the same bit for bit, but lie apart, where GGUF puts the scale before the integers of each block.

A weight is off by at most 0.57 d, 1/223 of the largest in its block: half a step, and what f16 takes from the scale. It takes more from
blocks whose largest is below 0.0078, where d is subnormal in f16, and all from those below 3.8e-6. NaN, infinities and weights above 8.3e6
have no scale: theirs comes out as NaN or infinity, for the caller to refuse (`unheld`).

`matmul_q8` is out = x · w' + bias for x f32 [M, K], products and sums in f32: one row reads the integers at the speed of memory, up to
five decode each block once for two rows, more expand 32 rows of w'ᵀ at a time into the second-level cache. All sum in the order of
`matmul` by output, so a row of x gives the same bits alone and among others. NaN and infinities in x spread to every output, through
blocks of zeros too.

What the steps gave, 2 cores of an EPYC (Zen 4, AVX-512), medians. One row, 768 to 2880 inputs, plain read 31-33 GB/s, bf16 28-31: prefetch
4 KiB ahead 23, 8 KiB 26-28, 16 KiB 28-30, 24 KiB no more; from the cache, a core: the scale widened as one value 14 GB/s, as a vector 18,
stored in f32 20 (from memory slower: 6 % more bytes); applied once, to the sum of a block's products, 2-5 % faster from memory, but
then many rows are no product of expanded weights. Few rows, 2880 x 2880, a core: expanded or straight, two 0.9 and 0.6 ms, three 1.4 and
1.0, five 2.3 and 1.6, six 1.5 and 1.7. Portable, the same, one row: a sum a block 1.0 ms (bf16 0.4), the row expanded first 1.7.
Quantising, a core: by output 3 billion weights a second, by input 1; as plain loops 0.3 and 0.1.
"""

from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from .checks import check_array
from .dtypes import F16, bits, to_f16, widen
from .elementary import f16_bits, value
from .errors import ToyllmError
from .jit import kernel
from .matmul import NO_BIAS, OUTPUTS, ROWS, check_matrix, multiply_panel, panels_for
from .rounding import LARGEST, SMALLEST, round_block
from .simd.ir import LANES
from .simd.q8 import expand_row, q8_tile, quantize_blocks, quantize_rest, transpose
from .simd.sums import products
from .threads import thread_scratch

BLOCK = 2 * LANES  # values that share a scale
COLUMNS = 64  # outputs of a task, by input: a cache line or more of each row of w
ONE, HALF = np.float32(1), np.float32(0.5)
I8 = np.dtype(np.int8)

one_rows, one_row = q8_tile(ROWS), q8_tile(1)
two_rows, two_row = q8_tile(ROWS, 2), q8_tile(1, 2)  # for two rows of x
STRAIGHT = 5  # rows of x for which w' is not worth expanding


class Q8(NamedTuple):
    """A matrix [K, N] in 8 bits, by output: values i8 [N, K filled up to blocks], scales F16 [N, blocks]."""

    values: np.ndarray
    scales: np.ndarray
    K: int


def room_for(w: np.ndarray) -> Q8:
    """Memory for w [K, N] in 8 bits."""
    K, N = w.shape
    n = -(-K // BLOCK)
    return Q8(np.empty((N, n * BLOCK), np.int8), np.empty((N, n), F16), K)


# ---- quantising -------------------------------------------------------------------------------------------------------------


def quantize_reference(w: np.ndarray) -> Q8:
    """The formula in NumPy."""
    made = room_for(w)
    N, n = made.scales.shape
    blocks = np.zeros((N, n * BLOCK), np.float32)
    blocks[:, : made.K] = widen(w).T
    blocks = blocks.reshape(N, n, BLOCK)
    with np.errstate(over="ignore", invalid="ignore"):
        d = np.abs(blocks).max(2, initial=0) / LARGEST
        held = (d >= SMALLEST) & (d < np.inf)
        scaled = np.where(held[:, :, None], blocks * np.divide(ONE, d, out=np.zeros_like(d), where=held)[:, :, None], 0)
        made.scales[...] = to_f16(d)
    whole = np.trunc(scaled)
    made.values[...] = (whole + np.copysign(np.abs(scaled - whole) >= HALF, scaled)).reshape(made.values.shape)
    return made


@kernel(parallel=True)
def _quantize_by_output(w, values, scales):
    """w [N, K], row by row."""
    N, K = w.shape
    n, whole = scales.shape[1], K // BLOCK
    stride, item, w_at, v_at, s_at = w.strides[0], w.itemsize, w.ctypes.data, values.ctypes.data, scales.ctypes.data
    for j in prange(N):
        quantize_blocks(w, w_at + j * stride, whole, v_at + j * n * BLOCK, s_at + j * n * 2)
        if whole < n:
            at, block = w_at + j * stride + whole * BLOCK * item, j * n + whole
            quantize_rest(w, at, K - whole * BLOCK, v_at + block * BLOCK, s_at + block * 2)


@kernel(parallel=True)
def _quantize_by_input(w, values, scales, panels):
    """w [K, N]: strips of columns, in which each block of inputs is transposed first, 16 columns at a time."""
    K, N = w.shape
    n = scales.shape[1]
    stride, item, w_at, v_at, s_at = w.strides[0], w.itemsize, w.ctypes.data, values.ctypes.data, scales.ctypes.data
    for strip in prange((N + COLUMNS - 1) // COLUMNS):
        panel = panels[numba.get_thread_id()]
        p_at = panel.ctypes.data
        for b in range(n):
            for first in range(strip * COLUMNS, min((strip + 1) * COLUMNS, N), LANES):
                width = min(LANES, N - first)
                for k in range(0, BLOCK, LANES):
                    row = b * BLOCK + k
                    transpose(w, w_at + row * stride + first * item, stride, K - row, width, p_at + 4 * k, 4 * BLOCK)
                for c in range(width):
                    block = (first + c) * n + b
                    quantize_blocks(panel, p_at + c * BLOCK * 4, 1, v_at + block * BLOCK, s_at + block * 2)


def quantize_kernel(w: np.ndarray) -> Q8:
    """The kernels, unchecked. They take no more memory than they give, but for a few KiB a thread."""
    made = room_for(w)
    if w.flags.c_contiguous:
        _quantize_by_input(w, made.values, made.scales, thread_scratch(LANES * BLOCK))
    else:
        _quantize_by_output(w.T, made.values, made.scales)
    return made


@kernel(parallel=True)
def _quantize_portable(w, values, scales):
    """w [K, N] in either order; scales as bits of f16."""
    K = len(w)
    for j in prange(len(scales)):
        values[j, K:] = 0
        for b in range(scales.shape[1]):
            first, last = b * BLOCK, min((b + 1) * BLOCK, K)
            scales[j, b] = f16_bits(round_block(w[first:last, j], values[j, first:last]))


def quantize_portable(w: np.ndarray) -> Q8:
    """The portable kernel, unchecked."""
    made = room_for(w)
    _quantize_portable(w, made.values, bits(made.scales))
    return made


def quantize(w: np.ndarray) -> Q8:
    """w [K, N] (f32, F16 or BF16, C-contiguous or a transpose) in 8 bits; what they do not hold shows in the scales: see `unheld`.

    Raises ToyllmError for other dtypes, shapes and strides.
    """
    check_matrix("w", w)
    return quantize_kernel(w)


def unheld(w: Q8) -> tuple[int, int] | None:
    """The first block, as an output and a block of its inputs, whose weights 8 bits do not hold; None where they hold all."""
    at = np.argwhere(~np.isfinite(widen(w.scales)))
    return (int(at[0, 0]), int(at[0, 1])) if len(at) else None


def dequantize_reference(w: Q8) -> np.ndarray:
    """The exact f32 values [K, N], as a transposed view."""
    blocks = w.values.reshape(*w.scales.shape, BLOCK) * widen(w.scales)[:, :, None]
    return blocks.reshape(w.values.shape)[:, : w.K].T


# ---- products ---------------------------------------------------------------------------------------------------------------


def matmul_q8_reference(x: np.ndarray, w: Q8, bias: np.ndarray, out: np.ndarray) -> None:
    """The formula in NumPy; f64 in, f64 arithmetic."""
    np.matmul(x, dequantize_reference(w), out=out)
    if bias.size:
        out += bias


@kernel(parallel=True)
def _few(x, values, scales, bias, out):
    """One row of x or a few, as long as those of values: `ROWS` outputs at a time, straight from their integers."""
    N, n = scales.shape
    M, K = x.shape
    w_at, s_at, x_at, y_at = values.ctypes.data, scales.ctypes.data, x.ctypes.data, out.ctypes.data
    for group in prange((N + ROWS - 1) // ROWS):
        first = group * ROWS
        last = min(first + ROWS, N)
        w, s = w_at + first * K, s_at + first * n * 2
        for m in range(0, M - 1, 2):
            x_m, y = x_at + m * K * 4, y_at + (m * N + first) * 4
            if last - first == ROWS:
                two_rows(w, K, s, n * 2, x_m, 4 * K, n, y, 4 * N)
            else:
                for j in range(last - first):
                    two_row(w + j * K, 0, s + j * n * 2, 0, x_m, 4 * K, n, y + 4 * j, 4 * N)
        if M % 2:
            x_m, y = x_at + (M - 1) * K * 4, y_at + ((M - 1) * N + first) * 4
            if last - first == ROWS:
                one_rows(w, K, s, n * 2, x_m, 0, n, y, 0)
            else:
                for j in range(last - first):
                    one_row(w + j * K, 0, s + j * n * 2, 0, x_m, 0, n, y + 4 * j, 0)
        if bias.size:
            for m in range(M):
                for j in range(first, last):
                    out[m, j] += bias[j]


@kernel(parallel=True)
def _many(x, values, scales, bias, out, panels):
    """Many rows of x, as long as those of values: `OUTPUTS` outputs are expanded, then tiles of `ROWS` x `TOKENS`."""
    N, n = scales.shape
    for group in prange((N + OUTPUTS - 1) // OUTPUTS):
        first = group * OUTPUTS
        count = min(OUTPUTS, N - first)
        panel = panels[numba.get_thread_id()]
        for j in range(first, first + count):
            to = panel.ctypes.data + (j - first) * n * BLOCK * 4
            expand_row(values.ctypes.data + j * n * BLOCK, scales.ctypes.data + j * n * 2, n, to)
        multiply_panel(panel, count, x, bias, out, first)


def matmul_q8_kernel(x: np.ndarray, w: Q8, bias: np.ndarray, out: np.ndarray, panels: np.ndarray) -> None:
    """The kernels, unchecked. `panels` f32 [threads, at least panels_for(K)] is scratch."""
    width = w.values.shape[1]
    if width > w.K:
        filled = np.zeros((len(x), width), np.float32)
        filled[:, : w.K] = x
        x = filled
    if len(x) <= STRAIGHT:
        _few(x, w.values, w.scales, bias, out)
    else:
        _many(x, w.values, w.scales, bias, out, panels)


@kernel(parallel=True)
def _portable(x, values, scales, bias, out):
    """Plain loops: the twin that any processor, the bounds checker and plain Python run."""
    M, K = x.shape
    for j in prange(len(scales)):
        for m in range(M):
            total = np.float32(0)
            for b in range(scales.shape[1]):
                first, last = b * BLOCK, min((b + 1) * BLOCK, K)
                total += products(x[m, first:last], values[j, first:last]) * value(scales[j, b])
            out[m, j] = total + bias[j] if bias.size else total


def matmul_q8_portable(x: np.ndarray, w: Q8, bias: np.ndarray, out: np.ndarray, panels: np.ndarray | None = None) -> None:  # noqa: ARG001
    """The portable kernel, unchecked."""
    _portable(x, w.values, w.scales, bias, out)


def check_q8(name: str, w: Q8) -> tuple[int, int]:
    """[K, N] of a matrix in 8 bits; else ToyllmError."""
    if not isinstance(w, Q8):
        raise ToyllmError(f"{name}: expected a Q8, found {type(w).__name__}; kernels.q8.quantize makes one")
    N, n = check_array(f"{name}.scales", w.scales, (None, None), (F16,))
    check_array(f"{name}.values", w.values, (N, n * BLOCK), (I8,))
    if n != -(-w.K // BLOCK):
        raise ToyllmError(f"{name}.K: expected as many inputs as {n} blocks of {BLOCK} are for, found {w.K}")
    return w.K, N


def matmul_q8(x: np.ndarray, w: Q8, bias: np.ndarray | None = None) -> np.ndarray:
    """x · w' + bias for x f32 [M, K], w [K, N] in 8 bits, bias f32 [N]: a new f32 [M, N]. Raises ToyllmError on other arrays."""
    K, N = check_q8("w", w)
    M, _ = check_array("x", x, (None, K))
    if bias is None:
        bias = NO_BIAS
    else:
        check_array("bias", bias, (N,))
    out = np.zeros((M, N), np.float32)
    if M and N and K:
        matmul_q8_kernel(x, w, bias, out, thread_scratch(panels_for(K)))
    elif bias.size:
        out += bias
    return out
