"""The command as a whole: exit codes, one-line errors, environment twins, help, interrupts, closed pipes, and what is never imported."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from toyllm import __version__
from toyllm.cli import main
from toyllm.kernels.errors import ToyllmError
from toyllm.kernels.host import BACKENDS
from toyllm.models import model as models_model

APP: Any = get_command(main.app)
COMMANDS = sorted(APP.commands)
WITHOUT_TWIN = {
    "--help",
    "--version",
    "--install-completion",
    "--show-completion",
    "--prompt",
    "--prompt-ids",
    "--input",
    "--force",
    "--save",
    "--output",
    "--session",
    "--emit",
    "--html",
}
CHOOSES = {("cut", "--layers"), ("cut", "--experts"), ("trace", "--layers")}  # which ones, said on the command line
OPTIONS = [(name, p) for name in COMMANDS for p in APP.commands[name].params if p.param_type_name == "option"]
ALONE = [(name, p) for name, p in OPTIONS if WITHOUT_TWIN & {*p.opts} or (name, p.opts[0]) in CHOOSES]
TWINS = [pytest.param(name, p, id=f"{name} {p.opts[0]}") for name, p in OPTIONS if (name, p) not in ALONE]

Process = Callable[..., "subprocess.Popen[bytes]"]


# Help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_100_columns_and_says_what_every_option_is_and_defaults_to(toyllm: Any, monkeypatch: Any, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = toyllm(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert "\x1b" not in out
    for name, option in OPTIONS:
        if name == command and "--help" not in option.opts:
            entry = re.search(rf"^  (?:-\w, )?{re.escape(option.opts[0])}(?![\w-]).*\n(?: {{10,}}.*\n)*", out, re.MULTILINE)
            assert entry, option.opts
            assert option.help.split()[0] in entry[0]
            if option.default not in (None, False):
                assert f"[default: {option.default}" in " ".join(entry[0].split())


def test_generate_says_what_comes_of_options_that_are_not_given(toyllm: Any) -> None:
    words = " ".join(toyllm("generate", "--help").out.split())
    for option, default in {
        "max-tokens": "200",
        "temperature": "0.8",
        "top-k": "off",
        "top-p": "0.95",
        "threads": "the physical cores",
    }.items():
        assert re.search(rf"--{option} [^[]*\[default: \(?{default}\)?\]", words), option


def test_without_arguments_the_help_is_shown_as_wrong_usage(toyllm: Any) -> None:
    code, out, err = toyllm()
    assert (code, out) == (2, "")
    assert all(name in err for name in COMMANDS)
    assert 'toyllm generate "Once upon a time"' in err


def test_the_version_names_processor_path_threads_and_layer(toyllm: Any) -> None:
    code, out, _ = toyllm("--version")
    assert code == 0
    assert re.fullmatch(
        rf"toyllm {re.escape(__version__)} · ({'|'.join(BACKENDS)}) on .+ · \d+ threads by (tbb|omp|workqueue) · Numba \S+, Python \S+\n",
        out,
    )


# Wrong usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such"], "No such command 'no-such'. See: toyllm --help"),
        (["--no-such"], "No such option: --no-such. See: toyllm --help"),
        (["generate", "--nonesuch"], "No such option: --nonesuch. See: toyllm generate --help"),
        (["generate", "a", "b"], "Got unexpected extra argument(s) (b). See: toyllm generate --help"),
        (["generate", "--seed"], "Option '--seed' requires an argument. See: toyllm --help"),
        (["generate", "--seed", "x"], "Invalid value for '--seed': 'x' is not a valid int. See: toyllm generate --help"),
        (["pull"], "Missing argument 'repo'. See: toyllm pull --help"),
    ],
)
def test_wrong_usage_is_one_line_with_where_to_read_on(toyllm: Any, arguments: list[str], message: str) -> None:
    outcome = toyllm(*arguments)
    assert (outcome.code, outcome.error) == (2, message)


def test_a_wrong_value_in_the_environment_names_the_variable(toyllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOYLLM_SEED", "x")
    outcome = toyllm("generate", "hi")
    assert outcome.code == 2
    assert outcome.error == "Invalid value for '--seed': 'x' is not a valid int (from TOYLLM_SEED). See: toyllm generate --help"
    outcome = toyllm("generate", "hi", "--seed", "y")
    assert outcome.error == "Invalid value for '--seed': 'y' is not a valid int. See: toyllm generate --help"


# Environment twins


@pytest.mark.parametrize(("command", "option"), TWINS)
def test_an_option_can_be_set_in_the_environment(monkeypatch: pytest.MonkeyPatch, command: str, option: Any) -> None:
    def value(arguments: list[str]) -> Any:
        return APP.commands[command].make_context(command, arguments, resilient_parsing=True).params[option.name]

    long = next(name for name in option.opts if name.startswith("--"))
    assert option.envvar == "TOYLLM_" + long[2:].replace("-", "_").upper()
    number = re.match("int|float", option.type.name)
    given = "1" if option.is_flag else "6" if number else "two words"
    expected = value([long] if option.is_flag else [long, given])
    assert expected != value([])
    monkeypatch.setenv(option.envvar, given)
    assert value([]) == expected
    if not option.is_flag:
        assert value([long, "7" if number else "other"]) not in (expected, None), "the command line wins"


@pytest.mark.parametrize(("command", "option"), [pytest.param(n, p, id=f"{n} {p.opts[0]}") for n, p in ALONE])
def test_what_is_written_and_where_has_no_twin(command: str, option: Any) -> None:
    assert option.envvar is None


def test_an_option_is_the_same_in_every_command_but_for_its_default() -> None:
    seen: dict[str, Any] = {}
    for name, option in OPTIONS:
        # bench's is a list of what the others are, card's are a card's inputs, generate's goes on where a file ends
        if (name, option.opts[0]) in {*CHOOSES, ("bench", "--threads"), ("card", "--input"), ("generate", "--output")}:
            continue
        same = (option.opts, option.secondary_opts, option.envvar, option.multiple, option.type.name)
        assert seen.setdefault(option.opts[0], same) == same


# Failures


def test_a_failure_is_one_line_and_exit_code_1(toyllm: Any) -> None:
    outcome = toyllm("tokenize", "hi", "-m", "./nowhere")
    assert outcome.code == 1
    assert outcome.error.startswith("./nowhere: ")


def test_control_characters_of_a_name_do_not_reach_the_terminal(toyllm: Any) -> None:
    assert r"\x1b[31mx\x07\u202e y" in toyllm("tokenize", "hi", "-m", "./\x1b[31mx\x07\u202e\ny").error


def test_a_file_that_the_system_refuses_is_one_line(toyllm: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/proc/self/mem")  # opens, and fails to be read
    (tmp_path / "model.safetensors").write_bytes(b"x")
    outcome = toyllm("generate", "hi", "-m", str(tmp_path))
    assert outcome.code == 1
    assert str(tmp_path) in outcome.error


def test_debugging_shows_the_traceback(toyllm: Any, monkeypatch: pytest.MonkeyPatch, process: Process) -> None:
    monkeypatch.setenv("TOYLLM_DEBUG", "1")
    with pytest.raises(ToyllmError, match="nowhere"):
        toyllm("tokenize", "hi", "-m", "./nowhere")
    child = process("tokenize", "hi", "-m", "./nowhere")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (1, b"")
    assert err.startswith(b"Traceback")
    assert b"ToyllmError: ./nowhere" in err


# Interrupts


def test_an_interrupt_while_loading_ends_with_130(toyllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_model, "open_checkpoint", lambda files: signal.raise_signal(signal.SIGINT))
    assert toyllm("generate", "hi") == (130, "", "")


def test_an_interrupt_while_waiting_for_a_pipe_ends_with_130(process: Process) -> None:
    child = process("tokenize", stdin=subprocess.PIPE)
    ready = Path(f"/proc/{child.pid}/wchan")
    wait_until(lambda: b"pipe" in ready.read_bytes() if ready.exists() else False, fallback=1.5)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130
    assert (child.stdout.read(), child.stderr.read()) == (b"", b"")


def wait_until(holds: Callable[[], bool], fallback: float) -> None:
    """Wait until something holds; where the system does not tell, for `fallback` seconds."""
    import time

    end = time.monotonic() + fallback
    while time.monotonic() < end and not holds():
        time.sleep(0.02)


# Pipes and streams


BUFFERING = pytest.mark.parametrize("unbuffered", ["", "1"])  # Python's own unbuffered stdout overlooks a write cut short


@BUFFERING
def test_a_reader_that_has_had_enough_is_no_failure(process: Process, unbuffered: str) -> None:
    child = process("tokenize", "--json", stdin=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    child.stdin.write(b"word " * 50_000)  # far more than a pipe holds comes of it
    child.stdin.close()
    assert child.stdout.read(20) == b'{"schema": "toyllm.t'
    child.stdout.close()
    assert (child.wait(60), child.stderr.read()) == (0, b"")


def test_a_full_disk_is_one_line_and_exit_code_1(process: Process) -> None:
    with Path("/dev/full").open("wb") as full:
        child = process("tokenize", "hi", stdout=full)
        assert child.wait(60) == 1
    assert re.fullmatch(rb"error: [^\n]*No space left on device[^\n]*\n", child.stderr.read())


@BUFFERING
def test_a_disk_that_fills_up_in_the_middle_of_a_document_is_a_failure(process: Process, tmp_path: Path, unbuffered: str) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    with (tmp_path / "out").open("wb") as out:
        arguments = ("tokenize", "word " * 1000, "--json")
        child = process(*arguments, stdout=out, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, preexec_fn=limit)
        assert child.wait(60) == 1
    assert child.stderr.read().startswith(b"error: ")
    assert (tmp_path / "out").stat().st_size == 1000


def closed(*descriptors: int) -> dict[str, Any]:
    """Start the process without these standard streams."""
    return {"preexec_fn": lambda: [os.close(n) for n in descriptors]}


def test_without_a_stdout_there_is_nowhere_to_write(process: Process) -> None:
    child = process("tokenize", "hi", **closed(1))
    assert child.wait(60) == 1
    assert child.stderr.read().startswith(b"error: stdout is closed")
    child = process("tokenize", "hi", **closed(0, 1, 2))
    assert child.wait(60) == 1


def test_without_a_stdin_there_is_nothing_to_read_and_without_a_stderr_nothing_to_say(process: Process) -> None:
    child = process("tokenize", "--count", **closed(0, 2))
    assert child.communicate(timeout=60) == (b"0\n", b"")
    assert child.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_is_utf8_in_any_locale(process: Process, encoding: str) -> None:
    child = process("tokenize", "☃é", "--json", env=os.environ | {"PYTHONIOENCODING": encoding})
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, b"")
    assert json.loads(out.decode("utf-8"))["text"] == "☃é"


# Imports


QUIET = [
    ["--help"],
    ["tokenize", "hi"],
    ["detokenize", "1 2"],
    ["models"],
    ["models", "tales-gpt2"],
    *([name, "--help"] for name in COMMANDS),
]


def test_commands_that_need_no_arithmetic_never_import_the_compiler() -> None:
    script = (
        "import sys\nfrom toyllm.cli.main import run\n"
        f"for arguments in {QUIET!r}:\n"
        "    assert run(arguments) == 0, arguments\n"
        "    assert not {'numba', 'llvmlite', 'torch', 'transformers'} & sys.modules.keys(), arguments\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, timeout=120)


def test_help_imports_next_to_nothing() -> None:
    script = "import sys\nfrom toyllm.cli.main import run\nassert run(['--help']) == 0\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    heavy = {"numpy", "tokenizers", "huggingface_hub", "safetensors", "rich.console", "httpx", "pydantic", "toyllm.models.model"}
    assert not heavy & {*done.stderr.split()}
