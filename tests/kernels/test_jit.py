"""The compiler's door: kernels are kept in a private folder, come back from it, and nothing that lies there can harm a run."""

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numba.core import config

from toyllm.kernels import jit

NOT_KEPT = "compiled kernels are not kept"
READ_ERROR = "a compiled kernel could not be read"
COMPILING = "compiling kernels for this processor"


def double(x):
    """The kernel of these tests, chosen for compiling quickly."""
    return x + x


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What has been said since the last call; as in a fresh process, nothing has been said before."""
    jit.say_once.cache_clear()
    logger = logging.getLogger("toyllm")
    caplog.set_level(logging.INFO, "toyllm")
    logger.addHandler(caplog.handler)  # the command line stops propagation

    def taken() -> list[str]:
        said = list(dict.fromkeys(r.getMessage() for r in caplog.records))
        caplog.clear()
        jit.say_once.cache_clear()
        return said

    yield taken
    logger.removeHandler(caplog.handler)
    jit.say_once.cache_clear()


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path | None]:
    """`cache_folder` as a fresh process sees the environment."""
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    return jit.cache_folder.__wrapped__


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """The kernel `double`, not compiled in this process yet; what it keeps lies in tmp_path."""
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    return lambda: jit.kernel(double)


def entries(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


class TestFolder:
    def test_is_private_and_named_after_the_source(self, choose, notes, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "deep"))
        folder = choose()
        assert folder == tmp_path / "deep" / "toyllm" / f"kernels-{jit.source_key()}"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.parent.stat().st_mode & 0o777 == 0o700
        assert choose() == folder
        assert notes() == []

    def test_follows_numbas_variable(self, choose, tmp_path, monkeypatch):
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
        assert choose().parent == tmp_path

    def test_follows_home(self, choose, tmp_path, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert choose().parent == tmp_path / ".cache" / "toyllm"
        monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
        assert choose().parent == tmp_path / ".cache" / "toyllm"

    def test_key_changes_with_any_source_and_with_the_bounds_checker(self, monkeypatch):
        key = jit.source_key.__wrapped__()
        assert key == jit.source_key.__wrapped__()
        monkeypatch.setattr(config, "BOUNDSCHECK", 1 if not config.BOUNDSCHECK else 0)
        assert jit.source_key.__wrapped__() != key
        monkeypatch.undo()
        read_bytes = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + (b"#" if path.name == "tiles.py" else b""))
        assert jit.source_key.__wrapped__() != key

    def place(self, tmp_path: Path) -> Path:
        return tmp_path / f"kernels-{jit.source_key()}"

    def refused(self, choose, notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
        assert choose() is None
        said = notes()
        assert len(said) == 1
        assert NOT_KEPT in said[0]
        assert why in said[0]
        assert "NUMBA_CACHE_DIR" in said[0]

    def test_open_to_others_is_refused(self, choose, notes, tmp_path, monkeypatch):
        for mode in (0o755, 0o720, 0o702):
            self.place(tmp_path).mkdir(exist_ok=True)
            self.place(tmp_path).chmod(mode)
            self.refused(choose, notes, tmp_path, monkeypatch, f"mode {mode:o}, expected 700")

    def test_another_owner_is_refused(self, choose, notes, tmp_path, monkeypatch):
        self.place(tmp_path).mkdir(mode=0o700)
        me = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
        self.refused(choose, notes, tmp_path, monkeypatch, "not a folder of this user's own")

    def test_a_link_is_refused(self, choose, notes, tmp_path, monkeypatch):
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        self.place(tmp_path).symlink_to(tmp_path / "elsewhere")
        self.refused(choose, notes, tmp_path, monkeypatch, "not a folder of this user's own")

    def test_a_file_in_its_place_is_refused(self, choose, notes, tmp_path, monkeypatch):
        self.place(tmp_path).write_text("")
        self.refused(choose, notes, tmp_path, monkeypatch, "File exists")

    def test_an_unwritable_one_is_refused(self, choose, notes, tmp_path, monkeypatch):
        self.place(tmp_path).mkdir(mode=0o700)
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
        self.refused(choose, notes, tmp_path, monkeypatch, "is not writable")

    def test_no_home_is_no_failure(self, choose, notes, monkeypatch):
        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", no_home)
        assert choose() is None
        assert "home directory" in notes()[0]


class TestOthers:
    """Folders of other versions, in the place where this one's is made."""

    @pytest.fixture
    def others(self, tmp_path, monkeypatch) -> Callable[..., Path]:
        """Make a folder as version number `i` left it, last used so many days ago."""
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))

        def make(i: int, days: float, name: str = "kernels-{:016x}", mode: int = 0o700) -> Path:
            folder = tmp_path / name.format(i)
            (folder / "kernels_1f").mkdir(parents=True)
            (folder / "kernels_1f" / "matmul.nbc").write_bytes(b"x")
            (folder / "kernels_1f" / "matmul.4711").write_bytes(b"never finished")
            folder.chmod(mode)
            used = time.time() - 86400 * days
            os.utime(folder, (used, used))
            return folder

        return make

    @pytest.fixture(autouse=True)
    def fresh_process(self, monkeypatch) -> Callable[[], Path | None]:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        return jit.cache_folder.__wrapped__

    def test_those_used_last_and_lately_are_kept(self, others, fresh_process, notes):
        kept = [others(i, days=i) for i in range(jit.OTHERS - 2)]
        old = others(50, days=jit.OTHERS_DAYS + 1)
        mine = fresh_process()
        assert sorted(path for path in mine.parent.iterdir()) == sorted([*kept, mine])
        assert not old.exists()
        assert notes() == []

    def test_no_more_than_so_many_are_kept(self, others, fresh_process):
        made = [others(i, days=i / 100) for i in range(jit.OTHERS + 5)]
        fresh_process()
        assert [path.exists() for path in made] == [True] * jit.OTHERS + [False] * 5

    def test_a_clock_that_went_back_removes_nothing_in_haste(self, others, fresh_process):
        later = [others(i, days=-400 - i) for i in range(jit.OTHERS)]
        assert all(path.exists() for path in [fresh_process(), *later])

    def test_only_a_new_version_looks_at_them(self, others, fresh_process):
        mine = fresh_process()
        old = others(1, days=99)
        assert fresh_process() == mine
        assert old.exists()

    def test_a_folder_in_use_is_left_and_its_time_is_noted(self, others, fresh_process):
        used, unused = others(1, days=99), others(2, days=99)
        descriptor = jit.lock(used, fcntl.LOCK_SH)  # as a process that runs on it has it
        mine = fresh_process()
        assert (used.exists(), unused.exists()) == (True, False)
        assert abs(mine.stat().st_mtime - time.time()) < 60
        os.close(descriptor)
        mine.rename(mine.with_name("elsewhere"))
        fresh_process()
        assert not used.exists()

    def test_this_process_holds_its_own(self, fresh_process, tmp_path, monkeypatch):
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
        with pytest.raises(BlockingIOError):
            jit.lock(fresh_process(), fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_one_that_is_removed_before_it_is_held_is_made_again(self, tmp_path, monkeypatch):
        folder, lock, removed = tmp_path / "kernels-1", jit.lock, []

        def late(path: Path, kind: int) -> int:
            held = lock(path, kind)
            if not removed:
                removed.append(path.rmdir())
            return held

        monkeypatch.setattr(jit, "lock", late)
        jit.take(folder)
        assert folder.is_dir()
        with pytest.raises(BlockingIOError):
            lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_what_is_not_certain_to_be_one_is_left(self, others, fresh_process, tmp_path, monkeypatch):
        left = [
            others(1, 99, name="kernels-mine"),
            others(2, 99, name="peers-{:016x}"),
            others(3, 99, mode=0o755),
            others(4, 99),
            others(5, 99),
        ]
        (left[3] / "kernels_1f" / "thesis.txt").write_text("precious")
        (left[4] / "kernels_1f" / "link.nbc").symlink_to(tmp_path / "thesis.txt")
        for folder in left[3:]:
            os.utime(folder, (0, 0))
        link, file = tmp_path / f"kernels-{6:016x}", tmp_path / f"kernels-{7:016x}"
        link.symlink_to(others(8, 0, name="elsewhere"))
        file.write_text("precious")
        os.utime(file, (0, 0))
        fresh_process()
        assert all(path.exists() for path in [*left, link, file, link.resolve() / "kernels_1f" / "matmul.nbc"])

    def test_another_owners_is_left(self, others, fresh_process, monkeypatch):
        theirs = others(1, 99)
        me = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
        jit.prune(theirs.parent)
        assert theirs.exists()

    def test_what_cannot_be_removed_is_no_failure(self, others, fresh_process, notes, monkeypatch):
        def refuse(folder: Path) -> None:
            raise PermissionError(13, "Permission denied")

        others(1, 99)
        monkeypatch.setattr(jit.shutil, "rmtree", refuse)
        assert fresh_process().is_dir()
        assert notes() == []


@pytest.mark.needs_jit
class TestEntries:
    def test_a_kernel_is_compiled_once_and_then_read(self, fresh, notes):
        first, second = fresh(), fresh()
        assert first(2.0) == 4.0
        assert len(notes()) == 1  # that it compiles
        assert second(2.0) == 4.0
        assert notes() == []
        assert sum(second.stats.cache_hits.values()) == 1
        assert not second.stats.cache_misses

    def test_each_signature_has_its_own_entry(self, fresh, tmp_path):
        kernel = fresh()
        assert (kernel(2.0), kernel(3)) == (4.0, 6)
        assert len(entries(tmp_path)) == 2
        again = fresh()
        assert (again(2.0), again(3)) == (4.0, 6)
        assert sum(again.stats.cache_hits.values()) == 2

    def test_kept_where_it_was_told_even_after_numba_forgot(self, fresh, tmp_path, monkeypatch):
        """Numba reads its configuration from the environment again whenever a NUMBA_ variable has changed."""
        monkeypatch.setattr(config, "CACHE_DIR", "")
        fresh()(2.0)
        assert len(entries(tmp_path)) == 1
        assert config.CACHE_DIR == ""

    @pytest.mark.parametrize("where", [0, 31, 32, 100, -1])
    def test_a_flipped_bit_is_seen_and_the_kernel_compiled_anew(self, fresh, notes, tmp_path, where):
        fresh()(2.0)
        (path,) = entries(tmp_path)
        damaged = bytearray(path.read_bytes())
        damaged[where] ^= 1
        path.write_bytes(damaged)
        self.compiled_anew(fresh, notes)

    @pytest.mark.parametrize("length", [0, 10, 32, 40, 1000])
    def test_a_truncated_entry_is_compiled_anew(self, fresh, notes, tmp_path, length):
        fresh()(2.0)
        (path,) = entries(tmp_path)
        path.write_bytes(path.read_bytes()[:length])
        self.compiled_anew(fresh, notes)

    def test_another_signatures_code_is_not_run(self, fresh, notes, tmp_path):
        fresh()(3)
        (other,) = entries(tmp_path)
        fresh()(2.0)
        (mine,) = set(entries(tmp_path)) - {other}
        mine.write_bytes(other.read_bytes())
        self.compiled_anew(fresh, notes)

    def test_an_entry_that_cannot_be_read_is_compiled_anew(self, fresh, notes, tmp_path):
        fresh()(2.0)
        (path,) = entries(tmp_path)
        path.unlink()
        path.mkdir()
        notes()
        assert fresh()(2.0) == 4.0
        said = notes()
        assert any(READ_ERROR in note for note in said)
        assert any(NOT_KEPT in note for note in said)

    def compiled_anew(self, fresh, notes) -> None:
        notes()
        kernel = fresh()
        assert kernel(2.0) == 4.0
        assert any(READ_ERROR in note for note in notes())
        assert not kernel.stats.cache_hits
        again = fresh()
        assert again(2.0) == 4.0
        assert again.stats.cache_hits
        assert notes() == []

    def test_what_cannot_be_written_is_not_kept_and_said_once(self, fresh, notes, monkeypatch):
        def full(path: Path, content: bytes) -> int:
            raise OSError(28, "No space left on device")

        kernel = fresh()
        monkeypatch.setattr(Path, "write_bytes", full)
        assert (kernel(2.0), kernel(3)) == (4.0, 6)
        (said,) = [note for note in notes() if NOT_KEPT in note]
        assert "No space left" in said

    def test_nothing_but_entries_is_left_behind(self, fresh, tmp_path):
        fresh()(2.0)
        assert [p.suffix for p in entries(tmp_path)] == [".nbc"]

    def test_without_a_folder_kernels_still_run(self, notes, monkeypatch):
        monkeypatch.setattr(jit, "cache_folder", lambda: None)
        assert jit.kernel(double)(2.0) == 4.0

    def test_seconds_of_preparing_are_counted(self, fresh):
        before = jit.preparing_seconds()
        fresh()(2.0)
        compiled = jit.preparing_seconds()
        assert compiled > before
        fresh()(2.0)
        assert jit.preparing_seconds() > compiled


SCRIPT = """
import logging, numpy
logging.basicConfig(level=logging.INFO, format="%(message)s")
from toyllm.kernels.sampling import largest
print(largest(numpy.arange(9, dtype=numpy.float32), 2))
"""


def run(**environment: str) -> list[str]:
    """The notes of a fresh process that runs one kernel."""
    variables = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=variables | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[8 7]\n"
    return done.stderr.splitlines()


@pytest.mark.needs_jit
def test_the_first_run_says_that_it_compiles_and_the_second_nothing(tmp_path):
    (said,) = run(HOME=str(tmp_path))
    assert said.startswith(COMPILING)
    assert run(HOME=str(tmp_path)) == []
    assert not any(p.stat().st_mode & 0o077 for p in (tmp_path / ".cache" / "toyllm").iterdir())


@pytest.mark.needs_jit
def test_a_folder_that_cannot_be_made_costs_one_note(tmp_path):
    (tmp_path / "file").write_text("")
    (said,) = run(HOME=str(tmp_path / "file"))
    assert said.startswith(NOT_KEPT)


@pytest.mark.needs_jit
def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | {"NUMBA_CACHE_DIR": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, **pipes) for _ in range(3)]
    for child in children:
        out, err = child.communicate(timeout=120)
        assert (child.returncode, out) == (0, "[8 7]\n")
        assert err.startswith(COMPILING)
        assert err.count("\n") == 1
    assert run(NUMBA_CACHE_DIR=str(tmp_path), HOME=str(tmp_path)) == []
    assert {path.suffix for path in entries(tmp_path)} == {".nbc"}
