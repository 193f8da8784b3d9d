"""`toyllm generate --input`: a file of prompts, continued together, its answers a JSON document a line in the order of the prompts."""

import hashlib
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..kernels.errors import OutOfMemory, ToyllmError
from . import output
from .answers import open_answers, read_header
from .changing import changes_entry
from .endings import INTERRUPTS
from .generate import token_entry
from .prompts import Line, read_line, split_lines
from .running import load, memory_lines, mixture_rows, settings_entry, show_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..models.batch import Answer, Request
    from ..models.generation import Settings
    from ..models.location import ModelFiles
    from ..models.model import Model as LoadedModel

FAILED = 1
Write = Callable[[str, bool], None]  # (a line, whether it is an error)


def answer_file(model: str, batching: dict[str, Any], given: dict[str, Any], running: dict[str, Any], special: bool, stats: bool) -> None:
    """Answer each line of the input that has none yet; `given` are the settings of lines that say nothing else.

    Exit code 1 where an answer is an error. Raises ToyllmError for what stops the run.
    """
    began = time.perf_counter()
    data, samples = read_input(batching["input"]), batching["samples"]
    path = Path(batching["answers"]) if batching["answers"] is not None else None
    header = read_header(path) if path else None
    loaded = load(model, running)
    base = base_settings(loaded, given, header)
    context = checked_context(loaded, running["context_size"])
    lines = split_lines(data)
    what = run_entry(loaded, base, context, {"attention": running["attention"], "special": special, "samples": samples}, data)
    with open_answers(path, what, len(lines)) as answers:
        if answers.done:
            output.say(f"note: {path} has {answers.done} of {len(lines)} answers already")
        todo = [read_line(n, text, loaded, base, samples, special, context) for n, text in enumerate(lines, 1) if n > answers.done]
        took = Took(time.perf_counter() - began)
        try:
            with output.count_bar("answering", "prompts", wanted=path is not None or not sys.stdout.isatty()) as bar:

                def progress() -> None:
                    bar(answers.done, len(lines), f"{took.rate:.1f} tok/s")

                for document in Run(loaded, context, todo, took).documents(batching["batch_size"], progress):
                    answers.write(document)
        except INTERRUPTS:
            again = "; the same command goes on from there" if path else ""
            output.say(f"\nstopped: {answers.done} of {len(lines)} lines are answered{again}")
            raise
    errors = f", {answers.failed} of them with an error" if answers.failed else ""
    speed = f"; {took.tokens} tokens in {took.seconds:.1f} s, {took.rate:.1f} tok/s" if took.tokens else ""
    output.say(f"{len(lines)} lines answered{errors}{speed}")
    if stats:
        show_stats(loaded, took, time.perf_counter() - began)
    if answers.failed:
        raise typer.Exit(FAILED)


# ---- before it begins -------------------------------------------------------------------------------------------------------


def read_input(name: str) -> bytes:
    """The bytes of a file, or of stdin. Raises ToyllmError."""
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ToyllmError(
            f"{name}: cannot be read ({error.strerror or error}); expected a file of prompts, a JSON object a line"
        ) from error


def base_settings(loaded: "LoadedModel", given: dict[str, Any], header: dict[str, Any] | None) -> "Settings":
    """The settings of lines that say nothing else; a seed that was drawn is that of the file which the run goes on with."""
    from ..models.generation import settings_for

    settings = settings_for(loaded.defaults, loaded.config, given)
    if given["seed"] is None and header:
        seed = header.get("settings", {}).get("seed") if isinstance(header.get("settings"), dict) else None
        return replace(settings, seed=seed if isinstance(seed, int) and 0 <= seed < 2**63 else secrets.randbelow(2**32))
    return settings


def checked_context(loaded: "LoadedModel", wanted: int | None) -> int:
    """Positions that a prompt and its continuation may take. Raises ToyllmError for more than the model knows."""
    most = loaded.config.context
    if wanted is not None and not 1 <= wanted <= most:
        raise ToyllmError(f"--context {wanted}: expected 1 to {most}, the positions this model knows")
    return wanted or most


def run_entry(loaded: "LoadedModel", base: "Settings", context: int, more: dict[str, Any], data: bytes) -> dict[str, Any]:
    """All that the answers depend on: what a file of them is known by. How many threads and sequences run together is not among it."""
    from .. import __version__
    from ..models.cut import fingerprint

    entry = {key: value for key, value in settings_entry(loaded, context).items() if key not in ("model", "threads")}
    return {
        "version": __version__,
        "model": {"weights": fingerprint(loaded.checkpoint), "files": files_digest(loaded.files)},
        "settings": asdict(base) | entry | more,
        "input": {"lines": len(split_lines(data)), "sha256": hashlib.sha256(data).hexdigest()},
    }


def files_digest(files: "ModelFiles") -> str:
    """The SHA-256 of a model's configuration and of what its tokenizer is made of."""
    digest = hashlib.sha256()
    for path in (files.config, files.generation_config, files.tokenizer, files.vocab, files.merges):
        digest.update(hashlib.sha256(path.read_bytes()).digest() if path else b"-")
    return f"sha256:{digest.hexdigest()}"


# ---- the run ----------------------------------------------------------------------------------------------------------------


