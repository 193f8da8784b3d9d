"""The one place that prints: data on stdout; notes, warnings, errors, progress and statistics on stderr."""

import json
import logging
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO

from ..kernels.errors import ToyllmError


def open_streams() -> bool:
    """Make the standard streams UTF-8, whatever the locale; True unless there is no stdout to write to, which is said.

    A stream that the caller closed is None in Python: stdin and stderr then lead nowhere.
    """
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: PTH123, SIM115 - for as long as the process lives
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115
    stderr: Any = sys.stderr
    stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    if sys.stdout is None:
        say("error: stdout is closed, so there is nowhere to write to; redirect it to a file or to /dev/null")
        return False
    # Opened anew: under PYTHONUNBUFFERED Python's own does not notice when the system takes only a part of what it writes.
    number = sys.stdout.fileno()
    sys.stdout = open(number, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    return True


def write(text: str) -> None:
    """Data, as it is, to stdout, at once. Raises ToyllmError where stdout does not take it, BrokenPipeError where nobody reads any more."""
    with stdout_named():
        sys.stdout.write(text)
        sys.stdout.flush()


def write_bytes(data: bytes) -> None:
    """Data that is no text, or perhaps none, to stdout; raises as `write` does."""
    with stdout_named():
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


@contextmanager
def stdout_named() -> Iterator[None]:
    """Say of a failure to write that it was stdout's."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ToyllmError(f"stdout: cannot be written ({error.strerror or error}); what came before is incomplete") from error


def write_json(command: str, document: dict[str, Any]) -> None:
    """One JSON document with its schema first, to stdout."""
    write(json_line(command, document))


def json_line(command: str, document: dict[str, Any]) -> str:
    """A JSON document with its schema first, as a line. A bare NaN or infinity is refused: JSON has none."""
    text = json.dumps({"schema": f"toyllm.{command}/1", **document}, ensure_ascii=False, allow_nan=False)
    return "".join(c if c.isascii() or printable(c) == c else json.dumps(c)[1:-1] for c in text) + "\n"


def say(text: str) -> None:
    """A line for the person, to stderr."""
    write_aside(text + "\n")


def say_dimmed(text: str) -> None:
    """Text for the person to read the data after, to stderr, without a line break; dimmed where colours belong."""
    write_aside(f"\x1b[2m{text}\x1b[0m" if colours(sys.stderr) else text)


def write_aside(text: str) -> None:
    """Write to stderr. Where it takes no more (full, its reader gone, its terminal closed) the rest leads nowhere: data comes first."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        give_up(sys.stderr)


def give_up(stream: TextIO) -> None:
    """Let a standard stream lead nowhere from now on: Python's own flush at exit would fail on it once again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def byte_bar(label: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """A bar of bytes on stderr, shown from the first call of progress(done, total) on; only on a terminal."""
    return count_bar(label, None)


def token_bar(label: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """As `byte_bar`, of tokens."""
    return count_bar(label, "tokens")


@contextmanager
def count_bar(label: str, unit: str | None, wanted: bool = True) -> Iterator[Callable[..., None]]:
    """A bar of counts of a unit; of bytes where it is None. progress(done, total, note) shows a note behind them.

    Off a terminal, or where it is not `wanted`, nothing is shown.
    """
    if not (wanted and colours(sys.stderr)):
        yield lambda done, total, note="": None  # noqa: ARG005
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = (MofNCompleteColumn(), TextColumn(unit)) if unit else (DownloadColumn(), TransferSpeedColumn())
    described, noted = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[note]}", markup=False)
    columns = (described, BarColumn(), *amount, TimeRemainingColumn(), noted)
    # Rich would take what goes to stdout meanwhile, and print it on stderr.
    bar, task = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False), None

    def progress(done: int, total: int, note: str = "") -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task(one_line(label), total=total, note="")
        bar.update(task, completed=done, note=note)

    try:
        yield progress
    finally:
        bar.stop()


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """A line on stderr that each call of show(text) replaces; only on a terminal. An empty text takes it away, as the end does.

    Unlike a bar it has no thread of its own: what is being measured has the processor to itself.
    """
    shown = colours(sys.stderr)

    def show(text: str) -> None:
        if shown:
            write_aside("\r\x1b[2K" + one_line(text)[: shutil.get_terminal_size().columns - 1])

    try:
        yield show
    finally:
        show("")


def printable(text: str) -> str:
    r"""Text from a file or a model, safe for a terminal: control and format characters become escapes such as \x1b."""
    if text.isprintable():  # nearly always, and then a hundred times as fast: none of those categories is
        return text
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else escape(c) for c in text)


def one_line(text: str) -> str:
    """`printable`, with line breaks and tabs escaped too: for names, pieces and error messages."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def escape(character: str) -> str:
    r"""The character as Python writes it: \x1b, \u202e, \U000e0041."""
    return character.encode("unicode_escape").decode("ascii")


def colours(stream: TextIO) -> bool:
    """Whether colour and bars belong on this stream: a terminal, no NO_COLOR, and not a dumb one."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def table(header: Iterable[str], rows: Iterable[Iterable[str]], right: Iterable[int] = ()) -> None:
    """A plain table to stdout: two spaces between columns, the columns in `right` aligned right; never wrapped or cut."""
    write("".join(line + "\n" for line in table_lines(header, rows, right)))


def table_lines(header: Iterable[str], rows: Iterable[Iterable[str]], right: Iterable[int] = ()) -> list[str]:
    """The lines of a table."""
    lines = [[one_line(cell) for cell in row] for row in (list(header), *rows)]
    widths = [max(display_width(row[i]) for row in lines) for i in range(len(lines[0]))]
    flush_right = set(right)

    def pad(cell: str, i: int) -> str:
        space = " " * (widths[i] - display_width(cell))
        return space + cell if i in flush_right else cell + space

    return ["  ".join(pad(cell, i) for i, cell in enumerate(row)).rstrip() for row in lines]


def display_width(text: str) -> int:
    """Columns on a terminal: wide East Asian characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


class Notes(logging.Handler):
    """Shows what the packages below log to "toyllm": `note:` and `warning:` lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record as one line."""
        say(f"{'warning' if record.levelno >= logging.WARNING else 'note'}: {one_line(record.getMessage())}")


def show_notes() -> None:
    """Send the packages' notes to stderr from now on."""
    logger = logging.getLogger("toyllm")
    if not any(isinstance(h, Notes) for h in logger.handlers):
        logger.addHandler(Notes())
    logger.setLevel(logging.INFO)
    logger.propagate = False
