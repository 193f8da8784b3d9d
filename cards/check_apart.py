"""Cards held against single functions of the engine: what no run over a prompt calls, or not in all of its forms."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.moe import ALGORITHMS, Mixing
from ..kernels.mxfp4 import dequantize
from ..kernels.rotary import rotate
from ..models import gpt_oss
from ..models.generation import Settings, generate
from ..models.sampling import Sampler
from .check import ALONE, Bench, Part, Pass, Ran

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS = 36  # tokens that mixture algorithms are tried on: enough for a budget, and their share of it is no multiple of 8
PROMPT = 8  # tokens at most that generation goes on from
LIKELY = 12  # tokens that penalties are tried on
NEAR = 1e-4  # a random number so near to the boundary between two tokens may fall on either side in f32
DRAWS: tuple[Settings, ...] = (
    Settings(temperature=0.0),
    Settings(temperature=1.0, top_p=1.0),
    Settings(temperature=1.5, top_p=1.0, top_k=5),
    Settings(temperature=1.2, top_p=0.7),
    Settings(temperature=1.0, top_p=1.0, min_p=0.05),
    Settings(temperature=1.0, top_p=1.0, repetition_penalty=2.5),
    Settings(temperature=1.0, top_p=1.0, presence_penalty=1.5),
    Settings(temperature=1.0, top_p=1.0, frequency_penalty=0.5),
    Settings(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25),
)
SEEDS = 8


def apart(bench: Bench, ids: Sequence[int], engine: Pass) -> "Iterator[Part]":
    """All cards of the family that have a function of the engine to be held against, on ids and activations of a prompt."""
    if bench.family == "gpt-oss":
        yield "rotary embedding", partial(hold_rotary, bench)
        yield "MXFP4", partial(hold_mxfp4, bench)
        for algorithm in ALGORITHMS:
            if algorithm != "auto":
                yield f"mixture: {algorithm}", partial(hold_mixture, bench, engine, algorithm)
    yield "sampling", partial(hold_sampling, bench, engine.logits[-1])
    if bench.family == "gpt2":
        yield "generation", partial(hold_generation, bench, ids[:PROMPT])


def hold_rotary(bench: Bench) -> None:
    """YaRN's frequencies, and the rotary embedding at positions that a prompt need not have."""
    c = bench.model.config
    ran = bench.run("YaRN")
    for at, (name, value) in enumerate(zip(("frequencies", "factor"), gpt_oss.frequencies(c), strict=True)):
        bench.hold_result(ALONE, ran, at, f"gpt_oss.frequencies: {name}", value, 1e-12)
    positions = np.arange(min(c.context, 64))
    x = np.random.default_rng(1).standard_normal((len(positions), 2, c.head_dim)).astype(np.float32)
    turned = rotate(x, *gpt_oss.rotations(c, positions), not c.hf_rope_impl)
    bench.hold_result(ALONE, bench.run("RoPE", x, positions), 0, "rotary.rotate", turned)


def hold_mxfp4(bench: Bench) -> None:
    """Every code in each half of a byte, and every scale, subnormal results, infinities and NaN included: exact."""
    blocks = np.random.default_rng(2).permuted(np.tile(np.arange(256, dtype=np.uint8), (64, 1)), axis=1).reshape(64, 16, 16)
    scales = np.arange(64 * 16).astype(np.uint8).reshape(64, 16)
    ran = bench.run("MXFP4", blocks, scales)
    with np.errstate(over="ignore"):
        ours = ran.run.results[0].astype(np.float32)
    shown = Ran(ran.card, replace(ran.run, results=(ours,)), ran.bound)
    bench.hold_result(ALONE, shown, 0, "mxfp4.dequantize", dequantize(blocks, scales), 0.0)


