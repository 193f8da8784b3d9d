"""`toyllm generate --input` and `--samples`: answers in order, bad lines, resuming after any end, what is refused."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm as package
from toyllm.cli.answers import WAY_OUT
from toyllm.cli.prompts import KEYS, SETTINGS, line_seed
from toyllm.models import batch
from toyllm.models.generation import BOUNDS
from toyllm.models.model import Model

BASELINE = str(Path(__file__).parents[1] / "models" / "goldens" / "gpt2" / "baseline")  # no tokenizer, 64 positions
QUICK = {"prompt": "Once upon a time", "max_tokens": 3}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """A file of these lines: JSON of what is no text or bytes."""

    def written(*lines: Any, name: str = "prompts.jsonl") -> str:
        texts = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode() for line in lines]
        (tmp_path / name).write_bytes(b"".join(text + b"\n" for text in texts))
        return str(tmp_path / name)

    return written


def documents(text: str) -> list[dict[str, Any]]:
    """The answers of an output, behind its header; every line is whole."""
    assert text.endswith("\n")
    header, *found = [json.loads(line) for line in text.splitlines()]
    assert header["schema"] == "toyllm.generate.batch/1"
    return found


def timeless(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers without what differs from run to run."""
    return [{key: value for key, value in document.items() if key != "timings"} for document in found]


