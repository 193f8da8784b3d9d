"""The models on this machine: what `toyllm models` lists, and whether toyllm can run them."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..kernels.errors import ToyllmError
from .checkpoint import no_weights, read_index
from .config import FAMILIES
from .json_files import read_object
from .location import ModelFiles, cached, embedded, list_files


@dataclass(frozen=True)
class Available:
    """One model that `find_model` finds by name."""

    name: str
    kind: str  # embedded or cached
    model_type: str | None  # from its config.json
    nbytes: int  # its weights on disk
    folder: Path
    problem: str | None  # why toyllm cannot run it; None where it can


def available() -> list[Available]:
    """Every embedded model, then every cached one, by name. Nothing but config.json and an index is read."""
    return [describe(name, "embedded", folder) for name, folder in embedded().items()] + [
        describe(name, "cached", folder) for name, folder in cached().items()
    ]


def describe(name: str, kind: str, folder: Path) -> Available:
    """One model's entry. What is wrong with it is a part of the entry: a damaged model must not hide the others."""
    files = list_files(name, folder)
    shards = [files.weights] if files.weights else [path for path in folder.glob("*.safetensors") if path.is_file()]
    model_type = problem = None
    try:
        model_type = model_type_of(files)
        if model_type not in FAMILIES:
            problem = f"model_type {json.dumps(model_type)[:80]} is not supported"
        elif files.weights is None:
            require_shards(files)
    except ToyllmError as error:
        problem = str(error).removeprefix(f"{folder}: ")
    return Available(name, kind, model_type, sum(path.stat().st_size for path in shards), folder, problem)


def model_type_of(files: ModelFiles) -> str | None:
    """The architecture that config.json names; None where it names none. Raises ToyllmError where it cannot be read."""
    if files.config is None:
        raise ToyllmError("no config.json")
    value = read_object(files.config).get("model_type")
    return value[:80] if isinstance(value, str) else None


def require_shards(files: ModelFiles) -> None:
    """Raise ToyllmError where there is no index, or a shard of it is missing."""
    if files.index is None:
        raise no_weights(files.folder)
    read_index(files.index)
