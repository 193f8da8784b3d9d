"""Register tiles over MXFP4 rows and activations held as two int8: AVX-512 VNNI multiplies bytes and adds four products at once.

A code's value, doubled and 12 more, is an unsigned byte; the 12 are taken off by what each lane of x starts with. Products and their
sums over 8 values are integers, exact; each lane then becomes f32, times the scales of its block.

A step is 4 blocks, 128 values. Of x it is a record of `RECORD` bytes: as int8 the upper halves of the 64 even values, those of the 64
odd ones, the lower halves likewise, 16 i32 to start from, and the 16 f32 by which lanes are scaled. Lane l of a vector is values 8 l to
8 l + 7.
"""

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .fp4 import VALUES
from .ir import broadcast, declare, f32, fma, horizontal_sums, i8, i32, integer, load, loop, once, pointer, prefetch, splat, store, vector

STEP = 4  # blocks
RECORD = 384  # bytes of x a step
EXPANDED = 192  # bytes of w a step, once expanded: 64 even and 64 odd values as bytes, 16 scales as f32
AHEAD = 8192  # bytes of codes before their use that they are asked for
OFFSET = 12  # what makes twice the lowest value 0


def dot_bytes(b, sums, w, x):
    """16 i32 + the sums of four products each, of unsigned bytes w and signed bytes x (AVX512_VNNI)."""
    f = declare(b, "llvm.x86.avx512.vpdpbusd.512", vector(i32), [vector(i32), vector(i8, 64), vector(i8, 64)])
    return b.call(f, [sums, w, x])


def bytes_at(b, address, mask=None):
    """64 bytes at an address; those outside `mask` are not read and come as zero."""
    kind = vector(i8, 64)
    if mask is None:
        return b.load(pointer(b, address, kind), align=1)
    f = declare(b, "llvm.masked.load.v64i8.p0", kind, [kind.as_pointer(), i32, vector(ir.IntType(1), 64), kind])
    return b.call(f, [pointer(b, address, kind), ir.Constant(i32, 1), mask, ir.Constant(kind, None)])