def mixed(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of mixed lengths for tales-gpt2, with settings of their own."""
    rng = np.random.default_rng(seed)
    return [
        {
            "prompt_ids": rng.integers(1, 4096, int(rng.integers(1, 50))).tolist(),
            "max_tokens": int(rng.integers(1, 30)),
            "temperature": (0, 0.8, 1.2)[i % 3],
            "id": f"number {i}",
        }
        for i in range(count)
    ]


# What comes out


def test_an_answer_is_the_document_of_generate_with_its_line_and_id(toyllm: Any, written: Any) -> None:
    file = written(QUICK, {"prompt": "The dog", "id": "dog", "seed": 5, "temperature": 0.5, "stop": "zzz", "logprobs": 1})
    code, out, err = toyllm("generate", "--input", file, "--max-tokens", "4", "--seed", "7")
    assert code == 0
    first, second = documents(out)
    alone = [
        ("Once upon a time", "--max-tokens", "3", "--seed", str(line_seed(7, 1))),
        ("The dog", "--max-tokens", "4", "--seed", "5", "--temperature", "0.5", "--stop", "zzz", "--logprobs", "1"),
    ]
    for number, found, arguments in ((1, first, alone[0]), (2, second, alone[1])):
        document = json.loads(toyllm("generate", *arguments, "--json").out)
        named = {"line": number} | ({"id": "dog"} if number == 2 else {})
        assert list(found) == [
            "schema",
            *named,
            *(key for key in document if key not in ("schema", "timings", "settings")),
            "timings",
            "settings",
        ]
        assert found["timings"].keys() == document["timings"].keys()
        document["settings"]["context"] = found["settings"]["context"]
        assert timeless([found]) == timeless([document | named])
    assert re.search(r"^2 lines answered; 7 tokens in .* tok/s$", err.strip())


def test_answers_are_in_the_order_of_the_lines(toyllm: Any, written: Any, tmp_path: Path) -> None:
    lines = mixed(20)
    lines[0]["max_tokens"] = 60  # the first is ready last
    out = tmp_path / "answers.jsonl"
    assert toyllm("generate", "--input", written(*lines), "--output", str(out), "--seed", "1").code == 0
    found = documents(out.read_text())
    assert [(d["line"], d["id"]) for d in found] == [(i + 1, f"number {i}") for i in range(20)]
    assert [d["prompt_tokens"] for d in found] == [line["prompt_ids"] for line in lines]


@pytest.mark.parametrize("size", ["1", "3", "50"])
def test_the_batch_size_changes_nothing(toyllm: Any, written: Any, size: str) -> None:
    file = written(*mixed(12, seed=2))
    found = [timeless(documents(toyllm("generate", "--input", file, "--seed", "1", *more).out)) for more in ((), ("--batch-size", size))]
    assert found[0] == found[1]


def test_stdin_is_an_input_with_or_without_a_last_line_end(toyllm: Any) -> None:
    for end in (b"", b"\n", b"\r\n"):
        data = b"\xef\xbb\xbf" + json.dumps(QUICK).encode() + b"\n" + json.dumps(QUICK).encode() + end
        assert len(documents(toyllm("generate", "--input", "-", stdin=data).out)) == 2


def test_no_lines_are_no_answers(toyllm: Any, written: Any) -> None:
    code, out, _ = toyllm("generate", "--input", written())
    assert (code, documents(out)) == (0, [])


def test_a_models_ids_are_its_text_where_it_has_no_tokenizer(toyllm: Any, written: Any) -> None:
    code, out, _ = toyllm("generate", "-m", BASELINE, "--input", written({"prompt_ids": [1, 2]}, {"prompt": "a"}), "--max-tokens", "2")
    first, second = documents(out)
    assert code == 1
    assert first["text"] is None
    assert "no tokenizer" in second["error"]


def on_screen(process: Any, *arguments: str) -> tuple[str, str]:
    """What goes to a stdout that is a pipe, and to a stderr that is a terminal."""
    ours, theirs = os.openpty()
    child = process(*arguments, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the terminal's other end is closed
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert child.wait() == 0
    return child.stdout.read().decode(), shown.decode()


def test_a_bar_with_its_rate_is_on_the_terminal_and_the_answers_are_not(written: Any, process: Any) -> None:
    out, err = on_screen(process, "generate", "--input", written(*mixed(12)))
    assert len(documents(out)) == 12
    assert re.search(r"\d+/12.*prompts.*tok/s", err)
    assert '"schema"' not in err


def test_samples_are_shown_without_a_bar_in_their_way(process: Any) -> None:
    out, err = on_screen(process, "generate", "Once", "-n", "2", "--max-tokens", "3", "--seed", "1")
    assert out.count("\n") == 2
    assert err == "\x1b[2msample 1 of 2, seed 1\r\n\x1b[0m\x1b[2msample 2 of 2, seed 2\r\n\x1b[0m"


# Seeds


def test_a_lines_seed_follows_from_the_runs_and_its_number() -> None:
    seeds = {line_seed(seed, number) for seed in range(20) for number in range(1, 50)}
    assert len(seeds) == 20 * 49
    assert line_seed(7, 3) == int(np.random.SeedSequence([7, 3]).generate_state(1)[0])


def test_the_drawn_seed_is_kept_for_those_who_go_on(toyllm: Any, written: Any, tmp_path: Path) -> None:
    file, out = written(*mixed(6)), tmp_path / "answers.jsonl"
    toyllm("generate", "--input", file, "--output", str(out))
    header, *lines = out.read_text().splitlines(keepends=True)
    out.write_text(header + "".join(lines[:2]))
    assert toyllm("generate", "--input", file, "--output", str(out)).code == 0
    assert timeless(documents(out.read_text())) == timeless([json.loads(line) for line in lines])


# Lines that are wrong


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("", "expected a JSON object such as .*: Expecting value"),
        ("once", "expected a JSON object such as"),
        ("[1]", r"expected a JSON object such as .*, found \[1\]"),
        ("{}", "^expected prompt or prompt_ids, found neither$"),
        ('{"prompt": "a", "prompt_ids": [1]}', "not both"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' occurs twice"),
        ('{"prompt": "a", "tempature": 1}', "^unknown key 'tempature': expected prompt, prompt_ids, id, max_tokens"),
        ('{"prompt": 1}', "^prompt: expected a text, found 1$"),
        ('{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"prompt": "\xff"}', r"^byte 12 \(0xff\): expected UTF-8"),
        ('{"prompt_ids": "1 2"}', "^prompt_ids: expected a list of token ids"),
        ('{"prompt_ids": [1.5]}', "^prompt_ids: expected a list of token ids"),
        ('{"prompt_ids": [true]}', "^prompt_ids: expected a list of token ids"),
        ('{"prompt_ids": [4096]}', "4096"),
        ('{"prompt_ids": [' + "9" * 30 + "]}", "^prompt_ids: expected"),
        ('{"prompt": "a", "id": [1]}', "^id: expected a text or a whole number"),
        ('{"prompt": "a", "max_tokens": 1.5}', r"^max_tokens: expected a whole number, found 1\.5$"),
        ('{"prompt": "a", "max_tokens": true}', "^max_tokens: expected a whole number, found true$"),
        ('{"prompt": "a", "temperature": "hot"}', '^temperature: expected a number, found "hot"$'),
        ('{"prompt": "a", "temperature": 1e999}', "^temperature: expected a number"),
        ('{"prompt": "a", "temperature": NaN}', "NaN"),
        ('{"prompt": "a", "temperature": -1}', r"^line 1: temperature: expected a finite number from 0, found -1$"),
        ('{"prompt": "a", "top_p": 2}', "top_p: expected 0 to 1, found 2$"),
        ('{"prompt": "a", "stop": [1]}', "^stop: expected a text or a list of texts"),
        ('{"prompt": "a", "stop": ""}', "stop: expected texts of at least one character"),
        ('{"prompt": "a", "n": 0}', "^n: expected a whole number from 1, found 0$"),
        ('{"prompt": "a", "seed": ' + str(2**63) + "}", "^seed: expected"),
        ("[" * 100_000, "expected a JSON object"),
        (
            '{"prompt_ids": ' + str([1] * 600) + "}",
            "^the prompt has 600 tokens and the context 512: shorten the prompt, or raise --context$",
        ),
    ],
)
def test_a_line_that_is_wrong_is_answered_with_what_is_wrong(toyllm: Any, written: Any, line: Any, error: str) -> None:
    code, out, err = toyllm("generate", "--input", written(line, QUICK))
    first, second = documents(out)
    assert code == 1
    assert first.keys() == {"line", "error"}
    assert first["line"] == 1
    assert re.search(error, first["error"])
    assert "\n" not in first["error"]
    assert second["finish_reason"], "the others go on"
    assert "2 lines answered, 1 of them with an error" in err


def test_null_is_not_given_and_an_error_keeps_its_id(toyllm: Any, written: Any) -> None:
    lines = [QUICK | dict.fromkeys(set(KEYS) - {"prompt", "max_tokens"}), {"prompt": 1, "id": 17}]
    first, second = documents(toyllm("generate", "--input", written(*lines)).out)
    assert first["finish_reason"] == "length"
    assert (second["line"], second["id"]) == (2, 17)


def test_every_setting_of_generate_can_be_a_lines() -> None:
    assert SETTINGS.keys() - {"n"} == BOUNDS.keys()


# Going on


def whole(toyllm: Any, file: str, out: Path, *more: str) -> str:
    """The output of an uninterrupted run."""
    assert toyllm("generate", "--input", file, "--output", str(out), "--seed", "3", *more).code == 0
    return out.read_text()


@pytest.mark.parametrize("lost", [0, 1, 5, "half a line", "all but the header"])
def test_only_the_missing_lines_are_done(toyllm: Any, written: Any, tmp_path: Path, lost: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = written(*mixed(8)), tmp_path / "answers.jsonl"
    text = whole(toyllm, file, out)
    lines = text.splitlines(keepends=True)
    kept = lines[: len(lines) - lost] if isinstance(lost, int) else [*lines[:4], lines[4][:30]] if lost == "half a line" else lines[:1]
    out.write_text("".join(kept))
    asked: list[int] = []
    answers = batch.answers
    monkeypatch.setattr(
        batch, "answers", lambda model, requests, *rest: asked.extend(r.key[0] for r in requests) or answers(model, requests, *rest)
    )
    code, stdout, err = toyllm("generate", "--input", file, "--output", str(out))
    done = sum(line.endswith("\n") for line in kept) - 1
    assert (code, stdout, asked) == (0, "", list(range(done + 1, 9)))
    assert (f"note: {out} has {done} of 8 answers already" in err) == (done > 0)
    assert out.read_text().startswith("".join(line for line in kept if line.endswith("\n"))), "what was there has not been touched"
    assert timeless(documents(out.read_text())) == timeless(documents(text))


def test_a_finished_file_with_errors_still_ends_with_1(toyllm: Any, written: Any, tmp_path: Path) -> None:
    file, out = written("wrong", QUICK), str(tmp_path / "answers.jsonl")
    assert [toyllm("generate", "--input", file, "--output", out).code for _ in range(2)] == [1, 1]


def test_threads_and_the_batch_size_may_change_on_the_way(toyllm: Any, written: Any, tmp_path: Path) -> None:
    file, out = written(*mixed(5)), tmp_path / "answers.jsonl"
    text = whole(toyllm, file, out, "--batch-size", "2")
    out.write_text("".join(text.splitlines(keepends=True)[:3]))
    assert toyllm("generate", "--input", file, "--output", str(out), "--batch-size", "4", "--threads", "1").code == 0
    assert [d["tokens"] for d in documents(out.read_text())] == [d["tokens"] for d in documents(text)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--seed", "4"), "from a run whose settings.seed was 3, not 4"),
        (("--temperature", "0.1"), "from a run whose settings.temperature was 0.8, not 0.1"),
        (("--cache-dtype", "bf16"), 'from a run whose settings.cache_dtype was "f32", not "bf16"'),
        (("-m", BASELINE), "from a run whose model.weights was"),
        (("-n", "2"), "from a run whose settings.samples was 1, not 2"),
        (("another input",), "from a run whose input.lines was 2, not 3"),
    ],
)
def test_the_file_of_another_run_is_refused_and_left_alone(
    toyllm: Any, written: Any, tmp_path: Path, change: tuple[str, ...], message: str
) -> None:
    file, out = written(QUICK, QUICK), tmp_path / "answers.jsonl"
    text = whole(toyllm, file, out)
    if change == ("another input",):
        written(QUICK, QUICK, QUICK)
        change = ()
    result = toyllm("generate", "--input", file, "--output", str(out), *change)
    assert result.code == 1
    assert message in result.error
    assert result.error.endswith(WAY_OUT)
    assert out.read_text() == text


@pytest.mark.parametrize("content", ["notes of mine\n", "no line end", '{"schema": "toyllm.generate/1"}\n', "\n", "[1]\n", "\x00\xff"])
def test_any_other_file_is_refused_and_left_alone(toyllm: Any, written: Any, tmp_path: Path, content: str) -> None:
    out = tmp_path / "mine.txt"
    out.write_text(content)
    result = toyllm("generate", "--input", written(QUICK), "--output", str(out))
    assert result.code == 1
    assert "is there already, and no file of answers" in result.error
    assert out.read_text() == content


def test_an_empty_file_is_nobodys(toyllm: Any, written: Any, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    out.touch()
    assert toyllm("generate", "--input", written(QUICK), "--output", str(out)).code == 0
    assert len(documents(out.read_text())) == 1


def test_answers_out_of_order_are_refused(toyllm: Any, written: Any, tmp_path: Path) -> None:
    file, out = written(QUICK, QUICK, QUICK), tmp_path / "answers.jsonl"
    header, first, second, _ = whole(toyllm, file, out).splitlines(keepends=True)
    for kept in ((header, second), (header, first, first), (header, first, "{}\n"), (header, "?\n")):
        out.write_text("".join(kept))
        result = toyllm("generate", "--input", file, "--output", str(out))
        assert re.search(rf"line {len(kept)}: expected the answer to line {len(kept) - 1} of the input", result.error)
        assert out.read_text() == "".join(kept)


def test_two_runs_never_write_to_one_file(toyllm: Any, written: Any, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "answers.jsonl"
    with out.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = toyllm("generate", "--input", written(QUICK), "--output", str(out))
        assert "another process is writing to it" in result.error


@pytest.mark.parametrize("output", ["/dev/null", "", "no/folder/answers.jsonl"])
def test_what_is_no_file_to_write_is_refused(toyllm: Any, written: Any, tmp_path: Path, output: str) -> None:
    assert toyllm("generate", "--input", written(QUICK), "--output", output if output.startswith("/") else str(tmp_path / output)).error


def test_an_input_that_is_not_there_is_one_line(toyllm: Any, tmp_path: Path) -> None:
    assert "none.jsonl: cannot be read" in toyllm("generate", "--input", str(tmp_path / "none.jsonl")).error


def test_a_full_disk_leaves_whole_lines(written: Any, tmp_path: Path, process: Any) -> None:
    """The limit on a file's size falls into an answer; below it nothing is lost."""
    import resource

    file, out = written(*mixed(6)), tmp_path / "answers.jsonl"
    limit = 9000

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    child = process("generate", "--input", file, "--output", str(out), preexec_fn=small_files, env=os.environ | {"NUMBA_CACHE_DIR": ""})
    _, err = child.communicate()
    assert child.returncode == 1
    assert b"cannot be written (File too large); the answers in it are whole, and stay" in err
    assert 0 < len(documents(out.read_text())) < 6


# Killed, interrupted


def killed_and_resumed(process: Any, file: str, out: Path, kills: int, seed: int) -> int:
    """Run until the end, killed so often at random moments; how many of the kills found the run at work."""
    moments, hit = random.Random(seed), 0
    for _ in range(kills):
        child = process("generate", "--input", file, "--output", str(out), "--seed", "3", "--batch-size", "3")
        before = out.read_bytes().count(b"\n") if out.exists() else 0
        until = before + moments.choice([0, 1, 2, 4])
        while child.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < until):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        child.kill()
        hit += child.wait() == -signal.SIGKILL
    child = process("generate", "--input", file, "--output", str(out), "--seed", "3")
    assert (child.wait(), child.stdout.read()) == (0, b"")
    return hit


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_moment_and_resumed_every_answer_is_there_once(
    toyllm: Any, written: Any, tmp_path: Path, process: Any, seed: int
) -> None:
    file = written(*mixed(24, seed))
    expected = documents(whole(toyllm, file, tmp_path / "uninterrupted.jsonl"))
    assert killed_and_resumed(process, file, tmp_path / "answers.jsonl", 3, seed)
    assert timeless(documents((tmp_path / "answers.jsonl").read_text())) == timeless(expected)


