"""Many prompts together: sequences share passes and a KV cache, each is drawn for itself, and one that ends makes room for the next.

A pass takes the next token of every sequence that decodes, and fills up with pieces of prompts, to `prefill_chunk` tokens in all; the
weights are read once for all of them. What a sequence says does not depend on its company, to the last bit: products and sums of a
token are the same alone and among others, and settings, random numbers, stops and penalties belong to the sequence.

Where the arithmetic does depend on how many tokens share a pass, each sequence's prompt keeps passes of its own, as it has alone, and so
few tokens are decoded together that none of it shows (`Sharing`).

A prompt that begins as one that the cache holds, or is about to, takes over those keys and values; at least its last token is evaluated.
"""

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.errors import OutOfMemory, ToyllmError
from .generation import Continuation, Result, Settings, Token, Writer, check_settings, clock
from .model import ignore

if TYPE_CHECKING:
    from .model import Model

log = logging.getLogger("toyllm")
SLOTS = 8  # sequences decoded together, unless said otherwise
WORTH_SHARING = 16  # tokens that a prompt must have in common with another, unless that is all of it: a prompt waits a pass for them


@dataclass(frozen=True)
class Request:
    """A prompt to continue; `key` is the caller's own."""

    prompt: Sequence[int]
    settings: Settings
    key: Any = None


@dataclass(frozen=True)
class Answer:
    """What came of a request: its tokens, their text and the result, or the error that ended it."""

    request: Request
    tokens: tuple[Token, ...] = ()
    text: str = ""
    result: Result | None = None
    first_token_s: float | None = None  # from its first pass to its first token, kernels left out; None without a token
    error: ToyllmError | None = None


@dataclass(frozen=True)
class Sharing:
    """What sequences may share, so that each gives the bits that it gives alone."""

    rows: int  # tokens that may be decoded in one pass
    prompts: bool  # whether a prompt may be in passes with other tokens, and take over another's beginning


def sharing(model: "Model") -> Sharing:
    """What this model's arithmetic allows.

    References and unfused attention go through BLAS, whose sums depend on a matrix's shape. Products in bf16 begin at a number of rows.
    A budget drops choices by what else is in a pass; below 12 tokens its smallest, 8 tokens an expert, makes it run all experts, exactly.
    """
    from ..kernels.attention import attention_plain
    from ..kernels.pairs import WORTHWHILE

    kernels = model.kernels
    if kernels.name == "numpy" or kernels.attention is attention_plain:
        return Sharing(1, prompts=False)
    if kernels.mixing.algorithm == "budget":
        return Sharing(11, prompts=False)
    if kernels.activations == "bf16":
        return Sharing(WORTHWHILE - 1, prompts=False)
    if model.changes and model.changes.of_scores:  # which are of one sequence
        return Sharing(1, prompts=False)
    return Sharing(model.prefill_chunk, prompts=True)


@dataclass(eq=False)
class Slot:
    """A sequence of the cache, and the request that it serves."""

    sequence: int
    held: list[int] = field(default_factory=list)  # the ids whose keys and values the cache has
    pending: list[int] = field(default_factory=list)  # what has to go through the model next: of the prompt, or the latest token
    request: Request | None = None
    run: Continuation | None = None
    tokens: list[Token] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    began: float = 0.0
    first_token_s: float | None = None
    donor: "Slot | None" = None  # whose first `awaited` tokens it takes over as soon as they are in the cache
    awaited: int = 0


def slots_for(model: "Model", positions: int, wanted: int | None, most: int) -> int:
    """How many sequences of so many positions to run together: `wanted`, or `SLOTS` reduced, with a note, to what fits in memory.

    Never more than `most`, the requests that there are. Raises ToyllmError for fewer than 1, and OutOfMemory, with the figures, for more
    than fits.
    """
    if wanted is not None and wanted < 1:
        raise ToyllmError(f"--batch-size {wanted}: expected at least 1")
    slots, free = min(wanted or SLOTS, max(most, 1)), model.free_for_cache()

    def needs(slots: int) -> int:
        return model.cache_bytes(positions, slots)

    if free is None or needs(slots) <= free:
        return slots
    fits = bisect_right(range(1, slots + 1), free, key=needs)
    figures = f"{needs(slots) / 1e9:.2f} GB for {slots} sequences of {positions} positions"
    figures += f", {max(0, free) / 1e9:.2f} GB are free beside the weights"
    if not fits:
        raise OutOfMemory(f"not even one sequence fits in memory: the KV caches take {figures}; try a smaller --context", positions)
    if wanted is not None:
        raise OutOfMemory(f"--batch-size {wanted}: the KV caches take {figures}; try --batch-size {fits}", positions)
    log.info("batch size reduced from %d to %d: the KV caches take %s", slots, fits, figures)
    return fits


