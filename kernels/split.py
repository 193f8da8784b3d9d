"""Products with MXFP4 weights, activations held as two int8: 16 bits, and integer arithmetic that memory cannot outrun.

    x[m, k] ≈ lift_m · s_{m,b} · (256 upper + lower),   upper and lower int8, b the block of 32 that k is in

`lift` is the power of two by which the row's largest |x| is beyond 1/16, s its block's share of that largest / 32512: the integers reach
32512, and the error is at most 1/65024 of the block's largest. As a weight is half an integer times a power of two, sums over 8 values are
exact; they are widened to f32 and added up in an order that depends on nothing but K: a row of x gives the same bits alone and among
others. A row of x that holds NaN or an infinity gives NaN. A scale of 255 is NaN.

One row, and up to `STRAIGHT`, read W as stored; more expand 32 rows of W at a time to bytes in the second-level cache.

What it gave, gpt-oss' 2880 x 5760, an EPYC with AVX-512: one row from the second-level cache 20 GB/s a core (f32 by permutations 10), from
memory on two cores 28 (14); prefetch 8 KiB ahead, 2 or 4 KiB 16-18, 16 KiB 13. 64 rows 137 GFLOP/s a core (f32 108).
"""

import numba
import numpy as np
from numba import prange

from .fp4 import BLOCK, dequantize_reference
from .host import features, supports
from .jit import inline, kernel
from .matmul import OUTPUTS
from .simd.fp4_split import EXPANDED, OFFSET, RECORD, STEP, expand_split, split_tile

AVAILABLE = supports("avx512") and features().get("avx512vnni", False)
ROWS = 4  # outputs of a tile
TOKENS = 4  # rows of x that share a tile
STRAIGHT = 4  # rows of x for which W is not worth expanding
LARGEST = np.float32(127 * 256)
ROUNDING = np.float32(1.5 * 2**23)  # added and taken off, it rounds to the nearest integer, ties to even

one_rows, one_row = split_tile(ROWS, 1), split_tile(1, 1)
wide_tokens, wide_one = split_tile(ROWS, TOKENS, True), split_tile(ROWS, 1, True)
rest_tokens, rest_one = split_tile(1, TOKENS, True), split_tile(1, 1, True)


