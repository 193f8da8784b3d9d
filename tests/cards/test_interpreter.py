import numpy as np
import pytest

from toyllm.cards.catalogue import library
from toyllm.cards.interpreter import run
from toyllm.cards.operators import Limits
from toyllm.cards.structure import CardError
from toyllm.cards.text import parse_all

LIBRARY = library()


def ran(text, inputs=None, tensors=None, **options):
    """A run of the first card of a text, which may call the others."""
    cards = parse_all(text, "my.card")
    return run(cards[0], {c.name: c for c in cards}, inputs, source=(tensors or {}).__getitem__, **options)


def refused(text, inputs=None, tensors=None, **options):
    """The message of what such a run is refused with, and the text at its column."""
    with pytest.raises(CardError) as caught:
        ran(text, inputs, tensors, **options)
    return str(caught.value), caught.value.excerpt.splitlines()[0].split(" | ", 1)[1][caught.value.column - 1 :]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_layer_norm_of_the_library(dtype):
    rng = np.random.default_rng(1)
    x, γ, β = rng.normal(size=(3, 8)), rng.normal(size=8), rng.normal(size=8)
    found = run(LIBRARY["gpt2.LN"], LIBRARY, {"x": x, "γ": γ, "β": β}, {"D": 8, "ε": 1e-5}, dtype=dtype).outputs["y"]
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * γ + β
    assert found.dtype == dtype
    np.testing.assert_allclose(found, want, rtol=100 * np.finfo(dtype).eps, atol=100 * np.finfo(dtype).eps)


def test_parameters_and_activations_are_below_the_group():
    rng = np.random.default_rng(2)
    tensors = {
        "blocks.1.up.weight": rng.normal(size=(4, 6)),
        "blocks.1.up.bias": rng.normal(size=6),
        "blocks.1.down.weight": rng.normal(size=(6, 4)),
        "blocks.1.down.bias": rng.normal(size=4),
    }
    x = rng.normal(size=(3, 4))
    hypers = {"D": 4, "F": 6, "activation": "gelu_new"}
    made = run(LIBRARY["gpt2.FFN"], LIBRARY, {"x": x}, hypers, tensors.__getitem__, group="blocks.1")
    assert sorted(made.activations) == ["blocks.1.mlp.hidden", "blocks.1.mlp.out"]
    want = made.activations["blocks.1.mlp.hidden"] @ tensors["blocks.1.down.weight"] + tensors["blocks.1.down.bias"]
    np.testing.assert_allclose(made.outputs["y"], want)


# ---- names, families, sizes -------------------------------------------------------------------------------------------------


def test_a_family_as_a_whole_and_its_activation():
    text = "Algorithm: F(x)\nInput: x ∈ R^T\nfor h ← 0, …, 2 do\n  Y^h ← h ⊙ x   Y^h ∈ R^T ▷ [attn.heads]\nend for\nreturn Y, Y^1"
    whole, one = ran(text, {"x": [1, 2]}).results
    np.testing.assert_array_equal(whole, [[0, 0], [1, 2], [2, 4]])
    np.testing.assert_array_equal(one, [1, 2])
    np.testing.assert_array_equal(ran(text, {"x": [1, 2]}).activations["attn.heads"], whole)


def test_indices_in_an_activations_name_are_not_its_axes():
    text = (
        "Algorithm: F()\nfor ℓ ← 0, …, 1 do\n  for h ← 0, …, 2 do\n    Y_ℓ^h ← [ℓ, h]   ▷ [blocks.{ℓ}.heads]\n"
        "    Z_ℓ^h ← [ℓ, h]   ▷ [all]\n    V_h ← h   ▷ [one.{ℓ}.{h}]\n  end for\nend for\nreturn 0"
    )
    found = ran(text).activations
    assert {name: value.shape for name, value in found.items() if "one" not in name} == {
        "blocks.0.heads": (3, 2),
        "blocks.1.heads": (3, 2),
        "all": (2, 3, 2),
    }
    assert found["one.1.2"] == 2


