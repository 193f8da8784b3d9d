"""`toyllm trace`: what a model does with a prompt, layer by layer: norms, the logit lens, attention, experts; as tables or as a page."""

import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .changing import CHANGING, changes_entry, read_changes
from .generate import token_text
from .options import DEFAULT_MODEL, RUNNING, Group, Json, Model, PromptIds, Stats, option, takes
from .prompt import read_prompt
from .running import load, memory_told, mixture_rows, settings_entry, show_memory

if TYPE_CHECKING:
    import numpy as np

    from ..models.model import Model as LoadedModel
    from ..models.trace import Layer, Lens, Routing, Trace

log = logging.getLogger("toyllm")
RUN: Group = {key: value for key, value in RUNNING.items() if key != "context_size"}  # the cache is as large as the run needs
SECTIONS = ("lens", "norms", "attention", "routing")


@takes(changing=CHANGING, running=RUN)
def trace(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to run; - or nothing reads stdin.", metavar="PROMPT", show_default=False)
    ] = None,
    model: Model = DEFAULT_MODEL,
    prompt_ids: PromptIds = None,
    no_special: Annotated[bool, option("Take special tokens in the prompt, such as <|endoftext|>, as plain text.", "--no-special")] = False,
    layers: Annotated[
        str | None, option("Only these: 0,3-5; -1 is the last.", "--layers", twin=False, metavar="LAYERS", show_default="all")
    ] = None,
    show: Annotated[
        str | None,
        option(f"Only these tables: {', '.join(SECTIONS)}; with commas between.", "--show", metavar="TABLES", show_default="all"),
    ] = None,
    top: Annotated[int, option("The lens' N likeliest tokens, in the document and the page.", "--top", metavar="N", min=1)] = 5,
    html: Annotated[Path | None, option("Write all of it as one page for a browser.", "--html", twin=False, metavar="FILE")] = None,
    force: Annotated[bool, option("Write over a file that is there.", "--force", twin=False)] = False,
    stats: Stats = False,
    json: Json = False,
    *,
    changing: dict[str, Any],
    running: dict[str, Any],
) -> None:
    """Show what a model does with a prompt at each layer.

    lens: the token that would come next if the model stopped behind that layer, and its probability in percent; * is the token that
    follows in the prompt. norms: of the residual stream, where it enters, and behind attention and behind all of each layer. attention:
    entropy in nats, the mean of a layer's heads and each head's own, and what goes to the sink. routing: the experts of each token, their
    weights in percent, and how loaded each expert is.

    A terminal shows as many layers as fit, or those that are named, below each other. The page holds all this and the attention maps of
    every head, and opens anywhere, without a network. Maps beyond 128 MiB are left out of it, with a note.

    Activations can be changed as they are computed: patched, then scaled, then added to, then ablated. The lens is applied to the stream
    as it then is, so a change of norm_f or of the logits is not in it.
    """
    began = time.perf_counter()
    chosen = parse_layers(context, layers)
    sections = parse_sections(context, show)
    if html is not None:
        from ..models.tensor_save import check_target

        check_target(html, (".html", ".htm"), force)
    text_or_ids, changes = read_prompt(context, prompt, prompt_ids), read_changes(context, changing)
    loaded = load(model, running, changes)

    from ..models.generation import clock, encode_prompt
    from ..models.params import sizes

    ids = encode_prompt(loaded, text_or_ids, not no_special)
    if html is not None:
        from .trace_page import check_length

        check_length(len(ids))
    loaded = loaded.changed(changes, len(ids), len(ids)) if changes else loaded
    L = sizes(loaded.config).L
    wanted = None if chosen is None else [number + L if -L <= number < 0 else number for number in chosen]
    found, timings = measured(loaded, ids, wanted, top, html is not None, time.perf_counter() - began, clock)
    if html is not None:
        from .trace_page import write_page

        write_page(html, force, loaded, found)
    if json:
        output.write_json("trace", document(loaded, found, timings))
    elif html is None:
        from .trace_shown import show_tables

        show_tables(loaded, found, sections, wrap=layers is not None)
    if stats:
        show_stats(loaded, len(ids), timings, time.perf_counter() - began)


