"""What `compare` says of two checkpoints or two runs: a verdict of a sentence or a few."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..models.compare_names import axes
from ..models.tensor_values import MXFP4
from .check import ranges

if TYPE_CHECKING:
    from ..models.compare_match import Weight
    from ..models.compare_runs import Activation, Comparison
    from ..models.compare_weights import Pair, Report

RETYPED = ("dtype", "rounded")
LISTED = 3  # names in a sentence
WIDE = 40  # characters of a list of tokens in one


def number(value: float | None) -> str:
    """A value with digits enough to tell any two of f32 apart."""
    return "-" if value is None else f"{value:.9g}"


def brief(value: float | None) -> str:
    """A difference or an error."""
    return "-" if value is None else f"{value:.3g}"


def count(n: int, what: str) -> str:
    """1 weight, 2 weights."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


# ---- checkpoints ------------------------------------------------------------------------------------------------------------


def checkpoints_verdict(report: "Report", rtol: float, atol: float) -> str:
    """How two checkpoints differ, if they do."""
    both = [pair for pair in report.pairs if pair.a and pair.b]
    changed = [pair for pair in both if pair.status not in ("same", *RETYPED)]
    alone = [pair for pair in report.pairs if not (pair.a and pair.b)]
    if changed:
        said = [changes(changed, len(both))]
    elif alone:
        said = ["They differ in what they hold; " + likeness(both) + "."]
    else:
        said = [sameness(both)]
    if changed and any(pair.status in RETYPED for pair in both):
        said.append(f"Besides, {retyping(both)}.")
    for status, name in (("only a", "A"), ("only b", "B")):
        missing = [pair for pair in alone if pair.status == status]
        if missing:
            said.append(f"Only in {name}: {listed(missing)}.")
    if (rtol or atol) and any(pair.difference and pair.difference.differing for pair in both):
        beyond = sum(pair.departs(rtol, atol) for pair in both)
        said.append(f"{count(beyond, 'weight')} {'departs' if beyond == 1 else 'depart'} beyond rtol {rtol:g}, atol {atol:g}.")
    if report.settings:
        said.append(f"config.json: {'; '.join(f'{key} is {json.dumps(a)} in A, {json.dumps(b)} in B' for key, a, b in report.settings)}.")
    return " ".join(said)


def sameness(both: Sequence["Pair"]) -> str:
    """Of checkpoints with the same weights: what they differ in all the same."""
    renamed = [pair for pair in both if name_a(pair) != name_b(pair)]
    ways = [way for way, found in (("names", renamed), ("dtype", any(pair.status in RETYPED for pair in both))) if found]
    if not ways:
        return f"They are equal bit for bit: {count(len(both), 'weight')}."
    names = f" {name_a(renamed[0])} in A is {name_b(renamed[0])} in B." if renamed else ""
    return f"They differ in {' and '.join(ways)} only: {likeness(both)}.{names}"


def likeness(both: Sequence["Pair"]) -> str:
    """In what way weights are the same."""
    if any(pair.status in RETYPED for pair in both):
        return retyping(both)
    return f"{count(len(both), 'weight')} {'is' if len(both) == 1 else 'are'} equal bit for bit"


def retyping(both: Sequence["Pair"]) -> str:
    """Which dtypes the same values have in the two."""
    kinds = Counter((kind(pair.a), kind(pair.b)) for pair in both if pair.status in RETYPED)
    said = []
    for (a, b), n in kinds.most_common(LISTED):
        of_kind = [pair for pair in both if pair.status in RETYPED and (kind(pair.a), kind(pair.b)) == (a, b)]
        rounded = Counter(pair.rounded.upper() for pair in of_kind if pair.rounded)
        how = " and ".join(f"{m:,} of them rounded in {name}" for name, m in rounded.items()) or "with the same values"
        if rounded.total() == n and len(rounded) == 1:
            how = "with A's values rounded in B" if rounded["B"] else "with B's values rounded in A"
        said.append(f"{count(n, 'weight')} {'is' if n == 1 else 'are'} {a} in A and {b} in B, {how}")
    return "; ".join(said)


def changes(changed: Sequence["Pair"], total: int) -> str:
    """Where the values differ: in one expert, one weight, one layer, or how many weights."""
    layers = {layer(pair) for pair in changed}
    experts = {expert for pair in changed for expert in pair.experts or (None,)}
    if len(layers) == len(experts) == 1 and None not in experts:
        where = f"in expert {experts.pop()} of layer {layers.pop()} only"
    elif len(changed) == 1:
        where = "in one weight only"
    elif len(layers) == 1 and None not in layers:
        where = f"in layer {layers.pop()} only"
    else:
        where = f"in {len(changed):,} of {count(total, 'weight')}"
    if len(changed) == 1:
        return f"They differ {where}: {name_a(changed[0])}, {change(changed[0])}."
    worst = max((pair for pair in changed if pair.difference), key=lambda pair: pair.difference.error, default=None)  # type: ignore[union-attr]
    most = f" The largest error is {brief(worst.difference.error)}, in {name_a(worst)}." if worst and worst.difference else ""
    return f"They differ {where}: {listed(changed)}.{most}"


