"""Drawing: the penalties by hand, the order in which settings act, ties, seeds, and log-probabilities in f64."""

from typing import Any

import numpy as np
import pytest

from toyllm.kernels.errors import ToyllmError
from toyllm.models.generation import Settings
from toyllm.models.sampling import Sampler, logprobs, penalise

PLAIN = {"temperature": 1.0, "top_p": 1.0, "seed": 0}


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def of(*shares: float) -> np.ndarray:
    """Logits whose softmax is `shares`."""
    return np.log(np.array(shares)).astype(np.float32)


def reach(logits: np.ndarray, context: tuple[int, ...] = (), **settings: Any) -> set[int]:
    """The tokens that 300 seeds draw first: all that are kept, if none of them is rare."""
    return {Sampler(Settings(**PLAIN | settings | {"seed": seed}), context, len(logits)).next(logits) for seed in range(300)}


# Penalties


def test_penalties_by_hand() -> None:
    logits, counts = f32(2.0, -2.0, 0.0, 4.0, 1.0), f32(1, 2, 1, 3, 0)
    penalise(logits, counts, 2.0, 0.5, 0.25)
    assert logits.tolist() == [2 / 2 - 0.5 - 0.25, -2 * 2 - 0.5 - 0.5, 0 - 0.5 - 0.25, 4 / 2 - 0.5 - 0.75, 1.0]


def test_repetition_makes_a_seen_token_less_likely_whatever_the_sign_of_its_logit() -> None:
    logits = f32(3.0, -3.0)
    penalise(logits, f32(1, 1), 1.5, 0, 0)
    assert logits.tolist() == [2.0, -4.5]


def test_negative_penalties_make_seen_tokens_more_likely() -> None:
    logits = f32(1.0, 1.0)
    penalise(logits, f32(0, 2), 0.5, -1.0, -2.0)
    assert logits.tolist() == [1.0, 1 / 0.5 + 1 + 2 * 2]


def test_the_prompt_counts_and_so_does_every_token_drawn() -> None:
    sampler = Sampler(Settings(temperature=0, frequency_penalty=1.0), [0], 3)
    logits = f32(3.0, 1.5, 0.25)
    # by hand: the logits less the counts are (2, 1.5, .25), (1, 1.5, .25), (1, .5, .25), (0, .5, .25), (0, -.5, .25), (0, -.5, -.75)
    assert [sampler.next(logits) for _ in range(6)] == [0, 1, 0, 1, 2, 0]


def test_the_logits_stay_as_they_came() -> None:
    logits = f32(3.0, -1.5, 0.25)
    before = logits.copy()
    for temperature in (0.0, 0.7):
        penalties = {"repetition_penalty": 2, "presence_penalty": 1, "frequency_penalty": 1}
        Sampler(Settings(temperature=temperature, top_k=2, min_p=0.1, seed=1, **penalties), [0, 1], 3).next(logits)
        np.testing.assert_array_equal(logits, before)


# The order: penalties, temperature, top-k, top-p, min-p, draw. Each case comes out otherwise in another order.


def test_the_token_that_crosses_top_p_stays() -> None:
    assert reach(of(0.4, 0.3, 0.2, 0.1), top_p=0.5) == {0, 1}
    assert reach(of(0.4, 0.3, 0.2, 0.1), top_p=0.39) == {0}
    assert reach(of(0.4, 0.3, 0.2, 0.1), top_p=0.0) == {0}


def test_temperature_acts_before_top_p() -> None:
    shares = (0.5, 0.3, 0.2)
    assert reach(of(*shares), top_p=0.45) == {0}
    assert reach(of(*shares), top_p=0.45, temperature=2.0) == {0, 1}  # 0.415, 0.322, 0.263


def test_top_k_acts_before_top_p() -> None:
    shares = (0.4, 0.3, 0.2, 0.1)
    assert reach(of(*shares), top_p=0.5) == {0, 1}
    assert reach(of(*shares), top_p=0.5, top_k=2) == {0}  # 0.4 of 0.7 is more than half


