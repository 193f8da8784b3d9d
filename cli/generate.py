"""`toyllm generate`: continue a prompt, as a stream of text or one JSON document."""

import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import DEFAULT_MODEL, Backend, Json, Model, PromptIds, Threads, option
from .prompt import read_prompt

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..models.generation import Event, Result, Settings, Token
    from ..models.model import Model as LoadedModel


def whole_text(context: typer.Context, parameter: typer.CallbackParam, value: list[str] | None) -> list[str] | None:
    """The stop text in TOYLLM_STOP is one, spaces included, where Typer would make each word one."""
    variable = os.environ.get(str(parameter.envvar))
    given = context.get_parameter_source(str(parameter.name))
    return [variable] if variable and given and given.name == "ENVIRONMENT" else value


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - or nothing reads stdin.", metavar="PROMPT", show_default=False)
    ] = None,
    model: Model = DEFAULT_MODEL,
    prompt_ids: PromptIds = None,
    max_tokens: Annotated[int | None, option("The most tokens to add.", "--max-tokens", "-n", show_default="200")] = None,
    temperature: Annotated[
        float | None, option("0 takes the likeliest token; higher is more varied.", "--temperature", "-t", show_default="0.8")
    ] = None,
    top_k: Annotated[int | None, option("Draw from the K likeliest tokens.", "--top-k", show_default="off")] = None,
    top_p: Annotated[
        float | None, option("Draw from the likeliest tokens that together reach this probability.", "--top-p", show_default="0.95")
    ] = None,
    min_p: Annotated[
        float | None, option("Drop tokens below this share of the likeliest one's probability.", "--min-p", show_default="off")
    ] = None,
    repetition_penalty: Annotated[
        float | None, option("Divide the logits of tokens in the context by this.", "--repetition-penalty", show_default="1, off")
    ] = None,
    presence_penalty: Annotated[
        float | None, option("Subtract this from the logits of tokens in the context.", "--presence-penalty", show_default="0")
    ] = None,
    frequency_penalty: Annotated[
        float | None, option("Subtract this for each time a token is in the context.", "--frequency-penalty", show_default="0")
    ] = None,
    seed: Annotated[int | None, option("The seed of the draws.", "--seed", show_default="drawn, and said")] = None,
    stop: Annotated[
        list[str] | None,
        option("End before this text; may be given several times.", "--stop", metavar="TEXT", show_default=False, callback=whole_text),
    ] = None,
    logprobs: Annotated[
        int | None, option("Report each token's log-probability, and the N likeliest.", "--logprobs", metavar="N", show_default=False)
    ] = None,
    context_size: Annotated[
        int | None,
        option("Positions of the KV cache: prompt and continuation.", "--context", metavar="N", show_default="the model's, or what fits"),
    ] = None,
    prefill_chunk: Annotated[int, option("Tokens of the prompt a pass.", "--prefill-chunk")] = 512,
    no_special: Annotated[bool, option("Take special tokens in the prompt, such as <|endoftext|>, as plain text.", "--no-special")] = False,
    threads: Threads = None,
    backend: Backend = "auto",
    no_preload: Annotated[bool, option("Do not read a file ahead that is not in memory yet.", "--no-preload")] = False,
    stats: Annotated[bool, option("Print counts, times and rates to stderr.", "--stats")] = False,
    json: Json = False,
) -> None:
    """Continue a prompt.

    The continuation streams to stdout; notes go to stderr. The defaults of temperature, top-k, top-p, min-p, the
    repetition penalty and max-tokens are the model's generation_config.json's where it has them.
    """
    began = time.perf_counter()
    text_or_ids = read_prompt(context, prompt, prompt_ids)

    from ..models.generation import Settings, check_bounds, encode_prompt, settings_for
    from ..models.generation import generate as continue_prompt

    given = {name: context.params[name] for name in context.params if name in Settings.__dataclass_fields__}
    given |= {"stop": tuple(stop) if stop else None, "logprobs": 0 if json and logprobs is None else logprobs}
    check_bounds(given)
    loaded = load(model, backend, threads, prefill_chunk, no_preload)
    settings = settings_for(loaded.defaults, loaded.config, given)
    ids = encode_prompt(loaded, text_or_ids, special=not no_special)
    room = loaded.context_for(context_size)
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
            "settings": settings_entry(loaded, settings, room),
        }
        output.write_json("generate", document)
    elif logprobs is not None:
        show_logprobs(loaded, run.tokens)
    if stats:
        show_stats(run.result, timings, time.perf_counter() - began)


def load(name: str, backend: str, threads: int | None, prefill_chunk: int, no_preload: bool) -> "LoadedModel":
    """The model, its files read ahead with a bar of bytes where they are not in memory."""
    from ..models.model import load as load_model
    from ..models.preload import read_ahead

    loaded = load_model(name, backend=backend, threads=threads, prefill_chunk=prefill_chunk)
    if not no_preload:
        with output.byte_bar(f"reading {name}") as progress:
            read_ahead(loaded.checkpoint.shards, progress)
    return loaded


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


def settings_entry(loaded: "LoadedModel", settings: "Settings", room: int) -> dict[str, Any]:
    """All settings that had a part in the result, as they came out."""
    rest = {
        "model": loaded.files.name,
        "context": room,
        "prefill_chunk": loaded.prefill_chunk,
        "threads": loaded.threads,
        "backend": loaded.kernels.name,
    }
    return asdict(settings) | rest


def show_logprobs(loaded: "LoadedModel", tokens: "list[Token]") -> None:
    """A line a token to stderr: its log-probability, and the likeliest in its place."""
    for token in tokens:
        top = "  ".join(f"{token_text(loaded, i)!r} {p:.4f}" for i, p in token.top)
        output.say(output.one_line(f"{token.id:>7}  {token_text(loaded, token.id)!r:<16} {token.logprob:9.4f}  {top}".rstrip()))


def show_stats(result: "Result", timings: dict[str, float | None], total_s: float) -> None:
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
    for name, value in rows:
        output.say(f"{name + ':':<22}{value}")
