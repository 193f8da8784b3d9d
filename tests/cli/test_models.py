"""`toyllm models`: the list, and one model's files and effective configuration."""

import json
from pathlib import Path

import pytest

from toyllm.cli.main import run
from toyllm.cli.models import size_text
from toyllm.models import config, location
from toyllm.models.location import cache_folder


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """One embedded model that runs, and one cached that does not; a configuration of three keys."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(location, "EMBEDDED", tmp_path / "embedded")
    values = [("n_layer", 6, "file"), ("activation_function", "gelu_new", "default"), ("n_inner", None, "default")]
    monkeypatch.setattr(config, "effective_config", lambda files: values)
    commit = "c" * 40
    cached = cache_folder() / "models--me--x"
    folders = {"small": tmp_path / "embedded" / "small", "me/x": cached / "snapshots" / commit}
    for folder, model_type in zip(folders.values(), ("gpt2", "llama"), strict=True):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        (folder / "model.safetensors").write_bytes(b"w" * 1500)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    return folders


def test_the_list_says_what_each_model_is_and_whether_it_runs(models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    assert run(["models"]) == 0
    assert [line.split(maxsplit=6) for line in capsys.readouterr().out.splitlines()] == [
        ["name", "kind", "type", "weights", "folder", "runs"],
        ["small", "embedded", "gpt2", "1.5", "kB", str(models["small"]), "yes"],
        ["me/x", "cached", "llama", "1.5", "kB", str(models["me/x"]), 'no: model_type "llama" is not supported'],
    ]


def test_the_list_as_json(models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    assert run(["models", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "toyllm.models/1"
    assert [list(model.values()) for model in document["models"]] == [
        ["small", "embedded", "gpt2", 1500, str(models["small"]), True, None],
        ["me/x", "cached", "llama", 1500, str(models["me/x"]), False, 'model_type "llama" is not supported'],
    ]
    assert list(document["models"][0]) == ["name", "kind", "model_type", "weights_bytes", "folder", "runs", "problem"]


def test_one_model_shows_its_files_and_where_each_value_comes_from(models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    assert run(["models", "small"]) == 0
    files, keys = capsys.readouterr().out.split("\n\n")
    assert [line.split() for line in files.splitlines()] == [
        ["file", "size", "path"],
        ["weights", "1.5", "kB", str(models["small"] / "model.safetensors")],
        ["config", "22", "B", str(models["small"] / "config.json")],
    ]
    assert [line.split() for line in keys.splitlines()] == [
        ["key", "value", "from"],
        ["n_layer", "6", "file"],
        ["activation_function", '"gelu_new"', "default"],
        ["n_inner", "null", "default"],
    ]


def test_one_model_as_json(models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    assert run(["models", "me/x", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    folder = models["me/x"]
    assert document["schema"] == "toyllm.models/1"
    assert document["model"] == {
        "name": "me/x",
        "folder": str(folder),
        "files": {"weights": str(folder / "model.safetensors"), "config": str(folder / "config.json")},
        "config": [
            {"key": "n_layer", "value": 6, "from": "file"},
            {"key": "activation_function", "value": "gelu_new", "from": "default"},
            {"key": "n_inner", "value": None, "from": "default"},
        ],
    }


def test_a_model_that_is_nowhere_fails_in_one_line(capsys: pytest.CaptureFixture) -> None:
    assert run(["models", "smal"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: smal: no folder or file here")
    assert shown.err.endswith("did you mean small?\n")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1023, "1.02 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (11_844_008, "11.8 MB")),
        *((548_105_171, "548 MB"), (13_761_300_984, "13.8 GB")),
    ],
)
def test_sizes_have_three_digits(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text
