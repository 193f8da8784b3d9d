"""Write the weights of a checkpoint that make_gpt2.py or make_gpt_oss.py made as a GGUF file: the same numbers, for llama.cpp.

    python benchmarks/make_gguf.py CHECKPOINT OUT.gguf

bf16, f16 and f32 matrices keep their dtype and MXFP4 its codes and scales, in GGUF's layout: nothing is rounded. As llama.cpp's own
converter does, vectors, GPT-2's position table and gpt-oss's router become f32 (exactly), GPT-2's matrices are transposed to
[out, in], and gate and up, interleaved row by row in the checkpoint, become two tensors. There is no tokenizer: token ids alone run it.
Memory stays at the largest tensor. Needs the gguf package.

llama.cpp rounds the bounds of YaRN's ramp to whole dimensions whatever the file says. It computes the same model as the checkpoint
only where config.json says `"truncate": true` among its rope settings, so nothing else is accepted.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toyllm.kernels.dtypes import BF16, F16, F32, widen
from toyllm.kernels.errors import ToyllmError
from toyllm.models import gpt2
from toyllm.models.checkpoint import Checkpoint, open_checkpoint
from toyllm.models.config import load_config
from toyllm.models.location import find_model

KINDS = {F32: "F32", F16: "F16", BF16: "BF16"}  # GGUF's names of the dtypes
GPT2 = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
GPT_OSS = {
    "embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.sinks": "attn_sinks.weight",
    "post_attention_layernorm": "post_attention_norm",
    "mlp.router": "ffn_gate_inp",
}
LAYER = re.compile(r"(?:h|layers)\.(\d+)\.")
AS_F32 = ("position_embd.weight", "ffn_gate_inp.weight")  # matrices that llama.cpp's converter widens


@dataclass(frozen=True)
class Part:
    """A tensor of the GGUF file."""

    name: str
    kind: str  # GGUF's name of the format
    shape: tuple[int, ...]  # in bytes along the last axis
    data: Callable[[], np.ndarray]  # u8 of that shape


def repack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """MXFP4 blocks u8 [..., n, 16] and scales u8 [..., n] in GGUF's layout, u8 [..., 17 n].

    A block is its scale and 16 bytes; byte i holds element i in its low nibble and element i + 16 in its high one.
    """
    elements = np.stack((blocks & 15, blocks >> 4), -1).reshape(*scales.shape, 32)
    codes = elements[..., :16] | elements[..., 16:] << 4
    return np.concatenate((scales[..., None], codes), -1).reshape(*scales.shape[:-1], -1)


def plain(name: str, array: np.ndarray, transpose: bool = False) -> Part:
    """A tensor that is no MXFP4: a matrix as stored, or anything else in f32."""
    wide = array.ndim == 1 or name.endswith(("bias", *AS_F32))
    item = 4 if wide else array.itemsize
    shape = array.shape[::-1] if transpose else array.shape

    def data() -> np.ndarray:
        values = np.ascontiguousarray(array.T if transpose else array)
        return (widen(values) if wide else values).view(np.uint8)

    return Part(name, "F32" if wide else KINDS[array.dtype], (*shape[:-1], shape[-1] * item), data)


def mxfp4(name: str, blocks: np.ndarray, scales: np.ndarray) -> Part:
    """The matrices of all experts, blocks [E, N, n, 16] and scales [E, N, n]."""
    shape = (*scales.shape[:-1], 17 * scales.shape[-1])

    def data() -> np.ndarray:
        out = np.empty(shape, np.uint8)
        for e in range(len(out)):  # one by one: codes apart take twice their bytes
            out[e] = repack(blocks[e], scales[e])
        return out

    return Part(name, "MXFP4", shape, data)


def rename(name: str, table: dict[str, str]) -> str | None:
    """GGUF's name of a tensor; None of one that has another form there (experts), or none (masks)."""
    short = name.removeprefix("model.")
    layer = LAYER.match(short)
    rest = short[layer.end() :] if layer else short
    stem = next((known for known in table if f"{rest}.".startswith(f"{known}.")), None)
    return None if stem is None else (f"blk.{layer[1]}." if layer else "") + table[stem] + rest[len(stem) :]


def gpt2_parts(checkpoint: Checkpoint) -> Iterator[Part]:
    """GPT-2's tensors, its matrices [in, out] transposed."""
    for name in checkpoint.tensors:
        if to := rename(name, GPT2):
            yield plain(to, checkpoint.array(name), transpose=".c_" in name and name.endswith("weight"))


def gpt_oss_parts(checkpoint: Checkpoint) -> Iterator[Part]:
    """GPT-OSS's tensors, gate and up apart."""
    for name in checkpoint.tensors:
        if to := rename(name, GPT_OSS):
            yield plain(to, checkpoint.array(name))
    for name in checkpoint.tensors:
        if name.endswith("_blocks"):
            stem, layer = name.removesuffix("_blocks"), name.split(".")[2]
            split = (("gate", 0, 2), ("up", 1, 2)) if "gate_up" in stem else (("down", 0, 1),)
            bias, blocks, scales = (checkpoint.array(f"{stem}_{part}") for part in ("bias", "blocks", "scales"))
            for to, first, step in split:
                yield plain(f"blk.{layer}.ffn_{to}_exps.bias", bias[:, first::step])
                yield mxfp4(f"blk.{layer}.ffn_{to}_exps.weight", blocks[:, first::step], scales[:, first::step])


def describe(writer: Any, c: Any) -> None:
    """What llama.cpp wants to know of a model, and that it has no tokenizer."""
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.context)
    if isinstance(c, gpt2.Config):
        writer.add_block_count(c.n_layer)
        writer.add_embedding_length(c.n_embd)
        writer.add_feed_forward_length(c.inner)
        writer.add_head_count(c.n_head)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
        return
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_expert_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_expert_count(c.num_local_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_sliding_window(c.sliding_window)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_string("gpt-oss.rope.scaling.type", "yarn")
    writer.add_rope_scaling_factor(c.rope_factor)
    writer.add_rope_scaling_orig_ctx_len(c.rope_original_context)


def write_gguf(checkpoint_folder: Path, out: Path) -> int:
    """Write `out`, which must not exist; its size. Raises ToyllmError for another model than the two makers'."""
    from gguf import GGMLQuantizationType, GGUFWriter

    files = find_model(str(checkpoint_folder))
    family, config = load_config(files)
    is_gpt2 = family is gpt2
    if not is_gpt2 and not config.rope_truncate:
        raise ToyllmError(f'{files.config}: llama.cpp rounds YaRN\'s bounds; set "truncate": true among the rope settings')
    checkpoint = open_checkpoint(files)
    parts = list((gpt2_parts if is_gpt2 else gpt_oss_parts)(checkpoint))
    writer = GGUFWriter(out, "gpt2" if is_gpt2 else "gpt-oss")
    describe(writer, config)
    for part in parts:
        writer.add_tensor_info(part.name, part.shape, np.dtype(np.uint8), math.prod(part.shape), GGMLQuantizationType[part.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for part in parts:
        writer.write_tensor_data(part.data())
    writer.close()
    return out.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the folder to read")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    options = parser.parse_args()
    if options.out.exists():
        sys.exit(f"error: {options.out} exists; name another file")
    try:
        print(f"{options.out}: {write_gguf(options.checkpoint, options.out):,} bytes")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; pip install {error.name}")
    except ToyllmError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
