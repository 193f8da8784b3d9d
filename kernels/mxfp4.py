"""MXFP4: 4-bit floats in blocks of 32 that share a power of two (OCP Microscaling Formats v1.0), and products with them.

    W[j, 32 b + 2 i]     = CODES[blocks[j, b, i] & 15] · 2^(scales[j, b] − 127)
    W[j, 32 b + 2 i + 1] = CODES[blocks[j, b, i] >> 4] · 2^(scales[j, b] − 127)

blocks u8 [N, K/32, 16], scales u8 [N, K/32], as the checkpoint stores them; scale 255 is NaN. A weight is exact in f32.
`matmul_mxfp4` is out = x · Wᵀ + bias for x f32 [M, K], with products and sums in f32: one row reads the mapped bytes at the speed of
memory, up to four decode each code once for two rows, more expand 32 rows of W at a time into the second-level cache. None ever
holds a whole matrix.

Within a block the 16 even elements come before the 16 odd ones wherever both kernels compute (the low nibbles are a vector, the high ones
another), so x is put in that order first, and the order of summation is the same for one row and for many.

What it gave, 2880 x 2880, one core of an EPYC: expanded or straight, two rows 0.9 and 0.6 ms, three 1.4 and 1.0, four 1.5 and 1.1,
six 1.3 and 1.7.
"""

import numba
import numpy as np
from numba import prange

from .checks import check_array
from .errors import ToyllmError
from .fp4 import BLOCK, CODES, SCALES, dequantize_reference
from .jit import kernel
from .matmul import NO_BIAS, OUTPUTS, ROWS, multiply_panel
from .simd.fp4 import expand_row, fp4_tile
from .threads import thread_scratch

one_rows, one_row = fp4_tile(ROWS), fp4_tile(1)
two_rows, two_row = fp4_tile(ROWS, 2), fp4_tile(1, 2)  # for two rows of x
STRAIGHT = 4  # rows of x for which W is not worth expanding
U8 = np.dtype(np.uint8)


