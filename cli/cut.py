"""`toyllm cut`: a smaller checkpoint out of a real one, or the same one in other names, dtypes and files."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .check import ranges
from .endings import INTERRUPTS
from .models import size_text
from .options import DEFAULT_MODEL, Json, Model, option

if TYPE_CHECKING:
    from ..models.cut import Choice, Plan
    from ..models.cut_tensors import Rounding

DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
EXPERT_DTYPES = {"mxfp4": "MXFP4", **DTYPES}
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def cut(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="The folder to make.", metavar="OUT", show_default=False)],
    model: Model = DEFAULT_MODEL,
    layers: Annotated[
        str | None, option("N: the first N; or a list, 0-3 or 0,2,5.", "--layers", twin=False, metavar="N|LIST", show_default="all")
    ] = None,
    experts: Annotated[
        str | None, option("N: the first N of each layer; or a list, 0,3,7.", "--experts", twin=False, metavar="N|LIST", show_default="all")
    ] = None,
    dialect: Annotated[
        str | None,
        option(
            "Names: hf (model., transformer.), bare (hf without these), original (gpt-oss as OpenAI has it, config.json too).",
            "--dialect",
            show_default="as they are",
        ),
    ] = None,
    dtype: Annotated[
        str | None, option("Everything stored as floats becomes bf16, f16 or f32.", "--dtype", show_default="as they are")
    ] = None,
    expert_dtype: Annotated[
        str | None,
        option("Experts become mxfp4 (only if each value stays the same), bf16, f16 or f32.", "--expert-dtype", show_default="as they are"),
    ] = None,
    shard_size: Annotated[
        str | None, option("Files of at most this many bytes: 2GB, 500MiB.", "--shard-size", metavar="SIZE", show_default="the same files")
    ] = None,
    merge: Annotated[bool, option("One file of weights.", "--merge")] = False,
    dry_run: Annotated[bool, option("Show what would be written, to the byte, and write nothing.", "--dry-run")] = False,
    force: Annotated[bool, option("Replace a folder that this command wrote.", "--force", twin=False)] = False,
    json: Json = False,
) -> None:
    """Write a smaller checkpoint, or the same one in other names, dtypes and files: tensors, config.json, tokenizer.

    Values stay as they are, bit for bit, where no other dtype is asked for; what that rounds is told. cut.json records what
    was cut. The folder appears whole or not at all; its name is printed.
    """
    if merge and shard_size is not None:
        raise typer.BadParameter("give one of them", ctx=context, param_hint="--merge, --shard-size")
    chosen = choice(context, layers, "--layers"), choice(context, experts, "--experts")
    dtypes = one_of(context, dtype, DTYPES, "--dtype"), one_of(context, expert_dtype, EXPERT_DTYPES, "--expert-dtype")
    size = nbytes_of(context, shard_size)

    from ..models.cut import Wanted, check_out, make_plan, write
    from ..models.location import find_model

    plan = make_plan(find_model(model), Wanted(*chosen, dialect, *dtypes, size, merge))
    if dry_run:
        output.write_json("cut", document(plan, out, None, 0.0)) if json else show(plan)
        return
    check_out(out, plan.nbytes, force)
    began = time.perf_counter()
    try:
        with output.byte_bar(f"cutting {model}") as progress:
            rounding = write(plan, out, force, progress)
    except INTERRUPTS:
        output.say("\ninterrupted: nothing is left of it")
        raise
    seconds = time.perf_counter() - began
    if rounding.values:
        by = f", by up to {100 * rounding.largest:.3g} %" if rounding.changed else ""
        output.say(f"note: rounding changed {rounding.changed:,} of {rounding.values:,} values{by}")
    if json:
        output.write_json("cut", document(plan, out, rounding, seconds))
        return
    output.say(f"{summary(plan)}; {size_text(plan.nbytes)} in {seconds:.2f} s ({plan.nbytes / seconds / 1e9:.1f} GB/s)")
    output.write(f"{out}\n")


# ---- what is asked for ------------------------------------------------------------------------------------------------------


def choice(context: typer.Context, text: str | None, hint: str) -> "Choice":
    """The number in "8", the numbers in "0-3,7". A number alone is how many; one layer alone is "5-5"."""
    if text is None:
        return None
    number = r"[0-9]{1,6}"
    if re.fullmatch(number, text):
        return int(text)
    if not re.fullmatch(rf"{number}(-{number})?(,{number}(-{number})?)*,?", text):
        raise typer.BadParameter(f"{text!r}: expected how many, or a list such as 0-3 or 0,2,5", ctx=context, param_hint=hint)
    bounds = [part.split("-") for part in text.removesuffix(",").split(",")]
    numbers = [n for first, *last in bounds for n in range(int(first), int((last or [first])[0]) + 1)]
    if not numbers or numbers != sorted(set(numbers)):
        raise typer.BadParameter(f"{text!r}: expected ascending numbers, each once", ctx=context, param_hint=hint)
    return tuple(numbers)


def one_of(context: typer.Context, text: str | None, known: dict[str, str], hint: str) -> str | None:
    """The dtype under safetensors' name."""
    if text is not None and text not in known:
        raise typer.BadParameter(f"{text!r}: expected {', '.join(known)}", ctx=context, param_hint=hint)
    return None if text is None else known[text]


