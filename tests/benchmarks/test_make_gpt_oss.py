"""The maker of GPT-OSS-shaped checkpoints: published tensors, files, sizes to the byte and counts."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import ml_dtypes  # noqa: F401 - teaches NumPy, and so safetensors' NumPy loader, bfloat16
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # as when it is run as a script
        yield importlib.import_module("make_gpt_oss")


def make(maker: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["make_gpt_oss.py", *arguments])
    maker.main()


@pytest.mark.parametrize(
    ("size", "dialect", "count", "tensor_bytes", "parameters"),
    [
        ("20b", "hf", 459, 13_761_264_768, 20_914_757_184),
        ("20b", "original", 363, 13_761_264_768, 20_914_757_184),
        ("120b", "hf", 687, 65_248_815_744, 116_829_156_672),
        ("120b", "original", 543, 65_248_815_744, 116_829_156_672),
    ],
)
def test_tensors_are_those_published(maker: ModuleType, size: str, dialect: str, count: int, tensor_bytes: int, parameters: int) -> None:
    tensors = maker.tensors_of(*maker.SIZES[size], dialect)
    assert len(tensors) == count
    assert sum(maker.nbytes(*tensor) for tensor in tensors.values()) == tensor_bytes
    assert maker.parameters(tensors) == parameters


def test_files_of_the_20b_have_the_published_sizes(maker: ModuleType) -> None:
    shards = maker.shards_of(maker.tensors_of(24, 32, "hf"))
    assert {name: maker.file_bytes(shard) for name, shard in shards.items()} == {
        "model-00000-of-00002.safetensors": 4_792_272_488,
        "model-00001-of-00002.safetensors": 4_798_702_184,
        "model-00002-of-00002.safetensors": 4_170_342_232,
    }
    assert maker.file_bytes(maker.tensors_of(24, 32, "original")) == 13_761_300_984


def test_small_files_of_the_120b_have_the_published_sizes(maker: ModuleType) -> None:
    shards = maker.shards_of(maker.tensors_of(36, 128, "hf"))
    assert list(shards)[-1] == "model-00014-of-00014.safetensors"
    assert len(shards) == 15
    assert len(json.dumps(maker.config_of(36, 128), indent=2) + "\n") == 2089
    assert len(json.dumps(maker.GENERATION, indent=2) + "\n") == 177


def test_a_sparse_layer_has_true_headers(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(maker, monkeypatch, str(tmp_path), "--layers", "1", "--experts", "5", "--sparse")
    assert "22 tensors, " in capsys.readouterr().out
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_local_experts"], config["layer_types"]) == (5, ["sliding_attention"])
    (shard,) = tmp_path.glob("*.safetensors")
    assert set(index["weight_map"].values()) == {shard.name}
    with safe_open(shard, "np") as file:
        assert set(file.keys()) == index["weight_map"].keys()
        assert file.metadata() is None
        shapes = {
            name: file.get_slice(f"model.layers.0.{name}").get_shape() for name in ("mlp.experts.down_proj_blocks", "self_attn.sinks")
        }
    assert shapes == {"mlp.experts.down_proj_blocks": [5, 2880, 90, 16], "self_attn.sinks": [64]}
    assert shard.stat().st_blocks * 512 < 2**20 < index["metadata"]["total_size"]


def test_the_original_dialect_is_one_file_without_a_model_type(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(maker, monkeypatch, str(tmp_path), "--layers", "2", "--experts", "4", "--sparse", "--dialect", "original")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert "model_type" not in config
    assert (config["num_hidden_layers"], config["num_experts"], config["experts_per_token"]) == (2, 4, 4)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.get_slice("block.1.attn.qkv.weight").get_shape() == [5120, 2880]


def test_values_are_sane(maker: ModuleType, tmp_path: Path) -> None:
    rows = {name: (dtype, (2, *shape[1:])) for name, (dtype, shape) in maker.tensors_of(1, 4, "hf").items()}
    blocks, scales = (f"model.layers.0.mlp.experts.down_proj_{part}" for part in ("blocks", "scales"))
    maker.write_file(tmp_path / "rows.safetensors", rows, seed=0, sparse=False)
    found = load_file(tmp_path / "rows.safetensors")
    assert {name: array.shape for name, array in found.items()} == {name: shape for name, (_, shape) in rows.items()}
    assert np.unique(found[scales]).tolist() == [127 - 9, 127 - 8, 127 - 7, 127 - 6, 127 - 5]
    assert np.bincount(found[blocks].ravel(), minlength=256).min() > 0.8 * found[blocks].size / 256
    embedding, norm = (found[f"model.{name}.weight"].astype(np.float32) for name in ("embed_tokens", "norm"))
    assert embedding.std() == pytest.approx(0.02, rel=0.05)
    assert norm.mean() == pytest.approx(1, abs=0.1)
    for name in rows:
        if found[name].dtype != np.uint8:
            assert np.abs(found[name].astype(np.float32)).min() >= 2.0**-14, name


def test_the_same_seed_writes_the_same_bytes(maker: ModuleType, tmp_path: Path) -> None:
    tensors = {"mlp.experts.down_proj_blocks": ("U8", (1, 3, 2, 16)), "norm.weight": ("BF16", (7,))}
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        maker.write_file(tmp_path / name, tensors, seed, sparse=False)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    assert len(a) == maker.file_bytes(tensors) == 8 + int.from_bytes(a[:8], "little") + math.prod((1, 3, 2, 16)) + 14


@pytest.mark.parametrize(("option", "least"), [("--layers", 1), ("--experts", 4)])
def test_too_few_of_anything_is_refused(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, least: int
) -> None:
    with pytest.raises(SystemExit):
        make(maker, monkeypatch, str(tmp_path), option, str(least - 1))
    assert f"{option}: expected at least {least}, found {least - 1}" in capsys.readouterr().err


def test_a_checkpoint_is_never_overwritten(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "model-00000-of-00000.safetensors"
    mine.write_bytes(b"mine")
    with pytest.raises(SystemExit, match="exists; name another folder"):
        make(maker, monkeypatch, str(tmp_path), "--layers", "1", "--sparse")
    assert mine.read_bytes() == b"mine"
