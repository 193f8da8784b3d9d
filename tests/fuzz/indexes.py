"""model.safetensors.index.json: whatever it says, nothing outside its folder is opened, and the tensors are those of the shards."""

import json
import os
from dataclasses import replace
from pathlib import Path
from random import Random

from toyllm.kernels.errors import ToyllmError
from toyllm.models.available import describe
from toyllm.models.checkpoint import open_checkpoint

from . import checkpoints
from .headers import NO_FILES
from .leg import Find, Leg, Trial, refused
from .mutate import chance, json_text

SHARDS = {"one.safetensors": {"a": 1, "b": 2}, "two.safetensors": {"c": 3}, "sub/three.safetensors": {"d": 4, "é": 5}}
OUTSIDE = {"secret": 6, "a": 7}


def write(path: Path, tensors: dict[str, int]) -> None:
    """A shard of tensors of one byte each."""
    path.write_bytes(checkpoints.file_bytes({name: ("U8", (1,), bytes([value])) for name, value in tensors.items()}))


def make_folder(folder: Path) -> Path:
    """A model's folder with shards, and with links and names that lead out of it or to what is no file."""
    model = folder / "model"
    (model / "sub").mkdir(parents=True)
    for name, tensors in SHARDS.items():
        write(model / name, tensors)
    (folder / "elsewhere").mkdir()
    for path in (folder / "outside.safetensors", folder / "elsewhere" / "inner.safetensors", folder / "model-other.safetensors"):
        write(path, OUTSIDE)
    (model / "link.safetensors").symlink_to("../outside.safetensors")
    (model / "within.safetensors").symlink_to("two.safetensors")
    (model / "dirlink").symlink_to("../elsewhere")
    (model / "up").symlink_to("..")
    (model / "loop.safetensors").symlink_to("loop.safetensors")
    (model / "gone.safetensors").symlink_to("nowhere")
    (model / "hard.safetensors").symlink_to(folder / "outside.safetensors")
    os.mkfifo(model / "fifo.safetensors")
    return model


def names(model: Path) -> list[str]:
    """What an index may call a shard."""
    inside = [*SHARDS, *SHARDS, "./one.safetensors", "sub//three.safetensors", "sub/./three.safetensors", "within.safetensors"]
    links = ["link.safetensors", "hard.safetensors", "dirlink/inner.safetensors", "up/outside.safetensors", "loop.safetensors"]
    links += ["up/model/one.safetensors", "up/model-other.safetensors", "gone.safetensors", "fifo.safetensors", "sub", "dirlink", "up"]
    out = [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "sub/../one.safetensors",
        "..",
        ".",
        "",
        "/",
        "../model/one.safetensors",
    ]
    out += [
        str(model / "one.safetensors"),
        str(model.parent / "outside.safetensors"),
        f"//{model}/one.safetensors",
        "/dev/zero",
        "/dev/stdin",
    ]
    odd = [
        "one.safetensors\0",
        "one.safetensors\0.x",
        "one\n.safetensors",
        "\x1b[2J",
        "\ud800",
        "one.safetensors/",
        "ONE.safetensors",
        " one.safetensors",
    ]
    odd += [
        "~/one.safetensors",
        "$HOME",
        "%2e%2e/outside.safetensors",
        "..\\outside.safetensors",
        "\u2025/outside.safetensors",
        "x" * 300,
        "a/" * 3000,
    ]
    return [*inside, *inside, *links, *out, *odd, "file:///etc/passwd", "http://localhost/one.safetensors", "missing.safetensors"]


def index_text(rng: Random, some: list[str]) -> bytes:
    """An index, sound or damaged."""
    weight_map = {tensor: name for name, tensors in SHARDS.items() for tensor in tensors if chance(rng, 0.9)}
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        weight_map[rng.choice([*weight_map, "a", "c", "secret", "other", "", "\x1b[31m"])] = rng.choice(some)
    document = {"metadata": {"total_size": 5}, "weight_map": weight_map}
    if chance(rng, 0.1):
        document = rng.choice(([], weight_map, {"weight_map": []}, {"weight_map": {}}, {"weight_map": [weight_map]}, {"weight_map": None}))
    return json_text(rng, document, most=rng.choice((0, 0, 1, 2)))


def check_index(model: Path, text: bytes) -> str:
    """Open the model with this index, and look at what was opened. Raises Find."""
    index = model / "model.safetensors.index.json"
    index.write_bytes(text)
    described = describe("fuzz", "cached", model)  # what `toyllm models` does with it
    if described.problem is not None and "\n" in described.problem:
        raise Find(f"`toyllm models`: {described.problem!r}")
    try:
        checkpoint = open_checkpoint(replace(NO_FILES, folder=model, index=index))
    except ToyllmError as error:
        line = refused(error)
        if not line.isprintable():
            raise Find(f"the error is not printable: {line!r}") from error
        return "refused"
    for path in checkpoint.shards:
        if not path.resolve().is_relative_to(model.resolve()):
            raise Find(f"{path} is outside the model's folder: {path.resolve()}")
    values = {tensor: value for tensors in SHARDS.values() for tensor, value in tensors.items()}
    for name in checkpoint.tensors:
        if checkpoint.array(name).tolist() != [values[name]]:
            raise Find(f"{name!r} is not the shard's")
    if missing := json.loads(text)["weight_map"].keys() - checkpoint.tensors.keys():
        raise Find(f"the index names {missing}, which no shard has")
    return "opened"


def prepare(folder: Path) -> Trial:
    model = make_folder(folder)
    some = names(model)
    return lambda rng: check_index(model, index_text(rng, some))


LEG = Leg("indexes of shards: damaged, or naming files elsewhere", prepare)
