"""GELU, in place: x · Φ(x), and the approximation that GPT-2 was trained with.

`gelu`:     x/2 · (1 + erf(x / √2))                                  (Hendrycks, Gimpel 2016, arXiv:1606.08415)
`gelu_new`: x/2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))           (the same, section 2)

x f32 of any shape, C-contiguous. tanh(u) is computed as 1 − 2 / (e^2u + 1), so gelu_new(x) = x / (1 + e^−2u). NaN stays NaN.
"""

import math

import numpy as np
from numba import prange

from .checks import check_array
from .elementary import exp
from .jit import inline, kernel

SQRT_HALF = np.float32(math.sqrt(0.5))
TWICE_SQRT_2_PI = np.float32(2 * math.sqrt(2 / math.pi))
CUBIC = np.float32(0.044715)
ONE, HALF = np.float32(1), np.float32(0.5)
STRIP = 4096  # values a task: enough to outweigh handing it to a thread


def gelu_reference(x: np.ndarray) -> None:
    """X · Φ(x) in NumPy, in place."""
    x[...] = x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


def gelu_new_reference(x: np.ndarray) -> None:
    """The tanh approximation in NumPy, in place."""
    x[...] = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@inline
def _gelu_new(x):
    return x / (ONE + exp(-TWICE_SQRT_2_PI * (x + CUBIC * x * x * x)))


@kernel
def _gelu_new_one(x):
    for i in range(x.shape[0]):
        x[i] = _gelu_new(x[i])


@kernel(parallel=True)
def _gelu_new_many(x):
    for strip in prange((x.shape[0] + STRIP - 1) // STRIP):
        _gelu_new_one(x[strip * STRIP : min((strip + 1) * STRIP, x.shape[0])])  # over its own array, a loop that LLVM makes vectors of


@kernel(parallel=True)
def _gelu(x):
    for strip in prange((x.shape[0] + STRIP - 1) // STRIP):
        for i in range(strip * STRIP, min((strip + 1) * STRIP, x.shape[0])):
            x[i] = HALF * x[i] * (ONE + np.float32(math.erf(x[i] * SQRT_HALF)))


def gelu_new_kernel(x: np.ndarray) -> None:
    """The kernel, unchecked."""
    flat = x.reshape(-1)
    (_gelu_new_one if flat.size <= STRIP else _gelu_new_many)(flat)


def gelu_kernel(x: np.ndarray) -> None:
    """The kernel, unchecked. erf has no vector form here: it is the slow one, and no published GPT-2 uses it."""
    _gelu(x.reshape(-1))


def gelu(x: np.ndarray) -> np.ndarray:
    """X · Φ(x) of an f32 array [N], as a new one. Raises ToyllmError on other arrays."""
    check_array("x", x, (None,))
    out = x.copy()
    gelu_kernel(out)
    return out


def gelu_new(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of `gelu` of an f32 array [N], as a new one. Raises ToyllmError on other arrays."""
    check_array("x", x, (None,))
    out = x.copy()
    gelu_new_kernel(out)
    return out
