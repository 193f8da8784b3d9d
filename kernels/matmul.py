"""Products with stored weights: out = x · w + bias.

x f32 [M, K], w [K, N] in f32, f16 or bf16, bias f32 [N] or none, out f32 [M, N]. w is used as it lies, in either order:

* by input: w is C-contiguous, row k holds what input k gives to every output (GPT-2's Conv1D);
* by output: w is the transpose of a C-contiguous [N, K], whose row j makes output j (every other linear layer).

Weights are widened exactly, products and sums are f32: by output in 16 partial sums that end in a tree, by input in one
chain over k. The order of summation depends on neither M, N nor the number of threads: a row of x gives the same bits alone and
among others. NaN and infinities spread to the outputs that use them. Any K, M and N, 1 included.

By input, w is read straight from where it lies: strips of columns, in which 16 rows of w at a time (8 for several rows of x) are added to
the sums, which rest in the first-level cache. By output, up to 48 rows of x use w as it lies as well; more expand 32 rows of w to f32 in
the second-level cache and reuse them. One row runs at the speed of memory, many at that of the multipliers.

What the steps gave, 2 cores of an EPYC with AVX-512, bf16, plain read 35-41 GB/s, f32 peak 117 GFLOP/s a core:
one row by output, 768 inputs: prefetch 8 KiB ahead 33-38 GB/s, none 24-27;
one row by input, GPT-2's shapes: strips of 128 columns, each a chain over all inputs in registers, 23 GB/s; strips as wide as a thread's
share with sums in memory, 8 rows of w a pass 30.6, 16 rows 31.4, 24 rows 31; prefetch into the first level 13, none 13-14;
8 rows by input: expanded to f32 5 GFLOP/s, straight 139 (of 180 at 64 rows); two strips a thread or fewer leave one of them idle;
64 rows by output, one core: rest of 4 rows one by one 87 GFLOP/s, two by two 95;
the portable kernel by input: a row of w after the other 10 GB/s, four at once 14-17;
blocks of 480 inputs packed for the first-level cache, sums in memory between: 77-89 GFLOP/s against 108 without: not kept.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import get_num_threads, prange

from .checks import check_array
from .dtypes import BF16, F16, F32, widen
from .elementary import value
from .errors import ToyllmError
from .host import supports
from .jit import inline, kernel
from .simd.ir import LANES
from .simd.sums import products
from .simd.tiles import axpy_tile, dot_tile, rows_tile
from .threads import thread_scratch

NO_BIAS = np.empty(0, np.float32)

WIDE = supports("avx512")  # 32 registers of 16 lanes, or 16 of 8: what a tile may keep
ROWS = 4 if WIDE else 2  # outputs of a tile, by output
TOKENS = 6 if WIDE else 2  # rows of x that share a tile, by output
FEW = 2 if WIDE else 1  # rows of x that share the tile for what remains
RUN, RUN_SHARED = (16, 8) if WIDE else (4, 2)  # rows of w that are added at once to one row of sums, and to several, by input
STRIP = 4096  # columns of a strip at most: its sums stay in the first-level cache
SHARE = 3 if WIDE else 2  # rows of x that share a run
TOGETHER = 48  # rows of x whose sums stay in the second-level cache, by input
STRAIGHT = 48  # rows of x for which weights are not worth expanding, by output
PORTABLE_STRIP = 512  # columns of a strip of the portable kernel
OUTPUTS = 32  # rows expanded together, by output
AHEAD_BYTES = 8192

dot_one, dot_row = dot_tile(ROWS, 1), dot_tile(1, 1)
dot_tokens, dot_few = dot_tile(ROWS, TOKENS), dot_tile(ROWS, FEW)
rows_one, row_one, axpy_rest = rows_tile(RUN, 1), rows_tile(1, 1), axpy_tile(1, 1, partial=True)
rows_shared, rows_pair, rows_rest = rows_tile(RUN_SHARED, SHARE), rows_tile(RUN_SHARED, 2), rows_tile(RUN_SHARED, 1)


def matmul_reference(x: np.ndarray, w: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """The formula in NumPy; f64 in, f64 arithmetic."""
    np.matmul(x, widen(w), out=out)
    if bias.size:
        out += bias


@inline
def _tiles(w, at, stride, rows, x, out, first, ahead):
    """out[:, first : first + rows] for rows of w, in tiles of `ROWS` x `TOKENS` and what remains."""
    M, K = x.shape
    x_at, y_at = x.ctypes.data, out.ctypes.data + 4 * first
    x_stride, y_stride = x.itemsize * K, 4 * out.shape[1]
    whole = rows // ROWS * ROWS
    tokens = M // TOKENS * TOKENS
    few = tokens + (M - tokens) // FEW * FEW
    for m in range(0, tokens, TOKENS):
        for j in range(0, whole, ROWS):
            dot_tokens(w, x, at + j * stride, stride, x_at + m * x_stride, x_stride, K, y_at + m * y_stride + 4 * j, y_stride, ahead)
    for m in range(tokens, few, FEW):
        for j in range(0, whole, ROWS):
            dot_few(w, x, at + j * stride, stride, x_at + m * x_stride, x_stride, K, y_at + m * y_stride + 4 * j, y_stride, ahead)
    for m in range(few, M):
        for j in range(0, whole, ROWS):
            dot_one(w, x, at + j * stride, stride, x_at + m * x_stride, 0, K, y_at + m * y_stride + 4 * j, 0, ahead)
    for m in range(M):
        for j in range(whole, rows):
            dot_row(w, x, at + j * stride, stride, x_at + m * x_stride, 0, K, y_at + m * y_stride + 4 * j, 0, 0)


@inline
def multiply_panel(panel, count, x, bias, out, first):
    """out[:, first : first + count] = x · panelᵀ + bias for `count` rows at the start of `panel`, f32, or as x bf16 in 16 bits."""
    _tiles(panel, panel.ctypes.data, panel.itemsize * x.shape[1], count, x, out, first, 0)
    if bias.size:
        for m in range(len(x)):
            for j in range(first, first + count):
                out[m, j] += bias[j]


@kernel(parallel=True)
def by_output(x, w, bias, out):
    """w [N, K]: `ROWS` outputs at a time, straight from w; also for x in bf16 as 16 bits, of any number of rows, against bf16."""
    N, stride, at = len(w), w.strides[0], w.ctypes.data
    for group in prange((N + ROWS - 1) // ROWS):
        first = group * ROWS
        last = min(first + ROWS, N)
        _tiles(w, at + first * stride, stride, last - first, x, out, first, AHEAD_BYTES)
        if bias.size:
            for m in range(len(x)):
                for j in range(first, last):
                    out[m, j] += bias[j]


@kernel(parallel=True)
def _by_input(x, w, bias, out, strips):
    """w [K, N]: strips of columns, in which a run of rows of w after the other is added to the sums of up to `TOGETHER` rows."""
    K, N = w.shape
    M = len(x)
    stride, item = w.strides[0], w.itemsize  # the item not from a stride: NumPy leaves that of an axis of length 1 open
    share = (N + strips - 1) // strips
    width = min((share + 63) // 64 * 64, STRIP)
    for strip in prange((N + width - 1) // width):
        first = strip * width
        last = min(first + width, N)
        whole = (last - first) // LANES * LANES
        at, x_at, y_at = w.ctypes.data + first * item, x.ctypes.data, out.ctypes.data + 4 * first
        out[:, first:last] = 0
        for start in range(0, M, TOGETHER):
            stop = min(start + TOGETHER, M)
            shared = start + (stop - start) // SHARE * SHARE
            pair = shared if stop - shared == 2 else stop
            run = RUN if stop - start == 1 else RUN_SHARED
            for k in range(0, K // run * run, run):
                for m in range(start, shared, SHARE):
                    rows_shared(w, at + k * stride, stride, x_at + (m * K + k) * 4, 4 * K, y_at + 4 * m * N, 4 * N, whole, run * stride)
                for m in range(pair, stop, 2):
                    ahead = run * stride if shared == start else 0
                    rows_pair(w, at + k * stride, stride, x_at + (m * K + k) * 4, 4 * K, y_at + 4 * m * N, 4 * N, whole, ahead)
                for m in range(shared, pair):
                    if run == RUN:
                        rows_one(w, at + k * stride, stride, x_at + (m * K + k) * 4, 0, y_at + 4 * m * N, 0, whole, run * stride)
                    else:
                        rows_rest(w, at + k * stride, stride, x_at + (m * K + k) * 4, 0, y_at + 4 * m * N, 0, whole, 0)
            for m in range(start, stop):
                for k in range(K // run * run, K):
                    row_one(w, at + k * stride, stride, x_at + (m * K + k) * 4, 0, y_at + 4 * m * N, 0, whole, 0)
        for m in range(M):
            if whole < last - first:
                y = y_at + (m * N + whole) * 4
                axpy_rest(w, at + whole * item, stride, 0, x_at + m * K * 4, 0, K, y, 0, last - first - whole, 0)
            if bias.size:
                for j in range(first, last):
                    out[m, j] += bias[j]


@kernel(parallel=True)
def _many_by_output(x, w, bias, out, panels):
    """Many rows, w [N, K]: `OUTPUTS` rows of w are expanded to f32, then tiles of `ROWS` x `TOKENS`."""
    N, K = w.shape
    for group in prange((N + OUTPUTS - 1) // OUTPUTS):
        first = group * OUTPUTS
        count = min(OUTPUTS, N - first)
        panel = panels[numba.get_thread_id()]
        for j in range(count):
            for k in range(K):
                panel[j * K + k] = value(w[first + j, k])
        multiply_panel(panel, count, x, bias, out, first)


def panels_for(K: int) -> int:
    """f32 values of scratch a thread needs for products with K inputs and many rows, in f32, in bf16 or from blocks of 32."""
    return OUTPUTS * (K + 31)


def matmul_kernel(x: np.ndarray, w: np.ndarray, bias: np.ndarray, out: np.ndarray, panels: np.ndarray) -> None:
    """The kernels, unchecked. `panels` f32 [threads, at least panels_for(K)] is scratch."""
    if w.flags.c_contiguous:
        _by_input(x, w, bias, out, get_num_threads() * (1 if len(x) == 1 else 3))
    elif len(x) <= STRAIGHT:
        by_output(x, w.T, bias, out)
    else:
        _many_by_output(x, w.T, bias, out, panels)


@inline
def _add_row(x, w, y):
    for j in range(len(y)):  # over arrays of its own, a loop that LLVM makes vectors of
        y[j] += x * value(w[j])


@inline
def _add_rows(x, a, b, c, d, y):
    """Four rows of w at once: the sums are loaded and stored a quarter as often."""
    x_a, x_b, x_c, x_d = x[0], x[1], x[2], x[3]
    for j in range(len(y)):
        y[j] = y[j] + x_a * value(a[j]) + x_b * value(b[j]) + x_c * value(c[j]) + x_d * value(d[j])


@kernel(parallel=True)
def _portable_by_output(x, w, bias, out):
    """W [N, K], plain loops: the twin that any processor, the bounds checker and plain Python run."""
    for j in prange(w.shape[0]):
        for m in range(x.shape[0]):
            total = products(x[m], w[j])
            out[m, j] = total + bias[j] if bias.size else total


@kernel(parallel=True)
def _portable_by_input(x, w, bias, out):
    """W [K, N], plain loops over strips of columns."""
    K, N = w.shape
    strips = (N + PORTABLE_STRIP - 1) // PORTABLE_STRIP
    for strip in prange(strips):
        first, last = strip * PORTABLE_STRIP, min((strip + 1) * PORTABLE_STRIP, N)
        for m in range(x.shape[0]):
            y = out[m, first:last]
            y[:] = 0
            for k in range(0, K // 4 * 4, 4):
                a, b, c, d = w[k, first:last], w[k + 1, first:last], w[k + 2, first:last], w[k + 3, first:last]
                _add_rows(x[m, k : k + 4], a, b, c, d, y)
            for k in range(K // 4 * 4, K):
                _add_row(x[m, k], w[k, first:last], y)
            if bias.size:
                for j in range(first, last):
                    out[m, j] += bias[j]


def matmul_portable(x: np.ndarray, w: np.ndarray, bias: np.ndarray, out: np.ndarray, panels: np.ndarray | None = None) -> None:  # noqa: ARG001
    """The portable kernels, unchecked."""
    by_input = w.flags.c_contiguous
    (_portable_by_input if by_input else _portable_by_output)(x, w if by_input else w.T, bias, out)


def check_matrix(name: str, w: np.ndarray) -> tuple[int, int]:
    """[K, N] of a weight matrix stored f32, f16 or bf16 in one of the two orders; else ToyllmError."""
    shape = check_array(name, w, (None, None), (F32, F16, BF16), contiguous=False)
    if not (w.flags.c_contiguous or w.flags.f_contiguous):
        raise ToyllmError(f"{name}: expected a contiguous matrix or the transpose of one; pass np.ascontiguousarray({name})")
    return shape[0], shape[1]


def checked_product(
    kernel: Callable[..., None], x: np.ndarray, shape: tuple[int, int], w: tuple[Any, ...], bias: np.ndarray | None
) -> np.ndarray:
    """What `kernel` makes of x, checked against the shape [K, N] of w, which has been checked, and bias: a new f32 [M, N]."""
    K, N = shape
    M, _ = check_array("x", x, (None, K))
    if bias is None:
        bias = NO_BIAS
    else:
        check_array("bias", bias, (N,))
    out = np.zeros((M, N), np.float32)
    if M and N and K:
        kernel(x, *w, bias, out, thread_scratch(panels_for(K)))
    elif bias.size:
        out += bias
    return out


def matmul(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """X · w + bias for x f32 [M, K], w [K, N] (f32, F16 or BF16, C-contiguous or a transpose), bias f32 [N]: a new f32 [M, N].

    Raises ToyllmError for other dtypes, shapes and strides.
    """
    return checked_product(matmul_kernel, x, check_matrix("w", w), (w,), bias)
