"""`toyllm detokenize`: the text of token ids, byte for byte."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ..kernels.errors import ToyllmError
from . import output
from .options import DEFAULT_MODEL, Json, Model
from .prompt import parse_ids, read_stdin
from .tokenize import find_tokenizer

if TYPE_CHECKING:
    from ..models.location import ModelFiles
    from ..models.tokenizer import Tokenizer


def detokenize(
    context: typer.Context,
    ids: Annotated[
        list[str] | None,
        typer.Argument(help="Token ids, with spaces or commas between; - or nothing reads stdin.", metavar="IDS", show_default=False),
    ] = None,
    model: Model = DEFAULT_MODEL,
    json: Json = False,
) -> None:
    """Write the text of token ids: exactly its bytes into a pipe or file, escaped and ended with a line break on a terminal."""
    if not ids and sys.stdin.isatty():
        raise typer.BadParameter('none given; try: toyllm detokenize "464 3290"', ctx=context, param_hint="IDS")
    try:
        found = parse_ids(" ".join(ids) if ids and ids != ["-"] else read_stdin())
    except ValueError as error:
        raise typer.BadParameter(str(error), ctx=context, param_hint="IDS") from error
    files, tokenizer = find_tokenizer(model)
    check_ids(found, files, tokenizer)
    if json:
        output.write_json("detokenize", {"ids": found, "text": tokenizer.decode(found)})
    elif sys.stdout.isatty():
        output.write(output.printable(tokenizer.decode(found)) + "\n")
    else:
        output.write_bytes(b"".join(map(tokenizer.token_bytes, found)))


def check_ids(ids: list[int], files: "ModelFiles", tokenizer: "Tokenizer") -> None:
    """Raise ToyllmError for an id that the model does not have: beyond its tokens, and beyond the rows of its embedding."""
    from ..models.json_files import read_object

    rows = read_object(files.config).get("vocab_size") if files.config else None
    size = max(tokenizer.vocab_size, rows if isinstance(rows, int) else 0)
    beyond = next((i for i in ids if i >= size), None)
    if beyond is not None:
        raise ToyllmError(f"token id {beyond}: {files.name} has ids 0 to {size - 1}; give the model that the ids come from with -m")
