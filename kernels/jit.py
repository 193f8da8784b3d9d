"""One door to Numba: how kernels are compiled, and where compiled kernels are kept.

Compiled kernels are cached per user, in a folder keyed by version and kernel source. Numba's cache is made of pickles, so
whoever can write there can run code here: the folder must be the user's own and private (0700), no link, and every
entry must carry its checksum. Where that does not hold, kernels are compiled anew, with one note.

A new version makes a folder of its own, and removes those of others that have not been used for long. A folder in use is locked.
"""

import fcntl
import hashlib
import logging
import os
import pickle
import re
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

from .threads import choose_threading_layer

log = logging.getLogger("toyllm")
config: Any = numba.config  # made at run time, so that no type checker knows what it holds
choose_threading_layer()

OTHERS, OTHERS_DAYS = 8, 30  # of other versions' folders so many are kept, used within so many days


def inline(function: Callable) -> Any:
    """A function for kernels to call and LLVM to inline; its arithmetic, too, is done as written."""
    return numba.njit(error_model="numpy")(function)


def kernel(function: Callable | None = None, *, parallel: bool = False) -> Any:
    """Compile `function` with Numba on its first call, or take it from the cache; `parallel` runs its prange loops on the threads.

    Arithmetic is done as written, in that order. Were the compiler free to reorder it (fastmath), the process that compiles a kernel could
    give other last bits than those that load it: linked code is optimised once more for the cache. Long sums are those of `simd.sums`.
    """
    if function is None:
        return lambda f: kernel(f, parallel=parallel)
    dispatcher: Any = numba.njit(parallel=parallel, error_model="numpy")(function)
    if not config.DISABLE_JIT and (folder := cache_folder()):
        try:
            dispatcher._cache = KernelCache(function, folder)  # noqa: SLF001 - what cache=True does, with our checks around it
        except (OSError, RuntimeError) as error:  # Numba's own test of the folder
            say_once(f"compiled kernels are not kept: {error}")
    return dispatcher


@cache
def cache_folder() -> Path | None:
    """The private folder of this version's compiled kernels, made if need be; None, with one note, where there can be none."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    try:
        base = Path(given) if given else default_base()
        folder = base / f"kernels-{source_key()}"
        new = not folder.exists()
        take(folder)
    except (OSError, RuntimeError) as error:
        log.info("compiled kernels are not kept: %s. They compile anew on each run; set NUMBA_CACHE_DIR to a private folder", error)
        return None
    if new:
        prune(base)
    return folder


def default_base() -> Path:
    """$XDG_CACHE_HOME/toyllm or ~/.cache/toyllm. Raises RuntimeError without a home."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return Path(xdg if Path(xdg).is_absolute() else Path.home() / ".cache") / "toyllm"


@cache
def source_key() -> str:
    """A hash of all that decides what a compiled kernel is: the kernels' source, Numba, and its switches."""
    from .. import __version__

    digest = hashlib.sha256(f"{__version__} {numba.__version__} {config.BOUNDSCHECK}".encode())
    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        digest.update(f"\0{path.relative_to(here)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def make_private(folder: Path) -> None:
    """Make `folder` with mode 0700. Raises OSError if it is not writable, not ours, a link, or open to others."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        raise OSError(f"{folder} is not a folder of this user's own")
    if state.st_mode & 0o077:
        raise OSError(f"{folder} is open to others (mode {state.st_mode & 0o777:o}, expected 700)")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder} is not writable")


def take(folder: Path) -> None:
    """Make `folder` private, lock it as in use until this process ends, and note the time. Raises OSError as `make_private` does."""
    while True:
        make_private(folder)
        with suppress(OSError):  # where there are no locks, `prune` removes nothing either
            held = lock(folder, fcntl.LOCK_SH)
            if not folder.exists() or not os.path.samestat(os.fstat(held), folder.stat()):  # pruned before it was locked
                os.close(held)
                continue
            os.utime(held)
        return


def lock(folder: Path, kind: int) -> int:
    """Lock a folder, no link; the descriptor that holds the lock. Raises OSError."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, kind)
    except OSError:
        os.close(held)
        raise
    return held


def prune(base: Path) -> None:
    """Remove the folders of other versions that nobody uses any more: all but the `OTHERS` used last, and those after `OTHERS_DAYS`.

    Only what is certain to be one: by its name, this user's own, private, no link, and with nothing but compiled kernels in it.
    """
    with suppress(OSError):  # it is a kindness, no part of the run
        found = [path for path in base.iterdir() if re.fullmatch(r"kernels-[0-9a-f]{16}", path.name) and path.name[8:] != source_key()]
        used = {path: state.st_mtime for path in found if stat.S_ISDIR((state := path.lstat()).st_mode)}
        for rank, path in enumerate(sorted(used, key=lambda path: used[path], reverse=True)):
            if rank >= OTHERS or time.time() - used[path] > OTHERS_DAYS * 86400:
                remove(path)


def remove(folder: Path) -> None:
    """Remove a folder of compiled kernels, unless it is in use or anything else."""
    with suppress(OSError):
        held = lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            state = os.fstat(held)
            private = state.st_uid == os.getuid() and not state.st_mode & 0o077
            if private and all(map(is_kept, folder.rglob("*"))):
                shutil.rmtree(folder)
        finally:
            os.close(held)


def is_kept(path: Path) -> bool:
    """Whether this is what a folder of compiled kernels holds: subfolders, entries, and entries that were never finished."""
    mode = path.lstat().st_mode
    return stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and bool(re.fullmatch(r"\.(nbc|nbi|[0-9]+)", path.suffix)))


