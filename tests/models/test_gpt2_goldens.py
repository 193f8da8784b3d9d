"""GPT-2 held against what transformers computed for small random checkpoints (make_gpt2_goldens.py), option by option."""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches NumPy, and so safetensors' NumPy loader, bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file

import toyllm

GOLDENS = Path(__file__).parent / "goldens" / "gpt2"
CASES = sorted(file.stem for file in GOLDENS.glob("*.safetensors"))
OPTIONS = [case for case in CASES if (GOLDENS / case / "model.safetensors").resolve().parent.name == "baseline" != case]


@functools.cache
def golden(case: str) -> dict[str, np.ndarray]:
    return load_file(GOLDENS / f"{case}.safetensors")


TAPPED = [case for case in CASES if "taps.logits" in golden(case)]


@functools.cache
def model(case: str) -> Any:
    return toyllm.load(str(GOLDENS / case))


def error(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b| / max|b|, where -inf must stand in the same places and NaN nowhere."""
    assert a.shape == b.shape
    seen = np.isfinite(b)
    np.testing.assert_array_equal(a[~seen], b[~seen])
    return float(np.abs(a[seen].astype(np.float64) - b[seen]).max() / np.abs(b[seen]).max())


def run(case: str, ids: Sequence[int] | np.ndarray, chunks: Sequence[int] = (), start: int = 0, **settings: Any) -> np.ndarray:
    """Logits [T, V] of `ids` fed into an empty cache from position `start`, in pieces of the lengths in `chunks` (default: whole)."""
    cache, logits, at = model(case).new_cache(), [], 0
    for n in chunks or [len(ids)]:
        tokens = np.asarray(ids[at : at + n])
        positions = np.arange(start + at, start + at + len(tokens))
        logits.append(model(case).forward(tokens, positions, np.zeros_like(tokens), cache, all_logits=True, **settings))
        at += n
    return np.concatenate(logits)


def greedy(case: str, prompt: np.ndarray, count: int) -> list[int]:
    """The likeliest token `count` times: the prompt in one pass, then one token a pass, ties to the lowest id."""
    cache, ids, fed = model(case).new_cache(), [int(i) for i in prompt], 0
    for _ in range(count):
        tokens, positions = np.asarray(ids[fed:]), np.arange(fed, len(ids))
        fed = len(ids)
        ids.append(int(model(case).forward(tokens, positions, np.zeros_like(tokens), cache)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_transformers(case: str) -> None:
    logits = model(case).logits(golden(case)["prompt"].tolist())
    assert logits.dtype == np.float32
    assert error(logits, golden(case)["logits"]) < 1e-4


@pytest.mark.parametrize("backend", ["portable", "numpy"])
@pytest.mark.parametrize("case", TAPPED)
def test_the_plain_backends_agree_with_transformers(case: str, backend: str) -> None:
    plain = toyllm.load(str(GOLDENS / case), backend=backend)
    assert error(plain.logits(golden(case)["prompt"].tolist()), golden(case)["logits"]) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_equal_those_of_transformers(case: str) -> None:
    expected = golden(case)["greedy"].tolist()
    assert greedy(case, golden(case)["prompt"], len(expected)) == expected


@pytest.mark.parametrize("case", TAPPED)
def test_every_activation_agrees_with_transformers(case: str) -> None:
    expected = {name.removeprefix("taps."): values for name, values in golden(case).items() if name.startswith("taps.")}
    found: dict[str, np.ndarray] = {}
    run(case, golden(case)["prompt"][: len(expected["embed"])], taps=lambda name, array: found.update({name: array.copy()}))
    assert found.keys() == expected.keys()
    errors = {name: error(found[name], expected[name]) for name in expected}
    assert {name: e for name, e in errors.items() if not e < 1e-4} == {}


def test_watching_changes_no_logits() -> None:
    ids = golden("baseline")["prompt"]
    np.testing.assert_array_equal(run("baseline", ids, taps=lambda name, array: None), run("baseline", ids))


@pytest.mark.parametrize("case", TAPPED)
def test_cached_decode_equals_one_full_pass_for_every_prefix_length(case: str) -> None:
    ids = np.concatenate([golden(case)["prompt"], golden(case)["greedy"]])
    full = run(case, ids)
    for n in range(1, len(ids)):
        assert error(run(case, ids[: n + 1], chunks=[n, 1]), full[: n + 1]) < 1e-5, f"prefix of {n}"
    assert error(run(case, ids, chunks=[1] * len(ids)), full) < 1e-5


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("case", TAPPED)
def test_prefill_in_chunks_changes_no_logits(case: str, chunk: int) -> None:
    ids = np.concatenate([golden(case)["prompt"], golden(case)["greedy"]])
    np.testing.assert_array_equal(run(case, ids, chunks=[chunk] * math.ceil(len(ids) / chunk)), run(case, ids))


def test_sequences_side_by_side_keep_their_own_logits() -> None:
    prompt = golden("baseline")["prompt"]
    ids = np.stack([prompt[:12], prompt[20:32]])
    sequences, positions = np.tile([0, 1], 12), np.arange(12).repeat(2)
    cache = model("baseline").new_cache(sequences=2)
    mixed = model("baseline").forward(ids.T.ravel(), positions, sequences, cache, all_logits=True)
    np.testing.assert_array_equal(mixed[sequences == 0], run("baseline", ids[0]))
    np.testing.assert_array_equal(mixed[sequences == 1], run("baseline", ids[1]))


def test_an_empty_cache_may_start_at_a_later_position() -> None:
    prompt, expected = golden("baseline")["prompt"], golden("baseline")["late.logits"]
    start = 64 - len(prompt)
    assert error(run("baseline", prompt, start=start), expected) < 1e-4
    assert error(run("baseline", prompt, start=start, chunks=[20, 1, 13]), expected) < 1e-4


# The goldens themselves: a second opinion in f64, and proof that each of them can fail.


def reference(folder: Path, ids: np.ndarray, start: int = 0) -> dict[str, np.ndarray]:
    """GPT-2 in plain NumPy, f64: every activation of `ids` [T] at positions start, start + 1, … under its name."""
    c = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False} | json.loads((folder / "config.json").read_text())
    files = {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}
    w = {name.removeprefix("transformer."): array.astype(np.float64) for name, array in files.items()}
    T, D, H = len(ids), c["n_embd"], c["n_head"]
    a: dict[str, np.ndarray] = {}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["layer_norm_epsilon"]) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        if c["activation_function"] == "gelu":
            return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = a["embed"] = w["wte.weight"][ids] + w["wpe.weight"][start : start + T]
    for i in range(c["n_layer"]):
        scale = (D // H) ** -0.5 if c["scale_attn_weights"] else 1.0
        scale /= i + 1 if c["scale_attn_by_inverse_layer_idx"] else 1
        h, b = f"h.{i}", f"blocks.{i}"
        a[f"{b}.norm_1"] = norm(x, f"{h}.ln_1")
        q, k, v = linear(a[f"{b}.norm_1"], f"{h}.attn.c_attn").reshape(T, 3, H, D // H).transpose(1, 0, 2, 3)
        scores = np.where(np.tri(T, dtype=bool), np.einsum("thd,shd->hts", q, k) * scale, -np.inf)
        e = np.exp(scores - scores.max(-1, keepdims=True))
        weights = e / e.sum(-1, keepdims=True)
        heads = np.einsum("hts,shd->thd", weights, v)
        out = linear(heads.reshape(T, D), f"{h}.attn.c_proj")
        named = {"q": q, "k": k, "v": v, "scores": scores, "weights": weights, "heads": heads, "out": out}
        a |= {f"{b}.attn.{name}": array for name, array in named.items()}
        x = a[f"{b}.resid_mid"] = x + out
        a[f"{b}.norm_2"] = norm(x, f"{h}.ln_2")
        a[f"{b}.mlp.hidden"] = gelu(linear(a[f"{b}.norm_2"], f"{h}.mlp.c_fc"))
        a[f"{b}.mlp.out"] = linear(a[f"{b}.mlp.hidden"], f"{h}.mlp.c_proj")
        x = a[f"{b}.out"] = x + a[f"{b}.mlp.out"]
    a["norm_f"] = norm(x, "ln_f")
    a["logits"] = a["norm_f"] @ w.get("lm_head.weight", w["wte.weight"]).T
    return a


@pytest.mark.parametrize("case", CASES)
def test_transformers_agrees_with_the_formulas(case: str) -> None:
    g = golden(case)
    ids = np.concatenate([g["prompt"], g["greedy"]])
    logits = reference(GOLDENS / case, ids)["logits"]
    assert error(g["logits"], logits[: len(g["prompt"])]) < 1e-5
    assert logits[len(g["prompt"]) - 1 : -1].argmax(-1).tolist() == g["greedy"].tolist()


@pytest.mark.parametrize("case", TAPPED)
def test_transformers_activations_agree_with_the_formulas(case: str) -> None:
    g = golden(case)
    expected = reference(GOLDENS / case, g["prompt"][: len(g["taps.embed"])])
    assert {name for name, values in expected.items() if not error(g[f"taps.{name}"], values) < 1e-5} == set()


def test_transformers_late_positions_agree_with_the_formulas() -> None:
    g = golden("baseline")
    assert error(g["late.logits"], reference(GOLDENS / "baseline", g["prompt"], 64 - len(g["prompt"]))["logits"]) < 1e-5


@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_shows_in_the_logits_but_reordering(case: str) -> None:
    ids = golden(case)["prompt"]
    difference = error(reference(GOLDENS / "baseline", ids)["logits"], golden(case)["logits"])
    assert difference < 1e-5 if case == "reorder_and_upcast_attn" else difference > 2e-4  # twice what the tests above forgive
