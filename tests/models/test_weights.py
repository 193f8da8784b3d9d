"""Tensors and the architecture that wants them: names in both dialects, and one line for each way they can disagree."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import toyllm
from toyllm.kernels.dtypes import F16, F32, to_f16
from toyllm.kernels.errors import ToyllmError
from toyllm.models import gpt2
from toyllm.models.checkpoint import Tensor, open_checkpoint
from toyllm.models.config import load_config
from toyllm.models.location import find_model
from toyllm.models.weights import match, matrix, vector

BASELINE = Path(__file__).parent / "goldens" / "gpt2" / "baseline"
Tensors = dict[str, np.ndarray]
Save = Callable[..., Path]


@pytest.fixture
def tensors() -> Tensors:
    """The tensors of a small GPT-2 that runs."""
    return load_file(BASELINE / "model.safetensors")


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(tensors: Tensors, **config: object) -> Path:
        save_file({name: np.array(array, order="C") for name, array in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(json.loads((BASELINE / "config.json").read_text()) | config))
        return tmp_path

    return save


def refusal(folder: Path) -> str:
    """The one line that loading ends with, without the file."""
    with pytest.raises(ToyllmError) as refused:
        toyllm.load(str(folder))
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(f"{folder}/model.safetensors: ")
    return message.removeprefix(f"{folder}/model.safetensors: ")


def test_the_baseline_loads(tensors: Tensors, save: Save) -> None:
    ids = [1, 2, 3]
    np.testing.assert_array_equal(toyllm.load(str(save(tensors))).logits(ids), toyllm.load(str(BASELINE)).logits(ids))


def test_names_carry_their_prefix_or_not_mixed_freely(tensors: Tensors, save: Save) -> None:
    mixed = {name.removeprefix("transformer.") if i % 2 else name: array for i, (name, array) in enumerate(tensors.items())}
    assert mixed.keys() != tensors.keys()
    ids = [1, 2, 3]
    np.testing.assert_array_equal(toyllm.load(str(save(mixed))).logits(ids), toyllm.load(str(BASELINE)).logits(ids))


def test_a_missing_tensor_is_named_and_the_others_counted(tensors: Tensors, save: Save) -> None:
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    assert refusal(save(tensors)) == "tensor h.1.mlp.c_fc.bias missing; download the checkpoint again"
    del tensors["transformer.h.2.mlp.c_fc.bias"]
    assert refusal(save(tensors)) == "tensor h.1.mlp.c_fc.bias and 1 more missing; download the checkpoint again"


def test_a_layer_more_or_less_in_the_config_shows(tensors: Tensors, save: Save) -> None:
    assert re.match(r"tensor h\.3\.\S+ and 11 more missing", refusal(save(tensors, n_layer=4)))
    assert re.match(r"tensor transformer\.h\.2\.\S+ is not part of this architecture", refusal(save(tensors, n_layer=2)))


def test_an_extra_tensor_is_named(tensors: Tensors, save: Save) -> None:
    tensors["score.weight"] = np.zeros((2, 24), np.float32)
    assert refusal(save(tensors)) == "tensor score.weight is not part of this architecture; is config.json the right one?"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("h.0.attn.c_attn.weight", np.transpose, r"expected shape \[24, 72\], found \[72, 24\]"),
        ("wte.weight", np.transpose, r"expected shape \[97, 24\], found \[24, 97\]"),
        ("wpe.weight", lambda a: a[:-1], r"expected shape \[64, 24\], found \[63, 24\]"),
        ("h.2.ln_1.weight", lambda a: a[None], r"expected shape \[24\], found \[1, 24\]"),
        ("h.2.ln_1.bias", lambda a: a[0], r"expected shape \[24\], found \[\]"),
        ("ln_f.bias", lambda a: a[:0], r"expected shape \[24\], found \[0\]"),
    ],
)
def test_a_wrong_or_transposed_shape_is_named_with_both(
    tensors: Tensors, save: Save, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    full = f"transformer.{name}"
    tensors[full] = np.asarray(change(tensors[full]))
    assert re.fullmatch(rf"tensor {re.escape(full)}: {message}", refusal(save(tensors)))


def test_a_weight_under_two_names_is_refused(tensors: Tensors, save: Save) -> None:
    tensors["ln_f.bias"] = tensors["transformer.ln_f.bias"]
    found = refusal(save(tensors))
    names = r"(transformer\.ln_f\.bias and ln_f\.bias|ln_f\.bias and transformer\.ln_f\.bias)"
    assert re.fullmatch(rf"tensors {names} are the same weight; keep one", found)


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int64, np.uint8, bool])
@pytest.mark.parametrize("name", ["transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.weight", "transformer.wpe.weight"])
def test_a_dtype_without_kernels_is_named(tensors: Tensors, save: Save, name: str, dtype: type) -> None:
    tensors[name] = tensors[name].astype(dtype)
    assert re.fullmatch(rf"tensor {re.escape(name)}: expected F32, F16 or BF16, found [A-Z0-9]+", refusal(save(tensors)))


@pytest.mark.parametrize("name", ["transformer.h.0.attn.bias", "h.2.attn.masked_bias"])
def test_buffers_of_the_causal_mask_are_passed_over_whatever_they_hold(tensors: Tensors, save: Save, name: str) -> None:
    tensors[name] = np.ones((1, 1, 64, 64), np.uint8)
    assert toyllm.load(str(save(tensors))).logits([1]).shape == (1, 97)


@pytest.mark.parametrize("name", ["h.x.attn.bias", "h.0.attn.bias.more", "transformer.transformer.ln_f.bias", ""])
def test_names_that_are_only_like_known_ones_are_refused(tensors: Tensors, save: Save, name: str) -> None:
    tensors[name] = np.ones(24, np.float32)
    assert "is not part of this architecture" in refusal(save(tensors))


def test_a_head_of_its_own_is_needed_where_nothing_ties_it(tensors: Tensors, save: Save) -> None:
    assert "lm_head.weight missing" in refusal(save(tensors, tie_word_embeddings=False))
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"][:, ::-1]
    assert toyllm.load(str(save(tensors, tie_word_embeddings=False))).logits([1]).shape == (1, 97)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T
    assert refusal(save(tensors)) == "tensor lm_head.weight: expected shape [97, 24], found [24, 97]"


def test_every_tensor_that_the_architecture_wants_is_matched_once() -> None:
    files = find_model(str(BASELINE))
    _, config = load_config(files)
    checkpoint = open_checkpoint(files)
    found = match(checkpoint, gpt2.specs(config), gpt2.PREFIXES, gpt2.IGNORED)
    assert sorted(tensor.name for tensor in found.values()) == sorted(checkpoint.tensors)
    assert gpt2.specs(config).keys() - found.keys() == {"head"}


def test_matrices_stay_in_the_memory_map_and_vectors_are_widened(tensors: Tensors, save: Save) -> None:
    name, bias = "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.bias"
    tensors[bias] = tensors[bias].astype(np.float16)
    checkpoint = open_checkpoint(find_model(str(save(tensors))))
    found: dict[str, Tensor] = checkpoint.tensors
    stored = matrix(checkpoint, found[name])
    assert stored.dtype == F32
    assert not stored.flags.owndata
    assert not stored.flags.writeable
    assert matrix(checkpoint, found[bias]).dtype == F16
    wide = vector(checkpoint, found[bias])
    assert (wide.dtype, wide.flags.c_contiguous) == (np.float32, True)
    np.testing.assert_array_equal(to_f16(wide).view(np.uint16), tensors[bias].view(np.uint16))
