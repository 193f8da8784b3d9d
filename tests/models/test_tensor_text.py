"""Tensors as text: the anchor's layout at every rank, edge, precision and threshold, and every dtype; as JSON, exactly."""

import json
import runpy
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from toyllm.kernels.dtypes import BF16, F16
from toyllm.models.tensor_json import describe_values, json_numbers
from toyllm.models.tensor_text import Layout, format_values, hexadecimal, texts
from toyllm.models.tensor_values import of_array

HERE = Path(__file__).parent
GOLDENS = HERE / "goldens" / "dump"
made_by = runpy.run_path(str(HERE / "make_dump_goldens.py"))
CASES = made_by["CASES"]


def text(array: np.ndarray, raw: bool = False, **settings) -> str:
    values, layout = of_array("x", array), Layout(**settings)
    return "".join(format_values(values, hexadecimal if raw else texts(layout), layout.edge(values)))


@pytest.mark.parametrize("name", CASES)
def test_the_layout_is_the_golden_one(name: str) -> None:
    shape, edge, precision, threshold, scientific, integers = CASES[name]
    array = np.array(made_by["numbers"](shape, integers), np.int64 if integers else np.float32).reshape(shape)
    found = text(array, edge_items=edge, precision=precision, threshold=threshold, scientific=scientific)
    assert found + "\n" == (GOLDENS / f"{name}.txt").read_text()


def test_no_golden_file_is_without_its_case() -> None:
    assert {path.stem for path in GOLDENS.iterdir()} == set(CASES)


@pytest.mark.parametrize(
    ("array", "settings", "expected"),
    [
        (np.array([1, -2.5, 3], np.float32), {}, "[ 1.0000, -2.5000,  3.0000]"),
        (np.arange(8).reshape(2, 2, 2), {}, "[[[ 0,  1],\n  [ 2,  3]],\n\n [[ 4,  5],\n  [ 6,  7]]]"),
        (np.arange(1001), {}, "[ 0,  1,  2, ...,  998,  999,  1000]"),
        (np.arange(1200).reshape(40, 30), {"edge_items": 1}, "[[ 0, ...,  29],\n ...,\n [ 1170, ...,  1199]]"),
    ],
)
def test_the_anchors_own_examples(array: np.ndarray, settings: dict, expected: str) -> None:
    assert text(array, **settings) == expected


def test_what_is_no_number_has_a_name() -> None:
    assert text(np.array([np.nan, np.inf, -np.inf, -0.0, 0.0], np.float32), precision=1) == "[ NaN,  +Inf, -Inf, -0.0,  0.0]"


def test_a_scalar_stands_alone_and_nothing_is_empty() -> None:
    assert text(np.array(2.5)) == "2.5000"
    assert text(np.array(-3, np.int8)) == "-3"
    assert text(np.zeros((0,))) == text(np.zeros((3, 0, 2))) == "[]"


def test_without_items_at_the_ends_only_the_cut_shows() -> None:
    assert text(np.arange(10).reshape(2, 5), edge_items=0, threshold=0) == "[...]"


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "u1", "u8", "i1", "i8", "?", "bf16", "f16"])
def test_every_dtype_shows_its_values_and_its_bits(dtype: str) -> None:
    exact = np.array([0, 1, 2, 5]) if dtype != "?" else np.array([False, True, True, False])
    stored = {"bf16": exact.astype(ml_dtypes.bfloat16).view(BF16), "f16": exact.astype(np.float16).view(F16)}
    array = stored[dtype] if dtype in stored else exact.astype(dtype)
    expected = [f" {v:.4f}" if dtype in ("f8", "f4", "f2", "bf16", "f16") else f" {v}" for v in exact.tolist()]
    assert text(array) == "[" + ", ".join(expected) + "]"
    width = array.dtype.itemsize
    bits = [f" 0x{int.from_bytes(array[i : i + 1].tobytes(), 'little'):0{2 * width}x}" for i in range(4)]
    assert text(array, raw=True) == "[" + ", ".join(bits) + "]"


def test_digits_on_demand_give_the_same_f32_back() -> None:
    array = np.random.default_rng(1).standard_normal(300).astype(np.float32)
    shown = text(array, scientific=True, precision=8, threshold=None)
    np.testing.assert_array_equal(np.array(shown.strip("[]").split(","), float).astype(np.float32), array)


def test_only_the_ends_of_axes_are_read() -> None:
    array = np.zeros((50, 60, 70), np.float32)
    values = of_array("x", array)
    read = []
    fetch = values.fetch
    object.__setattr__(values, "fetch", lambda ranges: read.append(ranges) or fetch(ranges))
    "".join(format_values(values, texts(Layout()), 3))
    assert sum(len(a) * len(b) * len(c) for a, b, c in read) == 6**3


def test_json_holds_every_value_exactly() -> None:
    array = np.array([[0.1, np.nan], [np.inf, -np.inf]], np.float32)
    found = describe_values(of_array("x", array), json_numbers, None)
    assert found == {"selected": [2, 2], "edge_items": None, "values": [[float(np.float32(0.1)), "NaN"], ["Infinity", "-Infinity"]]}
    json.dumps(found, allow_nan=False)
    assert [float(v) for row in found["values"] for v in row][2:] == [np.inf, -np.inf]
    assert describe_values(of_array("x", np.array([True, False])), json_numbers, None)["values"] == [True, False]
    assert describe_values(of_array("x", np.array(2**63, np.uint64)), json_numbers, None)["values"] == 2**63


def test_json_says_where_it_is_cut() -> None:
    array = np.arange(100).reshape(10, 10)
    found = describe_values(of_array("x", array), json_numbers, 2)
    keep = [0, 1, 8, 9]
    assert found == {"selected": [10, 10], "edge_items": 2, "values": array[np.ix_(keep, keep)].tolist()}
