"""Conversations with a harmony model: what was said, what of it the model reads again, and the KV cache that outlives a turn."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..kernels.errors import ToyllmError
from . import generation
from .generation import Settings, check_settings, generate
from .harmony import DeveloperContent, Message, Parser, SystemContent, render, stop_ids
from .harmony import Event as Said

if TYPE_CHECKING:
    from .model import Model
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
    ) -> None:
        """Begin with a system message and, if given, a developer's; the KV cache has `context` positions (default: the model's).

        Of the settings, harmony's own ends of an answer replace the ids that end a text, stop strings do not apply, and the seed is the
        first answer's: each later one takes the next. Raises ToyllmError for a model that cannot chat and for what cannot be written.
        """
        self.model, self.tokenizer = model, chat_tokenizer(model)
        self.settings = replace(check_settings(settings or Settings()), eos=tuple(sorted(stop_ids(self.tokenizer))), stop=())
        self.context: int = model.config.context if context is None else context
        self.opening = [Message("system", system or SystemContent())]
        self.opening += [Message("developer", developer)] if developer else []
        render(self.opening, self.tokenizer)  # what cannot be written is said now
        self.messages = list(self.opening)  # what the next prompt is made of, but for reasoning that is over
        self.prompt: list[int] = []  # the last turn's
        self.written: list[Message] = []  # what the model wrote in the last turn, in other roles than its own too
        self._turns = 0
        self._cache: Any = model.new_cache(self.context, keep=model.prefill_chunk)
        self._held: list[int] = []  # the ids whose keys and values the cache holds
        self._answer: Generator[Event] | None = None

    def reset(self) -> None:
        """Forget all but the opening."""
        self._close()
        self.messages = list(self.opening)

    def ask(self, text: str) -> Generator[Event]:
        """Say something; the answer arrives as it is drawn. Raises ToyllmError where it does not fit the context; nothing has changed then.

        What was said by the time the answer ends, or is closed, or the next question is asked, belongs to the conversation; of what the
        model wrote, only what it said in its own role.
        """
        self._close()
        messages = [*self.messages, Message("user", text)]
        prompt = render(messages, self.tokenizer)
        if len(prompt) >= self.context:
            raise ToyllmError(
                f"the conversation takes {len(prompt)} tokens with this message, and the context holds {self.context}: "
                "shorten the message, begin anew (in chat: /reset), or raise --context"
            )
        settings = replace(self.settings, seed=((self.settings.seed or 0) + self._turns) % 2**63)
        self.messages, self.prompt, self._turns = messages, prompt, self._turns + 1
        self._answer = self._steps(prompt, settings)
        return self._answer

    def _close(self) -> None:
        """End the answer under way, if there is one."""
        if self._answer:
            self._answer.close()

    def _steps(self, prompt: list[int], settings: Settings) -> Generator[Event]:
        """The answer to a prompt that fits."""
        common = next((i for i, (a, b) in enumerate(zip(self._held, prompt, strict=False)) if a != b), len(self._held))
        self._hold(prompt[: min(common, len(prompt) - 1)])  # the last token's logits are wanted in any case
        parser, drawn = Parser(self.tokenizer), []
        try:
            for step in generate(self.model, prompt, settings, self.context, self._cache):
                drawn += [step.token.id] if step.token else []
                said = parser.push(step.token.id) if step.token else parser.finish()
                yield Event(step.token, final_text(said), step.result, said)
        finally:
            parser.finish()
            self.written = parser.messages
            self.messages += [message for message in self.written if message.role == "assistant"]
            # An interrupt may have come inside a pass: sure to be in the cache is only what the last token was drawn from.
            self._hold([*prompt, *drawn[:-1]] if drawn else self._held)

    def _hold(self, ids: Sequence[int]) -> None:
        """Step back to these ids, with which the cache begins; to nothing, where it no longer has all that they need."""
        if not self._cache.can_resume(0, len(ids)):
            ids = ()
        self._cache.remove(0, len(ids))
        self._held = list(ids)


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
