"""JSON that strangers wrote: read within a bound, each name once, no NaN; whatever else is one line that names the file."""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from reprlib import Repr
from typing import Any

from ..kernels.errors import ToyllmError

# Bytes of a configuration, a header or an index: room for some 140,000 tensors, and a bound on what a hostile one costs to parse.
MAX_JSON = 16 * 2**20

_repr = Repr()
_repr.maxstring = 120
brief = _repr.repr  # text from a file, quoted, escaped and cut: it may be anything, of any length


def read_object(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes. Raises ToyllmError where there is none."""
    return parse_object(read_bytes(path, most), path)


def read_bytes(path: Path, most: int) -> bytes:
    """All of a file of at most so many bytes. Raises ToyllmError for a longer one, and for what is no file or cannot be read."""
    require_file(path)
    try:
        with path.open("rb") as file:
            data = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)  # no more at once: a read takes what it asks for
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > most:
        raise ToyllmError(f"{path}: larger than {most:,} bytes, which no such file is; download it again")
    return data


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object in which no name occurs twice, nor NaN or an infinity, which JSON does not have. Raises ToyllmError."""
    try:
        document = parse(text)
    except (ValueError, RecursionError) as error:
        raise ToyllmError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(document, dict):
        raise ToyllmError(f"{path}: expected a JSON object, found {type(document).__name__}; download it again")
    return document


def parse(text: bytes) -> Any:
    """Parse JSON in whose objects no name occurs twice, nor NaN or an infinity.

    Raises ValueError, of which UnicodeDecodeError is one, and RecursionError.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"the name {brief(twice)} occurs twice")
        if constants:
            where = next((f"{brief(name)}: " for name, value in pairs if value is constants), "")
            raise ValueError(f"{where}{constants[0]}, which JSON does not have")
        return members

    constants: list[str] = []  # and what stands in their place until the object around them is whole, and so has a name for them

    def constant(spelled: str) -> list[str]:
        constants.append(spelled)
        return constants

    return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)


def require_file(path: Path) -> None:
    """Refuse what cannot be read as a file, before opening it: opening a FIFO would wait for ever."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise ToyllmError(f"{path}: {'a folder' if stat.S_ISDIR(mode) else 'a device or pipe'}, where a file is expected")


def unreadable(path: Path, error: OSError) -> ToyllmError:
    """Put the operating system's refusal in one line with the file's name."""
    if isinstance(error, FileNotFoundError):
        return ToyllmError(f"{path}: missing; download it again")
    return ToyllmError(f"{path}: cannot be read ({error.strerror or error})")
