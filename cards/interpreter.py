"""Runs a card in NumPy: its steps, the cards that it calls, its parameters from wherever the caller has them.

    run(card, library, inputs={"x": ids}, hypers={"D": 768, …}, source=tensor_by_name).results

What cannot be done is a CardError at its place. A run is bounded (`Limits`), so that any card can be tried.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .evaluate import (
    Bound,
    Frame,
    Group,
    Machine,
    Parts,
    Source,
    clean,
    computed,
    evaluate,
    index_key,
    integer,
    is_hyper,
    is_known,
    joined,
    refusal,
    several,
    size_of,
    tensor_name,
    type_text,
)
from .functions import Refused, miscalled, some
from .language import Call, Index, Member, Name, Node, Sequence, Type, walk
from .operators import Limits, Numbers, Value, described, fits_into, integers, numbers
from .program import Assign, Choice, Loop, Return, Statement, program
from .structure import Card, CardError, HyperValue
from .text import error_at


@dataclass(frozen=True)
class Run:
    """What a card returned, in order and by the names of its outputs, and the activations that its steps named (the last of each name)."""

    results: tuple[Value, ...]
    activations: dict[str, Value]
    outputs: dict[str, Value]


def run(
    card: Card,
    library: Mapping[str, Card] | None = None,
    inputs: Mapping[str, Any] | None = None,
    hypers: Mapping[str, HyperValue] | None = None,
    source: Source | None = None,
    *,
    group: str = "",
    dtype: Any = np.float64,
    limits: Limits | None = None,
    watch: Callable[[Bound], None] | None = None,
) -> Run:
    """Run a card on inputs, by their names.

    `library` has the cards that it calls, by name. `inputs` may also have parameters that its headline lists behind the semicolon.
    `hypers` go before the values that the card states. `source` gives a parameter by its tensor's name (LANGUAGE.md, Parameters), below
    `group`. Reals are computed in `dtype`, float64 or float32. `watch` is called with every variable that a step binds.

    Raises CardError for what does not fit, at its place, and for a run beyond its limits.
    """
    machine = Machine(library or {}, source or no_source, Numbers(np.dtype(dtype), limits or Limits()), watch, call_card)
    frame = Frame(machine, program(card), known_hypers(card, {}, hypers or {}), group, place=card.place)
    handed = dict(inputs or {})
    wanted = {*card.arguments, *(name for name in card.given if name in handed)}
    if set(handed) != wanted:
        raise CardError(
            card.place, f"{card.name}: expected the inputs {', '.join(card.arguments) or 'none'}, found {', '.join(handed) or 'none'}"
        )
    with np.errstate(all="ignore"):
        try:
            for name in card.given:
                if name in handed:
                    hand_over(frame, name, value_of(machine, handed[name]))
            results = run_frame(frame, tuple(value_of(machine, handed[name]) for name in card.arguments))
        except Refused as error:
            raise CardError(card.place, f"{card.name}: {error}") from None
        except RecursionError:
            raise CardError(card.place, f"{card.name}: calls and expressions go too deep into each other") from None
    activations = machine.activations | {name: whole_activation(parts) for name, parts in machine.parts.items()}
    return Run(results, activations, dict(zip((d.name for d in frame.program.outputs), results, strict=False)))


def no_source(name: str) -> np.ndarray:
    """The source of a card that has no parameters."""
    raise KeyError(name)


def value_of(machine: Machine, value: Any) -> Value:
    """What a caller from outside hands over, as a value."""
    return value if isinstance(value, str | Group) else machine.numbers.normal(np.asarray(value))


def known_hypers(card: Card, callers: Mapping[str, HyperValue], handed: Mapping[str, HyperValue]) -> dict[str, HyperValue]:
    """A card's hypers: those handed over, else as the card states them, else the caller's."""
    stated = {h.name: h.value for h in card.hypers if h.value is not None}
    return {**callers, **stated, **handed}


# ---- cards ------------------------------------------------------------------------------------------------------------------


def run_frame(frame: Frame, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
    """The results of a card whose frame is made, for its inputs. Raises Refused where these do not fit, and CardError for its steps."""
    card, made = frame.program.card, frame.program
    handed = [*zip(made.inputs, inputs, strict=True), *((made.params[name], value) for name, value in frame.given.items())]
    take_sizes(frame, [(d.type, value) for d, value in handed if not d.type.ranges])
    for declared, value in handed:
        if not declared.type.ranges:
            frame.place = declared.declaration.place
            slots = frame.given if declared.name in frame.given else frame.variables
            slots[declared.name] = fitting(frame, value, declared.type, declared.name)
    held = frame.machine.held
    results = execute(frame, made.body)
    frame.machine.held = held
    if results is None:
        raise CardError(card.place, f"{card.name} ends without `return`")
    if not made.outputs:
        return results
    if len(results) != len(made.outputs):
        raise refusal(frame, None, f"{card.name} has {some(len(made.outputs), 'output')}, and here returns {len(results)}")
    take_sizes(frame, [(d.type, value) for d, value in zip(made.outputs, results, strict=True)])
    try:
        return tuple(fitting(frame, value, d.type, d.name) for d, value in zip(made.outputs, results, strict=True))
    except Refused as error:
        raise refusal(frame, None, str(error)) from None


def take_sizes(frame: Frame, stated: list[tuple[Type, Value]]) -> None:
    """Give the letters in stated shapes their values; those of plain letters first, then such as T in `R^{(T+1)×D}`.

    A letter that a step's stated shape defined is defined anew when the step is carried out again.
    """
    for letter in [name for name, step in frame.letters.items() if step is frame.step]:
        del frame.letters[letter], frame.variables[letter]
    pairs = [
        (node, length)
        for kind, value in stated
        if hasattr(value, "shape") and len(kind.sizes) == value.ndim
        for node, length in zip(kind.sizes, value.shape, strict=True)
    ]
    for node, length in sorted(pairs, key=lambda pair: not isinstance(pair[0], Name)):
        unknown = {n.name for n in walk(node) if isinstance(n, Name) and not is_known(frame, n.name)}
        if len(unknown) != 1:
            continue
        (letter,) = unknown
        if (found := solved(frame, node, letter, length)) is None:
            continue
        if is_hyper(frame, letter):
            frame.hypers = {**frame.hypers, letter: found}
        else:
            frame.variables[letter] = np.int64(found)
            frame.letters[letter] = frame.step


def solved(frame: Frame, node: Node, letter: str, length: int) -> int | None:
    """The value of a letter at which a size is `length`; None where there is none."""
    if isinstance(node, Name):
        return length
    sizes = []
    for trial in (0, 1):
        frame.variables[letter] = np.int64(trial)
        sizes.append(integer(frame, node))
        del frame.variables[letter]
    slope = sizes[1] - sizes[0]
    found, rest = divmod(length - sizes[0], slope) if slope else (0, 1)
    return found if rest == 0 and found >= 0 else None


def fitting(frame: Frame, value: Value, kind: Type, name: str) -> Value:
    """A value as what is stated of it; integers that are to be reals become such. Raises Refused where it is not."""
    if kind.domain == "card" or not hasattr(value, "dtype"):
        if kind.domain != "card" or not isinstance(value, Group):
            raise Refused(f"{name}: expected {type_text(frame, kind)}, found {described(value)}")
        return value
    if value.ndim != len(kind.sizes) or value.shape != tuple(size_of(frame, node) for node in kind.sizes):
        raise Refused(f"{name}: expected {type_text(frame, kind)}, found {described(value)}")
    if not in_domain(frame, value, kind):
        found = f", from {np.min(value)} to {np.max(value)}" if value.size else ""
        raise Refused(f"{name}: expected {type_text(frame, kind)}, found {described(value)}{found}")
    return frame.numbers.real(value) if kind.domain == "R" else value


def in_domain(frame: Frame, value: Value, kind: Type) -> bool:
    """Whether the numbers are of the stated domain."""
    found = value.dtype.kind
    if kind.domain == "R":
        return True
    if kind.domain == "bool":
        return found == "b" or (found == "i" and not np.any((value != 0) & (value != 1)))
    if found == "f":
        return False
    if kind.domain == "range" and kind.first and kind.last and value.size:
        return bool(np.min(value) >= integer(frame, kind.first)) and bool(np.max(value) <= integer(frame, kind.last))
    return kind.domain != "ℕ" or not np.any(value < 0)


def call_card(frame: Frame, node: Call) -> tuple[Value, ...]:
    """The results of a card that another one calls. Raises Refused and CardError."""
    card = found_card(frame, node.name)
    if wrong := miscalled(node, card):
        raise Refused(wrong)
    if frame.machine.calls >= frame.numbers.limits.calls:
        raise Refused(f"more than {frame.machine.calls} calls within each other")
    made = program(card)
    own = any(name not in card.given for name in made.params)
    callee = Frame(frame.machine, made, known_hypers(card, frame.hypers, {}), "" if own else frame.group, place=card.place)
    for name, argument in zip(card.given, node.given, strict=True):
        hand_over(callee, name, evaluate(frame, argument))
    inputs = tuple(computed(frame, argument) for argument in node.inputs)
    frame.machine.calls += 1
    try:
        return run_frame(callee, inputs)
    except Refused as error:
        raise Refused(f"{card.name}: {error}") from None
    finally:
        frame.machine.calls -= 1


def hand_over(frame: Frame, name: str, value: Value) -> None:
    """Give a card what stands behind the semicolon of its headline: a hyper, a parameter, or all others. Raises Refused."""
    if is_hyper(frame, name):
        if hasattr(value, "dtype"):
            value = value.item() if not value.ndim else tuple(value.tolist())
        frame.hypers = {**frame.hypers, name: value}
    elif name in frame.program.params:
        frame.given[name] = value
    elif isinstance(value, Group):
        frame.group = value.name
    else:
        raise Refused(f"{frame.program.card.name}: {name} stands for parameters of a card, found {described(value)}")


def found_card(frame: Frame, name: str) -> Card:
    """The card that a call names: of the caller's namespace, or by its whole name."""
    caller = frame.program.card
    for whole_name in (f"{caller.namespace}.{name}", name):
        if whole_name == caller.name:
            return caller
        if card := frame.machine.library.get(whole_name):
            return card
    raise Refused(f"{name}: no such function, and no such card")


