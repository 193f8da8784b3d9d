"""The maker of GGUF files: every number of the checkpoint, in llama.cpp's names, layouts and dtypes."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from toyllm.kernels.dtypes import BF16, widen
from toyllm.kernels.fp4 import CODES, dequantize_reference
from toyllm.models.checkpoint import Checkpoint, open_checkpoint
from toyllm.models.location import find_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # as when it is run as a script
        yield importlib.import_module("make_gguf")


def values(kind: str, data: np.ndarray) -> np.ndarray:
    """What a tensor's bytes say; MXFP4 is a scale, then element i in the low nibble of byte i and i + 16 in the high one."""
    if kind == "MXFP4":
        block = data.reshape(*data.shape[:-1], -1, 17)
        codes = np.concatenate((block[..., 1:] & 15, block[..., 1:] >> 4), -1)
        return (CODES[codes] * np.exp2(block[..., :1].astype(np.float32) - 127)).reshape(*data.shape[:-1], -1)
    return {"F32": lambda: data, "BF16": lambda: widen(data.view(BF16))}[kind]()


def test_repacked_blocks_hold_the_same_values(maker: ModuleType) -> None:
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (2, 5, 3, 16), np.uint8), rng.integers(100, 140, (2, 5, 3), np.uint8)
    packed = maker.repack(blocks, scales)
    assert packed.shape == (2, 5, 3 * 17)
    assert np.array_equal(values("MXFP4", packed), dequantize_reference(blocks, scales))
    quants = pytest.importorskip("gguf.quants")
    assert np.array_equal(quants.MXFP4.dequantize(packed), dequantize_reference(blocks, scales))


def read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, np.ndarray]]]:
    """Metadata, and each tensor's format and values, as the gguf package reads a file."""
    reader = pytest.importorskip("gguf").GGUFReader(path)
    tensors = {t.name: (t.tensor_type.name, values(t.tensor_type.name, np.asarray(t.data))) for t in reader.tensors}
    return {name: found.contents() for name, found in reader.fields.items()}, tensors


