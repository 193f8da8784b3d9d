"""Cut checkpoints on the disk: files to the byte, the record, memory, and a folder that appears whole or not at all."""

import json
import runpy
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models import cut as cutting
from toyllm.models import cut_files, cut_tensors
from toyllm.models.check import check
from toyllm.models.checkpoint import open_checkpoint
from toyllm.models.cut import Plan, Wanted, cut, make_plan
from toyllm.models.location import find_model
from toyllm.models.params import anatomy, count

help_ = runpy.run_path(str(Path(__file__).parent / "cut_help.py"))
hollow = runpy.run_path(str(Path(__file__).parents[1] / "hollow.py"))
at, tensors_of, config_of = (help_[name] for name in ["at", "tensors_of", "config_of"])


# ---- files ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [30_000, 60_000, 100_000, 10_000_000])
@pytest.mark.parametrize("case", ["gpt_oss/sharded", "gpt2/baseline", "gpt2/three_dtypes_unaligned"])
def test_no_file_is_larger_than_asked_and_all_tensors_are_there(tmp_path: Path, case: str, size: int) -> None:
    plan = cut(at(case), tmp_path / "out", Wanted(shard_size=size))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in files] == [shard.name for shard in plan.shards]
    assert all(path.stat().st_size <= size for path in files)
    assert (len(files) == 1) == (files[0].name == "model.safetensors") == (not (tmp_path / "out" / "model.safetensors.index.json").exists())
    assert (len(files) > 1) or size > 30_000
    assert (len(files) == 1) or size < 10_000_000
    assert tensors_of(tmp_path / "out") == tensors_of(at(case))
    assert check(find_model(str(tmp_path / "out"))).findings == check(find_model(at(case))).findings


def test_shards_follow_a_tokens_way(tmp_path: Path) -> None:
    plan = cut("tales-gpt2", tmp_path / "out", Wanted(shard_size=2_200_000))
    layers = [sorted({t.key.partition(".")[0] for t in shard.tensors}) for shard in plan.shards]
    assert layers[0] == ["embed"]
    inner = [int(layer) for names in layers for layer in names if layer.isdecimal()]
    assert inner == sorted(inner)
    assert "norm_f" in layers[-1]


@pytest.mark.parametrize("case", ["gpt_oss/sharded", "gpt_oss/original_sharded", "gpt2/sharded"])
def test_shards_are_merged(tmp_path: Path, case: str) -> None:
    cut(at(case), tmp_path / "out", Wanted(merge=True))
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert tensors_of(tmp_path / "out") == tensors_of(at(case))


def test_files_are_as_the_format_wants_them_and_the_librarys_reader_takes_them(tmp_path: Path) -> None:
    cut(at("gpt2/three_dtypes_unaligned"), tmp_path / "out", Wanted())
    checkpoint = open_checkpoint(find_model(str(tmp_path / "out")))
    assert {t.dtype for t in checkpoint.tensors.values()} == {"F32", "F16", "BF16"}
    start = 8 + int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert start % 8 == 0
    assert all(t.offset % {"F32": 4, "F16": 2, "BF16": 2}[t.dtype] == 0 for t in checkpoint.tensors.values())
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(checkpoint.tensors)
        assert file.metadata()["format"] == "pt"


PLANS = [
    Wanted(),
    Wanted(layers=1, merge=True),
    Wanted(shard_size=2_300_000),
    Wanted(layers=(0, 2), dtype="F32", shard_size=5_000_000),
    Wanted(dtype="F16", dialect="bare"),
]
MIXTURE_PLANS = [
    *PLANS,
    Wanted(layers=2, experts=(0, 3, 7)),
    Wanted(experts=1, expert_dtype="BF16"),
    Wanted(dialect="original", shard_size=3_000_000),
]


@pytest.mark.parametrize(("model", "wanted"), [*(("tales-gpt2", w) for w in PLANS), *(("tales-gpt-oss", w) for w in MIXTURE_PLANS)])
def test_the_plan_is_right_to_the_byte_and_the_same_command_writes_the_same_bytes(tmp_path: Path, model: str, wanted: Wanted) -> None:
    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    planned = make_plan(find_model(model), wanted)
    cut(model, tmp_path / "a", wanted)
    cut(model, tmp_path / "b", wanted)
    assert {name: len(data) for name, data in read(tmp_path / "a").items()} == planned.files
    assert sum(map(len, read(tmp_path / "a").values())) == planned.nbytes
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert planned.parameters == count(anatomy(find_model(str(tmp_path / "a"))).entries).parameters
    assert len(planned.tensors) == len(tensors_of(tmp_path / "a"))


