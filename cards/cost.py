"""What the cards of a model come to: parameters, and the operations and bytes of a decoded token, as `toyllm params` counts them.

A card's tensors and their shapes are those that it declares, with hypers for letters; the model's headers or config.json tell in which
dtype they are stored, and `models.params` what counts and is multiplied. A card has all that it reaches: its own tensors, those of the
cards whose parameters it holds, and attention over the cache where a step gives `attn.heads`; each tensor once, so that the cards add up.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from ..kernels.errors import ToyllmError
from ..models.memory import PerToken, Running, per_token, running
from ..models.params import Anatomy, Entry, count, entry, sizes
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


@dataclass(frozen=True, eq=False)
class Filled:
    """A model's cards: filled, by name, and what is needed to count them. Two are never equal: what is found of one is kept for it."""

    anatomy: Anatomy
    run: Running
    family: str
    hypers: dict[str, HyperValue]
    cards: dict[str, Card]
    stored: dict[str, Entry]  # the model's tensors, by our names

    @property
    def position(self) -> int:
        """The position at which a decoded token is counted: the last."""
        return self.run.context - 1


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
    sums = cost(reach(card.name, "", model), model)
    line = f"total {count_text(sums.parameters)}"
    if model.hypers.get("E"):
        line += f", active a token {count_text(sums.active)}"
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


kept = lru_cache(maxsize=1 << 14)  # layers are many, and each card runs in all of them


@kept
def reach(name: str, group: str, model: Filled) -> Reach:
    """What a card reaches below a group of tensors. Raises ToyllmError for what the model does not have."""
    found = own_reach(name, group, model)
    for child, below in children(name, group, model):
        found |= reach(child, below, model)
    if name in EVERY:
        found = Reach({tensor: replace(e, share=(1, 1)) for tensor, e in found.entries.items()}, found.layers)
    return found


@kept
def own_reach(name: str, group: str, model: Filled) -> Reach:
    """What a card declares itself."""
    card, entries = model.cards[name], {}
    for d in card.params:
        lengths = shape(d.type, model)
        for key, values in tensors(d, model.hypers) if lengths is not None else ():
            tensor = ".".join(filter(None, (group, named(key, values))))
            entries[tensor] = stored_as(tensor, lengths or (), model)
    block = BLOCK.match(group)
    attends = block and any("attn.heads" in step.taps for step in card.steps)
    return Reach(entries, frozenset({int(block[1])} if block and attends else ()))


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


@kept
def shape(kind: str, model: Filled) -> tuple[int, ...] | None:
    """The sizes of a type; None for the parameters of a card, or where they cannot be told."""
    domain, _, power = RANGED.sub("", kind).partition("^")
    if not re.fullmatch(r"[Rℕℤ]|\{.*\}", domain):
        return None
    found = [size(piece, model.hypers) for piece in split_top(power.removeprefix("{").removesuffix("}"), "×") if piece]
    return None if None in found else tuple(n for n in found if n is not None)


@kept
def stored_as(name: str, shape: tuple[int, ...], model: Filled) -> Entry:
    """A tensor of a card as the model stores it. A checkpoint may hold queries, keys and values in one."""
    key = name.removeprefix("blocks.")
    found = model.stored.get(key) or model.stored.get(re.sub(r"\.[qkv]\.", ".qkv.", key))
    if found is None:
        raise ToyllmError(f"the cards' tensor {name} is none of the model's")
    nbytes = found.nbytes * math.prod(shape) // math.prod(found.shape)
    return entry(key, Spec(found.name, shape), found.name, found.dtype, nbytes, model.anatomy.config)


def children(name: str, group: str, model: Filled) -> Iterator[tuple[str, str]]:
    """The cards whose parameters a card holds, each with its group; and those that it calls which find theirs in the model."""
    card = model.cards[name]
    for d in card.params:
        kind = RANGED.sub("", d.type)
        child = next((whole for whole in (f"{card.namespace}.{kind}", kind) if whole in model.cards), None)
        if child and d.keys:
            yield from ((child, named(key, values)) for key, values in tensors(d, model.hypers))
        elif child:
            yield child, group
    for other in calls(name, model):
        if not model.cards[other].given and model.cards[other].params:
            yield other, ""


@kept
def calls(name: str, model: Filled) -> tuple[str, ...]:
    """The names of the cards that a card calls."""
    return tuple(dict.fromkeys(card.name for card in called(model.cards[name], model.cards)))


