"""What a model is made of and what it will take: counted from config.json and the headers of its files, without reading a weight.

    tensors   each an `Entry`: what it counts as, what a token does with it
    a model   an `Anatomy`: its tensors and its files, to the byte
    figures   sums over any tensors (`count`); what each of several machines would hold is in parts.py, what it takes to run in memory.py

A parameter is a weight of the model: MXFP4 codes are two a byte and their scales none; a tied embedding is one; buffers, and a head that
is stored although config.json ties it, are none, though their bytes count. Active parameters are those that a token is multiplied with:
of the experts k in E, of a tied embedding all, as it is the head, and none of a table from which a token only takes its row.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ..kernels.errors import ToyllmError
from . import gpt2, gpt_oss
from .checkpoint import Checkpoint, Tensor, open_checkpoint
from .config import load_config
from .json_files import read_object
from .location import ModelFiles
from .weights import Spec, match

COMPONENTS = ("embedding", "attention", "router", "experts", "mlp", "norms", "head", "not read")
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}  # bytes an element, of the dtypes that a config.json can promise
PROMISED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # config.json's names for them

log = logging.getLogger("toyllm")

# ---- sizes ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The dimensions that both families have, by the legend's letters; E = 0 without experts."""

    L: int
    D: int
    F: int
    V: int
    H: int
    G: int
    Dh: int
    E: int
    k: int
    windows: tuple[int | None, ...]  # a layer: the most positions that a query sees, None for all


