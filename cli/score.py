"""`toyllm score`: how likely a model finds each token of a text, how surprised it is of all, and how far another run departs."""

import logging
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .against import COMPARING, read_options
from .changing import CHANGING, changes_entry, read_changes
from .generate import finite, token_text
from .options import DEFAULT_MODEL, RUNNING, Group, Json, Model, PromptIds, Stats, number, option, takes
from .prompt import read_file, read_prompt, read_stdin
from .running import load, memory_told, mixture_rows, settings_entry, show_memory
from .surprise import coloured, rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..models.changes import Change
    from ..models.model import Model as LoadedModel
    from ..models.score import Comparison, Figures, Scores, Text, Token

log = logging.getLogger("toyllm")
MARK = "\ufeff"

RUN: Group = {key: value for key, value in RUNNING.items() if key != "context_size"}
WINDOWS: Group = {
    "context_size": number(int, "Tokens a window; none is scored by more than that.", "--context", shown="the model's"),
    "stride": number(int, "A window begins every so many tokens.", "--stride", shown="half the context"),
}


@takes(windows=WINDOWS, changing=CHANGING, running=RUN, comparing=COMPARING)
def score(
    context: typer.Context,
    file: Annotated[
        str | None, typer.Argument(help="The text to score; - or nothing reads stdin.", metavar="[FILE | -]", show_default=False)
    ] = None,
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[str | None, option("Score this text, - reads stdin without its last line break.", "--prompt", twin=False)] = None,
    prompt_ids: PromptIds = None,
    no_special: Annotated[bool, option("Take special tokens in the text, such as <|endoftext|>, as plain text.", "--no-special")] = False,
    bos: Annotated[bool, option("Begin with the model's beginning-of-text token: the text's first token is then scored.", "--bos")] = False,
    top: Annotated[int, option("Show the N likeliest tokens in each place too.", "--top", metavar="N", min=0)] = 0,
    summary: Annotated[bool, option("Only what all tokens come to, on stdout.", "--summary")] = False,
    stats: Stats = False,
    json: Json = False,
    *,
    windows: dict[str, Any],
    changing: dict[str, Any],
    running: dict[str, Any],
    comparing: dict[str, Any],
) -> None:
    """Score a text: how likely each token is, its rank, and the perplexity of all.

    A terminal shows the text in the colours of its surprise; elsewhere there is a row a token: log-probability and entropy in nats,
    rank 1 for the likeliest. The text is taken as it is, with its last line break.

    A text longer than the context is scored in windows as long as that, one every stride. Each scores the tokens that no window before it
    has reached, so each is scored once, with at least context - stride tokens before it, or all there are. One that has none before it
    in its window is not scored: the text's first and, at a stride as long as the context, every window's.

    Beside another run: KL(P||Q) of this run's distributions P to the other's Q, in nats a token, and how often both find the same token
    likeliest.

    Activations can be changed as they are computed: patched, then scaled, then added to, then ablated. So they are in both runs, unless
    the other has options of its own; with "" as options it is the model as it is. Positions count from 0 in each window.
    """
    began = time.perf_counter()
    given = read_text(context, file, prompt, prompt_ids)
    against, against_options = comparing["against"], comparing["against_options"]
    asked = running | changing
    others = asked if against_options is None else read_options(context, "--against-options", against_options, RUN | CHANGING)
    changes = read_changes(context, asked), read_changes(context, others)
    loaded = load(model, asked, changes[0])
    other = load(against or model, others, changes[1]) if against is not None or against_options is not None else None

    from ..models.generation import clock

    run = plan((loaded, other), changes, given, not no_special, bos, windows)
    loaded_s, cold = time.perf_counter() - began, clock()
    painting = not (json or summary or top) and output.colours(sys.stdout)
    with nullcontext(ignore) if painting else output.token_bar(f"scoring with {model}") as progress:
        batches = scored(run, top, progress)
        if json or summary:
            entries = [token_entry(run, token) for batch in batches for token in batch if not summary]
        else:
            entries = []
            for text in coloured(loaded.tokenizer, batches) if painting else rows(loaded.tokenizer, batches, other is not None, top):
                output.write(text)
    score_s = clock() - cold
    if not run.scored:
        log.info("no token has another before it, so none is scored; --bos puts one there")
    timings = {"load_s": loaded_s, "score_s": score_s, "tok_s": len(run.text.ids) / score_s if score_s > 0 else None}
    if json:
        output.write_json("score", document(run, timings) | ({} if summary else {"tokens": entries}))
    else:
        lines = named(figure_rows(run) + comparison_rows(run))
        output.write("".join(f"{line}\n" for line in lines)) if summary else output.say("\n".join(lines))
    if stats:
        show_stats(run, timings, time.perf_counter() - began)


