"""Checkpoints: safetensors files, memory-mapped and never copied, alone or as the shards of an index.

Two readers must agree on every file: the one here, which says where a header and its file differ and refuses duplicate names,
and the safetensors library's, so that nothing is accepted that the library refuses.
"""

import errno
import math
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from ..kernels.dtypes import BF16, F16, F32
from ..kernels.errors import ToyllmError
from .json_files import MAX_JSON, brief, parse_object, read_object, require_file, unreadable
from .location import ModelFiles

# By safetensors' names. The others (F8_E4M3, F4, C64, …) are listed, but no array is made of them.
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": F32,
    "F16": F16,
    "BF16": BF16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype(bool),
}

# How other files begin. Looked up only where the first 8 bytes are no length of a header, as theirs never are.
FOREIGN = (
    ((b"version ",), "a Git LFS pointer, not the weights; fetch them with `git lfs pull`"),
    ((b"GGUF",), "a GGUF file, not safetensors; get the model as safetensors"),
    ((b"PK\x03\x04",), "a zip archive as torch.save writes it; pickles are never opened: get the model as safetensors"),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a pickle; pickles are never opened: get the model as safetensors"),
)
NOT_OPENED = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")

MAX_RANK, MAX_ELEMENTS = 64, 2**59  # what a NumPy array can have, were each element 16 bytes
MAX_EMPTY = 2**20  # places in the axes of a tensor without elements: no bytes of the file bound what walking along them costs
LONGEST = 1000  # characters of a name, a tensor's or a shard's with its folders: messages, lists and tables show names whole


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: what its header says, and where its bytes are."""

    name: str
    dtype: str  # as safetensors spells it: "BF16"
    shape: tuple[int, ...]
    path: Path
    offset: int  # in bytes from the start of the file; may be odd
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """Open weights: every tensor by name, in file order, and one read-only memory map a file."""

    tensors: dict[str, Tensor]
    maps: dict[Path, mmap.mmap] = field(repr=False)

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files, in the order of their names."""
        return tuple(self.maps)

    def array(self, name: str) -> np.ndarray:
        """View a tensor's bytes where they are mapped: read-only, in the stored dtype, perhaps unaligned.

        The map lives as long as the checkpoint or any array of it. Raises ToyllmError for an unknown name, a dtype that
        toyllm has no array for, and a file that has shrunk since it was opened (touching its lost pages would kill the process).
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ToyllmError(f"{self.shards[0].parent}: no tensor {brief(name)} in this checkpoint; `toyllm params` lists them")
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None:
            known = ", ".join(DTYPES)
            raise ToyllmError(f"{tensor.path}: tensor {brief(name)} has dtype {tensor.dtype}; toyllm reads {known}")
        mapped = self.maps[tensor.path]
        end, size = tensor.offset + tensor.nbytes, min(len(mapped), mapped.size())
        if end > size:
            raise ToyllmError(f"{tensor.path}: changed while open: tensor {brief(name)} ends at byte {end:,}, the file now at {size:,}")
        return np.ndarray(tensor.shape, dtype, buffer=mapped, offset=tensor.offset)

    def check_whole(self) -> None:
        """Raise ToyllmError where a file has shrunk since it was opened. Costs a question to the system a file."""
        for path, mapped in self.maps.items():
            size = mapped.size()
            if size < len(mapped):
                raise ToyllmError(f"{path}: changed while open: it had {len(mapped):,} bytes, and has {size:,} now; download it again")


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """Map a model's weights: the single file, or every shard that its index names. Nothing but headers is read.

    Raises ToyllmError where there are no safetensors weights, where a file or the index is damaged or foreign, and where
    index and shards disagree.
    """
    if files.weights is not None:
        return map_files([files.weights])
    if files.index is None:
        raise no_weights(files.folder)
    weight_map = read_index(files.index)
    checkpoint = map_files(sorted(set(weight_map.values())))
    for name, path in weight_map.items():
        if name not in checkpoint.tensors or checkpoint.tensors[name].path != path:
            raise ToyllmError(f"{path}: no tensor {brief(name)}, which {files.index.name} says is there; download both again")
    return checkpoint


def map_files(paths: Iterable[Path]) -> Checkpoint:
    """Map all files as one checkpoint. Raises ToyllmError for a name that two of them hold."""
    tensors: dict[str, Tensor] = {}
    maps: dict[Path, mmap.mmap] = {}
    for path in paths:
        maps[path], found = map_file(path)
        for tensor in found:
            if tensor.name in tensors:
                other = tensors[tensor.name].path.name
                raise ToyllmError(f"{path}: tensor {brief(tensor.name)} is in {other} too; only one shard may hold it")
            tensors[tensor.name] = tensor
    return Checkpoint(tensors, maps)


def no_weights(folder: Path) -> ToyllmError:
    """Say that a folder has no safetensors, and what it has instead."""
    others = sorted(path.name for path in folder.glob("*") if path.suffix in NOT_OPENED)
    if not others:
        return ToyllmError(f"{folder}: neither model.safetensors nor model.safetensors.index.json; `toyllm pull REPO` fetches a model")
    return ToyllmError(
        f"{folder}: no safetensors weights, only {brief(', '.join(others))}; pickles can run code and are never opened, nor are other "
        "formats: `toyllm pull` a repository with safetensors, or save the model again with transformers' save_pretrained()"
    )


def read_index(index: Path) -> dict[str, Path]:
    """Read a model.safetensors.index.json: tensor name -> shard, a file of the index's folder. Raises ToyllmError."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ToyllmError(f'{index}: expected "weight_map" with tensor names and their files; download it again')
    shards = {name: shard_path(index, name) for name in sorted(set(weight_map.values()))}
    return {name: shards[shard] for name, shard in weight_map.items()}


