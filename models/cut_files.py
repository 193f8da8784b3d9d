"""The files of a cut checkpoint: tensors shared out to shards, the bytes around them, and which folder may be replaced."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kernels.errors import ToyllmError
from .checkpoint import DTYPES
from .cut_tensors import Made, Rounding
from .json_files import read_object
from .location import INDEX, WEIGHTS

RECORD, RECORD_SCHEMA = "cut.json", "toyllm.cut-record/1"
MAX_RECORD = 2**16  # bytes of a cut.json that is taken over into the next one
NUMBERS = re.compile(r"\[\n\s*(\d[\d,\s]*?)\n\s*\]")  # no string has a line break in JSON
ENTRY_BYTES = 120  # of a tensor in a header, at most, beside its name and shape

Metadata = dict[str, str]


@dataclass(frozen=True)
class Shard:
    """A file of weights to write: its header, and the tensors in the order in which they follow it."""

    name: str
    header: bytes
    tensors: tuple[Made, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)


# ---- shards -----------------------------------------------------------------------------------------------------------------


def make_shards(tensors: Sequence[Made], metadata: Metadata, size: int | None, merge: bool) -> tuple[Shard, ...]:
    """The files that hold these tensors: one with `merge`, files of at most `size` bytes, else as many as the source has.

    Raises ToyllmError for a size that a tensor alone exceeds.
    """
    if merge:
        groups = [list(tensors)]
    elif size is not None:
        groups = groups_of(tensors, metadata, size)
    else:
        groups = [[t for t in tensors if t.home == home] for home in sorted({t.home for t in tensors})]
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    names = [WEIGHTS] if len(groups) == 1 else names
    return tuple(make_shard(name, group, metadata) for name, group in zip(names, groups, strict=True))


def groups_of(tensors: Sequence[Made], metadata: Metadata, size: int) -> list[list[Made]]:
    """The tensors in their order, a new group where the file would exceed `size`; a header is taken for a little more than it will be."""
    empty = len(header_of((), metadata)) + 8
    groups: list[list[Made]] = [[]]
    filled = empty
    for t in tensors:
        needed = t.nbytes + len(json.dumps(t.name)) + len(json.dumps(t.shape)) + ENTRY_BYTES
        if empty + needed > size:
            raise ToyllmError(f"--shard-size {size:,}: tensor {t.name} alone takes {empty + needed:,} bytes; tensors are not divided")
        if filled + needed > size and groups[-1]:
            groups.append([])
            filled = empty
        groups[-1].append(t)
        filled += needed
    return groups


def make_shard(name: str, tensors: Sequence[Made], metadata: Metadata) -> Shard:
    """A file with its tensors as the safetensors library lays them out: wide dtypes first, so that all are aligned, then by name."""
    ordered = tuple(sorted(tensors, key=lambda t: (-DTYPES[t.dtype].itemsize, t.name)))
    return Shard(name, header_of(ordered, metadata), ordered)


def header_of(tensors: Sequence[Made], metadata: Metadata) -> bytes:
    """What a safetensors file begins with: the length of its JSON in 8 bytes, then that, spaces up to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for t in tensors:
        begin, end = end, end + t.nbytes
        header[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_of(shards: Sequence[Shard]) -> dict[str, bytes]:
    """The index by its file's name, where there is more than one shard."""
    if len(shards) == 1:
        return {}
    place = {t.name: shard.name for shard in shards for t in shard.tensors}
    size = sum(t.nbytes for shard in shards for t in shard.tensors)
    return {INDEX: json_bytes({"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))})}


def json_bytes(document: dict[str, Any]) -> bytes:
    """A JSON document as the small files have it, lists of numbers on one line each."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    text = NUMBERS.sub(lambda found: f"[{', '.join(found[1].replace(',', ' ').split())}]", text)
    return (text + "\n").encode()


# ---- writing ----------------------------------------------------------------------------------------------------------------


def write_shard(folder: Path, shard: Shard, rounding: Rounding, advance: Callable[[int], None]) -> None:
    """Write one file of weights, calling advance(bytes) after each piece of a tensor."""
    with (folder / shard.name).open("xb") as file:
        file.write(shard.header)
        for tensor in shard.tensors:
            left = tensor.nbytes
            for piece in tensor.pieces(rounding):
                file.write(piece.reshape(-1).view("u1").data)
                left -= piece.nbytes
                advance(piece.nbytes)
            if left:
                raise ToyllmError(f"{tensor.home}: changed while open: {tensor.name} came out {left:,} bytes short of {tensor.nbytes:,}")


def check_folder(path: Path, force: bool) -> None:
    """Raise ToyllmError where no folder can be made at `path`: nowhere to put it, or something there that is not to be replaced."""
    if not path.parent.is_dir():
        raise ToyllmError(f"{path}: no folder {path.parent} to make it in")
    if not os.path.lexists(path):
        return
    if not force:
        raise ToyllmError(f"{path}: is there already; name another folder, or replace what `toyllm cut` wrote there with --force")
    if path.is_symlink() or not path.is_dir() or not is_cut(path):
        raise ToyllmError(f"{path}: no folder that `toyllm cut` wrote, so --force does not replace it; name another, or remove it yourself")


def is_cut(folder: Path) -> bool:
    """Whether a folder is empty, or holds a record of a cut and nothing but files."""
    inside = list(folder.iterdir())
    if any(path.is_dir() for path in inside):
        return False
    return not inside or read_record(folder) is not None


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a folder's cut.json says; None where there is none that toyllm wrote."""
    path = folder / RECORD
    try:
        record = read_object(path) if path.is_file() and path.stat().st_size <= MAX_RECORD else {}
    except ToyllmError:
        return None
    return record if record.get("schema") == RECORD_SCHEMA else None


def check_room(path: Path, nbytes: int) -> None:
    """Raise ToyllmError where the disk has not so many bytes free."""
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise ToyllmError(f"{path}: {nbytes:,} bytes to write, {free:,} free on this disk; make room, or keep less")