def nbytes_of(context: typer.Context, text: str | None) -> int | None:
    """Bytes in "2GB", 2 · 10⁹, or "2GiB", 2 · 2³⁰."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)", text)
    if not found or found[2].lower() not in UNITS or float(found[1]) <= 0:
        raise typer.BadParameter(f"{text!r}: expected a size such as 2GB or 500MiB", ctx=context, param_hint="--shard-size")
    return int(float(found[1]) * UNITS[found[2].lower()])


# ---- what is told -----------------------------------------------------------------------------------------------------------


def document(plan: "Plan", out: Path, rounding: "Rounding | None", seconds: float) -> dict[str, Any]:
    """The plan and what came of it as one JSON document; `rounding` and `seconds` are null where nothing was written."""
    changes = rounding and {"values": rounding.values, "changed": rounding.changed, "largest_relative_change": rounding.largest}
    return {
        "out": str(out),
        "written": rounding is not None,
        "record": plan.record,
        "parameters": plan.parameters,
        "tensors": len(plan.tensors),
        "files": [{"name": name, "bytes": nbytes} for name, nbytes in plan.files.items()],
        "bytes": plan.nbytes,
        "rounding": changes,
        "seconds": None if rounding is None else seconds,
    }


def parts(plan: "Plan") -> list[tuple[str, str]]:
    """What is kept and what changes, named."""
    record = plan.record
    layers, experts, dialect = record["layers"], record["experts"], record["dialect"]
    rows = [("layers", f"{ranges(tuple(layers['kept']))} of {layers['of']}")]
    if experts:
        k = experts["per_token"]
        before = f" instead of {experts['of_per_token']}" if k != experts["of_per_token"] else ""
        rows.append(("experts", f"{ranges(tuple(experts['kept']))} of {experts['of']}, {k} a token{before}"))
    if dialect["from"] != dialect["to"]:
        rows.append(("names", f"{dialect['to']}, before {dialect['from']}"))
    for c in record["conversions"]:
        rows.append(("converted", f"{c['weights']} weights {c['from']} to {c['to']}, {'exactly' if c['exact'] else 'rounded to nearest'}"))
    return rows


def summary(plan: "Plan") -> str:
    """The same in one line."""
    return "; ".join(f"{name} {text}" for name, text in parts(plan))


def show(plan: "Plan") -> None:
    """The plan as two tables: what, and every file with its bytes."""
    facts = [*parts(plan), ("tensors", f"{len(plan.tensors):,}, {plan.parameters:,} parameters")]
    output.table(("cut", plan.record["source"]["model"]), facts)
    output.write("\n")
    rows = [(name, f"{nbytes:,}") for name, nbytes in plan.files.items()]
    output.table(("file", "bytes"), [*rows, ("total", f"{plan.nbytes:,}")], right=(1,))
