"""Mixtures of experts: four algorithms, one result; and `budget` against its definition and a table worked by hand."""

import logging
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from toyllm.kernels import moe
from toyllm.kernels.backends import Backend, backend
from toyllm.kernels.dtypes import to_bf16
from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.fp4 import dequantize_reference
from toyllm.kernels.matmul import panels_for
from toyllm.kernels.moe import ALGORITHMS, Experts, Mixing, Mxfp4, budget_for, check_mixing, swiglu_reference, within_budget
from toyllm.kernels.routing import route, route_reference
from toyllm.kernels.threads import thread_scratch

TOLERANCE = 1e-6  # reached: 4e-7, against f64; the algorithms agree bit for bit
COARSE = 1e-4  # with activations of 16 bits before MXFP4; reached: 4e-5
LIMIT, ALPHA = 7.0, 1.702
PLAIN = ("portable", "numpy")

kinds = pytest.mark.parametrize("kind", ["mxfp4", "f32", "bf16"])
backends = pytest.mark.parametrize("name", [pytest.param("auto", marks=pytest.mark.needs_jit), *PLAIN])


# ---- the worked table ---------------------------------------------------------------------------------------------------------

# Seven tokens, three experts. Each cell: p(e|t), the token's rank of the expert, and p^rank, by which the expert prefers tokens.
#
#          A                   B                   C
#   t0   .60 first  .60      .30 second .09      .10 third  .001
#   t1   .60 first  .60      .30 second .09      .10 third  .001     as t0: an expert that has room for one takes t0
#   t2   .50 first  .50      .10 third  .001     .40 second .16
#   t3   .20 second .04      .70 first  .70      .10 third  .001
#   t4   .45 first  .45      .35 second .1225    .20 third  .008
#   t5   .32 third  .0328    .33 second .1089    .35 first  .35      C prefers t5 to t2, whose p is larger but whose rank is lower
#   t6   .10 third  .001     .45 first  .45      .45 second .2025    a tie inside a token: B, the lower index, is its first
PROBABILITIES = [
    [0.6, 0.3, 0.1],
    [0.6, 0.3, 0.1],
    [0.5, 0.1, 0.4],
    [0.2, 0.7, 0.1],
    [0.45, 0.35, 0.2],
    [0.32, 0.33, 0.35],
    [0.1, 0.45, 0.45],
]
LOGITS = np.log(np.float32(PROBABILITIES)) + np.float32(1.5)  # any constant: p is a softmax
A, B, C = range(3)
WORKED = {  # (budget, k): each token's experts with their weights, and what was dropped of the tokens' own k choices
    # A takes t0, B t3, C t5. Dropped: t1's, t2's, t4's and t6's own.
    (1, 1): ({0: {A: 1}, 3: {B: 1}, 5: {C: 1}}, 4),
    # A takes t0 t1, B t3 t6, C t5 t6. t6 keeps B, its better one. Nobody took t2 and t4: those two are dropped.
    (2, 1): ({0: {A: 1}, 1: {A: 1}, 3: {B: 1}, 5: {C: 1}, 6: {B: 1}}, 2),
    # The same are taken, and t6 keeps both, halves as their logits are equal. Of 14 own choices 6 are kept:
    # dropped are B of t0, B of t1, A and C of t2, A of t3, A and B of t4, B of t5.
    (2, 2): ({0: {A: 1}, 1: {A: 1}, 3: {B: 1}, 5: {C: 1}, 6: {B: 0.5, C: 0.5}}, 8),
    # A takes t0 t1 t2, B t3 t6 t4, C t5 t6 t2. t4 keeps B, its second choice: its own, A, is the one dropped.
    (3, 1): ({0: {A: 1}, 1: {A: 1}, 2: {A: 1}, 3: {B: 1}, 4: {B: 1}, 5: {C: 1}, 6: {B: 1}}, 1),
    # The same are taken. t2 keeps A and C, .5 to .4. Dropped: B of t0, B of t1, A of t3, A of t4, B of t5.
    (3, 2): ({0: {A: 1}, 1: {A: 1}, 2: {A: 5 / 9, C: 4 / 9}, 3: {B: 1}, 4: {B: 1}, 5: {C: 1}, 6: {B: 0.5, C: 0.5}}, 5),
}


