"""What the cards of a model come to: parameters, and the operations and bytes of a decoded token, as `toyllm params` counts them.

A card's tensors and their shapes are those that it declares, with hypers for letters; the model's headers or config.json tell in which
dtype they are stored, and `models.params` what counts and is multiplied. A card has all that it reaches: its own tensors, those of the
cards whose parameters it holds, and attention over the cache where a step gives `attn.heads`; each tensor once, so that the cards add up.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..kernels.errors import ToyllmError
from ..models.memory import Running, per_token, running
from ..models.params import Anatomy, Entry, count, entry
from ..models.parts import Part
from ..models.weights import Spec
from .catalogue import READING, called, library, reading
from .fill import fill
from .known import known, size
from .settings import hypers
from .structure import Card, Declaration, HyperValue
from .text import split_top

RANGED = re.compile(r"\s*\(([^()]*=.*\.\..*)\)\Z")  # `(ℓ=0..L-1)` behind the type of a family
BLOCK = re.compile(r"blocks\.(\d+)(?:\.|\Z)")
EVERY = ("gpt-oss.All", "gpt-oss.Budget")  # a decoded token goes through every expert: the budget is all of a step's few tokens


@dataclass(frozen=True)
class Cost:
    """What a card comes to; without parameters of its own, what its caller hands over is told apart."""

    parameters: int
    active: int
    flops: int  # of matrix products and attention
    weight_bytes: int  # read, as stored
    cache_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes that a token reads."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class Reach:
    """Tensors by their names, and the layers whose keys and values are attended to."""

    entries: dict[str, Entry]
    layers: frozenset[int]

    def __or__(self, other: "Reach") -> "Reach":
        return Reach(self.entries | other.entries, self.layers | other.layers)


@dataclass(frozen=True)
class Filled:
    """A model's cards: filled, by name, and what is needed to count them."""

    anatomy: Anatomy
    run: Running
    family: str
    hypers: dict[str, HyperValue]
    cards: dict[str, Card]
    stored: dict[str, Entry]  # the model's tensors, by our names
    own: dict[tuple[str, str], Reach] = field(default_factory=dict)  # what `own_reach` has found, by card and group
    reached: dict[tuple[str, str], Reach] = field(default_factory=dict)  # and `reach`
    shapes: dict[str, tuple[int, ...] | None] = field(default_factory=dict)  # by type

    @property
    def position(self) -> int:
        """The position at which a decoded token is counted: the last."""
        return self.run.context - 1

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The groups of tensors with which each card runs, by its name."""
        return groups(self)


def filled_cards(a: Anatomy) -> Filled:
    """The library with the cards of a model's family filled; the model's own end their parameters with the total. Raises ToyllmError."""
    family = a.family.__name__.rpartition(".")[2].replace("_", "-")
    values = hypers(a.config, [e.name for e in a.entries])
    cards = {name: fill(card, values) if name in READING[family] else card for name, card in library().items()}
    model = Filled(a, running(a, None, "f32", 512), family, values, cards, {e.key: e for e in a.entries if e.key})
    for name in READING[family]:
        if not cards[name].given and any(d.keys for d in cards[name].params):
            cards[name] = with_total(cards[name], model)
    return model


def with_total(card: Card, model: Filled) -> Card:
    """The card of a model with the total of its parameters as its last remark."""
    total = cost(reach(card, "", model), model)
    line = f"total {count_text(total.parameters)}"
    if model.hypers.get("E"):
        line += f", active a token {count_text(total.active)}"
    head = next((s for s in card.steps if s.taps == ("logits",)), None)
    if model.hypers["tied"] and head:
        line += f", embeddings tied: {head.variables[0]} = {head.expression}"
    return replace(card, lines=(*card.lines, line))


def count_text(n: int) -> str:
    """A count: 81.91M, 20.91B, 1.5K; two decimals for M and B, one for K, trailing zeros dropped."""
    if n < 1000:
        return str(n)
    units = ((10**3, "K", 1), (10**6, "M", 2), (10**9, "B", 2))
    unit, sign, digits = next((u for u in units if round(n / u[0], u[2]) < 1000), units[-1])
    return f"{n / unit:.{digits}f}".rstrip("0").rstrip(".") + sign


# ---- what a card reaches ----------------------------------------------------------------------------------------------------


def reach(card: Card, group: str, model: Filled) -> Reach:
    """What a card reaches below a group of tensors. Raises ToyllmError for what the model does not have."""
    if (card.name, group) not in model.reached:
        found = own_reach(card, group, model)
        for child, below in children(card, group, model):
            found |= reach(child, below, model)
        if card.name in EVERY:
            found = Reach({name: replace(e, share=(1, 1)) for name, e in found.entries.items()}, found.layers)
        model.reached[card.name, group] = found
    return model.reached[card.name, group]


def own_reach(card: Card, group: str, model: Filled) -> Reach:
    """What a card declares itself."""
    if (card.name, group) in model.own:
        return model.own[card.name, group]
    entries: dict[str, Entry] = {}
    for d in card.params:
        if d.type not in model.shapes:
            model.shapes[d.type] = shape(d.type, model.hypers)
        sizes = model.shapes[d.type]
        for key, values in tensors(d, model.hypers) if sizes is not None else ():
            name = ".".join(filter(None, (group, named(key, values))))
            entries[name] = stored_as(name, sizes or (), card, model)
    block = BLOCK.match(group)
    attends = block and any("attn.heads" in step.taps for step in card.steps)
    model.own[card.name, group] = Reach(entries, frozenset({int(block[1])} if block and attends else ()))
    return model.own[card.name, group]


def tensors(d: Declaration, values: Mapping[str, HyperValue]) -> Iterator[tuple[str, dict[str, HyperValue]]]:
    """The key of each tensor that a declaration names, with the values of its letters; of a family, for each member."""
    for key, indices in itertools.product(d.keys, members(d.type, values)):
        if key:
            yield key, {**values, **indices}


def members(kind: str, values: Mapping[str, HyperValue]) -> Iterator[dict[str, int]]:
    """The indices of each member of a family; none, once, for what is no family."""
    ranged = RANGED.search(kind)
    axes = []
    for piece in split_top(ranged[1]) if ranged else ():
        index, ends = piece.split("=", 1)
        first, last = (known(end, values) for end in ends.split("..", 1))
        axes.append([(index.strip(), i) for i in range(first, last + 1)] if isinstance(first, int) and isinstance(last, int) else [])
    yield from map(dict, itertools.product(*axes))


def named(key: str, values: Mapping[str, HyperValue]) -> str:
    """A tensor's name with the values of the expressions in its braces."""
    return re.sub(r"\{([^{}]*)\}", lambda found: str(known(found[1], values)), key)


