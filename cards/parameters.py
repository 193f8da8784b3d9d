"""The parameters of a model's cards, read from its checkpoint by the names that the cards have for them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernels.dtypes import widen
from ..models import gpt2, gpt_oss
from ..models.checkpoint import Checkpoint, Tensor
from ..models.weights import match

QKV = ("q", "k", "v")


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
        if key in found or part not in QKV:
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
