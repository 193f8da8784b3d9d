import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toyllm.cards.language import (
    Array,
    Binary,
    Call,
    Compare,
    Index,
    Literal,
    Name,
    New,
    Node,
    Power,
    Range,
    Rest,
    Sequence,
    Slice,
    Transpose,
    Type,
    Unary,
    Values,
    expression,
    sequence,
    template,
    type_of,
    walk,
)
from toyllm.cards.structure import CardError, Place

A, B, C = Name("a"), Name("b"), Name("c")
ONE, TWO = Literal(1), Literal(2)


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("a · b", Binary("·", A, B)),
        ("a ⊙ b / c", Binary("/", Binary("⊙", A, B), C)),
        ("a + b · c", Binary("+", A, Binary("·", B, C))),
        ("a - b - c", Binary("-", Binary("-", A, B), C)),
        ("a mod 2", Binary("mod", A, TWO)),
        ("modern - newer", Binary("-", Name("modern"), Name("newer"))),
        ("-a^2", Unary("-", Power(A, TWO))),
        ("√a · b", Binary("·", Unary("√", A), B)),
        ("√(a + b)", Unary("√", Binary("+", A, B))),
        ("a^⊤", Transpose(A)),
        ("a⊤ · b", Binary("·", Transpose(A), B)),
        ("a^{-2}", Power(A, Unary("-", TWO))),
        ("a^b^⊤", Transpose(Power(A, B))),
        ("a^b[0]", Index(Power(A, B), (Literal(0),))),
        ("2^(a - 1)", Power(TWO, Binary("-", A, ONE))),
        ("2a", Binary("⊙", TWO, A)),
        ("2π", Binary("⊙", TWO, Literal(math.pi))),
        ("2a^b", Binary("⊙", TWO, Power(A, B))),
        ("¬ a ∧ b ∨ c", Binary("∨", Binary("∧", Unary("¬", A), B), C)),
        ("0 ≤ a < b", Compare(Literal(0), (("≤", A), ("<", B)))),
        ("a = b", Compare(A, (("=", B),))),
        ("a ∉ b", Compare(A, (("∉", B),))),
        ("a & 15 = 1 << 2", Compare(Binary("&", A, Literal(15)), (("=", Binary("<<", ONE, TWO)),))),
        ("a >> 4 + 1", Binary(">>", A, Binary("+", Literal(4), ONE))),
        ("a[b, 1:2, ::2, …, new, :]", Index(A, (B, Slice(ONE, TWO), Slice(None, None, TWO), Rest(), New(), Slice()))),
        ("a[1:][0]", Index(Index(A, (Slice(ONE),)), (Literal(0),))),
        ("[a, b]", Array((A, B))),
        ("[1, 2][0]", Index(Array((ONE, TWO)), (Literal(0),))),
        ("a, b", Values((A, B))),
        ("⌊a / 2⌋ + ⌈b⌉", Binary("+", Unary("⌊", Binary("/", A, TWO)), Unary("⌈", B))),
        ("F()", Call("F")),
        ("F(a; b)", Call("F", (A,), (B,))),
        ("F(; b, c)", Call("F", (), (B, C))),
        ("F (G(a), axis=-1)", Call("F", (Call("G", (A,)),), (), (("axis", Unary("-", ONE)),))),
        ("gpt-oss.F(a)", Call("gpt-oss.F", (A,))),
        ("∞ ⊙ NaN", None),
        ("true", Literal(True)),
        ('a = "gelu \\"new\\""', Compare(A, (("=", Literal('gelu "new"')),))),
        ("1e-05", Literal(1e-5)),
        ("0.5", Literal(0.5)),
        ("θ_ℓ^attn", Power(Name("θ_ℓ"), Name("attn"))),
        ("W_{ℓ+1}^h_q", Power(Name("W_{ℓ+1}"), Name("h_q"))),
        ("(" * 50 + "a" + ")" * 50, A),
        ("ẽ′ + x̂_1", Binary("+", Name("ẽ′"), Name("x̂_1"))),
    ],
)
def test_every_construct(text, node):
    found = expression(text)
    if node is None:
        assert math.isinf(found.left.value)
        assert math.isnan(found.right.value)
    else:
        assert found == node


def test_numbers_keep_their_kind():
    assert [type(expression(text).value) for text in ("2", "2.0", "2e0", "true")] == [int, float, float, bool]


