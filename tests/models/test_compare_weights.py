"""Two checkpoints against each other: dialects, dtypes, one bit in one expert; and what is read for it."""

import json
import os
import runpy
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.fp4 import dequantize_reference
from toyllm.models import compare_weights
from toyllm.models.checkpoint import open_checkpoint
from toyllm.models.compare_weights import Pair, Report
from toyllm.models.location import find_model

TESTS = Path(__file__).parents[1]
GOLDENS = Path(__file__).parent / "goldens"
hollow = runpy.run_path(str(TESTS / "hollow.py"))
harmony = runpy.run_path(str(TESTS / "harmony_model.py"))
Arrays = dict[str, np.ndarray]


def compare(a: Path, b: Path) -> Report:
    return compare_weights.compare_checkpoints(find_model(str(a)), find_model(str(b)))


def statuses(report: Report) -> dict[str, str]:
    """The weights that are not the same, by our names."""
    return {pair.weight.key: pair.status for pair in report.pairs if pair.status != "same"}


def only(report: Report) -> Pair:
    """The one pair that differs."""
    (pair,) = (pair for pair in report.pairs if pair.status != "same")
    return pair


def flip(folder: Path, tensor: str, place: tuple[int, ...], bit: int) -> None:
    """Flip one bit of a tensor of bytes."""
    stored = open_checkpoint(find_model(str(folder))).tensors[tensor]
    offset = stored.offset + int(np.ravel_multi_index(place, stored.shape))
    with stored.path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)