def matmul_mxfp4_reference(x: np.ndarray, blocks: np.ndarray, scales: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """The formula in NumPy; f64 in, f64 arithmetic."""
    np.matmul(x, dequantize_reference(blocks, scales).T, out=out)
    if bias.size:
        out += bias


@kernel
def _split_halves(x, out):
    """Each block of 32 of x [M, K]: its even elements, then its odd ones."""
    for m in range(x.shape[0]):
        for b in range(0, x.shape[1], BLOCK):
            for i in range(BLOCK // 2):
                out[m, b + i] = x[m, b + 2 * i]
                out[m, b + BLOCK // 2 + i] = x[m, b + 2 * i + 1]


@kernel(parallel=True)
def _dequantize(blocks, scales, table, out):
    N, n = scales.shape
    for j in prange(N):
        to = out.ctypes.data + j * n * BLOCK * 4
        expand_row(blocks.ctypes.data + j * n * 16, scales.ctypes.data + j * n, table.ctypes.data, n, out, to, True)


@kernel(parallel=True)
def _few(x, blocks, scales, table, bias, out):
    """One row of x or a few, their blocks in halves: `ROWS` rows of W at a time, straight from their bytes."""
    N, n = scales.shape
    M, K = x.shape
    w_at, s_at, t_at, x_at, y_at = blocks.ctypes.data, scales.ctypes.data, table.ctypes.data, x.ctypes.data, out.ctypes.data
    for group in prange((N + ROWS - 1) // ROWS):
        first = group * ROWS
        last = min(first + ROWS, N)
        w, s = w_at + first * n * 16, s_at + first * n
        for m in range(0, M - 1, 2):
            x_m, y = x_at + m * K * 4, y_at + (m * N + first) * 4
            if last - first == ROWS:
                two_rows(w, n * 16, s, n, t_at, x_m, 4 * K, n, y, 4 * N)
            else:
                for j in range(last - first):
                    two_row(w + j * n * 16, 0, s + j * n, 0, t_at, x_m, 4 * K, n, y + 4 * j, 4 * N)
        if M % 2:
            x_m, y = x_at + (M - 1) * K * 4, y_at + ((M - 1) * N + first) * 4
            if last - first == ROWS:
                one_rows(w, n * 16, s, n, t_at, x_m, 0, n, y, 0)
            else:
                for j in range(last - first):
                    one_row(w + j * n * 16, 0, s + j * n, 0, t_at, x_m, 0, n, y + 4 * j, 0)
        if bias.size:
            for m in range(M):
                for j in range(first, last):
                    out[m, j] += bias[j]


@kernel(parallel=True)
def _many(x, blocks, scales, table, bias, out, panels):
    """Many rows of x, their blocks in halves: `OUTPUTS` rows of W are expanded, then tiles of `ROWS` x `TOKENS`."""
    N, n = scales.shape
    K = x.shape[1]
    for group in prange((N + OUTPUTS - 1) // OUTPUTS):
        first = group * OUTPUTS
        count = min(OUTPUTS, N - first)
        panel = panels[numba.get_thread_id()]
        for j in range(first, first + count):
            to = panel.ctypes.data + (j - first) * K * panel.itemsize
            expand_row(blocks.ctypes.data + j * n * 16, scales.ctypes.data + j * n, table.ctypes.data, n, panel, to, False)
        multiply_panel(panel, count, x, bias, out, first)


def split_halves(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """x f32 [M, K] with the even elements of each block of 32 before the odd ones, written to `out`, unchecked."""
    _split_halves(x, out)
    return out


def matmul_mxfp4_kernel(x, blocks, scales, bias, out, panels) -> None:
    """The kernels, unchecked. `panels` f32 [threads, at least OUTPUTS · K] is scratch."""
    x = split_halves(x, np.empty_like(x))
    if len(x) <= STRAIGHT:
        _few(x, blocks, scales, SCALES, bias, out)
    else:
        _many(x, blocks, scales, SCALES, bias, out, panels)


@kernel(parallel=True)
def _portable(x, blocks, scales, codes, table, bias, out):
    """Plain loops: the twin that any processor, the bounds checker and plain Python run. x is in its natural order."""
    N, n = scales.shape
    for j in prange(N):
        for m in range(x.shape[0]):
            total = np.float32(0)
            for b in range(n):
                part = np.float32(0)
                for i in range(BLOCK // 2):
                    byte = blocks[j, b, i]
                    part += x[m, b * BLOCK + 2 * i] * codes[byte & 15] + x[m, b * BLOCK + 2 * i + 1] * codes[byte >> 4]
                total += part * table[scales[j, b]]
            out[m, j] = total
            if bias.size:
                out[m, j] += bias[j]


def matmul_mxfp4_portable(x, blocks, scales, bias, out, panels=None) -> None:  # noqa: ARG001
    """The portable kernel, unchecked."""
    _portable(x, blocks, scales, CODES, SCALES, bias, out)


def check_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> tuple[int, int]:
    """[N, K] of a matrix in MXFP4; ToyllmError where blocks and scales are none."""
    N, n = check_array("scales", scales, (None, None), (U8,))
    check_array("blocks", blocks, (N, n, BLOCK // 2), (U8,))
    return N, n * BLOCK


def dequantize(blocks: np.ndarray, scales: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The exact f32 values [N, K] of blocks u8 [N, K/32, 16] and scales u8 [N, K/32]; into `out`, if given.

    Raises ToyllmError on other arrays. Hand it the rows that are wanted: it never holds more than they need.
    """
    N, K = check_mxfp4(blocks, scales)
    if out is None:
        out = np.empty((N, K), np.float32)
    check_array("out", out, (N, K))
    if not out.flags.writeable:
        raise ToyllmError("out: expected an array that can be written")
    if out.size:
        _dequantize(blocks, scales, SCALES, out)
    return out


def matmul_mxfp4(x: np.ndarray, blocks: np.ndarray, scales: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x · Wᵀ + bias for x f32 [M, K] and W [N, K] in MXFP4: a new f32 [M, N]. Raises ToyllmError on other arrays."""
    N, K = check_mxfp4(blocks, scales)
    M, _ = check_array("x", x, (None, K))
    if bias is None:
        bias = NO_BIAS
    else:
        check_array("bias", bias, (N,))
    out = np.zeros((M, N), np.float32)
    if M and N and K:
        matmul_mxfp4_kernel(x, blocks, scales, bias, out, thread_scratch(OUTPUTS * K))
    elif bias.size:
        out += bias
    return out
