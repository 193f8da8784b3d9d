"""What a card is: plain frozen data, equal when they say the same.

Expressions, types and tensor names are kept as strings: `language` reads them when a card is checked or run, and not before. The
places in a file (`line`, `column`, `raw`) do not count when cards are compared. LANGUAGE.md describes what the texts mean.
"""

import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..kernels.errors import ToyllmError

KINDS = ("bind", "update", "for", "if", "else", "end", "return", "comment")
CLOSING = ("else", "end")  # steps that stand one depth further out than what is before them

NESTED = 50  # blocks within each other: more than any that are meant, and less than Python's stack
LONGEST = 500  # characters of a message, and of the line that it shows: a name in a card can have any length

HyperValue = int | float | bool | str | tuple["HyperValue", ...]


@dataclass(frozen=True)
class Place:
    """Where a text stands in a file: line and columns from 1, `end` behind it, `source` the whole line."""

    file: str = ""
    line: int = 0
    column: int = 0
    end: int = 0
    source: str = ""

    @property
    def raw(self) -> str:
        """The text as it was written there."""
        return self.source[self.column - 1 : self.end - 1]


NOWHERE = Place()


class CardError(ToyllmError):
    """A card does not hold: the message begins with the place; `excerpt` shows the line, and a caret under what is meant."""

    def __init__(self, place: Place, what: str, offset: int = 0) -> None:
        self.line, self.column = place.line, place.column + offset
        at = f"{place.file}:{self.line}:{self.column}: " if place.line else f"{place.file}: " if place.file else ""
        super().__init__(at + (what if len(what) <= LONGEST else what[: LONGEST - 1] + "…"))
        shown, column = around(place.source, self.column - 1)
        before = "".join(c for c in shown[:column] if not unicodedata.combining(c))
        margin = " " * (len(str(self.line)) + 2)
        self.excerpt = f"  {self.line} | {shown}\n{margin} | {' ' * len(before)}^" if place.source else ""


