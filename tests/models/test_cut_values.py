"""Cut checkpoints in other dtypes: exact where it is said, rounded to nearest where it is asked for, refused where a value has no place."""

import json
import runpy
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file, save_file

import toyllm
from toyllm.kernels.dtypes import BF16, widen
from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.fp4 import dequantize_reference
from toyllm.models import cut as cutting
from toyllm.models.cut import Wanted, cut, make_plan
from toyllm.models.cut_tensors import encode, scale_bytes
from toyllm.models.location import find_model
from toyllm.models.recipe import mxfp4 as recipe

help_ = runpy.run_path(str(Path(__file__).parent / "cut_help.py"))
at, tensors_of, array, activations, ids_for, holds = (
    help_[name] for name in ["at", "tensors_of", "array", "activations", "ids_for", "holds"]
)

AT = "model.layers.0.mlp.experts."
ML = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


# ---- MXFP4 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
@pytest.mark.parametrize("model", ["tales-gpt-oss", "gpt_oss/sharded", "gpt_oss/original"])
def test_decoded_experts_are_the_values_by_input_and_compute_the_same(tmp_path: Path, model: str, dtype: str) -> None:
    cut(at(model), tmp_path / "hf", Wanted(dialect="hf"))
    cut(at(model), tmp_path / "dense", Wanted(dialect="hf", expert_dtype=dtype))
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = (array(tmp_path / "hf", f"{AT}{name}_{part}") for part in ("blocks", "scales"))
        dense = widen(array(tmp_path / "dense", AT + name))
        np.testing.assert_array_equal(dense, dequantize_reference(blocks, scales).transpose(0, 2, 1))
    assert holds(tmp_path / "dense")
    ids = ids_for(at(model))
    before, after = (activations(folder, ids) for folder in (at(model), tmp_path / "dense"))
    np.testing.assert_array_equal(after["blocks.0.router.experts"], before["blocks.0.router.experts"])
    assert np.abs(after["logits"] - before["logits"]).max() / np.abs(before["logits"]).max() < 1e-5


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_the_embedded_models_blocks_come_back_byte_for_byte(tmp_path: Path, dtype: str) -> None:
    cut("tales-gpt-oss", tmp_path / "dense", Wanted(expert_dtype=dtype))
    cut(str(tmp_path / "dense"), tmp_path / "back", Wanted(expert_dtype="MXFP4"))
    assert tensors_of(tmp_path / "back") == tensors_of("tales-gpt-oss")


@pytest.mark.parametrize("model", ["gpt_oss/sharded", "gpt_oss/original", "gpt_oss/odd"])
def test_any_blocks_come_back_with_the_same_values(tmp_path: Path, model: str) -> None:
    cut(at(model), tmp_path / "before", Wanted(dialect="hf"))
    cut(at(model), tmp_path / "dense", Wanted(expert_dtype="BF16", dialect="hf"))
    cut(str(tmp_path / "dense"), tmp_path / "back", Wanted(expert_dtype="MXFP4"))
    before, back = tensors_of(tmp_path / "before"), tensors_of(tmp_path / "back")
    assert before.keys() == back.keys()
    assert {name for name in before if before[name] != back[name]} <= {name for name in before if name.endswith(("blocks", "scales"))}
    for name in (AT + "gate_up_proj", AT + "down_proj"):
        old, new = (
            dequantize_reference(*(array(f, f"{name}_{part}") for part in ("blocks", "scales")))
            for f in (tmp_path / "before", tmp_path / "back")
        )
        np.testing.assert_array_equal(new.view(np.uint32), old.view(np.uint32))


@given(
    codes=arrays(np.uint8, (3, 2, 16)),
    scales=arrays(np.uint8, (3, 2), elements=st.integers(0, 252)),
)
@settings(max_examples=200, deadline=None)
def test_every_value_of_mxfp4_is_found_again_to_the_sign_of_a_zero(codes: np.ndarray, scales: np.ndarray) -> None:
    values = dequantize_reference(codes, scales)
    again = scale_bytes(values)
    blocks = encode(values, again)
    np.testing.assert_array_equal(dequantize_reference(blocks, again).view(np.uint32), values.view(np.uint32))
    canonical = (np.stack([codes & 7, codes >> 4 & 7]).max(axis=(0, -1)) >= 6) | ((scales == 0) & (codes & 0x77).any(axis=-1))
    np.testing.assert_array_equal(again[canonical], scales[canonical])
    np.testing.assert_array_equal(blocks[canonical], codes[canonical])
    zeros = ~(codes & 0x77).any(axis=-1)
    assert (again[zeros] == 1).all()