def test_a_node_knows_where_it_begins():
    node = expression("x · W_1 + F(a; θ_ℓ)")
    assert {n.name: n.at for n in walk(node) if isinstance(n, Name)} == {"x": 0, "W_1": 4, "a": 12, "θ_ℓ": 15}
    assert node.right.at == 10


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("(a", 3, "ends where something is missing"),
        ("", 1, "ends where something is missing"),
        ("a b", 3, "`b` is not expected"),
        ("a $ b", 3, "`$` has no meaning"),
        ("x²", 2, "`²` has no meaning"),
        ("a[]", 3, "`]` is not expected"),
        ("a + · b", 5, "`·` is not expected"),
        ("F(a; axis=1)", 1, "an option such as axis="),
        ("F(a, axis=1, axis=2)", 1, "an option such as axis="),
        ('"\\q"', 1, "the escapes in a text"),
        ("-" * 1000 + "a", 1, "more than 150 levels"),
        ("(" * 1000 + "a" + ")" * 1000, 1, "more than 150 levels"),
        ("+".join("a" * 1000), 1, "more than 150 levels"),
    ],
)
def test_what_is_no_expression_is_refused_with_its_column(text, column, message):
    place = Place("my.card", 7, 11, 11 + len(text), " " * 10 + text)
    with pytest.raises(CardError, match=message.replace("$", r"\$")) as caught:
        expression(text, place)
    assert (caught.value.line, caught.value.column) == (7, 10 + column)
    assert len(str(caught.value)) < 200


def test_columns_are_those_of_the_file_where_signs_are_spelled_in_ascii():
    raw = "a  <= b and F(c] )"
    place = Place("my.card", 1, 1, 1 + len(raw), raw)
    with pytest.raises(CardError) as caught:
        expression("a ≤ b ∧ F(c] )", place)
    assert raw[caught.value.column - 1] == "]"


@given(st.text(max_size=30) | st.lists(st.sampled_from(list("ab12·⊙^⊤_{}[](),;:+-√…=")), max_size=12).map("".join))
def test_any_text_is_an_expression_or_an_error(text):
    try:
        node = expression(text)
    except CardError:
        return
    assert isinstance(node, Node)
    assert [n.at for n in walk(node)] == [n.at for n in walk(expression(text))]


def test_sequences_of_loops():
    assert sequence("0, …, b") == Sequence(Literal(0), B)
    assert sequence("a") == A


# ---- types ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("R", Type("R")),
        ("ℕ", Type("ℕ")),
        ("R^a", Type("R", (A,))),
        ("R^{a×3b}", Type("R", (A, Binary("⊙", Literal(3), B)))),
        ("ℤ^{(a+1)×b·c}", Type("ℤ", (Binary("+", A, ONE), Binary("·", B, C)))),
        ("{0,1}^{a×b}", Type("bool", (A, B))),
        ("{0..b-1}^a", Type("range", (A,), Literal(0), Binary("-", B, ONE))),
        ("{0..255}", Type("range", (), Literal(0), Literal(255))),
        ("Block", Type("card", card="Block")),
        ("gpt-oss.Block (ℓ=0..a-1)", Type("card", card="gpt-oss.Block", ranges=(Range("ℓ", Literal(0), Binary("-", A, ONE)),))),
        ("R^a (i=0..1, h=0..c)", Type("R", (A,), ranges=(Range("i", Literal(0), ONE), Range("h", Literal(0), C)))),
    ],
)
def test_types(text, found):
    assert type_of(text) == found


@pytest.mark.parametrize(
    ("text", "column"),
    [("R^", 2), ("R^{a", 5), ("R^{a×}", 6), ("{0;1}", 2), ("(ℓ=1..N)", 1), ("R^a (ℓ..2=)", 7), ("R T", 1), ("R^{a × $}", 8)],
)
def test_what_is_no_type_is_refused_with_its_column(text, column):
    with pytest.raises(CardError) as caught:
        type_of(text, Place("my.card", 1, 1, 1 + len(text), text))
    assert caught.value.column == column


def test_names_of_tensors():
    assert template("blocks.{ℓ}.attn.q") == ("blocks.", Name("ℓ"), ".attn.q")
    assert template("embed") == ("embed",)
    with pytest.raises(CardError, match="ends where"):
        template("blocks.{ℓ+}.x")
