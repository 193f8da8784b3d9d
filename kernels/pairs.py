"""Products of many rows in bf16: out = x · w + bias with x rounded to bf16, for those who ask for it (`--activations bf16`).

As `matmul` and `matmul_mxfp4`, but x is first rounded to the nearest bf16 (8 bits; ties to even, NaN kept), and AVX512_BF16 multiplies
neighbouring pairs and adds both products to an f32, rounding after each; denormals count as 0. Weights in bf16 are used as they are,
MXFP4 is expanded to bf16, exactly. Weights in f32 and f16 do not fit in bf16, and fewer than `WORTHWHILE` rows wait for memory and not
for the multipliers: these are multiplied in f32, x unrounded. The error is that of rounding x: at most 2^-9 of each product.

By output, rows of w are read straight from where they lie; by input, two rows of w after the other are laid side by side in a strip.
The order of summation does not depend on M, N or the number of threads.

What it gives, GFLOP/s of 512 rows x 2880 · 2880 x 4096, an EPYC whose peak is 117 a core in f32 and 234 in pairs of bf16, one core and two:
by input 206 and 431 (f32 93 and 170), by output 198 and 398 (109 and 219), MXFP4 211 and 419 (109 and 218).
"""

import numba
import numpy as np
from numba import prange

from .dtypes import BF16, to_bf16, widen
from .elementary import bf16_bits
from .fp4 import BLOCK, SCALES, dequantize_reference
from .host import features
from .jit import kernel
from .matmul import OUTPUTS, TOKENS, by_output, matmul_kernel, multiply_panel
from .mxfp4 import matmul_mxfp4_kernel, split_halves
from .simd.fp4 import expand_row
from .simd.ir import LANES
from .simd.tiles import interleave, pairs_tile

AVAILABLE = features().get("avx512bf16", False)
WORTHWHILE = 16  # rows
VECTORS = 4  # of 16 columns, in a strip by input: with a row of x, no more scratch than `panels_for`
COLUMNS = VECTORS * LANES

strip_tokens, strip_one, lay = pairs_tile(VECTORS, TOKENS), pairs_tile(VECTORS, 1), interleave(VECTORS)


def round_rows(x: np.ndarray, width: int) -> np.ndarray:
    """x f32 [M, K] rounded to bf16, as u16 [M, width], filled up with 0. Unchecked."""
    out = np.empty((len(x), width), np.uint16)
    out[:, x.shape[1] :] = 0
    _round_rows(x, out)
    return out


@kernel(parallel=True)
def _round_rows(x, out):
    for m in prange(x.shape[0]):
        for k in range(x.shape[1]):
            out[m, k] = bf16_bits(x[m, k])


@kernel(parallel=True)
def _by_input(x, w, bias, out, panels):
    """w [K, N] in bf16: strips of `COLUMNS`, whose pairs of rows are laid side by side."""
    K, N = w.shape
    M = len(x)
    x_at, y_at, x_stride = x.ctypes.data, out.ctypes.data, 2 * x.shape[1]
    n = x.shape[1] // 2
    for strip in prange((N + COLUMNS - 1) // COLUMNS):
        first = strip * COLUMNS
        count = min(COLUMNS, N - first)
        panel = panels[numba.get_thread_id()]
        at = panel.ctypes.data
        lay(w.ctypes.data + 2 * first, w.strides[0], K, count, at)
        rest = at + 4 * COLUMNS * n  # the panel's last rows: where sums of a strip narrower than a tile go
        if count == COLUMNS:
            for m in range(0, M // TOKENS * TOKENS, TOKENS):
                strip_tokens(at, x_at + m * x_stride, x_stride, n, y_at + 4 * (m * N + first), 4 * N)
            for m in range(M // TOKENS * TOKENS, M):
                strip_one(at, x_at + m * x_stride, 0, n, y_at + 4 * (m * N + first), 0)
        else:
            for m in range(M):
                strip_one(at, x_at + m * x_stride, 0, n, rest, 0)
                for j in range(count):
                    out[m, first + j] = panel[COLUMNS * n + j]
        if bias.size:
            for m in range(M):
                for j in range(first, first + count):
                    out[m, j] += bias[j]


@kernel(parallel=True)
def _mxfp4(x, blocks, scales, table, bias, out, panels):
    """Rows of x in bf16, their blocks in halves: `OUTPUTS` rows of W are expanded to bf16."""
    N, n = scales.shape
    for group in prange((N + OUTPUTS - 1) // OUTPUTS):
        first = group * OUTPUTS
        count = min(OUTPUTS, N - first)
        panel = panels[numba.get_thread_id()].view(np.uint16)
        for j in range(first, first + count):
            to = panel.ctypes.data + (j - first) * n * BLOCK * 2
            expand_row(blocks.ctypes.data + j * n * 16, scales.ctypes.data + j * n, table.ctypes.data, n, panel, to, False)
        multiply_panel(panel, count, x, bias, out, first)


def matmul_bf16_kernel(x: np.ndarray, w: np.ndarray, bias: np.ndarray, out: np.ndarray, panels: np.ndarray) -> None:
    """As `matmul_kernel`, but many rows of x are rounded to bf16 where the weights are bf16. Unchecked."""
    if len(x) < WORTHWHILE or w.dtype != BF16:
        matmul_kernel(x, w, bias, out, panels)
    elif w.flags.c_contiguous:
        _by_input(round_rows(x, -(-len(w) // 2) * 2), w, bias, out, panels)
    else:
        by_output(round_rows(x, len(w)), w.T, bias, out)


def matmul_mxfp4_bf16_kernel(x, blocks, scales, bias, out, panels, few=matmul_mxfp4_kernel) -> None:
    """As `matmul_mxfp4_kernel`, many rows of x rounded to bf16; `few` multiplies those that are not many. Unchecked."""
    if len(x) < WORTHWHILE:
        few(x, blocks, scales, bias, out, panels)
    else:
        _mxfp4(round_rows(split_halves(x, np.empty_like(x)), x.shape[1]), blocks, scales, SCALES, bias, out, panels)


def matmul_bf16_reference(x: np.ndarray, w: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """The formula in NumPy: x rounded to bf16, arithmetic in f64."""
    np.matmul(widen(to_bf16(x)).astype(np.float64), widen(w), out=out)
    if bias.size:
        out += bias


def matmul_mxfp4_bf16_reference(x: np.ndarray, blocks: np.ndarray, scales: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """The formula in NumPy: x rounded to bf16, arithmetic in f64."""
    np.matmul(widen(to_bf16(x)).astype(np.float64), dequantize_reference(blocks, scales).T, out=out)
    if bias.size:
        out += bias
