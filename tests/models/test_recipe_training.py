"""Training the embedded models: the schedule, and tiny runs held against transformers."""

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from toyllm.kernels.errors import ToyllmError
from toyllm.models.location import EMBEDDED
from toyllm.models.recipe import mxfp4
from toyllm.models.recipe.export import export
from toyllm.models.recipe.train import RECIPES, Recipe, learning_rate, main, train


def test_learning_rate_rises_to_the_peak_and_falls_to_a_twentieth():
    recipe = replace(RECIPES["gpt2"], steps=1000, warmup=100, peak=1.0)
    rates = [learning_rate(recipe, step) for step in range(recipe.steps)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert rates.index(max(rates)) == 99
    assert all(a > b for a, b in pairwise(rates[99:]))
    assert learning_rate(recipe, recipe.steps // 2) == pytest.approx(0.05 + 0.95 / 2)
    assert rates[-1] == pytest.approx(0.05, abs=1e-4)


def test_recipes_take_the_steps_of_the_shipped_models():
    assert RECIPES["gpt2"].steps == json.loads((EMBEDDED / "tales-gpt2" / "training.json").read_text())["steps"]
    assert RECIPES["gpt_oss"].steps == 2704


def test_training_without_a_corpus_says_how_to_make_one(tmp_path):
    with pytest.raises(ToyllmError, match=r"train\.npy does not exist\. Make it first: .*recipe\.corpus BOOKS"):
        main(["gpt2", str(tmp_path), str(tmp_path / "out")])


def test_training_without_torch_says_what_to_install(tmp_path, monkeypatch):
    for name in ("train", "held_out"):
        np.save(tmp_path / f"{name}.npy", np.zeros(1000, np.uint16))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ToyllmError, match=r"training needs torch, which is not installed\. Run: pip install torch"):
        main(["gpt2", str(tmp_path), str(tmp_path / "out")])


def test_training_for_no_steps_is_wrong_usage(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["gpt2", str(tmp_path), str(tmp_path / "out"), "--steps", "0"])
    assert "--steps: expected 1 or more, found 0" in capsys.readouterr().err


TINY = {
    "gpt2": {"vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "gpt_oss": {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 4,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 64,
    },
}


def tiny(architecture: str, **changes) -> Recipe:
    """A recipe that takes a moment: two steps, the second of them in MXFP4 for gpt_oss."""
    recipe = RECIPES[architecture]
    smaller = {"steps": 2, "warmup": 1, "window": 16, "batch": 2, "mxfp4_from": 0.5 if architecture == "gpt_oss" else 1.0}
    return replace(recipe, config=recipe.config | TINY[architecture], **(smaller | changes))


@pytest.fixture
def tiny_data(tmp_path) -> Path:
    """A corpus as the corpus script leaves it: a tale of 40 words, told again and again."""
    ids = np.tile(np.random.default_rng(0).integers(0, 300, 40).astype(np.uint16), 10)
    np.save(tmp_path / "train.npy", ids)
    np.save(tmp_path / "held_out.npy", ids[:100])
    (tmp_path / "tokenizer.json").write_bytes((EMBEDDED / "tales-gpt2" / "tokenizer.json").read_bytes())
    return tmp_path


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")  # of other people's imports
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_oss"])
def test_two_steps_and_export_give_a_model_that_transformers_loads(tmp_path, tiny_data, architecture):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    train(tiny(architecture), tiny_data, tmp_path / "trained")
    files = {"config.json", "generation_config.json", "model.safetensors", "training.json"}
    assert {path.name for path in (tmp_path / "trained").iterdir()} == files
    export(architecture, tmp_path / "trained", tiny_data, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["tokens_seen"] == 64
    assert 0 < record["held_out_loss_nats_per_token"] < 1.1 * math.log(300)

    ids = torch.arange(12)[None]
    unpack = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if architecture == "gpt_oss" else {}
    load = transformers.AutoModelForCausalLM.from_pretrained
    before = load(tmp_path / "trained", dtype=torch.float32)(input_ids=ids).logits
    after = load(tmp_path / "out", dtype=torch.float32, **unpack)(input_ids=ids).logits
    assert (before - after).abs().max() < 0.02 * before.abs().max()  # bf16 is all that export takes


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")  # of other people's imports
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_oss"])
def test_an_interrupted_run_continues_to_the_same_weights(tmp_path, tiny_data, architecture, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    recipe = tiny(architecture, steps=4)
    train(recipe, tiny_data, tmp_path / "straight", checkpoint_every=1)

    def interrupt(recipe: Recipe, step: int) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return learning_rate(recipe, step)

    monkeypatch.setattr("toyllm.models.recipe.train.learning_rate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tiny_data, tmp_path / "resumed", checkpoint_every=1)
    monkeypatch.undo()
    with pytest.raises(ToyllmError, match="of a run with other settings"):
        train(replace(recipe, seed=1), tiny_data, tmp_path / "resumed")
    train(recipe, tiny_data, tmp_path / "resumed")
    assert (tmp_path / "straight" / "model.safetensors").read_bytes() == (tmp_path / "resumed" / "model.safetensors").read_bytes()
    assert not (tmp_path / "resumed" / "checkpoint.pt").exists()


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")  # of other people's imports
def test_experts_end_at_mxfp4_values_and_still_learn_there(tmp_path, tiny_data):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for steps in (1, 3):
        train(tiny("gpt_oss", steps=steps, mxfp4_from=0.0), tiny_data, tmp_path / str(steps))
    less, more = (load_file(tmp_path / steps / "model.safetensors") for steps in "13")
    experts = [name for name in more if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 4
    for name in experts:
        weight = more[name].swapaxes(1, 2)
        np.testing.assert_array_equal(weight, mxfp4.nearest(weight))
        assert (less[name] != more[name]).any()


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")  # of other people's imports
def test_every_expert_at_once_is_the_routed_sum(tiny_data):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from toyllm.models.recipe.networks import every_expert, new_model

    torch.manual_seed(0)
    recipe = tiny("gpt_oss")
    experts = new_model("gpt_oss", recipe.config).model.layers[0].mlp.experts
    hidden, logits = torch.randn(10, 32), torch.randn(10, 4)
    top, chosen = logits.topk(2)
    weights = top.softmax(-1)
    routed = type(experts).forward.__wrapped__(experts, hidden, chosen, weights)
    torch.testing.assert_close(every_expert(experts, False, hidden, chosen, weights), routed, rtol=1e-4, atol=1e-7)
