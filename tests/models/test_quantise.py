"""Dense weights in 8 bits: which are, what the model then computes, what it takes, and what is refused."""

import json
import runpy
import shutil
import tracemalloc
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches NumPy, and so safetensors' NumPy loader, bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import toyllm
from toyllm.kernels.dtypes import widen
from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.q8 import Q8, dequantize_reference, quantize_reference
from toyllm.models import memory, quantise
from toyllm.models.activations import record
from toyllm.models.model import Model
from toyllm.models.params import anatomy
from toyllm.models.parts import split, whole
from toyllm.models.trace import trace

GOLDENS = Path(__file__).parent / "goldens"
hollow = runpy.run_path(str(Path(__file__).parents[1] / "hollow.py"))
GPT2 = ("baseline", "bf16", "f16", "head_untied", "head_equal", "n_inner", "three_dtypes_unaligned", "sharded")
GPT_OSS = ("baseline", "odd", "original", "experts_bf16", "tied", "sharded")
CASES = [f"gpt2/{name}" for name in GPT2] + [f"gpt_oss/{name}" for name in GPT_OSS]
IDS = np.random.default_rng(3).integers(0, 90, 60).tolist()

every = pytest.mark.parametrize("case", CASES)


def load(case: str, weights: str = "q8", **settings: Any) -> Model:
    return toyllm.load(str(GOLDENS / case), weights=weights, **settings)


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    """Every array, and every matrix in 8 bits, by where it is in the weights."""
    if is_dataclass(value):
        return {k: v for f in fields(value) for k, v in leaves(getattr(value, f.name), f"{place}.{f.name}").items()}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {k: v for i, item in enumerate(value) for k, v in leaves(item, f"{place}.{i}").items()}
    return {place.removeprefix("."): value}


def in_8_bits(model: Model) -> dict[str, Q8]:
    return {place: w for place, w in leaves(model.weights).items() if isinstance(w, Q8)}


# Which are


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("gpt2/baseline", {"qkv", "out", "up", "down"}),
        ("gpt_oss/baseline", {"q", "k", "v", "out"}),
        ("gpt_oss/original", {"q", "k", "v", "out"}),
    ],
)
def test_the_matrices_of_products_are_in_8_bits_and_nothing_else(case: str, parts: set[str]) -> None:
    stored, model = load(case, "stored"), load(case)
    L = len(model.weights.blocks)
    assert in_8_bits(model).keys() == {"head"} | {f"blocks.{i}.{part}.weight" for i in range(L) for part in parts}
    before = leaves(stored.weights)
    for place, w in leaves(model.weights).items():
        if not isinstance(w, Q8) and isinstance(w, np.ndarray):
            assert w.dtype == before[place].dtype
            np.testing.assert_array_equal(w, before[place])


def test_dense_experts_are_too_one_by_one() -> None:
    model = load("gpt_oss/experts_bf16")
    c = model.config
    experts = [place for place in in_8_bits(model) if ".experts." in place]
    assert len(experts) == 2 * c.num_hidden_layers * c.num_local_experts
    assert model.weights.blocks[0].experts.gate_up[0].values.shape[0] == 2 * c.intermediate_size


@every
def test_integers_and_scales_are_those_of_the_stored_weights(case: str) -> None:
    stored, model = load(case, "stored"), load(case)
    before = leaves(stored.weights)
    for place, w in in_8_bits(model).items():
        matrix = before[place] if place in before else leaves(stored.weights)[place.rpartition(".")[0]][int(place.rpartition(".")[2])]
        expected = quantize_reference(matrix)
        np.testing.assert_array_equal(w.values, expected.values)
        np.testing.assert_array_equal(widen(w.scales), widen(expected.scales))


@pytest.mark.parametrize("case", ["gpt2/bf16", "gpt_oss/tied"])
def test_a_tied_embedding_is_looked_up_in_the_map(case: str) -> None:
    model = load(case)
    embed = model.weights.embed
    assert not embed.flags.owndata
    np.testing.assert_array_equal(model.weights.head.values, quantize_reference(embed.T).values)
    stored = load(case, "stored")
    np.testing.assert_array_equal(
        record(model, IDS[:5], lambda name: name == "embed")[0]["embed"], record(stored, IDS[:5], bool)[0]["embed"]
    )


