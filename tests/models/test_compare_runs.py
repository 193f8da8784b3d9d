"""Two runs against each other: mistakes made in a copy of GPT-OSS are found where they were made, and so is a changed bias."""

import functools
import importlib
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models import compare_runs as module
from toyllm.models.activations import record
from toyllm.models.compare_dump import open_dump
from toyllm.models.compare_names import axes, is_activation, order
from toyllm.models.compare_runs import Comparison, compare_runs

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent)
    reference = importlib.import_module("gpt_oss_reference")

GOLDENS = Path(__file__).parent / "goldens"
EMBEDDED = Path(toyllm.__file__).parent / "models" / "embedded"
RTOL = 1e-4


def every(name: str) -> bool:
    return True


def ids(T: int, V: int = 97) -> list[int]:
    return np.random.default_rng(T).integers(0, V, T).tolist()


@functools.cache
def load(name: str, **settings: Any) -> Any:
    return toyllm.load(name, **settings)


def against(folder: Path, tokens: list[int], tmp_path: Path, **changed: np.ndarray) -> Comparison:
    """A model against the reference as it stands, in f64."""
    arrays = {name: np.ascontiguousarray(array) for name, array in reference.forward(folder, np.array(tokens)).items()}
    save_file(arrays | changed, tmp_path / "reference.safetensors")
    return compare_runs(load(str(folder), exact=True), open_dump(tmp_path / "reference.safetensors"), tokens, every)


# mistakes in a copy


def transposed_projection(patch: pytest.MonkeyPatch) -> None:
    read = reference.read_weights

    def wrong(*arguments: Any) -> Any:
        weights = read(*arguments)
        name = "model.layers.1.self_attn.o_proj.weight"
        return weights | {name: weights[name].T}

    patch.setattr(reference, "read_weights", wrong)


def window_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = reference.visible
    patch.setattr(reference, "visible", lambda T, window: right(T, window and window - 1))


def clamp_missing(patch: pytest.MonkeyPatch) -> None:
    right = reference.activation
    patch.setattr(reference, "activation", lambda gate, up, limit: right(gate, up, math.inf))


def keys_not_rotated(patch: pytest.MonkeyPatch) -> None:
    right, calls = reference.rotate, iter(range(1000))
    patch.setattr(reference, "rotate", lambda x, *turn: x if next(calls) % 2 else right(x, *turn))


def sink_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = reference.attention_weights
    patch.setattr(reference, "attention_weights", lambda scores, sinks: right(scores, np.full_like(sinks, -1e30)))


STORIES, LIMITED = EMBEDDED / "tales-gpt-oss", GOLDENS / "gpt_oss" / "swiglu_limit"
MISTAKES = [
    (transposed_projection, STORIES, "blocks.1.attn.out", range(70)),
    (window_off_by_one, STORIES, "blocks.0.attn.scores", range(63, 70)),
    (clamp_missing, LIMITED, "blocks.0.experts.hidden", range(70)),
    (keys_not_rotated, STORIES, "blocks.0.attn.k", range(70)),  # YaRN's factor is forgotten of the first, too
    (sink_forgotten, STORIES, "blocks.0.attn.weights", range(70)),
]


@pytest.mark.parametrize("folder", [STORIES, LIMITED], ids=lambda folder: folder.name)
def test_the_copy_without_a_mistake_agrees(folder: Path, tmp_path: Path) -> None:
    found = against(folder, ids(70), tmp_path)
    assert found.first(1e-5, 0) is None
    assert (found.only_a, found.only_b) == ((), ())


