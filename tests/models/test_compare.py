"""What two tensors come to against one another: the figures of NumPy on the whole, however they are cut; and what NaN and infinity are."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toyllm.kernels.dtypes import to_bf16, to_f16
from toyllm.models.compare import Difference, Tally
from toyllm.models.tensor_values import cuts

NAN, INF = math.nan, math.inf


def difference(a: Any, b: Any, piece: int | None = None) -> Difference:
    """The two, whole or in pieces of so many elements."""
    a, b = np.asarray(a), np.asarray(b)
    tally = Tally()
    for at in cuts(b.shape, piece or max(b.size, 1)):
        tally.add(a[at], b[at], tuple(part.start for part in at))
    return tally.result()


@given(seed=st.integers(0, 2**32 - 1), piece=st.integers(1, 100), share=st.sampled_from([0, 0.02, 1]))
@settings(max_examples=60, deadline=None)
def test_pieces_come_to_what_numpy_says_of_the_whole(seed: int, piece: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 6, rng.integers(1, 4)))
    b = rng.standard_normal(shape)
    a = np.where(rng.random(shape) < share, b + rng.standard_normal(shape), b)
    found, apart = difference(a, b, piece), np.abs(a - b)
    assert (found.elements, found.differing, found.unlike) == (b.size, (a != b).sum(), 0)
    assert found.max == apart.max()
    assert found.mean == pytest.approx(apart.mean(), rel=1e-12)
    assert found.error == apart.max() / np.abs(b).max()
    assert found.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)
    if not apart.any():
        assert (found.place, found.a, found.b, found.cosine) == (None, None, None, 1.0)
        return
    assert found.place == tuple(int(i) for i in np.unravel_index(apart.argmax(), shape))
    assert (found.a, found.b) == (a[found.place], b[found.place])


@pytest.mark.parametrize("narrow", [to_bf16, to_f16])
def test_short_floats_are_widened_exactly(narrow: Any) -> None:
    values = np.array([1.0, -0.375, 2**-20, 6.5], np.float32)
    assert difference(narrow(values), values).differing == 0
    assert difference(narrow(values), values + np.float32(0.5)).max == 0.5


@pytest.mark.parametrize("pair", [(NAN, NAN), (INF, INF), (-INF, -INF), (0.0, -0.0)])
def test_what_equals_itself(pair: tuple[float, float]) -> None:
    found = difference([1.0, pair[0], 3.0], [1.0, pair[1], 3.5])
    assert (found.differing, found.unlike, found.max, found.place) == (1, 0, 0.5, (2,))
    assert found.cosine == pytest.approx((1 + 10.5) / math.sqrt(10) / math.sqrt(1 + 3.5**2))
    assert not difference([pair[0]], [pair[1]]).exceeds(0, 0)


@pytest.mark.parametrize("pair", [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, -INF), (INF, -INF), (NAN, INF), (-INF, NAN)])
def test_what_is_unlike_is_infinitely_far(pair: tuple[float, float]) -> None:
    found = difference([[0.0, 9.0], [pair[0], 3.0]], [[0.0, 1.0], [pair[1], 3.0]])
    assert (found.differing, found.unlike, found.max, found.error, found.place) == (2, 1, INF, INF, (1, 0))
    np.testing.assert_equal((found.a, found.b), pair)
    assert found.exceeds(1e9, 1e9)
    assert found.mean == 8 / 3  # of the three that are finite in both


def test_the_first_of_several_worst_is_named() -> None:
    assert difference([0.0, 2, 0, 2], [0.0, 1, 0, 1], piece=1).place == (1,)


def test_nothing_against_zeros_and_zeros_against_something() -> None:
    assert difference([0.0, 0.0], [0.0, 0.0]).error == 0
    assert difference([0.0, 1.0], [0.0, 0.0]).error == INF
    assert difference([0.0, 1.0], [0.0, 0.0]).cosine is None
    assert difference(np.zeros((0, 3)), np.zeros((0, 3))) == Difference(0, 0, 0, 0.0, 0.0, 0.0, None, None, None, None)


def test_a_tolerance_is_a_share_of_the_largest_value_and_a_rest() -> None:
    found = difference([100.0, 0.5], [-100.0 + 200, 0.0])
    assert found.error == 0.005
    assert found.exceeds(0.004999, 0)
    assert not found.exceeds(0.005, 0)
    assert not found.exceeds(0.004, 0.1)
    assert not found.exceeds(0, 0.5)


def test_whole_numbers_and_truth_values() -> None:
    assert difference(np.array([1, 2, 3]), np.array([1, 2, 5])).max == 2
    assert difference(np.array([True, False]), np.array([True, True])).differing == 1
    assert difference(np.array([3], np.uint8), np.array([5], np.uint8)).max == 2


def test_numbers_near_the_largest_do_not_warn() -> None:
    assert difference([1e308, 1.0], [-1e308, 1.0]).max == INF
    largest = float(np.finfo(np.float32).max)
    assert difference(np.array([largest], np.float32), np.array([-largest], np.float32)).max == 2 * largest