def by_token(assignments: list[moe.Assignment]) -> dict[int, dict[int, float]]:
    """Token -> expert -> weight."""
    found: dict[int, dict[int, float]] = {}
    for e, tokens, weights in assignments:
        for t, weight in zip(tokens.tolist(), weights.tolist(), strict=True):
            found.setdefault(t, {})[e] = weight
    return found


@pytest.mark.parametrize(("budget", "k"), WORKED)
def test_budget_as_worked_by_hand(budget, k):
    assignments, dropped = within_budget(LOGITS, k, budget)
    found, (expected, lost) = by_token(assignments), WORKED[budget, k]
    assert {t: set(weights) for t, weights in found.items()} == {t: set(weights) for t, weights in expected.items()}
    for t, weights in expected.items():
        assert found[t] == pytest.approx(weights, rel=1e-6)
    assert dropped == lost


def plain_budget(logits: np.ndarray, k: int, budget: int) -> tuple[dict[int, dict[int, float]], int]:
    """The definition in plain Python, one step a sentence; exact while p^rank is no subnormal."""
    T, E = logits.shape
    e_to = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    p = e_to / e_to.sum(1, keepdims=True)
    choices = [sorted(range(E), key=lambda e: (-logits[t, e], e)) for t in range(T)]
    taken = {e: sorted(range(T), key=lambda t: (-(p[t, e] ** (choices[t].index(e) + 1)), t))[:budget] for e in range(E)}
    kept = [[e for e in choices[t] if t in taken[e]][:k] for t in range(T)]
    raw = [[float(np.exp(logits[t, e] - logits[t].max(), dtype=np.float64)) for e in kept[t]] for t in range(T)]
    weights = {t: {e: r / sum(raw[t]) for e, r in zip(kept[t], raw[t], strict=True)} for t in range(T) if kept[t]}
    return weights, sum(e not in kept[t] for t in range(T) for e in choices[t][:k])


@pytest.mark.parametrize(("T", "E", "k", "budget"), [(24, 4, 2, 8), (40, 8, 4, 16), (13, 5, 5, 1), (30, 6, 1, 8), (9, 3, 2, 16)])
def test_budget_equals_the_definition(rng, T, E, k, budget):
    logits = rng.standard_normal((T, E), np.float32) * np.float32(2)
    logits[1] = logits[0]
    logits[2] = logits[2].round()  # ties inside a token
    assignments, dropped = within_budget(logits, k, budget)
    expected, lost = plain_budget(logits, k, budget)
    found = by_token(assignments)
    assert found.keys() == expected.keys()
    for t, weights in expected.items():
        assert found[t] == pytest.approx(weights, rel=1e-6)
    assert dropped == lost
    assert all(len(tokens) <= budget and (np.diff(tokens) > 0).all() for _, tokens, _ in assignments)
    assert sorted({e for e, _, _ in assignments}) == [e for e, _, _ in assignments]


def test_preferences_too_small_for_a_float_still_rank():
    """p^128 is 0 in f64 for every token: the last expert must take those that like it most, not the first ones."""
    T, E = 24, 128
    logits = np.tile(np.linspace(9, 0, E, dtype=np.float32), (T, 1))
    logits[20:, -1] = -np.arange(4, dtype=np.float32)  # still the last choice, and the less the later
    logits[:20, -1] = -10
    logits[:, :-1] += np.float32(30)
    taken = within_budget(logits, E, 2)[0][-1]
    assert taken[0] == E - 1
    assert taken[1].tolist() == [20, 21]


def test_a_token_keeps_no_more_than_k_whoever_took_it(rng):
    logits = rng.standard_normal((16, 8), np.float32)
    assignments, dropped = within_budget(logits, 3, 16)  # everyone takes everyone
    experts, weights = route(logits, 3)
    expected = {t: dict(zip(experts[t].tolist(), weights[t].tolist(), strict=True)) for t in range(16)}
    found = by_token(assignments)
    assert found.keys() == expected.keys()
    assert all(found[t] == pytest.approx(expected[t], rel=1e-6) for t in expected)
    assert dropped == 0


