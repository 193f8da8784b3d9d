"""`toyllm bench`: how fast a model runs here, and how much that is of what this machine can do."""

import platform
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .endings import INTERRUPTS
from .models import size_text
from .options import DEFAULT_MODEL, RUNNING, Group, Json, Model, number, option, takes
from .running import load, memory_told, settings_entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..models.bench import Bench, Measured, Tell, Test

Column = tuple[str, int, Callable[["Measured"], str]]  # of the table: title, width, cell

LIST = "N,..."
SIZES: Group = {
    "prompt_sizes": (Annotated[str, option("Prompts to run, in tokens; 0 is none.", "--prompt-sizes", "-p", metavar=LIST)], "512"),
    "generation_lengths": (
        Annotated[str, option("How many tokens to decode; 0 is none.", "--generation-lengths", "-n", metavar=LIST)],
        "128",
    ),
    "depth": (Annotated[str, option("Positions that a prefill, uncounted, fills before.", "--depth", "-d", metavar=LIST)], "0"),
    "threads": number(str, "Threads of the kernels.", "--threads", shown="the physical cores", metavar=LIST),
}
RUN: Group = {key: value for key, value in RUNNING.items() if key not in SIZES} | {
    "context_size": number(int, "Positions of the KV cache.", "--context", shown="what the tests need")
}


@takes(sizes=SIZES, running=RUN)
def bench(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    repetitions: Annotated[
        int, option("Counted runs of each test; one that is not counted comes first.", "--repetitions", "-r", metavar="N", min=1)
    ] = 5,
    json: Json = False,
    *,
    sizes: dict[str, str | None],
    running: dict[str, Any],
) -> None:
    """Measure prefill and decoding: each size at each depth on each number of threads, as llama-bench does for llama.cpp.

    pp512 is a prompt of 512 tokens. tg128 is 128 tokens decoded one by one, with the search for the likeliest next one after each, as
    --temperature 0 does; "@ d4096" is behind 4096 others. The tokens are drawn from the vocabulary with a fixed seed.

    t/s is the mean over the repetitions ± their standard deviation; the rest is of the median one. MB/token is what a decoded token
    reads: weights as they are held, in a mixture those of the experts that run, and keys and values. GB/s is how fast it reads them,
    stream how fast this machine reads memory on as many threads (2.1 GB; the median of three reads before, between and after the
    repetitions), and share the one as a part of the other. TFLOP/s counts a prompt's matrix products and attention as `toyllm params`
    does, and the head once.
    """
    counts = {name: numbers(context, name, text) for name, text in sizes.items()}
    if not any(counts["prompt_sizes"] + counts["generation_lengths"]):
        raise typer.BadParameter("nothing to measure; expected a size above 0", param_hint=["--prompt-sizes", "--generation-lengths"])

    from ..models import bench as measuring

    loaded = load(model, running | {"threads": max(counts["threads"], default=None)})
    threads = counts["threads"] or [loaded.threads]
    tests = measuring.combine(counts["prompt_sizes"], counts["generation_lengths"], counts["depth"], threads)
    measuring.check_room(tests, loaded.config.context, running["context_size"])
    with memory_told(loaded), output.status_line() as status:
        status(f"{model}: setting up")
        room = loaded.context_for(running["context_size"] or max(test.end for test in tests))
        made = measuring.set_up(loaded, tests, room)
    facts = setting(made, tests, repetitions)
    measured, shown, interrupt = [], columns(tests), None
    if not json:
        output.write("".join(f"- {output.one_line(fact)}\n" for fact in told(facts, made, tests)))
        output.write("\n" + line(shown, [title for title, _, _ in shown]) + rule(shown))
    try:
        with output.status_line() as status:
            for test in tests:
                measured.append(measuring.measure(made, test, repetitions, telling(status, test)))
                status("")
                if not json:
                    output.write(line(shown, [cell(measured[-1]) for _, _, cell in shown]))
    except INTERRUPTS as error:
        interrupt = error
    if json:
        output.write_json("bench", facts | {"complete": interrupt is None, "tests": [entry(m) for m in measured]})
    if interrupt:
        raise interrupt


