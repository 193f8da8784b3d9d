"""A smaller checkpoint out of a real one, or the same in other names, dtypes and files: planned to the byte, then written.

A plan reads headers, and a few kilobytes of each tensor for the fingerprint. Its tensors are those of the architecture's table for the
configuration that remains, in the dialect that is wanted; each is made from rows of the source's (see cut_tensors.py), a few megabytes at
a time. The same plan writes the same bytes. Beside config.json stands cut.json, the record, which each file of weights has in its
__metadata__ too, under "toyllm.cut":

    {"schema": "toyllm.cut-record/1", "toyllm": version,
     "source": {"model": as it was named, "fingerprint": "sha256:…", "tensors", "bytes", "cut": the source's own record, or null},
     "layers": {"kept": [0, 1], "of": 24}, "experts": {"kept": […], "of": 32, "per_token": 4, "of_per_token": 4} or null,
     "dialect": {"from": "original", "to": "hf"}, "conversions": [{"from": "MXFP4", "to": "BF16", "weights": 4, "exact": true}],
     "left_out": [buffers that the dialect has no place for]}

The fingerprint is the SHA-256 of every tensor's name, dtype, shape, and first and last 4,096 bytes, by name: however a model's tensors
are shared out to files it is the same, and two trained models differ in it.
"""

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .. import __version__
from ..kernels.errors import ToyllmError
from .checkpoint import Checkpoint, require_inside
from .cut_config import is_openai, require_same, smaller, special_tokens, write_config
from .cut_files import (
    RECORD,
    RECORD_SCHEMA,
    Shard,
    check_folder,
    check_room,
    index_of,
    json_bytes,
    make_shards,
    read_record,
    write_shard,
)
from .cut_table import DIALECTS, ORIGINAL, Kept, Source, make_tensors, open_source
from .cut_tensors import EXACT, Made, Rounding
from .json_files import read_object
from .location import ModelFiles, find_model, list_files
from .params import count, entry, sizes
from .tensor_values import MXFP4
from .weights import Spec
from .whole import whole_folder

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "LICENSE*",
    "NOTICE*",
    "USAGE_POLICY*",
)
GENERATION = "generation_config.json"
SAMPLE = 4096  # bytes at each end of a tensor that the fingerprint looks at

log = logging.getLogger("toyllm")

Choice = int | tuple[int, ...] | None  # the first so many, these, or all


@dataclass(frozen=True)
class Wanted:
    """What to cut. Dtypes are safetensors' names, and "MXFP4" for the experts."""

    layers: Choice = None
    experts: Choice = None
    dialect: str | None = None  # one of cut_table.DIALECTS
    dtype: str | None = None  # of everything stored as floats
    expert_dtype: str | None = None  # of the experts' matrices alone
    shard_size: int | None = None  # bytes of a file, at most
    merge: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that will be written."""

    config: Any
    record: dict[str, Any]
    shards: tuple[Shard, ...]
    documents: dict[str, bytes]  # small files that are made
    copies: tuple[Path, ...]  # small files that are copied

    @property
    def tensors(self) -> list[Made]:
        """All tensors, by file."""
        return [t for shard in self.shards for t in shard.tensors]

    @property
    def parameters(self) -> int:
        """What `params` will count."""
        return count(entry(t.key, Spec(t.name, t.shape), t.name, t.dtype, t.nbytes, self.config) for t in self.tensors if t.key).parameters

    @property
    def files(self) -> dict[str, int]:
        """Every file's name and bytes: weights, documents, copies."""
        found = {shard.name: shard.nbytes for shard in self.shards}
        found |= {name: len(data) for name, data in self.documents.items()}
        return found | {path.name: path.stat().st_size for path in self.copies}

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


# ---- planning ---------------------------------------------------------------------------------------------------------------


