"""`toyllm chat`: a conversation on a terminal, or one whose lines come from a pipe."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..kernels.errors import ToyllmError
from . import output
from .conversing import CHATTING, begin, check_chatting, messages_shown, note_ending
from .generate import consume, show_stats, times
from .lasting import LASTING, check_lasting, note_forgotten, open_session, remembered, talk_of
from .options import RUNNING, SAMPLING, Group, Stats, number, option, takes
from .running import load, memory_told

if TYPE_CHECKING:
    from ..models.chat import Conversation
    from ..models.session import SessionFile

ANSWERS: Group = {
    **{name: kind for name, kind in SAMPLING.items() if name not in ("stop", "logprobs")},
    "max_tokens": number(int, "The most tokens of an answer, reasoning included.", "--max-tokens", shown="what the context holds"),
}
HELP = """/reset  forget all that was said, in the session's file too
/quit   end the chat, as Ctrl-D does
Ctrl-C stops an answer; at the prompt it drops the line, and twice in a row ends the chat.
Every other line is said to the model."""


@takes(chatting=CHATTING, lasting=LASTING, sampling=ANSWERS, running=RUNNING)
def chat(
    context: typer.Context,
    model: Annotated[
        str | None, option("Needed: a folder, a .safetensors file, or a repo id in the local Hugging Face cache.", "--model", "-m")
    ] = None,
    stats: Stats = False,
    *,
    chatting: dict[str, Any],
    lasting: dict[str, Any],
    sampling: dict[str, Any],
    running: dict[str, Any],
) -> None:
    """Talk with a gpt-oss model.

    Each line is a turn, from a terminal or a pipe. Answers go to stdout; reasoning, dimmed, and notes go to stderr. With --session a
    conversation goes on another day, with the reasoning, date and instructions that it began with unless others are given.
    """
    if model is None:
        raise typer.BadParameter("none given; try: toyllm chat -m openai/gpt-oss-20b", ctx=context, param_hint="--model")

    from ..models.generation import check_bounds

    said = check_chatting(context, chatting)
    check_lasting(context, lasting)
    check_bounds(sampling)
    loaded = load(model, running)
    with memory_told(loaded):
        file = open_session(loaded, lasting, talks=True)
        said = remembered(context, said, file)
        conversation = begin(loaded, said, sampling, running["context_size"], lasting)
        if file and file.session:
            conversation.restore(file.session)
            note_restored(conversation, file)
        if conversation.settings.temperature:
            output.say(f"seed {conversation.settings.seed}")
        if sys.stdin.isatty():
            output.say(f"{output.one_line(model)}, context {conversation.context}; /help says more, Ctrl-D ends")
        talk(conversation, stats, lambda: file.save(conversation.held, talk_of(conversation, said)) if file else None)


def note_restored(conversation: "Conversation", file: "SessionFile") -> None:
    """Say on stderr how much of a conversation goes on."""
    messages, read = len(conversation.messages) - len(conversation.opening), len(conversation.held.ids)
    output.say(f"note: {output.one_line(str(file.path))}: goes on behind {messages} messages; {read} tokens need not be read again")


def talk(conversation: "Conversation", stats: bool, save: Callable[[], None]) -> None:
    """Turn after turn, to the end of the input; what is kept in a file is saved after each."""
    person = sys.stdin.isatty()
    read = line_reader(person)
    warned = False  # the last thing was Ctrl-C at the prompt
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            if warned or not person:
                output.say("")
                raise
            warned = True
            output.say("\nCtrl-C again ends the chat, and so does Ctrl-D")
            continue
        warned = False
        command = line.strip() if line is not None else "/quit"
        if command == "/quit":
            return
        if command == "/reset":
            conversation.reset()
            conversation.settle()
            save()
            output.say("a new conversation")
        elif command == "/help":
            output.say(HELP)
        elif command.startswith("/") and command[1:].isalpha():
            output.say(f"no command {output.one_line(command)}: there are /help, /reset and /quit")
        elif command:
            turn(conversation, line or "", stats, person, save)


def line_reader(person: bool) -> Callable[[], str | None]:
    """What reads the next line, None at the end of the input. A person gets a prompt, and line editing where Python has it."""
    if not person:
        lines = pipe_lines()
        return lambda: next(lines, None)
    with suppress(ImportError):
        import readline  # noqa: F401 - `input` looks for it
    stdin: Any = sys.stdin
    stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # what is no UTF-8 is then refused as any such text is
    return read_terminal


def pipe_lines() -> Iterator[str]:
    """The lines of stdin without their ends. Raises ToyllmError for one that is not UTF-8."""
    for i, data in enumerate(sys.stdin.buffer, 1):
        try:
            yield data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ToyllmError(f"stdin: line {i}: expected UTF-8 ({error.reason}); convert the text first") from error


def read_terminal() -> str | None:
    """A line from the person at the terminal, None after Ctrl-D. The prompt keeps out of a stdout that leads elsewhere."""
    prompt = "\n> "
    if not sys.stdout.isatty():
        output.say_dimmed(prompt)
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        output.say("")
        return None


def turn(conversation: "Conversation", line: str, stats: bool, person: bool, save: Callable[[], None]) -> None:
    """Say a line and show the answer. With a person at the prompt, Ctrl-C ends only the answer and an error only the turn."""
    began = time.perf_counter()
    try:
        try:
            with closing(conversation.ask(line)) as events:
                note_forgotten(conversation)
                run = consume(events, messages_shown())
        except KeyboardInterrupt:
            save()
            if not person:
                raise
            output.say("\nstopped; what was said so far stays in the conversation")
            return
        save()
    except ToyllmError as error:
        if not person:
            raise
        output.say(f"error: {output.one_line(str(error))}")
        return
    note_ending(conversation, run.result)
    if stats:
        show_stats(conversation.model, run.result, times(run, began, began), time.perf_counter() - began)