def numbers(context: typer.Context, name: str, text: str | None) -> list[int]:
    """The numbers in "128,512"; none for None."""
    least = 1 if name == "threads" else 0
    try:
        found = [int(part) for part in text.split(",")] if text is not None else []
        if min(found, default=least) >= least:
            return found
    except ValueError:
        pass
    parameter: Any = next(p for p in context.command.params if p.name == name)
    raise typer.BadParameter(f"{text!r}: expected numbers from {least}, such as 1,2", ctx=context, param=parameter)


def telling(status: Callable[[str], None], test: "Test") -> "Tell":
    """Shows how far a test is."""

    def tell(what: str, done: int, total: int) -> None:
        status(f"{test.name}, {test.threads} threads: {what}" + (f" {done:,} of {total:,}" if total > 1 else ""))

    return tell


# ---- what is measured -------------------------------------------------------------------------------------------------------


def setting(made: "Bench", tests: "Sequence[Test]", repetitions: int) -> dict[str, Any]:
    """What was measured, on what, and how, as the JSON document has it."""
    from importlib.metadata import version  # costs every other command 30 ms

    from .. import __version__
    from ..kernels.host import processor
    from ..kernels.threads import physical_cores, threading_layer
    from ..models.bench import SEED, last_cache_bytes
    from ..models.params import count
    from ..models.parts import whole

    loaded, entries = made.model, whole(made.anatomy).entries
    sums, dtypes = count(entries), {}
    for e in entries:
        dtype = "MXFP4" if e.key.endswith((".blocks", ".scales")) else e.dtype
        dtypes[dtype] = dtypes.get(dtype, 0) + e.nbytes
    return {
        "machine": {
            "processor": processor(),
            "cores": physical_cores(),
            "cache_bytes": last_cache_bytes(),
            "threading_layer": threading_layer(),
        },
        "versions": {
            "toyllm": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "numba", "llvmlite")},
        },
        "model": {
            "name": loaded.files.name,
            "model_type": loaded.family.__name__.rpartition(".")[2],
            "parameters": sums.parameters,
            "active": sums.active,
            "bytes": sums.nbytes,
            "bytes_by_dtype": dtypes,
        },
        "settings": settings_entry(loaded, made.room) | {"threads": list(dict.fromkeys(test.threads for test in tests))},
        "repetitions": repetitions,
        "seed": SEED,
        "stream_bytes": made.stream.nbytes if made.stream is not None else None,
    }


def entry(m: "Measured") -> dict[str, Any]:
    """A test as the JSON document has it; bytes are of a token, on average, and null for a prompt."""
    from ..models.bench import summary

    def billions(rate: float | None) -> float | None:
        return rate / 1e9 if rate is not None else None

    test, decodes = m.test, m.byte_rate is not None
    return {
        "test": test.name,
        "kind": test.kind,
        "tokens": test.tokens,
        "depth": test.depth,
        "threads": test.threads,
        "seconds": list(m.seconds),
        "tok_s": asdict(summary(m.rates)),
        "flops": m.work.flops,
        "tflop_s": m.flop_rate / 1e12,
        "weight_bytes": m.work.weight_bytes if decodes else None,
        "cache_bytes": m.work.cache_bytes if decodes else None,
        "gb_s": billions(m.byte_rate),
        "stream_seconds": list(m.stream_seconds),
        "stream_gb_s": billions(m.stream_rate),
        "share": m.share,
    }


