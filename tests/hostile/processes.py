"""`toyllm` in processes of their own, in surroundings that a test chooses."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

COMMAND = [sys.executable, "-m", "toyllm"]
GREEDY = ("--temperature", "0")
SETTINGS = ("TOYLLM_", "NUMBA_CACHE_DIR", "NO_COLOR", "COLUMNS", "HF_")  # of whoever runs the tests: no test depends on them


class Outcome(NamedTuple):
    """How a process ended, and what it wrote."""

    code: int
    out: bytes
    err: bytes

    @property
    def error(self) -> str:
        """The one line of an error behind notes, without which it would not be one: no traceback, no escapes, nothing else."""
        lines = [line for line in self.err.decode().splitlines() if not line.startswith("note: ")]
        assert self.code in (1, 2), self
        assert len(lines) == 1, self
        assert lines[0].startswith("error: "), self
        assert "\x1b" not in lines[0]
        return lines[0].removeprefix("error: ")


def environment(**changes: str | None) -> dict[str, str]:
    """This process's, without settings of toyllm's; with these changes, None for what is unset."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return {name: value for name, value in {**kept, **changes}.items() if value is not None}


def start(*arguments: str, command: Sequence[str] = COMMAND, **options: Any) -> "subprocess.Popen[bytes]":
    """Begin a run; stdin is empty, stdout and stderr are pipes, unless said otherwise."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()}
    return subprocess.Popen([*command, *arguments], **streams | options)


def run(*arguments: str, stdin: bytes | None = None, timeout: float = 120, **options: Any) -> Outcome:
    """A run to its end."""
    with start(*arguments, **({} if stdin is None else {"stdin": subprocess.PIPE}), **options) as child:
        try:
            out, err = child.communicate(stdin, timeout)
        finally:
            child.kill()
    return Outcome(child.returncode, out or b"", err or b"")


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something holds; it has to within so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def asleep(pid: int) -> bool:
    """Whether a process waits for something."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"
