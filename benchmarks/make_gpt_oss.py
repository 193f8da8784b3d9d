"""Write a random checkpoint with exactly the tensors of gpt-oss-20b or -120b: for timing, where the weights' meaning does not matter.

    python benchmarks/make_gpt_oss.py OUT [--size 20b|120b] [--layers N] [--experts N] [--sparse] [--dialect hf|original]

OUT becomes a folder with config.json and weights in the published names, shapes and dtypes; token ids alone run it, as it has no
tokenizer. `hf` is cut into shards as published: the three files of the 20b have the published sizes to the byte, as has its single
file in the `original` dialect. (Of the 120b the order of the layers in the files is not known; its `original` is one file, not seven.)

Codes are random and scales 2^-9 to 2^-5, other values N(0, 0.02) with 1 added to norms; none is subnormal. The same command
writes the same bytes. Memory stays at a few megabytes whatever the size. `--sparse` writes true headers over holes that take no
disk space and read as zeros.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from make_gpt2 import BLOCK, normal_blocks, write_stream

from toyllm.kernels.dtypes import to_bf16

V, D, F = 201_088, 2880, 2880  # vocabulary, width, inner width of an expert
H, G, DH, K = 64, 8, 64, 4  # query heads, key/value heads, width of a head, experts a token
SIZES = {"20b": (24, 32), "120b": (36, 128)}  # layers, experts
ROWS = (H * DH, G * DH, G * DH)  # of q, k and v, which `original` keeps in one tensor
WIDTHS = {"BF16": 2, "U8": 1}
SHARD_BYTES = 4_800_000_000  # a shard is closed before the tensor that would exceed it
SCALES = (118, 123)  # 2^-9 to 2^-5, as bytes with bias 127

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape


def layer(E: int) -> list[tuple[str, str, tuple[int, ...], tuple[str, ...]]]:
    """A layer's tensors, sorted as they were exported: original name, dtype, shape, and Hugging Face's name or names."""
    return [
        ("attn.norm.scale", "BF16", (D,), ("input_layernorm.weight",)),
        ("attn.out.bias", "BF16", (D,), ("self_attn.o_proj.bias",)),
        ("attn.out.weight", "BF16", (D, H * DH), ("self_attn.o_proj.weight",)),
        ("attn.qkv.bias", "BF16", (sum(ROWS),), tuple(f"self_attn.{part}_proj.bias" for part in "qkv")),
        ("attn.qkv.weight", "BF16", (sum(ROWS), D), tuple(f"self_attn.{part}_proj.weight" for part in "qkv")),
        ("attn.sinks", "BF16", (H,), ("self_attn.sinks",)),
        ("mlp.gate.bias", "BF16", (E,), ("mlp.router.bias",)),
        ("mlp.gate.weight", "BF16", (E, D), ("mlp.router.weight",)),
        ("mlp.mlp1_bias", "BF16", (E, 2 * F), ("mlp.experts.gate_up_proj_bias",)),
        ("mlp.mlp1_weight.blocks", "U8", (E, 2 * F, D // 32, 16), ("mlp.experts.gate_up_proj_blocks",)),
        ("mlp.mlp1_weight.scales", "U8", (E, 2 * F, D // 32), ("mlp.experts.gate_up_proj_scales",)),
        ("mlp.mlp2_bias", "BF16", (E, D), ("mlp.experts.down_proj_bias",)),
        ("mlp.mlp2_weight.blocks", "U8", (E, D, F // 32, 16), ("mlp.experts.down_proj_blocks",)),
        ("mlp.mlp2_weight.scales", "U8", (E, D, F // 32), ("mlp.experts.down_proj_scales",)),
        ("mlp.norm.scale", "BF16", (D,), ("post_attention_layernorm.weight",)),
    ]


def tensors_of(L: int, E: int, dialect: str) -> Tensors:
    """Every tensor in the order in which they were exported: by original name, and so layer 10 after layer 1."""
    tensors: Tensors = {}
    for i in sorted(range(L), key=str):
        for original, dtype, shape, names in layer(E):
            if dialect == "original":
                tensors[f"block.{i}.{original}"] = (dtype, shape)
            else:
                rows = ROWS if len(names) > 1 else shape[:1]
                tensors |= {f"model.layers.{i}.{name}": (dtype, (n, *shape[1:])) for name, n in zip(names, rows, strict=True)}
    embedding, norm, head = (
        ("embedding.weight", "norm.scale", "unembedding.weight")
        if dialect == "original"
        else ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    )
    return tensors | {embedding: ("BF16", (V, D)), norm: ("BF16", (D,)), head: ("BF16", (V, D))}


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes."""
    return WIDTHS[dtype] * math.prod(shape)


def parameters(tensors: Tensors) -> int:
    """How many the model has: a byte of codes holds two, a scale is none."""
    factor = {"blocks": 2, "scales": 0}
    return sum(math.prod(shape) * factor.get(name[-6:], 1) for name, (_, shape) in tensors.items())


def shards_of(tensors: Tensors) -> dict[str, Tensors]:
    """The Hugging Face files: shards numbered from zero, the number after `of` being the last one's."""
    shards, filled = [{}], 0
    for name, (dtype, shape) in tensors.items():
        if filled + nbytes(dtype, shape) > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled += nbytes(dtype, shape)
    return {f"model-{i:05}-of-{len(shards) - 1:05}.safetensors": shard for i, shard in enumerate(shards)}