def parse_layers(context: typer.Context, text: str | None) -> list[int] | None:
    """Layers as "0,3-5" names them, negative ones from the end; None for all."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(-?[0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not match or last < first or (first < 0 and match[2]):
            raise typer.BadParameter(f"{part.strip()!r}: expected layers such as 0,3-5 or -1", ctx=context, param_hint="--layers")
        found += range(first, last + 1)
    return found


def parse_sections(context: typer.Context, text: str | None) -> list[str]:
    """The tables to show, in their order."""
    wanted = [part.strip() for part in text.split(",")] if text is not None else list(SECTIONS)
    for part in wanted:
        if part not in SECTIONS:
            raise typer.BadParameter(f"{part!r}: expected {', '.join(SECTIONS)}", ctx=context, param_hint="--show")
    return [section for section in SECTIONS if section in wanted]


def measured(
    loaded: "LoadedModel", ids: list[int], layers: list[int] | None, top: int, paged: bool, load_s: float, clock: Any
) -> "tuple[Trace, dict[str, float | None]]":
    """The trace, with attention maps where a page is to have them and they are not too large, and how long it took."""
    from ..models.trace import trace

    cold = clock()
    with output.token_bar(f"tracing {loaded.files.name}") as progress, memory_told(loaded):
        found = trace(loaded, ids, layers, top, paged and maps_fit(loaded, ids, layers), progress)
    trace_s = clock() - cold
    return found, {"load_s": load_s, "trace_s": trace_s, "tok_s": len(ids) / trace_s if trace_s > 0 else None}


def maps_fit(loaded: "LoadedModel", ids: list[int], layers: list[int] | None) -> bool:
    """Whether a page can hold the attention maps; says what to do where it cannot."""
    from ..models.params import sizes
    from ..models.trace import MAPS, map_bytes

    n = len(set(layers)) if layers is not None else sizes(loaded.config).L
    needed = map_bytes(loaded, len(ids), n)
    if needed > MAPS:
        most = MAPS // map_bytes(loaded, len(ids), 1)
        hint = f"--layers with up to {most} of them, or a shorter prompt, brings them" if most else "take a shorter prompt"
        log.info("no attention maps in the page: %d MiB for %d tokens and %d layers; %s", needed >> 20, len(ids), n, hint)
    return needed <= MAPS


# ---- the JSON document ------------------------------------------------------------------------------------------------------


def document(loaded: "LoadedModel", found: "Trace", timings: dict[str, float | None]) -> dict[str, Any]:
    """What --json prints."""
    tokens = [{"id": i, "text": token_text(loaded, i), "embed": norm} for i, norm in zip(found.ids, numbers(found.embed), strict=True)]
    return {
        "tokens": tokens,
        "layers": [layer_entry(loaded, layer) for layer in found.layers],
        "timings": timings,
        "settings": settings_entry(loaded, len(found.ids)) | changes_entry(loaded),
    }


def layer_entry(loaded: "LoadedModel", layer: "Layer") -> dict[str, Any]:
    """One layer; lists are by token, or by head and token."""
    entropy, sink = layer.entropy, layer.sink
    return {
        "layer": layer.number,
        "resid_mid": numbers(layer.resid_mid),
        "out": numbers(layer.out),
        "lens": lens_entries(loaded, layer.lens),
        "attention": {
            "entropy": numbers(entropy),
            "head_entropy": numbers(entropy.mean(1)),
            "mean_entropy": numbers(entropy.mean()),
            "sink": None if sink is None else numbers(sink),
            "head_sink": None if sink is None else numbers(sink.mean(1)),
        },
        "routing": layer.routing and routing_entry(layer.routing),
    }


def lens_entries(loaded: "LoadedModel", lens: "Lens") -> list[dict[str, Any]]:
    """An entry a token: the likeliest, the entropy, and how likely the token was that follows; null for the last."""
    rows = zip(
        lens.ids.tolist(), numbers(lens.probabilities), numbers(lens.entropy), numbers(lens.following), lens.rank.tolist(), strict=True
    )
    return [
        {
            "top": [{"id": i, "text": token_text(loaded, i), "prob": p} for i, p in zip(ids, probs, strict=True) if i >= 0],
            "entropy": entropy,
            "next": {"prob": p_next, "rank": rank} if rank > 0 else None,
        }
        for ids, probs, entropy, p_next, rank in rows
    ]


def routing_entry(routing: "Routing") -> dict[str, Any]:
    """The experts of each token, and what each expert has to do."""
    return {
        "experts": routing.experts.tolist(),
        "weights": numbers(routing.weights),
        "counts": routing.counts.tolist(),
        "shares": numbers(routing.shares),
        "max_over_mean": routing.imbalance,
    }


def numbers(array: "np.ndarray | np.floating[Any]") -> Any:
    """Numbers as JSON has them: lists, null for what is not finite."""
    import numpy as np

    values = np.asarray(array).astype(object)
    values[~np.isfinite(array)] = None
    return values.tolist()


def show_stats(loaded: "LoadedModel", T: int, timings: dict[str, float | None], total_s: float) -> None:
    """Times, rates and memory, to stderr."""
    rate = timings["tok_s"]
    rows = [
        ("total duration", f"{total_s:.3f} s"),
        ("load duration", f"{timings['load_s']:.3f} s"),
        ("trace duration", f"{timings['trace_s']:.3f} s"),
        ("trace rate", f"{rate:.1f} tokens/s" if rate else "-"),
        *mixture_rows(loaded),
    ]
    output.say("\n".join(f"{name + ':':<22}{value}" for name, value in rows))
    show_memory(loaded, T)
