"""Bad configurations, and weights that do not fit them or hold what no weight should."""

from dataclasses import replace
from typing import Any

import numpy as np

from .making import (
    INFINITY,
    NAN,
    WIDTHS,
    Case,
    Command,
    Make,
    Tensors,
    check,
    generate,
    gpt2,
    gpt_oss,
    params,
    poked,
    runs,
    with_config,
    with_file,
    with_tensors,
)

# ---- config.json ------------------------------------------------------------------------------------------------------------

HUGE, INTEGER = 10**4000, "expected an integer from 1 to"
CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "an array": (b"[]", "expected a JSON object, found list"),
    "not UTF-8": (b'{"a":"\xff"}', "not valid JSON"),
    "100,000 nested brackets": (b"[" * 100_000, "not valid JSON"),
    "5,000 digits": (b'{"n_embd":' + b"1" * 5000 + b"}", "not valid JSON"),
    "NaN": (b'{"model_type":"gpt2","layer_norm_epsilon":NaN}', "'layer_norm_epsilon': NaN, which JSON does not have"),
    "-Infinity, unread": (b'{"model_type":"gpt2","x":[-Infinity]}', "-Infinity, which JSON does not have"),
    "a number beyond f64": (b'{"model_type":"gpt2","layer_norm_epsilon":1e999}', "layer_norm_epsilon: expected a finite number"),
    "a key twice": (b'{"model_type":"gpt2","n_layer":1,"n_layer":2}', "the name 'n_layer' occurs twice"),
    "a key twice, deep inside": (b'{"model_type":"gpt2","x":{"y":1,"y":1}}', "the name 'y' occurs twice"),
    "no keys": (b"{}", "model_type null is not supported"),
    "17 MB": (b" " * 17_000_000, "larger than 16,777,216 bytes"),
    "NUL bytes": (bytes(1000), "not valid JSON"),
}
GPT2_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("wrong model_type", {"model_type": "llama"}, 'model_type "llama" is not supported; toyllm runs gpt2, gpt_oss'),
    ("model_type a list", {"model_type": ["gpt2"]}, "is not supported"),
    ("model_type of 1 MB", {"model_type": "x" * 1_000_000}, "is not supported"),
    ("model_type with escapes", {"model_type": "\x1b[2J"}, "is not supported"),
    ("heads that do not divide", {"n_head": 5}, "n_head: 5 does not divide n_embd 24"),
    ("a negative size", {"n_embd": -24}, f"n_embd: {INTEGER}"),
    ("a size of 0", {"n_layer": 0}, f"n_layer: {INTEGER}"),
    ("a huge size", {"vocab_size": 2**31}, f"vocab_size: {INTEGER}"),
    ("the largest size", {"vocab_size": 2**31 - 1}, "expected shape"),
    ("a size of 4,000 digits", {"n_embd": HUGE}, "n_embd: expected|not valid JSON"),
    ("10,001 layers", {"n_layer": 10_001}, "n_layer: expected an integer from 1 to 10000"),
    ("3,000 layers", {"n_layer": 3_000}, "missing"),
    ("a float size", {"n_embd": 24.0}, "n_embd: expected an integer, found 24.0"),
    ("a string size", {"n_embd": "24"}, "n_embd: expected an integer, found"),
    ("true for a size", {"n_head": True}, "n_head: expected an integer, found true"),
    ("null for a size", {"n_embd": None}, "n_embd: expected an integer, found null"),
    ("a negative epsilon", {"layer_norm_epsilon": -1}, "layer_norm_epsilon: expected a number above 0"),
    ("an unknown activation", {"activation_function": "relu\x1b[2J"}, "activation_function: expected"),
    ("an activation of 1 MB", {"activation_function": "x" * 1_000_000}, "activation_function: expected"),
    ("cross attention", {"add_cross_attention": True}, "add_cross_attention"),
    ("eos as text", {"eos_token_id": "</s>"}, "eos_token_id: expected a token id"),
    ("eos negative", {"eos_token_id": -1}, "eos_token_id: expected a token id"),
    ("eos a list with null", {"eos_token_id": [1, None]}, "eos_token_id: expected a token id"),
    ("a layer more than there are", {"n_layer": 4}, "h.3.* missing|not in the checkpoint"),
    ("a layer less than there are", {"n_layer": 2}, "not part of this architecture"),
    ("other widths than the weights'", {"n_embd": 48}, "expected shape"),
    ("fewer positions than the weights", {"n_positions": 63}, "expected shape"),
]
ROPE = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False}
GPT_OSS_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("layer_types too short", {"layer_types": ["full_attention"]}, "layer_types: 1 entries for num_hidden_layers 3"),
    ("layer_types unknown", {"layer_types": ["full_attention"] * 2 + ["\x1b[2J"]}, "layer_types: expected sliding_attention or"),
    ("layer_types of numbers", {"layer_types": [1, 2, 3]}, "layer_types: expected a list of strings"),
    ("more experts a token than there are", {"num_experts_per_tok": 9, "experts_per_token": 9}, "9 experts a token, but the model has 8"),
    ("no experts", {"num_local_experts": 0}, f"num_local_experts: {INTEGER}"),
    ("a window of 0", {"sliding_window": 0}, f"sliding_window: {INTEGER}"),
    ("a window of null", {"sliding_window": None}, "sliding_window: expected an integer"),
    ("key heads that do not divide", {"num_key_value_heads": 3}, "3 does not divide num_attention_heads 8"),
    ("an odd head", {"head_dim": 15}, "head_dim: expected an even number"),
    ("rope of another kind", {"rope_scaling": ROPE | {"rope_type": "llama3"}}, "rope_type: expected yarn or default"),
    ("rope as text", {"rope_scaling": "yarn\x1b"}, "rope_type: expected yarn or default"),
    ("rope theta of 0", {"rope_theta": 0}, "rope_theta: expected a number above"),
    ("rope factor of 1e308", {"rope_scaling": ROPE | {"factor": 1e308}}, "rope_factor: expected 1 to"),
    ("an attention factor", {"rope_scaling": ROPE | {"attention_factor": 2.0}}, "rope_attention_factor: expected YaRN's own"),
    ("a swiglu limit beyond f32", {"swiglu_limit": 1e300}, "swiglu_limit: expected a number above 0, at most"),
    ("a swiglu limit of 0", {"swiglu_limit": 0}, "swiglu_limit: expected a number above 0"),
]
SOUND: list[tuple[str, Make]] = [
    ("an epsilon below f32", with_config(layer_norm_epsilon=1e-320)),
    ("an epsilon beyond f32", with_config(gpt_oss, rms_norm_eps=1e300)),
    ("a theta of next to 1", with_config(gpt_oss, rope_theta=1.0000000000000002)),
    ("a theta of 1e300", with_config(gpt_oss, rope_theta=1e300)),
    ("eos as an integer", with_config(eos_token_id=5)),
    ("eos as a list", with_config(eos_token_id=[5, 6])),
    ("eos null", with_config(eos_token_id=None)),
    ("eos beyond the vocabulary", with_config(eos_token_id=2**31 - 1)),
    ("unknown keys of every kind", with_config(x=[{"y": None}, 1e300], __class__="os.system", auto_map={"AutoModel": "x--evil.Model"})),
    ("a window longer than the context", with_config(gpt_oss, sliding_window=2**31 - 1)),
    ("rope settings that are silent", with_config(gpt_oss, rope_scaling={"rope_type": "yarn", "factor": 16.0})),
    ("beta_fast below beta_slow", with_config(gpt_oss, rope_scaling=ROPE | {"beta_fast": 1.0, "beta_slow": 4.0})),
]