def sizes(c: Any) -> Sizes:
    """The sizes of a family's configuration."""
    if isinstance(c, gpt2.Config):
        D, H = c.n_embd, c.n_head
        return Sizes(c.n_layer, D, c.inner, c.vocab_size, H, H, D // H, 0, 0, (None,) * c.n_layer)
    windows = tuple(c.sliding_window if slides else None for slides in c.sliding)
    heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
    experts = (c.num_local_experts, c.num_experts_per_tok)
    return Sizes(c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.vocab_size, *heads, *experts, windows)


def one_layer(c: Any, i: int) -> Any:
    """The configuration of a model that has layer i alone."""
    if isinstance(c, gpt2.Config):
        return replace(c, n_layer=1)
    return replace(c, num_hidden_layers=1, layer_types=(gpt_oss.SLIDING if c.sliding[i] else gpt_oss.FULL,))


def specs_for(family: ModuleType, c: Any, names: Iterable[str]) -> dict[str, Spec]:
    """The architecture's tensors in the dialect of a checkpoint with these names."""
    return gpt_oss.specs(c, frozenset(names)) if family is gpt_oss else family.specs(c)


# ---- tensors ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One tensor, or a part's share of one."""

    key: str  # ours, "3.qkv.weight"; empty for what the model does not read
    name: str  # the checkpoint's
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    nbytes: int
    component: str  # one of COMPONENTS
    share: tuple[int, int] = (1, 1)  # k and E: a token uses k in E of it
    shard_axis: int | None = None
    counted: bool = True  # as parameters
    multiplied: bool = True  # with every token
    looked_up: bool = False  # a token takes one row of it
    inputs: int | None = None  # the axis of inputs, of a dense matrix: what can be quantised

    @property
    def layer(self) -> int | None:
        """The layer that it belongs to."""
        first = self.key.partition(".")[0]
        return int(first) if first.isdecimal() else None

    @property
    def weights(self) -> int:
        """Weights that it holds, counted or not."""
        return math.prod(self.shape) * (2 if self.key.endswith(".blocks") else 0 if self.key.endswith(".scales") else 1)

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return self.weights if self.counted else 0

    @property
    def active(self) -> int:
        """Weights that a token is multiplied with or that are added to it."""
        k, E = self.share
        return self.weights * k // E if self.multiplied else 0

    @property
    def widened(self) -> int:
        """Bytes of the f32 copy that the engine makes of biases, norms and sinks on loading."""
        vector = self.multiplied and (len(self.shape) == 1 or self.key.endswith(".bias"))
        return 4 * math.prod(self.shape) if vector and self.dtype != "F32" else 0

    @property
    def read(self) -> int:
        """Bytes that one decoded token reads of it, as stored."""
        k, E = self.share
        row = self.nbytes // max(self.shape[0], 1) if self.looked_up and not self.multiplied else 0
        return (self.nbytes * k // E if self.multiplied else 0) + row

    @property
    def flops(self) -> int:
        """Operations on one decoded token: a product and a sum for each weight of a matrix."""
        return 2 * self.active if len(self.shape) > 1 and not self.key.endswith(".bias") else 0


def component_of(key: str, s: Sizes) -> str:
    """The component of a tensor by our name for it."""
    if key in ("embed", "position"):
        return "embedding"
    if key == "head":
        return "head"
    part = key.split(".")[0 if key.startswith("norm") else 1]
    if part.startswith("norm"):
        return "norms"
    if part in ("up", "down", "gate_up"):
        return "experts" if s.E else "mlp"
    return "router" if part == "router" else "attention"


def inputs_axis(key: str, component: str, c: Any) -> int | None:
    """The axis of inputs of a dense matrix, or of each expert's: 0 in GPT-2's Conv1D, 1 in all others; None for what is none."""
    if key in ("embed", "head"):
        return 1
    if not key.endswith(".weight") or component not in ("attention", "mlp", "experts"):
        return None
    return 0 if isinstance(c, gpt2.Config) else 1


def entry(key: str, spec: Spec, name: str, dtype: str, nbytes: int, c: Any) -> Entry:
    """The entry of a tensor of the architecture."""
    s = sizes(c)
    component, tied = component_of(key, s), c.tie_word_embeddings
    made = Entry(key, name, dtype, spec.shape, nbytes, component, shard_axis=spec.shard_axis, inputs=inputs_axis(key, component, c))
    if component == "embedding":
        return replace(made, looked_up=True, multiplied=key == "embed" and tied)
    if component == "head" and tied:
        return replace(made, counted=False, multiplied=False)
    return replace(made, share=(s.k, s.E)) if component == "experts" else made


def stored_entries(checkpoint: Checkpoint, family: ModuleType, c: Any) -> tuple[Entry, ...]:
    """An entry for each tensor of a checkpoint, in file order. Raises ToyllmError where they are not the architecture's."""
    specs = specs_for(family, c, checkpoint.tensors)
    keys = {t.name: key for key, t in match(checkpoint, specs, family.PREFIXES, family.IGNORED).items()}

    def made(t: Tensor) -> Entry:
        if t.name not in keys:
            return Entry("", t.name, t.dtype, t.shape, t.nbytes, "not read", counted=False, multiplied=False)
        return entry(keys[t.name], specs[keys[t.name]], t.name, t.dtype, t.nbytes, c)

    entries = tuple(made(t) for t in checkpoint.tensors.values())
    for e in entries:
        if e.component == "head" and not e.counted:
            log.info("%s is stored although config.json ties it to the embedding: its bytes count, its parameters do not", e.name)
    return entries


def promised_entries(family: ModuleType, c: Any, document: dict[str, Any]) -> tuple[Entry, ...]:
    """An entry for each tensor that a config.json promises, in the dtypes and the dialect that it tells."""
    said = document.get("dtype", document.get("torch_dtype"))
    dtype = PROMISED.get(said if isinstance(said, str) else "", "BF16" if family is gpt_oss else "F32")
    prefix, names = family.PREFIXES[0], ()
    if "model_type" not in document:
        prefix, names = "", ("embedding.weight",)  # OpenAI's own, always in MXFP4
    quantization = document.get("quantization_config")
    if not names and not (isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"):
        names = ("experts.gate_up_proj",)  # dequantised: as transformers reads such a config.json
    entries = []
    for key, spec in specs_for(family, c, names).items():
        if not spec.optional:
            kind = "U8" if key.endswith((".blocks", ".scales")) else dtype
            name = spec.name if key == "head" else prefix + spec.name
            entries.append(entry(key, spec, name, kind, math.prod(spec.shape) * WIDTHS[kind], c))
    return tuple(entries)


# ---- files ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """The bytes of one file of weights: header (8 bytes of length, JSON and its padding) and tensors, which are all there is."""

    path: Path
    nbytes: int
    header: int
    padding: int  # of the header: spaces at its end
    tensors: int


def file_sizes(checkpoint: Checkpoint) -> tuple[File, ...]:
    """Every byte of a checkpoint's files. Raises ToyllmError where header and tensors are not all of a file."""
    found = []
    for path, mapped in checkpoint.maps.items():
        header = 8 + int.from_bytes(mapped[:8], "little")
        tensors = sum(t.nbytes for t in checkpoint.tensors.values() if t.path == path)
        size = path.stat().st_size
        if header + tensors != size:
            raise ToyllmError(f"{path}: header {header:,} and tensors {tensors:,} bytes are {header + tensors:,}, the file has {size:,}")
        text = mapped[8:header]
        found.append(File(path, size, header, len(text) - len(text.rstrip(b" ")), tensors))
    return tuple(found)


# ---- a model --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anatomy:
    """A model by its headers, or by its config.json alone: then without files."""

    family: ModuleType
    config: Any
    entries: tuple[Entry, ...]
    files: tuple[File, ...] = ()


def anatomy(files: ModelFiles) -> Anatomy:
    """Open a model's headers; its config.json alone where there are no weights. Raises ToyllmError."""
    family, config = load_config(files)
    if files.weights is None and files.index is None and files.config is not None:
        return Anatomy(family, config, promised_entries(family, config, read_object(files.config)))
    checkpoint = open_checkpoint(files)
    return Anatomy(family, config, stored_entries(checkpoint, family, config), file_sizes(checkpoint))


# ---- figures ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """Sums over tensors."""

    parameters: int
    active: int
    nbytes: int
    counted: int  # bytes of what is counted as parameters

    @property
    def bits(self) -> float | None:
        """Bits a parameter takes, scales included; None without any."""
        return 8 * self.counted / self.parameters if self.parameters else None


def count(entries: Iterable[Entry]) -> Count:
    """Parameters, those of them active for a token, and bytes."""
    entries = tuple(entries)
    stored = sum(e.nbytes for e in entries)
    return Count(sum(e.parameters for e in entries), sum(e.active for e in entries), stored, sum(e.nbytes for e in entries if e.counted))
