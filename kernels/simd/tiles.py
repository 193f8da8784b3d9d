"""The register tiles that every product is made of.

All compute y[m, j] = Σ_k x[m, k] · w[k, j] for a few tokens m and a few outputs j:

* `dot_tile`, for weights stored by output (row j holds w[:, j]): vectors run along k, each output ends in one sum over lanes;
* `axpy_tile`, for weights stored by input (row k holds w[k, :], as GPT-2's Conv1D): vectors run along j, k is a chain of fma;
* `rows_tile`, the same sums for a few whole rows of such weights: they stream from memory in the order in which they lie, while the
  sums rest in the first-level cache.

The order of summation of an output depends on neither the number of tokens nor that of outputs, so one token gives bit for bit what
it gives among many.
"""

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .ir import (
    ITEM_BYTES,
    LANES,
    PAIRS,
    add_pairs,
    broadcast,
    decode_q8,
    f32,
    fma,
    horizontal_sums,
    i16,
    integer,
    lanes_below,
    load,
    load_weights,
    loop,
    once,
    pointer,
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

    tile(w, x, w_at, w_stride, x_at, x_stride, n, y_at, y_stride, ahead): `w` and `x` only say how values are stored, x as f32, or as
    u16: then both are bf16, multiplied in pairs (AVX512_BF16). Rows of w in 8 bits are those of `kernels.cells`. `_at` are addresses,
    `_stride` bytes from row to row; n values a row, any n; y[m, j] is written at y_at + m * y_stride + 4 * j.
    `ahead` is how many bytes before their use the rows of w are asked for.
    """

    @intrinsic
    def tile(typing, w, x, w_at, w_stride, x_at, x_stride, n, y_at, y_stride, ahead):
        pairs = x.dtype == types.uint16
        form = "bf16" if pairs else storage(w)
        width = PAIRS if pairs else LANES  # of a vector
        starts = (0, LANES) if form == "q8" else (0,)  # of the vectors of a step
        lanes = len(starts) * width
        kind, item, multiply = (i16, 2, add_pairs) if pairs else (f32, 4, lambda b, sums, x, w: fma(b, w, x, sums))

        def generate(context, b, signature, arguments):
            _, _, w_at, w_stride, x_at, x_stride, n, y_at, y_stride, ahead = arguments
            rows = [b.add(w_at, b.mul(w_stride, integer(j))) for j in range(outputs)]
            inputs = [b.add(x_at, b.mul(x_stride, integer(m))) for m in range(tokens)]

            def weights_of(row, k, masks):
                at = b.add(row, b.mul(k, integer(ITEM_BYTES[form])))
                if masks[0] is None:
                    prefetch(b, b.add(at, ahead))
                if form == "q8":
                    return decode_q8(b, at, b.add(b.add(row, n), b.lshr(k, integer(4))), masks)
                return [load(b, at, i16, masks[0], PAIRS) if pairs else load_weights(b, at, form, masks[0])]

            def step(k, sums, left=None):
                masks = [None if left is None else lanes_below(b, b.sub(left, integer(v)), width) for v in starts]
                places = [b.mul(b.add(k, integer(v)), integer(item)) for v in starts]
                x = [[load(b, b.add(at, p), kind, mask, width) for p, mask in zip(places, masks, strict=True)] for at in inputs]
                new = []
                for j, row in enumerate(rows):
                    weights = weights_of(row, k, masks)
                    for m in range(tokens):
                        so_far = sums[j * tokens + m]
                        for part, w in zip(x[m], weights, strict=True):
                            so_far = multiply(b, so_far, part, w)
                        new.append(so_far)
                return new

            whole = b.and_(n, integer(-lanes))
            k, sums, close = loop(b, integer(0), whole, lanes, [splat(f32, 0.0)] * (outputs * tokens))
            sums = close(step(k, sums))
            sums = once(b, b.icmp_signed("<", whole, n), sums, lambda: step(whole, sums, b.sub(n, whole)))
            together = next(n for n in (4, 2, 1) if tokens % n == 0 and outputs * n <= LANES)  # the more sums at once, the cheaper each
            for m in range(0, tokens, together):
                totals = horizontal_sums(b, [sums[j * tokens + m + i] for i in range(together) for j in range(outputs)])
                for i in range(together):
                    part = totals if together == 1 else shuffle(b, totals, totals, range(i * outputs, (i + 1) * outputs))
                    store(b, part, b.add(y_at, b.mul(y_stride, integer(m + i))))
            return context.get_dummy_value()

        return types.void(w, x, *[types.int64] * 8), generate

    return tile


@cache
def axpy_tile(vectors: int, tokens: int, partial: bool = False, onto: bool = False, asks: bool = True) -> Any:
    """The intrinsic for `vectors` · 16 columns of w and `tokens` rows of x; `partial` masks the last vector; `onto` adds to y.

    tile(w, w_at, w_stride, scales, x_at, x_stride, n, y_at, y_stride, width, ahead): as `dot_tile`, with n rows of w; `scales` is how many
    bytes behind a row's columns their scales lie (read where w is in 8 bits); `width` is the number of columns that exist (read where
    `partial`); `ahead` is how many rows before their use the rows of w are asked for (if it `asks`).
    """

    @intrinsic
    def tile(typing, w, w_at, w_stride, scales, x_at, x_stride, n, y_at, y_stride, width, ahead):
        form = storage(w)

        def generate(context, b, signature, arguments):
            _, w_at, w_stride, scales, x_at, x_stride, n, y_at, y_stride, width, ahead = arguments
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
            for byte in range(0, vectors * LANES * size if asks else 0, 64):
                prefetch(b, b.add(b.add(row, distance), integer(byte)))
            if form == "q8":
                places = [(b.add(row, integer(v * LANES)), b.add(row, b.add(scales, integer(v)))) for v in range(0, vectors, 2)]
                weights = [w for v, place in zip(range(0, vectors, 2), places, strict=True) for w in decode_q8(b, *place, masks[v : v + 2])]
            else:
                weights = [load_weights(b, b.add(row, integer(v * LANES * size)), form, masks[v]) for v in range(vectors)]
            new = []
            for m in range(tokens):
                x = broadcast(b, b.add(inputs[m], b.mul(k, integer(4))))
                new += [fma(b, weights[v], x, sums[m * vectors + v]) for v in range(vectors)]
            sums = close(new)
            for i, at in enumerate(outputs):
                store(b, sums[i], at, masks[i % vectors])
            return context.get_dummy_value()

        return types.void(w, *[types.int64] * 10), generate

    return tile


@cache
def pairs_tile(vectors: int, tokens: int) -> Any:
    """The intrinsic for `vectors` · 16 columns, whose pairs of inputs lie side by side, and `tokens` rows of x, all bf16 as 16 bits.

    tile(w_at, x_at, x_stride, n, y_at, y_stride): n pairs; w as `interleave` writes it, 64 `vectors` bytes a pair.
    """

    @intrinsic
    def tile(typing, w_at, x_at, x_stride, n, y_at, y_stride):
        def generate(context, b, signature, arguments):
            w_at, x_at, x_stride, n, y_at, y_stride = arguments
            inputs = [b.add(x_at, b.mul(x_stride, integer(m))) for m in range(tokens)]
            k, sums, close = loop(b, integer(0), n, 1, [splat(f32, 0.0)] * (tokens * vectors))
            row = b.add(w_at, b.mul(k, integer(64 * vectors)))
            weights = [load(b, b.add(row, integer(64 * v)), i16, None, PAIRS) for v in range(vectors)]
            new = []
            for m, at in enumerate(inputs):
                x = b.bitcast(broadcast(b, b.add(at, b.mul(k, integer(4)))), vector(i16, PAIRS))
                new += [add_pairs(b, sums[m * vectors + v], x, weights[v]) for v in range(vectors)]
            for i, total in enumerate(close(new)):
                store(b, total, b.add(b.add(y_at, b.mul(y_stride, integer(i // vectors))), integer(64 * (i % vectors))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return tile


@cache
def interleave(vectors: int) -> Any:
    """The intrinsic that lays pairs of rows of bf16 side by side for `pairs_tile`: (at, stride, n, width, to).

    n rows, `width` columns (up to 16 `vectors`; zeros beyond), the last row of an odd n beside zeros.
    """

    @intrinsic
    def lay(typing, at, stride, n, width, to):
        def generate(context, b, signature, arguments):
            at, stride, n, width, to = arguments
            masks = [lanes_below(b, b.sub(width, integer(LANES * v))) for v in range(vectors)]
            zipped = [lane for j in range(LANES) for lane in (j, LANES + j)]
            k, _, close = loop(b, integer(0), n, 2, [])
            first = b.add(at, b.mul(k, stride))
            exists = b.icmp_signed("<", b.add(k, integer(1)), n)
            nothing = ir.Constant(vector(i16), None)
            for v in range(vectors):
                place = b.add(first, integer(2 * LANES * v))
                upper = load(b, place, i16, masks[v])
                lower = load(b, b.select(exists, b.add(place, stride), place), i16, masks[v])
                both = shuffle(b, upper, b.select(exists, lower, nothing), zipped)
                there = b.add(b.add(to, b.mul(k, integer(32 * vectors))), integer(64 * v))
                b.store(both, pointer(b, there, both.type), align=1)
            close([])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return lay


@cache
def rows_tile(rows: int, tokens: int) -> Any:
    """The intrinsic that adds what `rows` rows of w give to `tokens` rows of y.

    tile(w, w_at, w_stride, x_at, x_stride, y_at, y_stride, width, ahead): as `axpy_tile`, x_at where these rows' inputs are; y is added to,
    `width` columns, a multiple of 16; `ahead` is how many bytes before their use the rows of w are asked for.
    """

    @intrinsic
    def tile(typing, w, w_at, w_stride, x_at, x_stride, y_at, y_stride, width, ahead):
        form = storage(w)

        def generate(context, b, signature, arguments):
            _, w_at, w_stride, x_at, x_stride, y_at, y_stride, width, ahead = arguments
            starts = [b.add(w_at, b.mul(w_stride, integer(k))) for k in range(rows)]
            inputs = [b.add(x_at, b.mul(x_stride, integer(m))) for m in range(tokens)]
            x = [[broadcast(b, b.add(at, integer(4 * k))) for k in range(rows)] for at in inputs]
            outputs = [b.add(y_at, b.mul(y_stride, integer(m))) for m in range(tokens)]
            j, _, close = loop(b, integer(0), width, LANES, [])
            places = [b.add(at, b.mul(j, integer(4))) for at in outputs]
            sums = [load(b, at, f32) for at in places]
            for k, start in enumerate(starts):
                at = b.add(start, b.mul(j, integer(ITEM_BYTES[form])))
                prefetch(b, b.add(at, ahead))
                weights = load_weights(b, at, form)
                sums = [fma(b, weights, x[m][k], sums[m]) for m in range(tokens)]
            for value, at in zip(sums, places, strict=True):
                store(b, value, at)
            close([])
            return context.get_dummy_value()

        return types.void(w, *[types.int64] * 8), generate

    return tile