def refused(says: str) -> tuple[Command, ...]:
    return (params(says), generate(says), check(says), Command(("card", "-m", "{}"), 1, says))


def refused_with_weights(says: str) -> tuple[Command, ...]:
    """By what the weights are: a card reads none."""
    return (params(says), generate(says), check(says.replace("expected shape", "expected") + "|missing"))


def commands_for(says: str) -> tuple[Command, ...]:
    by_weights = any(word in says for word in ("expected shape", "missing", "architecture", "multiples of 32"))
    return refused_with_weights(says) if by_weights else refused(says)


MODELS = [Case("config", name, with_file("config.json", data), refused(says)) for name, (data, says) in CONTENTS.items()]
MODELS += [Case("config", name, with_config(**changes), commands_for(says)) for name, changes, says in GPT2_VALUES]
MODELS += [Case("config", name, with_config(gpt_oss, **changes), commands_for(says)) for name, changes, says in GPT_OSS_VALUES]
MODELS += [Case("config", name, make, (runs(), params("", code=0), check("0 errors", code=0))) for name, make in SOUND]
MODELS += [
    Case("config", "none", lambda folder: (gpt2(folder) / "config.json").unlink(), (generate("no config.json"),)),
    Case(
        "config",
        "a chat template that would run code",
        with_file("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}{% include '/etc/passwd' %}"),
        (runs(),),
    ),
    Case(
        "config",
        "sizes that MXFP4 has no blocks for",
        with_config(gpt_oss, hidden_size=60),
        (generate("multiples of 32"), params("expected shape"), check("multiples of 32")),
    ),
    Case("config", "code beside the weights", with_file("modeling_gpt2.py", "raise SystemExit(9)"), (runs(), params("", code=0))),
]

