"""What the cards of a model take from it: hypers from its configuration, parameters from its checkpoint, by the cards' own names."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..kernels.dtypes import widen
from ..models import gpt2, gpt_oss
from ..models.checkpoint import Checkpoint, Tensor
from ..models.weights import match
from .structure import HyperValue

QKV = ("q", "k", "v")


def hypers(c: Any, names: Iterable[str] = (), tied: bool | None = None) -> dict[str, HyperValue]:
    """The values of a model's hypers, by their names in the cards of its family.

    `names` are those of the checkpoint's tensors, which tell how experts are stored (without any: in MXFP4). `tied` says whether the head
    is the embedding, where config.json does not have the last word: see `is_tied`.
    """
    same = bool(c.tie_word_embeddings if tied is None else tied)
    if isinstance(c, gpt2.Config):
        return {
            "V": c.vocab_size,
            "P": c.n_positions,
            "D": c.n_embd,
            "L": c.n_layer,
            "H": c.n_head,
            "Dh": c.n_embd // c.n_head,
            "F": c.inner,
            "ε": c.layer_norm_epsilon,
            "activation": gpt2.ACTIVATIONS[c.activation_function],
            "scaled": c.scale_attn_weights,
            "by_layer": c.scale_attn_by_inverse_layer_idx,
            "tied": same,
        }
    return {
        "V": c.vocab_size,
        "D": c.hidden_size,
        "L": c.num_hidden_layers,
        "H": c.num_attention_heads,
        "G": c.num_key_value_heads,
        "Dh": c.head_dim,
        "E": c.num_local_experts,
        "k": c.num_experts_per_tok,
        "F": c.intermediate_size,
        "ε": c.rms_norm_eps,
        "w": tuple(c.sliding_window if slides else math.inf for slides in c.sliding),
        "λ": plain(c.swiglu_limit),
        "α": plain(c.swiglu_alpha),
        "mxfp4": not gpt_oss.has_dense_experts(frozenset(names)),
        "b": plain(c.rope_theta),
        "s": plain(c.rope_factor),
        "P_0": c.rope_original_context,
        "β_fast": plain(c.rope_beta_fast),
        "β_slow": plain(c.rope_beta_slow),
        "yarn": c.rope_type == "yarn",
        "truncate": c.rope_truncate,
        "interleaved": not c.hf_rope_impl,
        "tied": same,
    }


def plain(value: float) -> float:
    """An integer where there is no fraction: 150000, not 150000.0."""
    return int(value) if float(value).is_integer() else value


def source(checkpoint: Checkpoint, c: Any) -> Callable[[str], np.ndarray]:
    """What gives a card the parameter of a name, such as `blocks.0.q.weight`: widened to f32, or MXFP4's bytes.

    Where queries, keys and values are stored as one, as OpenAI does, they are given as three. For a name that the model does not have it
    raises KeyError. Raises ToyllmError for a checkpoint that is not of the configuration's architecture.
    """
    found = tensors(checkpoint, c)

    def stored(key: str) -> np.ndarray:
        array = checkpoint.array(found[key].name)
        return array if array.dtype == np.uint8 else widen(array)

    def read(name: str) -> np.ndarray:
        key = name.removeprefix("blocks.")
        layer, part, kind = (*key.split("."), "", "")[:3]
        if key in found or part not in QKV or not isinstance(c, gpt_oss.Config):
            return stored(key)
        heads = c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads
        first, last = (c.head_dim * sum(heads[: QKV.index(part) + n]) for n in (0, 1))
        return stored(f"{layer}.qkv.{kind}")[first:last]

    return read


def is_tied(checkpoint: Checkpoint, c: Any) -> bool:
    """Whether a model's head is its embedding: none is stored, or the same once more, whatever config.json says."""
    found = tensors(checkpoint, c)
    if "head" not in found:
        return True
    embed, head = (checkpoint.array(found[key].name) for key in ("embed", "head"))
    return head.dtype == embed.dtype and np.array_equal(head.view(np.uint8), embed.view(np.uint8))


def tensors(checkpoint: Checkpoint, c: Any) -> dict[str, Tensor]:
    """The checkpoint's tensors by our names. Raises ToyllmError where they are not this architecture's."""
    if isinstance(c, gpt2.Config):
        return match(checkpoint, gpt2.specs(c), gpt2.PREFIXES, gpt2.IGNORED)
    return match(checkpoint, gpt_oss.specs(c, frozenset(checkpoint.tensors)), gpt_oss.PREFIXES, gpt_oss.IGNORED)
