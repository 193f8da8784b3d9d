"""A card with all its texts read: what each name means, and its steps as a tree that can be checked, run and written as code."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any

from .language import (
    Index,
    Literal,
    Member,
    Name,
    Node,
    Power,
    Range,
    Type,
    expression,
    moved,
    part_of,
    sequence,
    template,
    type_of,
    walk,
)
from .structure import Card, Declaration, Step
from .text import error_at

# ---- names ------------------------------------------------------------------------------------------------------------------

SCRIPTS = re.compile(r"_(\{[^{}]*\}|[^\W_]+)(['′]*)")


@dataclass(frozen=True)
class Script:
    """One subscript or superscript: its sign, its text (empty where only its value counts), and it as an expression."""

    sign: str
    text: str
    value: Node


Family = tuple[str, tuple[tuple[str, str | None], ...]]  # root, and each script's sign and text, None where an index stands


@dataclass(frozen=True)
class Names:
    """What a card declares and binds. `families` are by their names with `·` where the index stands: "θ_·^attn"."""

    plain: frozenset[str]
    families: dict[str, Family]

    @cached_property
    def wholes(self) -> dict[str, str]:
        """The family that a name means as a whole: `Y` is all of `Y^·`."""
        return {re.sub(r"[_^]·", "", name): name for name in self.families if name.count("·") == 1}


def scripted(node: Node) -> tuple[str, tuple[Script, ...]] | None:
    """The root and the scripts of a name; None where the node is none."""
    if isinstance(node, Power):
        base, exponent = scripted(node.base), node.exponent
        if base is None:
            return None
        if not isinstance(exponent, Name):
            text = str(exponent.value) if isinstance(exponent, Literal) else ""
            return base[0], (*base[1], Script("^", text, exponent))
        root, below = scripted(exponent) or ("", ())
        return base[0], (*base[1], Script("^", root, Name(root, at=exponent.at)), *below)
    if not isinstance(node, Name):
        return None
    root = SCRIPTS.split(node.name, maxsplit=1)[0]
    return root, tuple(subscripts(node, len(root)))


def subscripts(node: Name, start: int) -> Iterator[Script]:
    """The subscripts of a name, from an offset on."""
    for found in SCRIPTS.finditer(node.name, start):
        text = found[1].strip("{}")
        value = expression(text)
        plain = isinstance(value, Name | Literal) and not found[2]
        yield Script("_", text if plain else found[1] + found[2], moved(value, node.at + found.start(1) + found[1].startswith("{")))


def spelled_out(root: str, scripts: tuple[Script, ...]) -> str:
    """A name from its parts."""
    return root + "".join(s.sign + s.text for s in scripts)


def family_of(node: Node, indices: set[str]) -> tuple[str, Family] | None:
    """The family that a declared name makes, where some of its scripts are among these indices."""
    root, scripts = scripted(node) or ("", ())
    if not any(s.text in indices for s in scripts):
        return None
    pattern = tuple((s.sign, None if s.text in indices else s.text) for s in scripts)
    return root + "".join(sign + ("·" if text is None else text) for sign, text in pattern), (root, pattern)


def resolve(node: Node, names: Names) -> Node:
    """The node with every scripted name as what it is: a name, a member of a family, an index, or a power."""
    if isinstance(node, Name | Power) and (found := scripted(node)) is not None:
        if spelled_out(*found) in names.plain or spelled_out(*found) in names.wholes:
            return Name(spelled_out(*found), at=node.at)
        if member := member_of(*found, names):
            return replace(member, indices=tuple(resolve(i, names) for i in member.indices), at=node.at)
        if isinstance(node, Name):
            root, scripts = found
            if scripts and (spelled_out(root, scripts[:-1]) in names.plain or member_of(root, scripts[:-1], names)):
                before = resolve(Name(spelled_out(root, scripts[:-1]), at=node.at), names)
                return Index(before, (resolve(scripts[-1].value, names),), at=node.at)
            return node
    changes = {f.name: resolved(getattr(node, f.name), names) for f in fields(node) if isinstance(getattr(node, f.name), Node | tuple)}
    return replace(node, **changes) if changes else node


def resolved(value: Any, names: Names) -> Any:
    """A field of a node, resolved."""
    if isinstance(value, Node):
        return resolve(value, names)
    return tuple(resolved(item, names) for item in value) if isinstance(value, tuple) else value


def resolve_type(kind: Type, names: Names) -> Type:
    """A type whose sizes and ends are resolved."""
    ranges = tuple(Range(r.index, resolve(r.first, names), resolve(r.last, names)) for r in kind.ranges)
    first, last = (end and resolve(end, names) for end in (kind.first, kind.last))
    return replace(kind, sizes=resolved(kind.sizes, names), first=first, last=last, ranges=ranges)


def member_of(root: str, scripts: tuple[Script, ...], names: Names) -> Member | None:
    """The member of a family that a root with these scripts is."""
    for name, (stem, pattern) in names.families.items():
        fits = len(pattern) == len(scripts) and all(
            s.sign == sign and text in (None, s.text) for s, (sign, text) in zip(scripts, pattern, strict=True)
        )
        if stem == root and fits:
            return Member(name, tuple(s.value for s, (_, text) in zip(scripts, pattern, strict=True) if text is None))
    return None


# ---- programs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Declared:
    """A name that is declared: its type and, for a parameter, the name of its tensor."""

    name: str
    type: Type
    declaration: Declaration
    tensor: tuple[str | Node, ...] | None = None


def counted(declared: Declared) -> tuple[str, ...]:
    """The indices of a family, in the order in which its name has them."""
    indices = {r.index for r in declared.type.ranges}
    _, scripts = scripted(expression(declared.name)) or ("", ())
    return tuple(s.text for s in scripts if s.text in indices)


@dataclass(frozen=True)
class Assign:
    """Targets are `Name`, `Member`, or `Index` of one of these."""

    step: Step
    targets: tuple[Node, ...]
    value: Node
    types: tuple[Type, ...]
    taps: tuple[tuple[str | Node, ...] | None, ...]  # each target's activation


@dataclass(frozen=True)
class Loop:
    """`over` is a `Sequence`, or an expression for a vector."""

    step: Step
    variable: str
    over: Node
    body: "tuple[Statement, ...]"


@dataclass(frozen=True)
class Branch:
    """A condition (None: else) and what is done where it holds."""

    step: Step
    condition: Node | None
    body: "tuple[Statement, ...]"


@dataclass(frozen=True)
class Choice:
    """The first branch that holds is taken."""

    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Return:
    """The results, a `Values` where there are several."""

    step: Step
    value: Node


Statement = Assign | Loop | Choice | Return


@dataclass(frozen=True)
class Program:
    """A card, read. `letters` are the sizes that the shapes of its inputs define."""

    card: Card
    inputs: tuple[Declared, ...]
    outputs: tuple[Declared, ...]
    params: dict[str, Declared]  # by name; of families by the name with `·`
    names: Names
    letters: tuple[str, ...]
    body: tuple[Statement, ...] = field(default=(), repr=False)

    def given(self, name: str) -> tuple[str, ...]:
        """The parameters that a name behind the semicolon of the headline hands over: all that have no name of their own there, for θ."""
        if name in self.params or not name.startswith("θ") or any(h.name == name for h in self.card.hypers):
            return (name,)
        return tuple(p for p in self.params if p not in self.card.given)


@lru_cache(maxsize=256)
def program(card: Card) -> Program:
    """The program of a card. Raises CardError for a text that cannot be read."""
    inputs = tuple(read_declared(card.inputs))
    outputs = tuple(read_declared(card.outputs))
    params = tuple(read_declared(card.params))
    by_name = {(family_of(expression(d.name), {r.index for r in d.type.ranges}) or (d.name,))[0]: d for d in params}
    names = names_of_card(card, inputs, outputs, params)
    known = {d.name for d in inputs} | {h.name for h in card.hypers}
    letters = tuple(dict.fromkeys(n for d in inputs for n in letters_of(d.type) if n not in known))
    made = Program(card, inputs, outputs, by_name, names, letters)
    made = replace(
        made,
        inputs=tuple(replace(d, type=resolve_type(d.type, names)) for d in inputs),
        outputs=tuple(replace(d, type=resolve_type(d.type, names)) for d in outputs),
        params={name: replace(d, type=resolve_type(d.type, names)) for name, d in by_name.items()},
    )
    steps = list(card.steps)
    return replace(made, body=tuple(read_block(steps, names)))


def read_declared(declarations: tuple[Declaration, ...]) -> Iterator[Declared]:
    """Each name of these declarations."""
    for d in declarations:
        kind = type_of(d.type, d.place)
        for name in d.names:
            yield Declared(name, kind, d, template(d.key[name], d.place) if d.key.get(name) else None)


def letters_of(kind: Type) -> Iterator[str]:
    """The letters in the sizes of a type, from left to right."""
    yield from (node.name for size in kind.sizes for node in walk(size) if isinstance(node, Name))


def names_of_card(card: Card, inputs: tuple[Declared, ...], outputs: tuple[Declared, ...], params: tuple[Declared, ...]) -> Names:
    """What the scripts of a card's names mean: by its declarations, its steps, and the letters in its shapes."""
    plain = {d.name for d in inputs} | {h.name for h in card.hypers}
    letters = [letter for d in (*inputs, *outputs) for letter in letters_of(d.type)]
    families: dict[str, Family] = {}

    def add(node: Node, indices: set[str]) -> None:
        root, scripts = scripted(node) or ("", ())
        family = family_of(node, indices)
        if spelled_out(root, scripts) in plain or member_of(root, scripts, Names(frozenset(), families)):
            return
        if family:
            families.setdefault(*family)
        else:
            plain.add(spelled_out(root, scripts))

    for d in params:
        add(expression(d.name, d.declaration.place), {r.index for r in d.type.ranges})
    loops: set[str] = set()
    for step in card.steps:
        if step.kind == "for":
            loops |= set(step.variables)
            plain |= set(step.variables)
        elif step.kind in ("bind", "update"):
            for target in targets_of(step):
                add(base_of(target), loops)
        letters += [letter for t, place in step.places() for letter in letters_of(type_of(t, place))]
    for letter in letters:
        if isinstance(resolve(Name(letter), Names(frozenset(plain), families)), Name):  # and not such as w_ℓ, an entry of w
            plain.add(letter)
    return Names(frozenset(plain), families)


