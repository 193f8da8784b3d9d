"""Register tiles over MXFP4 rows as stored: 16 bytes of codes and one scale byte for every 32 values.

With AVX-512 a code becomes its f32 by one permutation of a table of 16. Elsewhere its bits are moved to where they read as a
half-precision number 2^14 too small, which every processor with vectors converts; a power of two repairs it.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..host import supports
from .blocks import Blocks
from .ir import (
    LANES,
    broadcast,
    declare,
    f16,
    f32,
    i8,
    i16,
    i32,
    i64,
    integer,
    loop,
    pointer,
    shuffle,
    splat,
    store,
    vector,
)

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
PERMUTES = supports("avx512")


def numbers(b, codes):
    """Two vectors of f32 from 16 bytes at an address: the low nibbles' values and the high nibbles', without their scale."""
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


def decode(b, codes, scale, table):
    """Two vectors of f32 from a block's codes and its scale byte: the even elements and the odd ones."""
    scale = scale_of(b, scale, table)
    return [b.fmul(values, scale) for values in numbers(b, codes)]


FP4 = Blocks(LANES, 1, 4096, decode)


@intrinsic
def _expand_row(typing, w_at, s_at, table_at, n, y, y_at, natural):
    narrow = y.dtype == types.uint16

    def generate(context, b, signature, arguments):
        w_at, s_at, table_at, n, _, y_at, natural = arguments
        i, _, close = loop(b, integer(0), n, 1, [])
        low, high = decode(b, b.add(w_at, b.mul(i, integer(16))), b.add(s_at, i), table_at)
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
