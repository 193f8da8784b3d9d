"""Every public kernel refuses what it cannot compute with, in one line that names the argument, before compiled code reads it.

Which these are is found by walking the package: a function that reaches compiled code and takes arrays is here, or says in its docstring
that it is unchecked.
"""

import dis
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import FunctionType

import numpy as np
import pytest

import toyllm.kernels
from toyllm.kernels.activation import gelu, gelu_new
from toyllm.kernels.attention import attention
from toyllm.kernels.cells import store
from toyllm.kernels.dtypes import to_bf16
from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.matmul import matmul
from toyllm.kernels.mxfp4 import dequantize, matmul_mxfp4
from toyllm.kernels.norm import layer_norm, rms_norm
from toyllm.kernels.q8 import Q8, dequantize_reference, matmul_q8, quantize, quantize_reference
from toyllm.kernels.rotary import rotate
from toyllm.kernels.routing import route
from toyllm.kernels.sampling import largest, log_sum_exp, sample
from toyllm.kernels.stream import COLUMNS, ROWS, read_stream

vector, matrix, cube = np.ones(4, np.float32), np.ones((3, 4), np.float32), np.ones((2, 3, 4), np.float32)
weights = np.ones((4, 5), np.float32)
weights.flags.writeable = False  # as from a memory map
read_only = np.ones((3, 64), np.float32)
read_only.flags.writeable = False
in_8_bits = quantize_reference(np.ones((40, 3), np.float32))
blocks, scales = np.zeros((3, 2, 16), np.uint8), np.full((3, 2), 127, np.uint8)
cells, begin, end = np.arange(3, dtype=np.int32), np.ones(2, np.int64), np.full(2, 3)

