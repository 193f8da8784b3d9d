"""What `generate` and `chat` share for runs that last: going on where the context is full, and sessions in files."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..kernels.errors import ToyllmError
from . import output
from .options import Group, number, option

if TYPE_CHECKING:
    from ..models.chat import Conversation
    from ..models.held import Held, Shift
    from ..models.model import Model as LoadedModel
    from ..models.session import SessionFile, Talk

STEP_BACK = 1024  # tokens of a session's end that a prompt may have otherwise: for gpt-oss-20b's windows 50 MB more, in f32
LASTING: Group = {
    "context_shift": (
        Annotated[
            bool, option("Where the context is full, keep its first tokens, drop half of the others, say so, and go on.", "--context-shift")
        ],
        False,
    ),
    "keep": number(
        int,
        "How many of the first tokens --context-shift keeps.",
        "--keep",
        metavar="N",
        shown="a beginning of text; in a chat, the opening",
    ),
    "session": number(
        str, "Go on where this file ended, if it is there, and keep in it where this run ends.", "--session", twin=False, metavar="FILE"
    ),
}


def check_lasting(context: typer.Context, lasting: dict[str, Any], changed: bool = False) -> None:
    """Refuse what has no meaning: --keep without a context that is shifted, and either option where positions of changes would move."""
    if lasting["keep"] is not None and not lasting["context_shift"] and on_command_line(context, "keep"):
        raise typer.BadParameter("has no meaning without --context-shift", ctx=context, param_hint="--keep")
    for name in ("context_shift", "session") if changed else ():
        if lasting[name]:
            text = "has no meaning where activations are changed"
            raise typer.BadParameter(text, ctx=context, param_hint="--" + name.replace("_", "-"))


def on_command_line(context: typer.Context, name: str) -> bool:
    """Whether a parameter was given there, and not in the environment or not at all."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def open_session(loaded: "LoadedModel", lasting: dict[str, Any], talks: bool) -> "SessionFile | None":
    """The session's file, read and checked; None where none was asked for."""
    if lasting["session"] is None:
        return None
    from ..models.session import SessionFile

    return SessionFile(Path(lasting["session"]), loaded, talks)


def remembered(context: typer.Context, said: dict[str, str | None], file: "SessionFile | None") -> dict[str, str | None]:
    """How a conversation opens: as said now, else as its session began."""
    if not file or not file.session or not file.session.talk:
        return said

    def given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")

    return {name: said[name] if given(name) else before for name, before in file.session.talk.opening.items()}


def talk_of(conversation: "Conversation | None", said: dict[str, str | None] | None) -> "Talk | None":
    """What a session keeps of a conversation beside its cache; nothing of anything else."""
    from ..models.session import Talk

    if conversation is None or said is None:
        return None
    return Talk(said, tuple(conversation.messages[len(conversation.opening) :]), conversation.turns)


@contextmanager
def kept_in(file: "SessionFile | None", held: "Held | None", talk: "Callable[[], Talk | None]") -> Iterator[None]:
    """Puts in the file what is held when the block ends, also by Ctrl-C or a pipe that closes; not after an error of ours.

    Where that comes before anything was read, the file stays as it is.
    """
    try:
        yield
    except ToyllmError:
        raise
    except BaseException:
        if file and held and held.ids and held.passes:
            file.save(held, talk())
        raise
    if file and held:
        file.save(held, talk())


def note_shift(shift: "Shift") -> None:
    """Say on stderr what left a full context; where the text stands on the same terminal, on a line of its own."""
    line = "\n" if sys.stdout.isatty() and sys.stderr.isatty() else ""
    kept = f"the first {shift.kept} and the last {shift.moved}" if shift.kept else f"the last {shift.moved}"
    output.say(f"{line}note: the context of {shift.context} tokens was full: kept {kept}, dropped {shift.dropped}")


def note_forgotten(conversation: "Conversation") -> None:
    """Say on stderr which messages a question found no room for."""
    gone, left = len(conversation.forgotten), len(conversation.messages) - len(conversation.opening)
    if gone:
        what = f"dropped the oldest {gone} messages, kept the opening and the last {left}"
        output.say(f"note: the context of {conversation.context} tokens was full: {what}")
