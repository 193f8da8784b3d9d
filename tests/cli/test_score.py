"""`toyllm score`: colours, rows, figures and the JSON document, texts from everywhere, another run beside it, and every refusal."""

import importlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toyllm as package
from toyllm.cli import output
from toyllm.models import score as scoring
from toyllm.models.location import EMBEDDED
from toyllm.models.model import Model

surprise = importlib.import_module("toyllm.cli.surprise")
TALES = EMBEDDED / "tales-gpt2"
BASELINE = str(Path(__file__).parents[1] / "models" / "goldens" / "gpt2" / "baseline")  # no tokenizer, 64 positions
FOX = "The fox and the crow.\n"
ODD = "Naïve 狐\t🦊 \x1b[31m\u202e<|endoftext|>a\n\nb"


@pytest.fixture
def story(tmp_path: Path) -> Callable[..., str]:
    """A file with this text."""

    def story(content: str | bytes) -> str:
        path = tmp_path / "story.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return story


@pytest.fixture
def document(toyllm: Any) -> Callable[..., Any]:
    """Run score with --json, which must succeed without a word on stderr."""

    def document(*arguments: str, **options: Any) -> Any:
        code, out, err = toyllm("score", *arguments, "--json", **options)
        assert (code, err) == (0, "")
        assert out.endswith("}\n")
        assert out.count("\n") == 1
        return json.loads(out, parse_constant=lambda constant: pytest.fail(constant))

    return document


