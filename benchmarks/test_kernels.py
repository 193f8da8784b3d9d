"""Micro-benchmarks of the kernels, called as the models call them: `pytest benchmarks`.

What is read from memory in decoding is read from memory here: a round goes once over so many matrices, or layers of a KV cache, that no
cache holds them, and a call's time is its share of the round. Rates are held against a plain read of 2 GB, measured right behind each
benchmark; those of work that one core does within its caches (norms and routing of one row, sampling) against its plain read of as many
bytes from there. Both are the best of several.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import streaming

from toyllm.kernels import attention, backends, matmul, moe, sampling, threads
from toyllm.kernels.dtypes import F32, to_bf16, to_f16

FAR = 256 * 2**20  # bytes that no cache holds
ROUNDS = 7
NARROW = {"f32": lambda a: a, "f16": to_f16, "bf16": to_bf16}
SHAPES = pytest.mark.parametrize(("K", "N", "order"), [(2880, 4096, "by_output"), (768, 3072, "by_input")], ids=["by_output", "by_input"])
HEADS = pytest.mark.parametrize(("H", "G"), [(12, 12), (64, 8)], ids=["gpt2", "gpt_oss"])
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def memory() -> np.ndarray:
    """What a plain read reads."""
    return streaming.prepare()


@pytest.fixture(scope="module")
def k() -> backends.Backend:
    """The best backend, on the physical cores."""
    threads.set_threads()
    return backends.backend()


@pytest.fixture
def timed(benchmark: Any, memory: np.ndarray) -> Callable[..., None]:
    """Time `run`, which makes `calls` calls that each read `nbytes` or do `flops` operations; the figures go to extra_info.

    `near`: one core does it, within its caches.
    """

    def time(run: Callable[[], None], calls: int = 1, nbytes: int = 0, flops: int = 0, near: bool = False) -> None:
        benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=2)
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = benchmark.stats.stats.min / calls
        found = {"microseconds": seconds * 1e6}
        if flops:
            found["GFLOP/s"] = flops / seconds / 1e9
        if nbytes:
            found["GB/s"] = nbytes / seconds / 1e9
            found["of a plain read"] = found["GB/s"] / (near_read(nbytes) if near else far_read(memory))
        benchmark.extra_info.update(found)

    return time


def far_read(memory: np.ndarray) -> float:
    """GB/s of a plain read from memory, on all threads."""
    return max(max(streaming.measure(memory, threads.physical_cores()).values()) for _ in range(ROUNDS))


def near_read(nbytes: int) -> float:
    """GB/s of plain reads of the same bytes again and again, on one core."""
    array = np.ones(max(nbytes // 8, 1), np.uint64)
    return max(streaming.repeated_read(array, 1000) for _ in range(ROUNDS))


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def weights(count: int, rows: int, columns: int, dtype: str) -> list[np.ndarray]:
    """Matrices [rows, columns], C-contiguous, N(0, 0.02)."""
    one = normal(rows, columns) * np.float32(0.02)
    one[np.abs(one) < 2.0**-14] = 2.0**-14  # no subnormal numbers
    return [NARROW[dtype](one).copy() for _ in range(count)]


def mxfp4(count: int, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks [count, rows, columns / 32, 16] and scales of so many matrices."""
    shape = (count, rows, columns // 32)
    return rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(118, 123, shape, np.uint8)


def panels(K: int) -> np.ndarray:
    return threads.thread_scratch(matmul.panels_for(K))


def each(function: Callable[[Any], None], things: list[Any]) -> Callable[[], None]:
    """A round: the function on everything in turn."""

    def run() -> None:
        for thing in things:
            function(thing)

    return run


# ---- products ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@SHAPES
def test_matmul_one_row(timed: Callable, k: backends.Backend, K: int, N: int, order: str, dtype: str) -> None:
    item = F32.itemsize if dtype == "f32" else 2
    count = math.ceil(FAR / (K * N * item))
    stored = weights(count, *((N, K) if order == "by_output" else (K, N)), dtype)
    x, bias, out, scratch = normal(1, K), normal(N), np.empty((1, N), np.float32), panels(K)
    ws = [w.T for w in stored] if order == "by_output" else stored
    timed(each(lambda w: k.matmul(x, w, bias, out, scratch), ws), count, nbytes=K * N * item)


def test_matmul_one_row_head_of_gpt_oss(timed: Callable, k: backends.Backend) -> None:
    K, N = 2880, 201_088
    (w,) = weights(1, N, K, "bf16")
    x, out, scratch = normal(1, K), np.empty((1, N), np.float32), panels(K)
    timed(lambda: k.matmul(x, w.T, matmul.NO_BIAS, out, scratch), nbytes=K * N * 2)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@SHAPES
def test_matmul_512_rows(timed: Callable, k: backends.Backend, K: int, N: int, order: str, dtype: str) -> None:
    (stored,) = weights(1, *((N, K) if order == "by_output" else (K, N)), dtype)
    x, bias, out, scratch = normal(512, K), normal(N), np.empty((512, N), np.float32), panels(K)
    w = stored.T if order == "by_output" else stored
    timed(lambda: k.matmul(x, w, bias, out, scratch), flops=2 * 512 * K * N)


@pytest.mark.parametrize("N", [5760, 2880], ids=["gate_up", "down"])
def test_mxfp4_one_row(timed: Callable, k: backends.Backend, N: int) -> None:
    K, nbytes = 2880, N * 90 * 17
    count = math.ceil(FAR / nbytes)
    blocks, scales = mxfp4(count, N, K)
    x, bias, out, scratch = normal(1, K), normal(N), np.empty((1, N), np.float32), panels(K)
    timed(each(lambda e: k.matmul_mxfp4(x, blocks[e], scales[e], bias, out, scratch), list(range(count))), count, nbytes=nbytes)


@pytest.mark.parametrize("rows", [8, 64, 512])
def test_mxfp4_many_rows(timed: Callable, k: backends.Backend, rows: int) -> None:
    K, N = 2880, 5760
    blocks, scales = mxfp4(1, N, K)
    x, bias, out, scratch = normal(rows, K), normal(N), np.empty((rows, N), np.float32), panels(K)
    timed(lambda: k.matmul_mxfp4(x, blocks[0], scales[0], bias, out, scratch), flops=2 * rows * K * N)


def test_experts_of_one_token(timed: Callable, k: backends.Backend) -> None:
    """4 of 32 experts of gpt-oss, gate, up, activation, down and their sum."""
    D = F = 2880
    up, down = mxfp4(32, 2 * F, D), mxfp4(32, D, F)
    w = moe.Experts(moe.Mxfp4(*up), normal(32, 2 * F), moe.Mxfp4(*down), normal(32, D), 7.0, 1.702)
    x, out, logits, weight = normal(1, D), np.empty((1, D), np.float32), normal(1, 32), np.full((1, 4), 0.25, np.float32)
    scratch = (np.empty((4, 2 * F), np.float32), np.empty((4, F), np.float32), np.empty((1, D), np.float32), panels(D))
    chosen = [np.array([[e, e + 8, e + 16, e + 24]]) for e in range(8)]
    run = each(lambda experts: k.mixture(x, logits, experts, weight, w, out, scratch), chosen)
    timed(run, len(chosen), nbytes=4 * (3 * F * D // 32) * 17)


# ---- attention --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("depth", [128, 1000, 8192])
@HEADS
def test_attention_step(timed: Callable, k: backends.Backend, H: int, G: int, dtype: str, depth: int) -> None:
    Dh, item = 64, 4 if dtype == "f32" else 2
    nbytes = 2 * G * depth * Dh * item
    count = math.ceil(FAR / nbytes)
    one = NARROW[dtype](normal(G, depth, Dh))
    layers = [(one.copy(), one.copy()) for _ in range(count)]
    q, out = normal(1, H, Dh), np.empty((1, H, Dh), np.float32)
    cells, begin, end = np.arange(depth, dtype=np.int32), np.zeros(1, np.int64), np.full(1, depth)
    sinks = normal(H) if G < H else attention.NO_SINKS
    scratch = threads.thread_scratch(attention.SCRATCH)
    run = each(lambda layer: k.attention(q, *layer, cells, True, begin, end, 0.125, out, scratch, sinks), layers)
    timed(run, count, nbytes=nbytes)


@HEADS
def test_attention_of_512(timed: Callable, k: backends.Backend, H: int, G: int) -> None:
    T, Dh = 512, 64
    q, out, keys, values = normal(T, H, Dh), np.empty((T, H, Dh), np.float32), normal(G, T, Dh), normal(G, T, Dh)
    cells, begin, end = np.arange(T, dtype=np.int32), np.zeros(T, np.int64), np.arange(1, T + 1)
    sinks = normal(H) if G < H else attention.NO_SINKS
    scratch = threads.thread_scratch(attention.SCRATCH)
    timed(lambda: k.attention(q, keys, values, cells, True, begin, end, 0.125, out, scratch, sinks), flops=4 * H * Dh * T * (T + 1) // 2)


# ---- norms, routing, sampling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize(("kind", "D"), [("layer_norm", 768), ("rms_norm", 2880)], ids=["layer_norm", "rms_norm"])
def test_norm(timed: Callable, k: backends.Backend, kind: str, D: int, rows: int) -> None:
    x, weight, bias, out = normal(rows, D), normal(D), normal(D), np.empty((rows, D), np.float32)
    calls = [None] * (1000 if rows == 1 else 10)
    one = (lambda _: k.layer_norm(x, weight, bias, 1e-5, out)) if kind == "layer_norm" else (lambda _: k.rms_norm(x, weight, 1e-5, out))
    timed(each(one, calls), len(calls), nbytes=x.nbytes, near=rows == 1)


@pytest.mark.parametrize("rows", [1, 512])
def test_routing(timed: Callable, k: backends.Backend, rows: int) -> None:
    logits, experts, weight = normal(rows, 32), np.zeros((rows, 4), np.int64), np.empty((rows, 4), np.float32)
    calls = [None] * (1000 if rows == 1 else 10)
    timed(each(lambda _: k.route(logits, experts, weight), calls), len(calls), nbytes=logits.nbytes, near=True)


@pytest.mark.parametrize("setting", ["plain", "top_k", "top_p"])
def test_sampling(timed: Callable, setting: str) -> None:
    V = 201_088
    logits, scratch = normal(V) * 3, sampling.sample_scratch(V)
    limits = {"plain": (0, 1.0), "top_k": (50, 1.0), "top_p": (0, 0.9)}[setting]
    run = each(lambda _: sampling.sample_kernel(logits, 1.0, *limits, 0.0, 0.5, scratch), [None] * 10)
    timed(run, 10, nbytes=logits.nbytes, near=True)
