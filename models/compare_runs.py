"""Two runs over the same tokens held against each other, activation by activation, and the first that departs.

A run is a model's, in steps of its prefill chunk so that only those tokens' activations are held at a time, or one that somebody wrote to a
file, whose arrays are read when their turn comes (see compare_dump).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.errors import ToyllmError
from .activations import Recording
from .compare import Difference, Tally, numbers
from .compare_dump import Dump
from .compare_names import order, token_axis

if TYPE_CHECKING:
    from .model import Model

PIECE = 2**18  # elements held as f64 at a time
MASKED = -1e4  # a score from here down, in a file, is that of an invisible key: others add a large negative number where ours is -infinity

Shape = tuple[int, ...]
Wanted = Callable[[str], bool]


@dataclass(frozen=True)
class Activation:
    """One activation in both runs."""

    name: str
    a: Shape
    b: Shape
    difference: Difference | None  # None where the shapes differ
    by_token: np.ndarray  # f64 [T], the largest |a - b| of each token
    choice: bool = False  # whole numbers, the experts chosen: they are the same, or they are not

    def departs(self, rtol: float, atol: float) -> bool:
        """Whether any element is further away than atol + rtol · max|b|, or the shape is another."""
        if self.difference is None:
            return True
        return bool(self.difference.differing) if self.choice else self.difference.exceeds(rtol, atol)

    def tokens(self, rtol: float, atol: float) -> list[int]:
        """The positions of the tokens in which it departs."""
        limit = 0.0 if self.choice or self.difference is None else atol + rtol * self.difference.largest
        return np.flatnonzero(self.by_token > limit).tolist()


@dataclass(frozen=True)
class Comparison:
    """Two runs compared: the activations of both, in the order in which a model makes them, and the names that only one of them has."""

    activations: tuple[Activation, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    def first(self, rtol: float, atol: float) -> Activation | None:
        """The first that departs; None where the runs agree."""
        return next((found for found in self.activations if found.departs(rtol, atol)), None)


def compare_runs(
    a: "Model | Dump", b: "Model | Dump", ids: Sequence[int], wanted: Wanted, progress: Callable[[int, int], None] | None = None
) -> Comparison:
    """Run, or read, the activations of ids [T] that are `wanted`, calling progress(tokens done, T). Two files take no ids.

    Raises ToyllmError for ids that do not fit, runs without a common activation, and files that cannot be read.
    """
    found: dict[str, Progressing] = {}
    names_a: set[str] = set()
    names_b: set[str] = set()
    length = max((run.prefill_chunk for run in (a, b) if not isinstance(run, Dump)), default=1)
    for step_a, step_b in zip(steps(a, ids, length, wanted), steps(b, ids, length, wanted), strict=True):
        names_a, names_b = names_a | set(step_a.names), names_b | set(step_b.names)
        for name in sorted(names_a & names_b, key=order):
            if isinstance(a, Dump) and not isinstance(b, Dump):
                y, shape_b = step_b.rows(name, None)
                x, shape_a = step_a.rows(name, shape_b)
            else:
                x, shape_a = step_a.rows(name, None)
                y, shape_b = step_b.rows(name, shape_a)
            at = found.setdefault(name, Progressing(shape_a, shape_b, x.dtype.kind in "iu"))
            if shape_a == shape_b:
                at.add(x, y, token_axis(name), step_a.first)
        if progress and ids:
            progress(min(step_a.first + length, len(ids)), len(ids))
    if not found:
        raise ToyllmError(f"the runs have no activation in common: one has {some(names_a)}, the other {some(names_b)}")
    activations = tuple(found[name].result(name) for name in sorted(found, key=order))
    return Comparison(activations, tuple(sorted(names_a - names_b, key=order)), tuple(sorted(names_b - names_a, key=order)))


def some(names: set[str]) -> str:
    """A few names, as the end of a message."""
    first = sorted(names, key=order)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "") or "none that is wanted"


@dataclass
class Progressing:
    """What has been found so far in one activation."""

    a: Shape
    b: Shape
    choice: bool
    tally: Tally = field(default_factory=Tally)
    by_token: list[np.ndarray] = field(default_factory=list)

    def add(self, x: np.ndarray, y: np.ndarray, axis: int, first: int) -> None:
        """Take in the rows of some tokens, which are along `axis`, from token `first` on."""
        others = tuple(i for i in range(y.ndim) if i != axis)
        together = max(1, PIECE * y.shape[axis] // max(y.size, 1))
        for begin in range(0, y.shape[axis], together):
            part = (slice(None),) * axis + (slice(begin, begin + together),)
            apart = self.tally.add(x[part], y[part], (*(0,) * axis, first + begin))
            self.by_token.append(np.zeros(y[part].shape[axis]) if apart is None else apart.max(others))

    def result(self, name: str) -> Activation:
        """The activation, when all tokens have been seen."""
        alike = self.a == self.b
        by_token = np.concatenate([np.zeros(0), *self.by_token])
        return Activation(name, self.a, self.b, self.tally.result() if alike else None, by_token, self.choice)


# ---- steps ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Some tokens of a run, from number `first` on.

    `rows(name, shape)` gives their rows of an activation, and the shape of the whole, which a file's is brought into where it can be.
    """

    first: int
    names: Sequence[str]
    rows: Callable[[str, Shape | None], tuple[np.ndarray, Shape]]


def steps(run: "Model | Dump", ids: Sequence[int], length: int, wanted: Wanted) -> Iterator[Step]:
    """A run over ids [T], step by step of so many tokens; a file, without ids, in one."""
    if isinstance(run, Dump):
        names = [name for name in run.names if wanted(name)]
        starts = range(0, len(ids), length) if ids else repeat(0, 1)
        return (Step(first, names, rows_of(run, first, first + length if ids else None)) for first in starts)
    return model_steps(run, ids, length, wanted)


def model_steps(model: "Model", ids: Sequence[int], length: int, wanted: Wanted) -> Iterator[Step]:
    """A model's run. What it brings of tokens that follow is that of keys that cannot be seen."""
    from ..kernels.threads import set_threads

    T = len(ids)
    if model.config.context < T:
        raise ToyllmError(f"a prompt of {T} tokens: {model.files.name} has {model.config.context} positions")
    cache = model.new_cache(T)
    for first in range(0, T, length):
        last = min(first + length, T)
        recording = Recording(wanted, last - first, T)
        set_threads(model.threads)  # which the other run may have changed
        at = np.arange(first, last)
        model.forward(ids[first:last], at, np.zeros_like(at), cache, taps=recording.tap, all_logits=wanted("logits"))

        def rows(name: str, shape: Shape | None, arrays: dict[str, np.ndarray] = recording.arrays) -> tuple[np.ndarray, Shape]:  # noqa: ARG001
            array, axis = arrays[name], token_axis(name)
            return array, (*array.shape[:axis], T, *array.shape[axis + 1 :])

        yield Step(first, list(recording.arrays), rows)


def rows_of(dump: Dump, first: int, last: int | None) -> Callable[[str, Shape | None], tuple[np.ndarray, Shape]]:
    """The rows of a file's activations that belong to some tokens; all of them where the shape is not the one that it should be."""

    def rows(name: str, shape: Shape | None) -> tuple[np.ndarray, Shape]:
        array = dump.read(name, shape) if shape else dump.whole(name)
        whole = array.shape
        if whole == shape:
            array = array[(slice(None),) * token_axis(name) + (slice(first, last),)]
        if name.endswith("attn.scores"):
            array = numbers(array)
            array = np.where(array <= MASKED, -np.inf, array)
        return array, whole

    return rows
