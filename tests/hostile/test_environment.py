"""Surroundings at their worst: signals at any moment, streams that take nothing, no home, no folder, no memory."""

import ctypes
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from toyllm.cli import endings
from toyllm.cli.main import run as run_here
from toyllm.models import gpt2
from toyllm.models.location import embedded

from .processes import GREEDY, asleep, environment, run, start, wait_until

EMBEDDED = embedded()
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
ONCE = ("generate", "Once upon a time", *GREEDY, "--max-tokens", "8")


# Signals


INTERRUPTING = """
import os, signal, sys
import toyllm.__main__

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.{signal})

sys.meta_path.insert(0, Interrupt())
sys.argv[1:] = {arguments!r}
toyllm.__main__.main()
"""


def interrupted_at_import(name: str, number: str = "SIGINT") -> Any:
    """A run that a signal reaches as it imports a module."""
    script = INTERRUPTING.format(name=name, signal=number, arguments=list(ONCE))
    return run(command=[sys.executable, "-c", script])


@pytest.mark.parametrize("module", ["toyllm.cli.main", "typer", "inspect", "toyllm.cli.trace", "toyllm.cli.tokenize"])
def test_ctrl_c_while_the_command_starts_is_no_traceback(module: str) -> None:
    assert interrupted_at_import(module) == (130, b"", b"")


@pytest.mark.parametrize("module", ["toyllm.models.generation", "numpy.random", "numba", "llvmlite.binding", "toyllm.kernels.matmul"])
def test_ctrl_c_while_a_model_is_loaded_is_no_traceback(module: str) -> None:
    code, out, err = interrupted_at_import(module)
    assert (code, out, err.strip()) == (130, b"", b"")


def test_a_signal_whose_exception_python_drops_comes_again() -> None:
    """As it happens in the functions that LLVM calls while it loads a kernel."""
    for number, raised in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, endings.Ended)):
        callback = ctypes.CFUNCTYPE(None)(lambda number=number: signal.raise_signal(number))

        def dropped(callback: Any = callback) -> None:
            with endings.ended_by_signals():
                callback()
                time.sleep(10)

        with pytest.raises(raised):
            dropped()


def test_what_else_python_drops_is_said_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    with endings.ended_by_signals():
        ctypes.CFUNCTYPE(None)(lambda: [][0])()
    assert [dropped.exc_type for dropped in seen] == [IndexError]


def test_handlers_are_put_back_and_what_was_ignored_stays_so() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with endings.ended_by_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("passes", [0, 4], ids=["prefill", "decode"])
def test_what_was_said_before_a_signal_is_kept_and_its_line_ended(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: signal.Signals, passes: int
) -> None:
    left, forward = [passes], gpt2.forward

    def signalled(*arguments: Any) -> None:
        forward(*arguments)
        if not left[0]:
            signal.raise_signal(number)
        left[0] -= 1

    monkeypatch.setattr(gpt2, "forward", signalled)
    assert run_here(list(ONCE)) == 130
    out, err = capfd.readouterr()
    whole = run(*ONCE).out.decode()
    assert out == (whole[: len(out) - 1] + "\n" if passes else "")
    assert bool(len(out) > 1) is bool(passes)
    assert "Traceback" not in err
    left[0] = passes
    assert run_here([*ONCE, "--json"]) == 130
    assert capfd.readouterr().out == "", "a document is whole or not there"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_kernels_compile_ends_the_run_and_leaves_no_half_of_one(tmp_path: Path, number: signal.Signals) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    with start(*ONCE, env=environment(NUMBA_CACHE_DIR=str(cache))) as child:
        assert child.stderr.readline().startswith(b"note: compiling kernels")
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err.strip()) == (130, b"", b"")
    assert all(path.suffix == ".nbc" for path in cache.rglob("*") if path.is_file())


