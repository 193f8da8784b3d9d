"""Where a pass hands over each activation as soon as it is made: to those who change it, then to those who read it.

Here is also what the engine does not hold and only they need: attention's scores and weights, and what is inside the experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..kernels.cells import load
from ..kernels.errors import ToyllmError
from .tensor_values import as_slice

Reader = Callable[[str, np.ndarray], None]  # (name, a buffer that the next activation overwrites)


@dataclass(frozen=True)
class Write:
    """One change of one activation: what is done at which places of its axes, whose steps are above 0."""

    kind: str  # "set", "scale" or "add"
    axes: tuple[range, ...]
    counts: tuple[bool, ...]  # which axes count positions of the sequence: tokens, and keys
    value: np.ndarray  # of as many axes, each as long as its range, or 1

    def apply(self, array: np.ndarray, positions: np.ndarray) -> None:
        """Change a pass's activation in place; its rows are the tokens at these positions, its keys those from position 0 on."""
        token = self.counts.index(True)
        places = self.axes[token]
        numbers = (positions - places.start) // places.step
        rows = np.flatnonzero((positions >= places.start) & (numbers < len(places)) & ((positions - places.start) % places.step == 0))
        if not len(rows):
            return
        index: list[Any] = [as_slice(axis) for axis in self.axes]
        source: list[Any] = [slice(None)] * len(index)
        for axis, n in enumerate(self.value.shape):
            if axis == token:
                index[axis], source[axis] = rows, numbers[rows] if n > 1 else slice(None)
            elif self.counts[axis]:
                seen = self.axes[axis][: len(range(self.axes[axis].start, array.shape[axis], self.axes[axis].step))]
                index[axis], source[axis] = as_slice(seen), slice(len(seen)) if n > 1 else slice(None)
        value, at = self.value[tuple(source)], tuple(index)
        with np.errstate(all="ignore"):  # infinities are what scores of invisible keys are
            array[at] = value if self.kind == "set" else array[at] * value if self.kind == "scale" else array[at] + value


@dataclass(frozen=True)
class Tap:
    """What changes a pass over tokens at these positions, int64 [T], and what reads it."""

    positions: np.ndarray
    reader: Reader | None = None
    writes: Mapping[str, Sequence[Write]] = field(default_factory=dict)

    def __call__(self, name: str, array: np.ndarray) -> None:
        """Change an activation in place, and show it. Its rows are those of the pass's last tokens."""
        self.change(name, array)
        self.read(name, array)

    def change(self, name: str, array: np.ndarray, tokens: np.ndarray | None = None) -> None:
        """Change an activation in place; `tokens` says which of the pass its rows are, if not the last."""
        for write in self.writes.get(name, ()):
            T = array.shape[write.counts.index(True)]
            write.apply(array, self.positions[len(self.positions) - T :] if tokens is None else self.positions[tokens])

    def read(self, name: str, array: np.ndarray) -> None:
        """Show an activation."""
        if self.reader:
            self.reader(name, array)

    def changes(self, *names: str) -> bool:
        """Whether any of these is changed."""
        return any(name in self.writes for name in names)

    def wants(self, *names: str) -> bool:
        """Whether any of these is changed or read."""
        return self.reader is not None or self.changes(*names)


# ---- attention --------------------------------------------------------------------------------------------------------------


def tap_scores(tap: Tap, name: str, q: np.ndarray, cache: Any, scale: float, heads: np.ndarray, sinks: np.ndarray | None = None) -> None:
    """`scores` and `weights` f32 [H, T, S] of one sequence, which the fused step never holds; nothing, where nobody wants them.

    S counts all positions up to the last query's, on sliding layers too. Invisible keys have score -infinity and weight 0, whatever is
    written there; a sink takes its share of the weights. Where a change makes other weights of a query's than its own, its head in
    `heads` f32 [T, H, Dh] is computed anew from them; all other heads stay as the fused step has made them.
    """
    if not tap.wants(f"{name}.scores", f"{name}.weights"):
        return
    T, H, _ = q.shape
    places = np.arange(cache.begin.min(), cache.end.max())
    keys = load(cache.keys[:, cache.cells[places]], q.shape[-1]).repeat(H // cache.keys.shape[0], axis=0)
    visible = np.zeros((T, places[-1] + 1 + cache.origin), bool)
    visible[:, places + cache.origin] = (places >= cache.begin[:, None]) & (places < cache.end[:, None])
    scores = np.full((H, *visible.shape), -np.inf, np.float32)
    scores[:, :, places + cache.origin] = np.einsum("thd,hsd->hts", q, keys) * np.float32(scale)
    scores[:, ~visible] = -np.inf
    weights = own = softmax(scores, sinks)
    if tap.changes(f"{name}.scores"):
        tap.change(f"{name}.scores", scores)
        scores[:, ~visible] = -np.inf
        weights = softmax(scores, sinks)
    if tap.changes(f"{name}.weights"):
        weights = weights.copy()
        tap.change(f"{name}.weights", weights)
        weights[:, ~visible] = 0
    if weights is not own:
        attend(weights, weights != own, cache, heads)
    tap.read(f"{name}.scores", scores)
    tap.read(f"{name}.weights", weights)


def softmax(scores: np.ndarray, sinks: np.ndarray | None) -> np.ndarray:
    """The weights f32 [H, T, S] of scores; NaN where a query without a sink has nothing but -infinity.

    Summed key by key, so that the zeros of a longer S do not matter.
    """
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - top)
        total = np.stack([np.ascontiguousarray(head.T).sum(0, dtype=np.float64) for head in weights])[..., None].astype(np.float32)
        if sinks is not None:
            total += np.exp(sinks[:, None, None] - top)
        return weights / total


