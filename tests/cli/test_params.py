"""`toyllm params`: its tables and its JSON document add up, and nothing but headers is needed."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import toyllm as package
from toyllm.cli.main import run

hollow = runpy.run_path(str(Path(__file__).parents[1] / "hollow.py"))
GPT2 = hollow["GPT2"]

COUNTS = """\
component           parameters  active   bytes  bits a weight
embedding and head         696     600   2,784             32
attention                1,248   1,248   4,992             32
mlp                      2,424   2,424   9,696             32
norms                      120     120     480             32
not read                     0       0     256              -
total                    4,488   4,392  18,208             32

dtype  parameters  active   bytes  bits a weight
F32         4,488   4,392  18,208             32

"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    hollow["write"](folder, GPT2, hollow["gpt2"]() | {"h.0.attn.bias": ("F32", (1, 1, 8, 8))})
    return str(folder)


@pytest.fixture
def moe(tmp_path: Path) -> str:
    hollow["write"](tmp_path / "moe", hollow["GPT_OSS"], hollow["gpt_oss"]())
    return str(tmp_path / "moe")


def blocks(text: str) -> list[list[list[str]]]:
    """Tables as cells, those with single spaces inside included."""
    return [[line.split() for line in table.splitlines()] for table in text.strip().split("\n\n")]


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def test_the_tables_add_up(model: str, capsys: pytest.CaptureFixture) -> None:
    assert run(["params", "-m", model]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(COUNTS)
    _, _, files, memory, running = blocks(shown)
    header, padding, tensors, nbytes = map(number, files[1][1:])
    assert header + tensors == nbytes == (Path(model) / "model.safetensors").stat().st_size
    assert tensors == 18_208
    assert padding < 8
    for column in range(1, 5):
        cells = [row[-5 + column - 1] for row in memory[1:-1]]
        assert sum(number(cell) for cell in cells if cell != "-") == number(memory[-1][column])
    assert [" ".join(row[:-5]) for row in memory[1:-1]] == ["input", "layer 0", "layer 1", "head", "buffers", "engine"]
    assert running[1] == ["context", "8", "positions,", "keys", "and", "values", "in", "f32,", "prompts", "by", "512"]


def test_layers_add_up_to_the_total(model: str, capsys: pytest.CaptureFixture) -> None:
    assert run(["params", "-m", model, "--layers"]) == 0
    header, *layers, total = blocks(capsys.readouterr().out)[1]
    assert header[:2] == ["layer", "parameters"]
    assert [" ".join(row[:-4]) for row in layers] == ["no layer", "0", "1"]
    for column in (-4, -3, -2):
        assert sum(number(row[column]) for row in layers) == number(total[column])


def test_the_json_document(moe: str, capsys: pytest.CaptureFixture) -> None:
    assert run(["params", "-m", moe, "--json", "--tree", "--context", "100", "--cache-dtype", "bf16", "--bandwidth", "40"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "toyllm.params/1"
    assert (document["model"], document["from"]) == (moe, "headers")
    for groups in ("components", "dtypes", "layers", "tensors"):
        assert sum(group["parameters"] for group in document[groups]) == document["parameters"]
        assert sum(group["bytes"] for group in document[groups]) == document["bytes"]
    assert [group["component"] for group in document["components"]] == ["embedding", "attention", "router", "experts", "norms", "head"]
    assert document["running"] == {"context": 100, "cache_dtype": "bf16", "prefill_chunk": 512, "weights": "stored", "sequences": 1}
    needs, token = document["memory"], document["token"]
    assert sum(piece["bytes"] for piece in needs["pieces"]) == needs["needed_bytes"]
    assert needs["cache_bytes"] == 2048 * (100 + 100), "what a window remembers, and a pass"
    assert token["bytes"] == token["weight_bytes"] + token["cache_bytes"]
    assert token["tok_s"] == pytest.approx(40e9 / token["bytes"])
    (file,) = document["files"]
    assert file["header_bytes"] + file["tensor_bytes"] == file["bytes"]
    assert file["tensor_bytes"] == document["bytes"]


def test_the_plan_of_weights_in_8_bits(moe: str, capsys: pytest.CaptureFixture) -> None:
    """Attention and the head in blocks of 34 bytes, in place of their pages of the map."""

    def document(*more: str) -> dict:
        assert run(["params", "-m", moe, "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    stored, found = document(), document("--weights", "q8")
    weights = 2880 * (2 * 4096 + 2 * 512 + 64)
    assert (stored["memory"]["quantised_bytes"], found["memory"]["quantised_bytes"]) == (0, weights // 32 * 34)
    assert found["memory"]["weights_bytes"] == stored["memory"]["weights_bytes"] - 2 * weights
    assert found["token"]["weight_bytes"] == stored["token"]["weight_bytes"] - 2 * weights + weights // 32 * 34
    assert (found["bytes"], found["components"], found["token"]["flops"]) == tuple(
        value for value in (stored["bytes"], stored["components"], stored["token"]["flops"])
    )
    assert found["running"]["weights"] == "q8"
    for options, table in (([], 3), (["--shards", "2"], 3)):
        assert run(["params", "-m", moe, "--weights", "q8", *options]) == 0
        assert "quantised" in capsys.readouterr().out.split("\n\n")[table]
        assert run(["params", "-m", moe, *options]) == 0
        assert "quantised" not in capsys.readouterr().out


def test_several_sequences_take_as_many_caches_as_are_then_made(toyllm: Any) -> None:
    for model in ("tales-gpt2", "tales-gpt-oss"):
        found = json.loads(toyllm("params", "-m", model, "--json", "--batch-size", "8", "--context", "100").out)
        assert found["running"]["sequences"] == 8
        assert found["memory"]["cache_bytes"] == package.load(model).new_cache(100, sequences=8).nbytes
    text = toyllm("params", "--batch-size", "8").out
    assert "prompts by 512, 8 sequences together" in text
    assert toyllm("params", "--batch-size", "0").error == "--batch-size 0: expected at least 1"


def test_a_configuration_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "anything.json"
    path.write_text(json.dumps({"model_type": "gpt2"}))
    assert run(["params", "--config", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["from"], document["parameters"], document["files"]) == ("config", 124_439_808, [])


def test_a_stored_head_that_is_tied_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hollow["write"](tmp_path, GPT2, hollow["gpt2"]() | {"lm_head.weight": ("F32", (50, 12))})
    assert run(["params", "-m", str(tmp_path), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["parameters"] == 4_488
    assert shown.err.startswith("note: lm_head.weight is stored although config.json ties it")


@pytest.mark.parametrize(("option", "names"), [("--split=0.6,0.4", ["layers 0-0", "layers 1-1"]), ("--shards=2", ["shard 0", "shard 1"])])
def test_parts_are_columns_and_json(model: str, capsys: pytest.CaptureFixture, option: str, names: list[str]) -> None:
    assert run(["params", "-m", model, option]) == 0
    table = blocks(capsys.readouterr().out)[3]
    assert " ".join(table[0]) == " ".join(names)
    parameters = [number(cell) for cell in next(row for row in table if row[0] == "parameters")[1:]]
    assert run(["params", "-m", model, option, "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert [part["part"] for part in parts] == names
    assert [part["parameters"] for part in parts] == parameters


def test_the_tree_has_every_tensor_and_sums(model: str, capsys: pytest.CaptureFixture) -> None:
    assert run(["params", "-m", model, "--tree"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tensor", "dtype", "shape", "parameters", "bytes"]
    assert lines[1].split() == ["├", "wte.weight", "F32", "[50,", "12]", "600", "2,400"]
    assert sum("F32" in line for line in lines) == 29
    layer = next(line for line in lines if line.split()[:2] == ["├", "0"])
    assert layer.split()[2:] == ["1,884", "7,792"]  # a block of 1,884 parameters, and a buffer of 256 bytes
    buffer = next(line for line in lines if "[1, 1, 8, 8]" in line)
    assert buffer.split()[-2:] == ["0", "256"]


def test_a_hostile_name_stays_harmless(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hollow["write"](tmp_path, GPT2, hollow["gpt2"]() | {"[/x]\x1b]52;c;AA\x07": ("F32", ())})
    assert run(["params", "-m", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "[/x]\\x1b]52;c;AA\\x07 is not part of this architecture" in shown.err
    assert "\x1b" not in shown.err


def test_a_hostile_name_that_is_a_buffer_is_shown_harmlessly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hostile = "[/x]\x1b]52;c;AA\x07." * 40 + "rotary_emb.inv_freq"
    hollow["write"](tmp_path, hollow["GPT_OSS"], hollow["gpt_oss"]() | {hostile: ("F32", (3,)), "rotary_emb.inv_freq": ("F32", (3,))})
    assert run(["params", "-m", str(tmp_path), "--tree"]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b]52;c;AA\\x07" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config", "x.json", "-m", "y"], 2, "give --model or --config, not both"),
        (["--split", "1,1", "--shards", "2"], 2, "give --split or --shards, not both"),
        (["--split", "a,b"], 2, "--split a,b: expected numbers such as 0.6,0.4"),
        (["--bandwidth", "0"], 2, "--bandwidth 0.0: expected a number above 0"),
        (["--bandwidth", "nan"], 2, "--bandwidth nan: expected a number above 0"),
        (["--context", "1025"], 1, "--context 1025: expected 1 to"),
        (["--weights", "q4"], 1, "--weights q4: expected stored or q8"),
        (["--config", "absent.json"], 1, "absent.json: missing"),
        (["--config", "endless.json"], 1, "n_layer: expected an integer from 1 to 10000, found 2000000000"),
        (["--shards", "7"], 1, "--shards 7: expected a divisor"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "endless.json").write_text('{"model_type": "gpt2", "n_layer": 2000000000}')
    assert run(["params", *arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("name", ["params", "check"])
def test_no_arithmetic_is_loaded(name: str) -> None:
    program = f"import sys; from toyllm.cli.main import run; code = run([{name!r}]); sys.exit(code or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, env={**os.environ, "COLUMNS": "20"}).returncode == 0


def test_an_allocation_that_failed_is_shown_as_such() -> None:
    from toyllm.cli.running import memory_lines
    from toyllm.models.memory import ALLOCATED, FAILED, Allocation

    pieces = (Allocation("layer 0", "weights", 1000, ALLOCATED), Allocation("layer 0", "cache", 2000, FAILED))
    assert [line.split("  ") for line in memory_lines(pieces)][1][-1] == "weights allocated, cache failed"
    assert memory_lines(pieces)[1].split()[:6] == ["layer", "0", "1,000", "-", "2,000", "-"]
    assert memory_lines(pieces)[2].split() == ["total", "1,000", "0", "2,000", "0"]
