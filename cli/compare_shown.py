"""How `compare` shows what it has found: tables and a verdict, or one JSON document.

    {"schema": "toyllm.compare/1", "kind": "checkpoints", "a", "b", "agrees", "verdict", "rtol", "atol", "bytes", "seconds",
     "config": [{"key", "a", "b"}],
     "weights": [{"key", "status", "departs", "a": {"name", "dtype", "shape"}, "b",
                  "stored": [{"name", "differing", "bits", "place", "experts"}], "experts", "difference"}]}
    {"schema": "toyllm.compare/1", "kind": "runs", "a": settings or {"file"}, "b", "ids", "agrees", "verdict", "rtol", "atol", "first",
     "activations": [{"name", "departs", "a": shape, "b": shape, "tokens", "difference"}], "only_a", "only_b"}

A `difference` is null or {"elements", "differing", "unlike", "max", "mean", "largest", "error", "cosine", "place", "a", "b"}: see
models/compare.py. What JSON has no number for is "NaN", "Infinity" or "-Infinity".
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..models.compare_dump import Dump
from ..models.tensor_json import json_number
from . import output
from .compare_words import brief, checkpoints_verdict, kind, number, place, runs_verdict, shape
from .models import size_text

if TYPE_CHECKING:
    from ..models.compare import Difference
    from ..models.compare_match import Weight
    from ..models.compare_runs import Activation, Comparison
    from ..models.compare_weights import Pair, Report
    from ..models.model import Model

ROWS = 20  # of what departs, unless all are asked for
FIGURES = ("differing", "max", "mean", "error", "cosine", "worst at", "A", "B")


def show_checkpoints(
    report: "Report", names: tuple[str, str], seconds: float, tolerance: tuple[float, float], *, show_all: bool, json: bool
) -> None:
    """What two checkpoints come to."""
    verdict = checkpoints_verdict(report, *tolerance)
    if json:
        document = head("checkpoints", report.agrees(*tolerance), verdict, tolerance) | {"a": names[0], "b": names[1]}
        config = [{"key": key, "a": a, "b": b} for key, a, b in report.settings]
        weights = [weight_entry(pair, tolerance) for pair in report.pairs]
        output.write_json("compare", document | {"bytes": report.nbytes, "seconds": seconds, "config": config, "weights": weights})
        return
    shown = report.pairs if show_all else [pair for pair in report.pairs if pair.departs(*tolerance)]
    rows = [(pair.weight.name, what(pair), *figures(pair.difference, place(pair))) for pair in shown]
    show_rows(("weight", "", *FIGURES), rows, show_all, (2, 3, 4, 5, 6))
    output.write(output.one_line(verdict) + "\n")
    output.say(f"{size_text(report.nbytes)} in {seconds:.2f} s ({report.nbytes / seconds / 1e9:.1f} GB/s)")


def show_runs(
    found: "Comparison",
    runs: "tuple[Model | Dump, Model | Dump]",
    ids: Sequence[int],
    tolerance: tuple[float, float],
    *,
    show_all: bool,
    json: bool,
) -> None:
    """What two runs come to."""
    verdict, first = runs_verdict(found, *tolerance), found.first(*tolerance)
    if json:
        document = head("runs", first is None, verdict, tolerance) | dict(zip("ab", map(run_entry, runs), strict=True))
        activations = [activation_entry(at, tolerance) for at in found.activations]
        document |= {"ids": list(ids), "first": first and first.name, "activations": activations}
        output.write_json("compare", document | {"only_a": found.only_a, "only_b": found.only_b})
        return
    shown = found.activations if show_all else [at for at in found.activations if at.departs(*tolerance)]
    rows = []
    for at in shown:
        size = str(list(at.a)) if at.a == at.b else f"{list(at.a)} / {list(at.b)}"
        tokens = f"{len(at.tokens(*tolerance))} of {len(at.by_token)}" if at.difference else "-"
        rows.append((at.name, size, tokens, *figures(at.difference, str(list(at.difference.place or ())) if at.difference else "-")))
    show_rows(("activation", "shape", "tokens", *FIGURES), rows, show_all, (2, 3, 4, 5, 6, 7))
    output.write(output.one_line(verdict) + "\n")
    for name, missing in (("A", found.only_a), ("B", found.only_b)):
        if missing:
            output.say(f"not compared: {len(missing)} activations that only {name} has, such as {missing[0]}")


def show_rows(header: Sequence[str], rows: Sequence[Sequence[str]], show_all: bool, right: Sequence[int]) -> None:
    """A table, cut unless all is asked for, and a blank line; nothing without rows."""
    if not rows:
        return
    output.table(header, rows if show_all else rows[:ROWS], right)
    if not show_all and len(rows) > ROWS:
        output.write(f"... and {len(rows) - ROWS} more: --all shows them\n")
    output.write("\n")


def what(pair: "Pair") -> str:
    """How a weight differs, in a word or two."""
    if pair.status in ("dtype", "rounded"):
        return f"{kind(pair.a)} / {kind(pair.b)}" + (", rounded" if pair.status == "rounded" else "")
    if pair.status == "shape":
        return f"{shape(pair.a)} / {shape(pair.b)}"
    retyped = f"{kind(pair.a)} / {kind(pair.b)}, " if pair.a and pair.b and pair.a.kind != pair.b.kind else ""
    status = retyped + pair.status.replace(" a", " in A").replace(" b", " in B")
    if not pair.experts:
        return status
    return f"{status}, expert {pair.experts[0]}" if len(pair.experts) == 1 else f"{status}, {len(pair.experts)} experts"


def figures(d: "Difference | None", where: str) -> tuple[str, ...]:
    """The figures of a difference as cells."""
    if d is None:
        return ("-",) * len(FIGURES)
    cosine = "-" if d.cosine is None else f"{d.cosine:.8f}"
    return (f"{d.differing:,}", brief(d.max), brief(d.mean), brief(d.error), cosine, where if d.place else "-", number(d.a), number(d.b))


# ---- JSON -------------------------------------------------------------------------------------------------------------------


def head(kind: str, agrees: bool, verdict: str, tolerance: tuple[float, float]) -> dict[str, Any]:
    """What both documents begin with."""
    return {"kind": kind, "agrees": agrees, "verdict": verdict, "rtol": tolerance[0], "atol": tolerance[1]}


def weight_entry(pair: "Pair", tolerance: tuple[float, float]) -> dict[str, Any]:
    """A pair of weights."""

    def side(weight: "Weight | None") -> dict[str, Any] | None:
        return weight and {"name": weight.name, "dtype": weight.kind, "shape": list(weight.shape)}

    return {
        "key": pair.weight.key,
        "status": pair.status,
        "departs": pair.departs(*tolerance),
        "a": side(pair.a),
        "b": side(pair.b),
        "stored": [asdict(stored) for stored in pair.stored],
        "experts": list(pair.experts),
        "difference": difference_entry(pair.difference),
    }


def activation_entry(at: "Activation", tolerance: tuple[float, float]) -> dict[str, Any]:
    """An activation in both runs."""
    return {
        "name": at.name,
        "departs": at.departs(*tolerance),
        "a": list(at.a),
        "b": list(at.b),
        "tokens": at.tokens(*tolerance),
        "difference": difference_entry(at.difference),
    }


def difference_entry(d: "Difference | None") -> dict[str, Any] | None:
    """A difference, in numbers that JSON has."""
    return d and {key: json_number(value) for key, value in (asdict(d) | {"error": d.error}).items()}


def run_entry(run: "Model | Dump") -> dict[str, Any]:
    """Where a run comes from: a file, or a model and how it ran."""
    from .running import settings_entry

    return {"file": str(run.path)} if isinstance(run, Dump) else {k: v for k, v in settings_entry(run, 0).items() if k != "context"}
