"""LayerNorm: y = (x − mean(x)) / √(variance(x) + ε) · weight + bias, over the last axis.

x, y f32 [T, D], C-contiguous; weight, bias f32 [D]; the variance is the biased one (Ba, Kiros, Hinton 2016,
arXiv:1607.06450; ε inside the root as in GPT-2). Two passes in f32. A NaN or infinity makes its own row NaN, no other.
Cost: 3 reads and a write of T·D.
"""

import numpy as np
from numba import prange

from .checks import check_array
from .jit import inline, kernel


def layer_norm_reference(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float, out: np.ndarray) -> None:
    """The formula in NumPy; f64 in, f64 arithmetic."""
    centred = x - x.mean(-1, keepdims=True)
    out[...] = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + epsilon) * weight + bias


@inline
def _row(x, weight, bias, epsilon, out):
    width = x.shape[0]
    total = np.float32(0)
    for i in range(width):
        total += x[i]
    mean = np.float32(total / np.float32(width))
    squares = np.float32(0)
    for i in range(width):
        d = x[i] - mean
        squares += d * d
    scale = np.float32(1) / np.sqrt(np.float32(squares / np.float32(width)) + np.float32(epsilon))
    for i in range(width):
        out[i] = (x[i] - mean) * scale * weight[i] + bias[i]


@kernel
def _layer_norm_one(x, weight, bias, epsilon, out):
    _row(x[0], weight, bias, epsilon, out[0])


@kernel(parallel=True)
def _layer_norm_many(x, weight, bias, epsilon, out):
    for t in prange(x.shape[0]):
        _row(x[t], weight, bias, epsilon, out[t])


def layer_norm_kernel(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float, out: np.ndarray) -> None:
    """The kernel, unchecked. One row is not worth waking the threads for."""
    (_layer_norm_one if len(x) == 1 else _layer_norm_many)(x, weight, bias, epsilon, out)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    """LayerNorm of each row of x f32 [T, D] with weight and bias f32 [D]; a new f32 [T, D]. Raises ToyllmError on other arrays."""
    T, D = check_array("x", x, (None, None))
    check_array("weight", weight, (D,))
    check_array("bias", bias, (D,))
    out = np.empty((T, D), np.float32)
    if T:
        layer_norm_kernel(x, weight, bias, epsilon, out)
    return out
