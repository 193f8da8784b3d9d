"""Files of activations: found under our names or through a map, brought into our shapes, and refused where they cannot be."""

import json
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from toyllm.kernels.dtypes import widen
from toyllm.kernels.errors import ToyllmError
from toyllm.models.compare_dump import Dump, is_dump, open_dump

T, H, DH = 5, 3, 4
Q = np.random.default_rng(0).standard_normal((T, H, DH)).astype(np.float32)


def opened(tmp_path: Path, arrays: dict[str, Any], rules: Any = None, suffix: str = ".npz") -> Dump:
    """The arrays in a file, and the rules, text or an object, in another."""
    path, map_path = tmp_path / f"dump{suffix}", tmp_path / ("map.toml" if isinstance(rules, str) else "map.json")
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
    if rules is not None:
        map_path.write_text(rules if isinstance(rules, str) else json.dumps(rules))
    return open_dump(path, map_path if rules is not None else None)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_names_that_are_ours_need_no_map(tmp_path: Path, suffix: str) -> None:
    dump = opened(tmp_path, {"logits": Q[0], "blocks.3.attn.q": Q, "theirs": Q, "ids": np.arange(T), "embed": Q[0]}, suffix=suffix)
    assert dump.names == ["embed", "blocks.3.attn.q", "logits"]
    assert dump.unknown == ("theirs",)
    assert dump.ids() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(dump.read("blocks.3.attn.q", Q.shape), Q)


@pytest.mark.parametrize(
    ("array", "entry"),
    [
        (Q, "blocks.{i}.attn.q"),
        (Q[None], "blocks.{i}.attn.q"),
        (Q.reshape(1, T, H * DH), "blocks.{i}.attn.q"),
        (Q.reshape(T, H * DH), {"name": "blocks.{i}.attn.q"}),
        (Q.swapaxes(0, 1)[None], {"name": "blocks.{i}.attn.q", "slice": "0", "transpose": [1, 0, 2]}),
        (np.stack([Q + 1, Q, Q + 2], 1).reshape(1, T, -1), {"name": "blocks.{i}.attn.q", "reshape": ["T", 3, -1], "slice": ":, 1"}),
        (np.stack([Q + 1, Q, Q + 2], 1).reshape(1, T, -1), [{"name": "blocks.{i}.attn.q", "slice": "0, :, 12:24"}]),
        (Q[::-1], {"name": "blocks.{i}.attn.q", "slice": "::-1"}),
        (Q.T, {"name": "blocks.{i}.attn.q", "transpose": [2, 1, 0]}),
        (Q.reshape(-1), {"name": "blocks.{i}.attn.q", "reshape": [T, H, DH]}),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_theirs_become_ours(tmp_path: Path, array: np.ndarray, entry: Any, suffix: str) -> None:
    dump = opened(tmp_path, {"layers.12.q": array}, {"layers.{i}.q": entry}, suffix)
    assert dump.names == ["blocks.12.attn.q"]
    np.testing.assert_array_equal(dump.read("blocks.12.attn.q", Q.shape), Q)


def test_one_of_theirs_may_be_several_of_ours(tmp_path: Path) -> None:
    toml = """
    "h.{i}.qkv" = [
        { name = "blocks.{i}.attn.q", slice = "0" },
        { name = "blocks.{i}.attn.k", slice = "1" },
    ]
    tokens = "ids"
    """
    dump = opened(tmp_path, {"h.0.qkv": np.stack([Q, -Q]), "h.1.qkv": np.stack([2 * Q, Q]), "tokens": np.arange(T)[None]}, toml)
    assert dump.names == ["blocks.0.attn.q", "blocks.0.attn.k", "blocks.1.attn.q", "blocks.1.attn.k"]
    np.testing.assert_array_equal(dump.read("blocks.1.attn.q", Q.shape), 2 * Q)
    assert dump.ids() == [0, 1, 2, 3, 4]
    assert dump.unknown == ()


def test_a_number_is_the_same_wherever_it_stands(tmp_path: Path) -> None:
    dump = opened(tmp_path, {"a.1.b.1": Q, "a.1.b.2": Q}, {"a.{i}.b.{i}": "blocks.{i}.attn.q", "missing": "embed", "a.{i}.c": "norm_f"})
    assert (dump.names, dump.unknown, dump.unmatched) == (["blocks.1.attn.q"], ("a.1.b.2",), ("missing", "a.{i}.c"))


def test_a_shape_that_could_mean_another_thing_is_left(tmp_path: Path) -> None:
    dump = opened(tmp_path, {"blocks.0.attn.q": Q.swapaxes(1, 2), "blocks.0.attn.k": Q.reshape(T * H, DH), "blocks.0.attn.v": Q[:, None]})
    assert [dump.read(name, Q.shape).shape for name in dump.names] == [(T, DH, H), (T * H, DH), (T, 1, H, DH)]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, np.int32])
