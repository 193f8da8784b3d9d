"""LLVM vector code for Numba's `@intrinsic`: what the kernels' building blocks are written with.

A vector is always 16 lanes of f32. LLVM lowers it to one zmm register, two ymm or four NEON registers, so the same
text, and the same order of summation, serves every processor. Addresses are integers: nothing here is bounds-checked.
"""

from llvmlite import ir
from numba import types

LANES = 16
PAIRS = 2 * LANES  # values of 16 bits in a vector, of which one instruction multiplies neighbours

i8, i16, i32, i64 = (ir.IntType(n) for n in (8, 16, 32, 64))
f16, f32, void = ir.HalfType(), ir.FloatType(), ir.VoidType()


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, BFloat)

    def __hash__(self):
        return hash(BFloat)


def vector(t, n=LANES):
    return ir.VectorType(t, n)


def splat(t, value, n=LANES):
    return ir.Constant(vector(t, n), [ir.Constant(t, value)] * n)


def integer(value):
    return ir.Constant(i64, value)


def declare(builder, name, result, arguments):
    """The LLVM function `name`, declared once in the module that is being built."""
    return builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def pointer(builder, address, t):
    return builder.inttoptr(address, t.as_pointer())


def fma(builder, a, b, c):
    """A * b + c, rounded once, over vectors."""
    return builder.call(declare(builder, "llvm.fma.v16f32", vector(f32), [vector(f32)] * 3), [a, b, c])


def add_pairs(builder, sums, a, b):
    """Sums of 16 f32 + the products of 16 pairs of bf16 (AVX512_BF16): rounded to nearest even after each product, denormals taken as 0.

    a and b are vectors of 32 x i16.
    """
    kind = vector(BFloat(), PAIRS)
    f = declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", vector(f32), [vector(f32), kind, kind])
    return builder.call(f, [sums, builder.bitcast(a, kind), builder.bitcast(b, kind)])


def broadcast(builder, address):
    """The f32 at `address` in every lane."""
    scalar = builder.load(pointer(builder, address, f32), align=4)
    one = builder.insert_element(ir.Constant(vector(f32), ir.Undefined), scalar, ir.Constant(i32, 0))
    return builder.shuffle_vector(one, one, splat(i32, 0))


def shuffle(builder, a, b, lanes):
    """A vector of the named lanes of a followed by b."""
    return builder.shuffle_vector(a, b, ir.Constant(vector(i32, len(lanes)), [ir.Constant(i32, i) for i in lanes]))


def horizontal_sums(builder, vectors):
    """A vector of the sums over lanes of 1, 2, 4, 8 or 16 vectors; the sums of several cost little more than that of one.

    Each sum is the same tree, halves added to halves, whatever it is computed beside and on whatever processor.
    """
    partials = LANES
    while partials > 1:
        partials //= 2
        pairs = list(zip(vectors[::2], vectors[1::2], strict=True)) if len(vectors) > 1 else [(vectors[0], vectors[0])]
        n = vectors[0].type.count * (2 if len(vectors) > 1 else 1)
        low = [start + i for start in range(0, n, 2 * partials) for i in range(partials)]
        high = [i + partials for i in low]
        vectors = [builder.fadd(shuffle(builder, a, b, low), shuffle(builder, a, b, high)) for a, b in pairs]
    return vectors[0]


def prefetch(builder, address, locality=2):
    """Ask for the cache line at `address`; it may lie anywhere. Locality 2 is the second-level cache."""
    f = declare(builder, "llvm.prefetch.p0", void, [i8.as_pointer(), i32, i32, i32])
    constants = [ir.Constant(i32, n) for n in (0, locality, 1)]
    builder.call(f, [pointer(builder, address, i8), *constants])


def lanes_below(builder, count, lanes=LANES):
    """The mask of the first `count` of `lanes` lanes (i64; as many or more means all)."""
    every = ir.Constant(vector(i64, lanes), [ir.Constant(i64, i) for i in range(lanes)])
    one = builder.insert_element(ir.Constant(vector(i64, lanes), ir.Undefined), count, ir.Constant(i32, 0))
    return builder.icmp_signed("<", every, builder.shuffle_vector(one, one, splat(i32, 0, lanes)))