def decode(b, w_at, s_at, mask=None, few=None):
    """A step of stored codes and scales as (even values, odd values, scales of the lanes); `few` masks its 4 scales."""
    raw = bytes_at(b, w_at, mask)
    prefetch(b, b.add(w_at, integer(AHEAD)))
    look_up = declare(b, "llvm.x86.avx512.pshuf.b.512", vector(i8, 64), [vector(i8, 64)] * 2)
    table = ir.Constant(vector(i8, 64), [ir.Constant(i8, int(OFFSET + 2 * s * v)) for s in (1, -1) for v in VALUES] * 4)
    low = splat(i8, 15, 64)
    shifted = b.bitcast(b.lshr(b.bitcast(raw, vector(i32)), splat(i32, 4)), vector(i8, 64))
    even, odd = (b.call(look_up, [table, b.and_(codes, low)]) for codes in (raw, shifted))
    four = vector(i8, 4)
    if few is None:
        scales = b.load(pointer(b, s_at, four), align=1)
    else:
        f = declare(b, "llvm.masked.load.v4i8.p0", four, [four.as_pointer(), i32, vector(ir.IntType(1), 4), four])
        scales = b.call(f, [pointer(b, s_at, four), ir.Constant(i32, 1), few, ir.Constant(four, None)])
    lanes = ir.Constant(vector(i32), [ir.Constant(i32, lane // 4) for lane in range(16)])
    exponents = b.shl(b.zext(b.shuffle_vector(scales, ir.Constant(four, ir.Undefined), lanes), vector(i32)), splat(i32, 23))
    least = splat(i32, 0x00400000)  # 2^-127, which byte 0 means, is subnormal
    power = b.bitcast(b.select(b.icmp_unsigned(">", exponents, least), exponents, least), vector(f32))
    return even, odd, fma(b, power, splat(f32, 0.0), power)  # infinity times 0 makes NaN of byte 255


def partly(b, blocks):
    """Masks of the codes and the scales of a step of which only so many blocks exist."""

    def first(count, lanes):
        bits = b.sub(b.shl(integer(1), count), integer(1))
        kind = ir.IntType(lanes)
        return b.bitcast(bits if lanes == 64 else b.trunc(bits, kind), vector(ir.IntType(1), lanes))

    return first(b.shl(blocks, integer(4)), 64), first(blocks, STEP)


@cache
def split_tile(outputs: int, tokens: int, expanded: bool = False) -> Any:
    """The intrinsic for `outputs` rows of w, as stored or as `expand_split` writes them, and `tokens` rows of x.

    tile(w_at, w_stride, s_at, s_stride, x_at, x_stride, lift_at, n, y_at, y_stride): addresses of codes and scales (none where expanded),
    of x's records, of the f32 that a row of x is multiplied with in the end, and of the outputs, with their bytes from row to row; n blocks
    a row.
    """

    @intrinsic
    def tile(typing, w_at, w_stride, s_at, s_stride, x_at, x_stride, lift_at, n, y_at, y_stride):
        def generate(context, b, signature, arguments):
            w_at, w_stride, s_at, s_stride, x_at, x_stride, lift_at, n, y_at, y_stride = arguments
            rows = [b.add(w_at, b.mul(w_stride, integer(j))) for j in range(outputs)]
            scales = [b.add(s_at, b.mul(s_stride, integer(j))) for j in range(outputs)]
            inputs = [b.add(x_at, b.mul(x_stride, integer(m))) for m in range(tokens)]

            def weights(j, i, masks):
                if not expanded:
                    return decode(b, b.add(rows[j], b.mul(i, integer(16))), b.add(scales[j], i), *masks)
                at = b.add(rows[j], b.mul(i, integer(EXPANDED // STEP)))
                return bytes_at(b, at), bytes_at(b, b.add(at, integer(64))), load(b, b.add(at, integer(128)), f32)

            def step(i, sums, masks=(None, None)):
                w = [weights(j, i, masks) for j in range(outputs)]
                new = list(sums)
                for m, row in enumerate(inputs):
                    at = b.add(row, b.mul(i, integer(RECORD // STEP)))
                    upper_even, upper_odd, lower_even, lower_odd = (bytes_at(b, b.add(at, integer(64 * part))) for part in range(4))
                    start = b.bitcast(bytes_at(b, b.add(at, integer(256))), vector(i32))
                    scale = load(b, b.add(at, integer(320)), f32)
                    for j, (even, odd, power) in enumerate(w):
                        upper = dot_bytes(b, dot_bytes(b, splat(i32, 0), even, upper_even), odd, upper_odd)
                        whole = b.add(b.shl(upper, splat(i32, 8)), start)
                        whole = dot_bytes(b, dot_bytes(b, whole, even, lower_even), odd, lower_odd)
                        products = b.fmul(b.sitofp(whole, vector(f32)), scale)  # power times scale might be subnormal
                        new[j * tokens + m] = fma(b, products, power, new[j * tokens + m])
                return new

            none = [splat(f32, 0.0)] * (outputs * tokens)
            if expanded:  # to whole steps
                i, sums, close = loop(b, integer(0), n, STEP, none)
                sums = close(step(i, sums))
            else:
                whole = b.and_(n, integer(-STEP))
                i, sums, close = loop(b, integer(0), whole, STEP, none)
                sums = close(step(i, sums))
                sums = once(b, b.icmp_signed("<", whole, n), sums, lambda: step(whole, sums, partly(b, b.sub(n, whole))))
            for m in range(tokens):
                totals = horizontal_sums(b, sums[m::tokens])
                lift = broadcast(b, b.add(lift_at, integer(4 * m)))
                lift = b.shuffle_vector(lift, lift, ir.Constant(vector(i32, outputs), [ir.Constant(i32, 0)] * outputs))
                store(b, b.fmul(totals, lift), b.add(y_at, b.mul(y_stride, integer(m))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return tile


@intrinsic
def _expand_split(typing, w_at, s_at, n, to):
    def generate(context, b, signature, arguments):
        w_at, s_at, n, to = arguments

        def step(i, masks=(None, None)):
            at = b.add(to, b.mul(i, integer(EXPANDED // STEP)))
            for part, value in enumerate(decode(b, b.add(w_at, b.mul(i, integer(16))), b.add(s_at, i), *masks)):
                b.store(value, pointer(b, b.add(at, integer(64 * part)), value.type), align=1)

        whole = b.and_(n, integer(-STEP))
        i, _, close = loop(b, integer(0), whole, STEP, [])
        step(i)
        close([])
        with b.if_then(b.icmp_signed("<", whole, n)):
            step(whole, partly(b, b.sub(n, whole)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


# expand_split(w_at, s_at, n, to): a row of n blocks, to EXPANDED bytes for every 4 blocks or fewer
expand_split: Any = _expand_split
