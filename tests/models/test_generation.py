"""Generation: where settings come from, when a text ends, what of it is certain, and that the loop is the model's own arithmetic."""

import json
import re
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.threads import max_threads, set_threads
from toyllm.models.config import GenerationDefaults
from toyllm.models.generation import BOUNDS, Event, Settings, Token, Writer, check_settings, encode_prompt, generate, settings_for
from toyllm.models.location import ModelFiles
from toyllm.models.model import Model
from toyllm.models.tokenizer import Tokenizer, byte_characters, load_tokenizer

# Where settings come from

CONFIG = SimpleNamespace(eos_token_id=(7,), bos_token_id=(7,))


def test_without_a_word_the_settings_are_the_documented_defaults() -> None:
    settings = settings_for(GenerationDefaults(), CONFIG, {})
    assert replace(settings, seed=None) == Settings(eos=(7,))
    documented = {"max_tokens": 200, "temperature": 0.8, "top_k": 0, "top_p": 0.95, "min_p": 0.0}
    assert documented.items() <= vars(settings).items()


def test_the_file_overrides_the_defaults_and_an_option_overrides_the_file() -> None:
    file = GenerationDefaults(
        temperature=0.5, top_k=40, top_p=0.9, min_p=0.1, repetition_penalty=1.2, max_new_tokens=9, eos_token_id=(1, 2)
    )
    settings = settings_for(file, CONFIG, {"top_k": 3, "min_p": 0.0, "seed": 5, "stop": None})
    expected = Settings(
        max_tokens=9, temperature=0.5, top_k=3, top_p=0.9, min_p=0.0, repetition_penalty=1.2, seed=5, eos=(1, 2)
    )  # of each two, the later wins, zero or not
    assert settings == expected


def test_do_sample_false_is_greedy_unless_a_temperature_is_asked_for() -> None:
    file = GenerationDefaults(do_sample=False, temperature=0.7)
    assert settings_for(file, CONFIG, {}).temperature == 0
    assert settings_for(file, CONFIG, {"temperature": 0.3}).temperature == 0.3
    assert settings_for(replace(file, do_sample=True), CONFIG, {}).temperature == 0.7
    assert settings_for(replace(file, do_sample=None), CONFIG, {}).temperature == 0.7


def test_ends_of_text_come_from_the_generation_config_else_from_the_config() -> None:
    assert settings_for(GenerationDefaults(), CONFIG, {}).eos == (7,)
    assert settings_for(GenerationDefaults(eos_token_id=(8, 9)), CONFIG, {}).eos == (8, 9)
    assert settings_for(GenerationDefaults(eos_token_id=()), CONFIG, {}).eos == ()


def test_a_seed_is_drawn_where_none_is_given_and_a_new_one_each_time() -> None:
    seeds = {settings_for(GenerationDefaults(), CONFIG, {}).seed for _ in range(5)}
    assert len(seeds) > 1
    assert all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)
    assert settings_for(GenerationDefaults(), CONFIG, {"seed": 0}).seed == 0


INF, NAN = float("inf"), float("nan")
WRONG = {
    "max_tokens": [-1],
    "temperature": [-0.1, INF, NAN],
    "top_k": [-1, 2**31],
    "top_p": [-0.01, 1.01, NAN],
    "min_p": [-0.01, 1.01, NAN],
    "repetition_penalty": [0.0, -1.0, 1e-10, 1e10, INF, NAN],
    "presence_penalty": [-INF, 1e10, NAN],
    "frequency_penalty": [INF, -1e10, NAN],
    "seed": [-1, 2**63],
    "stop": [("",), ("a", "")],
    "logprobs": [-1],
}
RIGHT = {
    "max_tokens": [0, 10**9],
    "temperature": [0, 1e-9, 1e9],
    "top_k": [0, 2**31 - 1],
    "top_p": [0, 1],
    "min_p": [0, 1],
    "repetition_penalty": [1e-9, 1, 1e9],
    "presence_penalty": [-2, 0, 2],
    "frequency_penalty": [-2, 0, 2],
    "seed": [0, 2**63 - 1],
    "stop": [(), (" ",)],
    "logprobs": [0, 10**6],
}


