"""Files and folders that appear whole or not at all, and over nothing that was not meant.

What is written lies beside its place under another name, `.toyllm-….partial`, and takes its own when it is complete. A run that ends
before that removes it. One that is killed cannot: the next that writes into the same folder does. While a partial is being written it is
locked, so that only what nobody writes any more is removed.
"""

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..kernels.errors import ToyllmError

PARTIAL = re.compile(r"\.toyllm-[0-9a-f]{1,16}\.partial")
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextmanager
def whole_file(path: Path, force: bool) -> Iterator[BinaryIO]:
    """A file to write that appears at `path` when the block ends well; when it does not, nothing is left and nothing has changed.

    With `force` it takes the place of a file, or of a link (not of what that points to), and has the file's permissions. Raises
    ToyllmError where something is there without it, for what is no file, and where writing fails.
    """
    with failures_named(path):
        check_free(path, force)
        with partial_beside(path, lambda partial: partial.open("xb").close()) as partial:
            with partial.open("wb") as file:
                yield file
            if force and path.is_file() and not path.is_symlink():
                partial.chmod(stat.S_IMODE(path.stat().st_mode))
            put_file(partial, path, force)


def check_free(path: Path, force: bool) -> None:
    """Raise ToyllmError where something is at `path` that a file is not to be written over."""
    if not os.path.lexists(path):
        return
    if not force:
        raise ToyllmError(f"{path}: is there already; --force writes over it")
    if not path.is_symlink() and not path.is_file():
        raise ToyllmError(f"{path}: is no file, and --force writes over files only; name another")


def put_file(partial: Path, path: Path, force: bool) -> None:
    """Give a complete file its name. Without `force`, not to one that somebody else has taken meanwhile: a link is made or it is not."""
    if force:
        partial.replace(path)
        return
    try:
        path.hardlink_to(partial)
    except FileExistsError as error:
        raise ToyllmError(f"{path}: came into being meanwhile; --force writes over it") from error
    except OSError:  # a file system without hard links
        check_free(path, force)
        partial.replace(path)


@contextmanager
def whole_folder(path: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends well; when it does not, nothing is left and nothing has changed.

    `check` is called before that, and raises ToyllmError where something is there that may not be replaced. Raises ToyllmError where
    writing fails.
    """
    with failures_named(path), partial_beside(path, Path.mkdir) as partial:
        yield partial
        check()
        put_folder(partial, path)


def put_folder(folder: Path, path: Path) -> None:
    """Give a complete folder its name. The one that had it goes under the partial's, in one step where the system can do that."""
    if not os.path.lexists(path):
        folder.rename(path)
        return
    folder.chmod(stat.S_IMODE(path.stat().st_mode))
    if exchange(folder, path):
        return
    old = path.with_name(f".toyllm-{secrets.token_hex(4)}.replaced")
    path.rename(old)
    try:
        folder.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def exchange(a: Path, b: Path) -> bool:
    """Let two names change places in one step; False where this system or file system cannot."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


# ---- partials ---------------------------------------------------------------------------------------------------------------


@contextmanager
def failures_named(path: Path) -> Iterator[None]:
    """Turn the system's refusals into one line about `path`. Raises ToyllmError."""
    try:
        yield
    except OSError as error:
        raise ToyllmError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def partial_beside(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """What `make` makes, beside `path` and locked; if it still has its name when the block ends, it is removed. Raises OSError."""
    remove_leftovers(path.parent)
    partial, held = path, None
    while partial is path:
        new = path.with_name(f".toyllm-{secrets.token_hex(4)}.partial")
        make(new)
        with suppress(OSError):  # where there are no locks, leftovers are not removed either
            held = lock(new)
        partial = new if os.path.lexists(new) else path  # else another process took it for a leftover before it was locked
    try:
        yield partial
    finally:
        remove(partial)
        if held is not None:
            os.close(held)


def lock(path: Path) -> int:
    """Lock a file or folder, no link; the descriptor that holds the lock. Raises OSError, BlockingIOError where another has it."""
    held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


def remove_leftovers(folder: Path) -> None:
    """Remove the partials of runs that were killed: this user's own, by their name, that nobody holds."""
    found: list[Path] = []
    with suppress(OSError):  # a folder to write into that may not be listed
        found = [path for path in folder.iterdir() if PARTIAL.fullmatch(path.name)]
    for path in found:
        with suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                held = lock(path)
                remove(path)
                os.close(held)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
