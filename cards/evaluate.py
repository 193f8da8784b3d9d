"""The values of expressions, in NumPy, while a card runs: names, parameters, operators, functions, indices. See `interpreter`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .functions import FUNCTIONS, Refused, misuse
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
from .operations import COMPUTED, transpose
from .operators import (
    BINARY,
    Numbers,
    Value,
    broadcast,
    checked_indices,
    compare,
    described,
    floor_quotient,
    numbers,
    power,
    truths,
    typed,
    unary,
    whole,
)
from .program import Declared, Program, counted
from .structure import NOWHERE, Card, CardError, HyperValue, Place, Step
from .text import error_at

Source = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Group:
    """The parameters below a name: `blocks.0`; all of the model's, where it is empty."""

    name: str


@dataclass(frozen=True)
class Bound:
    """What a step gave a `variable`, spelled as the step has it; `activation` is its full name, or empty. Of a part, the whole variable."""

    card: Card
    step: Step
    variable: str
    activation: str
    value: Value


@dataclass
class Parts:
    """An activation whose members a step gives one by one: those of the last `owner` that did."""

    owner: "Frame"
    place: Place
    values: dict[tuple[int, ...], Value] = field(default_factory=dict)


@dataclass
class Machine:
    """What the frames of one run share. `call` runs another card; `parts` are activations of which a step gives a member at a time."""

    library: Mapping[str, Card]
    source: Source
    numbers: Numbers
    watch: Callable[[Bound], None] | None
    call: Callable[["Frame", Call], tuple[Value, ...]]
    activations: dict[str, Value] = field(default_factory=dict)
    parts: dict[str, Parts] = field(default_factory=dict)
    calls: int = 0
    steps: int = 0
    held: int = 0  # bytes in variables
    recorded: int = 0  # bytes in activations


@dataclass
class Frame:
    """One running card. `letters` are the sizes that a step's stated shape defined, each with that step."""

    machine: Machine
    program: Program
    hypers: dict[str, HyperValue]  # its own and its callers'
    group: str  # below which it finds its parameters and names its activations
    variables: dict[str, Value] = field(default_factory=dict)
    members: dict[str, dict[tuple[int, ...], Value]] = field(default_factory=dict)
    letters: dict[str, Step | None] = field(default_factory=dict)
    given: dict[str, Value] = field(default_factory=dict)  # parameters that were handed over
    read: dict[str, Value] = field(default_factory=dict)  # parameters that were read, by the tensor's name
    place: Place = NOWHERE
    step: Step | None = None

    @property
    def numbers(self) -> Numbers:
        """How the run computes."""
        return self.machine.numbers


# ---- expressions ------------------------------------------------------------------------------------------------------------


def refusal(frame: Frame, node: Node | None, what: str) -> CardError:
    """The error at a node of the step that runs."""
    return error_at(frame.place, what, node.at if node else 0)


def evaluate(frame: Frame, node: Node) -> Value:
    """The one value of an expression. Raises CardError."""
    value = several(frame, node)
    if isinstance(value, tuple) and isinstance(node, Call | Values):
        raise refusal(frame, node, f"{len(value)} results where one is expected; give them names: a, b ← …")
    return value


def several(frame: Frame, node: Node) -> Value:
    """The value of an expression, a tuple where it has several results. Raises CardError."""
    try:
        return EVALUATE[type(node)](frame, node)
    except Refused as error:
        raise refusal(frame, node, f"{sign_of(node)}{error}") from None
    except CardError:
        raise
    except (ValueError, TypeError, IndexError, OverflowError, MemoryError) as error:
        raise refusal(frame, node, f"{sign_of(node)}{error or type(error).__name__}") from error


def sign_of(node: Node) -> str:
    """What an error's message begins with: the operator or function that it speaks of."""
    match node:
        case Binary() | Unary():
            return f"`{node.operator}`: "
        case Call() if node.name in FUNCTIONS:
            return f"{node.name}: "
        case _:
            return ""


