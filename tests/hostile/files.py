"""Bad files of weights, and bad indexes of shards."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .making import INDEX, WEIGHTS, Case, Make, check, dump, entry, generate, gpt2, params, raw, sharded, weight_map, with_file, write_index

# ---- one file ---------------------------------------------------------------------------------------------------------------

TWO = b'{"w":%b,"w":%b}' % tuple(json.dumps(entry(begin=begin, end=begin + 8)).encode() for begin in (0, 8))
SAME = b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2)
ENTRY, SHAPE, LIBRARY = r"data_offsets \[begin, end\], found", "is none that an array can have", "refused by the safetensors library"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "7 bytes": (b"\0" * 7, "only 7 bytes"),
    "header of 0 bytes": (raw(b""), "not valid JSON"),
    "header of 2^63": (raw({}, length=2**63), "the header would have 9,223,372,036,854,775,808 bytes"),
    "header of 2^64 - 1": (raw({}, length=2**64 - 1), "the header would have 18,446,744,073,709,551,615 bytes"),
    "header of 100,000,001": (raw({}, length=100_000_001), "the header would have 100,000,001 bytes"),
    "header beyond the file": (raw({}, length=3), "truncated: the header alone takes 11 bytes, the file has 10"),
    "not UTF-8": (raw(b'{"\xff":1}'), "not valid JSON"),
    "not JSON": (raw(b"{nonsense"), "not valid JSON"),
    "an array": (raw([1, 2]), "expected a JSON object, found list"),
    "null": (raw(None), "expected a JSON object, found NoneType"),
    "100,000 nested brackets": (raw(b"[" * 100_000), "not valid JSON"),
    "100,000 nested brackets inside": (raw(b'{"w":' + b"[" * 100_000), "not valid JSON"),
    "100,000 nested objects": (raw(b'{"w":' * 100_000), "not valid JSON"),
    "a number of 5,000 digits": (raw(b'{"w":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "duplicate name, same range": (raw(SAME, bytes(8)), "the name 'w' occurs twice"),
    "duplicate name, another range": (raw(TWO, bytes(16)), "the name 'w' occurs twice"),
    "duplicate key in an entry": (raw(b'{"w":{"dtype":"F32","dtype":"U8","shape":[2],"data_offsets":[0,8]}}', bytes(8)), "'dtype' occurs"),
    "NaN": (raw(b'{"w":NaN}'), "'w': NaN, which JSON does not have"),
    "metadata not text": (raw({"__metadata__": {"a": 1}}), LIBRARY),
    "lone surrogate in a name": (raw(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), LIBRARY),
    "negative offset": (raw({"w": entry(begin=-8, end=0)}), ENTRY),
    "float offset": (raw({"w": entry(end=8.0)}, bytes(8)), ENTRY),
    "offset of 2^64": (raw({"w": entry(end=2**64)}), ENTRY),
    "offsets reversed": (raw({"w": entry(begin=8, end=0)}, bytes(8)), ENTRY),
    "overlapping": (raw({"v": entry(), "w": entry(begin=4, end=12)}, bytes(12)), "'w' begins at byte 135, expected 139"),
    "a hole": (raw({"v": entry(), "w": entry(begin=12, end=20)}, bytes(20)), "'w' begins at byte 144, expected 140"),
    "past the end": (raw({"w": entry(shape=(250,), end=1000)}, bytes(8)), "truncated: its tensors end at byte 1,074, the file has 82"),
    "one byte short": (raw({"w": entry()}, bytes(7)), "truncated: its tensors end at byte 77, the file has 76"),
    "one byte over": (raw({"w": entry()}, bytes(9)), "too long: its tensors end at byte 77, the file has 78"),
    "size against shape": (raw({"w": entry(shape=(3,))}, bytes(8)), r"F32 \[3\] takes 12 bytes, its data_offsets give it 8"),
    "size against dtype": (raw({"w": entry("F64")}, bytes(8)), r"F64 \[2\] takes 16 bytes"),
    "shape overflows": (raw({"w": entry(shape=(2**63, 2), end=0)}), SHAPE),
    "shape overflows to the right size": (raw({"w": entry(shape=(2**62 + 1, 4), end=16)}, bytes(16)), SHAPE),
    "shape of 4,000 digits": (raw(b'{"w":{"dtype":"F32","shape":[%b],"data_offsets":[0,8]}}' % (b"9" * 4000), bytes(8)), SHAPE),
    "negative size": (raw({"w": entry(shape=(-1, -2))}, bytes(8)), SHAPE),
    "float size": (raw({"w": entry(shape=(2.0,))}, bytes(8)), SHAPE),
    "rank 65": (raw({"w": entry(shape=(1,) * 65, end=4)}, bytes(4)), SHAPE),
    "empty, of 2^40 rows": (raw({"w": entry(shape=(2**40, 0), end=0)}), "holds nothing, in more places than any tensor has"),
    "unknown dtype": (raw({"w": entry("F33")}, bytes(8)), "unknown variant `F33`"),
    "escape sequences in a name": (raw({"\x1b]0;x\x07\x1b[2J\n\u202ew": entry(end=9)}, bytes(9)), r"x1b\]0;x\\+x07"),
    "a name of 10 MB": (raw({"w" * 10_000_000: entry()}, bytes(8)), "a name of 10,000,000 characters, at most 1,000 are read"),
    "a Git LFS pointer": (POINTER, "git lfs pull"),
    "a GGUF file": (b"GGUF\3\0\0\0" + bytes(80), "a GGUF file, not safetensors"),
    "a zip of torch.save": (b"PK\3\4" + bytes(80), "a zip archive as torch.save writes it; pickles are never opened"),
    "a pickle": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "a pickle; pickles are never opened"),
    "a pickle that would run a command": (
        b"\x80\x04\x95!\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x04exit\x85R.",
        "pickles are never",
    ),
    "a web page": (b"<!DOCTYPE html><html></html>", "damaged, or not safetensors"),
}


def unopened(make: Callable[[Path], object]) -> Make:
    """A GPT-2 with something else in its weights' place."""

    def made(folder: Path) -> None:
        gpt2(folder)
        (folder / WEIGHTS).unlink()
        make(folder / WEIGHTS)

    return made


