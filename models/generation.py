"""Generation: settings, the loop from a prompt's logits to its continuation, and when it ends."""

import math
import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.errors import ToyllmError
from ..kernels.jit import preparing_seconds
from .config import GenerationDefaults
from .held import Held, Shift
from .model import check_ids
from .nonfinite import NotFinite, explained
from .sampling import Sampler, logprobs

if TYPE_CHECKING:
    from .model import Model


@dataclass(frozen=True)
class Settings:
    """How to continue a prompt; the penalties act on the whole context, the prompt included."""

    max_tokens: int = 200
    temperature: float = 0.8  # 0 takes the likeliest token, ties to the lowest id
    top_k: int = 0  # 0 is off
    top_p: float = 0.95  # 1 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # 1 is off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None draws one
    stop: tuple[str, ...] = ()
    eos: tuple[int, ...] = ()  # ids that end the text
    logprobs: int | None = None  # how many alternatives to report beside each token's own; None reports nothing


BOUNDS = {  # setting -> (what is allowed, in words; the test); penalties within 1e9 keep f32 logits finite
    "max_tokens": ("0 or more", lambda v: v >= 0),
    "temperature": ("a finite number from 0", lambda v: 0 <= v < math.inf),
    "top_k": ("0 (off) to 2^31 - 1", lambda v: 0 <= v < 2**31),
    "top_p": ("0 to 1", lambda v: 0 <= v <= 1),
    "min_p": ("0 to 1", lambda v: 0 <= v <= 1),
    "repetition_penalty": ("1e-9 to 1e9, 1 is off", lambda v: 1e-9 <= v <= 1e9),
    "presence_penalty": ("-1e9 to 1e9", lambda v: abs(v) <= 1e9),
    "frequency_penalty": ("-1e9 to 1e9", lambda v: abs(v) <= 1e9),
    "seed": ("0 to 2^63 - 1", lambda v: 0 <= v < 2**63),
    "stop": ("texts of at least one character", all),
    "logprobs": ("0 or more", lambda v: v >= 0),
}


def check_bounds(settings: Mapping[str, Any], where: str | None = None) -> None:
    """Raise ToyllmError for a setting out of its bounds; None is not given. `where` names the file they come from, if any."""
    for name, (expected, holds) in BOUNDS.items():
        value = settings.get(name)
        if value is not None and not holds(value):
            setting = f"{where}: {name}" if where else f"--{name.replace('_', '-')}"
            raise ToyllmError(f"{setting}: expected {expected}, found {list(value) if name == 'stop' else value}")


def check_settings(settings: Settings) -> Settings:
    """The settings, with a seed drawn if there was none. Raises ToyllmError for one out of its bounds."""
    check_bounds(vars(settings))
    return settings if settings.seed is not None else replace(settings, seed=secrets.randbelow(2**32))


def settings_for(defaults: GenerationDefaults, config: Any, given: dict[str, Any]) -> Settings:
    """Our defaults, overridden by the model's generation_config.json, overridden by what is given (None: not given).

    `do_sample: false` means temperature 0; ids of end-of-text come from generation_config.json, else from config.json.
    Raises ToyllmError for one out of its bounds, unless it is overridden.
    """
    names = {f.name for f in fields(Settings)}
    theirs = {name: value for name, value in vars(defaults).items() if name in names and value is not None}
    if defaults.do_sample is False:
        theirs["temperature"] = 0.0
    if defaults.max_new_tokens is not None:
        theirs["max_tokens"] = defaults.max_new_tokens
    theirs["eos"] = config.eos_token_id if defaults.eos_token_id is None else defaults.eos_token_id
    ours = {name: value for name, value in given.items() if value is not None}
    check_bounds({name: value for name, value in theirs.items() if name not in ours}, "generation_config.json")
    return check_settings(Settings(**theirs | ours))


@dataclass(frozen=True)
class Token:
    """One generated token; `logprob` is its log-softmax of the raw logits, `top` the likeliest (id, logprob), if asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """How a generation ended: "stop" (end-of-text or a stop string), "length" (max_tokens) or "context" (no position left)."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int  # an ending end-of-text included
    prefill_s: float  # the prompt's passes
    decode_s: float  # from the first token to the end
    kernels_s: float  # loading or compiling kernels before the first token; the other two leave out all of it
    reused_tokens: int | None = None  # of the prompt, in the KV cache already; None: it was a new one
    context_shifts: int | None = None  # how often the context was full; None: that would have been the end
    dropped_tokens: int | None = None  # in all of them together