def read_text(context: typer.Context, file: str | None, prompt: str | None, ids: str | None) -> str | list[int]:
    """The text to score, as it is, or ids. A byte order mark is no text, and is left out with a note."""
    if (file is not None) + (prompt is not None) + (ids is not None) > 1:
        raise typer.BadParameter("give one of them", ctx=context, param_hint="FILE, --prompt, --prompt-ids")
    if prompt is not None or ids is not None:
        return read_prompt(context, prompt, ids)
    if file is None and sys.stdin.isatty():
        raise typer.BadParameter("none given; try: toyllm score story.txt", ctx=context, param_hint="FILE")
    where, text = ("stdin", read_stdin()) if file in (None, "-") else (str(file), read_file(str(file)))
    if text.startswith(MARK):
        log.info("%s: the byte order mark at its beginning is not scored", where)
    if crlf := text.count("\r\n"):
        log.info("%s: %d lines end in CRLF, which is scored as it is", where, crlf)
    return text.removeprefix(MARK)


# ---- scoring ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A text, the model that scores it, the one to compare with, the windows, and the scores so far."""

    loaded: "LoadedModel"
    other: "LoadedModel | None"
    text: "Text"
    context: int
    stride: int
    found: "list[Scores]"

    @property
    def models(self) -> "list[LoadedModel]":
        """The one or two."""
        return [model for model in (self.loaded, self.other) if model]

    @property
    def room(self) -> int:
        """Positions of the largest window."""
        return min(self.context, len(self.text.ids))

    @property
    def scored(self) -> int:
        """Tokens scored so far."""
        return sum(len(part.logprobs) for part in self.found)

    @property
    def windows(self) -> int:
        """How many there are."""
        from ..models.score import windows

        return sum(1 for _ in windows(len(self.text.ids), self.context, self.stride))


def plan(
    models: "tuple[LoadedModel, LoadedModel | None]",
    changes: "tuple[list[Change], list[Change]]",
    given: str | list[int],
    special: bool,
    bos: bool,
    windows: dict[str, Any],
) -> Run:
    """A run that is about to begin, checked; each model with its changes."""
    from ..models.score import encode_text, window_sizes

    text = encode_text(models[0], given, special, bos)
    context, stride = window_sizes([model for model in models if model], windows["context_size"], windows["stride"])
    T = len(text.ids)
    positions = T if context >= T else None, min(T, context)
    loaded, other = (model.changed(made, *positions) if model and made else model for model, made in zip(models, changes, strict=True))
    return Run(loaded or models[0], other, text, context, stride, [])


def scored(run: Run, top: int, progress: "Callable[[int, int], None]") -> "Iterator[list[Token]]":
    """The tokens with their scores, some at a time; what they were made of goes to `run.found`. Raises OutOfMemory before any."""
    from ..models.score import score, tokens

    for model in run.models:
        with memory_told(model):
            model.context_for(run.room)
    reached = 0
    for part in score(run.loaded, run.text.ids, run.context, run.stride, top, run.other):
        run.found.append(part)
        yield list(tokens(run.text.ids, reached, part))
        reached = part.first + len(part.logprobs)
        progress(reached, len(run.text.ids))
    yield list(tokens(run.text.ids, reached))


def ignore(done: int, total: int) -> None:
    """Show nothing of it."""


# ---- what comes of it -------------------------------------------------------------------------------------------------------


