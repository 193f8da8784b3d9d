"""The config.json of a cut checkpoint: the source's with every key that the cut changes, or written anew in the other dialect's keys.

What is written is read back as any config.json is, and must mean the model that was cut: what the keys of a dialect cannot say is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ..kernels.errors import ToyllmError
from . import gpt_oss
from .config import read_config

Document = dict[str, Any]

HIDDEN_LAYERS = ("num_hidden_layers", "n_layer")
EXPERTS = ("num_local_experts", "num_experts")
EXPERTS_A_TOKEN = ("num_experts_per_tok", "experts_per_token")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as config.json spells them
NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}
LAYER = re.compile(r"\b(h|layers|block)\.(\d+)(?=\.|$)")  # where a name has its layer's number


def smaller(c: Any, layers: Sequence[int], experts: Sequence[int]) -> Any:
    """The configuration with these layers and experts alone."""
    if not isinstance(c, gpt_oss.Config):
        return replace(c, n_layer=len(layers))
    kinds = tuple(gpt_oss.SLIDING if c.sliding[i] else gpt_oss.FULL for i in layers)
    k = min(c.num_experts_per_tok, len(experts))
    return replace(c, num_hidden_layers=len(layers), layer_types=kinds, num_local_experts=len(experts), num_experts_per_tok=k)


def renumbered(name: str, layers: Sequence[int]) -> str | None:
    """A name with its layer's new number; None where that layer is not kept. Names without a layer are as they were."""
    found = LAYER.search(name)
    if found is None:
        return name
    if int(found[2]) not in layers:
        return None
    return f"{name[: found.start(2)]}{layers.index(int(found[2]))}{name[found.end(2) :]}"


def is_openai(document: Document) -> bool:
    """Whether a config.json of GPT-OSS has OpenAI's own keys, which name no type."""
    return "model_type" not in document


def write_config(
    document: Document, generation: Document, new: Any, layers: Sequence[int], dense: bool, openai: bool, dtype: str | None
) -> Document:
    """The config.json of the configuration `new`, which has these layers of the source's.

    `generation` is the source's generation_config.json, `dense` tells that experts are matrices, `dtype` what all floats were converted
    to, if they were.
    """
    if isinstance(new, gpt_oss.Config) and openai:
        return openai_document(new)
    found = dict(document)
    if isinstance(new, gpt_oss.Config) and is_openai(document):
        found = hugging_face_document(new, generation)
    count = new.num_hidden_layers if isinstance(new, gpt_oss.Config) else new.n_layer
    change(found, HIDDEN_LAYERS if isinstance(new, gpt_oss.Config) else HIDDEN_LAYERS[::-1], count)
    if isinstance(new, gpt_oss.Config):
        change(found, EXPERTS, new.num_local_experts)
        change(found, EXPERTS_A_TOKEN, new.num_experts_per_tok)
        found["layer_types"] = list(new.layer_types or ())
        quantize(found, layers, dense)
    for key in ("dtype", "torch_dtype"):
        if dtype and isinstance(found.get(key), str):
            found[key] = DTYPES[dtype]
    return found


def change(document: Document, keys: Sequence[str], value: int) -> None:
    """Set every one of these spellings that is there; the first, where none is."""
    for key in [key for key in keys if key in document] or keys[:1]:
        document[key] = value


def quantize(document: Document, layers: Sequence[int], dense: bool) -> None:
    """Make quantization_config say how the experts are stored: absent for matrices."""
    settings = document.get("quantization_config")
    is_mxfp4 = isinstance(settings, dict) and settings.get("quant_method") == "mxfp4"
    if dense and is_mxfp4:
        del document["quantization_config"]
    if dense:
        return
    kept = dict(settings) if isinstance(settings, dict) and is_mxfp4 else dict(MXFP4)
    modules = kept.get("modules_to_not_convert")
    if isinstance(modules, list) and all(isinstance(name, str) for name in modules):
        kept["modules_to_not_convert"] = [new for name in modules if (new := renumbered(name, layers)) is not None]
    document["quantization_config"] = kept


def special_tokens(document: Document) -> Document:
    """What a config.json or generation_config.json says of special tokens, which OpenAI's config.json has no keys for."""
    return {key: document[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in document}


def openai_document(c: gpt_oss.Config) -> Document:
    """OpenAI's own config.json: these keys and no others, as its reader takes no others."""
    document: Document = {"num_hidden_layers": c.num_hidden_layers, "num_experts": c.num_local_experts}
    document |= {"experts_per_token": c.num_experts_per_tok, "vocab_size": c.vocab_size, "hidden_size": c.hidden_size}
    document |= {"intermediate_size": c.intermediate_size, "swiglu_limit": c.swiglu_limit, "head_dim": c.head_dim}
    document |= {"num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads}
    document |= {"sliding_window": c.sliding_window, "initial_context_length": c.rope_original_context, "rope_theta": c.rope_theta}
    document |= {"rope_scaling_factor": c.rope_factor, "rope_ntk_alpha": c.rope_beta_slow, "rope_ntk_beta": c.rope_beta_fast}
    return document


def hugging_face_document(c: gpt_oss.Config, generation: Document) -> Document:
    """Hugging Face's config.json as published; the special tokens are generation_config.json's, where there is one."""
    rope: Document = {"rope_type": c.rope_type, "factor": c.rope_factor, "original_max_position_embeddings": c.rope_original_context}
    rope |= {"beta_fast": c.rope_beta_fast, "beta_slow": c.rope_beta_slow, "truncate": c.rope_truncate}
    document: Document = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True}
    document |= {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True}
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        document[name] = getattr(c, name)
    for name in ("head_dim", "num_local_experts", "num_experts_per_tok", "sliding_window", "max_position_embeddings", "rms_norm_eps"):
        document[name] = getattr(c, name)
    document |= {"experts_per_token": c.num_experts_per_tok, "initial_context_length": c.rope_original_context}
    document |= {"rope_theta": c.rope_theta, "rope_scaling": rope, "swiglu_limit": c.swiglu_limit}
    document |= {"swiglu_alpha": c.swiglu_alpha, "tie_word_embeddings": c.tie_word_embeddings}
    document |= {} if c.hf_rope_impl else {"hf_rope_impl": False}
    return document | special_tokens(generation)


def require_same(family: ModuleType, document: Document, new: Any, where: Path) -> None:
    """Raise ToyllmError unless a config.json means this configuration; special tokens may be said in generation_config.json instead."""
    read = read_config(family.Config, family.normalise(document), where)
    family.check(read, where)
    slides, would = ([("sliding" if s else "full") for s in c.sliding] if isinstance(c, gpt_oss.Config) else [] for c in (new, read))
    odd = next((i for i, (one, other) in enumerate(zip(slides, would, strict=True)) if one != other), None)
    if odd is not None:
        means = f"layer {odd} of the result has {slides[odd]} attention, and OpenAI's config.json, without this key, means {would[odd]}"
        raise ToyllmError(f"{where}: layer_types: {means}; keep layers that alternate, or write another dialect: --dialect hf")
    for field in fields(new):
        name, wanted, found = field.name, getattr(new, field.name), getattr(read, field.name)
        if wanted != found and name != "layer_types" and not name.endswith("_token_id"):
            means = f"OpenAI's config.json has no key for {wanted}, and means {found}"
            raise ToyllmError(f"{where}: {name}: {means}; write another dialect: --dialect hf")
