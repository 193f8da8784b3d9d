"""Which weight of one checkpoint is which of another, whatever the dialect of either.

Weights are matched by our names for them, which the families' tables give: dialects and prefixes, q, k and v in one tensor or in three,
experts in MXFP4 or as matrices, and a tied head that only one of the two stores are no difference. What a table does not know, and all
where neither checkpoint has a config.json, is matched by the names in the files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from ..kernels.errors import ToyllmError
from .check_values import has_experts
from .checkpoint import Checkpoint, Tensor, open_checkpoint
from .config import load_config
from .location import ModelFiles
from .params import sizes, specs_for
from .tensor_values import MXFP4, Values, mxfp4_parts, weights

PARTS = ("norm_1", "qkv", "q", "k", "v", "sinks", "out", "norm_2", "router", "gate_up", "up", "down")  # of a layer, in its order


@dataclass(frozen=True)
class Weight:
    """A weight of a checkpoint."""

    key: str  # our name for it; the tensor's own where the architecture has none
    name: str  # the checkpoint's: of MXFP4 without its ending, with its rows where the tensor holds others too
    kind: str  # its dtype as safetensors spells it, or "MXFP4"
    values: Values  # MXFP4 decoded, [expert, row, column]
    stored: tuple[Tensor, ...]  # the bytes that hold it; blocks and scales of MXFP4
    transposed: bool = False  # [expert, column, row]: experts as matrices

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its values."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes that hold it."""
        return sum(t.nbytes for t in self.stored)

    @property
    def experts(self) -> int:
        """How many experts its first axis counts; 0 where it counts none."""
        return self.shape[0] if has_experts(self.stored[0], self.key) else 0


@dataclass(frozen=True)
class Side:
    """One of the two models: where it is, its open checkpoint and, where there is a config.json, its architecture."""

    files: ModelFiles
    checkpoint: Checkpoint
    family: ModuleType | None
    config: Any


def open_sides(a: ModelFiles, b: ModelFiles) -> tuple[Side, Side]:
    """Open two checkpoints; where one has no config.json the other's counts. Raises ToyllmError for models of two architectures."""

    def opened(files: ModelFiles, other: ModelFiles) -> Side:
        files = replace(files, config=files.config or other.config)
        return Side(files, open_checkpoint(files), *(load_config(files) if files.config else (None, None)))

    sides = opened(a, b), opened(b, a)
    require_one_family(*((side.files.name, side.family) for side in sides))
    return sides


def require_one_family(a: tuple[str, ModuleType | None], b: tuple[str, ModuleType | None]) -> None:
    """Raise ToyllmError where two models, each by its name and family, are of two architectures."""
    if a[1] is not b[1]:
        names = [str(family and family.__name__.rpartition(".")[2]) for _, family in (a, b)]
        raise ToyllmError(f"{a[0]} is a {names[0]}, {b[0]} a {names[1]}: they have nothing in common; compare two of one architecture")


def match_weights(a: Side, b: Side) -> list[tuple[Weight | None, Weight | None]]:
    """Every weight of either with the other's, in the order of the architecture, what that does not have last."""
    ours, theirs = gather(a), gather(b)
    if a.config is not None:
        ours, theirs = split_fused(ours, theirs, a.config), split_fused(theirs, ours, b.config)
        for weights_of, other, side in ((ours, theirs, b), (theirs, ours, a)):
            if "head" in weights_of and "head" not in other and "embed" in other and side.config.tie_word_embeddings:
                other["head"] = replace(other["embed"], key="head")
    return [turned(ours.get(key), theirs.get(key)) for key in sorted(ours | theirs, key=place)]


