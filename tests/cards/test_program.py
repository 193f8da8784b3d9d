import pytest

from toyllm.cards.language import Binary, Index, Literal, Member, Name, Power, expression
from toyllm.cards.program import Assign, Choice, Loop, Return, program, resolve
from toyllm.cards.structure import CardError
from toyllm.cards.text import parse

TEXT = """
Algorithm: my.Block(e, K; θ, w)
Input: e ∈ R^{T×D}
       K ∈ R^{C×D}
Output: e ∈ R^{T×D}
Hyper: D F L w
Param: W_e ∈ R^{D×F}   [up.weight]
       γ_ℓ^1 ∈ R^D (ℓ=0..L-1)   [blocks.{ℓ}.norm_1.weight]
       θ_ℓ^attn ∈ Attn (ℓ=0..L-1)   [blocks.{ℓ}]
for ℓ ← 0, …, L-1 do
  Y^ℓ, n_ℓ ← Attn(LN(e; γ_ℓ^1); θ_ℓ^attn)   ▷ [attn.q, -]
  K[ℓ, :] ← Y^{ℓ}
  if w_ℓ > 2 then
    q, k ← split(e, 2)   q, k ∈ R^{T×m}
  else
    return e
  end if
end for
return Y
"""


@pytest.fixture(scope="module")
def made():
    return program(parse(TEXT))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("W_e", Name("W_e")),
        ("θ_ℓ^attn", Member("θ_·^attn", (Name("ℓ"),))),
        ("θ_{ℓ+1}^attn", Member("θ_·^attn", (Binary("+", Name("ℓ"), Literal(1)),))),
        ("θ_0^attn", Member("θ_·^attn", (Literal(0),))),
        ("θ_ℓ^ffn", Power(Name("θ_ℓ"), Name("ffn"))),
        ("γ_ℓ^1", Member("γ_·^1", (Name("ℓ"),))),
        ("γ_ℓ^2", Power(Name("γ_ℓ"), Literal(2))),
        ("Y^0", Member("Y^·", (Literal(0),))),
        ("Y^{ℓ-1}", Member("Y^·", (Binary("-", Name("ℓ"), Literal(1)),))),
        ("w_ℓ", Index(Name("w"), (Name("ℓ"),))),
        ("W_e_0", Index(Name("W_e"), (Literal(0),))),
        ("e^2", Power(Name("e"), Literal(2))),
        ("W_e^2", Power(Name("W_e"), Literal(2))),
        ("Y^ℓ^2", Power(Member("Y^·", (Name("ℓ"),)), Literal(2))),
        ("unknown_1", Name("unknown_1")),
    ],
)
def test_the_cards_declarations_decide_what_a_script_is(made, text, meant):
    assert resolve(expression(text), made.names) == meant


def test_letters_are_those_of_the_inputs_that_nothing_else_defines(made):
    assert made.letters == ("T", "C")
    assert {"T", "C", "m", "q", "k", "D", "ℓ"} <= made.names.plain


def test_a_family_as_a_whole(made):
    assert made.names.wholes["Y"] == "Y^·"


def test_theta_is_all_parameters_without_a_name_of_their_own(made):
    assert made.given("θ") == ("W_e", "γ_·^1", "θ_·^attn")
    assert made.given("w") == ("w",)
    named = program(parse("Algorithm: F(; W, θ)\nParam: W, b ∈ R\nreturn W"))
    assert (named.given("W"), named.given("θ")) == (("W",), ("b",))


def test_steps_are_a_tree(made):
    loop, last = made.body
    assert isinstance(loop, Loop)
    assert isinstance(last, Return)
    assign, update, choice = loop.body
    assert isinstance(assign, Assign)
    assert assign.targets == (Member("Y^·", (Name("ℓ"),)), Member("n_·", (Name("ℓ"),)))
    assert assign.taps == (("attn.q",), None)
    assert isinstance(update.targets[0], Index)
    assert isinstance(choice, Choice)
    assert [branch.condition is None for branch in choice.branches] == [False, True]
    assert [len(branch.body) for branch in choice.branches] == [1, 1]


def test_parameters_know_their_tensors(made):
    assert made.params["γ_·^1"].tensor == ("blocks.", Name("ℓ"), ".norm_1.weight")


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("y ← (x", 2, 7),
        ("y, F(x) ← 1, 2", 2, 4),
        ("for i ← 0, …, ) do\nend for", 2, 15),
        ("if x + then\nend if", 2, 7),
        ("y ← 1   y ∈ R^{", 2, 16),
        ("return x +", 2, 11),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_with_its_place(text, line, column):
    with pytest.raises(CardError) as caught:
        program(parse(f"Algorithm: F()\n{text}"))
    assert (caught.value.line, caught.value.column) == (line, column)
