"""How `dump-tensor` shows what it has found: lists, values, tables of statistics, plots, files; as text or as one JSON document."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.mxfp4_blocks import GATE_UP, stored_blocks
from ..models.tensor_json import describe, describe_statistics, describe_values, json_numbers
from ..models.tensor_save import save as write_tensors
from ..models.tensor_stats import Statistics, statistics
from ..models.tensor_text import Layout, format_values, hexadecimal, texts
from ..models.tensor_values import MXFP4, Values
from ..models.whole import whole_file
from . import output
from .plot import terminal_plot, write_image

if TYPE_CHECKING:
    from ..models.checkpoint import Checkpoint

BATCH = 2**16  # characters written at a time


def show_list(tensors: Sequence[Values], checkpoint: "Checkpoint | None", json: bool, said: dict[str, Any]) -> None:
    """A row a tensor; of weights with the file each is in. Decoded MXFP4 weights are no bytes of their own. JSON begins with `said`."""
    stored = checkpoint.tensors if checkpoint else {}
    shards = {name: tensor.path.name for name, tensor in stored.items()}
    if json:
        shard_of = [{"shard": shards.get(values.name)} if checkpoint else {} for values in tensors]
        output.write_json("dump-tensor", said | {"tensors": [describe(v) | shard for v, shard in zip(tensors, shard_of, strict=True)]})
        return
    rows = []
    for values in tensors:
        decoded = checkpoint is not None and values.name not in stored
        row = (values.name, values.kind, str(list(values.whole)), "(decoded)" if decoded else f"{values.nbytes:,}")
        rows.append((*row, shards.get(values.name, "")) if checkpoint else row)
    output.table(("name", "dtype", "shape", "bytes", *(["shard"] if checkpoint else [])), rows, right=(3,))
    if checkpoint:
        total = sum(values.nbytes for values in tensors if values.name in stored)
        output.say(f"{sum(values.name in stored for values in tensors):,} tensors, {total:,} bytes")


def show_values(
    tensors: Sequence[Values],
    checkpoint: "Checkpoint | None",
    settings: dict[str, Any],
    slices: str | None,
    *,
    raw: bool,
    header: bool,
    json: bool,
    said: dict[str, Any],
) -> None:
    """The values, cut to the ends of their axes where there are many, each tensor under a line of facts."""
    threshold = None if settings["full"] else settings["threshold"]
    layout = Layout(settings["edge_items"], settings["precision"], threshold, settings["scientific"])
    if json:
        output.write_json("dump-tensor", said | {"tensors": [document(values, checkpoint, layout, raw) for values in tensors]})
        return
    for number, values in enumerate(tensors):
        output.write("\n" if number else "")
        if header:
            output.write(facts(values, statistics(values), slices) + "\n")
        write_batches(raw_text(values, checkpoint, layout) if raw else format_values(values, texts(layout), layout.edge(values)))


def document(values: Values, checkpoint: "Checkpoint | None", layout: Layout, raw: bool) -> dict[str, Any]:
    """One tensor as the JSON document has it: facts, statistics of what is selected, and its values, bits or blocks."""
    entry = describe(values) | {"statistics": describe_statistics(statistics(values))}
    edge = layout.edge(values)
    if raw and checkpoint and values.kind == MXFP4:
        blocks = [block and vars(block) | {"codes": block.codes.hex()} for block in stored_blocks(checkpoint, values, edge)]
        return entry | {"selected": list(values.shape), "blocks": blocks}
    return entry | describe_values(values, hexadecimal if raw else json_numbers, edge)


def raw_text(values: Values, checkpoint: "Checkpoint | None", layout: Layout) -> Iterator[str]:
    """The bits of a tensor, or its MXFP4 blocks, a line each."""
    edge = layout.edge(values)
    if checkpoint and values.kind == MXFP4:
        lines = ("..." if block is None else str(block) for block in stored_blocks(checkpoint, values, edge))
        return ("\n" * bool(number) + line for number, line in enumerate(lines))
    return format_values(values, hexadecimal, edge)


def facts(values: Values, found: Statistics, slices: str | None) -> str:
    """One line: name, dtype, shape, bytes and, of the selected part, the statistics."""
    parts = [f"{output.one_line(values.name)}  {values.kind} {list(values.whole)}, {values.nbytes:,} bytes"]
    if values.kind == MXFP4 and values.name.endswith(GATE_UP):
        parts.append("rows 2 i are gate, 2 i + 1 up")
    if slices is not None:
        parts.append(f"slice [{output.one_line(slices.strip().strip('[]'))}] of shape {list(values.shape)}")
    return "; ".join([*parts, " ".join(f"{name} {text}" for name, text in summary(found))])


def summary(found: Statistics) -> list[tuple[str, str]]:
    """The statistics as a person reads them."""

    def brief(value: float | None) -> str:
        return "-" if value is None else f"{value:.6g}"

    share = "-" if found.zeros is None else f"{100 * found.zeros:.3g} %"
    numbers = [(name, brief(getattr(found, name))) for name in ("min", "max", "mean", "std")]
    return [*numbers, ("zeros", share), ("NaN", f"{found.nan:,}"), ("Inf", f"{found.inf:,}")]


def show_statistics(tensors: Sequence[Values], json: bool, said: dict[str, Any]) -> None:
    """A row a tensor, with a bar on stderr while many bytes are read."""
    found = []
    total = sum(values.size * values.dtype.itemsize for values in tensors)
    with output.byte_bar("reading") as progress:
        done = 0
        for values in tensors:
            found.append(statistics(values))
            done += values.size * values.dtype.itemsize
            progress(done, total)
    if json:
        entries = [
            describe(values) | {"selected": list(values.shape), "statistics": describe_statistics(of)}
            for values, of in zip(tensors, found, strict=True)
        ]
        output.write_json("dump-tensor", said | {"tensors": entries})
        return
    rows = [(v.name, v.kind, str(list(v.shape)), *(text for _, text in summary(of))) for v, of in zip(tensors, found, strict=True)]
    output.table(("name", "dtype", "shape", "min", "max", "mean", "std", "zeros", "NaN", "Inf"), rows, right=range(3, 10))


def show_plots(tensors: Sequence[Values], slices: str | None, header: bool) -> None:
    """A histogram and, of a matrix, a heat map of each tensor."""
    for number, values in enumerate(tensors):
        found = statistics(values)
        output.write("\n" if number else "")
        if header:
            output.write(facts(values, found, slices) + "\n")
        output.write("".join(line + "\n" for line in terminal_plot(values, found)))


def save(path: Path, tensors: Sequence[Values], force: bool) -> None:
    """Write the tensors to a file, and say so."""
    write_tensors(path, tensors, force)
    output.say(f"wrote {output.one_line(str(path))}: {len(tensors)} {'tensor' if len(tensors) == 1 else 'tensors'}")


def save_image(path: Path, tensors: Sequence[Values], force: bool) -> None:
    """Write their plots to an image file, and say so."""
    found = [(values, statistics(values)) for values in tensors]
    with whole_file(path, force) as file:
        write_image(path, file, found)
    output.say(f"wrote {output.one_line(str(path))}")


def write_batches(pieces: Iterable[str]) -> None:
    """Text in small pieces to stdout, in larger ones, ended by a line break."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size > BATCH:
            output.write("".join(batch))
            batch, size = [], 0
    output.write("".join(batch) + "\n")
