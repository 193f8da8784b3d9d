"""Odd terminals, and what a run leaves of one: no escapes where none are wanted, any width, the cursor and the settings as they were."""

import fcntl
import os
import pty
import select
import signal
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import pytest

from .processes import COMMAND, GREEDY, asleep, environment, start, wait_until

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


class OnTerminal:
    """A run on a pseudo-terminal that is its own; `width` columns of 25 lines."""

    def __init__(self, *arguments: str, width: int = 80, command: Sequence[str] = COMMAND, **changes: str | None) -> None:
        self.screen, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (25, width))
        self.before = termios.tcgetattr(self.screen)
        self.child = start(
            *arguments,
            command=command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=environment(**{"TERM": "xterm", "INPUTRC": os.devnull, **changes}),
        )
        os.close(theirs)
        self.shown = b""

    def until(self, text: bytes = b"", seconds: float = 60) -> bytes:
        """All that has been shown when `text` has been; by default at the end."""
        end = time.monotonic() + seconds
        while not text or text not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.screen], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.screen, 4096)
                except OSError:  # nobody writes to it any more
                    assert not text, self.shown
                    break
        return self.shown

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self.screen)


SHOWN = [
    ("generate", "Once upon", *GREEDY, "--max-tokens", "3"),
    ("card", "--check", "-m", "tales-gpt2"),
    ("dump-tensor", "--plot", "wpe.weight"),
]


@pytest.mark.parametrize("arguments", SHOWN, ids=lambda arguments: arguments[0])
@pytest.mark.parametrize("changes", [{"TERM": "dumb"}, {"TERM": None, "NO_COLOR": "1"}], ids=str)
def test_a_terminal_that_wants_no_colours_gets_no_escapes(arguments: tuple[str, ...], changes: dict[str, str | None]) -> None:
    with OnTerminal(*arguments, **changes) as on:
        shown = on.until()
        assert on.child.wait(60) == 0
    assert b"\x1b" not in shown
    assert b"Traceback" not in shown


@pytest.mark.parametrize("width", [1, 1000])
@pytest.mark.parametrize("arguments", [SHOWN[0], SHOWN[-1], ("trace", "Once upon"), ("generate", "--help")], ids=" ".join)
def test_any_width_of_a_terminal_will_do(arguments: tuple[str, ...], width: int) -> None:
    with OnTerminal(*arguments, width=width) as on:
        shown = on.until()
        assert on.child.wait(60) == 0
    assert b"Traceback" not in shown
    assert len(shown) > 20


@pytest.mark.parametrize("number", SIGNALS)
def test_a_terminal_is_left_as_it_was(number: signal.Signals) -> None:
    """In the middle of a bar, which hides the cursor."""
    script = "import os, signal\nfrom toyllm.cli import output\nfrom toyllm.cli.endings import ended_by_signals\n"
    script += "with ended_by_signals(), output.byte_bar('reading') as progress:\n    progress(1, 10)\n    print('begun', flush=True)\n"
    script += "    import time\n    time.sleep(30)\n"
    with OnTerminal(command=[sys.executable, "-c", script]) as on:
        on.until(b"begun")
        on.child.send_signal(number)
        shown = on.until()
        assert on.child.wait(60) in (-2, 1, 130)
        assert b"\x1b[?25l" in shown
        assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l")
        assert termios.tcgetattr(on.screen) == on.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_chat_ends_at_its_prompt_and_gives_the_terminal_back(number: signal.Signals) -> None:
    scripted = [sys.executable, str(Path(__file__).parents[1] / "harmony_model.py"), '["<|channel|>final<|message|>Hello.<|return|>"]']
    with OnTerminal("chat", "-m", "scripted", *GREEDY, command=scripted) as on:
        on.until(b"> ")
        wait_until(lambda: asleep(on.child.pid))
        time.sleep(0.1)
        on.child.send_signal(number)
        on.until()
        assert on.child.wait(60) == 130
        assert termios.tcgetattr(on.screen) == on.before


def test_a_terminal_that_closes_ends_the_run_quietly(tmp_path: Path) -> None:
    on = OnTerminal("generate", "Once upon a time", *GREEDY, "--max-tokens", "200", "--json", command=sleeping(tmp_path))
    on.until(b"begun")
    os.close(on.screen)
    assert on.child.wait(60) == 130


def sleeping(folder: Path) -> list[str]:
    """A toyllm that says "begun" and takes a second over each token."""
    script = "import time\nfrom toyllm.models import gpt2\nforward = gpt2.forward\n"
    script += "def slow(*a):\n    print('begun', flush=True)\n    time.sleep(1)\n    forward(*a)\n"
    script += "gpt2.forward = slow\nfrom toyllm.__main__ import main\nmain()\n"
    (folder / "slow.py").write_text(script)
    return [sys.executable, str(folder / "slow.py")]