# What the model computes


def expanded(case: str, **settings: Any) -> Model:
    """The model with its dense weights as 8 bits round them, but as matrices in f32 by output."""
    model = load(case, "stored", **settings)

    def rounded(_: str, w: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(dequantize_reference(quantize_reference(w)).T).T

    model.weights = quantise.changed(model, rounded)
    return model


@every
def test_logits_are_those_of_the_rounded_weights_bit_for_bit(case: str) -> None:
    np.testing.assert_array_equal(load(case).logits(IDS), expanded(case).logits(IDS))


@pytest.mark.parametrize("backend", ["portable", "numpy"])
@pytest.mark.parametrize("case", ["gpt2/bf16", "gpt_oss/odd", "gpt_oss/experts_bf16"])
def test_every_backend_agrees(case: str, backend: str) -> None:
    expected = load(case).logits(IDS)
    found = load(case, backend=backend).logits(IDS)
    assert np.abs(found - expected).max() < 5e-4 * np.abs(expected).max(), "activations of 16 bits before MXFP4"


@pytest.mark.parametrize("name", ["tales-gpt2", "tales-gpt-oss"])
def test_a_trained_model_hardly_changes(name: str) -> None:
    stored = toyllm.load(name)
    ids = stored.tokenizer.encode("The king's daughter went into the forest, and there she found an old woman who was spinning.")  # type: ignore[union-attr]
    before, after = stored.logits(ids), toyllm.load(name, weights="q8").logits(ids)
    error = np.abs(after - before).max(1) / np.abs(before).max()
    assert 0 < np.median(error) < 2e-2
    assert (after.argmax(1) == before.argmax(1)).mean() > 0.85


@pytest.mark.parametrize("case", ["gpt2/bf16", "gpt_oss/odd", "gpt_oss/experts_bf16"])
def test_a_token_gives_the_same_bits_in_any_pass_and_beside_any_other(case: str) -> None:
    model, expected = load(case), load(case).logits(IDS[:40])
    np.testing.assert_array_equal(load(case, prefill_chunk=7).logits(IDS[:40]), expected)
    cache = model.new_cache(40)
    rows = [model.forward([token], [i], [0], cache)[0] for i, token in enumerate(IDS[:40])]
    np.testing.assert_array_equal(rows, expected)
    cache = model.new_cache(8, sequences=2)
    both = model.forward([*IDS[:8], *IDS[20:24]], [*range(8), *range(4)], [0] * 8 + [1] * 4, cache, all_logits=True)
    np.testing.assert_array_equal(both[:8], expected[:8])


@pytest.mark.parametrize("case", ["gpt2/bf16", "gpt_oss/baseline"])
def test_activations_in_bf16_are_for_what_is_stored(case: str) -> None:
    plain, rounded = load(case), load(case, activations="bf16")
    if rounded.kernels.activations == "f32":
        pytest.skip("this processor gains nothing by them")
    if case.startswith("gpt2"):
        np.testing.assert_array_equal(rounded.logits(IDS), plain.logits(IDS))
    else:
        assert (rounded.logits(IDS) != plain.logits(IDS)).any()  # experts in MXFP4


@pytest.mark.parametrize("case", ["gpt2/bf16", "gpt_oss/baseline", "gpt_oss/experts_bf16"])
def test_every_activation_can_be_watched(case: str) -> None:
    stored, model = load(case, "stored"), load(case)
    before, after = record(stored, IDS[:9], bool)[0], record(model, IDS[:9], bool)[0]
    assert after.keys() == before.keys()
    assert {name: a.shape for name, a in after.items()} == {name: a.shape for name, a in before.items()}
    np.testing.assert_array_equal(after["logits"], model.logits(IDS[:9]))


@pytest.mark.parametrize("case", ["gpt2/bf16", "gpt_oss/odd"])
def test_the_logit_lens_looks_through_the_head_in_8_bits(case: str) -> None:
    model = load(case)
    np.testing.assert_array_equal(trace(model, IDS[:9]).layers[-1].lens.ids[:, 0], model.logits(IDS[:9]).argmax(1))


# What it takes


@every
def test_planned_bytes_are_those_that_are_made(case: str) -> None:
    model = load(case)
    pieces = memory.of_model(model, 8)
    made: dict[str, int] = {}
    for place, w in in_8_bits(model).items():
        part = "head" if place == "head" else f"layer {place.split('.')[1]}"
        made[part] = made.get(part, 0) + w.values.nbytes + w.scales.nbytes
    assert {p.part: p.nbytes for p in pieces if p.kind == "quantised"} == made


@every
def test_the_map_counts_for_what_is_still_read_from_it(case: str) -> None:
    model, stored = load(case), load(case, "stored")
    mapped = memory.total(memory.of_model(model, 8), "weights")
    matrices: list[np.ndarray] = []
    quantise.changed(stored, lambda _, w: matrices.append(w))
    copied = sum(w.nbytes for w in matrices) - (stored.weights.embed.nbytes if same(stored.weights.head.T, stored.weights.embed) else 0)
    assert mapped == memory.total(memory.of_model(stored, 8), "weights") - copied
    assert model.mapped_bytes == mapped


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.ctypes.data == b.ctypes.data


@every
def test_a_token_reads_the_copies_and_its_row_of_the_embedding(case: str) -> None:
    model = load(case)
    a = anatomy(model.files)
    now, before = (memory.per_token(a, whole(a), memory.running(a, 8, "f32", 8, w)) for w in ("q8", "stored"))
    assert (now.flops, now.cache_bytes) == (before.flops, before.cache_bytes)
    E, k = (1, 1) if case.startswith("gpt2") else (model.config.num_local_experts, model.config.num_experts_per_tok)
    copies = sum((w.values.nbytes + w.scales.nbytes) * (k if ".experts." in place else E) // E for place, w in in_8_bits(model).items())
    kept = [e for e in whole(a).entries if e.inputs is None or not e.multiplied]
    row = sum(e.nbytes // e.shape[0] for e in whole(a).entries if e.looked_up and e.multiplied)
    assert now.weight_bytes == pytest.approx(copies + sum(e.read for e in kept) + row, abs=len(in_8_bits(model)))


def test_the_published_model_in_8_bits(tmp_path: Path) -> None:
    """gpt-oss-20b: 1,216,696,320 weights of attention and head, in blocks of 34 bytes."""
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    a = anatomy(toyllm.models.location.ModelFiles("it", tmp_path, None, None, tmp_path / "config.json", None, None, None, None))
    run = memory.running(a, 4096, "bf16", 512, "q8")
    dense = 24 * 2880 * (2 * 4096 + 2 * 512) + 201_088 * 2880
    assert memory.total(memory.plan(a, whole(a), run), "quantised") == dense // 32 * 34
    assert memory.total(memory.plan(a, whole(a), run), "weights") == 13_761_264_768 - 2 * dense
    parts = split(a, [0.5, 0.5])
    assert sum(memory.total(memory.plan(a, part, run), "quantised") for part in parts) == dense // 32 * 34


def test_quantising_takes_little_more_memory_than_it_makes() -> None:
    """NumPy reports its arrays to tracemalloc."""
    model = toyllm.load("tales-gpt2", weights="stored")
    model.kernels = toyllm.load("tales-gpt2", weights="q8").kernels
    tracemalloc.start()
    try:
        quantise.quantise(model, lambda done, total: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    made = sum(w.values.nbytes + w.scales.nbytes for w in in_8_bits(model).values())
    assert made <= peak < 1.05 * made + 2**18


def test_progress_is_told_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    load("gpt2/bf16", progress=lambda done, total: told.append((done, total)))
    assert told == []
    monkeypatch.setattr(quantise, "QUIET", -1)
    load("gpt2/bf16", progress=lambda done, total: told.append((done, total)))
    matrices: list[np.ndarray] = []
    quantise.changed(load("gpt2/bf16", "stored"), lambda _, w: matrices.append(w))
    assert [done for done, _ in told] == np.cumsum([w.nbytes for w in matrices]).tolist()
    assert {total for _, total in told} == {told[-1][0]}


def test_files_are_read_ahead_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(quantise, "quantise", lambda model, progress: order.append("quantise"))
    model = load("gpt2/bf16", preload=lambda shards: order.append(shards[0].name))
    assert order == ["model.safetensors", "quantise"]
    assert model.checkpoint.shards[0].name == "model.safetensors"
    for wrong in ({"threads": 0}, {"backend": "sse"}, {"weights": "q4"}, {"exact": True}):
        with pytest.raises(ToyllmError):
            toyllm.load("tales-gpt2", **({"weights": "q8", "preload": lambda shards: order.append("too early")} | wrong))
    assert "too early" not in order


# What is refused


def test_options_that_are_none_or_contradict(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToyllmError, match="--weights q4: expected stored or q8"):
        load("gpt2/bf16", "q4")
    with pytest.raises(ToyllmError, match="--exact is f32 throughout, --weights q8 is not: drop one of them"):
        load("gpt2/bf16", exact=True)
    a = anatomy(load("gpt2/bf16").files)
    with pytest.raises(ToyllmError, match="--weights q4: expected stored or q8"):
        memory.running(a, 8, "f32", 8, "q4")


def test_copies_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = memory.total(memory.of_model(load("gpt2/bf16"), 1), "quantised")
    for free, fits in ((needed, True), (None, True), (needed - 1, False)):
        monkeypatch.setattr(quantise, "available_memory", lambda free=free: free)
        if fits:
            load("gpt2/bf16")
        else:
            with pytest.raises(ToyllmError, match=r"--weights q8: the dense weights take 0\.00 GB in 8 bits, 0\.00 GB are free; close"):
                load("gpt2/bf16")


@pytest.mark.parametrize(
    ("case", "tensor", "said"),
    [
        ("gpt2/baseline", "transformer.h.1.mlp.c_fc.weight", "h.1.mlp.c_fc.weight"),
        ("gpt2/baseline", "transformer.wte.weight", "wte.weight"),
        ("gpt2/head_untied", "lm_head.weight", "lm_head.weight"),
        ("gpt_oss/baseline", "model.layers.1.self_attn.k_proj.weight", "layers.1.self_attn.k_proj.weight"),
        ("gpt_oss/original", "block.0.attn.qkv.weight", "block.0.attn.qkv.weight"),
        ("gpt_oss/experts_bf16", "model.layers.0.mlp.experts.down_proj", "layers.0.mlp.experts.down_proj"),
    ],
)
def test_weights_that_8_bits_do_not_hold_are_named(tmp_path: Path, case: str, tensor: str, said: str) -> None:
    values = {
        np.nan: "NaN, which 8 bits do not hold; `toyllm check` tells where",
        -np.inf: "infinity, which",
        2.0**24: "a weight of size 1.67772e+07, more",
    }
    shutil.copytree(GOLDENS / case, tmp_path / "model", ignore=shutil.ignore_patterns("original"))
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    for value, what in values.items():
        changed = tensors[tensor].copy()
        changed[..., -1, 3] = value
        save_file(tensors | {tensor: changed}, path)
        with pytest.raises(ToyllmError) as refused:
            toyllm.load(str(tmp_path / "model"), weights="q8")
        message = str(refused.value)
        assert message.startswith(f"--weights q8: {path}: tensor ")
        assert f"{said} has {what}" in message
        assert message.endswith("; leave the weights as stored")
        assert "\n" not in message


def test_an_embedding_that_is_only_looked_up_may_hold_anything(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "gpt2" / "head_untied", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.wte.weight"][5, 5] = np.nan
    save_file(tensors, path)
    assert np.isfinite(toyllm.load(str(tmp_path / "model"), weights="q8").logits([1, 2])).all()
