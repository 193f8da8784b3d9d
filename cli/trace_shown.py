"""A trace as tables: a row a token, head or expert, a column a layer; in colour and as wide as the terminal, or whole off one."""

import logging
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from . import output

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..models.model import Model
    from ..models.tokenizer import Tokenizer
    from ..models.trace import Layer, Routing, Trace

log = logging.getLogger("toyllm")
GLYPHS = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})
BLUES = ("", *(f"38;5;16;48;5;{colour}" for colour in (189, 153, 117, 75)), "38;5;231;48;5;26")  # from none to full: on dark and light
STEPS = (0.1, 0.3, 0.5, 0.7, 0.9)  # probabilities at which the next colour begins
BOLD, DIM = "1", "2"
WIDE, NARROW, PIECE, SHORT = 100, 60, 9, 6  # terminals, and the columns of a piece on wide and on narrower ones
GAP, BAR = 2, 8  # columns between two others, and of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"


class Cell(NamedTuple):
    """What stands in a table, and its colour."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A column of cells under each layer's name, and one for the rows' own names."""

    title: str
    rows: list[str]
    columns: dict[str, list[Cell]]
    corner: str = "token"


def show_tables(loaded: "Model", found: "Trace", sections: Sequence[str], wrap: bool) -> None:
    """Write the tables of these sections; where layers do not fit, `wrap` puts the rest below, else some are left out, with a note."""
    terminal, coloured = sys.stdout.isatty(), output.colours(sys.stdout)
    width = shutil.get_terminal_size((80, 24)).columns if terminal else None
    piece = None if width is None else PIECE if width >= WIDE else SHORT
    shown, left_out = [], False
    for table in (table for section in sections for table in TABLES[section](loaded.tokenizer, found, piece)):
        blocks = [table] if width is None else wrapped(table, width) if wrap else [chosen(table, width)]
        left_out |= sum(len(block.columns) for block in blocks) < len(table.columns)
        shown += blocks
    for number, table in enumerate(shown):
        output.write(("\n" if number else "") + "".join(f"{line}\n" for line in lines(table, coloured)))
    if left_out:
        log.info("not all layers fit in %d columns; --layers names those to show", width)
    if "routing" in sections and not any(layer.routing for layer in found.layers) and len(sections) == 1:
        log.info("%s has no experts: nothing is routed", loaded.files.name)


# ---- what the tables hold ---------------------------------------------------------------------------------------------------


def lens_tables(tokenizer: "Tokenizer | None", found: "Trace", piece: int | None) -> "Iterator[Table]":
    """What the model would say next if it stopped behind each layer."""
    following = [*found.ids[1:], -1]

    def cells(layer: "Layer") -> "Iterator[Cell]":
        likeliest = zip(layer.lens.ids[:, 0].tolist(), layer.lens.probabilities[:, 0].tolist(), following, strict=True)
        rows = [(cut(glyphs(tokenizer, i), piece), p, i == after) for i, p, after in likeliest]
        wide = max(output.display_width(text) for text, _, _ in rows)
        for text, p, hit in rows:
            space = " " * (wide - output.display_width(text))
            yield Cell(f"{text}{space} {whole_percent(p):>3}{'*' if hit else ' '}", BLUES[sum(p >= step for step in STEPS)])

    title = "lens: what would come next if the model stopped behind a layer, in percent; * is what does come"
    yield Table(title, labels(tokenizer, found, piece), {str(layer.number): list(cells(layer)) for layer in found.layers})


def norm_tables(tokenizer: "Tokenizer | None", found: "Trace", piece: int | None) -> "Iterator[Table]":
    """How long the residual stream is."""
    columns = {"embed": [Cell(figure(x)) for x in found.embed]}
    for layer in found.layers:
        columns[str(layer.number)] = paired(map(figure, layer.resid_mid), map(figure, layer.out))
    yield Table(
        "norms of the residual stream: where it enters, then behind attention and behind all of each layer",
        labels(tokenizer, found, piece),
        columns,
    )


def attention_tables(tokenizer: "Tokenizer | None", found: "Trace", piece: int | None) -> "Iterator[Table]":
    """How spread attention is, by token and by head, and what goes to the sink."""
    has_sinks = any(layer.sink is not None for layer in found.layers)
    means = "entropy in nats" + (", and percent that goes to the sink" if has_sinks else "")
    yield Table(
        f"attention of each token: {means}, mean of a layer's heads",
        [*labels(tokenizer, found, piece), "mean"],
        {str(layer.number): attention_cells(layer, 0) for layer in found.layers},
    )
    yield Table(
        f"attention of each head: {means}, mean of all tokens",
        [str(h) for h in range(len(found.layers[0].entropy))] + ["mean"],
        {str(layer.number): attention_cells(layer, 1) for layer in found.layers},
        "head",
    )


def attention_cells(layer: "Layer", axis: int) -> list[Cell]:
    """Means over heads (axis 0) or tokens (axis 1), and of all, of entropy and, where there is one, of the sink's share."""
    entropies = [f"{x:.2f}" for x in (*layer.entropy.mean(axis), layer.entropy.mean())]
    if layer.sink is None:
        return [Cell(text) for text in entropies]
    return paired(entropies, (f"{whole_percent(x)}" for x in (*layer.sink.mean(axis), layer.sink.mean())))


