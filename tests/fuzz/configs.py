"""config.json of both families: refused in a line, or sizes within their bounds and a model that runs."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models.config import LARGEST, load_config, read_config
from toyllm.models.location import EMBEDDED, find_model
from toyllm.models.model import Model

from . import checkpoints
from .leg import Find, Leg, Trial, refused
from .mutate import chance, json_text

SMALL = 100_000  # numbers of a model that is still run
LAYERS = 8
VALUES = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    16,
    31,
    32,
    33,
    64,
    100,
    -1,
    0.5,
    1.5,
    2.0,
    1e-5,
    1e-300,
    1e300,
    1e30,
    2**31 - 1,
    2**31,
    2**63,
    True,
    False,
    None,
]
VALUES += ["", "gelu", "gelu_new", "relu", "yarn", "default", "linear", "sliding_attention", [], {}, [1], ["full_attention"]]
OPENAI = {"num_hidden_layers": 2, "num_experts": 3, "experts_per_token": 2, "vocab_size": 24, "hidden_size": 32, "intermediate_size": 32}
OPENAI |= {"swiglu_limit": 7.0, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4, "rope_theta": 1e4}
OPENAI |= {"initial_context_length": 16, "rope_scaling_factor": 8.0, "rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0}
BASES = {"gpt2": checkpoints.GPT2, "gpt_oss": checkpoints.GPT_OSS, "openai": OPENAI}
KEYS = {
    "gpt2": """n_inner activation_function layer_norm_epsilon scale_attn_weights scale_attn_by_inverse_layer_idx tie_word_embeddings
        add_cross_attention""",
    "gpt_oss": """layer_types rms_norm_eps swiglu_alpha hf_rope_impl tie_word_embeddings rope_parameters initial_context_length rope_type
        rope_factor""",
    "openai": """model_type layer_types rope_scaling rms_norm_eps num_local_experts max_position_embeddings tie_word_embeddings
        rope_beta_fast""",
}


def document(rng: Random, base: str) -> dict[str, Any]:
    """A config.json with some of its values others."""
    made = dict(BASES[base])
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 4))):
        key = rng.choice([*made, *KEYS[base].split()])
        alike = [value for value in VALUES if type(value) is type(made.get(key))]  # most of what is of another type is refused
        made[key] = rng.choice(alike if alike and chance(rng, 0.7) else VALUES)
    if made.get("rope_scaling") == checkpoints.YARN and chance(rng, 0.3):
        made["rope_scaling"] = checkpoints.YARN | {rng.choice([*checkpoints.YARN]): rng.choice(VALUES)}
    if chance(rng, 0.1):
        made["layer_types"] = [rng.choice(("sliding_attention", "full_attention")) for _ in range(rng.randint(0, 4))]
    return made


def check_bounds(config: Any) -> None:
    """Raise Find for a value that no kernel should be reached with."""
    for f in fields(config):
        value, least = getattr(config, f.name), f.metadata.get("least")
        ids = value if f.name.endswith("_token_id") else [value] if type(value) is int else []
        if not all(0 <= n <= LARGEST for n in ids) or (least is not None and value is not None and not least <= value <= LARGEST):
            raise Find(f"{f.name}: {value!r} is out of bounds")


def tokens(rng: Random, model: Model, n: int) -> np.ndarray:
    """Ids of a prompt."""
    return np.array([rng.choice((0, model.vocab_size - 1, rng.randrange(model.vocab_size))) for _ in range(n)])


def forward(rng: Random, model: Model) -> None:
    """A prompt of one or two sequences and some decoded tokens, to the end of the context where that is near. Raises Find."""
    T = min(model.config.context, rng.choice((1, 2, 5, 16, 17, 40)))
    cache = model.new_cache(T, sequences=2)
    for sequence, n in ((0, T), (1, max(1, T - 1)))[: rng.randint(1, 2)]:
        for piece in parts(rng, n):
            at = np.array(piece)
            logits = model.forward(tokens(rng, model, len(at)), at, np.full(len(at), sequence), cache, all_logits=chance(rng, 0.5))
            if logits.shape[1] != model.vocab_size or logits.dtype != np.float32:
                raise Find(f"logits of shape {logits.shape}, {logits.dtype}")


def parts(rng: Random, n: int) -> Iterator[range]:
    """Positions to n, cut into a prompt and what follows."""
    first = rng.randint(1, n)
    yield range(first)
    for i in range(first, min(n, first + 3)):
        yield range(i, i + 1)


def check_config(rng: Random, folder: Path, base: str, text: bytes) -> str:
    """Load the model with this config.json, on weights that are its own or those of the unchanged one, and run it. Raises Find."""
    (folder / "config.json").write_bytes(text)
    try:
        _, config = load_config(find_model(str(folder)))
    except ToyllmError as error:
        refused(error)
        return "refused"
    check_bounds(config)
    if chance(rng, 0.8):
        layers = config.n_layer if hasattr(config, "n_layer") else config.num_hidden_layers
        if layers > LAYERS:
            return "accepted, too large to run here"
        some = checkpoints.specs(config, "openai" if base == "openai" else rng.choice(("mxfp4", "dense")))
        if checkpoints.elements(some) > SMALL:
            return "accepted, too large to run here"
    else:
        own = checkpoints.FAMILIES["gpt2" if base == "gpt2" else "gpt_oss"]
        some = checkpoints.specs(read_config(own.Config, own.normalise(BASES[base]), folder), "openai" if base == "openai" else "mxfp4")
    checkpoints.write_weights(rng, folder, some)
    try:
        model = toyllm.load(str(folder), threads=1, prefill_chunk=rng.choice((1, 3, 512)), cache_dtype=rng.choice(("f32", "bf16")))
        forward(rng, model)
    except ToyllmError as error:
        refused(error)
        return "accepted, and the weights refused"
    return "accepted, and run"


def prepare(folder: Path) -> Trial:
    (folder / "tokenizer.json").write_bytes((EMBEDDED / "tales-gpt2" / "tokenizer.json").read_bytes())

    def trial(rng: Random) -> str:
        base = rng.choice([*BASES])
        return check_config(rng, folder, base, json_text(rng, document(rng, base), most=rng.choice((0, 0, 0, 0, 0, 1, 2))))

    return trial


LEG = Leg("config.json of both families, and what loads with it", prepare)
