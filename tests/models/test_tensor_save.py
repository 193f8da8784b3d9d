"""Tensors in files: read back by NumPy, safetensors and json as they were; whole, or not there."""

import json
import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from toyllm.kernels.dtypes import BF16, F16
from toyllm.kernels.errors import ToyllmError
from toyllm.models.tensor_save import save
from toyllm.models.tensor_values import Values, of_array

EXACT = np.random.default_rng(2).standard_normal((5, 7)).astype(ml_dtypes.bfloat16)
ARRAYS = {
    "f32": np.random.default_rng(1).standard_normal((300, 400)).astype(np.float32),
    "f64": np.array([0.1, np.nan, np.inf, -np.inf]),
    "i64": np.arange(-3, 3).reshape(2, 3),
    "u8": np.arange(256, dtype=np.uint8),
    "bool": np.array([True, False]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "f16": EXACT.astype(np.float16).view(F16),
    "bf16": EXACT.view(BF16),
}
PLAIN = ARRAYS | {"f16": EXACT.astype(np.float16), "bf16": EXACT.astype(np.float32)}


def values(name: str) -> Values:
    return of_array(name, ARRAYS[name])


@pytest.mark.parametrize("name", ARRAYS)
def test_npy_is_read_by_numpy(tmp_path: Path, name: str) -> None:
    save(tmp_path / "x.npy", [values(name)])
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy", allow_pickle=False), PLAIN[name], strict=True)


def test_npz_holds_several_under_their_names(tmp_path: Path) -> None:
    save(tmp_path / "x.npz", [values(name) for name in ARRAYS] + [of_array("file", np.ones(2)), of_array("a/b..c", np.ones(1))])
    with np.load(tmp_path / "x.npz", allow_pickle=False) as found:
        assert set(found) == {*ARRAYS, "file", "a/b..c"}
        for name in ARRAYS:
            np.testing.assert_array_equal(found[name], PLAIN[name], strict=True)


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/a", "..\\a", "a\x1b[2J", "a\0b"])
def test_npz_takes_no_name_that_leads_out_of_where_it_is_unpacked(tmp_path: Path, name: str) -> None:
    with pytest.raises(ToyllmError, match=r"cannot be in an \.npz file, whose names are those of files; use \.safetensors"):
        save(tmp_path / "x.npz", [of_array(name, np.ones(1))])
    assert not any(tmp_path.iterdir())


def test_safetensors_keeps_every_dtype(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", [values(name) for name in ARRAYS])
    found = load_file(tmp_path / "x.safetensors")
    for name in ARRAYS:
        np.testing.assert_array_equal(found[name], EXACT if name == "bf16" else PLAIN[name], strict=True)


@pytest.mark.parametrize("name", ["f32", "f64", "i64", "u8", "scalar", "bf16", "f16"])
def test_csv_gives_the_same_numbers_back(tmp_path: Path, name: str) -> None:
    save(tmp_path / "x.csv", [values(name)])
    found = np.loadtxt(tmp_path / "x.csv", delimiter=",", dtype=PLAIN[name].dtype)
    np.testing.assert_array_equal(found, PLAIN[name])


def test_json_holds_all_values(tmp_path: Path) -> None:
    save(tmp_path / "x.json", [values("f32"), values("f64")])
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["schema"] == "toyllm.dump-tensor/1"
    first, second = document["tensors"]
    np.testing.assert_array_equal(np.array(first["values"], np.float32), ARRAYS["f32"])
    assert second["values"] == [0.1, "NaN", "Infinity", "-Infinity"]


def test_a_part_is_saved_as_a_part(tmp_path: Path) -> None:
    save(tmp_path / "x.npy", [values("f32").part("5, ::-3")])
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), ARRAYS["f32"][5, ::-3])


def test_widening_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "toyllm"):
        save(tmp_path / "x.npy", [values("bf16")])
        assert "written as f32, exactly" in caplog.text
        caplog.clear()
        save(tmp_path / "x.safetensors", [values("bf16")])
        save(tmp_path / "y.npy", [values("f32")])
    assert caplog.text == ""


def test_nothing_is_written_over_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_text("precious")
    with pytest.raises(ToyllmError, match="is there already; --force writes over it"):
        save(path, [values("u8")])
    assert path.read_text() == "precious"
    save(path, [values("u8")], force=True)
    assert np.load(path).size == 256


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".csv", ".json"])
def test_an_interrupted_save_leaves_nothing(tmp_path: Path, suffix: str, error: BaseException) -> None:
    broken = values("f32")
    fetch, calls = broken.fetch, []

    def interrupted(ranges: tuple[range, ...]) -> np.ndarray:
        calls.append(ranges)
        if len(calls) > 1:
            raise error
        return fetch(ranges)

    object.__setattr__(broken, "fetch", interrupted)
    with pytest.raises(ToyllmError if isinstance(error, OSError) else KeyboardInterrupt):
        save(tmp_path / f"x{suffix}", [broken])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("x.txt", 1, r"ends in \.npy, \.npz, \.safetensors, \.csv, \.json"),
        ("none/x.npy", 1, "no folder"),
        ("x.npy", 2, r"\.npy holds one tensor, not 2; use \.npz or \.safetensors"),
        ("x.csv", 2, r"\.csv holds one tensor"),
        ("a" * 300 + ".npy", 1, r"cannot be written \(File name too long\)"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, name: str, count: int, message: str) -> None:
    with pytest.raises(ToyllmError, match=message):
        save(tmp_path / name, [values("u8"), values("i64")][:count])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "x.npy").mkdir()
    with pytest.raises(ToyllmError, match="is no file, and --force writes over files only; name another"):
        save(tmp_path / "x.npy", [values("u8")], force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_csv_has_two_axes(tmp_path: Path) -> None:
    with pytest.raises(ToyllmError, match=r"\.csv holds at most 2 axes, not \[2, 2, 2\]; take a --slice"):
        save(tmp_path / "x.csv", [of_array("x", np.zeros((2, 2, 2)))])
    assert list(tmp_path.iterdir()) == []
