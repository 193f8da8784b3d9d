"""`toyllm tokenize`: a text as a model sees it: ids, pieces, and the bytes that each piece covers."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..kernels.errors import ToyllmError
from . import output
from .options import DEFAULT_MODEL, Json, Model, option
from .prompt import given_text, read_stdin

if TYPE_CHECKING:
    from ..models.location import ModelFiles
    from ..models.tokenizer import Tokenizer


def tokenize(
    context: typer.Context,
    text: Annotated[str | None, typer.Argument(help="The text; - or nothing reads stdin.", metavar="TEXT", show_default=False)] = None,
    model: Model = DEFAULT_MODEL,
    ids: Annotated[bool, option("Only the ids, on one line: what --prompt-ids and detokenize take.", "--ids")] = False,
    count: Annotated[bool, option("Only how many tokens there are.", "--count")] = False,
    no_special: Annotated[bool, option("Take special tokens in the text, such as <|endoftext|>, as plain text.", "--no-special")] = False,
    json: Json = False,
) -> None:
    """Show the tokens of a text: id, piece, and the bytes it covers.

    A piece is a Python literal: 'text' where its bytes are whole characters, b'...' where they are not.
    """
    if ids + count + json > 1:
        raise typer.BadParameter("give one of them", ctx=context, param_hint="--ids, --count, --json")
    if text is None and sys.stdin.isatty():
        raise typer.BadParameter('none given; try: toyllm tokenize "Once upon a time"', ctx=context, param_hint="TEXT")
    given = read_stdin() if text is None or text == "-" else given_text(text)
    _, tokenizer = find_tokenizer(model)
    if ids or count:
        found = tokenizer.encode(given, special=not no_special)
        output.write((str(len(found)) if count else " ".join(map(str, found))) + "\n")
        return
    pieces = tokenizer.pieces(given, special=not no_special)
    if json:
        output.write_json("tokenize", {"text": given, "ids": [p.id for p in pieces], "pieces": [p._asdict() for p in pieces]})
        return
    rows = [(str(p.id), literal(tokenizer.token_bytes(p.id)), f"{p.start}:{p.end}") for p in pieces]
    output.table(("id", "piece", "bytes"), rows, right=(0, 2))


def find_tokenizer(model: str) -> "tuple[ModelFiles, Tokenizer]":
    """Load the tokenizer of a model, and say which files the model has. Raises ToyllmError where it has none."""
    from ..models.location import find_model
    from ..models.tokenizer import load_tokenizer

    files = find_model(model)
    tokenizer = load_tokenizer(files)
    if tokenizer is None:
        raise ToyllmError(
            f"{model}: no byte-level tokenizer in {files.folder}: expected tokenizer.json, or vocab.json and merges.txt; "
            "copy them from the model's repository"
        )
    return files, tokenizer


def literal(data: bytes) -> str:
    """Write a piece as Python does, so that spaces, control characters and parts of characters show."""
    try:
        return repr(data.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(data)
