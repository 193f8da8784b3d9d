"""Activations that the engine does not hold, computed plainly for those who watch."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernels.dtypes import widen

Tap = Callable[[str, np.ndarray], None]  # (name, a buffer that the next activation overwrites)


def tap_scores(tap: Tap, name: str, q: np.ndarray, cache: Any, scale: float, sinks: np.ndarray | None = None) -> None:
    """`scores` and `weights` f32 [H, T, S] of one sequence, which the fused step never holds.

    S counts all positions up to the last query's, on sliding layers too. Invisible keys have score -infinity and weight 0; a sink takes
    its share of the weights.
    """
    T, H, _ = q.shape
    places = np.arange(cache.begin.min(), cache.end.max())
    keys = widen(cache.keys[:, cache.cells[places]]).repeat(H // cache.keys.shape[0], axis=0)
    visible = (places >= cache.begin[:, None]) & (places < cache.end[:, None])
    scores = np.full((H, T, places[-1] + 1 + cache.origin), -np.inf, np.float32)
    scores[:, :, places + cache.origin] = np.where(visible, np.einsum("thd,hsd->hts", q, keys) * np.float32(scale), -np.inf)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks[:, None, None] - top)
    tap(f"{name}.scores", scores)
    tap(f"{name}.weights", weights / total)