def gather(side: Side) -> dict[str, Weight]:
    """A checkpoint's weights by our names for them."""
    tensors, values = side.checkpoint.tensors, weights(side.checkpoint)
    keys = our_names(side)
    found: dict[str, Weight] = {}

    def add(key: str, weight: Weight) -> None:
        key = weight.name if key in found else key  # a weight that is there twice
        found[key] = replace(weight, key=key)

    for name, tensor in tensors.items():
        stem = name[: -len("_blocks")]
        if name not in keys or (name.endswith("scales") and mxfp4_parts(side.checkpoint, stem)):
            continue
        key = keys[name]
        if name.endswith("blocks") and (parts := mxfp4_parts(side.checkpoint, stem)):
            ours = key.removesuffix(".blocks") + ".weight" if key != name else stem
            add(ours, Weight(ours, stem, MXFP4, values[stem], tuple(tensors[part] for part in parts)))
            continue
        weight = Weight(key, name, tensor.dtype, values[name], (tensor,))
        add(key, replace(weight, transposed=bool(weight.experts) and key.endswith(".weight")))
    return found


def our_names(side: Side) -> dict[str, str]:
    """The names of a checkpoint's tensors -> ours, or themselves; without the buffers that no model reads."""
    names = side.checkpoint.tensors
    if side.family is None:
        return {name: name for name in names}
    family: Any = side.family
    ours = {spec.name: key for key, spec in specs_for(family, side.config, names).items()}
    bare = {name: next(name.removeprefix(p) for p in family.PREFIXES if name.startswith(p)) for name in names}
    return {name: ours.get(bare[name], name) for name in names if not family.IGNORED.fullmatch(bare[name])}


def split_fused(found: Mapping[str, Weight], other: Mapping[str, Weight], config: Any) -> dict[str, Weight]:
    """The weights with q, k and v taken apart where one tensor holds them here and three in the other checkpoint."""
    s = sizes(config)
    Q, KV = s.H * s.Dh, s.G * s.Dh
    rows = {"q": range(Q), "k": range(Q, Q + KV), "v": range(Q + KV, Q + 2 * KV)}
    split: dict[str, Weight] = {}
    for key, weight in found.items():
        layer, _, part = key.partition(".qkv.")
        if part and f"{layer}.q.{part}" in other and weight.shape[:1] == (Q + 2 * KV,):
            split |= {f"{layer}.{letter}.{part}": take_rows(weight, f"{layer}.{letter}.{part}", some) for letter, some in rows.items()}
        else:
            split[key] = weight
    return split


def take_rows(weight: Weight, key: str, rows: range) -> Weight:
    """Some rows of a plain tensor as a weight of their own."""
    (tensor,) = weight.stored
    width = tensor.nbytes // tensor.shape[0]
    shape = (len(rows), *tensor.shape[1:])
    stored = replace(tensor, shape=shape, offset=tensor.offset + rows.start * width, nbytes=len(rows) * width)
    values = replace(weight.values, axes=(rows, *weight.values.axes[1:]))
    return Weight(key, f"{weight.name}[{rows.start}:{rows.stop}]", weight.kind, values, (stored,))


def turned(a: Weight | None, b: Weight | None) -> tuple[Weight | None, Weight | None]:
    """A pair in one layout: experts as matrices are read as MXFP4 has them where the other's are in MXFP4."""
    if a is None or b is None or a.transposed == b.transposed:
        return a, b
    return (turn(a), b) if a.transposed else (a, turn(b))


def turn(weight: Weight) -> Weight:
    """Experts [expert, column, row] read as [expert, row, column]."""
    values = weight.values
    (experts, columns, rows), (E, C, R) = values.axes, values.whole
    swapped = replace(
        values, axes=(experts, rows, columns), whole=(E, R, C), fetch=lambda at: values.fetch((at[0], at[2], at[1])).swapaxes(1, 2)
    )
    return replace(weight, values=swapped, transposed=False)


def place(key: str) -> tuple[int, int, str]:
    """Where a weight comes in the order of the architecture."""
    layer, _, rest = key.partition(".")
    if layer.isdecimal() and rest:
        part, _, kind = rest.partition(".")
        return int(layer), PARTS.index(part) if part in PARTS else len(PARTS), "" if kind == "weight" else kind
    known = ("embed", "position", "norm_f", "head")
    known_at = known.index(layer) if layer in known else len(known)
    return (-1, known_at, "") if known_at < 2 else (2**31, known_at, key)
