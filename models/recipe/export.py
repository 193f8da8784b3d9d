"""Turn a trained model into the folder that ships: bf16 weights, experts in MXFP4, configuration, tokenizer, defaults for generation.

    python -m toyllm.models.recipe.export gpt2|gpt_oss TRAINED DATA OUT

TRAINED is what the training script wrote, DATA what the corpus script wrote. Needs neither torch nor transformers.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ...kernels.dtypes import BF16, to_bf16
from ...kernels.errors import ToyllmError
from . import mxfp4
from .script import published, run, say

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
DTYPES = {BF16: "BF16", np.dtype(np.uint8): "U8"}  # as safetensors names them
GENERATION = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
GPT2_KEYS = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "bos_token_id",
    "eos_token_id",
)
GPT_OSS_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "sliding_window",
    "layer_types",
    "max_position_embeddings",
    "rms_norm_eps",
)


def main(arguments: list[str]) -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(prog="toyllm.models.recipe.export", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("architecture", choices=("gpt2", "gpt_oss"), help="which of the two models")
    parser.add_argument("trained", type=Path, metavar="TRAINED", help="the folder that the training script wrote")
    parser.add_argument("data", type=Path, metavar="DATA", help="the folder that the corpus script wrote, for its tokenizer")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    options = parser.parse_args(arguments)
    export(options.architecture, options.trained, options.data, options.out)


def export(architecture: str, trained: Path, data: Path, out: Path) -> None:
    """Write the shipping folder `out` from a trained model and its tokenizer. The same input gives the same bytes."""
    for path, maker in ((trained / "config.json", "train"), (data / "tokenizer.json", "corpus")):
        if not path.is_file():
            raise ToyllmError(f"{path} does not exist. Make it first: python -m toyllm.models.recipe.{maker} --help")
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != architecture:
        raise ToyllmError(f"{trained}/config.json: expected model_type {architecture!r}, found {config.get('model_type')!r}")
    tensors = stored(load_file(trained / "model.safetensors"), tied=architecture == "gpt2")
    with published(out) as partial:
        write_safetensors(partial / "model.safetensors", tensors)
        write_json(partial / "config.json", gpt2_config(config) if architecture == "gpt2" else gpt_oss_config(config))
        write_json(partial / "generation_config.json", GENERATION)
        shutil.copyfile(data / "tokenizer.json", partial / "tokenizer.json")
        shutil.copyfile(trained / "training.json", partial / "training.json")
    say(f"{len(tensors)} tensors, {sum(t.nbytes for t in tensors.values())} bytes of weights in {out}")


def stored(tensors: dict[str, np.ndarray], tied: bool) -> dict[str, np.ndarray]:
    """f32 tensors under the trained names → bf16 tensors, and blocks and scales u8 for experts, under the published names.

    Experts are trained as [E, in, out] and stored as [E, out, in]. A tied head is the embedding, and not stored twice.
    """
    result = {}
    for trained_name, weight in tensors.items():
        name = trained_name.removeprefix("transformer.")
        if name.endswith(EXPERTS):
            result[name + "_blocks"], result[name + "_scales"] = mxfp4.encode(weight.swapaxes(1, 2))
        elif not (tied and name == "lm_head.weight"):
            result[name] = to_bf16(weight)
    return result


def gpt2_config(config: dict[str, Any]) -> dict[str, Any]:
    """The published configuration of a GPT-2, from the one that transformers wrote."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{key: config[key] for key in GPT2_KEYS},
        "n_ctx": config["n_positions"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def gpt_oss_config(config: dict[str, Any]) -> dict[str, Any]:
    """The published configuration of a GPT-OSS, in the keys of OpenAI's own, from the one that transformers wrote."""
    rope = dict(config["rope_parameters"])
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        **{key: config[key] for key in GPT_OSS_KEYS},
        "experts_per_token": config["num_experts_per_tok"],
        "rope_theta": rope.pop("rope_theta"),
        "initial_context_length": rope["original_max_position_embeddings"],
        "rope_scaling": rope,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
        },
    }


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write tensors (BF16 or u8) in the order and with the padding of the safetensors library, whose NumPy side does not know bf16."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # wider first: all stay aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.tobytes())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object to read, in its own order."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