# generation_config.json
GENERATION: dict[str, tuple[object, str]] = {
    "an array": ([], "expected a JSON object, found list"),
    "not JSON": (b"{", "not valid JSON"),
    "a key twice": (b'{"top_k":1,"top_k":2}', "the name 'top_k' occurs twice"),
    "temperature as text": ({"temperature": "hot"}, "temperature: expected a number"),
    "top_k a float": ({"top_k": 5.0}, "top_k: expected an integer"),
    "top_p NaN": (b'{"top_p":NaN}', "'top_p': NaN, which JSON does not have"),
    "eos as text": ({"eos_token_id": "</s>"}, "eos_token_id: expected a token id"),
    "do_sample 0": ({"do_sample": 0}, "do_sample: expected true or false"),
    "top_p of 2": ({"top_p": 2.0}, "generation_config.json: top_p: expected 0 to 1"),
    "max_new_tokens negative": ({"max_new_tokens": -1}, "generation_config.json: max_tokens: expected 0 or more"),
}
DEFAULTS = Command(("generate", "-m", "{}", "--prompt-ids", "1"), 1, "")
MODELS += [
    Case("generation_config", name, with_file("generation_config.json", content), (replace(DEFAULTS, says=says),))
    for name, (content, says) in GENERATION.items()
]

# ---- weights ----------------------------------------------------------------------------------------------------------------