def test_every_bound_is_tried_here() -> None:
    assert WRONG.keys() == RIGHT.keys() == BOUNDS.keys()
    assert Settings.__dataclass_fields__.keys() - BOUNDS.keys() == {"eos"}  # checked where the configuration is read


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_setting_out_of_bounds_is_one_line_that_names_it(name: str, value: Any) -> None:
    option = "--" + name.replace("_", "-")
    with pytest.raises(ToyllmError, match=rf"\A{option}: expected [^\n]+, found [^\n]*\Z"):
        check_settings(replace(Settings(), **{name: value}))
    with pytest.raises(ToyllmError, match=rf"\A{option}: expected"):
        settings_for(GenerationDefaults(), CONFIG, {name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RIGHT.items() for value in values])
def test_a_setting_at_its_bounds_is_taken(name: str, value: Any) -> None:
    assert getattr(check_settings(replace(Settings(), **{name: value})), name) == value


def test_a_wrong_value_in_the_file_is_blamed_on_the_file_and_may_be_overridden() -> None:
    with pytest.raises(ToyllmError, match=r"\Ageneration_config\.json: top_p: expected 0 to 1, found 1\.5"):
        settings_for(GenerationDefaults(top_p=1.5), CONFIG, {})
    assert settings_for(GenerationDefaults(top_p=1.5), CONFIG, {"top_p": 0.5}).top_p == 0.5


# A model that says what it is told, over a tokenizer whose token i is byte i


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("bytes")
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(byte_characters())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = load_tokenizer(ModelFiles("bytes", folder, None, None, None, None, None, folder / "vocab.json", folder / "merges.txt"))
    assert tokenizer is not None
    return tokenizer


EOS = 256


class Parrot:
    """A stand-in for a model: its likeliest tokens, one after the other, are those of a script; id 256 ends the text."""

    def __init__(self, script: bytes | list[int], tokenizer: Tokenizer | None, context: int = 1000) -> None:
        self.script, self.tokenizer, self.vocab_size = [*script], tokenizer, 257
        self.config = SimpleNamespace(context=context, bos_token_id=(), eos_token_id=(EOS,))
        self.files, self.defaults = SimpleNamespace(name="parrot"), GenerationDefaults()
        self.fed: list[tuple[int, int]] = []
        self.prefill_chunk = 512

    def new_cache(self, context: int) -> int:
        return context

    def forward(self, tokens: Any, positions: Any, sequences: Any, cache: int, out: np.ndarray | None = None) -> np.ndarray:
        self.fed += zip((int(t) for t in tokens), (int(p) for p in positions), strict=True)
        assert max(positions) < cache
        logits = np.zeros((1, self.vocab_size), np.float32) if out is None else out
        logits[:] = 0
        logits[0, self.script.pop(0) if self.script else ord(".")] = 1
        return logits


GREEDY = Settings(temperature=0, eos=(EOS,), seed=0)


def say(
    script: bytes | list[int], tokenizer: Tokenizer | None, prompt: int = 2, context: int | None = None, **settings: Any
) -> list[Event]:
    model: Any = Parrot(script, tokenizer)
    events = list(generate(model, [1] * prompt, replace(GREEDY, **settings), context))
    tokens = [event.token.id for event in events if event.token]
    fed = [(1, i) for i in range(prompt)] + [(token, prompt + i) for i, token in enumerate(tokens[:-1])]
    assert model.fed == fed, "each token goes in once, in its place, and the last not at all"
    return events


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def ids_of(events: list[Event]) -> list[int]:
    return [event.token.id for event in events if event.token]


def reason_of(events: list[Event]) -> str:
    assert [event.result is not None for event in events] == [False] * (len(events) - 1) + [True], "the last event, and only it"
    assert events[-1].result
    assert events[-1].result.completion_tokens == len(ids_of(events))
    return events[-1].result.finish_reason


def test_end_of_text_stops_counts_as_a_token_and_is_no_text(raw: Tokenizer) -> None:
    events = say([*b"The end.", EOS, *b"more"], raw)
    assert (reason_of(events), text_of(events), ids_of(events)) == ("stop", "The end.", [*b"The end.", EOS])


def test_any_of_several_ends_of_text_stops(raw: Tokenizer) -> None:
    events = say(b"one, two", raw, eos=(EOS, ord(",")))
    assert (reason_of(events), text_of(events), ids_of(events)) == ("stop", "one", [*b"one,"])


def test_max_tokens_ends_with_length(raw: Tokenizer) -> None:
    events = say(b"abcdef", raw, max_tokens=3)
    assert (reason_of(events), text_of(events), ids_of(events)) == ("length", "abc", [*b"abc"])