def token_entry(run: Run, token: "Token") -> dict[str, Any]:
    """A token as the JSON document has it."""
    top = [{"id": i, "text": token_text(run.loaded, i), "logprob": p} for i, p in token.top]
    scores = {"logprob": token.logprob, "rank": token.rank, "entropy": token.entropy, "top_logprobs": top}
    compared = {"against_logprob": token.against_logprob, "kl": token.kl} if run.other else {}
    return {"id": token.id, "text": token_text(run.loaded, token.id), **scores, **compared}


def document(run: Run, timings: dict[str, float | None]) -> dict[str, Any]:
    """What --json prints, but for the tokens."""
    from ..models.score import comparison, figures

    def settings(model: "LoadedModel") -> dict[str, Any]:
        return settings_entry(model, run.context) | {"stride": run.stride} | changes_entry(model)

    against = {}
    if run.other:
        compared = comparison(run.found)
        against = {"against": (numbers(compared) if compared else {}) | {"settings": settings(run.other)}}
    return {
        "usage": {"tokens": len(run.text.ids), "scored": run.scored, "windows": run.windows},
        **numbers(figures(run.text, run.found)),
        **against,
        "timings": timings,
        "settings": settings(run.loaded),
    }


def numbers(figures: "Figures | Comparison") -> dict[str, float | None]:
    """Figures as JSON has them."""
    return {name: finite(value) for name, value in asdict(figures).items()}


def figure_rows(run: Run) -> list[tuple[str, str]]:
    """What the scores come to, named."""
    from ..models.score import figures

    found, T = figures(run.text, run.found), len(run.text.ids)
    sliding = f" of up to {run.context:,} tokens, one every {run.stride:,}" if run.windows > 1 else ""
    return [
        ("tokens", f"{T:,}, {run.scored:,} of them scored"),
        ("windows", f"{run.windows:,}{sliding}"),
        ("perplexity", shown(found.perplexity)),
        ("nats a token", shown(found.nats_per_token)),
        ("entropy", shown(found.entropy, " nats a token")),
        ("top-1 accuracy", percent(found.top_1)),
        ("bits a byte", shown(found.bits_per_byte, f", over {found.bytes or 0:,} bytes")),
        ("bits a character", shown(found.bits_per_character, f", over {found.characters or 0:,} characters")),
    ]


def comparison_rows(run: Run) -> list[tuple[str, str]]:
    """How far the other run departs, named."""
    from ..models.score import comparison

    found = comparison(run.found)
    if not found:
        return []
    percentiles = f"50 % {found.kl_p50:.4g}, 90 % {found.kl_p90:.4g}, 99 % {found.kl_p99:.4g}"
    return [
        ("other's perplexity", f"{found.perplexity:.4f} ({found.perplexity_difference:+.4g})"),
        ("KL(P||Q)", f"mean {found.kl_mean:.4g} nats a token; {percentiles}, most {found.kl_max:.4g} at token {found.kl_max_at}"),
        ("top-1 agreement", percent(found.top_1_agreement)),
    ]


def named(rows: list[tuple[str, str]]) -> list[str]:
    """A line a figure."""
    width = max(22, *(len(name) + 2 for name, _ in rows))
    return [f"{name + ':':<{width}}{value}" for name, value in rows]


def shown(value: float | None, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.4f}{unit}"


def percent(share: float | None) -> str:
    """A share of the scored tokens."""
    return "-" if share is None else f"{100 * share:.2f} % of tokens"


def show_stats(run: Run, timings: dict[str, float | None], total_s: float) -> None:
    """Times, rates, and the memory of each run, to stderr."""
    rate = timings["tok_s"]
    rows = [
        ("total duration", f"{total_s:.3f} s"),
        ("load duration", f"{timings['load_s']:.3f} s"),
        ("score duration", f"{timings['score_s']:.3f} s"),
        ("score rate", f"{rate:.1f} tokens/s" if rate else "-"),
        *mixture_rows(run.loaded),
    ]
    if run.other:
        rows += [(f"other's {name}", value) for name, value in mixture_rows(run.other)]
    output.say("\n".join(named(rows)))
    for model in run.models:
        show_memory(model, run.room)
