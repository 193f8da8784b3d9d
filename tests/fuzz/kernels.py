"""Kernels on shapes as ugly as chance makes them: the tiles and their portable twins against NumPy in f64.

An error is max|a − b| / max|b|; of few numbers, of which all may be what is left where large terms cancel, it is the largest departure
over the largest that the sums could be, |x| · |w|. Infinities and NaN must be where the formula has them.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from toyllm.kernels import attention, matmul, moe, mxfp4, pairs, q8
from toyllm.kernels.backends import backend
from toyllm.kernels.dtypes import to_bf16, to_f16, widen
from toyllm.kernels.fp4 import dequantize_reference
from toyllm.kernels.matmul import NO_BIAS, panels_for
from toyllm.kernels.routing import route_reference
from toyllm.kernels.threads import thread_scratch

from .leg import Find, Leg, Trial
from .mutate import chance

MOST = 1e-5  # the error that the design allows
ENOUGH = 64  # numbers among which one is about as large as its terms
COARSE = 1e-4  # where activations are held in 16 bits before MXFP4, over what the sums could be
STEPS = (1e-7, 2e-7, 5e-7, 1e-6, 2e-6, 5e-6, MOST, 2e-5, 5e-5, COARSE)
STORE = {"f32": lambda a: a.copy(), "f16": to_f16, "bf16": to_bf16}
EDGES = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 511, 513)


def length(rng: Random, most: int) -> int:
    """A length: one where tiles begin or end, a small one, or any."""
    edges = [n for n in EDGES if n <= most]
    return rng.choice((rng.choice(edges), rng.choice(edges), rng.randint(1, min(most, 20)), rng.randint(1, most)))


def array(numbers: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers of many sizes, f32."""
    return (numbers.standard_normal(shape) * 2.0 ** numbers.integers(-6, 6, (*shape[:-1], 1))).astype(np.float32)


def broken(rng: Random, values: np.ndarray) -> np.ndarray:
    """The same with a few of the numbers on which arithmetic trips."""
    for _ in range(rng.randint(1, 3)):
        values[tuple(rng.randrange(n) for n in values.shape)] = rng.choice((np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-39))
    return values


def placed(rng: Random, weights: np.ndarray) -> np.ndarray:
    """Weights as in a memory map: read-only, and perhaps at an odd address."""
    if chance(rng, 0.5):
        odd = np.empty(weights.nbytes + 1, np.uint8)[1:]
        odd[:] = np.ascontiguousarray(weights).reshape(-1).view(np.uint8)
        weights = odd.view(weights.dtype).reshape(weights.shape)
    weights.flags.writeable = False
    return weights


def held(what: str, found: np.ndarray, expected: np.ndarray, size: float, most: float = MOST) -> str:
    """What a trial comes to: the step below which its error is. Raises Find for one above `most`, and for another NaN or infinity."""
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite].astype(np.float32), equal_nan=True) or not np.isfinite(found[finite]).all():
        raise Find(f"{what}: NaN or infinities where the formula has none, or the other way")
    if expected.size >= ENOUGH and finite.all() and most == MOST:
        size = float(np.abs(expected).max())
    worst = float(np.abs(found[finite] - expected[finite]).max(initial=0)) / (size if np.isfinite(size) and size else 1)
    if worst > most:
        raise Find(f"{what}: an error of {worst:.1e}")
    return f"{what.split(':')[0]}: error at most {next(step for step in STEPS if worst <= step):.0e}"


def size_of(x: np.ndarray, w: np.ndarray, bias: np.ndarray) -> float:
    """The largest that any sum of x · w could be, infinities and NaN left aside."""
    sizes = np.abs(np.nan_to_num(x, nan=0, posinf=0, neginf=0)).astype(np.float64) @ np.abs(np.nan_to_num(w, nan=0, posinf=0, neginf=0))
    return float((sizes + np.abs(bias if bias.size else 0)).max(initial=0))


