"""GPT-OSS held against what transformers computed for small random checkpoints (make_gpt_oss_goldens.py), dialect by dialect."""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import toyllm

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent)
    reference = importlib.import_module("gpt_oss_reference")

GOLDENS = Path(__file__).parent / "goldens" / "gpt_oss"
CASES = sorted(file.stem for file in GOLDENS.glob("*.safetensors"))
WINDOWS = [case for case in CASES if case.startswith("window_")]
OPTIONS = [case for case in CASES if (GOLDENS / case / "model.safetensors").resolve().parent.name == "baseline" != case]
TOLERANCE = {True: 1e-4, False: 2e-3}  # exact (f32 throughout) or not


@functools.cache
def golden(case: str) -> dict[str, np.ndarray]:
    return load_file(GOLDENS / f"{case}.safetensors")


TAPPED = [case for case in CASES if "taps.logits" in golden(case)]


def all_ids(case: str) -> np.ndarray:
    """The prompt and what follows it greedily."""
    return np.concatenate([golden(case)["prompt"], golden(case)["greedy"]])


@functools.cache
def model(case: str, exact: bool = True) -> Any:
    return toyllm.load(str(GOLDENS / case), exact=exact)


def error(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b| / max|b|, where -inf must stand in the same places and NaN nowhere."""
    assert a.shape == b.shape
    seen = np.isfinite(b)
    np.testing.assert_array_equal(a[~seen], b[~seen])
    return float(np.abs(a[seen].astype(np.float64) - b[seen]).max() / np.abs(b[seen]).max())


def run(case: str, ids: np.ndarray, chunks: Sequence[int] = (), start: int = 0, exact: bool = True, **settings: Any) -> np.ndarray:
    """Logits [T, V] of `ids` fed into an empty cache from position `start`, in pieces of the lengths in `chunks` (default: whole)."""
    cache, logits, at = model(case, exact).new_cache(), [], 0
    for n in chunks or [len(ids)]:
        tokens = ids[at : at + n]
        positions = np.arange(start + at, start + at + len(tokens))
        logits.append(model(case, exact).forward(tokens, positions, np.zeros_like(tokens), cache, all_logits=True, **settings))
        at += n
    return np.concatenate(logits)


def tapped(case: str, ids: np.ndarray, exact: bool = True) -> dict[str, np.ndarray]:
    """Every activation of one pass."""
    found: dict[str, np.ndarray] = {}
    run(case, ids, exact=exact, taps=lambda name, array: found.update({name: array.copy()}))
    return found


def greedy(case: str, prompt: np.ndarray, count: int, exact: bool) -> list[int]:
    """The likeliest token `count` times: the prompt in one pass, then one token a pass, ties to the lowest id."""
    cache, ids, fed = model(case, exact).new_cache(), prompt.tolist(), 0
    for _ in range(count):
        tokens, positions = np.asarray(ids[fed:]), np.arange(fed, len(ids))
        fed = len(ids)
        ids.append(int(model(case, exact).forward(tokens, positions, np.zeros_like(tokens), cache)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers(case: str, exact: bool) -> None:
    logits = model(case, exact).logits(golden(case)["prompt"].tolist())
    assert logits.dtype == np.float32
    assert error(logits[golden(case)["rows"]], golden(case)["logits"]) < TOLERANCE[exact]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_equal_those_of_transformers(case: str, exact: bool) -> None:
    expected = golden(case)["greedy"].tolist()
    assert greedy(case, golden(case)["prompt"], len(expected), exact) == expected


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_tokens_go_to_the_experts_that_transformers_chose(case: str, exact: bool) -> None:
    expected, gap = golden(case)["router.experts"], golden(case)["router.gap"]
    found = tapped(case, golden(case)["prompt"], exact)
    chosen = np.stack([found[f"blocks.{i}.router.experts"] for i in range(len(expected))])
    np.testing.assert_array_equal(np.sort(chosen), np.sort(expected))
    decided = gap > 10 * TOLERANCE[exact]  # router logits are of about 3; in what order two near ones come is open
    np.testing.assert_array_equal(chosen[decided], expected[decided])


@pytest.mark.parametrize("case", TAPPED)
def test_every_activation_agrees_with_transformers(case: str) -> None:
    expected = {name.removeprefix("taps."): values for name, values in golden(case).items() if name.startswith("taps.")}
    found = tapped(case, golden(case)["prompt"][: len(expected["embed"])])
    assert found.keys() == expected.keys()
    errors = {name: error(found[name], expected[name]) for name in expected}
    assert {name: e for name, e in errors.items() if not e < 1e-4} == {}


def test_watching_changes_no_logits() -> None:
    ids = golden("baseline")["prompt"]
    np.testing.assert_array_equal(run("baseline", ids, taps=lambda name, array: None), run("baseline", ids))


@pytest.mark.parametrize("case", TAPPED)
def test_cached_decode_equals_one_full_pass_for_every_prefix_length(case: str) -> None:
    ids = all_ids(case)
    full = run(case, ids)
    for n in range(1, len(ids)):
        assert error(run(case, ids[: n + 1], chunks=[n, 1]), full[: n + 1]) < 1e-5, f"prefix of {n}"


@pytest.mark.parametrize("chunk", [1, 7, 64, 129])
@pytest.mark.parametrize("case", [*TAPPED, *WINDOWS])
def test_prefill_in_chunks_changes_no_logits(case: str, chunk: int) -> None:
    ids = all_ids(case)
    assert error(run(case, ids, chunks=[chunk] * math.ceil(len(ids) / chunk)), run(case, ids)) < 1e-5


def test_an_empty_cache_may_start_at_a_later_position() -> None:
    prompt, expected = golden("baseline")["prompt"], golden("baseline")["late.logits"]
    start = 1024 - len(prompt)
    assert error(run("baseline", prompt, start=start), expected) < 1e-4
    assert error(run("baseline", prompt, start=start, chunks=[20, 1, 13]), expected) < 1e-4


# The goldens themselves: a second opinion in f64, and proof that each of them can fail.


@pytest.mark.parametrize("case", CASES)
def test_transformers_agrees_with_the_formulas(case: str) -> None:
    g = golden(case)
    found = reference.forward(GOLDENS / case, all_ids(case))
    T = len(g["prompt"])
    assert error(g["logits"], found["logits"][g["rows"]]) < 1e-5
    assert found["logits"][T - 1 : -1].argmax(-1).tolist() == g["greedy"].tolist()
    chosen = np.stack([found[f"blocks.{i}.router.experts"][:T] for i in range(len(g["router.experts"]))])
    np.testing.assert_array_equal(chosen[g["router.gap"] > 1e-4], g["router.experts"][g["router.gap"] > 1e-4])


@pytest.mark.parametrize("case", TAPPED)
def test_transformers_activations_agree_with_the_formulas(case: str) -> None:
    g = golden(case)
    expected = reference.forward(GOLDENS / case, g["prompt"][: len(g["taps.embed"])])
    assert {f"taps.{name}" for name in expected} == {name for name in g if name.startswith("taps.")}
    assert {name for name, values in expected.items() if not error(g[f"taps.{name}"], values) < 1e-5} == set()


def test_transformers_late_positions_agree_with_the_formulas() -> None:
    g = golden("baseline")
    late = reference.forward(GOLDENS / "baseline", g["prompt"], 1024 - len(g["prompt"]))["logits"]
    assert error(g["late.logits"], late) < 1e-5


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_shows_in_the_logits_but_absent_keys(case: str) -> None:
    difference = error(reference.forward(GOLDENS / "baseline", golden(case)["prompt"])["logits"], golden(case)["logits"])
    assert difference < 1e-5 if case == "keys_absent" else difference > 4e-3  # twice what the tests above forgive


def softmax_over_all(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.argsort(-logits, -1)[:, :k]
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return chosen, np.take_along_axis(weights, chosen, -1)


MISTAKES: dict[str, tuple[str, Callable[[Any], Callable]]] = {
    "a window of one key more": ("visible", lambda right: lambda T, window: right(T, window and window + 1)),
    "sliding layers see all": ("visible", lambda right: lambda T, window: right(T, None)),
    "no sink": ("attention_weights", lambda right: lambda scores, sinks: right(scores, np.full_like(sinks, -1e9))),
    "YaRN's bounds truncated": ("frequencies", lambda right: lambda rope, Dh: right(rope | {"truncate": True}, Dh)),
    "YaRN dropped": ("frequencies", lambda right: lambda rope, Dh: right(rope | {"rope_type": "default"}, Dh)),
    "no concentration": ("frequencies", lambda right: lambda rope, Dh: (right(rope, Dh)[0], 1.0)),
    "interleaved pairs": ("rotate", lambda right: lambda x, cos, sin, interleaved: right(x, cos, sin, True)),
    "softmax over all experts": ("route", lambda right: softmax_over_all),
    "gate and up as halves": ("gate_and_up", lambda right: lambda rows: np.split(rows, 2, -1)),
    "gate clamped below": ("activation", lambda right: lambda gate, up, limit: right(np.maximum(gate, -limit), up, limit)),
    "no clamps": ("activation", lambda right: lambda gate, up, limit: right(gate, up, np.inf)),
    "up without its 1": ("activation", lambda right: lambda gate, up, limit: right(gate, np.clip(up, -limit, limit) - 1, np.inf)),
    "scales as factors": ("factors", lambda right: lambda scales: scales.astype(float)),
    "GGUF's order of nibbles": ("codes", lambda right: lambda blocks: np.concatenate([blocks & 15, blocks >> 4], -1)),
}
SHOWN_BY = {"gate clamped below": "swiglu_limit"}  # below the usual -7 the activation is 0 to five digits


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_common_mistake_would_show(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(reference, name, wrong(getattr(reference, name)))
    case = SHOWN_BY.get(mistake, "baseline")
    with np.errstate(all="ignore"):
        difference = error(reference.forward(GOLDENS / case, golden(case)["prompt"])["logits"], golden(case)["logits"])
    assert difference > 4e-3


@pytest.mark.parametrize(("case", "off"), [(case, off) for case in WINDOWS for off in (-1, 1) if (case, off) != ("window_1", -1)])
def test_every_window_off_by_one_would_show(case: str, off: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.visible
    monkeypatch.setattr(reference, "visible", lambda T, window: right(T, window and window + off))
    difference = error(reference.forward(GOLDENS / case, golden(case)["prompt"])["logits"][golden(case)["rows"]], golden(case)["logits"])
    assert difference > 4e-3


# Of gpt-oss-20b: base 150000, 64 dimensions, factor 32 over 4096 positions, beta 32 and 1, not truncated.
PUBLISHED_FREQUENCIES = """
1.000000000e+00 6.890443059e-01 4.747820555e-01 3.271458719e-01 2.254180002e-01 1.553229895e-01 1.070244215e-01 7.374456821e-02
5.081327482e-02 3.170569618e-02 1.933500113e-02 1.159204926e-02 6.794959490e-03 3.860359317e-03 2.093792379e-03 1.052602101e-03
4.564839192e-04 1.293187012e-04 3.830881237e-05 2.639646903e-05 1.818833668e-05 1.253256982e-05 8.635495875e-06 5.950239261e-06
4.099978482e-06 2.825066827e-06 1.946596211e-06 1.341291035e-06 9.242089502e-07 6.368209146e-07 4.387978251e-07 3.023511428e-07
"""
PUBLISHED_ROPE = {"rope_type": "yarn", "rope_theta": 150_000, "factor": 32.0, "original_max_position_embeddings": 4096}
PUBLISHED_ROPE |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


def test_the_frequencies_are_those_of_the_published_model() -> None:
    found, concentration = reference.frequencies(PUBLISHED_ROPE, 64)
    np.testing.assert_allclose(found, np.array(PUBLISHED_FREQUENCIES.split(), float), rtol=1e-6)
    assert concentration == pytest.approx(1.3465735902799727, rel=1e-15)


def test_truncated_bounds_give_other_frequencies() -> None:
    found, _ = reference.frequencies(PUBLISHED_ROPE | {"truncate": True}, 64)
    assert found[9] == pytest.approx(3.162075e-02, rel=1e-6)
    assert not np.allclose(found, np.array(PUBLISHED_FREQUENCIES.split(), float), rtol=1e-3)


def test_dequantising_equals_ml_dtypes_for_every_code_and_scale() -> None:
    scales = np.arange(255, dtype=np.uint8)  # 255 is NaN there
    blocks = np.broadcast_to(np.array([0x10 * (2 * j + 1) + 2 * j for j in range(8)] * 2, np.uint8), (255, 1, 16))
    factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    values = np.tile(np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64), 2)
    found = reference.dequantise(blocks, scales[:, None])
    np.testing.assert_array_equal(found, factors[:, None] * values)
    np.testing.assert_array_equal(np.signbit(found[:, 8]), True)  # -0
