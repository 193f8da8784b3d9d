"""Threads: how many, and which of Numba's threading layers carries them.

A parallel region costs 2-3 µs with OpenMP or TBB and about 50 µs with the built-in workqueue (2 cores, this module's
reason): per token there are dozens, so the layer matters more than the kernel.
"""

import ctypes
import os
import sys
from pathlib import Path

from .errors import ToyllmError


def choose_threading_layer() -> None:
    """Let Numba find OpenMP, else the TBB that came as a wheel; a user's own NUMBA_THREADING_LAYER stands."""
    os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")
    library = Path(sys.prefix) / "lib" / "libtbb.so.12"
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # its folder is not on the loader's path: once loaded, Numba finds it


def physical_cores() -> int:
    """Cores this process may run on, hyper-threads of one core counted once (they share the arithmetic units)."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def set_threads(count: int | None = None) -> int:
    """Use `count` threads in all kernels (default: the physical cores); returns the number. Raises ToyllmError out of range."""
    import numba

    most = numba.config.NUMBA_NUM_THREADS
    if count is None:
        count = min(physical_cores(), most)
    if not 1 <= count <= most:
        raise ToyllmError(f"--threads {count}: expected 1 to {most}, the processors this process may use")
    numba.set_num_threads(count)
    return count


def threading_layer() -> str:
    """The layer in use: "omp", "tbb" or "workqueue"; one parallel region is run if none has been yet."""
    import numba

    try:
        return numba.threading_layer()
    except ValueError:
        numba.njit(parallel=True)(_touch)(4)
        return numba.threading_layer()


def _touch(n: int) -> int:
    import numba

    total = 0
    for i in numba.prange(n):
        total += i
    return total
