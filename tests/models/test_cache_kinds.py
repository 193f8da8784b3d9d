"""What `get` returns, the cache of an encoder, and several caches as one."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toyllm.kernels.errors import ToyllmError
from toyllm.models.cache import (
    CacheConfig,
    CacheFull,
    EncoderCache,
    NotSupported,
    SlidingWindowCache,
    WrapperCache,
)

reading = runpy.run_path(str(Path(__file__).parent / "cache_reading.py"))
L, G, DH, causal, sliding, chunked, wrapper, forward, put, rows = (
    reading[name] for name in ("L", "G", "DH", "causal", "sliding", "chunked", "wrapper", "forward", "put", "rows")
)

# ---- what get returns -------------------------------------------------------------------------------------------------------


def test_history_is_padded_and_values_turned_as_configured() -> None:
    cache, plain = causal(), causal()
    cache.set_config(CacheConfig(padding=8, permuted_v=True, mask_dtype=np.float32, mask_batch_padding=4))
    forward(plain, [0, 1, 2], [0] * 3)
    cache.start_forward([0, 1, 2], [0] * 3)
    put(cache, [0, 1, 2])
    (key, value, mask), (plain_key, plain_value, plain_mask) = cache.get(), plain.get()
    assert (key.shape, value.shape, mask.shape) == ((8, G, DH), (G, DH, 8), (4, 8))
    assert (key.dtype, value.dtype, mask.dtype) == (np.float32,) * 3
    np.testing.assert_array_equal(key[:3], plain_key)
    np.testing.assert_array_equal(value.transpose(2, 0, 1)[:3], plain_value)
    np.testing.assert_array_equal(mask[:3, :3], np.where(plain_mask, 0, -np.inf))
    assert (mask[3:] == -np.inf).all()
    assert (mask[:, 3:] == -np.inf).all()
    assert not key[3:].any()


def test_a_configuration_comes_before_the_first_pass() -> None:
    for cache in (causal(), wrapper(), EncoderCache(L, G, DH)):
        cache.set_config(CacheConfig(padding=4))
        cache.set_config(CacheConfig(padding=2))
        cache.start_forward([0], [0])
        with pytest.raises(NotSupported, match="set_config"):
            cache.set_config(CacheConfig())
    cache = wrapper()
    cache.caches[1].start_forward([0], [0])
    with pytest.raises(NotSupported):
        cache.set_config(CacheConfig(padding=4))
    cache.caches[0].start_forward([0], [0])
    assert len(cache.caches[0].get()[0]) == 1, "the other member has not changed"


@pytest.mark.parametrize("make", [causal, lambda: sliding(3), lambda: chunked(8), wrapper])
def test_a_reserved_pass_has_the_largest_sizes_and_leaves_nothing(make: Callable[[], Any]) -> None:
    cache = make()
    forward(cache, [0, 1], [0, 0])
    cache.start_forward(list(range(500)), [1] * 500, reserve=True)
    cells = 3 * 3 + 16 if isinstance(cache, SlidingWindowCache | WrapperCache) else 3 * 16
    put(cache, list(range(500)))
    if isinstance(cache, WrapperCache):
        cache.set_layer_type(0)
    key, value, mask = cache.get()
    assert (key.shape, value.shape, mask.shape) == ((cells, G, DH), (cells, G, DH), (500, cells))
    with pytest.raises(ToyllmError):
        cache.put(rows([1], 0), rows([1], 0))
    cache.set_causal(False)
    assert [len(cache.positions(s)) for s in (0, 1)] == [2, 0]
    assert forward(cache, [2], [0]) == [[0, 1, 2]]


# ---- the encoder's ----------------------------------------------------------------------------------------------------------


def test_an_encoder_holds_an_input_until_its_position_is_removed() -> None:
    cache = EncoderCache(L, G, DH, 1, 16, 4)
    assert not cache.cached
    cache.start_forward([3], [0])
    put_input(cache, 7)
    assert cache.cached
    assert cache.nbytes == 2 * L * 7 * G * DH * 4
    for p in (4, 5):
        cache.start_forward([p], [0])
        for layer in range(L):
            cache.set_layer(layer)
            key, value, mask = cache.get()
            np.testing.assert_array_equal(key, rows(range(7), layer))
            np.testing.assert_array_equal(value, -rows(range(7), layer))
            assert mask is None
    assert cache.can_resume(0, 5)
    cache.remove(0, 4)
    cache.remove(0, 0, 3)
    assert cache.cached, "it moved to 0"
    cache.remove(0, 0, 1)
    assert not cache.cached
    with pytest.raises(ToyllmError, match="holds no input"):
        cache.get()
    assert cache.nbytes == 0


def put_input(cache: EncoderCache, n: int) -> None:
    for layer in range(L):
        cache.set_layer(layer)
        cache.put(rows(range(n), layer), -rows(range(n), layer))


def test_an_encoder_has_one_sequence() -> None:
    with pytest.raises(NotSupported, match="holds one sequence"):
        EncoderCache(L, G, DH, 2)
    cache = EncoderCache(L, G, DH)
    with pytest.raises(NotSupported):
        cache.start_forward([0, 0], [0, 1])
    with pytest.raises(NotSupported):
        cache.copy_prefix(0, 1, 1)
    cache.start_forward([0], [3])
    put_input(cache, 2)
    with pytest.raises(NotSupported):
        cache.start_forward([1], [4])
    cache.start_forward([1], [3])
    assert cache.cached


def test_a_reserved_pass_leaves_an_encoder_as_it_is() -> None:
    cache = EncoderCache(L, G, DH, 1, 9)
    cache.start_forward([0], [0], reserve=True)
    put_input(cache, 4)
    assert not cache.cached
    assert cache.get()[0].shape == (9, G, DH)


# ---- several as one ---------------------------------------------------------------------------------------------------------


def test_layers_and_their_types_are_chosen_in_any_order() -> None:
    cache = wrapper()
    cache.start_forward([0], [0])
    for kind, layer in ((0, 0), (1, 0), (0, 1), (1, 1)):
        if layer:
            cache.set_layer(layer)
            cache.set_layer_type(kind)
        else:
            cache.set_layer_type(kind)
            cache.set_layer(layer)
        cache.put(rows([10 * kind], layer), rows([10 * kind], layer))
    assert [int(member._keys[layer, 0, member.cells[member.begin[0]], 0]) for member in cache.caches for layer in range(L)] == [
        0,
        0,
        10,
        10,
    ]
    cache.start_forward([1], [0])
    assert cache.chosen is cache.caches[0]


def test_a_layer_that_the_chosen_member_lacks_is_refused() -> None:
    cache = WrapperCache([causal(layers=1), causal(layers=4)])
    cache.start_forward([0], [0])
    cache.set_layer(3)
    for call in (cache.get, lambda: cache.put(rows([0], 0), rows([0], 0))):
        with pytest.raises(ToyllmError, match="layer 3: the chosen cache has 1"):
            call()
    cache.set_layer_type(1)
    cache.put(rows([0], 0), rows([0], 0))
    for i in (4, -1):
        with pytest.raises(ToyllmError, match=f"layer {i}: expected 0 to 3"):
            cache.set_layer(i)
    with pytest.raises(ToyllmError, match="layer type 2: expected 0 to 1"):
        cache.set_layer_type(2)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_where_one_member_cannot_start_none_has(order: tuple[int, int]) -> None:
    pair = (sliding(3, max_sequences=1), causal(max_sequences=1, capacity=4))
    cache = WrapperCache([pair[i] for i in order])
    forward(cache, [0, 1, 2], [0] * 3)
    with pytest.raises(CacheFull):
        cache.start_forward([3, 4], [0, 0])
    assert [member.positions(0).tolist() for member in cache.caches] == [[0, 1, 2]] * 2
    forward(cache, [3], [0])
    assert sorted(member.positions(0).tolist() for member in cache.caches) == [[0, 1, 2, 3], [1, 2, 3]]


def test_an_encoder_beside_another_refuses_copies_for_both() -> None:
    cache = WrapperCache([EncoderCache(L, G, DH), causal(max_sequences=1)])
    cache.start_forward([0, 1], [0, 0])
    put_input(cache, 5)
    cache.set_layer_type(1)
    put_input(cache, 2)
    assert cache.caches[0].cached
    for call in (
        lambda: cache.copy_prefix(0, 1, 1),
        lambda: cache.start_forward([0], [1]),
        lambda: cache.state(0),
        lambda: cache.restore(0, []),
    ):
        with pytest.raises(NotSupported):
            call()
    assert (cache.positions(0).tolist(), cache.length(), cache.next_position(), cache.length(1)) == ([0, 1], 2, 2, 0)
    cache.remove(0, 0)
    assert not cache.caches[0].cached
