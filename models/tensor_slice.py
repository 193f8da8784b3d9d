"""Slices of tensors as text, `0, :5, -3:`, with NumPy's meaning: resolved to the positions of each axis before anything is read."""

import re
from collections.abc import Sequence

from ..kernels.errors import ToyllmError

Axis = range | int  # the positions of an axis that are taken; an int is one position, and drops the axis

INTEGER = r"[+-]?[0-9]{1,18}"
PART = re.compile(rf"({INTEGER})|({INTEGER})?\s*:\s*({INTEGER})?\s*(?::\s*({INTEGER})?)?")


def resolve_slice(text: str, shape: Sequence[int], name: str) -> tuple[Axis, ...]:
    """The positions that `text` takes of each axis of `shape`; axes that it does not mention are taken whole, as is `...`.

    Slices beyond an axis take what there is, as NumPy's do. Raises ToyllmError, with `name`, the axis and its length, for text that is
    no slice, for more axes than there are, and for an index beyond its axis.
    """
    parts = slice_parts(text, shape, name)
    return tuple(resolve_axis(part, i, n, text, name) for i, (part, n) in enumerate(zip(parts, shape, strict=True)))


def slice_parts(text: str, shape: Sequence[int], name: str) -> list[str]:
    """What `text` says of each axis of `shape`. Raises ToyllmError for more axes than there are."""
    parts = [part.strip() for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if parts[-1] == "":
        parts.pop()  # `0,` is `0`, and nothing is everything
    if parts.count("...") > 1:
        raise ToyllmError(f"--slice {text!r}: expected at most one `...`")
    given = [part for part in parts if part != "..."]
    if len(given) > len(shape):
        raise ToyllmError(f"--slice {text!r}: {len(given)} axes, but {name} has {len(shape)}: shape {list(shape)}")
    first = parts.index("...") if "..." in parts else len(parts)
    parts[first : first + 1] = [":"] * (len(shape) - len(given))
    return parts


def resolve_axis(part: str, axis: int, length: int, text: str, name: str) -> Axis:
    """The positions that one part of a slice takes of an axis."""
    where = f"--slice {text!r}: {part!r} at axis {axis} of {name}, length {length}"
    bounds = parse_part(part, where)
    if isinstance(bounds, int):
        if not -length <= bounds < length:
            raise ToyllmError(f"{where}: expected an index from {-length} to {length - 1}" if length else f"{where}: the axis is empty")
        return bounds % length
    return range(length)[bounds]


def parse_part(part: str, where: str) -> int | slice:
    """The index, or the slice, that one part of a slice is. Raises ToyllmError, which says where, for anything else."""
    found = PART.fullmatch(part)
    if not found:
        raise ToyllmError(f"{where}: expected an index, start:stop, start:stop:step or `...`")
    index, *bounds = (None if bound is None else int(bound) for bound in found.groups())
    if bounds[2] == 0:
        raise ToyllmError(f"{where}: the step cannot be 0")
    return slice(*bounds) if index is None else index
