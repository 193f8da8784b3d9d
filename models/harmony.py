"""harmony, the chat format of gpt-oss: conversations to token ids, and generated ids back to messages.

    <|start|>{role}[:{name}][ to={recipient}][<|channel|>{channel}][ {content type}]<|message|>{content}<|end|>

The structure is made of special tokens that only this module places, by id; every text is encoded as ordinary text, so nothing that
a user, a tool or a model wrote can become structure. The ids are those of the tokenizer at hand, found by the tokens' strings.
Source: docs/format.md of openai/harmony, and its library where that document is silent.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..kernels.errors import ToyllmError
from .harmony_tools import Namespace, Tool, tools_section
from .tokenizer import Tokenizer

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, RETURN, CALL, END_OF_TEXT = "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"

STOPPING = (RETURN, CALL, END_OF_TEXT)  # these end a generation; <|end|> only ends a message, and the model goes on
CLOSING = (END, *STOPPING)
SPECIAL = (START, CHANNEL, CONSTRAIN, MESSAGE, *CLOSING)

NAMED_ROLES = ("system", "developer", "user", "assistant")  # a tool's message has the tool's name in place of a role
REASONING = ("low", "medium", "high")
CHANNELS = ("analysis", "commentary", "final")  # reasoning, not meant for the user; function calls and preambles; the answer


@dataclass(frozen=True)
class SystemContent:
    """What a system message says: who the model is, what it knows, how long it thinks, and its built-in tools."""

    model_identity: str = "You are ChatGPT, a large language model trained by OpenAI."
    knowledge_cutoff: str | None = "2024-06"
    current_date: str | None = None  # year-month-day
    reasoning: str = "medium"  # one of REASONING
    channels: tuple[str, ...] = CHANNELS  # each message must be on one of them
    tools: tuple[Namespace, ...] = ()


@dataclass(frozen=True)
class DeveloperContent:
    """What a developer message says: the instructions (elsewhere called the system prompt), and functions to call."""

    instructions: str | None = None
    functions: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Message:
    """One message. A field of the header that is None is not written."""

    role: str  # one of NAMED_ROLES, or "tool"
    content: str | SystemContent | DeveloperContent
    channel: str | None = None
    recipient: str | None = None  # the tool that is called; "assistant" in a tool's answer
    content_type: str | None = None  # "json", or with the token before it: "<|constrain|>json"
    name: str | None = None  # of the tool, as "functions.get_weather"; of the author, in other roles


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the id of each of harmony's special tokens.

    Raises ToyllmError that names the missing ones. A token that the tokenizer also reads out of ordinary text is missing, too.
    """
    ids = {token: tokenizer.id_of(token) for token in SPECIAL}
    known = {token: i for token, i in ids.items() if i is not None and i not in tokenizer.encode(token, special=False)}
    if missing := [token for token in SPECIAL if token not in known]:
        raise ToyllmError(
            f"tokenizer: chat needs the special tokens of gpt-oss, and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            "not among its own; use a gpt-oss model, or generate without chat"
        )
    return known


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids on which a generation stops. Raises ToyllmError where the tokenizer lacks harmony's tokens."""
    ids = special_ids(tokenizer)
    return frozenset(ids[token] for token in STOPPING)


# Conversations to ids


def render(messages: Sequence[Message], tokenizer: Tokenizer, completion: bool = True, keep_analysis: bool = False) -> list[int]:
    """Turn a conversation into ids; with `completion` the model's answer is to follow.

    A final message ends its turn once anything follows it. What was on `analysis` up to there is left out, unless `keep_analysis`;
    a turn that still calls tools keeps its reasoning. This is the format's document; the library beside it drops only what precedes the
    first final message. Raises ToyllmError for a message that the format cannot hold, and where the tokenizer lacks harmony's tokens.
    """
    ids = special_ids(tokenizer)
    functions = any(isinstance(m.content, DeveloperContent) and m.content.functions for m in messages)
    kept = messages if keep_analysis else without_past_analysis(messages, completion)
    sections = [section for message in kept for section in message_sections(message, functions)]
    if completion:
        sections.append((START, "assistant"))
    return [i for token, text in sections for i in (ids[token], *tokenizer.encode(text, special=False))]


