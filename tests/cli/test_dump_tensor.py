"""`toyllm dump-tensor`: what it lists, shows, sums up, plots and saves, what it refuses, and how little it reads for it."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors.numpy import load_file, save_file
from typer.main import get_command

import toyllm
from toyllm.cli.dump_tensor import dump_tensor
from toyllm.kernels.errors import ToyllmError

UsageError = typer.BadParameter.__mro__[1]
HOSTILE = ("\x1b]52;c;aGk=\x07", "[/x]", "a\nb", "\u202etxt.exe", "$x_{$")

app = typer.Typer(rich_markup_mode=None)
app.command("dump-tensor")(dump_tensor)

Run = Callable[..., str]


class Stream(io.TextIOWrapper):
    """A standard stream over bytes: a terminal, or a pipe."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", newline="")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line and return its stdout; with `screen`, stdout is a terminal."""

    def run(*arguments: str | Path, screen: bool = False) -> str:
        out = Stream(screen)
        monkeypatch.setattr(sys, "stdout", out)
        get_command(app)([str(a) for a in arguments], standalone_mode=False)
        out.flush()
        return out.buffer.getvalue().decode()

    return run


RNG = np.random.default_rng(4)
BLOCKS = RNG.integers(0, 256, (2, 4, 3, 16), dtype=np.uint8)
TENSORS = {
    "layers.0.weight": RNG.standard_normal((40, 30)).astype(np.float32),
    "layers.0.bias": np.array([1, -2.5, 3, np.nan], np.float32),
    "layers.1.weight": np.arange(6, dtype=np.int64).reshape(2, 3),
    "scalar": np.array(2.5),
    "empty": np.zeros((0, 3), np.float32),
    "experts.gate_up_proj_blocks": BLOCKS,
    "experts.gate_up_proj_scales": RNG.integers(110, 130, (2, 4, 3), dtype=np.uint8),
}
FACTS = r"min \S+ max \S+ mean \S+ std \S+ zeros [\d.]+ % NaN [\d,]+ Inf [\d,]+"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_file(TENSORS, path)
    return path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "model.safetensors"
    save_file({name: np.ones((2, 2), np.float32) for name in HOSTILE}, path)
    return path


# lists


def test_without_a_name_all_tensors_are_listed(run: Run, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("-m", weights).splitlines()
    assert lines[0].split() == ["name", "dtype", "shape", "bytes", "shard"]
    rows = {line.split()[0]: re.split(r" {2,}", line)[1:] for line in lines[1:]}
    assert rows.keys() == {*TENSORS, "experts.gate_up_proj"}
    assert rows["layers.0.weight"] == ["F32", "[40, 30]", "4,800", "model.safetensors"]
    assert rows["experts.gate_up_proj"] == ["MXFP4", "[2, 4, 96]", "(decoded)"]
    assert capsys.readouterr().err == f"7 tensors, {sum(a.nbytes for a in TENSORS.values()):,} bytes\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("layers.*.weight", "--list"), ["layers.0.weight", "layers.1.weight"]),
        ((r"^layers\.\d\.(weight|bias)$", "--regex", "--list"), ["layers.0.weight", "layers.0.bias", "layers.1.weight"]),
        (("scalar", "empty", "--list"), ["scalar", "empty"]),
    ],
)
def test_a_list_can_be_filtered(run: Run, weights: Path, arguments: tuple[str, ...], expected: list[str]) -> None:
    assert sorted(line.split()[0] for line in run(*arguments, "-m", weights).splitlines()[1:]) == sorted(expected)


def test_a_list_as_json(run: Run, weights: Path) -> None:
    document = json.loads(run("scalar", "experts.gate_up_proj", "--list", "--json", "-m", weights))
    by_name = {entry.pop("name"): entry for entry in document.pop("tensors")}
    assert document == {"schema": "toyllm.dump-tensor/1"}
    assert by_name["scalar"] == {"dtype": "F64", "shape": [], "bytes": 8, "shard": "model.safetensors"}
    assert by_name["experts.gate_up_proj"] == {"dtype": "MXFP4", "shape": [2, 4, 96], "bytes": 2 * 4 * 3 * 17, "shard": None}


# values


def test_a_name_shows_facts_and_values(run: Run, weights: Path) -> None:
    assert run("layers.0.bias", "-m", weights) == (
        "layers.0.bias  F32 [4], 16 bytes; min -2.5 max 3 mean 0.5 std 2.27303 zeros 0 % NaN 1 Inf 0\n[ 1.0000, -2.5000,  3.0000,  NaN]\n"
    )
    assert run("layers.1.weight", "-m", weights, "--no-header") == "[[ 0,  1,  2],\n [ 3,  4,  5]]\n"
    assert run("scalar", "-m", weights, "--no-header", "--precision", "1") == "2.5\n"
    assert run("empty", "-m", weights).splitlines() == [
        "empty  F32 [0, 3], 0 bytes; min - max - mean - std - zeros - NaN 0 Inf 0",
        "[]",
    ]


def test_a_glob_shows_several(run: Run, weights: Path) -> None:
    parts = run("layers.*.weight", "-m", weights).split("\n\n")
    assert sorted(part.split()[0] for part in parts) == ["layers.0.weight", "layers.1.weight"]
    assert all(re.search(FACTS, part.splitlines()[0]) for part in parts)


def test_the_knobs_reach_the_layout(run: Run, weights: Path) -> None:
    w = TENSORS["layers.0.weight"]
    edge = run("layers.0.weight", "-m", weights, "--no-header", "--edge-items", "1", "--precision", "2").splitlines()
    assert edge == [f"[[{w[0, 0]: .2f}, ..., {w[0, -1]: .2f}],", " ...,", f" [{w[-1, 0]: .2f}, ..., {w[-1, -1]: .2f}]]"]
    assert run("layers.0.weight", "-m", weights, "--no-header", "--full", "--scientific").count("e") == 1200
    assert "..." not in run("layers.0.weight", "-m", weights, "--no-header", "--threshold", "1200")
    assert run("layers.0.bias", "-m", weights, "--no-header", "--threshold", "3", "--edge-items", "1") == "[ 1.0000, ...,  NaN]\n"


def test_a_slice_is_shown_with_the_statistics_of_the_slice(run: Run, weights: Path) -> None:
    w = TENSORS["layers.0.weight"][0, -3:]
    head, values = run("layers.0.weight", "-m", weights, "--slice", "0, -3:").splitlines()
    assert f"[40, 30], 4,800 bytes; slice [0, -3:] of shape [3]; min {w.min():.6g} max {w.max():.6g}" in head
    assert values == "[" + ", ".join(f"{v: .4f}" for v in w.tolist()) + "]"


def test_raw_shows_bits_and_mxfp4_blocks(run: Run, weights: Path) -> None:
    assert run("layers.0.bias", "-m", weights, "--raw", "--no-header", "--slice", ":2") == "[ 0x3f800000,  0xc0200000]\n"
    head, *lines = run("experts.gate_up_proj", "-m", weights, "--raw", "--slice", "1, :2, :32").splitlines()
    assert "MXFP4 [2, 4, 96], 408 bytes; rows 2 i are gate, 2 i + 1 up; slice" in head
    scale = TENSORS["experts.gate_up_proj_scales"][1, :, 0].tolist()
    assert lines == [
        f"[1, 0, 0:32]  gate 0  scale 0x{scale[0]:02x} 2^{scale[0] - 127}  codes {BLOCKS[1, 0, 0].tobytes().hex(' ')}",
        f"[1, 1, 0:32]  up 0  scale 0x{scale[1]:02x} 2^{scale[1] - 127}  codes {BLOCKS[1, 1, 0].tobytes().hex(' ')}",
    ]


def test_json_holds_facts_statistics_and_values(run: Run, weights: Path) -> None:
    (entry,) = json.loads(run("layers.0.bias", "-m", weights, "--json"))["tensors"]
    assert (entry["name"], entry["dtype"], entry["shape"], entry["bytes"]) == ("layers.0.bias", "F32", [4], 16)
    assert entry["values"] == [1, -2.5, 3, "NaN"]
    assert entry["statistics"] == pytest.approx(
        {"min": -2.5, "max": 3, "mean": 0.5, "std": np.std([1, -2.5, 3]), "zeros": 0, "nan": 1, "inf": 0, "elements": 4}
    )
    (entry,) = json.loads(run("layers.0.weight", "-m", weights, "--json"))["tensors"]
    assert (entry["edge_items"], np.shape(entry["values"])) == (3, (6, 6))
    (entry,) = json.loads(run("experts.gate_up_proj", "-m", weights, "--json", "--raw", "--slice", "0, 1, 5"))["tensors"]
    assert [(b["index"], b["first"], b["part"], b["codes"]) for b in entry["blocks"]] == [
        ([0, 1], 0, "up 0", BLOCKS[0, 1, 0].tobytes().hex())
    ]


def test_statistics_alone_are_a_table(run: Run, weights: Path) -> None:
    lines = run("layers.*", "--stats", "-m", weights).splitlines()
    assert lines[0].split() == ["name", "dtype", "shape", "min", "max", "mean", "std", "zeros", "NaN", "Inf"]
    row = next(line for line in lines if line.startswith("layers.0.bias"))
    assert re.split(r" {2,}", row) == ["layers.0.bias", "F32", "[4]", "-2.5", "3", "0.5", "2.27303", "0 %", "1", "0"]
    assert len(run("--stats", "-m", weights).splitlines()) == 1 + len(TENSORS) + 1
    entries = json.loads(run("layers.*", "--stats", "--json", "-m", weights))["tensors"]
    assert all("statistics" in entry and "values" not in entry for entry in entries)


# plots and files


@pytest.mark.parametrize("width", ["40", "200"])
def test_a_plot_is_a_histogram_and_a_heat_map_as_wide_as_the_terminal(
    run: Run, weights: Path, width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    histogram, heat = run("layers.0.weight", "--plot", "--no-header", "-m", weights, screen=True).split("\n\n")
    assert sum(int(re.split(r" {2,}", line.strip())[-2 if "█" in line else -1]) for line in histogram.splitlines()) == 1200
    assert max(map(len, histogram.splitlines())) <= int(width)
    rows = heat.splitlines()[:-1]
    assert {len(row) for row in rows} == {32}
    assert len(rows) == 24
    assert "█" in run("layers.0.bias", "--plot", "-m", weights)
    assert run("empty", "--plot", "--no-header", "-m", weights) == "nothing finite to plot\n"


def test_without_matplotlib_an_image_names_what_to_install(
    run: Run, weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("toyllm.cli.plot.find_spec", lambda name: None)
    with pytest.raises(ToyllmError, match=re.escape("pip install 'toyllm[plot]'")):
        run("layers.0.weight", "--plot", tmp_path / "x.png", "-m", weights)


def test_an_image_is_written_whole(run: Run, weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run("layers.*", "--plot", tmp_path / "x.png", "-m", weights)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ToyllmError, match="is there already"):
        run("scalar", "--plot", tmp_path / "x.png", "-m", weights)


def test_saving_prints_nothing_and_says_what_it_wrote(run: Run, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    assert run("layers.*", "experts.gate_up_proj", "--save", path, "-m", weights) == ""
    assert capsys.readouterr().err == f"wrote {path}: 4 tensors\n"
    found = load_file(path)
    np.testing.assert_array_equal(found["layers.0.bias"], TENSORS["layers.0.bias"], strict=True)
    assert found["experts.gate_up_proj"].shape == (2, 4, 96)
    with pytest.raises(ToyllmError, match="--force"):
        run("scalar", "--save", path, "-m", weights)
    run("scalar", "--save", path, "--force", "-m", weights)
    assert list(load_file(path)) == ["scalar"]


# activations


def test_an_activation_of_a_real_run(run: Run) -> None:
    model = toyllm.load("tales-gpt2")
    ids = model.tokenizer.encode("Once upon a time")
    entries = json.loads(run("logits", "--prompt", "Once upon a time", "--json", "--full"))["tensors"]
    np.testing.assert_array_equal(np.array(entries[0]["values"], np.float32), model.logits(ids))
    (entry,) = json.loads(run("blocks.2.attn.weights", "--prompt-ids", " ".join(map(str, ids)), "--json"))["tensors"]
    np.testing.assert_allclose(np.sum(entry["values"], -1), 1, rtol=1e-6)
    shown = run("blocks.*.norm_1", "--prompt", "Once upon a time", "--step", "2", "--stats").splitlines()
    assert [re.split(r" {2,}", line)[2] for line in shown[1:]] == ["[1, 256]"] * 6


def test_with_a_prompt_alone_activations_are_listed(run: Run) -> None:
    lines = run("--prompt", "Once upon a time").splitlines()
    assert lines[0].split() == ["name", "dtype", "shape", "bytes"]
    assert re.split(r" {2,}", lines[-1]) == ["logits", "F32", "[4, 4096]", "65,536"]
    assert len(lines) == 1 + 1 + 6 * 13 + 2


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layers.0.weigth",), r"no tensor 'layers\.0\.weigth'; did you mean layers\.0\.weight"),
        (("zzz*",), r"no tensor 'zzz\*'; `toyllm dump-tensor` without a name lists them"),
        (("blocks.0.attn.q",), r"blocks\.0\.attn\.q: an activation, which only a run has: give it a --prompt or --prompt-ids"),
        (("logits",), r"an activation, which only a run has"),
        (("(", "--regex"), r"--regex '\(': not a regular expression"),
        (("layers.0.weight", "--slice", "50"), r"'50' at axis 0 of layers\.0\.weight, length 40"),
        (("scalar", "--save", "x.txt"), r"ends in \.npy"),
    ],
)
def test_what_is_not_there_is_one_line(run: Run, weights: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ToyllmError, match=message):
        run(*arguments, "-m", weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("scalar", "--stats", "--plot"), "give one of them"),
        (("scalar", "--json", "--save", "x.npy"), "give one of them"),
        (("scalar", "--raw", "--plot"), "give one of them"),
        (("scalar", "--list", "--slice", "..."), "give one of them"),
        (("--plot",), "which tensors"),
        (("--save", "x.npz"), "which tensors"),
        (("scalar", "--step", "2"), "a step follows a prompt"),
        (("scalar", "--precision", "-1"), "range"),
        (("logits", "--prompt", "a", "--prompt-ids", "1"), "not both"),
    ],
)
def test_wrong_usage_is_told(run: Run, weights: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as error:
        run(*arguments, "-m", weights)
    assert message in error.value.format_message()


def test_a_weight_with_a_prompt_is_told(run: Run) -> None:
    with pytest.raises(ToyllmError, match=r"wte\.weight: a weight, not an activation of a run: leave out the prompt"):
        run("wte.weight", "--prompt", "Once")
    with pytest.raises(ToyllmError, match=r"no activation 'blocks\.0\.atn\.q'; did you mean blocks\.0\.attn\.q"):
        run("blocks.0.atn.q", "--prompt", "Once")


@pytest.mark.parametrize("arguments", [(), ("*",), ("*", "--stats"), ("*", "--plot"), ("*", "--raw"), ("*", "--slice", "0")])
def test_hostile_names_are_shown_harmlessly(run: Run, hostile: Path, arguments: tuple[str, ...]) -> None:
    shown = run(*arguments, "-m", hostile, screen=True)
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\u202e" not in shown
    assert "a\\nb" in shown
    assert "[/x]" in shown
    assert "\\x1b]52;c;aGk=\\x07" in shown


def test_a_hostile_name_can_be_asked_for(run: Run, hostile: Path) -> None:
    for name in HOSTILE:
        assert run(name, "--no-header", "-m", hostile) == "[[ 1.0000,  1.0000],\n [ 1.0000,  1.0000]]\n"


# how little it takes


def test_a_weight_needs_no_compiler_and_reads_only_what_it_shows(tmp_path: Path) -> None:
    """A sparse file of 8 GB: were it read, it would take seconds and show in memory."""
    shape, begin = [2_000_000_000], 4096
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0]]}}).encode().ljust(begin - 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(begin + 4 * shape[0])
        file.seek(begin + 4 * 1_999_999_999)
        file.write(np.float32(7).tobytes())
    code = f"""
import resource, sys
from typer.main import get_command
sys.path.insert(0, {str(Path(__file__).parent)!r})
from {Path(__file__).stem} import app
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
get_command(app)(["w", "-m", {str(tmp_path)!r}, "--slice", "-2:"], standalone_mode=False)
get_command(app)(["w", "-m", {str(tmp_path)!r}, "--no-header", "--edge-items", "1"], standalone_mode=False)
print("numba" in sys.modules, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | {"NO_COLOR": "1"})
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == ["[ 0.0000,  7.0000]", "[ 0.0000, ...,  7.0000]", "False True"]
