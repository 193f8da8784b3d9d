"""The cards that toyllm ships, run on weights: held against the engine, and against what transformers computed."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import toyllm
from toyllm.cards.interpreter import Run, run
from toyllm.cards.language import Binary, Literal, Name, Node
from toyllm.cards.program import program
from toyllm.cards.settings import hypers, is_tied, source
from toyllm.cards.structure import HyperValue
from toyllm.cards.text import parse, render
from toyllm.kernels.fp4 import dequantize_reference
from toyllm.kernels.moe import budget_for, within_budget
from toyllm.kernels.rotary import rotate_reference, rotations, yarn_frequencies
from toyllm.kernels.routing import route_reference
from toyllm.kernels.sampling import sample
from toyllm.models import gpt2, gpt_oss
from toyllm.models.activations import record
from toyllm.models.generation import Settings
from toyllm.models.sampling import Sampler

FILES = sorted((Path(__file__).parents[2] / "cards" / "library").glob("*.card"))
LIBRARY = {card.name: card for card in (parse(file.read_text(encoding="utf-8"), file.name) for file in FILES)}
GOLDENS = Path(__file__).parents[1] / "models" / "goldens"
# A few: test_check holds the cards against the engine for every golden checkpoint, and the engine is held against all of them.
CASES = ["gpt2/baseline", "gpt2/scale_by_layer_only", "gpt_oss/baseline", "gpt_oss/odd", "gpt_oss/rope_default", "gpt_oss/experts_bf16"]
EMBEDDED = ("tales-gpt2", "tales-gpt-oss")
TOLERANCE = 1e-4  # of max|a - b| / max|b|: the engine computes in f32, cards in f64
OPTIONS: dict[str, HyperValue] = {"moe": "auto", "ρ": 1.0}  # of a run, not of a model


@cache
def model(name: str, moe: str = "auto", ratio: float = 1.0) -> Any:
    path = GOLDENS / name
    return toyllm.load(str(path) if path.is_dir() else name, exact=True, moe=moe, tokens_per_expert_ratio=ratio)


def card(name: str, m: Any, inputs: Mapping[str, Any], **options: HyperValue) -> Run:
    """Run a card of the library on a model's weights; `m` names a family, too."""
    return run(LIBRARY[name], LIBRARY, inputs, values_of(m, **options), source(m.checkpoint, m.config))


def values_of(m: Any, **options: HyperValue) -> dict[str, HyperValue]:
    return {**OPTIONS, **hypers(m.config, m.checkpoint.tensors, is_tied(m.checkpoint, m.config)), **options}


def of(m: Any) -> str:
    """The name of the model's card."""
    return "gpt2" if m.family is gpt2 else "gpt-oss"


def ids_for(m: Any, n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, m.vocab_size, n)


def error(a: Any, b: np.ndarray) -> float:
    """max|a - b| / max|b|, where -inf must stand in the same places and NaN nowhere."""
    a = np.asarray(a)
    assert a.shape == b.shape
    seen = np.isfinite(b)
    np.testing.assert_array_equal(a[~seen], b[~seen])
    return float(np.abs(a[seen].astype(np.float64) - b[seen]).max() / np.abs(b[seen]).max())


# ---- as text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_card_is_kept_in_the_canonical_layout_under_its_name(file):
    text = file.read_text(encoding="utf-8")
    made = parse(text, file.name)
    assert render(made) == text
    assert file.stem.replace("-", "") == made.name.lower().replace("-", "")


# ---- parameters -------------------------------------------------------------------------------------------------------------