@pytest.mark.parametrize(
    ("T", "k", "E", "ratio", "budget"),
    [
        (16, 4, 32, 1.0, 8),  # 2 tokens an expert on average
        (64, 4, 32, 1.0, 8),  # 8 are 8
        (65, 4, 32, 1.0, 8),  # 8.125: floor before rounding up
        (72, 4, 32, 1.0, 16),  # 9
        (64, 4, 32, 1.125, 16),  # 9
        (64, 4, 32, 1.12, 8),  # 8.96: floor
        (512, 4, 128, 1.25, 24),  # 20
        (10, 1, 128, 0.001, 8),  # at least 1
        (100, 4, 32, 1e9, 104),  # no more than all
        (100, 4, 32, 1e308, 104),
    ],
)
def test_budgets(T, k, E, ratio, budget):
    assert budget_for(T, k, E, ratio) == budget


@pytest.mark.parametrize(
    ("T", "ratio", "chosen"),
    [
        (11, 1.0, "all"),  # budget 8: 24 > 22
        (12, 1.0, "budget"),  # 24 > 24 is not
        (1, 1.0, "all"),
        (48, 2.0, "budget"),  # 2 · 48 · 4/32 = 12, budget 16: 48 <= 96
        (48, 4.0, "budget"),  # budget 24
        (48, 5.0, "budget"),  # 30, budget 32: 96 > 96 is not
        (48, 5.5, "all"),  # 33, budget 40
        (48, 1e300, "all"),
    ],
)
def test_budget_runs_all_where_it_would_be_most_of_the_tokens(T, ratio, chosen):
    mixing = Mixing("budget", ratio)
    assert mixing.choose(T, 4, 32) == chosen
    assert mixing.ran == {chosen}


def test_that_all_runs_in_the_place_of_budget_is_said_once(caplog):
    logger = logging.getLogger("toyllm")
    logger.addHandler(caplog.handler)  # the command line stops propagation
    caplog.set_level(logging.INFO, "toyllm")
    try:
        mixing = Mixing("budget")
        for T in (11, 1, 48, 5):
            mixing.choose(T, 4, 32)
    finally:
        logger.removeHandler(caplog.handler)
    said = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert said == ["--moe budget: 8 tokens an expert is most of 11, so all experts run on all tokens"]
    assert mixing.ran == {"all", "budget"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_algorithms_are_chosen_by_name(algorithm):
    mixing = check_mixing(algorithm, 1.0)
    assert [mixing.choose(T, 4, 32) for T in (1, 64)] == {
        "auto": ["single", "grouped"],
        "single": ["single", "single"],
        "grouped": ["grouped", "grouped"],
        "all": ["all", "all"],
        "budget": ["all", "budget"],
    }[algorithm]


def test_another_algorithm_and_a_ratio_that_is_none_are_refused():
    with pytest.raises(ToyllmError, match="--moe sparse: expected one of auto, single, grouped, all, budget"):
        check_mixing("sparse", 1.0)
    for ratio in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ToyllmError, match=f"--tokens-per-expert-ratio {ratio}: expected a number above 0"):
            check_mixing("budget", ratio)


# ---- the activation -----------------------------------------------------------------------------------------------------------


