"""What is known of the expressions of a card that is being checked: names, declared types, calls. See `shapes`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .checked import KINDS, UNCLEAR, Bindings, Checked, find_card, hyper_known, near
from .functions import FUNCTIONS, Refused, miscalled, misuse
from .language import (
    Array,
    Binary,
    Call,
    Compare,
    Index,
    Literal,
    Member,
    Name,
    New,
    Node,
    Power,
    Rest,
    Slice,
    Transpose,
    Type,
    Unary,
    Values,
    walk,
)
from .program import Declared, Program, counted, program
from .shape_functions import RULES
from .shape_rules import (
    ANY,
    CARD,
    REAL,
    TEXT,
    TRUTH,
    WHOLE,
    Known,
    Range,
    Result,
    Rules,
    binary,
    compare,
    indexed,
    power,
    scalar,
    shape_text,
    truths,
    unary,
    whole,
)
from .sizes import ONE, Size, fixed, is_loose, letter, quotient, solved, substituted, unknown
from .structure import Card, HyperValue
from .text import error_at

# ---- declarations -----------------------------------------------------------------------------------------------------------


def begun(card: Card, library: Mapping[str, Card], hypers: Mapping[str, HyperValue]) -> Checked:
    """A card whose inputs are bound and whose declarations are checked. Raises CardError where it cannot be read."""
    made = program(card)
    stated = {h.name: hypers.get(h.name, h.value) for h in card.hypers}
    values = {name: fixed(v) for name, v in stated.items() if isinstance(v, int) and not isinstance(v, bool)}
    c = Checked(made, library, Rules(values), {name: hyper_known(name, value) for name, value in stated.items()}, {})
    c.sizes = {name: known.value for name, known in c.hypers.items() if known.value is not None}
    for name in made.letters:
        c.sizes.setdefault(name, letter(name))
    for d in made.inputs:
        kind = d.type
        value = letter(d.name) if not kind.sizes and kind.domain in ("ℕ", "ℤ", "range") else None
        c.bound.variables[d.name] = declared_known(c, d, value)
    for d in (*made.params.values(), *made.inputs):
        check_declared(c, d)
    return c


def check_declared(c: Checked, d: Declared) -> None:
    """Check the sizes of a declaration, and the card that it names."""
    place = d.declaration.place
    counted_by = {r.index for r in d.type.ranges}
    nodes = (*d.type.sizes, *(end for r in d.type.ranges for end in (r.first, r.last)), *filter(None, (d.type.first, d.type.last)))
    for node in nodes:
        for name in (n for n in walk(node) if isinstance(n, Name)):
            if name.name not in c.sizes and name.name not in c.bound.variables and name.name not in counted_by:
                c.found.append(error_at(place, f"{name.name}: no hyper, and no size of an input{near(name.name, c.sizes)}", name.at))
    if d.type.domain == "card" and find_card(c, d.type.card) is None:
        c.found.append(error_at(place, f"{d.type.card}: no such card{near(d.type.card, c.library)}"))


def declared_known(c: Checked, d: Declared, value: Size | None = None) -> Known:
    """What is known of a declared name; of a family, of its members."""
    return Known(KINDS[d.type.domain], None if d.type.domain == "card" else sizes_of(c, d.type), value, card=d.type.card)


def sizes_of(c: Checked, kind: Type) -> tuple[Size, ...]:
    """The sizes of a type."""
    return tuple(size_of(c, node) for node in kind.sizes)


def size_of(c: Checked, node: Node) -> Size:
    """A size in a type; an unknown one where a letter of it stands for nothing."""
    match node:
        case Literal(value=int() as n):
            return fixed(n)
        case Name(name=name) if name in c.sizes:
            return c.sizes[name]
        case Name(name=name):
            known = c.bound.variables.get(name)
            return known.value if known is not None and known.value is not None else unknown()
        case Binary():
            a, b = size_of(c, node.left), size_of(c, node.right)
            match node.operator:
                case "+":
                    return a + b
                case "-":
                    return a - b
                case "·" | "⊙":
                    return a * b
                case "/" if (found := quotient(a, b)) is not None:
                    return found
    before, c.found = c.found, []
    known = value_of(c, node)
    c.found = before
    return known.value if known.value is not None else unknown()


# ---- stated shapes ----------------------------------------------------------------------------------------------------------


def as_stated(c: Checked, found: Known, kind: Type, name: str) -> Known:
    """What is known of a value once its stated type is. Raises Refused where they do not agree.

    A letter that stands for nothing yet stands for what is found at its place.
    """
    if kind.domain == "card" or found.kind in (CARD, TEXT):
        if kind.domain != "card" or found.kind not in (CARD, ANY):
            raise Refused(f"{name}: expected {type_text(c, kind)}, found {found}")
        return found
    if found.sizes is not None:
        if len(found.sizes) != len(kind.sizes):
            raise Refused(f"{name}: expected {type_text(c, kind)}, found {found}")
        define_letters(c, [*zip(kind.sizes, found.sizes, strict=True)])
    else:
        define_letters(c, [(node, unknown()) for node in kind.sizes])
    stated = sizes_of(c, kind)
    wrong = found.sizes is not None and not c.rules.agree(stated, found.sizes)
    if wrong or (kind.domain not in ("R", "bool") and found.kind == REAL) or (kind.domain == "bool" and found.kind == REAL):
        raise Refused(f"{name}: expected {type_text(c, kind)}, found {found}")
    value = found.value if not stated else None
    return Known(REAL if kind.domain == "R" else found.kind or KINDS[kind.domain], stated, value, found.entries)


def define_letters(c: Checked, pairs: list[tuple[Node, Size]]) -> None:
    """Let letters that stand for nothing stand for what is at their place; one for a size that cannot be told becomes its name."""
    for node, size in sorted(pairs, key=lambda pair: not isinstance(pair[0], Name)):
        names = {n.name for n in walk(node) if isinstance(n, Name)}
        new = {n for n in names if n not in c.sizes and n not in c.bound.variables and n not in c.program.params}
        if len(new) != 1:
            continue
        (name,) = new
        c.sizes[name] = letter(name)
        value = size if isinstance(node, Name) else solved(size_of(c, node), name, size)
        if value is not None and not any(map(is_loose, value.letters)):
            c.sizes[name] = value


def type_text(c: Checked, kind: Type) -> str:
    """A type as it is written."""
    if kind.domain == "card":
        return f"parameters of {kind.card}"
    letters = {n.name for node in kind.sizes for n in walk(node) if isinstance(n, Name) and n.name not in c.bound.variables}
    c = replace(c, sizes={**{name: letter(name) for name in letters}, **c.sizes})
    ends = [str(size_of(c, end)) for end in (kind.first, kind.last) if end]
    domain = {"bool": "{0,1}", "range": f"{{{'..'.join(ends)}}}"}.get(kind.domain, kind.domain)
    return shape_text(domain, sizes_of(c, kind))


# ---- expressions ------------------------------------------------------------------------------------------------------------


def result_of(c: Checked, node: Node) -> Result:
    """What is known of an expression's value or values; what is wrong with it is noted once, where it is."""
    try:
        return EXPRESSIONS[type(node)](c, node)
    except Refused as error:
        operator = (
            f"`{node.operator}`: "
            if isinstance(node, Binary | Unary)
            else f"{node.name}: "
            if isinstance(node, Call) and node.name in FUNCTIONS
            else ""
        )
        c.found.append(error_at(c.place, f"{operator}{error}", node.at))
        return UNCLEAR


