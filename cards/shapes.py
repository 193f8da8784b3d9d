"""Checks a card before it runs: names, order, numbers of arguments, kinds and shapes, with sizes that are not numbers yet.

    for problem in problems(card, library):
        print(problem)
        print(problem.excerpt)

Each card is checked on its own: what it calls counts by its declared inputs and outputs. A size that cannot be told beforehand is let
through; the interpreter checks it again with numbers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .checked import KINDS, UNCLEAR, Bindings, Checked, Family
from .functions import Refused, some
from .language import (
    Index,
    Member,
    Name,
    Node,
    Sequence,
    Type,
    Values,
)
from .program import Assign, Branch, Choice, Loop, Return, Statement
from .shape_expressions import as_stated, begun, integer, result_of, sizes_of, value_of
from .shape_rules import (
    ANY,
    CARD,
    TEXT,
    TRUTH,
    WHOLE,
    Known,
    joined_kind,
    scalar,
    updated,
)
from .sizes import ONE, Size, is_loose, letter, unknown
from .structure import Card, CardError, HyperValue, Place
from .text import error_at


def problems(card: Card, library: Mapping[str, Card] | None = None, hypers: Mapping[str, HyperValue] | None = None) -> list[CardError]:
    """What is wrong with a card, in the order of its lines; nothing for one that holds.

    `library` has the cards that it may call, by name. Sizes are compared with the values of `hypers`, and those that the card states.
    """
    try:
        checked = begun(card, library or {}, hypers or {})
    except CardError as error:
        return [error]
    block(checked, checked.program.body)
    if not any(isinstance(node, Return) for node in statements(checked.program.body)):
        checked.found.append(CardError(card.place, f"{card.name} ends without `return`"))
    unique = {(error.line, error.column): error for error in reversed(checked.found)}
    return [unique[place] for place in sorted(unique)]


def all_problems(cards: Iterable[Card], library: Mapping[str, Card] | None = None) -> list[CardError]:
    """What is wrong with several cards that may call each other and those of a library."""
    cards = tuple(cards)
    everything = {**(library or {}), **{card.name: card for card in cards}}
    return [error for card in cards for error in problems(card, everything)]


def check(card: Card, library: Mapping[str, Card] | None = None, hypers: Mapping[str, HyperValue] | None = None) -> None:
    """Raise CardError, the first one, where something is wrong with a card."""
    for error in problems(card, library, hypers):
        raise error


def statements(body: tuple[Statement, ...]) -> Iterable[Statement]:
    """All statements of a body, inner ones too."""
    for statement in body:
        yield statement
        inner = (
            (b.body for b in statement.branches)
            if isinstance(statement, Choice)
            else (statement.body,)
            if isinstance(statement, Loop)
            else ()
        )
        for each in inner:
            yield from statements(each)


# ---- steps ------------------------------------------------------------------------------------------------------------------


def block(c: Checked, body: tuple[Statement, ...]) -> bool:
    """Check statements in their order; whether what follows them is reached."""
    for statement in body:
        match statement:
            case Assign():
                assign(c, statement)
            case Loop():
                loop(c, statement)
            case Choice():
                if not choose(c, statement.branches):
                    return False
            case Return():
                returned(c, statement)
                return False
    return True


def assign(c: Checked, statement: Assign) -> None:
    """A bind or an update."""
    step, targets = statement.step, statement.targets
    c.place = step.place
    result = result_of(c, statement.value)
    values = result if isinstance(result, tuple) else (result,)
    if isinstance(result, Known) and len(targets) > 1 and result.kind != TEXT and result.sizes is None:
        values = (Known(result.kind),) * len(targets)  # of as many results as nobody can tell
    if len(values) != len(targets):
        found = f"{some(len(values), 'result')} for {some(len(targets), 'name')}"
        c.found.append(error_at(c.place, found, statement.value.at))
        values = (UNCLEAR,) * len(targets)
    stated = dict(enumerate(zip(statement.types, step.places(), strict=True)))
    for i, (target, value) in enumerate(zip(targets, values, strict=True)):
        known = value
        if isinstance(target, Index):
            known = change(c, target, value, step.targets)
        if i in stated:
            kind, (_, place) = stated[i]
            known = fitted(c, known, kind, place, step.variables[i], value)
        if not isinstance(target, Index):
            bind(c, target, known)


def fitted(c: Checked, found: Known, kind: Type, place: Place, name: str, value: Known) -> Known:
    """What a step gives a name, as stated; what is wrong with that is noted, and the stated type believed."""
    try:
        return as_stated(c, found, kind, name)
    except Refused as error:
        c.found.append(error_at(place, str(error)))
        return Known(KINDS[kind.domain], None if kind.domain == "card" else sizes_of(c, kind), card=value.card)


def change(c: Checked, target: Index, value: Known, place: Place) -> Known:
    """A part of a variable that is given another value; what is known of the part."""
    before, c.place = c.place, place
    base = value_of(c, target.operand)
    part = value_of(c, target) if base != UNCLEAR else UNCLEAR
    try:
        known = updated(c.rules, base, part, value)
    except Refused as error:
        c.found.append(error_at(place, str(error), target.at))
        known = base
    bind(c, target.operand, known)
    c.place = before
    return replace(part, kind=known.kind)


def bind(c: Checked, target: Node, known: Known) -> None:
    """Give a name, or the members of a family, what is known of its value."""
    if isinstance(target, Name):
        if target.name in c.hypers or (target.name in c.sizes and target.name not in c.bound.variables):
            what = f"{target.name} is a {'hyper' if target.name in c.hypers else 'size'} of the card: give the variable another name"
            c.found.append(error_at(c.place, what))
        c.bound.variables[target.name] = known
        c.bound.partly.discard(target.name)
    elif isinstance(target, Member):
        names = tuple(i.name if isinstance(i, Name) else "" for i in target.indices)
        for index in target.indices:
            value_of(c, index)
        number = c.loops.get(names[0]) or unknown()
        before = c.bound.families.get(target.family)
        if before is not None and (before.indices != names or before.number != number):
            number = unknown()
            known = merged_value(c, before.member, known)
        c.bound.families[target.family] = Family(names, known, number)
        c.bound.partly.discard(target.family)


def loop(c: Checked, statement: Loop) -> None:
    """A for: checked for its first round, then for any, until what changes from round to round is known as such."""
    c.place = statement.step.place
    number, first, kind = loop_over(c, statement.over)
    outer, letters, before, found = c.loops, c.sizes, c.bound, c.found
    c.loops = {**outer, statement.variable: number}
    after = before
    for turn, value in enumerate((first, *(letter(statement.variable),) * 4)):
        c.bound, c.sizes, c.found = before.copy(), dict(letters), []
        c.bound.variables[statement.variable] = scalar(kind, value if kind == WHOLE else None)
        after = c.bound if block(c, statement.body) else before
        if turn and c.found and before != (loosened := loose(before, statement.body)):
            before = loosened  # what is wrong with the second round may be right with what the first one left
            continue
        found += c.found
        merged = merged_round(c, before, after)
        if turn and merged == before:
            break
        before = merged
    c.bound = Bindings({**after.variables, **before.variables}, {**after.families, **before.families}, after.partly)
    c.loops, c.found = outer, found


def merged_round(c: Checked, before: Bindings, after: Bindings) -> Bindings:
    """What is known at the beginning of a round, the first one or another."""
    return Bindings(
        {name: merged_value(c, known, after.variables.get(name, known)) for name, known in before.variables.items()},
        {name: merged_family(c, family, after.families.get(name, family)) for name, family in before.families.items()},
        before.partly & after.partly,
    )


def loose(bound: Bindings, body: tuple[Statement, ...]) -> Bindings:
    """What is bound, the sizes of what a body changes not known."""
    targets = [t.operand if isinstance(t, Index) else t for s in statements(body) if isinstance(s, Assign) for t in s.targets]
    result = bound.copy()
    for target in targets:
        if isinstance(target, Name) and target.name in bound.variables:
            result.variables[target.name] = loose_value(bound.variables[target.name])
        elif isinstance(target, Member) and target.family in bound.families:
            family = bound.families[target.family]
            result.families[target.family] = replace(family, member=loose_value(family.member))
    return result


def loose_value(known: Known) -> Known:
    """A value of which only the kind and the number of axes are known; the same one again, if it is such."""
    if known.sizes is None or (all(any(map(is_loose, s.letters)) for s in known.sizes) and known.value is None):
        return known
    sizes = tuple(s if any(map(is_loose, s.letters)) else unknown() for s in known.sizes)
    return Known(known.kind, sizes, None if known.value is None else unknown())


def loop_over(c: Checked, over: Node) -> tuple[Size, Size, str]:
    """How often a loop goes round, and its variable's first value and kind."""
    if isinstance(over, Sequence):
        first, last = (integer(c, end) for end in (over.first, over.last))
        return last - first + ONE, first, WHOLE
    known = value_of(c, over)
    if known.kind in (TEXT, CARD) or (known.sizes is not None and len(known.sizes) != 1 and not known.hyper):
        c.found.append(error_at(c.place, f"a loop runs through a sequence or a vector, found {known}", over.at))
        return unknown(), unknown(), ANY
    return known.sizes[0] if known.sizes else unknown(), unknown(), known.kind