def around(line: str, column: int) -> tuple[str, int]:
    """A line, of a long one what stands around a column (from 0), and where in this the column is."""
    first = max(0, min(column, len(line)) - LONGEST // 2) if len(line) > LONGEST else 0
    shown = line[first : first + LONGEST]
    return ("…" if first else "") + shown + ("…" if first + len(shown) < len(line) else ""), column - first + bool(first)


@dataclass(frozen=True)
class Declaration:
    """Names of one type: `γ, β ∈ R^D   (of the norm) [norm_1.weight, norm_1.bias]`."""

    names: tuple[str, ...]
    type: str
    note: str = ""
    keys: tuple[str, ...] = ()  # names of tensors, one for each of `names`, or none
    place: Place = field(default=NOWHERE, compare=False, repr=False)  # of the type

    @property
    def key(self) -> dict[str, str]:
        """The tensor of each name that has one."""
        return dict(zip(self.names, self.keys, strict=True)) if self.keys else {}


@dataclass(frozen=True)
class Hyper:
    """A size or setting of the model; None is not filled in."""

    name: str
    value: HyperValue | None = None


@dataclass(frozen=True)
class Step:
    """One line of the algorithm.

    `expression` is the right side of a bind or update, `0, …, L-1` or a vector's name of a for, the condition of an if (of an else: empty
    or one more condition), and what a return gives. `shapes` has a type for each variable, or is empty; `taps` the engine's name for
    each variable ("" has none), or is empty. A comment has only a note.
    """

    kind: str
    variables: tuple[str, ...] = ()
    expression: str = ""
    shapes: tuple[str, ...] = ()
    note: str = ""
    taps: tuple[str, ...] = ()
    depth: int = 0
    place: Place = field(default=NOWHERE, compare=False, repr=False)  # of the expression
    targets: Place = field(default=NOWHERE, compare=False, repr=False)  # of the variables, or of the step's first word
    margins: tuple[Place, ...] = field(default=(), compare=False, repr=False)  # of each of the shapes

    def places(self) -> Iterator[tuple[str, Place]]:
        """Each of the shapes with its place."""
        yield from zip(self.shapes, self.margins or (NOWHERE,) * len(self.shapes), strict=True)


@dataclass(frozen=True)
class Card:
    """One algorithm. `given` are the names behind the semicolon of the headline, `lines` the remarks below the parameters."""

    name: str
    family: str = ""
    inputs: tuple[Declaration, ...] = ()
    outputs: tuple[Declaration, ...] = ()
    hypers: tuple[Hyper, ...] = ()
    params: tuple[Declaration, ...] = ()
    lines: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    given: tuple[str, ...] = ()
    place: Place = field(default=NOWHERE, compare=False, repr=False)  # of the headline

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return names_of(self.inputs)

    @property
    def namespace(self) -> str:
        """The namespace in which its calls are looked up first."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def called(self) -> str:
        """The name by which cards of its namespace call it."""
        return self.name.rpartition(".")[2]

    @property
    def signature(self) -> str:
        """Its headline: name and arguments."""
        given = f"; {', '.join(self.given)}" if self.given else ""
        return f"{self.name}({', '.join(self.arguments)}{given})"


def names_of(declarations: Iterable[Declaration]) -> tuple[str, ...]:
    """All names that are declared, in order."""
    return tuple(name for declaration in declarations for name in declaration.names)


def base_of(variable: str) -> str:
    """The name that an assignment to `variable` changes: that of `K` for `K[:, p]`."""
    return variable.partition("[")[0].rstrip()


# ---- what follows from the steps ---------------------------------------------------------------------------------------------


@dataclass
class Open:
    """A for or an if whose end has not come: the names bound before it, and by the end of the branches so far."""

    step: Step
    before: set[str]
    after: set[str]
    last_branch: bool  # nothing but an end can follow: a for, or an if whose plain else has come


def arrange(inputs: Sequence[Declaration], steps: Iterable[Step]) -> tuple[Step, ...]:
    """The steps with the depths and the kinds (bind or update) that follow from their order. Raises CardError where ends do not match."""
    arranged: list[Step] = []
    opened: list[Open] = []
    bound = set(names_of(inputs))
    for step in steps:
        if step.kind == "end" and not opened:
            raise CardError(step.targets, "`end`: no `for` or `if` is open here")
        if step.kind == "else" and (not opened or opened[-1].last_branch):
            raise CardError(step.targets, "`else`: no `if` is open here that could have one more branch")
        kind, depth = step.kind, len(opened) - (step.kind in CLOSING)
        if kind in ("bind", "update"):
            changed = {base_of(v) for v in step.variables}
            kind = "update" if changed <= bound else "bind"
            bound |= changed
        elif kind in ("for", "if"):
            if len(opened) == NESTED:
                raise CardError(step.targets, f"more than {NESTED} `for` and `if` within each other; make cards of some")
            opened.append(Open(step, set(bound), set(), kind == "for"))
        elif kind == "else":
            opened[-1].after |= bound
            opened[-1].last_branch = not step.expression
            bound = set(opened[-1].before)
        elif kind == "end":
            bound |= opened.pop().after
        arranged.append(replace(step, kind=kind, depth=depth))
    if opened:
        raise CardError(opened[-1].step.targets, f"`{opened[-1].step.kind}`: it has no `end`")
    return tuple(arranged)


def closes(steps: Sequence[Step], end: int) -> str:
    """What the `end` at this index closes: "for" or "if"; "for" where nothing is open, which no card has."""
    return next((s.kind for s in reversed(steps[:end]) if s.depth == steps[end].depth and s.kind in ("for", "if")), "for")


# ---- values of hypers --------------------------------------------------------------------------------------------------------


def value_text(value: HyperValue) -> str:
    """A hyper's value as it is written: `768`, `1e-05`, `∞`, `true`, `gelu_new`, `(128,∞)×12`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}∞" if math.isinf(value) else repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return value if is_word(value) else quoted(value)
    n = len(value)
    period = next((p for p in range(1, n // 2 + 1) if n % p == 0 and value == value[:p] * (n // p)), n)
    return f"({','.join(map(value_text, value[:period]))})" + (f"×{n // period}" if period != n else "")


def is_word(text: str) -> bool:
    """Whether a hyper's text can stand without quotes, and is not taken for something else."""
    return text[:1].isalpha() and text.replace("_", "a").replace("-", "a").isalnum() and text not in ("true", "false", "inf", "NaN")


def quoted(text: str) -> str:
    """A text in quotes, with escapes as in JSON; what is no printed character is escaped."""
    import json

    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in json.dumps(text, ensure_ascii=False))
