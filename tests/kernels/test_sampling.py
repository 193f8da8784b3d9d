"""Drawing a token: the kernel, which sorts only where a limit falls, against the definition, which sorts everything."""

from itertools import product

import numba
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from toyllm.kernels.sampling import largest, log_sum_exp, sample, sample_kernel, sample_reference, sample_scratch

PLAIN = numba.config.DISABLE_JIT
NEAR = 1e-6  # what f32 weights may move a limit by
U = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1 - 2**-53]

# A coarse grid: two weights are equal or differ by far more than f32's rounding, and ties are frequent.
logit = st.one_of(st.just(-np.inf), st.integers(-60, 20).map(lambda i: i / 4))
logit_lists = st.lists(logit, min_size=1, max_size=40).filter(lambda values: max(values) > -np.inf)
share = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.floats(0, 1))


def possible(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> set[int]:
    """What the definition draws with each limit where it is, and moved by f32's rounding to either side."""

    def around(x: float, most: float = 1.0) -> set[float]:
        return {min(x * (1 + e), most) for e in (-NEAR, 0, NEAR)}

    limits = product({1.0} if top_p == 1 else around(top_p), around(min_p), around(u, 1 - 2**-53))
    return {sample_reference(logits, temperature, top_k, p, m, v) for p, m, v in limits}


@settings(deadline=None, max_examples=30 if PLAIN else 300, derandomize=True, database=None)
@given(
    values=logit_lists,
    temperature=st.sampled_from([0.25, 0.5, 0.8, 1.0, 2.0]),
    top_k=st.integers(0, 50),
    top_p=share,
    min_p=share,
    u=st.one_of(st.sampled_from(U), st.floats(0, 1, exclude_max=True)),
)
@example(values=[0.0] * 8, temperature=1.0, top_k=3, top_p=0.5, min_p=1.0, u=0.5)
@example(values=[-np.inf, 2.0, -np.inf], temperature=0.5, top_k=3, top_p=0.999, min_p=0.0, u=0.99)
@example(values=[-5.0], temperature=2.0, top_k=9, top_p=0.0, min_p=1.0, u=0.0)
def test_draws_what_the_definition_draws(values, temperature, top_k, top_p, min_p, u):
    logits = np.array(values, np.float32)
    with np.errstate(all="ignore"):
        assert sample(logits, temperature, top_k, top_p, min_p, u) in possible(logits, temperature, top_k, top_p, min_p, u)


@pytest.mark.parametrize(
    "limits", [(0, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.95, 0.0), (0, 1.0, 0.1), (300, 0.9, 0.05), (1, 1.0, 0.0), (0, 0.0, 0.0)]
)
def test_a_vocabulary_of_thousands(rng, limits):
    V = 300 if PLAIN else 5000
    for temperature, spread, u in product([0.7, 1.0], [0.01, 3], U):
        logits = (spread * rng.standard_normal(V)).astype(np.float32)
        assert sample(logits, temperature, *limits, u) in possible(logits, temperature, *limits, u)


def draws(n: int, logits: np.ndarray, *limits: float) -> np.ndarray:
    """How often each id is drawn for n numbers u, evenly spread over [0, 1)."""
    ids = [sample(logits, *limits, u=(i + 0.5) / n) for i in range(n)]
    return np.bincount(ids, minlength=len(logits))


def test_ids_are_drawn_as_often_as_they_are_probable(rng):
    logits = rng.standard_normal(12).astype(np.float32)
    n = 200 if PLAIN else 2000
    for temperature in (0.5, 1.0, 2.0):
        p = np.exp(logits.astype(np.float64) / temperature)
        assert np.abs(draws(n, logits, temperature) - n * p / p.sum()).max() <= 1


def test_what_is_cut_is_never_drawn_and_the_rest_keeps_its_proportions():
    p = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
    logits = np.log(p).astype(np.float32)
    kept = {
        (3, 1.0, 0.0): [1, 3, 4],  # top-k
        (0, 0.64, 0.0): [1, 3],  # top-p: 0.4 + 0.25, the one that crosses 0.64 stays
        (0, 0.66, 0.0): [1, 3, 4],
        (0, 1.0, 0.3): [1, 3, 4],  # min-p: at least 0.3 · 0.4
        (3, 0.75, 0.0): [1, 3],  # top-p counts shares of what top-k kept: 0.65 of 0.85
        (0, 0.9, 0.55): [1, 3],
    }
    for limits, ids in kept.items():
        expected = np.zeros(5)
        expected[ids] = 400 * p[ids] / p[ids].sum()
        assert np.abs(draws(400, logits, 1.0, *limits) - expected).max() <= 1, limits


def test_ties_go_to_the_lower_id():
    logits = np.zeros(6, np.float32)
    assert set(np.flatnonzero(draws(60, logits, 1.0, 2))) == {0, 1}
    assert set(np.flatnonzero(draws(60, logits, 1.0, 0, 0.49))) == {0, 1, 2}


def test_a_share_begins_where_the_one_before_it_ends():
    logits = np.zeros(4, np.float32)  # shares of exactly a quarter, each without its upper end
    assert [sample(logits, 1.0, u=u) for u in (0, 0.2499, 0.25, 0.5, 0.75, 1 - 2**-53)] == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("u", U)
def test_one_token_or_one_that_is_possible(u):
    assert sample(np.float32([3]), 0.8, 0, 0.95, 0.1, u) == 0
    assert sample(np.float32([-np.inf, -np.inf, -50, -np.inf]), 0.8, 2, 0.95, 0.1, u) == 2


def test_top_k_of_the_vocabulary_or_more_is_off(rng):
    logits = rng.standard_normal(20).astype(np.float32)
    for u in U:
        assert sample(logits, 1.0, 20, u=u) == sample(logits, 1.0, 999, u=u) == sample(logits, 1.0, 0, u=u)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-3, 1e3, 1e40, 1e300, np.inf])
