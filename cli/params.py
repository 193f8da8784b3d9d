"""`toyllm params`: what a model is made of, and what it takes to run, before it is loaded or downloaded."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .models import size_text
from .options import DEFAULT_MODEL, RUNNING, Json, Model, number, option, takes
from .running import memory_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..models.location import ModelFiles
    from ..models.memory import Running
    from ..models.params import Anatomy, Entry
    from ..models.parts import Part

DEPTH = 16  # of the tree: no model's names have more parts, a hostile file's may
PLANNING = {
    **{name: RUNNING[name] for name in ("context_size", "cache_dtype", "prefill_chunk", "weights")},
    "batch_size": number(int, "Sequences that run together, each with that context.", "--batch-size", metavar="N", shown="1"),
}


@takes(planning=PLANNING)
def params(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    config: Annotated[
        Path | None, option("Ask of a config.json alone, before downloading.", "--config", metavar="FILE", show_default=False)
    ] = None,
    layers: Annotated[bool, option("A row a layer.", "--layers")] = False,
    tree: Annotated[bool, option("The tensors as a tree, instead of the sums.", "--tree")] = False,
    split: Annotated[
        str | None, option("Parts of consecutive layers, in these shares: 0.6,0.4.", "--split", metavar="SHARES", show_default=False)
    ] = None,
    shards: Annotated[
        int | None, option("N parts of every layer, cut along each tensor's shard axis.", "--shards", metavar="N", show_default=False)
    ] = None,
    bandwidth: Annotated[
        float | None,
        option("The memory's speed: adds the tokens a second that it allows.", "--bandwidth", metavar="GB/S", show_default=False),
    ] = None,
    json: Json = False,
    *,
    planning: dict[str, Any],
) -> None:
    """Count parameters and bytes, plan the memory, and tell what a token costs; from headers alone, no weight is read.

    Parameters: an MXFP4 code is one, its scale none; a tied embedding is counted once; buffers are none. Active are those that a token
    is multiplied with: k of E experts, a tied embedding as the head, but no table of which a token takes only its row.
    """
    if config is not None and (source := context.get_parameter_source("model")) and source.name == "COMMANDLINE":
        raise typer.BadParameter("give --model or --config, not both")
    if split is not None and shards is not None:
        raise typer.BadParameter("give --split or --shards, not both")
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise typer.BadParameter(f"--bandwidth {bandwidth}: expected a number above 0")

    from ..models import memory, parts
    from ..models.params import anatomy

    a = anatomy(model_files(model, config))
    context_size, sequences = planning["context_size"], 1 if planning["batch_size"] is None else planning["batch_size"]
    run = memory.running(a, context_size, planning["cache_dtype"], planning["prefill_chunk"], planning["weights"], sequences)
    cut = parts.split(a, fractions(split)) if split is not None else parts.shards(a, shards) if shards is not None else []
    if json:
        output.write_json("params", {"model": model if config is None else str(config), **document(a, run, cut, bandwidth, tree)})
        return
    if tree:
        output.table(("tensor", "dtype", "shape", "parameters", "bytes"), tree_rows(a.entries), right=(3, 4))
        return
    show_counts(a, layers)
    if cut:
        show_parts([part_figures(a, part, run, bandwidth) for part in cut])
    else:
        show_memory(a, run, bandwidth)


def model_files(model: str, config: Path | None) -> "ModelFiles":
    """The model's files, or a configuration's alone."""
    from ..models.location import ModelFiles, find_model

    if config is None:
        return find_model(model)
    return ModelFiles(str(config), config.parent, None, None, config, None, None, None, None)


def fractions(text: str) -> list[float]:
    """The shares in "0.6,0.4"."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--split {text}: expected numbers such as 0.6,0.4") from error


# ---- figures ----------------------------------------------------------------------------------------------------------------


def entry(entries: "Iterable[Entry]") -> dict[str, Any]:
    """Sums over tensors as the JSON document has them."""
    from ..models.params import count

    sums = count(entries)
    return {"parameters": sums.parameters, "active": sums.active, "bytes": sums.nbytes, "bits_per_weight": sums.bits}


def grouped(entries: "Sequence[Entry]", name: str, values: "Iterable[Any]") -> list[dict[str, Any]]:
    """Sums for each of the values that an attribute has; those without a tensor are left out."""
    found: dict[Any, list[Entry]] = {}
    for e in entries:
        found.setdefault(getattr(e, name), []).append(e)
    groups = [(value, found.get(value, [])) for value in values]
    return [{name: value, "tensors": len(mine), **entry(mine)} for value, mine in groups if mine]


