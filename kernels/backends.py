"""The table of backends: which functions do a model's arithmetic.

`avx512` and `avx2` are the register tiles at the width of the processor; `portable` is plain loops that LLVM lowers for
any machine; `numpy` the references. All take the same arguments, unchecked: the models check shapes when they are
built and ids and positions at each step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import activation, attention, matmul, norm
from .host import choose_backend


@dataclass(frozen=True)
class Backend:
    """A model's arithmetic."""

    name: str
    matmul: Callable[..., None]
    layer_norm: Callable[..., None]
    gelu: Callable[[np.ndarray], None]
    gelu_new: Callable[[np.ndarray], None]
    attention: Callable[..., None]


def _reference_matmul(x, w, bias, out, panels) -> None:  # noqa: ARG001
    matmul.matmul_reference(x, w, bias, out)


def _reference_attention(q, keys, values, cells, adjoining, begin, end, scale, out, scratch, sinks=attention.NO_SINKS) -> None:  # noqa: ARG001
    attention.attention_reference(q, keys, values, cells, begin, end, scale, out, sinks)


TILES = (matmul.matmul_kernel, norm.layer_norm_kernel, activation.gelu_kernel, activation.gelu_new_kernel, attention.attention_kernel)
TABLE = {
    "avx512": TILES,
    "avx2": TILES,
    "portable": (matmul.matmul_portable, *TILES[1:4], attention.attention_portable),
    "numpy": (_reference_matmul, norm.layer_norm_reference, activation.gelu_reference, activation.gelu_new_reference, _reference_attention),
}


def backend(name: str = "auto") -> Backend:
    """The backend of that name, or the best for this processor. Raises ToyllmError for one it does not know or cannot run."""
    chosen = choose_backend(name)
    return Backend(chosen, *TABLE[chosen])
