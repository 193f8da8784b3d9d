"""Checks of arrays before a kernel reads them: compiled code trusts every shape."""

import numpy as np

from .dtypes import F32, NAMES
from .errors import ToyllmError


def check_array(
    name: str, array: object, shape: tuple[int | None, ...], dtypes: tuple[np.dtype, ...] = (F32,), contiguous: bool = True
) -> tuple[int, ...]:
    """The array's shape, if it is a NumPy array of one of `dtypes`, of `shape` (None: any length), and if `contiguous` also aligned.

    Raises ToyllmError for what is not.
    """
    if not isinstance(array, np.ndarray):
        raise ToyllmError(f"{name}: expected a NumPy array, found {type(array).__name__}")
    if array.dtype not in dtypes:
        raise ToyllmError(
            f"{name}: expected {' or '.join(NAMES.get(d, str(d)) for d in dtypes)}, found {NAMES.get(array.dtype, array.dtype)}"
        )
    if array.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ToyllmError(f"{name}: expected shape [{wanted}], found {list(array.shape)}")
    if contiguous and not array.flags.c_contiguous:
        raise ToyllmError(f"{name}: expected a C-contiguous array; pass np.ascontiguousarray({name})")
    if contiguous and not array.flags.aligned:
        raise ToyllmError(f"{name}: expected an aligned array; pass {name}.copy()")
    return array.shape


def check_number(name: str, value: object, whole: bool = False) -> None:
    """Raise ToyllmError for what is no number, or no integer where it is to be `whole`, or too large for a kernel's."""
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool | np.bool_) or not isinstance(value, kinds):
        raise ToyllmError(f"{name}: expected {'an integer' if whole else 'a number'}, found {value!r}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ToyllmError(f"{name}: expected a number below 2^63, found one of {value.bit_length()} bits")
