"""Cards as text and as JSON, damaged: an error with its place, or a card that can be shown in every form, and a run within its limits."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from toyllm.cards import settings
from toyllm.cards.catalogue import LIBRARY, library
from toyllm.cards.evaluate import Group
from toyllm.cards.fill import fill
from toyllm.cards.interpreter import run
from toyllm.cards.language import Binary, Literal, Name, Node, Type
from toyllm.cards.latex import render_latex
from toyllm.cards.notation import from_json, render_markdown, to_json
from toyllm.cards.operators import Limits
from toyllm.cards.program import program
from toyllm.cards.shapes import all_problems
from toyllm.cards.structure import Card, HyperValue
from toyllm.cards.text import parse, parse_all, render
from toyllm.kernels.errors import ToyllmError
from toyllm.models.checkpoint import open_checkpoint
from toyllm.models.config import load_config
from toyllm.models.location import find_model

from . import checkpoints
from .leg import Find, Leg, Trial, refused
from .mutate import chance, json_text

SECONDS = 5.0  # of the processor, for all that is done with one card
LIMITS = Limits(steps=2000, calls=8, elements=1 << 16, held=1 << 24, work=1 << 32)
TOKEN = re.compile(r'"[^"\n]*"|\d+(?:\.\d+)?|[^\W\d]\w*|\s+|.')
SPOKEN = """
x y θ_ℓ W_e A^h C[ℓ] T D H Dh ℓ for do end if then else return ← ∈ R^{T×D} R^D ℕ {0..V-1}^T {0,1} ▷ … · ⊙ + - / mod √ ^⊤ ^2 _ℓ ^{ ^{-1}
⌊ ⌋ ⌈ ⌉ [:, 0] [:, new] […] ( ) [ ] { } , ; : = ≤ ≠ ∧ ∨ ¬ << >> & "a" "\\u0000" ∞ π NaN true axis=0 axis=9 Algorithm: Input: Output:
Hyper: Param: softmax(x) sum(x) reshape(x,2,-1) zeros(9,9,9) range(5) concat(x,x) split(x,2) top_k(x,1) scatter_add(x,x,x) one_hot(x,3)
pad(x,1,1) repeat(x,2) 0 1 -1 2 3 0.5 1e9 1e400 99999999 999999999999 9223372036854775807 9223372036854775808 18446744073709551616
1e-400 0..9 (1)×9 (1,2)×99999999 ℝ 0x1 ² ₁ ′ 《 # ─── Block(x;θ) Attn MXFP4(x,x) Sample gpt2.LN F(x) ``` $ \\ | <b> % ~ ℓ=0..L-1
"""
WORDS = SPOKEN.split()
WORDS += ["9" * 500, "9" * 5000, "(" * 200, "[" * 200, "{" * 200, "-" * 300, "x^" * 200, "a_" * 300, " " * 500, "x, " * 300]
WORDS += [*"\u0302\u202e\ufeff\0\x85\u2028\t", "\x1b[2J", "\ud800"]
JSON_VALUES = [
    None,
    True,
    -1,
    0,
    1001,
    10**30,
    1.5,
    "",
    "x ← y",
    "for",
    [],
    {},
    [[]],
    {"number": "NaN"},
    {"number": 1},
    "\ud800",
    "x\ny",
    "a" * 3000,
]


def card_text(rng: Random, texts: list[str]) -> str:
    """One or two cards, some of their lines and words others."""
    lines = [line for text in rng.sample(texts, rng.choice((1, 1, 1, 2))) for line in text.splitlines()]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 5))):
        i = rng.randrange(len(lines))
        how = rng.randrange(10)
        if how == 0 and len(lines) > 1:
            del lines[i]
        elif how == 1:
            lines.insert(rng.randrange(len(lines)), lines[i])
        elif how == 2:
            lines[i] = rng.choice(rng.choice(texts).splitlines())
        elif how == 3:
            at = rng.randint(0, len(lines[i]))
            lines[i] = lines[i][:at] + rng.choice(WORDS) + lines[i][at + rng.randint(0, 3) :]
        else:
            tokens = TOKEN.findall(lines[i]) or [""]
            k = rng.randrange(len(tokens))
            other = rng.choice(TOKEN.findall(rng.choice(lines)) or [""])
            tokens[k] = rng.choice((rng.choice(WORDS), other, tokens[k] * 2, "", rng.choice(WORDS) + tokens[k]))
            lines[i] = "".join(tokens)
    return rng.choice(("\n", "\n", "\n", "\r\n", "\r", "\n\n")).join(lines)


def mutate_document(rng: Random, document: Any) -> Any:
    """A card's document with one of its values another, in place."""
    holder, keys = document, []
    while isinstance(holder, (dict, list)) and holder:
        key = rng.choice([*holder]) if isinstance(holder, dict) else rng.randrange(len(holder))
        keys.append((holder, key))
        holder = holder[key]
        if chance(rng, 0.2):
            break
    if keys:
        holder, key = keys[-1]
        if chance(rng, 0.15):
            del holder[key]
        elif isinstance(holder[key], str) and chance(rng, 0.5):
            at = rng.randint(0, len(holder[key]))
            holder[key] = holder[key][:at] + rng.choice(WORDS) + holder[key][at + rng.randint(0, 2) :]
        else:
            holder[key] = rng.choice(JSON_VALUES)
    return document


def read(rng: Random, texts: list[str]) -> tuple[Card, ...]:
    """Cards from damaged text, or from a damaged document. Raises ToyllmError."""
    if chance(rng, 0.7):
        return parse_all(card_text(rng, texts), "fuzz.card")
    document: Any = to_json(rng.choice([*library().values()]))
    for _ in range(rng.choice((0, 1, 1, 2))):
        document = mutate_document(rng, document)
    if chance(rng, 0.2):
        try:
            document = json.loads(json_text(rng, document))
        except (ValueError, RecursionError):
            document = rng.choice(JSON_VALUES)
    return (from_json(document, "fuzz.json"),)


def show(cards: tuple[Card, ...]) -> None:
    """Every form in which cards are shown; the text and the document read back are the same card. Raises Find."""
    render_markdown(cards)
    render_latex(cards)
    for card in cards:
        if to_json(parse(render(card))) != to_json(card):
            raise Find(f"{card.name}: its canonical text is another card")
        if to_json(from_json(json.loads(json.dumps(to_json(card))))) != to_json(card):
            raise Find(f"{card.name}: its document is another card")


def length(node: Node, letters: Mapping[str, Any]) -> int:
    """A size, where it is made of letters and numbers; else any."""
    match node:
        case Literal(value=int(n)):
            return n
        case Name(name=name):
            return letters[name] if type(letters.get(name)) is int else 3
        case Binary(operator=sign, left=a, right=b) if sign in "+-⊙·":
            x, y = length(a, letters), length(b, letters)
            return x + y if sign == "+" else x - y if sign == "-" else x * y
    return 2


def made_for(rng: Random, kind: Type, letters: Mapping[str, Any]) -> Any:
    """An input of a type, and sometimes of another."""
    if kind.domain == "card" or kind.ranges:
        return Group("blocks.0")
    shape = [min(max(0, length(size, letters)), 50) for size in kind.sizes][:6]
    if shape and chance(rng, 0.05):
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 7))
    numbers = np.random.default_rng(rng.getrandbits(32))
    if kind.domain == "bool":
        return numbers.integers(0, 2, shape).astype(bool)
    if kind.domain == "R":
        return numbers.standard_normal(shape) if chance(rng, 0.95) else np.full(shape, rng.choice((np.nan, np.inf, 1e308)))
    last = min(length(kind.last, letters), 300) if kind.last else 5
    return numbers.integers(0, max(last, 0) + 1, shape) if chance(rng, 0.95) else numbers.integers(-(2**63), 2**63 - 1, shape)


