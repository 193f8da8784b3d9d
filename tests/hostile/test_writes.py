"""What is written appears whole or not at all, never over what was not meant, and a run that was killed leaves nothing for long."""

import fcntl
import json
import os
import resource
import shutil
import stat
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toyllm.cli.main import run as run_here
from toyllm.kernels.errors import ToyllmError
from toyllm.models import whole
from toyllm.models.whole import whole_file, whole_folder

from .killed import WRITERS
from .processes import run

HERE = Path(__file__).parent
if find_spec("matplotlib") is None:
    del WRITERS["plot"]
FILES = [name for name in WRITERS if name != "cut"]


# Runs that end in the middle


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["x.npz", "html", "emit", "cut"])
def test_however_a_run_ends_what_it_writes_is_whole_or_not_there(tmp_path: Path, writer: str) -> None:
    """Killed at each step on the disk, killed in a write, a full disk; with nothing in its place, and with something to replace."""
    done = run(str(tmp_path), writer, command=[sys.executable, str(HERE / "killed.py")])
    assert done.code == 0, done.err.decode()
    found = json.loads(done.out)
    for end in found:
        assert end["state"] in ("old", "new"), end
        assert all(whole.PARTIAL.fullmatch(name) for name in end["left"]), end
        assert end["afterwards"] == [], "the next run clears up"
        if end["how"] == "full":
            assert (end["code"], end["state"], end["left"]) == (1, "old", []), end
        if end["how"] == "killed in a write":
            assert (end["code"], end["state"]) == (-25, "old"), end
            assert end["at"] == 0 or len(end["left"]) == 1, "where no byte may be written, a lock of Numba's may be the first to try"
    killed = [end for end in found if end["how"] == "killed"]
    for force in (False, True):
        states = [end["state"] for end in killed if end["force"] is force]
        assert states == sorted(states, reverse=True), "once it is there, it stays"
        assert {"old", "new"} == set(states)
        assert sum(end["code"] == -9 for end in killed if end["force"] is force) >= 5
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A real one, where this system lets its users make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    fill = f"mount -t tmpfs -o size=64k none {disk} && cd {disk}"
    script = f'{fill} && "$@"; code=$?; ls -A . >&2; exit $code'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or run(command=[*inside, f"{fill}"]).code:
        pytest.skip("no file system can be mounted here")
    toyllm = [sys.executable, "-m", "toyllm"]
    for arguments, name in ((("dump-tensor", "wte.weight", "--save", "x.npy"), "x.npy"), (("cut", "out", "--layers", "1"), f"{disk}/out")):
        code, out, err = run(*arguments, command=[*inside, script, "sh", *toyllm])
        assert (code, out) == (1, b"")
        last = err.decode().splitlines()[-1]
        assert last.startswith(f"error: {name}: "), "and nothing is left, which would be listed behind it"
        assert "cannot be written (No space left on device)" in last or "free on this disk" in last


def test_a_session_that_cannot_be_written_stays_what_it_was(tmp_path: Path) -> None:
    asked = ("generate", "Once upon a time", "--temperature", "0", "--max-tokens", "4", "--session", str(tmp_path / "x.session"))
    assert run(*asked).code == 0
    before = (tmp_path / "x.session").read_bytes()
    size = len(before) // 2
    done = run(*asked, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert done.code == 1
    assert done.err.decode().splitlines()[-1] == f"error: {tmp_path / 'x.session'}: cannot be written (File too large)"
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


# What is there already


@pytest.mark.parametrize("writer", FILES)
def test_only_a_file_or_a_link_is_written_over_and_only_if_meant(tmp_path: Path, capfd: pytest.CaptureFixture[str], writer: str) -> None:
    name, arguments = WRITERS[writer]
    path, behind = tmp_path / name, tmp_path / "behind"
    behind.write_bytes(b"precious")

    def make(kind: str) -> None:
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "file":
            path.write_bytes(b"mine")
        else:
            path.symlink_to(behind if kind == "link" else tmp_path / "nowhere")

    for kind in ("file", "link", "dangling link", "folder", "pipe"):
        make(kind)
        before = path.lstat()
        assert run_here(list(arguments(path))) == 1
        assert f"error: {path}: is there already; --force writes over it\n" in capfd.readouterr().err
        assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
        code = run_here([*arguments(path), "--force"])
        err = capfd.readouterr().err
        if kind in ("folder", "pipe"):
            assert code == 1
            assert err.endswith(f"error: {path}: is no file, and --force writes over files only; name another\n")
            assert path.lstat().st_ino == before.st_ino
        else:
            assert code == 0
            assert stat.S_ISREG(path.lstat().st_mode)
            assert len(path.read_bytes()) > 8
        path.rmdir() if kind == "folder" else path.unlink()
    assert behind.read_bytes() == b"precious", "a link is replaced, not what it points to"
    assert [inside.name for inside in tmp_path.iterdir()] == ["behind"]


def test_a_file_written_over_keeps_its_permissions_and_its_other_names_keep_their_content(tmp_path: Path) -> None:
    path, other = tmp_path / "x", tmp_path / "other"
    path.write_bytes(b"before")
    other.hardlink_to(path)
    for mode in (0o600, 0o444, 0o640):
        path.chmod(mode)
        with whole_file(path, force=True) as file:
            file.write(b"after")
        assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"after", mode)
    assert other.read_bytes() == b"before"


