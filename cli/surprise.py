"""How a scored text is shown: in the colours of its surprise, or as a row a token."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from . import output
from .tokenize import literal

if TYPE_CHECKING:
    from ..models.score import Token
    from ..models.tokenizer import Tokenizer

STEP = 2  # bits of surprise from one colour to the next
STYLES = ("", *(f"38;5;16;48;5;{colour}" for colour in (145, 180, 214, 208)), "38;5;231;48;5;160")  # from grey to red: on dark and light
UNSCORED = "2"
NATS_A_BIT = 0.6931471805599453
MARKS = {"\n": "↵\n", "\t": "⇥\t"}  # what would not show its colour
NUMBERS = {"number": 7, "id": 7, "piece": 18, "logprob": 11, "rank": 7, "entropy": 8}  # columns and their widths on a terminal
COMPARED = {"against_logprob": 15, "kl": 10}


def style(bits: float | None) -> str:
    """The colour of a surprise; None is a token that has none."""
    return UNSCORED if bits is None else STYLES[min(int(max(bits, 0) // STEP), len(STYLES) - 1)]


def painted(text: str, bits: float | None) -> str:
    """Text in the colour of its surprise, safe for a terminal."""
    look = style(bits)
    pieces = ((MARKS.get(c) or c) for c in output.printable(text))
    lines = "".join(pieces).split("\n")
    return "\n".join(f"\x1b[{look}m{line}\x1b[0m" if line and look else line for line in lines)


def legend() -> str:
    """What the colours mean."""
    edges = range(0, STEP * len(STYLES), STEP)
    names = [f"{low}-{low + STEP}" if low < edges[-1] else f"{low}+" for low in edges]
    cells = [painted(f" {name} ", low) for name, low in zip(names, edges, strict=True)]
    return "surprise in bits: " + "".join(cells) + "  " + painted("unscored", None)


def coloured(tokenizer: "Tokenizer | None", batches: "Iterable[list[Token]]") -> Iterator[str]:
    """The text as it is scored; ids where there is no tokenizer. A character that several tokens spell has the surprise of all."""
    stream = tokenizer.stream() if tokenizer else None
    waiting: float | None = 0.0

    def paint(token: "Token") -> str:
        nonlocal waiting
        waiting = None if waiting is None or token.logprob is None else waiting - token.logprob / NATS_A_BIT
        text = stream.push(token.id) if stream else f"{token.id} "
        if not text:
            return ""
        bits, waiting = waiting, 0.0
        return painted(text, bits)

    ended = False
    for count, batch in enumerate(batches):
        text = "".join(map(paint, batch))
        ended = text.endswith("\n") if text else ended
        yield text if count else f"{legend()}\n\n{text}"
    rest = painted(stream.finish(), waiting) if stream else ""
    yield rest + ("\n" if rest or not ended else "") + "\n"


def rows(tokenizer: "Tokenizer | None", batches: "Iterable[list[Token]]", compared: bool, top: int) -> Iterator[str]:
    """A line a token under a header: tab-separated; on a terminal in columns. Nothing stands where a token has no score."""
    widths = NUMBERS | (COMPARED if compared else {})
    for n in range(1, top + 1):
        widths |= {f"top_{n}": NUMBERS["piece"], f"logprob_{n}": NUMBERS["logprob"]}
    line = aligned(widths) if sys.stdout.isatty() else "\t".join
    piece = pieces(tokenizer)

    def cells(token: "Token") -> list[str]:
        numbers = (number(token.logprob, ".6f"), number(token.rank, "d"), number(token.entropy, ".4f"))
        others = (number(token.against_logprob, ".6f"), number(token.kl, ".4g")) if compared else ()
        likeliest = [cell for i, p in token.top for cell in (piece(i), number(p, ".6f"))] if token.top else [""] * (2 * top)
        return [str(token.number), str(token.id), piece(token.id), *numbers, *others, *likeliest]

    for count, batch in enumerate(batches):
        header = "" if count else line(list(widths)) + "\n"
        yield header + "".join(output.printable(line(cells(token))) + "\n" for token in batch)


def number(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)


def aligned(widths: dict[str, int]) -> Callable[[list[str]], str]:
    """Cells in columns of these widths, pieces to the left and numbers to the right."""

    def line(cells: list[str]) -> str:
        parts = []
        for (name, width), cell in zip(widths.items(), cells, strict=True):
            space = " " * (width - output.display_width(cell))
            parts.append(cell + space if name == "piece" or name.startswith("top") else space + cell)
        return "  ".join(parts).rstrip()

    return line


def pieces(tokenizer: "Tokenizer | None") -> Callable[[int], str]:
    """A token as a Python literal; nothing without a tokenizer."""
    known: dict[int, str] = {}

    def piece(token: int) -> str:
        if token not in known:
            known[token] = literal(tokenizer.token_bytes(token)) if tokenizer else ""
        return known[token]

    return piece