def by_component(entries: "Sequence[Entry]") -> list[dict[str, Any]]:
    """Sums by component."""
    from ..models.params import COMPONENTS

    return grouped(entries, "component", COMPONENTS)


def by_dtype(entries: "Sequence[Entry]") -> list[dict[str, Any]]:
    """Sums by stored dtype."""
    return grouped(entries, "dtype", sorted({e.dtype for e in entries}))


def by_layer(entries: "Sequence[Entry]") -> list[dict[str, Any]]:
    """Sums by layer; layer null is all that belongs to none."""
    return grouped(entries, "layer", [None, *sorted({e.layer for e in entries if e.layer is not None})])


def part_figures(a: "Anatomy", part: "Part", run: "Running", bandwidth: float | None) -> dict[str, Any]:
    """What a part holds, needs and costs."""
    from ..models import memory
    from ..models.preload import available_memory

    pieces, token = memory.plan(a, part, run), memory.per_token(a, part, run)
    needed, available = memory.total(pieces), available_memory()
    return {
        "part": part.name,
        **entry(part.entries),
        "components": by_component(part.entries),
        "memory": {
            "pieces": [{"part": p.part, "kind": p.kind, "bytes": p.nbytes, "status": p.status} for p in pieces],
            **{f"{kind}_bytes": memory.total(pieces, kind) for kind in memory.KINDS},
            "needed_bytes": needed,
            "available_bytes": available,
            "verdict": memory.verdict(needed, memory.total(pieces, "weights"), available),
        },
        "token": {
            "weight_bytes": token.weight_bytes,
            "cache_bytes": token.cache_bytes,
            "bytes": token.nbytes,
            "flops": token.flops,
            "bandwidth_gb_s": bandwidth,
            "tok_s": token.rate(bandwidth * 1e9) if bandwidth else None,
        },
    }


def document(a: "Anatomy", run: "Running", parts: "list[Part]", bandwidth: float | None, tree: bool) -> dict[str, Any]:
    """All figures as one JSON document; the tensors only with `tree`."""
    from ..models.parts import whole

    figures = part_figures(a, whole(a), run, bandwidth)
    document = {
        "from": "headers" if a.files else "config",
        **entry(a.entries),
        "components": by_component(a.entries),
        "dtypes": by_dtype(a.entries),
        "layers": by_layer(a.entries),
        "files": [
            {"path": str(f.path), "bytes": f.nbytes, "header_bytes": f.header, "padding_bytes": f.padding, "tensor_bytes": f.tensors}
            for f in a.files
        ],
        "running": {key: value for key, value in asdict(run).items() if key != "keep"},  # which no plan here has
        "memory": figures["memory"],
        "token": figures["token"],
    }
    if parts:
        document["parts"] = [part_figures(a, part, run, bandwidth) for part in parts]
    if tree:
        document["tensors"] = [
            {"name": e.name, "dtype": e.dtype, "shape": e.shape, "parameters": e.parameters, "bytes": e.nbytes} for e in a.entries
        ]
    return document


# ---- tables -----------------------------------------------------------------------------------------------------------------


def bits_text(bits: float | None) -> str:
    """Bits a weight, or a dash."""
    return f"{bits:.4g}" if bits is not None else "-"


def show_groups(name: str, groups: list[dict[str, Any]], total: dict[str, Any] | None = None) -> None:
    """A table of sums, with their total."""
    rows = [(str(group[name]) if group[name] is not None else "no layer", group) for group in groups]
    rows += [("total", total)] if total else []
    cells = [(what, f"{g['parameters']:,}", f"{g['active']:,}", f"{g['bytes']:,}", bits_text(g["bits_per_weight"])) for what, g in rows]
    output.table((name, "parameters", "active", "bytes", "bits a weight"), cells, right=(1, 2, 3, 4))
    output.write("\n")