def stored(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return widen(checkpoint.array(name))


def test_gpt2(maker: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    gpt2 = importlib.import_module("make_gpt2")
    D, V, L = 32, 50, 2
    shapes = {name: tuple(V if n == gpt2.V else n for n in shape) for name, shape in gpt2.shapes_of(L, D).items()}
    gpt2.write_weights(tmp_path / "model.safetensors", shapes, "bf16")
    (tmp_path / "config.json").write_text(json.dumps(gpt2.config_of("124M", L) | {"n_embd": D, "n_head": 4, "vocab_size": V}))
    maker.write_gguf(tmp_path, tmp_path / "model.gguf")
    checkpoint = open_checkpoint(find_model(str(tmp_path)))
    fields, tensors = read(tmp_path / "model.gguf")
    assert (fields["general.architecture"], fields["tokenizer.ggml.model"], fields["gpt2.vocab_size"]) == ("gpt2", "none", V)
    assert (fields["gpt2.block_count"], fields["gpt2.attention.head_count"], fields["gpt2.feed_forward_length"]) == (L, 4, 4 * D)

    expected = {"token_embd.weight": ("BF16", stored(checkpoint, "wte.weight"))}
    expected["position_embd.weight"] = ("F32", stored(checkpoint, "wpe.weight"))
    names = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
    names |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    pairs = [("ln_f", "output_norm"), *((f"h.{i}.{a}", f"blk.{i}.{b}") for i in range(L) for a, b in names.items())]
    for theirs, ours in pairs:
        weight = stored(checkpoint, f"{theirs}.weight")
        expected[f"{ours}.weight"] = ("BF16", weight.T) if weight.ndim == 2 else ("F32", weight)
        expected[f"{ours}.bias"] = ("F32", stored(checkpoint, f"{theirs}.bias"))
    check(tensors, expected)


def test_gpt_oss(maker: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    L = 2
    checkpoint = small_gpt_oss(tmp_path, L, truncate=True)
    maker.write_gguf(tmp_path, tmp_path / "model.gguf")
    fields, tensors = read(tmp_path / "model.gguf")
    assert fields["general.architecture"] == "gpt-oss"
    found = {name.removeprefix("gpt-oss."): value for name, value in fields.items() if name.startswith("gpt-oss.")}
    assert {name: found[name] for name in ("expert_count", "expert_used_count", "attention.sliding_window", "rope.scaling.type")} == {
        "expert_count": 4,
        "expert_used_count": 2,
        "attention.sliding_window": 16,
        "rope.scaling.type": "yarn",
    }
    assert (found["rope.freq_base"], found["rope.scaling.factor"], found["rope.scaling.original_context_length"]) == (150_000, 32, 4096)
    assert (found["attention.key_length"], found["attention.head_count"], found["attention.head_count_kv"]) == (16, 4, 2)

    names = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    expected = {f"{b}.weight": ("F32" if "norm" in b else "BF16", stored(checkpoint, f"{a}.weight")) for a, b in names.items()}
    for i in range(L):
        at, to = f"model.layers.{i}", f"blk.{i}"
        for theirs, ours in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "post_attention_norm")):
            expected[f"{to}.{ours}.weight"] = ("F32", stored(checkpoint, f"{at}.{theirs}.weight"))
        expected[f"{to}.attn_sinks.weight"] = ("F32", stored(checkpoint, f"{at}.self_attn.sinks"))
        linear = {f"self_attn.{p}_proj": f"attn_{'output' if p == 'o' else p}" for p in "qkvo"} | {"mlp.router": "ffn_gate_inp"}
        for theirs, ours in linear.items():
            kind = "F32" if ours == "ffn_gate_inp" else "BF16"
            expected[f"{to}.{ours}.weight"] = (kind, stored(checkpoint, f"{at}.{theirs}.weight"))
            expected[f"{to}.{ours}.bias"] = ("F32", stored(checkpoint, f"{at}.{theirs}.bias"))
        for theirs, ours, rows in (
            ("gate_up", "gate", slice(0, None, 2)),
            ("gate_up", "up", slice(1, None, 2)),
            ("down", "down", slice(None)),
        ):
            stem = f"{at}.mlp.experts.{theirs}_proj"
            blocks, scales = checkpoint.array(f"{stem}_blocks"), checkpoint.array(f"{stem}_scales")
            expected[f"{to}.ffn_{ours}_exps.weight"] = ("MXFP4", dequantize_reference(blocks, scales)[:, rows])
            expected[f"{to}.ffn_{ours}_exps.bias"] = ("F32", stored(checkpoint, f"{stem}_bias")[:, rows])
    check(tensors, expected)


def small_gpt_oss(folder: Path, L: int, truncate: bool) -> Checkpoint:
    """A checkpoint of L small layers in `folder`."""
    importlib.import_module("make_harmony").write_checkpoint(folder, L)
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"]["truncate"] = truncate
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(find_model(str(folder)))


def check(found: dict[str, tuple[str, np.ndarray]], expected: dict[str, tuple[str, np.ndarray]]) -> None:
    assert found.keys() == expected.keys()
    for name, (kind, array) in expected.items():
        assert found[name][0] == kind, name
        assert np.array_equal(found[name][1], array), name


def test_a_model_that_llama_cpp_computes_otherwise_is_refused(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    small_gpt_oss(tmp_path, 1, truncate=False)
    monkeypatch.setattr(sys, "argv", ["make_gguf.py", str(tmp_path), str(tmp_path / "model.gguf")])
    with pytest.raises(SystemExit, match='set "truncate": true'):
        maker.main()
    assert not (tmp_path / "model.gguf").exists()


def test_a_file_is_never_overwritten(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"mine")
    monkeypatch.setattr(sys, "argv", ["make_gguf.py", str(tmp_path), str(mine)])
    with pytest.raises(SystemExit, match="exists; name another file"):
        maker.main()
    assert mine.read_bytes() == b"mine"