def test_top_p_acts_before_min_p() -> None:
    shares = (0.4, 0.3, 0.2, 0.1)
    assert reach(of(*shares), min_p=0.6) == {0, 1}
    assert reach(of(*shares), min_p=0.6, top_p=0.55) == {0, 1}  # the other way round 0.4 of 0.7 would do for p


def test_min_p_is_a_share_of_the_likeliest_after_temperature() -> None:
    shares = (0.4, 0.3, 0.2, 0.1)
    assert reach(of(*shares), min_p=0.3) == {0, 1, 2}
    assert reach(of(*shares), min_p=0.3, temperature=2.0) == {0, 1, 2, 3}  # √(0.1 / 0.4) = 0.5


def test_penalties_act_before_temperature_and_before_every_cut() -> None:
    logits = f32(4.0, 3.5, 0.0)
    assert reach(logits, (0,), presence_penalty=1.0, top_k=1) == {1}
    assert reach(logits, (0,), presence_penalty=1.0, top_p=0.1) == {1}
    # 4 / 2 − 3.5 = −1.5 at temperature 0.25 is e^−6 = 0.0025; after temperature, 16 / 2 − 14 would be the same, presence would not
    assert reach(logits, (0,), presence_penalty=1.0, temperature=0.125, min_p=0.1) == {1}  # (3 − 3.5) · 8 = −4; otherwise 32 − 1 > 28


def test_the_draw_takes_tokens_at_their_share_of_what_was_kept() -> None:
    sampler, logits = Sampler(Settings(**PLAIN | {"top_k": 3}), [], 4), of(0.4, 0.3, 0.1, 0.2)
    counts = np.bincount([sampler.next(logits) for _ in range(9000)], minlength=4)
    assert np.abs(counts / 9000 - np.array([4, 3, 0, 2]) / 9).max() < 0.02


def plainly(logits: np.ndarray, counts: np.ndarray, s: Settings, u: float) -> int:
    """The definition, in f64 and by sorting: what `Sampler.next` must draw with the random number u."""
    x = logits.astype(np.float64)
    seen = counts > 0
    x[seen] = np.where(x[seen] > 0, x[seen] / s.repetition_penalty, x[seen] * s.repetition_penalty)
    x -= s.presence_penalty * seen + s.frequency_penalty * counts
    p = np.exp((x - x.max()) / s.temperature)
    order = np.argsort(-p, kind="stable")[: s.top_k or len(p)]
    running = np.cumsum(p[order])
    order = order[: np.flatnonzero(running >= s.top_p * running[-1])[0] + 1]
    kept = np.sort(order[p[order] >= s.min_p * p.max()])
    running = np.cumsum(p[kept])
    return int(kept[np.flatnonzero(running > u * running[-1])[0]])


@pytest.mark.parametrize("case", range(60))
def test_all_settings_together_draw_what_the_definition_draws(case: int) -> None:
    rng = np.random.default_rng(case)
    V = 50
    settings = Settings(
        temperature=float(rng.uniform(0.3, 2)),
        top_k=int(rng.choice([0, 1, 5, 20, V, 1000])),
        top_p=float(rng.choice([0, 0.5, 0.9, 0.99, 1])),
        min_p=float(rng.choice([0, 0.01, 0.1, 1])),
        repetition_penalty=float(rng.uniform(0.8, 1.5)),
        presence_penalty=float(rng.uniform(-1, 1)),
        frequency_penalty=float(rng.uniform(-0.5, 0.5)),
        seed=case,
    )
    context = rng.integers(0, V, 30)
    sampler, counts = Sampler(settings, context.tolist(), V), np.bincount(context, minlength=V)
    numbers = np.random.Generator(np.random.PCG64(case))
    for _ in range(20):
        logits = (3 * rng.standard_normal(V)).astype(np.float32)
        expected = plainly(logits, counts, settings, numbers.random())
        assert sampler.next(logits) == expected
        counts[expected] += 1


