"""What the functions of cards compute, in NumPy. LANGUAGE.md says what each means; see `operators` for the kinds of values."""

import math
from collections.abc import Callable

import numpy as np
from numpy.lib.array_utils import normalize_axis_index

from .functions import Refused
from .operators import (
    Numbers,
    Value,
    arithmetic,
    axis_of,
    broadcast,
    checked_indices,
    described,
    fits_into,
    integers,
    numbers,
    truths,
    typed,
    unary,
    whole,
    whole_sizes,
)

# ---- elementwise functions --------------------------------------------------------------------------------------------------


def elementwise(function: Callable[[Value], Value], cost: int = 100) -> Callable[..., Value]:
    """A function of each real, and what each costs."""

    def compute(m: Numbers, x: Value) -> Value:
        m.room(numbers(x).shape, cost * x.size)
        return m.real(np.asarray(function(m.real(x))))

    return compute


def each(function: Callable[[float], float]) -> Callable[[Value], Value]:
    """A function that NumPy does not have, of each entry."""
    return lambda x: np.asarray(np.frompyfunc(function, 1, 1)(x), np.float64)


def sigmoid(x: Value) -> Value:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def gelu(x: Value) -> Value:
    """x Φ(x), Φ by erfc: no cancellation where x is far below 0."""
    return x * each(lambda v: math.erfc(-v / math.sqrt(2)) / 2)(x)