def attend(weights: np.ndarray, changed: np.ndarray, cache: Any, heads: np.ndarray) -> None:
    """Heads f32 [T, H, Dh] as the weights [H, T, S] make them, where a query's were changed.

    Query by query over the keys that it sees, so that the other queries of a pass do not matter.
    """
    values = cache.values
    group = len(weights) // len(values)
    for h, t in np.argwhere(changed.any(-1)):
        seen = slice(cache.begin[t], cache.end[t])
        own = weights[h, t, cache.begin[t] + cache.origin : cache.end[t] + cache.origin]
        heads[t, h] = own @ load(values[h // group, cache.cells[seen]], heads.shape[-1])


# ---- experts ----------------------------------------------------------------------------------------------------------------


class Inside:
    """What happens inside the experts that a token chose, in the order in which it chose them."""

    def __init__(self, tap: Tap, name: str, experts: np.ndarray, F: int) -> None:
        self._tap, self._name, self._experts = tap, name, experts
        self.h = np.full((*experts.shape, 2 * F), np.nan, np.float32)
        self.z = np.full((*experts.shape, F), np.nan, np.float32)

    def watch(self, e: int, tokens: np.ndarray, part: str, array: np.ndarray) -> None:
        """Change, and keep, what expert e makes of those of its tokens that chose it: `gate_up` [n, 2F], then `hidden` [n, F]."""
        n, slot = np.nonzero(self._experts[tokens] == e)
        if part == "gate_up":
            self._change("gate", array[:, 0::2], n, slot, tokens)
            self._change("up", array[:, 1::2], n, slot, tokens)
            self.h[tokens[n], slot] = array[n]
        else:
            self._change("hidden", array, n, slot, tokens)
            self.z[tokens[n], slot] = array[n]

    def _change(self, part: str, array: np.ndarray, n: np.ndarray, slot: np.ndarray, tokens: np.ndarray) -> None:
        name = f"{self._name}.experts.{part}"
        if self._tap.changes(name):
            rows = np.zeros((len(n), self._experts.shape[1], array.shape[1]), np.float32)  # as [T, k, F] has them, the others unused
            rows[np.arange(len(n)), slot] = array[n]
            self._tap.change(name, rows, tokens[n])
            array[n] = rows[np.arange(len(n)), slot]

    def read(self) -> None:
        """Show it."""
        self._tap.read(f"{self._name}.experts.gate", self.h[..., 0::2])
        self._tap.read(f"{self._name}.experts.up", self.h[..., 1::2])
        self._tap.read(f"{self._name}.experts.hidden", self.z)


def tap_inside(tap: Tap, name: str, experts: np.ndarray, F: int) -> Inside | None:
    """What is to watch the experts of a block; None where nobody wants it.

    Raises ToyllmError where a change sends a token to one expert twice.
    """
    if tap.changes(f"{name}.router.experts"):
        ordered = np.sort(experts, axis=1)
        twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
        if len(twice):
            t, i = twice[0]
            raise ToyllmError(
                f"{name}.router.experts: the token at position {tap.positions[t]} would go to expert {ordered[t, i]} twice; "
                "expected each of its experts once"
            )
    wanted = tap.wants(*(f"{name}.experts.{part}" for part in ("gate", "up", "hidden")))
    return Inside(tap, name, experts, F) if wanted else None
