"""Damaged safetensors files: nothing is opened that the safetensors library refuses, and what is opened is what it finds."""

import re
import struct
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from safetensors import SafetensorError, deserialize

from toyllm.kernels.errors import ToyllmError
from toyllm.models.checkpoint import DTYPES, Checkpoint, open_checkpoint
from toyllm.models.location import ModelFiles

from .leg import Find, Leg, Trial, refused
from .mutate import chance, json_text, mutate_bytes

NO_FILES = ModelFiles("fuzz", Path(), None, None, None, None, None, None, None)
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "C64": 64}
BITS |= {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
NAMES = ["a", "b", "w", "wte.weight", "h.0.attn.c_attn.weight", "", " ", "é", "__metadata", "a b", "x" * 200, "\x7f", '"', "\\"]
SIZES = [0, 1, 1, 1, 2, 2, 3, 4, 5, 8]


def sound(rng: Random) -> tuple[dict[str, Any], int]:
    """A header that is right, and the bytes of its data."""
    header: dict[str, Any] = {}
    if chance(rng, 0.3):
        header["__metadata__"] = {"format": "pt", "é": "\n"} if chance(rng, 0.5) else {}
    end = 0
    for name in rng.sample(NAMES, rng.choice((0, 1, 1, 2, 2, 3, 4))):
        dtype = rng.choice([*BITS])
        shape = [rng.choice(SIZES) for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))]
        bits = BITS[dtype]
        if bits < 8:
            shape.append(8)  # whole bytes
        for n in shape:
            bits *= n
        begin, end = end, end + -(-bits // 8)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return header, end


def repeat(rng: Random, header: dict[str, Any]) -> dict[str, Any]:
    """The header with a second name for one of its tensors, which a reader might take for the first."""
    name = rng.choice([*header])
    return {**header, rng.choice((name.upper(), name + "\0", " " + name, name + "\ud800", name[:1])): header[name]}


def damage_offsets(rng: Random, header: dict[str, Any]) -> None:
    """Move where a tensor lies, or change its shape so that a product of its sizes wraps around, in place."""
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    if not tensors:
        return
    entry, other = rng.choice(tensors), rng.choice(tensors)
    begin, end = entry["data_offsets"]
    how = rng.randrange(7)
    if how == 0:
        by = rng.randint(-8, 8)
        entry["data_offsets"] = [begin + by, end + by]
    elif how == 1:
        entry["data_offsets"] = [begin, end + rng.randint(-8, 8)]
    elif how == 2:
        entry["data_offsets"] = [end, begin]
    elif how == 3:
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif how == 4:
        entry["data_offsets"] = rng.choice(
            ([2**64 - 8, 0], [2**63, 2**63], [0, 2**64 - 1], [2**64, 2**64], [-8, 0], [begin], [begin, end, end])
        )
    elif how == 5:
        big = rng.choice((2**31, 2**32, 2**33, 2**59, 2**60, 2**61, 2**62, 2**63, 2**64 - 1, 2**64))
        entry["shape"] = rng.choice(
            ([big, big], [big, 0], [0, big, big], [big, 2], [big], [1] * 65, [1] * 63 + [0, big], [2] * 64, [*entry["shape"], 1])
        )
    else:
        entry["dtype"] = rng.choice([*BITS])


def file_bytes(rng: Random) -> bytes:
    """A safetensors file, sound or damaged."""
    header, nbytes = sound(rng)
    if chance(rng, 0.25):
        damage_offsets(rng, header)
    if header and chance(rng, 0.03):
        header = repeat(rng, header)
    text = json_text(rng, header, most=rng.choice((0, 1, 1, 1, 2, 3)))
    if chance(rng, 0.1):
        text += b" " * (-len(text) % 8)
    data = rng.randbytes(nbytes)
    if chance(rng, 0.06):
        data = rng.choice((data[:-1], data + b"\0", data + bytes(8), b""))
    length = len(text)
    if chance(rng, 0.06):
        length = rng.choice(
            (length - 1, length + 1, length + len(data), 0, 1, 2**63, 2**64 - 1, 2**64 - 8, 100_000_001, 2**24, 2**24 + 1, 2**31)
        )
    made = struct.pack("<Q", length % 2**64) + text + data
    return mutate_bytes(rng, made) if chance(rng, 0.1) else made


# Why we refuse what the library opens: each a rule of ours, stricter on purpose. Anything else is a find.
STRICTER = {
    "a name twice": re.compile(r"the name .* occurs twice"),
    "an entry that is no object of dtype, shape and data_offsets": re.compile(r"expected dtype, shape and data_offsets"),
    "a name that nobody could read": re.compile(r"a name of [\d,]+ characters, at most"),
    "an empty tensor of more places than any": re.compile(r"holds nothing, in more places than any tensor has"),
    "a shape that no array can have": re.compile(r"is none that an array can have"),
}
SECOND = "refused by the safetensors library"


def check_file(path: Path, content: bytes) -> str:
    """Write a file, open it, and hold what is found against the library. Says which of the two refused it. Raises Find."""
    path.write_bytes(content)
    try:
        library: dict[str, Any] | None = dict(deserialize(content))
    except SafetensorError:
        library = None
    try:
        checkpoint = open_checkpoint(replace(NO_FILES, folder=path.parent, weights=path))
    except ToyllmError as error:
        return why_refused(refused(error), library is None)
    if library is None:
        raise Find("opened, refused by the library")
    compare(checkpoint, library, content)
    return "opened by both"


def why_refused(line: str, by_both: bool) -> str:
    """How a trial ended whose file we refused. Raises Find for a line that is not to be shown, and for a reason that is no rule of ours."""
    if not line.isprintable():
        raise Find(f"the error is not printable: {line!r}")
    if by_both:
        return "refused by both" + (", by the library's reader alone" if SECOND in line else "")
    for reason, pattern in STRICTER.items():
        if pattern.search(line):
            return f"refused, opened by the library: {reason}"
    raise Find(f"refused, opened by the library: {line}")


def compare(checkpoint: Checkpoint, library: dict[str, Any], content: bytes) -> None:
    """Raise Find where the tensors are not what the library finds in the same bytes."""
    if set(library) != set(checkpoint.tensors):
        raise Find(f"names: expected {sorted(library)}, found {sorted(checkpoint.tensors)}")
    for name, expected in library.items():
        tensor = checkpoint.tensors[name]
        if (tensor.dtype, list(tensor.shape)) != (expected["dtype"], expected["shape"]):
            raise Find(f"{name!r}: expected {expected['dtype']} {expected['shape']}, found {tensor}")
        if content[tensor.offset : tensor.offset + tensor.nbytes] != expected["data"]:
            raise Find(f"{name!r}: other bytes than the library's")
        if tensor.dtype in DTYPES and checkpoint.array(name).tobytes() != expected["data"]:
            raise Find(f"{name!r}: the array holds other bytes than the library's")


def prepare(folder: Path) -> Trial:
    path = folder / "model.safetensors"
    return lambda rng: check_file(path, file_bytes(rng))


LEG = Leg("safetensors files with damaged headers, against the safetensors library", prepare)
