"""Checkpoints of any size without weights: true headers over holes, which take no space on the disk and read as zeros."""

import json
import math
import os
from pathlib import Path

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}

GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_positions": 8, "n_embd": 12, "n_layer": 2, "n_head": 4}
# one layer and two experts of gpt-oss-20b, with a small vocabulary
GPT_OSS = {"model_type": "gpt_oss", "vocab_size": 64, "num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
GPT_OSS |= {"quantization_config": {"quant_method": "mxfp4"}}


def gpt2(L: int = 2, D: int = 12, V: int = 50, P: int = 8, dtype: str = "F32") -> Tensors:
    """GPT-2's tensors, as published."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, D), "wpe.weight": (P, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    for i in range(L):
        for name, d_in, d_out in (("attn.c_attn", D, 3 * D), ("attn.c_proj", D, D), ("mlp.c_fc", D, 4 * D), ("mlp.c_proj", 4 * D, D)):
            shapes |= {f"h.{i}.{name}.weight": (d_in, d_out), f"h.{i}.{name}.bias": (d_out,)}
        shapes |= {f"h.{i}.ln_{n}.{part}": (D,) for n in (1, 2) for part in ("weight", "bias")}
    return {name: (dtype, shape) for name, shape in shapes.items()}


def gpt_oss(L: int = 1, E: int = 2, V: int = 64, D: int = 2880, F: int = 2880) -> Tensors:
    """GPT-OSS's tensors, as Hugging Face publishes them, 64 heads and 8 of them for keys and values."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(L):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
        for name, d_out, d_in in (("q", 4096, D), ("k", 512, D), ("v", 512, D), ("o", D, 4096)):
            shapes |= {f"{at}.self_attn.{name}_proj.weight": (d_out, d_in), f"{at}.self_attn.{name}_proj.bias": (d_out,)}
        shapes |= {f"{at}.self_attn.sinks": (64,), f"{at}.mlp.router.weight": (E, D), f"{at}.mlp.router.bias": (E,)}
        for name, rows, columns in (("gate_up", 2 * F, D), ("down", D, F)):
            stem = f"{at}.mlp.experts.{name}_proj_"
            shapes |= {f"{stem}blocks": (E, rows, columns // 32, 16), f"{stem}scales": (E, rows, columns // 32), f"{stem}bias": (E, rows)}
    return {name: ("U8" if name.endswith(("blocks", "scales")) else "BF16", shape) for name, shape in shapes.items()}


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return WIDTHS[dtype] * math.prod(shape)


def write_file(path: Path, tensors: Tensors) -> dict[str, int]:
    """Write a safetensors file of zeros; gives each tensor's offset in it."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + nbytes(dtype, shape))}
        end += nbytes(dtype, shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}


def write(folder: Path, config: dict, tensors: Tensors) -> dict[str, int]:
    """Write config.json and model.safetensors; gives each tensor's offset."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return write_file(folder / "model.safetensors", tensors)


def poke(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