def test_no_tokens_are_no_tokens(raw: Tokenizer) -> None:
    events = say(b"abc", raw, max_tokens=0)
    assert (reason_of(events), text_of(events), len(events)) == ("length", "", 1)


def test_the_context_ends_with_context(raw: Tokenizer) -> None:
    events = say(b"abcdef", raw, prompt=4, context=7)
    assert (reason_of(events), text_of(events)) == ("context", "abc")


def test_a_prompt_that_fills_the_context_leaves_room_for_nothing(raw: Tokenizer) -> None:
    events = say(b"abc", raw, prompt=7, context=7)
    assert (reason_of(events), text_of(events), len(events)) == ("context", "", 1)
    assert reason_of(say(b"abc", raw, prompt=7, context=7, max_tokens=0)) == "length"


def test_where_both_run_out_together_it_is_the_length(raw: Tokenizer) -> None:
    assert reason_of(say(b"abc", raw, prompt=4, context=7, max_tokens=3)) == "length"


def test_the_end_of_text_on_the_last_token_is_a_stop(raw: Tokenizer) -> None:
    assert reason_of(say([*b"ab", EOS], raw, max_tokens=3)) == "stop"


def test_a_prompt_longer_than_the_context_is_refused_at_once_with_both_numbers(raw: Tokenizer) -> None:
    model: Any = Parrot(b"abc", raw, context=9)
    with pytest.raises(ToyllmError, match=r"the prompt has 10 tokens and the context 9: .* --context"):
        generate(model, [1] * 10, GREEDY)
    with pytest.raises(ToyllmError, match="the prompt has 5 tokens and the context 4"):
        generate(model, [1] * 5, GREEDY, 4)
    assert model.fed == []


def test_settings_and_stops_are_checked_before_anything_runs(raw: Tokenizer) -> None:
    model: Any = Parrot(b"abc", None)
    with pytest.raises(ToyllmError, match="--stop: this model has no tokenizer"):
        generate(model, [1], replace(GREEDY, stop=("a",)))
    with pytest.raises(ToyllmError, match="--top-p: expected"):
        generate(model, [1], replace(GREEDY, top_p=2.0))
    assert model.fed == []


def test_without_a_tokenizer_ids_are_the_text() -> None:
    events = say([5, 250, 7, EOS], None)
    assert (text_of(events), ids_of(events), reason_of(events)) == ("5 250 7 ", [5, 250, 7, EOS], "stop")


def test_damaged_logits_are_an_error_while_running(raw: Tokenizer) -> None:
    model: Any = Parrot(b"abc", raw)
    forward = model.forward
    model.forward = lambda *args, taps=None, **named: forward(*args, **named) * np.float32(np.nan)
    with pytest.raises(ToyllmError, match="NaN or infinity"):
        list(generate(model, [1], GREEDY))


# Stop strings


