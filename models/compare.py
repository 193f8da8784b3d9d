"""How far two tensors are apart, in one pass over pieces of both: largest and mean difference, relative error, cosine, and where.

`b` is the reference. Error means max|a − b| / max|b|. A NaN equals a NaN, an infinity one of the same sign, and zeros are equal whatever
their signs. Where one of two elements alone is NaN or infinite, or they are infinities of unlike signs, their difference is infinite; means
and cosine are of the elements that are finite in both. Sums are f64.
"""

import math
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from ..kernels.dtypes import widen


@dataclass(frozen=True)
class Difference:
    """Two tensors of one shape held against each other."""

    elements: int
    differing: int  # elements that are not equal
    unlike: int  # of those: elements whose difference is infinite
    max: float  # of |a − b|
    mean: float  # of |a − b|
    largest: float  # of |b|
    cosine: float | None  # of the two as vectors; None where one of them is zero
    place: tuple[int, ...] | None  # of the largest difference, the first where several are; None where nothing differs
    a: float | None  # what stands there
    b: float | None

    @property
    def error(self) -> float:
        """max|a − b| / max|b|."""
        return self.max / self.largest if self.largest else math.inf if self.max else 0.0

    def exceeds(self, rtol: float, atol: float) -> bool:
        """Whether any element is further away than atol + rtol · max|b|."""
        return self.max > atol + rtol * self.largest


@dataclass
class Tally:
    """What has been found so far in two tensors that are read piece by piece."""

    elements: int = 0
    differing: int = 0
    unlike: int = 0
    finite: int = 0
    total: float = 0.0
    max: float = 0.0
    largest: float = 0.0
    aa: float = 0.0
    ab: float = 0.0
    bb: float = 0.0
    place: tuple[int, ...] | None = None
    a: float | None = None
    b: float | None = None

    def add(self, a: np.ndarray, b: np.ndarray, origin: tuple[int, ...] = ()) -> np.ndarray | None:
        """Take in a piece of both, its first element at `origin`; gives |a − b|, f64 in the piece's shape, or None where all is equal."""
        a, b = numbers(a), numbers(b)
        self.elements += b.size
        if np.array_equal(a, b):
            self.take(b.astype(np.float64), None)
            return None
        x, y = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(x - y)
        if not np.isfinite(apart).all():
            apart[(x == y) | (np.isnan(x) & np.isnan(y))] = 0
            apart[np.isnan(apart)] = np.inf
        self.take(y, x)
        count = int(np.count_nonzero(apart))
        if not count:
            return None
        unlike = int(np.isinf(apart).sum())
        self.differing, self.unlike = self.differing + count, self.unlike + unlike
        self.total += float(apart.sum() if not unlike else apart[np.isfinite(apart)].sum())
        worst = int(apart.argmax())
        if apart.flat[worst] > self.max:
            within = np.unravel_index(worst, b.shape)
            self.place = tuple(int(i) + first for i, first in zip_longest(within, origin, fillvalue=0))
            self.max, self.a, self.b = float(apart.flat[worst]), x.flat[worst].item(), y.flat[worst].item()
        return apart

    def take(self, y: np.ndarray, x: np.ndarray | None) -> None:
        """Add to the sums; x is None where it equals y."""
        y = y.ravel()
        x = y if x is None else x.ravel()
        finite = np.isfinite(y) & np.isfinite(x)
        if not finite.all():
            self.largest = max(self.largest, float(np.abs(y[np.isfinite(y)]).max(initial=0)))
            x, y = x[finite], y[finite]
        self.finite += y.size
        self.largest = max(self.largest, float(np.abs(y).max(initial=0)))
        with np.errstate(over="ignore", invalid="ignore"):  # f64 near its largest
            square = dot(y, y)
            self.bb += square
            self.aa, self.ab = (self.aa + square, self.ab + square) if x is y else (self.aa + dot(x, x), self.ab + dot(x, y))

    def result(self) -> Difference:
        """What the pieces come to."""
        norms = math.sqrt(self.aa) * math.sqrt(self.bb)
        cosine = None if not norms else max(-1.0, min(1.0, self.ab / norms)) if self.differing else 1.0
        mean = self.total / self.finite if self.finite else 0.0
        return Difference(self.elements, self.differing, self.unlike, self.max, mean, self.largest, cosine, self.place, self.a, self.b)


def numbers(array: np.ndarray) -> np.ndarray:
    """The array as NumPy calculates with it: bf16 and f16 widened, truth values as 0 and 1."""
    array = widen(array)
    return array.view(np.uint8) if array.dtype == bool else array


def dot(x: np.ndarray, y: np.ndarray) -> float:
    """The sum of products of two vectors, without the threads of a BLAS: for short vectors they cost more than they save."""
    return float(np.einsum("i,i->", x, y))
