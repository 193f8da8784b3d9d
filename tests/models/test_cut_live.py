"""Cut checkpoints as transformers loads them: nothing missing, nothing left over, and the logits that toyllm computes."""

import contextlib
import importlib
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.models.cut import Wanted, cut

with warnings.catch_warnings():  # their imports deprecate this and that
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        dialects = importlib.import_module("gpt_oss_checkpoints")
        maker = importlib.import_module("make_gpt_oss_goldens")

pytestmark = pytest.mark.live
help_ = runpy.run_path(str(Path(__file__).parent / "cut_help.py"))
at, tensors_of, ids_for = (help_[name] for name in ("at", "tensors_of", "ids_for"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Their warnings are not ours to fail on; nor are their bars to be seen."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def load(folder: Path) -> Any:
    """The model in f32, eager, MXFP4 dequantised; fails where a weight is missing, left over or of another shape."""
    config = transformers.AutoConfig.from_pretrained(folder)
    settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if getattr(config, "quantization_config", None):
        settings["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    left_over = [name for name in report["unexpected_keys"] if not name.endswith("attn.masked_bias")]  # a buffer of older versions
    assert (list(report["missing_keys"]), list(report["mismatched_keys"]), left_over) == ([], [], [])
    return model.eval()


def agree(folder: Path, T: int = 24) -> None:
    """Hold both runs of a checkpoint against one another."""
    ids = ids_for(folder, T)
    with quiet():
        theirs = load(folder)(torch.tensor([ids])).logits[0].numpy()
    ours = toyllm.load(str(folder), exact=True).logits(ids)
    assert np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max() < 1e-4


GPT2 = [
    Wanted(layers=3),
    Wanted(layers=(0, 2, 5), dialect="hf", dtype="F32"),
    Wanted(dialect="bare", shard_size=3_000_000),
    Wanted(dialect="hf", dtype="F16", shard_size=3_000_000),
]
GPT_OSS = [
    Wanted(layers=2, experts=(0, 3, 7)),
    Wanted(layers=(1, 2), shard_size=3_000_000),
    Wanted(experts=4, expert_dtype="BF16"),
    Wanted(layers=1, expert_dtype="F32", dtype="F32"),
    Wanted(experts=1),
    Wanted(dialect="bare"),
]


@pytest.mark.parametrize("wanted", GPT2)
@pytest.mark.parametrize("source", ["tales-gpt2"])
def test_cuts_of_gpt2_load_and_agree(tmp_path: Path, source: str, wanted: Wanted) -> None:
    cut(at(source), tmp_path / "out", wanted)
    agree(tmp_path / "out")


@pytest.mark.parametrize("case", ["buffers", "head_untied", "names_mixed", "scale_attn_by_inverse_layer_idx"])
@pytest.mark.parametrize("dialect", ["hf", "bare"])
def test_goldens_of_gpt2_load_in_either_dialect(tmp_path: Path, case: str, dialect: str) -> None:
    cut(at(f"gpt2/{case}"), tmp_path / "out", Wanted(layers=1, dialect=dialect))
    agree(tmp_path / "out")


@pytest.mark.parametrize("wanted", GPT_OSS)
def test_cuts_of_gpt_oss_load_and_agree(tmp_path: Path, wanted: Wanted) -> None:
    cut("tales-gpt-oss", tmp_path / "out", wanted)
    agree(tmp_path / "out")


@pytest.mark.parametrize("case", ["original", "original_sharded"])
@pytest.mark.parametrize("expert_dtype", [None, "BF16"])
def test_openais_own_checkpoints_load_once_they_have_hugging_faces_names(tmp_path: Path, case: str, expert_dtype: str | None) -> None:
    cut(at(f"gpt_oss/{case}"), tmp_path / "out", Wanted(dialect="hf", experts=3, expert_dtype=expert_dtype))
    agree(tmp_path / "out")


def test_what_transformers_saved_becomes_mxfp4_again(tmp_path: Path) -> None:
    cut(at("gpt_oss/sharded"), tmp_path / "dense", Wanted(expert_dtype="BF16"))
    with quiet():
        load(tmp_path / "dense").bfloat16().save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    for source in ("dense", "saved"):
        cut(str(tmp_path / source), tmp_path / f"{source} again", Wanted(expert_dtype="MXFP4", merge=True))
    agree(tmp_path / "saved again")
    assert tensors_of(tmp_path / "saved again") == tensors_of(tmp_path / "dense again")


@pytest.mark.parametrize("seed", range(6))
def test_random_checkpoints_cut_at_random_agree(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts = ("mxfp4", "bf16")[seed % 2]
    case = maker.Case(dialects.DEEP if seed < 4 else dialects.ODD, experts=experts)
    maker.write_checkpoint(tmp_path / "in", case)
    L, E = case.full_config["num_hidden_layers"], case.full_config["num_local_experts"]
    layers = tuple(sorted(rng.choice(L, 2, replace=False).tolist())) if L > 2 else 1
    kept = tuple(sorted(rng.choice(E, E - 1, replace=False).tolist()))
    dtype = (None, "F32")[int(rng.integers(2))]
    cut(str(tmp_path / "in"), tmp_path / "out", Wanted(layers=layers, experts=kept, dtype=dtype, shard_size=150_000))
    agree(tmp_path / "out")
