"""The register tiles compute their own addresses, which no bounds checker sees: they run on arrays that end at forbidden pages.

Every array they are given begins right behind, or ends right before, a page that may not be touched; a load or store outside it
ends the process, which is why this file runs as one of its own. Prefetches may go anywhere.
"""

import ctypes
import mmap
import signal
import subprocess
import sys
from itertools import product

import numpy as np
import pytest

PAGE, NO_ACCESS = mmap.PAGESIZE, 0
SIZES = (1, 2, 3, 15, 16, 17, 31, 63, 65, 127, 129, 257)
ROWS = (1, 2, 5, 6, 7, 13)
LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(shape: tuple[int, ...], dtype: np.dtype, at_end: bool) -> np.ndarray:
    """An array of zeros between two pages without access, which touches the one behind it or the one before it."""
    count, dtype = int(np.prod(shape)), np.dtype(dtype)
    inner = -(-count * dtype.itemsize // PAGE) * PAGE
    pages = mmap.mmap(-1, inner + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for page in (start, start + PAGE + inner):
        if LIBC.mprotect(ctypes.c_void_p(page), PAGE, NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (inner - count * dtype.itemsize if at_end else 0)
    return np.frombuffer(pages, dtype, count, offset).reshape(shape)


def products(at_end: bool) -> None:
    """Matmul in both orders and all formats."""
    from toyllm.kernels.dtypes import BF16, F16, F32
    from toyllm.kernels.matmul import NO_BIAS, STRAIGHT, matmul_kernel, panels_for
    from toyllm.kernels.pairs import AVAILABLE, WORTHWHILE, matmul_bf16_kernel
    from toyllm.kernels.threads import max_threads

    for K, N, dtype in product(SIZES, SIZES, (F32, F16, BF16)):
        by_input, by_output = guarded((K, N), dtype, at_end), guarded((N, K), dtype, at_end).T
        bias = guarded((N,), F32, at_end) if N % 2 else NO_BIAS
        panels = guarded((max_threads(), panels_for(K)), F32, at_end)
        for w in (by_input, by_output):
            w.flags.writeable = False
            for M in (*ROWS, STRAIGHT + 5) if K + N < 150 else (1, 7):
                matmul_kernel(guarded((M, K), F32, at_end), w, bias, guarded((M, N), F32, at_end), panels)
            if AVAILABLE and dtype == BF16:
                M = WORTHWHILE + 3
                matmul_bf16_kernel(guarded((M, K), F32, at_end), w, bias, guarded((M, N), F32, at_end), panels)


def attentions(at_end: bool) -> None:
    """Attention over a few keys and many, in neighbouring cells and others, in every dtype of a cache."""
    from toyllm.kernels.attention import SCRATCH, attention_kernel
    from toyllm.kernels.cells import DTYPES, width
    from toyllm.kernels.dtypes import F32
    from toyllm.kernels.threads import max_threads

    scratch = guarded((max_threads(), SCRATCH), F32, at_end)
    for Dh, S, T, dtype in product((1, 7, 16, 31, 33, 64, 80), (1, 3, 17, 63, 65, 130), (1, 5, 17), DTYPES):
        G, H = (2, 2) if T == 5 else (1, 6) if T == 1 else (2, 4)
        q, out = guarded((T, H, Dh), F32, at_end), guarded((T, H, Dh), F32, at_end)
        keys, values = (guarded((G, S, width(Dh, dtype)), DTYPES[dtype], at_end) for _ in range(2))
        cells, begin, end = guarded((S,), np.int32, at_end), guarded((T,), np.int64, at_end), guarded((T,), np.int64, at_end)
        begin[:], end[:] = np.arange(T) % S, S
        for adjoining in (True, False):
            cells[:] = np.arange(S) if adjoining else np.arange(S)[::-1]
            attention_kernel(q, keys, values, cells, adjoining, begin, end, 1.0, out, scratch)
            attention_kernel(q, keys, values, cells, adjoining, begin, end, 1.0, out, scratch, guarded((H,), F32, at_end))


def mxfp4(at_end: bool) -> None:
    """Products with rows in MXFP4, one row of x and many; and the rows themselves."""
    from toyllm.kernels.fp4 import BLOCK, SCALES
    from toyllm.kernels.matmul import NO_BIAS, OUTPUTS
    from toyllm.kernels.mxfp4 import _dequantize, _few, _many
    from toyllm.kernels.threads import max_threads

    table = guarded((256,), np.float32, at_end)
    table[:] = SCALES
    for N, n in product((*SIZES, 32, 33), (1, 2, 3, 90)):
        K = n * BLOCK
        blocks, scales = guarded((N, n, 16), np.uint8, at_end), guarded((N, n), np.uint8, at_end)
        bias = guarded((N,), np.float32, at_end) if N % 2 else NO_BIAS
        panels = guarded((max_threads(), OUTPUTS * K), np.float32, at_end)
        _dequantize(blocks, scales, table, guarded((N, K), np.float32, at_end))
        for M in (1, 2, 3):
            _few(guarded((M, K), np.float32, at_end), blocks, scales, table, bias, guarded((M, N), np.float32, at_end))
        for M in ROWS if N < 20 else (7,):
            _many(guarded((M, K), np.float32, at_end), blocks, scales, table, bias, guarded((M, N), np.float32, at_end), panels)


def split(at_end: bool) -> None:
    """The same with activations of 16 bits, one row of x, a few and many; and one token's experts."""
    from toyllm.kernels import split
    from toyllm.kernels.fp4 import BLOCK
    from toyllm.kernels.matmul import NO_BIAS, panels_for
    from toyllm.kernels.moe import Experts, Mxfp4
    from toyllm.kernels.moe_split import single_split
    from toyllm.kernels.threads import max_threads

    def f32(*shape: int) -> np.ndarray:
        return guarded(shape, np.float32, at_end)

    def u8(*shape: int) -> np.ndarray:
        return guarded(shape, np.uint8, at_end)

    if not split.AVAILABLE:
        return
    for N, n in product((1, 3, 4, 5, 31, 33, 64), (1, 2, 3, 4, 5, 7, 90)):
        w, panels = (u8(N, n, 16), u8(N, n)), f32(max_threads(), panels_for(n * BLOCK))
        for M in (1, 3, 4, 5, 9):
            records = guarded((M, split.steps_of(n) * split.RECORD), np.int8, at_end)
            lift, bias, out = f32(M), f32(N) if N % 2 else NO_BIAS, f32(M, N)
            split._split_rows(f32(M, n * BLOCK), records, records.view(np.int32), records.view(np.float32), lift)
            split._few(records, lift, *w, bias, out)
            split._many(records, lift, *w, bias, out, panels)
    for D, F, chosen in product((32, 160), (32, 96), ([0], [2, 0])):
        gate_up, down = Mxfp4(u8(3, 2 * F, D // 32, 16), u8(3, 2 * F, D // 32)), Mxfp4(u8(3, D, F // 32, 16), u8(3, D, F // 32))
        w, k = Experts(gate_up, f32(3, 2 * F), down, f32(3, D), 7.0, 1.702), len(chosen)
        index = guarded((k,), np.int64, at_end)
        index[:] = chosen
        single_split(f32(1, D), index, f32(k), w, (f32(k, 2 * F), f32(k, F), f32(1, D), f32(max_threads(), split.ROWS)), f32(1, D))


def q8(at_end: bool) -> None:
    """Weights to 8 bits in both orders and all formats, and products with them."""
    from toyllm.kernels.dtypes import BF16, F16, F32
    from toyllm.kernels.matmul import NO_BIAS, panels_for
    from toyllm.kernels.q8 import Q8, _quantize_by_input, _quantize_by_output, matmul_q8_kernel
    from toyllm.kernels.simd.ir import LANES
    from toyllm.kernels.threads import max_threads

    sizes = (1, 15, 16, 17, 31, 32, 33, 63, 65, 97)
    for K, N in product(sizes, sizes):
        n = -(-K // 32)
        w = Q8(guarded((N, 32 * n), np.int8, at_end), guarded((N, n), F16, at_end), K)
        for dtype in (F32, F16, BF16):
            _quantize_by_output(guarded((N, K), dtype, at_end), w.values, w.scales)
            panels = guarded((max_threads(), LANES * 32), F32, at_end)
            _quantize_by_input(guarded((K, N), dtype, at_end), w.values, w.scales, panels)
        bias = guarded((N,), F32, at_end) if N % 2 else NO_BIAS
        panels = guarded((max_threads(), panels_for(K)), F32, at_end)
        for M in (1, 2, 5, 7):
            matmul_q8_kernel(guarded((M, K), F32, at_end), w, bias, guarded((M, N), F32, at_end), panels)


def sums(at_end: bool) -> None:
    """Sums over a row: norms, and those of the portable kernels in every storage format."""
    from toyllm.kernels.attention import SCRATCH, attention_portable
    from toyllm.kernels.cells import DTYPES, width
    from toyllm.kernels.dtypes import BF16, F16, F32
    from toyllm.kernels.matmul import NO_BIAS, matmul_portable
    from toyllm.kernels.norm import layer_norm_kernel, rms_norm_kernel
    from toyllm.kernels.q8 import Q8, matmul_q8_portable
    from toyllm.kernels.sampling import log_sum_exp
    from toyllm.kernels.threads import max_threads

    def f32(*shape: int) -> np.ndarray:
        return guarded(shape, F32, at_end)

    for n in SIZES:
        for T in (1, 3):
            layer_norm_kernel(f32(T, n), f32(n), f32(n), 1e-5, f32(T, n))
            rms_norm_kernel(f32(T, n), f32(n), 1e-5, f32(T, n))
        log_sum_exp(f32(n))
        for dtype in (F32, F16, BF16):
            matmul_portable(f32(2, n), guarded((3, n), dtype, at_end).T, NO_BIAS, f32(2, 3))
        blocks = -(-n // 32)
        w = Q8(guarded((3, 32 * blocks), np.int8, at_end), guarded((3, blocks), F16, at_end), n)
        matmul_q8_portable(f32(2, n), w, NO_BIAS, f32(2, 3))
        for dtype in DTYPES:
            keys, values = (guarded((1, 3, width(n, dtype)), DTYPES[dtype], at_end) for _ in range(2))
            cells, begin, end = guarded((3,), np.int32, at_end), guarded((2,), np.int64, at_end), guarded((2,), np.int64, at_end)
            cells[:], end[:] = (2, 0, 1), 3
            attention_portable(f32(2, 2, n), keys, values, cells, False, begin, end, 1.0, f32(2, 2, n), f32(max_threads(), SCRATCH))


def rows(at_end: bool) -> None:
    """Rows rounded for a KV cache and for products in bf16, and memory read as a stream."""
    from toyllm.kernels.pairs import round_rows
    from toyllm.kernels.rounding import bf16_rows, q8_rows
    from toyllm.kernels.stream import COLUMNS, ROWS, read_stream

    for n, Dh in product((1, 3), SIZES):
        x = guarded((n, Dh), np.float32, at_end)
        bf16_rows(x, guarded((n, Dh), np.uint16, at_end))
        q8_rows(x, guarded((n, Dh + 2 * -(-Dh // 32)), np.int8, at_end))
        round_rows(x, Dh + 1)
    read_stream(guarded((2, ROWS, COLUMNS), np.float32, at_end))


def experts(at_end: bool) -> None:
    """One token's experts, the first and the last among them."""
    from toyllm.kernels.matmul import ROWS
    from toyllm.kernels.moe import Experts, Mxfp4, single
    from toyllm.kernels.threads import max_threads

    def f32(*shape: int) -> np.ndarray:
        return guarded(shape, np.float32, at_end)

    def u8(*shape: int) -> np.ndarray:
        return guarded(shape, np.uint8, at_end)

    E = 3
    for D, F, chosen in product((32, 64, 160), (32, 96), ([0], [2, 0], [1, 2, 0])):
        gate_up = Mxfp4(u8(E, 2 * F, D // 32, 16), u8(E, 2 * F, D // 32))
        down = Mxfp4(u8(E, D, F // 32, 16), u8(E, D, F // 32))
        w = Experts(gate_up, f32(E, 2 * F), down, f32(E, D), 7.0, 1.702)
        k, index = len(chosen), guarded((len(chosen),), np.int64, at_end)
        index[:] = chosen
        single(f32(1, D), index, f32(k), w, (f32(k, 2 * F), f32(k, F), f32(1, D), f32(max_threads(), ROWS)), f32(1, D))


def beyond(at_end: bool) -> None:
    """What the others must not do: one element outside."""
    a = guarded((5,), np.float32, at_end)
    ctypes.c_float.from_address(a.ctypes.data + (20 if at_end else -4)).value  # noqa: B018 - the read is the point


def run(what: str, *ends: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", __file__, what, *ends]
    return subprocess.run(command, capture_output=True, text=True, timeout=800)


@pytest.mark.needs_jit
@pytest.mark.timeout(900)
@pytest.mark.parametrize("what", ["products", "attentions", "mxfp4", "split", "q8", "experts", "sums", "rows"])
def test_nothing_outside_an_array_is_touched(what):
    done = run(what, "begin", "end")
    assert done.returncode == 0, done.stderr


def test_an_element_outside_would_be_noticed():
    for side in ("begin", "end"):
        assert run("beyond", side).returncode == -signal.SIGSEGV


if __name__ == "__main__":
    check = {f.__name__: f for f in (products, attentions, mxfp4, split, q8, experts, sums, rows, beyond)}[sys.argv[1]]
    for side in sys.argv[2:]:
        check(at_end=side == "end")