def test_the_activation_of_a_part_is_the_whole_variable():
    found = ran("Algorithm: F()\nK ← zeros(3)\nfor t ← 0, …, 2 do\n  K[t] ← t   ▷ [k]\nend for\nreturn K")
    np.testing.assert_array_equal(found.activations["k"], [0, 1, 2])


def test_every_bound_variable_is_told_on_request():
    seen = []
    ran(
        "Algorithm: F(x)\nInput: x ∈ R\na, b ← x, 2   ▷ [-, out]\na ← G(a)\nreturn a\n\nAlgorithm: G(y)\nInput: y ∈ R\ny ← y + 1\nreturn y",
        {"x": 1},
        watch=seen.append,
        group="blocks.3",
    )
    assert [(b.card.name, b.variable, b.activation, float(b.value)) for b in seen] == [
        ("F", "a", "", 1),
        ("F", "b", "blocks.3.out", 2),
        ("G", "y", "", 2),
        ("F", "a", "", 2),
    ]


def test_letters_take_their_values_from_inputs():
    text = "Algorithm: F(x, y)\nInput: x ∈ R^{(T+1)×2D}\n y ∈ R^{T·D}\nHyper: D=2\nreturn T, D"
    assert [int(v) for v in ran(text, {"x": np.zeros((4, 4)), "y": np.zeros(6)}).results] == [3, 2]


def test_a_hyper_without_a_value_takes_it_from_an_input_and_hands_it_on():
    text = "Algorithm: F(x)\nInput: x ∈ R^D\nHyper: D\nreturn G()\n\nAlgorithm: G()\nHyper: D\nreturn D"
    assert int(ran(text, {"x": [1, 2, 3]}).results[0]) == 3


def test_a_letter_of_a_stated_shape_is_defined_anew_each_round():
    text = "Algorithm: F()\ns ← 0\nfor j ← 0, …, 3 do\n  t ← nonzero(range(4) < j)   t ∈ ℕ^n\n  s ← s + n\nend for\nreturn s"
    assert int(ran(text).results[0]) == 0 + 1 + 2 + 3


def test_a_letter_that_another_step_defined_is_checked():
    text = "Algorithm: F()\na ← range(3)   a ∈ ℕ^n\nb ← range(4)   b ∈ ℕ^n\nreturn b"
    assert refused(text) == ("my.card:3:20: b: expected ℕ^3, found ℤ^4", "ℕ^n")


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("[0.5]", "ℤ^1", "expected ℤ^1, found R^1, from 0.5 to 0.5"),
        ("[-1]", "ℕ^1", "expected ℕ^1, found ℤ^1, from -1 to -1"),
        ("[0, 4]", "{0..3}^2", "expected {0..3}^2, found ℤ^2, from 0 to 4"),
        ("[0, 2]", "{0,1}^2", "expected {0,1}^2, found ℤ^2, from 0 to 2"),
        ("[0, 2]", "R^3", "expected R^3, found ℤ^2"),
        ("[0, 2]", "{0..b}^2", None),
        ('"a"', "R", "expected R, found the text 'a'"),
    ],
)
def test_a_stated_type_is_checked(value, kind, message):
    if message is None:
        text = f"Algorithm: F()\nb ← [1, 2]\na ← {value}   a ∈ {kind}\nreturn a"
        assert refused(text) == ("my.card:3:22: expected an integer, found ℤ^2", "b}^2")
        return
    assert refused(f"Algorithm: F()\na ← {value}   a ∈ {kind}\nreturn a") == (f"my.card:2:{12 + len(value)}: a: {message}", kind)


def test_integers_that_are_stated_to_be_real_become_so():
    assert ran("Algorithm: F()\na ← [1, 2]   a ∈ R^2\nreturn a", dtype=np.float32).results[0].dtype == np.float32


