"""Make the GPT-OSS goldens: small random checkpoints in every dialect, and what transformers computes for them in f32.

Needs torch and transformers (those in the repository were made with torch 2.13.0 and transformers 5.23.0; each says so in its
metadata, but for the checkpoints: published ones have none). Seeds are fixed: rerunning with the same versions reproduces every file,

    python tests/models/make_gpt_oss_goldens.py

Beside this file, in goldens/gpt_oss, for every row of CASES:

* `{case}/`, a checkpoint folder. Weights that several cases share are symbolic links to the first of them.
* `{case}.safetensors`, what is expected of it: `prompt` [T] and `logits` [n, V] of one pass over it, n of its `rows`;
  `router.experts` [L, T, k], each token's choice, and `router.gap` [L, T], the smallest difference between two neighbours
  among its k + 1 highest router logits (0 < gap; a choice with a small one is no choice); `greedy` [20], the ids
  transformers generates after the prompt. Where the row asks for them also `taps.*`, every activation of the prompt's first
  TAPPED tokens, and `late.logits` [T, V] of the prompt at the last positions.

Transformers always reads the case as Hugging Face publishes GPT-OSS, so it is told nothing through the dialects under test;
it dequantises the experts, and runs eagerly in f32. Every weight, bias, sink and norm is random and of a size that matters.
The prompt is the first one in which neither a greedy id nor the set of a token's experts hangs on a narrow margin.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpt_oss_checkpoints as dialects
import numpy as np
import torch
import transformers
from gpt_oss_checkpoints import DEEP, ODD, SMALL, YARN, Config, Weights
from safetensors.torch import save_file
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb, repeat_kv

GOLDENS = Path(__file__).parent / "goldens" / "gpt_oss"
MADE_WITH = {"made_with": f"torch {torch.__version__}, transformers {transformers.__version__}"}
GREEDY, TAPPED, STRIDE = 20, 12, 7  # of a long prompt's logits every 7th row is kept
MARGIN = 1e-2  # between the two highest logits, relative to the highest: 5 times what the loosest test forgives
GAP = 4e-3  # between the last expert chosen and the first one not, in logits of about 3


@dataclass(frozen=True)
class Case:
    """One checkpoint: its sizes, what its config.json says beyond BASE, how both are spelled and written, what is asked of it."""

    shape: Config
    config: Config = field(default_factory=dict)
    spelled: Callable[[Config], Config] = dialects.published
    experts: str = "mxfp4"
    stored: Callable[[Weights], Weights] = dialects.hugging_face
    written: Callable[[Path, Weights], None] = dialects.one_file
    same_weights_as: str = ""
    T: int = 34
    taps: bool = False
    late: bool = False

    @property
    def full_config(self) -> Config:
        """config.json in the published spelling."""
        quantised = {"quantization_config": {"quant_method": "mxfp4"}} if self.experts == "mxfp4" else {}
        return dialects.BASE | quantised | self.shape | self.config


def option(spelled: Callable[[Config], Config] = dialects.published, **config: object) -> Case:
    """The baseline's weights under another configuration."""
    return Case(DEEP, config, spelled, same_weights_as="baseline")


def windowed(window: int, same_weights_as: str = "window_1") -> Case:
    """A prompt far longer than the window, whose end every sliding layer must find to the token."""
    return Case(SMALL, {"sliding_window": window}, same_weights_as=same_weights_as, T=300)


