"""A card that is being checked: what is bound at some point of it, and what was found wrong. See `shapes`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .program import Program
from .shape_rules import ANY, CARD, REAL, TEXT, TRUTH, WHOLE, Known, Rules, scalar
from .sizes import Size, fixed, letter
from .structure import NOWHERE, Card, CardError, HyperValue, Place

KINDS = {"R": REAL, "ℕ": WHOLE, "ℤ": WHOLE, "range": WHOLE, "bool": TRUTH, "card": CARD}
UNCLEAR = Known()


@dataclass(frozen=True)
class Family:
    """What is known of a family that steps bind: a member, by the loop variables that count it, and how many there are."""

    indices: tuple[str, ...]
    member: Known
    number: Size


@dataclass
class Bindings:
    """What is bound at some point of a card; `partly` is bound on some ways there only."""

    variables: dict[str, Known] = field(default_factory=dict)
    families: dict[str, Family] = field(default_factory=dict)
    partly: set[str] = field(default_factory=set)

    def copy(self) -> "Bindings":
        """The same, apart."""
        return Bindings(dict(self.variables), dict(self.families), set(self.partly))


@dataclass
class Checked:
    """A card that is being checked, and what was found wrong with it."""

    program: Program
    library: Mapping[str, Card]
    rules: Rules
    hypers: dict[str, Known]
    sizes: dict[str, Size]  # the letters that stand for something, and for what
    bound: Bindings = field(default_factory=Bindings)
    loops: dict[str, Size] = field(default_factory=dict)  # the variables of the open loops, and how often each goes round
    found: list[CardError] = field(default_factory=list)
    place: Place = NOWHERE


def hyper_known(name: str, value: HyperValue | None) -> Known:
    """What is known of a hyper: an integer is spoken of by its letter."""
    match value:
        case None:
            return Known(ANY, (), letter(name), hyper=True)
        case bool():
            return scalar(TRUTH)
        case int():
            return scalar(WHOLE, letter(name))
        case float():
            return scalar(REAL)
        case str():
            return Known(TEXT)
        case _:
            kinds = {hyper_known("", v).kind for v in value}
            return Known(TEXT if TEXT in kinds else kinds.pop() if len(kinds) == 1 else REAL, (fixed(len(value)),))


def near(name: str, names: Iterable[str]) -> str:
    """A name that may be meant, for the end of a message."""
    import difflib

    if len(name) < 3:
        return ""
    found = difflib.get_close_matches(name, [n for n in names if n != name], 1, 0.6)
    return f"; is {found[0]} meant?" if found else ""


def find_card(c: Checked, name: str) -> Card | None:
    """The card that a name means in this one."""
    caller = c.program.card
    for whole_name in (f"{caller.namespace}.{name}", name):
        if whole_name == caller.name:
            return caller
        if whole_name in c.library:
            return c.library[whole_name]
    return None