spent: list[float] = []


def preparing_seconds() -> float:
    """Seconds that loading and compiling kernels has taken in this process so far."""
    return sum(spent)


class Entries:
    """The compiled signatures of one function, a file each, behind a SHA-256: damaged machine code is never run.

    Each file is named by its key and holds it. In Numba's own scheme, numbered files and an index, two processes that compile
    different signatures at once can leave one's code under the other's name.
    """

    def __init__(self, prefix: str, stamp: Any) -> None:
        self.prefix, self.stamp = prefix, stamp

    def path(self, key: Any) -> Path:
        """Where the entry of a key (signature, processor, bytecode) is kept."""
        return Path(f"{self.prefix}.{hashlib.sha256(repr((self.stamp, key)).encode()).hexdigest()[:16]}.nbc")

    def load(self, key: Any) -> Any:
        """What was saved for a key, or None. Raises ValueError where the file is not what was written, OSError where it cannot be read."""
        path = self.path(key)
        if not path.exists():
            return None
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise ValueError(f"{path} is damaged")
        stamp, found, data = pickle.loads(content[32:])  # noqa: S301 - from this user's private folder, checked above
        if (stamp, found) != (self.stamp, key):
            raise ValueError(f"{path} holds another kernel")
        return data

    def save(self, key: Any, data: Any) -> None:
        """Keep `data` for a key: another process sees the whole file or none. Raises OSError."""
        content = dumps((self.stamp, key, data))
        path = self.path(key)
        written = path.with_suffix(f".{os.getpid()}")
        try:
            written.write_bytes(hashlib.sha256(content).digest() + content)
            written.replace(path)
        finally:
            written.unlink(missing_ok=True)


class KernelCache(FunctionCache):
    """Numba's cache of one function, which never fails a run: what cannot be read is compiled, what cannot be written is not kept."""

    def __init__(self, function: Callable, folder: Path) -> None:
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder)  # for this function alone; Numba may reset it at any compilation
        try:
            super().__init__(function)
        finally:
            config.CACHE_DIR = before
        self._cache_file = Entries(f"{self._cache_path}/{self._impl.filename_base}", self._impl.locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function for a signature, or None; then it is about to be compiled, which is said once."""
        found = None
        self.began = time.perf_counter()
        try:
            with self._guard_against_spurious_io_errors():
                rtsys.initialize(target_context)  # all that running takes; Numba fills its tables for compiling here, a fifth of a start
                found = self._load_overload(sig, target_context)
        except Exception as error:  # noqa: BLE001 - unpickling damaged bytes raises anything
            say_once(f"a compiled kernel could not be read ({type(error).__name__}); it is compiled anew")
        if found is None:
            say_once("compiling kernels for this processor, once; this takes some seconds")
        else:
            spent.append(time.perf_counter() - self.began)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function, or say once that it could not be kept."""
        spent.append(time.perf_counter() - self.began)
        try:
            super().save_overload(sig, data)
        except OSError as error:
            say_once(f"compiled kernels are not kept: {error}")


@cache
def say_once(message: str) -> None:
    """Log a note the first time it is said."""
    log.info(message)