def test_any_temperature_draws_a_possible_token(temperature):
    """Down to greedy and up to all alike; a temperature whose inverse is no f32 must not make 0 · ∞."""
    logits = np.float32([1, -np.inf, 3, 2])
    for limits in [(0, 1.0, 0.0), (3, 0.95, 0.1)]:
        ids = set(np.flatnonzero(draws(9, logits, temperature, *limits)))
        assert ids == ({2} if temperature < 0.1 else {0, 2, 3})


def test_logits_of_any_size():
    big = np.float32([3e38, -3e38, 2.9e38])
    assert sample(big, 0.5, 2, 0.9, 0.1, 0.99) == 0
    assert set(np.flatnonzero(draws(9, np.float32([-3e38, -3e38]), 1.0))) == {0, 1}


def test_scratch_carries_nothing_from_draw_to_draw(rng):
    scratch = sample_scratch(50)
    for array in scratch:
        array.view(np.uint8)[:] = 0xFF
    for u in U:
        logits = rng.standard_normal(50).astype(np.float32)
        assert sample_kernel(logits, 0.8, 20, 0.9, 0.01, u, scratch) == sample(logits, 0.8, 20, 0.9, 0.01, u)


def test_logits_are_left_alone(rng):
    logits = rng.standard_normal(50).astype(np.float32)
    before = logits.copy()
    sample(logits, 0.8, 20, 0.9, 0.01, 0.5)
    log_sum_exp(logits)
    largest(logits, 3)
    np.testing.assert_array_equal(logits, before)


def exact_log_sum_exp(logits: np.ndarray) -> float:
    wide = logits.astype(np.float64)
    return float(wide.max() + np.log(np.exp(wide - wide.max()).sum()))


def test_log_sum_exp_equals_f64(rng):
    for V in (1, 2, 17, 300 if PLAIN else 50257):
        for spread in (0.1, 10, 1e4):
            logits = (spread * rng.standard_normal(V)).astype(np.float32)
            assert log_sum_exp(logits) == pytest.approx(exact_log_sum_exp(logits), abs=1e-6)


def test_log_sum_exp_of_special_values():
    assert log_sum_exp(np.float32([5])) == 5
    assert log_sum_exp(np.float32([-np.inf, 2, -np.inf])) == 2
    assert log_sum_exp(np.float32([1e38, -1e38])) == pytest.approx(1e38)
    assert np.isnan(log_sum_exp(np.float32([1, np.nan])))


def test_the_sum_of_probabilities_is_one(rng):
    logits = (5 * rng.standard_normal(300)).astype(np.float32)
    assert np.exp(logits.astype(np.float64) - log_sum_exp(logits)).sum() == pytest.approx(1, abs=1e-6)


@settings(deadline=None, max_examples=30 if PLAIN else 200, derandomize=True, database=None)
@given(values=st.lists(logit, max_size=30), n=st.integers(-1, 35))
def test_largest_are_in_order_and_ties_to_the_lower_id(values, n):
    logits = np.array(values, np.float32)
    with np.errstate(all="ignore"):
        found = largest(logits, n)
    np.testing.assert_array_equal(found, np.argsort(-logits, kind="stable")[: max(n, 0)])
    assert found.dtype == np.int64