@pytest.mark.parametrize(("mistake", "folder", "name", "tokens"), MISTAKES)
def test_a_mistake_is_located(
    mistake: Callable[[pytest.MonkeyPatch], None],
    folder: Path,
    name: str,
    tokens: range,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mistake(monkeypatch)
    first = against(folder, ids(70), tmp_path).first(RTOL, 0)
    assert first is not None
    assert first.name == name
    assert first.difference is not None
    assert first.difference.place is not None
    assert first.tokens(RTOL, 0) == list(tokens)


def test_the_place_of_a_window_s_mistake_is_the_key_at_its_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window_off_by_one(monkeypatch)
    first = against(STORIES, ids(70), tmp_path).first(RTOL, 0)
    assert first is not None
    assert first.difference is not None
    assert (first.difference.place, first.difference.b, first.difference.max) == ((0, 63, 0), -math.inf, math.inf)
    assert first.difference.unlike == 8 * 7, "a key a head, from the window's length on"


def test_a_key_that_a_later_step_brings_is_not_overlooked(tmp_path: Path) -> None:
    """The first step's tokens do not see those after it; a copy in which they do departs there."""
    T, tokens = 12, ids(12)
    arrays, _ = record(load("tales-gpt-oss"), tokens, every)
    arrays["blocks.1.attn.scores"][2, 3, T - 1] = 0.5
    save_file(arrays, tmp_path / "reference.safetensors")
    run = load("tales-gpt-oss", prefill_chunk=5)
    first = compare_runs(run, open_dump(tmp_path / "reference.safetensors"), tokens, every).first(RTOL, 0)
    assert first is not None
    assert (first.name, first.difference and first.difference.place) == ("blocks.1.attn.scores", (2, 3, T - 1))
    assert first.tokens(RTOL, 0) == [3]


# two models


@pytest.mark.parametrize(
    ("model", "bias", "name"),
    [
        ("tales-gpt2", "h.2.attn.c_proj.bias", "blocks.2.attn.out"),
        ("tales-gpt2", "h.0.ln_1.bias", "blocks.0.norm_1"),
        ("tales-gpt2", "h.5.mlp.c_fc.bias", "blocks.5.mlp.hidden"),
        ("tales-gpt-oss", "model.layers.3.self_attn.v_proj.bias", "blocks.3.attn.v"),
        ("tales-gpt-oss", "model.layers.1.mlp.router.bias", "blocks.1.router.logits"),
    ],
)
def test_a_changed_bias_is_the_first_activation_of_its_layer(model: str, bias: str, name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(EMBEDDED / model, tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    weights[bias][0] += 0.5
    save_file(weights, folder / "model.safetensors")
    found = compare_runs(load(model), toyllm.load(str(folder)), ids(9), every)
    first = found.first(RTOL, 0)
    assert first is not None
    assert first.name == name
    assert {at.difference and at.difference.differing for at in found.activations[: found.activations.index(first)]} == {0}


@pytest.mark.parametrize("model", ["tales-gpt2", "tales-gpt-oss"])
def test_two_backends_agree(model: str) -> None:
    found = compare_runs(load(model, exact=True), load(model, backend="numpy"), ids(80), every)
    assert found.first(1e-5, 0) is None
    assert any(at.difference and at.difference.differing for at in found.activations), "they are two"


@pytest.mark.parametrize("model", ["tales-gpt2", "tales-gpt-oss"])
def test_steps_and_pieces_change_no_figure(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ids(50)
    whole = compare_runs(load(model), load(model, cache_dtype="bf16"), tokens, every)
    monkeypatch.setattr(module, "PIECE", 1000)
    cut = compare_runs(load(model, prefill_chunk=7), load(model, cache_dtype="bf16", prefill_chunk=2), tokens, every)
    for x, y in zip(whole.activations, cut.activations, strict=True):
        assert (x.name, x.a, x.b) == (y.name, y.a, y.b)
        assert x.difference is not None
        assert y.difference is not None
        exact = not x.name.endswith(("attn.scores", "attn.weights"))  # which are computed beside the run, in another order for each step
        if exact:
            assert replace(x.difference, mean=0, cosine=0) == replace(y.difference, mean=0, cosine=0)
        assert x.difference.mean == pytest.approx(y.difference.mean, rel=1e-9 if exact else 1e-3)
        np.testing.assert_allclose(x.by_token, y.by_token, rtol=0, atol=0 if exact else 1e-5)


def test_only_what_is_wanted_is_kept_and_compared() -> None:
    found = compare_runs(load("tales-gpt2"), load("tales-gpt2"), ids(5), lambda name: name.endswith("resid_mid"))
    assert [at.name for at in found.activations] == [f"blocks.{i}.resid_mid" for i in range(6)]
    with pytest.raises(ToyllmError, match="no activation in common: one has none that is wanted"):
        compare_runs(load("tales-gpt2"), load("tales-gpt2"), ids(5), lambda name: False)


def test_models_of_other_sizes_depart_in_shape() -> None:
    found = compare_runs(load(str(GOLDENS / "gpt2" / "baseline")), load(str(GOLDENS / "gpt2" / "bf16")), ids(5, 60), every)
    first = found.first(1e9, 1e9)
    assert first is not None
    assert (first.name, first.a, first.b, first.difference) == ("embed", (5, 24), (5, 27), None)
    assert set(found.only_a) == {name for name in found.only_a if name.startswith("blocks.2.")} != set()


@pytest.mark.parametrize("model", ["tales-gpt2", "tales-gpt-oss"])
def test_the_order_is_that_in_which_models_make_them(model: str) -> None:
    arrays, kinds = record(load(model), ids(5), every)
    assert sorted(kinds, key=order) == list(kinds)
    assert all(map(is_activation, kinds))
    assert {name: len(axes(name)) for name in kinds} == {name: arrays[name].ndim for name in kinds}


# files


def dumped(tmp_path: Path, **changed: Any) -> Any:
    """tales-gpt2's own activations of some ids in a file, some of them others."""
    arrays, _ = record(load("tales-gpt2"), ids(9), every)
    np.savez(tmp_path / "own.npz", **(arrays | changed))
    return open_dump(tmp_path / "own.npz")


def test_either_side_may_be_a_file_and_both(tmp_path: Path) -> None:
    file = dumped(tmp_path, **{"blocks.3.out": 2 * record(load("tales-gpt2"), ids(9), every)[0]["blocks.3.out"][None]})
    for sides in ((load("tales-gpt2"), file), (file, load("tales-gpt2"))):
        found = compare_runs(*sides, ids(9), every)
        assert [at.name for at in found.activations if at.departs(0, 0)] == ["blocks.3.out"]
    np.savez(tmp_path / "batch.npz", **{"blocks.3.out": file.raw("blocks.3.out", None)[0], "blocks.1.attn.q": np.ones((1, 9, 256))})
    found = compare_runs(file, open_dump(tmp_path / "batch.npz"), [], every)
    assert [(at.name, at.a, len(at.tokens(0, 0))) for at in found.activations] == [
        ("blocks.1.attn.q", (9, 4, 64), 9),
        ("blocks.3.out", (9, 256), 0),
    ]
    np.savez(tmp_path / "joined.npz", **{"blocks.1.attn.q": np.ones((9, 256))})
    with pytest.raises(ToyllmError, match=r"joined.npz: blocks.1.attn.q: expected axes \[T, H, Dh\], found shape \[9, 256\]"):
        compare_runs(open_dump(tmp_path / "joined.npz"), file, [], every)


@pytest.mark.parametrize("masked", [-1e4, -65504, -1e9, float(np.finfo(np.float32).min), -math.inf])
def test_a_masked_score_is_minus_infinity(tmp_path: Path, masked: float) -> None:
    scores = record(load("tales-gpt2"), ids(9), every)[0]["blocks.1.attn.scores"]
    file = dumped(tmp_path, **{"blocks.1.attn.scores": np.where(np.isinf(scores), masked, scores)})
    assert compare_runs(load("tales-gpt2"), file, ids(9), every).first(0, 0) is None


def test_experts_are_the_same_or_not(tmp_path: Path) -> None:
    arrays, _ = record(load("tales-gpt-oss"), ids(9), every)
    chosen = arrays["blocks.2.router.experts"].copy()
    chosen[4] = chosen[4, ::-1]
    np.savez(tmp_path / "own.npz", **(arrays | {"blocks.2.router.experts": chosen}))
    found = compare_runs(load("tales-gpt-oss"), open_dump(tmp_path / "own.npz"), ids(9), every)
    first = found.first(1e9, 1e9)
    assert first is not None
    assert (first.name, first.tokens(1e9, 1e9)) == ("blocks.2.router.experts", [4])


def test_other_lengths_are_another_shape(tmp_path: Path) -> None:
    first = compare_runs(load("tales-gpt2"), dumped(tmp_path), ids(12), every).first(1, 1)
    assert first is not None
    assert (first.name, first.a, first.b) == ("embed", (12, 256), (9, 256))


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ToyllmError, match="a prompt of 513 tokens: tales-gpt2 has 512 positions"):
        compare_runs(load("tales-gpt2"), load("tales-gpt2"), ids(513), every)