@given(arrays(np.float32, (2, 64), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)))
@settings(max_examples=100, deadline=None)
def test_what_the_recipe_rounds_to_mxfp4_is_encoded_as_it_encodes(values: np.ndarray) -> None:
    values = recipe.nearest(np.where(np.abs(values) < 1e-30, 0, values))  # the recipe writes no scale below 2^-126
    blocks, scales = recipe.encode(values)
    np.testing.assert_array_equal(scale_bytes(values), scales)
    np.testing.assert_array_equal(encode(values, scales), blocks)


def dense_model(folder: Path, changes: dict[str, dict[tuple[int, ...], float]]) -> str:
    """The dense form of a golden, with some values changed."""
    cut(at("gpt_oss/sharded"), folder, Wanted(expert_dtype="BF16", merge=True))
    tensors = dict(load_file(folder / "model.safetensors"))
    for name, values in changes.items():
        for index, value in values.items():
            tensors[name][index] = value
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("value", [1.25, -0.875, float("nan"), float("inf"), 3e38, 1e-30])
def test_the_first_value_that_mxfp4_has_not_is_named(tmp_path: Path, value: float) -> None:
    places = {"down_proj": (2, 33, 4), "gate_up_proj": (3, 0, 127)}
    source = dense_model(tmp_path / "in", {f"{AT}{name}": {place: value} for name, place in places.items()})
    with pytest.raises(ToyllmError) as refused:
        cut(source, tmp_path / "out", Wanted(expert_dtype="MXFP4"))
    stored = float(np.float32(ml_dtypes.bfloat16(value)))
    assert str(refused.value) == (
        f"{source}/model.safetensors: tensor '{AT}down_proj': {stored:g} at [2, 33, 4]: MXFP4 has no such value; "
        "these weights can only be rounded to it, which cut does not do: leave out --expert-dtype mxfp4"
    )
    assert not (tmp_path / "out").exists()


def test_values_too_small_beside_the_largest_of_their_block_are_named(tmp_path: Path) -> None:
    source = dense_model(tmp_path / "in", {f"{AT}down_proj": {(2, 33, 4): 2.0**100}})
    column = np.abs(widen(array(source, f"{AT}down_proj"))[2, 32:, 4])
    first = 32 + int(np.flatnonzero((column > 0) & (column < 2.0**97))[0])
    with pytest.raises(ToyllmError, match=rf"at \[2, {first}, 4\]: MXFP4 has no such value beside 1.26765e\+30, the largest of its block"):
        cut(source, tmp_path / "out", Wanted(expert_dtype="MXFP4"))


def test_random_weights_are_not_made_into_mxfp4(tmp_path: Path) -> None:
    with pytest.raises(ToyllmError, match="MXFP4 has no such value; these weights can only be rounded"):
        cut(at("gpt_oss/experts_bf16"), tmp_path / "out", Wanted(expert_dtype="MXFP4"))
    assert not (tmp_path / "out").exists()


def test_sizes_that_are_no_multiples_of_32_are_not_made_into_mxfp4(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    cut(at("gpt_oss/experts_bf16"), folder, Wanted())
    tensors = dict(load_file(folder / "model.safetensors"))
    for name, t in tensors.items():
        if "down_proj" in name and "bias" not in name:
            tensors[name] = np.ascontiguousarray(t[:, :48])
        if "gate_up_proj" in name:
            tensors[name] = np.ascontiguousarray(t[..., :96])
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 48}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ToyllmError, match="--expert-dtype mxfp4: needs sizes that are multiples of 32, found hidden 32, intermediate 48"):
        cut(str(folder), tmp_path / "out", Wanted(expert_dtype="MXFP4"))


@pytest.mark.parametrize("scale", [255, 254])
def test_scales_that_make_no_finite_number_are_not_decoded(tmp_path: Path, scale: int) -> None:
    cut(at("gpt_oss/sharded"), tmp_path / "in", Wanted(merge=True))
    tensors = dict(load_file(tmp_path / "in" / "model.safetensors"))
    tensors[f"{AT}down_proj_scales"][1, 5, 0] = scale
    tensors[f"{AT}down_proj_blocks"][1, 5, 0] = 0x77
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ToyllmError) as refused:
        cut(str(tmp_path / "in"), tmp_path / "out", Wanted(expert_dtype="BF16"))
    assert f"tensor '{AT}down_proj_scales': scale {scale} at [1, 5, 0] makes values that are not finite" in str(refused.value)


def test_decoded_values_beyond_f16_are_named(tmp_path: Path) -> None:
    cut(at("gpt_oss/sharded"), tmp_path / "in", Wanted(merge=True))
    tensors = dict(load_file(tmp_path / "in" / "model.safetensors"))
    tensors[f"{AT}down_proj_scales"][1, 5, 1] = 127 + 14
    tensors[f"{AT}down_proj_blocks"][1, 5, 1] = 0
    tensors[f"{AT}down_proj_blocks"][1, 5, 1, 3] = 0x60  # 4 · 2^14 at 32 + 7
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ToyllmError) as refused:
        cut(str(tmp_path / "in"), tmp_path / "out", Wanted(expert_dtype="F16"))
    assert f"'{AT}down_proj_blocks' decoded: 65536 at [1, 5, 39] is beyond what F16 holds" in str(refused.value)


