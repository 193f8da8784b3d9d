"""`toyllm generate --samples`: several continuations of one prompt, which share its keys and values."""

import sys
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from . import output
from .batch import Took, answered, answers_entry, room_for, show_stats
from .changing import changes_entry
from .generate import opening, show_logprobs
from .running import memory_told, settings_entry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..models.batch import Answer
    from ..models.changes import Change
    from ..models.generation import Settings
    from ..models.model import Model as LoadedModel


@dataclass(frozen=True)
class Samples:
    """Several samples of a prompt that are about to be drawn."""

    model: "LoadedModel"
    prompt: list[int]
    settings: "Settings"  # the first one's; each one's seed is one more than that of the one before
    count: int
    context: int
    room: tuple[int, int]  # how many sequences run together, and the positions of each

    def answers(self, took: Took, bar: bool) -> "Iterator[Answer]":
        """The samples in their order, counted, and a bar, if wanted. Raises the error of one that could not be drawn."""
        from ..models.batch import Request

        first = self.settings.seed or 0
        requests = [Request(self.prompt, replace(self.settings, seed=(first + i) % 2**63), i) for i in range(self.count)]
        ready: dict[int, Answer] = {}
        told = 0
        with output.count_bar("sampling", "samples", bar) as show:

            def progress() -> None:
                show(told, self.count, f"{took.rate:.1f} tok/s")

            for answer in answered(self.model, requests, self.context, self.room, took, progress):
                if answer.error:
                    raise answer.error
                ready[answer.request.key] = answer
                while told in ready:
                    yield ready.pop(told)
                    told += 1


def plan(
    loaded: "LoadedModel",
    prompt: str | list[int],
    special: bool,
    given: dict[str, Any],
    wanted: int | None,
    changes: "Sequence[Change]",
    batching: dict[str, Any],
) -> Samples:
    """What is to be drawn, checked. Raises ToyllmError; OutOfMemory behind the plan of the memory."""
    from ..models.batch import Request
    from ..models.generation import encode_prompt, settings_for

    settings = settings_for(loaded.defaults, loaded.config, given)
    ids = encode_prompt(loaded, prompt, special)
    with memory_told(loaded):
        context = loaded.context_for(wanted)
    count = batching["samples"]
    room = room_for(loaded, [Request(ids, settings)] * count, context, batching["batch_size"])
    if changes:
        loaded = loaded.changed(changes, len(ids), max(len(ids), room[1]))
    return Samples(loaded, ids, settings, count, context, room)


def show(samples: Samples, began: float, json: bool, stats: bool, logprobs: bool) -> None:
    """Draw the samples and print them: a document, or each one's text in their order, behind a dim line on stderr that says which it is."""
    took, found = Took(time.perf_counter() - began), []
    for answer in samples.answers(took, bar=json):
        found.append(answer)
        if not json:
            show_text(samples, answer, logprobs)
    if json:
        settings = asdict(samples.settings) | settings_entry(samples.model, samples.context) | changes_entry(samples.model)
        output.write_json("generate", answers_entry(samples.model, found, took.load_s) | {"settings": settings})
    if stats:
        show_stats(samples.model, took, time.perf_counter() - began)


def show_text(samples: Samples, answer: "Answer", logprobs: bool) -> None:
    """One sample."""
    seed = f", seed {answer.request.settings.seed}" if samples.settings.temperature else ""
    output.say_dimmed(f"sample {answer.request.key + 1} of {samples.count}{seed}\n")
    if before := opening(samples.model, samples.prompt):
        output.say_dimmed(before)
    output.write((output.printable(answer.text) if sys.stdout.isatty() else answer.text) + "\n")
    if logprobs:
        show_logprobs(samples.model, list(answer.tokens))
