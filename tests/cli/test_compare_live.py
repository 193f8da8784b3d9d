"""The recipe of models/REFERENCES.md, run as it is written but for the model's name, against the embedded models."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toyllm

with warnings.catch_warnings():  # their imports deprecate this and that
    warnings.simplefilter("ignore")
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.live
MODELS = Path(toyllm.__file__).parent / "models"
PAGE = (MODELS / "REFERENCES.md").read_text()
EAGER = 'attn_implementation="eager"'
DEQUANTIZED = "quantization_config=transformers.Mxfp4Config(dequantize=True)"
(RECIPE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
MAPS = dict(re.findall(r"```toml\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))


def run_recipe(model: str) -> None:
    """Write reference.npz into the current folder."""
    recipe = RECIPE.replace("openai-community/gpt2", str(MODELS / "embedded" / model))
    if model == "tales-gpt-oss":
        assert DEQUANTIZED in PAGE
        recipe = recipe.replace(EAGER, f"{EAGER}, {DEQUANTIZED}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(recipe, "REFERENCES.md", "exec"), {})


def test_the_recipe_has_ten_lines() -> None:
    assert len([line for line in RECIPE.splitlines() if line]) == 10


@pytest.mark.parametrize(("model", "mapped", "count"), [("tales-gpt2", "gpt2.toml", 75), ("tales-gpt-oss", "gpt_oss.toml", 51)])
def test_the_recipe_makes_a_reference(
    toyllm: Callable[..., Any], model: str, mapped: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(mapped).write_text(MAPS[mapped])
    run_recipe(model)
    outcome = toyllm("compare", model, "reference.npz", "--map", mapped, "--exact", "--rtol", "1e-5")
    assert outcome.code == 0
    assert outcome.out.startswith(f"They agree within rtol 1e-05, atol 0: {count} activations; ")
    assert not re.search("has nothing of these names", outcome.err)