# ---- the record -------------------------------------------------------------------------------------------------------------


def test_the_record_says_what_was_cut_in_the_folder_and_in_every_file_of_weights(tmp_path: Path) -> None:
    wanted = Wanted(layers=(0, 1, 3), experts=3, dtype="F32", expert_dtype="BF16", shard_size=9_000_000)
    plan = cut("tales-gpt-oss", tmp_path / "out", wanted)
    record_ = json.loads((tmp_path / "out" / "cut.json").read_text())
    assert record_ == plan.record
    fingerprint = record_["source"].pop("fingerprint")
    assert len(fingerprint) == len("sha256:") + 64
    assert record_ == {
        "schema": "toyllm.cut-record/1",
        "toyllm": toyllm.__version__,
        "source": {"model": "tales-gpt-oss", "tensors": 79, "bytes": 7_235_200, "cut": None},
        "layers": {"kept": [0, 1, 3], "of": 4},
        "experts": {"kept": [0, 1, 2], "of": 8, "per_token": 2, "of_per_token": 2},
        "dialect": {"from": "hf", "to": "hf"},
        "conversions": [
            {"from": "BF16", "to": "F32", "weights": 48, "exact": True},
            {"from": "MXFP4", "to": "BF16", "weights": 6, "exact": True},
        ],
        "left_out": [],
    }
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "np") as file:
            assert json.loads(file.metadata()["toyllm.cut"]) == plan.record


def test_a_cut_of_a_cut_remembers_both(tmp_path: Path) -> None:
    first = cut("tales-gpt2", tmp_path / "a", Wanted(layers=4))
    second = cut(str(tmp_path / "a"), tmp_path / "b", Wanted(layers=(1, 2)))
    assert second.record["source"]["cut"] == first.record
    assert second.record["source"]["model"] == str(tmp_path / "a")


def test_the_fingerprint_is_the_weights_and_not_the_files(tmp_path: Path) -> None:
    def fingerprint(model: str | Path) -> str:
        return make_plan(find_model(str(model)), Wanted()).record["source"]["fingerprint"]

    source = at("gpt2/sharded")
    cut(source, tmp_path / "merged", Wanted(merge=True))
    assert fingerprint(tmp_path / "merged") == fingerprint(source)
    tensor = open_checkpoint(find_model(str(tmp_path / "merged"))).tensors["transformer.h.1.mlp.c_fc.weight"]
    for place in (tensor.offset, tensor.offset + tensor.nbytes - 1):
        original = tensor.path.read_bytes()[place]
        hollow["poke"](tensor.path, place, bytes([original ^ 1]))
        assert fingerprint(tmp_path / "merged") != fingerprint(source)
        hollow["poke"](tensor.path, place, bytes([original]))


# ---- whole or not at all ----------------------------------------------------------------------------------------------------


