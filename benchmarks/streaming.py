"""The speed at which this machine reads memory: what decoding is held against.

    python benchmarks/streaming.py [--threads N] [--gigabytes 2] [--repeat 5]

The larger of two reads of the same array, each byte once, each thread its share: a plain sum in C (compiled with `cc -O3 -march=native`
when it is asked for) and `toyllm.kernels.stream`, in Numba. Neither is always the faster. Software prefetch in the C loop gave nothing on
an idle EPYC (32-34 GB/s with and without).
"""

import argparse
import ctypes
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from toyllm.kernels.jit import kernel
from toyllm.kernels.stream import read_stream, stream_array
from toyllm.kernels.threads import set_threads

BYTES = 2 * 10**9
C_SUM = """
#include <stddef.h>
#include <stdint.h>
uint64_t sum(const uint64_t *a, size_t n) {
    uint64_t s[32] = {0};
    size_t i = 0;
    for (; i + 32 <= n; i += 32)
        for (int k = 0; k < 32; k++) s[k] += a[i + k];
    for (; i < n; i++) s[0] += a[i];
    for (int k = 1; k < 32; k++) s[0] += s[k];
    return s[0];
}
"""


@cache
def compiled_sum() -> Callable[[int, int], int] | None:
    """The C function (address, count of u64) -> their sum; None where there is no C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "sum.c", Path(folder) / "sum.so"
        source.write_text(C_SUM)
        try:
            command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)]
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        function = ctypes.CDLL(str(library)).sum
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint64
    return function


def c_read(array: np.ndarray, threads: int) -> int | None:
    """The sum, modulo 2^64, of a contiguous array's bytes read as u64, in C, a share a thread; None where there is no C compiler."""
    function = compiled_sum()
    if function is None:
        return None
    edges = [array.nbytes // 8 * i // threads for i in range(threads + 1)]
    sums = [0] * threads

    def share(i: int) -> None:
        sums[i] = function(array.ctypes.data + 8 * edges[i], edges[i + 1] - edges[i])  # ctypes lets go of the interpreter's lock

    others = [threading.Thread(target=share, args=(i,)) for i in range(1, threads)]
    for thread in others:
        thread.start()
    share(0)
    for thread in others:
        thread.join()
    return sum(sums) % 2**64


def prepare(nbytes: int = BYTES) -> np.ndarray:
    """Memory to read, written to, so that each page is its own; both functions are compiled."""
    array = stream_array(nbytes)
    read_stream(array[:1])
    c_read(array[:1], 1)
    return array


def measure(array: np.ndarray, threads: int) -> dict[str, float]:
    """GB/s of one read in C, 0 without a compiler, and of one in Numba, on the threads that are set."""
    rates = {}
    for name, read in (("C", lambda: c_read(array, threads)), ("Numba", lambda: read_stream(array))):
        began = time.perf_counter()
        done = read()
        rates[name] = array.nbytes / (time.perf_counter() - began) / 1e9 if done is not None else 0.0
    return rates


@kernel
def _repeated(array, times):
    total = np.uint64(0)
    for _ in range(times):
        part = np.uint64(0)
        for i in range(len(array)):
            part += array[i]
        total ^= part  # two rounds cannot be made one
    return total


def repeated_read(array: np.ndarray, times: int) -> float:
    """GB/s of a plain sum of u64 [n] on one core, so many times over: what its caches give it."""
    began = time.perf_counter()
    _repeated(array, times)
    return array.nbytes * times / (time.perf_counter() - began) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, metavar="N", help="default: the physical cores")
    parser.add_argument("--gigabytes", type=float, default=BYTES / 1e9, metavar="X", help="how much to read")
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    options = parser.parse_args()
    threads = set_threads(options.threads)
    array = prepare(int(options.gigabytes * 1e9))
    for _ in range(options.repeat):
        print("  ".join(f"{name} {rate:.1f} GB/s" for name, rate in measure(array, threads).items()))


if __name__ == "__main__":
    main()
