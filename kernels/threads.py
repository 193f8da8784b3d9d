"""Threads: how many, and which of Numba's threading layers carries them.

A parallel region costs 2 µs with TBB, 3 µs with OpenMP and about 50 µs with the built-in workqueue (2 cores); per token
there are dozens, so the layer matters more than the kernel. TBB comes first because it steals work: beside another
busy process OpenMP's barrier waits for the scheduler, 8 ms a region, while TBB's caller takes the other thread's share.
"""

import ctypes
import importlib
import logging
import os
import site
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ToyllmError

log = logging.getLogger("toyllm")


def choose_threading_layer() -> None:
    """Let Numba, which looks for TBB first, then OpenMP, find the TBB that came as a wheel; say so where neither is there."""
    for prefix in (sys.prefix, site.getuserbase()):
        library = Path(prefix) / "lib" / "libtbb.so.12"
        if library.exists():  # this folder is not on the loader's path: once the library is loaded, Numba finds it
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return
    for layer in ("tbbpool", "omppool"):
        try:
            importlib.import_module(f"numba.np.ufunc.{layer}")
        except ImportError:
            continue
        return
    log.info("neither TBB nor OpenMP is here: a parallel region takes some 25 times longer; pip install tbb, or install libgomp")


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


def max_threads() -> int:
    """The most threads a kernel may run on."""
    import numba

    config: Any = numba.config
    return config.NUMBA_NUM_THREADS


def thread_scratch(size: int) -> np.ndarray:
    """f32 [threads, size]: a private row for each thread that a kernel may run on."""
    return np.empty((max_threads(), size), np.float32)


def set_threads(count: int | None = None) -> int:
    """Use `count` threads in all kernels (default: the physical cores); returns the number. Raises ToyllmError out of range."""
    import numba

    most = max_threads()
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