@kept
def groups(model: Filled) -> dict[str, list[str]]:
    """The groups of tensors with which each card runs, by its name; those of its callers, where no card holds its parameters."""
    found: dict[str, dict[str, None]] = {}
    family = READING[model.family]
    held = {child for name in family for child, _ in children(name, "", model)}
    waiting = [(name, "") for name in family if not model.cards[name].given]
    while waiting:
        name, group = waiting.pop(0)
        if group not in found.setdefault(name, {}):
            found[name][group] = None
            waiting += children(name, group, model)
            waiting += [(other, group) for other in calls(name, model) if other not in held]
    return {name: list(below) for name, below in found.items()}


# ---- what it costs ----------------------------------------------------------------------------------------------------------


def cost(found: Reach, model: Filled) -> Cost:
    """What is reached, as `params` counts it."""
    tensors = tuple(found.entries.values())
    sums, token = count(tensors), per_token(model.anatomy, Part("tensors", tensors, range(0)), model.run)
    attention = [attended(layer, model) for layer in found.layers]
    flops = token.flops + sum(a.flops for a in attention)
    return Cost(sums.parameters, sums.active, flops, token.weight_bytes, sum(a.cache_bytes for a in attention))


@kept
def attended(layer: int, model: Filled) -> PerToken:
    """What attention over the cache of one layer takes."""
    return per_token(model.anatomy, Part("attention", (), range(layer, layer + 1)), model.run)


def costs(name: str, model: Filled) -> dict[Cost, int]:
    """What a card comes to with all that it reaches, and in how many layers: they may see different numbers of positions."""
    alike: dict[object, list[str]] = {}
    for group in groups(model).get(name, ()):
        alike.setdefault(kinds(model).get(group, group), []).append(group)
    found: dict[Cost, int] = {}
    for first, *others in alike.values():
        one = cost(reach(name, first, model), model)
        found[one] = found.get(one, 0) + 1 + len(others)
    return found


@kept
def kinds(model: Filled) -> dict[str, object]:
    """Of each block's group what its costs depend on: the positions that it sees, and how its tensors are stored."""
    stored: dict[int, list[tuple[str, str]]] = {}
    for e in model.stored.values():
        if e.layer is not None:
            stored.setdefault(e.layer, []).append((e.key.partition(".")[2], e.dtype))
    return {f"blocks.{i}": (sizes(model.anatomy.config).windows[i], frozenset(mine)) for i, mine in stored.items()}


def total(model: Filled) -> Cost:
    """What the model comes to."""
    return cost(reach(model.family, "", model), model)


def shares(model: Filled) -> dict[str, tuple[int, Cost]]:
    """What each card adds to the model itself, of all times that it runs, and how many these are: each tensor where it is met first."""
    found: dict[str, tuple[int, Cost]] = {}
    whole = reach(model.family, "", model)
    left, layers = dict(whole.entries), set(whole.layers)
    for card in reading(model.cards[model.family], model.cards):
        below = groups(model).get(card.name, ())
        mine = [own_reach(card.name, group, model) for group in below]
        entries = {tensor: left.pop(tensor) for one in mine for tensor in one.entries if tensor in left}
        attends = {layer for one in mine for layer in one.layers} & layers
        layers -= attends
        if entries:
            found[card.name] = (len(below), cost(Reach(entries, frozenset(attends)), model))
    return found


def handed(card: Card, model: Filled) -> int:
    """The number of parameters that a card's caller hands over one by one, and counts as its own."""
    shapes = [(shape(d.type, model), d) for d in card.params if not d.keys]
    return sum(math.prod(found) * len(d.names) for found, d in shapes if found is not None)


# ---- in words ---------------------------------------------------------------------------------------------------------------


def cost_lines(card: Card, model: Filled) -> list[str]:
    """The last lines of a card, as remarks: its text may end with them, and whoever reads it passes over them."""
    lines = [cost_text(one, layers, model) for one, layers in costs(card.name, model).items() if one.parameters]
    if not lines and (n := handed(card, model)):
        lines = [f"{n:,} parameters, which its caller hands over; no matrix product"]
    return [f"# {line}" for line in lines or ["no parameters, no matrix product"]]


def cost_text(one: Cost, layers: int, model: Filled) -> str:
    """A card's parameters, FLOPs and bytes."""
    parameters = f"{one.parameters:,} parameters" + (f" in each of {layers} layers" if layers > 1 else "")
    cache = f", {one.cache_bytes:,} of cache" if one.cache_bytes else ""
    return f"{parameters}; a token at position {model.position:,}: {one.flops:,} FLOPs, {one.weight_bytes:,} bytes of weights{cache}"
