"""The kind and the shape of what each function of the language gives, from what is known of its arguments. See `shape_rules`."""

from collections.abc import Callable
from fractions import Fraction

from .functions import Refused
from .shape_rules import (
    ANY,
    REAL,
    TRUTH,
    WHOLE,
    Known,
    Result,
    Rules,
    axis_of,
    integers,
    joined_kind,
    numbers,
    rounded,
    scalar,
    shape_text,
    truths,
    whole,
    with_axis,
)
from .sizes import ONE, Size, computed, fixed, product, quotient, substituted, unknown


def real(_: Rules, x: Known) -> Known:
    """A function of each number, real."""
    return Known(REAL, numbers(x).sizes)


def kept(_: Rules, x: Known) -> Known:
    """A function that leaves integers integers."""
    return Known(joined_kind(x), x.sizes)


def extreme(name: str, choose: Callable[..., Fraction]) -> Callable[..., Known]:
    """`minimum` or `maximum`."""

    def rule(r: Rules, a: Known, b: Known) -> Known:
        sizes = r.broadcast(a, b)
        value = None
        if sizes == () and a.value is not None and b.value is not None:
            numeric = [substituted(v.value, r.values) for v in (a, b) if v.value is not None]
            value = (
                computed(name, choose, *numeric) if all(v.number is not None for v in numeric) else computed(name, choose, a.value, b.value)
            )
        return Known(joined_kind(a, b), sizes, value)

    return rule


def chosen(r: Rules, c: Known, a: Known, b: Known) -> Known:
    """`where(c, a, b)`."""
    return Known(joined_kind(a, b, keep=True), r.broadcast(truths(c), a, b))


def reduction(kind: str = ANY) -> Callable[..., Known]:
    """A reduction to this kind; of any kind, where it is not said."""

    def rule(r: Rules, x: Known, axis: Known | None = None) -> Known:
        result = joined_kind(truths(x) if kind == TRUTH else x) if kind in (ANY, TRUTH) else kind
        result = TRUTH if kind == TRUTH else result
        return scalar(result) if axis is None else with_axis(x, axis_of(r, x, axis, 0), ONE, result)

    return rule


def along(kind: str = ANY) -> Callable[..., Known]:
    """A function along an axis that keeps the shape."""

    def rule(r: Rules, x: Known, axis: Known | None = None) -> Known:
        axis_of(r, x, axis, -1)
        return Known(kind or joined_kind(x), x.sizes)

    return rule


def argmax(r: Rules, x: Known, axis: Known | None = None) -> Known:
    """An index; the axis is dropped."""
    return with_axis(x, axis_of(r, x, axis, -1), None, WHOLE)


def top_k(r: Rules, x: Known, k: Known) -> Known:
    """Indices of the k largest."""
    axis, size = axis_of(r, x, None, -1), whole(r, k)
    if x.sizes is not None and axis is not None:
        n, found = r.number(x.sizes[axis]), r.number(size)
        if n is not None and found is not None and found > n:
            raise Refused(f"the {found} largest of {n}")
    return with_axis(x, axis, size, WHOLE)


def concat(r: Rules, *values: Known, axis: Known | None = None) -> Known:
    """Arrays behind one another."""
    kind = joined_kind(*values, keep=True)
    known = [v for v in values if v.sizes is not None]
    at = axis_of(r, known[0], axis, 0) if known else None
    if at is None:
        return Known(kind)
    shapes = [v.sizes for v in known if v.sizes is not None]
    without = [(*s[:at], *s[at + 1 :]) for s in shapes]
    if len({len(s) for s in shapes}) > 1 or not all(r.agree(without[0], w) for w in without):
        raise Refused(f"the other axes differ: {' and '.join(map(str, values))}")
    size = sum((s[at] for s in shapes), Size()) if len(known) == len(values) else unknown()
    return Known(kind, (*shapes[0][:at], size, *shapes[0][at + 1 :]))


def stack(r: Rules, *values: Known, axis: Known | None = None) -> Known:
    """Arrays on a new axis."""
    kind = joined_kind(*values, keep=True)
    shapes = [v.sizes for v in values if v.sizes is not None]
    if not shapes:
        return Known(kind)
    if not all(r.agree(shapes[0], s) for s in shapes):
        raise Refused(f"the shapes differ: {' and '.join(map(str, values))}")
    first = next(v for v in values if v.sizes is not None)
    at = axis_of(r, first, axis, 0, more=1)
    if at is None:
        return Known(kind, tuple(unknown() for _ in (*shapes[0], 0)))
    entries = tuple(v.value for v in values) if not shapes[0] else ()
    return Known(kind, (*shapes[0][:at], fixed(len(values)), *shapes[0][at:]), entries=entries)


