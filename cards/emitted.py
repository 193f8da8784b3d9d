"""What an emitted script is made of beside the cards: its head, the reader of tensors, helpers, and NumPy's words for the functions."""

from collections.abc import Callable

from ..kernels.errors import ToyllmError

HEAD = '''"""{name}, a {family}, in plain NumPy: written from toyllm's algorithm cards, a function each, step by step.

    python SCRIPT FOLDER 464 3290 …                     the likeliest tokens behind these ids, and their logits
    python SCRIPT FOLDER 464 3290 … --save FILE.npy     also all logits, float32 [T, V]

FOLDER holds the model's .safetensors files, or is one of them. Weights are widened to float32 as they are read.
The aim is to be read, not to be fast.
"""

import json
import sys
from pathlib import Path

import numpy as np
'''

READER = '''
FILES = {}  # of a tensor: its file's bytes, dtype, shape, first and last byte


def open_files(path):
    """Map the files, and note where each tensor lies in them."""
    path = Path(path)
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        data = np.memmap(file, np.uint8, "r")
        length = int(data[:8].view("<u8")[0])
        for name, entry in json.loads(bytes(data[8 : 8 + length])).items():
            if name != "__metadata__":
                first, last = (8 + length + n for n in entry["data_offsets"])
                FILES[name] = data, entry["dtype"], entry["shape"], first, last


def tensor(name):
    """A tensor by its name in the cards: float32, or the bytes of MXFP4."""
    layer = 0
    if name.startswith("blocks."):
        _, layer, part = name.split(".", 2)
        name = f"blocks.{part}"
    data, dtype, shape, first, last = FILES[NAMES[name].format(layer)]
    array = data[first:last]
    if dtype != "U8" and first % 4:
        array = array.copy()  # NumPy reads numbers where they are aligned
    if dtype == "BF16":
        array = (array.view("<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype != "U8":
        array = array.view({"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
    array = array.reshape(shape)
    return array[slice(*ROWS[name])] if name in ROWS else array
'''

MAIN = """
def main(arguments):
    save = None
    if "--save" in arguments[:-1]:
        at = arguments.index("--save")
        save, arguments = arguments[at + 1], arguments[:at] + arguments[at + 2 :]
    if len(arguments) < 2:
        sys.exit("usage: SCRIPT FOLDER ID… [--save FILE.npy]")
    open_files(arguments[0])
    z, _ = {model}(np.array([int(i) for i in arguments[1:]]))
    for token in np.argsort(-z[-1], kind="stable")[:5]:
        print(token, z[-1, token])
    if save:
        np.save(save, z.astype(np.float32))


if __name__ == "__main__":
    main(sys.argv[1:])
"""

HELPERS = {  # by name, in the order in which they stand
    "sigmoid": '''
def sigmoid(x):
    """1 / (1 + exp(-x)); where exp would overflow, 0."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))
''',
    "GELU": '''
def GELU(x):
    """x · Φ(x)."""
    from math import erfc, sqrt

    return x * np.frompyfunc(lambda v: erfc(-v / sqrt(2)) / 2, 1, 1)(x).astype(x.dtype)
''',
    "GELU_tanh": '''
def GELU_tanh(x):
    """The approximation that GPT-2 was trained with."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))
''',
    "softmax": '''
def softmax(x, axis=-1):
    """exp(x) / Σ exp(x), the largest taken off before."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)
''',
    "window": '''
def window(queries, keys, width):
    """Whether query t, the last of the positions, sees key s: one of the `width` latest up to its own."""
    age = (np.arange(queries) + keys - queries)[:, None] - np.arange(keys)
    return (age >= 0) & (age < width)
''',
    "causal": '''
def causal(queries, keys):
    """Whether query t, the last of the positions, sees key s: none behind its own."""
    return (np.arange(queries) + keys - queries)[:, None] >= np.arange(keys)
''',
    "top_k": '''
def top_k(x, k):
    """Indices of the k largest, descending, ties to the lower index."""
    return np.argsort(-x, axis=-1, kind="stable")[..., :k]
''',
}
SAME = ("exp", "log", "sin", "cos", "tanh", "sqrt", "square", "abs", "floor", "ceil", "minimum", "maximum", "where")
REDUCED = {"sum": "sum", "mean": "mean", "variance": "var", "std": "std", "max": "max", "min": "min", "any": "any", "all": "all"}
ALONG = {"cumsum": ("cumsum", ""), "argmax": ("argmax", ""), "argsort": ("argsort", ', kind="stable"')}
JOINED = {"concat": "concatenate", "stack": "stack"}


WRITTEN: dict[str, Callable[[list[str], str | None], str]] = {  # of the arguments and the axis
    "SiLU": lambda x, _: f"({x[0]}) * sigmoid({x[0]})",
    "ReLU": lambda x, _: f"np.maximum({x[0]}, 0)",
    "clamp": lambda x, _: f"np.clip({', '.join(x)})",
    "mask": lambda x, _: f"np.where({x[1]}, {x[0]}, -np.inf)",
    "split": lambda x, axis: f"np.split({x[0]}, {x[1]}, axis={axis or -1})",
    "repeat": lambda x, axis: f"np.repeat({x[0]}, {x[1]}, axis={axis or 0})",
    "reshape": lambda x, _: f"np.reshape({x[0]}, {sizes(x[1:])})",
    "permute": lambda x, _: f"np.transpose({x[0]}, {sizes(x[1:])})",
    "transpose": lambda x, _: f"np.swapaxes({x[0]}, -1, -2)",
    "gather": lambda x, axis: f"np.take_along_axis({x[0]}, {x[1]}, axis={axis or -1})",
    "nonzero": lambda x, _: f"np.flatnonzero({x[0]})",
    "range": lambda x, _: f"np.arange({', '.join(x)})",
    "zeros": lambda x, _: f"np.zeros({sizes(x)})",
    "full": lambda x, _: f"np.full({sizes(x[1:])}, {x[0]})",
    "size": lambda x, axis: f"{x[0]}.shape[{axis}]",
}


def sizes(x: list[str]) -> str:
    """Several sizes as a tuple, one as itself."""
    return f"({', '.join(x)})" if len(x) > 1 else x[0]


def call(name: str, x: list[str], axis: str | None) -> str:
    """A function of the cards in NumPy's words. Raises ToyllmError for one that it has none for."""
    if name in WRITTEN:
        return WRITTEN[name](x, axis)
    if name in HELPERS:
        return f"{name}({', '.join([*x, *([f'axis={axis}'] if axis else [])])})"
    if name in SAME:
        return f"np.{name}({', '.join(x)})"
    if name in REDUCED:
        return f"np.{REDUCED[name]}({x[0]}" + (f", axis={axis}, keepdims=True)" if axis else ")")
    if name in ALONG:
        function, more = ALONG[name]
        return f"np.{function}({x[0]}, axis={axis or -1}{more})"
    if name in JOINED:
        return f"np.{JOINED[name]}([{', '.join(x)}], axis={axis or 0})"
    raise ToyllmError(f"{name}: this function of the cards is not written in NumPy yet; --check runs the card itself")