def routing_tables(tokenizer: "Tokenizer | None", found: "Trace", piece: int | None) -> "Iterator[Table]":
    """Where each token goes, and how loaded each expert is; nothing for a model without experts."""
    routed = {str(layer.number): layer.routing for layer in found.layers if layer.routing}
    if not routed:
        return
    yield Table(
        "routing: the experts of each token, by weight in percent",
        labels(tokenizer, found, piece),
        {number: route_cells(routing) for number, routing in routed.items()},
    )
    first = next(iter(routed.values()))
    most = max(float(routing.shares.max()) for routing in routed.values()) or 1.0
    yield Table(
        f"load: tokens of each expert, {first.counts.mean():.4g} if all were loaded alike",
        [*map(str, range(len(first.counts))), "max/mean"],
        {number: load_cells(routing, most) for number, routing in routed.items()},
        "expert",
    )


def route_cells(routing: "Routing") -> list[Cell]:
    """Experts with their weights, largest first."""
    rows = zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)
    pairs = [[f"{e}:{whole_percent(w)}" for e, w in zip(experts, weights, strict=True)] for experts, weights in rows]
    wide = max(len(text) for row in pairs for text in row)
    return [Cell(" ".join(f"{text:<{wide}}" for text in row)) for row in pairs]


def load_cells(routing: "Routing", most: float) -> list[Cell]:
    """Counts with bars, the largest share of any layer as long as they get; and at the end how uneven it is."""
    digits = len(str(routing.counts.max()))
    rows = zip(routing.counts.tolist(), routing.shares.tolist(), strict=True)
    return [*(Cell(f"{count:>{digits}} {bar(share / most):<{BAR}}") for count, share in rows), Cell(f"{routing.imbalance:.2f}")]


TABLES = {"lens": lens_tables, "norms": norm_tables, "attention": attention_tables, "routing": routing_tables}


# ---- cells ------------------------------------------------------------------------------------------------------------------


def glyphs(tokenizer: "Tokenizer | None", token: int) -> str:
    """A token as one visible word: a space is ·, a line break ↵; its id without a tokenizer; NaN for -1."""
    if token < 0 or tokenizer is None:
        return "NaN" if token < 0 else str(token)
    data = tokenizer.token_bytes(token)
    try:
        return output.one_line(data.decode("utf-8").translate(GLYPHS))
    except UnicodeDecodeError:
        return "".join(chr(byte) if 0x20 < byte < 0x7F else f"\\x{byte:02x}" for byte in data)


def labels(tokenizer: "Tokenizer | None", found: "Trace", piece: int | None) -> list[str]:
    """The prompt's tokens, numbered."""
    digits = len(str(len(found.ids) - 1))
    return [f"{n:>{digits}} {cut(glyphs(tokenizer, i), piece)}" for n, i in enumerate(found.ids)]


def cut(text: str, width: int | None) -> str:
    """Text in so many columns, … where something is left out."""
    if width is None or output.display_width(text) <= width:
        return text
    while output.display_width(text) > width - 1:
        text = text[:-1]
    return text + "…"


def paired(left: "Iterable[str]", right: "Iterable[str]") -> list[Cell]:
    """Two columns as one."""
    rows = list(zip(left, right, strict=True))
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [Cell(f"{a:>{first}} {b:>{second}}") for a, b in rows]


def figure(x: float) -> str:
    """Three digits, four where there are as many before the point."""
    return f"{x:.4g}" if abs(x) >= 1000 else f"{x:#.3g}".rstrip(".")


def whole_percent(share: float) -> str:
    """A share in whole percent; NaN as it is."""
    return "NaN" if math.isnan(share) else f"{100 * share:.0f}"


def bar(share: float) -> str:
    """A bar of a share of the longest one, in eighths of a column; what is not nothing shows."""
    eighths = max(round(share * BAR * 8), int(share > 0))
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


# ---- tables on a screen -----------------------------------------------------------------------------------------------------


def widths(table: Table) -> list[int]:
    """Of each column, what its cells and its name take."""
    return [max(output.display_width(text) for text in (name, *(cell.text for cell in cells))) for name, cells in table.columns.items()]


def room(table: Table, width: int) -> int:
    """What the rows' names leave of a line."""
    return width - max(map(output.display_width, (table.corner, *table.rows)))


def chosen(table: Table, width: int) -> Table:
    """The table with as many of its columns as fit on a line, evenly apart, the last among them."""
    names, needed = list(table.columns), widths(table)
    for n in range(len(names), 1, -1):
        kept = [round(i * (len(names) - 1) / (n - 1)) for i in range(n)]
        if sum(needed[i] + GAP for i in kept) <= room(table, width):
            return replace(table, columns={names[i]: table.columns[names[i]] for i in kept})
    return replace(table, columns={names[-1]: table.columns[names[-1]]})


def wrapped(table: Table, width: int) -> list[Table]:
    """The table as several, each with as many columns as fit on a line."""
    blocks: list[dict[str, list[Cell]]] = [{}]
    left = room(table, width)
    for (name, cells), needed in zip(table.columns.items(), widths(table), strict=True):
        if blocks[-1] and needed + GAP > left:
            blocks.append({})
            left = room(table, width)
        blocks[-1][name] = cells
        left -= needed + GAP
    return [replace(table, columns=columns) for columns in blocks]


def lines(table: Table, coloured: bool) -> list[str]:
    """A title, the names of the columns, and the rows."""
    needed = widths(table)
    first = max(map(output.display_width, (table.corner, *table.rows)))
    gap = " " * GAP

    def painted(text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if coloured and style else text

    def padded(text: str, width: int) -> str:
        return text + " " * (width - output.display_width(text))

    header = gap.join([padded(table.corner, first), *(padded(name, n) for name, n in zip(table.columns, needed, strict=True))])
    found = [painted(table.title, BOLD), painted(header.rstrip(), DIM)]
    for label, *cells in zip(table.rows, *table.columns.values(), strict=True):
        row = [padded(label, first), *(painted(padded(cell.text, n), cell.style) for cell, n in zip(cells, needed, strict=True))]
        found.append(gap.join(row).rstrip())
    return found
