"""Inside a run: figures equal to NumPy's on the run's own activations, whatever passes it is cut into, and the lens' end to the logits."""

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models import trace as tracing
from toyllm.models.activations import record
from toyllm.models.trace import quantise, trace

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES = ("gpt2", "gpt_oss")
IDS = (np.arange(37) * 29 % 61).tolist()


def load(family: str, **settings: Any) -> Any:
    return toyllm.load(str(GOLDENS / family / "baseline"), **settings)


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def final_norm(model: Any, x: np.ndarray) -> np.ndarray:
    """Written out, f64."""
    x, w, c = x.astype(np.float64), model.weights.norm_f, model.config
    if hasattr(w, "bias"):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.layer_norm_epsilon) * w.weight + w.bias
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_eps) * w


def entropy(p: np.ndarray) -> np.ndarray:
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


@pytest.fixture(params=["one pass", "several passes"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the prompt and the lens' logits fit in one piece."""
    if request.param == "several passes":
        monkeypatch.setattr(tracing, "WEIGHTS", 5 * 4 * 8 * len(IDS))
        monkeypatch.setattr(tracing, "LOGITS", 3 * 4 * 97)
        assert tracing.pass_rows(load("gpt_oss"), len(IDS)) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_at_the_last_layer_is_the_logits_to_the_bit(family: str, monkeypatch: pytest.MonkeyPatch, passes: None) -> None:
    model, rows = load(family), []
    lens = tracing.lens_logits

    def kept(*arguments: Any) -> np.ndarray:
        rows.append(lens(*arguments).copy())
        return rows[-1]

    monkeypatch.setattr(tracing, "lens_logits", kept)
    last = len(model.weights.blocks) - 1
    found = trace(model, IDS, [last], top=3)
    logits = model.logits(IDS)
    np.testing.assert_array_equal(np.concatenate(rows), logits)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :3]
    np.testing.assert_array_equal(found.layers[0].lens.ids, order)
    np.testing.assert_allclose(found.layers[0].lens.probabilities, np.take_along_axis(softmax(logits), order, -1), rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_those_of_the_activations(family: str, passes: None) -> None:
    model = load(family)
    found = trace(model, IDS, top=4, maps=True)
    arrays, _ = record(model, IDS, lambda name: True)
    np.testing.assert_allclose(found.embed, np.linalg.norm(arrays["embed"].astype(np.float64), axis=-1), rtol=1e-12)
    assert [layer.number for layer in found.layers] == list(range(len(model.weights.blocks)))
    for layer in found.layers:
        at = f"blocks.{layer.number}"
        for name, norms in (("resid_mid", layer.resid_mid), ("out", layer.out)):
            np.testing.assert_allclose(norms, np.linalg.norm(arrays[f"{at}.{name}"].astype(np.float64), axis=-1), rtol=1e-5)

        weights = arrays[f"{at}.attn.weights"].astype(np.float64)
        rest = 1 - weights.sum(-1)
        whole = np.concatenate([weights, np.maximum(rest, 0)[..., None]], -1) if family == "gpt_oss" else weights
        np.testing.assert_allclose(layer.entropy, entropy(whole), atol=1e-5)
        assert layer.entropy.min() >= 0
        if family == "gpt_oss":
            assert layer.sink is not None
            np.testing.assert_allclose(layer.sink, rest, atol=1e-6)
            assert layer.sink.max() > 0.5
        else:
            assert layer.sink is None
        assert layer.maps is not None
        seen = np.tril(np.ones((len(IDS), len(IDS)), bool))
        np.testing.assert_allclose((layer.maps / 255) ** 2, weights[:, seen], atol=4e-3)

        lens = softmax(final_norm(model, arrays[f"{at}.out"]) @ np.asarray(toyllm.kernels.dtypes.widen(model.weights.head), np.float64))
        order = np.argsort(-lens, axis=-1, kind="stable")
        np.testing.assert_array_equal(layer.lens.ids[:, 0], order[:, 0])
        np.testing.assert_allclose(layer.lens.probabilities, -np.sort(-lens, axis=-1)[:, :4], rtol=2e-4)
        np.testing.assert_allclose(layer.lens.entropy, entropy(lens), atol=1e-4)
        following = lens[np.arange(len(IDS) - 1), IDS[1:]]
        np.testing.assert_allclose(layer.lens.following[:-1], following, rtol=1e-3)
        np.testing.assert_array_equal(layer.lens.rank[:-1], 1 + (lens[:-1] > following[:, None]).sum(-1))
        assert np.isnan(layer.lens.following[-1])
        assert layer.lens.rank[-1] == -1


def test_routing_is_the_routers_choice_and_its_loads_count_it(passes: None) -> None:
    model = load("gpt_oss")
    found = trace(model, IDS)
    arrays, _ = record(model, IDS, lambda name: "router" in name)
    E, k = model.config.num_local_experts, model.config.num_experts_per_tok
    for layer in found.layers:
        routing, at = layer.routing, f"blocks.{layer.number}.router"
        assert routing is not None
        np.testing.assert_array_equal(routing.experts, arrays[f"{at}.experts"])
        np.testing.assert_allclose(routing.weights, arrays[f"{at}.weights"], atol=1e-5)
        chosen = np.argsort(-arrays[f"{at}.logits"], axis=-1, kind="stable")[:, :k]
        np.testing.assert_array_equal(routing.counts, [(chosen == e).sum() for e in range(E)])
        assert routing.counts.sum() == len(IDS) * k
        assert routing.shares.sum() == pytest.approx(1)
        assert routing.imbalance == pytest.approx(routing.counts.max() * E / (len(IDS) * k))
    assert all(layer.routing is None for layer in trace(load("gpt2"), IDS).layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_layers_are_measured_as_among_all(family: str) -> None:
    model = load(family)
    every = trace(model, IDS, top=2)
    (one,) = trace(model, IDS, [1, 1], top=2).layers
    assert one.number == 1
    np.testing.assert_array_equal(one.lens.probabilities, every.layers[1].lens.probabilities)
    np.testing.assert_array_equal(one.entropy, every.layers[1].entropy)
    np.testing.assert_array_equal(one.out, every.layers[1].out)


def test_a_sliding_layer_attends_to_nothing_before_its_window() -> None:
    model = load("gpt_oss")
    (layer,) = trace(model, IDS, [0], maps=True).layers
    assert layer.maps is not None
    T, window = len(IDS), model.config.sliding_window
    assert model.config.sliding[0]
    assert window < T
    dense = np.zeros((layer.maps.shape[0], T, T), np.uint8)
    dense[:, np.tril(np.ones((T, T), bool))] = layer.maps
    distance = np.arange(T)[:, None] - np.arange(T)
    assert not dense[:, distance >= window].any()
    assert dense[:, distance == window - 1].any()


def test_bytes_of_attention_keep_small_weights_apart() -> None:
    w = np.linspace(0, 1, 100_001)
    back = (quantise(w) / 255.0) ** 2
    assert (np.abs(back - w) <= np.sqrt(w) / 255 + 1e-5).all()
    assert abs((quantise(np.array([1 / 300])) / 255.0) ** 2 * 300 - 1)[0] < 0.07
    np.testing.assert_array_equal(quantise(np.array([0, 1, 1 + 1e-7, -1e-9, np.nan])), [0, 255, 255, 0, 0])


def test_a_damaged_model_is_traced_to_where_it_breaks() -> None:
    model = load("gpt2")
    first, second, *rest = model.weights.blocks
    broken = dataclasses.replace(second, norm_1=dataclasses.replace(second.norm_1, weight=second.norm_1.weight * np.float32("nan")))
    model.weights = dataclasses.replace(model.weights, blocks=(first, broken, *rest))
    whole, damaged, *_ = trace(model, IDS, top=2, maps=True).layers
    assert np.isfinite(whole.out).all()
    assert np.isfinite(whole.lens.probabilities).all()
    assert np.isnan(damaged.out).all()
    assert np.isnan(damaged.entropy).all()
    assert np.isnan(damaged.lens.probabilities).all()
    assert np.isnan(damaged.lens.entropy).all()
    assert (damaged.lens.ids == -1).all()
    assert (damaged.lens.rank == -1).all()


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "WEIGHTS", 2**20)
    monkeypatch.setattr(tracing, "LOGITS", 2**20)
    model, ids = toyllm.load("tales-gpt2"), list(range(500))
    trace(model, ids[:1])  # compiles
    tracemalloc.start()
    trace(model, ids, top=5)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    all_logits = len(ids) * model.vocab_size * len(model.weights.blocks) * 4
    assert most < all_logits / 2


def test_progress_counts_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    trace(load("gpt2", prefill_chunk=10), IDS, progress=lambda *counts: told.append(counts))
    assert told == [(10, 37), (20, 37), (30, 37), (37, 37)]


def test_a_budget_of_experts_has_the_models_own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "WEIGHTS", 1)
    assert tracing.pass_rows(load("gpt_oss"), len(IDS)) == 1
    assert tracing.pass_rows(load("gpt_oss", moe="budget"), len(IDS)) == 512


def test_what_cannot_be_traced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("gpt2")
    with pytest.raises(ToyllmError, match=r"^a prompt of 0 tokens: expected 1 to 64, the positions this model has$"):
        trace(model, [])
    with pytest.raises(ToyllmError, match=r"^a prompt of 65 tokens"):
        trace(model, [1] * 65)
    with pytest.raises(ToyllmError, match=r"^token id 97 "):
        trace(model, [97])
    with pytest.raises(ToyllmError, match=r"^layer 9: expected 0 to 2$"):
        trace(model, IDS, [0, 9])
    monkeypatch.setattr(tracing, "MAPS", 1000)
    with pytest.raises(ToyllmError, match=r"^attention maps of 37 tokens and 3 layers: expected at most 1000 bytes; take fewer layers$"):
        trace(model, IDS, maps=True)
    assert trace(model, IDS).layers[0].maps is None
