"""Small models of both families, written for a trial: weights that are small numbers, or any bytes at all."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np

from toyllm.models import gpt2, gpt_oss
from toyllm.models.weights import Spec

from .mutate import chance

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 24,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
GPT_OSS = {"model_type": "gpt_oss", "vocab_size": 24, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
GPT_OSS |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 4}
GPT_OSS |= {"max_position_embeddings": 128, "rope_theta": 10000.0, "rope_scaling": YARN, "swiglu_limit": 7.0, "eos_token_id": [0, 2]}
CONFIGS: dict[str, dict[str, Any]] = {"gpt2": GPT2, "gpt_oss": GPT_OSS}
FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2, "gpt_oss": gpt_oss}
# names of tensors by which GPT-OSS's dialects are told from each other
DIALECTS = {"mxfp4": frozenset[str](), "dense": frozenset(["experts.gate_up_proj"]), "openai": frozenset(["embedding.weight"])}

Stored = tuple[str, tuple[int, ...], bytes]  # dtype, shape, data


def specs(config: Any, dialect: str) -> list[Spec]:
    """Every tensor of a model with this configuration."""
    if isinstance(config, gpt2.Config):
        return [*gpt2.specs(config).values()]
    return [*gpt_oss.specs(config, DIALECTS[dialect]).values()]


def elements(some: Iterable[Spec]) -> int:
    """How many numbers they hold."""
    return sum(math.prod(spec.shape) for spec in some)


def stored(rng: Random, spec: Spec, dtype: str, wild: bool) -> Stored:
    """A tensor: any bytes at all, or small numbers, and scales about 1."""
    if spec.name.endswith(("blocks", "scales")):
        dtype = "U8"
    n, numbers = math.prod(spec.shape), np.random.default_rng(rng.getrandbits(64))
    if wild or spec.name.endswith("blocks"):
        return dtype, spec.shape, wild_bytes(rng, numbers, n, dtype)
    if dtype == "U8":
        return dtype, spec.shape, numbers.integers(120, 126, n, np.uint8).tobytes()
    values = (numbers.standard_normal(n) * rng.choice((0.1, 0.5, 2))).astype(np.float32)
    if dtype == "BF16":
        return dtype, spec.shape, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return dtype, spec.shape, values.astype(np.float16 if dtype == "F16" else np.float32).tobytes()


def wild_bytes(rng: Random, numbers: np.random.Generator, n: int, dtype: str) -> bytes:
    """Numbers of a dtype whose bits are anything, or those on which arithmetic is known to trip."""
    data = numbers.integers(0, 256, n * WIDTHS[dtype], np.uint8)
    if dtype != "U8" and chance(rng, 0.5):
        special = {"F32": "7f800000 ff800000 7fc00000 7f800001 00000001 80000000 7f7fffff ff7fffff 007fffff 00800000"}
        special |= {"BF16": "7f80 ff80 7fc0 7f81 0001 8000 7f7f ff7f 007f 0080", "F16": "7c00 fc00 7e00 7c01 0001 8000 7bff fbff 03ff 0400"}
        words = np.array([int(word, 16) for word in special[dtype].split()], f"<u{WIDTHS[dtype]}")
        return words[numbers.integers(0, len(words), n)].tobytes()
    if dtype == "U8" and chance(rng, 0.3):
        return numbers.choice(np.array([0, 1, 127, 254, 255], np.uint8), n).tobytes()
    return data.tobytes()


def file_bytes(tensors: dict[str, Stored]) -> bytes:
    """The safetensors file of some tensors."""
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + len(data))}
        end += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


def write_weights(rng: Random, folder: Path, some: Sequence[Spec], wild: float = 0) -> None:
    """Write model.safetensors: one dtype for all tensors, or a draw for each; a share of them `wild`."""
    each = chance(rng, 0.3)
    dtype = rng.choice(("F32", "F16", "BF16"))
    tensors = {spec.name: stored(rng, spec, rng.choice(("F32", "F16", "BF16")) if each else dtype, chance(rng, wild)) for spec in some}
    if chance(rng, 0.3):
        for spec in some:
            if spec.optional:
                del tensors[spec.name]
    (folder / "model.safetensors").write_bytes(file_bytes(tensors))