def value_of(c: Checked, node: Node) -> Known:
    """What is known of an expression's one value."""
    result = result_of(c, node)
    if isinstance(result, tuple):
        c.found.append(error_at(c.place, f"{len(result)} results where one is expected; give them names: a, b ← …", node.at))
        return UNCLEAR
    return result


def integer(c: Checked, node: Node) -> Size:
    """An expression that is to be an integer."""
    known = value_of(c, node)
    try:
        return whole(c.rules, known, None)
    except Refused as error:
        c.found.append(error_at(c.place, str(error), node.at))
        return unknown()


def literal(_: Checked, node: Literal) -> Known:
    """A number, a truth value or a text."""
    match node.value:
        case bool():
            return scalar(TRUTH)
        case int() as n:
            return scalar(WHOLE, fixed(n))
        case float() as x:
            return scalar(REAL, fixed(int(x)) if x.is_integer() else None)
        case _:
            return Known(TEXT)


def name_known(c: Checked, node: Name) -> Known:
    """A variable, a hyper, a size, a parameter, or a family as a whole."""
    name = node.name
    if name in c.bound.variables:
        if name in c.bound.partly:
            raise Refused(f"{name} is not bound on every way to here; bind it in each branch, or before")
        return c.bound.variables[name]
    if name in c.hypers:
        return c.hypers[name]
    if name in c.program.params:
        return param(c, c.program.params[name])
    if name in c.sizes:
        return scalar(WHOLE, c.sizes[name])
    if family := c.program.names.wholes.get(name):
        return whole_family(c, family)
    if name.startswith("θ") and name in c.program.card.given:
        return Known(CARD)
    raise Refused(missing(c, name))


