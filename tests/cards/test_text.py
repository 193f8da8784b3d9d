import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toyllm.cards.structure import Card, CardError, Declaration, Hyper, Step, arrange, names_of
from toyllm.cards.text import canonical, parse, parse_all, render, render_full

ANCHOR = """\
Algorithm: Toy::GPT2.forward(x, p_start)      [HF GPT-2 family]
  Input:    x ∈ {1..V}^T   (token IDs)
            p_start ∈ ℕ   (absolute position of x[0])
  Output:   P ∈ R^{T×V}   (logits)
  Hyper:    V=50257 D=768 H=12 D_f=3072 N=6 ctx=1024
  Param:    W_e ∈ R^{V×D}   (token embeddings)
            W_p ∈ R^{ctx×D}   (learned absolute positions)
            θ_block_ℓ ∈ (ℓ=1..N)   (per-block; see GPT2Block)
            γ_f, β_f ∈ R^D   (final LayerNorm)
            (total 81.91M, embeddings tied: logits = e · W_e^⊤)
   1: e ← W_e[x] + W_p[p_start : p_start+T]                           e ∈ R^{T×D}
   2: for ℓ ← 1, …, N do
   3:    e ← e + Attn(LN(e; γ_ℓ^1, β_ℓ^1, ε); θ_ℓ^attn)               e ∈ R^{T×D}
   4:    e ← e + FFN (LN(e; γ_ℓ^2, β_ℓ^2, ε); θ_ℓ^ffn )               e ∈ R^{T×D}
   5: end for
   6: e ← LN(e; γ_f, β_f, ε)                                          e ∈ R^{T×D}
   7: P ← e · W_e^⊤                                                   P ∈ R^{T×V}
   8: return P
"""


def step(kind, variable="", expression="", shape=""):
    return Step(kind, (variable,) if variable else (), expression, (shape,) if shape else ())


INPUTS = (Declaration(("x",), "{1..V}^T", "token IDs"), Declaration(("p_start",), "ℕ", "absolute position of x[0]"))
DISTILGPT2 = Card(
    "Toy::GPT2.forward",
    "HF GPT-2 family",
    INPUTS,
    (Declaration(("P",), "R^{T×V}", "logits"),),
    tuple(Hyper(*pair) for pair in (("V", 50257), ("D", 768), ("H", 12), ("D_f", 3072), ("N", 6), ("ctx", 1024))),
    (
        Declaration(("W_e",), "R^{V×D}", "token embeddings"),
        Declaration(("W_p",), "R^{ctx×D}", "learned absolute positions"),
        Declaration(("θ_block_ℓ",), "(ℓ=1..N)", "per-block; see GPT2Block"),
        Declaration(("γ_f", "β_f"), "R^D", "final LayerNorm"),
    ),
    ("total 81.91M, embeddings tied: logits = e · W_e^⊤",),
    arrange(
        INPUTS,
        (
            step("bind", "e", "W_e[x] + W_p[p_start : p_start+T]", "R^{T×D}"),
            step("for", "ℓ", "1, …, N"),
            step("bind", "e", "e + Attn(LN(e; γ_ℓ^1, β_ℓ^1, ε); θ_ℓ^attn)", "R^{T×D}"),
            step("bind", "e", "e + FFN (LN(e; γ_ℓ^2, β_ℓ^2, ε); θ_ℓ^ffn )", "R^{T×D}"),
            step("end"),
            step("bind", "e", "LN(e; γ_f, β_f, ε)", "R^{T×D}"),
            step("bind", "P", "e · W_e^⊤", "R^{T×V}"),
            step("return", expression="P"),
        ),
    ),
)


def test_the_layout_is_the_anchors_to_the_column():
    assert render(DISTILGPT2) == ANCHOR


def test_the_anchors_text_reads_as_its_card():
    assert parse(ANCHOR) == DISTILGPT2


def test_binding_again_is_an_update():
    kinds = [s.kind for s in DISTILGPT2.steps]
    assert kinds == ["bind", "for", "update", "update", "end", "update", "bind", "return"]