def hold_mixture(bench: Bench, engine: Pass, algorithm: str) -> None:
    """A mixture algorithm in the first block, on random tokens of the size that the prompt's have; budgets of several sizes."""
    model = bench.model
    c, weights = model.config, model.weights.blocks[0]
    size = engine.taps["blocks.0.norm_2"].std()
    x = (size * np.random.default_rng(3).standard_normal((ROWS, c.hidden_size))).astype(np.float32)
    buffers = model.family.make_buffers(c, ROWS)
    for ratio in (1.0, 0.5, float(ROWS)) if algorithm == "budget" else (1.0,):
        kernels = replace(model.kernels, mixing=Mixing(algorithm, ratio, {"all"}))  # whose note is for those who ask for a budget
        out = model.family.mixture(x, weights, 0, c, kernels, buffers, None).copy()
        settings: dict[str, Any] = {"moe": algorithm, "ρ": ratio}
        bench.hold_steps(ALONE, bench.run("MoE", x, group="blocks.0", **settings), {"blocks.0.mlp.out": out}, every=False)


def hold_sampling(bench: Bench, z: np.ndarray) -> None:
    """Tokens drawn from logits, for settings of each kind and the same random numbers.

    The likeliest tokens are in the context, each more often than the one before, and stand on both sides of 0: penalties tell them apart.
    """
    likeliest = np.argsort(-z, kind="stable")[:LIKELY]
    z, ids = z - z[likeliest[len(likeliest) // 2]], np.repeat(likeliest, np.arange(len(likeliest))).tolist()
    for settings in DRAWS:
        for seed in range(SEEDS if settings.temperature else 1):
            token = Sampler(replace(settings, seed=seed), ids, bench.model.vocab_size).next(z)
            (u,) = uniforms(seed, 1)
            ran = nearest(lambda u, s=settings: bench.run("Sample", z, ids, u, *sample_inputs(s)), u, token)
            bench.hold_result(ALONE, ran, 0, f"sampling.Sampler: {described(settings)}", token, 0.0)


def hold_generation(bench: Bench, ids: Sequence[int]) -> None:
    """A few tokens generated, greedily and drawn."""
    count = min(3, bench.model.config.context - len(ids))
    if not count:
        return
    for settings in (Settings(count, temperature=0.0, seed=0), Settings(count, seed=1)):
        settings = replace(settings, eos=bench.model.config.eos_token_id)
        events = generate(bench.model, ids, settings, len(ids) + count)
        tokens = np.array([*ids, *(event.token.id for event in events if event.token)])
        eos = np.array(settings.eos, np.int64)
        ran = nearest(
            lambda u, s=settings, eos=eos: bench.run("Generate", ids, u, eos, *sample_inputs(s)), uniforms(settings.seed, count), tokens
        )
        bench.hold_result(ALONE, ran, 0, f"generation.generate: {described(settings)}", tokens, 0.0)


def uniforms(seed: int | None, count: int) -> np.ndarray:
    """The random numbers that a sampler of this seed draws."""
    return np.random.Generator(np.random.PCG64(seed)).random(count)


def nearest(attempt: "Callable[[Any], Ran]", u: Any, expected: Any) -> Ran:
    """The run with these random numbers; if it does not give what is expected, one with numbers next to them, if that does."""
    first = attempt(u)
    trials: Iterator[Ran] = (first if shift == 0 else attempt(np.clip(u + shift, 0, 1 - NEAR)) for shift in (0, NEAR, -NEAR))
    return next((ran for ran in trials if np.array_equal(ran.run.results[0], expected)), first)


def sample_inputs(s: Settings) -> tuple[Any, ...]:
    """What the sampling card takes behind the random number."""
    return s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty, s.frequency_penalty


def described(s: Settings) -> str:
    """The settings that say something, by the options' names."""
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    on = [name for name, value in off.items() if getattr(s, name) != value and (s.temperature or name.endswith("penalty"))]
    return ", ".join(f"{name.replace('_', '-')} {getattr(s, name):g}" for name in ("temperature", *on))