def answers(
    model: "Model",
    requests: Iterable[Request],
    slots: int = SLOTS,
    context: int | None = None,
    positions: int | None = None,
    progress: Callable[[int], None] = ignore,
) -> Iterator[Answer]:
    """Continue every prompt, up to `slots` of them at a time; answers come as they are ready, not in order.

    A prompt and its continuation never exceed `context` (default: the model's). The cache has `positions` for each sequence (default:
    the context): less will do where no request needs more. A request that cannot be run, or whose logits give no token, is answered
    with its error; the others go on. `progress` is called after each pass with the number of tokens drawn in it. Raises ToyllmError for
    no slots, OutOfMemory where the system does not give the cache.
    """
    if slots < 1:
        raise ToyllmError(f"--batch-size {slots}: expected at least 1")
    room: int = model.config.context if context is None else context
    return Batch(model, slots, room, room if positions is None else positions).run(iter(requests), progress)


class Batch:
    """The cache's sequences and what they are at."""

    def __init__(self, model: "Model", slots: int, context: int, positions: int) -> None:
        """Sequences of up to `positions` each, in a cache of their own. Raises OutOfMemory."""
        self._model, self._context, self._positions = model, context, positions
        self._cache = model.new_cache(positions, sequences=slots)
        self._sharing = sharing(model)
        self._slots = [Slot(i) for i in range(slots)]  # those that have waited longest for a pass first
        self._logits = np.empty((slots, model.vocab_size), np.float32)

    def run(self, requests: Iterator[Request], progress: Callable[[int], None]) -> Iterator[Answer]:
        """Answer all requests, taking the next whenever a slot is free."""
        waiting = True
        while True:
            while waiting and (free := [slot for slot in self._slots if slot.run is None]):
                request = next(requests, None)
                waiting = request is not None
                if request and (refused := self._admit(request, free)):
                    yield refused
            if all(slot.run is None for slot in self._slots):
                return
            for taken in self._passes():
                drawn = self._pass(taken)
                progress(len(drawn))
                yield from (answer for answer in drawn if answer)

    # ---- a request finds a slot

    def _admit(self, request: Request, free: list[Slot]) -> Answer | None:
        """Give a request one of the free slots; the answer, where it cannot be run."""
        prompt = list(request.prompt)
        donor, common = self._longest_prefix(prompt)
        try:
            run = self._begin(prompt, request.settings, common)
        except ToyllmError as error:
            return Answer(request, error=error)
        slot = donor if donor in free else free[0]
        slot.request, slot.tokens, slot.text, slot.began, slot.first_token_s = request, [], [], clock(), None
        self._keep(slot, common if donor is slot else 0)
        slot.pending = prompt[len(slot.held) :]
        if donor and donor is not slot:
            slot.donor, slot.awaited = donor, common
            self._take_over(slot)
        slot.run = run
        return None

    def _begin(self, prompt: list[int], settings: Settings, reused: int) -> Continuation:
        """A sequence before its first pass. Raises ToyllmError for a prompt that does not fit, and for settings."""
        settings = check_settings(settings)
        needed = min(len(prompt) + settings.max_tokens, self._context)
        room = self._context if needed <= self._positions else self._positions
        if not 0 < len(prompt) <= room:
            raise ToyllmError(f"the prompt has {len(prompt)} tokens and the context {room}: shorten the prompt, or raise --context")
        return Continuation(self._model, prompt, settings, room, Writer(self._model, settings.stop), reused)

    def _longest_prefix(self, prompt: list[int]) -> tuple[Slot | None, int]:
        """The slot whose tokens, those about to come included, begin most as the prompt does, and how many are worth taking over."""
        if not self._sharing.prompts:
            return None, 0
        most = len(prompt) - 1  # the last token's logits are wanted in any case
        length, donor = 0, None
        for slot in sorted(self._slots, key=lambda slot: slot.donor is not None):  # of two alike, one that waits for nobody
            n = min(most, common_prefix(prompt, slot.held + slot.pending))
            if n > length and (n > len(slot.held) or self._cache.can_resume(slot.sequence, n)):
                length, donor = n, slot
        return (donor, length) if length >= min(most, WORTH_SHARING) else (None, 0)

    def _keep(self, slot: Slot, length: int) -> None:
        """Forget all that a slot holds behind its first tokens."""
        self._cache.remove(slot.sequence, length)
        slot.held = slot.held[:length]

    def _take_over(self, slot: Slot) -> bool:
        """Copy what a slot waits for from its donor, if it is there by now. A donor's passes end there, so that no window has left it."""
        donor, length = slot.donor, slot.awaited
        if donor is None or len(donor.held) < length:
            return False
        self._cache.copy_prefix(donor.sequence, slot.sequence, length)
        slot.held, slot.pending, slot.donor = donor.held[:length], slot.pending[length:], None
        return True

    # ---- passes

    def _passes(self) -> list[list[tuple[Slot, int]]]:
        """The next passes: of each slot in them, how many of its pending tokens. Decoding goes first."""
        chunk = self._model.prefill_chunk
        ready = sorted((slot for slot in self._slots if slot.run and slot.donor is None), key=lambda slot: len(slot.pending) > 1)
        if not self._sharing.prompts:
            decoding = [slot for slot in ready if len(slot.pending) == 1]
            rows = min(self._sharing.rows, chunk)
            together = [[(slot, 1) for slot in decoding[i : i + rows]] for i in range(0, len(decoding), rows)]
            return together + [[(slot, min(len(slot.pending), chunk))] for slot in ready[len(decoding) :]]
        taken: list[tuple[Slot, int]] = []
        for slot in ready:
            stops = [other.awaited - len(slot.held) for other in self._slots if other.donor is slot]
            n = min(len(slot.pending), chunk, *stops)
            if n:
                taken.append((slot, n))
                chunk -= n
        return [taken]

    def _pass(self, taken: list[tuple[Slot, int]]) -> list[Answer | None]:
        """Run a pass, and draw a token for each sequence that has come to the end of what was pending: their answers, of those that end."""
        done = [slot for slot, n in taken if n == len(slot.pending)]
        rows: list[tuple[int, int, int]] = []  # (token, position, sequence); the last of each of `done` at the end, for their logits
        for slot, n in taken:
            body = n - (n == len(slot.pending))
            rows += [(slot.pending[i], len(slot.held) + i, slot.sequence) for i in range(body)]
        rows += [(slot.pending[-1], len(slot.held) + len(slot.pending) - 1, slot.sequence) for slot in done]
        tokens, positions, sequences = np.array(rows, np.int64).T.copy()
        logits = self._logits[: len(done)]
        self._model.forward(tokens, positions, sequences, self._cache, out=logits)
        served = {slot.sequence for slot, _ in taken}
        self._slots.sort(key=lambda slot: slot.sequence in served)
        for slot, n in taken:
            slot.held += slot.pending[:n]
            slot.pending = slot.pending[n:]
        while any(self._take_over(slot) for slot in self._slots):  # what one has taken over another may wait for
            pass
        return [self._draw(slot, row) for slot, row in zip(done, logits, strict=True)]

    def _draw(self, slot: Slot, logits: np.ndarray) -> Answer | None:
        """A slot's next token; at the end of the sequence its answer, and the slot is free."""
        run, request = slot.run, slot.request
        if run is None or request is None:
            raise RuntimeError("a slot without a request was in a pass")
        try:
            if not run.ended:
                event = run.push(logits)
                slot.text.append(event.text)
                slot.tokens += [event.token] if event.token else []
                slot.pending = [] if run.token is None else [run.token]
        except ToyllmError as error:
            slot.run = None
            self._keep(slot, 0)
            return Answer(request, tuple(slot.tokens), "".join(slot.text), error=error)
        if slot.first_token_s is None and slot.tokens:
            slot.first_token_s = clock() - slot.began
        if not run.ended:
            return None
        last = run.finish()
        slot.run, slot.pending = None, []
        return Answer(request, tuple(slot.tokens), "".join(slot.text) + last.text, last.result, slot.first_token_s)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