def stored_order(tensors: Tensors) -> Tensors:
    """As the safetensors library lays a file out: wide dtypes first, then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (-WIDTHS[item[1][0]], item[0])))


def header_of(tensors: Tensors) -> bytes:
    """The safetensors header of a file: its length in 8 bytes, then JSON, padded to a multiple of 8; no metadata, as published."""
    header, end = {}, 0
    for name, (dtype, shape) in stored_order(tensors).items():
        begin, end = end, end + nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(tensors: Tensors) -> int:
    """Bytes of the file that holds these tensors."""
    return len(header_of(tensors)) + sum(nbytes(*tensor) for tensor in tensors.values())


def values_of(name: str, dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Draw a tensor's values as they are stored, flat, some megabytes at a time."""
    if dtype == "BF16":
        yield from map(to_bf16, normal_blocks(math.prod(shape), float("norm" in name), rng))
        return
    low, high = SCALES if name.endswith("scales") else (0, 256)
    left = math.prod(shape)
    while left:
        values = rng.integers(low, high, min(8 * BLOCK, left), np.uint8)
        yield values
        left -= len(values)


def write_file(path: Path, tensors: Tensors, seed: int, sparse: bool) -> None:
    """Write one new safetensors file."""
    header, total = header_of(tensors), file_bytes(tensors)
    rng = np.random.default_rng(seed)
    drawn = (block for name, tensor in stored_order(tensors).items() for block in values_of(name, *tensor, rng))
    write_stream(path, header, () if sparse else drawn, total)
    if sparse:
        os.truncate(path, total)  # grows it by one hole


def config_of(L: int, E: int) -> dict:
    """Hugging Face's config.json as published."""
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = {"architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200_002}
    config |= {"experts_per_token": K, "head_dim": DH, "hidden_act": "silu", "hidden_size": D, "initial_context_length": 4096}
    config |= {"initializer_range": 0.02, "intermediate_size": F}
    config |= {"layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(L)]}
    config |= {"max_position_embeddings": 131_072, "model_type": "gpt_oss", "num_attention_heads": H, "num_experts_per_tok": K}
    config |= {"num_hidden_layers": L, "num_key_value_heads": G, "num_local_experts": E, "output_router_logits": False}
    config |= {"pad_token_id": 199_999, "quantization_config": {"modules_to_not_convert": kept, "quant_method": "mxfp4"}}
    config |= {"rms_norm_eps": 1e-5, "rope_scaling": yarn | {"rope_type": "yarn", "truncate": False}, "rope_theta": 150_000}
    config |= {"router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False}
    return config | {"transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": V}


def original_config_of(L: int, E: int) -> dict:
    """OpenAI's config.json: other keys, and no model_type."""
    config = {"num_hidden_layers": L, "num_experts": E, "experts_per_token": K, "vocab_size": V, "hidden_size": D}
    config |= {"intermediate_size": F, "swiglu_limit": 7.0, "head_dim": DH, "num_attention_heads": H, "num_key_value_heads": G}
    config |= {"sliding_window": 128, "initial_context_length": 4096, "rope_theta": 150_000}
    return config | {"rope_scaling_factor": 32.0, "rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0}


GENERATION = {"bos_token_id": 199_998, "do_sample": True, "eos_token_id": [200_002, 199_999, 200_012], "pad_token_id": 199_999}
GENERATION |= {"transformers_version": "4.55.0.dev0"}


def write_checkpoint(folder: Path, L: int, E: int, dialect: str, sparse: bool) -> tuple[Tensors, dict[str, Tensors]]:
    """Write all files of the folder. Returns the tensors, and those of each weight file."""
    tensors = tensors_of(L, E, dialect)
    files = shards_of(tensors) if dialect == "hf" else {"model.safetensors": tensors}
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, shard) in enumerate(files.items()):
        write_file(folder / name, shard, seed, sparse)
    if dialect == "hf":
        size = sum(nbytes(*tensor) for tensor in tensors.values())
        place = {name: file for file, shard in files.items() for name in shard}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    config = config_of(L, E) if dialect == "hf" else original_config_of(L, E)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tensors, files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--size", choices=SIZES, default="20b")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer, or more, than the published model has")
    parser.add_argument("--experts", type=int, metavar="N", help=f"a layer's experts, {K} or more")
    parser.add_argument("--sparse", action="store_true", help="holes instead of values")
    parser.add_argument("--dialect", choices=("hf", "original"), default="hf", help="Hugging Face's names and shards, or OpenAI's")
    options = parser.parse_args()
    L, E = SIZES[options.size]
    L = L if options.layers is None else options.layers
    E = E if options.experts is None else options.experts
    for name, value, least in (("--layers", L, 1), ("--experts", E, K)):
        if value < least:
            parser.error(f"{name}: expected at least {least}, found {value}")
    try:
        tensors, files = write_checkpoint(options.out, L, E, options.dialect, options.sparse)
    except FileExistsError as error:
        sys.exit(f"error: {error.filename} exists; name another folder")
    size = sum(map(file_bytes, files.values()))
    print(f"{options.out}: {len(tensors)} tensors, {parameters(tensors):,} parameters, {size:,} bytes in {len(files)} files")


if __name__ == "__main__":
    main()