def test_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    with start("tokenize", "--count", stdin=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as child:
        wait_until(lambda: asleep(child.pid), 10)
        child.send_signal(signal.SIGHUP)
        assert child.communicate(b"hi", 60) == (b"2\n", b"")


def test_ctrl_c_for_both_ends_of_a_pipe_is_an_interrupt(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = gpt2.forward

    def interrupted(*arguments: Any) -> None:
        forward(*arguments)
        try:
            raise KeyboardInterrupt
        finally:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(gpt2, "forward", interrupted)
    assert run_here(list(ONCE)) == 130
    assert capfd.readouterr().out == ""


# Streams


EVERY_RUN = """
import os, sys
from toyllm.cli import output
from toyllm.cli.main import run

for arguments in {runs!r}:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.stdout = sys.__stdout__
    assert output.open_streams()
    code = run(arguments)
    print(code, file=sys.stderr)
    sys.stderr.flush()
"""


def test_a_stdout_that_is_full_is_one_line_and_exit_code_1_of_every_command(tmp_path: Path) -> None:
    runs = [[*run, *more] for run, more in printing(tmp_path)]
    done = run(command=[sys.executable, "-c", EVERY_RUN.format(runs=runs)], timeout=250)
    assert done.code == 0
    said = [line for line in done.err.decode().splitlines() if line == "1" or line.startswith("error: ")]
    full = "error: stdout: cannot be written (No space left on device); what came before is incomplete"
    by_click = "error: [Errno 28] No space left on device"
    assert said == [full, "1"] * (len(runs) - 1) + [by_click, "1"], done.err.decode()


def printing(folder: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Every command that prints, as text and as JSON where it has that."""
    tensor, text = "wte.weight", ["--prompt", "Once upon a time"]
    (folder / "prompts").write_text('{"prompt": "Once"}\n')
    for command in (
        ["generate", "Once", "--max-tokens", "2", *GREEDY],
        ["tokenize", "Once"],
        ["detokenize", "72 73"],
        ["models"],
        ["models", "tales-gpt2"],
        ["params"],
        ["dump-tensor", tensor],
        ["dump-tensor", "logits", *text],
        ["trace", "Once upon"],
        ["card"],
        ["score", *text],
        ["compare", "tales-gpt2", "tales-gpt2"],
        ["check"],
        ["bench", "-p", "4", "-n", "1", "--repetitions", "1"],
    ):
        yield command, []
        yield command, ["--json"]
    yield ["dump-tensor", tensor], ["--plot"]
    yield ["dump-tensor"], ["--list"]
    yield ["generate", "--max-tokens", "2"], ["--input", str(folder / "prompts")]
    yield ["generate", "Once", "--max-tokens", "2"], ["--samples", "2"]
    yield ["card"], ["-m", "tales-gpt2", "--full"]
    yield ["card"], ["-m", "tales-gpt2", "--emit", "numpy"]
    yield ["card"], ["-m", "tales-gpt2", "--check"]
    yield ["cut"], [str(folder / "cut")]
    yield ["cut"], [str(folder / "json"), "--json"]
    yield ["--version"], []
    yield ["--help"], []


@pytest.mark.parametrize("arguments", [ONCE, (*ONCE, "--stats", "--logprobs", "1")])
def test_a_stderr_that_is_full_costs_notes_and_nothing_else(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        assert run(*arguments, stderr=full)[:2] == (0, run(*ONCE).out)
        assert run("tokenize", "-m", "./nowhere", "hi", stderr=full)[:2] == (1, b"")


def test_a_stderr_that_nobody_reads_ends_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run("cut", str(tmp_path / "out"), stderr=writer)
    finally:
        os.close(writer)
    assert done.code == 0
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("arguments", [("dump-tensor", "wte.weight", "--full"), ("params", "--json"), ("trace", "Once", "--json")])
def test_a_reader_that_leaves_early_is_no_failure(arguments: tuple[str, ...]) -> None:
    with start(*arguments) as child:
        assert child.stdout.read(5)
        child.stdout.close()
        assert (child.wait(60), child.stderr.read()) == (0, b"")


@pytest.mark.parametrize("streams", [(0,), (2,), (0, 2)])
def test_streams_that_are_closed_are_done_without(streams: tuple[int, ...]) -> None:
    child = start(*ONCE, preexec_fn=lambda: [os.close(n) for n in streams])
    with child:
        assert (child.communicate(timeout=60)[0], child.returncode) == (run(*ONCE).out, 0)


# Home, locale, interpreter


@pytest.mark.parametrize("home", [None, "/proc", "nowhere", ""])
def test_without_a_home_that_can_be_written_to_everything_runs(tmp_path: Path, home: str | None) -> None:
    """/proc is a folder where not even root makes files."""
    surroundings = environment(HOME=home, XDG_CACHE_HOME=None)
    code, out, err = run(*ONCE, "--backend", "numpy", env=surroundings, cwd=tmp_path)
    assert (code, out) == (0, run(*ONCE).out)
    notes = err.decode().splitlines()
    assert all(line.startswith("note: comp") for line in notes)
    assert sum("compiled kernels are not kept" in line for line in notes) == (home == "/proc")
    assert run("models", env=surroundings, cwd=tmp_path).err == b""


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def test_an_ascii_locale_changes_nothing(tmp_path: Path) -> None:
    for arguments in (("tokenize", "☃é", "--json"), ("tokenize", "--json"), ("score", "--prompt", "☃é", "--json")):
        plain, ascii_ = (run(*arguments, stdin="☃é".encode(), env=environment(**changes)) for changes in ({}, ASCII))
        assert plain.code == 0
        assert strip_times(ascii_.out) == strip_times(plain.out)
    made = run("cut", str(tmp_path / "☃"), "--layers", "1", env=environment(**ASCII))
    assert made.out.decode() == f"{tmp_path / '☃'}\n"
    assert run("params", "-m", str(tmp_path / "☃"), env=environment(**ASCII)).code == 0


def strip_times(document: bytes) -> dict[str, Any]:
    found = json.loads(document)
    found.pop("timings", None)
    return found


def test_bytes_that_are_no_text_are_refused_in_any_locale() -> None:
    for changes in ({}, ASCII):
        assert "lone surrogate" in run("tokenize", b"a\xff", env=environment(**changes)).error


@pytest.mark.parametrize("switches", [["-O"], ["-bb"], ["-W", "error"]])
def test_python_may_be_started_with_any_switch(switches: list[str]) -> None:
    done = run(*ONCE, command=[sys.executable, *switches, "-m", "toyllm"])
    assert done == (0, run(*ONCE).out, b"")
    assert run("tokenize", "hi", "-m", "./nowhere", command=[sys.executable, *switches, "-m", "toyllm"]).error.startswith("./nowhere: ")


def test_no_output_depends_on_the_order_of_hashes() -> None:
    for arguments in (
        ("trace", "Once upon", "-m", "tales-gpt-oss", "--layers", "0"),
        ("card", "--full"),
        ("models", "tales-gpt2", "--json"),
    ):
        first, second = (run(*arguments, env=environment(PYTHONHASHSEED=seed)) for seed in ("1", "2"))
        assert first.code == 0
        assert first == second


# Limits


def limited(**limits: int) -> dict[str, Any]:
    """Start the process with limits, by their names in `resource`."""
    return {"preexec_fn": lambda: [resource.setrlimit(getattr(resource, name), (n, n)) for name, n in limits.items()]}


def test_too_little_memory_is_refused_beforehand_with_the_figures(tmp_path: Path) -> None:
    hollow = runpy.run_path(str(Path(__file__).parents[1] / "hollow.py"))
    P, D, L = 300_000, 256, 4
    config = hollow["GPT2"] | {"n_positions": P, "n_embd": D, "n_layer": L}
    hollow["write"](tmp_path, config, hollow["gpt2"](L=L, D=D, P=P))
    cache, GB = 2 * L * P * D * 4, 10**9
    asked = ("generate", "--prompt-ids", "1 2", *GREEDY, "--max-tokens", "2", "-m", str(tmp_path), "--no-preload", "--backend", "numpy")
    done = run(*asked, "--context", str(P), **limited(RLIMIT_AS=2 * GB))
    said = done.err.decode().splitlines()
    assert (done.code, done.out) == (1, b"")
    found = re.fullmatch(
        rf"error: --context {P}: the KV cache takes {cache / 1e9:.2f} GB, (\d\.\d\d) GB are free beside the weights; try --context (\d+)",
        said[-1],
    )
    assert found
    assert float(found[1]) < 2
    assert said[0].startswith("memory ")
    fits = run(*asked, "--context", str(int(found[2]) - 1000), **limited(RLIMIT_AS=2 * GB))
    assert fits.code == 0, fits.err
    mapped = (tmp_path / "model.safetensors").stat().st_size
    refused = run(*asked, **limited(RLIMIT_AS=mapped + GB // 10)).error
    assert re.search(r"GB to map, 0\.\d\d GB of address space left; raise the limit|MB of address space are left", refused)


@pytest.mark.parametrize("megabytes", [200, 300, 450, 600])
def test_however_little_the_address_space_a_run_works_or_says_so(megabytes: int) -> None:
    """On few threads, each of which takes its share: OpenBLAS ends the process itself where it has none."""
    threads = environment(OPENBLAS_NUM_THREADS="1", NUMBA_NUM_THREADS="2")
    done = run(*ONCE, env=threads, **limited(RLIMIT_AS=megabytes * 10**6))
    assert done.code in (0, 1)
    if done.code:
        assert re.search(rf"out of memory, under a limit of {megabytes} MB|MB of address space are left", done.error)


def test_few_files_may_be_open_and_none_be_written() -> None:
    whole = run(*ONCE)
    assert run(*ONCE, **limited(RLIMIT_NOFILE=24)) == whole
    assert run(*ONCE, **limited(RLIMIT_FSIZE=0))[:2] == whole[:2], "Numba may say that it cannot make a lock"
    assert run(*ONCE, **limited(RLIMIT_STACK=512 * 1024)) == whole


# Folders and names


def test_a_current_folder_that_is_gone_or_read_only_matters_only_to_what_is_written_there(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    script = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); from toyllm.__main__ import main; main()"
    leave = [sys.executable, "-P", "-c", script]
    for command, cwd in ((leave, None), ([sys.executable, "-P", "-m", "toyllm"], "/proc")):
        for arguments, code in (
            (ONCE, 0),
            (("models", "--json"), 0),
            (("cut", "out"), 1),
            (("dump-tensor", "wte.weight", "--save", "x.npy"), 1),
            (("params", "-m", "./x"), 1),
        ):
            gone.mkdir(exist_ok=True)
            done = run(*arguments, command=command, cwd=cwd)
            assert done.code == code
            if code:
                assert done.error


NAME = "a\n\x1b[31m\u202e ☃"


def test_a_model_may_lie_in_a_folder_of_any_name_and_the_name_steers_no_terminal(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED["tales-gpt2"], tmp_path / NAME)
    (tmp_path / "inside").mkdir()
    for name, cwd in ((str(tmp_path / NAME), None), (f"./{NAME}", tmp_path), (f"../{NAME}", tmp_path / "inside"), (".", tmp_path / NAME)):
        for words in (["params"], ["check"], ["dump-tensor"], ["generate", "Once", "--max-tokens", "1", "--json", *GREEDY]):
            done = run(*words, "-m", name, cwd=cwd, command=[sys.executable, "-P", "-m", "toyllm"])
            assert done.code == 0, done
            assert b"\x1b" not in done.out + done.err
    for arguments in (("tokenize", "hi", "-m", str(tmp_path / NAME / "x")), ("cut", str(tmp_path / NAME), "--layers", "1")):
        assert r"/a \x1b[31m\u202e ☃" in run(*arguments).error