def test_a_folder_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir(mode=0o700)
    with whole_folder(tmp_path / "x", lambda: None) as partial:
        (partial / "inside").touch()
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o700
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "inside"]


@pytest.mark.parametrize("writer", list(WRITERS))
def test_where_nothing_can_be_written_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str], writer: str) -> None:
    name, arguments = WRITERS[writer]
    assert run_here(list(arguments(tmp_path / "none" / name))) == 1
    err = capfd.readouterr().err
    assert f"{tmp_path / 'none' / name}: no folder {tmp_path / 'none'} to " in err
    assert run_here(list(arguments(Path("/proc") / name))) == 1  # where not even root makes files
    err = capfd.readouterr().err.splitlines()[-1]
    assert err.startswith(f"error: /proc/{name}: ")
    assert "cannot be written" in err or "free on this disk" in err


@pytest.mark.parametrize("writer", ["x.npz", "cut"])
def test_other_file_systems_are_written_to(tmp_path: Path, writer: str) -> None:
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other file system to write to")
    folder = Path("/dev/shm") / f"toyllm-test-{os.getpid()}"
    folder.mkdir()
    try:
        name, arguments = WRITERS[writer]
        (tmp_path / "link").symlink_to(folder)
        assert run_here(list(arguments(tmp_path / "link" / name))) == 0
        assert [path.name for path in folder.iterdir()] == [name]
    finally:
        shutil.rmtree(folder)


# Meanwhile


def test_a_name_taken_meanwhile_is_not_taken_over(tmp_path: Path) -> None:
    def write() -> None:
        with whole_file(tmp_path / "x", False) as file:
            file.write(b"mine")
            (tmp_path / "x").write_bytes(b"theirs")

    with pytest.raises(ToyllmError, match="came into being meanwhile; --force writes over it"):
        write()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"theirs"}


def test_nor_where_the_file_system_has_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with whole_file(tmp_path / "x", False) as file:
        file.write(b"mine")
    with pytest.raises(ToyllmError, match="is there already"), whole_file(tmp_path / "y", False) as file:
        (tmp_path / "y").write_bytes(b"theirs")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"mine", "y": b"theirs"}


def test_a_folder_is_replaced_in_one_step_or_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swap = whole.exchange
    for exchange in (swap, lambda a, b: False):
        monkeypatch.setattr(whole, "exchange", exchange)
        with whole_folder(tmp_path / "x", lambda: None) as partial:
            (partial / f"{len(partial.name)}").touch()
        with whole_folder(tmp_path / "x", lambda: None) as partial:
            (partial / "new").touch()
        assert [path.name for path in tmp_path.rglob("*")] == ["x", "new"]


def test_what_another_run_is_writing_is_left_and_what_nobody_writes_any_more_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".toyllm-0123abcd.partial"
    left.write_bytes(b"of a run that was killed")
    (tmp_path / ".toyllm-4711.partial").mkdir()
    (tmp_path / ".toyllm-4711.partial" / "config.json").touch()
    with whole_file(tmp_path / "a", False) as first, whole_file(tmp_path / "b", False) as second:
        assert sum(path.name.endswith(".partial") for path in tmp_path.iterdir()) == 2
        first.write(b"a")
        second.write(b"b")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"a", "b": b"b"}


def test_what_is_not_certain_to_be_a_leftover_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [".toyllm-notes.partial", "toyllm-1.partial", ".toyllm-1.partial.txt", ".toyllm-12345678.replaced"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    (tmp_path / ".toyllm-1.partial").symlink_to("thesis")
    with whole_file(tmp_path / "x", False):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "thesis", ".toyllm-1.partial", "x"])
    assert (tmp_path / "thesis" / "chapter").exists()
    me = os.getuid()
    (tmp_path / ".toyllm-2.partial").touch()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with whole_file(tmp_path / "y", False):
        pass
    assert (tmp_path / ".toyllm-2.partial").exists(), "another's"


def test_a_partial_that_is_taken_for_a_leftover_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock: Callable[[Path], int] = whole.lock
    taken: list[Any] = []

    def late(path: Path) -> int:
        if not taken:
            taken.append(path.unlink())
        return lock(path)

    monkeypatch.setattr(whole, "lock", late)
    with whole_file(tmp_path / "x", False) as file:
        file.write(b"whole")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"whole"}


def test_without_locks_files_are_written_and_nothing_is_cleared_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(held: int, kind: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".toyllm-1.partial").touch()
    with whole_file(tmp_path / "x", False) as file:
        np.save(file, np.ones(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".toyllm-1.partial", "x"]
