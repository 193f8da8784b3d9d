"""What `chat` and `generate --chat` share: how a conversation begins, and how what the model says is shown."""

import datetime as dt
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .options import Group, option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..models.chat import Conversation
    from ..models.generation import Event, Result
    from ..models.harmony import Message
    from ..models.model import Model as LoadedModel


CHATTING: Group = {
    "reasoning": (
        Annotated[str, option("How long the model thinks before it answers: low, medium or high.", "--reasoning")],
        "medium",
    ),
    "date": (Annotated[str | None, option("The date to tell the model.", "--date", metavar="YYYY-MM-DD")], None),
    "instructions": (
        Annotated[str | None, option("What the developer asks of the model; @FILE reads a file.", "--instructions", metavar="TEXT")],
        None,
    ),
}


def check_chatting(context: typer.Context, chatting: dict[str, Any]) -> dict[str, str | None]:
    """The options of `CHATTING`, found right, and instructions read from their file. Raises a usage error for the first that is wrong."""
    from ..models.harmony import REASONING

    def wrong(name: str, text: str) -> Exception:
        return typer.BadParameter(text, ctx=context, param_hint=f"--{name}")

    reasoning, date, instructions = (chatting[name] for name in CHATTING)
    if reasoning not in REASONING:
        raise wrong("reasoning", f"expected {', '.join(REASONING)}; found {reasoning!r}")
    if date is not None and not is_date(date):
        raise wrong("date", f"expected YYYY-MM-DD, such as 2025-06-28; found {date!r}")
    if instructions and instructions.startswith("@"):
        try:
            instructions = Path(instructions[1:]).read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise wrong("instructions", f"{instructions[1:]}: cannot be read ({error})") from error
    return {"reasoning": reasoning, "date": date, "instructions": instructions or None}


def is_date(text: str) -> bool:
    """Whether a text is a day of the calendar as YYYY-MM-DD."""
    try:
        return dt.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def begin(
    loaded: "LoadedModel", chatting: dict[str, str | None], sampling: dict[str, Any], wanted: int | None, lasting: dict[str, Any]
) -> "Conversation":
    """A conversation with checked options, in a context as wanted. An answer may fill it, unless something limits that."""
    from ..models.chat import Conversation, chat_tokenizer
    from ..models.generation import settings_for
    from ..models.harmony import DeveloperContent, SystemContent

    chat_tokenizer(loaded)  # before anything is said about memory
    room = loaded.context_for(wanted)
    if sampling["max_tokens"] is None and loaded.defaults.max_new_tokens is None:
        sampling = sampling | {"max_tokens": room}
    settings = settings_for(loaded.defaults, loaded.config, sampling)
    system = SystemContent(current_date=chatting["date"], reasoning=str(chatting["reasoning"]))
    developer = DeveloperContent(chatting["instructions"]) if chatting["instructions"] else None
    return Conversation(loaded, settings, system, developer, room, lasting["context_shift"], lasting["keep"])


@contextmanager
def messages_shown() -> "Iterator[Callable[[Event], None]]":
    """Shows what the model says as it comes, and at the end breaks the line that is open.

    What is meant for the user goes to stdout. The rest goes to stderr, dimmed on a terminal, each message behind what it is: reasoning,
    calls of tools, and what the model wrote in others' roles.
    """
    from ..models.chat import Event as ChatEvent
    from ..models.chat import is_answer

    screen = sys.stdout.isatty() and sys.stderr.isatty()
    begun: list[Callable[[str], None]] = []  # what has written messages, the last writer last
    is_open = False

    def show(event: "Event") -> None:
        nonlocal is_open
        if not isinstance(event, ChatEvent) or event.said is None:
            return
        message, text, closed = event.said
        write = answer if is_answer(message) else aside
        if not is_open and (text or message.recipient):
            if write in begun or (begun and screen):
                write("\n")
            write("" if write is answer else label(message))
            begun.append(write)
            is_open = True
        if is_open:
            write(text + "\n" * closed)
            is_open = not closed

    try:
        yield show
    finally:
        if is_open:
            begun[-1]("\n")


def answer(text: str) -> None:
    """What is meant for the user, to stdout."""
    output.write(output.printable(text) if sys.stdout.isatty() else text)


def aside(text: str) -> None:
    """What is not, to stderr."""
    output.say_dimmed(output.printable(text) if sys.stderr.isatty() else text)


def label(message: "Message") -> str:
    """What a message is that is no answer: "analysis: ", "call to functions.get_weather: ", or whose role it is in."""
    if message.role != "assistant":
        return f"{message.name or message.role}: "
    return f"call to {message.recipient}: " if message.recipient else f"{message.channel}: "


def message_entry(message: "Message") -> dict[str, Any]:
    """A message as the JSON document has it."""
    return {key: getattr(message, key) for key in ("role", "channel", "recipient", "content_type", "content")}


def note_ending(conversation: "Conversation", result: "Result") -> None:
    """Say on stderr why an answer is not whole, and of a tool's call that nobody hears it."""
    if result.finish_reason == "length":
        output.say(f"note: cut at --max-tokens {conversation.settings.max_tokens}")
    elif result.finish_reason == "context":
        output.say(f"note: cut where the context of {conversation.context} tokens was full; a larger --context holds more")
    calls = dict.fromkeys(m.recipient for m in conversation.written if m.role == "assistant" and m.recipient)
    if calls:
        output.say(output.one_line(f"note: the model called {', '.join(map(str, calls))}; no tools are connected, so nothing answers"))
