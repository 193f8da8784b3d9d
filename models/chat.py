"""Conversations with a harmony model: what was said, what of it the model reads again, and the KV cache that outlives a turn."""

from bisect import bisect_left
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..kernels.errors import ToyllmError
from . import generation
from .generation import Settings, check_settings, generate
from .harmony import DeveloperContent, Message, Parser, SystemContent, render, stop_ids
from .harmony import Event as Said
from .held import Held, common_prefix

if TYPE_CHECKING:
    from .model import Model
    from .session import Session
    from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Event(generation.Event):
    """What one step of an answer brought; `text` is the final channel's alone, `said` a piece of a message on any channel."""

    said: Said | None = None


class Conversation:
    """A conversation: its messages, and the KV cache that holds what the model has read of them."""

    def __init__(
        self,
        model: "Model",
        settings: Settings | None = None,
        system: SystemContent | None = None,
        developer: DeveloperContent | None = None,
        context: int | None = None,
        shifting: bool = False,
        keep: int | None = None,
    ) -> None:
        """Begin with a system message and, if given, a developer's; the KV cache has `context` positions (default: the model's).

        Of the settings, harmony's own ends of an answer replace the ids that end a text, stop strings do not apply, and the seed is the
        first answer's: each later one takes the next. Where the context is full, a conversation ends, unless it is `shifting`: then an
        answer goes on without half of what it has read behind the first `keep` tokens (default: the opening), and a question without
        the oldest turns. Raises ToyllmError for a model that cannot chat and for what cannot be written.
        """
        self.model, self.tokenizer = model, chat_tokenizer(model)
        self.settings = replace(check_settings(settings or Settings()), eos=tuple(sorted(stop_ids(self.tokenizer))), stop=())
        self.context: int = model.config.context if context is None else context
        self.opening = [Message("system", system or SystemContent())]
        self.opening += [Message("developer", developer)] if developer else []
        opening = render(self.opening, self.tokenizer, completion=False)  # what cannot be written is said now
        self.shifting = shifting
        self.keep = (len(opening) if keep is None else keep) if shifting else None
        self.messages = list(self.opening)  # what the next prompt is made of, but for reasoning that is over
        self.prompt: list[int] = []  # the last turn's
        self.written: list[Message] = []  # what the model wrote in the last turn, in other roles than its own too
        self.forgotten: list[Message] = []  # what the last question found no room for
        self.turns = 0  # questions so far
        self.held = Held(model, self.context, len(opening))
        self._answer: Generator[Event] | None = None

    def reset(self) -> None:
        """Forget all but the opening."""
        self._close()
        self.messages = list(self.opening)

    def restore(self, session: "Session") -> None:
        """Go on where a session ended, with this conversation's own opening. Raises ToyllmError for more than the context holds."""
        self._close()
        self.held.restore(session.ids, session.states)
        if session.talk:
            self.messages, self.turns = [*self.opening, *session.talk.messages], session.talk.turns
        self.settle()

    def ask(self, text: str) -> Generator[Event]:
        """Say something; the answer arrives as it is drawn. Raises ToyllmError where it does not fit the context; nothing has changed then.

        What was said by the time the answer ends, or is closed, or the next question is asked, belongs to the conversation; of what the
        model wrote, only what it said in its own role. A conversation that is shifting first forgets the oldest turns where there is no
        room, at least half of what follows the opening; `forgotten` says which messages those were.
        """
        self._close()
        messages = [*self.messages, Message("user", text)]
        prompt = render(messages, self.tokenizer)
        behind = self._without_oldest(messages, len(prompt)) if self.shifting and len(prompt) >= self.context else len(self.opening)
        forgotten = messages[len(self.opening) : behind]
        if forgotten:
            messages = [*self.opening, *messages[behind:]]
            prompt = render(messages, self.tokenizer)
        if len(prompt) >= self.context:
            raise ToyllmError(
                f"the conversation takes {len(prompt)} tokens with this message{', all else forgotten' if forgotten else ''}, and the "
                f"context holds {self.context}: shorten the message, begin anew (in chat: /reset), or raise --context"
            )
        settings = replace(self.settings, seed=((self.settings.seed or 0) + self.turns) % 2**63)
        self.messages, self.forgotten, self.prompt, self.turns = messages, forgotten, prompt, self.turns + 1
        self._answer = self._steps(prompt, settings)
        return self._answer

    def _close(self) -> None:
        """End the answer under way, if there is one."""
        if self._answer:
            self._answer.close()

    def _without_oldest(self, messages: list[Message], length: int) -> int:
        """Where the messages go on when the oldest turns are left out, at least half of what follows the opening; `length` is the prompt's.

        Only whole turns go, and the last question never does.
        """
        begins = [i for i, message in enumerate(messages) if i > len(self.opening) and message.role == "user"]
        opening = len(render(self.opening, self.tokenizer, completion=False))
        most = min(self.context - 1, (length + opening) // 2)

        def fits(begin: int) -> bool:
            return len(render([*self.opening, *messages[begin:]], self.tokenizer)) <= most

        return begins[min(bisect_left(begins, True, key=fits), len(begins) - 1)] if begins else len(self.opening)

    def _steps(self, prompt: list[int], settings: Settings) -> Generator[Event]:
        """The answer to a prompt that fits."""
        parser = Parser(self.tokenizer)
        begun = False
        try:
            for step in generate(self.model, prompt, settings, held=self.held, keep=self.keep):
                if step.token and not begun:
                    self.held.mark()  # the next prompt begins as this one does, not as the reasoning that follows
                    begun = True
                if step.shift:
                    yield Event(None, "", shift=step.shift)
                    continue
                said = parser.push(step.token.id) if step.token else parser.finish()
                yield Event(step.token, final_text(said), step.result, said=said)
        finally:
            parser.finish()
            self.written = parser.messages
            self.messages += [message for message in self.written if message.role == "assistant"]
            self.settle()

    def settle(self) -> None:
        """Hold nothing but what the next prompt will begin with, as far as that is known."""
        known = render([*self.messages, Message("user", "")], self.tokenizer, completion=False)[:-1]  # without the message's end
        self.held.step_back(common_prefix(self.held.ids, known))


def chat_tokenizer(model: "Model") -> "Tokenizer":
    """The model's tokenizer. Raises ToyllmError, naming what is missing, where it cannot write harmony."""
    name, tokenizer = model.files.name, model.tokenizer
    if tokenizer is None:
        raise ToyllmError(f"{name}: chat needs a tokenizer, and there is none beside the weights; copy tokenizer.json there")
    try:
        stop_ids(tokenizer)
    except ToyllmError as error:
        raise ToyllmError(f"{name}: {error}") from error
    return tokenizer


def is_answer(message: Message) -> bool:
    """Whether a message is meant for the user: no reasoning, no call of a tool, and in the model's own role."""
    return message.role == "assistant" and message.channel != "analysis" and message.recipient is None


def final_text(said: Said | None) -> str:
    """What an event adds to the answer on the final channel."""
    return said.text if said and is_answer(said.message) and said.message.channel == "final" else ""
