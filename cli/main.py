"""The `toyllm` command: its subcommands, and how every run ends (exit codes 0, 1, 2, 3, 130)."""

import errno
import os
import resource
import sys
from typing import Annotated, Any

import typer
from typer.main import get_command

from ..kernels.errors import ToyllmError
from . import output
from .bench import bench
from .card import card
from .chat import chat
from .check import check
from .compare import compare
from .cut import cut
from .detokenize import detokenize
from .dump_tensor import dump_tensor
from .endings import INTERRUPTED, ended_by_signals, interrupted
from .generate import generate
from .models import models
from .params import params
from .pull import pull
from .score import score
from .tokenize import tokenize
from .trace import trace

DONE, FAILED, USAGE = 0, 1, 2
UsageError: Any = typer.BadParameter.__mro__[1]  # wherever this Typer keeps its click

app = typer.Typer(
    name="toyllm",
    help="Run GPT-2 and GPT-OSS checkpoints, and see everything inside them.",
    epilog='Try: toyllm generate "Once upon a time"',
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: Rich's boxes take longer to load than the rest of the command
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def print_version(wanted: bool) -> None:
    """Print name, version, processor path, threads and threading layer, and stop."""
    if wanted:
        from .version import describe

        output.write(describe() + "\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Version, processor path, threads and threading layer.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Run GPT-2 and GPT-OSS checkpoints, and see everything inside them."""
    del version  # its callback has acted
    output.show_notes()


for command in (generate, chat, tokenize, detokenize, models, params, dump_tensor, trace, card, score, compare, check, cut, bench, pull):
    app.command()(command)


def main() -> None:
    """Run one command; every failure is one line on stderr and an exit code."""
    code = run(sys.argv[1:]) if output.open_streams() else FAILED
    os._exit(code)  # all is written: Python would take a third of a second more to put away what the compiler holds


def run(arguments: list[str]) -> int:
    """Run the command in `arguments` and return its exit code."""
    try:
        with ended_by_signals():
            result = get_command(app)(arguments, prog_name="toyllm", standalone_mode=False)
            sys.stdout.flush()
        return result if isinstance(result, int) else DONE
    except UsageError as error:
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            output.say(error.format_message())
            return USAGE
        path = context.command_path if context else "toyllm"
        return fail(error.format_message().rstrip(".") + origin(error) + f". See: {path} --help", USAGE)
    except (KeyboardInterrupt, typer.Abort):
        output.say("")
        return INTERRUPTED
    except SystemExit as ending:
        if interrupted(ending):
            give_up_stdout()
            return INTERRUPTED
        if not isinstance(ending.__context__, BrokenPipeError):
            raise
        give_up_stdout()  # Typer ends like this when the reader has had enough (`| head`): nothing is left to say
        return DONE
    except (ToyllmError, OSError, MemoryError, ImportError) as error:
        give_up_stdout()
        if interrupted(error):
            return INTERRUPTED
        if os.environ.get("TOYLLM_DEBUG") or (isinstance(error, ImportError) and not starved(error)):
            raise
        fail(described(error), FAILED)
        if excerpt := getattr(error, "excerpt", ""):  # the place in a file that a CardError points at
            output.say(output.printable(excerpt))
        return FAILED


def starved(error: Exception) -> bool:
    """Whether an error came of too little memory: under a limit libraries fail to be loaded, and say so in words of their own."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return isinstance(error, MemoryError)
    system = isinstance(error, OSError) and error.errno in (None, errno.ENOMEM)
    return system or isinstance(error, MemoryError | ImportError)


def described(error: Exception) -> str:
    """What went wrong, in words that say where."""
    if starved(error):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        figures = "" if limit == resource.RLIM_INFINITY else f", under a limit of {limit / 1e6:.0f} MB (ulimit -v)"
        return f"out of memory{figures} ({str(error) or 'the system gives no more'}); close other programs, or take less at a time"
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return "the current folder is gone: change to one that is there"
    return str(error)


def origin(error: Any) -> str:
    """Where a wrong value was given, if not on the command line: its environment variable."""
    context, parameter = error.ctx, getattr(error, "param", None)
    if context is None or parameter is None:
        return ""
    source = context.get_parameter_source(parameter.name)
    return f" (from {parameter.envvar})" if source and source.name == "ENVIRONMENT" else ""


def give_up_stdout() -> None:
    """Drop what stdout does not take any more."""
    try:
        sys.stdout.flush()
    except OSError:
        output.give_up(sys.stdout)


def fail(message: str, code: int) -> int:
    """Say what went wrong in one line."""
    output.say("error: " + " ".join(output.printable(message).split()))
    return code
