"""Make the GPT-2 goldens: small random checkpoints, and what transformers computes for them in f32.

Needs torch and transformers (the files in the repository were made with torch 2.13.0 and transformers 5.23.0; each file
says so in its metadata). Seeds are fixed: rerunning with the same versions reproduces every file,

    python tests/models/make_gpt2_goldens.py

Beside this file, in goldens/gpt2, for every row of CASES:

* `{case}/`, a checkpoint folder. Weights that several cases share are symbolic links to the first of them.
* `{case}.safetensors`, what is expected of it: `prompt` [T] and `logits` [T, V] of one pass over it; `greedy` [30], the
  ids transformers generates after it, up to the last position the model has. Where the row asks for them also
  `taps.*`, every activation of the prompt's first TAPPED tokens, and `late.logits` of the prompt at the last positions.

Every weight and bias is random and of a size that matters, LayerNorm's included, so that nothing hides behind a zero or a one.
The prompt is the first one whose greedy ids are all decided by a clear margin: no rounding can change them.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

GOLDENS = Path(__file__).parent / "goldens" / "gpt2"
MADE_WITH = {"made_with": f"torch {torch.__version__}, transformers {transformers.__version__}"}
T, GREEDY, TAPPED = 34, 30, 17
MARGIN = 2e-3  # between the two highest logits, relative to the highest: 20 times what a test forgives

Weights = dict[str, torch.Tensor]
BASE = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 97, "n_positions": 64, "n_ctx": 64}
BASE |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bos_token_id": None, "eos_token_id": None}
DEEP = {"n_embd": 24, "n_head": 3, "n_layer": 3}
SMALL = {"n_embd": 20, "n_head": 5, "n_layer": 2}
ODD = {"n_embd": 27, "n_head": 3, "n_layer": 2}


def random_weights(config: dict) -> Weights:
    """Every parameter of the model, by its published name, large enough for each option to show in the logits."""
    V, P, D, L = (config[k] for k in ("vocab_size", "n_positions", "n_embd", "n_layer"))
    F = config.get("n_inner") or 4 * D
    rng = np.random.default_rng(2)

    def normal(*shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return torch.from_numpy((mean + std * rng.standard_normal(shape)).astype(np.float32))

    def norm(name: str) -> Weights:
        return {f"{name}.weight": normal(D, std=0.3, mean=1), f"{name}.bias": normal(D, std=0.1)}

    def conv1d(name: str, d_in: int, d_out: int) -> Weights:
        return {f"{name}.weight": normal(d_in, d_out, std=2 / d_in**0.5), f"{name}.bias": normal(d_out, std=0.1)}

    weights = {"wte.weight": normal(V, D, std=0.1), "wpe.weight": normal(P, D, std=0.1)}
    for i in range(L):
        weights |= norm(f"h.{i}.ln_1") | conv1d(f"h.{i}.attn.c_attn", D, 3 * D) | conv1d(f"h.{i}.attn.c_proj", D, D)
        weights |= norm(f"h.{i}.ln_2") | conv1d(f"h.{i}.mlp.c_fc", D, F) | conv1d(f"h.{i}.mlp.c_proj", F, D)
    return weights | norm("ln_f")


# How a checkpoint spells and stores its weights: functions of the published names.


def prefixed(weights: Weights) -> Weights:
    """As GPT2LMHeadModel saves them."""
    return {f"transformer.{name}": tensor for name, tensor in weights.items()}


def bare(weights: Weights) -> Weights:
    """As in openai-community/gpt2."""
    return weights


def both_spellings(weights: Weights) -> Weights:
    """Every other name prefixed."""
    return {name if i % 2 else f"transformer.{name}": tensor for i, (name, tensor) in enumerate(weights.items())}


def with_buffers(weights: Weights) -> Weights:
    """The causal mask and its fill value, which older versions saved beside the weights of every layer."""
    layers = sorted({name.split(".")[1] for name in weights if name.startswith("h.")})
    masks = {f"h.{i}.attn.bias": torch.tril(torch.ones(1, 1, 64, 64, dtype=torch.uint8)) for i in layers}
    return prefixed(weights | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in layers})


def own_head(weights: Weights) -> Weights:
    """A head that is not the embedding."""
    values = 0.1 * np.random.default_rng(1).standard_normal(weights["wte.weight"].shape)
    return prefixed(weights) | {"lm_head.weight": torch.from_numpy(values.astype(np.float32))}


def equal_head(weights: Weights) -> Weights:
    """The embedding, stored a second time as the head."""
    return prefixed(weights) | {"lm_head.weight": weights["wte.weight"].clone()}


def f16(weights: Weights) -> Weights:
    """Half precision throughout."""
    return prefixed({name: tensor.half() for name, tensor in weights.items()})


def bf16(weights: Weights) -> Weights:
    """bfloat16 throughout."""
    return prefixed({name: tensor.bfloat16() for name, tensor in weights.items()})


def three_dtypes(weights: Weights) -> Weights:
    """Vectors in f32, matrices in bf16, embeddings in f16."""
    stored = {n: t if t.ndim == 1 else t.half() if n.startswith("w") else t.bfloat16() for n, t in weights.items()}
    return prefixed(stored)


# How they are written.


def one_file(folder: Path, weights: Weights) -> None:
    """model.safetensors, by the library."""
    save_file(weights, folder / "model.safetensors", MADE_WITH)


def unaligned(folder: Path, weights: Weights) -> None:
    """model.safetensors without padding, as openai-community/gpt2 is: the data begin at an odd offset, in the order of the names."""
    header, end = {"__metadata__": MADE_WITH}, 0
    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for name, tensor in sorted(weights.items()):
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": dtypes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    data = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for _, tensor in sorted(weights.items()))
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def three_shards(folder: Path, weights: Weights) -> None:
    """model-0000i-of-00003.safetensors and their index, every third tensor in the same file."""
    names = sorted(weights)
    shards = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, members in shards.items():
        save_file({name: weights[name] for name in members}, folder / file, MADE_WITH)
    place = {name: file for file, members in shards.items() for name in members}
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


@dataclass(frozen=True)
class Case:
    """One checkpoint: a shape, what its config.json says beyond BASE, how its weights are spelled, stored and written."""

    shape: dict
    config: dict = field(default_factory=dict)
    stored: Callable[[Weights], Weights] = prefixed
    written: Callable[[Path, Weights], None] = one_file
    same_weights_as: str = ""
    taps: bool = False
    late: bool = False


def option(taps: bool = False, **config: object) -> Case:
    """The baseline's weights under another configuration."""
    return Case(DEEP, config, same_weights_as="baseline", taps=taps)