def make_plan(files: ModelFiles, wanted: Wanted) -> Plan:
    """Plan a cut of a model. Nothing is written. Raises ToyllmError for what it has not, or what cannot be had."""
    source = open_source(files)
    keep = what_to_keep(source, wanted)
    new = smaller(source.config, keep.layers, keep.experts)
    require_scales_kept(source, keep)
    tensors, left_out = make_tensors(source, new, keep)
    if left_out:
        log.info("%d buffers that the model does not read are left out, such as %s", len(left_out), left_out[0])
    record = make_record(source, keep, new, tensors, left_out)
    metadata = {"format": "pt", "toyllm.cut": json.dumps(record, separators=(",", ":"), ensure_ascii=False)}
    shards = make_shards(tensors, metadata, wanted.shard_size, wanted.merge)

    small = make_documents(source, new, keep) | {RECORD: json_bytes(record)} | index_of(shards)
    copies = sorted(path for path in files.folder.iterdir() if path.is_file() and any(fnmatch(path.name, pattern) for pattern in COPIED))
    for copy in copies:
        require_inside(copy, files.folder)
    return Plan(new, record, shards, small, tuple(path for path in copies if path.name not in small))


def what_to_keep(source: Source, wanted: Wanted) -> Kept:
    """The layers and experts that are meant, and changes that this family can have. Raises ToyllmError."""
    s, known = sizes(source.config), DIALECTS[source.family_name]
    if wanted.dialect is not None and wanted.dialect not in known:
        raise ToyllmError(f"--dialect {wanted.dialect}: {source.family_name} has the dialects {', '.join(known)}")
    for option, given in (("--experts", wanted.experts), ("--expert-dtype", wanted.expert_dtype)):
        if given is not None and not s.E:
            raise ToyllmError(f"{option}: {source.files.name} is {source.family_name}, which has no experts; leave it out")
    layers = chosen(wanted.layers, s.L, "--layers")
    experts = chosen(wanted.experts, s.E, "--experts") if s.E else ()
    if s.E and len(experts) < s.k:
        log.info("a token goes to %d of the experts instead of %d: --experts keeps no more", len(experts), s.k)
    return Kept(layers, experts, wanted.dialect, wanted.dtype, wanted.expert_dtype)


def chosen(choice: Choice, of: int, option: str) -> tuple[int, ...]:
    """The numbers that a choice means. Raises ToyllmError for those that are not there, and for another order."""
    if choice is None:
        return tuple(range(of))
    if isinstance(choice, int):
        if not 1 <= choice <= of:
            raise ToyllmError(f"{option} {choice}: expected the first 1 to {of}, or a list of numbers from 0 to {of - 1}")
        return tuple(range(choice))
    if not choice or list(choice) != sorted({n for n in choice if 0 <= n < of}):
        raise ToyllmError(
            f"{option} {','.join(map(str, choice))[:80]}: expected ascending numbers from 0 to {of - 1}, which this model has"
        )
    return choice


def require_scales_kept(source: Source, keep: Kept) -> None:
    """Raise ToyllmError where a GPT-2 scales its scores by each layer's number, and layers would get other numbers."""
    moved = next(((old, new) for new, old in enumerate(keep.layers) if old != new), None)
    if moved and getattr(source.config, "scale_attn_by_inverse_layer_idx", False):
        raise ToyllmError(
            f"{source.files.config}: scale_attn_by_inverse_layer_idx: layer {moved[0]} would run as layer {moved[1]}, whose scores are "
            f"scaled differently; keep the first layers, as --layers {len(keep.layers)} does"
        )