def targets_of(step: Step) -> Iterator[Node]:
    """What a step assigns to, not resolved. Raises CardError for what cannot be assigned to."""
    start = 0
    for variable in step.variables:
        node = part_of(variable, start, step.targets)
        if scripted(base_of(node)) is None:
            raise error_at(step.targets, f"{variable}: expected a name, or a part of one such as K[:, p]", start)
        yield node
        start += len(variable) + 2


def base_of(target: Node) -> Node:
    """The name that a target is, or is a part of."""
    return target.operand if isinstance(target, Index) else target


def read_block(steps: list[Step], names: Names) -> Iterator[Statement]:
    """The statements up to the end of a block, which stays; what is read is taken from `steps`."""
    while steps and steps[0].kind not in ("end", "else"):
        step = steps.pop(0)
        if step.kind in ("bind", "update"):
            yield read_assign(step, names)
        elif step.kind == "for":
            over = resolve(sequence(step.expression, step.place), names)
            body = tuple(read_block(steps, names))
            steps.pop(0)
            yield Loop(step, step.variables[0], over, body)
        elif step.kind == "if":
            yield read_choice(step, steps, names)
        elif step.kind == "return":
            yield Return(step, resolve(expression(step.expression, step.place), names))


def read_choice(step: Step, steps: list[Step], names: Names) -> Choice:
    """An if with all its branches."""
    branches = []
    while step.kind != "end":
        condition = resolve(expression(step.expression, step.place), names) if step.expression else None
        branches.append(Branch(step, condition, tuple(read_block(steps, names))))
        step = steps.pop(0)
    return Choice(tuple(branches))


def read_assign(step: Step, names: Names) -> Assign:
    """A bind or an update."""
    types = tuple(resolve_type(type_of(t, place), names) for t, place in step.places())
    taps = tuple(template(t, step.targets) if t else None for t in step.taps) or (None,) * len(step.variables)
    targets = tuple(resolve(target, names) for target in targets_of(step))
    return Assign(step, targets, resolve(expression(step.expression, step.place), names), types, taps)
