"""Runs of `toyllm` that end in the middle of writing: killed at each step, and where the disk is full.

    python tests/hostile/killed.py FOLDER WRITER

prints, as JSON, what each run left in FOLDER. Every run is a fork of this process, which has imported what it takes.
"""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toyllm.cli import output
from toyllm.cli.main import run

WEIGHT = ("dump-tensor", "h.0.ln_1.bias", "--slice", "0:4")
PORTABLE = ("--backend", "numpy", "--no-preload")  # no compiled kernels, so that their threads cannot be missing in a fork
WRITERS: dict[str, tuple[str, Callable[[Path], tuple[str, ...]]]] = {
    **{name: (name, lambda path: (*WEIGHT, "--save", str(path))) for name in ("x.npy", "x.npz", "x.safetensors", "x.csv", "x.json")},
    "plot": ("x.png", lambda path: (*WEIGHT, "--plot", str(path))),
    "html": ("x.html", lambda path: ("trace", "Once", "--layers", "0", "--html", str(path), *PORTABLE)),
    "emit": ("x.py", lambda path: ("card", "-m", "tales-gpt2", "--emit", "numpy", "--output", str(path))),
    "cut": ("x", lambda path: ("cut", str(path), "--layers", "1")),
}
STEPS = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.scandir", "os.listdir", "shutil.rmtree"}


def forked(action: Callable[[], int]) -> int:
    """What `os.waitstatus_to_exitcode` says of a fork that does this."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            output.open_streams()
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(step: int, folder: Path) -> None:
    """Let this process be killed at a step, counted from 0, that touches the folder."""
    left, inside = step, str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in STEPS and any(inside in os.fsdecode(a) for a in arguments if isinstance(a, str | bytes)):
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def limit(nbytes: int, killed: bool) -> None:
    """Let no file grow beyond so many bytes: the write fails, or kills the process."""
    if killed:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def content(path: Path) -> Any:
    """The bytes of a file, or of a folder's files by name; None where nothing is."""
    if path.is_dir():
        return {inside.name: inside.read_bytes() for inside in path.iterdir()}
    return path.read_bytes() if path.exists() else None


def ends(folder: Path, writer: str) -> list[dict[str, Any]]:
    """What the runs of a writer left, ended in all ways, with nothing in its place and with something."""
    name, arguments = WRITERS[writer]
    path = folder / name

    def write(prepare: Callable[[], None], force: bool) -> Callable[[], int]:
        def action() -> int:
            prepare()
            return run([*arguments(path), *(["--force"] if force else [])])

        return action

    assert forked(write(lambda: None, False)) == 0
    new = content(path)
    size = max(map(len, new.values())) if isinstance(new, dict) else len(new)
    kept, before = folder.with_name(f"{folder.name}-kept"), tampered(path)
    path.rename(kept)
    found = []
    for force in (False, True):
        endings = [("killed", step, lambda step=step: kill_at(step, folder)) for step in range(100)]
        for nbytes in (0, size // 2, size - 1):
            for how in ("full", "killed in a write"):
                endings.append((how, nbytes, lambda nbytes=nbytes, how=how: limit(nbytes, how != "full")))
        done = False
        for how, at, prepare in endings:
            if how == "killed" and done:
                continue
            old = None
            if force:
                copy(kept, path)
                old = before
            code = forked(write(prepare, force))
            done = how == "killed" and code == 0
            left = [inside.name for inside in folder.iterdir() if inside != path]
            state = "old" if content(path) == old else "new" if content(path) == new else "broken"
            found.append({"how": how, "at": at, "force": force, "code": code, "state": state, "left": left})
            clear(path)
            if left:
                assert forked(write(lambda: None, False)) == 0
                clear(path)
            found[-1]["afterwards"] = [inside.name for inside in folder.iterdir()]
    clear(kept)
    return found


def tampered(path: Path) -> Any:
    """Make what is there another than what will be written; its content."""
    one = path / "LICENSE" if path.is_dir() else path
    one.write_bytes(b"before")
    return content(path)


def copy(path: Path, to: Path) -> None:
    """Copy a file or a folder."""
    if path.is_dir():
        shutil.copytree(path, to)
    else:
        shutil.copyfile(path, to)


def clear(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


if __name__ == "__main__":
    print(json.dumps(ends(Path(sys.argv[1]), sys.argv[2])))
