"""A model's cards as one NumPy script: a function a card, the steps as they stand, and a reader of its safetensors files.

What the script does is what the cards say, in NumPy's words: it takes no step from the engine. The names of the cards stay where Python
takes them (γ, ℓ, x_1, g′ as gʹ); a superscript becomes a subscript. Sizes and settings are constants at its top.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..kernels.errors import ToyllmError
from ..models import gpt2
from ..models.checkpoint import Checkpoint
from . import emitted, settings
from .catalogue import called, library, reached
from .fill import fill
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
    Sequence,
    Slice,
    Transpose,
    Type,
    Unary,
    Values,
    walk,
)
from .program import Assign, Choice, Loop, Program, Return, Statement, program
from .structure import Card, HyperValue

WIDTH = 120
COMMENT = 72  # the column of a step's comment, counted from 0
SIGNS = {"⊙": "*", "/": "/", "+": "+", "-": "-", "mod": "%", "&": "&", "<<": "<<", ">>": ">>", "∨": "|", "∧": "&"}
RELATIONS = {"=": "==", "≠": "!=", "≤": "<=", "≥": ">=", "<": "<", ">": ">"}
LEVELS = {"|": 2, "&": 3, "<<": 4, ">>": 4, "+": 5, "-": 5, "*": 6, "/": 6, "@": 6, "//": 6, "%": 6}  # Python's, the highest binds most
COMPARISON, UNARY, POWER, ATOM = 1, 7, 8, 9  # a comparison binds less than `|` and `&`


def script(config: object, checkpoint: Checkpoint, name: str) -> str:
    """The script of a model: of its configuration and the names of its tensors. Raises ToyllmError for what NumPy has no words for."""
    values = settings.hypers(config, checkpoint.tensors, settings.is_tied(checkpoint, config)) | {"moe": "grouped"}
    family = "gpt2" if isinstance(config, gpt2.Config) else "gpt-oss"
    filled = {key: fill(card, values) for key, card in library().items()}
    cards = [*reached([filled[family]], filled).values()]
    written = [Writer(card, filled, values).function() for card in cards[1:]]
    main = Writer(cards[0], filled, values)
    body = "\n\n\n".join([main.function(), *written])
    constants = [f"{python_name(key)} = {constant(value)}" for key, value in values.items() if used(python_name(key), body)]
    helpers = [text for key, text in emitted.HELPERS.items() if used(key, body)]
    parts = [
        emitted.HEAD.format(name=json.dumps(name, ensure_ascii=False)[1:-1], family=cards[0].family.removesuffix(" family")),
        "\n".join(constants),
        tensor_table(checkpoint, config, "θ" in body),
        emitted.READER,
        *helpers,
        body,
        emitted.MAIN.format(model=python_name(cards[0].called)),
    ]
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def used(name: str, text: str) -> bool:
    """Whether a name occurs in a script as one."""
    return re.search(rf"(?<![\w.ʹ]){re.escape(name)}(?![\wʹ])", text) is not None


def python_name(name: str) -> str:
    """A card's name as Python takes it."""
    return re.sub(r"[\^.-]", "_", name).replace("′", "ʹ").replace("'", "ʹ").replace("{", "").replace("}", "")


