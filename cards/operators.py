"""What the operators of cards compute, in NumPy, and within which limits. LANGUAGE.md says what each means.

A value is an array (or NumPy number) of one of three kinds: reals in the dtype of the run, integers in int64, truth values; or it is a
text, or a tuple of texts, from a hyper. What does not fit is `Refused`; the interpreter adds the place.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .functions import Refused

Value = Any  # an array or NumPy number, a text, or a tuple of texts


START = 50_000  # what it costs to begin an operation, in multiplications of a matrix product


@dataclass(frozen=True)
class Limits:
    """What one run of a card may take: a card of unknown origin neither hangs nor fills the memory.

    `steps` that are carried out, `calls` of cards within each other, `elements` of one array, `held` bytes in variables and recorded
    activations, and `work`: multiplications of matrix products, a hundred for each other number, and `START` for each operation.
    """

    steps: int = 1_000_000
    calls: int = 32
    elements: int = 1 << 28
    held: int = 1 << 33
    work: int = 1 << 41


@dataclass
class Numbers:
    """How a run computes: the dtype of its reals, its limits, and what it has done so far."""

    dtype: np.dtype[Any]
    limits: Limits
    work: int = 0

    def room(self, shape: tuple[int, ...], work: int | None = None) -> None:
        """Raise Refused before an array of this shape is made, where that goes beyond the limits."""
        elements = math.prod(shape)
        if elements > self.limits.elements:
            raise Refused(f"an array of {' × '.join(map(str, shape))} numbers; at most {self.limits.elements} are computed at once")
        self.work += START + (100 * elements if work is None else work)
        if self.work > self.limits.work:
            raise Refused(f"the card computes too much: more than {self.limits.work:.1e} operations")

    def normal(self, value: Value) -> Value:
        """An array as one of the three kinds."""
        kind = value.dtype.kind
        if kind == "b":
            return value
        wanted = np.dtype(np.int64) if kind in "iu" else self.dtype
        return value if value.dtype == wanted else value.astype(wanted)

    def real(self, value: Value) -> Value:
        """Numbers as reals."""
        numbers(value)
        return value if value.dtype == self.dtype else value.astype(self.dtype)

    def pair(self, a: Value, b: Value) -> tuple[Value, Value]:
        """Two operands of one kind, reals or integers, whose shapes go together."""
        self.room(broadcast(a, b))
        if a.dtype.kind == "f" or b.dtype.kind == "f":
            return self.real(a), self.real(b)
        return integers(a), integers(b)


# ---- kinds and shapes -------------------------------------------------------------------------------------------------------


def described(value: Value) -> str:
    """A value's type, as a card would write it."""
    if not hasattr(value, "dtype"):
        return f"the text {value!r}" if isinstance(value, str) else "texts" if isinstance(value, tuple) else "parameters of a card"
    return typed({"b": "{0,1}", "i": "ℤ"}.get(value.dtype.kind, "R"), value.shape)


def typed(domain: str, shape: tuple[int, ...]) -> str:
    """A type of a domain and sizes."""
    sizes = "×".join(map(str, shape))
    return domain if not shape else f"{domain}^{{{sizes}}}" if len(shape) > 1 else f"{domain}^{sizes}"


def numbers(value: Value) -> Value:
    """An array or number. Raises Refused for anything else."""
    if not hasattr(value, "dtype"):
        raise Refused(f"expected numbers, found {described(value)}")
    return value


def integers(value: Value) -> Value:
    """Integers, truth values as 0 and 1. Raises Refused for reals."""
    if numbers(value).dtype.kind not in "ib":
        raise Refused(f"expected integers, found {described(value)}")
    return value if value.dtype == np.int64 else value.astype(np.int64)


def truths(value: Value) -> Value:
    """Truth values. Raises Refused for others."""
    if numbers(value).dtype.kind != "b":
        raise Refused(f"expected truth values, found {described(value)}")
    return value


