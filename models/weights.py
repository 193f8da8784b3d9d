"""From a checkpoint's tensors to a model's: names in all dialects, shapes checked, nothing missing and nothing left over."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..kernels.dtypes import BF16, F16, F32, widen
from ..kernels.errors import ToyllmError
from .checkpoint import Checkpoint, Tensor
from .json_files import brief

log = logging.getLogger("toyllm")


@dataclass(frozen=True)
class Spec:
    """A tensor as the architecture wants it: its name in the checkpoint, its shape, and the axis along which it can be sharded."""

    name: str
    shape: tuple[int, ...]
    shard_axis: int | None = None
    optional: bool = False


def match(checkpoint: Checkpoint, specs: Mapping[str, Spec], prefixes: tuple[str, ...], ignored: re.Pattern[str]) -> dict[str, Tensor]:
    """The checkpoint's tensor for each spec, by our names. Raises ToyllmError for one that is missing, extra or of another shape.

    Each name may carry any of `prefixes`, mixed freely; names that `ignored` matches without their prefix are passed over.
    """
    ours = {spec.name: key for key, spec in specs.items()}
    found: dict[str, Tensor] = {}
    for tensor in checkpoint.tensors.values():
        bare = next(tensor.name.removeprefix(p) for p in prefixes if tensor.name.startswith(p))
        if ignored.fullmatch(bare):
            continue
        key = ours.get(bare)
        if key is None:
            name = brief(tensor.name)[1:-1]  # of any length; those that are known are short
            raise ToyllmError(f"{tensor.path}: tensor {name} is not part of this architecture; is config.json the right one?")
        if key in found:
            raise ToyllmError(f"{tensor.path}: tensors {found[key].name} and {tensor.name} are the same weight; keep one")
        if tensor.shape != specs[key].shape:
            expected, shape = list(specs[key].shape), brief(list(tensor.shape))
            raise ToyllmError(f"{tensor.path}: tensor {tensor.name}: expected shape {expected}, found {shape}")
        found[key] = tensor
    missing = [spec.name for key, spec in specs.items() if key not in found and not spec.optional]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ToyllmError(f"{checkpoint.shards[0]}: tensor {missing[0]}{more} missing; download the checkpoint again")
    return found


def matrix(checkpoint: Checkpoint, tensor: Tensor) -> np.ndarray:
    """A weight matrix as it is stored, from the memory map. Raises ToyllmError for a dtype without kernels."""
    array = checkpoint.array(tensor.name)
    if array.dtype not in (F32, F16, BF16):
        raise ToyllmError(f"{tensor.path}: tensor {tensor.name}: expected F32, F16 or BF16, found {tensor.dtype}")
    return array


def mxfp4_bytes(checkpoint: Checkpoint, tensor: Tensor) -> np.ndarray:
    """The blocks or the scales of MXFP4 weights, u8, from the memory map. Raises ToyllmError for another dtype."""
    if tensor.dtype != "U8":
        raise ToyllmError(f"{tensor.path}: tensor {tensor.name}: expected U8, found {tensor.dtype}")
    return checkpoint.array(tensor.name)


def vector(checkpoint: Checkpoint, tensor: Tensor) -> np.ndarray:
    """A bias or norm weight, widened once to f32: small, and read whole by every token."""
    wide = np.ascontiguousarray(widen(matrix(checkpoint, tensor)), np.float32)
    if not np.isfinite(wide).all():
        log.warning("%s: tensor %s holds NaN or infinity; `toyllm check` says where", tensor.path, tensor.name)
    return wide
