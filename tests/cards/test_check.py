"""The check itself: it passes for every option of both families, it runs every card, and it sees a departure on either side."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.cards.catalogue import READING, library
from toyllm.cards.check import Report, check
from toyllm.cards.structure import Card, CardError
from toyllm.cards.text import parse, render
from toyllm.kernels.errors import ToyllmError
from toyllm.models import gpt2

GOLDENS = Path(__file__).parents[1] / "models" / "goldens"
CASES = [f"{family}/{file.stem}" for family in ("gpt2", "gpt_oss") for file in sorted((GOLDENS / family).glob("*.safetensors"))]
GPT2, GPT_OSS = "gpt2/n_inner", "gpt_oss/window_5"


@cache
def model(name: str) -> Any:
    path = GOLDENS / name
    return toyllm.load(str(path) if path.is_dir() else name, exact=True)


def edited(name: str, *edits: tuple[str, str]) -> Card:
    """A card of the library with parts of its text replaced, wherever they stand."""
    text = render(library()[name])
    for old, new in edits:
        assert old in text, f"{name} has no {old}: the card has changed, and this test has not"
        text = text.replace(old, new)
    return parse(text, "mine.card")


def swapped(name: str, first: int, second: int) -> Card:
    """A card of the library with two steps, by their numbers, in each other's place."""
    card = library()[name]
    steps = list(card.steps)
    steps[first - 1], steps[second - 1] = steps[second - 1], steps[first - 1]
    return replace(card, steps=tuple(steps))


def checked(case: str, card: Card, stop: bool = False) -> Report:
    """The check with a card in place of the library's, on tokens that reach past a window of 5."""
    m = model(case)
    return check(m, {**library(), card.name: card}, np.random.default_rng(5).integers(0, m.vocab_size, 14).tolist(), 10, stop=stop)


# ---- what holds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tales-gpt2", "tales-gpt-oss", *CASES])
def test_every_card_runs_and_agrees_with_the_engine(name: str) -> None:
    report = check(model(name), library())
    assert report.first is None
    assert report.unstated == ()
    family = "gpt2" if model(name).family is gpt2 else "gpt-oss"
    assert report.ran == READING[family].keys()
    assert {h.stage for h in report.held} == {"prefill", "decode", "alone"}


@pytest.mark.parametrize("case", [GPT2, GPT_OSS])
@pytest.mark.parametrize("start", [1, 7, 8])
def test_the_prompt_is_prefilled_up_to_the_start_and_decoded_from_there(case: str, start: int) -> None:
    report = check(model(case), library(), list(range(8)), start)
    assert report.holds
    decoded = [h for h in report.held if (h.stage, h.name) == ("decode", "norm_f")]
    assert len(decoded) == 8 - start
    assert ("no token was decoded: lower --start" in report.notes) == (start == 8)


def test_single_precision_agrees_too() -> None:
    assert check(model(GPT2), library(), [1, 2, 3, 4], 2, dtype=np.float32).holds


def test_a_window_that_hides_nothing_is_noted() -> None:
    assert check(model(GPT_OSS), library(), list(range(14)), 10).notes == ()
    assert any("window of 5 hides nothing from 4 tokens" in n for n in check(model(GPT_OSS), library(), [1, 2, 3, 4], 3).notes)
    assert any("from the 3 tokens that are prefilled" in n for n in check(model(GPT_OSS), library(), list(range(9)), 3).notes)


