"""Tensors as JSON: what they are, what their values come to, and the values as nested lists, exactly.

    {"schema": "toyllm.dump-tensor/1", "tensors": [{"name", "dtype", "shape", "bytes", "shard",            of a list
                                                    "statistics": {"min", "max", "mean", "std", "zeros", "nan", "inf", "elements"},
                                                    "selected", "edge_items", "values"}]}                  of values

`dtype` is safetensors' name or "MXFP4"; `shape` and `bytes` are the whole tensor's, `selected` is the shape of the slice. JSON has no NaN:
"NaN", "Infinity" and "-Infinity" are strings, as float() in Python and Number() in JavaScript read them. Bits are strings, "0x3f80"; in
place of `values`, MXFP4 has `blocks`: [{"index", "first", "part", "scale", "codes"}], null where an axis is cut. Of a run there are also
`settings`, before the tensors: model, backend and the like, the decode `step`, and the `changes` that were made.
"""

import itertools
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from ..kernels.dtypes import widen
from .tensor_stats import Statistics
from .tensor_text import Scalars, spans
from .tensor_values import Values

SCHEMA = "toyllm.dump-tensor/1"


def describe(values: Values) -> dict[str, Any]:
    """Name, stored dtype, shape and bytes of the whole tensor."""
    return {"name": values.name, "dtype": values.kind, "shape": list(values.whole), "bytes": values.nbytes}


def describe_statistics(found: Statistics) -> dict[str, Any]:
    """The statistics under their names."""
    return {key: json_number(value) for key, value in asdict(found).items()}


def describe_values(values: Values, scalars: Scalars, edge: int | None) -> dict[str, Any]:
    """The values of a part and its shape; `edge_items` is null where all are there, else how many of each end of a longer axis are."""
    cut = edge is not None and any(len(spans(n, edge)) > 1 for n in values.shape)
    return {"selected": list(values.shape), "edge_items": edge if cut else None, "values": nested(values, scalars, edge)}


def json_numbers(array: np.ndarray) -> list[Any]:
    """Writes values as JSON has them, exactly: numbers, true and false; what JSON has no number for as "NaN", "Infinity", "-Infinity"."""
    return [json_number(value) for value in widen(array).ravel().tolist()]


def json_number(value: Any) -> Any:
    """The number, or the word for one that is not finite: as Python's float() and JavaScript's Number() read it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def nested(values: Values, scalars: Scalars, edge: int | None, at: tuple[slice, ...] = ()) -> Any:
    """The same values as nested lists; where an axis is cut, its two ends follow one another."""
    if len(at) == len(values.shape):
        return scalars(values.read(at))[0]
    parts = spans(values.shape[len(at)], edge)
    if len(at) == len(values.shape) - 1:
        return list(itertools.chain(*(scalars(values.read((*at, slice(part.start, part.stop)))) for part in parts)))
    return [nested(values, scalars, edge, (*at, slice(i, i + 1))) for part in parts for i in part]
