"""The register tile over rows whose values share a scale in blocks of 32, whatever a block is made of."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from numba import types
from numba.extending import intrinsic

from .ir import LANES, f32, fma, horizontal_sums, integer, load, loop, prefetch, splat, store


class Blocks(NamedTuple):
    """A storage format in blocks of 32 values."""

    codes: int  # bytes of codes a block
    scale: int  # bytes of its scale, which lie apart
    ahead: int  # bytes of codes before their use that they are asked for
    decode: Callable  # (builder, address of codes, of the scale, of a table): the values, two vectors of f32


@cache
def blocks_tile(form: Blocks, outputs: int, tokens: int = 1) -> Any:
    """The intrinsic for `outputs` rows of w and `tokens` rows of x, whose blocks have their values in the order in which they are decoded.

    tile(w_at, w_stride, s_at, s_stride, table_at, x_at, x_stride, n, y_at, y_stride): addresses of codes and scales, of the table that
    decoding needs, if it does, of x and of the outputs, with their bytes from row to row; n blocks a row.
    """

    @intrinsic
    def tile(typing, w_at, w_stride, s_at, s_stride, table_at, x_at, x_stride, n, y_at, y_stride):
        def generate(context, b, signature, arguments):
            w_at, w_stride, s_at, s_stride, table_at, x_at, x_stride, n, y_at, y_stride = arguments
            rows = [b.add(w_at, b.mul(w_stride, integer(j))) for j in range(outputs)]
            scales = [b.add(s_at, b.mul(s_stride, integer(j))) for j in range(outputs)]
            inputs = [b.add(x_at, b.mul(x_stride, integer(m))) for m in range(tokens)]
            i, sums, close = loop(b, integer(0), n, 1, [splat(f32, 0.0)] * (outputs * tokens))
            x = [b.add(at, b.mul(i, integer(8 * LANES))) for at in inputs]
            halves = [(load(b, at, f32), load(b, b.add(at, integer(4 * LANES)), f32)) for at in x]
            new = []
            for j, (row, scale_row) in enumerate(zip(rows, scales, strict=True)):
                at = b.add(row, b.mul(i, integer(form.codes)))
                prefetch(b, b.add(at, integer(form.ahead)))
                low, high = form.decode(b, at, b.add(scale_row, b.mul(i, integer(form.scale))), table_at)
                for m, (first, second) in enumerate(halves):
                    new.append(fma(b, high, second, fma(b, low, first, sums[j * tokens + m])))
            sums = close(new)
            for m in range(tokens):
                store(b, horizontal_sums(b, sums[m::tokens]), b.add(y_at, b.mul(y_stride, integer(m))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return tile
