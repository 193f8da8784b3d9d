"""The language of cards: expressions, types and names of tensors, read into plain data. LANGUAGE.md describes it, grammar.lark is it.

A node knows where in the canonical text of its expression it begins (`at`, from 0; it does not count when nodes are compared): with the
place of a step that makes a line and a column (`text.error_at`). What a script means is not decided here but by the card: see `names`.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .structure import NOWHERE, CardError, Place
from .text import DIGITS, error_at, is_sequence, split_top

if TYPE_CHECKING:
    from lark import Lark

DEPTH = 150  # levels of an expression: more than any that is meant, and less than Python's stack

# ---- expressions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A part of an expression, which begins at `at` in its text."""

    at: int = field(default=0, compare=False, kw_only=True)


@dataclass(frozen=True)
class Literal(Node):
    """A number, a truth value, or a text."""

    value: float | bool | str


@dataclass(frozen=True)
class Name(Node):
    """A name with its subscripts, as it is written."""

    name: str


@dataclass(frozen=True)
class Unary(Node):
    """`-a`, `√a`, `¬a`, and `⌊a⌋`, `⌈a⌉` by their first sign."""

    operator: str
    operand: Node


@dataclass(frozen=True)
class Binary(Node):
    """`∨ ∧ & << >> + - · ⊙ / mod`; a number before a name is `⊙`."""

    operator: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Compare(Node):
    """A chain: `0 ≤ s < w` is left 0, then (≤, s) and (<, w)."""

    left: Node
    rest: tuple[tuple[str, Node], ...]


@dataclass(frozen=True)
class Transpose(Node):
    """The last two axes exchanged."""

    operand: Node


@dataclass(frozen=True)
class Power(Node):
    """`x^2`; also a name with a superscript, until `names` has decided what it is."""

    base: Node
    exponent: Node


@dataclass(frozen=True)
class Slice(Node):
    """`a:b:step` within an index."""

    start: Node | None = None
    stop: Node | None = None
    step: Node | None = None


@dataclass(frozen=True)
class Rest(Node):
    """`…` within an index: all axes that it does not speak of."""


@dataclass(frozen=True)
class New(Node):
    """`new` within an index: one more axis, of length 1."""


@dataclass(frozen=True)
class Index(Node):
    """`x[i, a:b]`."""

    operand: Node
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Member(Node):
    """`θ_ℓ`, once `names` has decided: the member of `family` (its name with `·` where the indices stand) at `indices`."""

    family: str
    indices: tuple[Node, ...]


@dataclass(frozen=True)
class Call(Node):
    """`F(a, b, axis=0; p, q)`."""

    name: str
    inputs: tuple[Node, ...] = ()
    given: tuple[Node, ...] = ()
    options: tuple[tuple[str, Node], ...] = ()


@dataclass(frozen=True)
class Array(Node):
    """`[a, b]`."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Values(Node):
    """`a, b`: several results."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Sequence(Node):
    """`first, …, last` of a loop, both included."""

    first: Node
    last: Node


def children(node: Node) -> Iterator[Node]:
    """The nodes directly below a node."""
    for value in vars(node).values():
        if isinstance(value, Node):
            yield value
        elif isinstance(value, tuple):
            for item in value:
                yield from (part for part in (item if isinstance(item, tuple) else (item,)) if isinstance(part, Node))


def walk(node: Node) -> Iterator[Node]:
    """A node and all below it, from left to right."""
    yield node
    for child in children(node):
        yield from walk(child)


# ---- reading expressions ----------------------------------------------------------------------------------------------------

CONSTANTS = {"∞": math.inf, "π": math.pi, "NaN": math.nan, "true": True, "false": False}


def expression(text: str, place: Place = NOWHERE) -> Node:
    """An expression in its canonical spelling; `Values` where it has several results. Raises CardError at its place."""
    return read(text, "values", place)


def sequence(text: str, place: Place = NOWHERE) -> Node:
    """What a loop runs through: a `Sequence`, or the expression of a vector. Raises CardError."""
    return read(text, "sequence" if is_sequence(text) else "values", place)


def read(text: str, start: str, place: Place) -> Node:
    """A text by one of the grammar's rules."""
    try:
        return tree_of(text, start)
    except Misread as error:
        raise error_at(place, f"{shown(text)}: {error}", error.at) from None


def shown(text: str) -> str:
    """An expression within a message: its beginning."""
    return text if len(text) <= 60 else text[:59] + "…"


