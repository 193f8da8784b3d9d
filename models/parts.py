"""A model as one part, or as what each of several machines would hold: whole layers (`split`) or a share of every layer (`shards`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..kernels.errors import ToyllmError
from .params import Anatomy, Entry, sizes


@dataclass(frozen=True)
class Part:
    """What one machine holds: tensors (not those that the model does not read), layers, and of each layer one in `shards` of the heads."""

    name: str
    entries: tuple[Entry, ...]
    layers: range
    shards: int = 1


def whole(a: Anatomy) -> Part:
    """The model as one part."""
    return Part("all", needed(a), range(sizes(a.config).L))


def needed(a: Anatomy) -> tuple[Entry, ...]:
    """The tensors that a token has to do with."""
    return tuple(e for e in a.entries if e.multiplied or e.looked_up)


def split(a: Anatomy, fractions: Sequence[float]) -> list[Part]:
    """Parts of consecutive layers, as many as each fraction's share; the first has the embedding, the last the final norm and the head.

    A tied embedding is counted where it is looked up and held again where it is the head. Raises ToyllmError for other than positive
    fractions, and where one comes to no layer.
    """
    L, total = sizes(a.config).L, sum(fractions)
    if not fractions or not all(math.isfinite(f) and f > 0 for f in fractions):
        raise ToyllmError(f"--split {','.join(f'{f:g}' for f in fractions)}: expected numbers above 0, such as 0.6,0.4")
    cuts = [round(L * sum(fractions[:n]) / total) for n in range(len(fractions) + 1)]
    if any(begin == end for begin, end in pairwise(cuts)):
        raise ToyllmError(f"--split {','.join(f'{f:g}' for f in fractions)}: a part comes to none of the {L} layers; use larger shares")
    last, parts = len(fractions) - 1, []
    for n in range(last + 1):
        layers = range(cuts[n], cuts[n + 1])
        mine = [e for e in needed(a) if (e.layer in layers if e.layer is not None else n == (0 if e.looked_up else last))]
        tied = [e for e in needed(a) if e.looked_up and e.multiplied] if last else []
        if n == 0:
            mine = [replace(e, multiplied=False) if e in tied else e for e in mine]
        if n == last:
            mine += [replace(e, counted=False, looked_up=False) for e in tied]
        parts.append(Part(f"layers {layers[0]}-{layers[-1]}", tuple(mine), layers))
    return parts


def shards(a: Anatomy, n: int) -> list[Part]:
    """Parts that hold one in n of the heads, experts and rows of every layer; what has no axis to cut is in each of them.

    Raises ToyllmError where n does not divide the heads: keys and values are cached by whole heads.
    """
    s = sizes(a.config)
    if n < 1 or s.H % n or s.G % n:
        heads = f"{s.G} key/value heads" if s.G != s.H else f"{s.H} heads"
        raise ToyllmError(f"--shards {n}: expected a divisor of the model's {heads}")

    def cut(e: Entry, i: int) -> Entry:
        if e.shard_axis is None:
            return e
        length = e.shape[e.shard_axis]
        mine = length * (i + 1) // n - length * i // n
        shape = (*e.shape[: e.shard_axis], mine, *e.shape[e.shard_axis + 1 :])
        return replace(e, shape=shape, nbytes=e.nbytes // max(length, 1) * mine)

    return [Part(f"shard {i}", tuple(cut(e, i) for e in needed(a)), range(s.L), n) for i in range(n)]
