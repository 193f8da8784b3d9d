"""The file that answers go to: a header that says what run it belongs to, then a line for each line of the input, in their order.

A line is written whole or, where the process is killed in the midst of it, without its end: whoever goes on drops that. So a file is
always the beginning of the one that an uninterrupted run leaves.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..kernels.errors import ToyllmError
from . import output

SCHEMA = "toyllm.generate.batch/1"
WAY_OUT = "give another --output, or delete the file"


def fingerprint(what: dict[str, Any]) -> str:
    """The SHA-256 of what a run depends on, as compact JSON with sorted keys."""
    return "sha256:" + hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def header_line(what: dict[str, Any]) -> str:
    """The file's first line."""
    return output.json_line("generate.batch", {"fingerprint": fingerprint(what), **what})


def read_header(path: Path) -> dict[str, Any] | None:
    """The first line of a file of answers; None where there is no file, or an empty one. Raises ToyllmError for any other file."""
    try:
        if path.is_dir() or (path.exists() and not stat.S_ISREG(path.stat().st_mode)):
            raise ToyllmError(f"{path}: expected a file to write answers to, found a folder or device; without --output they go to stdout")
        with path.open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise ToyllmError(f"{path}: no folder {path.parent} to write to") from None
        return None
    except OSError as error:
        raise ToyllmError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not line:
        return None
    try:
        header = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise ToyllmError(f"{path}: is there already, and no file of answers; {WAY_OUT}")
    return header


@dataclass
class Answers:
    """Where answers go: how many are there, and how many of them are errors."""

    put: Callable[[str], None]
    done: int = 0
    failed: int = 0

    def write(self, document: dict[str, Any]) -> None:
        """Add an answer as a line; an error is that and no more. Raises ToyllmError where that fails; none of it is there then."""
        failed = "error" in document
        self.put(json.dumps(document) + "\n" if failed else output.json_line("generate", document))
        self.done, self.failed = self.done + 1, self.failed + failed


@contextmanager
def open_answers(path: Path | None, what: dict[str, Any], lines: int) -> Iterator[Answers]:
    """The file at `path`, to add answers to those that it has, or stdout; with a header, where it is new. `lines` are those of the input.

    Raises ToyllmError, and has changed nothing, for the file of another run, for one that another process writes to, and for one whose
    lines are not the first answers in their order.
    """
    if path is None:
        output.write(header_line(what))
        yield Answers(output.write)
        return
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ToyllmError(f"{path}: cannot be written ({error.strerror or error})") from error
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ToyllmError(f"{path}: another process is writing to it; wait for its end, or give another --output") from error
        answers = Answers(lambda line: append(path, number, line))
        end = read_answers(path, number, answers, what, lines)
        os.ftruncate(number, end)
        if not end:
            append(path, number, header_line(what))
        yield answers
    finally:
        os.close(number)


def append(path: Path, number: int, line: str) -> None:
    """Write a line behind all that an open file has. Raises ToyllmError where it does not fit on the disk, say; none of it is left then."""
    data, at = line.encode(), os.lseek(number, 0, os.SEEK_END)
    try:
        if (written := os.write(number, data)) < len(data):
            os.write(number, data[written:])  # says why not
    except OSError as error:
        os.ftruncate(number, at)
        raise ToyllmError(f"{path}: cannot be written ({error.strerror or error}); the answers in it are whole, and stay") from error


def read_answers(path: Path, number: int, answers: Answers, what: dict[str, Any], lines: int) -> int:
    """Count the answers that a file has, and say where the last whole one ends. Raises ToyllmError where it is not this run's."""
    end = 0
    with os.fdopen(os.dup(number), "rb") as file:
        for n, line in enumerate(file):
            if n and not line.endswith(b"\n"):
                break
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if n == 0:
                check_header(path, found, what)
            elif not isinstance(found, dict) or found.get("line") != n or n > lines:
                raise ToyllmError(f"{path}: line {n + 1}: expected the answer to line {n} of the input; {WAY_OUT}")
            else:
                answers.done, answers.failed = n, answers.failed + ("error" in found)
            end += len(line)
    return end


def check_header(path: Path, found: Any, what: dict[str, Any]) -> None:
    """Raise ToyllmError, naming the first difference, where a file belongs to another run."""
    if isinstance(found, dict) and found.get("schema") == SCHEMA and found.get("fingerprint") == fingerprint(what):
        return
    theirs = flat(found if isinstance(found, dict) else {})
    ours = flat(json.loads(json.dumps(what)))
    different = next((key for key in ours if ours[key] != theirs.get(key)), None)
    if different is None:
        raise ToyllmError(f"{path}: is there already, from another run; {WAY_OUT}")
    was, now = (json.dumps(side.get(different)) for side in (theirs, ours))
    raise ToyllmError(f"{path}: is there already, from a run whose {different} was {was}, not {now}; {WAY_OUT}")


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """The leaves of nested objects under their paths, such as settings.seed."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return leaves
