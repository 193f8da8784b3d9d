"""config.json of GPT-OSS: what it says, in all its spellings, and what no GPT-OSS can have."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kernels.errors import ToyllmError
from .config import LARGEST, layers, optional_positive, positive, size
from .json_files import brief


@dataclass(frozen=True)
class Config:
    """config.json of model_type gpt_oss, under Hugging Face's names, the rope settings laid flat; the defaults are gpt-oss-20b's."""

    vocab_size: int = size(201088)  # V
    hidden_size: int = size(2880)  # D
    intermediate_size: int = size(2880)  # F
    num_hidden_layers: int = layers(24)  # L
    num_attention_heads: int = size(64)  # H
    num_key_value_heads: int = size(8)  # G
    head_dim: int = size(64)  # Dh
    num_local_experts: int = size(32)  # E
    num_experts_per_tok: int = size(4)  # k
    sliding_window: int = size(128)  # keys a sliding layer sees, the query's own included
    layer_types: tuple[str, ...] | None = None  # absent: even layers slide, odd ones see everything
    max_position_embeddings: int = size(131072)
    rms_norm_eps: float = positive(1e-5)
    swiglu_limit: float = positive(7.0, most=LARGEST)
    swiglu_alpha: float = positive(1.702, most=LARGEST)
    rope_type: str = "yarn"
    rope_theta: float = positive(150000.0)
    rope_factor: float = positive(32.0)
    rope_original_context: int = size(4096)
    rope_beta_fast: float = positive(32.0)
    rope_beta_slow: float = positive(1.0)
    rope_truncate: bool = False
    rope_attention_factor: float | None = optional_positive()  # on cos and sin; only YaRN's own, 0.1 ln(factor) + 1, is run
    rope_mscale: float | None = optional_positive()  # with the next, another way to say the same
    rope_mscale_all_dim: float | None = optional_positive()
    hf_rope_impl: bool = True  # pairs (i, i + Dh/2); false: (2 i, 2 i + 1)
    tie_word_embeddings: bool = False
    bos_token_id: tuple[int, ...] = ()
    eos_token_id: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """D."""
        return self.hidden_size

    @property
    def context(self) -> int:
        """The most positions the model knows."""
        return self.max_position_embeddings

    @property
    def sliding(self) -> tuple[bool, ...]:
        """Whether each layer slides."""
        if self.layer_types is None:
            return tuple(i % 2 == 0 for i in range(self.num_hidden_layers))
        return tuple(kind == SLIDING for kind in self.layer_types)


SLIDING, FULL = "sliding_attention", "full_attention"
# other spellings of config.json: OpenAI's own, and the two places for rope settings
SPELLINGS = {
    "experts_per_token": "num_experts_per_tok",
    "num_experts": "num_local_experts",
    "rope_scaling_factor": "rope_factor",
    "rope_ntk_alpha": "rope_beta_slow",
    "rope_ntk_beta": "rope_beta_fast",
}
ROPE_SPELLINGS = {
    "rope_type": "rope_type",
    "type": "rope_type",
    "rope_theta": "rope_theta",
    "factor": "rope_factor",
    "original_max_position_embeddings": "rope_original_context",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "truncate": "rope_truncate",
    "attention_factor": "rope_attention_factor",
    "mscale": "rope_mscale",
    "mscale_all_dim": "rope_mscale_all_dim",
}
# what transformers takes where rope settings are given without these; those of a config.json that gives none are `Config`'s
ROPE_SILENT = {"rope_type": "default", "rope_truncate": True}


def normalise(document: dict[str, Any]) -> dict[str, Any]:
    """config.json under the names of `Config`. A name of Hugging Face's own wins over another spelling of it."""
    flat = {SPELLINGS[key]: value for key, value in document.items() if key in SPELLINGS} | document
    for place in ("rope_scaling", "rope_parameters"):
        settings = document.get(place)
        if isinstance(settings, dict):
            flat |= {ROPE_SPELLINGS[key]: value for key, value in settings.items() if key in ROPE_SPELLINGS}
            flat = ROPE_SILENT | flat
        elif settings is not None:
            flat["rope_type"] = settings  # to be refused there
    if "initial_context_length" in document:
        flat.setdefault("rope_original_context", document["initial_context_length"])
        factor, length = flat.get("rope_factor"), document["initial_context_length"]
        if isinstance(factor, (int, float)) and isinstance(length, int) and 1 <= factor <= LARGEST and 1 <= length <= LARGEST:
            flat.setdefault("max_position_embeddings", int(length * factor))
    if "rope_scaling" in document and document["rope_scaling"] is None and "rope_parameters" not in document:
        flat["rope_type"] = "default"
    if flat.get("layer_types", ...) is None:
        del flat["layer_types"]
    return flat


def check(c: Config, where: Path) -> None:
    """Raise ToyllmError for a configuration that no GPT-OSS can have, or that toyllm does not run."""

    def wrong(key: str, text: str) -> ToyllmError:
        return ToyllmError(f"{where}: {key}: {text}")

    if c.num_attention_heads % c.num_key_value_heads:
        raise wrong("num_key_value_heads", f"{c.num_key_value_heads} does not divide num_attention_heads {c.num_attention_heads}")
    if c.head_dim % 2:
        raise wrong("head_dim", f"expected an even number for the rotary embedding, found {c.head_dim}")
    if c.num_experts_per_tok > c.num_local_experts:
        raise wrong("num_experts_per_tok", f"{c.num_experts_per_tok} experts a token, but the model has {c.num_local_experts}")
    if c.rope_type not in ("yarn", "default"):
        raise wrong("rope_type", f"expected yarn or default, found {brief(c.rope_type)}")
    if c.rope_theta <= 1:
        raise wrong("rope_theta", f"expected a number above 1, found {c.rope_theta:g}")
    if not 1 <= c.rope_factor <= LARGEST:
        raise wrong("rope_factor", f"expected 1 to {LARGEST}, found {c.rope_factor:g}")
    factor, known = attention_factor(c)
    if not math.isclose(factor, known, rel_tol=1e-6):
        raise wrong("rope_attention_factor", f"expected YaRN's own for this rope_factor, {known:g}, found {factor:g}")
    if c.layer_types is not None:
        if len(c.layer_types) != c.num_hidden_layers:
            raise wrong("layer_types", f"{len(c.layer_types)} entries for num_hidden_layers {c.num_hidden_layers}")
        odd = next((kind for kind in c.layer_types if kind not in (SLIDING, FULL)), None)
        if odd is not None:
            raise wrong("layer_types", f"expected {SLIDING} or {FULL}, found {brief(odd)}")


def attention_factor(c: Config) -> tuple[float, float]:
    """The factor on cos and sin that a configuration asks for, as transformers reads it (modeling_rope_utils), and YaRN's own."""

    def scaled(by: float) -> float:
        return 0.1 * by * math.log(c.rope_factor) + 1

    if c.rope_type != "yarn":
        return 1.0, 1.0
    known = scaled(1)
    if c.rope_attention_factor is not None:
        return c.rope_attention_factor, known
    if c.rope_mscale and c.rope_mscale_all_dim:
        return scaled(c.rope_mscale) / scaled(c.rope_mscale_all_dim), known
    return known, known