def whole(value: Value, least: int | None = None) -> int:
    """One integer, which may be the result of a division. Raises Refused for anything else, and for one below `least`."""
    if not hasattr(value, "dtype") or value.ndim or (value.dtype.kind == "f" and value % 1 != 0):
        raise Refused(f"expected an integer, found {value if hasattr(value, 'dtype') and not value.ndim else described(value)}")
    if least is not None and value < least:
        raise Refused(f"expected an integer of {least} or more, found {int(value)}")
    return int(value)


def whole_sizes(values: tuple[Value, ...]) -> tuple[int, ...]:
    """Sizes of axes."""
    return tuple(whole(v, 0) for v in values)


def broadcast(*values: Value) -> tuple[int, ...]:
    """The shape that arrays have together. Raises Refused."""
    try:
        return np.broadcast_shapes(*(numbers(v).shape for v in values))
    except ValueError:
        raise Refused(f"shapes do not go together: {' and '.join(map(described, values))}") from None


def fits_into(value: Value, shape: tuple[int, ...]) -> bool:
    """Whether a value, broadcast, has this shape."""
    found = numbers(value).shape
    return len(found) <= len(shape) and all(n in (1, m) for n, m in zip(found[::-1], shape[::-1], strict=False))


def axis_of(x: Value, axis: Value | None, default: int, more: int = 0) -> int:
    """An axis of x counted from 0. Raises Refused where it has none such; `more` axes are about to be added."""
    n = numbers(x).ndim + more
    given = default if axis is None else whole(axis)
    if not -n <= given < n:
        raise Refused(f"no axis {given} in {described(x)}")
    return given % n


def checked_indices(index: Value, n: int) -> Value:
    """Indices within an axis of length n, those below 0 as what they count to. Raises Refused."""
    found = integers(index)
    outside = (found < -n) | (found >= n)
    if outside.any():
        raise Refused(f"index {int(np.asarray(found)[outside].flat[0])} of an axis of length {n}")
    return np.where(found < 0, found + n, found)


# ---- operators --------------------------------------------------------------------------------------------------------------


def matmul(m: Numbers, a: Value, b: Value) -> Value:
    """`a · b`: matrix product, or plain product where one side is a number."""
    if not numbers(a).ndim or not numbers(b).ndim:
        return operator.mul(*m.pair(a, b))
    inner = a.shape[-1], b.shape[-2 if b.ndim > 1 else 0]
    if inner[0] != inner[1]:
        sides = (f"R^{inner[0]}" if a.ndim == 1 else f"R^{{…×{inner[0]}}}", f"R^{inner[0]}" if b.ndim == 1 else f"R^{{{inner[0]}×…}}")
        raise Refused(f"expected {' · '.join(sides)}, found {described(a)} · {described(b)}")
    try:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        raise Refused(f"the leading axes do not go together: {described(a)} · {described(b)}") from None
    shape = (*batch, *a.shape[-2:-1], *(b.shape[-1:] if b.ndim > 1 else ()))
    m.room(shape, math.prod(shape) * inner[0])
    real = "f" in (a.dtype.kind, b.dtype.kind)
    return np.matmul(m.real(a), m.real(b)) if real else np.matmul(integers(a), integers(b))


def divide(m: Numbers, a: Value, b: Value) -> Value:
    """`a / b`, always real."""
    a, b = m.pair(a, b)
    return m.real(np.divide(a, b))


def modulo(m: Numbers, a: Value, b: Value) -> Value:
    """`a mod b`: what is left, with the sign of b."""
    a, b = m.pair(a, b)
    if a.dtype.kind == "i" and not np.all(b):
        raise Refused("mod 0")
    return np.mod(a, b)


