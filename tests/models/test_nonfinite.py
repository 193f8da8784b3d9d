"""Where NaN begins: named with its token, however few tokens a pass takes."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

import toyllm
from toyllm.models.config import load_config
from toyllm.models.location import find_model
from toyllm.models.nonfinite import origin

from ..fuzz import checkpoints


@pytest.mark.parametrize("chunk", [1, 3, 512])
@pytest.mark.parametrize("name", ["embed", "head"])
def test_the_first_activation_that_is_not_finite_is_named(tmp_path: Path, name: str, chunk: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps(checkpoints.GPT2 | {"tie_word_embeddings": False}))
    _, config = load_config(find_model(str(tmp_path)))
    weights = {spec.name: checkpoints.stored(Random(1), spec, "F32", wild=False) for spec in checkpoints.specs(config, "")}
    stored = "wte.weight" if name == "embed" else "lm_head.weight"
    dtype, shape, data = weights[stored]
    values = np.frombuffer(data, np.float32).reshape(shape).copy()
    values[7] = np.nan
    (tmp_path / "model.safetensors").write_bytes(checkpoints.file_bytes(weights | {stored: (dtype, shape, values.tobytes())}))
    model = toyllm.load(str(tmp_path), prefill_chunk=chunk)
    ids = [1, 2, 3, 4, 7, 5, 6]
    if name == "embed":
        assert origin(model, ids) == "embed, at position 4"
        assert origin(model, ids[:4]) is None
    else:  # logits are the last token's of a pass
        assert origin(model, ids) == f"logits, at position {min(chunk, len(ids)) - 1}"
