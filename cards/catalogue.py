"""The cards that toyllm ships: `library/*.card`, in reading order, and what each is; and which cards a card calls."""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from ..kernels.errors import ToyllmError
from .structure import Card
from .text import parse

LIBRARY = Path(__file__).with_name("library")
SAMPLE = {"Sample": "the next token: penalties, temperature, top-k, top-p, min-p"}
READING: dict[str, dict[str, str]] = {  # of each family: its cards in the order in which they are read, the model's first
    "gpt2": {
        "gpt2": "the model over a prompt",
        "gpt2.Block": "a block: attention and feed-forward layer, each on a norm of the stream",
        "gpt2.LN": "LayerNorm",
        "gpt2.Attn": "causal attention over a prompt",
        "gpt2.Step": "the model on one more token, with a KV cache",
        "gpt2.AttnStep": "attention of one more token, with a KV cache",
        "gpt2.FFN": "the feed-forward layer",
        **SAMPLE,
        "gpt2.Generate": "the loop that generates a text",
    },
    "gpt-oss": {
        "gpt-oss": "the model over a prompt",
        "gpt-oss.Block": "a block: attention and experts, each on a norm of the stream",
        "gpt-oss.RMSNorm": "RMSNorm",
        "gpt-oss.RoPE": "rotary embedding of queries and keys",
        "gpt-oss.YaRN": "its frequencies, stretched to a longer context",
        "gpt-oss.Attn": "grouped-query attention with sinks, in a sliding window or not",
        "gpt-oss.Step": "the model on one more token, with ring caches",
        "gpt-oss.Rings": "ring caches from the keys and values of a prompt",
        "gpt-oss.AttnStep": "attention of one more token, with a ring cache",
        "gpt-oss.MoE": "the experts' layer: router and mixture",
        "gpt-oss.Router": "which experts a token goes to, and with which weights",
        "gpt-oss.Expert": "an expert: clamped SwiGLU",
        "MXFP4": "weights from their MXFP4 codes",
        "gpt-oss.Single": "the mixture of experts token by token",
        "gpt-oss.Grouped": "the mixture expert by expert",
        "gpt-oss.All": "the mixture with every expert on every token",
        "gpt-oss.Budget": "the mixture with a limit to what an expert takes",
        **SAMPLE,
    },
}
WHAT = {name: what for cards in READING.values() for name, what in cards.items()}
CALL = re.compile(r"(?<![\w.])(?:[^\W\d_][\w-]*(?:\.[^\W\d_]\w*)+|[^\W\d_]\w*)(?=\s*\()")


@cache
def library() -> Mapping[str, Card]:
    """All shipped cards by name, in reading order."""
    cards = [parse(path.read_text(encoding="utf-8"), path.name) for path in LIBRARY.glob("*.card")]
    order = list(WHAT)
    return {card.name: card for card in sorted(cards, key=lambda card: order.index(card.name) if card.name in order else len(order))}


def family_of(name: str) -> str | None:
    """The family that a card belongs to; None for one that every family shares."""
    namespace = name.partition(".")[0]
    return namespace if namespace in READING else None


def find_card(name: str, cards: Mapping[str, Card], families: Iterable[str] = READING) -> Card:
    """The card that a person means: case and hyphens do not matter, and what it is called within a family is enough; the first that has it.

    Raises ToyllmError for a name of none.
    """
    by_spelling = {spelled(known): card for known, card in cards.items()}
    for spelling in (spelled(name), *(spelled(f"{family}.{name}") for family in families)):
        if spelling in by_spelling:
            return by_spelling[spelling]
    spellings = {known: (spelled(known), spelled(known.rpartition(".")[2])) for known in cards}
    near = get_close_matches(spelled(name), {s for both in spellings.values() for s in both}, 3, 0.7)
    close = list(dict.fromkeys(known for spelling in near for known, both in spellings.items() if spelling in both))
    close = close or [known for known in cards if name and name.casefold() in WHAT.get(known, "").casefold()][:4]
    raise ToyllmError(
        f"{name}: no card of this name; " + (f"did you mean {' or '.join(close)}?" if close else "`toyllm card --list` lists them")
    )


def spelled(name: str) -> str:
    """A card's name as it is compared."""
    return re.sub(r"[-_]", "", name.casefold())


def called(card: Card, cards: Mapping[str, Card]) -> Iterator[Card]:
    """The cards that a card's steps call, in the order of the calls; one may come twice."""
    for step in card.steps:
        for name in CALL.findall(step.expression):
            found = cards.get(f"{card.namespace}.{name}") or cards.get(name)
            if found and found.name != card.name:
                yield found


def reached(roots: Iterable[Card], cards: Mapping[str, Card]) -> dict[str, Card]:
    """Cards and all that they call, each once, in the order in which a reader meets them."""
    found: dict[str, Card] = {}
    waiting = [*roots][::-1]
    while waiting:
        card = waiting.pop()
        if card.name not in found:
            found[card.name] = card
            waiting += [*called(card, cards)][::-1]
    return found


def reading(card: Card, cards: Mapping[str, Card]) -> list[Card]:
    """A card and every card that it calls, each once, in reading order; of a model's also those that decode and generate with it."""
    order = READING.get(card.name)
    if order is None:
        return list(reached([card], cards).values())
    shipped = library()
    parts = {other.name for name in order for other in called(shipped[name], shipped)}
    there = reached([cards[name] for name in order if name == card.name or name not in parts], cards)
    return [cards[name] for name in order if name in there]