def test_a_name_bound_in_each_branch_is_bound_not_updated():
    card = parse("Algorithm: F(x)\nInput: x ∈ R\nif x > 0 then\ny ← x\nelse\ny ← -x\nend if\ny ← 2y\nreturn y")
    assert [s.kind for s in card.steps] == ["if", "bind", "else", "bind", "end", "update", "return"]
    assert [s.depth for s in card.steps] == [0, 1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("length", "spaces"),
    [(50, 20), (68, 2), (69, 3), (70, 3), (90, 3)],
)
def test_shapes_begin_at_column_70_or_three_spaces_behind_a_longer_body(length, spaces):
    body = "   1: y ← " + "a" * (length - 10)
    card = parse(f"Algorithm: F()\n{body}  y ∈ R")
    assert render(card).splitlines()[-1] == body + " " * spaces + "y ∈ R"
    assert parse(render(card)) == card


def test_numbers_keep_their_column_beyond_99_steps():
    card = parse("Algorithm: F()\n" + "y ← 1\n" * 120)
    lines = render(card).splitlines()
    assert (lines[1], lines[99], lines[100]) == ("   1: y ← 1", "  99: y ← 1", " 100: y ← 1")
    assert parse(render(card)) == card


def test_a_card_written_by_hand_in_ascii_has_one_rendering():
    text = """
# a comment of the file's own
Algorithm: my.Net(x;θ,w)
Input: x in R^{T x D}  (the input)
Output: y, n in R^{T x D}
Hyper: D F act=gelu_new eps=1e-5 w=(128, inf, 128, inf) tied=true title="two words"
Param: W_1 in R^{D x F} [up.weight]
       a, b in R^F  (biases)  [up.bias, -]
       (a remark)

h <- GELU(x @ W_1 + a)  h in R^{T x F}  // hidden [mlp.hidden]
if w[0] <= 128 and not tied then
  K[:, 1] <- h * 2
else if x[0] in w then
  y, n <- split(h, 2)   y, n in R^{T x F}
end
for i <- 0, ..., D-1 do
// nothing
end for
return y, n
"""
    expected = """\
Algorithm: my.Net(x; θ, w)
  Input:    x ∈ R^{T×D}   (the input)
  Output:   y, n ∈ R^{T×D}
  Hyper:    D F act=gelu_new eps=1e-05 w=(128,∞)×2 tied=true title="two words"
  Param:    W_1 ∈ R^{D×F}   [up.weight]
            a, b ∈ R^F   (biases) [up.bias, -]
            (a remark)
   1: h ← GELU(x · W_1 + a)                                           h ∈ R^{T×F}   ▷ hidden [mlp.hidden]
   2: if w[0] ≤ 128 ∧ ¬ tied then
   3:    K[:, 1] ← h ⊙ 2
   4: else if x[0] ∈ w then
   5:    y, n ← split(h, 2)                                           y, n ∈ R^{T×F}
   6: end if
   7: for i ← 0, …, D-1 do
   8:    ▷ nothing
   9: end for
  10: return y, n
"""
    card = parse(text)
    assert render(card) == expected
    assert parse(expected) == card
    assert {h.name: h.value for h in card.hypers}["w"] == (128, float("inf")) * 2


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("a <= b >= c != d == e", "a ≤ b ≥ c ≠ d = e"),
        ("a and b or not c", "a ∧ b ∨ ¬ c"),
        ("t not  in v", "t ∉ v"),
        ("inf * pi @ x[...]", "∞ ⊙ π · x[…]"),
        ("pin + orbit + x_in", "pin + orbit + x_in"),
        ('"a  <= b" = s', '"a  <= b" = s'),
        ("a   +\tb", "a + b"),
    ],
)
def test_ascii_spellings(written, meant):
    assert canonical(written) == meant


def test_full_text_is_cards_below_a_rule_and_reads_back():
    others = [parse("Algorithm: A(x)\nInput: x ∈ R\nreturn x"), parse("Algorithm: B()\nreturn 1")]
    text = render_full([DISTILGPT2, *others])
    assert parse_all(text) == (DISTILGPT2, *others)
    [rule] = [line for line in text.splitlines() if line.startswith("─")]
    assert rule.startswith("─── sub-algorithms ─")
    assert len(rule) == 72


# ---- errors -----------------------------------------------------------------------------------------------------------------

