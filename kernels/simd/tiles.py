"""The two register tiles that every product is made of.

Both compute y[m, j] = Σ_k x[m, k] · w[k, j] for a few tokens m and a few outputs j, keeping all sums in registers:

* `dot_tile`, for weights stored by output (row j holds w[:, j]): vectors run along k, each output ends in one sum over lanes;
* `axpy_tile`, for weights stored by input (row k holds w[k, :], as GPT-2's Conv1D): vectors run along j, k is a chain of fma.

and `largest`, the maximum of a run of f32. The order of summation of an output depends on neither the number of tokens nor
that of outputs, so one token gives bit for bit what it gives among many.
"""

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .ir import (
    ITEM_BYTES,
    LANES,
    broadcast,
    f32,
    fma,
    horizontal_sums,
    i32,
    integer,
    lanes_below,
    load,
    load_weights,
    loop,
    prefetch,
    shuffle,
    splat,
    storage,
    store,
    vector,
)


@cache
def dot_tile(outputs: int, tokens: int) -> Any:
    """The intrinsic for `outputs` rows of w and `tokens` rows of x.

    tile(w, w_at, w_stride, x_at, x_stride, n, y_at, y_stride, ahead): `w` only says the storage format; `_at` are addresses,
    `_stride` bytes from row to row; n values a row, any n; y[m, j] is written at y_at + m * y_stride + 4 * j.
    `ahead` is how many bytes before their use the rows of w are asked for.
    """

    @intrinsic
    def tile(typing, w, w_at, w_stride, x_at, x_stride, n, y_at, y_stride, ahead):
        form = storage(w)

        def generate(context, b, signature, arguments):
            _, w_at, w_stride, x_at, x_stride, n, y_at, y_stride, ahead = arguments
            rows = [b.add(w_at, b.mul(w_stride, integer(j))) for j in range(outputs)]
            inputs = [b.add(x_at, b.mul(x_stride, integer(m))) for m in range(tokens)]
            size = ITEM_BYTES[form]

            def step(k, sums, mask=None):
                x = [load(b, b.add(at, b.mul(k, integer(4))), f32, mask) for at in inputs]
                new = []
                for j, row in enumerate(rows):
                    at = b.add(row, b.mul(k, integer(size)))
                    if mask is None:
                        prefetch(b, b.add(at, ahead))
                    weights = load_weights(b, at, form, mask)
                    new += [fma(b, weights, x[m], sums[j * tokens + m]) for m in range(tokens)]
                return new

            whole = b.and_(n, integer(-LANES))
            k, sums, close = loop(b, integer(0), whole, LANES, [splat(f32, 0.0)] * (outputs * tokens))
            sums = close(step(k, sums))
            with_tail = b.icmp_signed("<", whole, n)
            start = b.block
            tail, done = b.append_basic_block("tail"), b.append_basic_block("done")
            b.cbranch(with_tail, tail, done)
            b.position_at_end(tail)
            last = step(whole, sums, lanes_below(b, b.sub(n, whole)))
            end = b.block
            b.branch(done)
            b.position_at_end(done)
            for index, (s, t) in enumerate(zip(sums, last, strict=True)):
                both = b.phi(s.type)
                both.add_incoming(s, start)
                both.add_incoming(t, end)
                sums[index] = both
            for m in range(tokens):
                store(b, horizontal_sums(b, sums[m::tokens]), b.add(y_at, b.mul(y_stride, integer(m))))
            return context.get_dummy_value()

        return types.void(w, *[types.int64] * 8), generate

    return tile


@cache
def axpy_tile(vectors: int, tokens: int, partial: bool = False, onto: bool = False) -> Any:
    """The intrinsic for `vectors` · 16 columns of w and `tokens` rows of x; `partial` masks the last vector; `onto` adds to y.

    tile(w, w_at, w_stride, x_at, x_stride, n, y_at, y_stride, width, ahead): as `dot_tile`, with n rows of w; `width` is the number
    of columns that exist (read where `partial`); `ahead` is how many rows before their use the rows of w are asked for.
    """

    @intrinsic
    def tile(typing, w, w_at, w_stride, x_at, x_stride, n, y_at, y_stride, width, ahead):
        form = storage(w)

        def generate(context, b, signature, arguments):
            _, w_at, w_stride, x_at, x_stride, n, y_at, y_stride, width, ahead = arguments
            size = ITEM_BYTES[form]
            masks: list = [None] * vectors
            if partial:
                masks[-1] = lanes_below(b, b.sub(width, integer(LANES * (vectors - 1))))
            inputs = [b.add(x_at, b.mul(x_stride, integer(m))) for m in range(tokens)]
            distance = b.mul(ahead, w_stride)
            outputs = [
                b.add(b.add(y_at, b.mul(y_stride, integer(m))), integer(v * LANES * 4)) for m in range(tokens) for v in range(vectors)
            ]
            start = [load(b, at, f32, masks[i % vectors]) if onto else splat(f32, 0.0) for i, at in enumerate(outputs)]
            k, sums, close = loop(b, integer(0), n, 1, start)
            row = b.add(w_at, b.mul(k, w_stride))
            for byte in range(0, 0 if onto else vectors * LANES * size, 64):
                prefetch(b, b.add(b.add(row, distance), integer(byte)))
            weights = [load_weights(b, b.add(row, integer(v * LANES * size)), form, masks[v]) for v in range(vectors)]
            new = []
            for m in range(tokens):
                x = broadcast(b, b.add(inputs[m], b.mul(k, integer(4))))
                new += [fma(b, weights[v], x, sums[m * vectors + v]) for v in range(vectors)]
            sums = close(new)
            for i, at in enumerate(outputs):
                store(b, sums[i], at, masks[i % vectors])
            return context.get_dummy_value()

        return types.void(w, *[types.int64] * 9), generate

    return tile


@intrinsic
def _largest(typing, at, n):
    """The largest of the n f32 at an address; −infinity for none. NaN may or may not be passed over."""

    def generate(context, b, signature, arguments):
        at, n = arguments
        lowest = ir.Constant(vector(f32), [ir.Constant(f32, float("-inf"))] * LANES)

        def step(i, highest, mask=None):
            values = load(b, b.add(at, b.mul(i, integer(4))), f32, mask)
            if mask is not None:
                values = b.select(mask, values, lowest)
            return b.select(b.fcmp_ordered(">", values, highest), values, highest)

        whole = b.and_(n, integer(-LANES))
        i, (highest,), close = loop(b, integer(0), whole, LANES, [lowest])
        (highest,) = close([step(i, highest)])
        highest = step(whole, highest, lanes_below(b, b.sub(n, whole)))
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            a, c = shuffle(b, highest, highest, range(lanes)), shuffle(b, highest, highest, range(lanes, 2 * lanes))
            highest = b.select(b.fcmp_ordered(">", a, c), a, c)
        return b.extract_element(highest, ir.Constant(i32, 0))

    return types.float32(types.int64, types.int64), generate


largest: Any = _largest
