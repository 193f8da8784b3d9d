"""Cut checkpoints: the tensors, configurations and activations that were kept are the source's."""

import json
import logging
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models.checkpoint import open_checkpoint
from toyllm.models.cut import Wanted, cut
from toyllm.models.location import find_model

help_ = runpy.run_path(str(Path(__file__).parent / "cut_help.py"))
hollow = runpy.run_path(str(Path(__file__).parents[1] / "hollow.py"))
at, GOLDENS, tensors_of, array, config_of, means, activations, ids_for, holds, EMBEDDED = (
    help_[name] for name in ["at", "GOLDENS", "tensors_of", "array", "config_of", "means", "activations", "ids_for", "holds", "EMBEDDED"]
)
CASES = [f"{family}/{path.stem}" for family in ("gpt2", "gpt_oss") for path in sorted((GOLDENS / family).glob("*.safetensors"))]

# ---- nothing is lost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_without_a_wish_every_tensor_and_every_setting_is_the_same(tmp_path: Path, case: str) -> None:
    cut(at(case), tmp_path / "out", Wanted())
    assert tensors_of(tmp_path / "out") == tensors_of(at(case))
    assert means(tmp_path / "out") == means(at(case))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(open_checkpoint(find_model(at(case))).shards)
    assert holds(tmp_path / "out")


@pytest.mark.parametrize("model", EMBEDDED)
def test_the_small_files_come_along_and_another_models_card_does_not(tmp_path: Path, model: str) -> None:
    cut(model, tmp_path / "out", Wanted(layers=1))
    source = find_model(model).folder
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"tokenizer.json", "generation_config.json", "config.json", "cut.json", "model.safetensors"}


def test_chat_files_and_licences_come_along(tmp_path: Path) -> None:
    hollow["write"](tmp_path / "in", hollow["GPT2"], hollow["gpt2"]())
    names = ["chat_template.jinja", "special_tokens_map.json", "tokenizer_config.json", "merges.txt", "vocab.json", "LICENSE.txt"]
    for name in [*names, "README.md", "training.json"]:
        (tmp_path / "in" / name).write_text(f"{{}} {name}")
    cut(str(tmp_path / "in"), tmp_path / "out", Wanted())
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {*names, "config.json", "cut.json", "model.safetensors"}
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "{} LICENSE.txt"


def test_one_file_named_is_what_is_cut(tmp_path: Path) -> None:
    cut(f"{at('gpt2/baseline')}/model.safetensors", tmp_path / "out", Wanted())
    assert tensors_of(tmp_path / "out") == tensors_of(at("gpt2/baseline"))


# ---- layers and experts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "layers"), [("tales-gpt2", 4), ("tales-gpt-oss", 3), ("gpt_oss/baseline", 2), ("gpt2/baseline", 1)])
def test_what_the_first_layers_compute_is_the_same_to_the_bit(tmp_path: Path, model: str, layers: int) -> None:
    source = at(model)
    cut(source, tmp_path / "out", Wanted(layers=layers))
    ids = ids_for(source)
    whole, part = activations(source, ids), activations(tmp_path / "out", ids)
    kept = [name for name in part if name == "embed" or name.startswith("blocks.")]
    assert f"blocks.{layers - 1}.out" in kept
    assert f"blocks.{layers}.out" not in part
    for name in kept:
        np.testing.assert_array_equal(part[name], whole[name], err_msg=name)


@pytest.mark.parametrize("layers", [(0, 2), (1, 2), (2,)])
def test_other_layers_take_their_tensors_and_their_windows_along(tmp_path: Path, layers: tuple[int, ...]) -> None:
    source = at("gpt_oss/layer_types")
    cut(source, tmp_path / "out", Wanted(layers=layers))
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for new, old in enumerate(layers):
        mine = {name: t for name, t in after.items() if f"layers.{new}." in name}
        assert mine == {name.replace(f"layers.{old}.", f"layers.{new}."): t for name, t in before.items() if f"layers.{old}." in name}
    assert len(after) == 3 + 19 * len(layers)
    kinds = config_of(Path(source))["layer_types"]
    assert config_of(tmp_path / "out")["layer_types"] == [kinds[i] for i in layers]
    assert holds(tmp_path / "out")


