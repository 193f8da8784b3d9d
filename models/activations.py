"""Activations of a real run, kept by name: the prompt's, joined where it runs in chunks, or those of one decode step."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.errors import ToyllmError

if TYPE_CHECKING:
    from .model import Model

UNSEEN = {"attn.scores": -np.inf, "attn.weights": 0.0}  # [H, T, S]: what stands at positions after those that a chunk has seen

Kind = tuple[np.dtype, tuple[int, ...]]  # dtype and shape


def record(
    model: "Model", ids: Sequence[int], wanted: Callable[[str], bool], step: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, Kind]]:
    """Run ids [T] from position 0: the activations whose names are `wanted`, and dtype and shape of all, in the order they are made in.

    Step 0 is the prompt, `logits` those of every position. Step N ≥ 1 is the pass over the Nth token that greedy decoding adds, whatever
    token that is, and has one row. Raises ToyllmError for ids and steps beyond the model's context, and where memory does not suffice.
    """
    T = len(ids)
    if T + step > model.config.context:
        raise ToyllmError(f"a prompt of {T} tokens and {step} decode steps: this model has {model.config.context} positions")
    recording = Recording(wanted, *((1, T + step) if step else (T, T)))
    cache = model.new_cache(T + step)
    first = (ids, np.arange(T), np.zeros(T, np.int64), cache)
    if not step:
        model.forward(*first, taps=recording.tap, all_logits=wanted("logits"))
    else:
        logits = model.forward(*first)
        for n in range(1, step + 1):
            token = int(logits[0].argmax())
            model.forward([token], [T + n - 1], [0], cache, taps=recording.tap if n == step else None, out=logits)
    return recording.arrays, recording.kinds


class Recording:
    """What the taps of one run bring, each array allocated once for all chunks."""

    def __init__(self, wanted: Callable[[str], bool], rows: int, positions: int) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.kinds: dict[str, Kind] = {}
        self._wanted, self._rows, self._positions = wanted, rows, positions
        self._filled: dict[str, int] = {}

    def tap(self, name: str, array: np.ndarray) -> None:
        """Put one chunk of an activation in its place."""
        part = ".".join(name.split(".")[-2:])
        axis = 1 if part in UNSEEN else 0
        if name not in self.kinds:
            shape = [*array.shape]
            shape[axis] = self._rows
            if axis:
                shape[2] = self._positions
            self.kinds[name] = array.dtype, tuple(shape)
            if self._wanted(name):
                self.arrays[name] = allocate(name, shape, UNSEEN.get(part, 0), array.dtype)
        if name in self.arrays:
            first = self._filled.get(name, 0)
            self._filled[name] = last = first + array.shape[axis]
            place = (slice(None), slice(first, last), slice(array.shape[2])) if axis else slice(first, last)
            self.arrays[name][place] = array


def allocate(name: str, shape: Sequence[int], fill: float, dtype: np.dtype) -> np.ndarray:
    """A new array. Raises ToyllmError where it does not fit in memory."""
    try:
        return np.full(shape, fill, dtype)
    except MemoryError as error:
        raise ToyllmError(f"{name}: {list(shape)} does not fit in memory; take a shorter prompt, or fewer names at a time") from error
