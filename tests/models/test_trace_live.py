"""The inside of both embedded models held against transformers and torch as they are installed: lens, entropies, norms, routing."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.models.location import EMBEDDED
from toyllm.models.trace import trace

with warnings.catch_warnings():  # their imports deprecate this and that
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.live
STORY = "Once upon a time there lived in the forest an old woodcutter and his three daughters, and the youngest of them "
GAP = 1e-3  # between router logits of the last expert chosen and the first one not: a smaller one is no choice


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Their warnings are not ours to fail on; nor are their bars to be seen."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def load(name: str) -> Any:
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if name == "tales-gpt-oss":
        settings["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED / name, **settings).eval()


def watch(modules: list[Any]) -> list[Any]:
    """What each module will give, filled as the model runs."""
    found: list[Any] = [None] * len(modules)
    for i, module in enumerate(modules):
        module.register_forward_hook(lambda module, given, result, i=i: found.__setitem__(i, result))
    return found


def whole_entropy(weights: Any) -> np.ndarray:
    """Of rows [..., S] in f64, and of what they lack to 1."""
    p = torch.cat([weights.double(), (1 - weights.double().sum(-1, keepdim=True)).clamp(min=0)], -1)
    return torch.special.entr(p).sum(-1).numpy()


@pytest.mark.parametrize("name", ["tales-gpt2", "tales-gpt-oss"])
def test_what_is_inside_is_what_transformers_computes(name: str) -> None:
    ours = toyllm.load(name, exact=True)
    ids = (12 * ours.tokenizer.encode(STORY))[:300]  # beyond the window of 64
    assert len(ids) == 300
    found = trace(ours, ids, top=1)
    with quiet():
        theirs = load(name)
        base, moe = theirs.base_model, name == "tales-gpt-oss"
        blocks = list(base.layers if moe else base.h)
        outs = watch(blocks)
        mids = [None] * len(blocks)
        for i, block in enumerate(blocks):
            norm_2 = block.post_attention_layernorm if moe else block.ln_2
            norm_2.register_forward_pre_hook(lambda module, given, i=i: mids.__setitem__(i, given[0]))
        routers = watch([block.mlp.router for block in blocks] if moe else [])
        result = theirs(torch.tensor([ids]), output_attentions=True)
        lens = []
        for out in outs:
            x = (out[0] if isinstance(out, tuple) else out)[0]
            normed = base.norm(x) if moe else base.ln_f(x)
            lens.append((x, torch.softmax(theirs.lm_head(normed).double(), -1).numpy()))
    np.testing.assert_allclose(lens[-1][1], torch.softmax(result.logits[0].double(), -1).numpy(), atol=1e-6)
    decided = np.ones(len(ids), bool)  # no expert was a close call for this token so far; what it attends to has little of others'
    for layer, (x, p), attention, mid in zip(found.layers, lens, result.attentions, mids, strict=True):
        if moe:
            logits, scores, chosen = (part.numpy() for part in routers[layer.number])
            ordered = -np.sort(-logits, axis=-1)
            decided &= ordered[:, 1] - ordered[:, 2] > GAP
            routing = layer.routing
            assert routing is not None
            np.testing.assert_array_equal(np.sort(routing.experts)[decided], np.sort(chosen)[decided])
            np.testing.assert_allclose(routing.weights[decided], -np.sort(-scores)[decided], atol=1e-4)
            assert np.abs(routing.counts - np.bincount(chosen.ravel(), minlength=8)).sum() <= 2 * 2 * (~decided).sum()
        np.testing.assert_allclose(layer.entropy, whole_entropy(attention[0]), atol=2e-4)
        if layer.sink is not None:
            np.testing.assert_allclose(layer.sink, 1 - attention[0].double().sum(-1).numpy(), atol=1e-4)
        for norms, stream in ((layer.resid_mid, mid[0]), (layer.out, x)):  # type: ignore[index]
            np.testing.assert_allclose(norms[decided], stream.double().norm(dim=-1).numpy()[decided], rtol=1e-4)
        np.testing.assert_allclose(layer.lens.probabilities[decided, 0], p.max(-1)[decided], atol=1e-4)
        clear = decided & (-np.partition(-p, 1, -1)[:, 1] < p.max(-1) * 0.999)
        np.testing.assert_array_equal(layer.lens.ids[clear, 0], p.argmax(-1)[clear])
        entropies = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
        np.testing.assert_allclose(layer.lens.entropy[decided], entropies[decided], atol=1e-3)
    assert decided.mean() > 0.9