def of_dtype(dtype: str, nbytes: int) -> Make:
    """Four elements of a dtype that is listed, and that no array is made of."""
    return with_file(WEIGHTS, raw({"w": entry(dtype, (4,), 0, nbytes)}, bytes(nbytes)))


def odd_alignment(folder: Path) -> None:
    """Sound, but every weight begins at an odd byte: it runs."""
    gpt2(folder)
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip()
    (folder / WEIGHTS).write_bytes(raw(header + b" " * (len(header) % 2 + 1), content[end:]))


def link_loop(path: Path) -> None:
    path.symlink_to(path)


NO_WEIGHTS = "no safetensors weights|neither model.safetensors nor"
FILES = [
    *(Case("file", name, with_file(WEIGHTS, data), (params(says), check(says))) for name, (data, says) in CONTENTS.items()),
    Case("file", "F8", of_dtype("F8_E4M3", 4), (dump("tensor 'w' has dtype F8_E4M3", "w"), check("expected|not part"), params("not part"))),
    Case("file", "F4", of_dtype("F4", 2), (dump("tensor 'w' has dtype F4", "w"), dump("F4", code=0), generate("not part"))),
    Case("file", "odd alignment", odd_alignment, (check("0 errors", code=0), generate(code=0), params("", code=0))),
    Case("file", "a folder", unopened(Path.mkdir), (params("", code=0), generate(NO_WEIGHTS))),
    Case("file", "a FIFO", unopened(os.mkfifo), (generate(NO_WEIGHTS), dump(NO_WEIGHTS))),
    Case(
        "file", "a link to a device", unopened(lambda path: path.symlink_to("/dev/zero")), (generate(NO_WEIGHTS), check(NO_WEIGHTS, code=1))
    ),
    Case("file", "a link to itself", unopened(link_loop), (generate(NO_WEIGHTS),)),
    Case(
        "file", "a pickle beside nothing", unopened(lambda path: path.with_name("pytorch_model.bin").touch()), (generate("never opened"),)
    ),
]

# ---- shards -----------------------------------------------------------------------------------------------------------------


def mapped(change: Callable[[Path, dict[str, str]], object]) -> Make:
    """The two shards, and an index that `change(folder, weight_map)` changes in place."""

    def make(folder: Path) -> None:
        sharded(folder)
        found = weight_map(folder)
        change(folder, found)
        write_index(folder, found)

    return make


def shard_called(name: str) -> Make:
    """One tensor's shard has this name in the index."""
    return mapped(lambda folder, found: found.update({next(iter(found)): name}))


def index_of(content: str | bytes) -> Make:
    """The two shards with an index of these bytes."""
    return with_file(INDEX, content, base=sharded)


def link_out(folder: Path) -> None:
    sharded(folder)
    (folder / "model-0.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model-0.safetensors").symlink_to("../outside.safetensors")


