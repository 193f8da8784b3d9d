"""A generation whose context is full: what goes, what is said of it, and that what follows is a plain run over what stayed."""

import tracemalloc
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import toyllm
from toyllm.kernels.errors import ToyllmError
from toyllm.models.cache import CausalCache
from toyllm.models.generation import Event, Settings, generate, shortened
from toyllm.models.held import Held, Shift
from toyllm.models.model import Model
from toyllm.models.sampling import Sampler

GREEDY = Settings(temperature=0, seed=0, max_tokens=200)
LOADED: dict[str, Model] = {}


def tales(name: str = "tales-gpt2") -> Model:
    if name not in LOADED:
        LOADED[name] = toyllm.load(name, poison_cache=True)
    return LOADED[name]


def some_ids(model: Model, n: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.vocab_size, n).tolist()


def ids_of(events: list[Event]) -> list[int]:
    return [event.token.id for event in events if event.token]


@pytest.mark.parametrize(("keep", "length"), [(0, 1), (1, 20), (13, 48), (45, 20)])
def test_gpt2_goes_on_as_a_plain_run_over_the_ids_that_are_kept(keep: int, length: int) -> None:
    """The definition, token by token: each is the likeliest after all that is in the context, read from position 0 on."""
    model, room = tales(), 48
    text, expected = some_ids(model, length), []
    for _ in range(80):
        if len(text) > room:
            coming = text.pop()
            del text[keep : keep + (len(text) - keep) // 2]
            text.append(coming)
        held = Held(model, room)
        token = int(held.read(text)[0].argmax())
        expected.append(token)
        text.append(token)
    events = list(generate(model, some_ids(model, length), replace(GREEDY, max_tokens=80), room, keep=keep))
    assert ids_of(events) == expected
    result = events[-1].result
    assert result
    assert (result.finish_reason, result.completion_tokens) == ("length", 80)


def test_each_shift_is_told_before_the_token_that_it_makes_room_for() -> None:
    events = list(tales().generate(some_ids(tales(), 10), replace(GREEDY, max_tokens=100), 40, keep=4))
    at = [i for i, event in enumerate(events) if event.shift]
    assert [events[i].shift for i in at] == [Shift(40, 4, 18, 18)] * 4
    assert [sum(1 for event in events[:i] if event.token) for i in at] == [31, 49, 67, 85], "room for 40, and for 18 more each time"
    assert all(event.token is None and not event.text and event.result is None for event in events if event.shift)
    assert events[-1].result
    assert (events[-1].result.context_shifts, events[-1].result.dropped_tokens) == (4, 72)


def test_without_it_the_context_is_the_end_and_nothing_is_counted() -> None:
    events = list(generate(tales(), some_ids(tales(), 10), GREEDY, 40))
    result = events[-1].result
    assert result
    assert (result.finish_reason, result.completion_tokens) == ("context", 30)
    assert (result.context_shifts, result.dropped_tokens) == (None, None)
    assert not any(event.shift for event in events)


def test_where_there_is_room_it_changes_nothing() -> None:
    prompt = some_ids(tales(), 10)
    events, plain = (list(generate(tales(), prompt, GREEDY, 300, keep=keep)) for keep in (3, None))
    assert ids_of(events) == ids_of(plain)
    assert events[-1].result
    assert (events[-1].result.context_shifts, events[-1].result.dropped_tokens) == (0, 0)


@pytest.mark.parametrize(("length", "gone"), [(40, 0), (41, 20), (60, 29), (100, 74), (1000, 967)])
def test_a_prompt_that_is_too_long_loses_what_a_full_context_would(length: int, gone: int) -> None:
    model, prompt = tales(), some_ids(tales(), length)
    events = list(generate(model, prompt, replace(GREEDY, max_tokens=5), 40, keep=1))
    left = [*prompt[:1], *prompt[1 + gone :]]
    assert shortened(prompt, 40, 1) == left
    assert (events[0].shift == Shift(40, 1, gone, len(left) - 1)) == bool(gone)
    assert events[-1].result
    assert (events[-1].result.prompt_tokens, events[-1].result.context_shifts) == (len(left), 1)
    if gone:
        assert ids_of(events) == ids_of(list(generate(model, left, replace(GREEDY, max_tokens=5), 300)))


@pytest.mark.parametrize(("keep", "room"), [(-1, 40), (39, 40), (40, 40), (10**9, 40), (0, 1)])
def test_a_context_with_nothing_to_drop_is_refused_before_anything_runs(keep: int, room: int) -> None:
    with pytest.raises(
        ToyllmError, match=rf"\A--keep {keep}: expected 0 to {room - 2}, so that a context of {room} has something to drop\Z"
    ):
        generate(tales(), [1], GREEDY, room, keep=keep)


def test_gpt_oss_goes_on_over_what_it_has_read_and_stays_finite() -> None:
    model, room = tales("tales-gpt-oss"), 300
    held = Held(model, room)
    events = list(generate(model, some_ids(model, 10), replace(GREEDY, max_tokens=900, logprobs=0), held=held, keep=5))
    assert events[-1].result
    assert (events[-1].result.completion_tokens, events[-1].result.context_shifts) == (900, 5)
    assert all(event.token.logprob is not None and np.isfinite(event.token.logprob) for event in events if event.token)
    tokens = ids_of(events)
    assert held.text == some_ids(model, 10)[:5] + tokens[-len(held.text) + 5 :]


def test_penalties_act_on_what_is_in_the_context_and_not_on_what_has_left_it() -> None:
    sampler = Sampler(replace(GREEDY, frequency_penalty=1.0), [3, 3, 5], 8)
    sampler.forget([3, 5])
    logits = np.zeros(8, np.float32)
    logits[[3, 5]] = 1.5, 0.75
    assert sampler.next(logits) == 5, "3 is there once still"
    assert sampler._counts.tolist() == [0, 0, 0, 1, 0, 1, 0, 0]


def test_the_counts_of_a_long_run_are_those_of_its_context() -> None:
    model, held = tales(), Held(tales(), 40)
    events = generate(model, some_ids(model, 10), replace(GREEDY, temperature=1.0, repetition_penalty=1.3), held=held, keep=4)
    sampler = None
    for event in events:
        run: Any = events.gi_frame.f_locals["run"] if events.gi_frame else None
        sampler = run._sampler if run else sampler
        if event.token and sampler:
            expected = np.bincount(held.text, minlength=model.vocab_size)
            np.testing.assert_array_equal(sampler._counts, expected)
    assert sampler


class Endless:
    """A stand-in for a model, whose next token is the one before and 7 more; its cache turns keys by leaving them as they are."""

    tokenizer, vocab_size = None, 300
    files, config = SimpleNamespace(name="endless"), SimpleNamespace(context=64)

    def new_cache(self, context: int) -> CausalCache:
        return CausalCache(1, 1, 1, 1, context, context, shift=lambda layer, key, offsets: key)

    def forward(self, tokens: Any, positions: Any, sequences: Any, cache: CausalCache, out: np.ndarray | None = None) -> np.ndarray:
        cache.start_forward(positions, sequences)
        logits = np.zeros((1, self.vocab_size), np.float32) if out is None else out
        logits[:] = 0
        logits[:, (tokens[-1] + 7) % self.vocab_size] = 9
        return logits


def test_memory_stays_flat_over_twenty_thousand_tokens() -> None:
    model: Any = Endless()
    settings = Settings(max_tokens=20_000, seed=4, repetition_penalty=1.1, logprobs=2)
    events = generate(model, [1, 2, 3], settings, keep=2)
    for _ in range(5000):
        next(events)
    tracemalloc.start()
    try:
        for _ in range(100):
            next(events)
        before, _ = tracemalloc.get_traced_memory()
        *_, last = deque(events, maxlen=1)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert last.result.completion_tokens == 20_000
    assert last.result.context_shifts == last.result.dropped_tokens // 31 > 600
    assert after - before < 20_000, "a byte a token"
