"""How `toyllm card` shows cards, and what they cost: as text, coloured on a terminal, as Markdown, LaTeX or JSON."""

import re
import sys
from typing import TYPE_CHECKING, Any

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
    """Cards as text: the first, a rule, and the others; each with what it costs, and a model in full with how these add up."""
    text = text_of(cards, model)
    if output.colours(sys.stdout):
        text = "".join(coloured(line) for line in text.splitlines(keepends=True))
    output.write(text)


def text_of(cards: "Sequence[Card]", model: "Filled | None") -> str:
    """What `show_text` shows, without colours. Costs are remarks behind a `#`: whoever reads the text as cards passes over them."""
    costs = remarks(cards, model)
    first, *others = (output.printable(render(card)) + "".join(f"# {line}\n" for line in costs.get(card.name, ())) for card in cards)
    sums = [sums_text(model)] if model and others and cards[0].name == model.family else []
    return "\n".join([first, *([RULE + "\n"] if others else []), *others, *sums])


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


def show_markdown(cards: "Sequence[Card]", model: "Filled | None") -> None:
    """Cards as Markdown, each with what it costs."""
    from ..cards.notation import render_markdown

    output.write(output.printable(render_markdown(cards, remarks(cards, model))))


def show_latex(cards: "Sequence[Card]", model: "Filled | None") -> None:
    """Cards as a LaTeX document, each with what it costs."""
    from ..cards.latex import render_latex

    output.write(output.printable(render_latex(cards, remarks(cards, model))))


def show_json(cards: "Sequence[Card]", model: "Filled | None") -> None:
    """Cards as one JSON document, each as `cards.notation.from_json` reads it back; what they cost is beside them, by name."""
    from ..cards.notation import to_json

    document: dict[str, Any] = {"cards": [to_json(card) for card in cards]}
    if model:
        from ..cards.cost import costs, total

        document["position"] = model.position
        document["costs"] = {c.name: [{"layers": n, **vars(one)} for one, n in costs(c.name, model).items()] for c in cards}
        document["total"] = vars(total(model))
    output.write_json("card", document)


def remarks(cards: "Sequence[Card]", model: "Filled | None") -> dict[str, list[str]]:
    """What cards of a model cost, in words, by their names."""
    if model is None:
        return {}
    from ..cards.cost import cost_lines

    return {card.name: cost_lines(card, model) for card in cards}


FORMATS = {"text": show_text, "markdown": show_markdown, "latex": show_latex, "json": show_json}  # what --format may be

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