def choose(c: Checked, branches: tuple[Branch, ...]) -> bool:
    """An if: what is bound behind it is bound in each branch that goes on. Whether any does."""
    before = c.bound
    ends: list[Bindings] = []
    certain = False
    for branch in branches:
        c.bound, c.place = before.copy(), branch.step.place
        value = condition(c, branch.condition) if branch.condition is not None else ONE
        if value == Size():
            continue  # it never holds, whatever the model: such as j > 0 in a first round
        if block(c, branch.body):
            ends.append(c.bound)
        if certain := value == ONE:
            break
    if not certain:
        ends.append(before)
    c.bound = merge(c, ends) if ends else before
    return bool(ends)


def condition(c: Checked, node: Node) -> Size | None:
    """1 for a condition that always holds, 0 for one that never does."""
    known = value_of(c, node)
    if known.kind not in (TRUTH, ANY) or known.sizes:
        c.found.append(error_at(c.place, f"a condition is one truth value, found {known}", node.at))
        return None
    return known.value if known.kind == TRUTH else None


def merge(c: Checked, ways: list[Bindings]) -> Bindings:
    """What is known where several ways come together."""
    first, *others = ways
    result = first.copy()
    for other in others:
        result.partly |= other.partly | ({*result.variables, *result.families} ^ {*other.variables, *other.families})
        for name, known in other.variables.items():
            result.variables[name] = merged_value(c, result.variables[name], known) if name in result.variables else known
        for name, family in other.families.items():
            result.families[name] = merged_family(c, result.families.get(name, family), family)
    return result