# Arguments that hold, by name.
CALLS: dict[Callable, dict[str, object]] = {
    matmul: {"x": matrix, "w": weights, "bias": np.ones(5, np.float32)},
    layer_norm: {"x": matrix, "weight": vector, "bias": vector},
    rms_norm: {"x": matrix, "weight": vector},
    gelu: {"x": vector},
    gelu_new: {"x": vector},
    attention: {"q": cube, "keys": cube[:1], "values": cube[:1], "cells": cells, "begin": begin, "end": end, "scale": 1.0},
    sample: {"logits": vector, "temperature": 1.0, "top_k": 2, "top_p": 0.9, "min_p": 0.1, "u": 0.5},
    log_sum_exp: {"logits": vector},
    largest: {"logits": vector, "n": 2},
    dequantize: {"blocks": blocks, "scales": scales, "out": np.ones((3, 64), np.float32)},
    matmul_mxfp4: {"x": np.ones((2, 64), np.float32), "blocks": blocks, "scales": scales, "bias": np.ones(3, np.float32)},
    matmul_q8: {"x": np.ones((2, 40), np.float32), "w": in_8_bits, "bias": np.ones(3, np.float32)},
    quantize: {"w": weights},
    route: {"logits": matrix, "k": 2},
    read_stream: {"a": np.ones((1, ROWS, COLUMNS), np.float32)},
    store: {"rows": matrix, "dtype": "q8"},
    rotate: {"x": cube, "cos": np.ones((2, 2), np.float32), "sin": np.ones((2, 2), np.float32)},
}
OPTIONAL = [(matmul, "bias"), (matmul_mxfp4, "bias"), (matmul_q8, "bias"), (dequantize, "out")]
ANYWHERE = [(matmul, "w"), (quantize, "w")]  # weights as in a memory map
ARRAYS = [
    (call, name) for call, arguments in CALLS.items() if call is not store for name, a in arguments.items() if isinstance(a, np.ndarray)
]
# What does not hold in their place, and what the error says.
WRONG: list[tuple[Callable, dict[str, object], str]] = [
    (matmul, {"x": np.ones((3, 5), np.float32)}, r"x: expected shape \[any, 4\], found \[3, 5\]"),
    (matmul, {"w": np.ones((8, 10), np.float32)[::2, ::2]}, "w: expected a contiguous matrix or the transpose of one"),
    (matmul, {"bias": vector}, r"bias: expected shape \[5\], found \[4\]"),
    (matmul, {"bias": to_bf16(np.ones(5))}, "bias: expected f32, found bf16"),
    (layer_norm, {"weight": np.ones(3, np.float32)}, r"weight: expected shape \[4\], found \[3\]"),
    (layer_norm, {"bias": np.ones(5, np.float32)}, r"bias: expected shape \[4\], found \[5\]"),
    (rms_norm, {"weight": np.ones(3, np.float32)}, r"weight: expected shape \[4\], found \[3\]"),
    (gelu, {"x": matrix}, r"x: expected shape \[any\], found \[3, 4\]"),
    (attention, {"keys": np.ones((1, 3, 5), np.float32)}, r"keys: expected shape \[any, any, 4\]"),
    (attention, {"values": np.ones((1, 4, 4), np.float32)}, r"values: expected shape \[1, 3, 4\]"),
    (
        attention,
        {"keys": np.ones((2, 3, 4), np.float32), "values": np.ones((2, 3, 4), np.float32)},
        "3 heads and the cache 2: expected",
    ),
    (
        attention,
        {"keys": np.ones((0, 3, 4), np.float32), "values": np.ones((0, 3, 4), np.float32)},
        "3 heads and the cache 0: expected",
    ),
    (attention, {"values": to_bf16(np.ones((1, 3, 4)))}, "values: expected f32, found bf16"),
    (attention, {"cells": np.arange(3)}, "cells: expected int32, found int64"),
    (attention, {"cells": np.int32([0, 1, 3])}, "cells: expected indices from 0 to 2, found 0 to 3"),
    (attention, {"cells": np.int32([0, -1, 2])}, "cells: expected indices from 0 to 2, found -1 to 2"),
    (attention, {"begin": np.int32([0, 0])}, "begin: expected int64, found int32"),
    (attention, {"begin": np.int64([-1, 0])}, "expected 0 <= begin < end <= 3"),
    (attention, {"begin": np.int64([0, 3])}, "expected 0 <= begin < end <= 3"),
    (attention, {"end": np.int64([3, 4])}, "expected 0 <= begin < end <= 3"),
    (attention, {"end": np.int64([3])}, r"end: expected shape \[2\], found \[1\]"),
    (attention, {"sinks": np.ones(2, np.float32)}, r"sinks: expected shape \[3\], found \[2\]"),
    (attention, {"sinks": np.ones(0, np.float32)}, r"sinks: expected shape \[3\], found \[0\]"),
    (attention, {"sinks": [1.0, 2.0, 3.0]}, "sinks: expected a NumPy array, found list"),
    (dequantize, {"blocks": blocks[:, :1].copy()}, r"blocks: expected shape \[3, 2, 16\], found \[3, 1, 16\]"),
    (dequantize, {"blocks": blocks[..., :8].copy()}, r"blocks: expected shape \[3, 2, 16\], found \[3, 2, 8\]"),
    (dequantize, {"scales": scales[:2]}, r"blocks: expected shape \[2, 2, 16\], found \[3, 2, 16\]"),
    (dequantize, {"out": np.ones((3, 32), np.float32)}, r"out: expected shape \[3, 64\], found \[3, 32\]"),
    (dequantize, {"out": np.ones((4, 64), np.float32)}, r"out: expected shape \[3, 64\], found \[4, 64\]"),
    (dequantize, {"out": read_only}, "out: expected an array that can be written"),
    (matmul_mxfp4, {"scales": scales[:2]}, r"blocks: expected shape \[2, 2, 16\], found \[3, 2, 16\]"),
    (matmul_mxfp4, {"blocks": blocks.view(np.int8)}, "blocks: expected uint8, found int8"),
    (matmul_mxfp4, {"x": np.ones((2, 63), np.float32)}, r"x: expected shape \[any, 64\], found \[2, 63\]"),
    (matmul_mxfp4, {"x": to_bf16(np.ones((2, 64)))}, "x: expected f32, found bf16"),
    (matmul_mxfp4, {"bias": np.ones(64, np.float32)}, r"bias: expected shape \[3\], found \[64\]"),
    (matmul_q8, {"w": weights}, "w: expected a Q8, found ndarray; kernels.q8.quantize makes one"),
    (matmul_q8, {"w": in_8_bits._replace(K=32)}, "w.K: expected as many inputs as 2 blocks of 32 are for, found 32"),
    (matmul_q8, {"w": in_8_bits._replace(K=65)}, "w.K: expected as many inputs as 2 blocks of 32 are for, found 65"),
    (matmul_q8, {"w": in_8_bits._replace(scales=in_8_bits.scales[:2])}, r"w.values: expected shape \[2, 64\], found \[3, 64\]"),
    (matmul_q8, {"w": in_8_bits._replace(scales=np.ones((3, 2), np.float32))}, "w.scales: expected f16, found f32"),
    (matmul_q8, {"w": in_8_bits._replace(values=in_8_bits.values.view(np.uint8))}, "w.values: expected int8, found uint8"),
    (matmul_q8, {"w": in_8_bits._replace(values=np.repeat(in_8_bits.values, 2, 1)[:, ::2])}, "w.values: expected a C-contiguous array"),
    (matmul_q8, {"x": np.ones((2, 64), np.float32)}, r"x: expected shape \[any, 40\], found \[2, 64\]"),
    (matmul_q8, {"bias": np.ones(40, np.float32)}, r"bias: expected shape \[3\], found \[40\]"),
    (quantize, {"w": np.ones((8, 10), np.float32)[::2, ::2]}, "w: expected a contiguous matrix or the transpose of one"),
    (quantize, {"w": np.ones((3, 4))}, "w: expected f32 or f16 or bf16, found float64"),
    (route, {"k": 0}, "k: expected 1 to 4, the number of experts, found 0"),
    (route, {"k": 5}, "k: expected 1 to 4, the number of experts, found 5"),
    (route, {"normalization": "max"}, "normalization: expected softmax or linear, found 'max'"),
    (read_stream, {"a": np.ones((1, ROWS, 5), np.float32)}, rf"a: expected shape \[any, {ROWS}, {COLUMNS}\], found"),
    (store, {"dtype": "q4"}, "--cache-dtype q4: expected f32 or bf16 or q8"),
    (attention, {"keys": np.ones((1, 3, 4), np.int8)}, r"keys: expected shape \[any, any, 6\], found \[1, 3, 4\]"),
    (attention, {"keys": np.ones((1, 3, 6), np.int8)}, r"values: expected int8, found f32"),
    (rotate, {"x": np.ones((2, 3, 5), np.float32)}, "x: expected an even head size, found 5"),
    (rotate, {"cos": np.ones((2, 4), np.float32)}, r"cos: expected shape \[2, 2\], found \[2, 4\]"),
    (rotate, {"sin": np.ones((3, 2), np.float32)}, r"sin: expected shape \[2, 2\], found \[3, 2\]"),
    (sample, {"temperature": 0}, "temperature 0,"),
    (sample, {"temperature": -1.0}, "temperature -1.0,"),
    (sample, {"temperature": np.nan}, "temperature nan,"),
    (sample, {"top_k": -1}, "top_k -1,"),
    (sample, {"top_p": 1.01}, "top_p 1.01,"),
    (sample, {"top_p": np.nan}, "top_p nan,"),
    (sample, {"min_p": -0.1}, "min_p -0.1,"),
    (sample, {"u": 1.0}, "u 1.0:"),
    (sample, {"logits": np.float32([1, np.nan])}, "logits: expected a largest one that is finite"),
    (sample, {"logits": np.float32([1, np.inf])}, "logits: expected a largest one that is finite"),
    (sample, {"logits": np.float32([-np.inf])}, "logits: expected a largest one that is finite"),
    (sample, {"logits": np.empty(0, np.float32)}, "logits: expected a largest one that is finite"),
    (log_sum_exp, {"logits": np.empty(0, np.float32)}, "logits: expected at least one"),
]


