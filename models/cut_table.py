"""Which tensors a cut checkpoint has, and from which of the source's each is made: the architecture's table, held against the source."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..kernels.errors import ToyllmError
from .checkpoint import DTYPES, Checkpoint, Tensor, open_checkpoint
from .config import load_config
from .cut_config import renumbered
from .cut_tensors import Made, Pieces, Rows, decoded, encoded, kept
from .gpt_oss import has_dense_experts
from .location import ModelFiles
from .params import sizes, specs_for
from .tensor_values import MXFP4
from .weights import Spec, match, matrix, mxfp4_bytes

HF, BARE, ORIGINAL = "hf", "bare", "original"
DIALECTS = {"gpt2": (HF, BARE), "gpt_oss": (HF, BARE, ORIGINAL)}  # by the family's module
OPENAI_MARK, DENSE_MARK = "embedding.weight", "experts.gate_up_proj"  # the names that tell gpt_oss.specs its dialects
MATRICES = ("gate_up", "down")  # of experts
LAST = 2**31  # stands after every layer


@dataclass(frozen=True)
class Source:
    """A checkpoint to cut: its tensors by our names."""

    files: ModelFiles
    family: ModuleType
    config: Any
    checkpoint: Checkpoint
    found: Mapping[str, Tensor]

    @property
    def family_name(self) -> str:
        """The family's module: "gpt2" or "gpt_oss"."""
        return self.family.__name__.rpartition(".")[2]

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return sizes(self.config).E > 0

    @property
    def dense(self) -> bool:
        """Whether its experts are stored as matrices."""
        return has_dense_experts(frozenset(self.checkpoint.tensors))

    @property
    def dialect(self) -> str:
        """How its tensors are named: OpenAI's own way, or Hugging Face's with the prefix, without, or with both mixed."""
        if self.family_name == "gpt_oss" and any(t.name.endswith(OPENAI_MARK) for t in self.found.values()):
            return ORIGINAL
        prefixed = {t.name.startswith(self.family.PREFIXES[0]) for key, t in self.found.items() if key != "head"}
        return "mixed" if len(prefixed) > 1 else HF if True in prefixed else BARE


@dataclass(frozen=True)
class Kept:
    """What is kept of a source, and what of it changes."""

    layers: tuple[int, ...]
    experts: tuple[int, ...]  # none, where the model has none
    dialect: str | None = None
    dtype: str | None = None  # of everything stored as floats
    expert_dtype: str | None = None  # of the experts' matrices alone; "MXFP4" too


def open_source(files: ModelFiles) -> Source:
    """Open a checkpoint by its headers. Raises ToyllmError for one that no model could be loaded from."""
    family, config = load_config(files)
    checkpoint = open_checkpoint(files)
    found = match(checkpoint, specs_for(family, config, checkpoint.tensors), family.PREFIXES, family.IGNORED)
    for key, tensor in found.items():
        (mxfp4_bytes if is_mxfp4(key) else matrix)(checkpoint, tensor)  # for the dtypes that they refuse
    return Source(files, family, config, checkpoint, found)


def is_mxfp4(key: str) -> bool:
    """Whether a tensor is one half of MXFP4 weights."""
    return key.endswith((".blocks", ".scales"))


def make_tensors(source: Source, new: Any, keep: Kept) -> tuple[list[Made], list[str]]:
    """The tensors of the configuration `new`, in a token's order, and the names of the buffers that have no place in its dialect.

    Raises ToyllmError for what the dialect has no names for, and for weights that cannot be brought into it.
    """
    openai = (keep.dialect or source.dialect) == ORIGINAL
    dense = keep.expert_dtype != MXFP4 if keep.expert_dtype else source.dense
    if openai and dense:
        raise ToyllmError("the original dialect names experts in MXFP4 alone: add --expert-dtype mxfp4, or --dialect hf")
    s = sizes(new)
    if source.dense and not dense and (s.D % 32 or s.F % 32):
        raise ToyllmError(f"--expert-dtype mxfp4: needs sizes that are multiples of 32, found hidden {s.D}, intermediate {s.F}")
    marks = [mark for mark, there in ((OPENAI_MARK, openai), (DENSE_MARK, dense)) if there]
    made = [make_tensor(source, key, spec, keep) for key, spec in specs_for(source.family, new, marks).items()]
    tensors = [t for t in made if t is not None]
    buffers = {t.name: make_buffer(source, t, keep) for t in source.checkpoint.tensors.values() if t not in source.found.values()}
    taken = {t.name for t in tensors}
    left_out = [name for name, t in buffers.items() if t is not None and (openai or t.name in taken)]
    tensors += [t for name, t in buffers.items() if t is not None and name not in left_out]
    return sorted(tensors, key=depth), left_out


