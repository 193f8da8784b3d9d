"""GPT-OSS in plain NumPy, f64: a second opinion on goldens and engine alike, written to be read and not to be fast.

    x = embed[token]
    for each layer:  x = x + attention(rmsnorm(x)) · Wo + bo;   x = x + Σ_k weight_k · expert_k(rmsnorm(x))
    logits = rmsnorm(x) · headᵀ

Shapes: T tokens, D width, H query and G key/value heads of Dh, E experts of width F, k of them a token, V vocabulary. Each rule
that is easy to get wrong is a function of its own, so that a test can put the mistake in its place. Weights go by Hugging Face's
names, whatever the dialect of the folder.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches NumPy, and so safetensors' NumPy loader, bfloat16
import numpy as np
from safetensors.numpy import load_file

Weights = dict[str, np.ndarray]

# ---- configuration and weights, from any dialect ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What the forward pass needs to know."""

    L: int
    H: int
    G: int
    Dh: int
    k: int
    window: int
    slides: tuple[bool, ...]  # a layer
    rope: dict[str, Any]  # rope_type, rope_theta and YaRN's settings
    interleaved: bool  # rotate the pairs (2i, 2i + 1) instead of (i, i + Dh/2)
    limit: float
    eps: float


def read_config(folder: Path) -> Config:
    """config.json in any spelling."""
    c = json.loads((folder / "config.json").read_text())
    if "rope_ntk_beta" in c:  # OpenAI's own keys
        rope = {"rope_type": "yarn", "factor": c["rope_scaling_factor"], "original_max_position_embeddings": c["initial_context_length"]}
        rope |= {"beta_fast": c["rope_ntk_beta"], "beta_slow": c["rope_ntk_alpha"], "truncate": False}
    else:
        rope = c.get("rope_parameters") or c["rope_scaling"]
    types = c.get("layer_types") or ["full_attention" if i % 2 else "sliding_attention" for i in range(c["num_hidden_layers"])]
    return Config(
        L=c["num_hidden_layers"],
        H=c["num_attention_heads"],
        G=c["num_key_value_heads"],
        Dh=c["head_dim"],
        k=c.get("num_experts_per_tok") or c["experts_per_token"],
        window=c["sliding_window"],
        slides=tuple(kind == "sliding_attention" for kind in types),
        rope={"rope_theta": c.get("rope_theta")} | rope,
        interleaved=not c.get("hf_rope_impl", True),
        limit=c.get("swiglu_limit", 7.0),
        eps=c.get("rms_norm_eps", 1e-5),
    )


HUGGING_FACE = {
    "unembedding.weight": "lm_head.weight",
    "embedding.weight": "model.embed_tokens.weight",
    "attn.norm.scale": "input_layernorm.weight",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "norm.scale": "model.norm.weight",
    "block.": "model.layers.",
    "attn.sinks": "self_attn.sinks",
    "attn.out": "self_attn.o_proj",
    "mlp.gate": "mlp.router",
    "mlp.mlp1_": "mlp.experts.gate_up_proj_",
    "mlp.mlp2_": "mlp.experts.down_proj_",
    "proj_weight.": "proj_",
}


def read_weights(folder: Path, c: Config) -> Weights:
    """All tensors of a folder's own files in f64, the experts dequantised to `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F]."""
    stored = {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}
    named: Weights = {}
    for name, array in stored.items():
        if "layers." not in name and "lm_head" not in name and "embed_tokens" not in name and "model.norm" not in name:
            for theirs, ours in HUGGING_FACE.items():
                name = name.replace(theirs, ours)
        if "attn.qkv" in name:
            q, kv = c.H * c.Dh, c.G * c.Dh
            for part, rows in zip("qkv", np.split(array, [q, q + kv]), strict=True):
                named[name.replace("attn.qkv", f"self_attn.{part}_proj")] = rows
        else:
            named[name] = array
    w = {name: array.astype(np.float64) for name, array in named.items() if array.dtype != np.uint8}
    for name in [name for name in w if name.endswith(("gate_up_proj", "down_proj"))]:
        w[name] = w[name].swapaxes(1, 2)  # dequantised experts are stored [E, in, out]
    blocks = (name.removesuffix("_blocks") for name in named if name.endswith("_blocks"))
    return w | {name: dequantise(named[f"{name}_blocks"], named[f"{name}_scales"]) for name in blocks}


# ---- MXFP4 --------------------------------------------------------------------------------------------------------------------

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """u8 blocks [..., n, 16] and scales [..., n] -> f64 [..., 32 n]."""
    return (VALUES[codes(blocks)] * factors(scales)[..., None]).reshape(*scales.shape[:-1], -1)


def codes(blocks: np.ndarray) -> np.ndarray:
    """The 32 codes of each block: byte j holds element 2j in its low half, element 2j + 1 in its high half."""
    return np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)


def factors(scales: np.ndarray) -> np.ndarray:
    """What a block's codes are multiplied by: 2^(s - 127)."""
    return 2.0 ** (scales.astype(int) - 127)


# ---- rotary embedding ---------------------------------------------------------------------------------------------------------