def test_sequences_of_texts_and_numbers_in_hypers():
    text = 'Algorithm: F()\nHyper: w=(128,∞)×2 kind=(full,slides)\nreturn w_1, w[2], kind_1 = "slides"'
    assert [v.item() for v in ran(text).results] == [float("inf"), 128, True]


# ---- calls ------------------------------------------------------------------------------------------------------------------

FAMILY = """
Algorithm: my()
  Output: y ∈ R^2
  Hyper: D=2 L=2 ε=0.5
  Param: θ_ℓ ∈ Block (ℓ=0..L-1)   [blocks.{ℓ}]
         W_ℓ^h ∈ R^D (ℓ=0..L-1, h=0..2)   [w.{ℓ}.{h}]
y ← zeros(D)
for ℓ ← 0, …, L-1 do
  y ← Block(y; θ_ℓ, ℓ) + W_ℓ^0
end for
return y

Algorithm: my.Block(x; θ, n)
  Input: x ∈ R^D
  Hyper: D ε n
  Param: θ^inner ∈ Inner
         b ∈ R^D   [b]
x ← x + b   x ∈ R^D   ▷ [sum]
return Inner(x; θ^inner) + n

Algorithm: my.Inner(x; θ)
  Input: x ∈ R^D
  Hyper: D ε
  Param: g ∈ R^D   [g]
  y ← Plain(x)
  x[0] ← ε   ▷ [changed]
  return y + g

Algorithm: my.Plain(x)
  Input: x ∈ R^D
  Hyper: D
  y ← 2x   ▷ [plain]
  return y
"""
TENSORS = {f"blocks.{i}.{n}": np.array([i + 1.0, j]) for i in range(2) for j, n in enumerate("bg")} | {
    f"w.{i}.0": np.array([10.0, 20.0]) for i in range(2)
}


def test_groups_hypers_and_activations_through_calls():
    made = ran(FAMILY, tensors=TENSORS)
    y, want = np.zeros(2), {}
    for i in range(2):
        x = y + TENSORS[f"blocks.{i}.b"]
        want |= {f"blocks.{i}.sum": x, f"blocks.{i}.plain": 2 * x, f"blocks.{i}.changed": np.array([0.5, x[1]])}
        y = 2 * x + TENSORS[f"blocks.{i}.g"] + i + np.array([10, 20])
    np.testing.assert_array_equal(made.outputs["y"], y)
    assert set(made.activations) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(made.activations[name], value)


def test_values_are_never_shared():
    text = "Algorithm: F(x)\nInput: x ∈ R^2\nParam: W ∈ R^2 [w]\na ← W\na[0] ← 9\nb ← x\nx[1] ← 7\nc ← G(b)\nreturn a, b, c, x\n"
    text += "\nAlgorithm: G(x)\nInput: x ∈ R^2\nx[0] ← 5\nreturn x"
    x, w = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    found = ran(text, {"x": x}, {"w": w}).results
    assert [v.tolist() for v in found] == [[9, 4], [1, 2], [5, 2], [1, 7]]
    assert (x.tolist(), w.tolist()) == ([1, 2], [3, 4])


def test_a_parameter_is_read_when_a_step_needs_it():
    text = "Algorithm: F(t)\nInput: t ∈ R\nParam: W ∈ R [w]\nif t > 0 then\n  return W\nelse if t < 0 then\n return 1\n"
    text += "else\n  return 2\nend if"
    assert [float(ran(text, {"t": t}, {"w": np.float32(3)} if t > 0 else {}).results[0]) for t in (1, 0, -1)] == [3, 2, 1]


def test_parameters_behind_the_semicolon_may_be_handed_over_from_outside():
    text = "Algorithm: F(x; W, c)\nInput: x ∈ R^T\nHyper: c\nParam: W ∈ R^T\nreturn c ⊙ x ⊙ W"
    assert ran(text, {"x": [1, 2], "W": [3, 4], "c": 2}).results[0].tolist() == [6, 16]