def missing(c: Checked, name: str) -> str:
    """What to say of a name that nothing is bound to."""
    if name in c.program.names.plain or name in c.program.names.families:
        return f"{name.replace('·', 'i')} is used before it is bound"
    names = {*c.bound.variables, *c.hypers, *c.program.params, *c.sizes}
    return f"unknown name {name}{near(name, names)}"


def param(c: Checked, d: Declared) -> Known:
    """A parameter."""
    if d.tensor is None and d.type.domain != "card" and d.name not in c.program.card.given:
        raise Refused(f"{d.name} has no tensor: name it in brackets on its `Param` line, or list it behind the semicolon of the headline")
    return declared_known(c, d)


def whole_family(c: Checked, name: str) -> Known:
    """All members on a new first axis."""
    if family := c.bound.families.get(name):
        if name in c.bound.partly:
            raise Refused(f"{name.replace('·', 'i')} is not bound on every way to here; bind it in each branch, or before")
        member, number = family.member, family.number
        loops = {*family.indices, *c.loops}
    elif name in c.program.params and len(c.program.params[name].type.ranges) == 1:
        d = c.program.params[name]
        (r,) = d.type.ranges
        member, number, loops = param(c, d), size_of(c, r.last) - size_of(c, r.first) + ONE, {r.index}
    else:
        raise Refused(missing(c, name))
    if member.kind in (CARD, TEXT) or member.sizes is None:
        return Known(member.kind, None, card=member.card)
    return Known(member.kind, (number, *(unknown() if s.letters & loops else s for s in member.sizes)))


def member_known(c: Checked, node: Member) -> Known:
    """A member of a family."""
    values = [integer(c, i) for i in node.indices]
    if family := c.bound.families.get(node.family):
        if node.family in c.bound.partly:
            raise Refused(f"{node.family.replace('·', 'i')} is not bound on every way to here; bind it in each branch, or before")
        return replaced(family.member, dict(zip(family.indices, values, strict=True)))
    if node.family not in c.program.params:
        raise Refused(missing(c, node.family))
    d = c.program.params[node.family]
    names = counted(d)
    for r in d.type.ranges:
        first, last, found = (
            c.rules.number(s) for s in (size_of(c, r.first), size_of(c, r.last), dict(zip(names, values, strict=True))[r.index])
        )
        if found is not None and ((first is not None and found < first) or (last is not None and found > last)):
            raise Refused(f"{d.name} is declared for {r.index} = {first} to {last}, found {found}")
    before = c.sizes
    c.sizes = {**c.sizes, **{name: letter(name) for name in names}}
    known = param(c, d)
    c.sizes = before
    return replaced(known, dict(zip(names, values, strict=True)))


def replaced(known: Known, values: Mapping[str, Size]) -> Known:
    """What is known, with values for letters."""
    if known.sizes is None:
        return known
    value = known.value and substituted(known.value, values)
    return replace(known, sizes=tuple(substituted(s, values) for s in known.sizes), value=value)


def called(c: Checked, node: Call) -> Result:
    """What a function or a card gives."""
    if node.name in FUNCTIONS:
        inputs = [value_of(c, argument) for argument in node.inputs]
        options = {name: value_of(c, value) for name, value in node.options}
        if wrong := misuse(node):
            c.found.append(error_at(c.place, wrong, node.at))
            return UNCLEAR
        return RULES[node.name](c.rules, *inputs, **options)
    inputs, handed = ([value_of(c, argument) for argument in some] for some in (node.inputs, node.given))
    card = find_card(c, node.name)
    if card is None:
        near_names = [*FUNCTIONS, *(card.called for card in c.library.values())]
        raise Refused(f"{node.name}: no such function, and no such card{near(node.name, near_names)}")
    if wrong := miscalled(node, card):
        raise Refused(wrong)
    return call_card(c, node, program(card), inputs, handed)


