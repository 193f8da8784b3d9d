"""config.json as data: a frozen dataclass a family, read with every value checked and its origin known."""

import importlib
import json
import math
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_args, get_origin

from ..kernels.errors import ToyllmError
from .json_files import read_object
from .location import ModelFiles

FAMILIES = {"gpt2": "gpt2", "gpt_oss": "gpt_oss"}  # model_type in config.json -> the module of this package that runs it

C = TypeVar("C")
LARGEST = 2**31 - 1  # of any size or id: products of two stay exact in 64 bits


def size(default: int, most: int = LARGEST) -> Any:
    """A dataclass field for a dimension: an integer of at least 1."""
    return field(default=default, metadata={"least": 1, "most": most})


def layers(default: int) -> Any:
    """A dataclass field for a number of layers, small enough to name every tensor of them."""
    return size(default, most=10_000)


def optional_size() -> Any:
    """A dataclass field for a dimension that may be null."""
    return field(default=None, metadata={"least": 1})


def positive(default: float, most: float = math.inf) -> Any:
    """A dataclass field for a number above 0, and not above `most`."""
    return field(default=default, metadata={"above": 0.0, "most": most})


def family_of(document: dict[str, Any], where: Path) -> ModuleType:
    """The module that runs a checkpoint with this config.json, by its `model_type`."""
    model_type = document.get("model_type")
    if model_type is None and {"num_experts", "swiglu_limit"} <= document.keys():
        model_type = "gpt_oss"  # OpenAI's own config.json names no type
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ToyllmError(f"{where}: model_type {json.dumps(model_type)[:80]} is not supported; toyllm runs {known}")
    return importlib.import_module(f".{FAMILIES[model_type]}", __package__)


def optional_positive() -> Any:
    """A dataclass field for a number above 0 that may be null."""
    return field(default=None, metadata={"above": 0.0, "most": math.inf})


def read_config(cls: type[C], document: dict[str, Any], where: Path) -> C:
    """`cls` filled from the document's keys of the same names, its defaults elsewhere; keys it does not know are not looked at."""
    return cls(**{f.name: checked(document[f.name], f, where) for f in fields(cls) if f.name in document})  # type: ignore[arg-type]


def checked(value: Any, of: Field[Any], where: Path) -> Any:
    """`value` if it fits the field's type and bounds, else a ToyllmError; an integer passes for a float, never a bool for an integer."""

    def wrong(expected: str) -> ToyllmError:
        return ToyllmError(f"{where}: {of.name}: expected {expected}, found {json.dumps(value)[:80]}")

    allowed = get_args(of.type) or (of.type,)
    if value is None and type(None) in allowed:
        return None
    kind = next(t for t in allowed if t is not type(None))
    if of.name.endswith("_token_id"):
        return token_ids(value, wrong)
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise wrong("a list of strings")
        return tuple(value)
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    if type(value) is not kind:
        raise wrong({int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind])
    number: Any = value
    if kind is float and not math.isfinite(number):
        raise wrong("a finite number")
    most = of.metadata.get("most", LARGEST)
    if "least" in of.metadata and not of.metadata["least"] <= number <= most:
        raise wrong(f"an integer from {of.metadata['least']} to {most}")
    if "above" in of.metadata and not of.metadata["above"] < number <= most:
        raise wrong(f"a number above {of.metadata['above']:g}" + (f", at most {most}" if most < math.inf else ""))
    return value


def token_ids(value: Any, wrong: Any) -> tuple[int, ...]:
    """One id, a list of ids or null, as a tuple."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i <= LARGEST for i in ids):
        raise wrong("a token id, a list of them, or null")
    return tuple(ids)


def load_config(files: ModelFiles) -> tuple[ModuleType, Any]:
    """The family's module and its configuration, read and checked. Raises ToyllmError."""
    if files.config is None:
        raise ToyllmError(f"{files.folder}: no config.json beside the weights; copy it from the model's repository")
    document = read_object(files.config)
    family = family_of(document, files.config)
    config = read_config(family.Config, family.normalise(document), files.config)
    family.check(config, files.config)
    return family, config


def effective_config(files: ModelFiles) -> list[tuple[str, Any, str]]:
    """What the model will run with: (key, value, "file" or "default") for every key that toyllm reads."""
    family, config = load_config(files)
    document = family.normalise(read_object(files.config)) if files.config else {}
    return [(f.name, getattr(config, f.name), "file" if f.name in document else "default") for f in fields(config)]


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model's generation_config.json says about sampling; None where it is silent. The names are the file's."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    bos_token_id: tuple[int, ...] | None = None
    eos_token_id: tuple[int, ...] | None = None


def generation_defaults(files: ModelFiles) -> GenerationDefaults:
    """generation_config.json, or nothing but None without one."""
    if files.generation_config is None:
        return GenerationDefaults()
    return read_config(GenerationDefaults, read_object(files.generation_config), files.generation_config)
