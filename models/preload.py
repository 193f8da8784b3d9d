"""Reading ahead: weights that are not in the page cache, fetched in order before the first token needs them.

A memory map faults its pages in where the kernels touch them, in small pieces and with nothing to show for it. One pass in
large reads takes the disk at its full speed and can report how far it is.
"""

import errno
import logging
import os
import random
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ..kernels.errors import ToyllmError

SAMPLES = 256  # pages looked at per file: a millisecond, and a share good to a few hundredths
RESIDENT = 0.95  # from this share on, the pages that are missing cost less than a pass over all of them
CHUNK = 8 * 2**20  # bytes a read: large enough for any disk, and an interrupt waits for one of them at most

log = logging.getLogger("toyllm")


def resident_share(path: Path) -> float | None:
    """Estimate the share of a file, 0 to 1, that is in the page cache; None where the system cannot say.

    Asks for one byte of each of `SAMPLES` pages (all pages of a small file) with RWF_NOWAIT, which refuses to wait for a disk.
    The pages are drawn anew each time: the kernel may fetch those it had to refuse, so that the same ones would look resident
    on a second run. Raises ToyllmError for a file that cannot be read.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        with path.open("rb", buffering=0) as file:
            descriptor = file.fileno()
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # a refused page shall not bring its neighbours along
            pages = -(-os.fstat(descriptor).st_size // page)
            samples = min(pages, SAMPLES)
            drawn = (random.randrange(i * pages // samples, (i + 1) * pages // samples) for i in range(samples))  # noqa: S311
            return sum(is_resident(descriptor, page * number) for number in drawn) / samples if samples else 1.0
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # tmpfs, network file systems
            return None
        raise ToyllmError(f"{path}: cannot be read ({error.strerror})") from error


def is_resident(descriptor: int, offset: int) -> bool:
    """Tell whether the byte at `offset` can be had without waiting. Raises OSError, EOPNOTSUPP where the file system does not tell."""
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    return True


def read_ahead(paths: Iterable[Path], progress: Callable[[int, int], None]) -> None:
    """Bring the files that are not in the page cache into it, calling progress(done_bytes, total_bytes) after each chunk.

    A file that the system knows nothing about counts as resident: most of those are. Where all files together exceed the
    available memory nothing is read, with a note, for the last pages would push out the first. Raises ToyllmError for a file
    that cannot be read. KeyboardInterrupt passes through between two chunks.
    """
    shares = {path: resident_share(path) for path in paths}
    sizes = {path: path.stat().st_size for path in shares}
    cold = [path for path, share in shares.items() if share is not None and share < RESIDENT]
    needed, available = sum(sizes.values()), available_memory()
    if cold and available is not None and needed > available:
        figures = f"{needed / 1e9:.1f} GB of weights, {available / 1e9:.1f} GB of memory available"
        log.info("%s: not read ahead, and every token will read from the disk again", figures)
        return
    done, total = 0, sum(sizes[path] for path in cold)
    scratch = bytearray(CHUNK)
    for path in cold:
        for count in read_chunks(path, scratch):
            done = min(done + count, total)
            progress(done, total)


def read_chunks(path: Path, scratch: bytearray) -> Iterator[int]:
    """Read a file from beginning to end into `scratch`, again and again; yields the bytes of each read. Raises ToyllmError."""
    try:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while count := file.readinto(scratch):
                yield count
    except OSError as error:
        raise ToyllmError(f"{path}: cannot be read ({error.strerror})") from error


def available_memory() -> int | None:
    """Bytes that the page cache may take: what the kernel calls available, within a container's limit; None where unknown."""
    limits = []
    with suppress(OSError):  # absent but on Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError):  # absent but in a container
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        limits += [int(limit)] if limit.isdecimal() else []  # else "max"
    return min(limits, default=None)


def address_space() -> int | None:
    """Bytes that this process may still map under a limit on its address space (`ulimit -v`); None where there is none."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    with suppress(OSError):  # absent but on Linux
        return max(0, limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())
    return limit
