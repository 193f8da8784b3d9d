"""Sessions: what a run's KV cache holds, in a .safetensors file, so that a later run goes on where it ended.

    ids                                   I64 [n], the text; all of it has keys and values, but perhaps the last id
    {i}.positions, {i}.keys, {i}.values   of the i-th cache: I64 [m], and twice [L, G, m, W] in the cache's dtype

The metadata say which model the file belongs to, what its keys and values were made with, what a conversation adds, and a checksum of all
that. Nothing of a file is believed before it is checked. It holds what was said, readable to whoever can read the file.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.errors import ToyllmError
from .checkpoint import DTYPES, Checkpoint, map_files, read_header
from .harmony import REASONING, Message, render
from .held import Held, State, members, windowed
from .json_files import brief, parse_object, require_file
from .tensor_values import NAMES
from .whole import whole_file

if TYPE_CHECKING:
    from .model import Model

FORMAT = "toyllm.session/1"
PARTS = ("positions", "keys", "values")
SAMPLE = 64  # bytes of a tensor at its beginning, its middle and its end that the fingerprint reads
PRIVATE = 0o600  # a conversation is for its owner


@dataclass(frozen=True)
class Talk:
    """What a conversation adds to what its cache holds."""

    opening: dict[str, str | None]  # how the system's and the developer's messages were made: reasoning, date, instructions
    messages: tuple[Message, ...]  # those behind the opening
    turns: int  # questions so far, also those that are forgotten


@dataclass(frozen=True)
class Session:
    """What a file holds, all of it checked against the model."""

    ids: list[int]
    states: list[State]
    talk: Talk | None = None


class SessionFile:
    """A session's place: read when a run begins, replaced as a whole when it ends or a turn of it."""

    def __init__(self, path: Path, model: "Model", talks: bool = False) -> None:
        """Read the file; there may be none yet. Raises ToyllmError for one that is no session of this model, and leaves it as it is.

        `talks` says that it is a conversation's, or is to be one's.
        """
        self.path, self._model = Path(os.path.realpath(path)), model  # what a link leads to is replaced, not the link
        if model.changes:
            raise refused(self.path, "the run changes activations, and a session's keys and values are the model's own")
        self._fingerprint, self._made_with = fingerprint(model), made_with(model)
        self._found = identity(self.path)
        self.session = read(self.path, model, self._fingerprint, self._made_with) if self._found else None
        if self.session and bool(self.session.talk) != talks:
            what = "no conversation; go on with generate without --chat" if talks else "a conversation; go on with chat"
            raise ToyllmError(f"{self.path}: {what}, or give another --session")

    def save(self, held: Held, talk: Talk | None = None) -> None:
        """Put in the file what is held, and the conversation, if it is one. Raises ToyllmError where another has written it meanwhile."""
        if identity(self.path) != self._found:
            raise ToyllmError(f"{self.path}: another program has written or removed it since this one read it; give another --session")
        arrays = {"ids": np.array(held.text, np.int64)}
        for i, state in enumerate(held.states()):
            arrays |= {f"{i}.{part}": np.ascontiguousarray(array) for part, array in zip(PARTS, state, strict=True)}
        metadata = {"format": FORMAT, "model": self._fingerprint, "name": self._model.files.name, "made_with": json.dumps(self._made_with)}
        if talk:
            metadata["talk"] = json.dumps(asdict(talk))
        mode = self.path.stat().st_mode & 0o777 if self._found else PRIVATE
        with whole_file(self.path, force=True) as file:
            os.chmod(file.fileno(), mode)  # noqa: PTH101 - of a file without its name yet
            write(file, arrays, metadata)
        self._found = identity(self.path)
        self.session = None  # what was read is of no use any more, and its map can go