def split(r: Rules, x: Known, parts: Known, axis: Known | None = None) -> Result:
    """Equal parts, or parts of these sizes. Of a number of parts that is not known nothing is known."""
    at = axis_of(r, x, axis, -1)
    if parts.sizes == ():
        n = r.number(whole(r, parts, 1))
        if n is None or n > 1000 or at is None or x.sizes is None:
            return tuple(Known(x.kind, None) for _ in range(n)) if n and 1 < n <= 1000 else Known(x.kind)
        length = r.number(x.sizes[at])
        if length is not None and length % n:
            raise Refused(f"{n} equal parts of {length}")
        sizes = [quotient(x.sizes[at], fixed(n)) or unknown()] * n
    elif parts.entries:
        sizes = [unknown() if e is None else e for e in parts.entries]
        total = sum(sizes, Size())
        if at is not None and x.sizes is not None and r.same(total, x.sizes[at]) is False:
            raise Refused(f"parts of {' + '.join(map(str, sizes))} of an axis of length {x.sizes[at]}")
    else:
        return Known(x.kind)
    results = tuple(with_axis(x, at, size, x.kind) for size in sizes)
    return results[0] if len(results) == 1 else results


def repeat(r: Rules, x: Known, n: Known, axis: Known | None = None) -> Known:
    """Each entry n times."""
    at, times = axis_of(r, x, axis, 0), whole(r, n)
    return with_axis(x, at, x.sizes[at] * times if x.sizes is not None and at is not None else unknown(), x.kind)


def pad(r: Rules, x: Known, before: Known, after: Known, axis: Known | None = None, value: Known | None = None) -> Known:
    """Numbers before and behind."""
    at, more = axis_of(r, x, axis, -1), whole(r, before) + whole(r, after)
    kind = x.kind if value is None else joined_kind(x, value)
    return with_axis(x, at, x.sizes[at] + more if x.sizes is not None and at is not None else unknown(), kind)


def reshape(r: Rules, x: Known, *sizes: Known) -> Known:
    """The same numbers in another shape."""
    wanted, found = tuple(whole(r, s) for s in sizes), numbers(x).sizes
    if found is not None and r.same(product(found), product(wanted)) is False:
        raise Refused(f"{x} has {product(found)} numbers, {' × '.join(map(str, wanted))} are {product(wanted)}")
    return Known(x.kind, wanted)


def permute(r: Rules, x: Known, *axes: Known) -> Known:
    """Axes in their new order."""
    order = [r.number(whole(r, a, None)) for a in axes]
    sizes = numbers(x).sizes
    if sizes is None or None in order:
        return Known(x.kind, tuple(unknown() for _ in axes))
    n = len(sizes)
    found = [a % n for a in order if a is not None and n and -n <= a < n]
    if sorted(found) != list(range(n)) or len(order) != n:
        raise Refused(f"expected each axis of {x} once, found {', '.join(map(str, order))}")
    return Known(x.kind, tuple(sizes[a] for a in found))


def transpose(_: Rules, x: Known) -> Known:
    """The last two axes exchanged."""
    sizes = numbers(x).sizes
    if sizes is None:
        return x
    if len(sizes) < 2:
        raise Refused(f"expected two axes or more to transpose, found {x}")
    return Known(x.kind, (*sizes[:-2], sizes[-1], sizes[-2]))


def gather(r: Rules, x: Known, index: Known, axis: Known | None = None) -> Known:
    """Entries, position for position."""
    fits(r, x, index, axis_of(r, x, axis, -1))
    return Known(x.kind, index.sizes)


def fits(r: Rules, x: Known, index: Known, at: int | None) -> None:
    """Raise Refused where an index does not go position for position with x."""
    taken, sizes = integers(index).sizes, numbers(x).sizes
    if taken is None or sizes is None or at is None:
        return
    pairs = list(zip(sizes, taken, strict=False))
    if len(sizes) != len(taken) or any(r.same(a, b) is False and b != ONE for i, (a, b) in enumerate(pairs) if i != at):
        raise Refused(f"{x} and indices {index} do not go position for position")


def put(r: Rules, x: Known, index: Known, values: Known) -> Known:
    """x with values put, position for position."""
    fits(r, x, index, axis_of(r, x, None, -1))
    if index.sizes is not None and not r.fits_into(values, index.sizes):
        raise Refused(f"{values} at indices {index} in {x}")
    return Known(joined_kind(x, values, keep=True), x.sizes)


