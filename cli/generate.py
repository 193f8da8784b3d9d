"""`toyllm generate`: continue a prompt, as a stream of text or one JSON document."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from . import output
from .batching import BATCHING, check_batching
from .changing import CHANGING, changes_entry, read_changes
from .conversing import CHATTING, begin, check_chatting, message_entry, messages_shown, note_ending
from .lasting import LASTING, STEP_BACK, check_lasting, kept_in, note_forgotten, note_shift, open_session, remembered, talk_of
from .options import DEFAULT_MODEL, RUNNING, SAMPLING, Json, Model, PromptIds, Stats, option, takes
from .prompt import read_prompt
from .running import load, memory_told, mixture_rows, settings_entry, show_memory

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from ..models.changes import Change
    from ..models.chat import Conversation
    from ..models.generation import Event, Result, Settings, Token
    from ..models.held import Held
    from ..models.model import Model as LoadedModel
    from ..models.session import SessionFile


@takes(chatting=CHATTING, lasting=LASTING, batching=BATCHING, sampling=SAMPLING, changing=CHANGING, running=RUNNING)
def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; - or nothing reads stdin.", metavar="PROMPT", show_default=False)
    ] = None,
    model: Model = DEFAULT_MODEL,
    prompt_ids: PromptIds = None,
    no_special: Annotated[bool, option("Take special tokens in the prompt, such as <|endoftext|>, as plain text.", "--no-special")] = False,
    chat: Annotated[bool, option("Answer the prompt in the chat format of gpt-oss; an answer may fill the context.", "--chat")] = False,
    stats: Stats = False,
    json: Json = False,
    *,
    chatting: dict[str, Any],
    lasting: dict[str, Any],
    batching: dict[str, Any],
    sampling: dict[str, Any],
    changing: dict[str, Any],
    running: dict[str, Any],
) -> None:
    """Continue a prompt.

    The continuation streams to stdout; notes go to stderr. The defaults of temperature, top-k, top-p, min-p, the
    repetition penalty and max-tokens are the model's generation_config.json's where it has them.

    Activations can be changed as they are computed: patched, then scaled, then added to, then ablated. Positions count from 0 over prompt
    and continuation; negative ones count back from the prompt's end.

    What a prompt begins with is not read again where the file of --session has it; an empty prompt goes on where that ends.

    A line of --input is a JSON object: prompt or prompt_ids; id, which its answer repeats; and max_tokens, temperature, top_k, top_p,
    min_p, repetition_penalty, presence_penalty, frequency_penalty, seed, stop, logprobs and n, the samples wanted, where they differ
    from the options. A line's seed follows from the run's and the line's number. Answers are JSON documents, a line each, in the order
    of the prompts, and the same whatever runs beside them; what is wrong with a line is its answer, and exit code 1 in the end. The
    same command again goes on with the lines that the output does not have.
    """
    began = time.perf_counter()
    check_chat(context, chat)
    check_batching(context)
    said = check_chatting(context, chatting) if chat else None
    many = batching["input"] is not None
    text_or_ids = "" if many else read_prompt(context, prompt, prompt_ids)

    from ..models.generation import check_bounds

    logprobs = sampling["logprobs"]
    given = sampling | {"stop": tuple(sampling["stop"] or ()) or None, "logprobs": 0 if (json or many) and logprobs is None else logprobs}
    check_bounds(given)
    if many:
        from .batch import answer_file

        answer_file(model, batching, given, running, not no_special, stats)
        return
    changes = read_changes(context, changing)
    check_lasting(context, lasting, bool(changes))
    loaded = load(model, running, changes)
    wanted = running["context_size"]
    if batching["samples"] > 1:
        from .samples import plan as several
        from .samples import show

        samples = several(loaded, text_or_ids, not no_special, given, wanted, changes, batching)
        show(samples, began, json, stats, logprobs is not None)
        return
    with memory_told(loaded):
        file = open_session(loaded, lasting, chat)
        if said:
            said = remembered(context, said, file)
            conversation = begin(loaded.changed(changes) if changes else loaded, said, given, wanted, lasting)
            plan = answer(cast("str", text_or_ids), conversation, file)
        else:
            plan = continuation(loaded, text_or_ids, not no_special, given, wanted, changes, lasting, file)
        loaded_at = time.perf_counter()
        if not json and plan.settings.temperature:
            output.say(f"seed {plan.settings.seed}")
        shown = nullcontext(ignore) if json else messages_shown() if chat else text_shown(opening(loaded, plan.prompt))
        with kept_in(file, plan.held, lambda: talk_of(plan.conversation, said)), closing(plan.events):
            run = consume(plan.events, shown, whole=json or logprobs is not None)
    timings = times(run, began, loaded_at)
    if json:
        output.write_json("generate", document(loaded, plan, run, timings, said or {}, lasting["session"]))
    elif logprobs is not None:
        show_logprobs(loaded, run.tokens)
    if plan.conversation and not json:
        note_ending(plan.conversation, run.result)
    if stats:
        show_stats(loaded, run.result, timings, time.perf_counter() - began)
        show_memory(loaded, plan.room, keep=STEP_BACK if file and not chat else 0)


def check_chat(context: typer.Context, chat: bool) -> None:
    """Refuse what has no meaning with --chat, wherever it was set, and on the command line what has none without."""
    for name in ("prompt_ids", "stop") if chat else ():
        if context.params[name]:
            raise typer.BadParameter("has no meaning with --chat", ctx=context, param_hint="--" + name.replace("_", "-"))
    for name in () if chat else CHATTING:
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE":
            raise typer.BadParameter("has no meaning without --chat", ctx=context, param_hint=f"--{name}")


@dataclass(frozen=True)
class Plan:
    """A generation that is about to run: the model with its changes, the prompt's ids, settings, positions, and what it will bring."""

    model: "LoadedModel"
    prompt: list[int]
    settings: "Settings"
    room: int
    events: "Generator[Event]"
    held: "Held | None" = None  # with --session or --chat
    keep: int | None = None  # with --context-shift
    conversation: "Conversation | None" = None  # with --chat