def test_a_card_calls_itself():
    text = "Algorithm: my.F(n)\nInput: n ∈ ℕ\nOutput: f ∈ ℕ\nif n = 0 then\n return 1\nend if\nreturn n ⊙ F(n - 1)"
    assert int(ran(text, {"n": 10}).results[0]) == 3628800


def test_loops_through_a_vector_and_returns_from_within():
    text = "Algorithm: F(v)\nInput: v ∈ ℤ^n\ns ← 0\nfor t ∈ v do\n  if t < 0 then\n    return s\n  end if\n  s ← s + t\nend for\nreturn -1"
    assert int(ran(text, {"v": [3, 4, -1, 5]}).results[0]) == 7
    assert int(ran(text, {"v": [3, 4]}).results[0]) == -1


@pytest.mark.parametrize(
    ("steps", "message", "at"),
    [
        ("return G(x)", "my.card:6:8: F.G takes 1 argument (y), found 0", None),
        ("a ← G(x, x)\nreturn a", "my.card:6:5: F.G takes 1 argument (y), found 2", "G(x, x)"),
        ("a ← G(x; x)\nreturn a", "my.card:6:5: F.G takes 0 arguments behind the semicolon (none), found 1", "G(x; x)"),
        ("a ← G(x, axis=1)\nreturn a", "my.card:6:5: F.G: a card has no option axis=", "G(x, axis=1)"),
        ("a ← G([1])\nreturn a", "my.card:6:5: F.G: y: expected R^2, found ℤ^1", "G([1])"),
        ("a, b ← G(x)\nreturn a", "my.card:6:8: 1 result for 2 names", "G(x)"),
        ("a ← x, x\nreturn a", "my.card:6:5: 2 results for 1 name", "x, x"),
        ("return x, x", "my.card:6:8: F has 1 output, and here returns 2", "x, x"),
        ("return [1, 2, 3]", "my.card:6:8: y: expected R^2, found ℤ^3", "[1, 2, 3]"),
        ("return z", "my.card:6:8: z is not bound", "z"),
        ("return W", "my.card:6:8: W: the model has no tensor w", "W"),
        ("return V", "my.card:6:8: V: expected R^2, found v [3]", "V"),
        ("return U", "my.card:6:8: U has no tensor: name it in brackets on its `Param` line, or hand it over behind a semicolon", "U"),
        ("return P_3", "my.card:6:8: P_ℓ is declared for ℓ = 0 to 1, found 3", "P_3"),
        ("return n", "my.card:6:8: n: this hyper has no value; state it, as in n=1, or name a model that has it", "n"),
        ("if x then\nend if\nreturn x", "my.card:6:4: a condition is one truth value, found R^2", "x then"),
        ("for t ∈ [x] do\nend for\nreturn x", "my.card:6:9: a loop runs through a sequence or a vector, found R^{1×2}", "[x] do"),
        ("x[5] ← 1\nreturn x", "my.card:6:1: index 5 of an axis of length 2", "x[5] ← 1"),
        ("x[:1] ← x\nreturn x", "my.card:6:1: R^2 does not fit into R^1", "x[:1] ← x"),
        ("a ← Y^1\nY^0 ← 1\nreturn x", "my.card:6:5: Y is not bound", "Y^1"),
        ("for i ← 0, …, 1 do\n Y^{2i} ← 1\nend for\nreturn Y", None, None),
        ("a ← x", "my.card:1:1: F ends without `return`", "Algorithm: F(x)"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(steps, message, at):
    head = "Algorithm: F(x)\n Input: x ∈ R^2\n Output: y ∈ R^2\n Hyper: n\n Param: W, V, U, P_ℓ ∈ R^2   [w, v, -, -]\n"
    head = head.replace(", P_ℓ", "").replace(", -, -]", ", -]").replace("\n Hyper", "\n Hyper")
    if "P_3" in steps:
        head = head.replace("W, V, U ∈ R^2   [w, v, -]", "P_ℓ ∈ R^2 (ℓ=0..1)   [p]")
    if steps == "return G(x)":
        steps, at = "return G()", "G()"
    if message is None:
        steps, message, at = (
            "for i ← 0, …, 1 do\n Y^i ← 1\n if i = 1 then\n  a ← Y\n end if\nend for\nreturn [Y[0], Z]",
            "my.card:12:15: Z is not bound",
            "Z]",
        )
    text = f"{head}{steps}\n\nAlgorithm: F.G(y)\nInput: y ∈ R^2\nreturn y"
    assert refused(text, {"x": [1.0, 2.0]}, {"v": np.zeros(3)}) == (message, at)


def test_columns_are_those_of_the_file_where_signs_are_spelled_in_ascii():
    assert refused("Algorithm: F()\n  1:  y  <-  1 <= 2 and  q\nreturn y") == ("my.card:2:26: q is not bound", "q")


def test_wrong_inputs_are_told():
    with pytest.raises(CardError, match="F: expected the inputs x, found y"):
        ran("Algorithm: F(x)\nInput: x ∈ R\nreturn x", {"y": 1})
    with pytest.raises(CardError, match=r"F: x: expected \{0..4\}\^\{2×T\}, found ℤ\^2"):
        ran("Algorithm: F(x)\nInput: x ∈ {0..4}^{2×T}\nreturn x", {"x": [1, 2]})


# ---- limits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("for i ← 0, …, 10^15 do\nend for\nreturn 0", "the card takes more than 1000 steps"),
        ("for i ← 0, …, 999 do\nx ← i\nend for\nreturn 0", "the card takes more than 1000 steps"),
        ("return F()", "more than 8 calls within each other"),
        ("x ← zeros(10^6, 10^6)\nreturn 0", "zeros: an array of 1000000 × 1000000 numbers; at most 10000 are computed at once"),
        ("x ← range(10^18)\nreturn 0", "range: an array of 1000000000000000000 numbers"),
        ("x ← zeros(100) + zeros(101)[:, new]\nreturn 0", "`+`: an array of 101 × 100 numbers"),
        ("x ← zeros(2, 100)[zeros(100, 2) = 1]\nreturn 0", "an array of 100 × 2 × 100 numbers"),
        ("x ← zeros(100, 2)\nx ← x · x^⊤ + repeat(x, 10^9)\nreturn 0", "repeat: an array of 100 × 2 × 1000000000 numbers"),
        ("x ← pad(zeros(2), 10^9, 0)\nreturn 0", "pad: an array of 1000000002 numbers"),
        ("x ← one_hot([1], 10^9)\nreturn 0", "one_hot: an array of 1 × 1000000000 numbers"),
        ("for i ← 0, …, 99 do\nY_i ← zeros(10000)\nend for\nreturn 0", "the card holds more than 1 MiB"),
        ("for i ← 0, …, 99 do\nx ← zeros(10000)   ▷ [t.{i}]\nend for\nreturn 0", "the card holds more than 1 MiB"),
        ("x ← zeros(100, 100)\nfor i ← 0, …, 500 do\nx ← exp(x · x · x · x)\nend for\nreturn 0", "the card computes too much"),
        ("x ← split(zeros(1), [1" + ", 0" * 200 + "])\nreturn 0", "201 results for 1 name"),
    ],
)
def test_a_run_is_bounded(steps, message):
    limits = Limits(steps=1000, calls=8, elements=10_000, held=1 << 20, work=1_000_000_000)
    assert message in refused(f"Algorithm: F()\n{steps}", limits=limits)[0]


def test_calls_within_deep_expressions_are_bounded_by_default():
    text = "Algorithm: F()\nx ← " + "(1 + " * 40 + "F()" + ")" * 40 + "\nreturn x"
    assert refused(text)[0] == "my.card:1:1: F: calls and expressions go too deep into each other"
