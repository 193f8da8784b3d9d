"""Batches: what a sequence says beside others is what it says alone, to the last bit; slots, passes, shared prefixes, refusals."""

import functools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.kernels.errors import OutOfMemory, ToyllmError
from toyllm.models import memory
from toyllm.models.batch import SLOTS, WORTH_SHARING, Answer, Request, answers, common_prefix, sharing, slots_for
from toyllm.models.changes import Change
from toyllm.models.generation import Settings, generate
from toyllm.models.model import Model

GOLDENS = Path(__file__).parent / "goldens"
MODELS = ["tales-gpt2", "tales-gpt-oss", *(str(GOLDENS / name) for name in ("gpt2/baseline", "gpt_oss/baseline", "gpt_oss/experts_bf16"))]
TOGETHER = [1, 2, 3, 8]


@functools.cache
def load(name: str = "tales-gpt2", **settings: Any) -> Model:
    return toyllm.load(name, **settings)


def prompts(model: Model, count: int, longest: int, seed: int = 0) -> list[Request]:
    """Mixed lengths, greedy and sampled, penalties, ends of text and log-probabilities; some begin alike, and some are the same."""
    rng = np.random.default_rng(seed)
    V = model.vocab_size
    stem = rng.integers(0, V, longest // 2).tolist()
    requests = []
    for i in range(count):
        own = rng.integers(0, V, int(rng.integers(1, longest // 2))).tolist()
        ids = stem if i % 5 == 4 else stem[: int(rng.integers(0, longest // 2))] + own if i % 2 else own
        settings = Settings(
            max_tokens=int(rng.integers(0, 16)),
            temperature=(0.0, 0.7, 1.3)[i % 3],
            top_k=(0, 20)[i % 2],
            repetition_penalty=(1.0, 1.3)[i // 2 % 2],
            seed=i,
            eos=tuple(rng.integers(0, V, 2).tolist()),
            logprobs=2,
        )
        requests.append(Request(ids, settings, i))
    return requests


def alone(model: Model, request: Request, context: int | None = None) -> tuple[Any, ...]:
    """Tokens with their log-probabilities, text and ending of a prompt by itself."""
    events = list(generate(model, request.prompt, request.settings, context))
    result = events[-1].result
    assert result
    return tuple(e.token for e in events if e.token), "".join(e.text for e in events), result.finish_reason, result.completion_tokens


def said(answer: Answer) -> tuple[Any, ...]:
    """The same of an answer."""
    assert answer.error is None
    assert answer.result
    return answer.tokens, answer.text, answer.result.finish_reason, answer.result.completion_tokens


def agree(model: Model, requests: list[Request], slots: int, context: int | None = None, one_by_one: Any = None) -> list[Answer]:
    """The answers, found to be what each prompt gives by itself."""
    one_by_one = one_by_one or [alone(model, request, context) for request in requests]
    found = {answer.request.key: answer for answer in answers(model, requests, slots, context)}
    assert [said(found[i]) for i in range(len(requests))] == one_by_one
    return [found[i] for i in range(len(requests))]


@functools.cache
def expected(name: str, **settings: Any) -> tuple[list[Request], list[tuple[Any, ...]]]:
    model = load(name, **settings)
    requests = prompts(model, 16, min(40, model.config.context // 2))
    return requests, [alone(model, request) for request in requests]


@pytest.mark.parametrize("slots", TOGETHER)
@pytest.mark.parametrize("name", MODELS)
def test_together_is_one_by_one_to_the_last_bit(name: str, slots: int) -> None:
    requests, one_by_one = expected(name)
    agree(load(name), requests, slots, one_by_one=one_by_one)


@pytest.mark.parametrize("name", MODELS[:4])
@pytest.mark.parametrize("settings", [{"cache_dtype": "bf16"}, {"weights": "q8"}, {"backend": "portable"}, {"prefill_chunk": 7}])
def test_so_it_is_however_the_model_runs(name: str, settings: dict[str, Any]) -> None:
    requests, one_by_one = expected(name, **settings)
    agree(load(name, **settings), requests, 8, one_by_one=one_by_one)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_more_sequences_than_a_pass_takes_tokens_have_their_turns(chunk: int) -> None:
    requests, one_by_one = expected("tales-gpt-oss")
    agree(load("tales-gpt-oss", prefill_chunk=chunk), requests[:12], 8, one_by_one=one_by_one[:12])


@pytest.mark.parametrize(
    ("name", "settings", "rows"),
    [
        ("tales-gpt2", {"backend": "numpy"}, 1),
        ("tales-gpt-oss", {"backend": "numpy"}, 1),
        ("tales-gpt2", {"attention": "plain"}, 1),
        ("tales-gpt-oss", {"attention": "plain"}, 1),
        ("tales-gpt-oss", {"moe": "budget", "tokens_per_expert_ratio": 0.5}, 11),
        ("tales-gpt2", {"activations": "bf16"}, 15),
        ("tales-gpt-oss", {"activations": "bf16"}, 15),
        ("tales-gpt-oss", {"activations": "bf16", "moe": "budget"}, 11),
    ],
)
def test_arithmetic_that_depends_on_a_pass_keeps_passes_apart(name: str, settings: dict[str, Any], rows: int) -> None:
    """Prompts are long enough for it to show, and more sequences decode than may share a pass."""
    model = load(name, **settings)
    if model.kernels.activations != settings.get("activations", "f32"):
        pytest.skip("no products in bf16 on this processor")
    assert (sharing(model).rows, sharing(model).prompts) == (rows, False)
    count = rows + 3
    requests = [replace(r, settings=replace(r.settings, max_tokens=3, eos=())) for r in prompts(model, count, 50)]
    found = agree(model, requests, count)
    assert sum(answer.result.reused_tokens for answer in found) == 0, "a prefix taken over would have had other passes"  # type: ignore[union-attr]


def test_a_budget_below_12_tokens_is_none() -> None:
    """What `sharing` counts on."""
    model = load("tales-gpt-oss", moe="budget", tokens_per_expert_ratio=0.01)
    model.kernels.mixing.ran.clear()
    cache = model.new_cache(4, sequences=11)
    model.forward([1] * 11, [0] * 11, range(11), cache)
    assert model.kernels.mixing.ran == {"all"}


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from toyllm.kernels.threads import set_threads

    requests, one_by_one = expected("tales-gpt-oss")
    set_threads(1)
    try:
        agree(load("tales-gpt-oss"), requests, 8, one_by_one=one_by_one)
    finally:
        set_threads()


# Stops, ends and lengths


def test_each_sequence_stops_for_itself() -> None:
    model = load()
    text = "".join(e.text for e in generate(model, [3119, 650], Settings(temperature=0, seed=0, max_tokens=30)))
    stops = [(), (text[5:9],), (text[20:24], "nowhere"), (text[3:5],)]
    requests = [Request([3119, 650], Settings(temperature=0, seed=0, max_tokens=30, stop=stop), i) for i, stop in enumerate(stops)]
    found = agree(model, requests, 4)
    assert [len(answer.text) < len(text) for answer in found] == [False, True, True, True]


def test_no_tokens_a_full_context_and_a_prompt_of_one_token() -> None:
    model = load()
    settings = Settings(temperature=0, seed=0, max_tokens=5)
    requests = [Request([7], settings, 0), Request([7] * 10, settings, 1), Request([7] * 8, settings, 2)]
    requests.append(Request([7] * 9, replace(settings, max_tokens=0), 3))
    found = agree(model, requests, 3, context=10)
    assert [answer.result.finish_reason for answer in found if answer.result] == ["length", "context", "context", "length"]


def test_the_cache_need_not_hold_the_context() -> None:
    model = load("tales-gpt-oss")
    requests = [Request([5] * n, Settings(max_tokens=6, seed=n), n) for n in (3, 9, 10)]
    found = {a.request.key: said(a) for a in answers(model, requests, 2, positions=16)}
    assert found == {r.key: alone(model, r) for r in requests}


def test_what_cannot_be_run_is_answered_with_its_error_and_the_others_go_on() -> None:
    model = load(MODELS[2])  # without a tokenizer
    settings = Settings(max_tokens=4, seed=1)
    requests = [Request([1] * 65, settings, "long"), Request([1, 2], settings, "good"), Request([], settings, "empty")]
    requests += [Request([1], replace(settings, top_p=2.0), "top_p"), Request([1], replace(settings, stop=("a",)), "stop")]
    found = {answer.request.key: answer for answer in answers(model, requests, 2)}
    assert said(found["good"]) == alone(model, requests[1])
    messages = {key: str(answer.error) for key, answer in found.items() if answer.error}
    assert messages.keys() == {"long", "empty", "top_p", "stop"}
    assert messages["long"] == "the prompt has 65 tokens and the context 64: shorten the prompt, or raise --context"
    assert messages["top_p"].startswith("--top-p: expected")


def test_damaged_logits_end_one_sequence_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(MODELS[2])
    requests = [Request([n, n + 1], Settings(max_tokens=8, seed=n), n) for n in range(6)]
    forward = Model.forward

    def damaged(self: Model, tokens: Any, positions: Any, sequences: Any, *rest: Any, **named: Any) -> np.ndarray:
        logits = forward(self, tokens, positions, sequences, *rest, **named)
        if len(logits):
            logits[(np.asarray(sequences) == 1)[-len(logits) :] & (np.asarray(positions) == 4)[-len(logits) :]] = np.nan
        return logits

    monkeypatch.setattr(Model, "forward", damaged)
    found = {answer.request.key: answer for answer in answers(model, requests, 3)}
    monkeypatch.undo()
    wrong = [key for key, answer in found.items() if answer.error]
    assert 0 < len(wrong) < 6
    assert all("NaN or infinity" in str(found[key].error) and len(found[key].tokens) == 3 for key in wrong)
    assert all(said(found[r.key]) == alone(model, r) for r in requests if r.key not in wrong)


# Slots and passes


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """What each pass was over: (sequence, position) of its tokens."""
    seen: list[list[tuple[int, int]]] = []
    forward = Model.forward

    def watched(self: Model, tokens: Any, positions: Any, sequences: Any, *rest: Any, **named: Any) -> np.ndarray:
        seen.append(list(zip(map(int, sequences), map(int, positions), strict=True)))
        return forward(self, tokens, positions, sequences, *rest, **named)

    monkeypatch.setattr(Model, "forward", watched)
    return seen


def counted(lengths: list[tuple[int, int]]) -> list[Request]:
    """Prompts of so many tokens, none like another, that bring so many."""
    return [Request([i + 1] * n, Settings(temperature=0, max_tokens=new, seed=0), i) for i, (n, new) in enumerate(lengths)]


def test_one_that_ends_makes_room_for_the_next_at_once(passes: list[list[tuple[int, int]]]) -> None:
    done = [a.request.key for a in answers(load(), counted([(2, 3), (2, 10), (2, 3), (2, 3)]), 2)]
    assert done == [0, 2, 3, 1], "as they are ready"
    assert [len({sequence for sequence, _ in tokens}) for tokens in passes] == [2] * 9 + [1], "no slot waits while there are prompts"


def test_a_request_is_taken_when_there_is_room_and_not_before(passes: list[list[tuple[int, int]]]) -> None:
    taken: list[int] = []

    def endless() -> Iterator[Request]:
        for i in range(10**9):
            taken.append(len(passes))
            yield Request([i + 1], Settings(temperature=0, max_tokens=2, seed=0), i)

    stream = answers(load(), endless(), 2)
    assert [next(stream).request.key for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    assert taken == [0, 0, 2, 2, 4, 4]


def test_prompts_fill_the_passes_that_others_decode_in(passes: list[list[tuple[int, int]]]) -> None:
    list(answers(load(prefill_chunk=8), counted([(2, 12), (20, 2), (3, 2)]), 3))
    assert max(map(len, passes)) == 8
    assert all(len(tokens) == 8 for tokens in passes[:3]), "20 + 3 + 2 tokens, and the first one's decoding"
    assert [(0, 2 + i) in tokens for i, tokens in enumerate(passes[1:])] == [True] * len(passes[1:]), "which never waits"


def test_no_requests_are_no_answers() -> None:
    assert list(answers(load(), [], 4)) == []


def test_less_than_one_sequence_is_refused() -> None:
    with pytest.raises(ToyllmError, match=r"^--batch-size 0: expected at least 1$"):
        answers(load(), [], 0)
    with pytest.raises(ToyllmError, match=r"^--batch-size 0: expected at least 1$"):
        slots_for(load(), 10, 0, 5)


def test_progress_counts_the_tokens_drawn() -> None:
    drawn: list[int] = []
    found = list(answers(load(), counted([(2, 3), (2, 5)]), 2, progress=drawn.append))
    assert sum(drawn) == sum(len(answer.tokens) for answer in found) == 8
    assert drawn == [2, 2, 2, 1, 1]


# Shared prefixes


@pytest.mark.parametrize("name", ["tales-gpt2", "tales-gpt-oss"])
@pytest.mark.parametrize("slots", [3, 8])
def test_samples_of_a_prompt_read_it_once(name: str, slots: int, passes: list[list[tuple[int, int]]]) -> None:
    """Nine samples; whichever slot one gets, all but the prompt's last token is there already."""
    model = load(name, prefill_chunk=16)
    prompt = np.random.default_rng(3).integers(1, model.vocab_size, 40).tolist()
    requests = [Request(prompt, Settings(max_tokens=5, seed=i), i) for i in range(9)]
    found = agree(model, requests, slots)
    reused = [answer.result.reused_tokens for answer in found if answer.result]
    assert reused[0] == 0
    if name == "tales-gpt2" or slots == 8:
        assert reused[1:] == [39] * 8


def test_a_prompt_waits_for_what_another_is_about_to_read(passes: list[list[tuple[int, int]]]) -> None:
    model = load(prefill_chunk=8)
    stem = list(range(1, 31))
    requests = [Request([*stem, 40 + i] * (1 + i % 2), Settings(temperature=0, max_tokens=3, seed=0), i) for i in range(4)]
    found = list(answers(model, requests, 4))
    assert sorted(answer.result.reused_tokens for answer in found if answer.result) == [0, 30, 30, 30]
    assert all({sequence for sequence, _ in tokens} == {0} for tokens in passes[:4]), "the first 30 tokens are read once"
    assert max(position for _, position in passes[3]) == 29, "its pass ends where the others take over"
    agree(model, requests, 4)


def test_a_few_tokens_in_common_are_not_worth_waiting_for(passes: list[list[tuple[int, int]]]) -> None:
    common = list(range(1, WORTH_SHARING))
    requests = [Request([*common, 100 + i, 7], Settings(temperature=0, max_tokens=2, seed=0), i) for i in range(3)]
    found = list(answers(load(), requests, 3))
    assert [answer.result.reused_tokens for answer in found if answer.result] == [0, 0, 0]
    assert {sequence for sequence, _ in passes[0]} == {0, 1, 2}


def test_common_prefixes() -> None:
    assert [common_prefix(a, b) for a, b in [("", ""), ("a", ""), ("ab", "ab"), ("abc", "abd"), ("ab", "abc"), ("ba", "ab")]] == [  # type: ignore[arg-type]
        0, 0, 2, 2, 2, 0,
    ]  # fmt: skip


# Changes


def test_changes_are_made_in_every_sequence() -> None:
    model = load().changed([Change("scale", "blocks.2.attn.heads", np.float32(0.5))], 4, 30)
    requests = [Request([3119, 650, 259, 540], Settings(max_tokens=8, seed=i), i) for i in range(5)]
    found = agree(model, requests, 3)
    assert [said(answer) for answer in found] != [alone(load(), request) for request in requests]


# Memory


def test_memory_is_what_was_foretold() -> None:
    for name in MODELS:
        for dtype in ("f32", "bf16"):
            model = load(name, cache_dtype=dtype)
            for slots, positions in ((1, 10), (3, 64), (8, 33)):
                foretold = memory.total(memory.of_model(model, positions, slots), "cache")
                assert model.new_cache(positions, sequences=slots).nbytes == foretold == model.cache_bytes(positions, slots)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make so much memory free for KV caches."""
    return lambda nbytes: monkeypatch.setattr(Model, "free_for_cache", lambda self: nbytes)


def test_slots_are_as_many_as_wanted_and_asked_for(free: Any) -> None:
    model = load()
    free(None)
    assert [slots_for(model, 100, *given) for given in ((None, 100), (None, 3), (20, 100), (20, 7), (None, 0))] == [SLOTS, 3, 20, 7, 1]


def test_slots_are_reduced_to_what_fits_and_that_is_said(free: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = load()
    free(model.cache_bytes(512, 3) + 5)
    with caplog.at_level(logging.INFO, "toyllm"):
        assert slots_for(model, 512, None, 100) == 3
    (said_,) = caplog.messages
    assert said_.startswith("batch size reduced from 8 to 3: the KV caches take 0.05 GB for 8 sequences of 512 positions, 0.02 GB are free")


def test_more_than_fits_is_refused_with_the_figures(free: Any) -> None:
    model = load()
    free(model.cache_bytes(512, 3) + 5)
    with pytest.raises(OutOfMemory, match=r"^--batch-size 9: the KV caches take 0\.06 GB for 9 sequences .*; try --batch-size 3$"):
        slots_for(model, 512, 9, 100)
    free(10)
    with pytest.raises(OutOfMemory, match=r"^not even one sequence fits in memory: .*; try a smaller --context$"):
        slots_for(model, 512, None, 100)


# The whole


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tales-gpt2", "tales-gpt-oss"])
def test_two_hundred_prompts_of_mixed_length_through_eight_slots(name: str) -> None:
    model = load(name)
    agree(model, prompts(model, 200, 120, seed=1), 8)
