"""How `toyllm card` shows cards: as text, coloured on a terminal, and with what they cost."""

import re
import sys
from typing import TYPE_CHECKING

from ..cards.text import RULE, render
from . import output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..cards.cost import Filled
    from ..cards.structure import Card

BOLD, DIM, GREEN, MAGENTA, CYAN = "1", "2", "32", "35", "36"
STEP = re.compile(r"(\s*\d+: )(\s*)(.*)")
MARGIN = re.compile(r"(\S+(?: \S+)*)(\s*)(.*)")
OPENING = re.compile(r"(for|if|else if|else|end for|end if|return)\b")
CLOSING = re.compile(r" (do|then)$")
DECLARED = re.compile(r"(\s*(?:\w+:)?)(\s*)(.*?)((?:\s{3}\(.*)?(?:\s*\[[^\[\]]*\])?)")


def show_text(cards: "Sequence[Card]", model: "Filled | None") -> None:
    """Cards as text: the first, a rule, and the others; each with what it costs, and a model with how these add up."""
    text = text_of(cards, model)
    if output.colours(sys.stdout):
        text = "".join(coloured(line) for line in text.splitlines(keepends=True))
    output.write(text)


def text_of(cards: "Sequence[Card]", model: "Filled | None") -> str:
    """What `show_text` shows, without colours."""
    first, *others = (output.printable(render(card)) + cost_text(card, model) for card in cards)
    sums = [sums_text(model)] if model and others and cards[0].name == model.family else []
    return "\n".join([first, *([RULE + "\n"] if others else []), *others, *sums])


def cost_text(card: "Card", model: "Filled | None") -> str:
    """The remarks at the end of a card of a model."""
    if model is None:
        return ""
    from ..cards.cost import cost_lines

    return "".join(line + "\n" for line in cost_lines(card, model))


def sums_text(model: "Filled") -> str:
    """What each card adds to the model, and the sum of it."""
    from ..cards.cost import shares, total

    header = ("card", "times", "parameters", "FLOPs", "bytes of weights", "of cache")
    rows = [(name, str(times), one) for name, (times, one) in shares(model).items()]
    rows.append(("total", "", total(model)))
    cells = [(name, times, *(f"{n:,}" for n in (c.parameters, c.flops, c.weight_bytes, c.cache_bytes))) for name, times, c in rows]
    lines = output.table_lines(header, cells, right=range(1, 6))
    rule = f"─── a token at position {model.position:,} ".ljust(72, "─")
    return "\n".join([rule, "", *(f"# {line}" for line in lines), ""])


FORMATS = {"text": show_text}  # what --format may be

# ---- colours ----------------------------------------------------------------------------------------------------------------


def painted(text: str, *codes: str) -> str:
    """A text in colours."""
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if text.strip() else text


def coloured(line: str) -> str:
    """A line of a card in colours: keywords, shapes, notes, labels."""
    body = line.rstrip("\n")
    end = line[len(body) :]
    if body.startswith(("#", "───")):
        return painted(body, DIM) + end
    if body.startswith("Algorithm:"):
        return painted(body, BOLD) + end
    if step := STEP.fullmatch(body):
        return painted(step[1], DIM) + step[2] + coloured_step(step[3]) + end
    if declared := DECLARED.fullmatch(body):
        return painted(declared[1], CYAN) + declared[2] + declared[3] + painted(declared[4], DIM) + end
    return line


def coloured_step(text: str) -> str:
    """A step, without its number."""
    if text.startswith("▷"):
        return painted(text, GREEN)
    found = MARGIN.fullmatch(text)
    if not found:
        return text
    body, gap, margin = found.groups()
    body = OPENING.sub(lambda word: painted(word[0], MAGENTA), body, count=1) if OPENING.match(body) else body
    body = CLOSING.sub(lambda word: " " + painted(word[1], MAGENTA), body)
    shapes, sign, note = margin.partition("▷")
    return body + gap + painted(shapes, CYAN) + painted(sign + note, GREEN)