def test_buffers_go_with_their_layers(tmp_path: Path) -> None:
    source = at("gpt2/buffers")
    cut(source, tmp_path / "out", Wanted(layers=(1,), dialect="hf"))
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    buffers = {name for name in after if name.endswith(("attn.bias", "masked_bias"))}
    assert buffers
    assert len(buffers) == sum(".1." in name and name.endswith(("attn.bias", "masked_bias")) for name in before)
    for name in buffers:
        assert name.startswith("transformer.h.0.")
        old = name.replace("h.0.", "h.1.")
        assert after[name] == before.get(old, before.get(old.removeprefix("transformer.")))


@pytest.mark.parametrize("experts", [(0, 3, 7), (5, 6), (1, 2, 3, 4, 5, 6, 7)])
@pytest.mark.parametrize("model", ["tales-gpt-oss", "gpt_oss/baseline"])
def test_experts_are_the_same_rows_of_every_tensor_that_has_them(tmp_path: Path, model: str, experts: tuple[int, ...]) -> None:
    source = at(model)
    cut(source, tmp_path / "out", Wanted(experts=experts))
    checkpoint = open_checkpoint(find_model(source))
    changed = [name for name in checkpoint.tensors if ".mlp.router." in name or ".mlp.experts." in name]
    assert len(changed) == 8 * means(source)["num_hidden_layers"]
    for name in checkpoint.tensors:
        whole, part = checkpoint.array(name), array(tmp_path / "out", name)
        np.testing.assert_array_equal(part, whole[list(experts)] if name in changed else whole, err_msg=name)
    ids = ids_for(source)
    logits = activations(source, ids)["blocks.0.router.logits"][:, experts]
    np.testing.assert_array_equal(activations(tmp_path / "out", ids)["blocks.0.router.logits"], logits)


def test_experts_in_matrices_and_in_openais_names_are_cut_alike(tmp_path: Path) -> None:
    for case, name in (("experts_bf16", "model.layers.1.mlp.experts.down_proj"), ("original", "block.1.mlp.mlp1_weight.scales")):
        source = at(f"gpt_oss/{case}")
        cut(source, tmp_path / case, Wanted(experts=(1, 3)))
        np.testing.assert_array_equal(array(tmp_path / case, name), array(source, name)[[1, 3]])
        assert np.isfinite(toyllm.load(str(tmp_path / case)).logits([1, 2, 3])).all()


def test_fewer_experts_than_a_token_goes_to_are_said_and_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("toyllm"), "propagate", True)
    caplog.set_level(logging.INFO, "toyllm")
    plan = cut("tales-gpt-oss", tmp_path / "out", Wanted(experts=1))
    assert list(dict.fromkeys(caplog.messages)) == ["a token goes to 1 of the experts instead of 2: --experts keeps no more"]
    config = config_of(tmp_path / "out")
    assert (config["num_local_experts"], config["num_experts_per_tok"], config["experts_per_token"]) == (1, 1, 1)
    assert plan.record["experts"] == {"kept": [0], "of": 8, "per_token": 1, "of_per_token": 2}
    assert np.isfinite(toyllm.load(str(tmp_path / "out")).logits([1, 2])).all()