def without_past_analysis(messages: Sequence[Message], completion: bool) -> list[Message]:
    """Leave out the reasoning of turns that are over."""
    followed = messages if completion else messages[:-1]
    end = max((i for i, message in enumerate(followed) if message.channel == "final"), default=0)
    return [message for i, message in enumerate(messages) if i >= end or message.channel != "analysis"]


def message_sections(message: Message, functions: bool) -> Iterator[tuple[str, str]]:
    """Split a message into its special tokens, each with the text that follows it. Raises ToyllmError."""
    check_header(message)
    header = [(START, author(message) + (f" to={message.recipient}" if message.recipient else ""))]
    if message.channel:
        header.append((CHANNEL, message.channel))
    if message.content_type:
        token, text = header.pop()
        if message.content_type.startswith(CONSTRAIN):
            header += [(token, text + " "), (CONSTRAIN, message.content_type.removeprefix(CONSTRAIN))]
        else:
            header.append((token, f"{text} {message.content_type}"))
    yield from header
    yield MESSAGE, content_text(message, functions)
    yield CALL if message.role == "assistant" and message.recipient else END, ""


def check_header(message: Message) -> None:
    """Refuse a header that could not be read back as it was meant. Raises ToyllmError."""
    for field in ("name", "channel", "recipient", "content_type"):
        value = getattr(message, field)
        if value is not None and value.split() != [value]:
            raise ToyllmError(f"harmony message: {field}: expected one word without spaces, found {value!r}")
    if message.content_type and message.content_type.startswith("to="):
        raise ToyllmError(f"harmony message: content_type {message.content_type!r} would be read as a recipient; give it as recipient")


def author(message: Message) -> str:
    """Write who speaks: a role with the name behind it, or a tool's name alone. Raises ToyllmError."""
    if message.role in NAMED_ROLES:
        return f"{message.role}:{message.name}" if message.name else message.role
    if message.role != "tool":
        raise ToyllmError(f"harmony message: role: expected one of {', '.join(NAMED_ROLES)}, tool; found {message.role!r}")
    if not message.name or message.name.partition(":")[0] in NAMED_ROLES:
        raise ToyllmError(f"harmony message: name: expected the tool's, such as functions.get_weather; found {message.name!r}")
    return message.name


def content_text(message: Message, functions: bool) -> str:
    """Write what a message says. Raises ToyllmError where a role has another's content."""
    content = message.content
    if isinstance(content, SystemContent):
        role, text = "system", system_text(content, functions)
    elif isinstance(content, DeveloperContent):
        role, text = "developer", developer_text(content)
    else:
        return content
    if message.role != role:
        raise ToyllmError(f"harmony message: {type(content).__name__} belongs to the role {role}, found it in {message.role}")
    return text


def system_text(content: SystemContent, functions: bool) -> str:
    """Write a system message; `functions`: a developer message of the conversation describes some. Raises ToyllmError."""
    if content.reasoning not in REASONING:
        raise ToyllmError(f"reasoning: expected one of {', '.join(REASONING)}; found {content.reasoning!r}")
    about = [content.model_identity]
    about += [f"Knowledge cutoff: {content.knowledge_cutoff}"] if content.knowledge_cutoff else []
    about += [f"Current date: {content.current_date}"] if content.current_date else []
    sections = ["\n".join(about), f"Reasoning: {content.reasoning}"]
    sections += [tools_section(content.tools)] if content.tools else []
    if content.channels:
        line = f"# Valid channels: {', '.join(content.channels)}. Channel must be included for every message."
        sections.append(line + ("\nCalls to these tools must go to the commentary channel: 'functions'." if functions else ""))
    return "\n\n".join(sections)


def developer_text(content: DeveloperContent) -> str:
    """Write a developer message."""
    sections = [] if content.instructions is None else ["# Instructions", content.instructions]
    sections += [tools_section([Namespace("functions", tools=content.functions)])] if content.functions else []
    return "\n\n".join(sections)


# Ids to messages


