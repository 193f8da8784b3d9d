"""MXFP4 products with activations of 16 bits: against their formula, against f64, and one row against many."""

import numpy as np
import pytest

from toyllm.kernels import split
from toyllm.kernels.fp4 import BLOCK, dequantize_reference
from toyllm.kernels.matmul import NO_BIAS, OUTPUTS, panels_for
from toyllm.kernels.mxfp4 import matmul_mxfp4_reference
from toyllm.kernels.split import RECORD, matmul_mxfp4_split_kernel, matmul_mxfp4_split_reference, split_reference, split_rows, steps_of
from toyllm.kernels.threads import thread_scratch

TOLERANCE = 1e-6  # against the formula; reached: 9e-8
ROUNDING = 3e-7  # the same of the sum of all products' sizes, where outputs are few and may be near 0
FINE = 1e-4  # against f64, where no sum stands alone; reached: 3e-5
ROWS = (1, 2, 3, 4, 5, 31, 32, 33, 67)  # of W: around the tile's rows and the panel's
EVERY = (1, 2, 4, 5, 9)  # rows of x: straight and expanded, whole tiles and what remains

needs_tiles = pytest.mark.skipif(not split.AVAILABLE, reason="this processor has no AVX-512 VNNI")


def weights(rng: np.random.Generator, N: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales of a matrix [N, 32 n], read-only, at an odd address."""
    blocks = np.empty(N * n * 16 + 1, np.uint8)[1:].reshape(N, n, 16)
    blocks[:] = rng.integers(0, 256, blocks.shape)
    scales = rng.integers(118, 130, (N, n)).astype(np.uint8)
    for array in (blocks, scales):
        array.flags.writeable = False
    return blocks, scales


def inputs(rng: np.random.Generator, M: int, n: int) -> np.ndarray:
    return rng.standard_normal((M, n * BLOCK), np.float32)


def product(x: np.ndarray, blocks: np.ndarray, scales: np.ndarray, bias: np.ndarray = NO_BIAS) -> np.ndarray:
    """The kernel's, where nothing it writes or works in was anything before."""
    out = np.full((len(x), len(blocks)), np.nan, np.float32)
    matmul_mxfp4_split_kernel(x, blocks, scales, bias, out, np.full_like(thread_scratch(panels_for(x.shape[1])), np.nan))
    return out


def formula(x: np.ndarray, blocks: np.ndarray, scales: np.ndarray, bias: np.ndarray = NO_BIAS) -> np.ndarray:
    out = np.empty((len(x), len(blocks)))
    matmul_mxfp4_split_reference(x, blocks, scales, bias, out)
    return out


def exact(x: np.ndarray, blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    out = np.empty((len(x), len(blocks)))
    matmul_mxfp4_reference(x.astype(np.float64), blocks, scales, NO_BIAS, out)
    return out


def recorded(x: np.ndarray) -> np.ndarray:
    """The values f64 [M, K] that the records of x stand for."""
    (records, lift), n = split_rows(x), x.shape[1] // BLOCK
    steps = records.reshape(len(x), steps_of(n), RECORD)
    upper, lower = (steps[:, :, first : first + 128].astype(np.int32).reshape(len(x), -1, 2, 4, 16) for first in (0, 128))
    whole = (256 * upper + lower).transpose(0, 1, 3, 4, 2).reshape(len(x), -1, BLOCK)[:, :n]  # even and odd side by side
    scale = 2.0 * records.view(np.float32).reshape(len(x), -1, RECORD // 4)[:, :, 80::4].reshape(len(x), -1)[:, :n, None]
    starts = records.view(np.int32).reshape(len(x), -1, RECORD // 4)[:, :, 64:80].reshape(len(x), -1, 4)[:, :n]
    np.testing.assert_array_equal(starts, -12 * whole.reshape(len(x), n, 4, 8).sum(-1))
    return (whole * scale.astype(np.float64) * lift[:, None, None]).reshape(x.shape)


@pytest.mark.parametrize("n", [1, 3, 4, 9])
def test_a_record_holds_16_bits_of_each_block(rng, n):
    x = inputs(rng, 3, n) * np.exp(rng.uniform(-9, 9, (3, n)).astype(np.float32)).repeat(BLOCK, 1)
    found = recorded(x)
    np.testing.assert_allclose(found, split_reference(x), rtol=1e-6, atol=0)
    largest = np.abs(x).reshape(3, n, BLOCK).max(-1).repeat(BLOCK).reshape(x.shape)
    assert (np.abs(found - x) <= largest / 65024 * 1.001).all()


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1, 1e30, 3e38])
def test_a_record_is_as_fine_at_any_size(rng, size):
    x = rng.uniform(-1, 1, (2, 64)).astype(np.float32) * np.float32(size)
    assert np.abs(recorded(x) - x).max() <= np.abs(x).max() / 65024 * 1.001 + 1e-45


@needs_tiles
@pytest.mark.needs_jit
@pytest.mark.parametrize("M", EVERY)
def test_equals_its_formula_on_every_shape(rng, M):
    for n in (1, 2, 3, 4, 5, 17):
        for N in ROWS:
            x, (blocks, scales) = inputs(rng, M, n), weights(rng, N, n)
            bias = rng.standard_normal(N).astype(np.float32) if N % 2 else NO_BIAS
            found, expected = product(x, blocks, scales, bias), formula(x, blocks, scales, bias)
            sizes = np.abs(x) @ np.abs(dequantize_reference(blocks, scales)).T
            assert (np.abs(found - expected) <= ROUNDING * (sizes + 1)).all(), (n, N)


@needs_tiles
@pytest.mark.needs_jit
@pytest.mark.parametrize("M", [1, 8])
def test_error_against_f64_stays_small_over_the_inputs_of_gpt_oss(rng, error, M):
    x, (blocks, scales) = inputs(rng, M, 90), weights(rng, 101, 90)
    assert error(product(x, blocks, scales), exact(x, blocks, scales)) < FINE


@needs_tiles
@pytest.mark.needs_jit
@pytest.mark.parametrize(("n", "N"), [(1, 3), (3, 33), (90, 70)])
def test_a_row_alone_gives_the_bits_it_gives_among_others(rng, n, N):
    x, (blocks, scales), bias = inputs(rng, 13, n), weights(rng, N, n), rng.standard_normal(N).astype(np.float32)
    together = product(x, blocks, scales, bias)
    for m in range(13):
        assert np.array_equal(product(x[m : m + 1], blocks, scales, bias)[0], together[m]), m


@needs_tiles
@pytest.mark.needs_jit
@pytest.mark.parametrize("M", [1, 13])
def test_threads_change_no_bit(rng, threads, M):
    x, (blocks, scales) = inputs(rng, M, 5), weights(rng, 700, 5)
    threads(1)
    alone = product(x, blocks, scales)
    threads(2)
    assert np.array_equal(product(x, blocks, scales), alone)


@needs_tiles
@pytest.mark.needs_jit
@pytest.mark.parametrize("M", [1, 7])
class TestSpecialValues:
    N, n = 33, 2

    def test_zeros_give_the_bias(self, rng, M):
        bias, x = rng.standard_normal(self.N).astype(np.float32), np.zeros((M, self.n * BLOCK), np.float32)
        assert np.array_equal(product(x, *weights(rng, self.N, self.n), bias), np.tile(bias, (M, 1)))

    def test_zero_codes_give_zero_at_any_scale(self, rng, M):
        scales = rng.integers(0, 255, (self.N, self.n)).astype(np.uint8)
        for byte in (0x00, 0x88):  # zero and minus zero
            assert not product(inputs(rng, M, self.n), np.full((self.N, self.n, 16), byte, np.uint8), scales).any()

    def test_what_is_no_number_makes_its_row_none(self, rng, M):
        for value in (np.nan, np.inf, -np.inf):
            x = inputs(rng, M, self.n)
            x[M // 2, 17] = value
            found = np.isnan(product(x, *weights(rng, self.N, self.n)))
            assert found[M // 2].all()
            assert found.sum() == self.N

    def test_a_scale_of_nan_reaches_its_own_output_only(self, rng, M):
        for j, b in [(0, 0), (32, 1), (14, 0)]:
            blocks, scales = (a.copy() for a in weights(rng, self.N, self.n))
            blocks[j, b], scales[j, b] = 0, 255
            found = np.isnan(product(inputs(rng, M, self.n), blocks, scales))
            assert found[:, j].all()
            assert found.sum() == M

    def test_the_smallest_scale_is_no_zero(self, rng, error, M):
        blocks, scales = weights(rng, self.N, self.n)[0], np.zeros((self.N, self.n), np.uint8)
        x = inputs(rng, M, self.n) * np.float32(2.0**100)
        assert error(product(x, blocks, scales), formula(x, blocks, scales)) < TOLERANCE

    def test_the_largest_scales_are_no_infinity(self, rng, error, M):
        blocks, scales = weights(rng, self.N, self.n)[0], np.full((self.N, self.n), 252, np.uint8)
        x = inputs(rng, M, self.n) * np.float32(2.0**-100)
        assert error(product(x, blocks, scales), formula(x, blocks, scales)) < TOLERANCE


@needs_tiles
@pytest.mark.needs_jit
def test_a_panel_is_large_enough_for_expanded_rows():
    for n in range(1, 40):
        assert OUTPUTS * steps_of(n) * split.EXPANDED <= 4 * panels_for(n * BLOCK)