@pytest.mark.parametrize(
    ("model", "wanted", "message"),
    [
        ("tales-gpt2", Wanted(layers=7), "--layers 7: expected the first 1 to 6, or a list of numbers from 0 to 5"),
        ("tales-gpt2", Wanted(layers=0), "--layers 0: expected the first 1 to 6, or a list of numbers from 0 to 5"),
        ("tales-gpt2", Wanted(layers=(0, 6)), "--layers 0,6: expected ascending numbers from 0 to 5, which this model has"),
        ("tales-gpt2", Wanted(layers=(2, 1)), "--layers 2,1: expected ascending numbers from 0 to 5, which this model has"),
        ("tales-gpt2", Wanted(experts=2), "--experts: tales-gpt2 is gpt2, which has no experts; leave it out"),
        ("tales-gpt2", Wanted(expert_dtype="BF16"), "--expert-dtype: tales-gpt2 is gpt2, which has no experts; leave it out"),
        ("tales-gpt2", Wanted(dialect="original"), "--dialect original: gpt2 has the dialects hf, bare"),
        ("tales-gpt-oss", Wanted(experts=(8,)), "--experts 8: expected ascending numbers from 0 to 7, which this model has"),
        ("tales-gpt-oss", Wanted(dialect="gguf"), "--dialect gguf: gpt_oss has the dialects hf, bare, original"),
        (
            "tales-gpt-oss",
            Wanted(dialect="original", expert_dtype="BF16"),
            "the original dialect names experts in MXFP4 alone: add --expert-dtype mxfp4, or --dialect hf",
        ),
        (at("gpt_oss/odd"), Wanted(shard_size=200), "--shard-size 200: tensor model.embed_tokens.weight alone takes "),
    ],
)
def test_what_cannot_be_cut_is_one_line(tmp_path: Path, model: str, wanted: Wanted, message: str) -> None:
    with pytest.raises(ToyllmError) as refused:
        cut(model, tmp_path / "out", wanted)
    assert str(refused.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_layers_whose_scores_hang_on_their_number_keep_it(tmp_path: Path) -> None:
    source = at("gpt2/scale_attn_by_inverse_layer_idx")
    cut(source, tmp_path / "first", Wanted(layers=1))
    with pytest.raises(ToyllmError, match="layer 1 would run as layer 0, whose scores are scaled differently; keep the first layers"):
        cut(source, tmp_path / "second", Wanted(layers=(1,)))


# ---- dialects ---------------------------------------------------------------------------------------------------------------

ROUND_TRIPS = [
    ("tales-gpt-oss", ("original", "hf")),
    ("tales-gpt-oss", ("bare", "original", "hf")),
    ("gpt_oss/baseline", ("original", "hf")),
    ("gpt_oss/sharded", ("original", "hf")),
    ("gpt_oss/original", ("hf", "original")),
    ("gpt_oss/original_sharded", ("hf", "bare", "original")),
    ("gpt_oss/experts_bf16", ("bare", "hf")),
    ("tales-gpt2", ("hf", "bare")),
    ("gpt2/baseline", ("bare", "hf")),
    ("gpt2/sharded", ("bare", "hf")),
    ("gpt2/names_bare", ("hf", "bare")),
]


@pytest.mark.parametrize(("model", "dialects"), ROUND_TRIPS)
def test_a_way_through_other_dialects_ends_with_the_same_bytes(tmp_path: Path, model: str, dialects: tuple[str, ...]) -> None:
    source = at(model)
    ids, here = ids_for(source), source
    expected = toyllm.load(source).logits(ids)
    for n, dialect in enumerate(dialects):
        cut(here, tmp_path / str(n), Wanted(dialect=dialect))
        assert set(tensors_of(tmp_path / str(n))) != set(tensors_of(here))
        here = str(tmp_path / str(n))
        np.testing.assert_array_equal(toyllm.load(here).logits(ids), expected)
        assert holds(Path(here))
    assert tensors_of(here) == tensors_of(source)
    tokens = {"bos_token_id", "eos_token_id"}  # generation_config.json says these where OpenAI's config.json cannot
    assert {k: v for k, v in means(here).items() if k not in tokens} == {k: v for k, v in means(source).items() if k not in tokens}


def test_mixed_names_become_one_dialect(tmp_path: Path) -> None:
    source = at("gpt2/names_mixed")
    for dialect, prefix in (("hf", "transformer."), ("bare", "")):
        plan = cut(source, tmp_path / dialect, Wanted(dialect=dialect))
        assert plan.record["dialect"] == {"from": "mixed", "to": dialect}
        weights = [name for name in tensors_of(tmp_path / dialect) if name != "lm_head.weight"]
        assert all(name.removeprefix("transformer.") == name.removeprefix(prefix) for name in weights)
        assert all(name.startswith(prefix) for name in weights)
        np.testing.assert_array_equal(toyllm.load(str(tmp_path / dialect)).logits([1, 2]), toyllm.load(source).logits([1, 2]))


def test_openais_config_has_the_keys_that_its_reader_takes_and_no_others(tmp_path: Path) -> None:
    cut("tales-gpt-oss", tmp_path / "out", Wanted(layers=2, experts=4, dialect="original"))
    assert config_of(tmp_path / "out") == {
        "num_hidden_layers": 2,
        "num_experts": 4,
        "experts_per_token": 2,
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 128,
        "swiglu_limit": 7.0,
        "head_dim": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": 64,
        "initial_context_length": 256,
        "rope_theta": 10000.0,
        "rope_scaling_factor": 8.0,
        "rope_ntk_alpha": 1.0,
        "rope_ntk_beta": 32.0,
    }
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (0, 0, 0)
    assert generation["temperature"] == 0.8


@pytest.mark.parametrize(
    ("case", "layers", "message"),
    [
        ("rms_norm_eps", None, "rms_norm_eps: OpenAI's config.json has no key for 0.1, and means 1e-05"),
        ("rope_truncated", None, "rope_truncate: OpenAI's config.json has no key for True, and means False"),
        ("rope_interleaved", None, "hf_rope_impl: OpenAI's config.json has no key for False, and means True"),
        ("tied", None, "tie_word_embeddings: OpenAI's config.json has no key for True, and means False"),
        (
            "all_full",
            None,
            "layer_types: layer 0 of the result has full attention, and OpenAI's config.json, without this key, means sliding",
        ),
        (
            "baseline",
            (0, 2),
            "layer_types: layer 1 of the result has sliding attention, and OpenAI's config.json, without this key, means full",
        ),
    ],
)
def test_what_openais_config_cannot_say_is_refused(tmp_path: Path, case: str, layers: Any, message: str) -> None:
    with pytest.raises(ToyllmError) as refused:
        cut(at(f"gpt_oss/{case}"), tmp_path / "out", Wanted(layers=layers, dialect="original"))
    assert message in str(refused.value)
    assert str(refused.value).endswith("--dialect hf")
    assert list(tmp_path.iterdir()) == []


# ---- config.json ------------------------------------------------------------------------------------------------------------


def hollow_gpt_oss(folder: Path, **config: Any) -> str:
    """A GPT-OSS of two layers and four experts without values."""
    sizes = {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 32}
    tensors = hollow["gpt_oss"](L=2, E=4, D=64, F=32)
    hollow["write"](folder, hollow["GPT_OSS"] | sizes | config, tensors)
    return str(folder)


def test_every_spelling_of_a_size_and_every_list_of_layers_is_kept_consistent(tmp_path: Path) -> None:
    modules = ["model.layers.0.self_attn", "model.layers.1.self_attn", "model.layers.1", "model.layers.*.mlp.router", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": modules, "note": 7}
    given = {"num_experts": 4, "experts_per_token": 2, "quantization_config": quantization, "own": {"kept": [1.5, "[\n 1 ]"]}}
    source = hollow_gpt_oss(tmp_path / "in", **given, torch_dtype="bfloat16")
    cut(source, tmp_path / "out", Wanted(layers=(1,), experts=(2, 3)))
    before, after = config_of(tmp_path / "in"), config_of(tmp_path / "out")
    changed = {"num_hidden_layers": 1, "num_local_experts": 2, "num_experts": 2, "layer_types": ["full_attention"]}
    modules = ["model.layers.0.self_attn", "model.layers.0", "model.layers.*.mlp.router", "lm_head"]
    assert after == before | changed | {"quantization_config": quantization | {"modules_to_not_convert": modules}}
    assert list(after)[: len(before)] == list(before)


def test_quantization_and_dtype_are_said_as_the_tensors_are_stored(tmp_path: Path) -> None:
    source = hollow_gpt_oss(tmp_path / "in", torch_dtype="bfloat16", dtype="bfloat16")
    cut(source, tmp_path / "dense", Wanted(expert_dtype="F32", dtype="F32"))
    dense = config_of(tmp_path / "dense")
    assert "quantization_config" not in dense
    assert (dense["dtype"], dense["torch_dtype"]) == ("float32", "float32")
    cut(str(tmp_path / "dense"), tmp_path / "back", Wanted(expert_dtype="MXFP4", dtype="BF16"))
    assert config_of(tmp_path / "back")["quantization_config"]["quant_method"] == "mxfp4"
    assert config_of(tmp_path / "back")["dtype"] == "bfloat16"
    assert tensors_of(tmp_path / "back").keys() == tensors_of(source).keys()


def test_gpt2_says_its_layers_in_every_key_that_is_there(tmp_path: Path) -> None:
    hollow["write"](tmp_path / "in", hollow["GPT2"] | {"num_hidden_layers": 2}, hollow["gpt2"]())
    cut(str(tmp_path / "in"), tmp_path / "out", Wanted(layers=1))
    assert config_of(tmp_path / "out") == hollow["GPT2"] | {"n_layer": 1, "num_hidden_layers": 1}
