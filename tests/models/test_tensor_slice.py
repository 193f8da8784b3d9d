"""Slices in text: NumPy's meaning, and errors that name the axis and its length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toyllm.kernels.errors import ToyllmError
from toyllm.models.tensor_slice import resolve_slice
from toyllm.models.tensor_values import of_array

ARRAY = np.arange(5 * 6 * 7).reshape(5, 6, 7)
bound = st.none() | st.integers(-9, 9)
part = st.integers(-5, 4).map(str) | st.builds(
    lambda a, b, c: ":".join("" if n is None else str(n) for n in (a, b, c)), bound, bound, bound.filter(lambda n: n != 0)
)


@given(parts=st.lists(part, min_size=1, max_size=3), dots=st.integers(0, 4), spaces=st.booleans())
def test_a_slice_takes_what_numpy_takes(parts: list[str], dots: int, spaces: bool) -> None:
    if dots <= len(parts):
        parts.insert(dots, "...")
    text = (", " if spaces else ",").join(parts)
    expected = eval(f"ARRAY[{text}]", {"ARRAY": ARRAY})
    np.testing.assert_array_equal(of_array("x", ARRAY).part(text).read(), expected, strict=True)


@pytest.mark.parametrize("text", ["", "[]", "...", ":", "[0, :5, -3:]", "0,", " 0 , : 2 : , 1 ", "0, :5, -3:"])
def test_other_ways_to_write_one(text: str) -> None:
    inside = text.strip("[]") or "..."
    np.testing.assert_array_equal(of_array("x", ARRAY).part(text).read(), eval(f"ARRAY[{inside.strip()}]", {"ARRAY": ARRAY}), strict=True)


def test_a_scalar_has_no_axes_to_slice() -> None:
    assert of_array("x", np.array(3.0)).part("...").read() == 3
    with pytest.raises(ToyllmError, match=r"1 axes, but x has 0: shape \[\]"):
        resolve_slice("0", (), "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0, 6", r"'6' at axis 1 of w, length 6: expected an index from -6 to 5"),
        ("-6", r"'-6' at axis 0 of w, length 5: expected an index from -5 to 4"),
        ("..., ::0", r"'::0' at axis 2 of w, length 7: the step cannot be 0"),
        (":, a", r"'a' at axis 1 of w, length 6: expected an index, start:stop, start:stop:step or `...`"),
        ("0,,1", r"'' at axis 1"),
        ("1.5", r"'1.5' at axis 0"),
        ("1:2:3:4", r"'1:2:3:4' at axis 0"),
        ("None", r"'None' at axis 0"),
        ("٣", r"at axis 0"),
        ("9" * 40, r"at axis 0"),
        ("0, 0, 0, 0", r"4 axes, but w has 3: shape \[5, 6, 7\]"),
        ("..., 0, ...", r"at most one `...`"),
    ],
)
def test_a_bad_slice_names_the_axis_and_its_length(text: str, message: str) -> None:
    with pytest.raises(ToyllmError, match=message):
        resolve_slice(text, ARRAY.shape, "w")


def test_an_empty_axis_has_no_index() -> None:
    with pytest.raises(ToyllmError, match="axis 0 of w, length 0: the axis is empty"):
        resolve_slice("0", (0, 2), "w")
