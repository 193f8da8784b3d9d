"""Products in bf16 against NumPy in f64 on rounded activations, on every ugly shape."""

import numpy as np
import pytest

from toyllm.kernels import pairs
from toyllm.kernels.dtypes import BF16, F32, bits, to_bf16, widen
from toyllm.kernels.fp4 import BLOCK
from toyllm.kernels.matmul import NO_BIAS, matmul, panels_for
from toyllm.kernels.mxfp4 import matmul_mxfp4
from toyllm.kernels.threads import thread_scratch

pytestmark = pytest.mark.needs_jit
needs_pairs = pytest.mark.skipif(not pairs.AVAILABLE, reason="this processor multiplies no pairs of bf16")
SIZES = (1, 2, 3, 15, 17, 31, 33, 63, 64, 65, 129)
ROWS = (16, 17, 18, 23)
TOLERANCE = 2e-6


def product(x, w, bias=None):
    out = np.full((len(x), w.shape[1]), np.nan, np.float32)
    panels = np.full_like(thread_scratch(panels_for(len(w))), np.nan)
    pairs.matmul_bf16_kernel(x, w, NO_BIAS if bias is None else bias, out, panels)
    return out


def weights(rng, stored, K, N, order):
    return stored(rng.standard_normal((K, N)), "bf16") if order == "by input" else stored(rng.standard_normal((N, K)), "bf16").T


@needs_pairs
@pytest.mark.parametrize("order", ["by input", "by output"])
@pytest.mark.parametrize("M", ROWS)
def test_equals_the_reference_on_every_shape(rng, stored, error, M, order):
    for K in SIZES:
        for i, N in enumerate(SIZES):
            x, w = rng.standard_normal((M, K), np.float32), weights(rng, stored, K, N, order)
            bias = rng.standard_normal(N).astype(np.float32) if (i + K) % 2 else None
            expected = np.empty((M, N))
            pairs.matmul_bf16_reference(x, w, NO_BIAS if bias is None else bias, expected)
            assert error(product(x, w, bias), expected) < TOLERANCE, (K, N)


@needs_pairs
@pytest.mark.parametrize("M", ROWS)
def test_mxfp4_equals_the_reference(rng, error, M):
    for n in (1, 2, 3, 5):
        for N in (1, 3, 4, 31, 32, 33, 67):
            x = rng.standard_normal((M, n * BLOCK), np.float32)
            blocks, scales = rng.integers(0, 256, (N, n, 16), np.uint8), rng.integers(110, 130, (N, n), np.uint8)
            bias = rng.standard_normal(N).astype(np.float32)
            out, expected = np.full((M, N), np.nan, np.float32), np.empty((M, N))
            pairs.matmul_mxfp4_bf16_kernel(x, blocks, scales, bias, out, thread_scratch(panels_for(n * BLOCK)))
            pairs.matmul_mxfp4_bf16_reference(x, blocks, scales, bias, expected)
            assert error(out, expected) < TOLERANCE, (n, N)


@needs_pairs
@pytest.mark.parametrize("order", ["by input", "by output"])
def test_a_row_has_the_same_bits_among_any_number_of_others(rng, stored, order):
    w = weights(rng, stored, 131, 70, order)
    x = rng.standard_normal((40, 131), np.float32)
    for M in range(pairs.WORTHWHILE, 40):
        assert np.array_equal(product(x[:M], w), product(x, w)[:M]), M


@needs_pairs
@pytest.mark.parametrize("order", ["by input", "by output"])
def test_nan_and_infinity_spread_to_what_uses_them(rng, stored, order):
    x = rng.standard_normal((16, 33), np.float32)
    x[3, 5], x[7, 32] = np.nan, np.inf
    out = product(x, weights(rng, stored, 33, 20, order))
    assert np.isnan(out[3]).all()
    assert np.isinf(out[7]).all()
    assert np.isfinite(np.delete(out, [3, 7], 0)).all()


def test_rows_are_rounded_to_the_nearest_even_bf16(rng):
    x = rng.standard_normal((16, 7), np.float32)
    x[0, :5] = [0.0, -0.0, np.inf, np.nan, 1 + 2**-8]  # the last lies between two
    rounded = pairs.round_rows(x, 8)
    assert rounded.shape == (16, 8)
    assert not rounded[:, 7].any()
    assert np.array_equal(rounded[:, :7], bits(to_bf16(x)))


@pytest.mark.parametrize("form", ["f32", "f16"])
def test_weights_that_do_not_fit_in_bf16_are_multiplied_in_f32(rng, stored, form):
    x, w = rng.standard_normal((20, 33), np.float32), stored(rng.standard_normal((33, 21)), form)
    assert np.array_equal(product(x, w), matmul(x, w))


def test_a_few_rows_are_multiplied_in_f32(rng, stored):
    x, w = rng.standard_normal((pairs.WORTHWHILE - 1, 64), np.float32), stored(rng.standard_normal((64, 21)), "bf16")
    assert np.array_equal(product(x, w), matmul(x, w))
    blocks, scales = rng.integers(0, 256, (9, 2, 16), np.uint8), rng.integers(110, 130, (9, 2), np.uint8)
    out = np.empty((len(x), 9), np.float32)
    pairs.matmul_mxfp4_bf16_kernel(x, blocks, scales, NO_BIAS, out, thread_scratch(panels_for(64)))
    assert np.array_equal(out, matmul_mxfp4(x, blocks, scales))


@needs_pairs
def test_the_error_against_unrounded_activations_is_that_of_eight_bits(rng, stored, error):
    x, w = rng.standard_normal((32, 768), np.float32), weights(rng, stored, 768, 64, "by output")
    found = error(product(x, w), x.astype(np.float64) @ widen(w).astype(np.float64))
    assert 1e-5 < found < 4e-3
    assert w.dtype == BF16
    assert x.dtype == F32
