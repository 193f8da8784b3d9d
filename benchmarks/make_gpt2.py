"""Write a random checkpoint with the published shapes and tensor names of GPT-2: for timing, where the weights' meaning does not matter.

    python benchmarks/make_gpt2.py OUT [--size 124M|355M|774M|1.5B] [--dtype f32|f16|bf16] [--layers N]

OUT becomes a folder with model.safetensors and config.json; token ids alone run it, as it has no tokenizer. Values are
N(0, 0.02), with 1 added to LayerNorm's weights; none is subnormal in its dtype. The same command writes the same bytes.
Memory stays at a few megabytes whatever the size.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from toyllm.kernels.dtypes import to_bf16, to_f16

V, P = 50257, 1024  # vocabulary, positions
SIZES = {"124M": (12, 768, 12), "355M": (24, 1024, 16), "774M": (36, 1280, 20), "1.5B": (48, 1600, 25)}  # layers, width, heads
EXTRA = {"124M": {}, "1.5B": {"output_past": True}}  # what else the published files say
DTYPES = {"f32": ("F32", 4, None), "f16": ("F16", 2, to_f16), "bf16": ("BF16", 2, to_bf16)}
BLOCK = 1 << 20  # values drawn at a time
SMALLEST = np.float32(2.0**-14)  # half precision's smallest normal number; the other dtypes reach further

Shapes = dict[str, tuple[int, ...]]


def shapes_of(L: int, D: int) -> Shapes:
    """Every tensor of the published file in its order, the causal masks (`attn.bias`) included."""
    shapes: Shapes = {"wte.weight": (V, D), "wpe.weight": (P, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    for i in range(L):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (D,), f"h.{i}.{norm}.bias": (D,)}
        for name, d_in, d_out in (("attn.c_attn", D, 3 * D), ("attn.c_proj", D, D), ("mlp.c_fc", D, 4 * D), ("mlp.c_proj", 4 * D, D)):
            shapes |= {f"h.{i}.{name}.weight": (d_in, d_out), f"h.{i}.{name}.bias": (d_out,)}
        shapes[f"h.{i}.attn.bias"] = (1, 1, P, P)
    return dict(sorted(shapes.items()))


def is_mask(name: str) -> bool:
    """Whether the tensor is a causal mask, not a parameter."""
    return name.endswith(".attn.bias")


def parameters(shapes: Shapes) -> int:
    """How many the model has."""
    return sum(math.prod(shape) for name, shape in shapes.items() if not is_mask(name))


def header_of(shapes: Shapes, dtype: str) -> bytes:
    """Return the safetensors header: its length in 8 bytes, then JSON. Not padded, as published: most data begin at odd offsets."""
    spelled, width, _ = DTYPES[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": spelled, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text


def normal_blocks(count: int, mean: float, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Draw `count` values of N(mean, 0.02) in f32, at most BLOCK at a time, none of them subnormal in any dtype."""
    while count:
        values = rng.standard_normal(min(BLOCK, count), np.float32) * np.float32(0.02) + np.float32(mean)
        yield np.where(np.abs(values) < SMALLEST, np.copysign(SMALLEST, values), values)
        count -= len(values)


def blocks_of(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Draw the tensor's values in f32, flat, at most BLOCK at a time."""
    if is_mask(name):
        yield np.tri(P, dtype=np.float32).ravel()
    else:
        yield from normal_blocks(math.prod(shape), float(".ln_" in f".{name}" and name.endswith("weight")), rng)


def config_of(size: str, L: int) -> dict:
    """config.json as published."""
    _, D, H = SIZES[size]
    config = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": V}
    config |= {"n_ctx": P, "n_positions": P, "n_embd": D, "n_head": H, "n_layer": L, "layer_norm_epsilon": 1e-5}
    config |= {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02}
    config |= {"bos_token_id": 50256, "eos_token_id": 50256}
    config |= {"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True}
    config |= {"summary_type": "cls_index", "summary_use_proj": True}
    config |= {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}
    return config | EXTRA.get(size, {"n_special": 0, "predict_special_tokens": True})


def write_stream(path: Path, header: bytes, blocks: Iterable[np.ndarray], total: int) -> None:
    """Write a new file of `total` bytes block by block, with its progress on stderr once it takes more than a second."""
    shown = time.monotonic()
    with path.open("xb") as file:
        file.write(header)
        for block in blocks:
            file.write(block.tobytes())
            if time.monotonic() - shown > 1:
                shown = time.monotonic()
                print(f"{path}: {file.tell() / 1e6:,.0f} of {total / 1e6:,.0f} MB", file=sys.stderr)


def write_weights(path: Path, shapes: Shapes, dtype: str) -> None:
    """model.safetensors, every value drawn from one generator."""
    rng = np.random.default_rng(0)
    _, width, narrow = DTYPES[dtype]
    header = header_of(shapes, dtype)
    values = (block for name, shape in shapes.items() for block in blocks_of(name, shape, rng))
    total = len(header) + sum(math.prod(shape) for shape in shapes.values()) * width
    write_stream(path, header, map(narrow, values) if narrow else values, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--size", choices=SIZES, default="124M")
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer, or more, than the published model has")
    options = parser.parse_args()
    layers, width, _ = SIZES[options.size]
    layers = layers if options.layers is None else options.layers
    if layers < 1:
        parser.error(f"--layers: expected at least 1, found {layers}")
    shapes = shapes_of(layers, width)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        write_weights(options.out / "model.safetensors", shapes, options.dtype)
    except FileExistsError as error:
        sys.exit(f"error: {error.filename} exists; name another folder")
    (options.out / "config.json").write_text(json.dumps(config_of(options.size, layers), indent=2) + "\n")
    print(f"{options.out}: {parameters(shapes):,} parameters, {(options.out / 'model.safetensors').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
