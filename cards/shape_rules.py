"""What is known of a value before a card runs, and what operators and functions make of it: kinds, shapes, integers.

The counterpart of `operators` and `operations` without numbers: what certainly does not fit is Refused, what cannot be told is let through.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from .functions import Refused
from .sizes import ONE, Size, computed, fixed, is_loose, product, quotient, same, substituted, unknown

REAL, WHOLE, TRUTH, TEXT, CARD, ANY = "R", "ℤ", "{0,1}", "text", "card", ""


@dataclass(frozen=True)
class Known:
    """What is known of a value.

    `kind` is one of the six above. `sizes` are those of its axes (None: not even how many). `value` is that of an integer, or of a quotient
    that may be one; `entries` are those of a vector that was written down. A `hyper` without a value may be a sequence as well.
    """

    kind: str = ANY
    sizes: tuple[Size, ...] | None = None
    value: Size | None = None
    entries: tuple[Size | None, ...] = ()
    hyper: bool = False
    card: str = ""

    def __str__(self) -> str:
        if self.kind == TEXT:
            return "a text"
        if self.kind == CARD:
            return f"parameters of {self.card}" if self.card else "parameters"
        return shape_text(self.kind or "R", self.sizes)


Result = Known | tuple[Known, ...]


def shape_text(domain: str, sizes: tuple[Size, ...] | None) -> str:
    """A type as cards write it."""
    if sizes is None:
        return f"{domain}^{{…}}"
    texts = [f"({s})" if " " in str(s) and len(sizes) > 1 else str(s) for s in sizes]
    braces = len(sizes) > 1 or any(not t.isalnum() for t in texts)
    return domain if not sizes else f"{domain}^{{{'×'.join(texts)}}}" if braces else f"{domain}^{texts[0]}"


@dataclass
class Rules:
    """What the rules go by: the values of letters, where they have any."""

    values: Mapping[str, Size] = field(default_factory=dict)

    def same(self, a: Size, b: Size) -> bool | None:
        """Whether two sizes are equal; None where that cannot be told."""
        return same(a, b, self.values)

    def number(self, size: Size) -> int | None:
        """The value of a size, where it is known."""
        found = substituted(size, self.values).number
        return int(found) if found is not None and found.denominator == 1 else None

    def joint(self, a: Size, b: Size) -> Size | None:
        """The size of two axes together; None where they do not go together."""
        if b == ONE or a == b:
            return a
        if a == ONE:
            return b
        numbers = self.number(a), self.number(b)
        if numbers[0] == 1:
            return b
        if self.same(a, b) is False and numbers[1] != 1:
            return None
        return b if any(map(is_loose, a.letters)) else a

    def broadcast(self, *values: Known) -> tuple[Size, ...] | None:
        """The shape that values have together. Raises Refused."""
        shapes = [numbers(v).sizes for v in values]
        known = [s for s in shapes if s is not None]
        if len(known) < len(shapes):
            return None
        result: list[Size] = []
        for axis in range(1, max(map(len, known), default=0) + 1):
            size: Size | None = ONE
            for sizes in known:
                if len(sizes) >= axis and (size := self.joint(size, sizes[-axis])) is None:
                    raise Refused(f"shapes do not go together: {' and '.join(map(str, values))}")
            result.insert(0, size)
        return tuple(result)

    def fits_into(self, value: Known, sizes: tuple[Size, ...]) -> bool:
        """Whether a value, broadcast, may have this shape."""
        found = numbers(value).sizes
        if found is None:
            return True
        pairs = zip(found[::-1], sizes[::-1], strict=False)
        return len(found) <= len(sizes) and all(self.number(a) == 1 or self.same(a, b) is not False for a, b in pairs)

    def agree(self, a: tuple[Size, ...], b: tuple[Size, ...]) -> bool:
        """Whether two shapes may be the same."""
        return len(a) == len(b) and all(self.same(x, y) is not False for x, y in zip(a, b, strict=True))


# ---- kinds and integers -----------------------------------------------------------------------------------------------------


def numbers(value: Known) -> Known:
    """Numbers. Raises Refused for anything else."""
    if value.kind in (TEXT, CARD):
        raise Refused(f"expected numbers, found {value}")
    return value


def integers(value: Known) -> Known:
    """Integers. Raises Refused for reals."""
    if numbers(value).kind == REAL:
        raise Refused(f"expected integers, found {value}")
    return value


def truths(value: Known) -> Known:
    """Truth values. Raises Refused for others."""
    if numbers(value).kind in (REAL, WHOLE):
        raise Refused(f"expected truth values, found {value}")
    return value


def whole(r: Rules, value: Known, least: int | None = 0) -> Size:
    """One integer. Raises Refused for what is none, or below `least`."""
    if value.sizes or value.kind in (TEXT, CARD) or (value.kind == REAL and value.value is None):
        raise Refused(f"expected an integer, found {value}")
    if value.value is None:
        return unknown()
    number = substituted(value.value, r.values).number
    if number is not None and (number.denominator != 1 or (least is not None and number < least)):
        raise Refused(f"expected an integer{f' of {least} or more' if least is not None else ''}, found {number}")
    return value.value


def joined_kind(*values: Known, keep: bool = False) -> str:
    """The kind of numbers that are computed with each other; `keep`: truth values stay such."""
    kinds = {numbers(v).kind for v in values}
    if REAL in kinds:
        return REAL
    return ANY if ANY in kinds else TRUTH if keep and kinds == {TRUTH} else WHOLE


def scalar(kind: str, value: Size | None = None) -> Known:
    """One number."""
    return Known(kind, (), value)


def axis_of(r: Rules, x: Known, axis: Known | None, default: int, more: int = 0) -> int | None:
    """An axis of x, counted from 0; None where it cannot be told. Raises Refused where x has none such."""
    sizes = numbers(x).sizes
    number = default if axis is None else r.number(whole(r, axis, None))
    if sizes is None:
        return None
    n = len(sizes) + more
    if number is None:
        return None
    if not -n <= number < n:
        raise Refused(f"no axis {number} in {x}")
    return number % n


def with_axis(x: Known, axis: int | None, size: Size | None, kind: str) -> Known:
    """x with another size of an axis (None: without the axis)."""
    if x.sizes is None or axis is None:
        return Known(kind, None if size is None or x.sizes is None else tuple(unknown() for _ in x.sizes))
    return Known(kind, (*x.sizes[:axis], *(() if size is None else (size,)), *x.sizes[axis + 1 :]))


# ---- operators --------------------------------------------------------------------------------------------------------------


def arithmetic(r: Rules, sign: str, a: Known, b: Known) -> Known:
    """`+ - ⊙ / mod`, and `·` where one side is a number."""
    sizes = r.broadcast(a, b)
    kind = REAL if sign == "/" else joined_kind(a, b)
    value = combined(sign, a.value, b.value) if sizes == () and a.value is not None and b.value is not None else None
    return Known(kind, sizes, value)


def combined(sign: str, a: Size, b: Size) -> Size | None:
    """What an operator makes of two integers."""
    match sign:
        case "+":
            return a + b
        case "-":
            return a - b
        case "·" | "⊙":
            return a * b
        case "/":
            return quotient(a, b)
        case _:
            return None if b.number == 0 else computed("mod", lambda x, y: x % y, a, b)


def matmul(r: Rules, a: Known, b: Known) -> Known:
    """Matrix product."""
    if numbers(a).sizes == () or numbers(b).sizes == ():
        return arithmetic(r, "·", a, b)
    kind = joined_kind(a, b)
    if a.sizes is None or b.sizes is None:
        return Known(kind)
    inner = a.sizes[-1], b.sizes[-2 if len(b.sizes) > 1 else 0]
    if r.same(*inner) is False:
        sides = " · ".join((shape_side(inner[0], a, last=True), shape_side(inner[0], b, last=False)))
        turned = len(b.sizes) > 1 and r.same(inner[0], b.sizes[-1])
        raise Refused(f"expected {sides}, found {a} · {b}" + ("; transpose the right side?" if turned else ""))
    batch = r.broadcast(Known(REAL, a.sizes[:-2]), Known(REAL, b.sizes[:-2])) or ()
    return Known(kind, (*batch, *a.sizes[-2:-1], *(b.sizes[-1:] if len(b.sizes) > 1 else ())))


def shape_side(size: Size, side: Known, last: bool) -> str:
    """What one side of a product should be: `R^{…×D}` on the left, `R^{D×…}` on the right, `R^D` for a vector."""
    text = shape_text("R", (size,))
    inner = text.removeprefix("R^").strip("{}")
    return text if len(side.sizes or ()) == 1 else f"R^{{…×{inner}}}" if last else f"R^{{{inner}×…}}"


def logic(r: Rules, a: Known, b: Known) -> Known:
    """`∧ ∨`."""
    return Known(TRUTH, r.broadcast(truths(a), truths(b)))


def bits(r: Rules, a: Known, b: Known) -> Known:
    """`& << >>`."""
    return Known(WHOLE, r.broadcast(integers(a), integers(b)))


def binary(r: Rules, sign: str, a: Known, b: Known) -> Known:
    """An operator between two operands."""
    if sign in "∨∧":
        return logic(r, a, b)
    if sign in ("&", "<<", ">>"):
        return bits(r, a, b)
    return matmul(r, a, b) if sign == "·" else arithmetic(r, sign, a, b)


def unary(r: Rules, sign: str, x: Known) -> Known:
    """`-x`, `√x`, `¬x`, `⌊x⌋`, `⌈x⌉`."""
    if sign == "¬":
        return Known(TRUTH, truths(x).sizes)
    if sign == "-":
        return Known(joined_kind(x), x.sizes, None if x.value is None else -x.value)
    if sign == "√":
        return Known(REAL, numbers(x).sizes)
    return rounded(r, "⌊⌋" if sign == "⌊" else "⌈⌉", x)


def rounded(r: Rules, signs: str, x: Known) -> Known:
    """⌊x⌋ or ⌈x⌉."""
    value = numbers(x).value
    if value is None:
        return Known(WHOLE, x.sizes)
    number = substituted(value, r.values).number
    if number is not None:
        value = fixed(number.__floor__() if signs == "⌊⌋" else number.__ceil__())
    elif x.kind == REAL:
        value = computed(signs, int, value)
    return Known(WHOLE, x.sizes, value)


def power(r: Rules, a: Known, b: Known, literal: bool) -> Known:
    """A power: an integer to a written one of 0 or more is an integer."""
    sizes = r.broadcast(a, b)
    n = b.value.number if b.value is not None else None
    if not (literal and n is not None and n.denominator == 1 and n >= 0) or joined_kind(a) != WHOLE:
        return Known(REAL if REAL in (a.kind, b.kind) or not literal or (n is not None and n < 0) else joined_kind(a), sizes)
    return Known(WHOLE, sizes, product([a.value] * int(n)) if a.value is not None and n <= 16 else None)


def compare(r: Rules, relation: str, a: Known, b: Known) -> Known:
    """A comparison."""
    if TEXT in (a.kind, b.kind):
        if relation not in "=≠" or not {a.kind, b.kind} <= {TEXT, ANY}:
            raise Refused(f"{a} {relation} {b}")
        return scalar(TRUTH)
    if relation in "∈∉":
        numbers(b)
        return Known(TRUTH, numbers(a).sizes)
    sizes = r.broadcast(a, b)
    found = [v.value.number for v in (a, b) if sizes == () and v.value is not None and v.value.number is not None]
    return Known(TRUTH, sizes, fixed(RELATIONS[relation](*found)) if len(found) == 2 else None)


RELATIONS: dict[str, Callable[..., bool]] = {
    "=": operator.eq,
    "≠": operator.ne,
    "<": operator.lt,
    "≤": operator.le,
    ">": operator.gt,
    "≥": operator.ge,
}

# ---- indices ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """`a:b:step` within an index, as far as it is known."""

    start: Known | None
    stop: Known | None
    step: Known | None


def range_length(r: Rules, n: Size, item: Range) -> Size:
    """How many entries a range takes of an axis of length n. Raises Refused where it goes beyond it."""
    ends = []
    for end, default in ((item.start, Size()), (item.stop, n)):
        value = default if end is None else whole(r, end, None)
        number = r.number(value)
        ends.append(n + value if number is not None and number < 0 else value)
    first, last, length = (r.number(v) for v in (*ends, n))
    outside = [a is not None and b is not None and a > b for a, b in ((first, last), (last, length))]
    if any(outside) or (first is not None and first < 0):
        raise Refused(f"the range {ends[0]} : {ends[1]} of an axis of length {n}")
    taken = ends[1] - ends[0]
    if item.step is None:
        return taken
    step = r.number(whole(r, item.step, 1))
    if step is None:
        return unknown()
    rest = Size(tuple(term for term in taken.terms if term[0]))
    constant = (taken - rest).number or Fraction(0)
    return (quotient(rest, fixed(step)) or Size()) + fixed((constant / step).__ceil__())


def indexed(r: Rules, x: Known, items: list[Known | Range | str]) -> Known:
    """A part of an array; "…" and "new" stand for themselves. Raises Refused."""
    if x.hyper and (len(items) > 1 or not isinstance(items[0], Known)):
        return Known(x.kind)
    if x.hyper and isinstance(items[0], Known):
        return Known(x.kind, items[0].sizes)
    taken = sum(item not in ("…", "new") for item in items)
    if items.count("…") > 1:
        raise Refused("`…` stands once in an index")
    sizes = numbers(x).sizes
    if sizes is None:
        return Known(x.kind)
    if taken > len(sizes):
        raise Refused(f"{taken} indices into {x}")
    parts: list[Size | None] = []
    picks: list[Known] = []
    axis, split_up = 0, False
    for item in items:
        if item == "…":
            parts += sizes[axis : axis + len(sizes) - taken]
            axis += len(sizes) - taken
        elif item == "new":
            parts.append(ONE)
        elif isinstance(item, Range):
            parts.append(range_length(r, sizes[axis], item))
            axis += 1
        elif isinstance(item, Known):
            check_index(r, item, sizes[axis])
            split_up = split_up or (bool(picks) and parts[-1:] != [None])
            parts.append(None)
            picks.append(item)
            axis += 1
    parts += sizes[axis:]
    together = r.broadcast(*picks)
    if together is None:
        return Known(x.kind)
    at = 0 if split_up and together else next((i for i, part in enumerate(parts) if part is None), 0)
    before, behind = ([p for p in some if p is not None] for some in (parts[:at], parts[at:]))
    return Known(x.kind, (*before, *together, *behind))


def check_index(r: Rules, index: Known, n: Size) -> None:
    """Raise Refused for an index that is none, or beyond an axis of length n."""
    value = whole(r, index, None) if index.sizes == () else integers(index).value
    number, length = r.number(value) if value is not None else None, r.number(n)
    if number is not None and length is not None and not -length <= number < length:
        raise Refused(f"index {number} of an axis of length {length}")


def updated(r: Rules, x: Known, part: Known, value: Known) -> Known:
    """x with a part of it changed. Raises Refused where the value does not fit."""
    if part.sizes is not None and not r.fits_into(value, part.sizes):
        raise Refused(f"{value} does not fit into {part}")
    return replace(x, kind=joined_kind(x, value, keep=True), value=None, entries=())