def integer(frame: Frame, node: Node) -> int:
    """One integer."""
    try:
        return whole(evaluate(frame, node))
    except Refused as error:
        raise refusal(frame, node, str(error)) from None


def literal_value(frame: Frame, node: Literal) -> Value:
    """A number, a truth value or a text."""
    return constant(frame, node.value)


def constant(frame: Frame, value: HyperValue) -> Value:
    """A literal's or a hyper's value."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple) and any(isinstance(v, str) for v in value):
        return value
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise Refused("an integer of more than 64 bits")
    found = frame.numbers.normal(np.asarray(value))
    return found if found.ndim else found[()]


def name_value(frame: Frame, node: Name) -> Value:
    """A variable, a hyper, a size, a parameter, or a family as a whole."""
    name = node.name
    if name in frame.variables:
        return frame.variables[name]
    if is_hyper(frame, name) and frame.hypers.get(name) is not None:
        return constant(frame, frame.hypers[name])
    if name in frame.program.params:
        return read(frame, name, ())
    if whole_family := frame.program.names.wholes.get(name):
        return stacked(frame, whole_family)
    if name.startswith("θ") and name in frame.program.card.given:
        return Group(frame.group)
    if is_hyper(frame, name):
        raise Refused(f"{name}: this hyper has no value; state it, as in {name}=1, or name a model that has it")
    raise Refused(f"{name} is not bound")


def stacked(frame: Frame, family: str) -> Value:
    """All members of a family, on a new first axis."""
    if members := frame.members.get(family):
        keys = sorted(members)
        if keys != [(i,) for i in range(len(keys))]:
            raise Refused(f"members 0 to {len(keys) - 1} are not all bound")
        return COMPUTED["stack"](frame.numbers, *(members[key] for key in keys))
    if family not in frame.program.params:
        raise Refused("no member of it is bound")
    (counted,) = frame.program.params[family].type.ranges
    first, last = (integer(frame, end) for end in (counted.first, counted.last))
    values = [frame.numbers.normal(read(frame, family, (i,))) for i in range(first, last + 1)]
    return COMPUTED["stack"](frame.numbers, *values)


def member_value(frame: Frame, node: Member) -> Value:
    """A member of a family."""
    indices = tuple(integer(frame, i) for i in node.indices)
    members = frame.members.get(node.family, {})
    if indices in members:
        return members[indices]
    spelled = node.family.replace("·", "{}").format(*indices)
    if node.family in frame.program.params:
        return read(frame, node.family, indices)
    raise Refused(f"{spelled} is not bound")


def read(frame: Frame, name: str, indices: tuple[int, ...]) -> Value:
    """A parameter, as the source has it; its shape is checked."""
    if name in frame.given:
        value = frame.given[name]
        for i in indices:
            value = value[checked_indices(np.int64(i), value.shape[0])]
        return value
    declared = frame.program.params[name]
    values: dict[str, Value] = {}
    for (index, first, last), i in zip(counted_by(frame, declared), indices, strict=True):
        if not first <= i <= last:
            raise Refused(f"{declared.name} is declared for {index} = {first} to {last}, found {i}")
        values[index] = np.int64(i)
    if declared.type.domain == "card":
        return Group(joined(frame.group, tensor_name(frame, declared.tensor or (), values)))
    if declared.tensor is None:
        raise Refused(f"{declared.name} has no tensor: name it in brackets on its `Param` line, or hand it over behind a semicolon")
    tensor = joined(frame.group, tensor_name(frame, declared.tensor, values))
    if tensor not in frame.read:
        try:
            value = np.asarray(frame.machine.source(tensor))
        except KeyError:
            raise Refused(f"{declared.name}: the model has no tensor {tensor}") from None
        wanted = tuple(size_of(frame, node) for node in declared.type.sizes)
        if value.shape != wanted:
            raise Refused(f"{declared.name}: expected {type_text(frame, declared.type)}, found {tensor} {list(value.shape)}")
        frame.read[tensor] = value
    return frame.read[tensor]


def counted_by(frame: Frame, declared: Declared) -> list[tuple[str, int, int]]:
    """The indices of a family in the order in which its name has them, each with its ends."""
    ranges = {r.index: r for r in declared.type.ranges}
    return [(i, integer(frame, ranges[i].first), integer(frame, ranges[i].last)) for i in counted(declared)]


def tensor_name(frame: Frame, template: tuple[str | Node, ...], values: dict[str, Value]) -> str:
    """The name of a tensor or activation; `values` are those of a family's indices."""
    shadowed = {name: frame.variables[name] for name in values if name in frame.variables}
    frame.variables.update(values)
    try:
        return "".join(part if isinstance(part, str) else str(integer(frame, part)) for part in template)
    finally:
        for name in values:
            del frame.variables[name]
        frame.variables.update(shadowed)


