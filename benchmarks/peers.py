"""Time toyllm beside llama.cpp and transformers: the same random weights, the same shapes, the same machine, in turns.

    python benchmarks/peers.py [--peers PYTHON] [--only TEXT]... [--rounds N] [--quick] [--results PAGE] [--json FILE]

The tables go to stdout; README.md beside this file says how the peers' environment is made and what is measured how.
Before a peer is timed its logits are held against toyllm's: exit code 3 where they are not those of the same model.
"""

import argparse
import contextlib
import datetime as dt
import hashlib
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import report
import streaming
from make_gguf import write_gguf
from setups import GOALS, MODELS, START, Model, Runner, Work

from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.host import processor
from toyllm.kernels.jit import default_base
from toyllm.kernels.threads import physical_cores, set_threads
from toyllm.models.location import find_model
from toyllm.models.memory import per_token, running
from toyllm.models.params import Anatomy, anatomy, sizes
from toyllm.models.parts import whole

HERE = Path(__file__).parent
SHOWN = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")  # of the processor's features
Works = list[tuple[Work, list[Runner]]]  # each work with those who run it
CHECKED = {"prompt": 160, "tokens": 24}  # beyond gpt-oss's window of 128


# ---- files ------------------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def make(model: Model, folder: Path) -> tuple[Path, Path]:
    """The model's checkpoint and its GGUF file, kept from an earlier run of the same makers or made now."""
    source = b"".join((HERE / name).read_bytes() for name in ("make_gpt2.py", "make_gpt_oss.py", "make_gguf.py"))
    stamp = hashlib.sha256(source + repr(model.maker).encode()).hexdigest()
    home = folder / model.name
    checkpoint, gguf, made = home / "checkpoint", home / "model.gguf", home / "made"
    if made.exists() and made.read_text() == stamp:
        return checkpoint, gguf
    if home.exists() and not made.exists():
        raise ToyllmError(f"{home}: not made by this command; name another place with --folder")
    if home.exists():
        shutil.rmtree(home)  # of other makers, or not finished
    home.mkdir(parents=True)
    made.write_text("not finished\n")
    free = shutil.disk_usage(home).free
    if free < model.gigabytes * 1e9:
        raise ToyllmError(f"{home}: needs {model.gigabytes} GB, {free / 1e9:.1f} GB are free; name another place with --folder")
    say(f"making {model.name}, once: {model.gigabytes} GB in {home}")
    name, *options = model.maker
    done = subprocess.run([sys.executable, str(HERE / name), str(checkpoint), *options], check=False, capture_output=True, text=True)
    if done.returncode:
        raise ToyllmError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    config = checkpoint / "config.json"
    document = json.loads(config.read_text())
    if "rope_scaling" in document:  # as llama.cpp has it whatever the file says: it takes no time, and then logits can be compared
        document["rope_scaling"]["truncate"] = True
        config.write_text(json.dumps(document, indent=2) + "\n")
    write_gguf(checkpoint, gguf)
    made.write_text(stamp)
    return checkpoint, gguf


# ---- what a token takes -------------------------------------------------------------------------------------------------------


