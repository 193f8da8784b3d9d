"""`--context-shift` and `--session`: what generate and chat say of them, what they refuse, and that a file always holds a whole session."""

import json
import os
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toyllm.cli import chat, generate
from toyllm.models.location import EMBEDDED
from toyllm.models.model import Model, load

harmony_model = runpy.run_path(str(Path(__file__).parents[1] / "harmony_model.py"))
GREEDY = ("--temperature", "0")
FIVE = "<|channel|>final<|message|>5.<|return|>"
ONCE = ("Once upon a time", *GREEDY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random checkpoint that can chat."""
    path: Path = tmp_path_factory.mktemp("harmony")
    harmony_model["maker"]().write_checkpoint(path)
    return str(path)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make the model of every command one that says these answers."""

    def script(*answers: str, **options: Any) -> Any:
        model = harmony_model["Scripted"](*answers, **options)
        for module in (chat, generate):
            monkeypatch.setattr(module, "load", lambda name, options, changes=(): model)
        return model

    return script


@pytest.fixture
def document(toyllm: Any) -> Callable[..., Any]:
    """Run generate with --json, which must succeed."""

    def document(*arguments: str, **options: Any) -> Any:
        code, out, _ = toyllm("generate", *arguments, "--json", **options)
        assert code == 0
        return json.loads(out)

    return document


def ids(found: Any) -> list[int]:
    return [token["id"] for token in found["tokens"]]


# A full context


def test_a_shift_is_told_counted_and_the_text_goes_on(toyllm: Any, document: Any) -> None:
    asked = (*ONCE, "--max-tokens", "60", "--context", "40", "--context-shift")
    code, out, err = toyllm("generate", *asked, "--stats")
    assert code == 0
    note = "note: the context of 40 tokens was full: kept the last 20, dropped 20\n"
    assert err.startswith(2 * note)
    assert "context shifts:       2 (40 tokens dropped)\n" in err
    found = document(*asked)
    assert found["text"] == out[:-1]
    assert found["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 60, "context_shifts": 2, "dropped_tokens": 40}
    assert {"context_shift": True, "keep": 0, "context": 40}.items() <= found["settings"].items()
    assert toyllm("generate", *asked, "--json").err == 2 * note, "it is said there, too"


def test_without_it_nothing_is_different(document: Any) -> None:
    found = document(*ONCE, "--max-tokens", "60", "--context", "40")
    assert found["finish_reason"] == "context"
    assert found["usage"].keys() == {"prompt_tokens", "completion_tokens"}
    assert not {"context_shift", "keep", "session"} & found["settings"].keys()


def test_what_is_kept_is_as_asked_for_else_a_beginning_of_text(toyllm: Any, document: Any) -> None:
    few = ("--max-tokens", "60", "--context", "40", "--context-shift", *GREEDY)
    assert toyllm("generate", "Once", *few, "--keep", "10").err.startswith(
        "note: the context of 40 tokens was full: kept the first 10 and the last 15, dropped 15\n"
    )
    assert document("", *few)["settings"]["keep"] == 1
    assert document("Once", *few)["settings"]["keep"] == 0


def test_a_prompt_longer_than_the_context_is_shortened_and_that_is_told(toyllm: Any) -> None:
    asked = ("generate", "--prompt-ids", " ".join(["5"] * 50), "--max-tokens", "3", "--context", "40", *GREEDY)
    assert "the prompt has 50 tokens and the context 40" in toyllm(*asked).error
    code, _, err = toyllm(*asked, "--context-shift", "--keep", "2")
    assert (code, err) == (0, "note: the context of 40 tokens was full: kept the first 2 and the last 24, dropped 24\n")


def test_on_a_terminal_a_note_has_a_line_of_its_own(on_terminal: Any) -> None:
    code, _, err = on_terminal("generate", *ONCE, "--max-tokens", "40", "--context", "40", "--context-shift")
    assert code == 0
    assert "\nnote: the context of 40 tokens was full" in err


@pytest.mark.parametrize("command", [("generate", "x"), ("chat", "-m", "tales-gpt-oss")])
def test_keep_alone_is_wrong_usage_but_may_stand_in_the_environment(toyllm: Any, command: tuple[str, ...], monkeypatch: Any) -> None:
    outcome = toyllm(*command, "--keep", "3")
    assert outcome.code == 2
    assert outcome.error.startswith("Invalid value for --keep: has no meaning without --context-shift")
    monkeypatch.setenv("TOYLLM_KEEP", "3")
    assert "--keep" not in toyllm(*command, "--max-tokens", "1", *GREEDY).err


@pytest.mark.parametrize("option", [("--context-shift",), ("--session", "s")])
def test_changes_of_activations_have_positions_that_do_not_move(toyllm: Any, option: tuple[str, ...]) -> None:
    outcome = toyllm("generate", "x", "--ablate", "embed", *option)
    assert outcome.code == 2
    assert outcome.error.startswith(f"Invalid value for {option[0]}: has no meaning where activations are changed")


def test_keep_that_leaves_nothing_to_drop_is_one_line(toyllm: Any) -> None:
    outcome = toyllm("generate", "x", "--context-shift", "--context", "40", "--keep", "39")
    assert (outcome.code, outcome.error) == (1, "--keep 39: expected 0 to 38, so that a context of 40 has something to drop")


def test_a_chat_drops_its_oldest_turns_and_says_so(toyllm: Any, script: Any) -> None:
    lines = b"one\n" + b"x" * 30 + b"\n" + b"y" * 30 + b"\n"
    script(FIVE, FIVE, FIVE, context=300)
    assert "begin anew (in chat: /reset)" in toyllm("chat", "-m", "scripted", *GREEDY, stdin=lines).err
    script(FIVE, FIVE, FIVE, context=300)
    code, out, err = toyllm("chat", "-m", "scripted", *GREEDY, "--context-shift", stdin=lines)
    assert (code, out) == (0, "5.\n" * 3)
    assert err == "note: the context of 300 tokens was full: dropped the oldest 4 messages, kept the opening and the last 1\n"


def test_a_chats_answer_goes_on_where_the_context_is_full(toyllm: Any, script: Any) -> None:
    script("<|channel|>final<|message|>" + "x" * 90 + "<|return|>", context=250)
    code, out, err = toyllm("chat", "-m", "scripted", *GREEDY, "--context-shift", "--stats", stdin=b"?\n")
    assert (code, out) == (0, "x" * 90 + "\n")
    assert "note: the context of 250 tokens was full: kept the first 204 and the last 23, dropped 23\n" in err
    assert "context shifts:" in err


# Sessions


@pytest.mark.parametrize("model", ["tales-gpt2", "tales-gpt-oss"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_an_empty_prompt_goes_on_where_the_session_ended(document: Any, tmp_path: Path, model: str, dtype: str) -> None:
    options = (*GREEDY, "-m", model, "--cache-dtype", dtype, "--session", str(tmp_path / "s"))
    whole = document("Once upon a time", *options[:-2], "--max-tokens", "30")
    first = document("Once upon a time", *options, "--max-tokens", "18")
    again = document("", *options, "--max-tokens", "12")
    assert ids(first) + ids(again) == ids(whole)
    assert again["prompt_tokens"] == first["prompt_tokens"] + ids(first)
    assert (first["usage"]["reused_tokens"], again["usage"]["reused_tokens"]) == (0, len(again["prompt_tokens"]) - 1)
    assert again["settings"]["session"] == str(tmp_path / "s")


def test_a_prompt_that_begins_the_same_is_read_from_where_it_differs(document: Any, toyllm: Any, tmp_path: Path) -> None:
    options = (*GREEDY, "--max-tokens", "5", "--session", str(tmp_path / "s"))
    document("Once upon a time there was a king", *options)
    found = document("Once upon a time there lived", *options)
    assert found["usage"]["reused_tokens"] == len(found["prompt_tokens"]) - 1
    assert ids(found) == ids(document("Once upon a time there lived", *options[:-2]))
    assert "prompt reused:        0 tokens\n" in toyllm("generate", "The", *options, "--stats").err


def test_windows_too_step_back_to_where_a_prompt_differs_and_the_memory_told_counts_that(
    document: Any, toyllm: Any, tmp_path: Path
) -> None:
    text = " ".join(str(n * 7 % 901) for n in range(400))
    options = ("-m", "tales-gpt-oss", *GREEDY, "--max-tokens", "40")
    session = ("--session", str(tmp_path / "s"))
    first = document(text + " one question", *options, *session)
    assert len(first["prompt_tokens"]) > 600, "many windows of 128"
    second = document(text + " two", *options, *session)
    assert second["usage"]["reused_tokens"] >= len(first["prompt_tokens"]) - 10
    assert ids(second) == ids(document(text + " two", *options))

    def cache(*more: str) -> int:
        *_, total = [line for line in toyllm("generate", "x", *options, "--stats", *more).err.splitlines() if line.startswith("total ")]
        return int(total.split()[3].replace(",", ""))

    model = load("tales-gpt-oss")
    bytes_of = [model.family.cache_bytes(model.config, model.config.context, 512, "f32", 1, keep) for keep in (0, 1024)]
    assert [cache(), cache(*session)] == bytes_of
    assert bytes_of[0] < bytes_of[1] == model.new_cache(keep=1024).nbytes


def test_a_text_that_has_ended_goes_on_without_its_end(document: Any, tmp_path: Path) -> None:
    plain = ids(document(*ONCE, "--max-tokens", "5"))
    for file in (EMBEDDED / "tales-gpt2").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": plain[4]}))
    options = (*GREEDY, "-m", str(tmp_path), "--session", str(tmp_path / "s"))
    first = document("Once upon a time", *options)
    assert (ids(first), first["finish_reason"]) == (plain, "stop")
    again = document("", *options)
    assert again["prompt_tokens"] == first["prompt_tokens"] + plain[:4]
    assert ids(again) == plain[4:]


def test_what_is_no_session_of_this_model_is_refused_and_stays(toyllm: Any, tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert toyllm("generate", *ONCE, "--max-tokens", "3", "--session", str(path)).code == 0
    for data, arguments, message in (
        (path.read_bytes(), ("-m", "tales-gpt-oss"), "a session of another model, 'tales-gpt2', not of tales-gpt-oss"),
        (path.read_bytes(), ("--weights", "q8"), "made with --weights stored, and this run has q8"),
        (path.read_bytes()[:-1], (), "no session that can be read: "),
        (b"my precious notes", (), "no session that can be read: "),
    ):
        path.write_bytes(data)
        outcome = toyllm("generate", *ONCE, "--session", str(path), *arguments)
        assert outcome.code == 1
        assert outcome.error.startswith(f"{path}: {message}")
        assert path.read_bytes() == data


def test_an_interrupt_keeps_what_is_whole(process: Any, document: Any, tmp_path: Path) -> None:
    path = tmp_path / "s"
    child = process("generate", *ONCE, "--max-tokens", "400", "--backend", "numpy", "--session", str(path))
    assert len(child.stdout.read(30)) == 30
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 130
    again = document("", *GREEDY, "--max-tokens", "5", "--backend", "numpy", "--session", str(path))
    read = again["prompt_tokens"]
    assert again["usage"]["reused_tokens"] == len(read) - 1 > 5
    drawn = len(read) - len(document(*ONCE, "--max-tokens", "0")["prompt_tokens"])
    whole = document(*ONCE, "--max-tokens", str(drawn + 5), "--backend", "numpy")
    assert read + ids(again) == whole["prompt_tokens"] + ids(whole)


def test_an_interrupt_before_anything_was_read_leaves_the_session_before(toyllm: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "s"
    assert toyllm("generate", *ONCE, "--max-tokens", "3", "--session", str(path)).code == 0
    before = path.read_bytes()

    def interrupted(*arguments: Any, **named: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Model, "forward", interrupted)
    assert toyllm("generate", "The", *GREEDY, "--session", str(path)).code == 130
    assert path.read_bytes() == before
    assert toyllm("generate", "The", *GREEDY, "--session", str(tmp_path / "new")).code == 130
    assert not (tmp_path / "new").exists()


def test_a_reader_that_has_had_enough_still_leaves_a_session(process: Any, tmp_path: Path) -> None:
    path = tmp_path / "s"
    child = process("generate", *ONCE, "--max-tokens", "400", "--backend", "numpy", "--session", str(path))
    assert len(child.stdout.read(20)) == 20
    child.stdout.close()
    assert child.wait(60) == 0
    assert path.stat().st_size > 1000


def test_a_place_that_cannot_be_written_is_one_line(toyllm: Any, tmp_path: Path) -> None:
    outcome = toyllm("generate", "x", "--session", str(tmp_path / "nowhere" / "s"))
    assert (outcome.code, outcome.error) == (
        1,
        f"{tmp_path}/nowhere/s: no folder {tmp_path}/nowhere to write to; give another --session",
    )


# Conversations that go on the next day


def asked(folder: str, path: Path, *more: str) -> tuple[str, ...]:
    return ("chat", "-m", folder, "--max-tokens", "25", "--temperature", "2", "--seed", "3", "--session", str(path), *more)


def test_a_chat_goes_on_as_if_it_had_never_ended(toyllm: Any, folder: str, tmp_path: Path) -> None:
    whole = toyllm(*asked(folder, tmp_path / "whole"), stdin=b"Hello\nWho?\nWhy?\n")
    assert whole.code == 0
    first = toyllm(*asked(folder, tmp_path / "s"), stdin=b"Hello\nWho?\n")
    again = toyllm(*asked(folder, tmp_path / "s"), stdin=b"Why?\n")
    assert first.out + again.out == whole.out
    note, rest = again.err.split("\n", 1)
    assert note.startswith(f"note: {tmp_path}/s: goes on behind ")
    assert first.err + rest.removeprefix("seed 3\n") == whole.err
    assert (tmp_path / "s").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_opening_is_remembered_unless_another_is_given(toyllm: Any, folder: str, tmp_path: Path) -> None:
    def opening() -> dict[str, Any]:
        from safetensors import safe_open

        with safe_open(tmp_path / "s", "np") as file:
            return json.loads(file.metadata()["talk"])["opening"]

    toyllm(*asked(folder, tmp_path / "s", "--instructions", "Rhyme.", "--reasoning", "high"), stdin=b"Hello\n")
    assert opening() == {"reasoning": "high", "date": None, "instructions": "Rhyme."}
    toyllm(*asked(folder, tmp_path / "s", "--reasoning", "low", "--date", "2025-06-28"), stdin=b"Hello\n")
    assert opening() == {"reasoning": "low", "date": "2025-06-28", "instructions": "Rhyme."}


def test_reset_clears_the_file(toyllm: Any, folder: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    toyllm(*asked(folder, path), stdin=b"A secret\n")
    assert b"A secret" in path.read_bytes()
    toyllm(*asked(folder, path), stdin=b"/reset\n")
    assert b"A secret" not in path.read_bytes()
    assert "goes on behind 0 messages" in toyllm(*asked(folder, path), stdin=b"").err


def test_one_question_may_go_on_with_a_conversation(toyllm: Any, folder: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    options = ("-m", folder, "--max-tokens", "20", "--session", str(path), *GREEDY, "--json")
    first, second = (json.loads(toyllm("generate", "--chat", question, *options).out) for question in ("Hello", "Who?"))
    assert len(second["prompt_tokens"]) > len(first["prompt_tokens"])
    assert second["usage"]["reused_tokens"] >= len(first["prompt_tokens"])
    assert "goes on behind" in toyllm(*asked(folder, path), stdin=b"").err


def test_a_text_is_no_conversation(toyllm: Any, folder: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert toyllm("generate", "x", "-m", folder, "--max-tokens", "3", *GREEDY, "--session", str(path)).code == 0
    assert "no conversation; go on with generate" in toyllm(*asked(folder, path), stdin=b"Hello\n").error


def test_a_saved_turn_that_fails_to_be_written_is_said_and_the_chat_goes_on(
    toyllm: Any, folder: str, tmp_path: Path, monkeypatch: Any
) -> None:
    path = tmp_path / "s"
    lines = iter(["Hello", "Who?", "/quit"])

    def typed(prompt: str = "") -> str:
        if path.exists():
            os.utime(path, ns=(1, 1))  # as if another program had written it
        return next(lines)

    monkeypatch.setattr("builtins.input", typed)
    code, _, err = toyllm(*asked(folder, path), stdin=None)
    assert code == 0
    assert f"error: {path}: another program has written or removed it since this one read it; give another --session" in err


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(toyllm: Any, folder: str, tmp_path: Path, monkeypatch: Any) -> None:
    path, forward, passes = tmp_path / "s", Model.forward, iter(range(1000))
    lines = iter(["Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))

    def interrupted(self: Model, *arguments: Any, **named: Any) -> Any:
        if next(passes) == 12:
            raise KeyboardInterrupt
        return forward(self, *arguments, **named)

    monkeypatch.setattr(Model, "forward", interrupted)
    code, _, err = toyllm(*asked(folder, path), stdin=None)
    assert code == 0
    assert "stopped; what was said so far stays in the conversation" in err
    monkeypatch.setattr(Model, "forward", forward)
    again = toyllm(*asked(folder, path, "--stats"), stdin=b"Who?\n")
    assert again.code == 0
    assert again.err.startswith(f"note: {path}: goes on behind ")
    assert int(again.err.split("prompt reused:")[1].split()[0]) > 200