def joined(group: str, name: str) -> str:
    """A name below a group's."""
    return ".".join(filter(None, (group, name)))


def computed(frame: Frame, node: Node) -> Value:
    """A value that is computed with: a parameter's in the kinds of the run."""
    return clean(frame, evaluate(frame, node))


def binary(frame: Frame, node: Binary) -> Value:
    """An operator between two operands."""
    left, right = computed(frame, node.left), computed(frame, node.right)
    return BINARY[node.operator](frame.numbers, left, right)


def one_operand(frame: Frame, node: Unary) -> Value:
    """An operator before an operand; the floor of a quotient of integers is exact."""
    inner = node.operand
    if node.operator in "⌊⌈" and isinstance(inner, Binary) and inner.operator == "/":
        a, b = computed(frame, inner.left), computed(frame, inner.right)
        exact = floor_quotient(frame.numbers, a, b, node.operator == "⌈")
        return exact if exact is not None else unary(frame.numbers, node.operator, a / b)
    return unary(frame.numbers, node.operator, computed(frame, inner))


def comparison(frame: Frame, node: Compare) -> Value:
    """A chain: all of its comparisons."""
    left, result = computed(frame, node.left), np.bool_(True)
    for relation, operand in node.rest:
        right = computed(frame, operand)
        holding = compare(frame.numbers, relation, left, right)
        result = holding if len(node.rest) == 1 else BINARY["∧"](frame.numbers, truths(result), holding)
        left = right
    return result


def raised(frame: Frame, node: Power) -> Value:
    """A power."""
    base, exponent = computed(frame, node.base), computed(frame, node.exponent)
    return power(frame.numbers, numbers(base), numbers(exponent), isinstance(node.exponent, Literal))


def array(frame: Frame, node: Array) -> Value:
    """Numbers in a vector, arrays on a new first axis."""
    return COMPUTED["stack"](frame.numbers, *(computed(frame, item) for item in node.items))


def called(frame: Frame, node: Call) -> Value:
    """A function's or a card's result."""
    if node.name not in FUNCTIONS:
        results = frame.machine.call(frame, node)
        return results[0] if len(results) == 1 else results
    if wrong := misuse(node):
        raise refusal(frame, node, wrong)
    arguments = [computed(frame, argument) for argument in node.inputs]
    options = {name: computed(frame, value) for name, value in node.options}
    result = COMPUTED[node.name](frame.numbers, *arguments, **options)
    return result[0] if isinstance(result, tuple) and len(result) == 1 else result


# ---- stated sizes -----------------------------------------------------------------------------------------------------------


def size_of(frame: Frame, node: Node) -> int:
    """A size in a type. Raises CardError."""
    try:
        return whole(evaluate(frame, node), 0)
    except Refused as error:
        raise refusal(frame, node, f"a size: {error}") from None


def type_text(frame: Frame, kind: Type) -> str:
    """A type with its sizes as numbers, where they are known."""
    if kind.domain == "card":
        return f"the parameters of {kind.card}"
    ends = [integer(frame, n) for n in (kind.first, kind.last) if n]
    domain = {"bool": "{0,1}", "range": f"{{{'..'.join(map(str, ends))}}}"}.get(kind.domain, kind.domain)
    return typed(domain, tuple(size_of(frame, node) if sized(frame, node) else letter_text(node) for node in kind.sizes))