def change(pair: "Pair") -> str:
    """How one weight differs."""
    if pair.status == "shape":
        return f"shape {shape(pair.a)} in A, {shape(pair.b)} in B"
    d = pair.difference
    if d is None:
        return f"{bits(pair)}; values of {kind(pair.a)} are not read"
    if pair.status == "bits":
        return f"{bits(pair)} at {list(pair.stored[0].place or ())}, but no value: zeros of another sign, or other NaN"
    amount = f"{d.differing:,} of {count(d.elements, 'value')}" + (f" ({bits(pair)})" if pair.stored else "")
    return f"{amount}; the {'worst' if d.differing > 1 else 'one'} at {place(pair)}: {number(d.a)} in A, {number(d.b)} in B"


def bits(pair: "Pair") -> str:
    """How many bits differ; of MXFP4, in blocks and in scales."""
    parts = [f" of its {found.name[-6:]}" if kind(pair.a) == MXFP4 else "" for found in pair.stored]
    return " and ".join(count(found.bits, "bit") + part for found, part in zip(pair.stored, parts, strict=True))


def place(pair: "Pair") -> str:
    """The place of the worst element; of an expert's in words too."""
    d, weight = pair.difference, pair.weight
    if d is None or d.place is None:
        return "-"
    text = str(list(d.place))
    if not weight.experts:
        return text
    text += f" (expert {d.place[0]}"
    if weight.key.split(".")[1] == "gate_up":
        row = d.place[2 if weight.transposed else 1]
        text += f", row {row // 2} of {'up' if row % 2 else 'gate'}"
    return text + ")"


def layer(pair: "Pair") -> int | None:
    """The layer of a weight, if it is in one."""
    first = pair.weight.key.partition(".")[0]
    return int(first) if first.isdecimal() else None


def listed(pairs: Sequence["Pair"]) -> str:
    """Weights by name if they are few, else how many of which layers."""
    if len(pairs) <= LISTED:
        return ", ".join(name_a(pair) for pair in pairs)
    layers = sorted({number for pair in pairs if (number := layer(pair)) is not None})
    others = [name_a(pair) for pair in pairs if layer(pair) is None]
    inside = count(len(pairs) - len(others), "weight") + f" of {'layer' if len(layers) == 1 else 'layers'} {ranges(tuple(layers))}"
    outside = others if len(others) <= LISTED else [*others[:LISTED], f"{len(others) - LISTED:,} more"]
    return ", ".join([inside, *outside] if layers else outside)


def name_a(pair: "Pair") -> str:
    """A's name of a weight, B's where only that has it."""
    return pair.weight.name


def name_b(pair: "Pair") -> str:
    """B's name of a weight that both have."""
    return pair.b.name if pair.b else ""


def kind(weight: "Weight | None") -> str:
    """The dtype of a weight."""
    return weight.kind if weight else "-"


def shape(weight: "Weight | None") -> str:
    """The shape of a weight."""
    return str(list(weight.shape)) if weight else "-"


# ---- runs -------------------------------------------------------------------------------------------------------------------


def runs_verdict(found: "Comparison", rtol: float, atol: float) -> str:
    """Whether two runs agree, and where they first do not."""
    total = count(len(found.activations), "activation")
    first = found.first(rtol, atol)
    unequal = next((at for at in found.activations if at.difference is None or at.difference.differing), None)
    if unequal is None:
        return f"They are equal, value for value: {total}."
    if first is None:
        worst = max(found.activations, key=lambda at: at.difference.error if at.difference else 0)
        error = brief(worst.difference and worst.difference.error)
        return f"They agree within rtol {rtol:g}, atol {atol:g}: {total}; the largest error is {error}, in {worst.name}."
    departing = sum(at.departs(rtol, atol) for at in found.activations)
    said = f"{first.name} departs first: {departure(first, rtol, atol)}. "
    said += f"{departing:,} of {total} {'departs' if departing == 1 else 'depart'} beyond rtol {rtol:g}, atol {atol:g}"
    if unequal is not first and unequal.difference:
        said += f"; the first that is not equal is {unequal.name}, by an error of {brief(unequal.difference.error)}"
    return said + "."


def departure(at: "Activation", rtol: float, atol: float) -> str:
    """How one activation departs: error, worst element, and in which tokens."""
    if at.difference is None:
        return f"shape {list(at.a)} in A, {list(at.b)} in B"
    d, tokens = at.difference, at.tokens(rtol, atol)
    worst = f"at {list(d.place or ())} of [{', '.join(axes(at.name))}] it is {number(d.a)} in A, {number(d.b)} in B"
    where = ranges(tuple(tokens))
    where = where if len(where) <= WIDE else f"the first {tokens[0]}, the last {tokens[-1]}"
    among = f"in {len(tokens)} of {len(at.by_token)} tokens, {where}" if len(tokens) < len(at.by_token) else "in every token"
    return f"error {brief(d.error)}; {worst}; {among}"