@pytest.mark.parametrize(
    ("ids", "start", "message"),
    [
        ([1, 2], 0, "--start 0: expected 1 to 2"),
        ([1, 2], 3, "--start 3: expected 1 to 2"),
        ([97], 1, "token id 97 .* expected 0 to 96"),
        ([1] * 65, 1, "65 tokens: expected 1 to 64"),
        ([], None, "0 tokens: expected 1 to 64"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(ids: list[int], start: int | None, message: str) -> None:
    with pytest.raises(ToyllmError, match=message):
        check(model(GPT2), library(), ids, start)


def test_a_report_about_one_card_has_its_steps_and_those_that_call_it() -> None:
    report = check(model(GPT2), library(), [1, 2, 3], 2)
    about = report.about("gpt2.LN", library())
    assert {h.activation for h in about.held} == {"blocks.*.norm_1", "blocks.*.norm_2", "norm_f"}
    assert {h.card for h in report.about("gpt2.Attn", library()).held} == {"gpt2.Attn"}
    assert all(report.about(name, library()).held for name in READING["gpt2"])


# ---- cards that depart ------------------------------------------------------------------------------------------------------


def test_the_first_departure_is_named_with_its_place() -> None:
    first = checked(GPT2, edited("gpt2.FFN", ("x · W_1 + b_1", "x · W_1"))).first
    assert first is not None
    assert (first.stage, first.card, first.step, first.name) == ("prefill", "gpt2.FFN", 4, "blocks.0.mlp.hidden")
    assert first.place == "mine.card:12"
    assert first.text == "h ← GELU_tanh(x · W_1)"


def test_an_activation_that_the_engine_does_not_have_is_refused_at_its_place() -> None:
    with pytest.raises(CardError, match=r"mine.card:14:.*\[blocks.0.mlp.ouch\]: the engine has no such activation"):
        checked(GPT2, edited("gpt2.FFN", ("[mlp.out]", "[mlp.ouch]")))


def test_a_card_without_the_results_that_decoding_needs_is_refused() -> None:
    card = edited("gpt2", ("return z, C", "return z"))
    with pytest.raises(CardError, match="result 2 should be keys and values, but it returns 1"):
        checked(GPT2, replace(card, outputs=card.outputs[:1]))


def test_activations_that_no_step_names_any_more_are_told() -> None:
    report = checked(GPT2, edited("gpt2.FFN", ("   ▷ [mlp.out]", "")))
    assert report.holds
    assert report.unstated == ("blocks.0.mlp.out", "blocks.1.mlp.out")


MUTANTS: dict[str, tuple[str, str, tuple[str, str]]] = {  # what is wrong: a checkpoint that shows it, a card, what is written instead
    # GPT-2
    "causal mask off by one": (GPT2, "gpt2.Attn", ("causal(T, T)", "window(T, T, T - 1)")),
    "no causal mask": (GPT2, "gpt2.Attn", ("causal(T, T)", "window(T, T, ∞) ∨ true")),
    "scale dropped": (GPT2, "gpt2.Attn", ("s · q[:, h]", "q[:, h]")),
    "scale dropped when decoding": (GPT2, "gpt2.AttnStep", ("s · q[:, h]", "q[:, h]")),
    "scale by D, not by the head": (GPT2, "gpt2", ("1 / √Dh", "1 / √D")),
    "layers counted from 1": ("gpt2/scale_attn_by_inverse_layer_idx", "gpt2", ("s / (ℓ + 1)", "s / (ℓ + 2)")),
    "layers counted from 1 when decoding": ("gpt2/scale_by_layer_only", "gpt2.Step", ("s / (ℓ + 1)", "s / (ℓ + 2)")),
    "scaled although it should not": ("gpt2/scale_attn_weights_off", "gpt2", ("s ← 1  ", "s ← 1 / √Dh")),
    "keys and values swapped": (GPT2, "gpt2.Attn", ("q, k, v ", "q, v, k ")),
    "keys and values swapped in the cache": (GPT2, "gpt2.Attn", ("stack(k, v)", "stack(v, k)")),
    "keys and values swapped when decoding": (GPT2, "gpt2.AttnStep", ("stack(k, v)", "stack(v, k)")),
    "heads not back in order": (GPT2, "gpt2.Attn", ("permute(Y, 1, 0, 2)", "reshape(Y, T, H, Dh)")),
    "projection transposed": (GPT2, "gpt2.Attn", ("H·Dh) · W_o + b_o", "H·Dh) · W_o^⊤ + b_o")),
    "projection's bias missing": (GPT2, "gpt2.Attn", ("W_o + b_o", "W_o")),
    "bias of queries, keys and values missing": (GPT2, "gpt2.Attn", ("x · W_qkv + b_qkv", "x · W_qkv")),
    "erf for tanh": (GPT2, "gpt2.FFN", ("GELU_tanh(", "GELU(")),
    "tanh for erf": ("gpt2/gelu", "gpt2.FFN", ("GELU(", "GELU_tanh(")),
    "residual dropped": (GPT2, "gpt2.Block", ("e ← e + a", "e ← a")),
    "the norm for the residual": (GPT2, "gpt2.Block", ("e ← e + FFN(", "e ← n + FFN(")),
    "norm behind the sub-layer": (GPT2, "gpt2.Block", ("Attn(n;", "Attn(e;")),
    "the first norm twice": (GPT2, "gpt2.Block", ("LN(e; γ^2, β^2", "LN(e; γ^1, β^1")),
    "epsilon outside the root": ("gpt2/layer_norm_epsilon", "gpt2.LN", ("√(v + ε)", "(√v + ε)")),
    "the unbiased variance": (GPT2, "gpt2.LN", ("variance(x, axis=-1)", "variance(x, axis=-1) · D / (D - 1)")),
    "not centred": (GPT2, "gpt2.LN", ("(x - m) /", "x /")),
    "scale and shift swapped": (GPT2, "gpt2", ("γ_f, β_f, ε)", "β_f, γ_f, ε)")),
    "positions from 1": (GPT2, "gpt2", ("W_p[: T]", "W_p[1 : T + 1]")),
    "position of the token before": (GPT2, "gpt2.Step", ("W_p[[S]]", "W_p[[S - 1]]")),
    "the embedding for the head": ("gpt2/head_untied", "gpt2", ("e · W_u^⊤", "e · W_e^⊤")),
    "generated from the token before": (GPT2, "gpt2.Generate", ("Step(x[-1], C)", "Step(x[-2], C)")),
    # sampling
    "top-k of one more": (GPT2, "Sample", ("range(V) < k", "range(V) ≤ k")),
    "the token that reaches p dropped": (GPT2, "Sample", ("concat([true], c[: V-1] < p ⊙ c[V-1])", "concat([true], c[1 :] < p ⊙ c[V-1])")),
    "repetition raises what is below 0": (GPT2, "Sample", ("where(z > 0, z / r, r ⊙ z)", "z / r")),
    "presence for each time": (GPT2, "Sample", ("z′ - a - f ⊙ n", "z′ - a ⊙ n - f ⊙ n")),
    "temperature multiplies": (GPT2, "Sample", ("(z - max(z)) / τ", "(z - max(z)) ⊙ τ")),
    "drawn in the order of likelihood": (GPT2, "Sample", ("put(w, i, w)", "w")),
    # GPT-OSS
    "window off by one": (GPT_OSS, "gpt-oss.Attn", ("window(T, T, w)", "window(T, T, w + 1)")),
    "one window for all layers": (GPT_OSS, "gpt-oss", ("Block(e; θ_ℓ, w_ℓ)", "Block(e; θ_ℓ, w_0)")),
    "sink forgotten": (GPT_OSS, "gpt-oss.Attn", ("softmax(concat(A^h, full(σ_h, T, 1), axis=1))[:, : T]", "softmax(A^h)")),
    "sink of the first head": (GPT_OSS, "gpt-oss.Attn", ("full(σ_h, T, 1)", "full(σ_0, T, 1)")),
    "sink scaled": (GPT_OSS, "gpt-oss.AttnStep", ("[[σ_h]]", "[[σ_h / √Dh]]")),
    "heads grouped in turns": (GPT_OSS, "gpt-oss.Attn", ("⌊h · G / H⌋", "h mod G")),
    "heads grouped in turns when decoding": (GPT_OSS, "gpt-oss.AttnStep", ("⌊h · G / H⌋", "h mod G")),
    "scores not scaled": (GPT_OSS, "gpt-oss.Attn", (" / √Dh", "")),
    "values like keys": (GPT_OSS, "gpt-oss.Attn", ("x · W_v^⊤ + b_v, T, G, Dh)", "x · W_v^⊤ + b_v, T, G, Dh) + RoPE(k, p)")),
    "written to the next cell": (GPT_OSS, "gpt-oss.AttnStep", ("C[:, p mod R]", "C[:, (p + 1) mod R]")),
    "empty cells seen": (GPT_OSS, "gpt-oss.AttnStep", ("0 ≤ t ∧ p - w < t", "p - w < t")),
    "the first positions kept": (GPT_OSS, "gpt-oss.Rings", ("range(maximum(0, T - n), T)", "range(0, minimum(n, T))")),
    "position of the token before, turned": (GPT_OSS, "gpt-oss.AttnStep", ("H, Dh), [p])", "H, Dh), [p - 1])")),
    "wrong rotary pairs": (GPT_OSS, "gpt-oss.RoPE", ("if interleaved then", "if ¬ interleaved then")),
    "wrong rotary pairs, interleaved": ("gpt_oss/rope_interleaved", "gpt-oss.RoPE", ("if interleaved then", "if ¬ interleaved then")),
    "turned backwards": (GPT_OSS, "gpt-oss.RoPE", ("x_1 ⊙ c - x_2 ⊙ s, x_2 ⊙ c + x_1 ⊙ s", "x_1 ⊙ c + x_2 ⊙ s, x_2 ⊙ c - x_1 ⊙ s")),
    "factor on the sine dropped": (GPT_OSS, "gpt-oss.RoPE", ("m ⊙ sin(φ)", "sin(φ)")),
    "YaRN's ramp reversed": (GPT_OSS, "gpt-oss.YaRN", ("(1 - r) ⊙ f + r ⊙ f / s", "r ⊙ f + (1 - r) ⊙ f / s")),
    "YaRN's factor dropped": (GPT_OSS, "gpt-oss.YaRN", ("return f, 0.1 · log(s) + 1", "return f, 1")),
    "YaRN's ends rounded inwards": ("gpt_oss/rope_truncated", "gpt-oss.YaRN", ("⌊low⌋, ⌈high⌉", "⌈low⌉, ⌊high⌋")),
    "YaRN although it is not": ("gpt_oss/rope_default", "gpt-oss.YaRN", ("if ¬ yarn then", "if yarn then")),
    "a mean square that is centred": (GPT_OSS, "gpt-oss.RMSNorm", ("mean(x^2, axis=-1)", "variance(x, axis=-1)")),
    "epsilon outside the root, RMSNorm": ("gpt_oss/rms_norm_eps", "gpt-oss.RMSNorm", ("axis=-1) + ε)", "axis=-1)) + ε")),
    "softmax before top-k": (GPT_OSS, "gpt-oss.Router", ("softmax(gather(r, i))", "gather(softmax(r), i)")),
    "router's bias missing": (GPT_OSS, "gpt-oss.Router", ("W_r^⊤ + b_r", "W_r^⊤")),
    "the least likely experts": (GPT_OSS, "gpt-oss.Router", ("top_k(r, k)", "top_k(-r, k)")),
    "gate clamped below too": ("gpt_oss/swiglu_limit", "gpt-oss.Expert", ("minimum(g, λ)", "clamp(g, -λ, λ)")),
    "up not clamped": ("gpt_oss/swiglu_limit", "gpt-oss.Expert", ("clamp(u, -λ, λ)", "u")),
    "up without 1 more": (GPT_OSS, "gpt-oss.Expert", ("(u′ + 1)", "u′")),
    "the plain SiLU": (GPT_OSS, "gpt-oss.Expert", ("sigmoid(α ⊙ g′)", "sigmoid(g′)")),
    "gate and up in halves": (GPT_OSS, "gpt-oss.Expert", ("h[:, ::2], h[:, 1::2]", "split(h, 2)")),
    "gate and up swapped": (GPT_OSS, "gpt-oss.Expert", ("h[:, ::2], h[:, 1::2]", "h[:, 1::2], h[:, ::2]")),
    "expert's bias missing": (GPT_OSS, "gpt-oss.Expert", ("h · W′ + b_2[e]", "h · W′")),
    "one expert's matrix for all": ("gpt_oss/experts_bf16", "gpt-oss.Expert", ("W_1[e]", "W_1[0]")),
    "nibbles swapped": (GPT_OSS, "MXFP4", ("Q & 15, Q >> 4", "Q >> 4, Q & 15")),
    "a code misread": (GPT_OSS, "MXFP4", ("3, 4, 6]", "3, 4, 5]")),
    "scales' bias off by one": (GPT_OSS, "MXFP4", ("2^(s - 127)", "2^(s - 128)")),
    "NaN scales taken for numbers": (GPT_OSS, "MXFP4", ("where(s < 255, 2^(s - 127), NaN)", "2^(s - 127)")),
    "negative codes taken for positive": (GPT_OSS, "MXFP4", ("where(c < 8, v, -v)", "v")),
    "one weight for all experts, single": (GPT_OSS, "gpt-oss.Single", ("ω[t, j] ⊙ o[0]", "ω[t, 0] ⊙ o[0]")),
    "one weight for all experts, grouped": (GPT_OSS, "gpt-oss.Grouped", ("ω[t, j", "ω[t, 0 ⊙ j")),
    "every expert with a weight": (GPT_OSS, "gpt-oss.All", ("put(zeros(T, E), i, ω)", "put(full(0.1, T, E), i, ω)")),
    "budget of one more": (GPT_OSS, "gpt-oss.Budget", ("axis=0), axis=0) < n", "axis=0), axis=0) ≤ n")),
    "budget twice as large": (GPT_OSS, "gpt-oss.Budget", ("/ 8⌉", "/ 4⌉")),
    "budget's weights as the router's": (GPT_OSS, "gpt-oss.Budget", ("maximum(sum(a, axis=1), 2^{-126})", "sum(exp(b), axis=1)")),
}  # fmt: skip


@pytest.mark.parametrize("what", MUTANTS)
def test_a_card_that_says_something_else_departs(what: str) -> None:
    case, name, edit = MUTANTS[what]
    report = checked(case, edited(name, edit), stop=True)
    assert not report.holds, what
    assert report.first is not None
    assert report.first.difference > report.first.tolerance


@pytest.mark.parametrize(
    ("case", "name", "first", "second"),
    [
        (GPT2, "gpt2.Attn", 5, 6),  # mask and softmax
        (GPT2, "gpt2.Block", 3, 4),  # residual and norm
        (GPT_OSS, "gpt-oss.Attn", 8, 9),
        (GPT_OSS, "gpt-oss.Step", 6, 7),
    ],
)
def test_two_steps_in_each_others_place_depart(case: str, name: str, first: int, second: int) -> None:
    assert not checked(case, swapped(name, first, second), stop=True).holds


# ---- kernels that depart ----------------------------------------------------------------------------------------------------


def without_weight(x: np.ndarray, w: np.ndarray, epsilon: float, out: np.ndarray) -> None:
    out[...] = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)


def without_renormalising(kernels: Any) -> Callable[..., None]:
    def route(logits: np.ndarray, experts: np.ndarray, weights: np.ndarray) -> None:
        kernels.route(logits, experts, weights)
        every = np.exp(logits - logits.max(-1, keepdims=True))
        weights[...] = np.take_along_axis(every / every.sum(-1, keepdims=True), experts, -1)

    return route


KERNELS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "gpt2.FFN": (GPT2, lambda k: {"gelu_new": k.gelu}),
    "gpt2.Block": (GPT2, lambda k: {"layer_norm": lambda x, w, b, e, out: k.layer_norm(x, w, b, 100 * e, out)}),
    "gpt-oss.Block": (GPT_OSS, lambda k: {"rms_norm": without_weight}),
    "gpt-oss.Attn": (GPT_OSS, lambda k: {"rotate": lambda x, c, s, interleaved: k.rotate(x, c, s, not interleaved)}),
    "gpt-oss.Router": (GPT_OSS, lambda k: {"route": without_renormalising(k)}),
}


@pytest.mark.parametrize("card", KERNELS)
def test_a_kernel_that_computes_something_else_departs(card: str) -> None:
    case, change = KERNELS[card]
    m = model(case)
    first = check(
        replace(m, kernels=replace(m.kernels, **change(m.kernels)), _buffers=None), library(), list(range(14)), 10, stop=True
    ).first
    assert first is not None
    assert first.card == card
