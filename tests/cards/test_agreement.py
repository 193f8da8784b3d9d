"""The interpreter and the checker on any expression: neither fails otherwise than by CardError, and what runs is not complained of."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from toyllm.cards.functions import FUNCTIONS
from toyllm.cards.interpreter import run
from toyllm.cards.operators import Limits
from toyllm.cards.program import program
from toyllm.cards.shape_expressions import begun, result_of
from toyllm.cards.shapes import problems
from toyllm.cards.structure import CardError
from toyllm.cards.text import parse

INPUTS = {
    "x": ("R^{2×3}", np.arange(6.0).reshape(2, 3) - 2.5),
    "y": ("R^{3×2}", np.arange(6.0).reshape(3, 2)),
    "v": ("R^3", np.array([0.5, -1, 2])),
    "B": ("R^{2×1×3}", np.ones((2, 1, 3))),
    "s": ("R", np.array(0.25)),
    "i": ("{0..2}^3", np.array([2, 0, 1])),
    "j": ("{0..2}^{2×3}", np.array([[1, 0, 2], [0, 0, 1]])),
    "n": ("ℕ", np.array(2)),
    "m": ("{0,1}^3", np.array([True, False, True])),
}
LIMITS = Limits(steps=100, elements=10_000, held=1 << 24, work=1 << 32)
LEAVES = st.sampled_from([*INPUTS, "0", "1", "2", "3", "-1", "0.5", "∞", "NaN", "true", '"a"', "zeros(2, 3)", "[1, 0]"])
OPERATORS = st.sampled_from([*"+-·⊙/∨∧&=≠<≤∈∉", "mod", "<<", ">>"])


def combined(inner):
    items = st.one_of(
        inner,
        st.sampled_from(["…", "new", ":"]),
        st.tuples(inner, inner).map(lambda t: f"{t[0]} : {t[1]}"),
        inner.map(lambda e: f"{e} :"),
        inner.map(lambda e: f": : {e}"),
    )
    options = st.sampled_from(["", "", "", ", axis=0", ", axis=1", ", axis=-1", ", value=1"])
    return st.one_of(
        st.tuples(inner, OPERATORS, inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(st.sampled_from(["-", "√", "¬ "]), inner).map(lambda t: f"({t[0]}{t[1]})"),
        inner.map(lambda e: f"⌊{e}⌋"),
        inner.map(lambda e: f"({e})^⊤"),
        st.tuples(inner, st.sampled_from(["2", "{-1}", "n", "(x)"])).map(lambda t: f"({t[0]})^{t[1]}"),
        st.tuples(inner, st.lists(items, min_size=1, max_size=3)).map(lambda t: f"({t[0]})[{', '.join(t[1])}]"),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: f"[{', '.join(some)}]"),
        st.tuples(st.sampled_from(sorted(FUNCTIONS)), st.lists(inner, min_size=1, max_size=4), options).map(
            lambda t: f"{t[0]}({', '.join(t[1])}{t[2]})"
        ),
        st.sampled_from(sorted(name for name, f in FUNCTIONS.items() if f.least == 1)).flatmap(lambda f: inner.map(lambda e: f"{f}({e})")),
    )


EXPRESSIONS = st.recursive(LEAVES, combined, max_leaves=6)


def card(expression):
    lines = [f"Input: {name} ∈ {kind}" for name, (kind, _) in INPUTS.items()]
    return parse(f"Algorithm: F({', '.join(INPUTS)})\n" + "\n".join([*lines, f"return {expression}"]))


@given(EXPRESSIONS)
@settings(max_examples=300, deadline=None)
def test_what_runs_is_known(expression):
    made = card(expression)
    found = problems(made)
    try:
        results = run(made, inputs={name: value for name, (_, value) in INPUTS.items()}, limits=LIMITS).results
    except CardError:
        return
    assert [str(problem) for problem in found] == []
    checked = begun(made, {}, {})
    known = result_of(checked, program(made).body[0].value)
    known = known if isinstance(known, tuple) else (known,)
    if len(known) != len(results):
        assert len(known) == 1
        assert known[0].sizes is None
        return
    for k, value in zip(known, results, strict=True):
        if isinstance(value, str):
            assert k.kind == "text"
            continue
        assert k.kind in ("", {"f": "R", "i": "ℤ", "b": "{0,1}"}[value.dtype.kind])
        if k.sizes is not None:
            assert len(k.sizes) == value.ndim
            assert all(size.number in (None, n) for size, n in zip(k.sizes, value.shape, strict=True))
        if k.value is not None and k.value.number is not None:
            assert value == float(k.value.number)
