"""Register tiles over MXFP4 rows as stored: 16 bytes of codes and one scale byte for every 32 values.

With AVX-512 a code becomes its f32 by one permutation of a table of 16. Elsewhere its bits are moved to where they read as a
half-precision number 2^14 too small, which every processor with vectors converts; a power of two repairs it.
"""

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..host import supports
from .ir import (
    LANES,
    broadcast,
    declare,
    f16,
    f32,
    fma,
    horizontal_sums,
    i8,
    i16,
    i32,
    i64,
    integer,
    load,
    loop,
    pointer,
    prefetch,
    shuffle,
    splat,
    store,
    vector,
)

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
AHEAD = 4096  # bytes of codes before their use that they are asked for
PERMUTES = supports("avx512")


def decode(b, codes):
    """Two vectors of f32 from 16 bytes at an address: the low nibbles' values and the high nibbles'."""
    raw = b.load(pointer(b, codes, vector(i8)), align=1)
    if PERMUTES:
        table = ir.Constant(vector(f32), [ir.Constant(f32, sign * v) for sign in (1.0, -1.0) for v in VALUES])
        permute = declare(b, "llvm.x86.avx512.permvar.sf.512", vector(f32), [vector(f32), vector(i32)])
        wide = b.zext(raw, vector(i32))  # the permutation reads the lowest four bits of each index
        return b.call(permute, [table, wide]), b.call(permute, [table, b.lshr(wide, splat(i32, 4))])

    def half(nibbles):
        magnitude = b.shl(b.and_(nibbles, splat(i16, 7)), splat(i16, 9))
        sign = b.shl(b.and_(nibbles, splat(i16, 8)), splat(i16, 12))
        value = b.fpext(b.bitcast(b.or_(magnitude, sign), vector(f16)), vector(f32))
        return b.fmul(value, splat(f32, 2.0**14))

    wide = b.zext(raw, vector(i16))
    return half(wide), half(b.lshr(wide, splat(i16, 4)))


def scale_of(b, at, table):
    """The f32 scale of the byte at an address, in every lane, by the table of 256."""
    byte = b.zext(b.load(pointer(b, at, i8)), i64)
    return broadcast(b, b.add(table, b.shl(byte, integer(2))))


@cache
def fp4_tile(outputs: int, tokens: int = 1) -> Any:
    """The intrinsic for `outputs` rows of w and `tokens` rows of x, whose blocks have their even elements first.

    tile(w_at, w_stride, s_at, s_stride, table_at, x_at, x_stride, n, y_at, y_stride): addresses of codes and scales, of the 256 scales as
    f32, of x and of the outputs, with their bytes from row to row; n blocks a row.
    """

    @intrinsic
    def tile(typing, w_at, w_stride, s_at, s_stride, table_at, x_at, x_stride, n, y_at, y_stride):
        def generate(context, b, signature, arguments):
            w_at, w_stride, s_at, s_stride, table_at, x_at, x_stride, n, y_at, y_stride = arguments
            rows = [b.add(w_at, b.mul(w_stride, integer(j))) for j in range(outputs)]
            scales = [b.add(s_at, b.mul(s_stride, integer(j))) for j in range(outputs)]
            inputs = [b.add(x_at, b.mul(x_stride, integer(m))) for m in range(tokens)]
            i, sums, close = loop(b, integer(0), n, 1, [splat(f32, 0.0)] * (outputs * tokens))
            x = [b.add(at, b.mul(i, integer(128))) for at in inputs]
            halves = [(load(b, at, f32), load(b, b.add(at, integer(64)), f32)) for at in x]
            new = []
            for j, (row, scale_row) in enumerate(zip(rows, scales, strict=True)):
                at = b.add(row, b.mul(i, integer(16)))
                prefetch(b, b.add(at, integer(AHEAD)))
                low, high = decode(b, at)
                scale = scale_of(b, b.add(scale_row, i), table_at)
                low, high = b.fmul(low, scale), b.fmul(high, scale)
                for m, (even, odd) in enumerate(halves):
                    new.append(fma(b, high, odd, fma(b, low, even, sums[j * tokens + m])))
            sums = close(new)
            for m in range(tokens):
                store(b, horizontal_sums(b, sums[m::tokens]), b.add(y_at, b.mul(y_stride, integer(m))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return tile


@intrinsic
def _expand_row(typing, w_at, s_at, table_at, n, y, y_at, natural):
    narrow = y.dtype == types.uint16

    def generate(context, b, signature, arguments):
        w_at, s_at, table_at, n, _, y_at, natural = arguments
        i, _, close = loop(b, integer(0), n, 1, [])
        low, high = decode(b, b.add(w_at, b.mul(i, integer(16))))
        scale = scale_of(b, b.add(s_at, i), table_at)
        low, high = b.fmul(low, scale), b.fmul(high, scale)
        zipped = [lane for j in range(LANES) for lane in (j, LANES + j)]
        first = b.select(natural, shuffle(b, low, high, zipped[:LANES]), low)
        second = b.select(natural, shuffle(b, low, high, zipped[LANES:]), high)
        if narrow:
            at = b.add(y_at, b.mul(i, integer(64)))
            for half, value in enumerate((first, second)):
                upper = b.trunc(b.lshr(b.bitcast(value, vector(i32)), splat(i32, 16)), vector(i16))
                b.store(upper, pointer(b, b.add(at, integer(32 * half)), vector(i16)), align=2)
        else:
            at = b.add(y_at, b.mul(i, integer(128)))
            store(b, first, at)
            store(b, second, b.add(at, integer(64)))
        close([])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, y, types.int64, types.boolean), generate


# expand_row(w_at, s_at, table_at, n, y, y_at, natural): n blocks to 32 values each, f32, or bf16 as 16 bits if `y` is u16 (both
# exact); in order, or the even elements of each before the odd
expand_row: Any = _expand_row
