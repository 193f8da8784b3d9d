"""`toyllm compare`: what it says of two checkpoints and of two runs, its exit codes, its JSON, and what it refuses."""

import functools
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches NumPy, and so safetensors' NumPy loader, bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import toyllm
from toyllm.models.activations import record

TESTS = Path(__file__).parents[1]
GOLDENS = TESTS / "models" / "goldens"
EMBEDDED = Path(toyllm.__file__).parent / "models" / "embedded"
STORIES = EMBEDDED / "tales-gpt-oss"
hollow = runpy.run_path(str(TESTS / "hollow.py"))

Run = Callable[..., Any]
Change = Callable[[dict[str, np.ndarray]], Any]


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, Change], str]:
    """An embedded model again, its tensors changed, in a folder named b."""

    def changed(model: str, change: Change) -> str:
        folder = shutil.copytree(EMBEDDED / model, tmp_path / "b")
        tensors = load_file(folder / "model.safetensors")
        save_file(change(tensors) or tensors, folder / "model.safetensors")
        return str(folder)

    return changed


def verdict(outcome: Any) -> str:
    """The last line."""
    return outcome.out.splitlines()[-1]


# checkpoints


def test_one_model_is_equal_to_itself_in_a_line(toyllm: Run) -> None:
    outcome = toyllm("compare", "tales-gpt2", "tales-gpt2")
    assert (outcome.code, outcome.out) == (0, "They are equal bit for bit: 76 weights.\n")
    assert outcome.err.startswith("23.7 MB in ")


def test_names_only(toyllm: Run) -> None:
    outcome = toyllm("compare", str(GOLDENS / "gpt_oss" / "sharded"), str(GOLDENS / "gpt_oss" / "original_sharded"))
    said = "37 weights are equal bit for bit. model.embed_tokens.weight in A is embedding.weight in B."
    assert (outcome.code, outcome.out) == (0, f"They differ in names only: {said}\n")


@pytest.mark.parametrize(
    ("dtype", "name", "code", "how"),
    [(np.float32, "F32", 0, "with the same values"), (np.float16, "F16", 3, "with A's values rounded in B")],
)
def test_dtype_only(toyllm: Run, changed: Any, dtype: Any, name: str, code: int, how: str) -> None:
    folder = changed("tales-gpt2", lambda tensors: {key: array.astype(dtype) for key, array in tensors.items()})
    outcome = toyllm("compare", "tales-gpt2", folder)
    assert outcome.code == code
    assert verdict(outcome).startswith("They differ in dtype only: ")
    if code:
        assert f"BF16 in A and {name} in B, " in verdict(outcome)
    else:
        assert verdict(outcome) == f"They differ in dtype only: 76 weights are BF16 in A and {name} in B, {how}."
    assert toyllm("compare", "tales-gpt2", folder, "--rtol", "0.001").code == 0