CASES = {
    "baseline": Case(DEEP, taps=True, late=True),
    "keys_absent": option(dialects.without("layer_types", "attention_bias", "rms_norm_eps", "swiglu_limit", "initial_context_length")),
    "experts_per_token": option(dialects.without("num_experts_per_tok"), experts_per_token=2, num_experts_per_tok=2),
    "num_experts_per_tok": option(dialects.without("experts_per_token"), experts_per_token=3, num_experts_per_tok=3),
    "layer_types": option(layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
    "all_full": option(layer_types=["full_attention"] * 3),
    "all_sliding": option(layer_types=["sliding_attention"] * 3),
    "rms_norm_eps": option(rms_norm_eps=1e-1),
    "swiglu_limit": option(swiglu_limit=1.5),
    "rope_parameters": option(dialects.transformers_5, rope_theta=150000.0, rope_scaling=YARN | {"factor": 8.0, "beta_fast": 6.0}),
    "rope_truncated": option(rope_scaling=YARN | {"truncate": True}),
    "rope_from_pair_0": option(rope_scaling=YARN | {"beta_fast": 32.0}),  # low < 0, which transformers takes as 0
    "rope_default": option(dialects.transformers_5, rope_scaling={"rope_type": "default"}),
    "rope_interleaved": option(hf_rope_impl=False),
    "sharded": Case(SMALL, written=dialects.from_zero),
    "original": Case(SMALL | {"sliding_window": 5}, spelled=dialects.openai, stored=dialects.original),
    "original_sharded": Case(SMALL, spelled=dialects.openai, stored=dialects.original, written=dialects.two_dashes),
    "experts_bf16": Case(SMALL, experts="bf16"),
    "tied": Case(SMALL, {"tie_word_embeddings": True}),
    "odd": Case(ODD, taps=True),
    "window_1": windowed(1, same_weights_as=""),
    "window_5": windowed(5),
    "window_16": windowed(16),
    "window_128": windowed(128),
}


def write_checkpoint(folder: Path, case: Case) -> None:
    """The folder of one case, in its dialect."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(case.spelled(case.full_config), indent=1) + "\n")
    if case.same_weights_as:
        (folder / "model.safetensors").symlink_to(Path("..") / case.same_weights_as / "model.safetensors")
    else:
        case.written(folder, case.stored(dialects.random_weights(case.full_config, case.experts)))


def load(case: Case) -> transformers.GptOssForCausalLM:
    """The case's model in transformers: f32, eager, experts dequantised; nothing missing, nothing made up."""
    config = case.full_config
    weights = dialects.random_weights(config, case.experts)
    if not config.get("hf_rope_impl", True):
        weights = dialects.half_split(weights, config["num_attention_heads"])
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(config))
        dialects.one_file(Path(name), weights)
        settings: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
        if case.experts == "mxfp4":
            settings["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        model, report = transformers.GptOssForCausalLM.from_pretrained(name, output_loading_info=True, **settings)
    if any(report[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys")):
        raise ValueError(f"{case}: {report}")
    return model.eval()


def routing(model: transformers.GptOssForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's k + 1 highest logits [L, T, k + 1] and their experts, as the model chooses them."""
    found = model(ids, output_router_logits=True).router_logits
    return torch.stack(found).topk(model.config.num_experts_per_tok + 1)


def clear_choices(model: transformers.GptOssForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of the ids [1, T] how clear its experts are, and how clear the next id is: [T] both.

    The first is the least difference over all layers between the last expert's logit and the next one's; the second that between the
    two highest logits, relative to the highest.
    """
    logits, _ = routing(model, ids)
    first, second = model(ids).logits[0].topk(2).values.T
    return (logits[..., -2] - logits[..., -1]).amin(0), (first - second) / first.abs()


def decided_prompt(model: transformers.GptOssForCausalLM, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first random prompt [1, T] with wide margins for the experts of all tokens and for the greedy ids [GREEDY], and those ids."""
    for seed in range(20_000):
        prompt = torch.from_numpy(np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, T)))
        if not (clear_choices(model, prompt)[0] > GAP).all():
            continue
        ids = greedily(model, prompt)
        experts, following = clear_choices(model, ids)
        varied = len(ids[0, T:].unique()) > GREEDY // 3
        if varied and (experts > GAP).all() and (following[T - 1 : -1] > MARGIN).all():
            return prompt, ids[0, T:]
    raise ValueError("every prompt has a close call: choose other weights")


def greedily(model: transformers.GptOssForCausalLM, prompt: torch.Tensor) -> torch.Tensor:
    """The prompt and the GREEDY ids that follow, each from a whole pass: with a window of 1 the cache keeps `[-0:]`, everything."""
    settings = {"do_sample": False, "max_new_tokens": GREEDY, "use_cache": False}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


def activations(model: transformers.GptOssForCausalLM, ids: torch.Tensor) -> Weights:
    """What passes through the modules for `ids` [1, T], under toyllm's names; what they keep to themselves is computed from that."""
    seen: Weights = {}
    c = model.config

    def keep(*names: str, heads: int = 0) -> Callable:
        def hook(_module: object, _inputs: object, output: Any) -> None:
            for name, x in zip(names, output if isinstance(output, tuple) else (output,), strict=False):
                x = x.reshape(-1, heads, c.head_dim) if heads else x.reshape(-1, x.shape[-1])
                seen[name] = x

        return hook

    def before(hook: Callable) -> Callable:
        return lambda module, inputs: hook(module, None, inputs)

    model.model.embed_tokens.register_forward_hook(keep("embed"))
    model.model.norm.register_forward_hook(keep("norm_f"))
    for i, layer in enumerate(model.model.layers):
        at = f"blocks.{i}"
        layer.input_layernorm.register_forward_hook(keep(f"{at}.norm_1"))
        for part, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads), ("v", c.num_key_value_heads)):
            getattr(layer.self_attn, f"{part}_proj").register_forward_hook(keep(f"{at}.attn.{part}", heads=heads))
        layer.self_attn.o_proj.register_forward_pre_hook(before(keep(f"{at}.attn.heads", heads=c.num_attention_heads)))
        layer.self_attn.o_proj.register_forward_hook(keep(f"{at}.attn.out"))
        layer.post_attention_layernorm.register_forward_pre_hook(before(keep(f"{at}.resid_mid")))
        layer.post_attention_layernorm.register_forward_hook(keep(f"{at}.norm_2"))
        layer.mlp.router.register_forward_hook(keep(f"{at}.router.logits", f"{at}.router.weights", f"{at}.router.experts"))
        layer.mlp.experts.register_forward_hook(keep(f"{at}.mlp.out"))
        layer.register_forward_hook(keep(f"{at}.out"))

    result = model(ids, output_attentions=True)
    seen["logits"] = result.logits[0]
    for i, layer in enumerate(model.model.layers):
        seen |= attention_inside(model, layer.self_attn, seen, f"blocks.{i}", result.attentions[i][0])
        seen |= experts_inside(layer.mlp.experts, seen, f"blocks.{i}")
    return seen


def attention_inside(model: Any, attention: Any, seen: Weights, at: str, weights: torch.Tensor) -> Weights:
    """Rotated q and k, scores and weights [H, T, T] of a layer, checked against the weights that transformers returns."""
    q, k = (seen[f"{at}.attn.{part}"].transpose(0, 1)[None] for part in "qk")
    T = q.shape[2]
    q, k = (x[0] for x in apply_rotary_pos_emb(q, k, *model.model.rotary_emb(q, torch.arange(T)[None])))
    scores = q @ repeat_kv(k[None], attention.num_key_value_groups)[0].transpose(1, 2) * attention.scaling
    behind = torch.arange(T)[:, None] - torch.arange(T)
    scores = scores.masked_fill((behind < 0) | (behind >= (attention.sliding_window or T)), -torch.inf)
    sinks = attention.sinks[:, None, None].expand(-1, T, 1)
    torch.testing.assert_close(torch.cat([scores, sinks], -1).softmax(-1)[..., :-1], weights)
    named = {"q": q.transpose(0, 1), "k": k.transpose(0, 1), "scores": scores, "weights": weights}
    return {f"{at}.attn.{name}": tensor for name, tensor in named.items()}


def experts_inside(experts: Any, seen: Weights, at: str) -> Weights:
    """Gate, up and hidden [T, k, F] of the chosen experts, checked against the layer's output."""
    x, chosen = seen[f"{at}.norm_2"], seen[f"{at}.router.experts"]
    both = torch.einsum("td,tkdf->tkf", x, experts.gate_up_proj[chosen]) + experts.gate_up_proj_bias[chosen]
    hidden = experts._apply_gate(both)
    out = torch.einsum("tkf,tkfd->tkd", hidden, experts.down_proj[chosen]) + experts.down_proj_bias[chosen]
    torch.testing.assert_close((seen[f"{at}.router.weights"][..., None] * out).sum(1), seen[f"{at}.mlp.out"], rtol=1e-4, atol=1e-4)
    return {f"{at}.experts.gate": both[..., 0::2], f"{at}.experts.up": both[..., 1::2], f"{at}.experts.hidden": hidden}


@torch.no_grad()
def expected(case: Case) -> Weights:
    """What transformers computes for one case."""
    model = load(case)
    prompt, greedy = decided_prompt(model, case.T)
    rows = torch.arange(case.T) if case.T < 100 else torch.arange((case.T - 1) % STRIDE, case.T, STRIDE)
    top, experts = routing(model, prompt)
    found = {"prompt": prompt[0], "greedy": greedy, "rows": rows, "logits": model(prompt).logits[0, rows]}
    found |= {"router.experts": experts[..., :-1].to(torch.uint8), "router.gap": (top[..., :-1] - top[..., 1:]).amin(-1)}
    if case.late:
        last = torch.arange(model.config.max_position_embeddings - case.T, model.config.max_position_embeddings)
        found["late.logits"] = model(prompt, position_ids=last[None]).logits[0]
    if case.taps:
        found |= {f"taps.{name}": tensor for name, tensor in activations(model, prompt[:, :TAPPED]).items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def main() -> None:
    """Make all of it anew."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    shutil.rmtree(GOLDENS, ignore_errors=True)
    for name, case in CASES.items():
        write_checkpoint(GOLDENS / name, case)
        save_file(expected(case), GOLDENS / f"{name}.safetensors", MADE_WITH)
        print(name)


if __name__ == "__main__":
    main()
