"""LayerNorm and RMSNorm, over the last axis.

`layer_norm`: y = (x − mean(x)) / √(variance(x) + ε) · weight + bias      (Ba, Kiros, Hinton 2016, arXiv:1607.06450)
`rms_norm`:   y = x / √(mean(x²) + ε) · weight                            (Zhang, Sennrich 2019, arXiv:1910.07467)

x, y f32 [T, D], C-contiguous; weight, bias f32 [D]; the variance is the biased one, ε inside the root. In f32 throughout, sums
in one order (simd.sums).
A NaN makes its own row NaN, no other; so does an infinity in LayerNorm, while in RMSNorm it becomes NaN and the rest of its row 0.
Cost: 3 (RMSNorm 2) reads and a write of T·D.
"""

import numpy as np
from numba import prange

from .checks import check_array, check_number
from .jit import inline, kernel
from .simd.sums import squares, total

FEW = 16  # rows that are not worth waking the threads for: half a microsecond each, where that takes twenty
ZERO = np.float32(0)


def layer_norm_reference(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float, out: np.ndarray) -> None:
    """The formula in NumPy; f64 in, f64 arithmetic."""
    centred = x - x.mean(-1, keepdims=True)
    out[...] = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + epsilon) * weight + bias


@inline
def _scale(total, width, epsilon):
    """1 / √(total / width + ε)."""
    return np.float32(1) / np.sqrt(np.float32(total / np.float32(width)) + np.float32(epsilon))


@inline
def _row(x, weight, bias, epsilon, out):
    width = x.shape[0]
    mean = np.float32(total(x) / np.float32(width))
    scale = _scale(squares(x, mean), width, epsilon)
    for i in range(width):
        out[i] = (x[i] - mean) * scale * weight[i] + bias[i]


@kernel
def _layer_norm_few(x, weight, bias, epsilon, out):
    for t in range(x.shape[0]):
        _row(x[t], weight, bias, epsilon, out[t])


@kernel(parallel=True)
def _layer_norm_many(x, weight, bias, epsilon, out):
    for t in prange(x.shape[0]):
        _row(x[t], weight, bias, epsilon, out[t])


def rms_norm_reference(x: np.ndarray, weight: np.ndarray, epsilon: float, out: np.ndarray) -> None:
    """The formula in NumPy; f64 in, f64 arithmetic."""
    out[...] = x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


@inline
def _rms_row(x, weight, epsilon, out):
    scale = _scale(squares(x, ZERO), x.shape[0], epsilon)
    for i in range(x.shape[0]):
        out[i] = x[i] * scale * weight[i]


@kernel
def _rms_norm_few(x, weight, epsilon, out):
    for t in range(x.shape[0]):
        _rms_row(x[t], weight, epsilon, out[t])


@kernel(parallel=True)
def _rms_norm_many(x, weight, epsilon, out):
    for t in prange(x.shape[0]):
        _rms_row(x[t], weight, epsilon, out[t])


def rms_norm_kernel(x: np.ndarray, weight: np.ndarray, epsilon: float, out: np.ndarray) -> None:
    """The kernel, unchecked."""
    (_rms_norm_few if len(x) <= FEW else _rms_norm_many)(x, weight, epsilon, out)


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    """RMSNorm of each row of x f32 [T, D] with weight f32 [D]; a new f32 [T, D]. Raises ToyllmError on other arrays."""
    T, D = check_array("x", x, (None, None))
    check_number("epsilon", epsilon)
    check_array("weight", weight, (D,))
    out = np.empty((T, D), np.float32)
    if T:
        rms_norm_kernel(x, weight, epsilon, out)
    return out


def layer_norm_kernel(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float, out: np.ndarray) -> None:
    """The kernel, unchecked."""
    (_layer_norm_few if len(x) <= FEW else _layer_norm_many)(x, weight, bias, epsilon, out)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    """LayerNorm of each row of x f32 [T, D] with weight and bias f32 [D]; a new f32 [T, D]. Raises ToyllmError on other arrays."""
    T, D = check_array("x", x, (None, None))
    check_number("epsilon", epsilon)
    check_array("weight", weight, (D,))
    check_array("bias", bias, (D,))
    out = np.empty((T, D), np.float32)
    if T:
        layer_norm_kernel(x, weight, bias, epsilon, out)
    return out
