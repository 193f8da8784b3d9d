"""Options that change what a model computes while it runs: what the commands that show a run share."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..kernels.errors import ToyllmError
from .options import Group, number, option, whole_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..models.changes import Change
    from ..models.model import Model

KINDS = ("patch", "scale", "add", "ablate")  # in the order in which they are made, whatever that of the options
FILES = ("patch", "add")
NAMED = (".npz", ".safetensors")  # files that have a name for each array
FIGURE = r"[0-9]{1,6}"


def several(text: str, name: str, metavar: str) -> tuple[Any, None]:
    """An option that may be given several times."""
    return number(list[str], text, name, metavar=metavar, callback=whole_text)


CHANGING: Group = {
    "ablate": several(
        "Set an activation to 0, by a name that dump-tensor lists with a prompt, or a glob, whole or a slice: 'blocks.5.attn.heads[:, 3]'.",
        "--ablate",
        "NAME",
    ),
    "patch": several(
        "Put values in its place: a .npy file's, what a .npz or .safetensors file has under its name, or a number: blocks.7.out=clean.npz.",
        "--patch",
        "NAME=FILE",
    ),
    "scale": several("Multiply it: 'blocks.*.mlp.out=0.5'.", "--scale", "NAME=N"),
    "add": several("Add such values to it: 'blocks.4.resid_mid[-1]=direction.npy'.", "--add", "NAME=FILE"),
    "experts": number(str, "Route tokens to these experts only: 3,7.", "--experts", metavar="LIST"),
    "map_file": (
        Annotated[
            Path | None, option("A TOML or JSON file that says which of such a file's arrays is which activation.", "--map", metavar="FILE")
        ],
        None,
    ),
}


def read_changes(context: typer.Context, changing: dict[str, Any]) -> "list[Change]":
    """The changes that the options of `CHANGING` ask for, with what their files hold.

    Raises a usage error for what is no name with a value, and ToyllmError for a file that cannot be read.
    """
    source = context.get_parameter_source("map_file")
    if source and source.name == "COMMANDLINE" and not any(text.endswith(NAMED) for kind in FILES for text in changing[kind] or ()):
        raise wrong(context, "map_file", "has no meaning without a .npz or .safetensors file to --patch or --add")
    given = [(kind, text) for kind in KINDS for text in changing[kind] or ()]
    if not given and changing["experts"] is None:
        return []

    from ..models.changes import Change, experts

    files: dict[str, Any] = {}
    changes = []
    for kind, text in given:
        where, sign, value = text.partition("=")
        if bool(sign) == (kind == "ablate") or not where.strip() or (sign and not value):
            expected = "a name, and no value" if kind == "ablate" else f"a name and {'a number' if kind == 'scale' else 'a file or number'}"
            raise wrong(context, kind, f"{text!r}: expected {expected}: {EXAMPLES[kind]}")
        changes.append(Change(kind, where, read_value(context, kind, value, changing["map_file"], files), value))
    if changing["experts"] is not None:
        changes.append(experts(*expert_numbers(context, changing["experts"])))
    return changes


EXAMPLES = {
    "patch": "blocks.7.out=clean.npy",
    "scale": "blocks.*.mlp.out=0.5",
    "add": "blocks.4.resid_mid=direction.npy",
    "ablate": "'blocks.5.attn.heads[:, 3]'",
}


def read_value(context: typer.Context, kind: str, text: str, map_file: Path | None, files: dict[str, Any]) -> Any:
    """A number, or what a file holds, which is read once."""
    from ..models import changes

    if not text:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        if kind not in FILES:
            raise wrong(context, kind, f"{text!r}: expected a number") from None
        if text not in files:
            files[text] = changes.read_value(Path(text), map_file)
        return files[text]
    if kind not in FILES and not math.isfinite(value):
        raise wrong(context, kind, f"{text!r}: expected a finite number")
    return value


def expert_numbers(context: typer.Context, text: str) -> list[int]:
    """The numbers in "3,7" or "0-3,7"."""
    if not re.fullmatch(rf"{FIGURE}(-{FIGURE})?(,{FIGURE}(-{FIGURE})?)*", text):
        raise wrong(context, "experts", f"{text!r}: expected numbers of experts, such as 3,7 or 0-3")
    bounds = [[int(n) for n in part.split("-")] for part in text.split(",")]
    numbers = [n for first, *last in bounds for n in range(first, (last or [first])[0] + 1)]
    if not numbers:
        raise wrong(context, "experts", f"{text!r}: expected ascending numbers")
    return numbers


def wrong(context: typer.Context, name: str, text: str) -> Exception:
    """A usage error of an option, wherever that was given."""
    parameter = next(p for p in context.command.params if p.name == name)
    return typer.BadParameter(text, ctx=context, param=parameter)


def check_names(name: str, changes: "Sequence[Change]") -> None:
    """Raise ToyllmError for a change of what the model does not have, before anything is read or run for it."""
    if changes:
        from ..models.changes import names_meant
        from ..models.config import load_config
        from ..models.location import find_model

        files = find_model(name)
        _, config = load_config(files)
        try:
            for change in changes:
                names_meant(change, config)
        except ToyllmError as error:
            raise ToyllmError(f"{files.name}: {error}") from error


def changes_entry(loaded: "Model") -> dict[str, Any]:
    """The changes of a run, as a JSON document's settings have them."""
    made = loaded.changes.made if loaded.changes else ()
    return {"changes": [{"kind": c.kind, "where": c.where, "value": c.source or None} for c in made]}