@pytest.mark.slow
def test_two_hundred_prompts_killed_six_times(toyllm: Any, written: Any, tmp_path: Path, process: Any) -> None:
    file = written(*mixed(200, 5))
    expected = documents(whole(toyllm, file, tmp_path / "uninterrupted.jsonl"))
    assert killed_and_resumed(process, file, tmp_path / "answers.jsonl", 6, 5) > 3
    assert timeless(documents((tmp_path / "answers.jsonl").read_text())) == timeless(expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_whole_lines_and_says_how_to_go_on(written: Any, tmp_path: Path, process: Any, number: int) -> None:
    file, out = written(*[{"prompt": "Once", "max_tokens": 400}] * 40), tmp_path / "answers.jsonl"
    child = process("generate", "--input", file, "--output", str(out), "--batch-size", "2")
    while child.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 2):
        time.sleep(0.005)
    child.send_signal(number)
    _, err = child.communicate()
    assert child.returncode == 130
    done = len(documents(out.read_text()))
    assert 0 < done < 40
    assert f"stopped: {done} of 40 lines are answered; the same command goes on from there".encode() in err


# Samples of one prompt


def test_samples_are_each_what_their_seed_gives(toyllm: Any) -> None:
    arguments = ("generate", "Once upon a time", "--max-tokens", "6")
    code, out, err = toyllm(*arguments, "-n", "3", "--seed", "5")
    alone = [toyllm(*arguments, "--seed", str(seed)).out for seed in (5, 6, 7)]
    assert (code, out) == (0, "".join(alone))
    assert err == "sample 1 of 3, seed 5\nsample 2 of 3, seed 6\nsample 3 of 3, seed 7\n"


