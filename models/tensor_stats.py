"""What a tensor's values come to: extremes, mean and deviation, zeros, NaN and infinities, a histogram, a map of magnitudes.

All of it in passes over pieces, with sums in f64, so that a tensor of any size takes no memory.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..kernels.dtypes import widen
from .tensor_values import PIECE, Values


@dataclass(frozen=True)
class Statistics:
    """Of all elements, but the first four of the finite ones only; they are None where there are none."""

    min: float | int | None
    max: float | int | None
    mean: float | None
    std: float | None  # of the population
    zeros: float | None  # share of all elements, 0 to 1; None of an empty tensor
    nan: int
    inf: int
    elements: int


def statistics(values: Values) -> Statistics:
    """One pass over the values. Pieces are merged by their means and squares about them (Chan et al. 1979), so no digits cancel."""
    low: float | int | None = None
    high: float | int | None = None
    count = elements = zeros = nan = inf = 0
    mean = squares = 0.0
    for array, finite in finite_pieces(values):
        elements += array.size
        zeros += array.size - int(np.count_nonzero(array))
        if len(finite) < array.size:
            nans = int(np.isnan(array).sum())
            nan, inf = nan + nans, inf + array.size - len(finite) - nans
        if not len(finite):
            continue
        smallest, largest = finite.min().item(), finite.max().item()
        low = smallest if low is None else min(low, smallest)
        high = largest if high is None else max(high, largest)
        with np.errstate(over="ignore", invalid="ignore"):  # f64 near its largest: an infinite mean is then what f64 gives
            exact = finite.astype(np.float64)
            middle = float(exact.mean())
            exact -= middle
            shift, joined = middle - mean, count + len(finite)
            squares += float(np.square(exact, out=exact).sum()) + shift * shift * count * len(finite) / joined
            mean, count = mean + shift * len(finite) / joined, joined
    std = math.sqrt(squares / count) if count and squares >= 0 else math.nan
    share = zeros / elements if elements else None
    return Statistics(low, high, mean if count else None, std if count else None, share, nan, inf, elements)


def finite_pieces(values: Values) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of the values, and the finite ones in each, flat; truth values count as 0 and 1."""
    for piece in values.pieces():
        array = widen(piece).ravel()
        array = array.view(np.uint8) if array.dtype == bool else array
        finite = np.isfinite(array) if array.dtype.kind == "f" else None
        yield array, array if finite is None or finite.all() else array[finite]


def histogram(values: Values, found: Statistics, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts int64 [bins] of the finite values and edges f64 [bins + 1] from the smallest to the largest; one bin for a single value."""
    if found.min is None or found.max is None:
        return np.zeros(0, np.int64), np.zeros(0)
    low, high = float(found.min), float(found.max)
    if not np.isfinite(high - low) or not np.all(np.diff(np.linspace(low, high, bins + 1)) > 0):
        bins = 1  # too far apart, or too near, for numbers between
    counts, edges = np.zeros(bins, np.int64), np.array([low, high])
    if bins == 1:
        return np.array([found.elements - found.nan - found.inf]), edges
    for _, finite in finite_pieces(values):
        part, edges = np.histogram(finite, bins, (low, high))
        counts += part
    return counts, edges


def magnitudes(values: Values, rows: int, columns: int) -> np.ndarray:
    """Of a matrix: f64 [at most rows, at most columns], the mean |x| of the finite values in each cell; NaN in a cell without any."""
    R, C = values.shape
    tops = np.unique(np.linspace(0, R, min(rows, R) + 1).astype(int))
    lefts = np.unique(np.linspace(0, C, min(columns, C) + 1).astype(int))[:-1]
    cells = np.full((len(tops) - 1, len(lefts)), np.nan)
    height = max(1, PIECE // C)
    for i, (top, bottom) in enumerate(zip(tops[:-1].tolist(), tops[1:].tolist(), strict=True)):
        total, count = np.zeros(len(lefts)), np.zeros(len(lefts))
        for first in range(top, bottom, height):
            array = widen(values.read((slice(first, min(first + height, bottom)),))).astype(np.float64)
            finite = np.isfinite(array)
            with np.errstate(over="ignore"):
                total += np.add.reduceat(np.where(finite, np.abs(array), 0).sum(0), lefts)
            count += np.add.reduceat(finite.sum(0), lefts)
        np.divide(total, count, out=cells[i], where=count > 0)
    return cells
