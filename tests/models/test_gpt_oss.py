"""GPT-OSS: what config.json may say in which spelling, the tensors that follow from it, and one line for each that is not so."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import toyllm
from toyllm.cli.main import run
from toyllm.kernels.errors import ToyllmError
from toyllm.models import gpt_oss
from toyllm.models.checkpoint import open_checkpoint
from toyllm.models.config import effective_config, load_config
from toyllm.models.gpt_oss import Config, specs
from toyllm.models.location import find_model

GOLDENS = Path(__file__).parent / "goldens" / "gpt_oss"
Tensors = dict[str, np.ndarray]

# ---- config.json ------------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, Any] = {  # of gpt-oss-20b, but for what no one reads
    "model_type": "gpt_oss",
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
ORIGINAL = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}
OF_20B = Config(eos_token_id=(200002,), layer_types=("sliding_attention", "full_attention") * 12)


def without(*keys: str, of: dict[str, Any] = PUBLISHED) -> dict[str, Any]:
    return {key: value for key, value in of.items() if key not in keys}


@pytest.fixture
def read(tmp_path: Path) -> Callable[[dict[str, Any]], Config]:
    """A config.json with this content, as it is understood."""

    def read(document: dict[str, Any]) -> Config:
        (tmp_path / "config.json").write_text(json.dumps(document))
        (tmp_path / "model.safetensors").touch()
        return load_config(find_model(str(tmp_path)))[1]

    return read


SPELLINGS = {
    "published": PUBLISHED,
    "k under one name": without("experts_per_token"),
    "k under the other": without("num_experts_per_tok"),
    "rope_parameters": without("rope_scaling", "rope_theta") | {"rope_parameters": PUBLISHED["rope_scaling"] | {"rope_theta": 150000}},
    "the rope's type as type": PUBLISHED | {"rope_scaling": without("rope_type", of=PUBLISHED["rope_scaling"]) | {"type": "yarn"}},
    "original context at the top": PUBLISHED | {"rope_scaling": without("original_max_position_embeddings", of=PUBLISHED["rope_scaling"])},
    "swiglu_alpha": PUBLISHED | {"swiglu_alpha": 1.702},
    "a key of tomorrow": PUBLISHED | {"tomorrow": {"nested": [1, None]}},
}


@pytest.mark.parametrize("document", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_the_same_configuration(read: Callable, document: dict[str, Any]) -> None:
    assert read(document) == OF_20B


def test_openais_own_file_is_understood_without_a_model_type(read: Callable) -> None:
    assert read(ORIGINAL) == Config()
    assert read(ORIGINAL | {"rope_scaling_factor": 16}) == Config(rope_factor=16.0, max_position_embeddings=65536)
    assert read(ORIGINAL | {"rope_ntk_alpha": 2, "rope_ntk_beta": 16}) == Config(rope_beta_slow=2.0, rope_beta_fast=16.0)


def test_layers_alternate_where_the_file_is_silent(read: Callable) -> None:
    for document in (without("layer_types"), PUBLISHED | {"layer_types": None}):
        assert read(document).layer_types is None
        assert read(document).sliding == (True, False) * 12 == OF_20B.sliding
    assert read(PUBLISHED | {"layer_types": ["full_attention"] * 24}).sliding == (False,) * 24


def test_a_null_scaling_is_the_plain_rope_and_silence_is_yarn(read: Callable) -> None:
    assert read(PUBLISHED | {"rope_scaling": None}).rope_type == "default"
    assert read(without("rope_scaling")) == OF_20B
    plain = read(PUBLISHED | {"rope_scaling": None})
    cos, _ = gpt_oss.rotations(plain, np.array([1]))
    np.testing.assert_allclose(cos[0], np.cos(150000.0 ** (-np.arange(32) / 32)), atol=1e-6)


def test_rope_settings_mean_what_they_do_to_transformers_where_they_are_silent(read: Callable) -> None:
    published = PUBLISHED["rope_scaling"]
    assert read(PUBLISHED).rope_truncate is False
    assert read(PUBLISHED | {"rope_scaling": {key: published[key] for key in published if key != "truncate"}}).rope_truncate
    assert read(PUBLISHED | {"rope_scaling": {}}).rope_type == "default"
    assert not read(ORIGINAL).rope_truncate


@pytest.mark.parametrize("settings", [{"attention_factor": 1.3465735902799727}, {"attention_factor": None}, {"mscale": 0.707}])
def test_a_factor_on_the_rope_that_is_yarns_own_is_run(read: Callable, settings: dict[str, Any]) -> None:
    np.testing.assert_array_equal(
        gpt_oss.rotations(read(PUBLISHED | scaling(**settings)), np.array([5])), gpt_oss.rotations(read(PUBLISHED), np.array([5]))
    )


def test_the_files_rope_is_the_published_one(read: Callable) -> None:
    cos, sin = gpt_oss.rotations(read(PUBLISHED), np.array([0, 1]))
    np.testing.assert_allclose(cos[0], 1.3465735902799727, rtol=1e-7)
    angles = np.arctan2(sin[1], cos[1])
    np.testing.assert_allclose(angles[[0, 8, 9, 31]], [1, 5.081327482e-02, 3.170569618e-02, 3.023511428e-07], rtol=1e-5)


def test_pairs_are_interleaved_on_demand(read: Callable) -> None:
    assert read(PUBLISHED).hf_rope_impl
    assert not read(PUBLISHED | {"hf_rope_impl": False}).hf_rope_impl


def test_values_are_told_from_defaults(tmp_path: Path, read: Callable) -> None:
    read(ORIGINAL)
    origins = {key: origin for key, _, origin in effective_config(find_model(str(tmp_path)))}
    assert origins["num_local_experts"] == origins["rope_factor"] == origins["rope_beta_fast"] == "file"
    assert origins["rms_norm_eps"] == origins["rope_truncate"] == origins["layer_types"] == "default"


def scaling(**settings: Any) -> dict[str, Any]:
    return {"rope_scaling": PUBLISHED["rope_scaling"] | settings}


WRONG = [
    ({"num_experts_per_tok": 33}, "num_experts_per_tok: 33 experts a token, but the model has 32"),
    ({"num_local_experts": 3}, "num_experts_per_tok: 4 experts a token, but the model has 3"),
    ({"num_attention_heads": 63}, "num_key_value_heads: 8 does not divide num_attention_heads 63"),
    ({"num_key_value_heads": 128}, "num_key_value_heads: 128 does not divide num_attention_heads 64"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: expected an integer from 1 to 2147483647, found 0"),
    ({"head_dim": 63}, "head_dim: expected an even number for the rotary embedding, found 63"),
    ({"layer_types": ["full_attention"] * 23}, "layer_types: 23 entries for num_hidden_layers 24"),
    ({"layer_types": ["full_attention"] * 23 + ["chunked"]}, "layer_types: expected sliding_attention or full_attention, found 'chunked'"),
    ({"layer_types": "full_attention"}, 'layer_types: expected a list of strings, found "full_attention"'),
    ({"sliding_window": None}, "sliding_window: expected an integer, found null"),
    ({"sliding_window": 0}, "sliding_window: expected an integer from 1 to 2147483647, found 0"),
    ({"rms_norm_eps": 0}, "rms_norm_eps: expected a number above 0, found 0.0"),
    ({"rope_theta": 1}, "rope_theta: expected a number above 1, found 1"),
    ({"rope_theta": float("nan")}, "not valid JSON ('rope_theta': NaN, which JSON does not have); download it again"),
    ({"hidden_size": True}, "hidden_size: expected an integer, found true"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, found 1"),
    (scaling(rope_type="llama3"), "rope_type: expected yarn or default, found 'llama3'"),
    (scaling(rope_type=None), "rope_type: expected a string, found null"),
    (scaling(type="linear"), "rope_type: expected yarn or default, found 'linear'"),
    (scaling(factor=0.5), "rope_factor: expected 1 to 2147483647, found 0.5"),
    (scaling(factor=1e308), "rope_factor: expected 1 to 2147483647, found 1e+308"),
    (scaling(factor=float("inf")), "not valid JSON ('factor': Infinity, which JSON does not have); download it again"),
    (scaling(attention_factor=1.0), "rope_attention_factor: expected YaRN's own for this rope_factor, 1.34657, found 1"),
    (scaling(mscale=1.0, mscale_all_dim=1.0), "rope_attention_factor: expected YaRN's own for this rope_factor, 1.34657, found 1"),
    (scaling(mscale=-1.0), "rope_mscale: expected a number above 0, found -1.0"),
    (scaling(truncate="no"), 'rope_truncate: expected true or false, found "no"'),
    ({"rope_scaling": "dynamic"}, "rope_type: expected yarn or default, found 'dynamic'"),
    ({"rope_scaling": [32]}, "rope_type: expected a string, found [32]"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_what_no_gpt_oss_can_have_is_one_line(tmp_path: Path, read: Callable, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ToyllmError) as refused:
        read(PUBLISHED | changed)
    assert str(refused.value) == f"{tmp_path}/config.json: {message}"


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 1e308, 10**400, -1, True, "32", None])
@pytest.mark.parametrize("length", [4096, 10**400, 0, True, "4096", None])
def test_a_context_that_cannot_be_reckoned_is_no_traceback(read: Callable, factor: Any, length: Any) -> None:
    with pytest.raises(ToyllmError):
        read(ORIGINAL | {"rope_scaling_factor": factor, "initial_context_length": length})


# ---- tensors ----------------------------------------------------------------------------------------------------------------

GLOBAL = {"model.embed_tokens.weight": (201088, 2880), "model.norm.weight": (2880,), "lm_head.weight": (201088, 2880)}
LAYER = {  # the published table, E = 32
    "input_layernorm.weight": (2880,),
    "self_attn.q_proj.weight": (4096, 2880),
    "self_attn.q_proj.bias": (4096,),
    "self_attn.k_proj.weight": (512, 2880),
    "self_attn.k_proj.bias": (512,),
    "self_attn.v_proj.weight": (512, 2880),
    "self_attn.v_proj.bias": (512,),
    "self_attn.o_proj.weight": (2880, 4096),
    "self_attn.o_proj.bias": (2880,),
    "self_attn.sinks": (64,),
    "post_attention_layernorm.weight": (2880,),
    "mlp.router.weight": (32, 2880),
    "mlp.router.bias": (32,),
    "mlp.experts.gate_up_proj_blocks": (32, 5760, 90, 16),
    "mlp.experts.gate_up_proj_scales": (32, 5760, 90),
    "mlp.experts.gate_up_proj_bias": (32, 5760),
    "mlp.experts.down_proj_blocks": (32, 2880, 90, 16),
    "mlp.experts.down_proj_scales": (32, 2880, 90),
    "mlp.experts.down_proj_bias": (32, 2880),
}
OPENAI = {
    "attn.norm.scale": (2880,),
    "attn.qkv.weight": (5120, 2880),
    "attn.qkv.bias": (5120,),
    "attn.sinks": (64,),
    "attn.out.weight": (2880, 4096),
    "attn.out.bias": (2880,),
    "mlp.norm.scale": (2880,),
    "mlp.gate.weight": (32, 2880),
    "mlp.gate.bias": (32,),
    "mlp.mlp1_weight.blocks": (32, 5760, 90, 16),
    "mlp.mlp1_weight.scales": (32, 5760, 90),
    "mlp.mlp1_bias": (32, 5760),
    "mlp.mlp2_weight.blocks": (32, 2880, 90, 16),
    "mlp.mlp2_weight.scales": (32, 2880, 90),
    "mlp.mlp2_bias": (32, 2880),
}
OF_120B = replace(OF_20B, num_hidden_layers=36, num_local_experts=128, layer_types=None)


def wanted(c: Config, *names: str) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in specs(c, frozenset(names)).values()}


def test_tensors_of_the_20b_are_the_published_459() -> None:
    layers = {f"layers.{i}.{name}": shape for i in range(24) for name, shape in LAYER.items()}
    expected = {name.removeprefix("model."): shape for name, shape in GLOBAL.items()} | layers
    assert wanted(OF_20B) == expected
    assert len(expected) == 459
    assert len(wanted(OF_120B)) == 687


def test_tensors_of_the_original_dialect_are_the_published_363() -> None:
    ours = {"embedding.weight": (201088, 2880), "norm.scale": (2880,), "unembedding.weight": (201088, 2880)}
    expected = ours | {f"block.{i}.{name}": shape for i in range(24) for name, shape in OPENAI.items()}
    assert wanted(OF_20B, "embedding.weight") == expected
    assert len(expected) == 363
    assert len(wanted(OF_120B, "embedding.weight")) == 543


def test_dequantised_experts_are_matrices_by_input() -> None:
    found = wanted(OF_20B, "model.layers.0.mlp.experts.gate_up_proj")
    assert found["layers.23.mlp.experts.gate_up_proj"] == (32, 2880, 5760)
    assert found["layers.23.mlp.experts.down_proj"] == (32, 2880, 2880)
    assert len(found) == 24 * 17 + 3
    assert not any(name.endswith(("blocks", "scales")) for name in found)


@pytest.mark.parametrize(("c", "total"), [(OF_20B, 20_914_757_184), (OF_120B, 116_829_156_672)])
@pytest.mark.parametrize("dialect", ["", "embedding.weight", "experts.gate_up_proj"])
def test_parameters_add_up_to_the_published_totals(c: Config, total: int, dialect: str) -> None:
    shapes = wanted(c, dialect)
    counts = {
        name: 0 if name.endswith("scales") else math.prod(shape) * (2 if name.endswith("blocks") else 1) for name, shape in shapes.items()
    }
    assert sum(counts.values()) == total


# ---- checkpoints that are not so --------------------------------------------------------------------------------------------

DIALECTS = ("baseline", "original", "experts_bf16")


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """A folder with these tensors and the configuration of a dialect's golden, changed."""

    def save(case: str, tensors: Tensors, **config: Any) -> Path:
        save_file({name: np.array(array, order="C") for name, array in tensors.items()}, tmp_path / "model.safetensors")
        document = json.loads((GOLDENS / case / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(document | config))
        return tmp_path

    return save


def tensors_of(case: str) -> Tensors:
    return load_file(GOLDENS / case / "model.safetensors")


def refusal(folder: Path) -> str:
    """The one line that loading ends with, without the file."""
    with pytest.raises(ToyllmError) as refused:
        toyllm.load(str(folder))
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(f"{folder}/model.safetensors: ")
    return message.removeprefix(f"{folder}/model.safetensors: ")


LAYER_TENSORS = [(case, name) for case in DIALECTS for name in tensors_of(case) if ".1." in name]


def test_each_dialect_has_the_tensors_that_the_table_counts() -> None:
    assert [sum(case == c for c, _ in LAYER_TENSORS) for case in DIALECTS] == [19, 15, 17]


@pytest.mark.parametrize("case", DIALECTS)
def test_what_is_broken_below_loads_whole(save: Callable, case: str) -> None:
    np.testing.assert_array_equal(
        toyllm.load(str(save(case, tensors_of(case)))).logits([1, 2]), toyllm.load(str(GOLDENS / case)).logits([1, 2])
    )


@pytest.mark.parametrize(("case", "name"), LAYER_TENSORS)
def test_a_wrong_shape_in_any_tensor_of_a_layer_is_one_line(save: Callable, case: str, name: str) -> None:
    tensors = tensors_of(case)
    right = tensors[name]
    wrong = [right[:-1], right[None], right.reshape(-1, 1), np.concatenate([right, right], -1)]
    if right.ndim > 1 and right.shape[0] != right.shape[1]:
        wrong.append(right.swapaxes(0, 1))
    for array in wrong:
        message = refusal(save(case, tensors | {name: array}))
        assert message == f"tensor {name}: expected shape {list(right.shape)}, found {list(array.shape)}"


@pytest.mark.parametrize(("case", "name"), LAYER_TENSORS)
def test_a_missing_tensor_of_a_layer_is_one_line(save: Callable, case: str, name: str) -> None:
    tensors = tensors_of(case)
    del tensors[name]
    if name.endswith("experts.gate_up_proj"):  # only the other layers say that the experts are matrices
        assert any(other.endswith("experts.gate_up_proj") for other in tensors)
    assert refusal(save(case, tensors)) == f"tensor {name.removeprefix('model.')} missing; download the checkpoint again"


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("short", ["blocks", "scales"])
def test_blocks_and_scales_that_disagree_are_one_line(save: Callable, part: str, short: str) -> None:
    name = f"model.layers.2.mlp.experts.{part}_{short}"
    tensors = tensors_of("baseline")
    right = tensors[name]
    tensors[name] = np.concatenate([right, right], 2)
    assert refusal(save("baseline", tensors)) == f"tensor {name}: expected shape {list(right.shape)}, found {list(tensors[name].shape)}"


@pytest.mark.parametrize(
    ("case", "name", "dtype", "message"),
    [
        ("baseline", "model.layers.1.mlp.experts.down_proj_blocks", np.int8, "expected U8, found I8"),
        ("baseline", "model.layers.1.mlp.experts.down_proj_scales", ml_dtypes.float8_e8m0fnu, "expected U8, found F8_E8M0"),
        ("original", "block.1.mlp.mlp1_weight.scales", np.int8, "expected U8, found I8"),
        ("baseline", "model.layers.1.mlp.router.weight", np.uint8, "expected F32, F16 or BF16, found U8"),
        ("baseline", "model.layers.1.self_attn.sinks", np.int64, "expected F32, F16 or BF16, found I64"),
        ("experts_bf16", "model.layers.1.mlp.experts.down_proj", np.float64, "expected F32, F16 or BF16, found F64"),
    ],
)
def test_a_dtype_without_kernels_is_one_line(save: Callable, case: str, name: str, dtype: Any, message: str) -> None:
    tensors = tensors_of(case)
    array = tensors[name]
    tensors[name] = array.view(dtype) if array.itemsize == np.dtype(dtype).itemsize else array.astype(np.float32).astype(dtype)
    assert refusal(save(case, tensors)) == f"tensor {name}: {message}"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", DIALECTS)
def test_weights_may_be_f32_or_f16(save: Callable, case: str, dtype: Any) -> None:
    tensors = {
        name: array if array.dtype == np.uint8 else array.astype(np.float32).astype(dtype) for name, array in tensors_of(case).items()
    }
    found, plain = toyllm.load(str(save(case, tensors))).logits([5, 6, 7]), toyllm.load(str(GOLDENS / case)).logits([5, 6, 7])
    np.testing.assert_allclose(found, plain, atol=1e-5 if dtype == np.float32 else 5e-2)


@pytest.mark.parametrize(("D", "F"), [(80, 32), (64, 48)])
def test_sizes_that_mxfp4_cannot_have_are_one_line(save: Callable, D: int, F: int) -> None:
    message = refusal(save("baseline", tensors_of("baseline"), hidden_size=D, intermediate_size=F))
    assert message == f"MXFP4 needs sizes that are multiples of 32, found hidden_size {D}, intermediate_size {F}"


def test_a_tensor_too_many_is_named(save: Callable) -> None:
    tensors = tensors_of("baseline") | {"model.layers.3.self_attn.sinks": np.zeros(8, np.float32)}
    message = refusal(save("baseline", tensors))
    assert message == "tensor model.layers.3.self_attn.sinks is not part of this architecture; is config.json the right one?"


def test_experts_in_both_forms_are_refused(save: Callable) -> None:
    both = tensors_of("baseline") | {"model.layers.1.mlp.experts.gate_up_proj": np.zeros((8, 64, 64), np.float32)}
    assert refusal(save("baseline", both)).endswith("_blocks is not part of this architecture; is config.json the right one?")


def test_without_a_head_of_its_own_the_embedding_must_be_tied(save: Callable) -> None:
    tensors = tensors_of("baseline")
    head = tensors.pop("lm_head.weight")
    assert refusal(save("baseline", tensors)) == "tensor lm_head.weight missing; download the checkpoint again"
    tied = toyllm.load(str(save("baseline", tensors, tie_word_embeddings=True)))
    assert tied.weights.head.base is tied.weights.embed.base or np.shares_memory(tied.weights.head, tied.weights.embed)
    assert head.shape == tied.weights.embed.shape


def test_matrices_and_experts_stay_in_the_memory_map(save: Callable) -> None:
    for case in DIALECTS:
        model = toyllm.load(str(GOLDENS / case))
        files = [np.memmap(path, np.uint8, "r") for path in open_checkpoint(model.files).shards]
        assert len(files) == 1
        block = model.weights.blocks[0]
        kept = [model.weights.embed, block.q.weight, block.k.weight, block.v.weight, block.out.weight, block.router.weight]
        for experts in (block.experts.gate_up, block.experts.down):
            kept += [experts] if isinstance(experts, np.ndarray) else list(experts)
        for array in kept:
            assert not array.flags.writeable
            assert not array.flags.owndata


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: 9 experts a token, but the model has 8"),
        ({"num_attention_heads": 7}, "num_key_value_heads: 2 does not divide num_attention_heads 7"),
        ({"num_local_experts": 7}, "expected shape [7, "),
        ({"sliding_window": "128"}, 'sliding_window: expected an integer, found "128"'),
    ],
)
def test_the_command_ends_in_one_line_and_exit_code_1(
    save: Callable, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], message: str
) -> None:
    folder = save("baseline", tensors_of("baseline"), **changed)
    assert run(["generate", "-m", str(folder), "--prompt-ids", "1 2", "--max-tokens", "1"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
