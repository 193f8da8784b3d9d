"""Cards filled from a model: their hypers have its values, and branches that these decide are gone. Without the parser; see `known`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from .known import WORD, known
from .structure import Card, Declaration, Hyper, HyperValue, Step, arrange


def fill(card: Card, values: Mapping[str, HyperValue]) -> Card:
    """A card with these values for the hypers that state none.

    Of a choice that they decide, the branch that is taken stays; hypers and parameters that only the others needed go. A hyper that is
    handed over to the card has its caller's value, and is left alone.
    """
    hypers = tuple(h if h.name in card.given or h.value is not None else Hyper(h.name, values.get(h.name)) for h in card.hypers)
    decided = {h.name: h.value for h, before in zip(hypers, card.hypers, strict=True) if before.value is None and h.value is not None}
    steps = folded([*card.steps], decided)
    made = replace(card, hypers=hypers, steps=arrange(card.inputs, steps))
    gone = words(step_texts(card.steps)) - words(step_texts(made.steps))
    params = tuple(p for d in card.params if (p := without(d, gone)).names)
    needed = words(step_texts(made.steps)) | words(d.type for d in (*card.inputs, *card.outputs, *params)) | {*card.given}
    return replace(made, params=params, hypers=tuple(h for h in hypers if h.name not in gone - needed))


def folded(steps: list[Step], values: Mapping[str, HyperValue | None]) -> list[Step]:
    """The steps up to the end of a block, which stays, with the choices in it decided; what is read is taken from `steps`."""
    result: list[Step] = []
    while steps and steps[0].kind not in ("else", "end"):
        step = steps.pop(0)
        if step.kind == "if":
            result += (left := chosen(step, steps, values))
            if left and left[-1].kind == "return":  # what follows is never come to
                folded(steps, {})
                break
        else:
            result.append(step)
            if step.kind == "for":
                result += [*folded(steps, values), steps.pop(0)]
    return result


def chosen(step: Step, steps: list[Step], values: Mapping[str, HyperValue | None]) -> list[Step]:
    """What is left of a choice: the branch that is sure to be taken, or all that may be."""
    branches: list[tuple[Step, object, list[Step]]] = []
    decided = False
    while step.kind != "end":
        condition = known(step.expression, values) if step.expression else True
        body = folded(steps, values)
        if condition is not False and not decided:
            branches.append((step, condition, body))
        decided = decided or condition is True
        step = steps.pop(0)
    if not branches:
        return []
    if branches[0][1] is True:
        return branches[0][2]
    kept: list[Step] = []
    for number, (head, condition, body) in enumerate(branches):
        expression = "" if condition is True else head.expression
        kept += [replace(head, kind="else" if number else "if", expression=expression), *body]
    return [*kept, step]


def step_texts(steps: Iterable[Step]) -> Iterable[str]:
    """All of the steps in which names stand."""
    for step in steps:
        yield from (step.expression, *step.variables, *step.shapes)


def words(texts: Iterable[str]) -> set[str]:
    """The names in texts; of scripted ones, what stands before a superscript, and this by itself."""
    return {word for text in texts for word in re.findall(WORD, re.sub(r'"[^"]*"', "", text))}


def without(d: Declaration, gone: set[str]) -> Declaration:
    """A declaration without these names."""
    kept = [n for n, name in enumerate(d.names) if not words([name.partition("^")[0]]) & gone]
    return replace(d, names=tuple(d.names[n] for n in kept), keys=tuple(d.keys[n] for n in kept) if d.keys else ())
