"""How a KV cache stores keys and values: what comes back, in every dtype, and that poison shows."""

import numpy as np
import pytest

from toyllm.kernels.cells import DTYPES, cell_bytes, load, store, width
from toyllm.kernels.dtypes import F16, bits, to_bf16
from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.q8 import Q8, dequantize_reference, quantize_reference

WIDTHS = (1, 2, 7, 31, 32, 33, 63, 64, 65, 80, 96, 128)
every = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def rows(rng):
    def make(*shape: int) -> np.ndarray:
        sizes = np.float32(2.0) ** rng.integers(-12, 6, (*shape[:-1], 1)).astype(np.float32)
        return rng.standard_normal(shape, np.float32) * sizes

    return make


@pytest.mark.parametrize(("Dh", "W"), [(1, 3), (31, 33), (32, 34), (33, 37), (64, 68), (80, 86), (128, 136)])
def test_a_row_in_8_bits_is_its_integers_and_a_scale_a_block(rows, Dh, W):
    assert width(Dh, "q8") == W == cell_bytes(Dh, "q8")
    assert store(rows(2, Dh), "q8").shape == (2, W)
    assert (width(Dh, "f32"), width(Dh, "bf16")) == (Dh, Dh)
    assert (cell_bytes(Dh, "f32"), cell_bytes(Dh, "bf16")) == (4 * Dh, 2 * Dh)


@every
def test_any_number_of_axes_and_any_strides(rows, dtype):
    a = rows(3, 2, 5, 40)
    stored = store(a, dtype)
    assert stored.dtype == DTYPES[dtype]
    assert stored.shape == (3, 2, 5, width(40, dtype))
    for strided, same in ((a.swapaxes(0, 2), stored.swapaxes(0, 2)), (a[:, 1], stored[:, 1]), (a[2, 1, 4], stored[2, 1, 4])):
        np.testing.assert_array_equal(store(strided, dtype), same)
        np.testing.assert_array_equal(load(same, 40), load(np.ascontiguousarray(same), 40))
    assert store(a[:0], dtype).shape == (0, 2, 5, width(40, dtype))
    assert load(store(a[:0], dtype), 40).shape == (0, 2, 5, 40)


def test_f32_is_kept_and_bf16_is_rounded_as_weights_are(rows):
    a = rows(50, 33)
    a[0, :6] = 0, -0.0, np.inf, -np.inf, np.nan, 3.4e38
    assert store(a, "f32") is a
    assert load(a, 33) is a
    np.testing.assert_array_equal(bits(store(a, "bf16")), bits(to_bf16(a)))


@pytest.mark.parametrize("Dh", WIDTHS)
def test_8_bits_are_those_of_weights(rows, Dh):
    """Integers and scales as `quantize` makes them, with the zeros of its last block left out."""
    a = rows(9, Dh)
    a[3] = 0
    stored, weights = store(a, "q8"), quantize_reference(a.T)
    np.testing.assert_array_equal(stored[:, :Dh], weights.values[:, :Dh])
    scales = np.ascontiguousarray(stored[:, Dh:]).view(F16)
    np.testing.assert_array_equal(bits(scales), bits(weights.scales))
    np.testing.assert_array_equal(load(stored, Dh), dequantize_reference(Q8(weights.values, scales, Dh)).T)


def test_8_bits_are_off_by_little(rng):
    a = rng.standard_normal((100, 64), np.float32)
    largest = np.abs(a).reshape(100, 2, 32).max(-1).repeat(32, -1)
    assert (np.abs(load(store(a, "q8"), 64) - a) / largest).max() < 1 / 223


@every
@pytest.mark.parametrize("Dh", [7, 64, 65])
def test_poison_shows(rows, dtype, Dh):
    """Cells filled with NaN, as a cache that looks for reads of what was never written, and single ones, and infinities in 8 bits."""
    assert np.isnan(load(store(np.full((2, Dh), np.nan, np.float32), dtype), Dh)).all()
    for poison in (np.nan, np.inf, -np.inf):
        a = rows(3, Dh)
        a[1, Dh - 1] = poison
        found = load(store(a, dtype), Dh)
        assert not np.isfinite(found[1, Dh - 1])
        if dtype == "q8":
            assert np.isnan(found[1, (Dh - 1) // 32 * 32 :]).all()
        found[1, (Dh - 1) // 32 * 32 :] = 0
        assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: width(64, "q4"), "--cache-dtype q4: expected f32 or bf16 or q8"),
        (lambda: store(np.ones((2, 3), np.float32), "q4"), "--cache-dtype q4: expected f32 or bf16 or q8"),
        (lambda: store(np.ones((2, 3)), "q8"), "rows: expected f32, found float64"),
        (lambda: store([1.0], "f32"), "rows: expected a NumPy array, found list"),
        (lambda: store(np.float32(1), "q8"), "rows: expected a NumPy array, found float32"),
        (lambda: load(np.ones((2, 68), np.int8), 63), "stored: expected rows of 67 elements for 63 numbers, found 68"),
        (lambda: load(np.ones((2, 68), np.float32), 64), "stored: expected rows of 64 elements for 64 numbers, found 68"),
        (lambda: load(np.ones((2, 64)), 64), "stored: expected f32 or bf16 or int8, found float64"),
    ],
)
def test_refuses(call, says):
    with pytest.raises(ToyllmError, match=says):
        call()