def shape(kind: str, values: Mapping[str, HyperValue]) -> tuple[int, ...] | None:
    """The sizes of a type; None for the parameters of a card, or where they cannot be told."""
    domain, _, sizes = RANGED.sub("", kind).partition("^")
    if not re.fullmatch(r"[Rℕℤ]|\{.*\}", domain):
        return None
    found = [size(piece, values) for piece in split_top(sizes.removeprefix("{").removesuffix("}"), "×") if piece]
    return None if None in found else tuple(n for n in found if n is not None)


def stored_as(name: str, shape: tuple[int, ...], card: Card, model: Filled) -> Entry:
    """A tensor of a card as the model stores it. A checkpoint may hold queries, keys and values in one."""
    key = name.removeprefix("blocks.")
    found = model.stored.get(key) or model.stored.get(re.sub(r"\.[qkv]\.", ".qkv.", key))
    if found is None:
        raise ToyllmError(f"{card.name}: the model has no tensor {name}")
    nbytes = found.nbytes * math.prod(shape) // math.prod(found.shape)
    return entry(key, Spec(found.name, shape), found.name, found.dtype, nbytes, model.anatomy.config)


def children(card: Card, group: str, model: Filled) -> Iterator[tuple[Card, str]]:
    """The cards whose parameters a card holds, each with its group; and those that it calls which find theirs in the model."""
    for d in card.params:
        child = model.cards.get(f"{card.namespace}.{RANGED.sub('', d.type)}") or model.cards.get(RANGED.sub("", d.type))
        if child and d.keys:
            yield from ((child, named(key, values)) for key, values in tensors(d, model.hypers))
        elif child:
            yield child, group
    for other in called(card, model.cards):
        if not other.given and other.params:
            yield other, ""


