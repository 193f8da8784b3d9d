"""The maker of GPT-2-shaped checkpoints: published shapes, names and sizes."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors import safe_open

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_gpt2.py"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_gpt2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("size", "parameters", "tensors", "tensor_bytes"),
    [
        ("124M", 124_439_808, 160, 548_090_880),
        ("355M", 354_823_168, 316, 1_519_955_968),
        ("774M", 774_030_080, 472, 3_247_115_264),
        ("1.5B", 1_557_611_200, 628, 6_431_771_392),
    ],
)
def test_sizes_are_those_published(maker: ModuleType, size: str, parameters: int, tensors: int, tensor_bytes: int) -> None:
    layers, width, _ = maker.SIZES[size]
    shapes = maker.shapes_of(layers, width)
    assert maker.parameters(shapes) == parameters
    assert len(shapes) == tensors
    assert 4 * sum(math.prod(shape) for shape in shapes.values()) == tensor_bytes


def make(maker: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["make_gpt2.py", *arguments])
    maker.main()


def test_one_layer_is_written(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(maker, monkeypatch, str(tmp_path), "--layers", "1", "--dtype", "f16")
    assert f"{50257 * 768 + 1024 * 768 + 12 * 768**2 + 13 * 768 + 2 * 768:,} parameters" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["n_layer"] == 1
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert set(file.keys()) == maker.shapes_of(1, 768).keys()
        weight, mask, norm = (file.get_tensor(f"h.0.{name}") for name in ("mlp.c_fc.weight", "attn.bias", "ln_1.weight"))
    assert (weight.shape, weight.dtype) == ((768, 3072), np.float16)
    assert weight.std() == pytest.approx(0.02, rel=0.02)
    assert np.abs(weight).min() >= np.finfo(np.float16).smallest_normal
    assert norm.mean() == pytest.approx(1, abs=0.01)
    np.testing.assert_array_equal(mask[0, 0], np.tri(1024))


def test_a_checkpoint_is_never_overwritten(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="exists; name another folder"):
        make(maker, monkeypatch, str(tmp_path), "--layers", "1")
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