def table(out: str) -> list[dict[str, str]]:
    """The rows of a tab-separated table by its header."""
    header, *lines = [line.split("\t") for line in out.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def figures(text: str) -> dict[str, str]:
    """The named figures that follow the notes."""
    return dict(re.findall(r"^([^:\n]+): +(.+)$", text, re.MULTILINE))


# rows and figures


def test_off_a_terminal_stdout_has_a_row_a_token_and_stderr_what_they_come_to(toyllm: Any, story: Any, document: Any) -> None:
    code, out, err = toyllm("score", story(FOX))
    assert code == 0
    found = document(story(FOX))
    rows = table(out)
    assert list(rows[0]) == ["number", "id", "piece", "logprob", "rank", "entropy"]
    assert rows[0] == {"number": "0", "id": "343", "piece": "'The'", "logprob": "", "rank": "", "entropy": ""}
    for number, (row, token) in enumerate(zip(rows, found["tokens"], strict=True)):
        assert (row["number"], row["id"], row["piece"]) == (str(number), str(token["id"]), repr(token["text"]))
        if number:
            assert float(row["logprob"]) == pytest.approx(token["logprob"], abs=1e-6)
            assert int(row["rank"]) == token["rank"]
            assert float(row["entropy"]) == pytest.approx(token["entropy"], abs=1e-4)
    said = figures(err)
    assert said["tokens"] == f"{len(rows)}, {len(rows) - 1} of them scored"
    assert said["windows"] == "1"
    assert said["perplexity"] == f"{found['perplexity']:.4f}"
    assert said["nats a token"] == f"{found['nats_per_token']:.4f}"
    assert said["bits a byte"] == f"{found['bits_per_byte']:.4f}, over {len(FOX) - 3} bytes"
    assert "\x1b" not in out + err


def test_the_document_has_exactly_these_keys(document: Any, story: Any) -> None:
    found = document(story(FOX), "--top", "2")
    names = ["perplexity", "nats_per_token", "entropy", "top_1", "bytes", "characters", "bits_per_byte", "bits_per_character"]
    assert list(found) == ["schema", "usage", *names, "timings", "settings", "tokens"]
    assert found["schema"] == "toyllm.score/1"
    assert found["usage"] == {"tokens": len(found["tokens"]), "scored": len(found["tokens"]) - 1, "windows": 1}
    assert list(found["timings"]) == ["load_s", "score_s", "tok_s"]
    assert all(value > 0 for value in found["timings"].values())
    assert {"model": "tales-gpt2", "context": 512, "stride": 256}.items() <= found["settings"].items()
    first, *rest = found["tokens"]
    assert first == {"id": 343, "text": "The", "logprob": None, "rank": None, "entropy": None, "top_logprobs": []}
    for token in rest:
        assert list(token) == ["id", "text", "logprob", "rank", "entropy", "top_logprobs"]
        assert [list(top) for top in token["top_logprobs"]] == [["id", "text", "logprob"]] * 2
        place = [top["id"] for top in token["top_logprobs"]].index(token["id"]) + 1 if token["rank"] <= 2 else token["rank"]
        assert token["rank"] == place
    nats = -sum(token["logprob"] for token in rest) / len(rest)
    assert found["perplexity"] == pytest.approx(math.exp(nats))
    assert found["bits_per_character"] == pytest.approx(nats * len(rest) / math.log(2) / (len(FOX) - 3))


def test_a_summary_is_the_figures_on_stdout(toyllm: Any, story: Any, document: Any) -> None:
    code, out, err = toyllm("score", story(FOX), "--summary")
    assert (code, err) == (0, "")
    names = ["tokens", "windows", "perplexity", "nats a token", "entropy", "top-1 accuracy", "bits a byte", "bits a character"]
    assert list(figures(out)) == names
    assert "tokens" not in document(story(FOX), "--summary")


def test_alternatives_stand_beside_each_token(toyllm: Any, story: Any, document: Any) -> None:
    rows = table(toyllm("score", story(FOX), "--top", "2").out)
    tokens = document(story(FOX), "--top", "2")["tokens"]
    assert [rows[0][name] for name in ("top_1", "logprob_1", "top_2", "logprob_2")] == [""] * 4
    for row, token in zip(rows[1:], tokens[1:], strict=True):
        for n, top in enumerate(token["top_logprobs"], 1):
            assert row[f"top_{n}"] == repr(top["text"])
            assert float(row[f"logprob_{n}"]) == pytest.approx(top["logprob"], abs=1e-6)


def test_windows_slide_as_asked_and_as_said(toyllm: Any, story: Any, document: Any) -> None:
    text = FOX * 20
    code, out, err = toyllm("score", story(text), "--context", "32", "--stride", "8")
    found = document(story(text), "--context", "32", "--stride", "8")
    T = found["usage"]["tokens"]
    windows = math.ceil((T - 32) / 8) + 1
    assert code == 0
    assert figures(err)["windows"] == f"{windows} of up to 32 tokens, one every 8"
    assert found["usage"] == {"tokens": T, "scored": T - 1, "windows": windows}
    model = package.load("tales-gpt2")
    ids = [token["id"] for token in found["tokens"]]
    for begin, tokens in [(0, range(1, 32)), (8, range(32, 40)), (16, range(40, 48))]:
        logits = model.logits(ids[begin : begin + 32]).astype(float)
        for i in tokens:
            before = logits[i - begin - 1]
            assert found["tokens"][i]["logprob"] == pytest.approx(before[ids[i]] - math.log(sum(map(math.exp, before))), abs=1e-6)
    disjoint = document(story(text), "--context", "32", "--stride", "32")["tokens"]
    assert [i for i, token in enumerate(disjoint) if token["logprob"] is None] == list(range(0, T, 32))
    assert len(table(out)) == T


def test_stats_tell_times_and_memory(toyllm: Any, story: Any) -> None:
    _, _, err = toyllm("score", story(FOX * 20), "--stats", "-m", "tales-gpt-oss", "--against-options", "--moe budget")
    said = figures(err)
    assert {"total duration", "load duration", "score duration", "score rate", "mixture of experts"} <= said.keys()
    assert (said["mixture of experts"], said["other's mixture of experts"]) == ("grouped", "budget")
    assert int(said["other's dropped pairs"]) > 0
    assert len(re.findall(r"^total +[\d,]+", err, re.MULTILINE)) == 2


# on a terminal


def test_a_terminal_shows_the_text_in_the_colours_of_its_surprise(on_terminal: Any, story: Any, document: Any) -> None:
    tokens = document(story(ODD))["tokens"]
    code, out, err = on_terminal("score", story(ODD))
    assert code == 0
    legend, blank, *_ = out.split("\n")
    assert blank == ""
    assert re.sub(r"\x1b\[[\d;]*m", "", legend) == "surprise in bits:  0-2  2-4  4-6  6-8  8-10  10+   unscored"
    body = out.removeprefix(f"{legend}\n\n")
    plain = re.sub(r"\x1b\[[\d;]*m", "", body)
    assert plain == "Naïve 狐⇥\t🦊 \\x1b[31m\\u202e<|endoftext|>a↵\n↵\nb\n\n"
    assert body.startswith("\x1b[2mN\x1b[0m")
    assert not re.search(r"\x1b\[[\d;]+[1-9]m[^\x1b]*\n", body), "no colour runs over the end of a line"
    assert "perplexity:" in err
    bits = -tokens[1]["logprob"] / math.log(2)
    assert surprise.painted("a", bits) + surprise.painted("ï", -(tokens[2]["logprob"] + tokens[3]["logprob"]) / math.log(2)) in body


@pytest.mark.parametrize(("bits", "level"), [(0, 0), (1.99, 0), (2, 1), (9.9, 4), (10, 5), (500, 5), (-1e-17, 0)])
def test_a_colour_stands_for_two_bits(bits: float, level: int) -> None:
    look = surprise.STYLES[level]
    assert surprise.painted("x", bits) == (f"\x1b[{look}mx\x1b[0m" if look else "x")


def test_without_colours_a_terminal_shows_rows_in_columns(on_terminal: Any, story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = story("狐 fox\n")
    coloured = on_terminal("score", path, "--top", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, err = on_terminal("score", path)
    assert code == 0
    assert "\x1b" not in out + err
    assert "\t" not in out
    header, *lines = out.splitlines()
    assert header.split() == ["number", "id", "piece", "logprob", "rank", "entropy"]
    assert {output.display_width(line) for line in lines[1:]} <= {len(header)}
    assert lines[-1].split()[:3] == [str(len(lines) - 1), "199", "'\\n'"]
    assert [row.split()[:5] for row in coloured.out.splitlines()[1:]] == [line.split()[:5] for line in lines]


def test_a_bar_runs_where_no_text_does(on_terminal: Any, story: Any) -> None:
    assert "scoring with tales-gpt2" in on_terminal("score", story(FOX), "--summary").err
    assert "scoring" not in on_terminal("score", story(FOX)).err


def test_without_a_tokenizer_the_ids_are_the_text(on_terminal: Any, toyllm: Any, document: Any) -> None:
    arguments = ("-m", BASELINE, "--prompt-ids", "1 2 3")
    code, out, err = toyllm("score", *arguments)
    assert [row["piece"] for row in table(out)] == ["", "", ""]
    assert (figures(err)["bits a byte"], code) == ("-", 0)
    found = document(*arguments)
    assert (found["bytes"], found["bits_per_byte"], found["tokens"][1]["text"]) == (None, None, None)
    assert re.sub(r"\x1b\[[\d;]*m", "", on_terminal("score", *arguments).out).endswith("\n\n1 2 3 \n\n")


def test_a_character_in_parts_at_the_end_is_shown_as_what_there_is(on_terminal: Any) -> None:
    model = package.load("tales-gpt2")
    ids = model.tokenizer.encode("狐")[:-1]
    out = on_terminal("score", "--prompt-ids", " ".join(map(str, [33, *ids]))).out
    assert re.sub(r"\x1b\[[\d;]*m", "", out).endswith("A\ufffd\n\n")


# texts


def test_a_file_and_a_pipe_are_the_same_text_as_it_is(document: Any, story: Any) -> None:
    of_file = document(story(ODD + "\n"))["tokens"]
    ids = package.load("tales-gpt2").tokenizer.encode(ODD + "\n")
    assert [token["id"] for token in of_file] == ids
    for arguments in ((), ("-",)):
        assert document(*arguments, stdin=(ODD + "\n").encode())["tokens"] == of_file
    assert document("--prompt-ids", " ".join(map(str, ids)))["tokens"] == of_file
    assert document("--prompt", ODD + "\n")["tokens"] == of_file


def test_special_tokens_in_a_text_are_tokens_unless_told_otherwise(document: Any, story: Any) -> None:
    assert [token["id"] for token in document(story("a<|endoftext|>"))["tokens"]][1:] == [0]
    assert len(document(story("a<|endoftext|>"), "--no-special")["tokens"]) > 2


def test_a_beginning_of_text_makes_the_first_token_scored(document: Any, story: Any) -> None:
    plain, begun = document(story("A fox")), document(story("A fox"), "--bos")
    assert [token["id"] for token in begun["tokens"]] == [0] + [token["id"] for token in plain["tokens"]]
    assert begun["tokens"][0]["logprob"] is None
    assert begun["tokens"][1]["logprob"] < 0
    assert (begun["bytes"], plain["bytes"]) == (5, 4)


def test_line_ends_and_a_byte_order_mark_are_told(toyllm: Any, story: Any) -> None:
    code, out, err = toyllm("score", story(b"\xef\xbb\xbfA\r\nB\r\n"))
    assert code == 0
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert [re.sub(r".*story.txt: ", "", note) for note in notes] == [
        "the byte order mark at its beginning is not scored",
        "2 lines end in CRLF, which is scored as it is",
    ]
    assert [row["piece"] for row in table(out)] == ["'A'", "'\\r'", "'\\n'", "'B'", "'\\r'", "'\\n'"]


@pytest.mark.parametrize("stdin", [b"", b"\xef\xbb\xbf"])
def test_an_empty_text_is_refused(toyllm: Any, stdin: bytes) -> None:
    code, out, err = toyllm("score", stdin=stdin)
    assert (code, out) == (1, "")
    assert err.endswith("error: the text is empty: there is nothing to score\n")


def test_one_token_is_shown_without_a_score(toyllm: Any, on_terminal: Any, story: Any) -> None:
    code, out, err = toyllm("score", story("A"))
    assert (code, table(out)[0]["logprob"], figures(err)["perplexity"]) == (0, "", "-")
    assert err.startswith("note: no token has another before it, so none is scored; --bos puts one there\n")
    found = json.loads(toyllm("score", story("A"), "--json", "--against", "tales-gpt-oss").out)
    assert (found["perplexity"], list(found["against"])) == (None, ["settings"])
    assert on_terminal("score", story("A")).out.endswith("\x1b[2mA\x1b[0m\n\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ab\xffc", "byte 2 (0xff): expected UTF-8 (invalid start byte); convert the text first"),
        ("fox".encode("utf-16"), "byte 0 (0xff): expected UTF-8 (invalid start byte); convert the text first"),
    ],
)
def test_a_text_that_is_not_utf8_is_an_error_that_says_where(toyllm: Any, story: Any, content: bytes, message: str) -> None:
    path = story(content)
    outcome = toyllm("score", path)
    assert (outcome.code, outcome.error) == (1, f"{path}: {message}")
    assert toyllm("score", "-", stdin=content).error == f"stdin: {message}"


def test_what_is_no_file_is_an_error_with_the_other_ways(toyllm: Any, tmp_path: Path) -> None:
    for name, reason in (("Once upon a time", "No such file or directory"), (str(tmp_path), "Is a directory")):
        outcome = toyllm("score", name)
        assert outcome.code == 1
        assert outcome.error == f"{name}: cannot be read ({reason}); expected a text file; - is stdin, --prompt takes a text itself"


def test_nothing_to_score_and_too_much_are_wrong_usage(toyllm: Any, story: Any) -> None:
    outcome = toyllm("score", stdin=None)
    assert (outcome.code, "try: toyllm score story.txt" in outcome.error) == (2, True)
    for extra in (("--prompt", "a"), ("--prompt-ids", "1")):
        outcome = toyllm("score", story(FOX), *extra)
        assert (outcome.code, "give one of them" in outcome.error) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--context", "1"), "--context 1: expected 2 to 512"),
        (("--context", "513"), "--context 513: expected 2 to 512"),
        (("--stride", "0"), "--stride 0: expected 1 to 512"),
        (("--context", "8", "--stride", "9"), "--stride 9: expected 1 to 8, the context"),
        (("--prefill-chunk", "0"), "--prefill-chunk 0: expected at least 1"),
        (("--cache-dtype", "f8"), "--cache-dtype f8: expected f32 or bf16"),
        (("--threads", "0"), "--threads 0: expected 1 to "),
        (("-m", BASELINE), "no tokenizer beside the weights; give ids with --prompt-ids"),
        (("-m", BASELINE, "--against", "tales-gpt2"), "no tokenizer beside the weights"),
    ],
)
def test_what_does_not_fit_is_one_line(toyllm: Any, story: Any, arguments: tuple[str, ...], message: str) -> None:
    outcome = toyllm("score", story(FOX), *arguments)
    assert outcome.code == 1
    assert message in outcome.error


