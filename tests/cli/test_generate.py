"""`toyllm generate`: the stream and the JSON document, prompts from everywhere, every ending and every refusal."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm as package
from toyllm.cli import generate as module
from toyllm.kernels.threads import max_threads
from toyllm.models.location import EMBEDDED
from toyllm.models.model import Model

TALES = EMBEDDED / "tales-gpt2"
BASELINE = str(Path(__file__).parents[1] / "models" / "goldens" / "gpt2" / "baseline")  # no tokenizer, no ends of text, 64 positions
GREEDY = ("--temperature", "0")
CONTEXT = json.loads((TALES / "config.json").read_text())["n_positions"]


def strictly(text: str) -> Any:
    """The one JSON document, in which there is no NaN and no infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert text.endswith("\n")
    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def document(toyllm: Any) -> Callable[..., Any]:
    """Run generate with --json, which must succeed without a word on stderr."""

    def document(*arguments: str, **options: Any) -> Any:
        code, out, err = toyllm("generate", *arguments, "--json", **options)
        assert (code, err) == (0, "")
        assert out.count("\n") == 1
        return strictly(out)

    return document


def ids(found: Any) -> list[int]:
    return [token["id"] for token in found["tokens"]]


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., str]:
    """tales-gpt2 in a folder of its own, with other small files: name -> document, None for no such file."""

    def variant(**files: Any) -> str:
        for file in TALES.iterdir():
            shutil.copy(file, tmp_path) if file.suffix == ".json" else (tmp_path / file.name).symlink_to(file)
        for name, content in files.items():
            path = tmp_path / f"{name}.json"
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_text(json.dumps(content))
        return str(tmp_path)

    return variant


# The document


def test_the_document_has_exactly_these_keys_and_types(document: Any) -> None:
    found = document("Once upon a time", "--max-tokens", "3", "--logprobs", "2", "--seed", "1")
    assert list(found) == ["schema", "prompt_tokens", "tokens", "text", "finish_reason", "usage", "timings", "settings"]
    assert found["schema"] == "toyllm.generate/1"
    assert all(type(i) is int for i in found["prompt_tokens"])
    assert len(found["tokens"]) == 3
    for token in found["tokens"]:
        assert list(token) == ["id", "text", "logprob", "top_logprobs"]
        assert [type(v) for v in token.values()] == [int, str, float, list]
        assert token["logprob"] < 0
        assert [list(top) for top in token["top_logprobs"]] == [["id", "text", "logprob"]] * 2
        assert token["top_logprobs"][0]["logprob"] >= token["top_logprobs"][1]["logprob"]
    assert found["text"] == "".join(token["text"] for token in found["tokens"])
    assert found["usage"] == {"prompt_tokens": len(found["prompt_tokens"]), "completion_tokens": 3}
    assert list(found["timings"]) == ["load_s", "prefill_s", "first_token_s", "decode_tok_s"]


def test_the_settings_are_all_effective_ones(document: Any) -> None:
    found = document("Once", "--max-tokens", "2", "--seed", "3", "--top-k", "9", "--stop", "a b", "--stop", "c", "--context", "100")[
        "settings"
    ]
    sampling = {"max_tokens": 2, "temperature": 0.8, "top_k": 9, "top_p": 0.95, "min_p": 0.0, "seed": 3}
    penalties = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    ends = {"stop": ["a b", "c"], "eos": [0], "logprobs": 0}
    running = {"model": "tales-gpt2", "context": 100, "prefill_chunk": 512}
    assert (sampling | penalties | ends | running).items() <= found.items()
    assert found["threads"] >= 1
    assert found["backend"] in ("avx512", "avx2", "portable")


@pytest.mark.parametrize("prompt", ["Once", "Once upon a time there was a poor man who had three sons and a goat"])
def test_the_times_add_up(document: Any, prompt: str) -> None:
    times = document(prompt, "--max-tokens", "10", "--seed", "1")["timings"]
    assert all(value > 0 for value in times.values())
    assert times["load_s"] + times["prefill_s"] <= times["first_token_s"] < 120


def test_times_that_there_are_none_of_are_null(document: Any) -> None:
    times = document("Once", "--max-tokens", "0")["timings"]
    assert times["first_token_s"] is None
    assert times["decode_tok_s"] is None
    assert document("Once", "--max-tokens", "1")["timings"]["decode_tok_s"] is None


