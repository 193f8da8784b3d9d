"""GPT-2 held against transformers and torch as they are installed: random checkpoints under random options, and tales-gpt2."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm

with warnings.catch_warnings():  # their imports deprecate this and that
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.live
EMBEDDED = Path(toyllm.__file__).parent / "models" / "embedded"
STORY = "Once upon a time there lived in the forest an old woodcutter and his three daughters, and the youngest of them "


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Their warnings are not ours to fail on; nor are their bars to be seen."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def error(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b| / max|b|."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max())


def draw(seed: int) -> tuple[Any, dict[str, Any]]:
    """A GPT-2 configuration and how its checkpoint is saved, every option drawn at random."""
    rng = np.random.default_rng(seed)

    def one_of(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    H, Dh = one_of(1, 2, 3, 4, 5, 8), one_of(1, 5, 8, 16, 20, 64)
    config = transformers.GPT2Config(
        vocab_size=one_of(61, 97, 256, 1000),
        n_positions=one_of(64, 90, 128),
        n_embd=H * Dh,
        n_head=H,
        n_layer=one_of(1, 2, 3),
        n_inner=one_of(None, None, 8, 33, 200),
        activation_function=one_of("gelu_new", "gelu_new", "gelu"),
        layer_norm_epsilon=one_of(1e-5, 1e-6, 1e-3),
        scale_attn_weights=one_of(True, True, False),
        scale_attn_by_inverse_layer_idx=one_of(True, False),
        reorder_and_upcast_attn=one_of(True, False),
        tie_word_embeddings=one_of(True, True, False),
        bos_token_id=None,
        eos_token_id=None,
    )
    backbone = config.tie_word_embeddings and one_of(True, False)  # saved without the head, names without `transformer.`
    saving = {"dtype": one_of("float32", "float32", "float16", "bfloat16"), "shards": one_of(False, True), "backbone": backbone}
    return config, saving


def save_random(folder: Path, seed: int) -> None:
    """A checkpoint of the drawn configuration, none of its values a zero or a one."""
    config, saving = draw(seed)
    model = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(seed)
    for name, values in model.named_parameters():
        is_norm_weight = values.ndim == 1 and name.endswith("weight")
        is_conv1d = values.ndim == 2 and ".h." in name
        std = 1.5 / len(values) ** 0.5 if is_conv1d else 0.1
        values.copy_(float(is_norm_weight) + std * torch.randn(values.shape, generator=generator))
    saved = (model.transformer if saving["backbone"] else model).to(getattr(torch, saving["dtype"]))
    saved.save_pretrained(folder, **({"max_shard_size": "20KB"} if saving["shards"] else {}))


def reference(folder: Path) -> Any:
    """The checkpoint as transformers runs it in f32, eagerly."""
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest token `count` times: the prompt in one pass, then one token a pass."""
    cache, ids, fed = model.new_cache(), list(prompt), 0
    for _ in range(count):
        tokens, positions = np.asarray(ids[fed:]), np.arange(fed, len(ids))
        fed = len(ids)
        ids.append(int(model.forward(tokens, positions, np.zeros_like(tokens), cache)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("seed", range(36))
def test_random_checkpoints_agree(seed: int, tmp_path: Path) -> None:
    with quiet():
        save_random(tmp_path, seed)
        theirs = reference(tmp_path)
        rng = np.random.default_rng(seed)
        T = int(rng.integers(1, min(61, theirs.config.n_positions - 28)))
        prompt = torch.from_numpy(rng.integers(0, theirs.config.vocab_size, (1, T)))
        logits = theirs(prompt).logits[0].numpy()
        ids = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=30)[0, T:].tolist()
    ours = toyllm.load(str(tmp_path))
    assert error(ours.logits(prompt[0].tolist()), logits) < 1e-4
    assert greedy(ours, prompt[0].tolist(), 30) == ids


def test_the_embedded_stories_agree() -> None:
    ours = toyllm.load("tales-gpt2")
    prompt = ours.tokenizer.encode(STORY)
    with quiet():
        theirs = reference(EMBEDDED / "tales-gpt2")
        logits = theirs(torch.tensor([prompt])).logits[0].numpy()
        theirs.generation_config.eos_token_id = None
        settings = {"do_sample": False, "max_new_tokens": 30, "attention_mask": torch.ones(1, len(prompt))}
        ids = theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    assert error(ours.logits(prompt), logits) < 1e-4
    assert greedy(ours, prompt, 30) == ids
