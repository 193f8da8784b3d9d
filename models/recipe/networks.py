"""The two networks as transformers has them, made ready for training: initial weights, and experts that run on every token at once."""

import math
from functools import partial
from typing import Any

from . import mxfp4
from .script import imported

INITIAL_STD = 0.02
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # of GPT-OSS's activation


def new_model(architecture: str, config: dict[str, Any]) -> Any:
    """A model with random weights from torch's generator as it stands. GPT-2's are drawn by transformers, GPT-OSS's here."""
    transformers = imported("transformers")
    if architecture == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**config))
    initialise(model)
    set_rounding(model, on=False)
    return model


def initialise(model: Any) -> None:
    """Draw GPT-OSS's weights: normal, those that write to the residual narrower by √(2 · layers); vectors of biases and sinks zero."""
    init = imported("torch").nn.init
    narrower = INITIAL_STD / math.sqrt(2 * model.config.num_hidden_layers)
    for name, weight in model.named_parameters():
        writes_to_residual = "o_proj.weight" in name or name.endswith("down_proj")
        if weight.dim() >= 2:
            init.normal_(weight, std=narrower if writes_to_residual else INITIAL_STD)
        elif "bias" in name or "sinks" in name:
            init.zeros_(weight)


def set_rounding(model: Any, on: bool) -> None:
    """Let GPT-OSS's experts compute with their weights as they are, or (`on`) with the nearest MXFP4 values."""
    for layer in model.model.layers:
        layer.mlp.experts.forward = partial(every_expert, layer.mlp.experts, on)


def every_expert(experts: Any, rounding: bool, hidden: Any, chosen: Any, weights: Any) -> Any:
    """The mixture's sum with every expert run on every token, the unchosen ones weighted 0: at this size faster than routing.

    hidden [T, D], chosen [T, k] expert indices, weights [T, k] → [T, D].
    """
    torch = imported("torch")
    gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj  # [E, D, 2F] and [E, F, D]
    if rounding:
        gate_up_proj, down_proj = rounded(gate_up_proj), rounded(down_proj)
    shares = torch.zeros(len(hidden), experts.num_experts, dtype=weights.dtype).scatter(1, chosen, weights)  # [T, E]
    gate_up = torch.matmul(hidden.unsqueeze(0), gate_up_proj) + experts.gate_up_proj_bias[:, None]  # [E, T, 2F]
    gate, up = gate_up[..., ::2].clamp(max=SWIGLU_LIMIT), gate_up[..., 1::2].clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    inner = (up + 1) * gate * torch.sigmoid(gate * SWIGLU_ALPHA) * shares.t().unsqueeze(-1).to(gate_up.dtype)  # [E, T, F]
    side_by_side = inner.permute(1, 0, 2).flatten(1)  # [T, E·F]: one product sums over experts too
    return side_by_side @ down_proj.flatten(0, 1) + shares.to(inner.dtype) @ experts.down_proj_bias.to(inner.dtype)


def rounded(weight: Any) -> Any:
    """The nearest MXFP4 values of an expert weight [E, in, out], blocks along `in`. The gradient passes straight through to the weight."""
    values = mxfp4.nearest(weight.detach().transpose(1, 2).numpy())
    return imported("torch").from_numpy(values).transpose(1, 2) + (weight - weight.detach())  # the difference is exactly 0


def round_experts(model: Any) -> None:
    """Replace the experts' weights by the nearest MXFP4 values, so that export loses nothing more."""
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            weight.data.copy_(rounded(weight.detach()))