def show_counts(a: "Anatomy", layers: bool) -> None:
    """Sums by component, by dtype, and by layer; and the files to the byte."""
    components = by_component(a.entries)
    if a.config.tie_word_embeddings:
        components = [c | {"component": "embedding and head"} if c["component"] == "embedding" else c for c in components]
    show_groups("component", components, entry(a.entries))
    if layers:
        show_groups("layer", by_layer(a.entries), entry(a.entries))
    show_groups("dtype", by_dtype(a.entries))
    if a.files:
        header = ("file", "header", "of it padding", "tensors", "bytes")
        rows = [(f.path.name, f"{f.header:,}", f"{f.padding:,}", f"{f.tensors:,}", f"{f.nbytes:,}") for f in a.files]
        output.table(header, rows, right=(1, 2, 3, 4))
        output.write("\n")


def show_memory(a: "Anatomy", run: "Running", bandwidth: float | None) -> None:
    """The memory plan, whether it fits, and what a token costs."""
    from ..models.memory import plan
    from ..models.parts import whole

    part = whole(a)
    pieces = plan(a, part, run)
    output.write("".join(line + "\n" for line in memory_lines(pieces)) + "\n")
    settings = f"{run.context:,} positions, keys and values in {run.cache_dtype}, prompts by {run.prefill_chunk}"
    settings += ", dense weights in 8 bits" if run.weights == "q8" else ""
    settings += f", {run.sequences} sequences together" if run.sequences > 1 else ""
    facts = [row for row in running_rows(part_figures(a, part, run, bandwidth)) if row[1]]
    output.table(("running", ""), [("context", settings), *facts])


def running_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Memory and cost of a token, of a model or a part, named."""
    needs, token = figures["memory"], figures["token"]
    available = needs["available_bytes"]
    rate = f"{token['tok_s']:.1f} tok/s at {token['bandwidth_gb_s']:g} GB/s" if token["tok_s"] else ""
    return [
        ("memory", size_text(needs["needed_bytes"])),
        ("available here", size_text(available) if available is not None else "unknown"),
        ("verdict", needs["verdict"]),
        ("a token reads", f"{size_text(token['bytes'])}: weights {token['weight_bytes']:,}, cache {token['cache_bytes']:,}"),
        ("a token computes", f"{token['flops'] / 1e9:.4g} GFLOP"),
        ("at most", rate),
    ]


def show_parts(parts: list[dict[str, Any]]) -> None:
    """A column a part, a row a figure."""
    from ..models.memory import KINDS

    names = dict.fromkeys(group["component"] for part in parts for group in part["components"])

    def component(part: dict[str, Any], name: str) -> str:
        return next((f"{group['parameters']:,}" for group in part["components"] if group["component"] == name), "-")

    rows = [(name, *(component(part, name) for part in parts)) for name in names]
    rows += [(f"{name}", *(f"{part[name]:,}" for part in parts)) for name in ("parameters", "active", "bytes")]
    kinds = [kind for kind in KINDS if kind != "quantised" or any(part["memory"]["quantised_bytes"] for part in parts)]
    rows += [(f"memory: {kind}", *(f"{part['memory'][f'{kind}_bytes']:,}" for part in parts)) for kind in kinds]
    rows += [(row[0][0], *(text for _, text in row)) for row in zip(*map(running_rows, parts), strict=True) if row[0][1]]
    output.table(("", *(part["part"] for part in parts)), rows, right=range(1, len(parts) + 1))


def tree_rows(entries: "Sequence[Entry]") -> list[tuple[str, ...]]:
    """The tensors as a tree of their names' parts, each branch with its sums; a branch without a fork stands on its leaf's line."""
    return branch_rows([(e.name.split(".", DEPTH), e) for e in entries], "")


def branch_rows(named: "list[tuple[list[str], Entry]]", indent: str) -> list[tuple[str, ...]]:
    """The rows below one branch; the names are what is left of them there."""
    branches: dict[str, list[tuple[list[str], Entry]]] = {}
    for name, e in named:
        first, *rest = name or [""]
        branches.setdefault(first, []).append((rest, e))
    rows = []
    for n, (first, below) in enumerate(branches.items()):
        last = n == len(branches) - 1
        label = indent + ("└ " if last else "├ ") + first
        if len(below) == 1:
            rest, e = below[0]
            shape = "[" + ", ".join(map(str, e.shape)) + "]"
            rows.append((".".join((label, *rest)), e.dtype, shape, f"{e.parameters:,}", f"{e.nbytes:,}"))
        else:
            rows.append((label, "", "", f"{sum(e.parameters for _, e in below):,}", f"{sum(e.nbytes for _, e in below):,}"))
            rows += branch_rows(below, indent + ("  " if last else "│ "))
    return rows