HEAD = "Algorithm: F(x; w)\nInput: x ∈ R^T\nParam: w ∈ R^T\n"


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("", 0, 0, "no card"),
        ("hello", 1, 1, "expected a card"),
        ("Algorithm: F", 1, 1, "expected a headline"),
        ("Algorithm: F(x)\nInput: y ∈ R", 1, 14, "the headline has the inputs (x)"),
        ("Algorithm: F(x; w)\nInput: x ∈ R", 1, 1, "w is behind the semicolon"),
        ("Algorithm: F(x)\nInput: x", 2, 8, "expected a declaration"),
        ("Algorithm: F()\nHyper: D=768 E==3", 2, 16, "E"),
        ("Algorithm: F()\nParam: a, b ∈ R   [t]", 2, 8, "2 names but 1 in brackets"),
        ("Algorithm: F()\nParam: a, a ∈ R", 2, 15, "a is declared twice"),
        ("Algorithm: F()\nParam: (a remark", 2, 8, "a remark ends"),
        (HEAD + "y ←", 4, 1, "expected a step"),
        (HEAD + "for x", 4, 1, "expected `for ℓ ← 0, …, L-1 do`"),
        (HEAD + "if x", 4, 1, "expected `if condition then`"),
        (HEAD + "   1: return", 4, 7, "expected `return y`"),
        (HEAD + "   1: for t ∈ x do", 4, 7, "`for`: it has no `end`"),
        (HEAD + "   1: end for", 4, 7, "no `for` or `if` is open"),
        (HEAD + "   1: else", 4, 7, "no `if` is open"),
        (HEAD + "for t ∈ x do\nend if", 5, 1, "`end if` where an `end for` belongs"),
        (HEAD + "if x then\nelse\nelse\nend", 6, 1, "`else`: no `if` is open"),
        (HEAD + "   1: y ← x   z ∈ R", 4, 15, "expected the shape of y, found that of z"),
        (HEAD + "   1: y ← x   ▷ [a, b]", 4, 7, "1 variables but 2 activations"),
        (HEAD + "return x\nInput: y ∈ R", 5, 1, "`Input:` belongs above"),
        ("Algorithm: F()\nreturn 1\nAlgorithm: F()\nreturn 1", 3, 1, "a second card named F"),
    ],
)
def test_what_is_no_card_is_refused_with_its_place(text, line, column, message):
    with pytest.raises(CardError, match=re.escape(message)) as caught:
        parse_all(text, "my.card")
    assert (caught.value.line, caught.value.column) == (line, column)
    assert str(caught.value).startswith(f"my.card:{line}:{column}: " if line else "my.card: ")
    if line:
        number, source, caret = re.fullmatch(r"  (\d+) \| (.*)\n +\| ( *)\^", caught.value.excerpt).groups()
        assert (int(number), source, len(caret)) == (line, text.splitlines()[line - 1], column - 1)


def test_one_card_is_one():
    with pytest.raises(CardError, match="here begins another"):
        parse("Algorithm: F()\nAlgorithm: G()")


# ---- round trip -------------------------------------------------------------------------------------------------------------

NAMES = st.from_regex(r"[A-Za-zγθℓ]{1,3}(_[a-z0-9]{1,3})?", fullmatch=True).filter(
    lambda s: s not in ("for", "if", "else", "end", "return", "in", "or", "and", "not", "do", "inf", "pi", "N", "Z")
)
WORDS = st.text(st.sampled_from("abz019 .,;:()[]{}<>=+-·⊙∈←▷×^_/…é#*@"), max_size=25).map(lambda s: " ".join(s.split()))
NOTES = WORDS.filter(lambda s: not s.endswith("]") and not re.search(r"(^|\s)(//|▷)", s))  # brackets at the end name tensors
REMARKS = WORDS.filter(lambda s: s.strip())
KEYS = st.from_regex(r"[a-z]{1,4}(\.\{ℓ\})?(\.[a-z]{1,4})?|", fullmatch=True)
TYPES = st.sampled_from(["R", "R^T", "R^{T×D}", "ℕ", "{0..V-1}^T", "R^{(T+1)×3D}", "Block (ℓ=0..L-1)", "{0,1}^{T×S}", "Attn"])
EXPRESSIONS = st.sampled_from(
    ["e · W_e^⊤", "x[:, 0 : T]", "F(a, b; θ_ℓ)", 'act = "two  words"', "¬ (a ∈ v) ∧ 0 ≤ b < 2π", "-x^2 / √Dh", "a, b", "x" * 80]
)
VALUES = st.recursive(
    st.integers() | st.floats(allow_nan=False) | st.booleans() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.tuples(st.integers(0, 9), st.booleans()).map(lambda v: v * 3),
    max_leaves=4,
)


