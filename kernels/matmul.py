"""Products with stored weights: out = x · w + bias.

x f32 [M, K], w [K, N] in f32, f16 or bf16, bias f32 [N] or none, out f32 [M, N]. w is used as it lies, in either order:

* by input: w is C-contiguous, row k holds what input k gives to every output (GPT-2's Conv1D);
* by output: w is the transpose of a C-contiguous [N, K], whose row j makes output j (every other linear layer).

Weights are widened exactly, products and sums are f32: by output in 16 partial sums that end in a tree, by input in one
chain over k. The order of summation depends on neither M, N nor the number of threads, and the tiles' kernels are compiled
strictly: a row of x gives the same bits alone and among others. NaN and infinities spread to the outputs that use them. Any K,
M and N, 1 included.

One row (decode) reads every weight once and runs at the speed of memory; more rows (prefill) expand a strip of weights
to f32 in the second-level cache and reuse it for all of them.

What the steps gave, 2 cores of an EPYC (Zen 5, AVX-512), bf16, plain read 35-41 GB/s:
one row by output, 768 inputs: prefetch 8 KiB ahead 33-36 GB/s, none 24-27; by input, strips of 128 columns:
32 rows ahead 28-31 GB/s, none 21-24; strips of 64 columns 17-22.
"""

import numba
import numpy as np
from numba import prange

from .checks import check_array
from .dtypes import BF16, F16, F32, widen
from .elementary import value
from .errors import ToyllmError
from .host import supports
from .jit import inline, kernel
from .simd.ir import LANES
from .simd.tiles import axpy_tile, dot_tile
from .threads import thread_scratch

NO_BIAS = np.empty(0, np.float32)

WIDE = supports("avx512")  # 32 registers of 16 lanes, or 16 of 8: what a tile may keep
ROWS = 4 if WIDE else 2  # outputs of a tile, by output
TOKENS = 6 if WIDE else 2  # rows of x that share a tile, by output
STRIP = 8 * LANES if WIDE else 4 * LANES  # columns of a tile for one row of x, by input
PANEL = 4 * LANES if WIDE else LANES  # columns of an expanded strip, by input
GROUP = 6 if WIDE else 4  # rows of x that share a tile, by input
OUTPUTS = 32  # rows expanded together, by output
AHEAD_BYTES, AHEAD_ROWS = 8192, 32

