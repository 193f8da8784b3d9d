"""Rotary position embedding: the frequencies of the published model, and the rotation against its definition."""

import math

import numpy as np
import pytest

from toyllm.kernels.rotary import rotate, rotate_kernel, rotate_reference, rotations, yarn_frequencies

TOLERANCE = 1e-6  # reached: 1e-7
GPT_OSS = (64, 150_000.0, 32.0, 4096)  # Dh, base, factor, original context
# Of gpt-oss-20b and 120b: pairs 0 to 8 unscaled, 18 to 31 slowed 32 times, the ramp not rounded to whole pairs.
PUBLISHED = """
1.000000000e+00 6.890443059e-01 4.747820555e-01 3.271458719e-01 2.254180002e-01 1.553229895e-01 1.070244215e-01 7.374456821e-02
5.081327482e-02 3.170569618e-02 1.933500113e-02 1.159204926e-02 6.794959490e-03 3.860359317e-03 2.093792379e-03 1.052602101e-03
4.564839192e-04 1.293187012e-04 3.830881237e-05 2.639646903e-05 1.818833668e-05 1.253256982e-05 8.635495875e-06 5.950239261e-06
4.099978482e-06 2.825066827e-06 1.946596211e-06 1.341291035e-06 9.242089502e-07 6.368209146e-07 4.387978251e-07 3.023511428e-07
"""
FREQUENCIES = np.array(PUBLISHED.split(), np.float64)

pairs = pytest.mark.parametrize("interleaved", [False, True])


def turned(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """The definition: each pair of x [T, H, Dh] is a complex number, multiplied by e^(i angle), angles [T, Dh/2]."""
    half = x.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    z = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)[:, None]
    out = np.empty_like(x)
    out[..., first], out[..., second] = z.real, z.imag
    return out


