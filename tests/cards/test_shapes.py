from pathlib import Path

import pytest

from toyllm.cards.catalogue import library
from toyllm.cards.shapes import all_problems, check, problems
from toyllm.cards.structure import CardError
from toyllm.cards.text import parse, parse_all
from toyllm.cli.card import filled

LIBRARY = library()


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_the_librarys_cards_hold(name):
    assert [str(problem) for problem in problems(LIBRARY[name], LIBRARY)] == []


@pytest.mark.parametrize("config", sorted((Path(__file__).parent / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_cards_of_published_models_hold_with_their_sizes(config):
    cards = filled("", config).cards
    assert [str(problem) for card in cards.values() for problem in problems(card, cards)] == []


HEAD = """\
Algorithm: my.F(x, y, i, n, t; θ)
Input:  x ∈ R^{T×D}
        y ∈ R^{S×D}
        i ∈ {0..D-1}^T
        n ∈ ℕ
        t ∈ R
Output: z ∈ R^{T×D}
Hyper:  D F H Dh w act
Param:  W ∈ R^{D×F}   [up.weight]
        b ∈ R^F   [up.bias]
        W_q^h ∈ R^{D×Dh} (h=0..H-1)   [q.{h}.weight]
        θ_ℓ ∈ LN (ℓ=0..1)   [blocks.{ℓ}]
"""
LN = "Algorithm: my.LN(x; γ, ε)\nInput: x ∈ R^{T×D}\nOutput: y ∈ R^{T×D}\nHyper: D ε\nParam: γ ∈ R^D\nreturn x ⊙ γ\n"


def wrong(steps, head=HEAD):
    """The messages of what is wrong, each with the text at its column."""
    cards = parse_all(head + steps + "\n" + LN, "my.card")
    return [
        (str(e).split(": ", 1)[1], e.excerpt.splitlines()[0].split(" | ", 1)[1][e.column - 1 :])
        for e in problems(cards[0], {c.name: c for c in cards})
    ]


@pytest.mark.parametrize(
    "steps",
    [
        "return x",
        "z ← x   z ∈ R^{T×D}\nreturn z",
        "z ← (x · W + b) · W^⊤\nreturn z",
        "k ← nonzero(i > 2)   k ∈ ℕ^m\nu ← x[k]   u ∈ R^{m×D}\nv ← y[k] + u\nreturn x",
        "a, c ← split(x · W, 2)   a, c ← R^{T×F/2}\nreturn x".replace("a, c ← R", "a, c ∈ R"),
        "u ← concat(x, x, axis=1)[:, ::2]   u ∈ R^{T×D}\nreturn u",
        "for h ← 0, …, H-1 do\n  Y^h ← x · W_q^h\nend for\nu ← Y   u ∈ R^{H×T×Dh}\nreturn x",
        "for h ← 0, …, H-1 do\n  Y^h ← x · W_q^h\nend for\nu ← W_q   u ∈ R^{H×D×Dh}\nu ← permute(Y, 1, 0, 2)   u ∈ R^{T×H×Dh}\nreturn x",
        "u ← x\nfor j ← 0, …, n-1 do\n  u ← concat(u, y)   u ∈ R^{(T+(j+1)·S)×D}\nend for\nreturn x",
        "if t > 0 then\n  u ← x\nelse\n  return x\nend if\nreturn u",
        'if act = "gelu" then\n  u ← x\nelse if w_0 = ∞ then\n  u ← 2x\nelse\n  u ← 3x\nend if\nreturn u',
        "u ← reshape(y, S·D)\nK ← zeros(n, D)\nK[2 : 4] ← y[:2]\nK[0] ← x[0]\nreturn x + K[: 1]",
        "z ← LN(x; x[0], 1e-05)\nreturn z",
        "u ← y[-1]   u ∈ R^D\nu ← y[S - 1, new, : D/2]   u ∈ R^{1×D/2}\nreturn x",
        "g ← minimum(n, w)   g ∈ ℕ\nu ← x[: g]   u ∈ R^{r×D}\nreturn x",
    ],
)
def test_what_holds_is_not_complained_of(steps):
    assert wrong(steps) == []


@pytest.mark.parametrize(
    ("steps", "message", "at"),
    [
        ("return q", "unknown name q", "q"),
        ("z ← x · V\nreturn x", "unknown name V", "V"),
        ("z ← x · Wq\nreturn x", "unknown name Wq", "Wq"),
        ("return LNN(x)", "LNN: no such function, and no such card; is LN meant?", "LNN(x)"),
        ("z ← u + x\nu ← x\nreturn z", "u is used before it is bound", "u + x"),
        ("for h ← 0, …, 3 do\nz ← Y^h\nY^h ← x\nend for\nreturn x", "Y^i is used before it is bound", "Y^h"),
        ("if t > 0 then\nu ← x\nend if\nreturn u", "u is not bound on every way to here; bind it in each branch, or before", "u"),
        (
            "z ← x · W^⊤\nreturn x",
            "`·`: expected R^{…×D} · R^{D×…}, found R^{T×D} · R^{F×D}; transpose the right side?",
            "x · W^⊤",
        ),
        ("z ← x + y\nreturn x", "`+`: shapes do not go together: R^{T×D} and R^{S×D}", "x + y"),
        ("z ← x   z ∈ R^{S×D}\nreturn x", "z: expected R^{S×D}, found R^{T×D}", "R^{S×D}"),
        ("z ← x   z ∈ R^T\nreturn x", "z: expected R^T, found R^{T×D}", "R^T"),
        ("z ← x   z ∈ ℕ^{T×D}\nreturn x", "z: expected ℕ^{T×D}, found R^{T×D}", "ℕ^{T×D}"),
        ("z ← x · W   z ∈ R^{T×D}\nreturn x", "z: expected R^{T×D}, found R^{T×F}", "R^{T×D}"),
        ("return x · W", "output z: expected R^{T×D}, found R^{T×F}", "x · W"),
        ("return x, x", "my.F has 1 output, and here returns 2", "x, x"),
        ("a, c ← x\nreturn x", "1 result for 2 names", "x"),
        ("a, c ← split(x, 3)\nreturn x", "3 results for 2 names", "split(x, 3)"),
        ("a ← split(x, 3) + 1\nreturn x", "3 results where one is expected; give them names: a, b ← …", "split(x, 3) + 1"),
        ("z ← softmax(x, 2)\nreturn x", "softmax: expected 1 argument, found 2", "softmax(x, 2)"),
        ("z ← softmax(x, value=2)\nreturn x", "softmax: no option value=; it knows axis=", "softmax(x, value=2)"),
        ("z ← softmax(x, axis=2)\nreturn x", "softmax: no axis 2 in R^{T×D}", "softmax(x, axis=2)"),
        ("z ← softmaxx(x)\nreturn x", "softmaxx: no such function, and no such card; is softmax meant?", "softmaxx(x)"),
        ("z ← LN(x)\nreturn x", "my.LN takes 2 arguments behind the semicolon (γ, ε), found 0", "LN(x)"),
        ("z ← LN(x, y; b, 1)\nreturn x", "my.LN takes 1 argument (x), found 2", "LN(x, y; b, 1)"),
        ("z ← LN(x; b, 1)\nreturn x", "LN: γ: expected R^D, found R^F", "b, 1)"),
        ("z ← LN(i; x[0], 1)\nreturn x", "LN: x: expected R^{T×D}, found ℤ^T", "i; x[0], 1)"),
        ("z ← x[0, 0, 0]\nreturn x", "3 indices into R^{T×D}", "x[0, 0, 0]"),
        ("z ← x[t]\nreturn x", "expected an integer, found R", "x[t]"),
        ("z ← [1, 2][2]\nreturn x", "index 2 of an axis of length 2", "[1, 2][2]"),
        ("z ← [1, 2][1 : 3]\nreturn x", "the range 1 : 3 of an axis of length 2", "[1, 2][1 : 3]"),
        ("z ← W_q^h\nreturn x", "unknown name h", "h"),
        ("z ← θ_2\nreturn x", "θ_ℓ is declared for ℓ = 0 to 1, found 2", "θ_2"),
        ("z ← reshape(x, S, D)\nreturn x", "reshape: R^{T×D} has D·T numbers, S × D are D·S", "reshape(x, S, D)"),
        ("z ← ¬ x\nreturn x", "`¬`: expected truth values, found R^{T×D}", "¬ x"),
        ("if x then\nend if\nreturn x", "a condition is one truth value, found R^{T×D}", "x then"),
        ("for r ∈ x do\nend for\nreturn x", "a loop runs through a sequence or a vector, found R^{T×D}", "x do"),
        ("T ← 3\nreturn x", "T is a size of the card: give the variable another name", "3"),
        ("u ← 3x\nu[:, 0] ← y\nreturn x", "R^{S×D} does not fit into R^T", "u[:, 0] ← y"),
        ("z ← x", "my.F ends without `return`", HEAD.splitlines()[0]),
        (
            "k ← nonzero(i > 2)   k ∈ ℕ^m\nl ← nonzero(i > 3)   l ∈ ℕ^p\nz ← x[k] + x[l]\nreturn x",
            "`+`: shapes do not go together: R^{m×D} and R^{p×D}",
            "x[k] + x[l]",
        ),
    ],
)
def test_what_does_not_hold_is_told_with_its_place(steps, message, at):
    assert wrong(steps) == [(message, at)]


def test_every_mistake_is_told_once_in_the_order_of_the_lines():
    found = wrong("for j ← 0, …, 3 do\nu ← x · q\nend for\nz ← x + y\nreturn p")
    assert [message for message, _ in found] == ["unknown name q", "`+`: shapes do not go together: R^{T×D} and R^{S×D}", "unknown name p"]


def test_what_is_declared_is_checked_too():
    card = parse("Algorithm: F(x)\nInput: x ∈ R^T\nHyper: D\nParam: W ∈ R^{D×Q}   [w]\n θ ∈ Attnn\nreturn x", "my.card")
    assert [str(e) for e in problems(card, LIBRARY)] == [
        "my.card:4:17: Q: no hyper, and no size of an input",
        "my.card:5:6: Attnn: no such card",
    ]


def test_values_of_hypers_decide_where_letters_cannot():
    text = "Algorithm: F(x)\nInput: x ∈ R^{T×D}\nHyper: D H Dh\ny ← reshape(x, T, H, Dh)\nreturn y"
    assert len(problems(parse(text))) == 1
    assert problems(parse(text.replace("D H Dh", "D=768 H=12 Dh=64"))) == []
    assert problems(parse(text), hypers={"D": 768, "H": 12, "Dh": 64}) == []
    assert len(problems(parse(text.replace("D H Dh", "D=768 H=12 Dh=63")))) == 1


def test_the_place_is_that_of_the_file_and_the_excerpt_has_a_caret():
    card = parse("# mine\nAlgorithm: F(x)\nInput: x ∈ R^{T×D}\n   1: y  <-  x * x @ transpose(x)   // square\n   2: return z", "my.card")
    with pytest.raises(CardError) as caught:
        check(card)
    assert str(caught.value) == "my.card:5:14: unknown name z"
    assert caught.value.excerpt == "  5 |    2: return z\n    |              ^"


def test_cards_of_one_file_call_each_other():
    cards = parse_all(HEAD + "z ← LN(x; x[0], 1)\nreturn LN(y; y[0], 1)\n" + LN, "my.card")
    assert [str(e) for e in all_problems(cards)] == ["my.card:14:8: output z: expected R^{T×D}, found R^{S×D}"]
