"""Top-k routing against its definition: which experts, in which order, with which weights."""

import numpy as np
import pytest

from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.routing import route, route_kernel, route_reference

TOLERANCE = 2e-6  # reached: 1e-6, over 299 experts

normalizations = pytest.mark.parametrize("normalization", ["softmax", "linear"])


def best(row: np.ndarray, k: int) -> list[int]:
    """The definition in plain Python: by descending logit, NaN behind every number, ties to the lowest index."""
    return sorted(range(len(row)), key=lambda e: (np.isnan(row[e]), -row[e] if not np.isnan(row[e]) else 0, e))[:k]


@normalizations
@pytest.mark.parametrize(("T", "E", "k"), [(1, 1, 1), (1, 32, 4), (7, 5, 3), (50, 128, 4), (20, 8, 8), (3, 300, 299)])
def test_equals_the_definition(rng, error, T, E, k, normalization):
    logits = rng.standard_normal((T, E), np.float32) * np.float32(3)
    experts, weights = route(logits, k, normalization)
    assert (experts.dtype, weights.dtype) == (np.int64, np.float32)
    assert experts.tolist() == [best(row, k) for row in logits]
    expected, shares = route_reference(logits.astype(np.float64), k)
    np.testing.assert_array_equal(experts, expected)
    assert error(weights, shares) < TOLERANCE
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert (np.diff(weights) <= 0).all()


def test_both_normalizations_agree(rng, error):
    logits = rng.standard_normal((40, 32), np.float32) * np.float32(5)
    (experts, softmax), (same, linear) = route(logits, 4), route(logits, 4, "linear")
    np.testing.assert_array_equal(experts, same)
    assert error(linear, softmax) < TOLERANCE


@normalizations
def test_ties_go_to_the_lowest_index(normalization):
    logits = np.float32([[1, 3, 3, 2, 3], [0, 0, 0, 0, 0], [-0.0, 0.0, -1, -0.0, 0.0]])
    experts, weights = route(logits, 3, normalization)
    assert experts.tolist() == [[1, 2, 4], [0, 1, 2], [0, 1, 3]]
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_ties_of_random_small_integers(rng):
    logits = rng.integers(-2, 3, (200, 9)).astype(np.float32)
    for k in (1, 4, 9):
        assert route(logits, k)[0].tolist() == [best(row, k) for row in logits]


@normalizations
def test_all_experts_are_a_sort_and_a_softmax(rng, normalization):
    logits = rng.standard_normal((6, 10), np.float32)
    experts, weights = route(logits, 10, normalization)
    assert np.array_equal(np.sort(experts), np.tile(np.arange(10), (6, 1)))
    spread = np.empty_like(weights)
    np.put_along_axis(spread, experts, weights, 1)
    p = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(spread, p / p.sum(-1, keepdims=True), rtol=1e-6)


@normalizations
def test_one_expert_has_all_the_weight(rng, normalization):
    _, weights = route(rng.standard_normal((6, 10), np.float32), 1, normalization)
    assert (weights == 1).all()


@normalizations
@pytest.mark.parametrize("size", [1e4, 3e38])
def test_large_logits_neither_overflow_nor_vanish(normalization, size):
    experts, weights = route(np.float32([[-size, size, size, 0]]), 3, normalization)
    assert experts.tolist() == [[1, 2, 3]]
    np.testing.assert_array_equal(weights, [[0.5, 0.5, 0]])


@normalizations
def test_minus_infinity_is_never_weighed(normalization):
    experts, weights = route(np.float32([[-np.inf, 1, -np.inf, 1]]), 3, normalization)
    assert experts.tolist() == [[1, 3, 0]]
    np.testing.assert_array_equal(weights, [[0.5, 0.5, 0]])


@pytest.mark.parametrize("row", [[1, np.nan], [np.nan, 1], [np.nan, 1, np.nan, 2], [np.nan] * 3, [3, np.nan, 3, np.inf], [-np.inf, np.nan]])
def test_nan_is_chosen_after_every_number(row):
    logits = np.float32([row])
    for k in range(1, len(row) + 1):
        experts, weights = route(logits, k)
        with np.errstate(invalid="ignore"):
            expected, shares = route_reference(logits, k)
        assert experts.tolist() == expected.tolist() == [best(logits[0], k)]
        np.testing.assert_array_equal(np.isnan(weights), np.isnan(shares))


def test_nan_stays_in_its_row(rng):
    logits = rng.standard_normal((5, 8), np.float32)
    spoilt = logits.copy()
    spoilt[2] = np.nan
    for plain, found in zip(route(logits, 3), route(spoilt, 3), strict=True):
        np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(plain, 2, 0))


def test_a_row_alone_gives_the_bits_it_gives_among_others(rng):
    logits = rng.standard_normal((9, 32), np.float32)
    experts, weights = route(logits, 4)
    for t in range(9):
        alone = route(logits[t : t + 1], 4)
        assert np.array_equal(alone[0][0], experts[t])
        assert np.array_equal(alone[1][0], weights[t])


def test_output_is_never_read_before_it_is_written(rng):
    logits = rng.standard_normal((5, 8), np.float32)
    experts, weights = np.full((5, 3), 7), np.full((5, 3), np.nan, np.float32)
    route_kernel(logits, experts, weights)
    assert np.array_equal(experts, route(logits, 3)[0])
    assert np.array_equal(weights, route(logits, 3)[1])


def test_no_tokens():
    experts, weights = route(np.empty((0, 8), np.float32), 3)
    assert experts.shape == weights.shape == (0, 3)


@pytest.mark.parametrize(("E", "k"), [(4, 0), (4, -1), (4, 5), (0, 1)])
def test_k_outside_the_experts_is_refused(E, k):
    with pytest.raises(ToyllmError, match=f"k: expected 1 to {E}, the number of experts, found {k}"):
        route(np.zeros((2, E), np.float32), k)


def test_another_normalization_is_refused():
    with pytest.raises(ToyllmError, match="normalization: expected softmax or linear, found 'sigmoid'"):
        route(np.zeros((2, 4), np.float32), 2, "sigmoid")
