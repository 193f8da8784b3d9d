"""Activations of another implementation, from a .npz or .safetensors file: under our names, or through a map from theirs to ours.

A map is a TOML or JSON file of their names and what they are here; `{i}` stands for a number, the same in both:

    "input_ids" = "ids"
    "h.{i}.ln_1" = "blocks.{i}.norm_1"
    "h.{i}.attn.c_attn" = [
        {name = "blocks.{i}.attn.q", reshape = ["T", 3, -1], slice = ":, 0"},
        {name = "blocks.{i}.attn.k", reshape = ["T", 3, -1], slice = ":, 1"},
    ]
    "keys.{i}" = {name = "blocks.{i}.attn.k", slice = "0", transpose = [1, 0, 2]}

`reshape`, `slice` and `transpose` are done in this order, "T" standing for the number of tokens. A shape that then still differs is bridged
where that can mean one thing only: a first axis of 1, a batch, is dropped, and a last axis may hold our last ones in a row. `ids` are the
token ids that were run.
"""

import json
import math
import re
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.dtypes import BF16, F16
from ..kernels.errors import ToyllmError
from .checkpoint import brief, map_files, parse_object, read_header
from .compare_names import axes, is_activation, order, token_axis
from .tensor_slice import resolve_slice
from .tensor_values import as_slice

IDS = "ids"
Load = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Rule:
    """What an array of theirs is here."""

    where: str  # the map's file and their name, for messages
    theirs: str
    ours: str
    reshape: tuple[int | str, ...] | None = None
    slice: str | None = None
    transpose: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Dump:
    """A file of activations by our names, each read when it is asked for."""

    path: Path
    arrays: dict[str, tuple[Load, Rule | None]]
    unknown: tuple[str, ...] = ()  # arrays of the file that stand for none
    unmatched: tuple[str, ...] = ()  # names of the map that the file does not have

    @property
    def names(self) -> list[str]:
        """The activations that are there, in the order in which a model makes them."""
        return sorted((name for name in self.arrays if name != IDS), key=order)

    def ids(self) -> list[int] | None:
        """The token ids that were run, if the file has them. Raises ToyllmError for what cannot be token ids."""
        if IDS not in self.arrays:
            return None
        array = self.raw(IDS, None)
        if array.dtype.kind not in "iu" or not array.size or array.size != max(array.shape):
            raise ToyllmError(f"{self.path}: ids: expected whole numbers [T] or [1, T], found {array.dtype} {list(array.shape)}")
        return [int(i) for i in array.ravel()]

    def raw(self, name: str, T: int | None) -> np.ndarray:
        """An activation as the file, and the map, have it; T is how many tokens were run."""
        load, rule = self.arrays[name]
        array = load()
        if array.dtype not in (BF16, F16) and array.dtype.kind not in "biuf":
            raise ToyllmError(f"{self.path}: {name}: expected numbers, found dtype {array.dtype}; save it as f32")
        return moved(array, rule, T) if rule else array

    def whole(self, name: str) -> np.ndarray:
        """An activation in its own shape, without a batch of 1. Raises ToyllmError where it has not the axes of that activation."""
        array, letters = self.raw(name, None), axes(name)
        if array.ndim == len(letters) + 1 and len(array) == 1:
            array = array[0]
        if array.ndim != len(letters):
            raise ToyllmError(f"{self.path}: {name}: expected axes [{', '.join(letters)}], found shape {list(array.shape)}")
        return array

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """An activation that is `shape` here, in that shape if it can be brought into it."""
        return fitted(self.raw(name, shape[token_axis(name)]), shape)


def is_dump(path: Path, mapped: bool) -> bool:
    """Whether a path is a file of activations: a .npz, or a .safetensors with one under our names; `mapped`, under any."""
    if path.suffix != ".safetensors" or not path.is_file():
        return path.suffix == ".npz"
    if mapped:
        return True
    with path.open("rb") as file:
        return any(is_activation(name) for name in parse_object(read_header(file, path), path))


def open_dump(path: Path, map_path: Path | None = None) -> Dump:
    """A file's activations. Raises ToyllmError for a file or a map that cannot be read, or where they have no name in common."""
    loads = open_npz(path) if path.suffix == ".npz" else open_safetensors(path)
    rules = read_map(map_path) if map_path else []
    arrays: dict[str, tuple[Load, Rule | None]] = {}
    used: set[str] = set()
    unmatched = []
    for rule in rules:
        hits = list(applied(rule, loads))
        if not hits:
            unmatched.append(rule.theirs)
        for theirs, ours in hits:
            if ours in arrays:
                raise ToyllmError(f"{rule.where}: {ours} is there already, from another name; map it once")
            arrays[ours] = loads[theirs], rule
            used.add(theirs)
    for name, load in loads.items():
        if (name == IDS or is_activation(name)) and name not in arrays and name not in used:
            arrays[name] = load, None
            used.add(name)
    if not arrays.keys() - {IDS}:
        names = brief(", ".join(loads))
        expected = f"no array that {map_path} names" if map_path else "no activation under toyllm's names, such as blocks.0.attn.q"
        raise ToyllmError(f"{path}: {expected}; it has {names}; --map FILE says what those are")
    return Dump(path, arrays, tuple(name for name in loads if name not in used), tuple(dict.fromkeys(unmatched)))