@st.composite
def declarations(draw, names):
    made = []
    while names:
        n = draw(st.integers(1, min(2, len(names))))
        mine, names = tuple(names[:n]), names[n:]
        keys = draw(st.just(()) | st.lists(KEYS, min_size=n, max_size=n).map(tuple))
        made.append(Declaration(mine, draw(TYPES), draw(NOTES), keys))
    return tuple(made)


@st.composite
def blocks(draw, depth=0):
    steps = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["bind", "bind", "for", "if", "return", "comment"]))
        note = draw(NOTES)
        if kind == "bind":
            variables = tuple(draw(st.lists(NAMES | NAMES.map(lambda n: f"{n}[:, {n}]"), min_size=1, max_size=3)))
            n = len(variables)
            shapes = draw(st.just(()) | st.lists(TYPES, min_size=n, max_size=n).map(tuple))
            taps = draw(st.just(()) | st.lists(KEYS, min_size=n, max_size=n).map(tuple))
            steps.append(Step("bind", variables, draw(EXPRESSIONS), shapes, note, taps))
        elif kind == "for" and depth < 3:
            over = draw(st.sampled_from(["0, …, L-1", "x[0]"]))
            steps += [Step("for", (draw(NAMES),), over, note=note), *draw(blocks(depth + 1)), Step("end")]
        elif kind == "if" and depth < 3:
            steps += [Step("if", expression=draw(EXPRESSIONS), note=note), *draw(blocks(depth + 1))]
            if draw(st.booleans()):
                steps += [Step("else", expression=draw(EXPRESSIONS | st.just(""))), *draw(blocks(depth + 1))]
            steps.append(Step("end", note=note))
        elif kind == "return":
            steps.append(Step("return", expression=draw(EXPRESSIONS), note=note))
        elif kind == "comment":
            steps.append(Step("comment", note=note))
    return steps


@st.composite
def cards(draw):
    names = draw(st.lists(NAMES, unique=True, max_size=9))
    a, b, c = sorted(draw(st.lists(st.integers(0, len(names)), min_size=3, max_size=3)))
    inputs, params = draw(declarations(names[:a])), draw(declarations(names[a:b]))
    hypers = tuple(Hyper(name, draw(st.none() | VALUES)) for name in names[b:c])
    given = tuple(draw(st.lists(st.sampled_from(["θ", *names_of(params), *(h.name for h in hypers)]), max_size=3)))
    return Card(
        draw(st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,5}(\.[A-Z][a-z]{0,5})?", fullmatch=True)),
        draw(WORDS),
        inputs,
        draw(declarations(draw(st.lists(NAMES, unique=True, max_size=2)))),
        hypers,
        params,
        tuple(draw(st.lists(REMARKS, max_size=2))),
        arrange(inputs, draw(blocks())),
        given,
    )


@given(cards())
def test_what_is_written_reads_back(card):
    assert parse(render(card)) == card


@given(st.lists(cards(), min_size=1, max_size=3, unique_by=lambda card: card.name))
def test_several_cards_read_back(several):
    assert parse_all(render_full(several)) == tuple(several)


@given(
    st.text(max_size=60) | st.lists(st.sampled_from([*ANCHOR.splitlines(), "end", "else", "if x then", "(", "▷", "Param:"])).map("\n".join)
)
def test_any_text_is_a_card_or_an_error_of_one_line(text):
    try:
        cards = parse_all(text)
    except CardError as error:
        message = str(error)
    else:
        message = render_full(cards).partition("\n")[0]
        assert parse_all(render_full(cards)) == cards
    assert len(message.splitlines()) == 1


def test_shipped_cards_are_in_the_canonical_layout():
    files = sorted((Path(__file__).parents[2] / "cards/library").glob("*.card"))
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert render(parse(text, str(file))) == text


def test_reading_and_writing_imports_no_parser_and_no_arithmetic():
    code = "import json, sys, toyllm.cards.text; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"lark", "numba", "numpy"} & set(modules)
