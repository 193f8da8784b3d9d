"""The table of backends: which functions do a model's arithmetic.

`avx512` and `avx2` are the register tiles at the width of the processor; `portable` is plain loops that LLVM lowers for
any machine; `numpy` the references. All take the same arguments, unchecked: the models check shapes when they are
built and ids and positions at each step.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from . import activation, attention, matmul, moe, moe_split, mxfp4, norm, pairs, q8, rotary, routing, split
from .errors import ToyllmError
from .host import choose_backend

log = logging.getLogger("toyllm")


@dataclass(frozen=True)
class Backend:
    """A model's arithmetic."""

    name: str
    matmul: Callable[..., None]
    layer_norm: Callable[..., None]
    gelu: Callable[[np.ndarray], None]
    gelu_new: Callable[[np.ndarray], None]
    attention: Callable[..., None]
    rms_norm: Callable[..., None]
    rotate: Callable[..., None]
    route: Callable[..., None]
    matmul_mxfp4: Callable[..., None]
    matmul_q8: Callable[..., None]
    quantize: Callable[[np.ndarray], q8.Q8]
    single: Callable[..., None] | None  # a single token's experts in one go, where there is a kernel for it
    mixing: moe.Mixing = field(default_factory=moe.Mixing)
    activations: str = "f32"  # of products of many rows: one of ACTIVATIONS
    exact: bool = False  # whether f32 throughout was asked for
    weights: str = "stored"  # how dense weights are held: one of WEIGHTS; `matmul` takes both forms where it is "q8"

    def mixture(self, *arguments: Any) -> None:
        """`moe.mix` with this backend's products."""
        moe.mix(self.mixing, self.matmul, self.matmul_mxfp4, self.single, *arguments)


def _reference_matmul(x, w, bias, out, panels) -> None:  # noqa: ARG001
    matmul.matmul_reference(x, w, bias, out)


def _reference_attention(q, keys, values, cells, adjoining, begin, end, scale, out, scratch, sinks=attention.NO_SINKS) -> None:  # noqa: ARG001
    attention.attention_reference(q, keys, values, cells, begin, end, scale, out, sinks)


def _reference_mxfp4(x, blocks, scales, bias, out, panels) -> None:  # noqa: ARG001
    mxfp4.matmul_mxfp4_reference(x, blocks, scales, bias, out)


def _reference_q8(x, w, bias, out, panels) -> None:  # noqa: ARG001
    q8.matmul_q8_reference(x, w, bias, out)


def _reference_route(logits, experts, weights) -> None:
    experts[...], weights[...] = routing.route_reference(logits, experts.shape[1])


TILES: dict[str, Any] = {
    "matmul": matmul.matmul_kernel,
    "layer_norm": norm.layer_norm_kernel,
    "gelu": activation.gelu_kernel,
    "gelu_new": activation.gelu_new_kernel,
    "attention": attention.attention_kernel,
    "rms_norm": norm.rms_norm_kernel,
    "rotate": rotary.rotate_kernel,
    "route": routing.route_kernel,
    "matmul_mxfp4": mxfp4.matmul_mxfp4_kernel,
    "matmul_q8": q8.matmul_q8_kernel,
    "quantize": q8.quantize_kernel,
    "single": moe.single,
}
PORTABLE = TILES | {
    "matmul": matmul.matmul_portable,
    "attention": attention.attention_portable,
    "matmul_mxfp4": mxfp4.matmul_mxfp4_portable,
    "matmul_q8": q8.matmul_q8_portable,
    "quantize": q8.quantize_portable,
    "single": None,
}
NUMPY = {
    "matmul": _reference_matmul,
    "layer_norm": norm.layer_norm_reference,
    "gelu": activation.gelu_reference,
    "gelu_new": activation.gelu_new_reference,
    "attention": _reference_attention,
    "rms_norm": norm.rms_norm_reference,
    "rotate": rotary.rotate_reference,
    "route": _reference_route,
    "matmul_mxfp4": _reference_mxfp4,
    "matmul_q8": _reference_q8,
    "quantize": q8.quantize_reference,
    "single": None,
}
TABLE = {"avx512": TILES, "avx2": TILES, "portable": PORTABLE, "numpy": NUMPY}


ACTIVATIONS = ("f32", "bf16")
ATTENTION = ("fused", "plain")
WEIGHTS = ("stored", "q8")
SPLIT = {"matmul_mxfp4": split.matmul_mxfp4_split_kernel, "single": moe_split.single_split}
BF16 = {"matmul": pairs.matmul_bf16_kernel}


def with_q8(matmul: Callable[..., None], matmul_q8: Callable[..., None]) -> Callable[..., None]:
    """A `matmul` whose weights may be in 8 bits, too."""

    def product(x: np.ndarray, w: np.ndarray | q8.Q8, bias: np.ndarray, out: np.ndarray, panels: np.ndarray) -> None:
        (matmul_q8 if isinstance(w, q8.Q8) else matmul)(x, w, bias, out, panels)

    return product


def backend(
    name: str = "auto",
    mixing: moe.Mixing | None = None,
    activations: str = "f32",
    step: str = "fused",
    weights: str = "stored",
    exact: bool = False,
) -> Backend:
    """The backend of that name, or the best for this processor.

    Activations that meet MXFP4 weights are held in 16 bits where the processor gains by it, unless `exact` says f32 throughout.
    `activations` "bf16" lets products of many rows round them, where the processor gains by it; `step` "plain" computes attention
    unfused; `weights` "q8" lets weights be in 8 bits, which are multiplied in f32 whatever `activations` says. Raises ToyllmError for
    what it does not know or cannot run.
    """
    chosen = choose_backend(name)
    if activations not in ACTIVATIONS:
        raise ToyllmError(f"--activations {activations}: expected {' or '.join(ACTIVATIONS)}")
    if step not in ATTENTION:
        raise ToyllmError(f"--attention {step}: expected {' or '.join(ATTENTION)}")
    if weights not in WEIGHTS:
        raise ToyllmError(f"--weights {weights}: expected {' or '.join(WEIGHTS)}")
    functions = TABLE[chosen]
    if chosen == "avx512" and split.AVAILABLE and not exact:
        functions = functions | SPLIT
    if activations == "bf16" and chosen == "avx512" and pairs.AVAILABLE:
        functions = functions | BF16 | {"matmul_mxfp4": partial(pairs.matmul_mxfp4_bf16_kernel, few=functions["matmul_mxfp4"])}
    elif activations == "bf16":
        log.info("--activations bf16: the %s kernels multiply in f32, which is as fast here; they go on so", chosen)
        activations = "f32"
    if step == "plain":
        functions = functions | {"attention": attention.attention_plain}
    if weights == "q8":
        functions = functions | {"matmul": with_q8(functions["matmul"], functions["matmul_q8"])}
    return Backend(chosen, **functions, mixing=mixing or moe.Mixing(), activations=activations, exact=exact, weights=weights)