def copy(source: Path, target: Path, change: Any = None, **config: Any) -> Path:
    """A checkpoint of one file again, its tensors as `change` makes them and its configuration with other entries."""
    target.mkdir()
    document = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(document))
    arrays = load_file(source / "model.safetensors")
    save_file(change(arrays) if change else arrays, target / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GPT-OSS as published: two layers of four experts, in MXFP4."""
    path = tmp_path_factory.mktemp("compare") / "gpt_oss"
    harmony["maker"]().write_checkpoint(path)
    return path


GPT2 = GOLDENS / "gpt2" / "baseline"

# one bit


@pytest.mark.parametrize("expert", [0, 3])
@pytest.mark.parametrize("bit", [0, 3, 4, 7])
@pytest.mark.parametrize(("matrix", "row"), [("gate_up", 5), ("down", 63)])
def test_a_flipped_bit_of_a_code_is_found(gpt_oss: Path, tmp_path: Path, matrix: str, row: int, bit: int, expert: int) -> None:
    name = f"model.layers.1.mlp.experts.{matrix}_proj"
    shutil.copytree(gpt_oss, tmp_path / "b")
    flip(tmp_path / "b", f"{name}_blocks", (expert, row, 1, 6), bit)
    pair = only(compare(gpt_oss, tmp_path / "b"))
    (stored,) = pair.stored
    assert (stored.name, stored.differing, stored.bits, stored.place) == (f"{name}_blocks", 1, 1, (expert, row, 1, 6))
    weights = [open_checkpoint(find_model(str(folder))) for folder in (gpt_oss, tmp_path / "b")]
    a, b = (dequantize_reference(w.array(f"{name}_blocks"), w.array(f"{name}_scales")) for w in weights)
    place = (expert, row, 32 + 12 + bit // 4)
    assert (pair.weight.key, pair.weight.name, pair.weight.kind) == (f"1.{matrix}.weight", name, "MXFP4")
    assert pair.difference is not None
    if a[place] == b[place]:  # a zero's sign
        assert (pair.status, pair.experts, pair.difference.differing) == ("bits", (expert,), 0)
    else:
        assert (pair.status, pair.experts, pair.difference.differing) == ("values", (expert,), 1)
        assert (pair.difference.place, pair.difference.a, pair.difference.b) == (place, a[place], b[place])


def test_a_flipped_bit_of_a_scale_changes_its_block(gpt_oss: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt_oss, tmp_path / "b")
    flip(tmp_path / "b", "model.layers.0.mlp.experts.down_proj_scales", (2, 7, 1), 0)
    pair = only(compare(gpt_oss, tmp_path / "b"))
    assert pair.stored[0].place == (2, 7, 1)
    assert pair.experts == (2,)
    assert pair.difference is not None
    assert 16 < pair.difference.differing <= 32
    assert pair.difference.place is not None
    assert pair.difference.place[:2] == (2, 7)
    assert 32 <= pair.difference.place[2] < 64


def test_one_bit_in_a_file_of_the_published_shapes(tmp_path: Path) -> None:
    """One layer and eight experts of gpt-oss-20b, in holes; and memory stays at what a few pieces take."""
    for name in "ab":
        hollow["write"](tmp_path / name, hollow["GPT_OSS"] | {"num_local_experts": 8}, hollow["gpt_oss"](E=8))
    flip(tmp_path / "b", "model.layers.0.mlp.experts.down_proj_blocks", (6, 2879, 89, 15), 6)
    compare(tmp_path / "a", tmp_path / "a")  # what is imported on the way is no memory of the comparison's
    tracemalloc.start()
    try:
        pair = only(compare(tmp_path / "a", tmp_path / "b"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (pair.stored[0].place, pair.stored[0].bits) == ((6, 2879, 89, 15), 1)
    assert (pair.difference and pair.difference.place, pair.experts) == ((6, 2879, 2879), (6,))
    assert peak < 16 * 2**20
    assert pair.weight.values.size * 4 > 10 * peak, "or the decoded tensor would have fitted"


def test_equal_tensors_are_read_once_and_never_as_values(gpt_oss: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(gpt_oss, tmp_path / "b")
    monkeypatch.setattr(compare_weights, "compare_values", None)
    calls: list[tuple[int, int]] = []
    report = compare_weights.compare_checkpoints(
        find_model(str(gpt_oss)), find_model(str(tmp_path / "b")), lambda *done: calls.append(done)
    )
    assert statuses(report) == {}
    assert report.agrees(0, 0)
    size = sum(t.nbytes for t in open_checkpoint(find_model(str(gpt_oss))).tensors.values())
    assert calls[-1] == (2 * size, 2 * size)
    assert calls == sorted(calls)
    assert report.nbytes == 2 * size


def test_every_expert_that_differs_is_named(gpt_oss: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt_oss, tmp_path / "b")
    for expert in (3, 1):
        flip(tmp_path / "b", "model.layers.0.mlp.experts.gate_up_proj_scales", (expert, 0, 0), 1)
    assert only(compare(gpt_oss, tmp_path / "b")).experts == (1, 3)


def test_the_expert_of_a_bias(gpt_oss: Path, tmp_path: Path) -> None:
    def change(arrays: Arrays) -> Arrays:
        arrays["model.layers.0.mlp.experts.down_proj_bias"][2, 5] += 1
        return arrays

    pair = only(compare(gpt_oss, copy(gpt_oss, tmp_path / "b", change)))
    assert (pair.experts, pair.difference and pair.difference.place) == ((2,), (2, 5))


# dialects


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("gpt_oss/sharded", "gpt_oss/original_sharded"),
        ("gpt_oss/original_sharded", "gpt_oss/sharded"),
    ],
)
def test_dialects_are_names_alone(a: str, b: str) -> None:
    """Other names, q, k and v in one tensor, other shards."""
    report = compare(GOLDENS / a, GOLDENS / b)
    assert statuses(report) == {}
    assert report.agrees(0, 0)
    names = {pair.weight.key: (pair.a and pair.a.name, pair.b and pair.b.name) for pair in report.pairs}
    fused = {"block.1.attn.qkv.weight[64:96]", "block.1.attn.qkv.bias[64:96]"}
    assert fused & {name for pair in names.values() for name in pair} == fused
    assert len(names) == len(report.pairs) == 3 + 2 * 17


def test_prefixes_and_buffers_are_no_difference(tmp_path: Path) -> None:
    def bare(arrays: Arrays) -> Arrays:
        mask = np.tril(np.ones((1, 1, 8, 8), np.float32))
        return {name.removeprefix("transformer."): array for name, array in arrays.items()} | {"h.0.attn.bias": mask}

    report = compare(GPT2, copy(GPT2, tmp_path / "b", bare))
    assert statuses(report) == {}
    assert {(pair.a and pair.a.name, pair.b and pair.b.name) for pair in report.pairs} > {("transformer.wte.weight", "wte.weight")}


def test_a_tied_head_that_one_of_them_stores(tmp_path: Path) -> None:
    def stored(arrays: Arrays) -> Arrays:
        return arrays | {"lm_head.weight": arrays["transformer.wte.weight"].copy()}

    def other(arrays: Arrays) -> Arrays:
        return arrays | {"lm_head.weight": 2 * arrays["transformer.wte.weight"]}

    for sides in ((GPT2, copy(GPT2, tmp_path / "b", stored)), (tmp_path / "b", GPT2)):
        assert compare(*sides).agrees(0, 0)
    assert statuses(compare(GPT2, copy(GPT2, tmp_path / "c", other))) == {"head": "values"}


def dequantised(arrays: Arrays) -> Arrays:
    """Experts as matrices [in, out] in bf16, which holds every value of theirs."""
    found = {name: array for name, array in arrays.items() if not name.endswith(("_blocks", "_scales"))}
    for name in (name.removesuffix("_blocks") for name in arrays if name.endswith("_blocks")):
        values = dequantize_reference(arrays[f"{name}_blocks"], arrays[f"{name}_scales"])
        found[name] = np.ascontiguousarray(values.swapaxes(1, 2)).astype(ml_dtypes.bfloat16)
    return found


@pytest.mark.parametrize("swap", [False, True])
def test_experts_in_mxfp4_and_as_matrices(gpt_oss: Path, tmp_path: Path, swap: bool) -> None:
    sides = (gpt_oss, copy(gpt_oss, tmp_path / "b", dequantised))
    report = compare(*sides[:: -1 if swap else 1])
    assert set(statuses(report).values()) == {"dtype"}
    assert len(statuses(report)) == 4
    assert report.agrees(0, 0)


def test_a_value_of_an_expert_in_mxfp4_and_in_a_matrix(gpt_oss: Path, tmp_path: Path) -> None:
    """The place is that of MXFP4's layout, expert, row and column, though the matrix is stored the other way round."""

    def change(arrays: Arrays) -> Arrays:
        arrays = dequantised(arrays)
        arrays["model.layers.1.mlp.experts.gate_up_proj"][3, 20, 77] += 4
        return arrays

    report = compare(copy(gpt_oss, tmp_path / "b", change), gpt_oss)
    pair = next(pair for pair in report.pairs if pair.status == "values")
    assert pair.difference is not None
    assert (pair.difference.place, pair.difference.differing, pair.experts) == ((3, 77, 20), 1, (3,))
    assert pair.difference.max == pytest.approx(4, abs=0.02)


def test_experts_that_are_matrices_in_both_have_their_own_places(gpt_oss: Path, tmp_path: Path) -> None:
    def change(arrays: Arrays) -> Arrays:
        arrays["model.layers.1.mlp.experts.gate_up_proj"][3, 20, 77] += 4
        return arrays

    a = copy(gpt_oss, tmp_path / "a", dequantised)
    pair = only(compare(a, copy(a, tmp_path / "b", change)))
    assert (pair.difference and pair.difference.place, pair.experts) == ((3, 20, 77), (3,))


# dtypes


def cast(dtype: Any) -> Any:
    return lambda arrays: {name: array.astype(dtype) for name, array in arrays.items()}


@pytest.mark.parametrize("short", [ml_dtypes.bfloat16, np.float16])
def test_a_wider_dtype_alone_is_one_model(tmp_path: Path, short: Any) -> None:
    a = copy(GPT2, tmp_path / "a", cast(short))
    report = compare(a, copy(a, tmp_path / "b", cast(np.float32)))
    assert set(statuses(report).values()) == {"dtype"}
    assert report.agrees(0, 0)


@pytest.mark.parametrize("short", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("swap", [False, True])
def test_rounding_to_a_dtype_is_told_from_other_values(tmp_path: Path, short: Any, swap: bool) -> None:
    sides = (GPT2, copy(GPT2, tmp_path / "b", cast(short)))
    report = compare(*sides[:: -1 if swap else 1])
    assert set(statuses(report).values()) == {"rounded"}
    assert {pair.rounded for pair in report.pairs} == {"a" if swap else "b"}
    assert not report.agrees(0, 0)
    assert report.agrees(2**-8, 0)

    def change(arrays: Arrays) -> Arrays:
        arrays = cast(short)(arrays)
        arrays["transformer.wpe.weight"][1, 2] *= 1 + 2**-7
        return arrays

    other = compare(*(GPT2, copy(GPT2, tmp_path / "c", change))[:: -1 if swap else 1])
    assert {key for key, status in statuses(other).items() if status == "values"} == {"position"}


def test_a_dtype_whose_values_are_not_read_is_compared_by_its_bytes(tmp_path: Path) -> None:
    for name, tail in (("a", b"\1\2\3\4"), ("b", b"\1\2\7\4")):
        (tmp_path / name).mkdir()
        header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
        (tmp_path / name / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + tail)
    pair = only(compare(tmp_path / "a", tmp_path / "b"))
    assert (pair.status, pair.difference, pair.stored[0].differing, pair.stored[0].place) == ("bytes", None, 1, None)
    assert pair.departs(1, 1)
    assert compare(tmp_path / "a", tmp_path / "a").agrees(0, 0)


def test_other_bits_for_the_same_value(tmp_path: Path) -> None:
    for name, zero in (("a", 0.0), ("b", -0.0)):
        (tmp_path / name).mkdir()
        save_file({"x": np.array([zero, 1], np.float32)}, tmp_path / name / "model.safetensors")
    pair = only(compare(tmp_path / "a", tmp_path / "b"))
    assert (pair.status, pair.stored[0].bits) == ("bits", 1)
    assert pair.departs(0, 0), "a checkpoint with a flipped bit is not the same"
    assert not pair.departs(0, 1e-30)


# what is not in both, and what is no tensor


def test_weights_that_one_of_them_has_and_shapes(tmp_path: Path) -> None:
    def cut(arrays: Arrays) -> Arrays:
        kept = {name: array for name, array in arrays.items() if ".h.2." not in name}
        return kept | {"transformer.wpe.weight": arrays["transformer.wpe.weight"][:50], "extra": np.ones(3, np.float32)}

    report = compare(GPT2, copy(GPT2, tmp_path / "b", cut, n_layer=2, n_positions=50))
    found = statuses(report)
    assert {found.pop("position"), found.pop("extra")} == {"shape", "only b"}
    assert set(found.values()) == {"only a"}
    assert len(found) == 12
    assert all(key.startswith("2.") for key in found)
    assert report.settings == (("n_positions", 64, 50), ("n_layer", 3, 2))
    assert not report.agrees(1e9, 1e9)
    keys = [pair.weight.key for pair in report.pairs]
    assert keys[:4] == ["embed", "position", "0.norm_1.weight", "0.norm_1.bias"]
    assert keys[-3:] == ["norm_f.bias", "norm_f.weight", "extra"]


def test_a_setting_that_makes_another_model(tmp_path: Path) -> None:
    report = compare(GPT2, copy(GPT2, tmp_path / "b", layer_norm_epsilon=1e-6, eos_token_id=3))
    assert [(key, b) for key, _, b in report.settings] == [("layer_norm_epsilon", 1e-6), ("eos_token_id", (3,))]
    assert not report.agrees(0, 0)
    assert compare(GPT2, copy(GPT2, tmp_path / "c", eos_token_id=3)).agrees(0, 0), "ids that end a text make no other model"


def test_without_a_config_the_other_one_s_counts(gpt_oss: Path, tmp_path: Path) -> None:
    shutil.copy(GOLDENS / "gpt_oss" / "original" / "model.safetensors", tmp_path)
    assert statuses(compare(tmp_path, GOLDENS / "gpt_oss" / "original")) == {}
    (tmp_path / "x").mkdir()
    shutil.copy(gpt_oss / "model.safetensors", tmp_path / "x")
    report = compare(tmp_path / "x", tmp_path / "x")
    assert statuses(report) == {}
    assert "model.layers.0.mlp.experts.down_proj" in {pair.weight.key for pair in report.pairs}, "named as in the file"


def test_two_architectures_are_refused() -> None:
    with pytest.raises(ToyllmError, match="tales-gpt2 is a gpt2, tales-gpt-oss a gpt_oss"):
        compare(Path("tales-gpt2"), Path("tales-gpt-oss"))


def test_a_file_that_shrinks_meanwhile_is_one_line(gpt_oss: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(gpt_oss, tmp_path / "b")
    opened = compare_weights.open_sides

    def open_and_cut(*files: Any) -> Any:
        sides = opened(*files)
        os.truncate(tmp_path / "b" / "model.safetensors", 20_000)
        return sides

    monkeypatch.setattr(compare_weights, "open_sides", open_and_cut)
    with pytest.raises(ToyllmError, match="changed while open: it ends within tensor"):
        compare(gpt_oss, tmp_path / "b")