def shard_path(index: Path, name: str) -> Path:
    """Find the file that an index calls `name`: in the index's folder, or behind a link from there into a Hugging Face cache."""
    relative = Path(name)
    if len(name) > LONGEST or not name.isprintable() or not relative.parts or relative.is_absolute() or ".." in relative.parts:
        raise ToyllmError(f"{index}: shard {brief(name)} is no name of a file in this folder; download the index again")
    path = index.parent / relative
    require_file(path)
    require_inside(path, index.parent)
    return path


def require_inside(path: Path, folder: Path) -> None:
    """Refuse a link out of a model's folder, but for one into the blobs of the Hugging Face cache that the folder is in."""
    target, folder = path.resolve(), folder.resolve()
    if not any(target.is_relative_to(place) for place in (folder, *blobs(folder))):
        raise ToyllmError(f"{path}: a link out of the model's folder, to {target}; put the file itself there")


def blobs(folder: Path) -> list[Path]:
    """Where a Hugging Face cache keeps the files of a snapshot in it: the model's own, and those that came through Xet, for all models."""
    for snapshots in folder.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            return [snapshots.parent / "blobs", snapshots.parents[1] / "blobs"]
    return []


def map_file(path: Path) -> tuple[mmap.mmap, list[Tensor]]:
    """Map one safetensors file and list its tensors by offset. Raises ToyllmError."""
    require_file(path)
    try:
        with path.open("rb") as file:
            header = read_header(file, path)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tensors = read_tensors(header, len(mapped), path)
        safe_open(path, framework="np")
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ToyllmError(f"{path}: refused by the safetensors library: {brief(reason)}; download it again") from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            from .preload import address_space

            figures = f"{path.stat().st_size / 1e9:.2f} GB to map, {(address_space() or 0) / 1e9:.2f} GB of address space left"
            raise ToyllmError(f"{path}: {figures}; raise the limit (ulimit -v)") from error
        raise unreadable(path, error) from error
    return mapped, tensors


def read_header(file: BinaryIO, path: Path) -> bytes:
    """Read the JSON text that stands between the 8 bytes of its length and the data, unparsed. Raises ToyllmError."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8:
        raise ToyllmError(f"{path}: {f'only {size} bytes' if size else 'an empty file'}, not safetensors; download it again")
    if length > MAX_JSON:
        unknown = f"damaged, or not safetensors: the header would have {length:,} bytes, at most {MAX_JSON:,} are read"
        raise ToyllmError(f"{path}: {next((what for prefixes, what in FOREIGN if start.startswith(prefixes)), unknown)}")
    if 8 + length > size:
        raise ToyllmError(f"{path}: truncated: the header alone takes {8 + length:,} bytes, the file has {size:,}; download it again")
    return file.read(length)


def read_tensors(header: bytes, size: int, path: Path) -> list[Tensor]:
    """List a header's tensors by offset; they cover the file's `size` bytes without gap or overlap. Raises ToyllmError."""
    entries = parse_object(header, path)
    entries.pop("__metadata__", None)
    end = 8 + len(header)
    tensors = [read_tensor(name, entry, end, path) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    for tensor in tensors:
        if tensor.offset != end:
            where = f"at byte {tensor.offset:,}, expected {end:,} (no gap, no overlap)"
            raise ToyllmError(f"{path}: tensor {brief(tensor.name)} begins {where}; download it again")
        end += tensor.nbytes
    if end != size:
        what = "truncated" if size < end else "too long"
        raise ToyllmError(f"{path}: {what}: its tensors end at byte {end:,}, the file has {size:,}; download it again")
    return tensors


def read_tensor(name: str, entry: Any, data: int, path: Path) -> Tensor:
    """Read one entry of a header; the data begin at byte `data` of the file. Raises ToyllmError."""
    if len(name) > LONGEST:
        raise ToyllmError(f"{path}: tensor {brief(name)}: a name of {len(name):,} characters, at most {LONGEST:,} are read")
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if 0 <= begin <= end < 2**63:
            pass
        case _:
            raise ToyllmError(f"{path}: tensor {brief(name)}: expected dtype, shape and data_offsets [begin, end], found {brief(entry)}")
    sizes = all(type(n) is int and n >= 0 for n in shape)
    if not sizes or len(shape) > MAX_RANK or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise ToyllmError(f"{path}: tensor {brief(name)}: shape {brief(shape)} is none that an array can have")
    if 0 in shape and math.prod(max(n, 1) for n in shape) > MAX_EMPTY:
        raise ToyllmError(f"{path}: tensor {brief(name)}: shape {brief(shape)} holds nothing, in more places than any tensor has")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        takes = f"{dtype} {brief(shape)} takes {math.prod(shape) * DTYPES[dtype].itemsize:,} bytes"
        raise ToyllmError(f"{path}: tensor {brief(name)}: {takes}, its data_offsets give it {end - begin:,}; download it again")
    return Tensor(name, dtype, tuple(shape), path, data + begin, end - begin)