def refusal(call: Callable, changed: dict[str, object]) -> str:
    with pytest.raises(ToyllmError) as refused:
        call(**(CALLS[call] | changed))
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("call", "changed", "says"), WRONG, ids=lambda a: getattr(a, "__name__", None))
def test_refuses(call, changed, says):
    with pytest.raises(ToyllmError, match=says):
        call(**(CALLS[call] | changed))


@pytest.mark.parametrize(("call", "name"), ARRAYS, ids=lambda a: getattr(a, "__name__", a))
class TestEveryArray:
    def test_that_is_empty_or_pretends_to_be_huge(self, call, name):
        """Without elements there is nothing to compute, or it is refused; as are 2^60 that share their bytes, at once."""
        array = CALLS[call][name]
        for axis in range(array.ndim):
            try:
                found = call(**(CALLS[call] | {name: np.empty([0 if i == axis else n for i, n in enumerate(array.shape)], array.dtype)}))
            except ToyllmError:
                continue
            assert np.size(found.values if isinstance(found, Q8) else found) == 0
            huge = np.broadcast_to(array.reshape(-1)[0], [2**60 if i == axis else 1 for i in range(array.ndim)])
            assert refusal(call, {name: huge}).startswith(name)

    def test_that_is_not_aligned(self, call, name):
        array = CALLS[call][name]
        if array.dtype.alignment == 1 or (call, name) in ANYWHERE:
            pytest.skip("may lie anywhere")
        odd = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
        odd[...] = array
        assert refusal(call, {name: odd}) == f"{name}: expected an aligned array; pass {name}.copy()"

    def test_of_another_type(self, call, name):
        array = CALLS[call][name]
        for wrong in (array.tolist(), 3 if (call, name) in OPTIONAL else None, "text", array.astype(object)):
            assert refusal(call, {name: wrong}).startswith(f"{name}: expected ")

    def test_of_another_dtype(self, call, name):
        array = CALLS[call][name]
        swapped = array.dtype.newbyteorder() if array.itemsize > 1 else np.int8
        for dtype in (np.float64, np.int16, swapped):
            assert refusal(call, {name: array.astype(dtype)}).startswith(f"{name}: expected ")

    def test_of_another_number_of_axes(self, call, name):
        array = CALLS[call][name]
        for wrong in (array[None], np.array(1, array.dtype), array.reshape(-1) if array.ndim > 1 else array[:, None]):
            assert refusal(call, {name: wrong}).startswith(f"{name}: expected shape ")

    def test_that_is_not_contiguous(self, call, name):
        array = CALLS[call][name]
        apart = np.repeat(array, 2, axis=-1)[..., ::2]
        message = refusal(call, {name: apart})
        assert message.startswith(f"{name}: expected a ")
        assert "contiguous" in message
        assert f"pass np.ascontiguousarray({name})" in message


