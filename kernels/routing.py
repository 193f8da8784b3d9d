"""Top-k routing: the experts of each token and their weights.

experts[t] are the k largest of logits[t], by descending logit, ties to the lowest index. With "softmax" the weights are the softmax of
those k logits; with "linear" the softmax over all experts, divided by the sum of the chosen k. Both are the same number.
logits f32 [T, E]; experts int64 [T, k], weights f32 [T, k]. A NaN logit is never chosen before a number.
"""

import numpy as np

from .checks import check_array, check_number
from .elementary import exp
from .errors import ToyllmError
from .jit import inline, kernel

NORMALIZATIONS = ("softmax", "linear")


def route_reference(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The definition in NumPy; f64 in, f64 arithmetic."""
    experts = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    chosen = np.take_along_axis(logits, experts, -1)
    weights = np.exp(chosen - chosen.max(-1, keepdims=True))
    return experts, weights / weights.sum(-1, keepdims=True)


@inline
def _above(a, b):
    """Whether logit a comes before b, which has the lower index."""
    return a > b or (np.isnan(b) and not np.isnan(a))


@kernel
def _route(logits, k, linear, experts, weights):
    T, E = logits.shape
    for t in range(T):
        for e in range(E):
            at = min(e, k)
            while at > 0 and _above(logits[t, e], logits[t, experts[t, at - 1]]):
                if at < k:
                    experts[t, at] = experts[t, at - 1]
                at -= 1
            if at < k:
                experts[t, at] = e
        top, total, everything = logits[t, experts[t, 0]], np.float32(0), np.float32(0)
        if linear:
            for e in range(E):
                everything += exp(np.float32(logits[t, e] - top))
        for i in range(k):
            weight = exp(np.float32(logits[t, experts[t, i]] - top))
            weights[t, i] = weight / everything if linear else weight
            total += weights[t, i]
        for i in range(k):
            weights[t, i] /= total


def route_kernel(logits: np.ndarray, experts: np.ndarray, weights: np.ndarray) -> None:
    """The kernel with softmax weights, unchecked; k is the width of experts int64 [T, k] and weights f32 [T, k], which it writes."""
    _route(logits, experts.shape[1], False, experts, weights)


def route(logits: np.ndarray, k: int, normalization: str = "softmax") -> tuple[np.ndarray, np.ndarray]:
    """The k experts of each token and their weights, from router logits f32 [T, E]: int64 [T, k] and f32 [T, k].

    Raises ToyllmError for other arrays, for k outside 1 to E, and for another normalization than "softmax" or "linear".
    """
    T, E = check_array("logits", logits, (None, None))
    check_number("k", k, whole=True)
    if not 1 <= k <= E:
        raise ToyllmError(f"k: expected 1 to {E}, the number of experts, found {k}")
    if normalization not in NORMALIZATIONS:
        raise ToyllmError(f"normalization: expected {' or '.join(NORMALIZATIONS)}, found {normalization!r}")
    experts, weights = np.zeros((T, k), np.int64), np.empty((T, k), np.float32)
    if T:
        _route(logits, k, normalization == "linear", experts, weights)
    return experts, weights