# ---- steps ------------------------------------------------------------------------------------------------------------------


def execute(frame: Frame, body: tuple[Statement, ...]) -> tuple[Value, ...] | None:
    """Carry out statements; the results where one of them returns."""
    for statement in body:
        frame.machine.steps += 1
        if frame.machine.steps > frame.numbers.limits.steps:
            raise refusal(frame, None, f"the card takes more than {frame.numbers.limits.steps} steps")
        match statement:
            case Assign():
                assign(frame, statement)
            case Loop():
                if (results := loop(frame, statement)) is not None:
                    return results
            case Choice():
                if (results := choose(frame, statement)) is not None:
                    return results
            case Return():
                frame.place, frame.step = statement.step.place, statement.step
                value = several(frame, statement.value)
                return value if isinstance(value, tuple) else (value,)
    return None


def loop(frame: Frame, statement: Loop) -> tuple[Value, ...] | None:
    """A for."""
    frame.place, frame.step = statement.step.place, statement.step
    for value in loop_values(frame, statement.over):
        frame.machine.steps += 1
        frame.variables[statement.variable] = value
        if (results := execute(frame, statement.body)) is not None:
            return results
        if frame.machine.steps > frame.numbers.limits.steps:
            raise refusal(frame, None, f"the card takes more than {frame.numbers.limits.steps} steps")
    return None


