"""Streaming: memory read at full speed by all threads, with nothing else to do: what bounds products with weights no cache holds.

sums[i] = Σ_r a[i, r]; a f32 [n, ROWS, COLUMNS], C-contiguous; sums f32 [n, COLUMNS], each a chain over r. A NaN stays in its column.
Cost: a read of a. For the speed of memory, a has to be several times the size of the processor's last cache: 2 GB are.

It reads as the kernels of one token do, in their widest tile with the same prefetch, so that their share of it is theirs alone. What was
tried, 2 cores of an EPYC (Zen 4, AVX-512), 2.1 GB, medians of 21: this 35.1 GB/s, plain Numba loops 34.7, integer vectors 34.8 without and
35.6 with prefetch, plain C (gcc -O3, no prefetch) 25; beside a busy process plain loops fall to 28.5 where prefetch keeps 31.
"""

import numpy as np
from numba import prange

from .checks import check_array
from .jit import kernel
from .simd.ir import LANES
from .simd.tiles import axpy_tile

COLUMNS = 4 * LANES
ROWS = 4096  # of a task: 1 MiB
AHEAD = 16  # rows: 4 KiB
ONES = np.ones(ROWS, np.float32)

tile = axpy_tile(COLUMNS // LANES, 1)


def read_reference(a: np.ndarray) -> np.ndarray:
    """The sums in NumPy; f64 in, f64 arithmetic."""
    return a.sum(1)


@kernel(parallel=True)
def _fill(a):
    for i in prange(a.shape[0]):
        for r in range(a.shape[1]):
            for c in range(a.shape[2]):
                a[i, r, c] = 1


@kernel(parallel=True)
def _read(a, ones, sums):
    n, rows, columns = a.shape
    width = 4 * columns
    at, x_at, y_at = a.ctypes.data, ones.ctypes.data, sums.ctypes.data
    for i in prange(n):
        tile(a, at + i * rows * width, width, 0, x_at, 0, rows, y_at + i * width, 0, 0, AHEAD)


def stream_array(nbytes: int) -> np.ndarray:
    """About so many bytes of ones to read, f32 [n, ROWS, COLUMNS]; written to, so that each page is memory of its own.

    Raises MemoryError where the system does not give them.
    """
    a = np.empty((max(1, nbytes // (4 * ROWS * COLUMNS)), ROWS, COLUMNS), np.float32)
    _fill(a)
    return a


def read_stream(a: np.ndarray) -> np.ndarray:
    """Read f32 [n, ROWS, COLUMNS] once: its sums over rows, f32 [n, COLUMNS]. Raises ToyllmError on other arrays."""
    n, _, _ = check_array("a", a, (None, ROWS, COLUMNS))
    sums = np.empty((n, COLUMNS), np.float32)
    if n:
        _read(a, ONES, sums)
    return sums
