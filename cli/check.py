"""`toyllm check`: read a checkpoint whole and say everything about it that does not hold."""

import time
from typing import TYPE_CHECKING, Any

import typer

from . import output
from .models import size_text
from .options import DEFAULT_MODEL, Json, Model

if TYPE_CHECKING:
    from ..models.check import Finding, Report

DOES_NOT_HOLD = 3


def check(model: Model = DEFAULT_MODEL, json: Json = False) -> None:
    """Look for NaN, infinities and NaN scales in every tensor, and hold names, shapes and index against the architecture.

    Exit code 3 when something does not hold; warnings, such as a matrix of zeros, leave it 0.
    """
    from ..models.check import check as examine
    from ..models.location import find_model

    files = find_model(model)
    began = time.perf_counter()
    with output.byte_bar(f"checking {model}") as progress:
        report = examine(files, progress)
    seconds = time.perf_counter() - began
    if json:
        output.write_json("check", document(model, report, seconds))
    else:
        show(report, seconds)
    if not report.holds:
        raise typer.Exit(DOES_NOT_HOLD)


def document(model: str, report: "Report", seconds: float) -> dict[str, Any]:
    """The report as one JSON document."""
    return {
        "model": model,
        "holds": report.holds,
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "seconds": seconds,
        "findings": [
            {
                "severity": f.severity,
                "kind": f.kind,
                "path": str(f.path),
                "tensor": f.tensor,
                "message": f.message,
                "place": f.place,
                "experts": f.experts,
                "count": f.count,
            }
            for f in report.findings
        ],
    }


def show(report: "Report", seconds: float) -> None:
    """A row a finding, if there are any, and one line about all."""
    if report.findings:
        rows = [(f.severity, f.kind, f.tensor or f.path.name, what(f)) for f in report.findings]
        output.table(("", "kind", "tensor or file", "finding"), rows)
        output.write("\n")
    errors = sum(f.severity == "error" for f in report.findings)
    figures = f"{report.tensors} tensors, {size_text(report.nbytes)} in {seconds:.2f} s ({report.nbytes / seconds / 1e9:.1f} GB/s)"
    output.write(f"{figures}: {errors} errors, {len(report.findings) - errors} warnings\n")


def what(finding: "Finding") -> str:
    """The message, and the experts concerned where there is more than one."""
    if len(finding.experts) < 2:
        return finding.message
    return f"{finding.message}; experts {ranges(finding.experts)}"


def ranges(numbers: tuple[int, ...]) -> str:
    """Ascending numbers with runs drawn together: 0-3, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return ", ".join("-".join(map(str, run)) for run in runs)