CASES = {
    "baseline": Case(DEEP, taps=True, late=True),
    "scale_attn_weights_off": option(scale_attn_weights=False),
    "scale_attn_by_inverse_layer_idx": option(scale_attn_by_inverse_layer_idx=True),
    "scale_by_layer_only": option(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, taps=True),
    "gelu": option(activation_function="gelu"),
    "layer_norm_epsilon": option(layer_norm_epsilon=1e-3),
    "reorder_and_upcast_attn": option(reorder_and_upcast_attn=True),
    "n_inner": Case(SMALL, {"n_inner": 37}, taps=True),
    "names_bare": Case(SMALL, stored=bare, written=unaligned),
    "names_mixed": Case(SMALL, stored=both_spellings),
    "buffers": Case(SMALL, stored=with_buffers),
    "head_untied": Case(SMALL, {"tie_word_embeddings": False}, stored=own_head),
    "head_differs": Case(SMALL, stored=own_head, same_weights_as="head_untied"),
    "head_equal": Case(SMALL, stored=equal_head),
    "sharded": Case(SMALL, written=three_shards),
    "f16": Case(ODD, stored=f16),
    "bf16": Case(ODD, stored=bf16, taps=True),
    "three_dtypes_unaligned": Case(ODD, stored=three_dtypes, written=unaligned),
}


