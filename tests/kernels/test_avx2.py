"""The same kernels on a processor with AVX2 and no more: the same bits, from instructions that it has.

A process compiles for one processor, so these run in processes of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from toyllm.kernels.host import supports

pytestmark = [
    pytest.mark.needs_jit,
    pytest.mark.skipif(not supports("avx2"), reason="no AVX2"),
]
TOLERANCE = 1e-6  # of what sums in vectors of the processor's own width


def everything() -> dict[str, np.ndarray]:
    """What the kernels give for the same inputs, by name."""
    from toyllm.kernels.attention import attention
    from toyllm.kernels.backends import backend
    from toyllm.kernels.dtypes import to_bf16, to_f16
    from toyllm.kernels.matmul import matmul, panels_for
    from toyllm.kernels.moe import Experts, Mixing, Mxfp4
    from toyllm.kernels.mxfp4 import dequantize, matmul_mxfp4
    from toyllm.kernels.norm import rms_norm
    from toyllm.kernels.q8 import matmul_q8, quantize
    from toyllm.kernels.rotary import rotate
    from toyllm.kernels.routing import route
    from toyllm.kernels.threads import thread_scratch

    rng, found = np.random.default_rng(7), {}
    x = rng.standard_normal((7, 160), np.float32)
    w = rng.standard_normal((160, 101), np.float32)
    codes, scales = rng.integers(0, 256, (101, 5, 16)).astype(np.uint8), rng.integers(120, 128, (101, 5)).astype(np.uint8)
    found["exact.dequantize"] = dequantize(codes, scales)
    found["exact.f16"] = matmul(x[:1], to_f16(w.T).T)
    whole, rest = quantize(to_bf16(w)), quantize(w.T[:, :155].copy().T)
    found |= {"exact.q8.values": whole.values, "exact.q8.scales": whole.scales.view(np.uint16), "exact.q8.rest": rest.values}
    for M in (1, 3, 7):
        found[f"exact.q8.{M}"] = matmul_q8(x[:M], whole)
        found[f"exact.mxfp4.{M}"] = matmul_mxfp4(x[:M], codes, scales)
        found[f"exact.by_input.{M}"] = matmul(x[:M], to_bf16(w))
        found[f"exact.by_output.{M}"] = matmul(x[:M], to_bf16(w.T).T)

    E, D, F, k = 4, 64, 32, 2
    stored = [
        Mxfp4(rng.integers(0, 256, (E, N, n, 16)).astype(np.uint8), rng.integers(122, 125, (E, N, n)).astype(np.uint8))
        for N, n in ((2 * F, D // 32), (D, F // 32))
    ]
    biases = [rng.standard_normal((E, N)).astype(np.float32) for N in (2 * F, D)]
    layer = Experts(stored[0], biases[0], stored[1], biases[1], 7.0, 1.702)
    tokens, logits = rng.standard_normal((5, D), np.float32), rng.standard_normal((5, E), np.float32)
    chosen, weights = route(logits, k)
    found |= {"exact.route.experts": chosen, "close.route.weights": weights}
    weights = (weights * 1024).round() / np.float32(1024)  # the same on both
    scratch = (*(np.empty(shape, np.float32) for shape in ((k, 2 * F), (k, F), (1, D))), thread_scratch(panels_for(D)))
    for algorithm in ("single", "grouped"):
        out = np.empty_like(tokens)
        backend("auto", Mixing(algorithm), exact=True).mixture(tokens, logits, chosen, weights, layer, out, scratch)
        found[f"exact.experts.{algorithm}"] = out

    q, keys, values = rng.standard_normal((9, 4, 64), np.float32), *rng.standard_normal((2, 2, 200, 64), np.float32)
    cells, end, sinks = np.arange(200, dtype=np.int32), np.arange(192, 201), rng.standard_normal(4).astype(np.float32)
    for order in (cells, cells[::-1].copy()):
        found[f"close.attention.{order[0]}"] = attention(q, to_bf16(keys), to_bf16(values), order, end - 128, end, 0.125, sinks)
    found["close.rms_norm"] = rms_norm(x, w[:, 0].copy())
    found["close.rotate"] = rotate(q, *(f(q[:, 0, :32]) for f in (np.cos, np.sin)))
    return found


def assembly() -> str:
    """The machine code of the kernels that are LLVM text, as freshly compiled."""
    from toyllm.kernels import attention, matmul, mxfp4, q8

    everything()
    kernels = [matmul._by_input, matmul.by_output, matmul._many_by_output, mxfp4._few, mxfp4._many, mxfp4._dequantize, attention._attention]
    kernels += [q8._few, q8._many, q8._quantize_by_output, q8._quantize_by_input]
    return "".join(text for kernel in kernels for text in kernel.inspect_asm().values())


def run(what: str, out: Path, **environment: str) -> None:
    command = [sys.executable, __file__, what, str(out)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


def test_the_same_bits_as_wider_processors(tmp_path, error):
    run("everything", tmp_path / "found.npz")
    with np.load(tmp_path / "found.npz") as narrow:
        found = dict(narrow)
    wide = everything()
    assert found.pop("backend") == "avx2"
    assert found.keys() == wide.keys()
    differ = {name for name, array in wide.items() if name.startswith("exact") and not np.array_equal(found[name], array)}
    assert differ == set()
    errors = {name: error(found[name], array) for name, array in wide.items() if name.startswith("close")}
    assert {name: e for name, e in errors.items() if not e < TOLERANCE} == {}


@pytest.mark.slow
def test_no_instruction_beyond_avx2(tmp_path):
    """In machine code compiled for this test: what comes from the cache cannot be looked at."""
    run("assembly", tmp_path / "found.s", NUMBA_CACHE_DIR=str(tmp_path))
    code = (tmp_path / "found.s").read_text()
    assert not re.search(r"zmm|%k[0-7]|[xy]mm(1[6-9]|2\d|3[01])", code)
    for instruction in ("ymm", "vfmadd", "vcvtph2ps", "prefetch"):
        assert instruction in code


if __name__ == "__main__":
    from toyllm.kernels.host import compile_for

    name = compile_for("avx2")  # before anything that compiles is imported
    if sys.argv[1] == "assembly":
        Path(sys.argv[2]).write_text(assembly())
    else:
        np.savez(sys.argv[2], backend=name, **everything())