class Event(NamedTuple):
    """What one id brought: a message that opened, text of one, or the end of one."""

    message: Message  # its header; its content is empty until it closes, and then whole
    text: str  # what this id adds to the content, possibly nothing
    closed: bool


class Parser:
    """Reads messages from ids that arrive one by one. Whatever a model writes, nothing raises, and `render` takes every message again.

    Where a model leaves the format, its text is kept: what closes without `<|message|>` is a message with all that followed role and
    channel as its content, an id without a token shows itself, and a message that no one closed ends where the next one starts.
    """

    def __init__(self, tokenizer: Tokenizer, role: str = "assistant") -> None:
        """Begin behind a prompt that ends with `<|start|>` and this role, or before any `<|start|>`."""
        self.tokenizer = tokenizer
        self.token_of = {i: token for token, i in special_ids(tokenizer).items()}
        self.messages: list[Message] = []  # those that are closed
        self.prompted = role
        self.begin(role)

    def begin(self, role: str | None) -> None:
        """Expect a header, without its role where that is known."""
        self.role = role
        self.header: list[tuple[str, list[int]]] = [(START, [])]  # special tokens, each with the ids that follow it
        self.open: Message | None = None  # the message whose content arrives
        self.text: list[str] = []
        self.stream = self.tokenizer.stream()

    def push(self, token_id: int) -> Event | None:
        """Take one id; None where it brought nothing to show (part of a header or of a character)."""
        token = self.token_of.get(token_id)
        if token in CLOSING:
            return self.finish()
        if token == START:
            event = self.finish()
            self.begin(None)
            return event
        if self.open:
            return self.add(self.stream.push(token_id))
        if token == MESSAGE:
            self.open = self.read_header()[0]
            return Event(self.open, "", closed=False)
        if token in (CHANNEL, CONSTRAIN):
            self.header.append((token, []))
        else:
            self.header[-1][1].append(token_id)
        return None

    def add(self, text: str) -> Event | None:
        """Append to the content of the open message."""
        self.text.append(text)
        return Event(self.open, text, closed=False) if self.open and text else None

    def finish(self) -> Event | None:
        """Close the message under way, if there is one: at the end of the ids, whether or not they closed it."""
        if self.open:
            message, rest = self.open, self.stream.finish()
        else:
            header, words = self.read_header()
            message, rest = Message(header.role, "", header.channel, name=header.name), " ".join(words)
            if not words:
                self.begin(self.prompted)
                return None
        message = replace(message, content="".join([*self.text, rest]))
        self.messages.append(message)
        self.begin(self.prompted)
        return Event(message, rest, closed=True)

    def read_header(self) -> tuple[Message, list[str]]:
        """Read who speaks, on which channel, and to whom; and return also the words after role and channel.

        The recipient and the content type may stand behind either of the two.
        """
        (_, words), *others = [(token, self.tokenizer.decode(ids).split()) for token, ids in self.header]
        role, name = self.role or self.prompted, None
        if words and self.role is None:
            role, name = read_author(words.pop(0))
        elif words[:1] == [role]:
            words.pop(0)
        channel = None
        for token, following in others:
            if token == CONSTRAIN:
                following[:1] = [CONSTRAIN + "".join(following[:1])]
            elif channel is None and following:
                channel = following.pop(0)
            words += following
        recipient = next((word.removeprefix("to=") for word in words if word.startswith("to=")), None)
        content_type = next((word for word in words if not word.startswith("to=")), None)
        return Message(role, "", channel, recipient or None, content_type, name), words


def read_author(word: str) -> tuple[str, str | None]:
    """Read the first word of a header: a role, a role with a name, or a tool's name."""
    role, _, name = word.partition(":")
    return (role, name or None) if role in NAMED_ROLES else ("tool", word)


def parse(ids: Iterable[int], tokenizer: Tokenizer, role: str = "assistant") -> list[Message]:
    """Turn ids into messages; `role` is whose turn it is where they do not begin with `<|start|>`."""
    parser = Parser(tokenizer, role)
    for token_id in ids:
        parser.push(token_id)
    parser.finish()
    return parser.messages
