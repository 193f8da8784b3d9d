"""Examining checkpoints: every kind of damage is found and named, all at once, and a sound file is left in peace."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from toyllm.kernels.errors import ToyllmError
from toyllm.models import check as checking
from toyllm.models.check import check
from toyllm.models.check_values import Finding
from toyllm.models.location import find_model

hollow = runpy.run_path(str(Path(__file__).parents[1] / "hollow.py"))
GPT2, GPT_OSS, poke = hollow["GPT2"], hollow["GPT_OSS"], hollow["poke"]
BITS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0001),
    "F32": ("<u4", 0x7F80_0000, 0x7F80_0001),
    "F16": ("<u2", 0x7C00, 0x7C01),
    "BF16": ("<u2", 0x7F80, 0x7F81),
}


def errors(folder: Path) -> list[Finding]:
    """Everything found but the matrices of zeros that hollow checkpoints consist of."""
    return [finding for finding in check(find_model(str(folder))).findings if finding.kind != "zero"]


def write_random(folder: Path, dtype: str = "F32") -> dict[str, int]:
    """A sound GPT-2."""
    tensors = hollow["gpt2"](dtype=dtype)
    offsets = hollow["write"](folder, GPT2, tensors)
    rng = np.random.default_rng(0)
    for name, (_, shape) in tensors.items():
        values = rng.standard_normal(shape).astype(np.float32)
        data = values.view("<u4") >> 16 if dtype == "BF16" else values
        numpy_dtype = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}[dtype]
        poke(folder / "model.safetensors", offsets[name], data.astype(numpy_dtype).tobytes())
    return offsets


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_sound_checkpoint_holds_and_every_byte_was_read(tmp_path: Path, dtype: str) -> None:
    write_random(tmp_path, dtype)
    calls: list[tuple[int, int]] = []
    report = check(find_model(str(tmp_path)), lambda done, total: calls.append((done, total)))
    assert report.holds
    assert report.findings == ()
    nbytes = sum(hollow["nbytes"](*tensor) for tensor in hollow["gpt2"](dtype=dtype).values())
    assert (report.tensors, report.nbytes, calls[-1]) == (28, nbytes, (nbytes, nbytes))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("negative", [False, True])
def test_nan_and_infinity_are_found_with_their_places(tmp_path: Path, dtype: str, negative: bool) -> None:
    offsets = write_random(tmp_path, dtype)
    kind, infinity, nan = BITS[dtype]
    width, sign = np.dtype(kind).itemsize, negative << (8 * np.dtype(kind).itemsize - 1)
    for name, index, bits in (("wte.weight", 7 * 12 + 5, nan), ("wte.weight", 9 * 12, nan), ("h.1.ln_2.bias", 11, infinity)):
        poke(tmp_path / "model.safetensors", offsets[name] + width * index, (bits | sign).to_bytes(width, "little"))
    found = [f for f in errors(tmp_path) if f.kind != "dtype"]  # f64 is a dtype that nothing runs on
    assert [(f.tensor, f.kind, f.place, f.count) for f in found] == [
        ("wte.weight", "nan", (7, 5), 2),
        ("h.1.ln_2.bias", "inf", (11,), 1),
    ]
    assert found[0].message == "NaN: 2, the first at [7, 5]"


@pytest.mark.parametrize("dtype", BITS)
def test_the_largest_and_the_smallest_finite_values_are_sound(tmp_path: Path, dtype: str) -> None:
    offsets = write_random(tmp_path, dtype)
    kind, infinity, _ = BITS[dtype]
    width = np.dtype(kind).itemsize
    sign = 1 << (8 * width - 1)
    extremes = np.array([infinity - 1, infinity - 1 | sign, 1, sign | 1, sign, 0], kind)
    poke(tmp_path / "model.safetensors", offsets["wpe.weight"], extremes.tobytes())
    assert [f for f in errors(tmp_path) if f.kind != "dtype"] == []


def test_places_are_right_beyond_the_first_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "CHUNK", 64)
    offsets = write_random(tmp_path)
    poke(tmp_path / "model.safetensors", offsets["wte.weight"] + 4 * (31 * 12 + 3), b"\x01\x00\x80\xff")
    assert [f.place for f in errors(tmp_path)] == [(31, 3)]


AT = "model.layers.0.mlp.experts."


def test_one_flipped_bit_in_one_expert_of_a_20b_is_found_and_named(tmp_path: Path) -> None:
    offsets = hollow["write"](tmp_path, GPT_OSS, hollow["gpt_oss"]())
    file = tmp_path / "model.safetensors"
    scale = offsets[AT + "gate_up_proj_scales"] + (1 * 5760 + 2001) * 90 + 7
    bias = offsets[AT + "down_proj_bias"] + 2 * (1 * 2880 + 17)
    poke(file, scale, bytes([127]))
    poke(file, bias, (0x3FC1).to_bytes(2, "little"))
    assert errors(tmp_path) == []
    poke(file, scale, bytes([127 ^ 1 << 7]))
    poke(file, bias, (0x3FC1 ^ 1 << 14).to_bytes(2, "little"))
    found = {f.tensor: f for f in errors(tmp_path)}
    assert found.keys() == {AT + "gate_up_proj_scales", AT + "down_proj_bias"}
    scale_finding, bias_finding = found[AT + "gate_up_proj_scales"], found[AT + "down_proj_bias"]
    assert (scale_finding.kind, scale_finding.place, scale_finding.experts) == ("scale", (1, 2001, 7), (1,))
    assert scale_finding.message.endswith("the first at [1, 2001, 7], in expert 1, row 1000 of up")
    assert (bias_finding.kind, bias_finding.place, bias_finding.experts) == ("nan", (1, 17), (1,))
    assert not check(find_model(str(tmp_path))).holds


def test_scales_that_overflow_with_large_codes_are_warned_of(tmp_path: Path) -> None:
    offsets = hollow["write"](tmp_path, GPT_OSS, hollow["gpt_oss"]())
    poke(tmp_path / "model.safetensors", offsets[AT + "down_proj_scales"], bytes([252, 253, 254]))
    (found,) = errors(tmp_path)
    assert (found.severity, found.kind, found.place, found.count) == ("warning", "scale", (0, 0, 1), 2)


def test_matrices_of_zeros_are_warned_of_also_where_one_expert_is(tmp_path: Path) -> None:
    offsets = hollow["write"](tmp_path, GPT_OSS, hollow["gpt_oss"]())
    poke(tmp_path / "model.safetensors", offsets[AT + "down_proj_blocks"] + 2880 * 90 * 16, b"\x70")
    report = check(find_model(str(tmp_path)))
    assert report.holds
    zero = {f.tensor: (f.message, f.experts) for f in report.findings}
    assert zero[AT + "down_proj_blocks"] == ("all zero in 1 of 2 experts", (0,))
    assert zero[AT + "gate_up_proj_blocks"] == ("all zero", (0, 1))
    assert zero["lm_head.weight"] == ("all zero", ())
    assert not {"model.norm.weight", AT + "down_proj_scales", AT + "down_proj_bias"} & zero.keys()


def test_minus_zero_is_zero(tmp_path: Path) -> None:
    offsets = write_random(tmp_path)
    poke(tmp_path / "model.safetensors", offsets["wpe.weight"], np.full((8, 12), -0.0, "<f4").tobytes())
    assert [(f.kind, f.tensor) for f in check(find_model(str(tmp_path))).findings] == [("zero", "wpe.weight")]


def test_all_that_differs_from_the_architecture_is_reported_at_once(tmp_path: Path) -> None:
    tensors = hollow["gpt2"]()
    del tensors["h.0.ln_1.bias"], tensors["ln_f.weight"]
    tensors["h.1.attn.c_attn.weight"] = ("F32", (36, 12))
    tensors["h.1.mlp.c_fc.bias"] = ("U8", (48,))
    tensors |= {"h.7.ln_1.bias": ("F32", (12,)), "\x1b]52;c;AA\x07": ("F32", ()), "transformer.wpe.weight": ("F32", (8, 12))}
    hollow["write"](tmp_path, GPT2, tensors)
    found = {(f.kind, f.tensor) for f in errors(tmp_path)}
    assert found == {
        ("missing", "h.0.ln_1.bias"),
        ("missing", "ln_f.weight"),
        ("shape", "h.1.attn.c_attn.weight"),
        ("dtype", "h.1.mlp.c_fc.bias"),
        ("extra", "h.7.ln_1.bias"),
        ("extra", "\x1b]52;c;AA\x07"),
        ("twice", "transformer.wpe.weight"),
    }


def test_nan_in_a_buffer_that_is_not_read_is_a_warning(tmp_path: Path) -> None:
    offsets = hollow["write"](tmp_path, GPT2, hollow["gpt2"]() | {"h.0.attn.bias": ("F32", (1, 1, 8, 8))})
    poke(tmp_path / "model.safetensors", offsets["h.0.attn.bias"], b"\xff\xff\xff\xff")
    assert [(f.severity, f.kind, f.place) for f in errors(tmp_path)] == [("warning", "nan", (0, 0, 0, 0))]


def test_without_a_configuration_the_values_are_read_all_the_same(tmp_path: Path) -> None:
    offsets = write_random(tmp_path)
    (tmp_path / "config.json").unlink()
    poke(tmp_path / "model.safetensors", offsets["wpe.weight"], b"\xff\xff\xff\xff")
    assert [f.kind for f in errors(tmp_path)] == ["config", "nan"]


def test_sizes_that_mxfp4_cannot_have_are_a_finding(tmp_path: Path) -> None:
    hollow["write"](tmp_path, GPT_OSS | {"hidden_size": 40, "intermediate_size": 64}, hollow["gpt_oss"](D=64, F=64))
    assert "multiples of 32, found hidden_size 40" in errors(tmp_path)[0].message


def test_a_configuration_of_endless_layers_is_a_finding(tmp_path: Path) -> None:
    for config in (GPT2 | {"n_layer": 2**31 - 1}, GPT_OSS | {"num_hidden_layers": 2**31 - 1}):
        hollow["write"](tmp_path, config, hollow["gpt2"]())
        assert [f.kind for f in errors(tmp_path)] == ["config"]


def write_shards(folder: Path, total_size: int | None = None) -> dict[str, str]:
    """A GPT-2 in two files; gives the index's map."""
    tensors = hollow["gpt2"]()
    halves = {"a.safetensors": list(tensors)[:10], "b.safetensors": list(tensors)[10:]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(GPT2))
    for file, names in halves.items():
        hollow["write_file"](folder / file, {name: tensors[name] for name in names})
    weight_map = {name: file for file, names in halves.items() for name in names}
    nbytes = sum(hollow["nbytes"](*tensor) for tensor in tensors.values())
    write_index(folder, weight_map, nbytes if total_size is None else total_size)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    document = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def test_shards_and_an_index_that_agree_hold(tmp_path: Path) -> None:
    write_shards(tmp_path)
    assert errors(tmp_path) == []