def constant(value: HyperValue) -> str:
    """A hyper's value in Python; a tuple that repeats itself as such."""
    if isinstance(value, tuple):
        n = len(value)
        period = next((p for p in range(1, n // 2 + 1) if n % p == 0 and value == value[:p] * (n // p)), n)
        items = f"[{', '.join(map(constant, value[:period]))}]"
        return items if period == n else f"{items} * {n // period}"
    if value == math.pi:
        return "np.pi"
    if isinstance(value, float) and not math.isfinite(value):
        return "np.nan" if math.isnan(value) else "np.inf" if value > 0 else "-np.inf"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def tensor_table(checkpoint: Checkpoint, config: object, layered: bool) -> str:
    """What the script knows of the checkpoint's names: our names to its own, a layer's with {} for its number; and rows of fused ones."""
    names: dict[str, str] = {}
    for key, tensor in settings.tensors(checkpoint, config).items():
        layer, _, part = key.partition(".")
        if layer.isdecimal():
            names.setdefault(f"blocks.{part}", re.sub(rf"(?<!\d){layer}(?!\d)", "{}", tensor.name, count=1))
        else:
            names[key] = tensor.name
    rows: dict[str, tuple[int, int]] = {}
    if layered and not isinstance(config, gpt2.Config) and "blocks.qkv.weight" in names:
        heads = [config.num_attention_heads, *[config.num_key_value_heads] * 2]  # type: ignore[attr-defined]
        for i, part in enumerate(settings.QKV):
            ends = tuple(config.head_dim * sum(heads[: i + n]) for n in (0, 1))  # type: ignore[attr-defined]
            for kind in ("weight", "bias"):
                names[f"blocks.{part}.{kind}"] = names[f"blocks.qkv.{kind}"]
                rows[f"blocks.{part}.{kind}"] = ends
    table = ["NAMES = {  # of a tensor in the cards: its name in the files, {} the number of the layer"]
    table += [f"    {json.dumps(key)}: {json.dumps(value)}," for key, value in names.items()]
    table += ["}"]
    if rows:
        table += ["ROWS = {  # first and last of the rows, where queries, keys and values lie in one tensor"]
        table += [f"    {json.dumps(key)}: {value}," for key, value in rows.items()]
        table += ["}"]
    else:
        table += ["ROWS = {}"]
    return "\n".join(table)


# ---- a card -----------------------------------------------------------------------------------------------------------------


@dataclass
class Writer:
    """Writes one card as a function."""

    card: Card
    cards: Mapping[str, Card]
    values: Mapping[str, HyperValue]
    made: Program = field(init=False)
    types: dict[str, Type] = field(init=False)  # of variables, as the card states them
    lists: set[str] = field(init=False)  # families whose members are kept, as they are wanted together later
    opened: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.made = program(self.card)
        self.types = {d.name: d.type for d in (*self.made.inputs, *self.made.params.values())}
        for step in assigns(self.made.body):
            for target, kind in zip(step.targets, step.types, strict=False):
                if isinstance(target, Name):
                    self.types.setdefault(target.name, kind)
                elif isinstance(target, Member):
                    self.types.setdefault(target.family, kind)
        wholes = self.made.names.wholes
        spoken = (n for node in expressions(self.made.body) for n in walk(node) if isinstance(n, Name))
        self.lists = {wholes[n.name] for n in spoken if n.name in wholes}

    def function(self) -> str:
        """The function, its docstring from the card's inputs and outputs."""
        arguments = [python_name(name) for name in (*self.card.arguments, *self.card.given)]
        lines = [f"def {python_name(self.card.called)}({', '.join(arguments)}):", *self.documentation()]
        lines += [f"    {line}" for line in self.preparation()]
        lines += list(self.block(self.made.body, 1))
        return "\n".join(lines)

    def documentation(self) -> Iterator[str]:
        """The docstring: the headline, and what comes in and goes out."""
        yield f'    """{self.card.signature}' + ("" if self.card.inputs or self.card.outputs else '"""')
        if not (self.card.inputs or self.card.outputs):
            return
        yield ""
        for label, declarations in (("in ", self.card.inputs), ("out", self.card.outputs)):
            for d in declarations:
                yield f"    {label}  {', '.join(d.names)} ∈ {d.type}" + (f"   ({d.note})" if d.note else "")
        yield '    """'

    def preparation(self) -> Iterator[str]:
        """Sizes that the steps speak of, by the shapes of the inputs; and the parameters."""
        spoken = {n.name for node in expressions(self.made.body) for n in walk(node) if isinstance(n, Name)}
        for letter in self.made.letters:
            place = next(((d, i) for d in self.made.inputs for i, size in enumerate(d.type.sizes) if size == Name(letter)), None)
            if letter in spoken and place:
                yield f"{python_name(letter)} = {python_name(place[0].name)}.shape[{place[1]}]"
        for name, declared in self.made.params.items():
            if declared.type.domain == "card" or name in self.card.given or name not in spoken:
                continue
            tensor = "".join(part for part in declared.tensor or () if isinstance(part, str))
            where = f'f"{{θ}}.{tensor}"' if any(n.startswith("θ") for n in self.card.given) else f'"{tensor}"'
            yield f"{python_name(name)} = tensor({where})"

    # ---- statements

    def block(self, body: tuple[Statement, ...], depth: int) -> Iterator[str]:
        """The statements of a block."""
        indent = "    " * depth
        for statement in body:
            if isinstance(statement, Assign):
                yield from self.assign(statement, indent)
            elif isinstance(statement, Return):
                yield f"{indent}return {self.text(statement.value)}"
            elif isinstance(statement, Loop):
                for family in sorted(self.families(statement) - self.opened):
                    self.opened.add(family)
                    yield f"{indent}{family_name(family)} = []"
                yield f"{indent}for {python_name(statement.variable)} in {self.sequence(statement.over)}:"
                yield from self.block(statement.body, depth + 1)
            else:
                yield from self.choice(statement, depth)

    def families(self, loop: Loop) -> set[str]:
        """The families whose members a loop binds one by one, and that are wanted together."""
        return {t.family for step in assigns(loop.body) for t in step.targets if isinstance(t, Member) and t.family in self.lists}

    def choice(self, statement: Choice, depth: int) -> Iterator[str]:
        """An if with all its branches."""
        for number, branch in enumerate(statement.branches):
            head = "else" if branch.condition is None else f"{'elif' if number else 'if'} {self.text(branch.condition)}"
            yield f"{'    ' * depth}{head}:"
            yield from self.block(branch.body, depth + 1)

    def assign(self, statement: Assign, indent: str) -> Iterator[str]:
        """An assignment; a member that is kept goes to the end of its list."""
        kept = [t for t in statement.targets if isinstance(t, Member) and t.family in self.lists]
        left = [member_name(t) if isinstance(t, Member) else self.text(t) for t in statement.targets]
        step = statement.step
        shapes = ", ".join(dict.fromkeys(step.shapes))
        comment = "; ".join(filter(None, (shapes, step.note)))
        if kept and len(left) == 1:
            line = f"{indent}{family_name(kept[0].family)}.append({self.text(statement.value)})"
        else:
            line = f"{indent}{', '.join(left)} = {self.text(statement.value)}"
        yield from with_comment(line, comment, indent)
        if len(left) > 1:
            yield from (f"{indent}{family_name(t.family)}.append({member_name(t)})" for t in kept)

    def sequence(self, node: Node) -> str:
        """What a loop runs through."""
        if not isinstance(node, Sequence):
            return self.text(node)
        match node.last:
            case Binary("-", left, Literal(1)):
                behind = self.text(left)
            case last:
                behind = f"{self.text(last)} + 1"
        return f"range({behind})" if node.first == Literal(0) else f"range({self.text(node.first)}, {behind})"

    # ---- expressions

    def text(self, node: Node, level: int = 0) -> str:
        """An expression, in parentheses where what stands around it binds more."""
        written, own = self.written(node)
        return f"({written})" if own < level else written

    def written(self, node: Node) -> tuple[str, int]:  # noqa: C901 - one line a kind of node
        """An expression and how much it binds."""
        match node:
            case Literal(value):
                return constant(value), ATOM if not isinstance(value, float) or value >= 0 else UNARY
            case Name(name):
                return self.name(name), ATOM
            case Member():
                return (self.group(node) if node.family in self.made.params else member_name(node)), ATOM
            case Unary():
                return self.unary(node)
            case Binary():
                return self.binary(node)
            case Compare():
                return self.comparison(node), COMPARISON
            case Transpose(operand):
                return f"{self.text(operand, ATOM)}.{'T' if self.rank(operand) == 2 else 'swapaxes(-1, -2)'}", ATOM
            case Power():
                return self.power(node), POWER
            case Index(operand, items):
                return f"{self.text(operand, ATOM)}[{', '.join(map(self.item, items))}]{self.widened(operand)}", ATOM
            case Array(items):
                return f"np.array([{', '.join(map(self.text, items))}])", ATOM
            case Values(items):
                return ", ".join(map(self.text, items)), 0
            case Call():
                return self.call(node), ATOM
        raise ToyllmError(f"{self.card.name}: {type(node).__name__} has no words in NumPy")

    def comparison(self, node: Compare) -> str:
        """A comparison; Python's own chains do not go with arrays."""
        if len(node.rest) != 1:
            raise ToyllmError(f"{self.card.name}: a chain of comparisons has no words in NumPy; write two, with ∧")
        [(relation, right)] = node.rest
        return f"{self.text(node.left, COMPARISON + 1)} {RELATIONS[relation]} {self.text(right, COMPARISON + 1)}"

    def power(self, node: Power) -> str:
        """A power; a whole number before an exponent that may be below 0 is written as a real."""
        match node.base, node.exponent:
            case Literal(int() as value), exponent if not isinstance(exponent, Literal):
                below = f"{value}.0"
            case base, _:
                below = self.text(base, POWER + 1)
        return f"{below} ** {self.text(node.exponent, UNARY)}"

    def name(self, name: str) -> str:
        """A variable; a family as a whole is its members on a new axis; parameters of a card are the beginning of their tensors' names."""
        if name in self.made.names.wholes and self.made.names.wholes[name] in self.lists:
            return f"np.stack({family_name(self.made.names.wholes[name])})"
        declared = self.made.params.get(name)
        if declared is not None and declared.type.domain == "card":
            return "θ" if any(n.startswith("θ") for n in self.card.given) else '""'
        return python_name(name)

    def group(self, node: Member) -> str:
        """The beginning of the names of a group's tensors."""
        declared = self.made.params[node.family]
        own = "".join(part if isinstance(part, str) else f"{{{self.text(node.indices[0])}}}" for part in declared.tensor or ())
        return f'f"{own}"'

    def widened(self, operand: Node) -> str:
        """Codes and scales are bytes in the file: what is taken from them becomes integers of full width."""
        declared = self.made.params.get(operand.name) if isinstance(operand, Name) else None
        return ".astype(int)" if declared and declared.type.domain in ("range", "ℕ", "ℤ") else ""

    def item(self, node: Node) -> str:
        """One part of an index."""
        match node:
            case Slice(start, stop, step):
                ends = [self.text(end) if end else "" for end in (start, stop)]
                return ":".join(ends) + (f":{self.text(step)}" if step else "")
            case Rest():
                return "..."
            case New():
                return "None"
        return self.text(node)

    def unary(self, node: Unary) -> tuple[str, int]:
        """An operator before its operand."""
        inner = node.operand
        match node.operator:
            case "-":
                return f"-{self.text(inner, UNARY)}", UNARY
            case "√":
                return f"np.sqrt({self.text(inner)})", ATOM
            case "¬":
                return f"np.logical_not({self.text(inner)})", ATOM
            case "⌊" if isinstance(inner, Binary) and inner.operator == "/":
                return f"{self.text(inner.left, LEVELS['//'])} // {self.text(inner.right, LEVELS['//'] + 1)}", LEVELS["//"]
        return f"np.{'floor' if node.operator == '⌊' else 'ceil'}({self.text(inner)})", ATOM

    def binary(self, node: Binary) -> tuple[str, int]:
        """An operator between two operands; `·` is a product of matrices, or with a number."""
        sign = ("*" if self.is_number(node.left) or self.is_number(node.right) else "@") if node.operator == "·" else SIGNS[node.operator]
        level = LEVELS[sign]
        return f"{self.text(node.left, level)} {sign} {self.text(node.right, level + 1)}", level

    def call(self, node: Call) -> str:
        """A card's function, or NumPy's."""
        card = self.cards.get(f"{self.card.namespace}.{node.name}") or self.cards.get(node.name)
        if card is not None and card in called(self.card, self.cards):
            return f"{python_name(card.called)}({', '.join(map(self.text, (*node.inputs, *node.given)))})"
        axis = next((self.text(value) for name, value in node.options if name == "axis"), None)
        return emitted.call(node.name, [self.text(argument) for argument in node.inputs], axis)

    def rank(self, node: Node) -> int | None:
        """How many axes a value has, where the card says so."""
        match node:
            case Literal():
                return 0
            case Name(name):
                kind = self.types.get(name)
                return 0 if name in self.values and not isinstance(self.values[name], tuple) else len(kind.sizes) if kind else None
            case Member():
                kind = self.types.get(node.family)
                return len(kind.sizes) if kind else None
            case Index(operand, items) if all(isinstance(i, Slice) or self.is_number(i) for i in items):
                whole = self.rank(operand)
                return None if whole is None else whole - sum(not isinstance(i, Slice) for i in items)
            case Unary():
                return self.rank(node.operand)
            case Binary() if node.operator != "·":
                ranks = self.rank(node.left), self.rank(node.right)
                return None if None in ranks else max(r for r in ranks if r is not None)
            case Call() if (card := self.cards.get(f"{self.card.namespace}.{node.name}") or self.cards.get(node.name)) is not None:
                outputs = program(card).outputs
                return len(outputs[0].type.sizes) if len(outputs) == 1 else None
        return None

    def is_number(self, node: Node) -> bool:
        """Whether a value is one number: a size, a setting, the variable of a loop."""
        if isinstance(node, Name):
            loops = {loop.variable for loop in loops_of(self.made.body)}
            hyper = any(h.name == node.name for h in self.card.hypers) and not isinstance(self.values.get(node.name), tuple)
            return node.name in loops or node.name in self.made.letters or hyper or self.rank(node) == 0
        if isinstance(node, Binary):
            return self.is_number(node.left) and self.is_number(node.right)
        if isinstance(node, Unary):
            return self.is_number(node.operand)
        return self.rank(node) == 0


def assigns(body: tuple[Statement, ...]) -> Iterator[Assign]:
    """All assignments of a block."""
    for statement in body:
        if isinstance(statement, Assign):
            yield statement
        elif isinstance(statement, Loop):
            yield from assigns(statement.body)
        elif isinstance(statement, Choice):
            for branch in statement.branches:
                yield from assigns(branch.body)


def loops_of(body: tuple[Statement, ...]) -> Iterator[Loop]:
    """All loops of a block."""
    for statement in body:
        if isinstance(statement, Loop):
            yield statement
            yield from loops_of(statement.body)
        elif isinstance(statement, Choice):
            for branch in statement.branches:
                yield from loops_of(branch.body)


def expressions(body: tuple[Statement, ...]) -> Iterator[Node]:
    """All expressions of a block: what is assigned, and to which parts, run through, asked and returned."""
    for statement in body:
        if isinstance(statement, Assign):
            yield statement.value
            yield from (item for target in statement.targets if isinstance(target, Index) for item in target.items)
        elif isinstance(statement, Loop):
            yield statement.over
            yield from expressions(statement.body)
        elif isinstance(statement, Choice):
            for branch in statement.branches:
                yield from (branch.condition,) if branch.condition else ()
                yield from expressions(branch.body)
        else:
            yield statement.value


def member_name(node: Member) -> str:
    """A member that a loop binds, as a variable: A_h for A^h."""
    family = python_name(node.family.replace("·", "{}"))
    return (
        family.format(*(python_name(i.name) if isinstance(i, Name) else "i" for i in node.indices))
        if "{}" in family
        else (family_name(node.family) + "_" + "_".join(python_name(i.name) if isinstance(i, Name) else "i" for i in node.indices))
    )


def family_name(family: str) -> str:
    """A family as a list: Y for Y^·."""
    return python_name(re.sub(r"[_^]·", "", family))


def with_comment(line: str, comment: str, indent: str) -> Iterator[str]:
    """A line with its comment behind it, or above where both are too long for one."""
    if not comment:
        yield line
    elif len(line) + 2 <= COMMENT and COMMENT + len(comment) + 2 <= WIDTH:
        yield f"{line:<{COMMENT}}# {comment}"
    elif len(line) + len(comment) + 4 <= WIDTH:
        yield f"{line}  # {comment}"
    else:
        yield f"{indent}# {comment}"
        yield line
