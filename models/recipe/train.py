"""Train one of the two embedded models from random weights.

    python -m toyllm.models.recipe.train gpt2|gpt_oss DATA OUT [--steps N]

DATA is what the corpus script wrote. OUT receives model.safetensors (f32), config.json and training.json for the export script, and on the
way checkpoint.pt: the same command continues an interrupted run, to the same weights. Needs torch and transformers.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.errors import ToyllmError
from .networks import new_model, round_experts, set_rounding
from .script import imported, published, run, say

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_EVERY, REPORT_EVERY = 400, 50  # steps
WINDOWS_ON_THE_WAY = 96  # of held-out text, at each checkpoint; all of them at the end
FINAL_RATE = 0.05  # of the peak


@dataclass(frozen=True)
class Recipe:
    """One model's configuration, in transformers' keys, and its training."""

    architecture: str  # "gpt2" or "gpt_oss"
    config: dict[str, Any]
    steps: int
    peak: float  # learning rate
    warmup: int = 100  # steps
    window: int = 256  # tokens
    batch: int = 16  # windows a step
    mxfp4_from: float = 1.0  # the fraction of the run after which experts compute with MXFP4 values; 1: never
    seed: int = 1337


RECIPES = {
    "gpt2": Recipe(
        architecture="gpt2",
        steps=3671,
        peak=2e-3,
        config={
            "vocab_size": 4096,
            "n_positions": 512,
            "n_embd": 256,
            "n_layer": 6,
            "n_head": 4,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "gpt_oss": Recipe(
        architecture="gpt_oss",
        steps=2704,
        peak=1.5e-3,
        mxfp4_from=0.75,
        config={
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 256,
            },
            "rms_norm_eps": 1e-5,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.01,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
    ),
}


def main(arguments: list[str]) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="toyllm.models.recipe.train", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("architecture", choices=RECIPES, help="which of the two models")
    parser.add_argument("data", type=Path, metavar="DATA", help="the folder that the corpus script wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (default: as many as the embedded model had)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the initial weights and the order of the text (default: 1337)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's choice); sums depend on it")
    options = parser.parse_args(arguments)
    for name in ("steps", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name}: expected 1 or more, found {value}")
    if options.threads:
        imported("torch").set_num_threads(options.threads)
    given = {name: value for name in ("steps", "seed") if (value := getattr(options, name)) is not None}
    train(replace(RECIPES[options.architecture], **given), options.data, options.out)


def train(recipe: Recipe, data: Path, out: Path, checkpoint_every: int = CHECKPOINT_EVERY) -> None:
    """Train by `recipe` on the ids in `data`, from the checkpoint in `out` if it has one, and write the model to `out`."""
    ids = [read_ids(data / f"{name}.npy", recipe.window) for name in ("train", "held_out")]
    torch = imported("torch")
    text, held_out = (torch.from_numpy(array) for array in ids)
    torch.manual_seed(recipe.seed)
    model = new_model(recipe.architecture, recipe.config)
    optimizer = new_optimizer(model)
    first = resume(recipe, out, model, optimizer)
    say(f"{sum(p.numel() for p in model.parameters())} parameters, steps {first} to {recipe.steps}")
    average, started = None, time.monotonic()
    for step in range(first, recipe.steps):
        if recipe.architecture == "gpt_oss":
            set_rounding(model, on=step >= recipe.mxfp4_from * recipe.steps)
        loss = take_step(recipe, step, model, optimizer, random_windows(text, recipe))
        average = loss if average is None else 0.98 * average + 0.02 * loss
        done = step + 1
        if done % REPORT_EVERY == 0 or done == recipe.steps:
            speed = (done - first) * recipe.batch * recipe.window / (time.monotonic() - started)
            say(f"step {done}  loss {average:.3f}  rate {learning_rate(recipe, step):.2e}  {speed:.0f} tokens/s")
        if done % checkpoint_every == 0 and done < recipe.steps:
            save_checkpoint(recipe, out, done, model, optimizer)
            say(f"step {done}  held-out loss {held_out_loss(model, held_out, recipe.window, WINDOWS_ON_THE_WAY):.3f}")
    finish(recipe, out, model, held_out)


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of one step, counted from 0: a linear rise over `warmup` steps times a cosine over the whole run, down to FINAL_RATE."""
    rise = min(1, (step + 1) / recipe.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return recipe.peak * rise * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def read_ids(path: Path, window: int) -> np.ndarray:
    """The token ids of a text, i64."""
    if not path.is_file():
        raise ToyllmError(f"{path} does not exist. Make it first: python -m toyllm.models.recipe.corpus BOOKS {path.parent}")
    ids = np.load(path)
    if len(ids) < window + 2:
        raise ToyllmError(f"{path}: expected more than {window + 1} tokens, one window and the next token, found {len(ids)}")
    return ids.astype(np.int64)


def windows_at(ids: Any, starts: Any, window: int) -> tuple[Any, Any]:
    """Tokens [B, window] from each start, and the tokens that follow each of them [B, window]."""
    torch = imported("torch")
    return torch.stack([ids[i : i + window] for i in starts]), torch.stack([ids[i + 1 : i + 1 + window] for i in starts])


def random_windows(ids: Any, recipe: Recipe) -> tuple[Any, Any]:
    """A batch for one step, at random places of the text."""
    starts = imported("torch").randint(len(ids) - recipe.window - 1, (recipe.batch,))
    return windows_at(ids, starts, recipe.window)


def new_optimizer(model: Any) -> Any:
    """AdamW; matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return imported("torch").optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


def take_step(recipe: Recipe, step: int, model: Any, optimizer: Any, batch: tuple[Any, Any]) -> float:
    """One update, products in bf16. Returns the cross-entropy in nats per token, without the router's balancing term."""
    torch = imported("torch")
    tokens, following = batch
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=tokens, use_cache=False)
    loss = cross_entropy(output.logits, following)
    balance = recipe.config.get("router_aux_loss_coef", 0.0)
    optimizer.zero_grad(set_to_none=True)
    (loss + balance * output.aux_loss if balance else loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    optimizer.step()
    return loss.item()


def cross_entropy(logits: Any, following: Any) -> Any:
    """Mean −log p of the following tokens, in nats, from logits [B, T, V]."""
    return imported("torch").nn.functional.cross_entropy(logits.float().flatten(0, 1), following.flatten())


def held_out_loss(model: Any, ids: Any, window: int, limit: int | None = None) -> float:
    """Nats per token over the text's windows side by side, or over `limit` of them spread evenly; in f32."""
    starts = range(0, len(ids) - window, window)
    if limit:
        starts = starts[:: math.ceil(len(starts) / limit)]
    total = 0.0
    with imported("torch").no_grad():
        for i in range(0, len(starts), 8):
            tokens, following = windows_at(ids, starts[i : i + 8], window)
            total += len(tokens) * cross_entropy(model(input_ids=tokens, use_cache=False).logits, following).item()
    return total / len(starts)


def save_checkpoint(recipe: Recipe, out: Path, done: int, model: Any, optimizer: Any) -> None:
    """Write all that the run is after `done` steps; the file before it stays whole until then."""
    torch = imported("torch")
    state = {"recipe": asdict(recipe), "done": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with published(out) as partial:
        torch.save({**state, "random": torch.get_rng_state()}, partial / CHECKPOINT)


def resume(recipe: Recipe, out: Path, model: Any, optimizer: Any) -> int:
    """Put the run where the checkpoint in `out` left it. Returns the steps done, 0 without one."""
    torch, path = imported("torch"), out / CHECKPOINT
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise ToyllmError(f"{path} is of a run with other settings. Give another folder, or remove it to start again")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return state["done"]


def finish(recipe: Recipe, out: Path, model: Any, held_out: Any) -> None:
    """Write the trained model and what is to be said of its training; the checkpoint has served."""
    if recipe.mxfp4_from < 1:
        round_experts(model)
    loss = held_out_loss(model, held_out, recipe.window)
    say(f"held-out loss {loss:.4f} nats per token")
    record = {
        "steps": recipe.steps,
        "tokens_seen": recipe.steps * recipe.batch * recipe.window,
        "held_out_loss_nats_per_token": loss,
        "seed": recipe.seed,
        "batch": recipe.batch,
        "window": recipe.window,
    }
    with published(out) as partial:
        model.save_pretrained(partial)
        (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / CHECKPOINT).unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
