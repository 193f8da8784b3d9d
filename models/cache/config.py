"""What all caches share: their errors, the shape of what `get` returns, and the checks of arguments."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...kernels.dtypes import F32
from ...kernels.errors import ToyllmError


class CacheFull(ToyllmError):  # noqa: N818 - named for what it says
    """Fewer cells are free than a batch needs; nothing of it was stored."""


class NotSupported(ToyllmError):  # noqa: N818 - named for what it says
    """This cache cannot do that, or not with what it holds; nothing has changed."""


@dataclass(frozen=True)
class CacheConfig:
    """What `get` returns, for engines that want it otherwise."""

    padding: int = 1  # the history is a multiple of so many cells; those added are zeros, and invisible
    permuted_v: bool = False  # value [G, Dh, history], not [history, G, Dh]
    mask_dtype: Any = bool  # True where visible; a float dtype: 0 where visible, -infinity elsewhere
    mask_batch_padding: int = 1  # the mask has a multiple of so many rows; those added see nothing

    def __post_init__(self) -> None:
        """Raise ToyllmError for what is no shape or no mask."""
        check_size("padding", self.padding)
        check_size("mask_batch_padding", self.mask_batch_padding)
        try:
            kind = np.dtype(self.mask_dtype).kind
        except TypeError:
            kind = ""
        if kind not in ("b", "f"):
            raise ToyllmError(f"mask_dtype {self.mask_dtype!r}: expected bool or a float dtype")


def check_config(config: object, used: bool) -> None:
    """Raise NotSupported where a cache is in use, ToyllmError for what is no configuration."""
    if used:
        raise NotSupported("set_config: the cache is in use already, expected before its first pass")
    if not isinstance(config, CacheConfig):
        raise ToyllmError(f"set_config: expected a CacheConfig, found {type(config).__name__}")


def is_integer(value: object) -> bool:
    """Whether it is a whole number, of Python's or of NumPy's, and no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_size(name: str, value: object, least: int = 1) -> int:
    """An integer of at least `least`. Raises ToyllmError."""
    if not is_integer(value) or value < least:  # type: ignore[operator]
        raise ToyllmError(f"{name} {value!r}: expected an integer from {least} on")
    return int(value)  # type: ignore[call-overload]


def check_sizes(**sizes: object) -> None:
    """As `check_size`, of several."""
    for name, value in sizes.items():
        check_size(name, value)


MOST = 2**62  # positions and sequences lie below it, so that sums of two do not overflow


def whole_numbers(given: object) -> np.ndarray | None:
    """A list of at least one integer, all from 0 on, as a new int64 [n]; None for anything else."""
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, OverflowError):
        return None
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        return None
    low, high = (array[0],) * 2 if len(array) == 1 else (array.min(), array.max())  # of one token, reductions cost more than all else
    return array.astype(np.int64) if low >= 0 and high < MOST else None


def check_batch(positions: object, sequences: object) -> tuple[np.ndarray, np.ndarray]:
    """Positions and sequences of a batch as new int64 [T] both. Raises ToyllmError."""
    arrays = []
    for name, given in (("positions", positions), ("sequences", sequences)):
        array = whole_numbers(given)
        if array is None:
            raise ToyllmError(f"{name}: expected a list of at least one integer, all from 0 on")
        arrays.append(array)
    if len(arrays[0]) != len(arrays[1]):
        raise ToyllmError(f"positions and sequences: expected as many of both, found {len(arrays[0])} and {len(arrays[1])}")
    return arrays[0], arrays[1]


def check_rows(name: str, given: object, rows: int | None, G: int, Dh: int) -> np.ndarray:
    """Keys or values as f32 [rows, G, Dh]; any number of rows for None. Raises ToyllmError for another shape."""
    if isinstance(given, np.ndarray) and given.shape == (rows, G, Dh) and given.dtype == F32:
        return given
    try:
        array = np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise ToyllmError(f"{name}: expected an array of numbers") from error
    if array.ndim != 3 or array.shape[1:] != (G, Dh) or (rows is not None and len(array) != rows):
        expected = f"[n, {G}, {Dh}]" if rows is None else f"[{rows}, {G}, {Dh}], a row a token of the batch"
        raise ToyllmError(f"{name}: expected {expected}, found {list(array.shape)}")
    return array