def answer(question: str, conversation: "Conversation", file: "SessionFile | None") -> Plan:
    """The plan to answer a conversation's next question, which is its first where there is no session."""
    if file and file.session:
        conversation.restore(file.session)
    events = conversation.ask(question)
    note_forgotten(conversation)
    settings, room, keep = conversation.settings, conversation.context, conversation.keep
    return Plan(conversation.model, conversation.prompt, settings, room, events, conversation.held, keep, conversation)


def continuation(
    loaded: "LoadedModel",
    prompt: str | list[int],
    special: bool,
    given: dict[str, Any],
    wanted: int | None,
    changes: "list[Change]",
    lasting: dict[str, Any],
    file: "SessionFile | None",
) -> Plan:
    """The plan to continue a prompt in a context as wanted; a session's text, where there is one and the prompt is empty."""
    from ..models.generation import encode_prompt, generate, settings_for
    from ..models.held import Held

    settings = settings_for(loaded.defaults, loaded.config, given)
    ids = file.session.ids if file and file.session and not prompt else []
    ids = ids or encode_prompt(loaded, prompt, special)
    room = loaded.context_for(wanted)
    keep = (int(ids[0] in loaded.config.bos_token_id) if lasting["keep"] is None else lasting["keep"]) if lasting["context_shift"] else None
    if changes:
        loaded = loaded.changed(changes, len(ids), max(len(ids), min(len(ids) + settings.max_tokens, room)))
    held = Held(loaded, room, back=STEP_BACK) if file else None
    if held and file and file.session:
        held.restore(file.session.ids, file.session.states)
    return Plan(loaded, ids, settings, room, generate(loaded, ids, settings, room, held, keep), held, keep)


@dataclass
class Run:
    """What a generation brought; tokens and text only where they were wanted whole."""

    tokens: "list[Token]"
    text: str
    first_at: float | None  # when the first token came
    result: "Result"