def scatter(r: Rules, x: Known, index: Known, values: Known) -> Known:
    """x with values put, or added, where the index names rows."""
    axis_of(r, x, None, 0)
    taken = integers(index).sizes
    if x.sizes is not None and taken is not None:
        rows = (*taken, *x.sizes[1:])
        if not r.fits_into(values, rows):
            raise Refused(f"expected {shape_text('R', rows)} for the rows of {x}, found {values}")
    return Known(joined_kind(x, values, keep=True), x.sizes)


def nonzero(_: Rules, c: Known) -> Known:
    """Indices, nobody knows how many."""
    sizes = truths(c).sizes
    if sizes is not None and len(sizes) != 1:
        raise Refused(f"expected a vector of truth values, found {c}")
    return Known(WHOLE, (unknown(),))


def integer_range(r: Rules, first: Known, end: Known | None = None) -> Known:
    """0, …, n-1, or a, …, b-1."""
    if end is None:
        return Known(WHOLE, (whole(r, first),))
    length = whole(r, end, None) - whole(r, first, None)
    return Known(WHOLE, (Size() if (r.number(length) or 0) < 0 else length,))


def made(kind: str) -> Callable[..., Known]:
    """An array of these sizes."""
    return lambda r, *sizes: Known(kind, tuple(whole(r, s) for s in sizes))


def full(r: Rules, value: Known, *sizes: Known) -> Known:
    """An array of one number."""
    if numbers(value).sizes:
        raise Refused(f"expected a number, found {value}")
    return Known(value.kind, tuple(whole(r, s) for s in sizes))


def one_hot(r: Rules, index: Known, n: Known) -> Known:
    """Rows with one 1."""
    size, sizes = whole(r, n), integers(index).sizes
    return Known(REAL, None if sizes is None else (*sizes, size))


def size(r: Rules, x: Known, axis: Known) -> Known:
    """Length of an axis."""
    at = axis_of(r, x, axis, 0)
    return scalar(WHOLE, unknown() if x.sizes is None or at is None else x.sizes[at])


def window(r: Rules, queries: Known, keys: Known, width: Known | None = None) -> Known:
    """Which query sees which key."""
    if width is not None and numbers(width).sizes:
        raise Refused(f"expected a width of 0 or more, or ∞, found {width}")
    T, S = whole(r, queries), whole(r, keys)
    found = r.number(T), r.number(S)
    if found[0] is not None and found[1] is not None and found[1] < found[0]:
        raise Refused(f"{found[0]} queries are the last of {found[1]} positions: expected as many keys or more")
    return Known(TRUTH, (T, S))


def masked(r: Rules, x: Known, c: Known) -> Known:
    """x where c, else −∞."""
    return Known(REAL, r.broadcast(x, truths(c)))


RULES: dict[str, Callable[..., Result]] = {
    **dict.fromkeys(("exp", "log", "sin", "cos", "tanh", "sqrt", "erf", "sigmoid", "SiLU", "GELU", "GELU_tanh"), real),
    **dict.fromkeys(("square", "abs", "ReLU"), kept),
    "floor": lambda r, x: rounded(r, "⌊⌋", x),
    "ceil": lambda r, x: rounded(r, "⌈⌉", x),
    "clamp": lambda r, x, low, high: Known(joined_kind(x, low, high), r.broadcast(x, low, high)),
    "minimum": extreme("minimum", min),
    "maximum": extreme("maximum", max),
    "where": chosen,
    **dict.fromkeys(("sum", "max", "min"), reduction()),
    **dict.fromkeys(("mean", "variance", "std"), reduction(REAL)),
    **dict.fromkeys(("any", "all"), reduction(TRUTH)),
    "softmax": along(REAL),
    "cumsum": along(),
    "argsort": along(WHOLE),
    "argmax": argmax,
    "top_k": top_k,
    "concat": concat,
    "stack": stack,
    "split": split,
    "repeat": repeat,
    "pad": pad,
    "reshape": reshape,
    "permute": permute,
    "transpose": transpose,
    "gather": gather,
    "scatter": scatter,
    "scatter_add": scatter,
    "put": put,
    "nonzero": nonzero,
    "range": integer_range,
    "zeros": made(REAL),
    "full": full,
    "one_hot": one_hot,
    "size": size,
    "causal": window,
    "window": window,
    "mask": masked,
}
