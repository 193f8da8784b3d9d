"""`toyllm card --check`: cards against the engine, a row for each step whose value the engine can show.

    {"schema": "toyllm.card/1", "check": {"model", "file", "card", "ids", "start", "rtol", "holds", "verdict", "first",
     "rows": [{"run", "card", "step", "text", "place", "activation", "compared", "difference", "worst", "tolerance", "holds"}],
     "ran", "unstated", "notes", "seconds"}}

`first` is the first comparison that departs, in the order of computing: {"run", "card", "step", "text", "place", "activation",
"difference", "tolerance"}, or null. Differences are max|a − b| / max|b|, b the engine's, or "Infinity" where shapes or infinities differ.
"""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..kernels.errors import ToyllmError
from . import output
from .options import Group, Json, PromptIds, number, option
from .prompt import read_prompt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..cards.check import Held, Report
    from ..cards.structure import Card

DOES_NOT_HOLD = 3
PATIENCE = 1.0  # seconds before it is said what runs

CHECKING: Group = {
    "check": (
        Annotated[
            bool, option("Run the cards on the weights and compare each step with the engine; a FILE.card in place of ours.", "--check")
        ],
        False,
    ),
    "prompt": (
        Annotated[str | None, option("Of --check: run this text; - reads stdin.", "--prompt", twin=False, show_default="random ids")],
        None,
    ),
    "prompt_ids": (PromptIds, None),
    "start": number(int, "Of --check: prefill N tokens of the prompt, decode the others.", "--start", metavar="N", shown="all but 6"),
    "rtol": number(float, "Of --check: differences up to this share of the largest value agree.", "--rtol", metavar="R", shown="1e-4"),
    "json": (Json, False),
}


def is_check(context: typer.Context, checking: dict[str, Any]) -> bool:
    """Whether a check is asked for. Raises BadParameter where only its options are; the environment may have those for other commands."""
    for name in ("prompt", "prompt_ids", "start", "rtol"):
        source = context.get_parameter_source(name)
        if not checking["check"] and source and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name.replace('_', '-')} is for a check: give --check too")
    return checking["check"]


def check_cards(
    context: typer.Context, name: str | None, model: str | None, form: str, others: dict[str, Any], checking: dict[str, Any]
) -> None:
    """Run the cards of a model's family and compare them with the engine; exit code 3 where they depart.

    `name` is a card of the library, which narrows what is shown, or a FILE.card whose cards run in place of the library's of their names.
    `model` None is the embedded one of the card's family; `checking` are the options of `CHECKING`, and `others` those that do not go
    together with them.
    """
    if wrong := next((option for option, value in others.items() if value), None):
        raise typer.BadParameter(f"give --check or {wrong}, not both")
    if form not in ("text", "json"):
        raise typer.BadParameter(f"--format {form}: a check is shown as text or json")
    start, rtol, json = checking["start"], checking["rtol"], checking["json"] or form == "json"
    if rtol is not None and not 0 <= rtol < math.inf:
        raise typer.BadParameter(f"--rtol {rtol}: expected a number from 0")
    given = checking["prompt"] is not None or checking["prompt_ids"] is not None
    prompt = read_prompt(context, checking["prompt"], checking["prompt_ids"]) if given else None

    from ..cards.catalogue import READING, find_card, library
    from ..cards.check import RTOL, check
    from .card import EMBEDDED, is_file

    cards, file = library(), Path(name) if name is not None and is_file(name) else None
    if file is not None:
        cards, wanted = overridden(cards, file)
    else:
        wanted = None if name is None else find_card(name, cards, family_first(model)).name
    model = model or EMBEDDED["gpt2" if wanted is None or wanted in READING["gpt2"] else "gpt-oss"]

    from ..models.generation import encode_prompt
    from ..models.model import load
    from .vanished import end_in_words

    began = time.perf_counter()
    loaded = load(model, exact=True)
    end_in_words(model)
    check_family(loaded.config, wanted, model)
    ids = None if prompt is None else encode_prompt(loaded, prompt)
    with output.status_line() as show:

        def progress(text: str) -> None:
            if time.perf_counter() - began > PATIENCE:
                show(f"checking {model}: {text}")

        report = check(loaded, cards, ids, start, RTOL if rtol is None else rtol, progress=progress)
    if wanted is not None and file is None:
        report = report.about(wanted, cards)
    seconds = time.perf_counter() - began
    if json:
        settings = {"model": model, "file": file and str(file), "card": wanted}
        output.write_json("card", {"check": settings | document(report, seconds)})
    else:
        show_report(report, seconds)
    if not report.holds:
        raise typer.Exit(DOES_NOT_HOLD)


