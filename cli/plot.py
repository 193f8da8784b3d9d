"""Plots of a tensor: a histogram of its values and, of a matrix, a map of magnitudes; in the terminal, or in a file by matplotlib."""

import itertools
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, BinaryIO

from ..kernels.errors import ToyllmError
from . import output

if TYPE_CHECKING:
    from pathlib import Path

    from ..models.tensor_stats import Statistics
    from ..models.tensor_values import Values

BINS, MAP_ROWS, WIDTH = 20, 24, 100  # of the terminal's plots; the width where there is no terminal
IMAGE_BINS, IMAGE_CELLS, MOST = 100, 1000, 12  # of the image's
RAMP = " .:-=+*#%@"  # magnitudes from 0 to the largest


def terminal_plot(values: "Values", found: "Statistics") -> Iterator[str]:
    """The lines of a histogram and, of a matrix, of a heat map, as wide as the terminal."""
    from ..models.tensor_stats import histogram

    width = shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else WIDTH
    counts, edges = histogram(values, found, BINS)
    if not len(counts):
        yield "nothing finite to plot"
        return
    ends = [f"{edge:.4g}" for edge in edges.tolist()]
    wide = max(map(len, ends))
    labels = [f"{low:>{wide}} to {high:>{wide}}" for low, high in itertools.pairwise(ends)]
    digits, most = len(f"{counts.max():,}"), int(counts.max())
    room = max(1, width - len(labels[0]) - digits - 4)
    for label, count in zip(labels, counts.tolist(), strict=True):
        yield f"{label}  {count:>{digits},}  {'█' * -(-count * room // most)}".rstrip()
    if len(values.shape) == 2:
        yield ""
        yield from heat_map(values, width)


def heat_map(values: "Values", width: int) -> Iterator[str]:
    """The lines of a map: each character the mean magnitude of a cell of the matrix."""
    import numpy as np

    from ..models.tensor_stats import magnitudes

    cells = magnitudes(values, MAP_ROWS, max(8, width - 2))
    largest = float(np.nanmax(cells))
    step = (len(RAMP) - 1) / largest if 0 < largest < math.inf else 0.0
    for row in cells.tolist():
        yield "|" + "".join(RAMP[round(x * step)] if math.isfinite(x) else "?" for x in row) + "|"
    unknown = "; ? where nothing is finite" if np.isnan(cells).any() else ""
    shape, grid = (" x ".join(map(str, size)) for size in (values.shape, cells.shape))
    yield f"mean |x| of {shape} values in {grid} cells, from 0 to {largest:.4g}: {RAMP!r}{unknown}"


def require_matplotlib() -> None:
    """Raise ToyllmError where matplotlib is not installed: before anything is computed for it."""
    if find_spec("matplotlib") is None:
        raise ToyllmError("plots in files need matplotlib, which is not installed: pip install 'toyllm[plot]'")


def write_image(path: "Path", file: BinaryIO, tensors: "Sequence[tuple[Values, Statistics]]") -> None:
    """An image in the format that `path` ends in: a row for each tensor, histogram and heat map. Raises ToyllmError for too many."""
    require_matplotlib()
    import numpy as np
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    from ..models.tensor_stats import histogram, magnitudes

    if len(tensors) > MOST:
        raise ToyllmError(f"{path}: {len(tensors)} tensors; at most {MOST} are plotted together")
    figure = Figure(figsize=(12, 4 * len(tensors)), layout="constrained")
    grid = figure.subplots(len(tensors), 2, squeeze=False)
    for (values, found), (left, right) in zip(tensors, grid, strict=True):
        counts, edges = histogram(values, found, IMAGE_BINS)
        if len(counts):
            left.stairs(counts, edges, fill=True)
        title = f"{output.one_line(values.name)}  {list(values.shape)}"
        left.set_title(title, parse_math=False)
        left.set_xlabel(f"value ({found.nan} NaN, {found.inf} Inf)")
        left.set_ylabel("count")
        if len(values.shape) != 2 or not values.size:
            right.set_axis_off()
            continue
        rows, columns = values.shape
        cells = np.ma.masked_invalid(magnitudes(values, IMAGE_CELLS, IMAGE_CELLS))
        image = right.imshow(cells, aspect="auto", interpolation="nearest", extent=(0, columns, rows, 0))
        right.set_title("mean magnitude")
        figure.colorbar(image, ax=right)
    figure.savefig(file, format=path.suffix[1:].lower())
