"""The streaming read reads all of its array: its sums are NumPy's."""

import numpy as np
import pytest

from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.stream import COLUMNS, ROWS, read_reference, read_stream, stream_array

pytestmark = pytest.mark.needs_jit


@pytest.mark.parametrize("n", [0, 1, 3])
def test_sums_every_value(rng, error, n):
    a = rng.standard_normal((n, ROWS, COLUMNS), np.float32)
    assert error(read_stream(a), read_reference(a.astype(np.float64))) < 1e-5


def test_a_nan_stays_in_its_column(rng):
    a = rng.standard_normal((2, ROWS, COLUMNS), np.float32)
    a[1, ROWS - 1, COLUMNS - 1] = np.nan
    assert np.argwhere(np.isnan(read_stream(a))).tolist() == [[1, COLUMNS - 1]]


@pytest.mark.parametrize(("nbytes", "n"), [(1, 1), (2**20, 1), (5 * 2**20 + 1, 5)])
def test_the_array_is_whole_tasks_of_ones(nbytes, n):
    a = stream_array(nbytes)
    assert a.shape == (n, ROWS, COLUMNS)
    np.testing.assert_array_equal(a, 1)
    np.testing.assert_array_equal(read_stream(a), ROWS)


@pytest.mark.parametrize("a", [np.ones((1, ROWS, COLUMNS)), np.ones((1, ROWS - 1, COLUMNS), np.float32), [1.0]])
def test_other_arrays_are_refused(a):
    with pytest.raises(ToyllmError, match=r"^a: expected"):
        read_stream(a)