def identity(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None where there is none. Raises ToyllmError for what is no file."""
    if not os.path.lexists(path):
        if not path.parent.is_dir():
            raise refused(path, f"no folder {path.parent} to write to")
        return None
    require_file(path)
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def refused(path: Path, reason: str) -> ToyllmError:
    """A file that is not read, and so never written over."""
    return ToyllmError(f"{path}: {reason}; give another --session")


def fingerprint(model: "Model") -> str:
    """What tells one model from another, in hexadecimal: SHA-256, at the cost of some bytes a tensor.

    It covers the configuration, each tensor's name, dtype, shape and place, the files' sizes, and 64 bytes at the beginning, in the middle
    and at the end of each tensor. So it tells apart sizes, families, precisions and conversions, and a model from what further training
    makes of it, which changes nearly every value. It does not see single values changed elsewhere; nor the tokenizer, nor files' names.
    """
    digest = hashlib.sha256(json.dumps([model.family.__name__, asdict(model.config)], default=str).encode())
    maps = model.checkpoint.maps
    places = {path: i for i, path in enumerate(maps)}
    for path, mapped in maps.items():
        if mapped.size() < len(mapped):
            raise ToyllmError(f"{path}: shrunk while open, from {len(mapped):,} bytes to {mapped.size():,}; start again")
        digest.update(f"{len(mapped)} ".encode())
    for tensor in model.checkpoint.tensors.values():
        described = [tensor.name, tensor.dtype, tensor.shape, places[tensor.path], tensor.offset]
        digest.update(json.dumps(described).encode())
        for at in {0, max(0, tensor.nbytes // 2), max(0, tensor.nbytes - SAMPLE)}:
            begin = tensor.offset + at
            digest.update(maps[tensor.path][begin : min(begin + SAMPLE, tensor.offset + tensor.nbytes)])
    return digest.hexdigest()


def made_with(model: "Model") -> dict[str, str]:
    """The options that keys and values depend on beyond rounding in f32: a session goes on with the same."""
    mixing = model.kernels.mixing
    return {
        "cache-dtype": model.cache_dtype,
        "weights": model.kernels.weights,
        "activations": model.kernels.activations,
        "exact": "yes" if model.kernels.exact else "no",
        "moe": f"budget, --tokens-per-expert-ratio {mixing.ratio}" if mixing.algorithm == "budget" else "auto",
    }


# ---- writing ----------------------------------------------------------------------------------------------------------------


def write(file: Any, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """A .safetensors file of these arrays, with these metadata and the checksum of both."""
    header: dict[str, Any] = {"__metadata__": metadata | {"sha256": checksum(metadata, arrays)}}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.writelines(data_of(array) for array in arrays.values())


def data_of(array: np.ndarray) -> memoryview:
    """The bytes of an array, in row-major order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def checksum(metadata: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of all that a file holds, its checksum aside: against damage. Whoever means harm can compute it, too."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, NAMES[array.dtype], array.shape]).encode())
        digest.update(data_of(array))
    return digest.hexdigest()


# ---- reading ----------------------------------------------------------------------------------------------------------------


def read(path: Path, model: "Model", expected: str, options: dict[str, str]) -> Session:
    """The session in a file. Raises ToyllmError that names what is wrong with it, in one line."""
    with as_session(path):
        checkpoint = map_files([path])
        with path.open("rb") as file:
            metadata = parse_object(read_header(file, path), path).get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise refused(path, f"no session of toyllm (its metadata have format {brief(metadata.get('format'))}, expected {FORMAT!r})")
    if metadata.get("model") != expected:
        raise refused(path, f"a session of another model, {brief(metadata.get('name'))}, not of {model.files.name}")
    check_options(path, metadata, options)
    session = Session(*read_arrays(path, checkpoint, model), read_talk(path, metadata, model))
    claimed = metadata.pop("sha256", None)
    if checksum(metadata, {name: checkpoint.array(name) for name in checkpoint.tensors}) != claimed:
        raise refused(path, "damaged: its checksum is not that of what it holds")
    return session


@contextmanager
def as_session(path: Path) -> Iterator[None]:
    """Says of what is wrong with a checkpoint that it is wrong with a session."""
    try:
        yield
    except (ToyllmError, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ").removesuffix("; download it again")
        raise refused(path, f"no session that can be read: {reason}") from error


def parsed(path: Path, text: str) -> dict[str, Any]:
    """The object of JSON in a member of the metadata. Raises ToyllmError where it is none."""
    with as_session(path):
        return parse_object(text.encode("utf-8", "replace"), path)


def check_options(path: Path, metadata: dict[str, str], options: dict[str, str]) -> None:
    """Raise ToyllmError where keys and values were made in another way."""
    found = parsed(path, metadata.get("made_with", ""))
    if found.keys() != options.keys():
        raise refused(path, f"made with {brief(found)}, which this version of toyllm does not know")
    for name, value in options.items():
        if found[name] != value:
            raise ToyllmError(
                f"{path}: made with --{name} {brief(found[name])[1:-1]}, and this run has {value}; give the same, or another --session"
            )


def read_arrays(path: Path, checkpoint: Checkpoint, model: "Model") -> tuple[list[int], list[State]]:
    """The ids, and what each member of a cache of this model is to hold. Raises ToyllmError where they do not fit it, or each other."""
    caches = members(model.new_cache(1))
    names = ["ids", *(f"{i}.{part}" for i in range(len(caches)) for part in PARTS)]
    if sorted(checkpoint.tensors) != sorted(names):
        raise refused(path, f"damaged: expected the tensors {brief(', '.join(names))}, found {brief(', '.join(checkpoint.tensors))}")

    def array(name: str, dtype: np.dtype, shape: Sequence[int | None]) -> np.ndarray:
        tensor = checkpoint.tensors[name]
        fits = len(tensor.shape) == len(shape) and all(want in (None, n) for n, want in zip(tensor.shape, shape, strict=True))
        if DTYPES.get(tensor.dtype) != dtype or not fits:
            wanted = f"{NAMES[dtype]} {['any' if n is None else n for n in shape]}"
            raise refused(path, f"damaged: tensor {name}: expected {wanted}, found {tensor.dtype} {brief(list(tensor.shape))}")
        return checkpoint.array(name)

    int64, most = np.dtype(np.int64), model.config.context
    found = array("ids", int64, [None])
    if len(found) > most + 1 or (len(found) and not 0 <= found.min() <= found.max() < model.vocab_size):
        raise refused(path, f"damaged: expected at most {most + 1} ids from 0 to {model.vocab_size - 1}")
    states, ends = [], set()
    for i, cache in enumerate(caches):
        _, keys, values = cache.state(0)
        positions = array(f"{i}.positions", int64, [None])
        m = len(positions)
        end = int(positions[-1]) + 1 if m else 0
        least = min(end, cache.window) if windowed(cache) else end
        if not least <= m <= end <= most or not np.array_equal(positions, np.arange(end - m, end)):
            raise refused(path, f"damaged: tensor {i}.positions: expected all that the next position sees, one after the other")
        stored = (array(f"{i}.{part}", old.dtype, (*old.shape[:2], m, old.shape[3])) for part, old in (("keys", keys), ("values", values)))
        states.append((positions, *stored))
        ends.add(end)
    if len(ends) != 1 or not len(found) - 1 <= max(ends) <= len(found):
        raise refused(path, f"damaged: {len(found)} ids, and keys and values of {' and '.join(map(str, sorted(ends)))}")
    return found.tolist(), states


def read_talk(path: Path, metadata: dict[str, str], model: "Model") -> Talk | None:
    """What a conversation added; None where it was none. Raises ToyllmError for what no conversation leaves."""
    if "talk" not in metadata:
        return None
    document = parsed(path, metadata["talk"])
    match document:
        case {"opening": dict(opening), "messages": [*entries], "turns": turns} if len(document) == 3 and type(turns) is int:
            pass
        case _:
            raise refused(path, "damaged: expected opening, messages and turns of a conversation")
    texts = all(value is None or isinstance(value, str) for value in opening.values())
    if not 0 <= turns < 2**63:
        raise refused(path, "damaged: expected 0 turns of a conversation or more")
    if opening.keys() != {"reasoning", "date", "instructions"} or not texts or opening["reasoning"] not in REASONING:
        raise refused(path, f"damaged: the opening {brief(opening)} of its conversation")
    return Talk(opening, tuple(read_message(path, entry, model) for entry in entries), turns)


def read_message(path: Path, entry: Any, model: "Model") -> Message:
    """One message of the user or the model. Raises ToyllmError for any other, and for what cannot be written again."""
    names = Message.__dataclass_fields__.keys()
    texts = isinstance(entry, dict) and entry.keys() == names and all(value is None or isinstance(value, str) for value in entry.values())
    if not texts or entry["role"] not in ("user", "assistant") or entry["content"] is None or not model.tokenizer:
        raise refused(path, f"damaged: {brief(entry)} is no message of a conversation")
    message = Message(**entry)
    try:
        render([message], model.tokenizer, completion=False)
    except ToyllmError as error:
        raise refused(path, f"damaged: a message that cannot be written ({error})") from error
    return message
