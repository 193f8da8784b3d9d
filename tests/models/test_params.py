"""Counting from headers and configurations: published totals, every byte, parts that add up, and the memory that a model takes."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models import memory
from toyllm.models.checkpoint import Checkpoint, open_checkpoint
from toyllm.models.location import ModelFiles, find_model
from toyllm.models.params import Anatomy, anatomy, count, file_sizes
from toyllm.models.parts import shards, split, whole

hollow = runpy.run_path(str(Path(__file__).parents[1] / "hollow.py"))
MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}


def gpt2(L: int, D: int, H: int) -> dict:
    return {"model_type": "gpt2", "n_layer": L, "n_embd": D, "n_head": H}


def gpt_oss(L: int = 24, E: int = 32, **more: object) -> dict:
    return {"model_type": "gpt_oss", "num_hidden_layers": L, "num_local_experts": E, **MXFP4, **more}


ORIGINAL = {"num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "swiglu_limit": 7.0}


def of_config(tmp_path: Path, document: dict) -> Anatomy:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    return anatomy(ModelFiles("it", tmp_path, None, None, path, None, None, None, None))


@pytest.fixture
def of_20b(tmp_path: Path) -> Anatomy:
    return of_config(tmp_path, gpt_oss())


@pytest.mark.parametrize(
    ("document", "parameters", "active", "nbytes"),
    [
        (gpt2(6, 768, 12), 81_912_576, 81_126_144, 327_650_304),
        (gpt2(12, 768, 12), 124_439_808, 123_653_376, 497_759_232),
        (gpt2(24, 1024, 16), 354_823_168, 353_774_592, 1_419_292_672),
        (gpt2(36, 1280, 20), 774_030_080, 772_719_360, 3_096_120_320),
        (gpt2(48, 1600, 25), 1_557_611_200, 1_555_972_800, 6_230_444_800),
        (gpt2(12, 768, 12) | {"torch_dtype": "float16"}, 124_439_808, 123_653_376, 248_879_616),
        (gpt_oss(), 20_914_757_184, 3_608_307_264, 13_761_264_768),
        (gpt_oss(36, 128), 116_829_156_672, 5_132_849_472, 65_248_815_744),
        (ORIGINAL, 20_914_757_184, 3_608_307_264, 13_761_264_768),
        (gpt_oss(quantization_config=None), 20_914_757_184, 3_608_307_264, 41_829_514_368),
    ],
)
def test_a_configuration_alone_gives_the_published_counts(
    tmp_path: Path, document: dict, parameters: int, active: int, nbytes: int
) -> None:
    sums = count(of_config(tmp_path, document).entries)
    assert (sums.parameters, sums.active, sums.nbytes) == (parameters, active, nbytes)


def test_headers_give_the_same_and_every_byte_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "array", None)  # no weight is looked at
    tensors = hollow["gpt_oss"](L=24, E=32, V=201_088)
    hollow["write"](tmp_path, gpt_oss(), tensors)
    found = anatomy(find_model(str(tmp_path)))
    sums = count(found.entries)
    assert (sums.parameters, sums.active, sums.nbytes) == (20_914_757_184, 3_608_307_264, 13_761_264_768)
    assert sums.bits == pytest.approx(8 * 13_761_264_768 / 20_914_757_184)
    (file,) = found.files
    assert file.header + file.tensors == file.nbytes == (tmp_path / "model.safetensors").stat().st_size
    assert file.tensors == 13_761_264_768
    assert {e.name: (e.dtype, e.shape) for e in found.entries} == tensors
    promised = of_config(tmp_path, gpt_oss()).entries
    assert {(e.name, e.dtype, e.shape, e.nbytes) for e in promised} == {(e.name, e.dtype, e.shape, e.nbytes) for e in found.entries}


def test_a_file_that_has_more_than_header_and_tensors_is_refused_with_the_figures(tmp_path: Path) -> None:
    hollow["write"](tmp_path, hollow["GPT2"], hollow["gpt2"]())
    checkpoint = open_checkpoint(find_model(str(tmp_path)))
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ToyllmError, match=r"model\.safetensors: header 2,\d+ and tensors 17,952 bytes are .*, the file has"):
        file_sizes(checkpoint)


def test_buffers_and_a_stored_copy_of_the_tied_head_are_bytes_but_no_parameters(tmp_path: Path) -> None:
    plain = hollow["gpt2"]()
    hollow["write"](tmp_path / "plain", hollow["GPT2"], plain)
    extra = {"h.0.attn.bias": ("F32", (1, 1, 8, 8)), "h.1.attn.masked_bias": ("F32", ()), "lm_head.weight": ("F32", (50, 12))}
    hollow["write"](tmp_path / "more", hollow["GPT2"], plain | extra)
    a, b = (count(anatomy(find_model(str(tmp_path / name))).entries) for name in ("plain", "more"))
    assert (b.parameters, b.active, b.bits) == (a.parameters, a.active, 32)
    assert b.nbytes - a.nbytes == 4 * (64 + 1 + 600)


def test_an_untied_head_counts_and_its_embedding_is_not_active(tmp_path: Path) -> None:
    tensors = hollow["gpt2"]() | {"lm_head.weight": ("F32", (50, 12))}
    hollow["write"](tmp_path, hollow["GPT2"] | {"tie_word_embeddings": False}, tensors)
    sums = count(anatomy(find_model(str(tmp_path))).entries)
    assert sums.parameters == sum(np.prod(shape) for _, shape in tensors.values())
    assert sums.active == sums.parameters - 50 * 12 - 8 * 12


def test_what_is_not_the_architecture_is_refused(tmp_path: Path) -> None:
    hollow["write"](tmp_path, hollow["GPT2"], hollow["gpt2"]() | {"h.0.attn.gate": ("F32", (12,))})
    with pytest.raises(ToyllmError, match=r"tensor h\.0\.attn\.gate is not part of this architecture"):
        anatomy(find_model(str(tmp_path)))


def test_a_decoded_token_reads_what_is_published(of_20b: Anatomy) -> None:
    token = memory.per_token(of_20b, whole(of_20b), memory.running(of_20b, 1000, "bf16", 512))
    experts, attention, head, rest = 1_270_702_080, 1_274_406_912, 1_158_266_880, 4_707_456
    assert token.weight_bytes == experts + attention + head + rest + 2 * 2880  # and a row of the embedding
    assert token.cache_bytes == 2048 * 12 * (128 + 1000)
    matrices = 3_608_307_264 - 24 * (4096 + 2 * 512 + 2880 + 64 + 2 * 2880 + 32 + 4 * (3 * 2880)) - 2880
    assert token.flops == 2 * matrices + 4 * 4096 * 12 * (128 + 1000)
    assert token.rate(40e9) == pytest.approx(40e9 / token.nbytes)


def test_a_plan_has_the_weights_and_the_cache_of_each_layer(of_20b: Anatomy) -> None:
    run = memory.running(of_20b, 8192, "bf16", 512)
    rows = memory.memory_rows(memory.plan(of_20b, whole(of_20b), run))
    assert [part for part, _, _ in rows] == ["input", *(f"layer {i}" for i in range(24)), "head", "buffers", "engine"]
    assert {status for _, _, status in rows} == {memory.PLANNED}
    assert [rows[1 + i][1]["cache"] for i in (0, 1)] == [2048 * (128 + 512), 2048 * 8192]
    pieces = memory.plan(of_20b, whole(of_20b), run)
    assert memory.total(pieces, "cache") == of_20b.family.cache_bytes(of_20b.config, 8192, 512, "bf16")
    assert memory.total(pieces, "weights") == 13_761_264_768
    assert memory.total(pieces) == sum(memory.total(pieces, kind) for kind in memory.KINDS)


def test_a_plan_shows_what_came_of_it(of_20b: Anatomy) -> None:
    pieces = memory.plan(of_20b, whole(of_20b), memory.running(of_20b, 64, "f32", 64))
    pieces = memory.mark(memory.mark(pieces, "weights", memory.ALLOCATED), "cache", memory.FAILED)
    statuses = {part: status for part, _, status in memory.memory_rows(pieces)}
    assert statuses["input"] == "allocated"
    assert statuses["layer 3"] == "weights allocated, widened planned, cache failed"


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_planned_buffers_and_copies_are_those_that_the_engine_makes(tmp_path: Path, name: str) -> None:
    tensors = hollow["gpt2"](D=64, dtype="F16") if name == "gpt2" else hollow["gpt_oss"](D=64, F=64)
    config = hollow["GPT2"] | {"n_embd": 64} if name == "gpt2" else hollow["GPT_OSS"] | {"hidden_size": 64, "intermediate_size": 64}
    hollow["write"](tmp_path, config, tensors)
    model = toyllm.load(str(tmp_path), backend="numpy")
    a = anatomy(model.files)
    pieces = memory.plan(a, whole(a), memory.running(a, 8, "f32", 8))
    made = sum(buffer.nbytes for buffer in vars(model.family.make_buffers(model.config, 8)).values())
    planned = next(p.nbytes for p in pieces if p.part == "buffers")
    crowd = 0 if name == "gpt2" else 4 * 4 * (2 * 64 + 3 * 64)  # half of 8 tokens, each with its x, y, h and z
    scratch = 4 * memory.threads() * 64 * (4096 + 1)  # narrower kernels take less
    assert made - scratch <= planned - crowd - 4 * model.vocab_size <= made + scratch
    vectors = [t for t in tensors if len(tensors[t][1]) == 1 or t.endswith("_bias")]
    assert memory.total(pieces, "widened") == sum(4 * int(np.prod(tensors[t][1])) for t in vectors)
    assert memory.total(pieces, "cache") == model.new_cache(8).nbytes


def test_parts_by_layers_add_up(of_20b: Anatomy) -> None:
    run = memory.running(of_20b, 4096, "f32", 512)
    parts = split(of_20b, [0.6, 0.4])
    assert [list(part.layers) for part in parts] == [list(range(14)), list(range(14, 24))]
    all_of_it = whole(of_20b)
    for figure in (
        lambda part: count(part.entries),
        lambda part: memory.per_token(of_20b, part, run),
        lambda part: {kind: memory.total(memory.plan(of_20b, part, run), kind) for kind in ("weights", "widened", "cache")},
    ):
        values = [dict(f) if isinstance(f, dict) else vars(f) for f in map(figure, (all_of_it, *parts))]
        assert all(values[0][key] == values[1][key] + values[2][key] for key in values[0])
    assert {e.component for e in parts[0].entries} - {e.component for e in parts[1].entries} == {"embedding"}


def test_a_tied_embedding_is_counted_in_the_first_part_and_held_in_the_last_too(tmp_path: Path) -> None:
    a = of_config(tmp_path, gpt2(12, 768, 12))
    first, last = (count(part.entries) for part in split(a, [1, 1]))
    assert first.parameters + last.parameters == 124_439_808
    assert first.active + last.active == 123_653_376
    assert first.nbytes + last.nbytes == 497_759_232 + 4 * 50257 * 768
    assert [part.entries for part in split(a, [1])] == [whole(a).entries]


@pytest.mark.parametrize("n", [1, 2, 8])
def test_shards_cut_what_has_an_axis_and_repeat_the_rest(of_20b: Anatomy, n: int) -> None:
    parts = shards(of_20b, n)
    for e, *mine in zip(whole(of_20b).entries, *(part.entries for part in parts), strict=True):
        if e.shard_axis is None:
            assert all(share == e for share in mine)
        else:
            assert sum(share.shape[e.shard_axis] for share in mine) == e.shape[e.shard_axis]
            assert sum(share.nbytes for share in mine) == e.nbytes
            assert sum(share.parameters for share in mine) == e.parameters
    run = memory.running(of_20b, 4096, "bf16", 512)
    planned = [memory.total(memory.plan(of_20b, part, run), "cache") for part in parts]
    assert planned == [of_20b.family.cache_bytes(of_20b.config, 4096, 512, "bf16") // n] * n


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: split(a, []), "expected numbers above 0"),
        (lambda a: split(a, [0.5, 0]), "expected numbers above 0"),
        (lambda a: split(a, [1, float("nan")]), "expected numbers above 0"),
        (lambda a: split(a, [1, 0.01]), "none of the 24 layers"),
        (lambda a: shards(a, 0), "expected a divisor of the model's 8 key/value heads"),
        (lambda a: shards(a, 3), "expected a divisor of the model's 8 key/value heads"),
        (lambda a: memory.running(a, 131_073, "f32", 512), "expected 1 to 131072"),
        (lambda a: memory.running(a, 1, "f16", 512), "expected f32 or bf16"),
        (lambda a: memory.running(a, 1, "f32", 0), "expected at least 1"),
    ],
)
def test_what_cannot_be_planned_is_refused(of_20b: Anatomy, call: object, message: str) -> None:
    with pytest.raises(ToyllmError, match=message):
        call(of_20b)


def test_the_verdict_tells_weights_that_would_not_stay_from_memory_that_is_not_there() -> None:
    assert memory.verdict(10, 6, 10) == "fits"
    assert memory.verdict(10, 6, 9).startswith("does not fit: it would run, but read weights from the disk")
    assert memory.verdict(10, 6, 3) == "does not fit"
    assert memory.verdict(10, 6, None).startswith("unknown")