@pytest.fixture
def case(rng):
    """Heads f32 [T, H, Dh] and angles f64 [T, Dh/2] for them."""
    return lambda T, H, Dh: (rng.standard_normal((T, H, Dh), np.float32), rng.uniform(-9, 9, (T, Dh // 2)))


def rotated(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    return rotate(x, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), interleaved)


class TestFrequencies:
    def test_are_those_of_the_published_model(self):
        found, factor = yarn_frequencies(*GPT_OSS)
        np.testing.assert_allclose(found, FREQUENCIES, rtol=1e-6)
        assert factor == pytest.approx(1.3465735902799727, rel=1e-15)

    def test_truncated_are_others(self):
        """The table of implementations that round the ramp's ends: wrong for this model."""
        found, factor = yarn_frequencies(*GPT_OSS, truncate=True)
        assert found[9] == pytest.approx(3.162075e-02, rel=1e-6)
        wrong = np.abs(found / FREQUENCIES - 1) > 1e-6
        assert wrong.nonzero()[0].tolist() == list(range(9, 18))
        assert factor == pytest.approx(1.3465735902799727, rel=1e-15)

    def test_without_a_factor_are_plain(self):
        found, factor = yarn_frequencies(16, 1000.0, 1.0, 64)
        np.testing.assert_allclose(found, 1000.0 ** (-np.arange(0, 16, 2) / 16), rtol=1e-15)
        assert factor == 1

    def test_beyond_the_ramp_are_kept_and_slowed(self):
        plain = 150_000.0 ** (-np.arange(0, 64, 2) / 64)
        found, _ = yarn_frequencies(*GPT_OSS)
        np.testing.assert_allclose(found[:9], plain[:9], rtol=1e-15)
        np.testing.assert_allclose(found[18:], plain[18:] / 32, rtol=1e-15)

    @pytest.mark.parametrize("betas", [(1e308, 1.0), (32.0, 1e308), (1e-300, 1e-308), (1.0, 1.0), (1.0, 32.0)])
    @pytest.mark.parametrize("truncate", [False, True])
    def test_are_numbers_whatever_the_settings(self, betas, truncate):
        found, _ = yarn_frequencies(*GPT_OSS, *betas, truncate)
        assert ((found > 0) & (found <= 1)).all()


def test_angles_are_formed_in_f32_at_every_position():
    positions = np.array([0, 1, 127, 131_071])
    cos, sin = rotations(positions, FREQUENCIES, 1.25)
    assert (cos.dtype, sin.dtype, cos.shape) == (np.float32, np.float32, (4, 32))
    angles = positions.astype(np.float32)[:, None] * FREQUENCIES.astype(np.float32)
    np.testing.assert_allclose(cos, 1.25 * np.cos(angles.astype(np.float64)), atol=2e-7)
    np.testing.assert_allclose(sin, 1.25 * np.sin(angles.astype(np.float64)), atol=2e-7)
    assert (cos[0] == 1.25).all()
    assert not sin[0].any()


@pairs
@pytest.mark.parametrize(("T", "H", "Dh"), [(1, 1, 2), (1, 64, 64), (3, 2, 10), (7, 3, 16), (2, 1, 66), (5, 8, 34)])
def test_equals_the_definition(case, error, T, H, Dh, interleaved):
    x, angles = case(T, H, Dh)
    assert error(rotated(x, angles, interleaved), turned(x.astype(np.float64), angles, interleaved)) < TOLERANCE


@pairs
def test_reference_equals_the_definition(case, error, interleaved):
    x, angles = case(4, 3, 10)
    found = x.astype(np.float64)
    rotate_reference(found, np.cos(angles), np.sin(angles), interleaved)
    assert error(found, turned(x.astype(np.float64), angles, interleaved)) < 1e-15


def test_the_two_layouts_are_one_rotation_of_reordered_heads(case):
    x, angles = case(4, 3, 16)
    order = np.arange(16).reshape(2, 8).T.ravel()  # where interleaved pairs stand in the half split
    np.testing.assert_array_equal(rotated(x[..., order].copy(), angles, True), rotated(x, angles, False)[..., order])
    assert not np.allclose(rotated(x, angles, True), rotated(x, angles, False), atol=0.1)


@pairs
def test_scores_depend_on_the_distance_alone(rng, interleaved):
    q, k = rng.standard_normal((2, 1, 1, 64), np.float32)

    def score(p: int, s: int) -> float:
        a, b = (rotate(x, *rotations(np.array([at]), FREQUENCIES), interleaved) for x, at in ((q, p), (k, s)))
        return float((a.astype(np.float64) * b).sum())

    for distance in (0, 1, 50):
        scores = [score(s + distance, s) for s in (0, 1, 100, 4000)]
        np.testing.assert_allclose(scores, scores[0], atol=2e-3)  # the angles are f32: 4000 radians carry 2e-4


@pairs
def test_nothing_turns_by_zero_and_the_factor_scales(case, interleaved):
    x, _ = case(3, 2, 10)
    ones, zeros = np.ones((3, 5), np.float32), np.zeros((3, 5), np.float32)
    np.testing.assert_array_equal(rotate(x, ones, zeros, interleaved), x)
    np.testing.assert_array_equal(rotate(x, 2 * ones, zeros, interleaved), 2 * x)


@pairs
def test_a_token_alone_gives_the_bits_it_gives_among_others(case, interleaved):
    x, angles = case(6, 3, 34)
    together = rotated(x, angles, interleaved)
    for t in range(6):
        assert np.array_equal(rotated(x[t : t + 1], angles[t : t + 1], interleaved)[0], together[t])


@pairs
@pytest.mark.parametrize("gap", [0, 1, 7, 64])
def test_bits_do_not_depend_on_where_arrays_lie(case, interleaved, gap):
    """Vector code runs where arrays lie far apart only: neighbours in memory must not show."""
    x, angles = case(2, 2, 40)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    memory = np.zeros(x.size + 2 * cos.size + 2 * gap, np.float32)
    near, at = [], 0
    for array in (cos, x, sin):
        near.append(memory[at : at + array.size].reshape(array.shape))
        near[-1][...] = array
        at += array.size + gap
    rotate_kernel(near[1], near[0], near[2], interleaved)
    assert np.array_equal(near[1], rotate(x, cos, sin, interleaved))


@pairs
def test_nan_stays_in_its_pair(case, interleaved):
    x, angles = case(3, 2, 10)
    x[1, 1, 4] = np.nan
    found = np.argwhere(np.isnan(rotated(x, angles, interleaved))).tolist()
    assert found == ([[1, 1, 4], [1, 1, 5]] if interleaved else [[1, 1, 4], [1, 1, 9]])


@pairs
def test_the_argument_is_left_alone(case, interleaved):
    x, angles = case(3, 2, 10)
    before = x.copy()
    assert not np.array_equal(rotated(x, angles, interleaved), before)
    np.testing.assert_array_equal(x, before)
    assert math.isclose(np.linalg.norm(rotated(x, angles, interleaved)), np.linalg.norm(x), rel_tol=1e-6)


def test_no_tokens(case):
    assert rotated(*case(0, 2, 10), False).shape == (0, 2, 10)