def test_logprobs_are_the_log_softmax_of_the_raw_logits(document: Any) -> None:
    arguments = ("--max-tokens", "12", "--seed", "5", "--temperature", "1.5", "--top-k", "50", "--repetition-penalty", "1.8")
    found = document("Once upon a time", *arguments, "--logprobs", "3")
    prompt = found["prompt_tokens"]
    logits = package.load("tales-gpt2").logits(prompt + ids(found))[len(prompt) - 1 : -1].astype(np.float64)
    exact = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    for token, row in zip(found["tokens"], exact, strict=True):
        assert token["logprob"] == pytest.approx(row[token["id"]], abs=1e-4)
        assert [top["id"] for top in token["top_logprobs"]] == np.argsort(-row, kind="stable")[:3].tolist()
        assert [top["logprob"] for top in token["top_logprobs"]] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-4)


def test_an_impossible_tokens_logprob_is_null() -> None:
    assert [module.finite(p) for p in (-math.inf, math.inf, math.nan, None, -1.5)] == [None, None, None, None, -1.5]


# The stream


def test_what_streams_is_the_text_and_a_line_end(toyllm: Any, document: Any) -> None:
    arguments = ("Once upon a time", "--max-tokens", "60", "--seed", "2", "--temperature", "1.2")
    found = document(*arguments)
    assert toyllm("generate", *arguments) == (0, found["text"] + "\n", "seed 2\n")


def test_the_drawn_seed_is_said_and_reproduces_the_text(toyllm: Any, document: Any) -> None:
    arguments = ("generate", "Once upon a time", "--max-tokens", "20", "--temperature", "1.2")
    code, out, err = toyllm(*arguments)
    seed = re.fullmatch(r"seed (\d+)\n", err)
    assert code == 0
    assert seed
    assert toyllm(*arguments, "--seed", seed[1]).out == out
    drawn = document(*arguments[1:])
    assert document(*arguments[1:], "--seed", str(drawn["settings"]["seed"]))["text"] == drawn["text"]


def test_a_greedy_run_draws_nothing_and_says_nothing(toyllm: Any) -> None:
    assert toyllm("generate", "Once", *GREEDY, "--max-tokens", "5").err == ""


def test_the_same_seed_gives_the_same_tokens_with_other_threads_and_chunks(document: Any) -> None:
    arguments = ("Once upon a time there was a poor man who had three sons", "--max-tokens", "30", "--seed", "4")
    expected = ids(document(*arguments))
    assert len(set(expected)) > 10
    for n in range(1, max_threads() + 1):
        assert ids(document(*arguments, "--threads", str(n))) == expected
    for n in (1, 5):
        assert ids(document(*arguments, "--prefill-chunk", str(n))) == expected
    assert ids(document(*arguments[:-1], "5")) != expected


def test_nothing_but_the_text_is_on_stdout_and_no_escape_anywhere_off_a_terminal(toyllm: Any) -> None:
    code, out, err = toyllm("generate", "Once", "--max-tokens", "8", "--seed", "1", "--stats", "--logprobs", "2")
    assert code == 0
    assert out.count("\n") == out.strip("\n").count("\n") + 1
    assert "\x1b" not in out + err
    lines = err.splitlines()
    assert lines[0] == "seed 1"
    assert all(re.match(r" *\d+  ['\"].*  +-\d+\.\d{4}  ", line) for line in lines[1:9])
    assert [line.split(":")[0] for line in lines[9:18]] == [
        "total duration",
        "load duration",
        "prompt eval count",
        "prompt eval duration",
        "prompt eval rate",
        "eval count",
        "eval duration",
        "eval rate",
        "time to first token",
    ]
    assert lines[18].split() == ["memory", "weights", "widened", "cache", "work", "status"]
    assert all(line.endswith("allocated") for line in lines[19:-1])
    assert lines[-1].startswith("total ")