def transposed(name: str) -> Make:
    def change(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        width = WIDTHS[dtype]
        values = np.frombuffer(data, f"V{width}").reshape(shape).T
        tensors[name] = dtype, shape[::-1], np.ascontiguousarray(values).tobytes()

    return with_tensors(change)


def without(name: str, base: Make = gpt2) -> Make:
    return with_tensors(lambda tensors: tensors.pop(name), base)


def filled(name: str, value: bytes, base: Make = gpt2) -> Make:
    """Every element of a tensor is the same."""

    def change(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = dtype, shape, value * (len(data) // len(value))

    return with_tensors(change, base)


def stored_as(name: str, dtype: str, base: Make = gpt2) -> Make:
    """Zeros of another dtype in a tensor's place."""

    def change(tensors: Tensors) -> None:
        _, shape, _ = tensors[name]
        tensors[name] = dtype, shape, bytes(WIDTHS[dtype] * int(np.prod(shape)))

    return with_tensors(change, base)


def cut_rows(name: str, base: Make = gpt2) -> Make:
    """A tensor without its last row."""

    def change(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = dtype, [shape[0] - 1, *shape[1:]], data[: len(data) // shape[0] * (shape[0] - 1)]

    return with_tensors(change, base)


def twice(tensors: Tensors) -> None:
    tensors["ln_f.bias"] = tensors["transformer.ln_f.bias"]


C_FC, WTE, WPE, LN = "transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight", "transformer.wpe.weight", "transformer.h.1.ln_1.weight"
BLOCKS, SCALES = "model.layers.1.mlp.experts.down_proj_blocks", "model.layers.1.mlp.experts.down_proj_scales"
BF16_NAN, BF16_INFINITY = b"\xc0\x7f", b"\x80\x7f"
DRAW = "no token can be drawn"
SHAPES: list[tuple[str, Make, str]] = [
    ("missing", without(C_FC), "missing|not in the checkpoint"),
    ("missing in MXFP4", without(SCALES, gpt_oss), "missing|not in the checkpoint"),
    ("extra", with_tensors(lambda tensors: tensors.update(x=("F32", [1], bytes(4)))), "not part of this architecture"),
    ("extra, with escapes", with_tensors(lambda t: t.update({"\x1b[2J\u202e": ("F32", [1], bytes(4))})), "not part of this architecture"),
    ("extra, of 1,000 characters", with_tensors(lambda t: t.update({"x" * 1000: ("F32", [1], bytes(4))})), "not part of this architecture"),
    ("transposed", transposed(C_FC), r"expected shape \[24, 96\], found \[96, 24\]"),
    ("a row less", cut_rows(WTE), r"expected shape \[97, 24\], found \[96, 24\]"),
    ("no elements", with_tensors(lambda t: t.update({LN: ("F32", [0], b"")})), r"expected shape \[24\], found \[0\]"),
    ("under two names", with_tensors(twice), "the same weight"),
    ("integers", stored_as(C_FC, "I8"), "expected F32"),
    ("f64", stored_as(LN, "F64"), "expected F32"),
    ("scales that do not match blocks", cut_rows(SCALES, gpt_oss), "expected shape"),
    ("blocks that do not match scales", cut_rows(BLOCKS, gpt_oss), "expected shape"),
    ("scales as floats", stored_as(SCALES, "F32", gpt_oss), "expected U8"),
]
MODELS += [Case("weights", name, make, (generate(says), check(says.replace("expected shape", "expected")))) for name, make, says in SHAPES]
MODELS += [
    Case("weights", "NaN in an embedding that is read", poked(WTE, 24 * 2, NAN), (generate(f"{DRAW}.*embed"), check("NaN: 1"))),
    Case("weights", "NaN in a matrix", poked(C_FC, 7, NAN), (generate(rf"{DRAW}.*blocks\.1\.mlp\.hidden"), check("NaN: 1, the first at"))),
    Case("weights", "NaN in a norm", poked(LN, 0, NAN), (generate(rf"{DRAW}.*blocks\.1\.norm_1"), check("NaN: 1"))),
    Case("weights", "infinity in a matrix", poked(C_FC, 7, INFINITY), (generate(rf"{DRAW}.*blocks\.1\.mlp"), check("infinity: 1"))),
    Case("weights", "NaN in the head alone", poked(WTE, -1, NAN), (generate(f"{DRAW}.*logits"), check("NaN: 1"))),
    Case("weights", "NaN that no token reads", poked(WPE, -1, NAN), (runs(), check("NaN: 1"))),
    Case("weights", "everything NaN", filled(C_FC, NAN), (generate(DRAW), generate(DRAW, "--temperature", "1"), check("NaN: 2,304"))),
    Case("weights", "everything 0", filled(C_FC, bytes(4)), (runs(), check("all zero", code=0))),
    Case("weights", "the largest of f32", filled(C_FC, b"\xff\xff\x7f\x7f"), (generate(DRAW), check("0 errors", code=0))),
    Case("weights", "subnormals", filled(C_FC, b"\x01\0\0\0"), (runs(), check("0 errors", code=0))),
    Case(
        "weights",
        "NaN in a router",
        filled("model.layers.1.mlp.router.weight", BF16_NAN, gpt_oss),
        (generate(rf"{DRAW}.*blocks\.1\.router"), check("NaN")),
    ),
    Case(
        "weights",
        "infinite sinks",
        filled("model.layers.1.self_attn.sinks", BF16_INFINITY, gpt_oss),
        (runs("tensor model.layers.1.self_attn.sinks holds NaN or infinity"), check("infinity")),
    ),
    Case("weights", "scale bytes of 0", filled(SCALES, b"\0", gpt_oss), (runs(), check("0 errors", code=0))),
    Case("weights", "scale bytes of 255", filled(SCALES, b"\xff", gpt_oss), (generate(rf"{DRAW}.*blocks\.1\.mlp"), check("scale 255"))),
    Case("weights", "scale bytes of 254", filled(SCALES, b"\xfe", gpt_oss), (generate(DRAW), check("scale 253 or 254", code=0))),
]