def merged_family(c: Checked, a: Family, b: Family) -> Family:
    """What is known of a family that is one or the other."""
    number = a.number if a.number == b.number or any(map(is_loose, a.number.letters)) else unknown()
    return Family(a.indices, merged_value(c, a.member, b.member), number)


def merged_value(c: Checked, a: Known, b: Known) -> Known:
    """What is known of a value that is one or the other."""
    if a == b:
        return a
    if a.kind in (TEXT, CARD) or b.kind in (TEXT, CARD):
        return a if a.kind == b.kind else UNCLEAR
    sizes = None
    if a.sizes is not None and b.sizes is not None and len(a.sizes) == len(b.sizes):
        sizes = tuple(
            x if c.rules.same(x, y) or (x != y and any(map(is_loose, x.letters))) else unknown()
            for x, y in zip(a.sizes, b.sizes, strict=True)
        )
    return Known(a.kind if a.kind == b.kind else joined_kind(a, b, keep=True), sizes, a.value if a.value == b.value else None)


def returned(c: Checked, statement: Return) -> None:
    """The results, held against the outputs."""
    c.place = statement.step.place
    result = result_of(c, statement.value)
    values, outputs = result if isinstance(result, tuple) else (result,), c.program.outputs
    if not outputs:
        return
    if len(values) != len(outputs):
        if isinstance(result, tuple) or result.sizes is not None or result.kind == TEXT:
            what = f"{c.program.card.name} has {some(len(outputs), 'output')}, and here returns {len(values)}"
            c.found.append(error_at(c.place, what))
        return
    letters = dict(c.sizes)
    nodes = statement.value.items if isinstance(statement.value, Values) else (statement.value,) * len(values)
    for d, value, node in zip(outputs, values, nodes, strict=True):
        try:
            as_stated(c, value, d.type, d.name)
        except Refused as error:
            c.found.append(error_at(c.place, f"output {error}", node.at))
    c.sizes = letters
