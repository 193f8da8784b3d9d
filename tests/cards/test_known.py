"""Arithmetic with hypers, read without the parser, means what the language says."""

import pytest

from toyllm.cards.catalogue import library
from toyllm.cards.cost import RANGED
from toyllm.cards.interpreter import run
from toyllm.cards.known import known, size
from toyllm.cards.structure import Hyper
from toyllm.cards.text import parse, split_top

VALUES = {"D": 64, "F": 96, "H": 4, "G": 2, "Dh": 16, "E": 8, "V": 50, "P": 32, "L": 3, "k": 2, "ε": 1e-05, "b": 1.5}
FLAGS = {"tied": True, "scaled": False, "by_layer": True, "mxfp4": False, "yarn": True, "truncate": False, "interleaved": True}
VALUES |= FLAGS | {"activation": "gelu_new", "moe": "all", "w": (4, 8)}


def by_the_language(text: str) -> object:
    names = " ".join(name for name in VALUES if name != "w")
    value = run(parse(f"Algorithm: it()\nHyper: {names}\nreturn {text}"), hypers={k: v for k, v in VALUES.items() if k != "w"}).results[0]
    return value if isinstance(value, str) else value.item()


def sizes() -> set[str]:
    declared = [d.type for card in library().values() for d in (*card.inputs, *card.outputs, *card.params)]
    shapes = [shape for card in library().values() for step in card.steps for shape in step.shapes]
    powers = [RANGED.sub("", kind).partition("^")[2].removeprefix("{").removesuffix("}") for kind in (*declared, *shapes)]
    return {piece for power in powers for piece in split_top(power, "×") if piece}


def conditions() -> set[str]:
    return {step.expression for card in library().values() for step in card.steps if step.kind in ("if", "else") and step.expression}


@pytest.mark.parametrize("text", sorted({t for t in sizes() | conditions() if known(t, VALUES) is not None}))
def test_what_the_library_asks_is_answered_as_the_language_does(text: str) -> None:
    assert known(text, VALUES) == by_the_language(text)


def test_sizes_of_parameters_and_conditions_of_models_are_all_answered() -> None:
    declared = {d.type for card in library().values() for d in card.params if "^" in d.type}
    powers = {RANGED.sub("", kind).partition("^")[2].removeprefix("{").removesuffix("}") for kind in declared}
    assert all(size(piece, VALUES) is not None for power in powers for piece in split_top(power, "×"))
    assert {t for t in conditions() if known(t, VALUES) is not None} >= {*FLAGS} - {"yarn"} | {
        "¬ yarn",
        'activation = "gelu"',
        'moe = "all"',
    }


@pytest.mark.parametrize(
    "text",
    [
        "1 + 2 · 3", "(1 + 2) · 3", "7 - 2 - 1", "3H·Dh", "2 · (D + 1) / 2", "-D + 70", "D / 32", "D / 48",
        "1 + 1 = 2 ∧ D > 3", "true ∨ false ∧ false", "¬ true ∨ true", "¬ (tied ∧ scaled)", "¬ D = 3", "D ≠ 64", "F ≥ D", "1e2 · b",
        '"a" = "b"', 'activation ≠ "gelu_new"', "3 · (D)",
    ],
)  # fmt: skip
def test_operators_bind_as_in_the_language(text: str) -> None:
    assert known(text, VALUES) == by_the_language(text)


@pytest.mark.parametrize(
    "text",
    ["T", "T + 1", "D + T", "w", "w = 4", "0 < D < 3", "sum(D)", "D[0]", "D^2", "√D", "D mod 3", "D 3", "(D", "D +", "", "D / 0", "1 ∧ 2"],
)
def test_what_it_does_not_read_it_says_nothing_of(text: str) -> None:
    assert known(text, VALUES) is None


@pytest.mark.parametrize(("text", "found"), [("D/3", None), ("D - F", None), ("tied", None), ("H·Dh", 64), ("D/32", 2)])
def test_a_size_is_an_integer_of_0_or_more(text: str, found: int | None) -> None:
    assert size(text, VALUES) == found


def test_a_hyper_without_a_value_is_not_known() -> None:
    assert known("D", {h.name: h.value for h in (Hyper("D"),)}) is None