def call_card(c: Checked, node: Call, made: Program, inputs: list[Known], handed: list[Known]) -> Result:
    """What a card gives, by its outputs; its inputs are held against what is handed to it."""
    card = made.card
    given = dict(zip(card.given, handed, strict=True))
    callee = begun(card, c.library, {})
    callee.found.clear()
    for h in card.hypers:
        own = given.get(h.name) or (callee.hypers[h.name] if h.value is not None else c.hypers.get(h.name, callee.hypers[h.name]))
        callee.hypers[h.name] = own
        if own.value is not None:
            callee.sizes[h.name] = own.value
        elif own.sizes == () and own.kind != TEXT:
            callee.sizes[h.name] = unknown()
    callee.rules = c.rules
    callee.sizes = {name: size for name, size in callee.sizes.items() if name not in made.letters}
    callee.bound = Bindings({d.name: replace(k, value=k.value) for d, k in zip(made.inputs, inputs, strict=True)})
    arguments = [*zip(made.inputs, inputs, node.inputs, strict=True)]
    arguments += [(made.params[name], given[name], n) for name, n in zip(card.given, node.given, strict=True) if name in made.params]
    open_pairs = [
        pair
        for d, k, _ in arguments
        if k.sizes is not None and len(k.sizes) == len(d.type.sizes)
        for pair in zip(d.type.sizes, k.sizes, strict=True)
    ]
    take_letters(callee, open_pairs)
    for d, known, argument in arguments:
        if d.type.ranges:
            continue
        try:
            as_stated(callee, known, d.type, f"{card.called}: {d.name}")
        except Refused as error:
            c.found.append(error_at(c.place, str(error), argument.at))
    if not made.outputs:
        return UNCLEAR
    results = tuple(output_known(callee, d) for d in made.outputs)
    return results[0] if len(results) == 1 else results


def take_letters(callee: Checked, pairs: list[tuple[Node, Size]]) -> None:
    """Let the letters of a card that is called stand for the sizes of what it is given, even for those that cannot be told."""
    for node, size in sorted(pairs, key=lambda pair: not isinstance(pair[0], Name)):
        new = {n.name for n in walk(node) if isinstance(n, Name) and n.name not in callee.sizes and n.name in callee.program.letters}
        if len(new) != 1:
            continue
        (name,) = new
        if isinstance(node, Name):
            callee.sizes[name] = size
            continue
        callee.sizes[name] = letter(name)
        callee.sizes[name] = solved(size_of(callee, node), name, size) or unknown()


def output_known(callee: Checked, d: Declared) -> Known:
    """What is known of an output of a card that was called; its letters that stand for nothing cannot be told."""
    sizes = sizes_of(callee, d.type)
    value = unknown() if not sizes and d.type.domain in ("ℕ", "ℤ", "range") else None
    return Known(KINDS[d.type.domain], None if d.type.domain == "card" else sizes, value, card=d.type.card)


def index_known(c: Checked, node: Index) -> Known:
    """A part of an array."""
    base = value_of(c, node.operand)
    items: list[Known | Range | str] = []
    for item in node.items:
        match item:
            case Rest():
                items.append("…")
            case New():
                items.append("new")
            case Slice():
                ends = (end and value_of(c, end) for end in (item.start, item.stop, item.step))
                items.append(Range(*ends))
            case _:
                items.append(value_of(c, item))
    return indexed(c.rules, base, items)


def comparison(c: Checked, node: Compare) -> Known:
    """A chain of comparisons."""
    left, result = value_of(c, node.left), None
    for relation, operand in node.rest:
        right = value_of(c, operand)
        known = compare(c.rules, relation, left, right)
        result = known if result is None else binary(c.rules, "∧", truths(result), known)
        left = right
    return result or UNCLEAR


def raised(c: Checked, node: Power) -> Known:
    """A power."""
    return power(c.rules, value_of(c, node.base), value_of(c, node.exponent), isinstance(node.exponent, Literal))


EXPRESSIONS: dict[type[Node], Callable[[Checked, Any], Result]] = {
    Literal: literal,
    Name: name_known,
    Member: member_known,
    Unary: lambda c, node: unary(c.rules, node.operator, value_of(c, node.operand)),
    Binary: lambda c, node: binary(c.rules, node.operator, value_of(c, node.left), value_of(c, node.right)),
    Compare: comparison,
    Transpose: lambda c, node: RULES["transpose"](c.rules, value_of(c, node.operand)),
    Power: raised,
    Index: index_known,
    Call: called,
    Array: lambda c, node: RULES["stack"](c.rules, *(value_of(c, item) for item in node.items)),
    Values: lambda c, node: tuple(value_of(c, item) for item in node.items),
}