def sized(frame: Frame, node: Node) -> bool:
    """Whether each letter in a size has a value."""
    return all(is_known(frame, n.name) for n in walk(node) if isinstance(n, Name))


def is_known(frame: Frame, name: str) -> bool:
    """Whether a name in a size has a value."""
    return name in frame.variables or (is_hyper(frame, name) and frame.hypers.get(name) is not None)


def letter_text(node: Node) -> str:
    """A size that has no value yet."""
    return node.name if isinstance(node, Name) else "…"


def clean(frame: Frame, value: Value) -> Value:
    """A value in the kinds of the run, where it has numbers."""
    return frame.numbers.normal(value) if hasattr(value, "dtype") else value


def is_hyper(frame: Frame, name: str) -> bool:
    """Whether the card declares a hyper of this name."""
    return any(h.name == name for h in frame.program.card.hypers)


# ---- indices ----------------------------------------------------------------------------------------------------------------


def indexed(frame: Frame, node: Index) -> Value:
    """A part of an array, or of a hyper's texts."""
    base = evaluate(frame, node.operand)
    if isinstance(base, tuple):
        item, *more = node.items
        if more or isinstance(item, Slice | Rest | New):
            raise Refused("texts are taken one at a time, by an integer")
        return base[int(checked_indices(np.int64(integer(frame, item)), len(base)))]
    return frame.numbers.normal(base[index_key(frame, node, base)])


def index_key(frame: Frame, node: Index, base: Value) -> tuple[Any, ...]:
    """What NumPy takes as the index. Raises Refused where the array has no such entries."""
    shape = numbers(base).shape
    rests = sum(isinstance(item, Rest) for item in node.items)
    taken = sum(not isinstance(item, Rest | New) for item in node.items)
    if rests > 1 or taken > len(shape):
        raise Refused(f"{taken} indices into {described(base)}" if rests < 2 else "`…` stands once in an index")
    key: list[Any] = []
    axis, rest = 0, base.size
    for item in node.items:
        if isinstance(item, Rest):
            axis += len(shape) - taken
            key.append(...)
        elif isinstance(item, New):
            key.append(None)
        else:
            key.append(axis_key(frame, item, shape[axis]))
            rest //= max(shape[axis], 1) if np.ndim(key[-1]) else 1
            axis += 1
    picks = [k for k in key if isinstance(k, np.ndarray)]
    if picks:
        frame.numbers.room((*broadcast(*picks), rest))
    return tuple(key)


def axis_key(frame: Frame, item: Node, n: int) -> Any:
    """The index of one axis of length n."""
    if not isinstance(item, Slice):
        index = computed(frame, item)
        return checked_indices(index if np.ndim(index) else np.int64(whole(index)), n)[()]
    start, stop, step = (None if end is None else integer(frame, end) for end in (item.start, item.stop, item.step))
    if step is not None and step < 1:
        raise Refused(f"a range goes on by 1 or more, found {step}")
    first, end = (default if v is None else v + n * (v < 0) for v, default in ((start, 0), (stop, n)))
    if not 0 <= first <= end <= n:
        raise Refused(f"the range {first} : {end} of an axis of length {n}")
    return slice(first, end, step)


def transposed(frame: Frame, node: Transpose) -> Value:
    """The last two axes exchanged."""
    return transpose(frame.numbers, computed(frame, node.operand))


def results_of(frame: Frame, node: Values) -> tuple[Value, ...]:
    """Several results."""
    return tuple(computed(frame, item) for item in node.items)


EVALUATE: dict[type[Node], Callable[[Frame, Any], Value]] = {
    Literal: literal_value,
    Name: name_value,
    Member: member_value,
    Unary: one_operand,
    Binary: binary,
    Compare: comparison,
    Transpose: transposed,
    Power: raised,
    Index: indexed,
    Call: called,
    Array: array,
    Values: results_of,
}