def test_samples_are_one_document(toyllm: Any) -> None:
    arguments = ("generate", "Once upon a time", "--max-tokens", "6", "--json")
    code, out, err = toyllm(*arguments, "--samples", "3", "--seed", str(2**63 - 1))
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert list(document) == ["schema", "prompt_tokens", "samples", "usage", "settings"]
    assert [sample["seed"] for sample in document["samples"]] == [2**63 - 1, 0, 1], "behind the largest comes the first"
    for sample in document["samples"]:
        alone = json.loads(toyllm(*arguments, "--seed", str(sample["seed"])).out)
        assert {key: sample[key] for key in ("tokens", "text", "finish_reason", "usage")}.items() <= alone.items()
    assert document["usage"] == {"prompt_tokens": 4, "completion_tokens": 18}


def test_one_sample_is_what_there_was_before(toyllm: Any) -> None:
    arguments = ("generate", "Once", "--max-tokens", "3", "--seed", "1")
    assert toyllm(*arguments, "-n", "1") == toyllm(*arguments)


def test_a_line_can_ask_for_samples(toyllm: Any, written: Any) -> None:
    out = toyllm("generate", "--input", written(QUICK | {"n": 2, "seed": 9}, QUICK, QUICK | {"n": 1}), "-n", "3").out
    first, second, third = documents(out)
    assert [sample["seed"] for sample in first["samples"]] == [9, 10]
    assert len(second["samples"]) == 3
    assert "samples" not in third