def test_a_cache_that_does_not_fit_is_refused_with_the_plan(toyllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from toyllm.models import model

    monkeypatch.setattr(model, "available_memory", lambda: model.RESERVE + 15 * 10**6)
    code, out, err = toyllm("generate", "Once", "--context", "512")
    assert (code, out) == (1, "")
    assert "layer 0   1,579,520   13,312  1,048,576            -  weights planned, widened planned, cache failed" in err
    assert err.splitlines()[-1].startswith("error: --context 512: the KV cache takes 0.01 GB, 0.00 GB are free beside the weights; try ")


def test_a_cache_that_the_system_does_not_give_is_one_line_behind_the_plan(toyllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from toyllm.models import gpt2

    def refuse(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(gpt2, "make_cache", refuse)
    code, out, err = toyllm("generate", "Once", "--context", "100")
    assert (code, out) == (1, "")
    assert "cache failed" in err
    assert err.splitlines()[-1].startswith("error: --context 100: the KV cache takes 0.00 GB, which the system does not give; try ")


def test_no_figure_is_made_up_where_nothing_was_generated(toyllm: Any) -> None:
    code, out, err = toyllm("generate", "Once", "--max-tokens", "0", "--seed", "1", "--stats", "--logprobs", "2")
    assert (code, out) == (0, "\n")
    assert re.search(r"^eval rate: +-$", err, re.MULTILINE)
    assert re.search(r"^time to first token: +-$", err, re.MULTILINE)


# Endings


def test_max_tokens_end_with_length(document: Any) -> None:
    found = document("Once", "--max-tokens", "2", *GREEDY)
    assert (found["finish_reason"], len(found["tokens"])) == ("length", 2)
    nothing = document("Once", "--max-tokens", "0")
    assert (nothing["finish_reason"], nothing["tokens"], nothing["text"]) == ("length", [], "")


def test_a_stop_string_ends_the_text_before_it_and_the_tokens_after_it(document: Any) -> None:
    plain = document("Once upon a time", "--max-tokens", "30", *GREEDY)
    text = plain["text"]
    for stop in (text[10:12], text[20:31], text[15]):
        found = document("Once upon a time", "--max-tokens", "30", *GREEDY, "--stop", stop, "--stop", "never \u2603")
        assert found["finish_reason"] == "stop"
        assert found["text"] == text[: text.index(stop)]
        n = len(found["tokens"])
        assert found["tokens"] == plain["tokens"][:n], "the token that completes it is there, whole"
        assert stop in "".join(token["text"] for token in found["tokens"])
        assert stop not in "".join(token["text"] for token in found["tokens"][:-1])


def test_an_end_of_text_is_a_token_and_no_text(document: Any, variant: Any) -> None:
    plain = document("Once upon a time", "--max-tokens", "10", *GREEDY)
    ending = ids(plain)[4]
    found = document("Once upon a time", "-m", variant(generation_config={"eos_token_id": [4095, ending]}), "--max-tokens", "10", *GREEDY)
    first = ids(plain).index(ending)
    assert found["finish_reason"] == "stop"
    assert ids(found) == ids(plain)[: first + 1]
    assert found["text"] == "".join(token["text"] for token in plain["tokens"][:first])
    assert found["usage"]["completion_tokens"] == first + 1
    assert found["settings"]["eos"] == [4095, ending]


def test_the_context_ends_with_context_and_is_never_passed(document: Any) -> None:
    found = document("--prompt-ids", "1 2 3", "--context", "8", *GREEDY)
    assert (found["finish_reason"], len(found["tokens"]), found["settings"]["context"]) == ("context", 5, 8)
    whole = document("-m", BASELINE, "--prompt-ids", "1 2 3", *GREEDY, "--max-tokens", "1000")
    assert (whole["finish_reason"], len(whole["tokens"])) == ("context", 61)


def test_a_prompt_as_long_as_the_context_leaves_no_room(toyllm: Any, document: Any) -> None:
    found = document("--prompt-ids", "1 2 3", "--context", "3", *GREEDY)
    assert (found["finish_reason"], found["tokens"], found["text"]) == ("context", [], "")
    assert toyllm("generate", "--prompt-ids", "1 2 3", "--context", "3", *GREEDY) == (0, "\n", "")


def test_a_prompt_longer_than_the_context_is_an_error_with_both_numbers(toyllm: Any) -> None:
    outcome = toyllm("generate", "--prompt-ids", "1 2 3 4", "--context", "3")
    assert (outcome.code, outcome.error) == (1, "the prompt has 4 tokens and the context 3: shorten the prompt, or raise --context")
    outcome = toyllm("generate", "--prompt-ids", "1 " * (CONTEXT + 1))
    assert f"the prompt has {CONTEXT + 1} tokens and the context {CONTEXT}" in outcome.error


# Where settings come from


def test_the_models_defaults_hold_until_an_option_says_otherwise(document: Any, variant: Any) -> None:
    theirs = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "max_new_tokens": 2,
        "do_sample": True,
    }
    model = variant(generation_config=theirs)
    found = document("Once", "-m", model, "--top-k", "3", "--min-p", "0")["settings"]
    expected = theirs | {"top_k": 3, "min_p": 0.0, "max_tokens": 2, "eos": [0]}
    assert {name: found.get(name) for name in expected if name not in ("max_new_tokens", "do_sample")}.items() <= expected.items()
    assert found["max_tokens"] == 2


def test_a_model_that_does_not_sample_is_greedy(document: Any, toyllm: Any, variant: Any) -> None:
    model = variant(generation_config={"do_sample": False, "temperature": 0.7})
    assert document("Once", "-m", model, "--max-tokens", "3")["settings"]["temperature"] == 0
    assert document("Once", "-m", model, "--max-tokens", "3", "--temperature", "0.7")["settings"]["temperature"] == 0.7
    assert toyllm("generate", "Once", "-m", model, "--max-tokens", "3").err == ""


def test_without_a_generation_config_the_documented_defaults_hold(document: Any, variant: Any) -> None:
    found = document("Once", "-m", variant(generation_config=None), "--stop", " ")["settings"]
    assert (found["temperature"], found["top_p"], found["top_k"], found["max_tokens"]) == (0.8, 0.95, 0, 200)
    assert found["eos"] == [0], "from config.json"


def test_the_models_bad_defaults_are_blamed_on_its_file(toyllm: Any, variant: Any) -> None:
    model = variant(generation_config={"top_p": 7})
    assert toyllm("generate", "Once", "-m", model).error == "generation_config.json: top_p: expected 0 to 1, found 7.0"
    assert toyllm("generate", "Once", "-m", model, "--top-p", "1", "--max-tokens", "1").code == 0


BAD = {
    "--max-tokens": ["-1"],
    "--temperature": ["-1", "nan", "inf"],
    "--top-k": ["-1", "99999999999999999999999"],
    "--top-p": ["1.5", "-0.1", "nan"],
    "--min-p": ["2", "nan"],
    "--repetition-penalty": ["0", "-1", "nan", "1e300"],
    "--presence-penalty": ["nan", "1e300"],
    "--frequency-penalty": ["-inf", "-1e300"],
    "--seed": ["-1", "9223372036854775808"],
    "--stop": [""],
    "--logprobs": ["-1"],
    "--context": ["0", "-5", str(CONTEXT + 1)],
    "--prefill-chunk": ["0"],
    "--threads": ["0", "-1", "100000"],
    "--backend": ["", "gpu"],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in BAD.items() for value in values])
def test_a_value_out_of_bounds_is_one_line_that_names_the_option(toyllm: Any, option: str, value: str) -> None:
    outcome = toyllm("generate", "Once", option, value)
    assert outcome.code == 1
    assert re.match(rf"{option}\b.*expected ", outcome.error)


@pytest.mark.parametrize("option", sorted(BAD))
def test_a_value_of_another_kind_is_wrong_usage(toyllm: Any, option: str) -> None:
    if option in ("--stop", "--backend"):
        pytest.skip("takes any text")
    outcome = toyllm("generate", "Once", option, "some")
    assert outcome.code == 2
    assert f"Invalid value for '{option}'" in outcome.error


# Prompts


def test_a_pipe_is_a_prompt_but_for_its_last_line_end(document: Any) -> None:
    expected = document("Once upon\n a time", "--max-tokens", "0")["prompt_tokens"]
    for arguments in ((), ("-",)):
        for text in (b"Once upon\n a time", b"Once upon\n a time\n"):
            assert document(*arguments, "--max-tokens", "0", stdin=text)["prompt_tokens"] == expected
    assert document("--max-tokens", "0", stdin=b"Once upon\n a time\n\n")["prompt_tokens"] != expected


def test_the_argument_comes_before_the_pipe(document: Any) -> None:
    found = document("Once", "--max-tokens", "0", stdin=b"\xff")["prompt_tokens"]
    assert found == document("--max-tokens", "0", stdin=b"Once")["prompt_tokens"]


def test_an_empty_prompt_begins_with_the_beginning_of_text(document: Any) -> None:
    assert document("--max-tokens", "1", stdin=b"")["prompt_tokens"] == [0]
    assert document("", "--max-tokens", "1")["prompt_tokens"] == [0]


def test_a_pipe_that_is_not_utf8_is_an_error_that_says_where(toyllm: Any) -> None:
    assert (
        toyllm("generate", stdin=b"abc \xff").error == "stdin: byte 4 (0xff): expected UTF-8 (invalid start byte); convert the text first"
    )


def test_nobody_to_ask_is_wrong_usage_with_an_example(toyllm: Any) -> None:
    outcome = toyllm("generate", stdin=None)
    assert outcome.code == 2
    assert 'try: toyllm generate "Once upon a time"' in outcome.error


@pytest.mark.parametrize("given", ["464 329", "464,329", " 464 ,\n329 ", "0464 329"])
def test_ids_are_a_prompt(document: Any, given: str) -> None:
    assert document("--prompt-ids", given, "--max-tokens", "0")["prompt_tokens"] == [464, 329]


@pytest.mark.parametrize(
    ("given", "message"), [("", "no ids given"), (" , ", "no ids given"), ("1 x", "'x' is not a token id"), ("-1", "'-1'")]
)
def test_what_is_no_list_of_ids_is_wrong_usage(toyllm: Any, given: str, message: str) -> None:
    outcome = toyllm("generate", "--prompt-ids", given)
    assert outcome.code == 2
    assert message in outcome.error
    assert "--prompt-ids" in outcome.error


def test_text_and_ids_together_are_wrong_usage(toyllm: Any) -> None:
    outcome = toyllm("generate", "Once", "--prompt-ids", "1")
    assert (outcome.code, "give a text or ids, not both" in outcome.error) == (2, True)


def test_an_id_that_the_model_does_not_have_is_an_error(toyllm: Any) -> None:
    outcome = toyllm("generate", "--prompt-ids", "1 4096 5000")
    assert (outcome.code, outcome.error) == (1, "token id 4096 (number 2 of 3): expected 0 to 4095")


def test_special_tokens_can_be_plain_text(document: Any) -> None:
    assert document("<|endoftext|>", "--max-tokens", "0")["prompt_tokens"] == [0]
    assert len(document("<|endoftext|>", "--max-tokens", "0", "--no-special")["prompt_tokens"]) > 1


# A model without a tokenizer


def test_without_a_tokenizer_ids_go_in_and_out(toyllm: Any, document: Any) -> None:
    found = document("-m", BASELINE, "--prompt-ids", "1 2", "--max-tokens", "4", "--logprobs", "1", *GREEDY)
    assert found["text"] is None
    assert {token["text"] for token in found["tokens"]} == {None}
    assert [token["top_logprobs"][0]["id"] for token in found["tokens"]] == ids(found)
    expected = " ".join(map(str, ids(found)))
    code, out, err = toyllm("generate", "-m", BASELINE, "--prompt-ids", "1 2", "--max-tokens", "4", *GREEDY)
    assert (code, out.split(), err) == (0, expected.split(), "")


def test_without_a_tokenizer_text_is_an_error_that_says_what_works(toyllm: Any) -> None:
    outcome = toyllm("generate", "-m", BASELINE, "Once")
    assert (outcome.code, outcome.error) == (1, f"{BASELINE}: no tokenizer beside the weights; give ids with --prompt-ids")
    outcome = toyllm("generate", "-m", BASELINE, "--prompt-ids", "1", "--stop", "x")
    assert (outcome.code, outcome.error) == (1, "--stop: this model has no tokenizer, so no text to stop at")
    assert "no beginning-of-text token" not in toyllm("generate", "-m", BASELINE).error


# Models that are not there, or not whole


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tales-gtp2", r"tales-gtp2: .* did you mean tales-gpt2"),
        ("no/such", r"no/such: .*`toyllm pull no/such` downloads it"),
        ("./nowhere", r"\./nowhere: no such folder or file"),
        ("", r"no name: "),
        (str(Path(__file__)), r".*: not a \.safetensors file"),
        (str(Path(__file__).parent), r".*: no config\.json, model\.safetensors"),
    ],
)
def test_a_model_that_is_not_there_is_one_line_with_the_next_step(toyllm: Any, model: str, message: str) -> None:
    outcome = toyllm("generate", "Once", "-m", model)
    assert outcome.code == 1
    assert re.match(message, outcome.error)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json beside the weights"),
        ({"model_type": "mamba"}, 'config.json: model_type "mamba" is not supported; toyllm runs gpt2'),
        ({"model_type": "gpt2", "n_embd": 256, "n_head": 3}, "config.json: n_head: 3 does not divide n_embd 256"),
        ({"model_type": "gpt2", "activation_function": "relu"}, "config.json: activation_function: expected gelu_new"),
        ({"model_type": "gpt2", "n_layer": "6"}, 'config.json: n_layer: expected an integer, found "6"'),
        ({"model_type": "gpt2", "layer_norm_epsilon": math.nan}, "config.json: not valid JSON ('layer_norm_epsilon': NaN"),
        ({"model_type": "gpt2"}, "model.safetensors: tensor "),
        ([], "config.json: expected a JSON object, found list"),
    ],
)
def test_a_config_that_does_not_hold_is_one_line(toyllm: Any, variant: Any, config: Any, message: str) -> None:
    outcome = toyllm("generate", "Once", "-m", variant(config=config))
    assert outcome.code == 1
    assert message in outcome.error


