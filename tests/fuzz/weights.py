"""Small models whose weights are any bytes at all: whatever is computed, nothing crashes; and tame ones, on which backends must agree."""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.host import supports
from toyllm.models.config import load_config
from toyllm.models.generation import Settings, generate
from toyllm.models.location import find_model
from toyllm.models.model import Model

from . import checkpoints
from .configs import forward, tokens
from .leg import Find, Leg, Trial, refused
from .mutate import chance

COARSE = 1e-2  # where activations before MXFP4 are held in 16 bits
AGREE = 1e-3  # of logits between backends, over the largest: sums in another order, through layers and a cache in f32
BACKENDS = [name for name in ("avx512", "portable", "numpy") if supports(name)] + ([] if supports("avx512") else ["auto"])


def document(rng: Random, family: str) -> dict[str, Any]:
    """A config.json of small sizes, as chance has them."""
    made = dict(checkpoints.CONFIGS[family])
    H = rng.randint(1, 4)
    if family == "gpt2":
        made |= {"n_head": H, "n_embd": H * rng.randint(1, 9), "n_inner": rng.choice((None, 1, 7, 16)), "vocab_size": rng.randint(1, 40)}
        made |= {"n_layer": rng.randint(1, 3), "n_positions": rng.randint(1, 40), "activation_function": rng.choice(("gelu", "gelu_new"))}
        return made | {"scale_attn_by_inverse_layer_idx": chance(rng, 0.2), "tie_word_embeddings": chance(rng, 0.7)}
    E, L = rng.randint(1, 5), rng.randint(1, 3)
    made |= {"num_key_value_heads": H, "num_attention_heads": H * rng.randint(1, 3), "head_dim": 2 * rng.randint(1, 9)}
    made |= {"num_local_experts": E, "num_experts_per_tok": rng.randint(1, E), "vocab_size": rng.randint(1, 40), "num_hidden_layers": L}
    made |= {"sliding_window": rng.choice((1, 2, 5, 64, 2**31 - 1)), "hf_rope_impl": chance(rng, 0.8)}
    return made | {"layer_types": [rng.choice(("sliding_attention", "full_attention")) for _ in range(L)]}


def write(rng: Random, folder: Path, family: str, wild: float) -> None:
    """config.json and model.safetensors."""
    made = document(rng, family)
    dialect = rng.choice([*checkpoints.DIALECTS])
    if dialect == "dense":
        made |= {"hidden_size": rng.randint(1, 40), "intermediate_size": rng.randint(1, 40)}
    (folder / "config.json").write_text(json.dumps(made))
    _, config = load_config(find_model(str(folder)))
    checkpoints.write_weights(rng, folder, checkpoints.specs(config, dialect), wild)


def options(rng: Random) -> dict[str, Any]:
    """How to run it."""
    made: dict[str, Any] = {"backend": rng.choice(BACKENDS), "cache_dtype": rng.choice(("f32", "bf16")), "threads": rng.choice((1, 2))}
    made |= {"moe": rng.choice(("auto", "single", "grouped", "all", "budget")), "attention": rng.choice(("fused", "fused", "plain"))}
    made |= {"weights": rng.choice(("stored", "stored", "q8")), "activations": rng.choice(("f32", "f32", "bf16"))}
    return made | {
        "prefill_chunk": rng.choice((1, 3, 512)),
        "poison_cache": chance(rng, 0.5),
        "tokens_per_expert_ratio": rng.choice((0.1, 1, 4)),
    }


def run_wild(rng: Random, folder: Path) -> str:
    """Load, run and generate from weights that are anything. Raises Find."""
    given = options(rng)
    try:
        model = toyllm.load(str(folder), **given)
        forward(rng, model)
        settings = Settings(max_tokens=4, temperature=rng.choice((0, 0.8)), top_k=rng.choice((0, 3)), top_p=rng.choice((0, 0.9, 1)), seed=1)
        prompt = tokens(rng, model, rng.randint(1, model.config.context)).tolist()
        for _ in generate(model, prompt, settings, min(model.config.context, len(prompt) + 8)):
            pass
    except ToyllmError as error:
        return "wild: " + ("no token can be drawn" if "no token can be drawn" in refused(error) else "refused otherwise")
    return "wild: generated"


def logits(folder: Path, given: dict[str, Any], ids: np.ndarray) -> tuple[Model, np.ndarray]:
    """A model run so, and its logits."""
    model = toyllm.load(str(folder), **given)
    return model, model.logits(ids)


def run_tame(rng: Random, folder: Path) -> str:
    """The same model on two backends, in chunks of its own each. Raises Find where logits depart."""
    shared = {"moe": rng.choice(("auto", "single", "grouped", "all")), "weights": rng.choice(("stored", "q8"))}
    shared["exact"] = shared["weights"] == "stored"
    first, second = rng.choice(BACKENDS), rng.choice(BACKENDS)
    model = toyllm.load(str(folder), backend="numpy")
    ids = tokens(rng, model, rng.randint(1, min(model.config.context, 70)))
    found = [
        logits(folder, shared | {"backend": name, "prefill_chunk": rng.choice((1, 5, 512)), "poison_cache": chance(rng, 0.5)}, ids)[1]
        for name in (first, second)
    ]
    if not all(np.isfinite(each).all() for each in found):
        raise Find("logits of sane weights are not finite")
    worst = float(np.abs(found[0] - found[1]).max() / np.abs(found[1]).max())
    if worst > (AGREE if shared["exact"] else COARSE):
        raise Find(f"{first} and {second} depart by {worst:.1e}: {shared}")
    return f"tame: {' and '.join(sorted((first, second)))} agree"


def prepare(folder: Path) -> Trial:
    def trial(rng: Random) -> str:
        wild = rng.choice((0, 0.03, 0.1, 1))
        write(rng, folder, rng.choice(("gpt2", "gpt_oss")), wild)
        return (run_wild if wild else run_tame)(rng, folder)

    return trial


LEG = Leg("small models with any bytes as weights", prepare)