def swiglu(h: np.ndarray) -> np.ndarray:
    out = np.full((len(h), h.shape[1] // 2), np.nan, np.float32)
    moe._swiglu_rows(h, np.float32(LIMIT), np.float32(ALPHA), out)
    return out


def test_the_activation_equals_the_reference(rng, error):
    h = rng.standard_normal((20, 96), np.float32) * np.float32(8)  # a third is beyond the clamps
    assert error(swiglu(h), swiglu_reference(h.astype(np.float64), LIMIT, ALPHA)) < 1e-6


def test_the_clamps_are_one_sided_for_the_gate_and_two_sided_for_up():
    gate, up = np.meshgrid(np.float32([-30, -7.5, 0, 7, 7.5, 1e30]), np.float32([-1e30, -7.5, -7, -1, 0, 7, 7.5, 1e30]))
    h = np.stack([gate.ravel(), up.ravel()], -1).reshape(1, -1)
    gate, up = np.minimum(gate, 7).astype(np.float64), np.clip(up, -7, 7)
    expected = (gate / (1 + np.exp(-1.702 * gate)) * (up + 1)).ravel()
    np.testing.assert_allclose(swiglu(h)[0], expected, rtol=1e-5)
    assert swiglu(np.float32([[-7.5, 0]]))[0, 0] != swiglu(np.float32([[-7, 0]]))[0, 0]  # no lower clamp on the gate


@pytest.mark.parametrize(("gate", "up"), [(np.nan, 1), (1, np.nan), (np.nan, np.nan)])
def test_nan_passes_through_the_clamps(gate, up):
    assert np.isnan(swiglu(np.float32([[gate, up]])))


@pytest.mark.parametrize(("gate", "up", "value"), [(np.inf, np.inf, 56), (np.inf, -np.inf, -42), (-1e38, np.inf, 0)])
def test_infinities_are_clamped(gate, up, value):
    assert swiglu(np.float32([[gate, up]]))[0, 0] == pytest.approx(value, rel=1e-4, abs=1e-30)


# ---- one result, whichever algorithm ------------------------------------------------------------------------------------------


@pytest.fixture
def layer(rng):
    """Random experts of a kind: as the kernels take them, and f64 matrices (gate_up [E, 2F, D], down [E, D, F])."""

    def make(kind: str, E: int = 5, D: int = 64, F: int = 96) -> tuple[Experts, np.ndarray, np.ndarray]:
        biases = [rng.standard_normal((E, n)).astype(np.float32) for n in (2 * F, D)]
        stored, wide = [], []
        for rows, columns, scale in ((2 * F, D, 124), (D, F, 123)):
            if kind == "mxfp4":
                blocks = rng.integers(0, 256, (E, rows, columns // 32, 16)).astype(np.uint8)
                scales = rng.integers(scale - 3, scale + 1, (E, rows, columns // 32)).astype(np.uint8)
                stored.append(Mxfp4(blocks, scales))
                wide.append(dequantize_reference(blocks, scales).astype(np.float64))
            else:
                w = rng.standard_normal((E, columns, rows)).astype(np.float32) / np.float32(columns**0.5)
                w = (to_bf16(w).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
                stored.append(to_bf16(w) if kind == "bf16" else w)
                wide.append(w.swapaxes(1, 2).astype(np.float64))
        for array in (a for s in stored for a in (s if isinstance(s, Mxfp4) else (s,))):
            array.flags.writeable = False
        return Experts(stored[0], biases[0], stored[1], biases[1], LIMIT, ALPHA), *wide

    return make


def reference(x: np.ndarray, choices: dict[int, dict[int, float]], w: Experts, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """f64 [T, D]: the formula, token by token."""
    out = np.zeros(x.shape)
    for t, experts in choices.items():
        for e, weight in experts.items():
            h = gate_up[e] @ x[t].astype(np.float64) + w.gate_up_bias[e]
            out[t] += weight * (down[e] @ swiglu_reference(h[None], LIMIT, ALPHA)[0] + w.down_bias[e])
    return out


def mix(kernels: Backend, x: np.ndarray, logits: np.ndarray, k: int, w: Experts, watch=None) -> np.ndarray:
    """The mixture of the k best experts; all that it works in is NaN before."""

    def nan(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    D, F = x.shape[1], w.gate_up_bias.shape[1] // 2
    experts, weights = route(logits, k)
    panels = np.full_like(thread_scratch(panels_for(max(D, F))), np.nan)
    out = nan(len(x), D)
    kernels.mixture(x, logits, experts, weights, w, out, (nan(k, 2 * F), nan(k, F), nan(1, D), panels), watch)
    return out


def inputs(rng, T: int, D: int = 64, E: int = 5) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal((T, D), np.float32), rng.standard_normal((T, E), np.float32)


def routed(logits: np.ndarray, k: int) -> dict[int, dict[int, float]]:
    experts, weights = route_reference(logits.astype(np.float64), k)
    return {t: dict(zip(experts[t].tolist(), weights[t].tolist(), strict=True)) for t in range(len(logits))}


@pytest.mark.needs_jit
@kinds
@pytest.mark.parametrize("algorithm", ["auto", "single", "grouped", "all"])
def test_every_algorithm_equals_the_formula(rng, layer, error, kind, algorithm):
    w, gate_up, down = layer(kind)
    for T, k in [(1, 3), (1, 1), (7, 3), (20, 2)]:
        x, logits = inputs(rng, T)
        expected = reference(x, routed(logits, k), w, gate_up, down)
        assert error(mix(backend("auto", Mixing(algorithm), exact=True), x, logits, k, w), expected) < TOLERANCE, (T, k)
        assert error(mix(backend("auto", Mixing(algorithm)), x, logits, k, w), expected) < COARSE, (T, k)


@pytest.mark.parametrize("name", PLAIN)
@kinds
def test_plain_backends_equal_the_formula(rng, layer, error, name, kind):
    w, gate_up, down = layer(kind, E=3, D=32, F=32)
    x, logits = inputs(rng, 3, 32, 3)
    expected = reference(x, routed(logits, 2), w, gate_up, down)
    for algorithm in ("single", "grouped", "all"):
        assert error(mix(backend(name, Mixing(algorithm)), x, logits, 2, w), expected) < TOLERANCE


@pytest.mark.needs_jit
@kinds
def test_single_grouped_and_all_give_the_same_bits(rng, layer, kind):
    w, _, _ = layer(kind)
    x, logits = inputs(rng, 30)
    single, grouped, everything = (mix(backend("auto", Mixing(a)), x, logits, 3, w) for a in ("single", "grouped", "all"))
    assert np.array_equal(single, grouped)
    assert np.array_equal(everything, grouped)
    for t in range(30):
        alone = mix(backend("auto"), x[t : t + 1], logits[t : t + 1], 3, w)
        assert np.array_equal(alone[0], grouped[t])


@backends
@pytest.mark.parametrize("ratio", [1e3, 1e300])
def test_a_budget_for_everyone_is_all(rng, layer, name, ratio):
    w, _, _ = layer("mxfp4", E=3, D=32, F=32)
    x, logits = inputs(rng, 13, 32, 3)
    mixing = Mixing("budget", ratio)
    assert np.array_equal(mix(backend(name, mixing), x, logits, 2, w), mix(backend(name, Mixing("all")), x, logits, 2, w))
    assert mixing.ran == {"all"}
    assert mixing.dropped == 0


@backends
def test_budget_mixes_what_was_kept_and_gives_nothing_to_the_others(rng, layer, error, name):
    w, gate_up, down = layer("mxfp4", E=3, D=32, F=32)
    x, logits = inputs(rng, 24, 32, 3)
    logits[:, 0] += 3  # most tokens want the first expert
    mixing = Mixing("budget", 0.5)
    found = mix(backend(name, mixing, exact=True), x, logits, 1, w)
    choices, dropped = plain_budget(logits, 1, budget_for(24, 1, 3, 0.5))
    assert error(found, reference(x, choices, w, gate_up, down)) < TOLERANCE
    nobodys = np.setdiff1d(np.arange(24), list(choices))
    assert len(nobodys)
    assert not found[nobodys].any()
    assert mixing.ran == {"budget"}
    assert mixing.dropped == dropped > 0
    mix(backend(name, mixing), x, logits, 1, w)
    assert mixing.dropped == 2 * dropped


@pytest.mark.needs_jit
def test_threads_change_no_bit(rng, layer, threads):
    w, _, _ = layer("mxfp4")
    x, logits = inputs(rng, 9)
    found = []
    for count, algorithm in product((1, 2), ("single", "grouped")):
        threads(count)
        found.append(mix(backend("auto", Mixing(algorithm)), x, logits, 3, w))
    assert all(np.array_equal(f, found[0]) for f in found)


@pytest.mark.needs_jit
def test_single_reads_the_chosen_experts_alone(rng, layer):
    """All others are NaN, in scales and biases."""
    w, _, _ = layer("mxfp4")
    x, logits = inputs(rng, 1)
    expected = mix(backend("auto"), x, logits, 2, w)
    others = np.setdiff1d(np.arange(5), route(logits, 2)[0][0])
    spoilt = {}
    for name in ("gate_up", "down"):
        scales, bias = getattr(w, name).scales.copy(), getattr(w, f"{name}_bias").copy()
        scales[others], bias[others] = 255, np.nan
        spoilt |= {name: Mxfp4(getattr(w, name).blocks, scales), f"{name}_bias": bias}
    for algorithm in ("single", "grouped"):
        assert np.array_equal(mix(backend("auto", Mixing(algorithm)), x, logits, 2, replace(w, **spoilt)), expected)


@pytest.mark.needs_jit
def test_nan_in_a_token_stays_in_its_row(rng, layer):
    w, _, _ = layer("mxfp4")
    x, logits = inputs(rng, 6)
    x[2, 5] = np.nan
    for algorithm in ("single", "grouped", "all"):
        found = np.isnan(mix(backend("auto", Mixing(algorithm)), x, logits, 3, w))
        assert found[2].all()
        assert found.sum() == 64


@backends
@pytest.mark.parametrize("algorithm", ["single", "grouped", "all"])
def test_watching_shows_every_chosen_expert_and_changes_nothing(rng, layer, error, name, algorithm):
    w, gate_up, _ = layer("mxfp4", E=3, D=32, F=32)
    x, logits = inputs(rng, 4, 32, 3)
    seen: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def watch(e: int, tokens: np.ndarray, part: str, array: np.ndarray) -> None:
        for n, t in enumerate(tokens):
            seen.setdefault((int(t), e), {})[part] = array[n].copy()

    kernels = backend(name, Mixing(algorithm), exact=True)
    assert np.array_equal(mix(kernels, x, logits, 2, w, watch), mix(kernels, x, logits, 2, w))
    chosen = {(t, e) for t, experts in routed(logits, 2).items() for e in experts}
    assert seen.keys() == ({(t, e) for t in range(4) for e in range(3)} if algorithm == "all" else chosen)
    for (t, e), parts in seen.items():
        expected = gate_up[e] @ x[t].astype(np.float64) + w.gate_up_bias[e]
        assert list(parts) == ["gate_up", "hidden"]
        assert error(parts["gate_up"], expected) < TOLERANCE
        assert error(parts["hidden"][None], swiglu_reference(expected[None], LIMIT, ALPHA)) < 5e-6  # reached: 2e-6, near the clamp


@backends
@pytest.mark.parametrize("algorithm", ["single", "grouped", "all"])
def test_what_a_watcher_writes_is_what_the_experts_go_on_with(rng, layer, name, algorithm):
    w, gate_up, down = layer("mxfp4", E=3, D=32, F=32)
    x, logits = inputs(rng, 4, 32, 3)

    def watch(e: int, tokens: np.ndarray, part: str, array: np.ndarray) -> None:
        if part == "gate_up":
            array[:, 1::2] += np.float32(e)
        else:
            array[tokens == 2, 5:] = 7

    found = mix(backend(name, Mixing(algorithm), exact=True), x, logits, 2, w, watch)
    expected = np.zeros((4, 32))
    for t, experts in routed(logits, 2).items():
        for e, weight in experts.items():
            h = gate_up[e] @ x[t].astype(np.float64) + w.gate_up_bias[e]
            h[1::2] += e
            z = swiglu_reference(h[None], LIMIT, ALPHA)[0]
            z[5:] = 7 if t == 2 else z[5:]
            expected[t] += weight * (down[e] @ z + w.down_bias[e])
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()
