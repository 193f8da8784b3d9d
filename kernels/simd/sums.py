"""A run of f32 to one number: its largest, its sum, its sum of squares.

The sums are 64 partial sums, or 16 of a short run, which end in a tree: the same order on every processor and wherever the compiler
puts them (a plain loop would be one long chain).
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from ..elementary import value
from .ir import (
    ITEM_BYTES,
    LANES,
    declare,
    f32,
    fma,
    i8,
    i16,
    i32,
    integer,
    lanes_below,
    load,
    load_weights,
    loop,
    shuffle,
    splat,
    storage,
    vector,
)

CHAINS = 4  # additions take several cycles: of so many, one starts while others end


def over_lanes(b, n, start, step, join):
    """One value from n: `step(i, so far, mask)` takes 16 from i on into a vector, whose lanes `join` makes one of in the end.

    The mask is None where all 16 exist.
    """
    steps = CHAINS * LANES
    long, whole = b.and_(n, integer(-steps)), b.and_(n, integer(-LANES))
    i, chains, close = loop(b, integer(0), long, steps, [start] * CHAINS)
    first, *others = close([step(b.add(i, integer(LANES * c)), chain, None) for c, chain in enumerate(chains)])
    i, (first,), close = loop(b, long, whole, LANES, [first])
    (first,) = close([step(i, first, None)])
    first = step(whole, first, lanes_below(b, b.sub(n, whole)))
    second, third, fourth = others
    result, lanes = join(b, join(b, first, second), join(b, third, fourth)), LANES
    while lanes > 1:
        lanes //= 2
        result = join(b, shuffle(b, result, result, range(lanes)), shuffle(b, result, result, range(lanes, 2 * lanes)))
    return b.extract_element(result, ir.Constant(i32, 0))


def f32s(b, at, i, mask):
    return load(b, b.add(at, b.mul(i, integer(4))), f32, mask)


def larger(b, x, y):
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def add(b, x, y):
    return b.fadd(x, y)


@intrinsic
def _largest(typing, at, n):
    def generate(context, b, signature, arguments):
        at, n = arguments
        lowest = ir.Constant(vector(f32), [ir.Constant(f32, float("-inf"))] * LANES)

        def step(i, highest, mask):
            values = f32s(b, at, i, mask)
            return larger(b, values if mask is None else b.select(mask, values, lowest), highest)

        return over_lanes(b, n, lowest, step, larger)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def total_of(typing, at, n):
    def generate(context, b, signature, arguments):
        at, n = arguments
        return over_lanes(b, n, splat(f32, 0.0), lambda i, sums, mask: b.fadd(f32s(b, at, i, mask), sums), add)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def total_f64_of(typing, at, n):
    def generate(context, b, signature, arguments):
        at, n = arguments
        start = splat(ir.DoubleType(), 0.0)
        return over_lanes(b, n, start, lambda i, sums, mask: b.fadd(b.fpext(f32s(b, at, i, mask), start.type), sums), add)

    return types.float64(types.int64, types.int64), generate


@intrinsic
def squares_of(typing, at, n, origin):
    def generate(context, b, signature, arguments):
        at, n, origin = arguments
        one = b.insert_element(ir.Constant(vector(f32), ir.Undefined), origin, ir.Constant(i32, 0))
        origins = b.shuffle_vector(one, one, splat(i32, 0))

        def step(i, sums, mask):
            d = b.fsub(f32s(b, at, i, mask), origins)
            d = d if mask is None else b.select(mask, d, splat(f32, 0.0))
            return fma(b, d, d, sums)

        return over_lanes(b, n, splat(f32, 0.0), step, add)

    return types.float32(types.int64, types.int64, types.float32), generate


@intrinsic
def products_of(typing, w, x_at, w_at, n):
    form = storage(w)

    def generate(context, b, signature, arguments):
        _, x_at, w_at, n = arguments

        def step(i, sums, mask):
            at = b.add(w_at, b.mul(i, integer(ITEM_BYTES[form])))
            if form == "q8":
                weights = b.sitofp(b.sext(load(b, at, i8, mask), vector(i32)), vector(f32))
            elif form == "f16":
                weights = widen_f16(b, load(b, at, i16, mask))
            else:
                weights = load_weights(b, at, form, mask)
            multiply_add = declare(b, "llvm.fmuladd.v16f32", vector(f32), [vector(f32)] * 3)
            return b.call(multiply_add, [f32s(b, x_at, i, mask), weights, sums])

        return over_lanes(b, n, splat(f32, 0.0), step, add)

    return types.float32(w, types.int64, types.int64, types.int64), generate


def widen_f16(b, bits):
    """f32 from the bits of 16 halves by integers and a product, as `elementary.f16_value`: some processors lack the conversion."""
    wide = b.zext(bits, vector(i32))
    size = b.shl(b.and_(wide, splat(i32, 0x7FFF)), splat(i32, 13))
    scaled = b.bitcast(b.fmul(b.bitcast(size, vector(f32)), splat(f32, 2.0**112)), vector(i32))
    special = b.select(b.icmp_unsigned(">=", size, splat(i32, 0x0F800000)), splat(i32, 0x7F800000), splat(i32, 0))
    sign = b.shl(b.and_(wide, splat(i32, 0x8000)), splat(i32, 16))
    return b.bitcast(b.or_(b.or_(scaled, special), sign), vector(f32))


run_total: Any = total_of
run_total_f64: Any = total_f64_of
run_squares: Any = squares_of
run_products: Any = products_of
largest: Any = _largest  # (at, n): −infinity for none; NaN may or may not be passed over


def total(x):
    """Σ x of a contiguous f32 [n]."""
    return x.sum()


def total_f64(x):
    """Σ x of a contiguous f32 [n], in f64."""
    return x.sum(dtype=np.float64)


def squares(x, origin):
    """Σ (x − origin)² of a contiguous f32 [n]."""
    return np.square(x - origin).sum()


def products(x, w):
    """Σ x · w of a contiguous f32 [n] and stored weights [n], or integers of 8 bits; fused where the processor can."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * np.float32(value(w[i]))
    return total


@overload(total)
def _total(x):
    return lambda x: run_total(x.ctypes.data, x.shape[0])


@overload(total_f64)
def _total_f64(x):
    return lambda x: run_total_f64(x.ctypes.data, x.shape[0])


@overload(squares)
def _squares(x, origin):
    return lambda x, origin: run_squares(x.ctypes.data, x.shape[0], origin)


@overload(products)
def _products(x, w):
    return lambda x, w: run_products(w, x.ctypes.data, w.ctypes.data, x.shape[0])
