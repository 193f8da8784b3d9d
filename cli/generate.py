"""`toyllm generate`: continue a prompt, as a stream of text or one JSON document."""

import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import DEFAULT_MODEL, RUNNING, SAMPLING, Json, Model, PromptIds, Stats, option, takes
from .prompt import read_prompt
from .running import load, mixture_rows, settings_entry

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..models.generation import Event, Result, Settings, Token
    from ..models.model import Model as LoadedModel


@takes(sampling=SAMPLING, running=RUNNING)
def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - or nothing reads stdin.", metavar="PROMPT", show_default=False)
    ] = None,
    model: Model = DEFAULT_MODEL,
    prompt_ids: PromptIds = None,
    no_special: Annotated[bool, option("Take special tokens in the prompt, such as <|endoftext|>, as plain text.", "--no-special")] = False,
    stats: Stats = False,
    json: Json = False,
    *,
    sampling: dict[str, Any],
    running: dict[str, Any],
) -> None:
    """Continue a prompt.

    The continuation streams to stdout; notes go to stderr. The defaults of temperature, top-k, top-p, min-p, the
    repetition penalty and max-tokens are the model's generation_config.json's where it has them.
    """
    began = time.perf_counter()
    text_or_ids = read_prompt(context, prompt, prompt_ids)

    from ..models.generation import check_bounds, encode_prompt, settings_for
    from ..models.generation import generate as continue_prompt

    logprobs = sampling["logprobs"]
    given = sampling | {"stop": tuple(sampling["stop"] or ()) or None, "logprobs": 0 if json and logprobs is None else logprobs}
    check_bounds(given)
    loaded = load(model, running)
    settings = settings_for(loaded.defaults, loaded.config, given)
    ids = encode_prompt(loaded, text_or_ids, special=not no_special)
    room = loaded.context_for(running["context_size"])
    loaded_at = time.perf_counter()
    events = continue_prompt(loaded, ids, settings, room)
    if not json:
        announce(loaded, ids, settings)
    run = consume(events, show=not json)
    timings = times(run, began, loaded_at)
    if json:
        document = {
            "prompt_tokens": ids,
            "tokens": [token_entry(loaded, token) for token in run.tokens],
            "text": run.text if loaded.tokenizer else None,
            "finish_reason": run.result.finish_reason,
            "usage": {"prompt_tokens": len(ids), "completion_tokens": run.result.completion_tokens},
            "timings": timings,
            "settings": asdict(settings) | settings_entry(loaded, room),
        }
        output.write_json("generate", document)
    elif logprobs is not None:
        show_logprobs(loaded, run.tokens)
    if stats:
        show_stats(loaded, run.result, timings, time.perf_counter() - began)


@dataclass
class Run:
    """What a generation brought."""

    tokens: "list[Token]"
    text: str
    first_at: float | None  # when the first token came
    result: "Result"


def consume(events: "Iterable[Event]", show: bool) -> Run:
    """Follow a generation to its end, showing the text as it becomes certain. A line cut short by an error or Ctrl-C is ended too."""
    tokens, text, first_at, result = [], [], None, None
    clean = output.printable if sys.stdout.isatty() else str
    try:
        for event in events:
            if event.token:
                tokens.append(event.token)
                first_at = first_at or time.perf_counter()
            text.append(event.text)
            result = event.result
            if show and event.text:
                output.write(clean(event.text))
    finally:
        if show and (result or any(text) or sys.stdout.isatty()):  # on a terminal the prompt stands on the line already
            output.write("\n")
    if result is None:
        raise RuntimeError("a generation ended without its result")
    return Run(tokens, "".join(text), first_at, result)


def announce(loaded: "LoadedModel", ids: list[int], settings: "Settings") -> None:
    """The seed, where one is used; and on a terminal the prompt, dimmed, for the continuation to follow."""
    if settings.temperature:
        output.say(f"seed {settings.seed}")
    if sys.stdout.isatty() and sys.stderr.isatty() and loaded.tokenizer:
        output.say_dimmed(output.printable(loaded.tokenizer.decode(ids)))


def times(run: Run, began: float, loaded_at: float) -> dict[str, float | None]:
    """Seconds to load the model and its kernels, to run the prompt, and from the start to the first token; tokens a second after it."""
    result, more = run.result, run.result.completion_tokens - 1
    return {
        "load_s": loaded_at - began + result.kernels_s,
        "prefill_s": result.prefill_s,
        "first_token_s": run.first_at - began if run.first_at else None,
        "decode_tok_s": more / result.decode_s if more > 0 and result.decode_s > 0 else None,
    }


def token_entry(loaded: "LoadedModel", token: "Token") -> dict[str, Any]:
    """A token as the JSON document has it."""
    top = [{"id": i, "text": token_text(loaded, i), "logprob": finite(p)} for i, p in token.top]
    return {"id": token.id, "text": token_text(loaded, token.id), "logprob": finite(token.logprob), "top_logprobs": top}


def token_text(loaded: "LoadedModel", token: int) -> str | None:
    """The text of one token by itself; null without a tokenizer."""
    return loaded.tokenizer.decode([token]) if loaded.tokenizer else None


def finite(number: float | None) -> float | None:
    """The number, or null for an infinite one, which JSON does not have: the log-probability of an impossible token."""
    return number if number is not None and math.isfinite(number) else None


def show_logprobs(loaded: "LoadedModel", tokens: "list[Token]") -> None:
    """A line a token to stderr: its log-probability, and the likeliest in its place."""
    for token in tokens:
        top = "  ".join(f"{token_text(loaded, i)!r} {p:.4f}" for i, p in token.top)
        output.say(output.one_line(f"{token.id:>7}  {token_text(loaded, token.id)!r:<16} {token.logprob:9.4f}  {top}".rstrip()))


def show_stats(loaded: "LoadedModel", result: "Result", timings: dict[str, float | None], total_s: float) -> None:
    """Ollama's eight figures and the time to the first token, to stderr."""
    first, rate, prefill_s = timings["first_token_s"], timings["decode_tok_s"], result.prefill_s
    rows = [
        ("total duration", f"{total_s:.3f} s"),
        ("load duration", f"{timings['load_s']:.3f} s"),
        ("prompt eval count", f"{result.prompt_tokens} tokens"),
        ("prompt eval duration", f"{prefill_s:.3f} s"),
        ("prompt eval rate", f"{result.prompt_tokens / prefill_s:.1f} tokens/s" if prefill_s > 0 else "-"),
        ("eval count", f"{result.completion_tokens} tokens"),
        ("eval duration", f"{result.decode_s:.3f} s"),
        ("eval rate", f"{rate:.1f} tokens/s" if rate else "-"),
        ("time to first token", f"{first:.3f} s" if first else "-"),
    ]
    for name, value in rows + mixture_rows(loaded):
        output.say(f"{name + ':':<22}{value}")