@dataclass(frozen=True)
class Event:
    """What one step brought: a token, the text that became certain, and at the end the result; or what left a full context."""

    token: Token | None
    text: str
    result: Result | None = None
    shift: Shift | None = None


def encode_prompt(model: "Model", prompt: str | Sequence[int], special: bool = True) -> list[int]:
    """Token ids of a prompt, checked. An empty text becomes the model's beginning-of-text token, where it has one.

    Raises ToyllmError for text without a tokenizer, no tokens at all, and ids out of range.
    """
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ToyllmError(f"{model.files.name}: no tokenizer beside the weights; give ids with --prompt-ids")
        ids = model.tokenizer.encode(prompt, special=special) or list((model.defaults.bos_token_id or model.config.bos_token_id)[:1])
    else:
        check_ids(prompt, model.vocab_size)
        ids = [int(i) for i in prompt]
    if not ids:
        raise ToyllmError("the prompt is empty, and this model has no beginning-of-text token to start from; give at least one token")
    check_ids(ids, model.vocab_size)
    return ids


def clock() -> float:
    """Seconds of a clock that stands still while kernels are loaded or compiled."""
    return time.perf_counter() - preparing_seconds()


def generate(
    model: "Model",
    prompt: Sequence[int],
    settings: Settings,
    context: int | None = None,
    held: Held | None = None,
    keep: int | None = None,
) -> Generator[Event]:
    """Continue the ids of a prompt token by token; the last event carries the result.

    Prompt and continuation together never exceed `context` (default: the model's), unless `keep` says how many of the first tokens
    stay where it is full: half of the others make room then, and an event says so (`Held.shift`). A longer prompt loses them at once.
    What the prompt begins with is not read again where the cache of `held`, if given, has it; `held.room` is the context then.
    Raises ToyllmError for a prompt longer than the context and for settings that do not fit, before anything runs; and, while running,
    for logits from which no token can be drawn.
    """
    settings = check_settings(settings)
    room: int = held.room if held else model.config.context if context is None else context
    if keep is not None and not 0 <= keep <= room - 2:
        raise ToyllmError(f"--keep {keep}: expected 0 to {room - 2}, so that a context of {room} has something to drop")
    if keep is None and len(prompt) > room:
        raise ToyllmError(f"the prompt has {len(prompt)} tokens and the context {room}: shorten the prompt, or raise --context")
    return steps(model, prompt, settings, held, room, keep, Writer(model, settings.stop))


def steps(
    model: "Model", prompt: Sequence[int], settings: Settings, held: Held | None, room: int, keep: int | None, writer: "Writer"
) -> Generator[Event]:
    """The loop of `generate`, whose checks have passed."""
    ids = list(prompt) if keep is None else shortened(prompt, room, keep)
    reused = held.resume(ids) if held else None
    run = Continuation(model, ids, settings, room, writer, reused, endless=keep is not None)
    held = held or Held(model, room)
    if keep is not None and len(ids) < len(prompt):
        yield run.shifted(Shift(room, keep, len(prompt) - len(ids), len(ids) - keep))
    logits = held.read(ids[len(held.ids) :])
    while not run.ended:
        if run.token is not None:
            if keep is not None and len(held.ids) == room:
                dropped = held.shift(keep)
                yield run.shifted(Shift(room, keep, len(dropped), len(held.ids) - keep), dropped)
            held.read([run.token], out=logits)
        try:
            event = run.push(logits[0])
        except NotFinite:
            raise explained(model, held.ids) from None
        held.next = None if run.token in settings.eos else run.token
        yield event
    yield run.finish()


