"""`toyllm cut`: a folder's name on stdout, a plan that is right, one line for what cannot be, and nothing left of what was ended."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toyllm.models import cut as cutting

GOLDENS = Path(__file__).parents[1] / "models" / "goldens"


def test_a_cut_prints_its_folder_and_says_what_it_kept(toyllm: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    outcome = toyllm("cut", out, "-m", "tales-gpt-oss", "--layers", "2", "--experts", "0,3,5-6")
    assert (outcome.code, outcome.out) == (0, f"{out}\n")
    assert outcome.err.startswith("layers 0-1 of 4; experts 0, 3, 5-6 of 8, 2 a token; 5.55 MB in ")
    assert toyllm("check", "-m", out).out.endswith("0 errors, 0 warnings\n")
    assert "3,219,992" in toyllm("params", "-m", out).out
    assert len(toyllm("generate", "The fox", "-m", out, "--max-tokens", "3", "--temperature", "0").out) > 3


def test_a_dry_run_shows_every_file_to_the_byte_and_writes_nothing(toyllm: Any, tmp_path: Path) -> None:
    arguments = ("cut", str(tmp_path / "out"), "--shard-size", "2.3MB", "--dtype", "f16", "--dialect", "hf", "--layers", "0-1,5")
    outcome = toyllm(*arguments, "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    facts, files = (part.splitlines() for part in outcome.out.split("\n\n"))
    assert [line.split(maxsplit=1) for line in facts] == [
        ["cut", "tales-gpt2"],
        ["layers", "0-1, 5 of 6"],
        ["names", "hf, before bare"],
        ["converted", "40 weights BF16 to F16, rounded to nearest"],
        ["tensors", "40, 3,549,440 parameters"],
    ]
    outcome = toyllm(*arguments)
    assert outcome.err.startswith("note: rounding changed 314 of 3,549,440 values, by up to 100 %\n")
    written = {path.name: f"{path.stat().st_size:,}" for path in (tmp_path / "out").iterdir()}
    total = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert dict(line.split() for line in files[1:]) == written | {"total": f"{total:,}"}


def test_the_json_document_before_and_after(toyllm: Any, tmp_path: Path) -> None:
    arguments = ("cut", str(tmp_path / "out"), "-m", "tales-gpt-oss", "--expert-dtype", "bf16", "--json")
    plan = json.loads(toyllm(*arguments, "--dry-run").out)
    done = json.loads(toyllm(*arguments).out)
    assert plan["schema"] == done["schema"] == "toyllm.cut/1"
    assert (plan.pop("written"), plan.pop("rounding"), plan.pop("seconds")) == (False, None, None)
    assert done.pop("written")
    assert done.pop("seconds") > 0
    assert done.pop("rounding") == {"values": 0, "changed": 0, "largest_relative_change": 0.0}
    assert plan == done
    assert done["record"] == json.loads((tmp_path / "out" / "cut.json").read_text())
    assert done["bytes"] == sum(file["bytes"] for file in done["files"]) == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert (done["out"], done["tensors"], done["parameters"]) == (str(tmp_path / "out"), 71, 5_927_744)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", 3), ("0", 0), ("0-3", (0, 1, 2, 3)), ("0,2,5", (0, 2, 5)), ("5,", (5,)), ("5-5", (5,)), ("0-1,4-5", (0, 1, 4, 5))],
)
def test_how_many_or_which(monkeypatch: pytest.MonkeyPatch, toyllm: Any, tmp_path: Path, text: str, expected: Any) -> None:
    seen = []
    monkeypatch.setattr(cutting, "make_plan", lambda files, wanted: seen.append(wanted) or sys.exit(0))
    with pytest.raises(SystemExit):
        toyllm("cut", str(tmp_path / "out"), "--layers", text, "--experts", text)
    assert (seen[0].layers, seen[0].experts) == (expected, expected)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("2GB", 2 * 10**9), ("1.5 gb", 15 * 10**8), ("500MiB", 500 * 2**20), ("4096", 4096), ("1kB", 1000), ("2TiB", 2**41)],
)
def test_sizes_are_read_as_they_are_written(monkeypatch: pytest.MonkeyPatch, toyllm: Any, tmp_path: Path, text: str, nbytes: int) -> None:
    seen = []
    monkeypatch.setattr(cutting, "make_plan", lambda files, wanted: seen.append(wanted) or sys.exit(0))
    with pytest.raises(SystemExit):
        toyllm("cut", str(tmp_path / "out"), "--shard-size", text)
    assert seen[0].shard_size == nbytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "3-1"], "--layers: '3-1': expected ascending numbers, each once"),
        (["--layers", "1,1"], "--layers: '1,1': expected ascending numbers, each once"),
        (["--layers", "-1"], "--layers: '-1': expected how many, or a list such as 0-3 or 0,2,5"),
        (["--experts", ""], "--experts: '': expected how many, or a list such as 0-3 or 0,2,5"),
        (["--experts", "0..3"], "--experts: '0..3': expected how many, or a list such as 0-3 or 0,2,5"),
        (["--experts", "9999999"], "--experts: '9999999': expected how many, or a list such as 0-3 or 0,2,5"),
        (["--dtype", "mxfp4"], "--dtype: 'mxfp4': expected bf16, f16, f32"),
        (["--expert-dtype", "q4"], "--expert-dtype: 'q4': expected mxfp4, bf16, f16, f32"),
        (["--shard-size", "2 parsecs"], "--shard-size: '2 parsecs': expected a size such as 2GB or 500MiB"),
        (["--shard-size", "0GB"], "--shard-size: '0GB': expected a size such as 2GB or 500MiB"),
        (["--shard-size", "1GB", "--merge"], "--merge, --shard-size: give one of them"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(toyllm: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    outcome = toyllm("cut", str(tmp_path / "out"), *arguments)
    assert (outcome.code, outcome.error) == (2, f"Invalid value for {message}. See: toyllm cut --help")
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_it_is_wrong_usage(toyllm: Any) -> None:
    assert toyllm("cut").error == "Missing argument 'OUT'. See: toyllm cut --help"


def test_nothing_is_written_over_without_force(toyllm: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert toyllm("cut", out, "--layers", "1").code == 0
    assert toyllm("cut", out).error.startswith(f"{out}: is there already; name another folder, or ")
    assert toyllm("cut", out, "--layers", "2", "--force").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_layer"] == 2


def test_a_folder_on_the_command_line_can_be_relative(toyllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert toyllm("cut", "out", "--layers", "1").out == "out\n"
    assert toyllm("cut", ".", "--force").error.startswith(f"{tmp_path}: no folder that `toyllm cut` wrote")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_is_ended_leaves_nothing(toyllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    write = cutting.write_shard
    before = signal.getsignal(number)

    def ended(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        assert len(list(tmp_path.iterdir())) == 1
        signal.raise_signal(number)

    monkeypatch.setattr(cutting, "write_shard", ended)
    code, out, err = toyllm("cut", str(tmp_path / "out"))
    assert (code, out) == (130, "")
    assert "interrupted: nothing is left of it\n" in err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path: Path, process: Callable[..., "subprocess.Popen[bytes]"]) -> None:
    import resource

    child = process("cut", str(tmp_path / "out"), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000)))
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (1, b"")
    assert err == f"error: {tmp_path}/out: cannot be written (File too large)\n".encode()
    assert list(tmp_path.iterdir()) == []


def test_names_from_a_file_do_not_steer_the_terminal(toyllm: Any, tmp_path: Path) -> None:
    source = tmp_path / "\x1b[31mred"
    assert toyllm("cut", str(source), "--layers", "1").code == 0
    outcome = toyllm("cut", str(tmp_path / "out"), "-m", str(source), "--dry-run")
    assert "\\x1b[31mred" in outcome.out
    assert "\x1b" not in outcome.out


def test_a_bar_of_bytes_is_shown_on_a_terminal(on_terminal: Any, tmp_path: Path) -> None:
    outcome = on_terminal("cut", str(tmp_path / "out"))
    assert outcome.code == 0
    assert "cutting tales-gpt2" in outcome.err
    assert re.search(r"[\d.]+/11\.8 MB", outcome.err)


def test_the_compiler_is_never_loaded(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom toyllm.cli.main import run\n"
        f"assert run(['cut', {str(tmp_path / 'out')!r}, '-m', 'tales-gpt-oss', '--expert-dtype', 'bf16', '--layers', '1']) == 0\n"
        "assert not {'numba', 'llvmlite', 'torch', 'tokenizers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60, env=os.environ | {"NO_COLOR": "1"})
