"""Where a prompt comes from: the argument, a pipe, or token ids."""

import os
import re
import sys
from pathlib import Path

import typer

from ..kernels.errors import ToyllmError


def read_stdin() -> str:
    """All of stdin, line ends as they are. Raises ToyllmError where it is not UTF-8."""
    return decode("stdin", sys.stdin.buffer.read())


def read_file(name: str) -> str:
    """All of a text file, line ends as they are. Raises ToyllmError where it cannot be read, or is not UTF-8."""
    try:
        return decode(name, Path(name).read_bytes())
    except OSError as error:
        raise ToyllmError(
            f"{name}: cannot be read ({error.strerror or error}); expected a text file; - is stdin, --prompt takes a text itself"
        ) from error


def decode(where: str, data: bytes) -> str:
    """Text from its UTF-8. Raises ToyllmError that says where it came from, and at which byte it is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        raise ToyllmError(f"{where}: byte {at} (0x{data[at]:02x}): expected UTF-8 ({error.reason}); convert the text first") from error


def given_text(text: str) -> str:
    """A text of the command line, which is UTF-8 in any locale: what Python could not decode by the locale's rules is decoded here.

    Bytes that are no UTF-8 stay the lone surrogates that Python makes of them.
    """
    if text.isascii() or not any("\udc80" <= c <= "\udcff" for c in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def parse_ids(text: str) -> list[int]:
    """Token ids from text, with spaces or commas between. Raises ValueError for anything else, and for none."""
    words = re.split(r"[\s,]+", text.strip(" \t\r\n,"))
    if words == [""]:
        raise ValueError("no ids given")
    wrong = next((word for word in words if not re.fullmatch(r"[0-9]{1,18}", word)), None)
    if wrong is not None:
        raise ValueError(f"{wrong[:40]!r} is not a token id: expected whole numbers with spaces or commas between")
    return [int(word) for word in words]


def read_prompt(context: typer.Context, text: str | None, ids: str | None) -> str | list[int]:
    """The prompt as text, or as ids where they are given. A pipe's last line break is dropped: `echo` adds one that nobody means."""
    if ids is not None:
        if text is not None:
            raise typer.BadParameter("give a text or ids, not both", ctx=context, param_hint="PROMPT, --prompt-ids")
        try:
            return parse_ids(ids)
        except ValueError as error:
            raise typer.BadParameter(f"{error}", ctx=context, param_hint="--prompt-ids") from error
    if text is not None and text != "-":
        return given_text(text)
    if sys.stdin.isatty() and text is None:
        raise typer.BadParameter(f'none given; try: {context.command_path} "Once upon a time"', ctx=context, param_hint="PROMPT")
    return read_stdin().removesuffix("\n")
