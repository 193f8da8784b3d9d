"""Small random GPT-OSS checkpoints in every dialect, for the goldens and the live comparison. Needs torch."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Config = dict[str, Any]
Weights = dict[str, torch.Tensor]

YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False}
BASE: Config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "hidden_act": "silu"}
BASE |= {"vocab_size": 97, "max_position_embeddings": 1024, "initial_context_length": 64, "rope_theta": 1000.0, "rope_scaling": YARN}
BASE |= {"rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "tie_word_embeddings": False, "pad_token_id": None, "eos_token_id": None}


def shape(D: int, F: int, H: int, G: int, Dh: int, E: int, k: int, L: int, window: int) -> Config:
    """The sizes of a model, by their names in config.json."""
    config = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": Dh}
    config |= {"num_local_experts": E, "num_experts_per_tok": k, "experts_per_token": k, "num_hidden_layers": L}
    layer_types = ["full_attention" if i % 2 else "sliding_attention" for i in range(L)]
    return config | {"sliding_window": window, "layer_types": layer_types}


DEEP = shape(D=64, F=32, H=8, G=2, Dh=16, E=8, k=4, L=3, window=5)
SMALL = shape(D=32, F=64, H=4, G=2, Dh=16, E=4, k=2, L=2, window=16)
ODD = shape(D=32, F=96, H=6, G=2, Dh=10, E=5, k=3, L=2, window=3)


def random_weights(config: Config, experts: str) -> Weights:
    """Every tensor by Hugging Face's name; `experts` in "mxfp4" or dequantised in "bf16". Large enough for each option to show."""
    D, F, E, L = (config[key] for key in ("hidden_size", "intermediate_size", "num_local_experts", "num_hidden_layers"))
    H, G, Dh = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    rng = np.random.default_rng(3)

    def normal(*shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return torch.from_numpy((mean + std * rng.standard_normal(shape)).astype(np.float32)).bfloat16()

    def linear(name: str, d_out: int, d_in: int, gain: float = 1) -> Weights:
        return {f"{name}.weight": normal(d_out, d_in, std=gain / d_in**0.5), f"{name}.bias": normal(d_out, std=0.2)}

    def expert(name: str, d_out: int, d_in: int, gain: float) -> Weights:
        std, bias = gain / d_in**0.5, {f"{name}_bias": normal(E, d_out, std=0.3)}
        if experts == "bf16":
            return bias | {name: normal(E, d_in, d_out, std=std)}
        middle = 127 + round(math.log2(std / 3))  # random codes have a standard deviation of about 3
        scales = rng.choice([middle - 6, middle - 1, middle, middle + 1], (E, d_out, d_in // 32)).astype(np.uint8)
        codes = rng.integers(0, 256, (E, d_out, d_in // 32, 16), np.uint8)
        return bias | {f"{name}_blocks": torch.from_numpy(codes), f"{name}_scales": torch.from_numpy(scales)}

    weights = {f"{name}.weight": normal(config["vocab_size"], D, std=1) for name in ("model.embed_tokens", "lm_head")}
    for i in range(L):
        at = f"model.layers.{i}"
        weights |= {f"{at}.{norm}_layernorm.weight": normal(D, std=0.3, mean=1) for norm in ("input", "post_attention")}
        weights |= linear(f"{at}.self_attn.q_proj", H * Dh, D) | linear(f"{at}.self_attn.k_proj", G * Dh, D)
        weights |= linear(f"{at}.self_attn.v_proj", G * Dh, D) | linear(f"{at}.self_attn.o_proj", D, H * Dh)
        weights |= {f"{at}.self_attn.sinks": normal(H, std=2)} | linear(f"{at}.mlp.router", E, D, gain=3)
        weights |= expert(f"{at}.mlp.experts.gate_up_proj", 2 * F, D, gain=2.5)
        weights |= expert(f"{at}.mlp.experts.down_proj", D, F, gain=0.7)
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    return weights | {"model.norm.weight": normal(D, std=0.3, mean=1)}


# How config.json is spelled: functions of the published spelling.


def published(config: Config) -> Config:
    """As Hugging Face publishes it."""
    return config


def transformers_5(config: Config) -> Config:
    """As transformers 5 saves it: one object for the rope, one key for k, the activation's alpha."""
    kept = without("rope_scaling", "rope_theta", "experts_per_token", "initial_context_length")(config)
    return kept | {"rope_parameters": config["rope_scaling"] | {"rope_theta": config["rope_theta"]}, "swiglu_alpha": 1.702}


def without(*keys: str) -> Callable[[Config], Config]:
    """Without these keys."""
    return lambda config: {key: value for key, value in config.items() if key not in keys}


def openai(config: Config) -> Config:
    """As in OpenAI's `original/`: other keys, no model_type; the norm's epsilon and the untruncated YaRN are understood."""
    same = ("num_hidden_layers", "experts_per_token", "vocab_size", "hidden_size", "intermediate_size", "swiglu_limit", "head_dim")
    same += ("num_attention_heads", "num_key_value_heads", "sliding_window", "initial_context_length", "rope_theta")
    renamed = {"num_experts": config["num_local_experts"], "rope_scaling_factor": config["rope_scaling"]["factor"]}
    renamed |= {"rope_ntk_alpha": config["rope_scaling"]["beta_slow"], "rope_ntk_beta": config["rope_scaling"]["beta_fast"]}
    return {key: config[key] for key in same} | renamed


# How a checkpoint spells its weights: functions of Hugging Face's names.


def hugging_face(weights: Weights) -> Weights:
    """As transformers names them."""
    return weights


ORIGINAL = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
    "model.layers.": "block.",
    "input_layernorm.weight": "attn.norm.scale",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "self_attn.o_proj": "attn.out",
    "self_attn.sinks": "attn.sinks",
    "mlp.router": "mlp.gate",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
    "mlp.experts.gate_up_proj_": "mlp.mlp1_weight.",
    "mlp.experts.down_proj_": "mlp.mlp2_weight.",
}


def original(weights: Weights) -> Weights:
    """As in OpenAI's `original/`: q, k and v in one tensor, other names."""
    found: Weights = {}
    for name, tensor in weights.items():
        if "q_proj" in name:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[name.replace("model.layers.", "block.").replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            for theirs, ours in ORIGINAL.items():
                name = name.replace(theirs, ours)
            found[name] = tensor
    return found


def half_split(weights: Weights, heads: int) -> Weights:
    """Rows of q and k reordered so that rotating the pairs (i, i + Dh/2) does what rotating (2i, 2i + 1) did before."""
    found = dict(weights)
    for name, tensor in weights.items():
        if "q_proj" in name or "k_proj" in name:
            Dh = len(weights[name.replace("k_proj", "q_proj")]) // heads
            rows = torch.arange(len(tensor)).reshape(-1, Dh // 2, 2)
            found[name] = tensor[rows.transpose(1, 2).flatten()]
    return found


# How they are written.


def one_file(folder: Path, weights: Weights) -> None:
    """model.safetensors."""
    save_file(weights, folder / "model.safetensors")


def shards(folder: Path, weights: Weights, spelled: str, count: int, first: int) -> None:
    """`count` files and their index, every so many-th tensor in the same file, so that layers and even experts are cut apart."""
    names = sorted(weights)
    place = {name: spelled.format(first + i % count, first + count - 1) for i, name in enumerate(names)}
    for file in sorted(set(place.values())):
        save_file({name: weights[name] for name in names if place[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def from_zero(folder: Path, weights: Weights) -> None:
    """Three shards as in gpt-oss-20b: numbered from zero, the last one's number after `of`. Beside them `original`, other weights."""
    shards(folder, weights, "model-{:05}-of-{:05}.safetensors", count=3, first=0)
    (folder / "original").symlink_to(Path("..") / "original", target_is_directory=True)


def two_dashes(folder: Path, weights: Weights) -> None:
    """Shards as in gpt-oss-120b's `original/`."""
    shards(folder, weights, "model--{:05}-of-{:05}.safetensors", count=2, first=1)
