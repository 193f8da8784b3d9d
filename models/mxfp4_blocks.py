"""MXFP4 weights as they are stored: each block of 32 with its scale beside it, the rows of gate and up told apart."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..kernels.fp4 import BLOCK
from .checkpoint import Checkpoint
from .tensor_text import spans
from .tensor_values import Values, mxfp4_parts

GATE_UP = ("gate_up_proj", "mlp1_weight")  # how the names end under which gate and up share a matrix, row by row


@dataclass(frozen=True)
class Block:
    """32 values of one row: row `index`, columns from `first` on."""

    index: tuple[int, ...]
    first: int
    part: str  # "gate 3" or "up 3"; "" of other matrices
    scale: int  # the byte: the factor is 2^(scale - 127), 255 is NaN
    codes: bytes  # 16; value 2 i is the low half of byte i, value 2 i + 1 the high half

    @property
    def factor(self) -> str:
        """The scale as a person reads it."""
        return "NaN" if self.scale == 255 else f"2^{self.scale - 127}"

    def __str__(self) -> str:
        """One line: where, which part, scale, codes."""
        at = ", ".join([*map(str, self.index), f"{self.first}:{self.first + BLOCK}"])
        part = f"{self.part}  " if self.part else ""
        return f"[{at}]  {part}scale 0x{self.scale:02x} {self.factor}  codes {self.codes.hex(' ')}"


def stored_blocks(checkpoint: Checkpoint, values: Values, edge: int | None) -> Iterator[Block | None]:
    """The blocks that hold the values of a decoded MXFP4 weight, in order; None stands where an axis is cut to its `edge` ends."""
    parts = mxfp4_parts(checkpoint, values.name)
    if parts is None or 0 in values.shape:
        return
    blocks, scales = (checkpoint.array(part) for part in parts)
    *rows, columns = (range(axis, axis + 1) if isinstance(axis, int) else axis for axis in values.axes)
    held = range(min(columns[0], columns[-1]) // BLOCK, max(columns[0], columns[-1]) // BLOCK + 1)
    interleaved = values.name.endswith(GATE_UP)
    for at in walk([*rows, held], edge):
        if at is None:
            yield None
            continue
        *index, b = at
        part = f"{'up' if index[-1] % 2 else 'gate'} {index[-1] // 2}" if interleaved and index else ""
        yield Block(tuple(index), b * BLOCK, part, int(scales[at]), blocks[at].tobytes())


def walk(axes: list[range], edge: int | None) -> Iterator[tuple[int, ...] | None]:
    """Every position of these axes in row-major order, each axis cut to its ends; None for what is left out."""
    if not axes:
        yield ()
        return
    first, *rest = axes
    for number, span in enumerate(spans(len(first), edge)):
        if number:
            yield None
        for i in span:
            yield from (None if at is None else (first[i], *at) for at in walk(rest, edge))