def check_matmul(rng: Random, numbers: np.random.Generator) -> str:
    """x · w by input or by output, of every storage format, in f32 and with x in bf16."""
    M, K, N = length(rng, 130), length(rng, 3000), length(rng, 600)
    form, by_input, twin = rng.choice([*STORE]), chance(rng, 0.5), chance(rng, 0.2)
    x, w, bias = array(numbers, M, K), array(numbers, K, N), array(numbers, N) if chance(rng, 0.5) else NO_BIAS
    if wild := chance(rng, 0.15):
        rng.choice((lambda: broken(rng, x), lambda: broken(rng, w)))()
    stored = placed(rng, STORE[form](w)) if by_input else placed(rng, STORE[form](np.ascontiguousarray(w.T))).T
    in_bf16 = pairs.AVAILABLE and not twin and not wild and form == "bf16" and chance(rng, 0.4)
    out, panels = np.full((M, N), np.nan, np.float32), np.full_like(thread_scratch(panels_for(K)), np.nan)
    product = pairs.matmul_bf16_kernel if in_bf16 else matmul.matmul_portable if twin else matmul.matmul_kernel
    product(x, stored, bias, out, panels)
    used = widen(to_bf16(x)) if in_bf16 and M >= pairs.WORTHWHILE else x
    expected = np.empty((M, N))
    with np.errstate(all="ignore"):
        matmul.matmul_reference(used.astype(np.float64), widen(stored).astype(np.float64), bias, expected)
    kind = f"{'x in bf16, ' if in_bf16 else ''}{'portable ' if twin else ''}matmul by {'input' if by_input else 'output'}"
    what = f"{kind}: M {M}, K {K}, N {N}, {form}, {'a' if bias.size else 'no'} bias"
    return held(what, out, expected, size_of(used, widen(stored), bias))


def check_q8(rng: Random, numbers: np.random.Generator) -> str:
    """Weights in 8 bits: the same integers whoever makes them, and their product."""
    M, K, N = length(rng, 70), length(rng, 1500), length(rng, 300)
    form, by_input, twin = rng.choice([*STORE]), chance(rng, 0.5), chance(rng, 0.2)
    x, w, bias = array(numbers, M, K), array(numbers, K, N), array(numbers, N) if chance(rng, 0.5) else NO_BIAS
    stored = placed(rng, STORE[form](w)) if by_input else placed(rng, STORE[form](np.ascontiguousarray(w.T))).T
    made, plain = q8.quantize(stored), q8.quantize_reference(stored)
    what = f"{'portable ' if twin else ''}matmul in 8 bits: M {M}, K {K}, N {N}, {form}, by {'input' if by_input else 'output'}"
    if made.values.tobytes() != plain.values.tobytes() or made.scales.tobytes() != plain.scales.tobytes():
        raise Find(f"{what}: other integers or scales than the reference's")
    out, panels = np.full((M, N), np.nan, np.float32), np.full_like(thread_scratch(panels_for(K)), np.nan)
    (q8.matmul_q8_portable if twin else q8.matmul_q8_kernel)(x, made, bias, out, panels)
    exact, expected = q8.dequantize_reference(made), np.empty((M, N))
    q8.matmul_q8_reference(x.astype(np.float64), made, bias, expected)
    return held(what, out, expected, size_of(x, exact, bias))