def test_a_window_that_does_not_fit_in_memory_is_refused_with_the_plan(toyllm: Any, story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from toyllm.models import model

    monkeypatch.setattr(model, "available_memory", lambda: model.RESERVE + 15 * 10**6)
    code, out, err = toyllm("score", story(FOX * 100))
    assert (code, out) == (1, "")
    assert "cache failed" in err
    assert err.splitlines()[-1].startswith("error: --context 512: the KV cache takes 0.01 GB")
    assert toyllm("score", story(FOX)).code == 0, "a short text needs no cache of the model's context"


def test_broken_logits_are_an_error(toyllm: Any, story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Model.forward

    def broken(*arguments: Any, **options: Any) -> Any:
        logits = forward(*arguments, **options)
        logits[-1, 7] = math.nan
        return logits

    monkeypatch.setattr(Model, "forward", broken)
    assert "hold NaN or infinity; are the weights damaged?" in toyllm("score", story(FOX)).err


# another run


def test_against_itself_nothing_departs(toyllm: Any, story: Any, document: Any) -> None:
    for arguments in (("--against", "tales-gpt2"), ("--against-options", ""), ("--against-options", "--prefill-chunk 3 --threads 1")):
        found = document(story(FOX * 9), *arguments)
        other = found["against"]
        kl = [other[f"kl_{name}"] for name in ("mean", "p50", "p90", "p99", "max")]
        assert (kl, other["perplexity_difference"], other["top_1_agreement"]) == ([0] * 5, 0, 1)
        assert other["perplexity"] == found["perplexity"]
        assert all((token["kl"], token["against_logprob"]) == (0, token["logprob"]) for token in found["tokens"][1:])


def test_another_model_is_compared_token_by_token(toyllm: Any, story: Any, document: Any) -> None:
    code, out, err = toyllm("score", story(FOX), "--against", "tales-gpt-oss")
    assert code == 0
    found, alone = document(story(FOX), "--against", "tales-gpt-oss"), document(story(FOX), "-m", "tales-gpt-oss")
    other = found["against"]
    assert list(other) == [
        "perplexity",
        "nats_per_token",
        "perplexity_difference",
        *(f"kl_{name}" for name in ("mean", "p50", "p90", "p99", "max", "max_at")),
        "top_1_agreement",
        "settings",
    ]
    assert other["settings"]["model"] == "tales-gpt-oss"
    assert other["perplexity"] == pytest.approx(alone["perplexity"])
    assert [token["against_logprob"] for token in found["tokens"]] == [token["logprob"] for token in alone["tokens"]]
    kl = [token["kl"] for token in found["tokens"][1:]]
    assert other["kl_mean"] == pytest.approx(sum(kl) / len(kl))
    assert (other["kl_max"], other["kl_max_at"]) == (max(kl), kl.index(max(kl)) + 1)
    rows = table(out)
    assert list(rows[0])[-2:] == ["against_logprob", "kl"]
    assert [float(row["kl"]) for row in rows[1:]] == pytest.approx(kl, rel=1e-3)
    said = figures(err)
    assert said["other's perplexity"] == f"{other['perplexity']:.4f} ({other['perplexity_difference']:+.4g})"
    assert said["KL(P||Q)"].startswith(f"mean {other['kl_mean']:.4g} nats a token; 50 % ")
    assert said["top-1 agreement"] == f"{100 * other['top_1_agreement']:.2f} % of tokens"


def test_other_options_stand_in_place_of_this_runs(document: Any, story: Any) -> None:
    this = ("-m", "tales-gpt-oss", "--moe", "all", "--prefill-chunk", "9")
    same = document(story(FOX), *this, "--against", "tales-gpt-oss")["against"]["settings"]
    assert (same["moe"], same["prefill_chunk"]) == ("all", 9)
    found = document(story(FOX), *this, "--against-options", "--cache-dtype bf16")
    settings = found["against"]["settings"]
    assert (settings["model"], settings["moe"], settings["prefill_chunk"], settings["cache_dtype"]) == (
        "tales-gpt-oss",
        "auto",
        512,
        "bf16",
    )
    assert 0 < found["against"]["kl_mean"] < 0.01
    assert (found["settings"]["moe"], found["settings"]["cache_dtype"]) == ("all", "f32")


def test_other_options_are_read_as_a_command_lines_are(toyllm: Any, document: Any, story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, message in [
        ("--no-such", "No such option: --no-such"),
        ("--help", "No such option: --help"),
        ("--context 9", "No such option: --context"),
        ("--threads x", "'x' is not a valid int"),
        ("--threads", "requires an argument"),
        ("bf16", "unexpected extra argument(s) (bf16)"),
        ("--exact '", "No closing quotation"),
    ]:
        outcome = toyllm("score", story(FOX), "--against-options", given)
        assert outcome.code == 2
        assert outcome.error.startswith("Invalid value for --against-options: ")
        assert message in outcome.error
    assert "--cache-dtype f8: expected f32 or bf16" in toyllm("score", story(FOX), "--against-options", "--cache-dtype f8").error
    monkeypatch.setenv("TOYLLM_PREFILL_CHUNK", "5")
    settings = document(story(FOX), "--against-options", "--threads 1")["against"]["settings"]
    assert (settings["prefill_chunk"], settings["threads"]) == (5, 1)


def test_different_vocabularies_are_an_error_with_what_can_be_compared(toyllm: Any, story: Any) -> None:
    outcome = toyllm("score", story(FOX), "--against", BASELINE)
    assert outcome.code == 1
    assert "the vocabularies differ (4096 tokens in tales-gpt2, 97 in " in outcome.error
    assert outcome.error.endswith("score each alone, and compare bits a byte")


def test_a_reader_that_has_had_enough_is_no_failure(process: Any, story: Any) -> None:
    child = process("score", story(FOX * 500))
    assert child.stdout.readline() == b"number\tid\tpiece\tlogprob\trank\tentropy\n"
    child.stdout.close()
    assert child.wait(120) == 0
    assert b"error" not in child.stderr.read()


def test_rows_come_while_the_text_is_still_being_scored(toyllm: Any, story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(output, "write", lambda text: written.append(text.count("\n")))
    monkeypatch.setattr(scoring, "LOGITS", 4 * 4096 * 8)
    toyllm("score", story(FOX * 10))
    assert len(written) > 5
    assert max(written) <= 10
