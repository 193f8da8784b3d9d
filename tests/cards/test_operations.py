"""Every operator and function of the language: what it computes, in both dtypes, and that the checker knows its kind and shape."""

import math
import re

import numpy as np
import pytest

from toyllm.cards.functions import FUNCTIONS
from toyllm.cards.interpreter import run
from toyllm.cards.operations import COMPUTED
from toyllm.cards.program import Return, program
from toyllm.cards.shape_expressions import begun, result_of
from toyllm.cards.shape_functions import RULES
from toyllm.cards.shapes import problems
from toyllm.cards.sizes import fixed, substituted
from toyllm.cards.structure import CardError
from toyllm.cards.text import parse

RNG = np.random.default_rng(7)
INPUTS = {
    "x": RNG.normal(size=(3, 4)),
    "y": RNG.normal(size=(3, 4)),
    "W": RNG.normal(size=(4, 6)),
    "v": RNG.normal(size=4),
    "s": np.array(0.5),
    "B": RNG.normal(size=(2, 3, 4)),
    "i": np.array([2, 0, 3]),
    "j": np.array([[1, 0], [2, 3], [0, 0]]),
    "m": np.array([True, False, True]),
    "q": np.array([1.0, math.nan, -math.inf, math.inf]),
    "n": np.array(3),
}
x, y, W, v, s, B, i, j, m, q, n = INPUTS.values()
TYPES = {
    "x": "R^{T×D}", "y": "R^{T×D}", "W": "R^{D×F}", "v": "R^D", "s": "R", "B": "R^{b×T×D}", "i": "{0..D-1}^T", "j": "{0..D-1}^{T×k}",
    "m": "{0,1}^T", "q": "R^D", "n": "ℕ",
}  # fmt: skip
LETTERS = {"T": 3, "D": 4, "F": 6, "b": 2, "k": 2, "n": 3}


def card(expression, numeric=False):
    kinds = {name: re.sub("[TDFbk]", lambda m: str(LETTERS[m[0]]), kind) if numeric else kind for name, kind in TYPES.items()}
    if numeric:
        expression = re.sub(r"\b[TDFb]\b", lambda m: str(LETTERS[m[0]]), expression)
    lines = [f"  Input: {name} ∈ {kind}" for name, kind in kinds.items()]
    return parse(f"Algorithm: F({', '.join(TYPES)})\n" + "\n".join(lines) + f"\n return {expression}", "f.card")


def computed(expression, dtype=np.float64):
    results = run(card(expression), inputs=INPUTS, dtype=dtype).results
    return results if len(results) > 1 else results[0]


def erf(a):
    return np.vectorize(math.erf)(a)


