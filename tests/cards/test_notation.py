import json
import re
from pathlib import Path

import pytest
from hypothesis import given

from toyllm.cards.catalogue import library
from toyllm.cards.latex import math_text as math
from toyllm.cards.latex import plain, render_latex
from toyllm.cards.notation import from_json, render_markdown, to_json
from toyllm.cards.text import parse
from toyllm.kernels.errors import ToyllmError

from .test_text import cards

LIBRARY = library()
FFN = """\
Algorithm: my.FFN(x; θ)      [mine & yours]
  Input:    x ∈ R^{T×D}   (normed *stream*)
  Output:   y ∈ R^{T×D}
  Hyper:    D=4 F w=(128,∞)×2 act=gelu_new
  Param:    W_1, b′ ∈ R^{D×F}   [up.weight, -]
            θ_ℓ ∈ LN (ℓ=0..L-1)   [blocks.{ℓ}]
            (100% of it; a|b)
   1: if act = "gelu" then
   2:    h ← GELU((x - 1) / √(2T) · W_1^⊤ + b′)                       h ∈ R^{T×F}   ▷ 0 ≤ h [mlp.hidden]
   3: else
   4:    ▷ nothing is done
   5: end if
   6: for t ∈ x[0, : T-1, …] do
   7:    h[t] ← -2h^2 ⊙ (a + b)
   8: end for
   9: return h
"""


@pytest.mark.parametrize("name", LIBRARY)
def test_a_card_of_the_library_reads_back_from_json(name):
    document = json.loads(json.dumps(to_json(LIBRARY[name]), allow_nan=False))
    assert from_json(document) == LIBRARY[name]


@given(cards())
def test_any_card_reads_back_from_json(card):
    assert from_json(json.loads(json.dumps(to_json(card), allow_nan=False))) == card


AS = "; write it as `toyllm card --format json` does"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], "card: expected an object with name, family, given, inputs, outputs, params, hypers, lines, steps, found list"),
        (("name",), 3, "card.name: expected a text, found int"),
        (("inputs",), {}, "card.inputs: expected a list, found dict"),
        (("inputs", 0), {"names": []}, "card.inputs[0]: expected an object with names, type, note, tensors, found names"),
        (("inputs", 0, "names", 0), None, "card.inputs[0].names[0]: expected a text, found NoneType"),
        (("params", 0, "tensors"), ["a"], "card.params[0].tensors: expected none, or one for each of 2 names, found 1"),
        (("hypers", 0, "value"), {"number": 3}, "card.hypers[0].value.number: expected NaN, Infinity or -Infinity, found 3"),
        (("hypers", 0, "value"), [None], "card.hypers[0].value[0]: expected a number, a text, true or false, found null"),
        (("steps", 0, "kind"), "goto", "card.steps[0].kind: expected bind, update, for, if, else, end, return, comment, found 'goto'"),
        (("steps", 0, "depth"), True, "card.steps[0].depth: expected an integer of 0 or more, found True"),
        (("steps", 1, "shapes"), ["R", "R"], "card.steps[1].shapes: expected none, or one for each of 1 variables, found 2"),
        (("steps", 1, "depth"), 0, "card: steps[1].depth: expected 1, found 0" + AS),
        (
            ("steps", 1, "expression"),
            "a @ b",
            "card: steps[1].expression: expected 'a · b', found 'a @ b'" + AS,
        ),
        (("steps", 8, "kind"), "end", "card: it is no card: as text, 16:7: `end`: no `for` or `if` is open here"),
        (("steps", 8, "expression"), "x\n", None),
        (("name",), "a(", None),
    ],
)
def test_what_is_no_card_is_refused_with_the_path_to_it(path, value, message):
    document = to_json(parse(FFN))
    if path:
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
    else:
        document = value
    with pytest.raises(ToyllmError) as caught:
        from_json(document)
    assert "\n" not in str(caught.value)
    assert message in (None, str(caught.value))


def test_numbers_that_json_does_not_have():
    values = to_json(parse("Algorithm: F()\nHyper: a=∞ b=-∞ c=NaN d=(1,∞) e=Infinity\nreturn 1"))["hypers"]
    assert [h["value"] for h in values] == [
        {"number": "Infinity"}, {"number": "-Infinity"}, {"number": "NaN"}, [1, {"number": "Infinity"}], "Infinity",
    ]  # fmt: skip


# ---- Markdown ---------------------------------------------------------------------------------------------------------------


def test_markdown():
    assert (
        render_markdown([parse(FFN)], {"my.FFN": ["8 parameters"]})
        == """\
### `my.FFN(x; θ)`

*mine \\& yours*

|  | name | type or value | what | tensor |
| --- | --- | --- | --- | --- |
| Input | `x` | `R^{T×D}` | normed \\*stream\\* |  |
| Output | `y` | `R^{T×D}` |  |  |
| Hyper | `D` | `4` |  |  |
|  | `F` |  |  |  |
|  | `w` | `(128,∞)×2` |  |  |
|  | `act` | `gelu_new` |  |  |
| Param | `W_1`, `b′` | `R^{D×F}` |  | `up.weight`, `-` |
|  | `θ_ℓ` | `LN (ℓ=0..L-1)` |  | `blocks.{ℓ}` |

```text
"""
        + "\n".join(FFN.splitlines()[7:])
        + """
```

* 100% of it; a\\|b
* 8 parameters
"""
    )


