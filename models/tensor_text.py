"""Tensors as text: the layout of Ollama's `ml.Dump`, for every dtype.

Row-major, the outermost axis first; scalars are separated by ", " and have a space where no minus sign stands; sub-arrays are separated by
a comma, a line break for each axis that closes, and an indent. Above `threshold` elements every axis longer than 2 · `edge_items` shows
its first and last `edge_items` only, and "..." between.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.dtypes import widen
from .tensor_values import PIECE, Values, patterns

Scalars = Callable[[np.ndarray], list[Any]]  # the elements of an array, in row-major order, each as text or as JSON has it


@dataclass(frozen=True)
class Layout:
    """How numbers are written, and how many; the defaults are those of the anchor."""

    edge_items: int = 3
    precision: int = 4  # digits after the point
    threshold: int | None = 1000  # elements up to which all are shown; None shows all in any case
    scientific: bool = False

    def edge(self, values: Values) -> int | None:
        """How many items of each end of an axis are shown; None: all."""
        return None if self.threshold is None or values.size <= self.threshold else self.edge_items


def texts(layout: Layout) -> Scalars:
    """Writes values: fixed or scientific notation for floats, `NaN`, `+Inf` and `-Inf`, digits for integers, True and False."""
    form = f"{{:.{layout.precision}{'e' if layout.scientific else 'f'}}}".format

    def one(value: float) -> str:
        return form(value) if math.isfinite(value) else "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"

    def write(array: np.ndarray) -> list[str]:
        array = widen(array)
        return [one(value) if array.dtype.kind == "f" else str(value) for value in array.ravel().tolist()]

    return write


def hexadecimal(array: np.ndarray) -> list[str]:
    """Writes the bits of each element: 0x3f80."""
    return [f"0x{value:0{2 * array.dtype.itemsize}x}" for value in patterns(array).ravel().tolist()]


def spans(n: int, edge: int | None) -> list[range]:
    """The positions of an axis that are shown: all of it, or its two ends."""
    return [range(n)] if edge is None or n <= 2 * edge else [range(edge), range(n - edge, n)]


def format_values(values: Values, scalars: Scalars, edge: int | None) -> Iterator[str]:
    """The text of a tensor in small pieces; only what is shown is read. A scalar stands alone, an empty tensor is `[]`."""
    if 0 in values.shape:
        yield "[]"
    elif not values.shape:
        yield scalars(values.read())[0]
    else:
        yield from format_axis(values, (), scalars, edge)


def format_axis(values: Values, at: tuple[slice, ...], scalars: Scalars, edge: int | None) -> Iterator[str]:
    """The text of the sub-array at these positions of the leading axes."""
    left = len(values.shape) - len(at)  # axes, this one included
    gap = "," + "\n" * (left - 1) + " " * (len(at) + 1) if left > 1 else ", "
    parts = spans(values.shape[len(at)], edge)
    yield "["
    separator = ""
    for part in parts:
        if part is not parts[0]:
            yield separator + "..."
            separator = gap
        if left > 1:
            for i in part:
                yield separator
                yield from format_axis(values, (*at, slice(i, i + 1)), scalars, edge)
                separator = gap
        else:
            for first in range(part.start, part.stop, PIECE):
                found = scalars(values.read((*at, slice(first, min(first + PIECE, part.stop)))))
                yield separator + gap.join(text if text.startswith("-") else " " + text for text in found)
                separator = gap
    yield "]"
