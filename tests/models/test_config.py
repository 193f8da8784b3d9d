"""config.json and generation_config.json: every value checked, each refusal one line that names file, key and what was found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toyllm.kernels.errors import ToyllmError
from toyllm.models import gpt2
from toyllm.models.config import FAMILIES, GenerationDefaults, effective_config, generation_defaults, load_config
from toyllm.models.location import ModelFiles, find_model

BASE = {"model_type": "gpt2", "n_embd": 24, "n_head": 3, "n_layer": 2, "vocab_size": 97, "n_positions": 64}

Folder = Callable[..., ModelFiles]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """The files of a model whose config.json is BASE with these changes; a string is the file itself."""

    def folder(changes: dict[str, Any] | str | bytes, name: str = "config.json") -> ModelFiles:
        (tmp_path / "config.json").write_text(json.dumps(BASE))
        text = json.dumps(BASE | changes if name == "config.json" else changes) if isinstance(changes, dict) else changes
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return find_model(str(tmp_path))

    return folder


def refusal(files: ModelFiles) -> str:
    """The one line that `load_config` ends with, without the folder."""
    with pytest.raises(ToyllmError) as refused:
        load_config(files)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(f"{files.folder}")
    return message.removeprefix(f"{files.folder}").removeprefix("/")


def test_what_the_file_says_holds_and_the_rest_is_transformers_default(folder: Folder) -> None:
    family, config = load_config(folder({"n_head": 4, "activation_function": "gelu", "unknown": [1]}))
    assert family is gpt2
    assert (config.n_head, config.activation_function, config.vocab_size, config.context) == (4, "gelu", 97, 64)
    assert (config.layer_norm_epsilon, config.scale_attn_weights, config.tie_word_embeddings) == (1e-5, True, True)
    assert (config.inner, config.eos_token_id) == (96, (50256,))


def test_origins_are_told_apart(folder: Folder) -> None:
    rows = {key: (value, origin) for key, value, origin in effective_config(folder({"n_inner": None, "unknown": 1}))}
    assert rows["n_embd"] == (24, "file")
    assert rows["n_inner"] == (None, "file")
    assert rows["layer_norm_epsilon"] == (1e-5, "default")
    assert rows.keys() == gpt2.Config.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_layer", 0, "n_layer: expected an integer from 1 to 10000, found 0"),
        ("n_layer", -2, "n_layer: expected an integer from 1 to 10000, found -2"),
        ("vocab_size", 2**31, "vocab_size: expected an integer from 1 to 2147483647, found 2147483648"),
        ("n_embd", "24", 'n_embd: expected an integer, found "24"'),
        ("n_embd", 24.0, "n_embd: expected an integer, found 24.0"),
        ("n_embd", True, "n_embd: expected an integer, found true"),
        ("n_embd", None, "n_embd: expected an integer, found null"),
        ("n_embd", [24], "n_embd: expected an integer, found [24]"),
        ("n_inner", 0, "n_inner: expected an integer from 1 to 2147483647, found 0"),
        ("layer_norm_epsilon", 0, "layer_norm_epsilon: expected a number above 0, found 0"),
        ("layer_norm_epsilon", -1e-5, "layer_norm_epsilon: expected a number above 0, found -1e-05"),
        ("layer_norm_epsilon", float("nan"), "not valid JSON ('layer_norm_epsilon': NaN, which JSON does not have)"),
        ("layer_norm_epsilon", float("inf"), "not valid JSON ('layer_norm_epsilon': Infinity, which JSON does not have)"),
        ("layer_norm_epsilon", "1e-5", 'layer_norm_epsilon: expected a number, found "1e-5"'),
        ("layer_norm_epsilon", 10**400, "layer_norm_epsilon: expected a number, found 1000"),
        ("scale_attn_weights", 1, "scale_attn_weights: expected true or false, found 1"),
        ("scale_attn_by_inverse_layer_idx", "no", 'scale_attn_by_inverse_layer_idx: expected true or false, found "no"'),
        ("activation_function", 3, "activation_function: expected a string, found 3"),
        ("activation_function", "relu", "activation_function: expected gelu_new or gelu_pytorch_tanh or gelu, found 'relu'"),
        ("eos_token_id", -1, "eos_token_id: expected a token id, a list of them, or null, found -1"),
        ("eos_token_id", 1.5, "eos_token_id: expected a token id, a list of them, or null, found 1.5"),
        ("eos_token_id", [1, "2"], 'eos_token_id: expected a token id, a list of them, or null, found [1, "2"]'),
        ("bos_token_id", True, "bos_token_id: expected a token id, a list of them, or null, found true"),
        ("n_head", 5, "n_head: 5 does not divide n_embd 24"),
        ("add_cross_attention", True, "add_cross_attention: toyllm runs decoders without an encoder only"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(folder: Folder, key: str, value: Any, message: str) -> None:
    assert refusal(folder({key: value})).startswith(f"config.json: {message}")


def test_a_wrong_value_of_any_length_is_cut(folder: Folder) -> None:
    assert len(refusal(folder({"n_embd": ["x"] * 10_000}))) < 200


@pytest.mark.parametrize(
    ("value", "ids"), [(None, ()), (5, (5,)), ([5, 6], (5, 6)), ([], ()), (0, (0,))], ids=["null", "one", "several", "none", "zero"]
)
def test_token_ids_are_one_several_or_none(folder: Folder, value: Any, ids: tuple[int, ...]) -> None:
    _, config = load_config(folder({"eos_token_id": value, "bos_token_id": value}))
    assert config.eos_token_id == config.bos_token_id == ids


def test_an_integer_passes_for_a_number(folder: Folder) -> None:
    _, config = load_config(folder({"layer_norm_epsilon": 1}))
    assert (config.layer_norm_epsilon, type(config.layer_norm_epsilon)) == (1.0, float)


@pytest.mark.parametrize("model_type", ["llama", "GPT2", "", None, 3, ["gpt2"]])
def test_an_unknown_architecture_is_named_with_those_that_run(folder: Folder, model_type: Any) -> None:
    assert refusal(folder({"model_type": model_type})) == (
        f"config.json: model_type {json.dumps(model_type)} is not supported; toyllm runs {', '.join(FAMILIES)}"
    )


def test_a_config_without_an_architecture_is_refused(folder: Folder) -> None:
    assert refusal(folder("{}")).startswith("config.json: model_type null is not supported")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON (Expecting value"),
        ('{"model_type": "gpt2"', "not valid JSON (Expecting"),
        (b'{"model_type": "gpt\xff"}', "not valid JSON ('utf-8' codec"),
        ("[1, 2]", "expected a JSON object, found list; download it again"),
        ('"gpt2"', "expected a JSON object, found str; download it again"),
        ("[" * 100_000, "not valid JSON (maximum recursion depth"),
        ('{"n_embd": ' + "1" * 5000 + "}", "not valid JSON (Exceeds the limit"),
        ('{"model_type": "gpt2", "layer_norm_epsilon": 1e999}', "layer_norm_epsilon: expected a finite number, found Infinity"),
        ('{"n_layer": 2, "n_head": 2, "n_layer": 3}', "not valid JSON (the name 'n_layer' occurs twice)"),
        ('{"unknown": {"n_layer": 2, "n_layer": 3}}', "not valid JSON (the name 'n_layer' occurs twice)"),
        ('{"unknown": [[NaN]]}', "not valid JSON (NaN, which JSON does not have)"),
        (b" " * (2**24 + 1), "larger than 16,777,216 bytes"),
    ],
    ids=[
        "empty",
        "cut off",
        "not UTF-8",
        "a list",
        "a string",
        "a tower",
        "a number without end",
        "beyond f64",
        "twice",
        "twice within",
        "NaN in a list",
        "too large",
    ],
)
def test_a_file_that_is_no_json_object_is_refused(folder: Folder, content: str | bytes, message: str) -> None:
    assert refusal(folder(content)).startswith(f"config.json: {message}")


def test_without_a_config_there_is_nothing_to_run(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert refusal(find_model(str(tmp_path))) == ": no config.json beside the weights; copy it from the model's repository"


# generation_config.json


def test_without_a_generation_config_nothing_is_said(folder: Folder) -> None:
    assert generation_defaults(folder({})) == GenerationDefaults()


def test_a_generation_config_is_read_and_silence_is_none(folder: Folder) -> None:
    document = {"do_sample": True, "temperature": 1, "top_k": 50, "eos_token_id": [1, 2], "top_p": None, "transformers_version": "5.0"}
    defaults = generation_defaults(folder(document, "generation_config.json"))
    assert defaults == GenerationDefaults(do_sample=True, temperature=1.0, top_k=50, eos_token_id=(1, 2))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"top_k": 50.0}, "top_k: expected an integer, found 50.0"),
        ({"temperature": "hot"}, 'temperature: expected a number, found "hot"'),
        ({"top_p": float("nan")}, "not valid JSON ('top_p': NaN, which JSON does not have); download it again"),
        ({"do_sample": 0}, "do_sample: expected true or false, found 0"),
        ({"eos_token_id": "</s>"}, 'eos_token_id: expected a token id, a list of them, or null, found "</s>"'),
        ("[]", "expected a JSON object, found list; download it again"),
    ],
)
def test_a_wrong_generation_config_is_one_line_that_names_it(folder: Folder, document: Any, message: str) -> None:
    files = folder(document, "generation_config.json")
    with pytest.raises(ToyllmError) as refused:
        generation_defaults(files)
    assert str(refused.value) == f"{files.folder}/generation_config.json: {message}"
