"""Statistics, histograms and maps of magnitudes: those of NumPy in f64, whatever the dtype and however the tensor is cut."""

import ml_dtypes
import numpy as np
import pytest

from toyllm.kernels.dtypes import BF16
from toyllm.models.tensor_stats import histogram, magnitudes, statistics
from toyllm.models.tensor_values import PIECE, of_array

rng = np.random.default_rng(3)
LARGE = rng.standard_normal((300, 700)).astype(np.float32)  # several pieces


@pytest.mark.parametrize(
    "array",
    [
        LARGE,
        LARGE + 1e4,
        np.array([1e8, 1e8 + 1, 1e8 + 2]),
        rng.integers(-128, 127, (9, 9), dtype=np.int8),
        np.array([0, 2**63], np.uint64),
        rng.random(50) > 0.7,
        np.array(2.5),
    ],
)
def test_they_are_numpys(array: np.ndarray) -> None:
    found, exact = statistics(of_array("x", array)), array.astype(np.float64)
    assert (found.min, found.max) == (array.min(), array.max())
    assert (found.mean, found.std) == pytest.approx((exact.mean(), exact.std()), rel=1e-12, abs=1e-12)
    assert (found.zeros, found.nan, found.inf, found.elements) == ((array == 0).mean(), 0, 0, array.size)
    assert LARGE.size > 2 * PIECE


def test_only_finite_values_count_for_extremes_and_mean() -> None:
    array = np.array([np.nan, np.inf, -np.inf, np.nan, 0, 1, 3, -0.0], np.float32).astype(ml_dtypes.bfloat16).view(BF16)
    found = statistics(of_array("x", array))
    assert (found.min, found.max, found.mean) == (0, 3, 1)
    assert (found.nan, found.inf, found.zeros) == (2, 2, 2 / 8)


@pytest.mark.parametrize("array", [np.zeros((3, 0)), np.full(3, np.nan), np.full(2, np.inf)])
def test_without_finite_values_there_are_none(array: np.ndarray) -> None:
    found = statistics(of_array("x", array))
    assert (found.min, found.max, found.mean, found.std) == (None, None, None, None)
    assert histogram(of_array("x", array), found, 4)[0].size == 0


def test_the_largest_f64_are_no_warning() -> None:
    found = statistics(of_array("x", np.array([1e308, 1e308, -1e308])))
    assert (found.min, found.max) == (-1e308, 1e308)
    histogram(of_array("x", np.array([1.7e308, -1.7e308])), statistics(of_array("x", np.array([1.7e308, -1.7e308]))), 4)


def test_a_histogram_is_numpys() -> None:
    values = of_array("x", LARGE)
    counts, edges = histogram(values, statistics(values), 20)
    expected, expected_edges = np.histogram(LARGE.astype(np.float64), 20)
    np.testing.assert_allclose(edges, expected_edges)
    assert np.abs(counts - expected).max() <= 1
    assert counts.sum() == LARGE.size


def test_a_single_value_is_one_bin() -> None:
    values = of_array("x", np.array([2.0, 2.0, np.nan]))
    counts, edges = histogram(values, statistics(values), 20)
    assert (counts.tolist(), edges.tolist()) == ([2], [2, 2])


def test_a_map_holds_mean_magnitudes() -> None:
    array = np.array([[1, -1, 4, 4], [1, -1, np.inf, np.nan], [0, 0, np.nan, np.inf]])
    np.testing.assert_array_equal(magnitudes(of_array("x", array), 9, 2), [[1, 4], [1, np.nan], [0, np.nan]])
    np.testing.assert_allclose(magnitudes(of_array("x", LARGE), 3, 7), np.abs(LARGE.reshape(3, 100, 7, 100)).mean((1, 3)), rtol=1e-5)
