"""Where arrays lie in memory changes no bit.

The compiler guards each of its vector loops with a plain loop, for arrays that overlap or nearly do; with sums in any order
allowed, the two may round differently. Small arrays are often allocated side by side, so this would show as rare flakes.
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from toyllm.kernels.attention import NO_SINKS, SCRATCH, attention_kernel, attention_portable
from toyllm.kernels.matmul import matmul_kernel, matmul_portable, panels_for
from toyllm.kernels.norm import layer_norm_kernel, rms_norm_kernel
from toyllm.kernels.threads import thread_scratch

pytestmark = pytest.mark.needs_jit


@pytest.fixture
def outcomes(rng) -> Callable[..., int]:
    """How many different results `run(*arrays, out)` gives with the f32 arrays in any order, up to 300 bytes apart."""

    def count(run: Callable[..., None], *arrays: np.ndarray) -> int:
        found = set()
        for _ in range(40):
            buffer = np.zeros(sum(a.size + 80 for a in arrays), np.float32)
            placed, at = [np.empty(0)] * len(arrays), 0
            for i in rng.permutation(len(arrays)):
                at += int(rng.integers(0, 80))
                placed[i] = buffer[at : at + arrays[i].size].reshape(arrays[i].shape)
                placed[i][...] = arrays[i]
                at += arrays[i].size
            run(*placed)
            found.add(placed[-1].tobytes())
        return len(found)

    return count


def test_of_a_norm(rng, outcomes):
    for T, D in product((1, 3), (1, 5, 15, 16, 17, 31, 40, 63)):
        x, weight, bias = rng.standard_normal((T, D), np.float32), *rng.standard_normal((2, D), np.float32)
        assert outcomes(lambda x, w, b, out: layer_norm_kernel(x, w, b, 1e-5, out), x, weight, bias, x) == 1, (T, D)
        assert outcomes(lambda x, w, out: rms_norm_kernel(x, w, 1e-5, out), x, weight, x) == 1, (T, D)


@pytest.mark.parametrize("kernel", [matmul_kernel, matmul_portable])
@pytest.mark.parametrize("by_input", [True, False])
def test_of_a_product(rng, outcomes, kernel, by_input):
    def run(x: np.ndarray, w: np.ndarray, bias: np.ndarray, out: np.ndarray) -> None:
        w.flags.writeable = False
        kernel(x, w if by_input else w.T, bias, out, panels)

    for M, K, N in product((1, 3), (5, 17), (1, 5, 17, 40)):
        panels = thread_scratch(panels_for(K))
        x, w = rng.standard_normal((M, K), np.float32), rng.standard_normal((K, N) if by_input else (N, K), np.float32)
        assert outcomes(run, x, w, rng.standard_normal(N).astype(np.float32), np.zeros((M, N))) == 1, (M, K, N)


@pytest.mark.parametrize("kernel", [attention_kernel, attention_portable])
def test_of_attention(rng, outcomes, kernel):
    scratch = thread_scratch(SCRATCH)

    def run(q: np.ndarray, keys: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
        S, T = keys.shape[1], len(q)
        cells, begin, end = np.arange(S, dtype=np.int32), np.zeros(T, np.int64), np.full(T, S)
        kernel(q, keys, values, cells, True, begin, end, 0.3, out, scratch, NO_SINKS)

    for T, S, Dh in product((1, 3), (1, 9, 70), (1, 5, 16, 33)):
        q, (keys, values) = rng.standard_normal((T, 2, Dh), np.float32), rng.standard_normal((2, 1, S, Dh), np.float32)
        assert outcomes(run, q, keys, values, q) == 1, (T, S, Dh)
