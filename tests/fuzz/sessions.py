"""Session files of a small model, damaged, their checksums made right again: refused in a line, or a text that goes on."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models import session
from toyllm.models.checkpoint import map_files
from toyllm.models.config import load_config
from toyllm.models.generation import Settings, generate
from toyllm.models.held import Held
from toyllm.models.location import find_model
from toyllm.models.model import Model

from . import checkpoints
from .leg import Find, Leg, Trial, refused
from .mutate import chance, json_text, mutate_bytes

ROOM = 16
DTYPES = [np.dtype(kind) for kind in ("<i8", "<i4", "u1", "<f4", "<f8", "?")]
TALK = {"opening": {"reasoning": "low", "date": "2025-01-01", "instructions": None}, "messages": [], "turns": 1}


class Saved:
    """A model and what its session file holds: arrays by name, and the metadata."""

    def __init__(self, folder: Path, family: str) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(checkpoints.CONFIGS[family]))
        _, config = load_config(find_model(str(folder)))
        checkpoints.write_weights(Random(1), folder, checkpoints.specs(config, "mxfp4"))
        self.model: Model = toyllm.load(str(folder), threads=1)
        self.path = folder / "saved.safetensors"
        held = Held(self.model, ROOM)
        held.read([1, 2, 3, 4, 5, 6, 7])
        session.SessionFile(self.path, self.model).save(held)
        header = self.path.read_bytes()
        self.metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
        self.arrays = {name: map_files([self.path]).array(name).copy() for name in map_files([self.path]).tensors}


def damaged(rng: Random, array: np.ndarray) -> np.ndarray:
    """An array whose values, length, shape or dtype are others."""
    how = rng.randrange(6)
    if how == 0 and array.size and array.dtype == np.int64:
        array = array.copy()
        array.flat[rng.randrange(array.size)] = rng.choice((-1, 0, 1, 23, 24, 2**31, 2**63 - 1, -(2**63)))
    elif how == 1 and array.size:
        array = array.copy()
        array.reshape(-1).view(np.uint8)[rng.randrange(array.nbytes)] ^= 1 << rng.randrange(8)
    elif how == 2 and array.ndim:
        axis = rng.randrange(array.ndim)
        array = np.take(array, rng.choice(([0], [], [0, 0], [*range(array.shape[axis])] * 2)) if array.shape[axis] else [], axis)
    elif how == 3:
        array = array.reshape(rng.choice(((-1,), (1, *array.shape), (*array.shape, 1), array.shape[::-1])))
    elif how == 4:
        array = np.zeros(array.shape, rng.choice(DTYPES))
    else:
        array = np.concatenate([array, array]) if array.ndim else array
    return np.ascontiguousarray(array)


def file_bytes(rng: Random, saved: Saved, path: Path) -> bytes:
    """A session file: its arrays or its metadata changed, and the checksum of that; or any of its bytes."""
    arrays: dict[str, Any] = dict(saved.arrays)
    metadata = {key: value for key, value in saved.metadata.items() if key != "sha256"}
    for _ in range(rng.choice((0, 1, 1, 2))):
        name = rng.choice([*arrays]) if arrays else "ids"
        how = rng.randrange(5)
        if how < 3 and arrays:
            arrays[name] = damaged(rng, arrays[name])
        elif how == 3 and arrays:
            arrays[rng.choice((name + "x", "ids", "2.keys", ""))] = arrays.pop(name)
        else:
            key = rng.choice([*metadata, "talk", "more"])
            metadata[key] = rng.choice(
                ("", "{}", "[]", "\x1b[2J", metadata.get(key, "a") + " ", json_text(rng, TALK).decode("utf-8", "replace"))
            )
    if chance(rng, 0.1):
        metadata["talk"] = json_text(rng, TALK).decode("utf-8", "replace")
    with path.open("wb") as file:
        session.write(file, arrays, metadata)
    content = path.read_bytes()
    return mutate_bytes(rng, content) if chance(rng, 0.2) else content


def check_session(rng: Random, saved: Saved) -> str:
    """Open a damaged session and go on from it. Raises Find."""
    path = saved.path.with_name("session.safetensors")
    content = file_bytes(rng, saved, path)
    path.write_bytes(content)
    try:
        found = session.SessionFile(path, saved.model, talks=chance(rng, 0.2)).session
        if found is None:
            raise Find("no session was found in a file that is there")
        held = Held(saved.model, ROOM)
        held.restore(found.ids, found.states)
        settings = Settings(max_tokens=2, temperature=0)
        with np.errstate(all="ignore"):
            for _ in generate(saved.model, [*found.ids, 1], settings, held=held):
                pass
    except ToyllmError as error:
        refused(error)
        if path.read_bytes() != content:
            raise Find("a session that was refused has been changed") from error
        return "no token can be drawn" if "no token can be drawn" in str(error) else "refused"
    return "gone on"


def prepare(folder: Path) -> Trial:
    some = [Saved(folder / family, family) for family in checkpoints.CONFIGS]
    return lambda rng: check_session(rng, rng.choice(some))


LEG = Leg("session files, damaged", prepare)
