"""Every case of the corpus, on the command's own main: how it ends, what it says, and that it takes little time and memory.

Run as `pytest tests/hostile/test_corpus.py`; a case by its name: `-k "rank 65"`.
"""

import io
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from toyllm.cli.main import run
from toyllm.kernels.jit import preparing_seconds

from .corpus import CASES
from .making import Case, Command, generate, gpt2, gpt_oss
from .processes import run as run_in_process

SECONDS = 5.0  # of processor time that a command may take, kernels that are loaded or compiled left out; most take a hundredth of it
MEGABYTES = 250  # of memory a command may take beyond what the process had before
LINES = ("error: ", "note: ", "warning: ", "seed ")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TOYLLM_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Libraries imported and most kernels loaded: what the first command takes is no case's fault."""
    for base in (gpt2, gpt_oss):
        folder = base(tmp_path_factory.mktemp("warm"))
        for command in (generate(), generate("", "--temperature", "1", "--seed", "1")):
            assert run(filled(command, folder)) == 0


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in CASES])
def test_a_bad_input_is_one_clear_line(case: Case, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    case.make(folder)
    monkeypatch.chdir(tmp_path)
    before = {path: path.lstat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    for command in case.commands:
        run_one(command, folder, capfd, monkeypatch)
    assert {path: path.lstat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before, "nothing is written"


def run_one(command: Command, folder: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    line = filled(command, folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    capfd.readouterr()
    with bounded_memory(line):
        began, preparing = time.process_time(), preparing_seconds()
        code = run(line)
        took = time.process_time() - began - (preparing_seconds() - preparing)
    held_against(command, line, code, *capfd.readouterr())
    assert took < SECONDS, line


IN_PROCESSES = (
    "file: 100,000 nested brackets",
    "file: a FIFO",
    "file: escape sequences in a name",
    "index: ../",
    "config: a number beyond f64",
    "weights: NaN in a matrix",
    "tokenizer: text doubled 60 times",
    "tokenizer: a pattern that is none",
)


@pytest.mark.parametrize("name", IN_PROCESSES)
def test_a_process_of_its_own_ends_the_same(name: str, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if str(case) == name)
    folder = tmp_path / "model"
    folder.mkdir()
    case.make(folder)
    line = filled(case.commands[0], folder)
    outcome = run_in_process(*line)
    held_against(case.commands[0], line, outcome.code, outcome.out.decode(), outcome.err.decode())


def filled(command: Command, folder: Path) -> list[str]:
    return [word.replace("{}", str(folder)) for word in command.line]


def held_against(command: Command, line: list[str], code: int, out: str, err: str) -> None:
    """The exit code, lines that are the command's own, one of them the error, and no control character anywhere."""
    shown = f"{line}\n{out[:2000]}\n{err[:2000]}"
    assert code == command.code, shown
    said = err.splitlines()
    assert all(text.startswith(LINES) for text in said) or code in (0, 3), shown
    assert "Traceback" not in err, shown
    assert sum(text.startswith("error: ") for text in said) == (code in (1, 2)), shown
    assert max(map(len, said), default=0) < 1500, shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", out + err), shown
    assert out == "" or code in (0, 3), shown
    where = err if code in (1, 2) or (not re.search(command.says, out)) else out
    assert re.search(command.says, where), shown


@contextmanager
def bounded_memory(line: list[str]) -> Iterator[None]:
    """Fails where memory in use grew beyond the bound meanwhile, as the system saw it at its highest."""
    before = peak(reset=True)
    yield
    grown = peak() - before
    assert grown < MEGABYTES * 2**20, (line, f"{grown / 2**20:.0f} MB")


def peak(reset: bool = False) -> int:
    """The most bytes this process has had in memory since the last reset; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
