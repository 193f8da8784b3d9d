"""Tensors to files: .npy, .npz, .safetensors, .csv, .json, whole or not at all.

Values are read and written piece by piece. bf16 stays BF16 in .safetensors and is widened to f32, exactly, elsewhere: NumPy has no
bfloat16.
"""

import json
import logging
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

import numpy as np

from ..kernels.dtypes import BF16, F16, widen
from ..kernels.errors import ToyllmError
from .json_files import brief
from .tensor_json import SCHEMA, describe, describe_values, json_numbers
from .tensor_values import NAMES, Values
from .whole import check_free, whole_file

log = logging.getLogger("toyllm")

Write = Callable[[BinaryIO, Sequence[Values]], None]


def check_target(path: Path, suffixes: Sequence[str], force: bool) -> None:
    """Raise ToyllmError where a file cannot be written to `path`: another ending, no folder, or a file there without `force`."""
    if path.suffix.lower() not in suffixes:
        raise ToyllmError(f"{path}: expected a name that ends in {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise ToyllmError(f"{path}: no folder {path.parent} to write to")
    check_free(path, force)


def save(path: Path, tensors: Sequence[Values], force: bool = False) -> None:
    """Write tensors to the format that the name ends in; several go into .npz, .safetensors and .json only, under their names.

    Raises ToyllmError for what the format cannot hold and where writing fails; then no file is left.
    """
    check_target(path, tuple(FORMATS), force)
    suffix = path.suffix.lower()
    if len(tensors) != 1 and suffix in SINGLE:
        raise ToyllmError(f"{path}: {suffix} holds one tensor, not {len(tensors)}; use .npz or .safetensors")
    if suffix != ".safetensors" and any(values.dtype == BF16 for values in tensors):
        log.info("%s holds no bfloat16: written as f32, exactly; .safetensors keeps BF16", suffix)
    with whole_file(path, force) as file:
        FORMATS[suffix](file, tensors)


def plain(array: np.ndarray) -> np.ndarray:
    """As NumPy's own dtypes have it: bf16 widened to f32, f16 as float16."""
    return array.view(np.float16) if array.dtype == F16 else widen(array)


def plain_dtype(values: Values) -> np.dtype:
    """The dtype of `plain`."""
    return plain(np.empty(0, values.dtype)).dtype


def write_npy(file: IO[bytes], tensors: Sequence[Values]) -> None:
    """NumPy's .npy, one tensor."""
    (values,) = tensors
    header = {"descr": np.lib.format.dtype_to_descr(plain_dtype(values)), "fortran_order": False, "shape": values.shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.writelines(plain(piece).tobytes() for piece in values.pieces())


def write_npz(file: BinaryIO, tensors: Sequence[Values]) -> None:
    """NumPy's .npz: a .npy for each tensor, under its name."""
    with zipfile.ZipFile(file, "w") as archive:
        for values in tensors:
            require_member(values.name)
            member = zipfile.ZipInfo(f"{values.name}.npy")  # of 1980: the same values make the same file
            with archive.open(member, "w", force_zip64=True) as inside:
                write_npy(inside, [values])


def require_member(name: str) -> None:
    """Refuse a name that leads out of the folder an archive is unpacked in, or that archives cannot hold. Raises ToyllmError."""
    place = PurePosixPath(name.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or not name.isprintable():
        raise ToyllmError(f"tensor {brief(name)} cannot be in an .npz file, whose names are those of files; use .safetensors")


def write_safetensors(file: BinaryIO, tensors: Sequence[Values]) -> None:
    """A .safetensors file with the values in the dtype in which they are stored; decoded MXFP4 as F32."""
    header: dict[str, Any] = {}
    end = 0
    for values in tensors:
        if values.name == "__metadata__":
            raise ToyllmError("a tensor named __metadata__ cannot be in a .safetensors file; use .npz")
        begin, end = end, end + values.size * values.dtype.itemsize
        header[values.name] = {"dtype": NAMES[values.dtype], "shape": values.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for values in tensors:
        file.writelines(piece.tobytes() for piece in values.pieces())


def write_csv(file: BinaryIO, tensors: Sequence[Values]) -> None:
    """A line for each row of a matrix or element of a vector; the shortest digits that give the same number back."""
    (values,) = tensors
    if len(values.shape) > 2:
        raise ToyllmError(f"{values.name}: .csv holds at most 2 axes, not {list(values.shape)}; take a --slice, or use .npy")
    for i in range(values.shape[0] if values.shape else 1):
        row = plain(values.read((slice(i, i + 1),) if values.shape else ())).ravel()
        file.write(",".join(row.astype(str).tolist()).encode() + b"\n")


def write_json(file: BinaryIO, tensors: Sequence[Values]) -> None:
    """The document of `dump-tensor --json`, with every value."""
    entries = [describe(values) | describe_values(values, json_numbers, None) for values in tensors]
    file.write(json.dumps({"schema": SCHEMA, "tensors": entries}, allow_nan=False).encode() + b"\n")


FORMATS: dict[str, Write] = {
    ".npy": write_npy,
    ".npz": write_npz,
    ".safetensors": write_safetensors,
    ".csv": write_csv,
    ".json": write_json,
}
SINGLE = (".npy", ".csv")
