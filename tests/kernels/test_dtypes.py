"""Widening is exact and rounding is to the nearest even, as ml_dtypes and NumPy have them."""

import ml_dtypes
import numpy as np
import pytest

from toyllm.kernels.dtypes import BF16, F16, F32, NAMES, bits, to_bf16, to_f16, widen

PATTERNS = np.arange(65536, dtype=np.uint16)


def same(a: np.ndarray, b: np.ndarray) -> None:
    """The same f32 values: equal, signs of zeros included, NaN where the other has NaN."""
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.signbit(a), np.signbit(b))


@pytest.mark.parametrize(("dtype", "peer"), [(BF16, ml_dtypes.bfloat16), (F16, np.float16)])
def test_all_65536_patterns_widen_exactly(dtype, peer):
    wide = widen(PATTERNS.view(dtype))
    assert wide.dtype == np.float32
    same(wide, PATTERNS.view(peer).astype(np.float32))


@pytest.mark.parametrize(("dtype", "narrow"), [(BF16, to_bf16), (F16, to_f16)])
def test_all_65536_patterns_survive_widening_and_rounding(dtype, narrow):
    stored = PATTERNS.view(dtype)
    numbers = ~np.isnan(widen(stored))
    np.testing.assert_array_equal(bits(narrow(widen(stored)))[numbers], PATTERNS[numbers])
    assert np.isnan(widen(narrow(widen(stored)))[~numbers]).all()


@pytest.mark.parametrize(("narrow", "peer"), [(to_bf16, ml_dtypes.bfloat16), (to_f16, np.float16)])
def test_rounding_is_to_the_nearest_even(rng, narrow, peer):
    """Around every value, every midpoint between two, and at random; beyond the largest is infinity."""
    middle = (PATTERNS.astype(np.uint32) << 16) + 0x8000
    half = np.append(PATTERNS[:0x7C00].view(np.float16).astype(np.float32), np.float32(65536))
    half = np.concatenate([half, (half[:-1] + half[1:]) / 2]).view(np.uint32)
    u = np.concatenate([middle, middle - 0x8000, half, half | 0x80000000, rng.integers(0, 2**32, 100_000, dtype=np.uint32)])
    x = np.concatenate([u + np.uint32(offset) for offset in (0xFFFFFFFF, 0, 1)]).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        same(widen(narrow(x)), x.astype(peer).astype(np.float32))


@pytest.mark.parametrize("narrow", [to_bf16, to_f16])
def test_nan_stays_nan_whatever_its_payload(narrow):
    payloads = np.concatenate([np.arange(1, 1 << 23, 997), [1, (1 << 23) - 1]]).astype(np.uint32)
    for sign in (0, 0x80000000):
        x = (payloads | np.uint32(0x7F800000 | sign)).view(np.float32)
        wide = widen(narrow(x))
        assert np.isnan(wide).all()
        np.testing.assert_array_equal(np.signbit(wide), np.signbit(x))


def test_beyond_the_range_is_infinity():
    x = np.array([65519.99, 65520, -1e9, np.inf], np.float32)
    with np.errstate(over="ignore"):
        same(widen(to_f16(x)), np.array([65504, np.inf, -np.inf, np.inf], np.float32))
    same(widen(to_bf16(np.float32([3.4e38, -3.4e38]))), np.float32([np.inf, -np.inf]))


def test_widening_f32_copies_nothing_and_the_others_leave_their_input_alone():
    x = np.ones(3, F32)
    assert widen(x) is x
    stored = to_bf16(x)
    stored.flags.writeable = False
    widen(stored)[:] = 0
    assert (widen(stored) == 1).all()


def test_shapes_strides_and_addresses_do_not_matter(rng):
    x = rng.standard_normal((4, 6), np.float32)
    for narrow in (to_bf16, to_f16):
        stored = narrow(x)
        assert stored.shape == (4, 6)
        same(widen(stored.T), widen(stored).T)
        same(widen(stored[1::2, ::3]), widen(stored)[1::2, ::3])
        odd = np.frombuffer(b"\0" + stored.tobytes(), stored.dtype, offset=1)
        same(widen(odd), widen(stored).reshape(-1))
    assert widen(to_bf16(np.empty((0, 3), np.float32))).shape == (0, 3)


def test_every_dtype_has_a_name():
    assert NAMES == {F32: "f32", F16: "f16", BF16: "bf16"}
    assert [d.itemsize for d in NAMES] == [4, 2, 2]
