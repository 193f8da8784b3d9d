"""GPT-OSS held against transformers and torch as they are installed: random checkpoints in every dialect, and tales-gpt-oss."""

import contextlib
import importlib
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
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        dialects = importlib.import_module("gpt_oss_checkpoints")
        maker = importlib.import_module("make_gpt_oss_goldens")

pytestmark = pytest.mark.live
EMBEDDED = Path(toyllm.__file__).parent / "models" / "embedded" / "tales-gpt-oss"
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


def draw(seed: int) -> Any:
    """A case of the goldens' maker, every size, option and dialect drawn at random."""
    rng = np.random.default_rng(seed)

    def one_of(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    G, E, L = one_of(1, 2, 3), one_of(5, 6, 8), one_of(1, 2, 3)
    sizes = {"D": one_of(32, 64, 96), "F": one_of(32, 64), "H": G * one_of(1, 2, 3, 4), "G": G, "Dh": one_of(8, 10, 16, 32), "E": E}
    shape = dialects.shape(**sizes, k=one_of(1, 2, 3, 4), L=L, window=one_of(1, 2, 5, 16, 31, 128))
    yarn = dialects.YARN | {"factor": one_of(4.0, 16.0, 32.0), "beta_fast": one_of(3.0, 4.0, 8.0)}
    config = {"vocab_size": one_of(61, 97, 200), "rope_theta": one_of(1000.0, 10_000.0, 150_000.0), "rope_scaling": yarn}
    dialect = one_of("hf", "hf", "transformers 5", "original")
    if dialect == "original":
        written = one_of(dialects.one_file, dialects.two_dashes)
        return maker.Case(shape, config, dialects.openai, stored=dialects.original, written=written)
    if one_of(True, False, False):
        config["layer_types"] = [one_of("full_attention", "sliding_attention") for _ in range(L)]
    config |= {"rms_norm_eps": one_of(1e-5, 1e-6, 1e-3), "swiglu_limit": one_of(7.0, 7.0, 3.0)}
    config |= {"tie_word_embeddings": one_of(True, False, False), "hf_rope_impl": one_of(True, True, False)}
    if dialect == "transformers 5":
        config["rope_scaling"] = one_of(yarn, {"rope_type": "default"})
    spelled = dialects.transformers_5 if dialect == "transformers 5" else one_of(dialects.published, dialects.without("experts_per_token"))
    experts, written = one_of("mxfp4", "mxfp4", "bf16"), one_of(dialects.one_file, dialects.from_zero)
    return maker.Case(shape, config, spelled, experts, written=written)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest token `count` times: the prompt in one pass, then one token a pass."""
    cache, ids, fed = model.new_cache(), list(prompt), 0
    for _ in range(count):
        tokens, positions = np.asarray(ids[fed:]), np.arange(fed, len(ids))
        fed = len(ids)
        ids.append(int(model.forward(tokens, positions, np.zeros_like(tokens), cache)[-1].argmax()))
    return ids[len(prompt) :]


def leading(clear: Any) -> int:
    """How many are true before the first that is not."""
    return int(clear.long().cumprod(0).sum())


def compare(folder: Path, theirs: Any, T: int) -> None:
    """Logits of a prompt and the greedy ids after it, up to the first token whose experts, or the first id, are a close call.

    Of some random prompts it is the one that gets furthest.
    """

    def decided(ids: Any) -> int:
        return leading(maker.clear_choices(theirs, ids)[0] > maker.GAP)

    with quiet():
        prompts = torch.from_numpy(np.random.default_rng(T).integers(0, theirs.config.vocab_size, (5, 1, T)))
        prompt = max(prompts, key=decided)
        ids = maker.greedily(theirs, prompt)
        logits, following = theirs(ids).logits[0].numpy(), maker.clear_choices(theirs, ids)[1]
        rows = decided(ids)
    count = max(min(leading(following[T - 1 : -1] > maker.MARGIN), rows - T + 1), 0)
    for exact, tolerance in ((True, 1e-4), (False, 2e-3)):
        ours = toyllm.load(str(folder), exact=exact)
        assert error(ours.logits(ids[0].tolist())[:rows], logits[:rows]) < tolerance
        assert greedy(ours, prompt[0].tolist(), count) == ids[0, T : T + count].tolist()


@pytest.mark.parametrize("seed", range(24))
def test_random_checkpoints_agree(seed: int, tmp_path: Path) -> None:
    case = draw(seed)
    with quiet():
        maker.write_checkpoint(tmp_path / "model", case)
        theirs = maker.load(case)
    compare(tmp_path / "model", theirs, T=int(np.random.default_rng(seed).integers(1, 200)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_checkpoints_that_transformers_saved_again_agree(dtype: str, tmp_path: Path) -> None:
    with quiet():
        saved = maker.load(maker.Case(dialects.SMALL, experts="bf16")).to(getattr(torch, dtype))
        saved.save_pretrained(tmp_path, max_shard_size="40KB")
        theirs = transformers.GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    compare(tmp_path, theirs, T=60)


@pytest.mark.skipif(not EMBEDDED.is_dir(), reason="tales-gpt-oss is not there")
def test_the_embedded_stories_agree() -> None:
    ours = toyllm.load("tales-gpt-oss", exact=True)
    prompt = 4 * ours.tokenizer.encode(STORY)  # beyond the window of 64
    with quiet():
        settings = {"dtype": torch.float32, "attn_implementation": "eager"}
        settings["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        theirs = transformers.GptOssForCausalLM.from_pretrained(EMBEDDED, **settings).eval()
        logits = theirs(torch.tensor([prompt])).logits[0].numpy()
    assert len(prompt) > theirs.config.sliding_window
    assert error(ours.logits(prompt), logits) < 1e-4