def load(builder, address, t, mask=None, lanes=LANES):
    """`lanes` values of LLVM type `t` at `address`, of any alignment; lanes outside `mask` are not read and come as zero."""
    if mask is None:
        return builder.load(pointer(builder, address, vector(t, lanes)), align=1)
    name = {i8: "i8", i16: "i16", f16: "f16", f32: "f32"}[t]
    p = vector(t, lanes).as_pointer()
    f = declare(builder, f"llvm.masked.load.v{lanes}{name}.p0", vector(t, lanes), [p, i32, vector(ir.IntType(1), lanes), vector(t, lanes)])
    zero = ir.Constant(vector(t, lanes), None)
    return builder.call(f, [builder.inttoptr(address, p), ir.Constant(i32, 1), mask, zero])


def store(builder, value, address, mask=None):
    """Store a vector of f32 at `address`, of any alignment; lanes outside `mask` (of 16) are left alone."""
    p = value.type.as_pointer()
    if mask is None:
        builder.store(value, builder.inttoptr(address, p), align=1)
    else:
        arguments = [vector(f32), p, i32, vector(ir.IntType(1))]
        f = declare(builder, "llvm.masked.store.v16f32.p0", void, arguments)
        builder.call(f, [value, builder.inttoptr(address, p), ir.Constant(i32, 1), mask])


def storage(array) -> str:
    """The name of an array type's storage format: "f32", "f16", "bf16" or "q8"."""
    if isinstance(array.dtype, types.Record):
        return next(iter(array.dtype.fields))
    return "q8" if array.dtype == types.int8 else "f32"


ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "q8": 1}


def load_weights(builder, address, form, mask=None):
    """16 weights stored as `form`, widened exactly to f32."""
    if form == "f32":
        return load(builder, address, f32, mask)
    if form == "f16":
        return builder.fpext(load(builder, address, f16, mask), vector(f32))
    wide = builder.zext(load(builder, address, i16, mask), vector(i32))
    return builder.bitcast(builder.shl(wide, splat(i32, 16)), vector(f32))


def decode_q8(builder, address, scale_address, masks=(None, None)):
    """Vectors of f32, one a mask, from the integers at one address that share the scale at another; 0 outside the masks. Any alignment."""
    half = builder.load(pointer(builder, scale_address, f16), align=1)
    one = builder.insert_element(ir.Constant(vector(f16), ir.Undefined), half, ir.Constant(i32, 0))
    one = builder.shuffle_vector(one, one, splat(i32, 0))  # of a vector: half as many instructions as of one value
    scale = builder.fpext(one, vector(f32))
    raw = [load(builder, builder.add(address, integer(LANES * n)), i8, mask) for n, mask in enumerate(masks)]
    return [builder.fmul(builder.sitofp(builder.sext(codes, vector(i32)), vector(f32)), scale) for codes in raw]


def loop(builder, start, stop, step, state):
    """Open `for i in range(start, stop, step)` carrying the values `state`; it may run no times.

    Returns (i, carried, close): emit the body, then `close(new)` ends it and returns the values after the last pass.
    """
    before = builder.block
    head, body, after = (builder.append_basic_block(n) for n in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(i64)
    i.add_incoming(start, before)
    carried = [builder.phi(s.type) for s in state]
    for phi, s in zip(carried, state, strict=True):
        phi.add_incoming(s, before)
    builder.cbranch(builder.icmp_signed("<", i, stop), body, after)
    builder.position_at_end(body)

    def close(new):
        i.add_incoming(builder.add(i, integer(step)), builder.block)
        for phi, n in zip(carried, new, strict=True):
            phi.add_incoming(n, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return carried

    return i, carried, close


def once(builder, condition, state, step):
    """The values that `step()` gives in place of the list `state`, where `condition` holds; else those."""
    before = builder.block
    taken, after = (builder.append_basic_block(n) for n in ("taken", "after"))
    builder.cbranch(condition, taken, after)
    builder.position_at_end(taken)
    new, end = step(), builder.block
    builder.branch(after)
    builder.position_at_end(after)
    values = []
    for old, other in zip(state, new, strict=True):
        value = builder.phi(old.type)
        value.add_incoming(old, before)
        value.add_incoming(other, end)
        values.append(value)
    return values