@pytest.mark.parametrize(
    ("script", "stops", "text"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("o",), ""),
        ("one two three", ("three",), "one two "),
        ("aaab", ("aab",), "a"),  # the beginning of the stop repeats
        ("abababc", ("ababc",), "ab"),
        ("one two three", ("three", "two"), "one "),  # the one that comes first in the text, not in the list
        ("one two", (" t", "one tw"), "one"),  # complete first
        ("one two", ("two", "e two"), "on"),  # complete together: the longer
        ("α\nβ\nγ", ("\nγ", "β\nδ"), "α\nβ"),
        ("👋🏽 hi", ("🏽",), "👋"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(raw: Tokenizer, script: str, stops: tuple[str, ...], text: str) -> None:
    events = say(script.encode(), raw, stop=stops)
    assert (reason_of(events), text_of(events)) == ("stop", text)
    shown = [event.text for event in events]
    assert all(text.startswith("".join(shown[:n])) for n in range(len(shown))), "nothing is shown that a stop takes back"


def test_a_stop_string_in_the_middle_of_a_token_cuts_the_token_but_keeps_its_id() -> None:
    model = tales()
    ids = encode_prompt(model, " house")  # one token
    assert len(ids) == 1
    parrot: Any = Parrot([], model.tokenizer)
    parrot.vocab_size, parrot.script = model.vocab_size, [*ids, 0]
    events = list(generate(parrot, [1], replace(GREEDY, stop=("us",), eos=(0,))))
    assert (ids_of(events), text_of(events), reason_of(events)) == (ids, " ho", "stop")


def test_what_a_stop_string_might_have_been_is_shown_in_the_end(raw: Tokenizer) -> None:
    for ending in ([EOS], []):
        events = say([*b"one tw", *ending], raw, stop=("two",), max_tokens=6 + len(ending))
        assert text_of(events) == "one tw"
        assert reason_of(events) == ("stop" if ending else "length")
        assert events[-1].text == "tw", "held until then"


def test_a_stop_string_that_only_the_tail_completes_stops_too(raw: Tokenizer) -> None:
    events = say([*b"ab", 0xF0], raw, stop=("b\ufffd",), max_tokens=3)
    assert (text_of(events), reason_of(events)) == ("a", "stop")


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The definition: read character by character, and end before the longest stop as soon as one is complete."""
    for n in range(1, len(text) + 1):
        if complete := [stop for stop in stops if text[:n].endswith(stop)]:
            return text[: n - max(map(len, complete))], True
    return text, False


@hypothesis_settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.text("abx", min_size=1, max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stops_cut_the_same_text_whatever_tokens_it_came_in(pieces: list[str], stops: list[str]) -> None:
    table = dict(enumerate(pieces))
    stream = SimpleNamespace(push=table.__getitem__, finish=lambda: "")
    model: Any = SimpleNamespace(tokenizer=SimpleNamespace(stream=lambda: stream))
    writer, shown = Writer(model, tuple(stops)), ""
    expected, stopped = cut("".join(pieces), tuple(stops))
    for i in table:
        shown += writer.push(i)
        assert expected.startswith(shown)
        if writer.stopped:
            break
    assert (shown + writer.finish(), writer.stopped) == (expected, stopped)


# Characters


def test_a_character_streams_when_its_last_byte_has_come(raw: Tokenizer) -> None:
    events = say("a👋é".encode(), raw, max_tokens=7)
    assert [event.text for event in events] == ["a", "", "", "", "👋", "", "é", ""]


def test_a_character_that_never_becomes_whole_is_shown_in_the_end(raw: Tokenizer) -> None:
    events = say("a👋".encode()[:-1], raw, max_tokens=4)
    assert [event.text for event in events] == ["a", "", "", "", "\ufffd"]


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.binary(max_size=12) | st.text(max_size=4).map(str.encode))
def test_nothing_is_lost_and_nothing_said_twice(raw: Tokenizer, script: bytes) -> None:
    events = say(script, raw, max_tokens=len(script))
    assert text_of(events) == script.decode("utf-8", "replace") == raw.decode(ids_of(events))


# Prompts


def test_a_prompt_is_text_or_ids(raw: Tokenizer) -> None:
    model: Any = Parrot(b"", raw)
    assert encode_prompt(model, "hé") == [*"hé".encode()]
    assert encode_prompt(model, [3, 256]) == [3, 256]
    assert encode_prompt(model, np.array([3, 256])) == [3, 256]


def test_an_empty_text_begins_with_the_beginning_of_text_where_there_is_one(raw: Tokenizer) -> None:
    model: Any = Parrot(b"", raw)
    with pytest.raises(ToyllmError, match="the prompt is empty, and this model has no beginning-of-text token"):
        encode_prompt(model, "")
    with pytest.raises(ToyllmError, match="the prompt is empty"):
        encode_prompt(model, [])
    model.config.bos_token_id = (9, 8)
    assert encode_prompt(model, "") == [9]
    model.defaults = GenerationDefaults(bos_token_id=(7,))
    assert encode_prompt(model, "") == [7], "generation_config.json's, where both name one"


def test_bad_prompts_are_refused(raw: Tokenizer) -> None:
    model: Any = Parrot(b"", raw)
    with pytest.raises(ToyllmError, match=r"token id 257 \(number 2 of 3\): expected 0 to 256"):
        encode_prompt(model, [1, 257, 999])
    with pytest.raises(ToyllmError, match="token id -1"):
        encode_prompt(model, [-1])
    with pytest.raises(ToyllmError, match="ids: expected integers of 64 bits, found float64"):
        encode_prompt(model, [1.5])
    model.tokenizer = None
    with pytest.raises(ToyllmError, match="parrot: no tokenizer beside the weights; give ids with --prompt-ids"):
        encode_prompt(model, "text")


# The real thing


MODELS: dict[tuple[Any, ...], Model] = {}


def tales(**options: Any) -> Model:
    key = tuple(sorted(options.items()))
    if key not in MODELS:
        MODELS[key] = toyllm.load("tales-gpt2", **options)
    return MODELS[key]


@pytest.fixture(autouse=True)
def default_threads() -> Iterator[None]:
    yield
    set_threads()


PROMPT = "Once upon a time there was a king who had three sons, and the youngest"


def continued(model: Model, settings: Settings, prompt: str = PROMPT) -> list[Token]:
    return [event.token for event in model.generate(prompt, settings) if event.token]


def test_a_seed_gives_the_same_tokens_whatever_the_threads_and_the_chunks() -> None:
    settings = Settings(max_tokens=40, temperature=1.0, seed=11)
    expected = [token.id for token in continued(tales(), settings)]
    assert len(set(expected)) > 10
    for options in ({}, {"prefill_chunk": 1}, {"prefill_chunk": 3}, *({"threads": n} for n in range(1, max_threads() + 1))):
        assert [token.id for token in continued(toyllm.load("tales-gpt2", **options), settings)] == expected, options
    assert [token.id for token in continued(tales(), replace(settings, seed=12))] != expected


def test_the_drawn_seed_reproduces_the_text() -> None:
    model = tales()
    settings = settings_for(model.defaults, model.config, {"max_tokens": 20, "temperature": 1.5})
    assert continued(model, settings) == continued(model, replace(Settings(), **vars(settings)))


def test_the_model_decides_each_token_by_the_logits_of_all_before_it() -> None:
    """Greedy through the loop, against one full pass over what came out."""
    model = tales()
    prompt = encode_prompt(model, PROMPT)
    ids = [token.id for token in continued(model, Settings(max_tokens=30, temperature=0))]
    logits = model.logits(prompt + ids)
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == ids


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs_are_those_of_the_raw_logits_whatever_the_settings(temperature: float) -> None:
    model = tales()
    prompt = encode_prompt(model, PROMPT)
    settings = Settings(max_tokens=20, temperature=temperature, top_k=30, repetition_penalty=2.0, presence_penalty=1.0, logprobs=4, seed=3)
    tokens = continued(model, settings)
    logits = model.logits(prompt + [token.id for token in tokens])[len(prompt) - 1 : -1].astype(np.float64)
    exact = logits - logits.max(-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    assert any(token.id != token.top[0][0] for token in tokens), "or the settings changed nothing"
    for token, row in zip(tokens, exact, strict=True):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        assert [i for i, _ in token.top] == np.argsort(-row, kind="stable")[:4].tolist()
        assert [p for _, p in token.top] == pytest.approx(np.sort(row)[::-1][:4].tolist(), abs=1e-4)


def test_without_logprobs_a_token_has_none() -> None:
    assert {(token.logprob, token.top) for token in continued(tales(), Settings(max_tokens=3, seed=0))} == {(None, ())}
    assert all(token.logprob is not None and token.top == () for token in continued(tales(), Settings(max_tokens=3, seed=0, logprobs=0)))


def test_the_result_counts_and_times() -> None:
    event = list(tales().generate(PROMPT, Settings(max_tokens=5, seed=0)))[-1]
    assert event.result
    assert (event.result.prompt_tokens, event.result.completion_tokens) == (len(encode_prompt(tales(), PROMPT)), 5)
    assert event.result.prefill_s > 0
    assert event.result.decode_s > 0
    assert event.result.kernels_s >= 0


def test_a_token_costs_no_new_buffer() -> None:
    """NumPy reports its arrays to tracemalloc. A row of logits is 16 kB; the embedding of one token, while it is widened, a few."""
    events = tales().generate(PROMPT, Settings(max_tokens=60, seed=4, repetition_penalty=1.1, logprobs=2))
    for _ in range(5):
        next(events)
    tracemalloc.start()
    try:
        next(events)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        assert sum(1 for _, event in zip(range(50), events, strict=False) if event.token) == 50
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - after < 12_000
    assert after - before < 9_000, "the ids that the cache holds, and small blocks that NumPy keeps for the next array"


def test_an_abandoned_generation_leaves_the_model_as_it_was() -> None:
    model, settings = tales(), Settings(max_tokens=10, seed=2)
    expected = continued(model, settings)
    events = model.generate("Another story", settings)
    next(events)
    next(events)
    assert continued(model, settings) == expected
    assert re.fullmatch(r"(?s).+", text_of(list(events))), "and goes on where it was, beside the other"
