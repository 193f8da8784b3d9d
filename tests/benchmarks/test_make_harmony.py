"""The maker of small checkpoints that can chat: what it writes, twice the same, and never over another."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import toyllm
from toyllm.models.harmony import special_ids

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # as when it is run as a script
        yield importlib.import_module("make_harmony")


def make(maker: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["make_harmony.py", *arguments])
    maker.main()


def test_the_script_writes_a_model_that_loads_and_speaks_harmony(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(maker, monkeypatch, str(tmp_path), "--layers", "3")
    assert capsys.readouterr().out == f"{tmp_path}: try toyllm chat -m {tmp_path} --max-tokens 60\n"
    model = toyllm.load(str(tmp_path))
    assert (model.config.num_hidden_layers, model.config.sliding) == (3, (True, False, True))
    assert model.tokenizer
    ids = special_ids(model.tokenizer)
    assert model.defaults.eos_token_id == (ids["<|return|>"], ids["<|endoftext|>"], ids["<|call|>"])
    assert model.vocab_size == model.tokenizer.vocab_size + 3
    assert {t.dtype for name, t in model.checkpoint.tensors.items() if "experts" in name and "bias" not in name} == {"U8"}


def test_the_same_command_writes_the_same_bytes(maker: ModuleType, tmp_path: Path) -> None:
    for name in "ab":
        maker.write_checkpoint(tmp_path / name)
    a, b = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "ab")
    assert a == b
    assert sum(map(len, a.values())) < 300_000
    assert json.loads(a["config.json"])["model_type"] == "gpt_oss"


def test_wrong_arguments_and_a_folder_in_use_are_refused(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make(maker, monkeypatch, str(tmp_path), "--layers", "0")
    assert "--layers: expected at least 1, found 0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^error: .*/none: No such file or directory$"):
        make(maker, monkeypatch, str(tmp_path), "--ranks", str(tmp_path / "none"))
    mine = tmp_path / "model.safetensors"
    mine.write_bytes(b"mine")
    with pytest.raises(SystemExit, match="exists; name another folder"):
        make(maker, monkeypatch, str(tmp_path))
    assert mine.read_bytes() == b"mine"