def link_cycle(folder: Path) -> None:
    sharded(folder)
    for a, b in ((0, 1), (1, 0)):
        (folder / f"model-{a}.safetensors").unlink()
        (folder / f"model-{a}.safetensors").symlink_to(f"model-{b}.safetensors")


def link_into_a_false_cache(folder: Path) -> None:
    sharded(folder)
    blobs = folder.parent / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (folder / "model-0.safetensors").rename(blobs / "0")
    (folder / "model-0.safetensors").symlink_to(blobs / "0")


def hub_cache(folder: Path) -> None:
    """As huggingface_hub writes it, `folder` a link to the snapshot: it runs."""
    repo = folder.parent / "models--owner--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (repo / "blobs").mkdir()
    sharded(snapshot)
    for path in sorted(snapshot.iterdir()):
        path.rename(repo / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    folder.rmdir()
    folder.symlink_to(snapshot)


def copy_of_a_shard(folder: Path, found: dict[str, str]) -> None:
    (folder / "copy.safetensors").write_bytes((folder / "model-0.safetensors").read_bytes())
    found[next(name for name, shard in found.items() if shard == "model-0.safetensors")] = "copy.safetensors"


def elsewhere(folder: Path, found: dict[str, str]) -> None:
    name = next(iter(found))
    found[name] = {"model-0.safetensors": "model-1.safetensors"}.get(found[name], "model-0.safetensors")


def broken_shard(change: Callable[[Path], object]) -> Make:
    """One of the shards is changed."""

    def make(folder: Path) -> None:
        sharded(folder)
        change(folder / "model-0.safetensors")

    return make


NAME, MAP = "is no name of a file in this folder", 'expected "weight_map"'
INDEXES: dict[str, tuple[Make, str]] = {
    "not JSON": (index_of("{"), "not valid JSON"),
    "an array": (index_of("[]"), "expected a JSON object, found list"),
    "not UTF-8": (index_of(b'"\xff"'), "not valid JSON"),
    "100,000 nested brackets": (index_of("[" * 100_000), "not valid JSON"),
    "17 MB": (index_of(b" " * 17_000_000), "larger than 16,777,216 bytes"),
    "duplicate name": (index_of('{"weight_map":{"a":"x","a":"y"}}'), "the name 'a' occurs twice"),
    "no map": (index_of("{}"), MAP),
    "an empty map": (mapped(lambda folder, found: found.clear()), MAP),
    "a map that is a list": (index_of('{"weight_map":["a"]}'), MAP),
    "a shard that is a number": (index_of('{"weight_map":{"a":1}}'), MAP),
    "../": (shard_called("../model-0.safetensors"), NAME),
    "../ further on": (shard_called("x/../model-0.safetensors"), NAME),
    "absolute": (shard_called("/etc/passwd"), NAME),
    "NUL": (shard_called("model-0.safetensors\0"), NAME),
    "escape sequences": (shard_called("\x1b[2J\x1b]52;c;AA\x07"), NAME),
    "lone surrogate": (shard_called("\ud800"), NAME),
    "no name": (shard_called(""), NAME),
    "a name of 100,000": (shard_called("x/" * 50_000), NAME),
    "a name too long for a file": (shard_called("x" * 300), "cannot be read"),
    "the folder itself": (shard_called("."), NAME),
    "a link out of the folder": (link_out, "a link out of the model's folder"),
    "a link into a false cache": (link_into_a_false_cache, "a link out of the model's folder"),
    "links in a cycle": (link_cycle, "cannot be read"),
    "missing shard": (broken_shard(Path.unlink), "model-0.safetensors: missing"),
    "a shard that is a FIFO": (broken_shard(lambda path: (path.unlink(), os.mkfifo(path))), "a device or pipe"),
    "a shard that is a folder": (broken_shard(lambda path: (path.unlink(), path.mkdir())), "a folder, where a file is expected"),
    "truncated shard": (broken_shard(lambda path: os.truncate(path, path.stat().st_size - 1)), "model-0.safetensors: truncated"),
    "a name absent from its shard": (mapped(elsewhere), "no such tensor|no tensor"),
    "a name in no shard": (mapped(lambda folder, found: found.update(x="model-0.safetensors")), "no such tensor|no tensor 'x'"),
    "a name in two shards": (mapped(copy_of_a_shard), "is in copy.safetensors too|is in model-0.safetensors too|twice"),
}


def says_of(name: str, says: str) -> tuple[Any, ...]:
    return (params(says), generate(says), check(says))


FILES += [Case("index", name, make, says_of(name, says)) for name, (make, says) in INDEXES.items()]
FILES += [Case("index", "the Hugging Face cache's own links", hub_cache, (params("", code=0), generate(code=0), check("0 errors", code=0)))]