def test_every_disagreement_of_index_and_shards_is_reported(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    weight_map["wte.weight"] = "b.safetensors"
    weight_map["ghost"] = "a.safetensors"
    del weight_map["h.1.ln_2.bias"]
    write_index(tmp_path, weight_map, 1)
    found = [(f.severity, f.kind, f.tensor) for f in errors(tmp_path)]
    assert found == [
        ("error", "index", "wte.weight"),
        ("error", "index", "ghost"),
        ("error", "index", "h.1.ln_2.bias"),
        ("warning", "index", None),
    ]


def test_a_shard_that_is_not_there_and_one_that_is_damaged_are_both_reported(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    poke(tmp_path / "b.safetensors", 0, (2**40).to_bytes(8, "little"))
    found = errors(tmp_path)
    assert [(f.kind, f.path.name) for f in found if f.kind == "file"] == [("file", "a.safetensors"), ("file", "b.safetensors")]
    assert {f.kind for f in found} == {"file", "missing"}


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "x", "a": "x"}}'])
def test_an_index_that_is_none_is_a_finding(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert errors(tmp_path)[0].kind == "index"


def test_a_folder_without_weights_is_no_checkpoint_to_check(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    with pytest.raises(ToyllmError, match=r"neither model\.safetensors nor"):
        check(find_model(str(tmp_path)))