def decode_bytes(a: Anatomy, work: Work, runner: Runner) -> float:
    """Bytes that a step has to read, half way through the steps."""
    token = per_token(a, whole(a), running(a, work.prompt + work.tokens // 2, "f32", 512))
    return token.weight_bytes * runner.weight_factor + token.cache_bytes * runner.cache_bytes / 4


def prompt_flops(a: Anatomy, tokens: int) -> float:
    """Operations on a token of a prompt, the mean: each matrix, the head once a prompt, and attention to what is seen."""
    s = sizes(a.config)
    head = "embed" if a.config.tie_word_embeddings else "head"
    matrices = sum(e.flops / (tokens if e.key == head else 1) for e in a.entries if e.multiplied)
    seen = sum(min(t, s.windows[i] or t) for i in range(s.L) for t in range(1, tokens + 1)) / tokens
    return matrices + 4 * s.H * s.Dh * seen


# ---- engines ----------------------------------------------------------------------------------------------------------------


class Worker:
    """An engine's process, which waits for requests."""

    def __init__(self, python: str, runner: Runner, model: Path, threads: int, log: Path) -> None:
        command = [python, str(HERE / "engines.py"), runner.engine, str(model), str(threads), json.dumps(runner.options)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self.name, self.log = runner.name, log
        with log.open("w") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self.process = subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes)
        self.about: dict[str, str] = self._reply()

    def ask(self, request: dict[str, Any]) -> dict[str, float]:
        """The answer to a request. Raises ToyllmError, with what it said last, where the process has ended."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin)
        return self._reply()

    def _reply(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.stop()
        said = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        raise ToyllmError(f"{self.name}: ended with status {status}: {said[-1] if said else 'without a word'}")

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def start(model: Model, runner: Runner, options: argparse.Namespace, log: Path) -> Worker:
    """A runner's worker. Raises ToyllmError, OSError."""
    checkpoint, gguf = make(model, options.folder)
    python = sys.executable if runner.engine == "toyllm" else options.peers
    return Worker(python, runner, gguf if runner.engine == "llama.cpp" else checkpoint, options.threads, log)


@contextlib.contextmanager
def started(model: Model, options: argparse.Namespace, left_out: list[str], scratch: Path) -> Iterator[dict[str, Worker]]:
    """The workers of a model's runners, by name; those that do not start are left out, but for toyllm."""
    make(model, options.folder)
    workers: dict[str, Worker] = {}
    try:
        for n, runner in enumerate(model.runners):
            say(f"{model.name}: {runner.name}")
            try:
                workers[runner.name] = start(model, runner, options, scratch / f"{n}.log")
            except (ToyllmError, OSError) as error:
                if runner is model.runners[0]:
                    raise
                left_out.append(f"{model.name}: {error if isinstance(error, ToyllmError) else f'{runner.name}: {error}'}")
                say(left_out[-1])
        yield workers
    finally:
        for worker in workers.values():
            worker.stop()


def logits_of(worker: Worker, scratch: Path) -> np.ndarray:
    """f32 [tokens + 1, V] behind the prompt of CHECKED and each step."""
    file = scratch / "logits.npy"
    worker.ask(CHECKED | {"save": str(file)})
    return np.load(file)


def compare(name: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float | None) -> dict[str, Any]:
    """An engine's logits held against toyllm's."""
    errors = np.abs(ours - theirs).max(1) / np.abs(ours).max(1)
    found = {"name": name, "error": float(np.median(errors)), "largest": float(errors.max()), "tolerance": tolerance}
    return found | {"same": int((ours.argmax(1) == theirs.argmax(1)).sum()), "positions": len(ours)}


def agreement(model: Model, workers: dict[str, Worker], options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Each runner's logits held against the first one's, and what else shows that the model is the same."""
    toyllm, *others = model.runners
    ours, found = logits_of(workers[toyllm.name], scratch), []
    for runner in others:
        if runner.name in workers:
            found.append(compare(runner.name, ours, logits_of(workers[runner.name], scratch), runner.tolerance))
            if check := runner.check:
                pair = []
                for each, settings in ((toyllm, check.ours), (runner, check.theirs)):
                    worker = start(model, replace(each, options=settings), options, scratch / "check.log")
                    try:
                        pair.append(logits_of(worker, scratch))
                    finally:
                        worker.stop()
                found.append(compare(check.how, *pair, check.tolerance))
    return found


def differs(entry: dict[str, Any]) -> bool:
    """Whether an engine has shown that it computes another model; NaN is no agreement."""
    return entry["tolerance"] is not None and not entry["error"] <= entry["tolerance"]


# ---- measuring --------------------------------------------------------------------------------------------------------------


def selected(options: argparse.Namespace) -> Iterator[tuple[Model, Works]]:
    """Each model with the works that are asked for, and who runs them."""
    for model in MODELS:
        works = []
        for work in model.works:
            if (model.quick or not options.quick) and chosen(f"{model.name}, {work.name}", options):
                runners = [r for r in model.runners if not r.works or work.name.startswith(r.works)]
                works.append((work, [r for r in runners if r is model.runners[0] or asked_for(r, options)]))
        if works:
            runners = tuple(r for r in model.runners if any(r in each for _, each in works))
            yield replace(model, runners=runners), works


def chosen(name: str, options: argparse.Namespace) -> bool:
    """Whether every --only is in a name."""
    return all(text in name for text in options.only)


def asked_for(runner: Runner, options: argparse.Namespace) -> bool:
    """Whether any --beside is in a runner's name."""
    return not options.beside or any(text in runner.name for text in options.beside)


def take_turns(
    works: Works, workers: dict[str, Worker], memory: np.ndarray, threads: int, rounds: int
) -> Iterator[tuple[str, dict[str, float], dict[str, float]]]:
    """Each work in each round: its name, every runner's tokens/s, and GB/s of plain reads just before. A round more, first, warms up."""
    for n in range(rounds + 1):
        say(f"round {n} of {rounds}" if n else "warming up")
        for work, runners in works:
            read = streaming.measure(memory, threads)
            first = n % len(runners)  # each begins in its turn
            rates = {}
            for runner in runners[first:] + runners[:first]:
                seconds = workers[runner.name].ask({"prompt": work.prompt, "tokens": work.tokens})
                rates[runner.name] = work.tokens / seconds["tokens"] if work.tokens else work.prompt / seconds["prompt"]
            if n:
                yield work.name, rates, read


def time_model(model: Model, works: Works, memory: np.ndarray, options: argparse.Namespace, left_out: list[str]) -> dict[str, Any]:
    """Everything about one model: that all compute the same, and how fast. Raises ToyllmError."""
    with tempfile.TemporaryDirectory() as scratch, started(model, options, left_out, Path(scratch)) as workers:
        say("the same logits?")
        document: dict[str, Any] = {"name": model.name, "title": model.title, "works": []}
        document["agreement"] = agreement(model, workers, options, Path(scratch))
        document["engines"] = {r.engine: workers[r.name].about for r in reversed(model.runners) if r.name in workers}
        if any(map(differs, document["agreement"])):
            return document
        present = [(work, [r for r in runners if r.name in workers]) for work, runners in works]
        turns = list(take_turns(present, workers, memory, options.threads, options.rounds))
    a = anatomy(find_model(str(options.folder / model.name / "checkpoint")))
    for work, runners in present:
        mine = [(rates, read) for name, rates, read in turns if name == work.name]
        measured = {r.name: [rates[r.name] for rates, _ in mine] for r in runners}
        if work.tokens:
            takes = {r.name: {"bytes": decode_bytes(a, work, r)} for r in runners}
        else:
            takes = {r.name: {"flops": prompt_flops(a, work.prompt)} for r in runners}
        document["works"].append(report.summarise(work.name, measured, [read for _, read in mine], takes))
    return document


def time_start(rounds: int) -> dict[str, Any]:
    """Seconds that START takes as a process, warm."""
    program = "import sys; from toyllm.cli.main import main; sys.exit(main())"
    seconds = []
    for n in range(rounds + 1):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program, *shlex.split(START)[1:]], check=False, capture_output=True, text=True)
        if done.returncode:
            raise ToyllmError(f"{START}: {done.stderr.strip()}")
        if n:
            seconds.append(time.perf_counter() - began)
    return {"command": START, "rounds": seconds, "seconds": median(seconds), "least": min(seconds), "most": max(seconds)}


def time_kernels() -> list[dict[str, Any]]:
    """What test_kernels.py measures."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernels.json"
        command = [sys.executable, "-m", "pytest", "-q", str(HERE / "test_kernels.py"), f"--benchmark-json={file}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=HERE.parent)
        if done.returncode:
            raise ToyllmError(f"test_kernels.py: {done.stdout.strip().splitlines()[-1]}")
        found = json.loads(file.read_text())["benchmarks"]
    return [{"name": b["name"].removeprefix("test_"), "microseconds": b["stats"]["min"] * 1e6, **b["extra_info"]} for b in found]


# ---- the command ------------------------------------------------------------------------------------------------------------


def busy() -> tuple[float, float]:
    """Seconds that all processors have worked so far, a virtual machine's host included, and those of them that were for this run."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, stolen = ticks[:8]
    mine, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own = mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime
    return (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK"), own


def machine() -> dict[str, Any]:
    """What it ran on."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has = [flag for flag in SHOWN if f" {flag} " in flags.replace("\n", " ")]
    lacks = [flag for flag in SHOWN if flag not in has]
    features = " ".join(has) + (f"; without {' '.join(lacks)}" if lacks else "")
    system = f"{platform.system()} {platform.release()}, {platform.machine()}, Python {platform.python_version()}"
    return {"processor": processor(), "cores": physical_cores(), "features": features, "system": system}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for. Raises ToyllmError."""
    document: dict[str, Any] = {"schema": report.SCHEMA, "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC"}
    document |= {"machine": machine(), "threads": set_threads(options.threads), "rounds": options.rounds}
    document |= {"streaming_bytes": streaming.BYTES, "engines": {}, "models": [], "start": None, "kernels": [], "left_out": []}
    memory = streaming.prepare()
    began, before = time.monotonic(), busy()
    for model, works in selected(options):
        timed = time_model(model, works, memory, options, document["left_out"])
        document["engines"] |= timed.pop("engines")
        document["models"].append(timed)
    del memory
    if chosen("start", options):
        say("start")
        document["start"] = time_start(options.rounds)
    if chosen("kernels", options) and (options.only or not options.quick):
        say("kernels")
        document["kernels"] = time_kernels()
    total, own = (now - then for now, then in zip(busy(), before, strict=True))
    document["others"] = max(0.0, total - own) / (time.monotonic() - began)
    document["goals"] = report.judge(map(asdict, GOALS), document)
    return document


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="the Python that has the peers (default: this one)")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="what has TEXT in its name: gpt2, decode, start, ...")
    parser.add_argument("--beside", action="append", default=[], metavar="TEXT", help="only these peers: llama.cpp, transformers, ...")
    parser.add_argument("--rounds", type=int, metavar="N", help="default 7, and 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="without the largest checkpoint and the kernels")
    parser.add_argument("--threads", type=int, default=physical_cores(), metavar="N", help="default: the physical cores")
    parser.add_argument(
        "--folder",
        type=Path,
        default=default_base() / "peers",
        metavar="DIR",
        help="where files are made and kept: 24 GB (default: %(default)s)",
    )
    parser.add_argument("--results", type=Path, metavar="PAGE", help="write the page here; notes on a page that is there are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 7)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, found {options.rounds}")
    if not any((*selected(options), chosen("start", options), chosen("kernels", options))):
        names = "; ".join(f"{model.name}, {work.name}" for model in MODELS for work in model.works)
        parser.error(f"--only: nothing has {' and '.join(options.only)} in its name; there are: {names}; start; kernels")
    return options


def main() -> None:
    options = parse()
    try:
        for path, begins in ((options.results, report.TITLE), (options.json, report.JSON)):
            if path:
                report.check_replaceable(path, begins)
        document = run(options)
        page = report.markdown(document)
        if options.results:
            before = options.results.read_text(encoding="utf-8") if options.results.exists() else ""
            report.replace(options.results, report.with_notes(page, before))
        if options.json:
            report.replace(options.json, json.dumps(document, indent=1, allow_nan=False) + "\n")
        print(page, end="", flush=True)
    except (ToyllmError, ModuleNotFoundError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    wrong = [f"{m['name']}, {entry['name']}" for m in document["models"] for entry in m["agreement"] if differs(entry)]
    if wrong:
        say(f"error: not the same model as toyllm's, and so nothing of it was timed: {'; '.join(wrong)}")
        sys.exit(3)


if __name__ == "__main__":
    main()
