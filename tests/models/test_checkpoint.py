"""Checkpoints: every tensor as the safetensors library reads it, mapped and not copied; everything damaged refused in one line."""

import gc
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from toyllm.kernels.dtypes import BF16, F16, F32, widen
from toyllm.kernels.errors import ToyllmError
from toyllm.models.checkpoint import MAX_JSON, open_checkpoint
from toyllm.models.location import ModelFiles


def files(folder: Path, weights: Path | None = None, index: Path | None = None) -> ModelFiles:
    return ModelFiles(str(folder), folder, weights, index, None, None, None, None, None)


def open_file(path: Path):
    return open_checkpoint(files(path.parent, weights=path))


def entry(dtype="F32", shape=(2,), begin=0, end=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file's bytes from any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def numbers(dtype, shape) -> np.ndarray:
    return np.asarray(np.random.default_rng(7).integers(0, 2 if dtype is np.bool_ else 100, shape)).astype(dtype)


STORED = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (2, 0, 3), (1, 1, 4, 4)])
def test_every_dtype_reads_as_the_library_reads_it(tmp_path, shape):
    path = tmp_path / "model.safetensors"
    save_file({name: numbers(dtype, shape) for name, dtype in STORED.items()}, path)
    checkpoint, expected = open_file(path), load_file(path)
    assert set(checkpoint.tensors) == set(expected)
    for name, wanted in expected.items():
        array = checkpoint.array(name)
        assert (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape, array.shape) == (name, shape, shape)
        assert array.tobytes() == wanted.tobytes()
        if array.dtype in (F32, F16, BF16):
            np.testing.assert_array_equal(widen(array), wanted.astype(np.float32))
        else:
            assert array.dtype == wanted.dtype


def test_arrays_are_read_only_views_of_one_map_at_any_alignment(tmp_path):
    path = tmp_path / "model.safetensors"
    data = bytes(range(3)) + np.arange(6, dtype="<f4").tobytes()
    header = json.dumps({"odd": entry("U8", (3,), 0, 3), "w": entry("F32", (2, 3), 3, 27)})
    path.write_bytes(raw(header.encode() + b" " * (-len(header) % 8), data))
    checkpoint = open_file(path)
    odd, w = checkpoint.array("odd"), checkpoint.array("w")
    assert not w.flags.aligned
    assert not w.flags.writeable
    assert w.flags.c_contiguous
    assert odd.base is w.base
    np.testing.assert_array_equal(w @ np.ones(3, np.float32), [3, 12])
    with pytest.raises(ValueError, match="WRITEABLE"):
        w.flags.writeable = True


def test_tensors_come_in_file_order_with_absolute_offsets(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"__metadata__": {"format": "pt"}, "b": entry(begin=8, end=16), "a": entry()}, b"AAAAaaaaBBBBbbbb"))
    tensors = open_file(path).tensors
    assert list(tensors) == ["a", "b"]
    content = path.read_bytes()
    assert [content[t.offset : t.offset + t.nbytes] for t in tensors.values()] == [b"AAAAaaaa", b"BBBBbbbb"]


def test_an_array_outlives_its_checkpoint_and_the_map_goes_with_the_last(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": np.arange(4, dtype=np.float32)}, path)

    def mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    array = open_file(path).array("w")
    gc.collect()
    np.testing.assert_array_equal(array, [0, 1, 2, 3])
    assert mapped()
    del array
    gc.collect()
    assert not mapped()


@pytest.mark.parametrize(("dtype", "nbytes"), [("F8_E4M3", 4), ("F8_E5M2", 4), ("F4", 2), ("C64", 32)])
def test_a_dtype_without_an_array_is_listed_and_named_when_asked_for(tmp_path, dtype, nbytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"w": entry(dtype, (4,), 0, nbytes)}, bytes(nbytes)))
    checkpoint = open_file(path)
    assert checkpoint.tensors["w"].dtype == dtype
    with pytest.raises(ToyllmError, match=f"model.safetensors: tensor 'w' has dtype {dtype};"):
        checkpoint.array("w")


