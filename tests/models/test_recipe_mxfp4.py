"""The recipe's rounding to MXFP4, against a search over all values."""

import math

import numpy as np
import pytest

from toyllm.kernels.errors import ToyllmError
from toyllm.models.recipe import mxfp4


def brute_force(block: np.ndarray) -> np.ndarray:
    """The nearest values for one block of 32, each by looking at all fifteen; a tie goes to the code that is even."""
    e = next(e for e in range(-126, 128) if np.abs(block).max() <= math.ldexp(6.0, e))
    candidates = [(math.ldexp(float(v), e), code & 1) for code, v in enumerate(mxfp4.VALUES)]
    return np.array([min((abs(v - float(x)), odd, abs(v), v) for v, odd in candidates)[3] for x in block], np.float32)


@pytest.mark.parametrize("size", [1e-37, 1e-3, 1.0, 6.0, 1e30])
def test_each_value_takes_the_nearest_code(size):
    blocks = np.random.default_rng(0).normal(size=(20, 32)).astype(np.float32) * np.float32(size)
    np.testing.assert_array_equal(mxfp4.nearest(blocks), [brute_force(block) for block in blocks])


def test_ties_take_the_even_code():
    block = np.zeros(32, np.float32)
    block[:8] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]
    block[8:16] = -block[:8]
    expected = np.array([0, 1, 1, 2, 2, 4, 4, 6])
    np.testing.assert_array_equal(mxfp4.nearest(block)[:16], [*expected, *-expected])
    np.testing.assert_array_equal(mxfp4.nearest(block), brute_force(block))


@pytest.mark.parametrize("e", [-126, -20, 0, 20, 125])
def test_scale_is_the_smallest_power_of_two_that_saturates_nothing(e):
    six = np.float32(math.ldexp(6.0, e))
    for largest, exponent in [(six, e), (np.nextafter(six, np.float32(np.inf)), e + 1), (-six, e)]:
        _, scales = mxfp4.encode(np.full(32, largest, np.float32))
        assert scales.tolist() == [exponent + 127]


def test_blocks_near_and_at_zero_keep_a_normal_scale():
    tiny = np.full(32, np.finfo(np.float32).smallest_subnormal)
    for block in (np.zeros(32, np.float32), -np.zeros(32, np.float32), tiny):
        blocks, scales = mxfp4.encode(block)
        assert scales.tolist() == [1]
        assert not blocks.any()


def test_a_value_that_rounds_to_zero_is_never_the_negative_zero():
    block = np.full(32, -0.1, np.float32)
    block[0] = 6
    blocks, _ = mxfp4.encode(block)
    assert blocks.tolist()[0] == [7, *[0] * 15]


def test_even_elements_lie_in_the_low_half_of_their_byte():
    block = np.zeros((1, 64), np.float32)
    block[0, :2], block[0, 63] = (6, -0.5), 6
    blocks, scales = mxfp4.encode(block)
    assert blocks.shape == (1, 2, 16)
    assert scales.shape == (1, 2)
    assert blocks[0, 0, 0] == 7 | 9 << 4
    assert blocks[0, 1, 15] == 7 << 4
    np.testing.assert_array_equal(mxfp4.decode(blocks, scales), block)


def test_codes_and_back_keep_every_pair_of_codes_and_every_scale():
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 16)
    blocks[blocks & 15 == 8] -= 8  # the negative zeros, in the low half
    blocks[blocks >> 4 == 8] -= 128  # and in the high half
    blocks[:, 0] = 7  # a 6 in every block: its scale is the only one
    for byte in (1, 100, 127, 128, 252):
        scales = np.full(16, byte, np.uint8)
        again = mxfp4.encode(mxfp4.decode(blocks[:, None], scales[:, None]))
        np.testing.assert_array_equal(again[0][:, 0], blocks)
        np.testing.assert_array_equal(again[1][:, 0], scales)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_mxfp4_cannot_hold_is_an_error(bad):
    with pytest.raises(ToyllmError, match="finite"):
        mxfp4.encode(np.array([bad] + [1.0] * 31, np.float32))
    with pytest.raises(ToyllmError, match=r"multiple of 32, found shape \[2, 33\]"):
        mxfp4.encode(np.zeros((2, 33), np.float32))
