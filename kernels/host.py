"""What this processor can do, and which kernels that means."""

import platform
import sys
from functools import cache
from typing import Any

import numba
from llvmlite import binding

from .errors import ToyllmError

BACKENDS = ("avx512", "avx2", "portable", "numpy")
NEEDS = {"avx512": ("avx512f", "avx512bw", "avx512vl"), "avx2": ("avx2", "fma", "f16c"), "portable": (), "numpy": ()}


@cache
def features() -> dict[str, bool]:
    """LLVM's names of instruction sets -> whether kernels may use them: what the processor and system have, or NUMBA_CPU_FEATURES says."""
    config: Any = numba.config
    if config.CPU_FEATURES is None:
        return dict(binding.get_host_cpu_features())
    return {name[1:]: name[0] == "+" for name in config.CPU_FEATURES.split(",") if name}


def supports(backend: str) -> bool:
    """Whether this processor can run the backend's kernels."""
    return all(features().get(f, False) for f in NEEDS[backend])


def best_backend() -> str:
    """The fastest backend that this processor runs."""
    return next(name for name in BACKENDS if supports(name))


def choose_backend(name: str) -> str:
    """`name`, or the best for "auto". Raises ToyllmError for an unknown one or one this processor cannot run."""
    if name == "auto":
        return best_backend()
    if name not in BACKENDS:
        raise ToyllmError(f"--backend {name}: expected auto or one of {', '.join(BACKENDS)}")
    if not supports(name):
        missing = ", ".join(f for f in NEEDS[name] if not features().get(f, False))
        raise ToyllmError(f"--backend {name}: this processor lacks {missing}; --backend auto takes {best_backend()}")
    return name


def compile_for(name: str) -> str:
    """As `choose_backend`, and kernels are compiled for no more than that: `avx2` uses no AVX-512 where the processor has it.

    A process compiles for one of them: raises ToyllmError where the others' kernels are loaded already.
    """
    if name == "avx2" and supports("avx512"):
        if f"{__package__}.matmul" in sys.modules:
            raise ToyllmError(f"--backend {name}: this process has loaded the kernels for avx512; choose it in a new one")
        config: Any = numba.config
        config.CPU_NAME = "haswell"
        config.CPU_FEATURES = ",".join(f"{'+' if has and not wider(f) else '-'}{f}" for f, has in features().items())
        features.cache_clear()
    return choose_backend(name)


def wider(feature: str) -> bool:
    """Whether an instruction set came with AVX-512 or after it."""
    return feature.startswith(("avx512", "avx10", "amx", "avxvnni", "evex", "egpr", "zu", "ndd", "ccmp", "nf", "ppx", "push2pop2", "cf"))


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:  # noqa: PTH123 - /proc is not a path to handle
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
