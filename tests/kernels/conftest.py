"""What the kernel tests share: ugly arrays, stored weights, the design's measure of error, and what runs without the compiler."""

from collections.abc import Callable, Iterator

import numba
import numpy as np
import pytest

from toyllm.kernels.dtypes import to_bf16, to_f16
from toyllm.kernels.threads import max_threads

JIT = not numba.config.DISABLE_JIT
STORE = {"f32": lambda a: a.copy(), "f16": to_f16, "bf16": to_bf16}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_jit: the register tiles are LLVM code, which NUMBA_DISABLE_JIT cannot run")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not JIT and item.get_closest_marker("needs_jit"):
        pytest.skip("the compiler is off")


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every test and every run."""
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def error() -> Callable[[np.ndarray, np.ndarray], float]:
    """max|a − b| / max|b|; infinite where the NaN or the infinities of a and b do not coincide."""

    def measure(a: np.ndarray, b: np.ndarray) -> float:
        finite = np.isfinite(b)
        if a.shape != b.shape or not np.array_equal(a[~finite], b[~finite].astype(a.dtype), equal_nan=True):
            return np.inf
        if not np.isfinite(a[finite]).all():
            return np.inf
        size = np.abs(b[finite]).max(initial=0.0)
        worst = np.abs(a[finite] - b[finite].astype(np.float64)).max(initial=0.0)
        return float(worst / size if size else worst)

    return measure


@pytest.fixture(scope="session")
def stored() -> Callable[..., np.ndarray]:
    """An f32 array as a weight in a memory map: in a storage format, read-only, and at an odd address if asked for."""

    def store(values: np.ndarray, form: str, unaligned: bool = False) -> np.ndarray:
        weights = STORE[form](np.ascontiguousarray(values, np.float32))
        if unaligned:
            odd = np.empty(weights.nbytes + 1, np.uint8)[1:]
            odd[:] = weights.reshape(-1).view(np.uint8)
            weights = odd.view(weights.dtype).reshape(weights.shape)
        weights.flags.writeable = False
        return weights

    return store


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """numba.set_num_threads, undone after the test; skips where there is one processor."""
    if max_threads() < 2:
        pytest.skip("one processor")
    before = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(before)


@pytest.fixture(autouse=True)
def plain_python_is_quiet() -> Iterator[None]:
    """Without the compiler, infinities that kernels mean to make would be NumPy warnings."""
    with np.errstate(**({} if JIT else {"all": "ignore"})):
        yield