def test_an_unknown_name_is_an_error(tmp_path):
    save_file({"w": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ToyllmError, match="no tensor 'v' in this checkpoint"):
        open_file(tmp_path / "model.safetensors").array("v")


def test_a_file_that_shrinks_while_open_is_refused_before_it_is_touched(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(4096, np.float32)}, path)
    checkpoint = open_file(path)
    os.truncate(path, 100)
    with pytest.raises(ToyllmError, match="changed while open"):
        checkpoint.array("w")


TWO = b'{"w":%b,"w":%b}' % tuple(json.dumps(entry(begin=begin, end=begin + 8)).encode() for begin in (0, 8))
SAME = b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2)
SHAPE, OFFSETS, LIBRARY = "is none that an array can have", "data_offsets [begin, end], found", "refused by the safetensors library"
DAMAGED = {
    "empty": (b"", "an empty file"),
    "seven bytes": (b"\0" * 7, "only 7 bytes"),
    "header of 2^63": (raw({}, length=2**63), "the header would have 9,223,372,036,854,775,808 bytes"),
    "header of 100,000,001": (raw({}, length=100_000_001), "the header would have 100,000,001 bytes"),
    "header beyond the file": (raw({}, length=3), "truncated: the header alone takes 11 bytes, the file has 10"),
    "header cut short": (raw({"w": entry()})[:30], "truncated: the header alone takes 69 bytes, the file has 30"),
    "header empty": (raw(b""), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff":1}'), "not valid JSON"),
    "not JSON": (raw(b"{nonsense"), "not valid JSON"),
    "an array": (raw([1, 2]), "expected a JSON object, found list"),
    "byte order mark": (raw(b"\xef\xbb\xbf{}"), "not valid JSON"),
    "trailing text": (raw(b"{}{}"), "not valid JSON"),
    "100,000 brackets": (raw(b"[" * 100_000), "not valid JSON"),
    "100,000 brackets inside": (raw(b'{"w":' + b"[" * 100_000), "not valid JSON"),
    "5,000 digits": (raw(b'{"w":' + b"9" * 5_000 + b"}"), "not valid JSON"),
    "4,000 digits in the shape": (raw(b'{"w":{"dtype":"F32","shape":[%b],"data_offsets":[0,8]}}' % (b"9" * 4_000), bytes(8)), SHAPE),
    "4,000 digits in the offsets": (raw(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,%b]}}' % (b"9" * 4_000)), OFFSETS),
    "NaN": (raw(b'{"w":NaN}'), "not valid JSON ('w': NaN, which JSON does not have)"),
    "NaN where no one looks": (
        raw(b'{"w":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":NaN}}'),
        "'x': NaN, which JSON does not have",
    ),
    "duplicate name, same range": (raw(SAME, bytes(8)), "'w' occurs twice"),
    "duplicate name, other range": (raw(TWO, bytes(16)), "'w' occurs twice"),
    "duplicate metadata": (raw(b'{"__metadata__":{"a":"1","a":"2"}}'), "'a' occurs twice"),
    "metadata not text": (raw({"__metadata__": {"a": 1}}), LIBRARY),
    "lone surrogate": (raw(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), LIBRARY),
    "entry as a list": (raw({"w": ["F32", [2], [0, 8]]}, bytes(8)), OFFSETS),
    "entry null": (raw({"w": None}), OFFSETS),
    "no shape": (raw({"w": {"dtype": "F32", "data_offsets": [0, 0]}}), OFFSETS),
    "negative offset": (raw({"w": entry(begin=-8, end=0)}), OFFSETS),
    "float offset": (raw({"w": {**entry(), "data_offsets": [0, 8.0]}}, bytes(8)), OFFSETS),
    "offsets reversed": (raw({"w": entry(begin=8, end=0)}, bytes(8)), OFFSETS),
    "three offsets": (raw({"w": {**entry(), "data_offsets": [0, 8, 8]}}, bytes(8)), OFFSETS),
    "bool as an offset": (raw({"w": {**entry("U8", (1,)), "data_offsets": [0, True]}}, bytes(1)), LIBRARY),
    "bool in the shape": (raw({"w": entry(shape=(True, 2))}, bytes(8)), SHAPE),
    "text in the shape": (raw({"w": entry(shape=("2",))}, bytes(8)), SHAPE),
    "negative size": (raw({"w": entry(shape=(-1, -2))}, bytes(8)), SHAPE),
    "shape overflows": (raw({"w": entry(shape=(2**63, 2), end=0)}), SHAPE),
    "shape overflows to the right size": (raw({"w": entry(shape=(2**62 + 1, 4), end=16)}, bytes(16)), SHAPE),
    "shape overflows beside a 0": (raw({"w": entry(shape=(0, 2**62), end=0)}), SHAPE),
    "empty, of 2^40 rows": (raw({"w": entry(shape=(2**40, 0), end=0)}), "shape [1099511627776, 0] holds nothing, in more places"),
    "rank 65": (raw({"w": entry(shape=(1,) * 65, end=4)}, bytes(4)), SHAPE),
    "overlap": (raw({"v": entry(), "w": entry(begin=4, end=12)}, bytes(12)), "'w' begins at byte 135, expected 139"),
    "hole": (raw({"v": entry(), "w": entry(begin=12, end=20)}, bytes(20)), "'w' begins at byte 144, expected 140"),
    "hole at the start": (raw({"w": entry(begin=8, end=16)}, bytes(16)), "'w' begins at byte 78, expected 70"),
    "past the end": (raw({"w": entry(shape=(250,), end=1000)}, bytes(8)), "truncated: its tensors end at byte 1,074, the file has 82"),
    "one byte short": (raw({"w": entry()}, bytes(7)), "truncated: its tensors end at byte 77, the file has 76"),
    "one byte over": (raw({"w": entry()}, bytes(9)), "too long: its tensors end at byte 77, the file has 78"),
    "size against shape": (raw({"w": entry(shape=(3,))}, bytes(8)), "'w': F32 [3] takes 12 bytes, its data_offsets give it 8"),
    "size against shape, dtype not read": (raw({"w": entry("F8_E4M3", (3,))}, bytes(8)), LIBRARY),
    "unknown dtype": (raw({"w": entry("F33")}, bytes(8)), "unknown variant `F33`"),
    "escape sequence in a name": (raw({"\x1b]0;x\x07\nw": entry(end=9)}, bytes(9)), r"'\x1b]0;x\x07\nw'"),
    "very long name": (raw({"w" * 100_000: entry()}, bytes(8)), "www...www"),
    "name of 1,001": (raw({"w" * 1001: entry()}, bytes(8)), "a name of 1,001 characters, at most 1,000 are read"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(80), "a GGUF file"),
    "zip": (b"PK\3\4" + bytes(80), "a zip archive as torch.save writes it"),
    "pickle, torch's older format": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "a pickle; pickles are never opened"),
    "pickle, protocol 4": (b"\x80\x04\x95" + bytes([9, *[0] * 7]) + bytes(9), "a pickle; pickles are never opened"),
    "web page": (b"<!DOCTYPE html><html></html>", "damaged, or not safetensors"),
}


