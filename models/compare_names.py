"""The names of activations: which there are, in the order in which a model makes them, and what their axes are.

T tokens, S keys, D width, H query and G key/value heads of Dh, E experts of width F, k of them a token, V vocabulary.
"""

import re

BLOCK = {  # a block's, in its order
    "norm_1": "T D",
    "attn.q": "T H Dh",
    "attn.k": "T G Dh",
    "attn.v": "T G Dh",
    "attn.scores": "H T S",
    "attn.weights": "H T S",
    "attn.heads": "T H Dh",
    "attn.out": "T D",
    "resid_mid": "T D",
    "norm_2": "T D",
    "router.logits": "T E",
    "router.experts": "T k",
    "router.weights": "T k",
    "experts.gate": "T k F",
    "experts.up": "T k F",
    "experts.hidden": "T k F",
    "mlp.hidden": "T F",
    "mlp.out": "T D",
    "out": "T D",
}
BEFORE, AFTER = {"embed": "T D"}, {"norm_f": "T D", "logits": "T V"}
NAME = re.compile(rf"{'|'.join(BEFORE | AFTER)}|blocks\.(\d+)\.({'|'.join(map(re.escape, BLOCK))})")


def is_activation(name: str) -> bool:
    """Whether there can be an activation of this name."""
    return NAME.fullmatch(name) is not None


def names_of(layers: int, mixture: bool) -> list[str]:
    """The activations of a model with so many blocks, experts in them or not, in the order in which it makes them."""
    other = ("mlp.hidden",) if mixture else ("router.", "experts.")
    return [*BEFORE, *(f"blocks.{i}.{part}" for i in range(layers) for part in BLOCK if not part.startswith(other)), *AFTER]


def axes(name: str) -> list[str]:
    """The letters of an activation's axes."""
    return (BEFORE | AFTER | BLOCK)[part(name)].split()


def token_axis(name: str) -> int:
    """Which axis of an activation counts the tokens."""
    return axes(name).index("T")


def order(name: str) -> tuple[int, int]:
    """Where an activation comes in a run."""
    if name in BEFORE:
        return -1, 0
    if name in AFTER:
        return 2**31, list(AFTER).index(name)
    return int(name.split(".")[1]), list(BLOCK).index(part(name))


def part(name: str) -> str:
    """The name without its block."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name