def softmax(a, axis=-1):
    e = np.exp(a - a.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


EXPRESSIONS = {
    # operators
    "x + y - 2": x + y - 2,
    "x ⊙ y / s": x * y / 0.5,
    "x · W": x @ W,
    "x · v": x @ v,
    "v · W": v @ W,
    "v · v": v @ v,
    "B · W": B @ W,
    "B · x^⊤": B @ x.T,
    "s · x": 0.5 * x,
    "n · n": 9,
    "i · i": i @ i,
    "i / 2": i / 2,
    "i mod 2": i % 2,
    "-5 mod 3": 1,
    "-x": -x,
    "√(x ⊙ x)": np.abs(x),
    "2π": 2 * math.pi,
    "3n": 9,
    "x^2": x**2,
    "i^2": i**2,
    "2^i": 2.0**i,
    "2^(-i)": 2.0**-i,
    "10^{-5}": 1e-5,
    "2^n": 8.0,
    "x^⊤": x.T,
    "⌊x⌋": np.floor(x).astype(int),
    "⌈x⌉": np.ceil(x).astype(int),
    "⌊9007199254740993 / 1⌋": 9007199254740993,
    "⌊-7 / 2⌋": -4,
    "⌈7 / 2⌉": 4,
    "¬ m": ~m,
    "m ∧ i > 0": m & (i > 0),
    "m ∨ i > 0": m | (i > 0),
    "0 ≤ i < 3": (i >= 0) & (i < 3),
    "i = 2": i == 2,
    "i ≠ 2": i != 2,
    "x ≥ y": x >= y,
    "i ∈ [0, 3]": np.isin(i, [0, 3]),
    "3 ∉ i": False,
    "i & 2": i & 2,
    "i << 4 >> 3": i * 2,
    '"a" = "a"': True,
    '"a" ≠ "a"': False,
    "∞": math.inf,
    "true": True,
    "m + m": 2 * m.astype(int),
    # indices
    "x[0]": x[0],
    "x[-1, 1:3]": x[-1, 1:3],
    "x[:, ::2]": x[:, ::2],
    "B[…, 1::2]": B[..., 1::2],
    "B[0, …, new]": B[0, ..., None],
    "x[new, :, 0]": x[None, :, 0],
    "W[i]": W[i],
    "B[:, :, i]": B[:, :, i],
    "x[[0, 1], [3, -1]]": x[[0, 1], [3, -1]],
    "B[[0, 1], :, [3, 2]]": B[[0, 1], :, [3, 2]],
    "B[0, :, [3, 2]]": B[0, :, [3, 2]],
    "B[:, 0, i]": B[:, 0, i],
    "W[j]": W[j],
    "x[n - 1][: D/2]": x[2][:2],
    "x[: n]": x[:3],
    "[n, 2, T]": np.array([3, 2, 3]),
    "[v, v]": np.stack([v, v]),
    # functions
    "exp(x)": np.exp(x),
    "log(abs(x))": np.log(np.abs(x)),
    "sin(x) + cos(x) + tanh(x)": np.sin(x) + np.cos(x) + np.tanh(x),
    "sqrt(square(x))": np.abs(x),
    "square(i) + abs(-i)": i * i + i,
    "erf(x)": erf(x),
    "sigmoid(x)": 1 / (1 + np.exp(-x)),
    "SiLU(x)": x / (1 + np.exp(-x)),
    "ReLU(x)": np.maximum(x, 0),
    "ReLU(-i)": np.zeros(3, int),
    "GELU(x)": x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "GELU_tanh(x)": 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "floor(x)": np.floor(x).astype(int),
    "ceil(x)": np.ceil(x).astype(int),
    "clamp(x, -0.5, s)": np.clip(x, -0.5, 0.5),
    "clamp(q, 0, 1)": np.array([1, math.nan, 0, 1]),
    "minimum(x, y)": np.minimum(x, y),
    "maximum(n, 2.5)": 3.0,
    "where(x > 0, x, 0)": np.where(x > 0, x, 0),
    "where(m, i, 7)": np.where(m, i, 7),
    "where(m, m, false)": m,
    "sum(x)": x.sum(),
    "sum(m)": 2,
    "sum(x, axis=0)": x.sum(0, keepdims=True),
    "mean(x, axis=-1)": x.mean(-1, keepdims=True),
    "variance(x, axis=-1)": x.var(-1, keepdims=True),
    "std(x)": x.std(),
    "max(x, axis=1)": x.max(1, keepdims=True),
    "min(i)": 0,
    "any(m)": True,
    "all(x > y, axis=0)": (x > y).all(0, keepdims=True),
    "softmax(x)": softmax(x),
    "softmax(x, axis=0)": softmax(x, 0),
    "softmax(mask(x, x > -∞))": softmax(x),
    "cumsum(x)": np.cumsum(x, -1),
    "cumsum(m)": np.array([1, 1, 2]),
    "argmax(x)": x.argmax(-1),
    "argmax(x, axis=0)": x.argmax(0),
    "argmax([1, 2, 2])": 1,
    "argsort([3, 1, 3, 1])": np.array([1, 3, 0, 2]),
    "argsort(x, axis=0)": x.argsort(0),
    "top_k([1, 5, 5, 9], 3)": np.array([3, 1, 2]),
    "top_k(x, n)": (-x).argsort(-1)[:, :3],
    "concat(x, y)": np.concatenate([x, y]),
    "concat(x, W^⊤[: T, : 2], axis=1)": np.concatenate([x, W.T[:3, :2]], 1),
    "concat([true], m)": np.array([True, True, False, True]),
    "stack(x, y, axis=1)": np.stack([x, y], 1),
    "stack(x, y, axis=-1)": np.stack([x, y], -1),
    "split(W, 3)": tuple(np.split(W, 3, -1)),
    "split(x, [1, 2, 1])": (x[:, :1], x[:, 1:3], x[:, 3:]),
    "split(W, 2, axis=0)": tuple(np.split(W, 2, 0)),
    "split(x, 1)": x,
    "repeat(x, 2)": np.repeat(x, 2, 0),
    "repeat(x, n, axis=-1)": np.repeat(x, 3, -1),
    "pad(x, 1, 2)": np.pad(x, ((0, 0), (1, 2))),
    "pad(i, 0, n, value=-1)": np.array([2, 0, 3, -1, -1, -1]),
    "pad(i, 1, 0, value=0.5)": np.array([0.5, 2, 0, 3]),
    "pad(x, 0, 1, axis=0, value=∞)": np.pad(x, ((0, 1), (0, 0)), constant_values=math.inf),
    "reshape(x, 2, T·D / 2)": x.reshape(2, 6),
    "reshape(B, b·T, D)": B.reshape(6, 4),
    "permute(B, 2, 0, 1)": B.transpose(2, 0, 1),
    "transpose(B)": B.swapaxes(1, 2),
    "gather(x, j)": np.take_along_axis(x, j, -1),
    "gather(x, [[0, 1, 2, 1]], axis=0)": np.take_along_axis(x, np.array([[0, 1, 2, 1]]), 0),
    "scatter(zeros(D), i, [1, 2, 3])": np.array([2.0, 0, 1, 3]),
    "scatter(W, [1], [v[0] + range(F)])": np.vstack([W[:1], v[0] + np.arange(6.0), W[2:]]),
    "scatter_add(zeros(2), [1, 1, 0], [1, 2, 3])": np.array([3.0, 3.0]),
    "scatter_add([0, 0], [1, 1], 1)": np.array([0, 2]),
    "put(zeros(T, D), [[1, 0], [2, 3], [1, 0]], [[1, 2], [3, 4], [5, 6]])": np.array([[2.0, 1, 0, 0], [0, 0, 3, 4], [6, 5, 0, 0]]),
    "nonzero(m)": np.array([0, 2]),
    "range(n)": np.arange(3),
    "range(-1, n)": np.arange(-1, 3),
    "range(3, 1)[:]": np.arange(0),
    "zeros(2, T)": np.zeros((2, 3)),
    "full(7, T)": np.full(3, 7),
    "full(s, T, 1)": np.full((3, 1), 0.5),
    "one_hot(i, D)": np.eye(4)[i],
    "size(x, axis=1)": 4,
    "size(x, axis=-2)": 3,
    "causal(2, 3)": np.array([[True, True, False], [True, True, True]]),
    "window(3, 4, 2)": np.array([[True, True, False, False], [False, True, True, False], [False, False, True, True]]),
    "window(T, T, ∞)": np.tril(np.ones((3, 3), bool)),
    "mask(i, m)": np.array([2, -math.inf, 3]),
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_what_is_computed(expression, dtype):
    found, wanted = computed(expression, dtype), EXPRESSIONS[expression]
    for a, b in zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, np.asarray(wanted))]:
        assert a.dtype == (dtype if b.dtype == np.float64 else b.dtype)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=30 * np.finfo(dtype).eps, atol=30 * np.finfo(dtype).eps)