def frequencies(rope: dict[str, Any], Dh: int) -> tuple[np.ndarray, float]:
    """Radians a position for each of the Dh/2 pairs, and the factor on cos and sin (YaRN's concentration)."""
    plain = rope["rope_theta"] ** (-2 * np.arange(Dh // 2) / Dh)
    if rope["rope_type"] == "default":
        return plain, 1.0

    def pair_turning(times: float) -> float:  # so often within the original context
        length = rope["original_max_position_embeddings"]
        return Dh / 2 * math.log(length / (times * 2 * math.pi)) / math.log(rope["rope_theta"])

    low, high = pair_turning(rope["beta_fast"]), pair_turning(rope["beta_slow"])
    if rope["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, Dh - 1)
    ramp = np.clip((np.arange(Dh // 2) - low) / (high - low), 0, 1)
    return plain / rope["factor"] * ramp + plain * (1 - ramp), 0.1 * math.log(rope["factor"]) + 1


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rotate each pair of x [T, n, Dh] by its angle; cos and sin [T, Dh/2]."""
    cos, sin = cos[:, None], sin[:, None]
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else np.split(x, 2, -1)
    pairs = a * cos - b * sin, b * cos + a * sin
    return np.stack(pairs, -1).reshape(x.shape) if interleaved else np.concatenate(pairs, -1)


# ---- attention ----------------------------------------------------------------------------------------------------------------


def visible(T: int, window: int | None) -> np.ndarray:
    """Which keys [T, T] each query sees: itself and what is before it, `window` in all."""
    behind = np.arange(T)[:, None] - np.arange(T)
    return (behind >= 0) & (behind < (window or T))


def attention_weights(scores: np.ndarray, sinks: np.ndarray) -> np.ndarray:
    """Softmax of scores [H, T, T] over the keys and the head's sink [H], which takes its share and has no value."""
    sinks = sinks[:, None, None]
    highest = np.maximum(scores.max(-1, keepdims=True), sinks)
    e = np.exp(scores - highest)
    return e / (e.sum(-1, keepdims=True) + np.exp(sinks - highest))


# ---- experts ------------------------------------------------------------------------------------------------------------------


def route(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest of logits [T, E], descending, ties to the lowest index, and the softmax over those k alone: both [T, k]."""
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    top = np.take_along_axis(logits, chosen, -1)
    e = np.exp(top - top[:, :1])
    return chosen, e / e.sum(-1, keepdims=True)


def gate_and_up(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of [..., 2F]: gate in the even rows, up in the odd ones."""
    return rows[..., 0::2], rows[..., 1::2]


def activation(gate: np.ndarray, up: np.ndarray, limit: float) -> np.ndarray:
    """gate · sigmoid(1.702 gate) · (up + 1), gate clamped from above alone, up on both sides."""
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


# ---- forward ------------------------------------------------------------------------------------------------------------------


def forward(folder: Path, ids: np.ndarray, start: int = 0) -> dict[str, np.ndarray]:
    """Every activation of `ids` [T] at positions start, start + 1, … under its name, for the model in a folder."""
    c = read_config(folder)
    w = read_weights(folder, c)
    T, a = len(ids), {}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.eps) * w[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    per_position, concentration = frequencies(c.rope, c.Dh)
    angles = np.arange(start, start + T, dtype=np.float32)[:, None] * per_position.astype(np.float32)  # f32 in every implementation
    cos, sin = np.cos(angles) * concentration, np.sin(angles) * concentration

    def attention(x: np.ndarray, name: str, slides: bool) -> dict[str, np.ndarray]:
        q, k, v = (linear(x, f"{name}.{part}_proj").reshape(T, -1, c.Dh) for part in "qkv")
        q, k = rotate(q, cos, sin, c.interleaved), rotate(k, cos, sin, c.interleaved)
        k_each, v_each = (x.repeat(c.H // c.G, axis=1) for x in (k, v))  # query head h uses key/value head h // (H/G)
        scores = np.einsum("thd,shd->hts", q, k_each) / math.sqrt(c.Dh)
        scores = np.where(visible(T, c.window if slides else None), scores, -np.inf)
        weights = attention_weights(scores, w[f"{name}.sinks"])
        heads = np.einsum("hts,shd->thd", weights, v_each)
        out = linear(heads.reshape(T, -1), f"{name}.o_proj")
        return {"q": q, "k": k, "v": v, "scores": scores, "weights": weights, "heads": heads, "out": out}

    def mixture(x: np.ndarray, name: str) -> dict[str, np.ndarray]:
        logits = linear(x, f"{name}.router")
        chosen, weights = route(logits, c.k)

        def project(x: np.ndarray, part: str) -> np.ndarray:  # each of [T, k, in] through its own expert
            every = np.einsum("tki,eoi->tkeo", x, w[f"{name}.experts.{part}"]) + w[f"{name}.experts.{part}_bias"]
            return np.take_along_axis(every, chosen[:, :, None, None], 2)[:, :, 0]

        gate, up = gate_and_up(project(x[:, None].repeat(c.k, 1), "gate_up_proj"))
        hidden = activation(gate, up, c.limit)
        out = (weights[..., None] * project(hidden, "down_proj")).sum(1)
        router = {"router.logits": logits, "router.experts": chosen, "router.weights": weights}
        return router | {"experts.gate": gate, "experts.up": up, "experts.hidden": hidden, "mlp.out": out}

    x = a["embed"] = w["model.embed_tokens.weight"][ids]
    for i in range(c.L):
        layer, block = f"model.layers.{i}", f"blocks.{i}"
        a[f"{block}.norm_1"] = norm(x, f"{layer}.input_layernorm")
        inside = attention(a[f"{block}.norm_1"], f"{layer}.self_attn", c.slides[i])
        a |= {f"{block}.attn.{name}": array for name, array in inside.items()}
        x = a[f"{block}.resid_mid"] = x + inside["out"]
        a[f"{block}.norm_2"] = norm(x, f"{layer}.post_attention_layernorm")
        inside = mixture(a[f"{block}.norm_2"], f"{layer}.mlp")
        a |= {f"{block}.{name}": array for name, array in inside.items()}
        x = a[f"{block}.out"] = x + inside["mlp.out"]
    a["norm_f"] = norm(x, "model.norm")
    a["logits"] = a["norm_f"] @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
    return a