dot_one, dot_row, dot_tokens = dot_tile(ROWS, 1), dot_tile(1, 1), dot_tile(ROWS, TOKENS)
axpy_strip, axpy_rest = axpy_tile(STRIP // LANES, 1), axpy_tile(1, 1, partial=True)
axpy_panel, axpy_panel_one = axpy_tile(PANEL // LANES, GROUP), axpy_tile(PANEL // LANES, 1)


def matmul_reference(x: np.ndarray, w: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """The formula in NumPy; f64 in, f64 arithmetic."""
    np.matmul(x, widen(w), out=out)
    if bias.size:
        out += bias


@kernel(parallel=True, strict=True)
def _one_by_output(x, w, bias, out):
    """One row, w [N, K]: dot products of `ROWS` outputs at a time."""
    N, K = w.shape
    stride, at, x_at, y_at = w.strides[0], w.ctypes.data, x.ctypes.data, out.ctypes.data
    for group in prange((N + ROWS - 1) // ROWS):
        first = group * ROWS
        last = min(first + ROWS, N)
        if last - first == ROWS:
            dot_one(w, at + first * stride, stride, x_at, 0, K, y_at + 4 * first, 0, AHEAD_BYTES)
        else:
            for j in range(first, last):
                dot_row(w, at + j * stride, stride, x_at, 0, K, y_at + 4 * j, 0, 0)
        if bias.size:
            for j in range(first, last):
                out[0, j] += bias[j]


@inline
def multiply_panel(panel, count, x, bias, out, first):
    """out[:, first : first + count] = x · panelᵀ + bias for `count` rows of f32 at the start of `panel`."""
    M, K = x.shape
    N = out.shape[1]
    at, x_at, y_at = panel.ctypes.data, x.ctypes.data, out.ctypes.data + 4 * first
    whole, tokens = count // ROWS * ROWS, M // TOKENS * TOKENS
    for m in range(0, tokens, TOKENS):
        for j in range(0, whole, ROWS):
            dot_tokens(panel, at + j * K * 4, K * 4, x_at + m * K * 4, K * 4, K, y_at + (m * N + j) * 4, N * 4, 0)
    for m in range(tokens, M):
        for j in range(0, whole, ROWS):
            dot_one(panel, at + j * K * 4, K * 4, x_at + m * K * 4, 0, K, y_at + (m * N + j) * 4, 0, 0)
    for m in range(M):
        for j in range(whole, count):
            dot_row(panel, at + j * K * 4, K * 4, x_at + m * K * 4, 0, K, y_at + (m * N + j) * 4, 0, 0)
        if bias.size:
            for j in range(first, first + count):
                out[m, j] += bias[j]


@kernel(parallel=True, strict=True)
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


@kernel(parallel=True, strict=True)
def _one_by_input(x, w, bias, out):
    """One row, w [K, N]: strips of columns, each a chain over all inputs."""
    K, N = w.shape
    stride, at, x_at, y_at = w.strides[0], w.ctypes.data, x.ctypes.data, out.ctypes.data
    item = w.itemsize  # not from a stride: NumPy leaves that of an axis of length 1 open
    for strip in prange((N + STRIP - 1) // STRIP):
        first = strip * STRIP
        last = min(first + STRIP, N)
        if last - first == STRIP:
            axpy_strip(w, at + first * item, stride, x_at, 0, K, y_at + 4 * first, 0, 0, AHEAD_ROWS)
        else:
            for j in range(first, last, LANES):
                axpy_rest(w, at + j * item, stride, x_at, 0, K, y_at + 4 * j, 0, last - j, AHEAD_ROWS)
        if bias.size:
            for j in range(first, last):
                out[0, j] += bias[j]


@kernel(parallel=True, strict=True)
def _many_by_input(x, w, bias, out, panels):
    """Many rows, w [K, N]: `PANEL` columns of w are expanded to f32, then tiles of `GROUP` rows by `PANEL` columns."""
    K, N = w.shape
    M = x.shape[0]
    for strip in prange((N + PANEL - 1) // PANEL):
        first = strip * PANEL
        count = min(PANEL, N - first)
        panel = panels[numba.get_thread_id()]
        for k in range(K):
            for j in range(count):
                panel[k * PANEL + j] = value(w[k, first + j])
            for j in range(count, PANEL):
                panel[k * PANEL + j] = 0
        at, x_at, y_at = panel.ctypes.data, x.ctypes.data, out.ctypes.data + 4 * first
        rest = at + 4 * K * PANEL  # the panel's last rows: where a strip narrower than a tile is summed
        if count == PANEL:
            for m in range(0, M // GROUP * GROUP, GROUP):
                axpy_panel(panel, at, 4 * PANEL, x_at + m * K * 4, K * 4, K, y_at + m * N * 4, N * 4, 0, 0)
            for m in range(M // GROUP * GROUP, M):
                axpy_panel_one(panel, at, 4 * PANEL, x_at + m * K * 4, 0, K, y_at + m * N * 4, 0, 0, 0)
        else:
            for m in range(M):
                axpy_panel_one(panel, at, 4 * PANEL, x_at + m * K * 4, 0, K, rest, 0, 0, 0)
                for j in range(count):
                    out[m, first + j] = panel[K * PANEL + j]
        if bias.size:
            for m in range(M):
                for j in range(first, first + count):
                    out[m, j] += bias[j]


def panels_for(K: int) -> int:
    """f32 values of scratch a thread needs for products with K inputs and more than one row."""
    return max(OUTPUTS * K, PANEL * (K + 1))


def matmul_kernel(x: np.ndarray, w: np.ndarray, bias: np.ndarray, out: np.ndarray, panels: np.ndarray) -> None:
    """The kernels, unchecked. `panels` f32 [threads, at least panels_for(K)] is scratch."""
    by_input = w.flags.c_contiguous
    if len(x) == 1:
        (_one_by_input if by_input else _one_by_output)(x, w if by_input else w.T, bias, out)
    else:
        (_many_by_input if by_input else _many_by_output)(x, w if by_input else w.T, bias, out, panels)


@kernel(parallel=True)
def _portable_by_output(x, w, bias, out):
    """W [N, K], plain loops: the twin that any processor, the bounds checker and plain Python run."""
    for j in prange(w.shape[0]):
        for m in range(x.shape[0]):
            total = np.float32(0)
            for k in range(w.shape[1]):
                total += x[m, k] * value(w[j, k])
            out[m, j] = total
            if bias.size:
                out[m, j] += bias[j]


@kernel(parallel=True)
def _portable_by_input(x, w, bias, out):
    """W [K, N], plain loops over strips of columns."""
    K, N = w.shape
    for strip in prange((N + 63) // 64):
        first, last = strip * 64, min(strip * 64 + 64, N)
        for m in range(x.shape[0]):
            for j in range(first, last):
                out[m, j] = 0
            for k in range(K):
                for j in range(first, last):
                    out[m, j] += x[m, k] * value(w[k, j])
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


def matmul(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """X · w + bias for x f32 [M, K], w [K, N] (f32, F16 or BF16, C-contiguous or a transpose), bias f32 [N]: a new f32 [M, N].

    Raises ToyllmError for other dtypes, shapes and strides.
    """
    K, N = check_matrix("w", w)
    M, _ = check_array("x", x, (None, K))
    if bias is None:
        bias = NO_BIAS
    else:
        check_array("bias", bias, (N,))
    out = np.zeros((M, N), np.float32)
    if M and N and K:
        matmul_kernel(x, w, bias, out, thread_scratch(panels_for(K)))
    elif bias.size:
        out += bias
    return out