def overridden(cards: "Mapping[str, Card]", file: Path) -> "tuple[Mapping[str, Card], str]":
    """The library with a file's cards in place of those of their names, and the first that is. Raises ToyllmError where none is."""
    from .card_file import checked_cards

    theirs = {card.name: card for card in checked_cards(file, cards)}
    replaced = [name for name in theirs if name in cards]
    if not replaced:
        raise ToyllmError(
            f"{file}: {', '.join(theirs)}: no card of ours has this name, so nothing in the engine to compare it with; give it the name of "
            "the card that it is to run in place of, such as gpt2.Attn (toyllm card --list has them all)"
        )
    return {**cards, **theirs}, replaced[0]


def family_first(model: str | None) -> tuple[str, ...]:
    """The families, that of a named model first."""
    from ..cards.catalogue import READING

    return tuple(READING) if model is None else tuple(sorted(READING, key=lambda family: family != family_of_model(model)))


def family_of_model(model: str) -> str:
    """The namespace of a model's cards, from its configuration."""
    from ..models.config import load_config
    from ..models.location import find_model

    return namespace(load_config(find_model(model))[1])


def namespace(config: Any) -> str:
    """The namespace of the cards of a configuration's family."""
    from ..models import gpt2

    return "gpt2" if isinstance(config, gpt2.Config) else "gpt-oss"


def check_family(config: Any, name: str | None, model: str) -> None:
    """Raise ToyllmError for a card that is of another family than the model."""
    from ..cards.catalogue import READING

    if name is not None and name not in READING[namespace(config)]:
        raise ToyllmError(f"{name}: not a card of {model}, which is a {namespace(config)}; name another model with -m, or none")


# ---- what is shown ----------------------------------------------------------------------------------------------------------

HEADER = ("run", "card", "step", "activation", "compared", "difference", "tolerance", "", "what it does")


def show_report(report: "Report", seconds: float) -> None:
    """A row a step and activation, and the verdict; on stderr what the run could not show."""
    rows = []
    for row in report.rows:
        h = row.worst
        figures = tuple(f"{value:.{digits}e}" if value else "0" for value, digits in ((h.difference, 1), (h.tolerance, 0)))
        held = "ok" if row.holds else "DEPARTS"
        rows.append((h.stage, h.card, str(h.step), h.activation, str(len(row.held)), *figures, held, h.text))
    output.table(HEADER, rows, right=(2, 4, 5, 6))
    output.write("\n" + output.one_line(verdict(report)) + "\n")
    for note in report.notes:
        output.say(f"note: {note}")
    for name in report.unstated:
        output.say(f"note: no step names {output.one_line(name)}, so it was not compared")
    output.say(f"{len(report.ran)} cards ran on {len(report.ids)} tokens, {report.start} of them prefilled, in {seconds:.1f} s")


def verdict(report: "Report") -> str:
    """What the report comes to, in a sentence."""
    rows, first = report.rows, report.first
    if first is not None:
        count = sum(not row.holds for row in rows)
        place = f" ({first.place})" if first.place else ""
        return (
            f"departs first in {first.stage}, at {first.card}, step {first.step}{place}, {first.text}: {first.name}: difference "
            f"{first.difference:.1e}, tolerance {first.tolerance:.0e} of the largest value; {count} of {len(rows)} rows depart"
        )
    worst = max((row.worst for row in rows), key=lambda h: h.difference)
    return (
        f"agrees with the engine: {sum(len(row.held) for row in rows)} tensors in {len(rows)} rows; largest difference "
        f"{worst.difference:.1e} of the largest value, at {worst.card}, step {worst.step}: {worst.name}"
    )


def document(report: "Report", seconds: float) -> dict[str, Any]:
    """The report as JSON has it."""
    from ..models.tensor_json import json_number

    def step(h: "Held") -> dict[str, Any]:
        return {"run": h.stage, "card": h.card, "step": h.step, "text": h.text, "place": h.place}

    first = report.first
    rows = [
        {
            **step(row.worst),
            "activation": row.worst.activation,
            "compared": len(row.held),
            "difference": json_number(row.worst.difference),
            "worst": row.worst.name,
            "tolerance": row.worst.tolerance,
            "holds": row.holds,
        }
        for row in report.rows
    ]
    return {
        "ids": list(report.ids),
        "start": report.start,
        "rtol": report.rtol,
        "holds": report.holds,
        "verdict": verdict(report),
        "first": first
        and {**step(first), "activation": first.name, "difference": json_number(first.difference), "tolerance": first.tolerance},
        "rows": rows,
        "ran": sorted(report.ran),
        "unstated": list(report.unstated),
        "notes": list(report.notes),
        "seconds": seconds,
    }
