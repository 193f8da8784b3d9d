"""The scalar functions that kernels inline: exp over the whole range of f32, and every stored 16-bit weight."""

from collections.abc import Callable

import numba
import numpy as np
import pytest

from toyllm.kernels.dtypes import BF16, F16, F32, bits, to_bf16, to_f16, widen
from toyllm.kernels.elementary import HIGHEST, LOWEST, bf16_bits, exp, f16_bits, value
from toyllm.kernels.jit import kernel

PLAIN = numba.config.DISABLE_JIT
ULPS = 2.0  # what exp promises; reached over all 2^32 patterns: 1.493, where 2^n is subnormal; 1.0 elsewhere


@kernel
def _exp_of(x, out):
    for i in range(len(x)):
        out[i] = exp(x[i])


@kernel
def _values_of(stored, out):
    for i in range(len(stored)):
        out[i] = value(stored[i])


@kernel
def _narrowed(x, bf16, f16):
    for i in range(len(x)):
        bf16[i], f16[i] = bf16_bits(x[i]), f16_bits(x[i])


@pytest.fixture
def exp_of() -> Callable[[np.ndarray], np.ndarray]:
    def run(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        _exp_of(x, out)
        return out

    return run


def test_exp_is_within_two_units_in_the_last_place(exp_of):
    n = 500 if PLAIN else 500_000
    x = np.concatenate([np.linspace(LOWEST, HIGHEST, n), *(s * np.geomspace(1e-38, 1, n // 10) for s in (1, -1))]).astype(np.float32)
    whole = (np.arange(-125, 128) + 0.5) * np.log(2)  # where the power of two changes
    x = np.concatenate([x, *(np.nextafter(whole.astype(np.float32), np.float32(side)) for side in (-1e9, 1e9))])
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exp_of(x) - exact) / np.spacing(exact.astype(np.float32))).max() <= ULPS


def test_exp_of_special_values(exp_of):
    x = np.array([0, -0.0, np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 88.8, -87, 89, -104, 1e4, -1e4], np.float32)
    expected = [1, 1, np.nan, np.inf, 0, np.inf, 0, 1, np.inf, 0, np.inf, 0, np.inf, 0]
    np.testing.assert_array_equal(exp_of(x), np.array(expected, np.float32))


def test_exp_is_finite_up_to_its_bounds_and_monotonous_across_them(exp_of):
    ends = np.array([LOWEST, HIGHEST], np.float32)
    low, high = exp_of(ends)
    assert 0 < low < 2e-38
    assert 3.4e38 < high < np.inf
    beyond = np.nextafter(ends, ends * 2)
    np.testing.assert_array_equal(exp_of(beyond), [0, np.inf])


def test_nan_keeps_to_itself(exp_of):
    x = np.zeros(70, np.float32)
    x[[0, 15, 69]] = np.nan
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(exp_of(x))), [0, 15, 69])


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_every_stored_pattern_widens_exactly(dtype):
    patterns = np.arange(0, 65536, 7 if PLAIN else 1).astype(np.uint16).view(dtype)
    out = np.empty(len(patterns), np.float32)
    _values_of(patterns, out)
    np.testing.assert_array_equal(out, widen(patterns))
    np.testing.assert_array_equal(np.signbit(out), np.signbit(widen(patterns)))


def test_rounding_to_16_bits_is_to_nearest_even(rng):
    """At every half, midway to the next one and beside that, at random bits, and at what neither holds: as NumPy and ml_dtypes round."""
    steps = np.arange(0x7C00, dtype=np.uint16)[:: 97 if PLAIN else 1].view(np.float16).astype(np.float32)
    midway = (steps[1:] + steps[:-1]) / 2
    anywhere = rng.integers(0, 2**32, 500 if PLAIN else 1_000_000, np.uint32).view(np.float32)
    ends = np.float32([0, 65519.996, 65520, 65536, 1e30, 2**-25, 2**-24, 1e-45, np.inf, np.nan, 3.4e38])
    x = np.concatenate([steps, midway, np.nextafter(midway, np.float32(0)), np.nextafter(midway, np.float32(1e9)), ends, anywhere])
    x = np.concatenate([x, -x])
    in_bf16, in_f16 = np.empty((2, len(x)), np.uint16)
    _narrowed(x, in_bf16, in_f16)
    np.testing.assert_array_equal(in_bf16, bits(to_bf16(x)))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = to_f16(x)
    np.testing.assert_array_equal(widen(in_f16.view(F16)), widen(expected))
    numbers = ~np.isnan(x)  # which NaN, is open
    np.testing.assert_array_equal(in_f16[numbers], bits(expected)[numbers])


def test_f32_stays_as_it_is():
    x = np.array([0, -0.0, 1e-45, np.inf, 1.5], F32)
    out = np.empty_like(x)
    _values_of(x, out)
    assert out.tobytes() == x.tobytes()
