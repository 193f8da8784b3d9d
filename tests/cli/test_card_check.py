"""`toyllm card --check`: cards against the engine, shown as a table or as JSON, and a person's own card in place of one of ours."""

import json
from pathlib import Path

import pytest

from toyllm.cards.catalogue import READING

from .conftest import Run

LIBRARY = Path(__file__).parents[2] / "cards" / "library"
GPT2 = str(Path(__file__).parents[1] / "models" / "goldens" / "gpt2" / "n_inner")
GPT_OSS = str(Path(__file__).parents[1] / "models" / "goldens" / "gpt_oss" / "window_5")
SHORT = ("--prompt-ids", "1 2 3 4 5 6 7 8 9", "--start", "7")


def mine(folder: Path, name: str, old: str, new: str) -> str:
    """A file with a card of the library, changed."""
    text = (LIBRARY / f"{name}.card").read_text(encoding="utf-8")
    assert old in text
    path = folder / "mine.card"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return str(path)


def test_a_row_for_each_step_and_a_verdict(toyllm: Run) -> None:
    found = toyllm("card", "--check", "-m", GPT2, *SHORT)
    assert found.code == 0
    header, *rows, empty, verdict = found.out.splitlines()
    assert header.split() == ["run", "card", "step", "activation", "compared", "difference", "tolerance", "what", "it", "does"]
    q = next(row.split() for row in rows if "blocks.*.attn.q" in row)
    assert q[:5] == ["prefill", "gpt2.Attn", "2", "blocks.*.attn.q", "2"]
    assert q[6:11] == ["1e-04", "ok", "q,", "k,", "v"]
    assert float(q[5]) < 1e-5
    assert {row.split()[0] for row in rows} == {"prefill", "decode", "alone"}
    assert empty == ""
    assert verdict.startswith("agrees with the engine: ")
    assert found.err.startswith("9 cards ran on 9 tokens, 7 of them prefilled, in ")


@pytest.mark.parametrize(("model", "family"), [(GPT2, "gpt2"), (GPT_OSS, "gpt-oss")])
def test_json_has_the_whole_report(toyllm: Run, model: str, family: str) -> None:
    found = toyllm("card", "--check", "-m", model, *SHORT, "--rtol", "0.001", "--json")
    document = json.loads(found.out)
    assert document["schema"] == "toyllm.card/1"
    check = document["check"]
    assert check["ids"] == [*range(1, 10)]
    assert (check["start"], check["rtol"], check["holds"], check["first"], check["unstated"]) == (7, 0.001, True, None, [])
    assert set(check["ran"]) == READING[family].keys()
    keys = {"run", "card", "step", "text", "place", "activation", "compared", "difference", "worst", "tolerance", "holds"}
    assert all(row.keys() == keys and row["holds"] for row in check["rows"])
    assert toyllm("card", "--check", "-m", model, *SHORT, "--format", "json").out.startswith('{"schema": "toyllm.card/1"')


def test_a_named_card_narrows_it_to_what_concerns_it(toyllm: Run) -> None:
    rows = toyllm("card", "mxfp4", "--check", *SHORT, "-m", GPT_OSS).out.splitlines()
    assert [row.split()[:4] for row in rows[1:-2]] == [["alone", "MXFP4", "7", "mxfp4.dequantize"]]
    assert "gpt-oss.Attn" in toyllm("card", "attn", "--check", *SHORT, "-m", GPT_OSS).out
    assert "gpt2.Attn" in toyllm("card", "attn", "--check", *SHORT, "-m", GPT2).out


def test_a_card_of_ones_own_runs_in_place_of_ours(toyllm: Run, tmp_path: Path) -> None:
    same = mine(tmp_path, "gpt2.attn", "mask(A^h, causal(T, T))", "where(range(T)[:, new] ≥ range(T), A^h, -∞)")
    assert toyllm("card", "--check", same, "-m", GPT2, *SHORT).code == 0


def test_a_card_that_departs_ends_with_3_and_its_place(toyllm: Run, tmp_path: Path) -> None:
    file = mine(tmp_path, "gpt2.attn", "s · q[:, h]", "q[:, h]")
    found = toyllm("card", "--check", file, "-m", GPT2, *SHORT)
    assert found.code == 3
    assert f"departs first in prefill, at gpt2.Attn, step 5 ({file}:14), A^h ← mask(A^h, causal(T, T)): blocks.0.attn.scores: " in found.out
    assert "DEPARTS" in found.out
    first = json.loads(toyllm("card", "--check", file, "-m", GPT2, *SHORT, "--json").out)["check"]["first"]
    assert (first["card"], first["step"], first["activation"]) == ("gpt2.Attn", 5, "blocks.0.attn.scores")


def test_infinite_differences_are_json_too(toyllm: Run, tmp_path: Path) -> None:
    file = mine(tmp_path, "gpt2.attn", "causal(T, T)", "window(T, T, 2)")
    document = json.loads(toyllm("card", "--check", file, "-m", GPT2, *SHORT, "--json").out)
    assert document["check"]["first"]["difference"] == "Infinity"


@pytest.mark.parametrize(
    "chosen", [("--check", "--list"), ("--check", "--full"), ("--check", "--config", "x"), ("--check", "--input", "x=1")]
)
def test_a_check_is_not_shown_as_something_else(toyllm: Run, chosen: tuple[str, ...]) -> None:
    found = toyllm("card", *chosen)
    assert found.code == 2
    assert f"give --check or {chosen[1]}, not both" in found.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--start", "3"), "--start is for a check: give --check too"),
        (("--prompt-ids", "3"), "--prompt-ids is for a check"),
        (("--check", "--rtol", "nan"), "--rtol nan: expected a number from 0"),
        (("--check", "--format", "latex"), "--format latex: a check is shown as text or json"),
    ],
)
def test_wrong_usage(toyllm: Run, arguments: tuple[str, ...], message: str) -> None:
    found = toyllm("card", *arguments)
    assert found.code == 2
    assert message in found.error


def test_what_cannot_be_checked_is_one_line(toyllm: Run, tmp_path: Path) -> None:
    assert "not a card of" in toyllm("card", "--check", "gpt-oss.attn", "-m", GPT2, *SHORT).error
    other = mine(tmp_path, "gpt2.attn", "gpt2.Attn(", "my.Attn(")
    assert "my.Attn: no card of ours has this name" in toyllm("card", "--check", other, "-m", GPT2).error
    assert "--start 10: expected 1 to 9" in toyllm("card", "--check", "-m", GPT2, *SHORT[:3], "10").error
    assert "--prompt-ids" in toyllm("card", "--check", "-m", GPT2, "--prompt", "Once").error


def test_a_wrong_shape_is_told_before_anything_runs(toyllm: Run, tmp_path: Path) -> None:
    file = mine(tmp_path, "gpt2.ffn", "h · W_2 + b_2", "h · W_2^⊤ + b_2")
    found = toyllm("card", "--check", file, "-m", "nowhere")
    assert found.code == 1
    assert f"{file}:14:" in found.err