def make_documents(source: Source, new: Any, keep: Kept) -> dict[str, bytes]:
    """config.json; and generation_config.json where it has to say what config.json said before."""
    where, generation = source.files.config, source.files.generation_config
    document = read_object(where) if where else {}
    defaults = read_object(generation) if generation else {}
    was_openai = source.family_name == "gpt_oss" and is_openai(document)
    openai = keep.dialect == ORIGINAL or (keep.dialect is None and was_openai)
    dense = keep.expert_dtype != MXFP4 if keep.expert_dtype else source.dense
    made = write_config(document, defaults, new, keep.layers, dense, openai, keep.dtype)
    require_same(source.family, made, new, where or source.files.folder)
    documents = {"config.json": json_bytes(made)}
    said = special_tokens(document) | defaults
    if openai and not was_openai and said != defaults:
        documents[GENERATION] = json_bytes(said)
    return documents


def make_record(source: Source, keep: Kept, new: Any, tensors: list[Made], left_out: list[str]) -> dict[str, Any]:
    """What cut.json says."""
    before, after, stored = sizes(source.config), sizes(new), source.checkpoint.tensors
    weights = [t for t in tensors if not t.key.endswith(".scales")]
    conversions = Counter((t.source, t.becomes) for t in weights if t.source != t.becomes)
    experts = {"kept": list(keep.experts), "of": before.E, "per_token": after.k, "of_per_token": before.k}
    return {
        "schema": RECORD_SCHEMA,
        "toyllm": __version__,
        "source": {
            "model": source.files.name,
            "fingerprint": fingerprint(source.checkpoint),
            "tensors": len(stored),
            "bytes": sum(t.nbytes for t in stored.values()),
            "cut": read_record(source.files.folder),
        },
        "layers": {"kept": list(keep.layers), "of": before.L},
        "experts": experts if before.E else None,
        "dialect": {"from": source.dialect, "to": keep.dialect or source.dialect},
        "conversions": [
            {"from": was, "to": to, "weights": n, "exact": to == MXFP4 or (was, to) in EXACT}
            for (was, to), n in sorted(conversions.items())
        ],
        "left_out": left_out,
    }


def fingerprint(checkpoint: Checkpoint) -> str:
    """The SHA-256 of every tensor's name, dtype, shape, and first and last 4,096 bytes, by name."""
    digest = hashlib.sha256()
    for name, t in sorted(checkpoint.tensors.items()):
        mapped, end = checkpoint.maps[t.path], t.offset + t.nbytes
        digest.update(json.dumps([name, t.dtype, t.shape]).encode())
        digest.update(mapped[t.offset : min(t.offset + SAMPLE, end)])
        digest.update(mapped[max(end - SAMPLE, t.offset) : end])
    return f"sha256:{digest.hexdigest()}"


# ---- writing ----------------------------------------------------------------------------------------------------------------


def check_out(out: Path, nbytes: int, force: bool) -> Path:
    """The absolute path of the folder to make. Raises ToyllmError where it cannot be made, or the disk has no room for it."""
    path = out.absolute()
    check_folder(path, force)
    check_room(path, nbytes)
    return path


def write(plan: Plan, out: Path, force: bool = False, progress: Callable[[int, int], None] | None = None) -> Rounding:
    """Write the folder `out`, whole or not at all, calling progress(bytes done, bytes in all); gives what conversions have changed.

    Raises ToyllmError for a folder that is there already, a disk without room, and values that a dtype cannot hold; nothing is left then.
    """
    path = check_out(out, plan.nbytes, force)
    rounding, done, total = Rounding(), 0, sum(t.nbytes for t in plan.tensors)

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    with whole_folder(path, lambda: check_folder(path, force)) as partial:
        for shard in plan.shards:
            write_shard(partial, shard, rounding, advance)
        for name, data in plan.documents.items():
            (partial / name).write_bytes(data)
        for copy in plan.copies:
            shutil.copyfile(copy, partial / copy.name)
        open_source(list_files(out.name, partial))  # it loads, or it does not appear
    return rounding


def cut(model: str, out: Path, wanted: Wanted, force: bool = False) -> Plan:
    """Cut a model, named as everywhere, into the folder `out`. Raises ToyllmError; see `make_plan` and `write`."""
    plan = make_plan(find_model(model), wanted)
    write(plan, out, force)
    return plan
