"""From what peers.py measured to one document, and from that to the page that people read.

Rates are medians over the rounds; a ratio, or a share of the streaming bandwidth, is formed within each round, from figures measured
seconds apart, and the median of those is shown.
"""

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

SCHEMA = "toyllm.peers/1"
TITLE = "# Peers side by side\n"
QUIET = 0.1  # of one processor, for other processes
JSON = f'{{\n "schema": "{SCHEMA}"'  # how the document begins, as indented by 1
NOTES = "## Notes\n"  # what people write themselves begins here, and is kept


def summarise(work: str, measured: dict[str, list[float]], streaming: list[dict[str, float]], sizes: dict[str, dict[str, float]]) -> dict:
    """One work: tokens/s of each runner in each round, the first runner's being toyllm's, and streaming GB/s in each round.

    `sizes` has, for each runner, "bytes" or "flops" a token.
    """
    first, *_ = measured
    plain = [max(rates.values()) for rates in streaming]
    runners = []
    for name, rates in measured.items():
        row: dict[str, Any] = {"name": name, "rounds": rates, "tokens_per_second": median(rates), "least": min(rates), "most": max(rates)}
        if "bytes" in sizes[name]:
            row["gigabytes_per_second"] = median(rates) * sizes[name]["bytes"] / 1e9
            row["share_of_streaming"] = median(rate * sizes[name]["bytes"] / 1e9 / read for rate, read in zip(rates, plain, strict=True))
        if "flops" in sizes[name]:
            row["teraflops"] = median(rates) * sizes[name]["flops"] / 1e12
        if name != first:
            row["ratio"] = median(ours / theirs for ours, theirs in zip(measured[first], rates, strict=True))
        runners.append(row)
    return {"name": work, "streaming": streaming, "streaming_gigabytes_per_second": median(plain), "runners": runners}