class Models:
    """A small model of each family, whose hypers and parameters cards run with."""

    def __init__(self, folder: Path) -> None:
        self.hypers: dict[str, dict[str, HyperValue]] = {}
        self.sources: dict[str, Any] = {}
        for name, document in checkpoints.CONFIGS.items():
            at = folder / name
            at.mkdir()
            (at / "config.json").write_text(json.dumps(document))
            _, config = load_config(find_model(str(at)))
            checkpoints.write_weights(Random(1), at, checkpoints.specs(config, "mxfp4"))
            checkpoint = open_checkpoint(find_model(str(at)))
            self.hypers[name] = settings.hypers(config, checkpoint.tensors) | {"moe": "auto", "ρ": 1.0}
            self.sources[name] = settings.source(checkpoint, config)


def run_cards(rng: Random, cards: tuple[Card, ...], models: Models) -> str:
    """Run the first card. Raises Find for results beyond the limits."""
    name = "gpt_oss" if cards[0].name.startswith("gpt-oss") else "gpt2"
    if chance(rng, 0.1):
        name = rng.choice([*models.hypers])
    stated = {h.name for card in cards for h in card.hypers if h.value is not None}
    hypers = {key: value for key, value in models.hypers[name].items() if key not in stated}
    card = cards[0] if chance(rng, 0.5) else fill(cards[0], hypers)
    letters = {**{letter: rng.choice((1, 2, 3, 4)) for letter in "TSNKM"}, **hypers}
    made = program(card)
    inputs = {d.name: made_for(rng, d.type, letters) for d in made.inputs}
    if chance(rng, 0.8):
        inputs |= {
            key: made_for(rng, made.params[key].type, letters) if key in made.params else rng.choice((0.5, 1e-5)) for key in card.given
        }
    given = {**library(), **{other.name: other for other in cards}}
    group = "" if "." not in card.name and chance(rng, 0.9) else rng.choice(("blocks.0", "blocks.1", "blocks.0", "", "blocks"))
    dtype = rng.choice((np.float64, np.float32))
    ran = run(card, given, inputs, hypers, models.sources[name], group=group, dtype=dtype, limits=LIMITS)
    for value in (*ran.results, *ran.activations.values()):
        if getattr(value, "size", 0) > LIMITS.elements:
            raise Find(f"{card.name}: an array of {value.size} numbers")
    return "run"


def check_cards(rng: Random, texts: list[str], models: Models) -> str:
    """Read, check, show and run damaged cards. Raises Find."""
    start = time.process_time()
    ended = "refused"
    try:
        cards = read(rng, texts)
        ended = "read"
        show(cards)
        if problems := all_problems(cards, library()):
            ended = "read, and a mistake found"
            for problem in problems:
                refused(problem)
        run_cards(rng, cards, models)
        ended += ", and run"
    except ToyllmError as error:
        refused(error)
    if (took := time.process_time() - start) > SECONDS:
        raise Find(f"{took:.1f} s for one card")
    return ended


def prepare(folder: Path) -> Trial:
    texts = [path.read_text(encoding="utf-8") for path in sorted(LIBRARY.glob("*.card"))]
    models = Models(folder)
    return lambda rng: check_cards(rng, texts, models)


LEG = Leg("cards as text and as JSON, read, shown and run", prepare)