def blocks(rng: Random, numbers: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights in MXFP4 [..., N, K], K a multiple of 32: blocks and scales, as stored."""
    *rows, K = shape
    codes, scales = numbers.integers(0, 256, (*rows, K // 32, 16), np.uint8), numbers.integers(118, 130, (*rows, K // 32), np.uint8)
    return placed(rng, codes), placed(rng, scales)


def check_mxfp4(rng: Random, numbers: np.random.Generator) -> str:
    """x · Wᵀ in MXFP4, in f32 and with x in bf16."""
    M, K, N, twin = length(rng, 70), 32 * length(rng, 60), length(rng, 300), chance(rng, 0.2)
    x, bias, (codes, scales) = array(numbers, M, K), array(numbers, N) if chance(rng, 0.5) else NO_BIAS, blocks(rng, numbers, N, K)
    in_bf16 = pairs.AVAILABLE and not twin and chance(rng, 0.4)
    out, panels = np.full((M, N), np.nan, np.float32), np.full_like(thread_scratch(panels_for(K)), np.nan)
    product = pairs.matmul_mxfp4_bf16_kernel if in_bf16 else mxfp4.matmul_mxfp4_portable if twin else mxfp4.matmul_mxfp4_kernel
    product(x, codes, scales, bias, out, panels)
    used, expected = widen(to_bf16(x)) if in_bf16 and M >= pairs.WORTHWHILE else x, np.empty((M, N))
    mxfp4.matmul_mxfp4_reference(used.astype(np.float64), codes, scales, bias, expected)
    what = f"{'x in bf16, ' if in_bf16 else ''}{'portable ' if twin else ''}matmul in MXFP4: M {M}, K {K}, N {N}"
    return held(what, out, expected, size_of(used, dequantize_reference(codes, scales).T, bias))


def check_attention(rng: Random, numbers: np.random.Generator) -> str:
    """Queries over a cache: cells in any order, windows, sinks, keys in f32 and bf16."""
    G, Dh, T, S = rng.choice((1, 1, 2, 3)), length(rng, 130), length(rng, 40), length(rng, 300)
    H, C = G * rng.choice((1, 2, 3, 4, 5, 8, 9, 16)), S + rng.randint(0, 70)
    q, keys, values = (numbers.standard_normal(shape).astype(np.float32) for shape in ((T, H, Dh), (G, C, Dh), (G, C, Dh)))
    if chance(rng, 0.5):
        keys, values = to_bf16(keys), to_bf16(values)
    adjoining = chance(rng, 0.5)
    first = rng.randint(0, C - S)
    cells = np.arange(first, first + S, dtype=np.int32) if adjoining else numbers.permutation(C)[:S].astype(np.int32)
    end = numbers.integers(1, S + 1, T) if chance(rng, 0.5) else np.minimum(np.arange(T) + max(1, S - T + 1), S)
    begin = np.maximum(0, end - rng.choice((1, 2, 63, 64, 65, S, S))) if chance(rng, 0.7) else np.array([rng.randrange(e) for e in end])
    scale, sinks = rng.choice((1 / np.sqrt(Dh), 1.0, 0.01)), numbers.standard_normal(H).astype(np.float32) * 3
    sinks = sinks if chance(rng, 0.5) else attention.NO_SINKS
    name, run = rng.choice((("tiles", attention.attention_kernel),) * 3 + (("portable", attention.attention_portable),))
    name, run = ("plain", attention.attention_plain) if chance(rng, 0.1) else (name, run)
    out = np.full((T, H, Dh), np.nan, np.float32)
    scratch = np.full_like(thread_scratch(attention.SCRATCH), np.nan)
    run(q, keys, values, cells, bool((np.diff(cells) == 1).all()), begin, end, scale, out, scratch, sinks)
    expected = np.empty(out.shape)
    exact = [widen(a).astype(np.float64) for a in (q, keys, values)]
    attention.attention_reference(*exact, cells, begin, end, scale, expected, sinks.astype(np.float64))
    # the error of a score is relative to its size, and becomes one of the weight
    size = np.abs(exact[2]).max() * max(1.0, float(np.abs(exact[0]).sum(2).max() * np.abs(exact[1]).max() * scale) / 8)
    return held(f"attention, {name}: T {T}, S {S}, H {H}, G {G}, Dh {Dh}, {keys.dtype}", out, expected, size)


def check_mixture(rng: Random, numbers: np.random.Generator) -> str:
    """Mixtures of experts in MXFP4, in matrices and in 8 bits, by every exact algorithm."""
    T, D, F, E = length(rng, 40), 32 * rng.randint(1, 6), 32 * rng.randint(1, 6), rng.randint(1, 9)
    k, kind, limit, alpha = (
        rng.randint(1, E),
        rng.choice(("MXFP4", "matrices", "8 bits")),
        rng.choice((7.0, 0.5, 100.0)),
        rng.choice((1.702, 1.0)),
    )
    x, logits = numbers.standard_normal((T, D)).astype(np.float32), numbers.standard_normal((T, E)).astype(np.float32)
    biases = numbers.standard_normal((E, 2 * F)).astype(np.float32), numbers.standard_normal((E, D)).astype(np.float32)
    if kind == "MXFP4":
        stored = [moe.Mxfp4(*blocks(rng, numbers, E, rows, columns)) for rows, columns in ((2 * F, D), (D, F))]
        wide = [dequantize_reference(*w).astype(np.float64) for w in stored]
    else:
        form = rng.choice([*STORE])
        stored = [placed(rng, STORE[form](array(numbers, E, d_in, d_out) / 8)) for d_in, d_out in ((D, 2 * F), (F, D))]
        if kind == "8 bits":
            stored = [tuple(q8.quantize(w[e]) for e in range(E)) for w in stored]
        wide = [np.stack([widen(w[e]) if kind == "matrices" else q8.dequantize_reference(w[e]) for e in range(E)]) for w in stored]
        wide = [w.astype(np.float64).transpose(0, 2, 1) for w in wide]
    w = moe.Experts(stored[0], biases[0], stored[1], biases[1], limit, alpha)
    algorithm, name = rng.choice(("auto", "single", "grouped", "all")), rng.choice(("auto", "auto", "auto", "portable", "numpy"))
    exact = kind == "MXFP4" and chance(rng, 0.5)
    kernels = backend(name, moe.Mixing(algorithm), weights="q8" if kind == "8 bits" else "stored", exact=exact)
    experts, weights = np.empty((T, k), np.int64), np.empty((T, k), np.float32)
    kernels.route(logits, experts, weights)
    out, expected = np.full((T, D), np.nan, np.float32), np.zeros((T, D))
    scratch = [np.full(shape, np.nan, np.float32) for shape in ((k, 2 * F), (k, F), (1, D))]
    kernels.mixture(x, logits, experts, weights, w, out, (*scratch, thread_scratch(panels_for(max(D, F)))))
    chosen, shares = route_reference(logits.astype(np.float64), k)
    if not np.array_equal(chosen, experts):
        raise Find(f"routing: T {T}, E {E}, k {k}: other experts than the reference's")
    size = 0.0
    for t, i in np.ndindex(T, k):
        e = chosen[t, i]
        h = wide[0][e] @ x[t].astype(np.float64) + biases[0][e]
        with np.errstate(over="ignore"):
            z = moe.swiglu_reference(h[None], limit, alpha)[0]
        expected[t] += shares[t, i] * (wide[1][e] @ z + biases[1][e])
        inside = np.abs(wide[0][e]) @ np.abs(x[t]) + np.abs(biases[0][e])  # errors of h come through as those of z do
        slack = np.maximum(np.abs(z), (inside[::2] + inside[1::2]) * (1 + min(limit, float(inside.max()))) / 8)
        size = max(size, float((np.abs(wide[1][e]) @ slack).max()))
    coarse = kind == "MXFP4" and not exact and name == "auto"
    what = f"mixture in {kind}, {algorithm}, {name}{', activations in 16 bits' if coarse else ''}: T {T}, D {D}, F {F}, E {E}, k {k}"
    return held(what, out, expected, size, COARSE if coarse else MOST)


CHECKS: list[Callable[[Random, np.random.Generator], str]] = [
    check_matmul,
    check_matmul,
    check_q8,
    check_mxfp4,
    check_attention,
    check_mixture,
]


def prepare(folder: Path) -> Trial:
    def trial(rng: Random) -> str:
        return rng.choice(CHECKS)(rng, np.random.default_rng(rng.getrandbits(64)))

    return trial


LEG = Leg("kernels on ugly shapes, against NumPy in f64", prepare)