def sizes(node: Node, values: Mapping[str, HyperValue]) -> Any:
    """A size, or the end of a range, with hypers for letters."""
    match node:
        case Literal():
            return node.value
        case Name():
            return values[node.name]
        case Binary():
            a, b = sizes(node.left, values), sizes(node.right, values)
            return {"⊙": a * b, "·": a * b, "+": a + b, "-": a - b, "/": a // b if node.operator == "/" else 0}[node.operator]
    raise AssertionError(node)


def tensors(name: str, values: dict[str, HyperValue], group: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a card declares, and those of the cards whose parameters it holds; as often as they are declared."""
    namespace = LIBRARY[name].namespace
    for declared in program(LIBRARY[name]).params.values():
        ranges = declared.type.ranges
        counted = range(sizes(ranges[0].last, values) + 1) if ranges else (0,)
        for i in counted:
            known = {**values, **({ranges[0].index: i} if ranges else {})}
            own = "".join(part if isinstance(part, str) else str(sizes(part, known)) for part in declared.tensor or ())
            whole = ".".join(filter(None, (group, own)))
            if declared.type.domain == "card":
                yield from tensors(f"{namespace}.{declared.type.card}", values, whole)
            else:
                yield whole.removeprefix("blocks."), tuple(sizes(size, known) for size in declared.type.sizes)


GPT2_SIZES = [(768, 6, 12), (768, 12, 12), (1024, 24, 16), (1280, 36, 20), (1600, 48, 25)]
MXFP4 = ("blocks", "scales")
DENSE = "layers.0.mlp.experts.gate_up_proj"
PUBLISHED = {
    **{f"gpt2 {D} {L}": (gpt2.Config(n_embd=D, n_layer=L, n_head=H), ()) for D, L, H in GPT2_SIZES},
    "gpt2 without ties": (gpt2.Config(n_inner=100, tie_word_embeddings=False), ()),
    "gpt-oss-20b": (gpt_oss.Config(), ()),
    "gpt-oss-120b": (gpt_oss.Config(num_hidden_layers=36, num_local_experts=128), ()),
    "gpt-oss dense": (gpt_oss.Config(num_hidden_layers=2), (DENSE,)),
}


@pytest.mark.parametrize("step", ["", ".Step"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameters_are_the_architectures_each_once(name, step):
    config, names = PUBLISHED[name]
    specs = gpt2.specs(config) if isinstance(config, gpt2.Config) else gpt_oss.specs(config, frozenset(names))
    values = hypers(config, names)
    root = ("gpt2" if isinstance(config, gpt2.Config) else "gpt-oss") + step
    left_out = {"head"} if values["tied"] else set()
    if "E" in values:
        left_out |= {"gate_up.weight", "down.weight"} if values["mxfp4"] else {f"{w}.{part}" for w in ("gate_up", "down") for part in MXFP4}
    found = [(key, shape) for key, shape in tensors(root, values) if key.removeprefix(f"{key.partition('.')[0]}.") not in left_out]
    assert len(dict(found)) == len(found)
    assert dict(found) == {key: spec.shape for key, spec in specs.items() if not spec.optional}


# ---- the models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_models_card_computes_what_transformers_did(case):
    golden, m = load_file(GOLDENS / f"{case}.safetensors"), model(case)
    logits = card(of(m), m, {"x": golden["prompt"]}).results[0]
    assert error(logits[golden["rows"]] if "rows" in golden else logits, golden["logits"]) < TOLERANCE


@pytest.mark.parametrize("name", [*EMBEDDED, "gpt2/scale_by_layer_only", "gpt_oss/odd", "gpt_oss/original", "gpt_oss/window_5"])
def test_every_activation_is_the_engines(name):
    m = model(name)
    ids = ids_for(m, 20)
    engine, _ = record(m, ids, lambda _: True)
    made = card(of(m), m, {"x": ids})
    assert set(made.activations) == set(engine)
    assert {name: e for name in engine if (e := error(made.activations[name], engine[name])) > TOLERANCE} == {}


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_activation_of_a_decoded_token_is_the_engines(name):
    m = model(name)
    ids = ids_for(m, 9)
    engine, _ = record(m, ids, lambda _: True, step=1)
    token = int(m.logits(ids)[-1].argmax())
    _, C = card(of(m), m, {"x": ids}).results
    if m.family is gpt2:
        made = card("gpt2.Step", m, {"t": token, "C": C})
    else:
        rings = card("gpt-oss.Rings", m, {"C": C, "R": 12}).results[0]
        made = card("gpt-oss.Step", m, {"x": token, "p": 9, "C": rings})
        engine = {name: array for name, array in engine.items() if not name.endswith(("scores", "weights")) or "router" in name}
    assert set(made.activations) == set(engine)
    assert {name: e for name in engine if (e := error(made.activations[name], engine[name])) > TOLERANCE} == {}


def test_gpt2_decodes_from_its_cache_what_a_prefill_gives():
    m = model("tales-gpt2")
    ids = ids_for(m, 12)
    whole, cache = card("gpt2", m, {"x": ids}).results
    C = card("gpt2", m, {"x": ids[:8]}).results[1]
    for n in range(8, 12):
        z, C = card("gpt2.Step", m, {"t": ids[n], "C": C}).results
        assert error(z[0], whole[n]) < 1e-12
    assert error(C, cache) < 1e-12


@pytest.mark.parametrize(("window", "prompt", "R"), [(5, 8, 24), (5, 3, 24), (16, 20, 200)])
def test_gpt_oss_decodes_from_its_rings_what_a_prefill_gives(window, prompt, R):
    m = model(f"gpt_oss/window_{window}")
    ids = ids_for(m, 24)
    whole = card("gpt-oss", m, {"x": ids}).results[0]
    C = card("gpt-oss.Rings", m, {"C": card("gpt-oss", m, {"x": ids[:prompt]}).results[1], "R": R}).results[0]
    for n in range(prompt, 24):
        z, C = card("gpt-oss.Step", m, {"x": ids[n], "p": n, "C": C}).results
        assert error(z[0], whole[n]) < 1e-12
    used = np.abs(C[0]).sum((0, 2, 3)) > 0  # cells of the first layer, which slides
    assert used.sum() == window


@pytest.mark.parametrize("T", [3, 5, 12])
def test_rings_hold_the_latest_positions(T):
    values: dict[str, HyperValue] = {"L": 2, "G": 1, "Dh": 1, "w": (5, float("inf"))}
    C = np.arange(1, 4 * T + 1).reshape(2, 2, T, 1, 1)
    sliding, full = run(LIBRARY["gpt-oss.Rings"], LIBRARY, {"C": C, "R": 12}, values).results[0][..., 0, 0]
    wanted = np.zeros((2, 12))
    wanted[:, [t % 5 for t in range(max(0, T - 5), T)]] = C[0, :, -5:, 0, 0]
    np.testing.assert_array_equal(sliding, wanted)
    np.testing.assert_array_equal(full[:, :T], C[1, ..., 0, 0])


@pytest.mark.parametrize("R", [5, 8, 30])
def test_a_ring_may_have_more_cells_than_the_window(R):
    m = model("gpt_oss/window_5")
    x = np.random.default_rng(0).normal(size=(20, m.config.hidden_size))
    C = np.full((2, R, m.config.num_key_value_heads, m.config.head_dim), 1e3)  # what was never written is never seen
    whole = attention(m, "", {"x": x})
    for p in range(20):
        y, C = attention(m, "Step", {"x": x[[p]], "p": p, "C": C})
        assert error(y[0], whole[0][p]) < 1e-12


def attention(m: Any, step: str, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """A card of attention in the model's first block, which slides."""
    values = values_of(m, w=m.config.sliding_window)
    return run(LIBRARY[f"gpt-oss.Attn{step}"], LIBRARY, inputs, values, source(m.checkpoint, m.config), group="blocks.0").results


# ---- rotary embedding, MXFP4, router ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["baseline", "rope_truncated", "rope_from_pair_0", "rope_default", "rope_interleaved"])
def test_frequencies_and_turns_are_the_engines(case):
    m = model(f"gpt_oss/{case}")
    c = m.config
    frequencies, factor = gpt_oss.frequencies(c)
    f, found = card("gpt-oss.YaRN", m, {}).results
    np.testing.assert_allclose(f, frequencies, rtol=1e-12)
    assert found == pytest.approx(factor, rel=1e-12)
    x, p = np.random.default_rng(0).normal(size=(7, 3, c.head_dim)), np.array([0, 1, 5, 63, 64, 200, 1000])
    turned = card("gpt-oss.RoPE", m, {"x": x, "p": p}).results[0]
    rotate_reference(x, *rotations(p, frequencies, factor), interleaved=not c.hf_rope_impl)
    assert error(turned, x) < TOLERANCE


def test_the_published_frequencies():
    values = hypers(gpt_oss.Config())
    f, m = run(LIBRARY["gpt-oss.YaRN"], LIBRARY, {}, values).results
    want, factor = yarn_frequencies(64, 150000.0, 32.0, 4096)
    np.testing.assert_allclose(f, want, rtol=1e-12)
    np.testing.assert_allclose([f[1], f[9], f[31]], [6.890443059e-01, 3.170569618e-02, 3.023511428e-07], rtol=1e-6)
    assert m == pytest.approx(factor) == pytest.approx(1.3465735902799727)


@pytest.mark.parametrize(
    "settings", [(16, 10.0, 4.0, 10**4, 1e3, 1.0), (16, 10.0, 4.0, 10), (64, 150000.0, 1.0, 4096), (8, 1e4, 9.0, 64, 3.0, 3.0)]
)
@pytest.mark.parametrize("truncate", [False, True])
def test_frequencies_of_unusual_settings(settings, truncate):
    names = dict(zip(("Dh", "b", "s", "P_0", "β_fast", "β_slow"), (*settings, 32.0, 1.0)[:6], strict=True))
    found = run(LIBRARY["gpt-oss.YaRN"], LIBRARY, {}, {**names, "yarn": True, "truncate": truncate}).results
    want, factor = yarn_frequencies(*(*settings, 32.0, 1.0)[:6], truncate)
    np.testing.assert_allclose(found[0], want, rtol=1e-12)
    assert found[1] == pytest.approx(factor)


def test_every_code_with_every_scale():
    rng = np.random.default_rng(0)
    codes = rng.permutation(np.arange(16 * 256) % 256).reshape(16, 16, 16).astype(np.uint8)
    scales = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = run(LIBRARY["MXFP4"], LIBRARY, {"Q": codes, "s": scales}).results[0]
    with np.errstate(over="ignore"):  # what f32 cannot hold, at scales 253 and 254, is infinite
        np.testing.assert_array_equal(found.astype(np.float32), dequantize_reference(codes, scales))


def test_ties_of_the_router_go_to_the_lower_expert():
    logits = np.array([[1.0, 3.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    values: dict[str, HyperValue] = {"D": 4, "E": 4, "k": 3}
    weights = {"router.weight": np.eye(4), "router.bias": np.zeros(4)}
    r, i, ω = run(LIBRARY["gpt-oss.Router"], LIBRARY, {"x": logits}, values, weights.__getitem__).results
    experts, shares = route_reference(logits, 3)
    np.testing.assert_array_equal(r, logits)
    np.testing.assert_array_equal(i, experts)
    np.testing.assert_allclose(ω, shares)


# ---- mixtures ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tales-gpt-oss", "gpt_oss/experts_bf16"])
def test_three_mixtures_are_one(name):
    m = model(name)
    x = np.random.default_rng(3).normal(size=(6, m.config.hidden_size))
    single, grouped, everything = (
        run(LIBRARY["gpt-oss.MoE"], LIBRARY, {"x": x}, values_of(m, moe=moe), source(m.checkpoint, m.config), group="blocks.1")
        for moe in ("single", "grouped", "all")
    )
    assert error(single.results[0], grouped.results[0]) < 1e-12
    assert error(everything.results[0], grouped.results[0]) < 1e-12
    for part in ("gate", "up", "hidden"):
        key = f"blocks.1.experts.{part}"
        assert error(single.activations[key], grouped.activations[key]) < 1e-12


@pytest.mark.parametrize(("T", "ratio"), [(24, 0.3), (40, 1.0), (9, 1.0)])
def test_the_budget_gives_each_token_what_the_engine_gives_it(T, ratio):
    m = model("tales-gpt-oss", "budget", ratio)
    ids = ids_for(m, T)
    found = card("gpt-oss", m, {"x": ids}, moe="budget", ρ=ratio).results[0]
    assert error(found, m.logits(ids)) < TOLERANCE
    exact = card("gpt-oss", m, {"x": ids}).results[0]
    assert (error(found, exact) > 0.01) == (T > 9)  # nine tokens are too few for a budget


def test_a_token_that_no_expert_took_gets_nothing():
    rng = np.random.default_rng(0)
    T, E, k, D = 48, 8, 2, 8
    r = rng.normal(size=(T, E)).astype(np.float32)
    r[:, :2] += 9  # every token wants the same two
    experts, weights = route_reference(r, k)
    n = budget_for(T, k, E, 0.5)
    assignments, _ = within_budget(r, k, n)
    dense = np.zeros((T, E))
    for e, tokens, shares in assignments:
        dense[tokens, e] = shares
    assert (dense.sum(1) == 0).any()
    values: dict[str, HyperValue] = {"D": D, "F": D, "E": E, "k": k, "λ": 7.0, "α": 1.702, "mxfp4": False, "ρ": 0.5}
    # an expert that gives (e + 1) for whatever it is given, so that the sums tell the weights
    given = {
        "gate_up.weight": np.zeros((E, D, 2 * D)),
        "gate_up.bias": np.zeros((E, 2 * D)),
        "down.weight": np.zeros((E, D, D)),
        "down.bias": np.eye(E),
    }
    inputs = {"x": rng.normal(size=(T, D)), "r": r, "i": experts, "ω": weights}
    found = run(LIBRARY["gpt-oss.Budget"], LIBRARY, inputs, values, given.__getitem__).results[0]
    np.testing.assert_allclose(found, dense, atol=1e-6)


# ---- sampling and generation ------------------------------------------------------------------------------------------------


class Fixed:
    """Random numbers that are known."""

    def __init__(self, u: float) -> None:
        self._u = u

    def random(self) -> float:
        return self._u


def test_tokens_are_drawn_as_the_engine_draws_them():
    rng = np.random.default_rng(1)
    for case in range(300):
        V = int(rng.integers(2, 300))
        z = (rng.standard_normal(V) * rng.choice([0.5, 2, 5])).astype(np.float32)
        z = np.round(8 * z) / 8 if case % 3 == 0 else z  # ties, which penalties that f32 holds exactly leave ties
        z[1:] = np.where(rng.random(V - 1) < 0.3 * (case % 5 == 0), -np.inf, z[1:])
        x, u = rng.integers(0, V, int(rng.choice([1, 20, 3 * V]))), rng.random() * (case % 7 > 0)
        τ, k = float(rng.choice([0, 0.3, 1, 1.7])), int(rng.choice([0, 1, 3, 50, 1000]))
        p, m = float(rng.choice([1, 0.9, 0.5, 0])), float(rng.choice([0, 0.05, 0.3, 1]))
        r, a, f = float(rng.choice([1, 2, 0.5])), float(rng.choice([0, 1, -1])), float(rng.choice([0, 0.5]))
        settings = Settings(temperature=τ, top_k=k, top_p=p, min_p=m, repetition_penalty=r, presence_penalty=a, frequency_penalty=f, seed=0)
        sampler = Sampler(settings, x.tolist(), V)
        sampler._random = Fixed(u)  # pyright: ignore[reportAttributeAccessIssue]
        inputs = {"z": z, "x": x, "u": u, "τ": τ, "k": k, "p": p, "m": m, "r": r, "a": a, "f": f}
        assert run(LIBRARY["Sample"], LIBRARY, inputs, {"V": V}).results[0] == sampler.next(z), (case, inputs)


@pytest.mark.parametrize(("p", "u", "token"), [(0.5, 0.49, 0), (0.5, 0.99, 1), (0.51, 0.99, 2), (0.0, 0.99, 0), (1.0, 0.99, 3)])
def test_the_token_with_which_the_sum_reaches_top_p_is_the_last(p, u, token):
    inputs = {"z": np.zeros(4), "x": [0], "u": u, "τ": 1.0, "k": 0, "p": p, "m": 0.0, "r": 1.0, "a": 0.0, "f": 0.0}
    assert run(LIBRARY["Sample"], LIBRARY, inputs, {"V": 4}).results[0] == token
    assert sample(np.zeros(4, np.float32), 1.0, top_p=p, u=u) == token


@pytest.mark.parametrize(("n", "eos"), [(6, ()), (0, ()), (6, "third")])
def test_the_generation_loop_writes_what_the_engine_writes(n, eos):
    m = model("tales-gpt2")
    ids = ids_for(m, 5).tolist()
    settings = Settings(n, temperature=1.2, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=7)
    tokens = [e.token.id for e in m.generate(ids, settings) if e.token]
    ends = [tokens[2]] if eos else []
    wanted = tokens[: tokens.index(ends[0]) + 1] if eos else tokens
    u = np.random.Generator(np.random.PCG64(7)).random(n)
    inputs = {"x": ids, "u": u, "eos": np.array(ends, np.int64), "τ": 1.2, "k": 40, "p": 0.9, "m": 0.01, "r": 1.1, "a": 0.0, "f": 0.0}
    assert card("gpt2.Generate", m, inputs).results[0].tolist() == ids + wanted


def test_the_generation_loop_ends_where_positions_do():
    m = model("gpt2/baseline")
    context = m.config.context
    ids = ids_for(m, context - 2).tolist()
    inputs = {"x": ids, "u": np.zeros(9), "eos": np.zeros(0, np.int64), "τ": 0.0, "k": 0, "p": 1.0, "m": 0.0, "r": 1.0, "a": 0.0, "f": 0.0}
    found = card("gpt2.Generate", m, inputs).results[0]
    greedy = [e.token.id for e in m.generate(ids, Settings(9, temperature=0)) if e.token]
    assert found.tolist() == ids + greedy
    assert len(found) == context