# Greedy, seeds, limits


def test_greedy_takes_the_lowest_of_equals() -> None:
    sampler = Sampler(Settings(temperature=0), [], 4)
    assert sampler.next(f32(0, 2, 2, 1)) == 1
    assert sampler.next(f32(5, 5, 5, 5)) == 0
    assert sampler.next(f32(-np.inf, -1, -np.inf, -1)) == 1


def test_a_seed_fixes_the_draws_and_another_changes_them() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(Settings(**PLAIN | {"seed": seed}), [], 100)
        return [sampler.next(np.zeros(100, np.float32)) for _ in range(20)]

    assert draws(7) == draws(7) != draws(8)
    assert draws(2**63 - 1)


@pytest.mark.parametrize("temperature", [5e-324, 1e-39, 1e-9, 1e9, 1e39, 1.7e308])
def test_extreme_temperatures_draw_a_token(temperature: float) -> None:
    logits = f32(1.0, 3.0, 2.0, -np.inf)
    drawn = reach(logits, temperature=temperature)
    assert drawn == {1} if temperature < 1 else {0, 1, 2} <= drawn


@pytest.mark.parametrize("extreme", [1e-9, 1e9])
def test_extreme_penalties_draw_a_token_without_a_warning(extreme: float) -> None:
    settings = Settings(repetition_penalty=extreme, presence_penalty=1 / extreme, frequency_penalty=-extreme, seed=0)
    sampler = Sampler(settings, [0, 0, 1], 3)
    assert all(0 <= sampler.next(f32(30, -30, 0)) < 3 for _ in range(10))


def test_whole_numbers_are_as_good_as_floats() -> None:
    """And compile nothing anew: the kernel is called with floats all the same."""
    logits = f32(1, 2, 3)
    whole, real = (Sampler(Settings(temperature=t, top_p=p, min_p=m, seed=3), [], 3) for t, p, m in ((1, 1, 0), (1.0, 1.0, 0.0)))
    assert [whole.next(logits) for _ in range(20)] == [real.next(logits) for _ in range(20)]
    assert whole._limits[:1] + whole._limits[2:] == (1.0, 1.0, 0.0)
    assert [type(v) for v in whole._limits] == [float, int, float, float]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [(0.0, np.nan), (np.inf, 0.0), (-np.inf, -np.inf)])
def test_logits_without_a_largest_are_an_error(temperature: float, logits: tuple[float, ...]) -> None:
    with pytest.raises(ToyllmError, match="NaN or infinity"):
        Sampler(Settings(**PLAIN | {"temperature": temperature}), [], 2).next(f32(*logits))


# Log-probabilities


def test_logprobs_are_the_log_softmax_in_f64() -> None:
    logits = (20 * np.random.default_rng(0).standard_normal(5000)).astype(np.float32)
    total, top = logprobs(logits, 7)
    exact = logits.astype(np.float64)
    exact -= exact.max() + np.log(np.exp(exact - exact.max()).sum())
    np.testing.assert_allclose(logits.astype(np.float64) - total, exact, rtol=0, atol=1e-5)
    assert [i for i, _ in top] == np.argsort(-exact, kind="stable")[:7].tolist()
    np.testing.assert_allclose([p for _, p in top], exact[[i for i, _ in top]], rtol=0, atol=1e-5)


def test_logprobs_come_likeliest_first_ties_to_the_lower_id_and_no_more_than_there_are() -> None:
    _, top = logprobs(f32(1, 3, 2, 3, -np.inf), 9)
    assert [i for i, _ in top] == [1, 3, 2, 0, 4]
    assert top[-1][1] == -np.inf
    assert logprobs(f32(1, 2), 0)[1] == ()