def test_samples_with_figures_and_log_probabilities(toyllm: Any) -> None:
    code, out, err = toyllm(
        "generate", "Once upon a time there was", "-n", "2", "--max-tokens", "2", "--stats", "--logprobs", "1", "-t", "0"
    )
    assert code == 0
    assert out.count("\n") == 2
    assert re.search(r"sample 1 of 2\n +\d+ .*\n +\d+ .*\nsample 2 of 2\n", err)
    for name in ("together:             2 sequences of 8 positions", "prompt tokens:        12, 5 of them reused", "rate:", "layer 0"):
        assert name in err


def test_changes_are_made_in_every_sample(toyllm: Any) -> None:
    arguments = ("generate", "Once upon a time", "--max-tokens", "5", "--seed", "1")
    for change in (("--scale", "blocks.*.mlp.out[-1]=0.5"), ("--ablate", "blocks.2.attn.weights[1]")):
        both = toyllm(*arguments, *change, "-n", "2").out
        assert both == "".join(toyllm(*arguments[:-1], seed, *change).out for seed in ("1", "2"))


# What has no meaning together


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Once", "--input", "x"), "PROMPT: has no meaning with --input"),
        (("--prompt-ids", "1", "--input", "x"), "--prompt-ids: has no meaning with --input"),
        (("--input", "x", "--ablate", "embed"), "--ablate: has no meaning with --input"),
        (("--input", "x", "--session", "s"), "--session: has no meaning with --input"),
        (("--input", "x", "--context-shift"), "--context-shift: has no meaning with --input"),
        (("--input", "x", "--keep", "0"), "--keep: has no meaning with --input"),
        (("--input", "x", "--chat"), "--chat: has no meaning with --input"),
        (("Once", "--chat", "-n", "2"), "--chat: has no meaning with --samples"),
        (("Once", "--session", "s", "-n", "2"), "--session: has no meaning with --samples"),
        (("Once", "--output", "x"), "--output: has no meaning without --input"),
        (("Once", "--batch-size", "2"), "--batch-size: has no meaning without --input or --samples"),
        (("Once", "-n", "0"), "-n"),
    ],
)
def test_what_has_no_meaning_together_is_wrong_usage(toyllm: Any, arguments: tuple[str, ...], message: str) -> None:
    result = toyllm("generate", *arguments)
    assert result.code == 2
    assert message in result.error


# Memory


def test_what_does_not_fit_is_refused_with_the_plan_and_the_figures(toyllm: Any, written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "free_for_cache", lambda self: self.cache_bytes(31, 2))
    for arguments in (("--input", written(*[{"prompt": "Once", "max_tokens": 30}] * 5)), ("Once", "-n", "5", "--max-tokens", "30")):
        code, _, err = toyllm("generate", *arguments, "--batch-size", "5", "--context", "31")
        *plan, error = err.splitlines()
        assert code == 1
        assert any(line.startswith("layer 0") and "cache failed" in line for line in plan)
        assert re.match(r"error: --batch-size 5: the KV caches take .* for 5 sequences of 31 positions.*; try --batch-size 2$", error)
        assert "batch size reduced from 5 to 2" in toyllm("generate", *arguments, "--context", "31").err


def test_the_version_of_the_package_is_in_the_header(toyllm: Any, written: Any) -> None:
    header = json.loads(toyllm("generate", "--input", written(QUICK), "--seed", "2").out.splitlines()[0])
    assert (header["version"], header["settings"]["seed"], header["input"]["lines"]) == (package.__version__, 2, 1)
    assert re.fullmatch("sha256:[0-9a-f]{64}", header["fingerprint"])
