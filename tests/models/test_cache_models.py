"""Caches under models: what a model refuses that a cache would take, and keys that moved against keys made where they are now."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models import gpt_oss
from toyllm.models.cache import CacheFull, CausalCache, NotSupported, WrapperCache
from toyllm.models.model import Model

GOLDENS = Path(__file__).parent / "goldens"
IDS = np.random.default_rng(3).integers(0, 97, 90)


@functools.cache
def load(family: str = "gpt_oss", case: str = "baseline", **settings: Any) -> Model:
    return toyllm.load(str(GOLDENS / family / case), **settings)


def fed(model: Model, cache: Any, positions: range, sequence: int = 0) -> np.ndarray:
    """Logits of the ids at these positions."""
    return model.forward(IDS[positions.start : positions.stop], positions, [sequence] * len(positions), cache, all_logits=True)


def held(cache: Any) -> list[tuple[np.ndarray, ...]]:
    """Everything stored of sequence 0."""
    return cache.state(0) if isinstance(cache, WrapperCache) else [cache.state(0)]


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
@pytest.mark.parametrize(
    ("positions", "sequences", "expected"),
    [
        ([4], [0], 3),  # a gap
        ([2], [0], 3),  # once more
        ([3, 5], [0, 0], 3),  # a gap inside
        ([4, 3], [0, 0], 3),  # out of order
        ([3, 3], [0, 0], 3),  # twice
        ([5, 7], [1, 1], 5),  # a gap in a sequence that was empty
        ([3, 0, 2], [0, 1, 1], 0),
    ],
)
def test_positions_that_do_not_follow_are_refused_and_change_nothing(
    family: str, positions: list[int], sequences: list[int], expected: int
) -> None:
    model = load(family)
    cache = model.new_cache(20, sequences=2)
    fed(model, cache, range(3))
    with pytest.raises(ToyllmError, match=rf"^sequence \d: expected positions from {expected} on, one after the other$"):
        model.forward(IDS[: len(positions)], positions, sequences, cache)
    assert [cache.length(s) for s in (0, 1)] == [3, 0]


@pytest.mark.parametrize(("family", "case"), [("gpt2", "baseline"), ("gpt_oss", "baseline"), ("gpt_oss", "all_full")])
def test_a_prompt_of_several_passes_that_does_not_fit_changes_nothing(family: str, case: str) -> None:
    model = load(family, case, prefill_chunk=8)
    cache = model.new_cache(20)
    fed(model, cache, range(3))
    before = held(cache)
    with pytest.raises(CacheFull):
        fed(model, cache, range(3, 21))
    for old, new in zip(before, held(cache), strict=True):
        for a, b in zip(old, new, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(fed(model, cache, range(3, 20))) == 17


def turned(c: gpt_oss.Config, key: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Keys f64 [L, G, n, Dh] turned to these positions, without a factor."""
    angles = positions[:, None] * gpt_oss.frequencies(c)[0].astype(np.float32).astype(np.float64)
    half = key.shape[-1] // 2
    a, b = (key[..., :half], key[..., half:]) if c.hf_rope_impl else (key[..., 0::2], key[..., 1::2])
    turns = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)
    return np.concatenate(turns, -1) if c.hf_rope_impl else np.stack(turns, -1).reshape(key.shape)


@pytest.mark.parametrize("case", ["baseline", "window_16", "original", "all_full", "all_sliding"])
def test_keys_that_moved_are_those_of_their_new_positions(case: str) -> None:
    """Turned back by hand and in f64 to position 0, and from there to where they are now."""
    model = load(case=case)
    cache = model.new_cache(len(IDS), keep=40)
    fed(model, cache, range(60))
    before = held(cache)
    cache.remove(0, 10, 33)
    for (positions, keys, values), (now, moved, same) in zip(before, held(cache), strict=True):
        kept = (positions < 10) | (positions >= 33)
        expected = np.where(positions < 10, positions, positions - 23)[kept]
        np.testing.assert_array_equal(now, expected)
        np.testing.assert_array_equal(same, values[:, :, kept])
        fresh = turned(model.config, turned(model.config, keys[:, :, kept].astype(np.float64), -positions[kept]), now)
        assert np.abs(moved - fresh).max() <= 1e-6 * np.abs(fresh).max()
        np.testing.assert_array_equal(moved[:, :, now < 10], keys[:, :, positions < 10])
    assert np.isfinite(fed(model, cache, range(37, 60))).all(), "and it goes on there"


def test_a_first_layers_keys_are_the_bits_nearly_of_a_run_at_the_new_positions() -> None:
    """Whose keys depend on nothing but token and position: kept 4, dropped 30, and the rest as if it had come then."""
    model = load(case="all_full")
    cache, fresh = model.new_cache(60), model.new_cache(60)
    fed(model, cache, range(60))
    cache.remove(0, 4, 34)
    ids = [*IDS[:4], *IDS[34:60]]
    model.forward(ids, range(30), [0] * 30, fresh)
    moved, made = (which.caches[0].state(0)[1][0] for which in (cache, fresh))
    assert np.abs(moved - made).max() <= 1e-6 * np.abs(made).max()


def test_a_factor_is_not_applied_again_when_keys_move() -> None:
    """YaRN's, 1.35 at a factor of 32."""
    c = gpt_oss.Config()
    assert gpt_oss.frequencies(c)[1] > 1.3
    key = np.random.default_rng(0).standard_normal((5, 8, 64)).astype(np.float32)
    moved = gpt_oss.shifted(c, 0, key.copy(), np.full(5, -4096))
    np.testing.assert_allclose(np.linalg.norm(moved, axis=-1), np.linalg.norm(key, axis=-1), rtol=1e-6)
    back = gpt_oss.shifted(c, 0, moved, np.full(5, 4096))
    np.testing.assert_allclose(back, key, atol=2e-6)


def test_gpt2_cannot_move_positions() -> None:
    model = load("gpt2")
    cache = model.new_cache(20)
    assert isinstance(cache, CausalCache)
    fed(model, cache, range(10))
    with pytest.raises(NotSupported, match="this cache has no shift; remove up to the end instead"):
        cache.remove(0, 2, 5)
    cache.remove(0, 5)
    np.testing.assert_array_equal(fed(model, cache, range(5, 10)), fed(model, model.new_cache(20), range(10))[5:])


@pytest.mark.parametrize(("family", "case"), [("gpt2", "baseline"), ("gpt_oss", "baseline"), ("gpt_oss", "window_16")])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_shared_prefix_and_a_restored_state_go_on_to_the_bit(family: str, case: str, dtype: str) -> None:
    model = load(family, case, cache_dtype=dtype)
    alone = fed(model, model.new_cache(60), range(60))
    cache, other = model.new_cache(60, sequences=3), model.new_cache(60)
    fed(model, cache, range(25))
    cache.copy_prefix(0, 2, 25)
    cache.copy_prefix(0, 1, 24)
    for sequence, from_ in ((1, 24), (2, 25)):
        np.testing.assert_array_equal(fed(model, cache, range(from_, 40), sequence), alone[from_:40])
    np.testing.assert_array_equal(fed(model, cache, range(25, 40)), alone[25:40])
    other.restore(0, cache.state(1)) if isinstance(other, WrapperCache) else other.restore(0, *cache.state(1))
    for p in range(40, 60):
        np.testing.assert_array_equal(fed(model, other, range(p, p + 1)), alone[p : p + 1])