# ---- files ------------------------------------------------------------------------------------------------------------------


def open_npz(path: Path) -> dict[str, Load]:
    """NumPy's .npz, each array read when it is asked for. Nothing pickled is ever loaded."""

    def attempt(read: Callable[[], Any], what: str) -> Any:
        try:
            return read()
        except (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ToyllmError(f"{path}: {what}cannot be read ({reason}); numpy.savez writes what can") from error

    archive: zipfile.ZipFile = attempt(lambda: zipfile.ZipFile(path), "")

    def load(member: str) -> np.ndarray:
        with archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)

    members = {member.removesuffix(".npy"): member for member in archive.namelist()}
    return {name: (lambda name=name, member=member: attempt(lambda: load(member), f"{name}: ")) for name, member in members.items()}


def open_safetensors(path: Path) -> dict[str, Load]:
    """A .safetensors file, from its memory map."""
    checkpoint = map_files([path])
    return {name: (lambda name=name: checkpoint.array(name)) for name in checkpoint.tensors}


# ---- maps -------------------------------------------------------------------------------------------------------------------


def read_map(path: Path) -> list[Rule]:
    """The rules of a TOML or JSON file. Raises ToyllmError for what is none."""
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ToyllmError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ToyllmError(f"{path}: not valid {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}") from error
    if not isinstance(document, dict):
        raise ToyllmError(f"{path}: expected an object of their names and ours, found {type(document).__name__}")
    return [rule for theirs, value in document.items() for rule in read_rules(theirs, value, f"{path}: {brief(theirs)}")]


def read_rules(theirs: str, value: Any, where: str) -> Iterator[Rule]:
    """What one name of theirs stands for: our name, an object with it, or a list of those. Raises ToyllmError for anything else."""
    for entry in value if isinstance(value, list) else [value]:
        match {"name": entry} if isinstance(entry, str) else entry:
            case {"name": str(name), **rest} if rest.keys() <= MOVES.keys():
                pass
            case _:
                expected = "expected our name, or an object of name, reshape, slice and transpose"
                raise ToyllmError(f"{where}: {expected}, found {brief(entry)}; TOML wants names with points in quotes")
        if (name != IDS and not is_activation(name.replace("{i}", "0"))) or ("{i}" in name and "{i}" not in theirs):
            listed = "`toyllm dump-tensor --list --prompt hello` lists them"
            raise ToyllmError(f"{where}: {brief(name)} is no activation of toyllm's; {listed}")
        moves: dict[str, Any] = {}
        for key, move in rest.items():
            holds, expected = MOVES[key]
            if not holds(move):
                raise ToyllmError(f"{where}: {key}: expected {expected}, found {brief(move)}")
            moves[key] = tuple(move) if isinstance(move, list) else move
        yield Rule(where, theirs, name, **moves)


MOVES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "reshape": (lambda v: isinstance(v, list) and all(n == "T" or type(n) is int for n in v), 'a list of lengths, "T" or -1'),
    "slice": (lambda v: isinstance(v, str), 'text such as ":, 0"'),
    "transpose": (lambda v: isinstance(v, list) and all(type(n) is int for n in v), "a list of axes"),
}


def applied(rule: Rule, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Those of the file's names that a rule means, each with ours."""
    head, *rest = (re.escape(piece) for piece in rule.theirs.split("{i}"))
    pattern = re.compile(head + (r"(?P<i>\d+)" + r"(?P=i)".join(rest) if rest else ""))
    for name in names:
        if found := pattern.fullmatch(name):
            yield name, rule.ours.replace("{i}", found.groupdict().get("i", ""))


def moved(array: np.ndarray, rule: Rule, T: int | None) -> np.ndarray:
    """The array as a rule reshapes, slices and transposes it. Raises ToyllmError where it cannot."""
    if rule.reshape is not None:
        sizes = [array.size if n == "T" and T is None else T if n == "T" else n for n in rule.reshape]
        try:
            array = array.reshape([int(n or 0) for n in sizes])
        except ValueError as error:
            raise ToyllmError(f"{rule.where}: reshape {list(rule.reshape)}: the array has shape {list(array.shape)}, T is {T}") from error
    if rule.slice is not None:
        try:
            axes = resolve_slice(rule.slice, array.shape, rule.theirs)
        except ToyllmError as error:
            raise ToyllmError(f"{rule.where}: {str(error).removeprefix('--')}") from error
        array = array[tuple(axis if isinstance(axis, int) else as_slice(axis) for axis in axes)]
    if rule.transpose is not None:
        if sorted(rule.transpose) != list(range(array.ndim)):
            raise ToyllmError(f"{rule.where}: transpose {list(rule.transpose)}: expected each axis of shape {list(array.shape)} once")
        array = array.transpose(rule.transpose)
    return array


def fitted(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array in this shape where a batch of 1 before it or joined last axes are all that differs; else as it is."""
    for found in (array.shape, array.shape[1:] if array.shape[:1] == (1,) else array.shape):
        leading = len(found) - 1
        if found == shape or (0 <= leading < len(shape) and found[:-1] == shape[:leading] and found[-1] == math.prod(shape[leading:])):
            return array.reshape(shape)
    return array