def floor_quotient(m: Numbers, a: Value, b: Value, up: bool) -> Value | None:
    """⌊a / b⌋, or ⌈a / b⌉, of integers, exactly; None for reals."""
    a, b = m.pair(a, b)
    if a.dtype.kind == "f":
        return None
    if not np.all(b):
        raise Refused("an integer divided by 0")
    return -(-a // b) if up else a // b


def bits(function: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    """An operator on the bits of integers."""

    def compute(m: Numbers, a: Value, b: Value) -> Value:
        m.room(broadcast(a, b))
        a, b = integers(a), integers(b)
        if function is not np.bitwise_and and np.any((b < 0) | (b > 63)):
            raise Refused("bits are moved by 0 to 63")
        return function(a, b)

    return compute


def logic(function: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    """An operator on truth values."""

    def compute(m: Numbers, a: Value, b: Value) -> Value:
        m.room(broadcast(truths(a), truths(b)))
        return function(a, b)

    return compute


def arithmetic(function: Callable[[Value, Value], Value]) -> Callable[..., Value]:
    """An operator, or function of two arguments, on numbers of one kind."""
    return lambda m, a, b: function(*m.pair(a, b))


BINARY: dict[str, Callable[..., Value]] = {
    "·": matmul,
    "⊙": arithmetic(operator.mul),
    "+": arithmetic(operator.add),
    "-": arithmetic(operator.sub),
    "/": divide,
    "mod": modulo,
    "∨": logic(np.logical_or),
    "∧": logic(np.logical_and),
    "&": bits(np.bitwise_and),
    "<<": bits(np.left_shift),
    ">>": bits(np.right_shift),
}


def power(m: Numbers, a: Value, b: Value, literal: bool) -> Value:
    """`a^b`: an integer, where a is one and the exponent is written as a number of 0 or more; else real."""
    m.room(broadcast(a, b))
    if a.dtype.kind in "ib" and b.dtype.kind == "i" and literal and b >= 0:
        result = np.power(integers(a), b)
        if np.any(np.abs(np.power(np.asarray(a, np.float64), b)) > 2.0**63):
            raise Refused("an integer of more than 64 bits")
        return result
    return np.power(m.real(a), m.real(b)) if b.ndim else m.real(a) ** m.real(b)


RELATIONS: dict[str, Callable[[Value, Value], Value]] = {
    "=": operator.eq,
    "≠": operator.ne,
    "<": operator.lt,
    "≤": operator.le,
    ">": operator.gt,
    "≥": operator.ge,
}


def compare(m: Numbers, relation: str, a: Value, b: Value) -> Value:
    """A comparison; texts are equal or not."""
    if isinstance(a, str) or isinstance(b, str):
        if relation not in "=≠" or not (isinstance(a, str) and isinstance(b, str)):
            raise Refused(f"{described(a)} {relation} {described(b)}")
        return np.bool_((a == b) == (relation == "="))
    if relation in "∈∉":
        m.room((max(numbers(a).size, 1), max(numbers(b).size, 1).bit_length()))
        return np.isin(*m.pair(np.asarray(a).reshape(-1), np.asarray(b).reshape(-1, 1)), invert=relation == "∉").reshape(a.shape)
    return RELATIONS[relation](*m.pair(a, b))


def unary(m: Numbers, sign: str, x: Value) -> Value:
    """`-x`, `√x`, `¬x`, `⌊x⌋`, `⌈x⌉`."""
    if sign == "¬":
        return ~truths(x)
    m.room(numbers(x).shape)
    if sign == "-":
        return -(x if x.dtype.kind == "f" else integers(x))
    if sign == "√":
        return np.sqrt(m.real(x))
    return rounded(m, x, np.floor if sign == "⌊" else np.ceil)


def rounded(m: Numbers, x: Value, function: Callable[[Value], Value]) -> Value:
    """⌊x⌋ or ⌈x⌉: integers."""
    if numbers(x).dtype.kind != "f":
        return integers(x)
    if not np.all(np.abs(x) < 2.0**63):
        raise Refused("no integer is the floor or ceiling of NaN, ∞ or a number beyond 2^63")
    return function(m.real(x)).astype(np.int64)