Shown = AbstractContextManager[Callable[["Event"], None]]  # shows each event, and at the end whatever way closes what it opened


def consume(events: "Iterable[Event]", shown: Shown, whole: bool = False) -> Run:
    """Follow a generation to its end, showing what it brings; it may have none that memory could hold, so little is kept unless `whole`."""
    tokens, text, first_at, result = [], [], None, None
    with shown as show:
        for event in events:
            if event.token:
                first_at = first_at or time.perf_counter()
            if event.shift:
                note_shift(event.shift)
            if whole:
                tokens += [event.token] if event.token else []
                text.append(event.text)
            result = event.result
            show(event)
    if result is None:
        raise RuntimeError("a generation ended without its result")
    return Run(tokens, "".join(text), first_at, result)


def opening(loaded: "LoadedModel", prompt: list[int]) -> str:
    """What the continuation continues: the prompt, where a terminal shows both."""
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    return output.printable(loaded.tokenizer.decode(prompt)) if terminal and loaded.tokenizer else ""


@contextmanager
def text_shown(before: str) -> "Iterator[Callable[[Event], None]]":
    """Shows the text as it becomes certain, behind what came before it. A line cut short by an error or Ctrl-C is ended too."""
    clean = output.printable if sys.stdout.isatty() else str
    due = False

    def show(event: "Event") -> None:
        nonlocal due
        if before and not due:  # not earlier: notes may come while kernels compile
            output.say_dimmed(before)
        due = due or bool(before or event.text or event.result)
        if event.text:
            output.write(clean(event.text))

    try:
        yield show
    finally:
        if due:
            output.write("\n")


def ignore(event: "Event") -> None:
    """Show nothing of it."""


def document(
    loaded: "LoadedModel", plan: Plan, run: Run, timings: dict[str, float | None], said: dict[str, Any], session: str | None
) -> dict[str, Any]:
    """What --json prints; `said` are the settings of a chat, `session` is the file of one."""
    counts = ("context_shifts", "dropped_tokens") if plan.keep is not None else ()
    counts = ("reused_tokens", *counts) if session else counts
    counted = {name: getattr(run.result, name) for name in counts}
    lasting = ({} if plan.keep is None else {"context_shift": True, "keep": plan.keep}) | ({"session": session} if session else {})
    messages = {"messages": [message_entry(message) for message in plan.conversation.written]} if plan.conversation else {}
    return {
        "prompt_tokens": plan.prompt,
        "tokens": [token_entry(loaded, token) for token in run.tokens],
        "text": run.text if loaded.tokenizer else None,
        "finish_reason": run.result.finish_reason,
        "usage": {"prompt_tokens": len(plan.prompt), "completion_tokens": run.result.completion_tokens} | counted,
        "timings": timings,
        "settings": asdict(plan.settings) | settings_entry(loaded, plan.room) | lasting | changes_entry(plan.model) | said,
        **messages,
    }


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
    evaluated = result.prompt_tokens - (result.reused_tokens or 0)
    rows = [
        ("total duration", f"{total_s:.3f} s"),
        ("load duration", f"{timings['load_s']:.3f} s"),
        ("prompt eval count", f"{evaluated} tokens"),
        ("prompt eval duration", f"{prefill_s:.3f} s"),
        ("prompt eval rate", f"{evaluated / prefill_s:.1f} tokens/s" if prefill_s > 0 else "-"),
        ("eval count", f"{result.completion_tokens} tokens"),
        ("eval duration", f"{result.decode_s:.3f} s"),
        ("eval rate", f"{rate:.1f} tokens/s" if rate else "-"),
        ("time to first token", f"{first:.3f} s" if first else "-"),
    ]
    reused = [] if result.reused_tokens is None else [("prompt reused", f"{result.reused_tokens} tokens")]
    gone = f"{result.context_shifts} ({result.dropped_tokens} tokens dropped)"
    shifts = [] if result.context_shifts is None else [("context shifts", gone)]
    for name, value in rows + reused + shifts + mixture_rows(loaded):
        output.say(f"{name + ':':<22}{value}")