def loop_values(frame: Frame, over: Node) -> Iterator[Value]:
    """What a loop runs through."""
    if isinstance(over, Sequence):
        first, last = (integer(frame, end) for end in (over.first, over.last))
        yield from map(np.int64, range(first, last + 1))
        return
    value = evaluate(frame, over)
    if not hasattr(value, "dtype") or value.ndim != 1:
        raise refusal(frame, over, f"a loop runs through a sequence or a vector, found {described(value)}")
    yield from value


def choose(frame: Frame, statement: Choice) -> tuple[Value, ...] | None:
    """An if."""
    for branch in statement.branches:
        frame.place, frame.step = branch.step.place, branch.step
        if branch.condition is None or holds(frame, branch.condition):
            return execute(frame, branch.body)
    return None


def holds(frame: Frame, condition: Node) -> bool:
    """Whether a condition is true."""
    value = evaluate(frame, condition)
    if not hasattr(value, "dtype") or value.ndim or value.dtype.kind != "b":
        raise refusal(frame, condition, f"a condition is one truth value, found {described(value)}")
    return bool(value)


def assign(frame: Frame, statement: Assign) -> None:
    """A bind or an update."""
    step, targets = statement.step, statement.targets
    frame.place, frame.step = step.place, step
    value = several(frame, statement.value)
    values = value if isinstance(value, tuple) and not isinstance(statement.value, Index | Name) else (value,)
    if len(values) != len(targets):
        raise refusal(frame, statement.value, f"{some(len(values), 'result')} for {some(len(targets), 'name')}")
    bound = [assigned(frame, target, clean(frame, v)) for target, v in zip(targets, values, strict=True)]
    take_sizes(frame, [(kind, part) for kind, (part, _) in zip(statement.types, bound, strict=False)])
    for i, (kind, (_, place)) in enumerate(zip(statement.types, step.places(), strict=True)):
        frame.place = place
        try:
            fitted = fitting(frame, bound[i][0], kind, step.variables[i])
        except Refused as error:
            raise refusal(frame, None, str(error)) from None
        if not isinstance(targets[i], Index):
            bound[i] = (fitted, fitted)
    frame.place = step.targets
    for target, variable, tap, (_, value) in zip(targets, step.variables, statement.taps, bound, strict=True):
        store(frame, target.operand if isinstance(target, Index) else target, value)
        name = record(frame, target, tap, value) if tap else ""
        if frame.machine.watch:
            frame.machine.watch(Bound(frame.program.card, step, variable, name, value))
    if frame.machine.held + frame.machine.recorded > frame.numbers.limits.held:
        raise refusal(frame, None, f"the card holds more than {frame.numbers.limits.held >> 20} MiB")