def gelu_tanh(x: Value) -> Value:
    """x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def plain(m: Numbers, x: Value, function: Callable[[Value], Value]) -> Value:
    """A function that leaves integers integers."""
    m.room(numbers(x).shape)
    return function(x if x.dtype.kind == "f" else integers(x))


def chosen(m: Numbers, c: Value, a: Value, b: Value) -> Value:
    """`where(c, a, b)`."""
    m.room(broadcast(truths(c), a, b))
    if a.dtype.kind == b.dtype.kind == "b":
        return np.where(c, a, b)
    return np.where(c, *m.pair(a, b))


def clamp(m: Numbers, x: Value, low: Value, high: Value) -> Value:
    """min(max(x, low), high); NaN stays NaN."""
    return np.minimum(*m.pair(np.maximum(*m.pair(x, low)), high))


# ---- reductions and what goes along an axis ---------------------------------------------------------------------------------


def reduction(function: Callable[..., Value], kind: str = "", some: bool = False) -> Callable[..., Value]:
    """A reduction, of reals ("real"), of truth values ("bool") or of any numbers; of at least one, where `some`."""

    def compute(m: Numbers, x: Value, axis: Value | None = None) -> Value:
        x = m.real(x) if kind == "real" else truths(x) if kind == "bool" else x if numbers(x).dtype.kind == "f" else integers(x)
        along = None if axis is None else axis_of(x, axis, 0)
        if some and (x.size == 0 if along is None else x.shape[along] == 0):
            raise Refused(f"there are no numbers in {described(x)}")
        m.room(x.shape)
        return function(x) if along is None else function(x, axis=along, keepdims=True)

    return compute


def softmax(m: Numbers, x: Value, axis: Value | None = None) -> Value:
    """exp(x) / Σ exp(x), the largest taken off before; all −∞ gives NaN."""
    along = axis_of(x, axis, -1)
    m.room(x.shape)
    if not x.shape[along]:
        return m.real(x)
    e = np.exp(m.real(x) - np.max(m.real(x), axis=along, keepdims=True))
    return e / e.sum(axis=along, keepdims=True)


def cumsum(m: Numbers, x: Value, axis: Value | None = None) -> Value:
    """Running sum."""
    m.room(numbers(x).shape)
    return np.cumsum(x if x.dtype.kind == "f" else integers(x), axis=axis_of(x, axis, -1))


def argmax(m: Numbers, x: Value, axis: Value | None = None) -> Value:
    """Index of the first of the largest; the axis is dropped."""
    along = axis_of(x, axis, -1)
    if not x.shape[along]:
        raise Refused(f"there are no numbers in {described(x)}")
    m.room(x.shape)
    return np.argmax(x, axis=along)


def argsort(m: Numbers, x: Value, axis: Value | None = None) -> Value:
    """Indices in ascending order, ties to the lower index."""
    m.room(numbers(x).shape)
    return np.argsort(x, axis=axis_of(x, axis, -1), kind="stable")


def top_k(m: Numbers, x: Value, k: Value) -> Value:
    """Indices of the k largest, descending, ties to the lower index."""
    n = numbers(x).shape[axis_of(x, None, -1)]
    if whole(k, 0) > n:
        raise Refused(f"the {int(k)} largest of {n}")
    m.room(x.shape)
    return np.argsort(-(x if x.dtype.kind == "f" else integers(x)), axis=-1, kind="stable")[..., : int(k)]


# ---- joining, cutting, moving -----------------------------------------------------------------------------------------------


def together(m: Numbers, values: tuple[Value, ...]) -> list[Value]:
    """Arrays of one kind."""
    kinds = {numbers(v).dtype.kind for v in values}
    return list(values) if kinds == {"b"} else [m.real(v) if "f" in kinds else integers(v) for v in values]


def concat(m: Numbers, *values: Value, axis: Value | None = None) -> Value:
    """Arrays behind one another."""
    along = axis_of(values[0], axis, 0)
    rest = {(*v.shape[:along], *v.shape[along + 1 :]) for v in values if numbers(v).ndim > along}
    if len(rest) > 1 or any(v.ndim != values[0].ndim for v in values):
        raise Refused(f"the other axes differ: {' and '.join(map(described, values))}")
    m.room((sum(v.size for v in values),))
    return np.concatenate(together(m, values), axis=along)


def stack(m: Numbers, *values: Value, axis: Value | None = None) -> Value:
    """Arrays on a new axis."""
    if len({numbers(v).shape for v in values}) > 1:
        raise Refused(f"the shapes differ: {' and '.join(map(described, values))}")
    along = axis_of(values[0], axis, 0, more=1)
    m.room((len(values), values[0].size))
    return np.stack(together(m, values), axis=along)


def split(m: Numbers, x: Value, parts: Value, axis: Value | None = None) -> tuple[Value, ...]:
    """Equal parts, or parts of these sizes."""
    along = axis_of(x, axis, -1)
    n = x.shape[along]
    m.room(x.shape)
    if np.ndim(numbers(parts)) == 0:
        count = whole(parts, 1)
        if n % count:
            raise Refused(f"{count} equal parts of {n}")
        sizes = [n // count] * count
    else:
        sizes = [whole(s, 0) for s in parts]
        if sum(sizes) != n:
            raise Refused(f"parts of {' + '.join(map(str, sizes))} = {sum(sizes)} of an axis of length {n}")
    m.room((len(sizes),))
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=along))


def repeat(m: Numbers, x: Value, n: Value, axis: Value | None = None) -> Value:
    """Each entry n times in a row."""
    along = axis_of(x, axis, 0)
    m.room((*x.shape, whole(n, 0)))
    return np.repeat(x, int(n), axis=along)


ZERO = np.int64(0)


def pad(m: Numbers, x: Value, before: Value, after: Value, axis: Value | None = None, value: Value = ZERO) -> Value:
    """Zeros, or `value`, before and behind."""
    along = axis_of(x, axis, -1)
    n = whole(before, 0), whole(after, 0)
    if numbers(value).ndim:
        raise Refused(f"value=: expected a number, found {described(value)}")
    shape = list(x.shape)
    shape[along] += sum(n)
    m.room(tuple(shape))
    if value.dtype.kind == "f" and x.dtype.kind != "f":
        x = m.real(x)
    result = np.full(shape, value, x.dtype)
    result[(slice(None),) * along + (slice(n[0], n[0] + x.shape[along]),)] = x
    return result


def reshape(m: Numbers, x: Value, *sizes: Value) -> Value:
    """The same numbers in another shape."""
    shape = whole_sizes(sizes)
    if math.prod(shape) != numbers(x).size:
        raise Refused(f"{described(x)} has {x.size} numbers, {' × '.join(map(str, shape))} are {math.prod(shape)}")
    m.room(shape, 0)
    return np.reshape(x, shape)


def permute(m: Numbers, x: Value, *axes: Value) -> Value:
    """Axes in their new order."""
    order = [whole(a) for a in axes]
    n = numbers(x).ndim
    if not all(-n <= a < n for a in order) or sorted(normalize_axis_index(a, n) for a in order) != list(range(n)):
        raise Refused(f"expected each axis of {described(x)} once, found {', '.join(map(str, order))}")
    m.room((), 0)
    return np.transpose(x, order)


def transpose(m: Numbers, x: Value) -> Value:
    """The last two axes exchanged."""
    if numbers(x).ndim < 2:
        raise Refused(f"expected two axes or more to transpose, found {described(x)}")
    m.room((), 0)
    return np.swapaxes(x, -1, -2)


# ---- by indices -------------------------------------------------------------------------------------------------------------


def gather(m: Numbers, x: Value, index: Value, axis: Value | None = None) -> Value:
    """The entries that the index names, position for position."""
    along = axis_of(x, axis, -1)
    fits(x, index, along)
    m.room(index.shape)
    return np.take_along_axis(x, checked_indices(index, x.shape[along]), axis=along)


def fits(x: Value, index: Value, along: int) -> None:
    """Raise Refused where an index does not go position for position with x."""
    if numbers(index).ndim != x.ndim or any(
        a not in (b, 1) for i, (a, b) in enumerate(zip(x.shape, index.shape, strict=True)) if i != along
    ):
        raise Refused(f"{described(x)} and indices {described(index)} do not go position for position")


def put(m: Numbers, x: Value, index: Value, values: Value) -> Value:
    """x with values put where the index names entries of the last axis."""
    along = axis_of(x, None, -1)
    fits(x, index, along)
    if not fits_into(values, index.shape) or index.shape[:along] != x.shape[:along]:
        raise Refused(f"{described(values)} at indices {described(index)} in {described(x)}")
    m.room(x.shape)
    x, values = merged(m, x, values)
    np.put_along_axis(x, checked_indices(index, x.shape[along]), np.broadcast_to(values, index.shape), axis=along)
    return x


def merged(m: Numbers, x: Value, values: Value) -> tuple[Value, Value]:
    """A copy of x, and what is put into it, of one kind."""
    a, b = together(m, (np.asarray(x), values))
    return a.copy(), b


def scatter(m: Numbers, x: Value, index: Value, values: Value, add: bool = False) -> Value:
    """x with values put, or added, where the index names rows."""
    axis_of(x, None, 0)
    rows = (*numbers(index).shape, *x.shape[1:])
    if not fits_into(values, rows):
        raise Refused(f"expected {typed('R', rows)} for the rows of {described(x)}, found {described(values)}")
    m.room(rows)
    m.room(x.shape)
    found = checked_indices(index, x.shape[0])
    x, values = merged(m, x, values)
    if add:
        np.add.at(x, found, values)
    else:
        x[found] = values
    return x


def nonzero(m: Numbers, c: Value) -> Value:
    """The indices at which a vector of truth values is true."""
    if truths(c).ndim != 1:
        raise Refused(f"expected a vector of truth values, found {described(c)}")
    m.room(c.shape)
    return np.flatnonzero(c)


# ---- making -----------------------------------------------------------------------------------------------------------------


def integer_range(m: Numbers, first: Value, end: Value | None = None) -> Value:
    """0, …, n-1, or a, …, b-1."""
    a, b = (0, whole(first, 0)) if end is None else (whole(first), whole(end))
    m.room((max(b - a, 0),))
    return np.arange(a, b, dtype=np.int64)


def full(m: Numbers, value: Value, *sizes: Value) -> Value:
    """An array of one number."""
    shape = whole_sizes(sizes)
    if numbers(value).ndim:
        raise Refused(f"expected a number, found {described(value)}")
    m.room(shape)
    return np.full(shape, value)


def zeros(m: Numbers, *sizes: Value) -> Value:
    """An array of real zeros."""
    return full(m, np.zeros((), m.dtype), *sizes)


def one_hot(m: Numbers, index: Value, n: Value) -> Value:
    """Rows of n with 1 at the index."""
    m.room((*numbers(index).shape, whole(n, 0)))
    found = checked_indices(index, int(n))
    return (np.asarray(found)[..., None] == np.arange(int(n))).astype(m.dtype)


def size(m: Numbers, x: Value, axis: Value) -> Value:
    """Length of an axis."""
    m.room((), 0)
    return np.int64(numbers(x).shape[axis_of(x, axis, 0)])


def window(m: Numbers, queries: Value, keys: Value, width: Value) -> Value:
    """Whether query t, the last of the positions, sees key s: one of the `width` latest up to its own."""
    T, S = whole(queries, 0), whole(keys, 0)
    if S < T:
        raise Refused(f"{T} queries are the last of {S} positions: expected as many keys or more")
    if numbers(width).ndim or not width >= 0:
        raise Refused(f"expected a width of 0 or more, or ∞, found {described(width) if numbers(width).ndim else width}")
    m.room((T, S))
    age = (np.arange(T) + S - T)[:, None] - np.arange(S)
    return (age >= 0) & (age < width)


def masked(m: Numbers, x: Value, c: Value) -> Value:
    """x where c, else −∞."""
    return chosen(m, c, m.real(x), np.asarray(-np.inf, m.dtype))


COMPUTED: dict[str, Callable[..., Value]] = {
    **{name: elementwise(getattr(np, name)) for name in ("exp", "log", "sin", "cos", "tanh", "sqrt")},
    "erf": elementwise(each(math.erf), 5000),
    "sigmoid": elementwise(sigmoid),
    "SiLU": elementwise(lambda x: x * sigmoid(x)),
    "GELU": elementwise(gelu, 5000),
    "GELU_tanh": elementwise(gelu_tanh),
    "square": lambda m, x: plain(m, x, np.square),
    "abs": lambda m, x: plain(m, x, np.abs),
    "ReLU": lambda m, x: plain(m, x, lambda v: np.maximum(v, v.dtype.type(0))),
    "floor": lambda m, x: unary(m, "⌊", x),
    "ceil": lambda m, x: unary(m, "⌈", x),
    "clamp": clamp,
    "minimum": arithmetic(np.minimum),
    "maximum": arithmetic(np.maximum),
    "where": chosen,
    "sum": reduction(np.sum),
    "mean": reduction(np.mean, "real", some=True),
    "variance": reduction(np.var, "real", some=True),
    "std": reduction(np.std, "real", some=True),
    "max": reduction(np.max, some=True),
    "min": reduction(np.min, some=True),
    "any": reduction(np.any, "bool"),
    "all": reduction(np.all, "bool"),
    "softmax": softmax,
    "cumsum": cumsum,
    "argmax": argmax,
    "argsort": argsort,
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
    "scatter_add": lambda m, x, i, v: scatter(m, x, i, v, add=True),
    "put": put,
    "nonzero": nonzero,
    "range": integer_range,
    "zeros": zeros,
    "full": full,
    "one_hot": one_hot,
    "size": size,
    "causal": lambda m, t, s: window(m, t, s, np.asarray(np.inf)),
    "window": window,
    "mask": masked,
}