def judge(goals: Iterable[dict[str, Any]], document: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals whose work was measured, each with what was found."""
    rows = {(m["name"], work["name"], row["name"]): row for m in document["models"] for work in m["works"] for row in work["runners"]}
    kernels = {kernel["name"]: kernel for kernel in document["kernels"]}

    def found(goal: dict[str, Any]) -> float | None:
        row = rows.get((goal["model"], goal["work"], goal["runner"]))
        peer = rows.get((goal["model"], goal["work"], goal["against"]))
        if goal["work"] == "start":
            return document["start"] and document["start"]["seconds"]
        if goal["model"] == "kernels":
            return kernels.get(goal["work"], {}).get("of a plain read")
        if row and goal["against"] == "streaming":
            return row["share_of_streaming"]
        return median(ours / theirs for ours, theirs in zip(row["rounds"], peer["rounds"], strict=True)) if row and peer else None

    return [goal | {"found": value} for goal in goals if (value := found(goal)) is not None]


def reached(goal: dict[str, Any], aim: float) -> bool:
    """Whether what was found is as good as `aim`: as few seconds, or as large a ratio."""
    return goal["found"] <= aim if goal["work"] == "start" else goal["found"] >= aim


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """Markdown; the columns of `head` are separated by commas, those that begin with > are numbers."""
    names = head.split(", ")
    lines = ["| " + " | ".join(name.lstrip(">") for name in names) + " |"]
    lines.append("|" + "|".join("---:" if name.startswith(">") else "---" for name in names) + "|")
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.0f} %"


def number(value: float) -> str:
    """Three significant figures, thousands apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 0.1 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def speed(row: dict[str, Any]) -> str:
    """GB/s or TFLOP/s."""
    return f"{number(row['gigabytes_per_second'])} GB/s" if "gigabytes_per_second" in row else f"{number(row['teraflops'])} TFLOP/s"


def model_part(model: dict[str, Any]) -> str:
    """A model's section."""
    rows = []
    for work in model["works"]:
        for row in work["runners"]:
            share = percent(row["share_of_streaming"]) if "share_of_streaming" in row else ""
            ratio = f"{row['ratio']:.2f} ×" if "ratio" in row else ""
            spread = f"{number(row['least'])}–{number(row['most'])}"
            rows.append((work["name"], row["name"], number(row["tokens_per_second"]), spread, speed(row), share, ratio))
    text = f"## {model['title']}\n\n"
    text += table("work, engine, >tokens/s, >least–most, >speed, >of streaming, >toyllm is", rows)
    if model["agreement"]:
        text += "\nThe same model: logits behind a prompt and 24 steps, against toyllm's, error max|a − b| / max|b|:\n\n"
        checks = (
            (a["name"], f"{a['error']:.1e}", allowed(a), f"{a['largest']:.1e}", f"{a['same']} of {a['positions']}")
            for a in model["agreement"]
        )
        text += table("engine, >median error, >allowed, >largest error, >same best token", checks)
    return text


def allowed(entry: dict[str, Any]) -> str:
    """The tolerance of a comparison; one without is decided by the line behind it."""
    return "see below" if entry["tolerance"] is None else f"{entry['tolerance']:.0e}"


def goal_part(goals: list[dict[str, Any]]) -> str:
    """What was aimed at, and what came of it."""

    def shown(goal: dict[str, Any], value: float | None) -> str:
        if value is None:
            return ""
        if goal["work"] == "start":
            return f"{value:.2f} s"
        return percent(value) if goal["against"] in ("streaming", "a plain read") else f"{value:.2f} ×"

    def verdict(goal: dict[str, Any]) -> str:
        if not reached(goal, goal["goal"]):
            return f"missed by {percent(abs(1 - goal['found'] / goal['goal']))}"
        return "met, and the stretch" if goal["stretch"] and reached(goal, goal["stretch"]) else "met"

    rows = (
        (
            f"{goal['model']}, {goal['work']}",
            goal["runner"],
            goal["against"],
            shown(goal, goal["goal"]),
            shown(goal, goal["stretch"]),
            shown(goal, goal["found"]),
            verdict(goal),
        )
        for goal in goals
    )
    return "## Goals\n\n" + table("work, engine, against, >goal, >stretch, >found, verdict", rows)


def markdown(document: dict[str, Any]) -> str:
    """The whole page."""
    machine = document["machine"]
    reads = [rates for model in document["models"] for work in model["works"] for rates in work["streaming"]]
    text = f"{TITLE}\nWritten by `python benchmarks/peers.py`; README.md beside this page says how it measures.\n\n"
    facts = {
        "date": document["date"],
        "processor": f"{machine['processor']}, {machine['cores']} cores; {machine['features']}",
        "system": machine["system"],
        "threads": str(document["threads"]),
        "rounds": f"{document['rounds']}, interleaved; medians",
        "beside it": f"other processes took {percent(document['others'])} of one processor, meanwhile",
    }
    if reads:
        best = median(max(rates.values()) for rates in reads)
        each = ", ".join(f"{name} {median(rates[name] for rates in reads):.1f}" for name in reads[0])
        facts["streaming"] = f"{best:.1f} GB/s: of two ways to read {document['streaming_bytes'] / 1e9:g} GB the faster, each time ({each})"
    for name, about in document["engines"].items():
        facts[name] = ", ".join(f"{key} {value}" for key, value in about.items())
    text += table("what, this run", facts.items()) + "\n"
    if document["others"] > QUIET:
        text += "**Not a quiet machine**: figures of engines that wait for all threads suffer most from others' work.\n\n"
    parts = [model_part(model) for model in document["models"]]
    if start := document["start"]:
        spread = f"{start['least']:.2f}–{start['most']:.2f}"
        parts.append(f"## Start\n\n`{start['command']}`, warm, as a process from start to end: {start['seconds']:.2f} s ({spread}).\n")
    if document["kernels"]:
        how = "A call's time in the best round; reads beside the best plain read that was measured right behind them."
        parts.append(f"## Kernels\n\n{how}\n\n{kernel_table(document['kernels'])}")
    if document["goals"]:
        parts.append(goal_part(document["goals"]))
    if document["left_out"]:
        parts.append("## Left out\n\n" + "".join(f"* {line}\n" for line in document["left_out"]))
    return text + "\n".join(parts)


def kernel_table(kernels: list[dict[str, Any]]) -> str:
    """The micro-benchmarks of test_kernels.py."""
    rows = []
    for k in kernels:
        rate = f"{number(k['GB/s'])} GB/s" if "GB/s" in k else f"{number(k['GFLOP/s'])} GFLOP/s" if "GFLOP/s" in k else ""
        share = percent(k["of a plain read"]) if "of a plain read" in k else ""
        rows.append((k["name"], f"{number(k['microseconds'])} µs", rate, share))
    return table("kernel, >time, >speed, >of a plain read", rows)


def check_replaceable(path: Path, begins: str) -> None:
    """Raise ValueError where `path` cannot be written, or is there and is not what an earlier run wrote."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(begins):
        raise ValueError(f"{path}: not written by this command; name another file")


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    written = path.with_name(f".{path.name}.writing")
    written.write_text(text, encoding="utf-8")
    written.replace(path)


def with_notes(text: str, before: str) -> str:
    """The page, and behind it the notes of the one that was there before."""
    _, marker, notes = before.partition(f"\n{NOTES}")
    return text + marker + notes
