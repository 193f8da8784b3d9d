"""`toyllm check`: findings as a table or JSON, and exit code 3 where something does not hold."""

import json
import runpy
from pathlib import Path

import pytest

from toyllm.cli.check import ranges
from toyllm.cli.main import run

hollow = runpy.run_path(str(Path(__file__).parents[1] / "hollow.py"))


def test_a_sound_model_is_one_line_and_exit_code_0(capsys: pytest.CaptureFixture) -> None:
    assert run(["check", "-m", "tales-gpt2"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("76 tensors, 11.8 MB in ")
    assert shown.out.endswith("GB/s): 0 errors, 0 warnings\n")
    assert shown.err == ""


def test_an_error_is_a_row_and_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    offsets = hollow["write"](tmp_path, hollow["GPT2"], hollow["gpt2"]() | {"[/x]\x1b]52;c;AA\x07": ("F32", ())})
    hollow["poke"](tmp_path / "model.safetensors", offsets["h.0.ln_1.bias"] + 4, b"\xff\xff\xff\xff")
    assert run(["check", "-m", str(tmp_path)]) == 3
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(maxsplit=3) for line in lines]
    assert ["error", "nan", "h.0.ln_1.bias", "NaN: 1, the first at [1]"] in rows
    assert ["error", "extra", "[/x]\\x1b]52;c;AA\\x07", "not part of this architecture"] in rows
    assert not any("\x1b" in line for line in lines)
    assert lines[-1].endswith("2 errors, 10 warnings")  # its ten matrices are zero


def test_warnings_alone_are_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hollow["write"](tmp_path, hollow["GPT_OSS"], hollow["gpt_oss"]())
    assert run(["check", "-m", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "gate_up_proj_blocks  all zero; experts 0-1\n" in shown
    assert shown.endswith(": 0 errors, 9 warnings\n")


def test_the_json_document(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    offsets = hollow["write"](tmp_path, hollow["GPT_OSS"], hollow["gpt_oss"]())
    name = "model.layers.0.mlp.experts.down_proj_scales"
    hollow["poke"](tmp_path / "model.safetensors", offsets[name] + 2880 * 90, b"\xff")
    assert run(["check", "-m", str(tmp_path), "--json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "toyllm.check/1"
    assert (document["holds"], document["tensors"]) == (False, 22)
    (error,) = [finding for finding in document["findings"] if finding["severity"] == "error"]
    assert error.pop("message").startswith("scale 255")
    assert error == {
        "severity": "error",
        "kind": "scale",
        "path": str(tmp_path / "model.safetensors"),
        "tensor": name,
        "place": [1, 0, 0],
        "experts": [1],
        "count": 1,
    }


def test_a_model_that_is_nowhere_is_a_failure_and_no_finding(capsys: pytest.CaptureFixture) -> None:
    assert run(["check", "-m", "nowhere/at-all"]) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("numbers", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 5, 7, 8), "0-2, 5, 7-8")])
def test_runs_of_numbers_are_drawn_together(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text
