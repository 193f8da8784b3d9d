"""`toyllm card`: which card is meant, filled from which model, and how it is shown; and cards that a person writes."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from toyllm.cards.catalogue import READING, WHAT
from toyllm.cards.cost import filled_cards
from toyllm.cards.text import RULE, parse_all
from toyllm.models.location import ModelFiles
from toyllm.models.params import anatomy

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "cards" / "configs"
GOLDENS = HERE.parent / "cards" / "goldens"
hollow = runpy.run_path(str(HERE.parent / "hollow.py"))

MINE = """\
Algorithm: my.Soft(x)
Input: x in R^n
Output: y in R^n
       m in R
# ASCII, and no numbers
m <- max(x)
y <- Exp(x - m) / sum(Exp(x - m))
return y, m

Algorithm: my.Exp(x)
Input: x in R^n
Output: y in R^n
return exp(x)
"""
CANONICAL = f"""\
Algorithm: my.Soft(x)
  Input:    x ∈ R^n
  Output:   y ∈ R^n
            m ∈ R
   1: m ← max(x)
   2: y ← Exp(x - m) / sum(Exp(x - m))
   3: return y, m

{RULE}

Algorithm: my.Exp(x)
  Input:    x ∈ R^n
  Output:   y ∈ R^n
   1: return exp(x)