# ---- floats -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gpt2/baseline", "gpt2/f16", "gpt2/bf16", "gpt2/three_dtypes_unaligned", "gpt_oss/experts_bf16"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_float_is_rounded_as_ml_dtypes_rounds_and_changes_are_counted(tmp_path: Path, case: str, dtype: str) -> None:
    plan = make_plan(find_model(at(case)), Wanted(dtype=dtype))
    rounding = cutting.write(plan, tmp_path / "out")
    changed, largest = 0, 0.0
    for name in tensors_of(at(case)):
        stored = array(at(case), name)
        before = widen(stored)
        after = before.astype(ML[dtype])
        np.testing.assert_array_equal(widen(array(tmp_path / "out", name)), after.astype(np.float32), err_msg=name)
        moved = after.astype(np.float64) != before
        changed += int(moved.sum())
        largest = max(largest, float(np.abs(after[moved].astype(np.float64) / before[moved] - 1).max(initial=0)))
    assert (rounding.changed, rounding.largest) == (changed, largest)
    assert not changed or any(not c["exact"] for c in plan.record["conversions"])
    assert all(t.dtype == dtype for t in plan.tensors)
    assert holds(tmp_path / "out")
    assert np.isfinite(toyllm.load(str(tmp_path / "out")).logits([1, 2])).all()


@pytest.mark.parametrize("model", ["tales-gpt2", "tales-gpt-oss"])
def test_wider_and_back_ends_with_the_same_bytes_and_the_same_logits(tmp_path: Path, model: str) -> None:
    plan = make_plan(find_model(model), Wanted(dtype="F32"))
    assert cutting.write(plan, tmp_path / "wide").values == 0
    ids = ids_for(model)
    np.testing.assert_array_equal(toyllm.load(str(tmp_path / "wide")).logits(ids), toyllm.load(model).logits(ids))
    plan = make_plan(find_model(str(tmp_path / "wide")), Wanted(dtype="BF16"))
    assert cutting.write(plan, tmp_path / "back").changed == 0
    assert tensors_of(tmp_path / "back") == tensors_of(model)


def test_a_value_beyond_the_dtype_is_named_and_infinities_and_nan_pass(tmp_path: Path) -> None:
    cut(at("gpt2/baseline"), tmp_path / "in", Wanted())
    (name,) = [n for n in tensors_of(tmp_path / "in") if n.endswith("h.1.mlp.c_fc.weight")]
    tensors = dict(load_file(tmp_path / "in" / "model.safetensors"))
    tensors[name][0, 0], tensors[name][0, 1], tensors[name][3, 2] = np.inf, np.nan, -65520
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ToyllmError) as refused:
        cut(str(tmp_path / "in"), tmp_path / "f16", Wanted(dtype="F16"))
    assert str(refused.value) == (
        f"{tmp_path}/in/model.safetensors: tensor '{name}': -65520 at [3, 2] is beyond what F16 holds; choose a dtype with a wider range"
    )
    cut(str(tmp_path / "in"), tmp_path / "bf16", Wanted(dtype="BF16"))
    assert array(tmp_path / "bf16", name).dtype == BF16
    kept = widen(array(tmp_path / "bf16", name))
    assert (kept[0, 0], np.isnan(kept[0, 1]), kept[3, 2]) == (np.inf, True, -65536)


def test_q_k_and_v_of_several_dtypes_need_one_to_become_one_tensor(tmp_path: Path) -> None:
    cut(at("gpt_oss/sharded"), tmp_path / "in", Wanted(merge=True))
    tensors = dict(load_file(tmp_path / "in" / "model.safetensors"))
    name = "model.layers.1.self_attn.k_proj.bias"
    tensors[name] = tensors[name].astype(np.float32)
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ToyllmError, match=r"q_proj.bias BF16, .*k_proj.bias F32, .*one dtype is needed .* choose it with --dtype"):
        cut(str(tmp_path / "in"), tmp_path / "out", Wanted(dialect="original"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut(str(tmp_path / "in"), tmp_path / "out", Wanted(dialect="original", dtype="BF16"))
    bias = widen(array(tmp_path / "out", "block.1.attn.qkv.bias"))
    parts = [tensors[f"model.layers.1.self_attn.{p}_proj.bias"].astype(np.float32) for p in "qkv"]
    np.testing.assert_array_equal(bias, np.concatenate(parts))