def write_checkpoint(folder: Path, case: Case) -> None:
    """The folder of one case."""
    folder.mkdir(parents=True)
    config = BASE | case.shape | case.config
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if case.same_weights_as:
        (folder / "model.safetensors").symlink_to(Path("..") / case.same_weights_as / "model.safetensors")
    else:
        case.written(folder, {name: tensor.contiguous() for name, tensor in case.stored(random_weights(config)).items()})


def load(folder: Path) -> transformers.GPT2LMHeadModel:
    """The checkpoint as transformers reads it: f32, eager attention, no dropout; nothing missing, nothing made up."""
    model, report = transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(f"{folder}: {report}")
    return model.eval()


def decided_prompt(model: transformers.GPT2LMHeadModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The first random prompt [1, T] after which all greedy ids [GREEDY] are chosen by more than MARGIN, and those ids."""
    for seed in range(1000):
        prompt = torch.from_numpy(np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, T)))
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=GREEDY)
        first, second = model(ids).logits[0, T - 1 : -1].topk(2).values.T
        if ((first - second) / first.abs() > MARGIN).all() and len(ids[0, T:].unique()) > GREEDY // 3:
            return prompt, ids[0, T:]
    raise ValueError("every prompt has a close call: choose other weights")


def activations(model: transformers.GPT2LMHeadModel, ids: torch.Tensor) -> Weights:
    """What passes through the modules for `ids` [1, T], under toyllm's names. Only the scores are computed here."""
    seen: Weights = {}
    H = model.config.n_head

    def keep(name: str, heads: int = 0) -> Callable:
        def hook(_module: object, _inputs: object, output: torch.Tensor | tuple) -> None:
            x = (output[0] if isinstance(output, tuple) else output)[0]
            seen[name] = x.reshape(len(x), heads, -1) if heads else x

        return hook

    def before(hook: Callable) -> Callable:
        return lambda module, inputs: hook(module, None, inputs)

    model.transformer.drop.register_forward_hook(keep("embed"))
    model.transformer.ln_f.register_forward_hook(keep("norm_f"))
    for i, block in enumerate(model.transformer.h):
        at = f"blocks.{i}"
        block.ln_1.register_forward_hook(keep(f"{at}.norm_1"))
        block.attn.c_attn.register_forward_hook(keep(f"{at}.qkv", heads=3 * H))
        block.attn.c_proj.register_forward_pre_hook(before(keep(f"{at}.attn.heads", heads=H)))
        block.attn.register_forward_hook(keep(f"{at}.attn.out"))
        block.ln_2.register_forward_pre_hook(before(keep(f"{at}.resid_mid")))
        block.ln_2.register_forward_hook(keep(f"{at}.norm_2"))
        block.mlp.act.register_forward_hook(keep(f"{at}.mlp.hidden"))
        block.mlp.register_forward_hook(keep(f"{at}.mlp.out"))
        block.register_forward_hook(keep(f"{at}.out"))

    result = model(ids, output_attentions=True)
    seen["logits"] = result.logits[0]
    future = torch.triu(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool), 1)
    for i, block in enumerate(model.transformer.h):
        q, k, v = seen.pop(f"blocks.{i}.qkv").split(H, dim=1)
        scores = (q.transpose(0, 1) @ k.permute(1, 2, 0) * block.attn.scaling).masked_fill(future, -torch.inf)
        weights = result.attentions[i][0]
        torch.testing.assert_close(scores.softmax(-1), weights)
        named = {"q": q, "k": k, "v": v, "scores": scores, "weights": weights}
        seen |= {f"blocks.{i}.attn.{name}": tensor for name, tensor in named.items()}
    return seen


@torch.no_grad()
def expected(folder: Path, case: Case) -> Weights:
    """What transformers computes for one case."""
    model = load(folder)
    prompt, greedy = decided_prompt(model)
    found = {"prompt": prompt[0], "greedy": greedy, "logits": model(prompt).logits[0]}
    if case.late:
        last = torch.arange(model.config.n_positions - T, model.config.n_positions)
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
        save_file(expected(GOLDENS / name, case), GOLDENS / f"{name}.safetensors", MADE_WITH)
        print(name)


if __name__ == "__main__":
    main()
