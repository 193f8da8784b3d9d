"""Cards of unknown origin: whatever their size, an error of one short line, in no time and in no memory."""

import json
import time

import numpy as np
import pytest

from toyllm.cards.fill import fill
from toyllm.cards.interpreter import run
from toyllm.cards.known import known
from toyllm.cards.latex import render_latex
from toyllm.cards.notation import from_json, to_json
from toyllm.cards.shapes import problems
from toyllm.cards.structure import Card, CardError, Hyper
from toyllm.cards.text import parse, parse_all
from toyllm.kernels.errors import ToyllmError

HEAD = "Algorithm: F(x)\n  Input: x ∈ R^{T×D}\n"
FAR = {
    "a number of 5,000 digits": (HEAD + f"y ← {'9' * 5000}\nreturn y", "a number of 5000 digits; at most 300"),
    "a subscript of 5,000 digits": (HEAD + f"y_{{{'9' * 5000}}} ← x\nreturn y", "at most 300"),
    "a hyper of 5,000 digits": (HEAD + f"  Hyper: a={'9' * 5000}\nreturn x", "expected a number, a word, a text in quotes or a sequence"),
    "a sequence of 10^11 values": (
        HEAD + "  Hyper: a=(1,2)×99999999999\nreturn x",
        "expected a number, a word, a text in quotes or a sequence",
    ),
    "100,000 spaces": ("Algorithm: F(x)" + " " * 100_000 + "[", "a line of 100,016 characters; at most 10,000"),
    "a name of 9,000 letters": (HEAD + f"y ← {'x' * 9000}\nreturn y", "xxx…"),
    "1,000 loops within each other": (
        HEAD + "for i ← 0, …, 9 do\n" * 1000 + "end\n" * 1000,
        "more than 50 `for` and `if` within each other",
    ),
}


def checked_and_run(text: str) -> None:
    card = parse(text)
    for problem in problems(card):
        raise problem
    run(card, inputs={"x": np.ones((2, 3))})


@pytest.mark.parametrize("name", FAR)
def test_what_goes_too_far_is_one_short_line_at_once(name: str) -> None:
    text, expected = FAR[name]
    start = time.process_time()
    with pytest.raises(CardError, match=expected) as caught:
        checked_and_run(text)
    assert time.process_time() - start < 2
    assert len(str(caught.value)) < 1000
    assert len(caught.value.excerpt) < 2000


def test_the_caret_is_under_what_is_meant_in_a_long_line_too() -> None:
    with pytest.raises(CardError) as caught:
        parse_all(HEAD + f"y ← x   ▷ {'a' * 2000}\nz = {'b' * 900} ¿ {'c' * 900}\nreturn y")
    shown, caret = (line.split("| ", 1)[1] for line in caught.value.excerpt.split("\n"))
    assert shown[len(caret) - 1] in "z¿b…"
    assert len(shown) < 600


@pytest.mark.parametrize(
    "text",
    ['"a" · 99999999999', "99999999999 a", "3 a + 1", '"a" + "b"', r'"\x"', "(" * 5000, f"{'9' * 5000}", f"{'9' * 400} / {'7' * 50}"],
)
def test_texts_are_no_numbers_and_nothing_is_known_of_what_goes_too_far(text: str) -> None:
    assert known(text, {"a": "gelu"}) is None


def test_choices_that_compare_texts_are_still_decided() -> None:
    assert known('a = "gelu"', {"a": "gelu"}) is True
    card = parse(HEAD + '  Hyper: a\nif a = "gelu" then\ny ← x\nelse\ny ← -x\nend\nreturn y')
    assert len(fill(card, {"a": "gelu"}).steps) == 2


def test_the_longest_integer_is_shown() -> None:
    assert "9" * 300 in render_latex([parse(HEAD + f"y ← {'9' * 300}\nreturn y")])


def test_a_hyper_that_is_nan_survives_json() -> None:
    card = parse(HEAD + "  Hyper: a=NaN b=(NaN,∞)\nreturn x")
    document = json.loads(json.dumps(to_json(card)))
    assert to_json(from_json(document)) == document


def test_a_document_whose_end_closes_nothing_is_no_card() -> None:
    document = to_json(parse(HEAD + "if true then\ny ← x\nend\nreturn y"))
    document["steps"][2]["depth"] = 7
    with pytest.raises(ToyllmError, match="`end for` where an `end if` belongs"):
        from_json(document)
    del document["steps"][0]
    with pytest.raises(ToyllmError, match="no `for` or `if` is open here"):
        from_json(document)


def test_what_a_document_holds_is_cut_in_the_message() -> None:
    document = to_json(Card("F", hypers=(Hyper("a", 1),)))
    for path, value in (("family", "a\n" * 5000), ("name", "x" * 20_000), ("given", ["x" * 20_000])):
        with pytest.raises(ToyllmError) as caught:
            from_json(document | {path: value})
        assert len(str(caught.value)) < 2000
    with pytest.raises(ToyllmError) as caught:
        from_json(document | {"x" * 20_000: 1})
    assert len(str(caught.value)) < 2000