def test_one_expert_only(toyllm: Run, changed: Any) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in ("gate_up_proj_blocks", "gate_up_proj_bias", "down_proj_scales"):
            tensors[f"model.layers.2.mlp.experts.{name}"][5, :2] += np.array(1, tensors[f"model.layers.2.mlp.experts.{name}"].dtype)

    outcome = toyllm("compare", "tales-gpt-oss", changed("tales-gpt-oss", change))
    assert outcome.code == 3
    assert verdict(outcome).startswith("They differ in expert 5 of layer 2 only: model.layers.2.mlp.experts.gate_up_proj, ")
    rows = [line.split("  ")[0] for line in outcome.out.splitlines()[1:4]]
    assert rows == [f"model.layers.2.mlp.experts.{name}" for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj")]


def test_one_bit_in_a_file_of_the_published_shapes(toyllm: Run, tmp_path: Path) -> None:
    offsets = {}
    for name in "ab":
        offsets = hollow["write"](tmp_path / name, hollow["GPT_OSS"], hollow["gpt_oss"]())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    flat = int(np.ravel_multi_index((1, 777, 45, 6), (2, 5760, 90, 16)))
    hollow["poke"](tmp_path / "b" / "model.safetensors", offsets[f"{name}_blocks"] + flat, b"\x40")
    outcome = toyllm("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    place = "the one at [1, 777, 1453] (expert 1, row 388 of up): 0 in A, 1.17549435e-38 in B"
    assert verdict(outcome) == f"They differ in expert 1 of layer 0 only: {name}, 1 of 33,177,600 values (1 bit of its blocks); {place}."
    assert outcome.code == 3


def test_a_zero_s_sign_is_a_bit_that_differs(toyllm: Run, tmp_path: Path) -> None:
    offsets = {}
    for name in "ab":
        offsets = hollow["write"](tmp_path / name, hollow["GPT_OSS"], hollow["gpt_oss"]())
    name = "model.layers.0.mlp.experts.down_proj"
    flat = int(np.ravel_multi_index((1, 777, 45, 6), (2, 2880, 90, 16)))
    hollow["poke"](tmp_path / "b" / "model.safetensors", offsets[f"{name}_blocks"] + flat, b"\x08")
    outcome = toyllm("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    said = "1 bit of its blocks at [1, 777, 45, 6], but no value: zeros of another sign, or other NaN"
    assert (outcome.code, verdict(outcome)) == (3, f"They differ in expert 1 of layer 0 only: {name}, {said}.")
    assert toyllm("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--atol", "1e-9").code == 0


def test_what_only_one_of_them_has_and_settings(toyllm: Run, tmp_path: Path) -> None:
    tensors = load_file(EMBEDDED / "tales-gpt2" / "model.safetensors")
    save_file({name: array for name, array in tensors.items() if "h.5." not in name and "h.4." not in name}, tmp_path / "model.safetensors")
    config = json.loads((EMBEDDED / "tales-gpt2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 4, "layer_norm_epsilon": 1e-6}))
    outcome = toyllm("compare", "tales-gpt2", str(tmp_path))
    said = "They differ in what they hold; 52 weights are equal bit for bit. Only in A: 24 weights of layers 4-5. "
    said += "config.json: n_layer is 6 in A, 4 in B; layer_norm_epsilon is 1e-05 in A, 1e-06 in B."
    assert (outcome.code, verdict(outcome)) == (3, said)
    assert "... and 4 more: --all shows them\n" in outcome.out
    everything = toyllm("compare", "tales-gpt2", str(tmp_path), "--all").out.splitlines()
    assert len(everything) == 1 + 76 + 2


def test_hostile_names_are_escaped(toyllm: Run, tmp_path: Path) -> None:
    for name, value in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        save_file({"\x1b]52;c;aGk=\x07[/x]\n": np.full(2, value, np.float32)}, tmp_path / name / "model.safetensors")
    for arguments in ((), ("--json",)):
        outcome = toyllm("compare", str(tmp_path / "a"), str(tmp_path / "b"), *arguments)
        assert outcome.code == 3
        assert not any(character in outcome.out for character in "\x1b\x07")


def test_checkpoints_as_json(toyllm: Run, changed: Any) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["h.1.ln_1.bias"][7] = np.nan

    outcome = toyllm("compare", "tales-gpt2", changed("tales-gpt2", change), "--json")
    document = json.loads(outcome.out)
    assert outcome.code == 3
    assert (document["schema"], document["kind"], document["agrees"]) == ("toyllm.compare/1", "checkpoints", False)
    assert document["verdict"].startswith("They differ in one weight only: h.1.ln_1.bias, 1 of 256 values (")
    assert (document["a"], document["rtol"], document["atol"], document["config"]) == ("tales-gpt2", 0, 0, [])
    assert len(document["weights"]) == 76
    (weight,) = (weight for weight in document["weights"] if weight["departs"])
    assert (weight["key"], weight["status"], weight["experts"]) == ("1.norm_1.bias", "values", [])
    assert weight["a"] == weight["b"] == {"name": "h.1.ln_1.bias", "dtype": "BF16", "shape": [256]}
    found = weight["difference"]
    assert {key: found[key] for key in ("max", "error", "b", "place", "unlike", "elements")} == {
        "max": "Infinity",
        "error": "Infinity",
        "b": "NaN",
        "place": [7],
        "unlike": 1,
        "elements": 256,
    }
    assert weight["stored"][0]["place"] == [7]


# runs


def test_a_run_on_two_backends(toyllm: Run) -> None:
    outcome = toyllm("compare", "tales-gpt2", "--prompt", "The fox", "--against-options", "--backend numpy", "--json")
    document = json.loads(outcome.out)
    assert (outcome.code, document["agrees"], document["first"], document["kind"]) == (0, True, None, "runs")
    assert (document["b"]["backend"], document["a"]["model"], document["b"]["model"]) == ("numpy", "tales-gpt2", "tales-gpt2")
    assert document["a"]["backend"] != "numpy"
    assert len(document["activations"]) == 81
    assert 0 < max(at["difference"]["error"] for at in document["activations"]) < 1e-5
    assert document["verdict"].startswith("They agree within rtol 0.0001, atol 0: 81 activations; the largest error is ")


def test_a_changed_bias_is_named_by_its_layer_s_first_activation(toyllm: Run, changed: Any) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["h.3.attn.c_attn.bias"][512 + 70] += 1  # of v

    outcome = toyllm("compare", "tales-gpt2", changed("tales-gpt2", change), "--prompt-ids", "5 6 7")
    assert outcome.code == 3
    assert verdict(outcome).startswith("blocks.3.attn.v departs first: error ")
    assert re.search(r"at \[\d, 1, 6\] of \[T, G, Dh\] it is ", verdict(outcome)), "the error is 1 at each token, but for rounding"
    assert "; in every token. " in verdict(outcome)
    assert outcome.out.splitlines()[1].startswith("blocks.3.attn.v  ")
    assert re.search(r"^\.\.\. and \d+ more: --all shows them$", outcome.out, re.MULTILINE)


@functools.cache
def own(model: str, ids: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A model's own activations."""
    return record(toyllm.load(model), list(ids), lambda name: True)[0]


def test_a_file_with_its_ids_and_a_map(toyllm: Run, tmp_path: Path) -> None:
    arrays = own("tales-gpt2", (5, 6, 7))
    theirs = {f"model.h.{i}.q": arrays[f"blocks.{i}.attn.q"].reshape(1, 3, 256).copy() for i in range(6)} | {"model.other": np.ones(3)}
    theirs["model.h.4.q"][0, 2, 130] += 0.5
    np.savez(tmp_path / "reference.npz", tokens=np.array([[5, 6, 7]]), **theirs)
    (tmp_path / "map.json").write_text(json.dumps({"tokens": "ids", "model.h.{i}.q": "blocks.{i}.attn.q", "model.norm": "norm_f"}))
    outcome = toyllm("compare", "tales-gpt2", str(tmp_path / "reference.npz"), "--map", str(tmp_path / "map.json"))
    assert outcome.code == 3
    assert verdict(outcome).startswith("blocks.4.attn.q departs first: error ")
    assert "at [2, 2, 2] of [T, H, Dh] it is " in verdict(outcome)
    assert "in 1 of 3 tokens, 2. 1 of 6 activations departs beyond rtol 0.0001, atol 0." in verdict(outcome)
    notes = outcome.err.splitlines()
    assert notes[0].endswith("reference.npz: 1 of its arrays stand for no activation, such as model.other")
    assert notes[1].endswith("reference.npz: has nothing of these names in the map: model.norm")
    assert notes[2] == "not compared: 75 activations that only A has, such as embed"


def test_only_some_activations(toyllm: Run) -> None:
    outcome = toyllm(
        "compare", "tales-gpt2", "tales-gpt2", "--prompt-ids", "5", "--only", "blocks.*.resid_mid", "--only", "logits", "--all"
    )
    assert [line.split()[0] for line in outcome.out.splitlines()[1:8]] == [*(f"blocks.{i}.resid_mid" for i in range(6)), "logits"]
    assert verdict(outcome) == "They are equal, value for value: 7 activations."


def test_a_saved_run_is_a_reference(toyllm: Run, tmp_path: Path) -> None:
    """And where it has no ids the text gives them."""
    file = str(tmp_path / "run.safetensors")
    assert toyllm("dump-tensor", "*", "--prompt", "The fox", "--save", file).code == 0
    assert toyllm("compare", "tales-gpt2", file, "--prompt", "The fox").out == "They are equal, value for value: 81 activations.\n"
    assert toyllm("compare", "tales-gpt2", file, "--prompt", "-", stdin=b"The fox\n").code == 0
    assert toyllm("compare", file, file).code == 0
    assert toyllm("compare", "tales-gpt2", file).error.startswith(f"{file}: has no ids; give the text that it is of with --prompt")


def test_shapes_that_differ_are_a_departure(toyllm: Run) -> None:
    sides = (str(GOLDENS / "gpt2" / "baseline"), str(GOLDENS / "gpt2" / "bf16"))
    outcome = toyllm("compare", *sides, "--prompt-ids", "5 6")
    assert verdict(outcome).startswith("embed departs first: shape [2, 24] in A, [2, 27] in B. ")
    document = json.loads(toyllm("compare", *sides, "--prompt-ids", "5 6", "--json").out)
    assert document["activations"][0] == {"name": "embed", "departs": True, "a": [2, 24], "b": [2, 27], "tokens": [], "difference": None}
    assert len(document["only_a"]) == 13
    assert document["only_b"] == []


# refusals


@pytest.mark.parametrize("arguments", [(), ("--prompt", "The fox")])
def test_two_architectures(toyllm: Run, arguments: tuple[str, ...]) -> None:
    error = toyllm("compare", "tales-gpt2", "tales-gpt-oss", *arguments).error
    assert error == "tales-gpt2 is a gpt2, tales-gpt-oss a gpt_oss: they have nothing in common; compare two of one architecture"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument 'A'"),
        (("tales-gpt2",), "Invalid value for B: with what? give a second model or file"),
        (("tales-gpt2", "tales-gpt2", "--backend", "numpy"), "Invalid value for '--backend': has no meaning for checkpoints"),
        (("tales-gpt2", "tales-gpt2", "--only", "embed"), "Invalid value for '--only': has no meaning for checkpoints"),
        (("tales-gpt2", "--against-options", "--backend numpy"), "Invalid value for --against-options: runs need a text"),
        (("tales-gpt2", "--prompt", "x", "--against-options", "--model y"), "Invalid value for --against-options: No such option: --model"),
        (("tales-gpt2", "x.npz", "--against-options", ""), "Invalid value for '--against-options': has no meaning where a file"),
        (("x.npz", "y.npz", "--prompt", "x"), "Invalid value for '--prompt': has no meaning for two files of activations"),
        (("tales-gpt2", "tales-gpt2", "--map", "x.json"), "Invalid value for --map: tales-gpt2 is no .npz or .safetensors file"),
        (("tales-gpt2", "tales-gpt2", "--rtol", "-1"), "Invalid value for --rtol: expected a number from 0, found -1"),
        (("tales-gpt2", "tales-gpt2", "--atol", "nan"), "Invalid value for --atol: expected a number from 0, found nan"),
    ],
)
def test_what_makes_no_sense_is_wrong_usage(toyllm: Run, arguments: tuple[str, ...], message: str) -> None:
    outcome = toyllm("compare", *arguments)
    assert outcome.code == 2
    assert outcome.error.startswith(message)


def test_files_and_prompts_of_other_tokens(toyllm: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", ids=[5, 6, 7], embed=own("tales-gpt2", (5, 6, 7))["embed"])
    error = toyllm("compare", "tales-gpt2", str(tmp_path / "x.npz"), "--prompt-ids", "5 6").error
    assert error == "the prompt and x.npz are of other tokens: 2 and 3 ids, the first to differ at position 2; compare runs over the same"
    np.savez(tmp_path / "x.npz", ids=[5, 4096], embed=own("tales-gpt2", (5, 6, 7))["embed"])
    assert toyllm("compare", "tales-gpt2", str(tmp_path / "x.npz")).error.startswith("token id 4096 (number 2 of 2): expected 0 to 4095")


def test_settings_in_the_environment_do_not_stop_a_comparison_of_checkpoints(toyllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOYLLM_BACKEND", "numpy")
    assert toyllm("compare", "tales-gpt2", "tales-gpt2").code == 0


def test_comparing_checkpoints_never_loads_numba() -> None:
    code = "import sys; from toyllm.cli.main import run; run(['compare', 'tales-gpt2', 'tales-gpt2']); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