def depth(t: Made) -> int:
    """Where a token comes by a tensor: at the embedding, in a layer, or after them."""
    first = t.key.partition(".")[0]
    return int(first) if first.isdecimal() else -1 if first in ("embed", "position") else LAST


def make_tensor(source: Source, key: str, spec: Spec, keep: Kept) -> Made | None:
    """The result's tensor `key`; None for one that the source has not, an optional head."""
    layer, _, rest = key.partition(".")
    was = f"{keep.layers[int(layer)]}.{rest}" if layer.isdecimal() else key
    stem, _, part = was.rpartition(".")
    is_matrix = source.has_experts and layer.isdecimal() and rest.partition(".")[0] in MATRICES and part != "bias"
    dtype = (keep.expert_dtype or keep.dtype) if is_matrix else keep.dtype

    if is_matrix and was not in source.found:
        return recode(source, key, stem, part, spec, keep)
    parts = parts_of(source, was, keep)
    if not parts:
        return None
    stored = {p.tensor.dtype for p in parts}
    if is_mxfp4(key):
        dtype = "U8"
    elif dtype is None and len(stored) > 1:
        names = ", ".join(f"{p.tensor.name} {p.tensor.dtype}" for p in parts)
        raise ToyllmError(f"{parts[0].tensor.path}: {names}: one dtype is needed where they become one tensor; choose it with --dtype")
    first = parts[0].tensor
    dtype = dtype or first.dtype
    return made(source, key, spec, keep, first, MXFP4 if is_mxfp4(key) else first.dtype, dtype, kept(source.checkpoint, parts, dtype))


def parts_of(source: Source, was: str, keep: Kept) -> list[Rows]:
    """The rows that make up a tensor, by our name for it in the source; none, where the source has it in no form."""
    found, (stem, _, part) = source.found, was.rpartition(".")
    layer, _, name = stem.partition(".")
    if was in found:
        stacked = source.has_experts and name in ("router", *MATRICES)
        fewer = stacked and len(keep.experts) < found[was].shape[0]
        return [Rows(found[was], tuple(range(e, e + 1) for e in keep.experts) if fewer else None)]
    if name == "qkv":
        return [Rows(found[f"{layer}.{p}.{part}"]) for p in "qkv"]
    if name in ("q", "k", "v") and f"{layer}.qkv.{part}" in found:
        s = sizes(source.config)
        ends = (0, s.H * s.Dh, (s.H + s.G) * s.Dh, (s.H + 2 * s.G) * s.Dh)
        n = "qkv".index(name)
        return [Rows(found[f"{layer}.qkv.{part}"], (range(ends[n], ends[n + 1]),))]
    return []


def recode(source: Source, key: str, stem: str, part: str, spec: Spec, keep: Kept) -> Made:
    """Experts' weights that the source has in the other form: a matrix out of MXFP4, or one half of MXFP4 out of a matrix."""
    found, checkpoint = source.found, source.checkpoint
    if part == "weight":
        blocks, scales, dtype = found[f"{stem}.blocks"], found[f"{stem}.scales"], str(keep.expert_dtype)
        return made(source, key, spec, keep, blocks, MXFP4, dtype, decoded(checkpoint, blocks, scales, keep.experts, dtype))
    dense = found[f"{stem}.weight"]
    return made(source, key, spec, keep, dense, dense.dtype, "U8", encoded(checkpoint, dense, keep.experts, part))


def made(source: Source, key: str, spec: Spec, keep: Kept, first: Tensor, was: str, dtype: str, pieces: Pieces) -> Made:
    """A tensor of the result under its name; without a new dialect, the prefix is that of the tensor it comes from."""
    prefixes = source.family.PREFIXES
    prefix = next(p for p in prefixes if first.name.startswith(p))
    if keep.dialect is not None:
        prefix = prefixes[0] if keep.dialect == HF and key != "head" else ""
    nbytes = math.prod(spec.shape) * DTYPES[dtype].itemsize
    return Made(key, prefix + spec.name, was, dtype, spec.shape, nbytes, first.path, pieces)


def make_buffer(source: Source, t: Tensor, keep: Kept) -> Made | None:
    """A buffer that the model does not read, as it is, with its layer's new number; None with a layer that is not kept."""
    name = renumbered(t.name, keep.layers)
    if name is None:
        return None
    prefixes = source.family.PREFIXES
    bare = next(name.removeprefix(p) for p in prefixes if name.startswith(p))
    name = name if keep.dialect is None else f"{prefixes[0] if keep.dialect == HF else ''}{bare}"
    return Made("", name, t.dtype, t.dtype, t.shape, t.nbytes, t.path, kept(source.checkpoint, [Rows(t)], t.dtype))