class Misread(Exception):  # noqa: N818 - named for what it says
    """A text that is no expression, and the offset at which that shows."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__(what)
        self.at = at


@cache
def parser() -> "Lark":
    """The parser of grammar.lark; made once, when the first expression is read."""
    from lark import Lark

    grammar = Path(__file__).with_name("grammar.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", start=["values", "sequence"], propagate_positions=True, maybe_placeholders=True)


@lru_cache(maxsize=4096)
def tree_of(text: str, start: str) -> Node:
    """The node of a text. Raises Misread."""
    from lark.exceptions import UnexpectedCharacters, UnexpectedToken

    try:
        tree = parser().parse(text, start=start)
    except UnexpectedCharacters as error:
        raise Misread(error.pos_in_stream or 0, f"`{text[error.pos_in_stream or 0]}` has no meaning here") from None
    except UnexpectedToken as error:
        if error.token.type == "$END":
            raise Misread(len(text.rstrip()), "it ends where something is missing") from None
        raise Misread(error.token.start_pos or 0, f"`{error.token}` is not expected here") from None
    level: list[Any] = [tree]
    for _ in range(DEPTH):
        level = [child for node in level for child in node.children if hasattr(child, "children")]
        if not level:
            return build(tree)
    raise Misread(0, f"more than {DEPTH} levels; give parts of it names of their own")


def build(tree: Any) -> Any:
    """A node from lark's tree: of a token its text, of a rule for parts of a node a tuple."""
    if not hasattr(tree, "children"):
        return None if tree is None else str(tree)
    at = 0 if tree.meta.empty else tree.meta.start_pos
    return BUILT[tree.data]([build(child) for child in tree.children], at)


@dataclass(frozen=True)
class Option(Node):
    """`axis=0`, until its call is built."""

    name: str
    value: Node


def call(parts: list[Any], at: int) -> Call:
    """A call: options taken from among the inputs. Raises Misread for one behind the semicolon, or given twice."""
    name, inputs, given = parts
    options = [(a.name.rstrip("= "), a.value) for a in inputs or () if isinstance(a, Option)]
    if len(dict(options)) < len(options) or any(isinstance(a, Option) for a in given or ()):
        raise Misread(at, f"{name}: an option such as axis= is given once, and before any semicolon")
    return Call(name, tuple(a for a in inputs or () if not isinstance(a, Option)), given or (), tuple(options), at=at)


def number(text: str, at: int) -> Literal:
    """A number: an integer, where it is written like one. Raises Misread for one of more digits than any that is meant."""
    if len(text) > DIGITS:
        raise Misread(at, f"a number of {len(text)} digits; at most {DIGITS}")
    return Literal(int(text) if text.isdecimal() else float(text), at=at)


def text_value(quoted: str, at: int) -> Literal:
    """A text from between its quotes. Raises Misread."""
    try:
        return Literal(json.loads(quoted), at=at)
    except ValueError:
        raise Misread(at, f"{quoted}: the escapes in a text are those of JSON") from None


BUILT: dict[str, Callable[[list[Any], int], Any]] = {  # the grammar's rules: from their parts and where they begin
    "name": lambda parts, at: Name(parts[0], at=at),
    "number": lambda parts, at: number(parts[0], at),
    "text": lambda parts, at: text_value(parts[0], at),
    "constant": lambda parts, at: Literal(CONSTANTS[parts[0]], at=at),
    "unary": lambda parts, at: Unary(*parts, at=at),
    "binary": lambda parts, at: Binary(parts[1], parts[0], parts[2], at=at),
    "juxtaposed": lambda parts, at: Binary("⊙", number(parts[0], at), parts[1], at=at),
    "compare": lambda parts, at: Compare(parts[0], tuple(zip(parts[1::2], parts[2::2], strict=True)), at=at),
    "transpose": lambda parts, at: Transpose(parts[0], at=at),
    "power": lambda parts, at: Power(*parts, at=at),
    "index": lambda parts, at: Index(*parts, at=at),
    "rest": lambda _, at: Rest(at=at),
    "new": lambda _, at: New(at=at),
    "slice": lambda parts, at: Slice(parts[0], parts[2], parts[4] if parts[3] else None, at=at),
    "call": call,
    "option": lambda parts, at: Option(*parts, at=at),
    "array": lambda parts, at: Array(tuple(parts), at=at),
    "group": lambda parts, _: parts[0],
    "values": lambda parts, at: parts[0] if len(parts) == 1 else Values(tuple(parts), at=at),
    "sequence": lambda parts, at: Sequence(*parts, at=at),
    "arguments": lambda parts, _: tuple(parts),
    "items": lambda parts, _: tuple(parts),
}


# ---- types ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """`ℓ=0..L-1`: what the members of a family are counted by, both ends included."""

    index: str
    first: Node
    last: Node


