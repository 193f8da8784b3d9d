"""Dense weights in 8 bits in place of the stored ones, for those who ask for it (`--weights q8`).

Every matrix that a token is multiplied with gets a copy in 8 bits (kernels.q8): those of attention, feed-forward, experts that are not in
MXFP4, and the head. The embedding is looked up in the memory map as before, tied or not; norms, biases, the router and experts in MXFP4
stay as they are stored.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.dtypes import widen
from ..kernels.errors import ToyllmError
from ..kernels.q8 import BLOCK, Q8, unheld
from .memory import of_model, total
from .params import specs_for
from .preload import available_memory
from .weights import match

if TYPE_CHECKING:
    from .model import Model

QUIET = 0.5  # seconds before progress is told


def quantise(model: "Model", progress: Callable[[int, int], None]) -> None:
    """Put the model's dense weights in 8 bits; where that takes long, progress(done_bytes, total_bytes) is called after each matrix.

    Raises ToyllmError for a weight that 8 bits do not hold, by its tensor's name, and where memory does not suffice.
    """
    check_room(total(of_model(model, 1), "quantised"))
    matrices: list[np.ndarray] = []
    changed(model, lambda _, w: matrices.append(w))
    done, whole, began = 0, sum(w.nbytes for w in matrices), time.perf_counter()

    def in_8_bits(place: str, w: np.ndarray) -> Q8:
        nonlocal done
        made = model.kernels.quantize(w)
        if at := unheld(made):
            raise not_held(model, place, w, *at)
        done += w.nbytes
        if time.perf_counter() - began > QUIET:
            progress(done, whole)
        return made

    model.weights = changed(model, in_8_bits)


def changed(model: "Model", change: Callable[[str, np.ndarray], Any]) -> Any:
    """The model's weights with change(place, matrix) for each dense matrix; its place is "3.qkv", "3.gate_up" or "head"."""

    def block(i: int, w: Any) -> Any:
        parts = {part: getattr(w, part) for part in model.family.DENSE}
        new = {part: replace(linear, weight=change(f"{i}.{part}", linear.weight)) for part, linear in parts.items()}
        if hasattr(w, "experts") and isinstance(w.experts.gate_up, np.ndarray):
            experts = {part: getattr(w.experts, part) for part in ("gate_up", "down")}
            matrices = {part: tuple(change(f"{i}.{part}", matrix) for matrix in all_of_it) for part, all_of_it in experts.items()}
            new["experts"] = replace(w.experts, **matrices)
        return replace(w, **new)

    w = model.weights
    return replace(w, blocks=tuple(block(i, b) for i, b in enumerate(w.blocks)), head=change("head", w.head))


def check_room(needed: int) -> None:
    """Raise ToyllmError where so many bytes are more than is free: they have to stay, where pages of a memory map can be dropped."""
    free = available_memory()
    if free is not None and needed > free:
        figures = f"the dense weights take {needed / 1e9:.2f} GB in 8 bits, {free / 1e9:.2f} GB are free"
        raise ToyllmError(f"--weights q8: {figures}; close other programs, or leave them as stored")


def not_held(model: "Model", place: str, w: np.ndarray, j: int, b: int) -> ToyllmError:
    """What is wrong with a matrix: output j, block b of its inputs."""
    family, c = model.family, model.config
    tensors = match(model.checkpoint, specs_for(family, c, model.checkpoint.tensors), family.PREFIXES, family.IGNORED)
    fused = f"{place.partition('.')[0]}.qkv.weight"
    tensor = next(tensors[key] for key in (f"{place}.weight", fused, place, "embed") if key in tensors)
    largest = np.abs(widen(np.ascontiguousarray(w[b * BLOCK : (b + 1) * BLOCK, j]))).max()  # NaN, if there is one
    if np.isfinite(largest):
        what = f"a weight of size {largest:g}, more than blocks of 8 bits hold"
    else:
        what = f"{'NaN' if np.isnan(largest) else 'infinity'}, which 8 bits do not hold; `toyllm check` tells where"
    return ToyllmError(f"--weights q8: {tensor.path}: tensor {tensor.name} has {what}; leave the weights as stored")