def told(facts: dict[str, Any], made: "Bench", tests: "Sequence[Test]") -> list[str]:
    """The same in lines to stand above the table, and a caution where it belongs."""
    from ..models.bench import DECODE, work
    from ..models.params import sizes

    machine, versions, model, settings = (facts[key] for key in ("machine", "versions", "model", "settings"))
    threads = f"{', '.join(map(str, settings['threads']))}, by {machine['threading_layer']}"
    lines = [
        f"toyllm {versions['toyllm']}, Python {versions['python']}, NumPy {versions['numpy']}, Numba {versions['numba']}",
        f"{machine['processor']}, {machine['cores']} cores; kernels: {settings['backend']}; threads: {threads}",
        f"{model['name']} ({model['model_type']}): {model['parameters']:,} parameters, {model['active']:,} active; "
        + ", ".join(f"{dtype} {size_text(nbytes)}" for dtype, nbytes in model["bytes_by_dtype"].items()),
        f"KV cache: {settings['context']:,} positions in {settings['cache_dtype']}; prompts by {settings['prefill_chunk']} tokens"
        + (f"; experts mixed: {settings['moe']}" if sizes(made.anatomy.config).E else "")
        + ("; dense weights in 8 bits" if settings["weights"] == "q8" else ""),
        f"{facts['repetitions']} repetitions after one that is not counted; tokens drawn with seed {facts['seed']}"
        + (f"; stream: reads of {facts['stream_bytes'] / 1e9:.2f} GB" if facts["stream_bytes"] else ""),
    ]
    least = min((work(made, test).token_bytes for test in tests if test.kind == DECODE), default=None)
    if least is not None and machine["cache_bytes"] and least <= machine["cache_bytes"]:
        lines.append(
            f"a token reads {size_text(round(least))}, which the processor's {size_text(machine['cache_bytes'])} of cache may keep: "
            "the share is then not one of memory"
        )
    return lines


# ---- the table --------------------------------------------------------------------------------------------------------------


def columns(tests: "Sequence[Test]") -> list[Column]:
    """The columns that the tests fill; all but the first are aligned right."""
    from ..models.bench import DECODE, PREFILL

    def figure(form: str, amount: float | None, unit: float = 1) -> str:
        return form.format(amount / unit) if amount is not None else ""

    found: list[Column] = [("test", max(len(test.name) for test in tests), lambda m: m.test.name)]
    if len({test.threads for test in tests}) > 1:
        found.append(("threads", 7, lambda m: str(m.test.threads)))
    found.append(("t/s", 13, rate_text))
    if any(test.kind == DECODE for test in tests):
        found.append(("MB/token", 8, lambda m: figure("{:,.1f}", m.work.token_bytes or None, 1e6)))
        found.append(("GB/s", 5, lambda m: figure("{:.1f}", m.byte_rate, 1e9)))
        found.append(("stream", 6, lambda m: figure("{:.1f}", m.stream_rate, 1e9)))
        found.append(("share", 5, lambda m: figure("{:.0%}", m.share)))
    if any(test.kind == PREFILL for test in tests):
        found.append(("TFLOP/s", 7, lambda m: figure("{:.3g}", m.flop_rate if m.test.kind == PREFILL else None, 1e12)))
    return found


def rate_text(m: "Measured") -> str:
    """Mean and standard deviation of the tokens a second."""
    from ..models.bench import summary

    rate = summary(m.rates)
    digits = 2 if rate.mean < 100 else 1 if rate.mean < 1000 else 0
    return f"{rate.mean:.{digits}f}" + (f" ± {rate.sd:.{digits}f}" if rate.sd is not None else "")


def line(shown: list[Column], texts: list[str]) -> str:
    """A row of the table."""
    padded = [text.rjust(width) if i else text.ljust(width) for i, (text, (_, width, _)) in enumerate(zip(texts, shown, strict=True))]
    return f"| {' | '.join(padded)} |\n"


def rule(shown: list[Column]) -> str:
    """What stands between titles and rows."""
    return line(shown, ["-" * (width - bool(i)) + ":" * bool(i) for i, (_, width, _) in enumerate(shown)])