def groups(model: Filled) -> dict[str, list[str]]:
    """The groups of tensors with which each card runs, by its name; those of its callers, where no card holds its parameters."""
    found: dict[str, dict[str, None]] = {}
    family = [model.cards[name] for name in READING[model.family]]
    held = {child.name for card in family for child, _ in children(card, "", model)}
    waiting = [(card, "") for card in family if not card.given]
    while waiting:
        card, group = waiting.pop(0)
        if group not in found.setdefault(card.name, {}):
            found[card.name][group] = None
            waiting += children(card, group, model)
            waiting += [(other, group) for other in called(card, model.cards) if other.name not in held]
    return {name: list(below) for name, below in found.items()}


# ---- what it costs ----------------------------------------------------------------------------------------------------------


def cost(found: Reach, model: Filled) -> Cost:
    """What is reached, as `params` counts it."""
    a, tensors = model.anatomy, tuple(found.entries.values())
    parts = [Part("tensors", tensors, range(0)), *(Part("attention", (), range(i, i + 1)) for i in found.layers)]
    tokens, sums = [per_token(a, part, model.run) for part in parts], count(tensors)
    flops, weights, cache = (sum(getattr(t, name) for t in tokens) for name in ("flops", "weight_bytes", "cache_bytes"))
    return Cost(sums.parameters, sums.active, flops, weights, cache)


def costs(card: Card, model: Filled) -> dict[Cost, int]:
    """What a card comes to with all that it reaches, and in how many layers: they may see different numbers of positions."""
    found: dict[Cost, int] = {}
    for group in model.groups.get(card.name, ()):
        one = cost(reach(card, group, model), model)
        found[one] = found.get(one, 0) + 1
    return found


def shares(model: Filled) -> dict[str, tuple[int, Cost]]:
    """What each card adds to the model itself, of all times that it runs, and how many these are: each tensor where it is met first."""
    found: dict[str, tuple[int, Cost]] = {}
    root, below = model.cards[model.family], model.groups
    held = reach(root, "", model)
    held = Reach(dict(held.entries), held.layers)
    for card in reading(root, model.cards):
        mine = Reach({}, frozenset())
        for group in below.get(card.name, ()):
            mine |= own_reach(card, group, model)
        mine = Reach({name: held.entries.pop(name) for name in mine.entries if name in held.entries}, mine.layers & held.layers)
        held = Reach(held.entries, held.layers - mine.layers)
        if mine.entries:
            found[card.name] = (len(below[card.name]), cost(mine, model))
    return found


def handed(card: Card, model: Filled) -> int:
    """The number of parameters that a card's caller hands over one by one, and counts as its own."""
    values = {**model.hypers, **{h.name: h.value for h in card.hypers if h.value is not None}}
    sizes = [(shape(d.type, values), d) for d in card.params if not d.keys]
    return sum(math.prod(found) * len(d.names) for found, d in sizes if found is not None)


# ---- in words ---------------------------------------------------------------------------------------------------------------


def cost_lines(card: Card, model: Filled) -> list[str]:
    """The last lines of a card, as remarks: its text may end with them, and whoever reads it passes over them."""
    lines = [cost_text(one, layers, model) for one, layers in costs(card, model).items() if one.parameters]
    if not lines and (n := handed(card, model)):
        lines = [f"{n:,} parameters, which its caller hands over; no matrix product"]
    return [f"# {line}" for line in lines or ["no parameters, no matrix product"]]


def cost_text(one: Cost, layers: int, model: Filled) -> str:
    """A card's parameters, FLOPs and bytes."""
    parameters = f"{one.parameters:,} parameters" + (f" in each of {layers} layers" if layers > 1 else "")
    cache = f", {one.cache_bytes:,} of cache" if one.cache_bytes else ""
    return f"{parameters}; a token at position {model.position:,}: {one.flops:,} FLOPs, {one.weight_bytes:,} bytes of weights{cache}"
