"""Register tiles over rows in 8 bits: 32 integers and one half-precision scale for every 32 values.

An integer times its scale has at most 19 bits: it is exact in f32, so the values are those of the expanded row, whichever tile
makes them.
"""

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .ir import (
    ITEM_BYTES,
    LANES,
    declare,
    decode_q8,
    f16,
    f32,
    fma,
    horizontal_sums,
    i8,
    i32,
    integer,
    lanes_below,
    load,
    load_weights,
    loop,
    pointer,
    prefetch,
    shuffle,
    splat,
    storage,
    store,
    vector,
)

LEAST = 2.0**-126  # of d, to be divided by: below, 1 / d may be infinite; such a scale is 0 either way
AHEAD = 16384  # bytes of integers before their use that they are asked for


@cache
def q8_tile(outputs: int, tokens: int = 1) -> Any:
    """The intrinsic for `outputs` rows of w and `tokens` rows of x.

    tile(w_at, w_stride, s_at, s_stride, x_at, x_stride, n, y_at, y_stride): addresses of integers and scales, of x and of the outputs, with
    their bytes from row to row; n blocks a row.
    """

    @intrinsic
    def tile(typing, w_at, w_stride, s_at, s_stride, x_at, x_stride, n, y_at, y_stride):
        def generate(context, b, signature, arguments):
            w_at, w_stride, s_at, s_stride, x_at, x_stride, n, y_at, y_stride = arguments
            rows = [b.add(w_at, b.mul(w_stride, integer(j))) for j in range(outputs)]
            scales = [b.add(s_at, b.mul(s_stride, integer(j))) for j in range(outputs)]
            inputs = [b.add(x_at, b.mul(x_stride, integer(m))) for m in range(tokens)]
            i, sums, close = loop(b, integer(0), n, 1, [splat(f32, 0.0)] * (outputs * tokens))
            x = [b.add(at, b.mul(i, integer(128))) for at in inputs]
            halves = [(load(b, at, f32), load(b, b.add(at, integer(64)), f32)) for at in x]
            new = []
            for j, (row, scale_row) in enumerate(zip(rows, scales, strict=True)):
                at = b.add(row, b.mul(i, integer(2 * LANES)))
                prefetch(b, b.add(at, integer(AHEAD)))
                low, high = decode_q8(b, at, b.add(scale_row, b.mul(i, integer(2))))
                for m, (first, second) in enumerate(halves):
                    new.append(fma(b, high, second, fma(b, low, first, sums[j * tokens + m])))
            sums = close(new)
            for m in range(tokens):
                store(b, horizontal_sums(b, sums[m::tokens]), b.add(y_at, b.mul(y_stride, integer(m))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return tile


@intrinsic
def _expand_row(typing, w_at, s_at, n, y_at):
    def generate(context, b, signature, arguments):
        w_at, s_at, n, y_at = arguments
        i, _, close = loop(b, integer(0), n, 1, [])
        at = b.add(y_at, b.mul(i, integer(128)))
        for half, values in enumerate(decode_q8(b, b.add(w_at, b.mul(i, integer(32))), b.add(s_at, b.mul(i, integer(2))))):
            store(b, values, b.add(at, integer(64 * half)))
        close([])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def quantize(b, weights, values_at, scale_at):
    """A block's two vectors of f32 to 32 integers and a scale at these addresses; integers of 0 where the scale is none for them."""
    bits = [b.and_(b.bitcast(w, vector(i32)), splat(i32, 0x7FFFFFFF)) for w in weights]
    either = b.select(b.icmp_unsigned(">", *bits), *bits)  # as integers: NaN above infinity above all numbers
    largest = b.call(declare(b, "llvm.vector.reduce.umax.v16i32", i32, [vector(i32)]), [either])
    step = b.fdiv(b.bitcast(largest, f32), ir.Constant(f32, 127.0))
    b.store(b.fptrunc(step, f16), pointer(b, scale_at, f16), align=2)
    holds = b.and_(b.fcmp_ordered(">=", step, ir.Constant(f32, LEAST)), b.fcmp_ordered("<", step, ir.Constant(f32, float("inf"))))
    one = b.insert_element(ir.Constant(vector(f32), ir.Undefined), b.fdiv(ir.Constant(f32, 1.0), step), ir.Constant(i32, 0))
    inverse = b.shuffle_vector(one, one, splat(i32, 0))
    for half, w in enumerate(weights):
        scaled = b.select(holds, b.fmul(w, inverse), splat(f32, 0.0))
        whole = b.fptosi(scaled, vector(i32))
        rest = b.fsub(scaled, b.sitofp(whole, vector(f32)))
        up, down = b.fcmp_ordered(">=", rest, splat(f32, 0.5)), b.fcmp_ordered("<=", rest, splat(f32, -0.5))
        rounded = b.add(b.add(whole, b.zext(up, vector(i32))), b.sext(down, vector(i32)))
        b.store(b.trunc(rounded, vector(i8)), pointer(b, b.add(values_at, integer(LANES * half)), vector(i8)), align=1)


@intrinsic
def _quantize_blocks(typing, w, w_at, n, v_at, s_at):
    form = storage(w)

    def generate(context, b, signature, arguments):
        _, w_at, n, v_at, s_at = arguments
        i, _, close = loop(b, integer(0), n, 1, [])
        at = b.add(w_at, b.mul(i, integer(2 * LANES * ITEM_BYTES[form])))
        weights = [load_weights(b, b.add(at, integer(half * LANES * ITEM_BYTES[form])), form) for half in range(2)]
        quantize(b, weights, b.add(v_at, b.mul(i, integer(2 * LANES))), b.add(s_at, b.mul(i, integer(2))))
        close([])
        return context.get_dummy_value()

    return types.void(w, *[types.int64] * 4), generate


@intrinsic
def _quantize_rest(typing, w, w_at, count, v_at, s_at):
    form = storage(w)

    def generate(context, b, signature, arguments):
        _, w_at, count, v_at, s_at = arguments
        halves = range(0, 2 * LANES, LANES)
        weights = [
            load_weights(b, b.add(w_at, integer(k * ITEM_BYTES[form])), form, lanes_below(b, b.sub(count, integer(k)))) for k in halves
        ]
        quantize(b, weights, v_at, s_at)
        return context.get_dummy_value()

    return types.void(w, *[types.int64] * 4), generate


@intrinsic
def _transpose(typing, w, w_at, stride, rows, width, to, to_stride):
    form = storage(w)

    def generate(context, b, signature, arguments):
        _, w_at, stride, rows, width, to, to_stride = arguments
        columns, none = lanes_below(b, width), ir.Constant(vector(ir.IntType(1)), None)
        tile = []
        for k in range(LANES):
            mask = b.select(b.icmp_signed("<", integer(k), rows), columns, none)
            tile.append(load_weights(b, b.add(w_at, b.mul(stride, integer(k))), form, mask))
        zipped = [lane for j in range(LANES) for lane in (j, LANES + j)]
        for _ in range(LANES.bit_length() - 1):  # each time, what was a vector's bit of a place becomes a lane's
            pairs = [(tile[k], tile[k + LANES // 2]) for k in range(LANES // 2)]
            tile = [shuffle(b, *pair, part) for pair in pairs for part in (zipped[:LANES], zipped[LANES:])]
        for j, column in enumerate(tile):
            store(b, column, b.add(to, b.mul(to_stride, integer(j))))
        return context.get_dummy_value()

    return types.void(w, *[types.int64] * 6), generate


# expand_row(w_at, s_at, n, y_at): n blocks to 32 values each, f32, exact
expand_row: Any = _expand_row
# quantize_blocks(w, w_at, n, v_at, s_at): n blocks of weights stored as those of w, to integers and scales
quantize_blocks: Any = _quantize_blocks
# quantize_rest(w, w_at, count, v_at, s_at): one block, of which `count` weights exist; the others are 0
quantize_rest: Any = _quantize_rest
# transpose(w, w_at, stride, rows, width, to, to_stride): 16 columns of 16 f32 of a tile of w, of which `rows` and `width` exist
transpose: Any = _transpose