def known(made, wanted):
    checked = begun(made, {}, {})
    (statement,) = program(made).body
    assert isinstance(statement, Return)
    result = result_of(checked, statement.value)
    assert isinstance(result, tuple) == isinstance(wanted, tuple)
    return zip(result, wanted, strict=True) if isinstance(wanted, tuple) else [(result, np.asarray(wanted))]


NUMERIC = {
    name for name in EXPRESSIONS if name.startswith(("split(x, [1", "gather(x, [[", "scatter(zeros(D)", "put("))
}  # T is not 3 as letters go


@pytest.mark.parametrize(
    ("expression", "numeric"), [*((e, True) for e in EXPRESSIONS), *((e, False) for e in EXPRESSIONS if e not in NUMERIC)]
)
def test_the_checker_knows_kind_and_shape(expression, numeric):
    made = card(expression, numeric)
    assert [str(problem) for problem in problems(made)] == []
    letters = {name: fixed(size) for name, size in LETTERS.items()}
    for k, w in known(made, EXPRESSIONS[expression]):
        assert k.kind == {"f": "R", "i": "ℤ", "b": "{0,1}"}[w.dtype.kind]
        assert len(k.sizes) == w.ndim
        if expression != "nonzero(m)":
            assert [substituted(size, letters).number for size in k.sizes] == list(w.shape)
        if k.value is not None:
            assert float(substituted(k.value, letters).number) == w


@pytest.mark.parametrize("expression", NUMERIC)
def test_letters_are_no_numbers(expression):
    assert len(problems(card(expression))) == 1


