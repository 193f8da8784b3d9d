"""The `toyllm` command as tests run it: inside this process, in one of its own, or on a terminal."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from toyllm.cli.main import run

COMMAND = [sys.executable, "-c", "from toyllm.cli.main import main; main()"]


class Outcome(NamedTuple):
    """How a run ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error, without which the run would not be one; nothing may stand on stdout."""
        assert self.code
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1
        return self.err[len("error: ") : -1]


Run = Callable[..., Outcome]


class Terminal(io.TextIOWrapper):
    """A standard stream over bytes that says it is a terminal."""

    def __init__(self, data: bytes = b"") -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8", newline="")

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests decides how they end."""
    for name in [name for name in os.environ if name.startswith("TOYLLM_")] + ["NO_COLOR"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def default_threads() -> Iterator[None]:
    """Undo --threads after the test."""
    yield
    from toyllm.kernels.threads import set_threads

    set_threads()


@pytest.fixture
def toyllm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, default_threads: None) -> Run:
    """Run a command line in this process, off any terminal, `stdin` in its pipe. Notes of a cold kernel cache are left out."""

    def toyllm(*arguments: str, stdin: bytes | None = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", Terminal() if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return Outcome(code, out, "".join(line for line in err.splitlines(True) if not line.startswith("note: compiling kernels")))

    return toyllm


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch, default_threads: None) -> Run:
    """Run a command line in this process as on a terminal, nothing typed."""

    def on_terminal(*arguments: str) -> Outcome:
        streams = Terminal(), Terminal(), Terminal()
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        return Outcome(run(list(arguments)), streams[1].text(), streams[2].text())

    return on_terminal


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a command line in a process of its own; stdout and stderr are pipes unless said otherwise."""
    started: list[subprocess.Popen[bytes]] = []

    def process(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([*COMMAND, *arguments], **streams | options))  # type: ignore[call-overload]
        return started[-1]

    yield process
    for child in started:
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream:
                stream.close()