@dataclass(frozen=True)
class Type:
    """What a name stands for: numbers of a domain, in an array of these sizes, or the parameters of a card; or a family of such.

    `domain` is "R", "ℕ", "ℤ", "range" ({first..last}), "bool" ({0,1}) or "card".
    """

    domain: str
    sizes: tuple[Node, ...] = ()
    first: Node | None = None
    last: Node | None = None
    card: str = ""
    ranges: tuple[Range, ...] = ()


DOMAIN = re.compile(r"(?P<domain>[Rℕℤ])(?=\^|\Z)|\{(?P<braces>[^{}]*)\}")
RANGES = re.compile(r"\s*\(([^()]*=.*\.\..*)\)\Z")
CARD_NAME = re.compile(r"[^\W\d_][\w.-]*")


def type_of(text: str, place: Place = NOWHERE) -> Type:
    """A type in its canonical spelling, such as `R^{T×D}` or `Block (ℓ=0..L-1)`. Raises CardError."""
    ranged = RANGES.search(text)
    ranges = tuple(ranges_of(ranged[1], ranged.start(1), place)) if ranged else ()
    kind = text[: ranged.start()] if ranged else text
    found = DOMAIN.match(kind)
    if not found:
        if not CARD_NAME.fullmatch(kind):
            raise error_at(place, f"{text}: expected a type such as R^{{T×D}}, ℕ, {{0..V-1}}^T, or the name of a card")
        return Type("card", card=kind, ranges=ranges)
    rest = kind[found.end() :]
    if rest and (rest[0] != "^" or len(rest) == 1):
        raise error_at(place, f"{text}: expected sizes such as ^{{T×D}}", found.end())
    start = found.end() + (2 if rest[1:2] == "{" else 1)
    if rest[1:2] == "{" and not rest.endswith("}"):
        raise error_at(place, f"{text}: the sizes end with }}", len(kind))
    sizes = tuple(sizes_of(rest[2:-1] if rest[1:2] == "{" else rest[1:], start, place)) if rest else ()
    if found["domain"]:
        return Type(found["domain"], sizes, ranges=ranges)
    if re.fullmatch(r"\s*0\s*,\s*1\s*", found["braces"]):
        return Type("bool", sizes, ranges=ranges)
    if ".." not in found["braces"]:
        raise error_at(place, f"{text}: expected {{a..b}} or {{0,1}}", 1)
    first, last = found["braces"].split("..", 1)
    begin = found.start("braces")
    return Type("range", sizes, part_of(first, begin, place), part_of(last, begin + len(first) + 2, place), ranges=ranges)


def sizes_of(text: str, start: int, place: Place) -> Iterator[Node]:
    """Sizes between `×`; `start` is where they begin in the type."""
    for piece in split_top(text, "×"):
        yield part_of(piece, start, place)
        start += len(piece) + 1


def ranges_of(text: str, start: int, place: Place) -> Iterator[Range]:
    """Ranges between commas, such as `ℓ=0..L-1, h=0..H-1`."""
    for piece in split_top(text):
        found = re.fullmatch(r"\s*(\w+)\s*=(.*?)\.\.(.*)", piece)
        if not found:
            raise error_at(place, f"{piece.strip()}: expected a range such as ℓ=0..L-1", start)
        yield Range(found[1], part_of(found[2], start + found.start(2), place), part_of(found[3], start + found.start(3), place))
        start += len(piece) + 1


def part_of(text: str, start: int, place: Place) -> Node:
    """An expression that begins at `start` of the text at `place`."""
    try:
        return moved(tree_of(text, "values"), start)
    except Misread as error:
        raise error_at(place, f"{text.strip()}: {error}", start + error.at) from None


def moved(node: Node, by: int) -> Node:
    """The node as part of a longer text."""
    changes: dict[str, Any] = {"at": node.at + by}
    for f in fields(node):
        value = getattr(node, f.name)
        if isinstance(value, Node | tuple):
            changes[f.name] = moved_value(value, by)
    return replace(node, **changes)


def moved_value(value: Any, by: int) -> Any:
    """A field of a node as part of a longer text."""
    if isinstance(value, Node):
        return moved(value, by)
    return tuple(moved_value(item, by) for item in value) if isinstance(value, tuple) else value


# ---- names of tensors and activations ---------------------------------------------------------------------------------------


def template(text: str, place: Place = NOWHERE) -> tuple[str | Node, ...]:
    """The name of a tensor or an activation: texts, and the expressions between braces as nodes. Raises CardError."""
    parts: list[str | Node] = []
    for piece in re.split(r"(\{[^{}]*\})", text):
        if piece.startswith("{"):
            try:
                parts.append(tree_of(piece[1:-1], "values"))
            except Misread as error:
                raise CardError(place, f"[{text}]: {piece}: {error}") from None
        elif piece:
            parts.append(piece)
    return tuple(parts)