def failing(error: BaseException, after: int) -> Callable[..., None]:
    """A `write_shard` that writes a number of files, and raises in the next."""
    write, left = cut_files.write_shard, [after]

    def write_shard(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        if not left[0]:
            raise error
        left[0] -= 1

    return write_shard


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), ToyllmError)]
)
def test_an_end_in_the_middle_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException], existing: bool
) -> None:
    if existing:
        cut("tales-gpt2", tmp_path / "out", Wanted(layers=1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(cutting, "write_shard", failing(error, after=2))
    with pytest.raises(raised) as ended:
        cut("tales-gpt2", tmp_path / "out", Wanted(shard_size=2_200_000), force=existing)
    if raised is ToyllmError:
        assert str(ended.value) == f"{tmp_path}/out: cannot be written (No space left on device)"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert len(list(tmp_path.iterdir())) == existing


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = make_plan(find_model("tales-gpt2"), Wanted()).nbytes

    class Disk:
        free = nbytes - 1

    monkeypatch.setattr(cut_files.shutil, "disk_usage", lambda _: Disk)
    with pytest.raises(ToyllmError) as refused:
        cut("tales-gpt2", tmp_path / "out", Wanted())
    assert str(refused.value) == (f"{tmp_path}/out: {nbytes:,} bytes to write, {nbytes - 1:,} free on this disk; make room, or keep less")
    assert list(tmp_path.iterdir()) == []
    Disk.free = nbytes
    cut("tales-gpt2", tmp_path / "out", Wanted())


def test_nothing_is_written_over_and_only_a_cut_is_replaced(tmp_path: Path) -> None:
    cut("tales-gpt2", tmp_path / "cut", Wanted())
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "cut.json").write_bytes((tmp_path / "cut" / "cut.json").read_bytes())
    (tmp_path / "nested" / "work").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("cut")
    for name in ("cut", "empty", "mine", "nested", "file", "link"):
        with pytest.raises(ToyllmError, match="is there already; name another folder"):
            cut("tales-gpt2", tmp_path / name, Wanted(layers=1))
    for name in ("mine", "nested", "file", "link"):
        with pytest.raises(ToyllmError, match="no folder that `toyllm cut` wrote"):
            cut("tales-gpt2", tmp_path / name, Wanted(layers=1), force=True)
    for name in ("cut", "empty"):
        cut("tales-gpt2", tmp_path / name, Wanted(layers=1), force=True)
        assert config_of(tmp_path / name)["n_layer"] == 1
    with pytest.raises(ToyllmError, match=r"no folder .*/no to make it in"):
        cut("tales-gpt2", tmp_path / "no" / "where", Wanted())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "empty", "file", "link", "mine", "nested"]


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = cut_files.write_shard

    def meanwhile(*arguments: Any) -> None:
        (tmp_path / "out").mkdir()
        write(*arguments)

    monkeypatch.setattr(cutting, "write_shard", meanwhile)
    with pytest.raises(ToyllmError, match="is there already"):
        cut("tales-gpt2", tmp_path / "out", Wanted())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_cut_can_replace_its_own_source(tmp_path: Path) -> None:
    cut("tales-gpt2", tmp_path / "out", Wanted())
    cut(str(tmp_path / "out"), tmp_path / "out", Wanted(layers=(2, 3), merge=True), force=True)
    before, after = tensors_of("tales-gpt2"), tensors_of(tmp_path / "out")
    assert after["h.1.mlp.c_fc.weight"] == before["h.3.mlp.c_fc.weight"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_source_that_no_model_can_be_loaded_from_is_refused(tmp_path: Path) -> None:
    hollow["write"](tmp_path / "extra", hollow["GPT2"], hollow["gpt2"]() | {"other": ("F32", (1,))})
    hollow["write"](tmp_path / "f64", hollow["GPT2"], hollow["gpt2"](dtype="F64"))
    for name, message in (("extra", "not part of this architecture"), ("f64", "expected F32, F16 or BF16, found F64")):
        with pytest.raises(ToyllmError, match=message):
            cut(str(tmp_path / name), tmp_path / "out", Wanted())
    assert not (tmp_path / "out").exists()


# ---- streaming --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ("gpt_oss/sharded", Wanted(experts=(0, 2), dialect="original")),
        ("gpt_oss/sharded", Wanted(expert_dtype="F32", dtype="F16")),
        ("gpt2/f16", Wanted(dtype="BF16")),
    ],
)
def test_pieces_of_any_size_make_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, wanted: Wanted, piece: int
) -> None:
    cut(at(case), tmp_path / "whole", wanted)
    monkeypatch.setattr(cut_tensors, "PIECE", piece)
    cut(at(case), tmp_path / "pieces", wanted)
    assert tensors_of(tmp_path / "pieces") == tensors_of(tmp_path / "whole")


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(dialect="original"), Wanted(expert_dtype="BF16", dtype="F32")])
def test_memory_does_not_grow_with_the_tensors(tmp_path: Path, wanted: Wanted) -> None:
    hollow["write"](tmp_path / "in", hollow["GPT_OSS"], hollow["gpt_oss"]())
    plan = make_plan(find_model(str(tmp_path / "in")), wanted)
    assert max(t.nbytes for t in plan.tensors) > 15e6
    tracemalloc.start()
    try:
        cutting.write(plan, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6


def test_progress_ends_with_all_bytes_of_the_tensors(tmp_path: Path) -> None:
    plan: Plan = make_plan(find_model("tales-gpt-oss"), Wanted(expert_dtype="BF16"))
    calls: list[tuple[int, int]] = []
    cutting.write(plan, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    total = sum(t.nbytes for t in plan.tensors)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
