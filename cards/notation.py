"""Cards as JSON, both ways, and as Markdown. `text` has the canonical layout, `latex` LaTeX.

    {"name": "gpt2.LN", "family": "GPT-2 family", "given": ["γ", "β", "ε"],
     "inputs": [{"names": ["x"], "type": "R^{T×D}", "note": "", "tensors": []}], "outputs": […], "params": […],
     "hypers": [{"name": "D", "value": 768}], "lines": ["remarks below the parameters"],
     "steps": [{"kind": "bind", "depth": 0, "variables": ["m"], "expression": "mean(x, axis=-1)", "shapes": ["R^{T×1}"],
                "note": "", "activations": []}]}

A hyper's value is a number, true, false, a text, a list of such, or null where it is not filled in. JSON has no number for NaN and the
infinities: they are {"number": "NaN"}, {"number": "Infinity"} and {"number": "-Infinity"}.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..kernels.errors import ToyllmError
from ..models.json_files import brief
from .structure import KINDS, LONGEST, Card, CardError, Declaration, Hyper, HyperValue, Step, value_text
from .text import parse, render

# ---- JSON -------------------------------------------------------------------------------------------------------------------


def to_json(card: Card) -> dict[str, Any]:
    """A card as JSON has it; `from_json` reads it back."""
    return {
        "name": card.name,
        "family": card.family,
        "given": list(card.given),
        **{key: [declaration_json(d) for d in getattr(card, key)] for key in ("inputs", "outputs", "params")},
        "hypers": [{"name": h.name, "value": value_json(h.value)} for h in card.hypers],
        "lines": list(card.lines),
        "steps": [step_json(step) for step in card.steps],
    }


def declaration_json(d: Declaration) -> dict[str, Any]:
    """A declaration."""
    return {"names": list(d.names), "type": d.type, "note": d.note, "tensors": list(d.keys)}


def step_json(step: Step) -> dict[str, Any]:
    """A step."""
    return {
        "kind": step.kind,
        "depth": step.depth,
        "variables": list(step.variables),
        "expression": step.expression,
        "shapes": list(step.shapes),
        "note": step.note,
        "activations": list(step.taps),
    }


def value_json(value: HyperValue | None) -> Any:
    """A hyper's value."""
    if isinstance(value, tuple):
        return [value_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def from_json(document: Any, where: str = "card") -> Card:
    """The card of a document that `to_json` could have made. Raises ToyllmError, with the path to what is wrong in it.

    The card's places are those of its canonical text.
    """
    fields = entries(document, where, tuple(to_json(Card(""))))
    hypers = [(f"{where}.hypers[{i}]", entries(h, f"{where}.hypers[{i}]", ("name", "value"))) for i, h in listed(fields, "hypers", where)]
    inputs, outputs, params = (
        tuple(read_declaration(d, f"{where}.{key}[{i}]") for i, d in listed(fields, key, where)) for key in ("inputs", "outputs", "params")
    )
    made = Card(
        name=text(fields, "name", where),
        family=text(fields, "family", where),
        inputs=inputs,
        outputs=outputs,
        params=params,
        hypers=tuple(Hyper(text(h, "name", at), read_value(h["value"], f"{at}.value")) for at, h in hypers),
        lines=texts(fields, "lines", where),
        steps=tuple(read_step(step, f"{where}.steps[{i}]") for i, step in listed(fields, "steps", where)),
        given=texts(fields, "given", where),
    )
    try:
        card = parse(render(made), where)
    except CardError as error:
        raise ToyllmError(f"{where}: it is no card: as text, {str(error).removeprefix(f'{where}:')}") from None
    if to_json(card) != to_json(made):  # and not the cards: NaN is no other NaN
        raise ToyllmError(f"{where}: {difference(to_json(made), to_json(card))}; write it as `toyllm card --format json` does")
    return card


def difference(a: Any, b: Any, path: str = "") -> str:
    """Where two documents first differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return next(difference(a[key], b[key], f"{path}.{key}".lstrip(".")) for key in a if a[key] != b.get(key))
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next(difference(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return f"{path}: expected {brief(b)}, found {brief(a)}"


def entries(document: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """The entries of an object, these and no others. Raises ToyllmError."""
    if not isinstance(document, dict) or set(document) != set(keys):
        found = ", ".join(map(str, document))[:LONGEST] if isinstance(document, dict) else type(document).__name__
        raise ToyllmError(f"{where}: expected an object with {', '.join(keys)}, found {found or 'an empty one'}")
    return document


def listed(fields: Mapping[str, Any], key: str, where: str) -> list[tuple[int, Any]]:
    """The entries of a list, numbered. Raises ToyllmError."""
    if not isinstance(fields[key], list):
        raise ToyllmError(f"{where}.{key}: expected a list, found {type(fields[key]).__name__}")
    return list(enumerate(fields[key]))


def text(fields: Mapping[str, Any], key: str, where: str) -> str:
    """A text. Raises ToyllmError."""
    return checked_text(fields[key], f"{where}.{key}")


def checked_text(value: Any, where: str) -> str:
    """A text. Raises ToyllmError."""
    if not isinstance(value, str):
        raise ToyllmError(f"{where}: expected a text, found {type(value).__name__}")
    return value


def texts(fields: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of texts. Raises ToyllmError."""
    return tuple(checked_text(value, f"{where}.{key}[{i}]") for i, value in listed(fields, key, where))


def read_declaration(document: Any, where: str) -> Declaration:
    """A declaration. Raises ToyllmError."""
    fields = entries(document, where, ("names", "type", "note", "tensors"))
    names, tensors = texts(fields, "names", where), texts(fields, "tensors", where)
    if tensors and len(tensors) != len(names):
        raise ToyllmError(f"{where}.tensors: expected none, or one for each of {len(names)} names, found {len(tensors)}")
    return Declaration(names, text(fields, "type", where), text(fields, "note", where), tensors)


def read_step(document: Any, where: str) -> Step:
    """A step. Raises ToyllmError."""
    fields = entries(document, where, tuple(step_json(Step(""))))
    kind, depth = text(fields, "kind", where), fields["depth"]
    if kind not in KINDS:
        raise ToyllmError(f"{where}.kind: expected {', '.join(KINDS)}, found {brief(kind)}")
    if type(depth) is not int or not 0 <= depth <= 1000:
        raise ToyllmError(f"{where}.depth: expected an integer of 0 or more, found {brief(depth)}")
    variables, shapes, taps = (texts(fields, key, where) for key in ("variables", "shapes", "activations"))
    for key, some in (("shapes", shapes), ("activations", taps)):
        if some and len(some) != len(variables):
            raise ToyllmError(f"{where}.{key}: expected none, or one for each of {len(variables)} variables, found {len(some)}")
    return Step(kind, variables, text(fields, "expression", where), shapes, text(fields, "note", where), taps, depth)


def read_value(document: Any, where: str) -> Any:
    """A hyper's value. Raises ToyllmError."""
    if isinstance(document, list):
        return tuple(read_value(value, f"{where}[{i}]") for i, value in enumerate(document))
    if isinstance(document, dict):
        number = entries(document, where, ("number",))["number"]
        if number not in ("NaN", "Infinity", "-Infinity"):
            raise ToyllmError(f"{where}.number: expected NaN, Infinity or -Infinity, found {brief(number)}")
        return float(number)
    if document is None and where.endswith("]"):
        raise ToyllmError(f"{where}: expected a number, a text, true or false, found null")
    return document


# ---- Markdown ---------------------------------------------------------------------------------------------------------------


def render_markdown(cards: Iterable[Card], remarks: Mapping[str, Sequence[str]] | None = None) -> str:
    """Cards as Markdown: for each a heading, a table of what it declares, its steps, and the `remarks` on it, by name."""
    return "\n".join(markdown(card, (remarks or {}).get(card.name, ())) for card in cards)


def markdown(card: Card, remarks: Sequence[str]) -> str:
    """One card."""
    steps = [line for line in render(card).splitlines() if re.match(r" *\d+: ", line)]
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", "\n".join(steps))), 3)
    hypers = [(code(h.name), "" if h.value is None else code(value_text(h.value)), "", "") for h in card.hypers]
    rows: list[tuple[str, ...]] = []
    for label, some in (
        ("Input", [declared(d) for d in card.inputs]),
        ("Output", [declared(d) for d in card.outputs]),
        ("Hyper", hypers),
        ("Param", [declared(d) for d in card.params]),
    ):
        rows += [(label if n == 0 else "", *cells) for n, cells in enumerate(some)]
    parts = [f"### {code(card.signature)}\n"]
    if card.family:
        parts.append(f"*{escaped(card.family)}*\n")
    if rows:
        header = ["", "name", "type or value", "what", "tensor"]
        parts.append("".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows)))
    if steps:
        parts.append("\n".join([f"{fence}text", *steps, fence]) + "\n")
    if card.lines or remarks:
        parts.append("".join(f"* {escaped(line)}\n" for line in (*card.lines, *remarks)))
    return "\n".join(parts)


def declared(d: Declaration) -> tuple[str, ...]:
    """The cells of a declaration."""
    tensors = ", ".join(code(key or "-") for key in d.keys)
    return ", ".join(map(code, d.names)), code(d.type), escaped(d.note), tensors


def code(text: str) -> str:
    """A span of code within a table, whatever is in it."""
    ticks = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}".replace("|", "\\|")


def escaped(text: str) -> str:
    """Text in which nothing is markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", text)