@given(cards())
def test_no_text_breaks_out_of_its_cell_or_fence(card):
    lines = render_markdown([card]).splitlines()
    fences = [n for n, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) == (2 if card.steps else 0)
    for line in lines[: fences[0] if fences else None]:
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 6


# ---- LaTeX ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("x · W_1^⊤ + b", r"x \cdot W_{1}^{\top} + b"),
        ("(x - m) / √(v + ε) ⊙ γ", r"\frac{x - m}{\sqrt{v + \varepsilon}} \odot \gamma"),
        ("a - (b - c)", r"a - \left(b - c\right)"),
        ("(a / b)^2", r"\left(\frac{a}{b}\right)^{2}"),
        ("2^(s - 127)", r"2^{s - 127}"),
        ("(-x)^2", r"\left(-x\right)^{2}"),
        ("-x^2", "-x^{2}"),
        ("W_q^h^⊤", r"W_{q}^{h \top}"),
        ("(a^2)^3", r"\left(a^{2}\right)^{3}"),
        ("x^⊤^2", r"x^{\top 2}"),
        ("2π ⊙ 3n", r"2 \pi \odot 3 n"),
        ("2 ⊙ (a + b)", r"2 \odot \left(a + b\right)"),
        ("θ_{ℓ+1}^attn", r"\theta_{\ell + 1}^{\mathrm{attn}}"),
        ("C′_ℓ[…, new, ::2, 1:]", r"C'_{\ell}[\ldots, \mathrm{new}, ::2, 1:]"),
        ("β_fast ⊙ x̂", r"\beta_{\mathrm{fast}} \odot \hat{x}"),
        ("low & 15 = 1 << 2", r"\mathit{low} \mathbin{\&} 15 = 1 \ll 2"),
        ("¬ (a ∧ b) ∨ 0 ≤ t < w", r"\lnot \left(a \land b\right) \lor 0 \le t < w"),
        ("⌊a / 2⌋ mod 3", r"\left\lfloor \frac{a}{2} \right\rfloor \bmod 3"),
        ('where(s < 255, 2^s, NaN), act = "a_b"', r"\operatorname{where}(s < 255, 2^{s}, \mathrm{NaN}),\; \mathit{act} = \text{``a\_b''}"),
        (
            "gpt2.LN(e; γ_f), concat(a, [b, 1e-05], axis=-1)",
            r"\operatorname{gpt2.LN}(e; \gamma_{f}),\; \operatorname{concat}(a, [b, 10^{-5}], \mathrm{axis}=-1)",
        ),
        ("0, …, L-1", r"0, \ldots, L - 1"),
        ("x $ {y}", r"\text{x \$ \{y\}}"),
    ],
)
def test_expressions_in_latex(text, latex):
    assert math(text) == latex


def test_values_of_hypers_in_latex():
    document = render_latex([parse("Algorithm: F()\nHyper: ε=1e-05 a=-∞ b=0.5 c=a_b\nreturn 1")])
    assert r"$\varepsilon = 10^{-5}$, $a = -\infty$, $b = 0.5$, $c = \text{a\_b}$" in document


def test_latex():
    document = render_latex([parse(FFN)], {"my.FFN": ["8 parameters, 100%"]})
    assert document == Path(__file__).with_name("ffn.tex").read_text(encoding="utf-8")


def test_signs_in_notes_are_set_and_markup_is_not_obeyed():
    assert plain("0 ≤ u_1 < β, 50% \\input{x} ~^#&$\x1b é") == (
        r"0 $\le$ u\_1 < $\beta$, 50\% \textbackslash{}input\{x\} \textasciitilde{}\textasciicircum{}\#\&\$\textbackslash{}x1b é"
    )


def balanced(text):
    depth = 0
    for sign in re.sub(r"\\.", "", text):
        depth += (sign == "{") - (sign == "}")
        if depth < 0:
            return False
    opened = re.findall(r"\\left(?![a-z])|\\right(?![a-z])|\\begin|\\end(?![A-Z])", text)
    return depth == 0 and opened.count(r"\left") == opened.count(r"\right") and opened.count(r"\begin") == opened.count(r"\end")


@pytest.mark.parametrize("name", LIBRARY)
def test_a_card_of_the_library_is_ascii_and_balanced_in_latex(name):
    document = render_latex([LIBRARY[name]])
    assert document.isascii()
    assert balanced(document)
    assert len(re.findall(r"\\State\b|\\(?:For|If|ElsIf|Else|EndFor|EndIf)\b", document)) == len(LIBRARY[name].steps)
    assert not re.search(r"[\^_]\{[^{}]*\}[\^]\{[^{}]*\}\^", document)


@given(cards())
def test_any_card_is_balanced_in_latex(card):
    document = render_latex([card])
    assert balanced(document)
    assert document.replace(r"\$", "").count("$") % 2 == 0