@dataclass
class Took:
    """What running many sequences took, so far."""

    load_s: float
    slots: int = 0  # sequences that run together
    positions: int = 0  # of the KV cache, a sequence
    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0  # drawn
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens drawn a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def answered(
    loaded: "LoadedModel", requests: "Sequence[Request]", context: int, room: tuple[int, int], took: Took, progress: Callable[[], None]
) -> "Iterator[Answer]":
    """The answers to all requests as they are ready, counted in `took`; progress() is called after each pass. `room` as `room_for` says."""
    from ..models.batch import answers
    from ..models.generation import clock

    took.slots, took.positions = room
    start = clock()

    def drew(tokens: int) -> None:
        took.tokens += tokens
        took.seconds = clock() - start
        progress()

    for answer in answers(loaded, requests, took.slots, context, took.positions, drew):
        if answer.result:
            took.prompt_tokens += answer.result.prompt_tokens
            took.reused_tokens += answer.result.reused_tokens or 0
        yield answer


@dataclass
class Run:
    """The lines that are to be answered, and what it took."""

    loaded: "LoadedModel"
    context: int
    lines: list[Line]
    took: Took

    def documents(self, batch_size: int | None, progress: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """The answers to all lines, in their order. progress() is called after each pass."""
        found: dict[int, list[Answer]] = {}
        stream = self.answers(batch_size, progress)
        for line in self.lines:
            mine = found.setdefault(line.number, [])
            while not line.error and len(mine) < line.samples:
                answer = next(stream)
                found.setdefault(answer.request.key[0], []).append(answer)
            document = self.document(line, sorted(mine, key=lambda answer: answer.request.key))
            del found[line.number]
            yield document

    def answers(self, batch_size: int | None, progress: Callable[[], None]) -> "Iterator[Answer]":
        """What comes of every sample of every line that can be run, as it is ready. Raises OutOfMemory."""
        from ..models.batch import Request

        lines = [line for line in self.lines if not line.error]
        requests = [Request(line.prompt, line.seeded(i), (line.number, i)) for line in lines for i in range(line.samples)]
        if requests:
            room = room_for(self.loaded, requests, self.context, batch_size)
            yield from answered(self.loaded, requests, self.context, room, self.took, progress)

    def document(self, line: Line, found: "list[Answer]") -> dict[str, Any]:
        """The answer to a line as JSON has it: of one sample as `generate --json` gives it; of several each one's part in `samples`."""
        error = line.error or next((str(answer.error) for answer in found if answer.error), None)
        if error:
            return line.named | {"error": error}
        settings = asdict(line.seeded(0)) | settings_entry(self.loaded, self.context) | changes_entry(self.loaded)
        return line.named | answers_entry(self.loaded, found, self.took.load_s) | {"settings": settings}


def room_for(loaded: "LoadedModel", requests: "Sequence[Request]", context: int, batch_size: int | None) -> tuple[int, int]:
    """How many sequences run together, and how many positions each needs of the KV cache. Raises OutOfMemory behind the plan."""
    from ..models import memory
    from ..models.batch import slots_for

    positions = min(max(len(request.prompt) + request.settings.max_tokens for request in requests), context)
    try:
        return slots_for(loaded, positions, batch_size, len(requests)), positions
    except OutOfMemory:
        pieces = memory.of_model(loaded, positions, min(batch_size or 1, len(requests)))
        output.say("\n".join(memory_lines(memory.mark(pieces, "cache", memory.FAILED))))
        raise


def answers_entry(loaded: "LoadedModel", found: "Sequence[Answer]", load_s: float) -> dict[str, Any]:
    """What came of a prompt, under the names that `generate --json` has; of several samples each one's part in `samples`."""
    prompt = {"prompt_tokens": list(found[0].request.prompt)}
    entries = [sample_entry(loaded, answer, load_s) for answer in found]
    if len(entries) == 1:
        return prompt | entries[0]
    completion = sum(entry["usage"]["completion_tokens"] for entry in entries)
    seeded = [{"seed": answer.request.settings.seed} | entry for answer, entry in zip(found, entries, strict=True)]
    return prompt | {"samples": seeded, "usage": {"prompt_tokens": len(found[0].request.prompt), "completion_tokens": completion}}


def sample_entry(loaded: "LoadedModel", answer: "Answer", load_s: float) -> dict[str, Any]:
    """What one sequence brought; its times count from its own first pass, which others share."""
    result = answer.result
    if result is None:
        raise RuntimeError("an answer without its result")
    more = result.completion_tokens - 1
    return {
        "tokens": [token_entry(loaded, token) for token in answer.tokens],
        "text": answer.text if loaded.tokenizer else None,
        "finish_reason": result.finish_reason,
        "usage": {"prompt_tokens": result.prompt_tokens, "completion_tokens": result.completion_tokens},
        "timings": {
            "load_s": load_s,
            "prefill_s": result.prefill_s,
            "first_token_s": answer.first_token_s,
            "decode_tok_s": more / result.decode_s if more > 0 and result.decode_s > 0 else None,
        },
    }


def show_stats(loaded: "LoadedModel", took: "Took", total_s: float) -> None:
    """What a run of many sequences took, and the memory of it, to stderr."""
    rows = [
        ("total duration", f"{total_s:.3f} s"),
        ("load duration", f"{took.load_s:.3f} s"),
        ("together", f"{took.slots} sequences of {took.positions} positions"),
        ("prompt tokens", f"{took.prompt_tokens}, {took.reused_tokens} of them reused"),
        ("eval count", f"{took.tokens} tokens"),
        ("duration", f"{took.seconds:.3f} s"),
        ("rate", f"{took.rate:.1f} tokens/s"),
    ]
    for name, value in rows + mixture_rows(loaded):
        output.say(f"{name + ':':<22}{value}")
    if took.slots:
        show_memory(loaded, took.positions, took.slots)
