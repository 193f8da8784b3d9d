"""What the tests of cut checkpoints look at them with."""

import json
from pathlib import Path
from typing import Any

import numpy as np

import toyllm
from toyllm.models.activations import record
from toyllm.models.check import check
from toyllm.models.checkpoint import open_checkpoint
from toyllm.models.config import effective_config, load_config
from toyllm.models.location import find_model

GOLDENS = Path(__file__).parent / "goldens"
EMBEDDED = ("tales-gpt2", "tales-gpt-oss")

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def at(model: str) -> str:
    """An embedded model by its name, or the folder of a golden one."""
    return model if model in EMBEDDED else str(GOLDENS / model)


def tensors_of(model: str | Path) -> Tensors:
    """Every tensor's dtype, shape and bytes."""
    checkpoint = open_checkpoint(find_model(str(model)))
    return {name: (t.dtype, t.shape, checkpoint.array(name).tobytes()) for name, t in checkpoint.tensors.items()}


def array(model: str | Path, name: str) -> np.ndarray:
    return open_checkpoint(find_model(str(model))).array(name)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def means(model: str | Path) -> dict[str, Any]:
    """The configuration that a model runs with, its layers' kinds spelled out."""
    _, config = load_config(find_model(str(model)))
    found = {key: value for key, value, _ in effective_config(find_model(str(model)))}
    return found | ({"layer_types": config.sliding} if "layer_types" in found else {})


def activations(model: str | Path, ids: list[int]) -> dict[str, np.ndarray]:
    """Every activation of a run."""
    return record(toyllm.load(str(model), exact=True), ids, lambda _: True)[0]


def ids_for(model: str | Path, T: int = 9) -> list[int]:
    return np.random.default_rng(5).integers(0, means(model)["vocab_size"], T).tolist()


def holds(folder: Path) -> bool:
    return check(find_model(str(folder))).holds
