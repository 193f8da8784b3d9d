"""What the processor can do, how many threads there are, and the table of backends that follows from it."""

import numba
import numpy as np
import pytest

from toyllm.kernels import backends, host, threads
from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.matmul import NO_BIAS
from toyllm.kernels.threads import max_threads, physical_cores, set_threads, thread_scratch, threading_layer


@pytest.fixture
def restored():
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch):
    """A processor with these features and no others."""
    return lambda *names: monkeypatch.setattr(host, "features", lambda: dict.fromkeys(names, True))


def test_threads_can_be_set_from_one_to_the_most(restored):
    for count in (1, max_threads()):
        assert set_threads(count) == count == numba.get_num_threads()


def test_the_default_is_the_physical_cores(restored):
    assert physical_cores() >= 1
    assert set_threads() == min(physical_cores(), max_threads())


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_other_numbers_of_threads_are_refused(restored, count):
    before = numba.get_num_threads()
    with pytest.raises(ToyllmError, match=f"--threads {count}: expected 1 to {max_threads()}"):
        set_threads(count)
    assert numba.get_num_threads() == before


def test_every_thread_has_scratch_of_its_own():
    scratch = thread_scratch(5)
    assert scratch.shape == (max_threads(), 5)
    assert scratch.dtype == np.float32


@pytest.mark.needs_jit
def test_a_threading_layer_that_is_quick_to_wake_is_found():
    assert threading_layer() in ("tbb", "omp")


def test_it_is_said_where_only_the_slow_threading_layer_is_there(monkeypatch, caplog, tmp_path):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(threads.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(threads.site, "getuserbase", lambda: str(tmp_path))
    monkeypatch.setattr(threads.importlib, "import_module", missing)
    with caplog.at_level("INFO", "toyllm"):
        threads.choose_threading_layer()
    assert [record.message for record in caplog.records if "pip install tbb" in record.message]


@pytest.mark.parametrize(
    ("features", "best"),
    [
        (("avx512f", "avx512bw", "avx512vl", "avx2", "fma", "f16c"), "avx512"),
        (("avx512f", "avx2", "fma", "f16c"), "avx2"),
        (("avx2", "fma"), "portable"),
        ((), "portable"),
    ],
)
def test_the_best_backend_is_the_widest_this_processor_runs(processor, features, best):
    processor(*features)
    assert host.best_backend() == best
    assert host.choose_backend("auto") == best
    assert host.choose_backend("portable") == "portable"
    assert host.choose_backend("numpy") == "numpy"


def test_a_backend_beyond_the_processor_is_refused_with_what_it_lacks(processor):
    processor("avx2", "fma", "f16c")
    with pytest.raises(ToyllmError, match="--backend avx512: this processor lacks avx512f, avx512bw, avx512vl; --backend auto takes avx2"):
        backends.backend("avx512")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ToyllmError, match="--backend sse: expected auto or one of avx512, avx2, portable, numpy"):
        backends.backend("sse")


def test_the_processor_has_a_name():
    assert host.processor()


@pytest.mark.parametrize("name", host.BACKENDS)
def test_every_backend_takes_the_same_arguments_and_agrees(rng, stored, error, name):
    if not host.supports(name):
        pytest.skip("this processor cannot run it")
    if numba.config.DISABLE_JIT and name not in ("portable", "numpy"):
        pytest.skip("the compiler is off")
    kernels, plain = backends.backend(name), backends.backend("numpy")
    assert kernels.name == name
    x, w = rng.standard_normal((3, 16), np.float32), stored(rng.standard_normal((16, 5)), "f32")
    weight, bias = rng.standard_normal((2, 16), np.float32)

    def products(b: backends.Backend) -> np.ndarray:
        out = np.empty((3, 5), np.float32)
        b.matmul(x, w, NO_BIAS, out, thread_scratch(4096))
        return out

    def norms(b: backends.Backend) -> np.ndarray:
        out = np.empty_like(x)
        b.layer_norm(x, weight, bias, 1e-5, out)
        return out

    def activations(b: backends.Backend) -> np.ndarray:
        out = np.stack([x, x])
        b.gelu(out[0])
        b.gelu_new(out[1])
        return out

    def in_8_bits(b: backends.Backend) -> np.ndarray:
        out = np.empty((3, 5), np.float32)
        b.matmul_q8(x, b.quantize(w), NO_BIAS, out, thread_scratch(4096))
        return out

    for run in (products, norms, activations, in_8_bits):
        assert error(run(kernels), run(plain)) < 1e-6


@pytest.mark.parametrize("name", host.BACKENDS)
def test_only_where_asked_for_does_a_product_look_whether_weights_are_in_8_bits(rng, stored, name):
    if not host.supports(name):
        pytest.skip("this processor cannot run it")
    if numba.config.DISABLE_JIT and name not in ("portable", "numpy"):
        pytest.skip("the compiler is off")
    plain = backends.backend(name)
    assert plain.weights == "stored"
    assert plain.matmul is backends.TABLE[name]["matmul"]
    x, w = rng.standard_normal((20, 40), np.float32), stored(rng.standard_normal((40, 5)), "bf16")

    def product(b: backends.Backend, by: str, weights: object) -> np.ndarray:
        out = np.empty((20, 5), np.float32)
        getattr(b, by)(x, weights, NO_BIAS, out, thread_scratch(4096))
        return out

    for activations in backends.ACTIVATIONS:
        either, stored_only = backends.backend(name, None, activations, weights="q8"), backends.backend(name, None, activations)
        assert either.weights == "q8"
        np.testing.assert_array_equal(product(either, "matmul", w), product(stored_only, "matmul", w))
        made = either.quantize(w)
        np.testing.assert_array_equal(product(either, "matmul", made), product(plain, "matmul_q8", made))


def test_weights_of_another_kind_are_refused():
    with pytest.raises(ToyllmError, match="--weights q4: expected stored or q8"):
        backends.backend("numpy", weights="q4")