"""


def config(name: str) -> str:
    return str(CONFIGS / f"{name}.json")


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "my.card"
    path.write_text(MINE, encoding="utf-8")
    return str(path)


# ---- the library ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["distilgpt2", "gpt2", "gpt-oss-20b", "gpt-oss-120b"])
def test_every_card_at_the_shapes_of_published_models(name: str, toyllm) -> None:
    shown = toyllm("card", "--full", "--config", config(name))
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == (GOLDENS / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["gpt2", "gpt-oss-20b"])
def test_what_is_shown_in_full_is_read_back_as_the_cards(name: str, toyllm) -> None:
    family = "gpt2" if name == "gpt2" else "gpt-oss"
    cards = parse_all(toyllm("card", "--full", "--config", config(name)).out)
    assert [card.name for card in cards] == list(READING[family])
    path = CONFIGS / f"{name}.json"
    filled = filled_cards(anatomy(ModelFiles(name, CONFIGS, None, None, path, None, None, None, None))).cards
    assert cards == tuple(filled[card.name] for card in cards)


def test_the_anchors_layout_to_the_column(toyllm) -> None:
    lines = toyllm("card", "--config", config("distilgpt2")).out.splitlines()
    assert lines[0] == "Algorithm: gpt2(x)      [GPT-2 family]"
    assert "            (total 81.91M, embeddings tied: z = e · W_e^⊤)" in lines
    steps = [line for line in lines if re.match(r" *\d+: ", line)]
    assert steps
    assert all(
        "   " in line[6:] and line.find("∈", 70) in (72, 75) for line in steps if "←" in line and "for" not in line and len(line) > 70
    )
    assert (
        lines[-1]
        == "# 81,912,576 parameters; a token at position 1,023: 181,003,776 FLOPs, 324,507,648 bytes of weights, 37,748,736 of cache"
    )


def test_in_full_the_sums_of_the_cards_are_those_of_params(toyllm) -> None:
    text = toyllm("card", "--full", "--config", config("gpt-oss-20b")).out
    said = json.loads(toyllm("params", "--json", "--config", config("gpt-oss-20b")).out)
    rows = [line.split() for line in text[text.index("─── a token at position") :].splitlines() if line.startswith("# ")][1:]
    *parts, total = [[int(cell.replace(",", "")) for cell in row[-4:]] for row in rows]
    assert [sum(column) for column in zip(*parts, strict=True)] == total
    token = said["token"]
    assert total == [said["parameters"], token["flops"], token["weight_bytes"], token["cache_bytes"]]


def test_without_a_name_the_card_of_the_model(toyllm) -> None:
    assert toyllm("card").out.startswith("Algorithm: gpt2(x)")
    assert "  Hyper:    V=4096 P=512 D=256 L=6 H=4" in toyllm("card").out
    assert toyllm("card", "-m", "tales-gpt-oss").out.startswith("Algorithm: gpt-oss(x)")


def test_a_card_of_the_other_family_is_filled_from_its_embedded_model(toyllm) -> None:
    assert "  Hyper:    D=256 E=8 k=2\n" in toyllm("card", "gpt-oss.router").out
    refused = toyllm("card", "gpt2.block", "-m", "tales-gpt-oss").error
    assert refused == "gpt2.block: a card of gpt2, but tales-gpt-oss is a gpt-oss; name a model of gpt2, or none"
    assert toyllm("card", "-m", "tales-gpt-oss", "block").out.startswith("Algorithm: gpt-oss.Block(")
    assert toyllm("card", "-m", "tales-gpt-oss", "mxfp4").out.startswith("Algorithm: MXFP4(")


def test_a_model_by_the_headers_of_its_files(tmp_path: Path, toyllm) -> None:
    hollow["write"](tmp_path, hollow["GPT2"], hollow["gpt2"](dtype="BF16"))
    assert toyllm("card", "-m", str(tmp_path)).out.splitlines()[-1] == (
        "# 4,488 parameters; a token at position 7: 8,880 FLOPs, 8,808 bytes of weights, 1,536 of cache"
    )


def test_a_part_in_full_has_what_it_calls(toyllm) -> None:
    text = toyllm("card", "gpt2.block", "--full").out
    assert [line for line in text.splitlines() if line.startswith(("Algorithm", "───"))] == [
        "Algorithm: gpt2.Block(e; θ, s)      [GPT-2 family]",
        RULE,
        "Algorithm: gpt2.LN(x; γ, β, ε)      [GPT-2 family]",
        "Algorithm: gpt2.Attn(x; θ, s)      [GPT-2 family]",
        "Algorithm: gpt2.FFN(x; θ)      [GPT-2 family]",
    ]


def test_the_list(toyllm) -> None:
    header, *rows = toyllm("card", "--list").out.splitlines()
    assert header.split() == ["card", "what", "it", "is"]
    assert [row.split("  ")[0] for row in rows] == list(WHAT)


def test_an_unknown_name_is_told_with_those_near_it(toyllm) -> None:
    assert toyllm("card", "rooter").error == "rooter: no card of this name; did you mean gpt-oss.Router?"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "html"), "--format html: expected text"),
        (("--config", config("gpt2"), "-m", "tales-gpt2"), "give --model or --config, not both"),
        (("--group", "blocks.0"), "--group is for a run: give --input too"),
        (("gpt2", "--input", "x"), "--input x: expected NAME=VALUE"),
        (("gpt2", "--input", "x=[[1],[2,3]]"), "expected a JSON number, a list of them"),
        (("gpt2", "--input", 'x="a"'), "expected a JSON number, a list of them"),
    ],
)
def test_wrong_usage_is_told(arguments: tuple[str, ...], said: str, toyllm) -> None:
    refused = toyllm("card", *arguments)
    assert refused.code == 2
    assert said in refused.error


def test_colours_on_a_terminal_only(on_terminal, toyllm, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, coloured = toyllm("card", "--full").out, on_terminal("card", "--full").out
    assert "\x1b" not in plain
    assert "\x1b[36m  Hyper:\x1b[0m" in coloured
    assert "\x1b[35mfor\x1b[0m ℓ ← 0, …, L-1 \x1b[35mdo\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_terminal("card", "--full").out == plain


def test_full_width_off_a_terminal_and_whatever_the_columns(toyllm, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = toyllm("card", "--full").out
    monkeypatch.setenv("COLUMNS", "30")
    assert toyllm("card", "--full").out == wide


def test_a_reader_that_has_enough_ends_it_quietly(process) -> None:
    child = process("card", "--full")
    child.stdout.readline()
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 0)


def test_no_weight_is_read_and_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\n"
        "from toyllm.cli.main import run\n"
        "from toyllm.models.checkpoint import Checkpoint\n"
        "Checkpoint.array = None\n"
        "assert run(['card', '--full']) == run(['card', '-m', 'tales-gpt-oss', '--full']) == run(['card', '--list']) == 0\n"
        "heavy = {'numba', 'llvmlite', 'lark', 'torch', 'tokenizers', 'rich', 'huggingface_hub'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr == "[]\n"


# ---- a person's own ---------------------------------------------------------------------------------------------------------


def test_a_file_is_shown_in_the_canonical_form(mine: str, toyllm) -> None:
    shown = toyllm("card", mine)
    assert (shown.code, shown.out, shown.err) == (0, CANONICAL, "")
    Path(mine).write_text(shown.out, encoding="utf-8")
    assert toyllm("card", mine).out == CANONICAL


def test_a_file_that_calls_the_library_is_shown_with_it_in_full(tmp_path: Path, toyllm) -> None:
    path = tmp_path / "norm.card"
    path.write_text("Algorithm: my.Norm(x; γ, ε)\nInput: x ∈ R^{T×D}\nHyper: D ε\nParam: γ ∈ R^D\nreturn gpt-oss.RMSNorm(x; γ, ε)\n")
    assert "gpt-oss.RMSNorm" not in toyllm("card", str(path)).out.replace("return gpt-oss.RMSNorm", "")
    full = toyllm("card", str(path), "--full").out
    assert [line.split("(")[0] for line in full.splitlines() if line.startswith("Algorithm")] == [
        "Algorithm: my.Norm",
        "Algorithm: gpt-oss.RMSNorm",
    ]
    assert "  Hyper:    D=256 ε\n" in toyllm("card", str(path), "-m", "tales-gpt-oss").out


def test_an_error_points_at_line_and_column(mine: str, toyllm) -> None:
    Path(mine).write_text(MINE.replace("sum(Exp", "sun(Exp"))
    refused = toyllm("card", mine)
    assert (refused.code, refused.out) == (1, "")
    first, source, caret = refused.err.splitlines()
    assert first.startswith(f"error: {mine}:7:19: ")
    assert source == "  7 | y <- Exp(x - m) / sun(Exp(x - m))"
    assert caret == "    |                   ^"


def test_every_error_of_a_file_is_told(mine: str, toyllm) -> None:
    Path(mine).write_text(MINE.replace("max(x)", "max(w)").replace("return exp(x)", "return exp(v)"))
    refused = toyllm("card", mine)
    assert refused.code == 1
    places = [line.split(mine)[1].split(": ")[0] for line in refused.err.splitlines() if line.startswith("error: ")]
    assert places == [":6:10", ":13:12"]
    assert refused.err.count("^") == 2


@pytest.mark.parametrize("text", ["", "hello", "Algorithm: F(x\n", "Algorithm: F(x)\nInput: x ∈ R\n"])
def test_what_is_no_card_is_told(text: str, tmp_path: Path, toyllm) -> None:
    path = tmp_path / "no.card"
    path.write_text(text)
    refused = toyllm("card", str(path))
    assert refused.code == 1
    assert refused.err.startswith(f"error: {path}")


def test_files_that_cannot_be_read_are_told(tmp_path: Path, toyllm) -> None:
    assert toyllm("card", str(tmp_path / "no.card")).error == f"{tmp_path}/no.card: cannot be read (No such file or directory)"
    (tmp_path / "bytes.card").write_bytes(b"Algorithm: \xff")
    assert "not UTF-8 text (invalid start byte at byte 11)" in toyllm("card", str(tmp_path / "bytes.card")).error


def test_signs_that_would_steer_a_terminal_are_escaped(tmp_path: Path, toyllm) -> None:
    path = tmp_path / "bad.card"
    path.write_text("Algorithm: F(x)   [a \x1b[31mfamily]\nInput: x ∈ R\nreturn x + \x1b]0;y\x07\n")
    assert "\x1b" not in toyllm("card", str(path)).err
    path.write_text("Algorithm: F(x)   [a \x1b[31mfamily]\nInput: x ∈ R   (\x07)\nreturn x   ▷ \x1b[2J\n")
    assert r"[a \x1b[31mfamily]" in toyllm("card", str(path)).out


# ---- runs -------------------------------------------------------------------------------------------------------------------


def test_a_card_runs_on_inputs(mine: str, toyllm) -> None:
    assert toyllm("card", mine, "--input", "x=[0, 0]").out == (
        "y  F64 [2], 16 bytes; min 0.5 max 0.5 mean 0.5 std 0 zeros 0 % NaN 0 Inf 0\n[ 0.5000,  0.5000]\n"
        "\nm  F64 [], 8 bytes; min 0 max 0 mean 0 std 0 zeros 100 % NaN 0 Inf 0\n0.0000\n"
    )


def test_a_librarys_card_runs_on_the_weights_of_its_model(tmp_path: Path, toyllm) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, 256)))
    for name, where in (("gpt2.ffn", "blocks.3"), ("gpt-oss.moe", "blocks.1")):
        ran = toyllm("card", name, "--group", where, "--input", f"x={tmp_path}/x.npy")
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith("y  F64 [1, 256], 2,048 bytes; ")


def test_inputs_that_do_not_fit_are_refused(mine: str, tmp_path: Path, toyllm) -> None:
    assert "expected the inputs x, found y" in toyllm("card", mine, "--input", "y=[1]").err
    assert toyllm("card", mine, "--input", f"x={tmp_path}/x.npy").error == f"{tmp_path}/x.npy: cannot be read (No such file or directory)"
    (tmp_path / "x.npy").write_bytes(b"no array")
    assert "x.npy: not an array of numbers in NumPy's format" in toyllm("card", mine, "--input", f"x={tmp_path}/x.npy").error


def test_parameters_need_a_model_with_weights(tmp_path: Path, toyllm) -> None:
    path = tmp_path / "p.card"
    path.write_text("Algorithm: F(x)\nInput: x ∈ R^n\nHyper: D=256\nParam: b ∈ R^D   [blocks.0.down.bias]\nreturn sum(x) + b\n")
    missing = "blocks.0.down.bias: a parameter, which only a model with weights has; name one with -m"
    assert missing in toyllm("card", str(path), "--input", "x=[1]").err
    assert missing in toyllm("card", str(path), "--config", config("gpt2"), "--input", "x=[1]").err
    assert toyllm("card", str(path), "-m", "tales-gpt2", "--input", "x=[1]").out.startswith("result 0  F64 [256]")