def record(frame: Frame, target: Node, tap: tuple[str | Node, ...], value: Value) -> str:
    """Keep an activation; its full name. Of a member whose indices the name does not have, as `Y^h ▷ [attn.heads]`, all are kept."""
    machine = frame.machine
    name = joined(frame.group, tensor_name(frame, tap, {}))
    named = {n.name for part in tap if isinstance(part, Node) for n in walk(part) if isinstance(n, Name)}
    indices = target.indices if isinstance(target, Member) else ()
    key = tuple(integer(frame, i) for i in indices if not (isinstance(i, Name) and i.name in named))
    slots: dict[Any, Value] = machine.activations
    at: Any = name
    if key:
        parts = machine.parts.get(name)
        if parts is None or parts.owner is not frame:
            machine.recorded -= sum(map(size_held, parts.values.values())) if parts else 0
            parts = machine.parts[name] = Parts(frame, frame.place)
        slots, at = parts.values, key
    machine.recorded += size_held(value) - size_held(slots.get(at))
    slots[at] = value
    return name


def whole_activation(parts: Parts) -> Value:
    """An activation from its members: their indices are its first axes. Raises CardError where they do not make one array."""
    keys = sorted(parts.values)
    grid = tuple(len(set(axis)) for axis in zip(*keys, strict=True))
    shapes = {parts.values[key].shape for key in keys}
    if len(shapes) > 1 or np.prod(grid) != len(keys):
        raise error_at(parts.place, "its members, together, make no array: they differ in shape, or some are missing")
    return np.stack([parts.values[key] for key in keys]).reshape(*grid, *shapes.pop())


def size_held(value: Value) -> int:
    """Bytes of a value."""
    return value.nbytes if hasattr(value, "nbytes") else 0


def assigned(frame: Frame, target: Node, value: Value) -> tuple[Value, Value]:
    """What a target stands for after it is given a value, and what its variable is then: the same, unless it is a part."""
    if not isinstance(target, Index):
        return value, value
    before, frame.place = frame.place, frame.step.targets if frame.step else frame.place
    base = computed(frame, target.operand)
    try:
        result, key = updated(frame, base, target, value)
    except Refused as error:
        raise refusal(frame, target, str(error)) from None
    frame.place = before
    return result[key], result


def updated(frame: Frame, base: Value, target: Index, value: Value) -> tuple[Value, Any]:
    """An array with a part of it changed, and NumPy's index of the part."""
    key = index_key(frame, target, base)
    part = base[key]
    if not fits_into(value, part.shape):
        raise Refused(f"{described(value)} does not fit into {described(part)}")
    frame.numbers.room(base.shape)
    kinds = base.dtype.kind, numbers(value).dtype.kind
    if kinds[0] == "f" or "f" in kinds:
        base, value = frame.numbers.real(base), frame.numbers.real(value)
    elif kinds != ("b", "b"):
        base, value = integers(base), integers(value)
    result = np.array(base)
    result[key] = value
    return result, key


def store(frame: Frame, target: Node, value: Value) -> None:
    """Give a name, or a member of a family, its value."""
    slots: dict[Any, Value] = frame.variables
    key: Any = target.name if isinstance(target, Name) else ""
    if isinstance(target, Member):
        slots = frame.members.setdefault(target.family, {})
        key = tuple(integer(frame, i) for i in target.indices)
    else:
        frame.letters.pop(key, None)
    frame.machine.held += size_held(value) - size_held(slots.get(key))
    slots[key] = value