def steps_of(n: int) -> int:
    """Records a row of n blocks takes."""
    return -(-n // STEP)


@inline
def _halve(x, upper, starts, scales, lift):
    """One block of x to its bytes: even values from 0 and odd ones from 64 of `upper`, lower halves 128 behind them."""
    largest = np.float32(0)
    for k in range(BLOCK):
        size = abs(x[k] * lift)
        largest = max(largest, size)
    inverse = LARGEST / largest if largest > 0 else np.float32(0)
    for lane in range(4):
        total = np.int32(0)
        for i in range(8):
            k = 8 * lane + i
            q = np.int32((x[k] * lift * inverse + ROUNDING) - ROUNDING)
            high = (q + np.int32(128)) >> np.int32(8)
            place = k // 2 + 64 * (k % 2)
            upper[place] = high
            upper[place + 128] = q - (high << np.int32(8))
            total += q
        starts[lane] = np.int32(-OFFSET) * total
        scales[lane] = largest / LARGEST * np.float32(0.5)  # a half, because codes are doubled


@inline
def split_row(x, out, starts, scales):
    """One row of x, f32 [K], to its records, the same memory seen as int8, i32 and f32; gives what its sums are multiplied with."""
    largest = np.float32(0)
    finite = True
    for k in range(len(x)):
        size = abs(x[k])
        finite &= size < np.inf
        largest = max(largest, size)
    exponent = np.float32(1)
    if not finite:
        out[:] = 0
        return np.float32(np.nan)
    while largest * exponent >= np.float32(0.125) and exponent > np.float32(2.0**-126):
        exponent *= np.float32(0.5)
    while 0 < largest * exponent < np.float32(0.0625) and exponent < np.float32(2.0**126):
        exponent *= np.float32(2)
    n = len(x) // BLOCK
    for b in range(n):
        at, lane = b // STEP * RECORD + b % STEP * 16, b // STEP * (RECORD // 4) + b % STEP * 4
        _halve(x[b * BLOCK : (b + 1) * BLOCK], out[at:], starts[lane + 64 :], scales[lane + 80 :], exponent)
    for b in range(n, (n + STEP - 1) // STEP * STEP):
        at, lane = b // STEP * RECORD + b % STEP * 16, b // STEP * (RECORD // 4) + b % STEP * 4
        for part in range(4):
            out[at + 64 * part : at + 64 * part + 16] = 0
        starts[lane + 64 : lane + 68] = 0
        scales[lane + 80 : lane + 84] = 0
    return np.float32(1) / exponent


@kernel(parallel=True)
def _split_rows(x, out, starts, scales, lift):
    for m in prange(len(x)):
        lift[m] = split_row(x[m], out[m], starts[m], scales[m])


@kernel
def _split_few(x, out, starts, scales, lift):
    for m in range(len(x)):
        lift[m] = split_row(x[m], out[m], starts[m], scales[m])


def split_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of x f32 [M, K] as records int8 [M, ·], and what each row's sums are multiplied with in the end, f32 [M]. Unchecked."""
    records, lift = np.empty((len(x), steps_of(x.shape[1] // BLOCK) * RECORD), np.int8), np.empty(len(x), np.float32)
    (_split_few if len(x) == 1 else _split_rows)(x, records, records.view(np.int32), records.view(np.float32), lift)
    return records, lift


@kernel(parallel=True)
def _few(records, lift, blocks, scales, bias, out):
    """`ROWS` rows of W at a time, straight from their bytes."""
    N, n = scales.shape
    M, size = records.shape
    w_at, s_at, x_at, lift_at, y_at = blocks.ctypes.data, scales.ctypes.data, records.ctypes.data, lift.ctypes.data, out.ctypes.data
    for group in prange((N + ROWS - 1) // ROWS):
        first = group * ROWS
        last = min(first + ROWS, N)
        w, s = w_at + first * n * 16, s_at + first * n
        for m in range(M):
            x, by, y = x_at + m * size, lift_at + 4 * m, y_at + (m * N + first) * 4
            if last - first == ROWS:
                one_rows(w, n * 16, s, n, x, 0, by, n, y, 0)
            else:
                for j in range(last - first):
                    one_row(w + j * n * 16, 0, s + j * n, 0, x, 0, by, n, y + 4 * j, 0)
            if bias.size:
                for j in range(first, last):
                    out[m, j] += bias[j]


@kernel(parallel=True)
def _many(records, lift, blocks, scales, bias, out, panels):
    """`OUTPUTS` rows of W are expanded to bytes, then tiles of `ROWS` x `TOKENS`."""
    N, n = scales.shape
    M, size = records.shape
    stride = (n + STEP - 1) // STEP * EXPANDED
    x_at, lift_at, y_at = records.ctypes.data, lift.ctypes.data, out.ctypes.data
    for group in prange((N + OUTPUTS - 1) // OUTPUTS):
        first = group * OUTPUTS
        count = min(OUTPUTS, N - first)
        at = panels[numba.get_thread_id()].ctypes.data
        for j in range(count):
            expand_split(blocks.ctypes.data + (first + j) * n * 16, scales.ctypes.data + (first + j) * n, n, at + j * stride)
        whole, together = count // ROWS * ROWS, M // TOKENS * TOKENS
        for m in range(0, together, TOKENS):
            x, by, y = x_at + m * size, lift_at + 4 * m, y_at + (m * N + first) * 4
            for j in range(0, whole, ROWS):
                wide_tokens(at + j * stride, stride, 0, 0, x, size, by, n, y + 4 * j, 4 * N)
            for j in range(whole, count):
                rest_tokens(at + j * stride, stride, 0, 0, x, size, by, n, y + 4 * j, 4 * N)
        for m in range(together, M):
            x, by, y = x_at + m * size, lift_at + 4 * m, y_at + (m * N + first) * 4
            for j in range(0, whole, ROWS):
                wide_one(at + j * stride, stride, 0, 0, x, 0, by, n, y + 4 * j, 0)
            for j in range(whole, count):
                rest_one(at + j * stride, stride, 0, 0, x, 0, by, n, y + 4 * j, 0)
        if bias.size:
            for m in range(M):
                for j in range(first, first + count):
                    out[m, j] += bias[j]


def matmul_mxfp4_split_kernel(x, blocks, scales, bias, out, panels) -> None:
    """As `matmul_mxfp4_kernel`, x held in 16 bits. Unchecked; `panels` as there."""
    records, lift = split_rows(x)
    if len(x) <= STRAIGHT:
        _few(records, lift, blocks, scales, bias, out)
    else:
        _many(records, lift, blocks, scales, bias, out, panels)


def split_reference(x: np.ndarray) -> np.ndarray:
    """The values that x f32 [M, K] comes to in 16 bits, f64 [M, K]; integers are found in f32, as the kernel finds them."""
    blocks = x.reshape(len(x), -1, BLOCK)
    largest = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        integers = np.where(largest > 0, np.rint(blocks * (LARGEST / largest)), np.where(largest == 0, 0, np.nan))
    return (integers * (largest / LARGEST).astype(np.float64)).reshape(x.shape)


def matmul_mxfp4_split_reference(x: np.ndarray, blocks: np.ndarray, scales: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
    """The formula in NumPy: x in 16 bits, arithmetic in f64."""
    np.matmul(split_reference(x), dequantize_reference(blocks, scales).T.astype(np.float64), out=out)
    if bias.size:
        out += bias