def test_any_numbers_are_read(tmp_path: Path, dtype: Any) -> None:
    values = np.array([[1, -2, 96]]).astype(dtype)
    dump = opened(tmp_path, {"embed": values}, suffix=".safetensors")
    np.testing.assert_array_equal(widen(dump.read("embed", (1, 3))), values.astype(np.float64))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.array([0.5])}, r"ids: expected whole numbers \[T\] or \[1, T\], found float64 \[1\]"),
        ({"ids": np.ones((2, 2), int)}, r"found int64 \[2, 2\]"),
        ({"ids": np.zeros(0, int)}, r"found int64 \[0\]"),
        ({"ids": np.array(["a"])}, "ids: expected numbers, found dtype <U1; save it as f32"),
    ],
)
def test_ids_that_are_none(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ToyllmError, match=message):
        opened(tmp_path, arrays | {"embed": Q}).ids()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("x = ", "map.toml: not valid TOML: "),
        (
            "h.0.q = 'embed'",
            "map.toml: 'h': expected our name, or an object of .*, found {'0': {'q': 'embed'}}; TOML wants names with points",
        ),
        ([], "map.json: expected an object of their names and ours, found list"),
        ({"x": 3}, "map.json: 'x': expected our name, or an object of name, reshape, slice and transpose, found 3"),
        ({"x": {"name": "embed", "permute": [0]}}, "expected our name, or an object of"),
        ({"x": {"slice": "0"}}, "expected our name, or an object of"),
        ({"x": "embedding"}, "'embedding' is no activation of toyllm's; `toyllm dump-tensor --list"),
        ({"x": "blocks.{i}.out"}, "'blocks.{i}.out' is no activation"),
        ({"x": {"name": "embed", "reshape": "T"}}, "reshape: expected a list of lengths, \"T\" or -1, found 'T'"),
        ({"x": {"name": "embed", "slice": 0}}, 'slice: expected text such as ":, 0", found 0'),
        ({"x": {"name": "embed", "transpose": [0, True]}}, r"transpose: expected a list of axes, found \[0, True\]"),
        ({"x": ["embed", "embed"]}, "'x': embed is there already"),
        ({"nothing": "embed"}, r"no array that .*map.json names; it has 'x'; --map FILE says"),
    ],
)
def test_maps_that_are_none(tmp_path: Path, rules: Any, message: str) -> None:
    with pytest.raises(ToyllmError, match=message):
        opened(tmp_path, {"x": Q}, rules)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"reshape": ["T", 7]}, r"'x': reshape \['T', 7\]: the array has shape \[5, 3, 4\], T is 5"),
        ({"slice": "9"}, r"'x': slice '9': '9' at axis 0 of x, length 5: expected an index from -5 to 4"),
        ({"transpose": [0, 1]}, r"'x': transpose \[0, 1\]: expected each axis of shape \[5, 3, 4\] once"),
    ],
)
def test_moves_that_cannot_be_made(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(ToyllmError, match=message):
        opened(tmp_path, {"x": Q}, {"x": {"name": "embed"} | entry}).read("embed", (T, 12))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    for file, message in (
        (tmp_path / "missing.npz", r"missing.npz: cannot be read \(No such file or directory\)"),
        (write(tmp_path / "text.npz", b"hello"), r"text.npz: cannot be read \(File is not a zip file\); numpy.savez writes what can"),
        (write(tmp_path / "cut.npz", b"PK\x03\x04 and no more"), r"cut.npz: cannot be read \(File is not a zip file\)"),
        (tmp_path / "missing.safetensors", "missing.safetensors: missing"),
    ):
        with pytest.raises(ToyllmError, match=message):
            open_dump(file)


def test_nothing_pickled_is_loaded_and_other_members_are_no_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", embed=np.array([print], object))
    with pytest.raises(ToyllmError, match=r"embed: cannot be read \(Object arrays cannot be loaded"):
        open_dump(tmp_path / "pickled.npz").read("embed", (1,))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("embed", b"hello, this is text")
    with pytest.raises(ToyllmError, match=r"embed: cannot be read \(the magic string is not correct"):
        open_dump(tmp_path / "text.npz").read("embed", (1,))


def test_which_files_are_of_activations(tmp_path: Path) -> None:
    save_file({"h.0.ln_1.weight": Q, "block.0.attn.norm.scale": Q}, tmp_path / "weights.safetensors")
    save_file({"h.0.ln_1.weight": Q, "blocks.0.norm_1": Q}, tmp_path / "dump.safetensors")
    names = ("weights.safetensors", "dump.safetensors", "any.npz", "none.safetensors", "folder")
    assert [is_dump(tmp_path / name, mapped=False) for name in names] == [False, True, True, False, False]
    assert [is_dump(tmp_path / name, mapped=True) for name in names] == [True, True, True, False, False]