def test_damaged_weights_are_an_error_and_no_text(toyllm: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(Path(BASELINE) / "model.safetensors")
    save_file(tensors | {"transformer.ln_f.bias": np.full(24, np.nan, np.float32)}, tmp_path / "model.safetensors")
    shutil.copy(Path(BASELINE) / "config.json", tmp_path)
    code, out, err = toyllm("generate", "-m", str(tmp_path), "--prompt-ids", "1", *GREEDY)
    assert (code, out) == (1, "")
    warning, error = err.splitlines()
    assert warning.endswith("tensor transformer.ln_f.bias holds NaN or infinity; `toyllm check` says where")
    begins = "which begins in norm_f, at position 0"
    assert error.startswith(f"error: no token can be drawn: the logits hold NaN or infinity, {begins}; are the weights damaged?")


# On a terminal


def test_on_a_terminal_the_prompt_comes_first_dimmed_and_the_text_follows(on_terminal: Any, toyllm: Any) -> None:
    arguments = ("generate", "Once upon a time", "--max-tokens", "5", "--seed", "1")
    text = toyllm(*arguments).out
    assert on_terminal(*arguments) == (0, text, "seed 1\n\x1b[2mOnce upon a time\x1b[0m")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_who_wants_no_colour_gets_none(on_terminal: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    _, out, err = on_terminal("generate", "Once", "--max-tokens", "5", "--seed", "1")
    assert err == "seed 1\nOnce"
    assert "\x1b" not in out


def test_control_characters_of_prompt_and_model_are_escaped_on_a_terminal(on_terminal: Any, toyllm: Any, monkeypatch: Any) -> None:
    arguments = ("generate", "a\x1b[31m\u202eb", "--seed", "1", "--logprobs", "1")
    script = [*package.load("tales-gpt2").tokenizer.encode("\x1b\x07\r"), 0] * 2
    monkeypatch.setattr("toyllm.models.sampling.Sampler.next", lambda self, logits: script.pop(0))
    assert toyllm(*arguments).out == "\x1b\x07\r\n", "off a terminal the text is what it is"
    code, out, err = on_terminal(*arguments)
    assert (code, out) == (0, "\\x1b\\x07\\r\n")
    plain = err.replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert r"a\x1b[31m\u202eb" in plain
    assert "\x1b" not in plain


def test_on_a_terminal_with_nothing_to_continue_there_is_an_example(on_terminal: Any) -> None:
    code, out, err = on_terminal("generate")
    assert (code, out) == (2, "")
    assert 'toyllm generate "Once upon a time"' in err


def test_json_on_a_terminal_is_the_document_alone(on_terminal: Any) -> None:
    code, out, err = on_terminal("generate", "Once", "--max-tokens", "2", "--json")
    assert (code, err) == (0, "")
    assert strictly(out)["schema"] == "toyllm.generate/1"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")
def test_a_real_terminal_shows_prompt_and_text_on_one_line(process: Any) -> None:
    ours, theirs = os.openpty()
    child = process("generate", "Once upon a time", "--max-tokens", "5", "--seed", "1", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while chunk := read(ours):
        shown += chunk
    os.close(ours)
    assert child.wait(60) == 0
    assert re.fullmatch(
        rb"(note: compiling[^\n]*\n)?seed 1\r\n(note: compiling[^\n]*\n)?\x1b\[2mOnce upon a time\x1b\[0m[^\n\x1b]+\r\n", shown
    )


def read(terminal: int) -> bytes:
    """What a terminal shows next; nothing once nobody writes to it any more."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


# Interrupts, pipes, disks, cold kernels: in processes of their own


def test_an_interrupt_keeps_the_text_so_far_and_ends_its_line(process: Any, toyllm: Any) -> None:
    arguments = ("generate", "Once upon a time", "--max-tokens", "500", "--seed", "1", "--backend", "numpy")
    child = process(*arguments)
    began = child.stdout.read(10)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in err
    assert [line for line in err.splitlines() if not line.startswith(b"note: ")] == [b"seed 1"]
    assert out.endswith(b"\n")
    whole = toyllm(*arguments[:3], "40", *arguments[4:]).out.encode()
    text = (began + out)[:-1]
    assert whole.startswith(text) or text.startswith(whole[:-1])


def test_an_interrupt_before_the_first_token_leaves_stdout_empty(toyllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **named: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Model, "forward", interrupted)
    assert toyllm("generate", "Once", "--seed", "1") == (130, "", "seed 1\n")
    assert toyllm("generate", "Once", "--seed", "1", "--json") == (130, "", "")


def test_a_reader_that_has_had_enough_ends_the_run_in_peace(process: Any) -> None:
    child = process("generate", "Once upon a time", "--max-tokens", "400", "--seed", "1", "--backend", "numpy")
    assert len(child.stdout.read(20)) == 20
    child.stdout.close()
    assert child.wait(60) == 0
    assert [line for line in child.stderr.read().splitlines() if not line.startswith(b"note: ")] == [b"seed 1"]


def test_a_full_disk_is_one_line(process: Any) -> None:
    with Path("/dev/full").open("wb") as full:
        child = process("generate", "Once", "--max-tokens", "5", *GREEDY, stdout=full)
        assert child.wait(60) == 1
    lines = [line for line in child.stderr.read().splitlines() if not line.startswith(b"note: ")]
    assert len(lines) == 1
    assert re.fullmatch(rb"error: stdout: .*No space left on device.*", lines[0])


@pytest.mark.slow
def test_compiling_is_said_once_with_a_cold_cache_and_never_again(tmp_path: Path, process: Any) -> None:
    def notes() -> list[bytes]:
        child = process(
            "generate", "--prompt-ids", "1 2 3", "--max-tokens", "2", "--json", env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        )
        out, err = child.communicate(timeout=200)
        assert child.returncode == 0
        times = json.loads(out)["timings"]
        assert times["load_s"] + times["prefill_s"] <= times["first_token_s"]
        return err.splitlines()

    (tmp_path / "private").mkdir()
    assert notes() == [b"note: compiling kernels for this processor, once; this takes some seconds"]
    assert notes() == []


def test_the_network_is_never_asked(toyllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert toyllm("generate", "Once", "--max-tokens", "1").code == 0
    assert toyllm("generate", "Once", "-m", "no/such-model").code == 1


def test_files_are_read_ahead_unless_that_is_not_wanted(toyllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read_ahead: list[Path] = []
    monkeypatch.setattr("toyllm.models.preload.read_ahead", lambda paths, progress: read_ahead.extend(paths))
    assert toyllm("generate", "Once", "--max-tokens", "1").code == 0
    assert read_ahead == [TALES / "model.safetensors"]
    assert toyllm("generate", "Once", "--max-tokens", "1", "--no-preload").code == 0
    assert len(read_ahead) == 1


def test_a_stop_in_the_environment_is_one_text(document: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOYLLM_STOP", "a time")
    assert document("Once", "--max-tokens", "1")["settings"]["stop"] == ["a time"]
    assert document("Once", "--max-tokens", "1", "--stop", "x", "--stop", "y")["settings"]["stop"] == ["x", "y"]


def test_subprocesses_start_with_the_same_command() -> None:
    from toyllm.cli.main import main

    assert callable(main)
    assert subprocess.run([shutil.which("toyllm") or "toyllm", "--help"], check=True, capture_output=True).stdout.startswith(
        b"Usage: toyllm"
    )
