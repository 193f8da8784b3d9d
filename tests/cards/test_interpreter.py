from pathlib import Path

import numpy as np
import pytest

from toyllm.cards.interpreter import run
from toyllm.cards.text import parse_all

LIBRARY = {
    card.name: card
    for file in sorted((Path(__file__).parents[2] / "cards/library").glob("*.card"))
    for card in parse_all(file.read_text(encoding="utf-8"), file.name)
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_layer_norm_of_the_library(dtype):
    rng = np.random.default_rng(1)
    x, γ, β = rng.normal(size=(3, 8)), rng.normal(size=8), rng.normal(size=8)
    found = run(LIBRARY["gpt2.LN"], LIBRARY, {"x": x, "γ": γ, "β": β}, {"D": 8, "ε": 1e-5}, dtype=dtype).outputs["y"]
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * γ + β
    assert found.dtype == dtype
    np.testing.assert_allclose(found, want, rtol=100 * np.finfo(dtype).eps, atol=100 * np.finfo(dtype).eps)


def test_parameters_and_activations_are_below_the_group():
    rng = np.random.default_rng(2)
    tensors = {
        "blocks.1.up.weight": rng.normal(size=(4, 6)),
        "blocks.1.up.bias": rng.normal(size=6),
        "blocks.1.down.weight": rng.normal(size=(6, 4)),
        "blocks.1.down.bias": rng.normal(size=4),
    }
    x = rng.normal(size=(3, 4))
    hypers = {"D": 4, "F": 6, "activation": "gelu_new"}
    made = run(LIBRARY["gpt2.FFN"], LIBRARY, {"x": x}, hypers, tensors.__getitem__, group="blocks.1")
    assert sorted(made.activations) == ["blocks.1.mlp.hidden", "blocks.1.mlp.out"]
    want = made.activations["blocks.1.mlp.hidden"] @ tensors["blocks.1.down.weight"] + tensors["blocks.1.down.bias"]
    np.testing.assert_allclose(made.outputs["y"], want)
