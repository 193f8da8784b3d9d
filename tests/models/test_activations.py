"""Activations of a run: those of transformers, whole where the prompt runs in chunks, of any decode step; and nothing made unasked."""

import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches NumPy, and so safetensors' NumPy loader, bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models import gpt2, gpt_oss
from toyllm.models.activations import record

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = {"gpt2": 1e-4, "gpt_oss": 2e-3}


def every(name: str) -> bool:
    return True


def golden(family: str) -> dict[str, np.ndarray]:
    return load_file(GOLDENS / family / "baseline.safetensors")


def load(family: str, **settings: Any) -> Any:
    return toyllm.load(str(GOLDENS / family / "baseline"), **settings)


def error(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b| / max|b|, where -inf must stand in the same places and NaN nowhere."""
    assert a.shape == b.shape
    seen = np.isfinite(b)
    np.testing.assert_array_equal(a[~seen], b[~seen])
    return float(np.abs(a[seen].astype(np.float64) - b[seen]).max() / np.abs(b[seen]).max())


@pytest.mark.parametrize("chunk", [512, 5, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_activation_is_that_of_transformers(family: str, chunk: int) -> None:
    expected = {name.removeprefix("taps."): values for name, values in golden(family).items() if name.startswith("taps.")}
    T = len(expected["embed"])
    assert T % 5, "or the last chunk is no shorter one"
    arrays, kinds = record(load(family, prefill_chunk=chunk), golden(family)["prompt"][:T].tolist(), every)
    assert arrays.keys() == kinds.keys() == expected.keys()
    assert {name: kinds[name] for name in kinds} == {name: (array.dtype, array.shape) for name, array in arrays.items()}
    assert {name: e for name in expected if not (e := error(arrays[name], expected[name])) < FAMILIES[family]} == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_change_no_activation(family: str) -> None:
    ids = golden(family)["prompt"][:23].tolist()
    whole, _ = record(load(family), ids, every)
    parts, _ = record(load(family, prefill_chunk=7), ids, every)
    assert {name for name in whole if not error(parts[name], whole[name]) < 1e-5} == set()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step_is_the_row_of_one_full_pass(family: str) -> None:
    prompt, greedy = golden(family)["prompt"][:20].tolist(), []
    model = load(family)
    for _ in range(3):
        greedy.append(int(model.logits(prompt + greedy)[-1].argmax()))
    full, _ = record(model, prompt + greedy, every)
    for step in (1, 3):
        found, _ = record(model, prompt, every, step)
        rows = slice(19 + step, 20 + step)
        for name, array in found.items():
            by_position = name.endswith(("attn.scores", "attn.weights"))
            assert error(array, full[name][:, rows, : rows.stop] if by_position else full[name][rows]) < 1e-5, name


def test_only_what_is_wanted_is_kept_and_everything_is_known() -> None:
    arrays, kinds = record(load("gpt2"), [1, 2, 3], lambda name: name == "blocks.0.attn.q")
    assert list(arrays) == ["blocks.0.attn.q"]
    model = load("gpt2")
    assert kinds["logits"] == (np.float32, (3, model.vocab_size))
    assert kinds.keys() == record(model, [1], every)[0].keys()


def test_more_tokens_than_positions_are_refused() -> None:
    model = load("gpt2")
    most = model.config.context
    with pytest.raises(ToyllmError, match=rf"a prompt of {most} tokens and 1 decode steps: this model has {most} positions"):
        record(model, [1] * most, every, 1)


@pytest.mark.parametrize(("family", "module"), [("gpt2", gpt2), ("gpt_oss", gpt_oss)])
def test_without_taps_nothing_is_computed_or_allocated_for_them(family: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy reports its arrays to tracemalloc. Scores and weights, and what is inside the experts, are made for those who watch."""
    model, ids = load(family), np.resize(golden(family)["prompt"], 48)

    def peak(taps: Any) -> int:
        cache = model.new_cache(48)
        tracemalloc.start()
        try:
            model.forward(ids, np.arange(48), np.zeros_like(ids), cache, taps=taps)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(None)  # buffers and kernels
    watched, unwatched = peak(lambda name, array: None), peak(None)
    monkeypatch.setattr(module, "tap_scores", None)
    if family == "gpt_oss":
        monkeypatch.setattr(module, "tap_inside", None)
    assert peak(None) == pytest.approx(unwatched, abs=4096)
    scores = model.config.num_attention_heads if family == "gpt_oss" else model.config.n_head
    assert watched - unwatched > scores * 48 * 48 * 4
