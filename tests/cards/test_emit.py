"""The script that is written from a model's cards: alone, with NumPy, it computes the engine's logits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import toyllm
from toyllm.cards.emit import constant, python_name, script
from toyllm.kernels.errors import ToyllmError
from toyllm.models.checkpoint import open_checkpoint
from toyllm.models.config import load_config
from toyllm.models.location import find_model

GOLDENS = Path(__file__).parents[1] / "models" / "goldens"
CHECKPOINTS = [
    "tales-gpt2",
    "tales-gpt-oss",
    *(str(path.parent) for family in ("gpt2", "gpt_oss") for path in sorted((GOLDENS / family).glob("*/config.json"))),
]


def emitted(name: str) -> tuple[str, Path]:
    """The script of a model, and where its tensors are."""
    files = find_model(name)
    _, config = load_config(files)
    checkpoint = open_checkpoint(files)
    return script(config, checkpoint, Path(name).name), checkpoint.shards[0].parent


@pytest.mark.parametrize("name", CHECKPOINTS, ids=lambda name: Path(name).name)
def test_the_script_computes_the_engines_logits(name, tmp_path):
    text, folder = emitted(name)
    path = tmp_path / "script.py"
    path.write_text(text, encoding="utf-8")
    model = toyllm.load(name, exact=True)
    ids = [i % model.vocab_size for i in (5, 17, 200, 3, 99, 42, 7, 300, 11, 12, 5)][: model.config.context]
    command = [sys.executable, "-I", "-W", "error", str(path), str(folder), *map(str, ids), "--save", str(tmp_path / "z.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    logits = np.load(tmp_path / "z.npy")
    expected = model.logits(ids)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
    assert int(done.stdout.split()[0]) == logits[-1].argmax()


@pytest.mark.parametrize("name", ["tales-gpt2", "tales-gpt-oss"])
def test_the_script_reads_as_a_person_would_write_it(name):
    text, _ = emitted(name)
    assert max(map(len, text.splitlines())) <= 120
    assert text == emitted(name)[0]
    compile(text, "script.py", "exec")


def test_a_model_without_mxfp4_has_no_word_of_it_in_its_script():
    text, _ = emitted("tales-gpt2")
    assert "MXFP4(" not in text
    assert "def softmax" in text
    assert "def sigmoid" not in text


@pytest.mark.parametrize(("name", "expected"), [("γ^1", "γ_1"), ("g′", "gʹ"), ("gpt-oss", "gpt_oss"), ("x_{1}", "x_1")])
def test_names_become_pythons(name, expected):
    assert python_name(name) == expected
    assert expected.isidentifier()


@pytest.mark.parametrize(
    ("value", "expected"), [((4, float("inf"), 4, float("inf")), "[4, np.inf] * 2"), (True, "True"), ("gelu", '"gelu"')]
)
def test_settings_become_pythons(value, expected):
    assert constant(value) == expected


def test_a_function_without_words_in_numpy_is_named():
    from toyllm.cards.emitted import call

    with pytest.raises(ToyllmError, match=r"scatter_add: .*--check"):
        call("scatter_add", ["x", "i", "v"], None)
