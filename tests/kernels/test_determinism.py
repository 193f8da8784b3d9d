"""The process that compiles a kernel and those that load it from the cache give the same bits.

Numba optimises linked code once more when it makes what the cache holds: a sum that the compiler may reorder can come out in another
order there. The process below runs twice on one empty cache, and prints a digest for each kernel and shape.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest


def attentions(rng: np.random.Generator) -> Iterator[np.ndarray]:
    from toyllm.kernels.attention import attention

    for T, S, H, G, Dh in ((1, 128, 2, 2, 64), (1, 300, 8, 1, 64), (5, 70, 4, 2, 33), (20, 150, 2, 2, 80)):
        q, keys, values = (rng.standard_normal(shape, np.float32) for shape in ((T, H, Dh), (G, S, Dh), (G, S, Dh)))
        end = np.arange(S - T + 1, S + 1)
        yield attention(q, keys, values, np.arange(S, dtype=np.int32), np.zeros(T, np.int64), end, 0.1, rng.standard_normal(H, np.float32))


def norms(rng: np.random.Generator) -> Iterator[np.ndarray]:
    from toyllm.kernels.norm import layer_norm, rms_norm

    for T, D in ((1, 33), (1, 768), (3, 768), (2, 2880)):
        x, weight, bias = rng.standard_normal((T, D), np.float32), *rng.standard_normal((2, D), np.float32)
        yield layer_norm(x, weight, bias)
        yield rms_norm(x, weight)


def routes(rng: np.random.Generator) -> Iterator[np.ndarray]:
    from toyllm.kernels.routing import route

    for normalization in ("softmax", "linear"):
        yield route(rng.standard_normal((3, 32), np.float32), 4, normalization)[1]


def samples(rng: np.random.Generator) -> Iterator[np.ndarray]:
    from toyllm.kernels.sampling import log_sum_exp, sample

    for V in (100, 50257):
        logits = rng.standard_normal(V, np.float32)
        yield np.array(log_sum_exp(logits))
        yield np.array([sample(logits, 0.8, top_k, top_p, 0.01, u) for top_k, top_p in ((0, 1.0), (40, 0.9)) for u in rng.random(20)])


def activations(rng: np.random.Generator) -> Iterator[np.ndarray]:
    from toyllm.kernels.activation import gelu, gelu_new
    from toyllm.kernels.moe import _swiglu_rows

    for n in (17, 5000):
        x = rng.standard_normal(n, np.float32)
        yield gelu(x)
        yield gelu_new(x)
    h, out = rng.standard_normal((3, 1440), np.float32), np.empty((3, 720), np.float32)
    _swiglu_rows(h, np.float32(7), np.float32(1.702), out)
    yield out


def products(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Those of the portable kernels; the tiles are made of instructions in their order."""
    from toyllm.kernels.matmul import NO_BIAS, matmul_portable

    for M, K, N in ((1, 768, 40), (3, 130, 7)):
        x, w, out = rng.standard_normal((M, K), np.float32), rng.standard_normal((K, N), np.float32), np.empty((M, N), np.float32)
        for order in (w, np.asfortranarray(w)):
            matmul_portable(x, order, NO_BIAS, out)
            yield out.copy()


KINDS = (attentions, norms, routes, samples, activations, products)


def digests() -> dict[str, list[str]]:
    return {
        kind.__name__: [hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest()[:12] for found in kind(np.random.default_rng(3))]
        for kind in KINDS
    }


@pytest.mark.needs_jit
@pytest.mark.slow
def test_what_compiles_and_what_loads_give_the_same_bits(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    compiled, loaded = map(json.loads, said)
    assert compiled.keys() == {kind.__name__ for kind in KINDS}
    assert loaded == compiled
    assert len({digest for found in compiled.values() for digest in found}) == sum(map(len, compiled.values()))


if __name__ == "__main__":
    print(json.dumps(digests()))