WRONG = {
    "x + W": "`+`: shapes do not go together: R^{3×4} and R^{4×6}",
    "x · y": "`·`: expected R^{…×4} · R^{4×…}, found R^{3×4} · R^{3×4}",
    "W · v": "`·`: expected R^{…×6} · R^6, found R^{4×6} · R^4",
    "x ∧ m": "`∧`: expected truth values, found R^{3×4}",
    "x & 1": "`&`: expected integers, found R^{3×4}",
    '"a" + 1': "`+`: expected numbers, found the text 'a'",
    "x[0, 0, 0]": "3 indices into R^{3×4}",
    "x[3]": "index 3 of an axis of length 3",
    "x[:, 1 : 5]": "the range 1 : 5 of an axis of length 4",
    "x[2 : 1]": "the range 2 : 1 of an axis of length 3",
    "x[…, …]": "`…` stands once in an index",
    "x[v]": "expected integers, found R^4",
    "x[m]": None,  # truth values count as 0 and 1
    "x[s]": "expected an integer, found 0.5",
    "[x, v]": "the shapes differ: R^{3×4} and R^4",
    "softmax(x, axis=2)": "softmax: no axis 2 in R^{3×4}",
    "top_k(v, 5)": "top_k: the 5 largest of 4",
    "concat(x, W)": "concat: the other axes differ: R^{3×4} and R^{4×6}",
    "stack(x, v)": "stack: the shapes differ: R^{3×4} and R^4",
    "split(x, 3)": "split: 3 equal parts of 4",
    "split(x, [1, 2])": "split: parts of 1 + 2 = 3 of an axis of length 4",
    "reshape(x, 5)": "reshape: R^{3×4} has 12 numbers, 5 are 5",
    "reshape(x, -1, 12)": "reshape: expected an integer of 0 or more, found -1",
    "permute(x, 0, 0)": "permute: expected each axis of R^{3×4} once, found 0, 0",
    "transpose(v)": "transpose: expected two axes or more to transpose, found R^4",
    "gather(x, i)": "gather: R^{3×4} and indices ℤ^3 do not go position for position",
    "gather(x, j + 2)": "gather: index 4 of an axis of length 4",
    "put(x, j, [1, 2, 3])": None,
    "scatter(x, [0, 1], W)": "scatter: expected R^{2×4} for the rows of R^{3×4}, found R^{4×6}",
    "nonzero(x)": "nonzero: expected truth values, found R^{3×4}",
    "zeros(s)": "zeros: expected an integer, found 0.5",
    "full(x, 2)": "full: expected a number, found R^{3×4}",
    "causal(3, 2)": "causal: 3 queries are the last of 2 positions: expected as many keys or more",
    "max(zeros(0))": "max: there are no numbers in R^0",
    "⌊q⌋": "`⌊`: no integer is the floor or ceiling of NaN, ∞ or a number beyond 2^63",
    "i mod 0": "`mod`: mod 0",
    "i << 64": "`<<`: bits are moved by 0 to 63",
    "99999999999999999999": "an integer of more than 64 bits",
    "10^30": "an integer of more than 64 bits",
    "window(2, 2, -1)": "window: expected a width of 0 or more, or ∞, found -1",
    "pad(x, 1, -1)": "pad: expected an integer of 0 or more, found -1",
    "one_hot(i, 2)": "one_hot: index 2 of an axis of length 2",
    "split(x, 2) + 1": "2 results where one is expected; give them names: a, b ← …",
    "exp(x; v)": "exp: a function takes nothing behind a semicolon; only cards do",
    "G(x)": "G: no such function, and no such card",
    "u": "u is not bound",
}


@pytest.mark.parametrize("expression", WRONG)
def test_what_does_not_fit_is_refused_with_its_place(expression):
    if WRONG[expression] is None:
        with pytest.raises(CardError) if expression.startswith("put") else np.errstate():
            computed(expression)
        return
    with pytest.raises(CardError) as caught:
        computed(expression)
    assert str(caught.value) == f"f.card:13:9: {WRONG[expression]}"


def test_functions_are_all_there():
    assert set(FUNCTIONS) == set(COMPUTED) == set(RULES)
    used = " ".join(EXPRESSIONS)
    assert [name for name in FUNCTIONS if f"{name}(" not in used] == []


def test_reals_keep_their_dtype_beside_integers():
    assert computed("x + i[0] / 3 + 2^n", np.float32).dtype == np.float32