NUMBERS = [(call, name) for call, arguments in CALLS.items() for name, number in arguments.items() if isinstance(number, int | float)] + [
    (layer_norm, "epsilon"),
    (rms_norm, "epsilon"),
]


@pytest.mark.parametrize(("call", "name"), NUMBERS, ids=lambda a: getattr(a, "__name__", a))
def test_of_every_number(call, name):
    for wrong in (None, "1", [1], True, 1j, np.ones(2), 2**70, -(2**5000)):
        assert refusal(call, {name: wrong}).startswith(f"{name}: expected ")


def reaches(function: Callable, seen: set[Callable]) -> bool:
    """Whether a function of toyllm.kernels calls compiled code, itself or through others."""
    if hasattr(function, "py_func"):
        return True
    if not isinstance(function, FunctionType) or not function.__module__.startswith("toyllm.kernels") or function in seen:
        return False
    seen.add(function)
    loads = (step.argval for step in dis.get_instructions(function) if step.opname == "LOAD_GLOBAL")
    named = [function.__globals__.get(name) for name in loads]
    for module, name in LATE.get(function.__name__, ()):
        named.append(getattr(importlib.import_module(f"toyllm.kernels.{module}"), name))
    return any(callable(other) and reaches(other, seen) for other in named)


LATE = {"store": [("rounding", "q8_rows")]}  # what functions import when they run


def taking_arrays() -> Iterator[Callable]:
    for module in pkgutil.iter_modules(toyllm.kernels.__path__):
        if module.ispkg or module.name == "elementary":  # what kernels inline, a number at a time
            continue
        for name, function in vars(importlib.import_module(f"toyllm.kernels.{module.name}")).items():
            if name.startswith("_") or not isinstance(function, FunctionType) or function.__module__ != f"toyllm.kernels.{module.name}":
                continue
            given = " ".join(str(p.annotation) for p in inspect.signature(function).parameters.values())
            if ("ndarray" in given or "Q8" in given or "empty" in given) and reaches(function, set()):
                yield function


@pytest.mark.needs_jit
def test_every_kernel_is_here_or_says_that_it_is_unchecked():
    found = list(taking_arrays())
    assert set(CALLS) <= set(found)
    missing = [f"{f.__module__}.{f.__name__}" for f in found if f not in CALLS and "unchecked" not in (f.__doc__ or "").lower()]
    assert not missing


@pytest.mark.needs_jit
@pytest.mark.parametrize("call", CALLS, ids=lambda a: a.__name__)
def test_what_holds_is_computed(call):
    """The arguments that the others are changed from are sound."""
    found = call(**CALLS[call])
    assert np.isfinite(dequantize_reference(found) if isinstance(found, Q8) else found).all()