def one_line(error: ToyllmError, path: Path) -> str:
    message = str(error)
    assert message.isprintable(), "one line, no escape bytes"
    assert message.startswith(f"{path}: ")
    assert len(message) < 600 + len(str(path))
    return message


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_clear_line(tmp_path, name):
    content, expected = DAMAGED[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ToyllmError) as caught:
        open_file(path)
    assert expected in one_line(caught.value, path)


def make_fifo(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Path.mkdir, "a folder, where a file is expected"),
        (make_fifo, "a device or pipe, where a file is expected"),
        (lambda path: path.symlink_to("/dev/zero"), "a device or pipe, where a file is expected"),
        (lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)"),
        (lambda path: path.symlink_to("gone"), "missing"),
        (lambda path: None, "missing"),
    ],
)
def test_what_is_not_a_file_is_refused_without_waiting_on_it(tmp_path, make, expected):
    path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(ToyllmError) as caught:
        open_file(path)
    assert expected in one_line(caught.value, path)


@settings(deadline=None)
@given(data=st.data())
def test_what_the_library_refuses_is_refused_and_what_is_accepted_can_be_read(tmp_path_factory, data):
    sound = raw({"v": entry("F16", (1, 4)), "w": entry("I8", (3,), 8, 11)}, bytes(11))
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"0", b"1", b",", b'"', b"}", b" "])
        )
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        safe_open(path, framework="np")
        refused = False
    except SafetensorError:
        refused = True
    try:
        checkpoint = open_file(path)
    except ToyllmError as error:
        one_line(error, path)
        return
    assert not refused
    for name in checkpoint.tensors:
        try:
            checkpoint.array(name).tobytes()
        except ToyllmError as error:
            one_line(error, path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards and an index, which the tests below damage."""
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    save_file({"b": np.full(2, 2, np.float32), "c": np.full(2, 3, np.float32)}, folder / "model-00000-of-00001.safetensors")
    save_file({"a": np.full(2, 1, np.float32)}, folder / "model-00001-of-00001.safetensors")
    write_index(folder, {"a": "model-00001-of-00001.safetensors", "b": SHARD, "c": SHARD})
    return folder


SHARD = "model-00000-of-00001.safetensors"


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))


def open_index(folder: Path):
    return open_checkpoint(files(folder, index=folder / "model.safetensors.index.json"))


def test_shards_are_one_checkpoint(sharded):
    checkpoint = open_index(sharded)
    assert [path.name for path in checkpoint.shards] == ["model-00000-of-00001.safetensors", "model-00001-of-00001.safetensors"]
    assert list(checkpoint.tensors) == ["b", "c", "a"]
    assert {name: checkpoint.array(name)[0] for name in "abc"} == {"a": 1, "b": 2, "c": 3}


def test_a_tensor_that_the_index_forgets_is_still_listed(sharded):
    write_index(sharded, {"b": SHARD})
    assert list(open_index(sharded).tensors) == ["b", "c"]


def test_links_into_the_hugging_face_cache_are_followed_and_no_others(sharded, tmp_path):
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / "0" / "inner"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in sharded.glob("model*"):
        path.rename(repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../../blobs") / path.name)
    assert list(open_index(snapshot).tensors) == ["b", "c", "a"]
    (repo / "blobs").rename(repo / "elsewhere")
    (repo / "blobs").symlink_to("elsewhere")
    with pytest.raises(ToyllmError, match="a link out of the model's folder"):
        open_index(snapshot)


def test_a_link_into_the_blobs_of_another_model_is_refused(sharded: Path, tmp_path: Path) -> None:
    other = tmp_path / "hub" / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    (sharded / SHARD).rename(other / "0")
    (sharded / SHARD).symlink_to(other / "0")
    with pytest.raises(ToyllmError, match="a link out of the model's folder"):
        open_index(sharded)
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "0"
    snapshot.parent.mkdir(parents=True)
    sharded.rename(snapshot)
    with pytest.raises(ToyllmError, match="a link out of the model's folder"):
        open_index(snapshot)


def test_a_shard_may_be_a_link_to_a_file_that_the_whole_cache_shares(tmp_path: Path, sharded: Path) -> None:
    hub = tmp_path / "hub"
    snapshot = hub / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    sharded.rename(snapshot)
    (hub / "blobs" / "ab").mkdir(parents=True)
    (hub / "models--a--b" / "blobs").mkdir()
    for path in snapshot.glob("model-*"):
        path.rename(hub / "blobs" / "ab" / path.name)
        (hub / "models--a--b" / "blobs" / path.name).symlink_to(Path("../../blobs/ab") / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert list(open_index(snapshot).tensors) == ["b", "c", "a"]


def duplicate_shard(folder: Path) -> None:
    (folder / "copy.safetensors").write_bytes((folder / SHARD).read_bytes())
    write_index(folder, {"b": "copy.safetensors", "c": SHARD})


def link_out(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / "outside.safetensors")
    (folder / SHARD).symlink_to("../outside.safetensors")


def link_cycle(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(SHARD)


BAD_INDEX = {
    "not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
    "an array": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "expected a JSON object, found list"),
    "not UTF-8": (lambda f: (f / "model.safetensors.index.json").write_bytes(b'"\xff"'), "not valid JSON"),
    "100,000 brackets": (lambda f: (f / "model.safetensors.index.json").write_text("[" * 100_000), "not valid JSON"),
    "too large": (lambda f: (f / "model.safetensors.index.json").write_bytes(b" " * (MAX_JSON + 1)), "larger than"),
    "duplicate name": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map":{"a":"x","a":"y"}}'), "'a' occurs twice"),
    "no map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), 'expected "weight_map"'),
    "empty map": (lambda f: write_index(f, {}), 'expected "weight_map"'),
    "map a list": (lambda f: write_index(f, ["a"]), 'expected "weight_map"'),
    "shard a number": (lambda f: write_index(f, {"a": 1}), 'expected "weight_map"'),
    "../": (lambda f: write_index(f, {"a": "../model/" + SHARD}), "is no name of a file in this folder"),
    "../ further on": (lambda f: write_index(f, {"a": "more/../" + SHARD}), "is no name of a file in this folder"),
    "absolute": (lambda f: write_index(f, {"a": str(f / SHARD)}), "is no name of a file in this folder"),
    "NUL": (lambda f: write_index(f, {"a": SHARD + "\0"}), "is no name of a file in this folder"),
    "escape sequence": (lambda f: write_index(f, {"a": "\x1b[2J"}), "is no name of a file in this folder"),
    "lone surrogate": (lambda f: write_index(f, {"a": "\ud800"}), "is no name of a file in this folder"),
    "no shard name": (lambda f: write_index(f, {"a": ""}), "is no name of a file in this folder"),
    "shard name too long": (lambda f: write_index(f, {"a": "x" * 300}), "cannot be read (File name too long)"),
    "shard name of thousands": (lambda f: write_index(f, {"a": "a/" * 3000}), "is no name of a file in this folder"),
    "shard a folder": (lambda f: write_index(f, {"a": "more"}), "more: a folder, where a file is expected"),
    "link out": (link_out, "a link out of the model's folder"),
    "link cycle": (link_cycle, "cannot be read (Too many levels of symbolic links)"),
    "shard missing": (lambda f: (f / SHARD).unlink(), SHARD + ": missing"),
    "shard damaged": (lambda f: os.truncate(f / SHARD, 20), SHARD + ": truncated"),
    "name in two shards": (duplicate_shard, "tensor 'b' is in copy.safetensors too"),
    "name in no shard": (lambda f: write_index(f, {"d": SHARD}), "no tensor 'd', which model.safetensors.index.json says is there"),
    "name in another shard": (lambda f: write_index(f, {"a": SHARD, "b": "model-00001-of-00001.safetensors"}), "no tensor 'a', which"),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_a_bad_index_is_one_clear_line(sharded, name):
    damage, expected = BAD_INDEX[name]
    damage(sharded)
    with pytest.raises(ToyllmError) as caught:
        open_index(sharded)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(str(sharded))
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_a_folder_with_pickles_alone_says_how_to_get_safetensors(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ToyllmError) as caught:
        open_checkpoint(files(tmp_path))
    message = one_line(caught.value, tmp_path)
    assert f"only '{name}'" in message
    assert "pickles can run code and are never opened" in message
    assert "save_pretrained" in message


def test_a_folder_without_weights_says_what_is_looked_for(tmp_path):
    with pytest.raises(ToyllmError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_checkpoint(files(tmp_path))


def test_459_tensors_open_in_milliseconds_whatever_the_file_weighs(tmp_path):
    path = tmp_path / "model.safetensors"
    nbytes = 16 * 2**20
    entries = {f"model.layers.{i // 19}.part_{i % 19}": entry("BF16", (nbytes // 2,), i * nbytes, (i + 1) * nbytes) for i in range(459)}
    path.write_bytes(raw(entries))
    os.truncate(path, path.stat().st_size + 459 * nbytes)  # 7.7 GB, all of it a hole
    times = []
    for _ in range(3):
        start = time.perf_counter()
        checkpoint = open_file(path)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
    assert checkpoint.array("model.layers.24.part_2")[-1]["bf16"] == 0


def test_nothing_heavy_is_imported():
    heavy = "{'numba', 'huggingface_hub', 'torch'}"
    code = f"import sys, toyllm.models.checkpoint, toyllm.models.preload; sys.exit(not {heavy}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
