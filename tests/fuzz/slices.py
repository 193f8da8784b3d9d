"""Slices in text, of stored tensors in every dtype and of decoded MXFP4: what NumPy takes, or an error in a line."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.fp4 import dequantize_reference
from toyllm.models.checkpoint import DTYPES, open_checkpoint
from toyllm.models.tensor_stats import statistics
from toyllm.models.tensor_text import Layout, format_values, hexadecimal, texts
from toyllm.models.tensor_values import Values, weights

from . import checkpoints
from .headers import NO_FILES
from .leg import Find, Leg, Trial, refused
from .mutate import chance

SHAPES = [(), (1,), (7,), (0,), (5, 6), (3, 0, 4), (2, 3, 4), (1, 1, 2, 3), (2, 2, 2, 2, 2)]
BOUNDS = [-10_000, -33, -8, -7, -6, -3, -2, -1, 0, 1, 2, 3, 5, 6, 7, 31, 32, 33, 64, 10_000, 2**31, 2**63, -(2**63), 10**17]
GARBAGE = [
    *"0123456789:,.-+[]() \t\n*eEjx_",
    "...",
    "None",
    "np.newaxis",
    "True",
    "1e3",
    "0x1",
    "٣",
    "\ud800",
    "\0",
    "\x1b[2J",
    "١:٢",
    "9" * 18,
    "9" * 19,
]
GARBAGE += ["9" * 400, "::", "...,...", "[[", "]]", "−1", "\u200b", ",,"]


def make_tensors(folder: Path) -> tuple[dict[str, Values], dict[str, np.ndarray]]:
    """Every tensor to slice, by name, and its values as an array to hold it against."""
    numbers = np.random.default_rng(5)
    stored: dict[str, checkpoints.Stored] = {"pad": ("U8", (1,), b"\0")}  # what follows is not aligned
    for dtype, shape in itertools.product(DTYPES, SHAPES):
        data = numbers.integers(0, 256, int(np.prod(shape)) * DTYPES[dtype].itemsize, np.uint8)
        stored[f"{dtype}{list(shape)}"] = dtype, shape, (data % 2 if dtype == "BOOL" else data).tobytes()
    blocks, scales = numbers.integers(0, 256, (2, 3, 4, 16), np.uint8), numbers.integers(100, 150, (2, 3, 4), np.uint8)
    stored |= {"m_blocks": ("U8", blocks.shape, blocks.tobytes()), "m_scales": ("U8", scales.shape, scales.tobytes())}
    path = folder / "model.safetensors"
    path.write_bytes(checkpoints.file_bytes(stored))
    checkpoint = open_checkpoint(replace(NO_FILES, folder=folder, weights=path))
    arrays = {name: np.frombuffer(data, DTYPES[dtype]).reshape(shape) for name, (dtype, shape, data) in stored.items()}
    return weights(checkpoint), arrays | {"m": dequantize_reference(blocks, scales)}


def part(rng: Random) -> str:
    """What a slice may say of an axis."""
    how = rng.randrange(8)
    if how < 3:
        return str(rng.choice(BOUNDS))
    if how == 3:
        return rng.choice(("...", ":", "", "::", "0", "-1"))
    bounds = [
        rng.choice(("", str(rng.choice(BOUNDS)), f"+{rng.randint(0, 9)}", f" {rng.randint(-9, 9)} "))
        for _ in range(rng.choice((1, 2, 2, 3)))
    ]
    return ":".join(bounds)


def slice_text(rng: Random, rank: int) -> str:
    """A slice, or what might be taken for one."""
    parts = [part(rng) for _ in range(rng.choice((rank, rank, rank, rng.randint(0, rank + 2))))]
    text = rng.choice((",", ", ", " ,")).join(parts)
    if chance(rng, 0.1):
        text = f"[{text}]"
    if chance(rng, 0.2):
        for _ in range(rng.randint(1, 3)):
            at = rng.randint(0, len(text))
            text = text[:at] + rng.choice(GARBAGE) + text[at + rng.randint(0, 1) :]
    return text


INTEGER = r"\s*[+-]?[0-9]{1,18}\s*"
PARTS = re.compile(rf"\s*\.\.\.\s*|{INTEGER}|(?:{INTEGER}|\s*)(?::(?:{INTEGER}|\s*)){{1,2}}", re.ASCII)


def expected(text: str, array: np.ndarray) -> np.ndarray | None:
    """What NumPy takes; None where it takes nothing, or the text is none of ours."""
    inside = text.strip().removeprefix("[").removesuffix("]")
    parts = [p.strip() for p in inside.split(",")]
    if parts[-1] == "":
        parts.pop()
    if not all(PARTS.fullmatch(p) for p in parts):
        return None
    index: list[Any] = []
    for p in parts:
        if p == "...":
            index.append(...)
        elif ":" in p:
            index.append(slice(*(int(bound) if bound.strip() else None for bound in p.split(":"))))
        else:
            index.append(int(p))
    try:
        return array[tuple(index)]
    except (IndexError, ValueError):
        return None


def check_slice(rng: Random, values: Values, array: np.ndarray, text: str) -> str:
    """Take a slice of a tensor in each of the ways in which the tool reads it. Raises Find."""
    wanted = expected(text, array)
    try:
        found = values.part(text)
    except ToyllmError as error:
        line = refused(error)
        if wanted is not None:
            raise Find(f"{text!r} of {values.name}: refused: {line}") from error
        return "refused"
    if wanted is None:
        raise Find(f"{text!r} of {values.name}: taken, and NumPy refuses it")
    read = found.read()
    if read.shape != wanted.shape or read.dtype != wanted.dtype or read.tobytes() != wanted.tobytes():
        raise Find(f"{text!r} of {values.name}: other values than NumPy's")
    limit = rng.choice((1, 2, 7, 2**16))
    if b"".join(piece.tobytes() for piece in found.pieces(limit)) != wanted.tobytes():
        raise Find(f"{text!r} of {values.name}: in pieces of {limit}, other values than whole")
    if statistics(found).elements != wanted.size:
        raise Find(f"{text!r} of {values.name}: statistics of {statistics(found).elements} elements, not {wanted.size}")
    layout = Layout(rng.randint(1, 3), rng.randint(0, 9), rng.choice((None, 3, 1000)), chance(rng, 0.5))
    "".join(format_values(found, rng.choice((texts(layout), hexadecimal)), layout.edge(found)))
    return "taken"


def prepare(folder: Path) -> Trial:
    tensors, arrays = make_tensors(folder)
    names = [*arrays, *["m"] * 12]

    def trial(rng: Random) -> str:
        name = rng.choice(names)
        return check_slice(rng, tensors[name], arrays[name], slice_text(rng, arrays[name].ndim))

    return trial


LEG = Leg("slices in text, against NumPy's", prepare)