def shortened(prompt: Sequence[int], room: int, keep: int) -> list[int]:
    """The ids of a prompt that stay in a context of `room` positions: where it is full, half of those behind the first `keep` go."""
    ids = list(prompt)
    while len(ids) > room:
        del ids[keep : keep + (len(ids) - keep) // 2]
    return ids


class Continuation:
    """One sequence on its way from a prompt to its end: what is drawn, what of the text is certain, when it ends.

    It runs no model. Whoever does calls `push` with the logits f32 [V] that follow the prompt, and then with those that follow `token`,
    which stands at position `used - 1` (unless the context was shifted), until the sequence has `ended`; then `finish`. The times in the
    result count from its making.
    """

    def __init__(
        self,
        model: "Model",
        prompt: Sequence[int],
        settings: Settings,
        room: int,
        writer: "Writer",
        reused: int | None = None,
        endless: bool = False,
    ) -> None:
        """The prompt fits the `room` positions, and `settings` are checked; `reused` tokens of it need no pass (None: a new cache).

        The sequence ends where there is no position left, unless it is `endless`: whoever runs the model makes room.
        """
        self._start, self._kernels = clock(), preparing_seconds()
        self._model, self._prompt, self._settings, self._writer, self._reused = model, prompt, settings, writer, reused
        self._sampler: Sampler | None = None
        self._whole = len(prompt) + settings.max_tokens
        self._last = self._whole if endless else min(self._whole, room)
        self._shifts, self._dropped = (0, 0) if endless else (None, None)
        self._prefilled = self._first = 0.0  # when the prompt's passes were over, and when the first token came
        self._prepared = 0.0
        self._stopped = False
        self.token: int | None = None  # the latest
        self.used = len(prompt)  # positions, the latest token's included

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to draw."""
        return self._stopped or self.used >= self._last

    def push(self, logits: np.ndarray) -> Event:
        """Draw a token from the logits of the one before it, f32 [V]. Raises ToyllmError where none can be drawn."""
        if self._sampler is None:
            self._prefilled = clock()
            self._sampler = Sampler(self._settings, self._prompt, self._model.vocab_size)
        drawn = draw(logits, self._sampler, self._settings)
        if self.token is None:
            self._first, self._prepared = clock(), preparing_seconds()
        self.token, self.used = drawn.id, self.used + 1
        ends = drawn.id in self._settings.eos
        text = "" if ends else self._writer.push(drawn.id)
        self._stopped = ends or self._writer.stopped
        return Event(drawn, text)

    def shifted(self, shift: Shift, ids: Sequence[int] = ()) -> Event:
        """Count what left the context; penalties no longer act on these `ids`."""
        self._shifts, self._dropped = (self._shifts or 0) + 1, (self._dropped or 0) + shift.dropped
        if self._sampler:
            self._sampler.forget(ids)
        return Event(None, "", shift=shift)

    def finish(self) -> Event:
        """The last event: the text that was held back, and the result."""
        if self.token is None:
            self._prefilled = self._first = clock()
            self._prepared = preparing_seconds()
        tail = self._writer.finish()
        stopped = self._stopped or self._writer.stopped
        reason = "stop" if stopped else "length" if self.used == self._whole else "context"
        seconds = (self._prefilled - self._start, clock() - self._first, self._prepared - self._kernels)
        counts = self._reused, self._shifts, self._dropped
        return Event(None, tail, Result(reason, len(self._prompt), self.used - len(self._prompt), *seconds, *counts))


def draw(logits: np.ndarray, sampler: Sampler, settings: Settings) -> Token:
    """The next token from logits f32 [V]; log-probabilities are those of the logits as they came, before any penalty."""
    chosen = sampler.next(logits)
    if settings.logprobs is None:
        return Token(chosen)
    total, top = logprobs(logits, settings.logprobs)
    return Token(chosen, float(logits[chosen]) - total, top)


class Writer:
    """Turns tokens into text that is certain: whole characters, and nothing that a stop string may still take back."""

    def __init__(self, model: "Model", stops: tuple[str, ...]) -> None:
        if stops and model.tokenizer is None:
            raise ToyllmError("--stop: this model has no tokenizer, so no text to stop at")
        self._stream = model.tokenizer.stream() if model.tokenizer else None
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        return self._release(self._stream.push(token) if self._stream else f"{token} ")

    def finish(self) -> str:
        """What was held back; nothing after a stop string."""
        if self.stopped:
            return ""
        text = self._release(self._stream.finish() if self._stream else "")
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _release(self, text: str) -> str:
        self._held += text
        # The stop that is complete first, whatever tokens the text came in; of two that end together the longer one.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            released, self._held = self._held[: min(found)[1]], ""
            return released
        keep = max((longest_overlap(self._held, stop) for stop in self._stops), default=0)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released


def longest_overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
