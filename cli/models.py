"""`toyllm models`: the models on this machine, or the files and the effective configuration of one."""

import json as js
from typing import Annotated

import typer

from . import output
from .options import Json

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def models(
    name: Annotated[str | None, typer.Argument(help="A model, as --model takes it.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """List the embedded and the cached models, or show one: its files and the configuration it runs with."""
    if name is None:
        show_all(json)
    else:
        show_one(name, json)


def show_all(json: bool) -> None:
    """Write the list of models: one row each."""
    from ..models.available import available

    found = available()
    if json:
        entries = [
            {
                "name": model.name,
                "kind": model.kind,
                "model_type": model.model_type,
                "weights_bytes": model.nbytes,
                "folder": str(model.folder),
                "runs": model.problem is None,
                "problem": model.problem,
            }
            for model in found
        ]
        output.write_json("models", {"models": entries})
        return
    rows = [
        (m.name, m.kind, m.model_type or "-", size_text(m.nbytes), str(m.folder), f"no: {m.problem}" if m.problem else "yes") for m in found
    ]
    output.table(("name", "kind", "type", "weights", "folder", "runs"), rows, right=(3,))


def show_one(name: str, json: bool) -> None:
    """Write a model's files, then every configuration key that toyllm reads, with its value and where that comes from."""
    from ..models.config import effective_config
    from ..models.location import find_model

    files = find_model(name)
    roles = ("weights", "index", "config", "generation_config", "tokenizer", "vocab", "merges")
    paths = {role: path for role in roles if (path := getattr(files, role))}
    config = effective_config(files)
    if json:
        keys = [{"key": key, "value": value, "from": origin} for key, value, origin in config]
        document = {"name": name, "folder": str(files.folder), "files": {role: str(path) for role, path in paths.items()}, "config": keys}
        output.write_json("models", {"model": document})
        return
    output.table(("file", "size", "path"), [(role, size_text(path.stat().st_size), str(path)) for role, path in paths.items()], right=(1,))
    output.write("\n")
    output.table(("key", "value", "from"), [(key, js.dumps(value, ensure_ascii=False), origin) for key, value, origin in config])


def size_text(nbytes: int) -> str:
    """Bytes as a person reads them, in powers of 1000 and three digits: 548 MB, 13.8 GB."""
    amount, unit = float(nbytes), 0
    while amount >= 999.5 and unit < len(UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.3g} {UNITS[unit]}"
