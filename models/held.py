"""What the KV cache of one sequence holds: its ids beside it, stepping back to what a prompt begins with, and room in a full one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.errors import ToyllmError
from . import cache as caches

if TYPE_CHECKING:
    from .model import Model

State = tuple[np.ndarray, np.ndarray, np.ndarray]  # positions int64 [n]; keys and values [L, G, n, W] as they are stored


@dataclass(frozen=True)
class Shift:
    """What became of a full context: the first `kept` tokens stayed, the `dropped` behind them went, the `moved` last took their place."""

    context: int
    kept: int
    dropped: int
    moved: int


class Held:
    """A KV cache of one sequence, and the ids whose keys and values it holds, from position 0 on.

    `ids` counts only what is stored whole: after an interrupt inside a pass the cache may have taken cells for more, which the next
    `step_back` gives back.
    """

    def __init__(self, model: "Model", room: int, opening: int = 0, back: int = 0) -> None:
        """Begin with an empty cache of `room` positions, and `mark` the place behind the first `opening` when they are read.

        Windows keep what lets it step back by `back` positions, wherever it is. Raises OutOfMemory.
        """
        self.model, self.room = model, room
        self.cache: Any = model.new_cache(room, keep=back) if back else model.new_cache(room)
        self.ids: list[int] = []
        self.next: int | None = None  # the token of the text that is not read yet, if there is one
        self.passes = 0  # how often something was read
        self._opening = opening if any(map(windowed, members(self.cache))) else 0
        self._marks: list[tuple[int, list[State | None]]] = []  # length, and of each window what it held then

    def read(self, tokens: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Run the tokens behind what is held; f32 logits [1, V] of the last. Raises as `Model.forward`."""
        if len(self.ids) < self._opening < len(self.ids) + len(tokens):
            first = self._opening - len(self.ids)
            self.read(tokens[:first], self._no_logits())
            tokens = tokens[first:]
        at = np.arange(len(self.ids), len(self.ids) + len(tokens))
        logits = self.model.forward(tokens, at, np.zeros(len(at), np.int64), self.cache, out=out)
        self.ids += tokens
        self.next, self.passes = None, self.passes + 1
        if len(self.ids) == self._opening:
            self.mark()
        return logits

    def _no_logits(self) -> np.ndarray:
        """Where the logits go that nobody asks for."""
        return np.empty((0, self.model.vocab_size), np.float32)

    @property
    def text(self) -> list[int]:
        """What is held, and the token behind it that is not read yet."""
        return self.ids if self.next is None else [*self.ids, self.next]

    def resume(self, prompt: Sequence[int]) -> int:
        """Step back to what the prompt begins with, and say how many ids that is; one at least is left to read, for its logits."""
        return self.step_back(min(common_prefix(self.ids, prompt), len(prompt) - 1))

    def step_back(self, length: int) -> int:
        """Forget all but the first `length` ids, and say how many are left: where the cache could not go on there, those up to a mark.

        One id can always be taken back; more only as far as the windows reach, or to a mark, or to nothing.
        """
        ids, self.ids, self.next = self.ids, [], None  # an interrupt in here leaves nothing to rely on
        marks, self._marks = [mark for mark in self._marks if mark[0] <= length], []
        if not self.cache.can_resume(0, length):
            length, states = marks[-1] if marks else (0, [])
            for member, state in zip(members(self.cache), states, strict=False):
                if state:
                    member.remove(0, 0)
                    member.restore(0, *state)
        self.cache.remove(0, length)
        self.ids, self._marks = ids[:length], marks
        return length

    def mark(self) -> None:
        """Remember this place: `step_back` finds it however far the windows have moved on. The first mark and the latest are kept.

        Each costs a copy of the windows: of gpt-oss-20b 6.3 MB in f32 (12 layers, 128 positions of 4,096 bytes); nothing without windows.
        """
        states = [last_of(member.state(0), member.window) if windowed(member) else None for member in members(self.cache)]
        self._marks = [*self._marks[:1], (len(self.ids), states)]

    def shift(self, keep: int) -> list[int]:
        """Make room in a full context: forget half of what follows the first `keep` ids, and say which ids those were.

        The rest moves to the positions behind the first. With a rotary embedding its keys are rotated there; they and the values are
        still those of tokens that had read what is forgotten. Without, or where a window would need what it has forgotten, all that is
        kept is read anew. At least two ids follow the first `keep`.
        """
        ids, self.ids = self.ids, []
        marks, self._marks = [mark for mark in self._marks if mark[0] <= keep], []
        end = keep + (len(ids) - keep) // 2
        rest = ids[:keep] + ids[end:]
        if self._closed_up(keep, end, len(rest)):
            self.ids, self._marks = rest, marks
        else:
            self.cache.remove(0, 0)
            coming, self.next = self.next, None
            self.read(rest, self._no_logits())
            self.next = coming
        return ids[keep:end]

    def _closed_up(self, begin: int, end: int, length: int) -> bool:
        """Take positions begin to end out of the cache; whether it can go on at `length` then."""
        try:
            self.cache.remove(0, begin, end)
        except caches.NotSupported:
            return False
        return self.cache.can_resume(0, length)

    def states(self) -> list[State]:
        """What is held, for each member of the cache: of a window only what it would not forget next. Copies."""
        self.cache.remove(0, len(self.ids))
        return [last_of(member.state(0), member.memory) if windowed(member) else member.state(0) for member in members(self.cache)]

    def restore(self, ids: Sequence[int], states: Sequence[State]) -> None:
        """Hold this text instead, with what `states` gave for it. Raises ToyllmError where that does not fit this cache."""
        n = int(states[0][0][-1]) + 1 if len(states[0][0]) else 0
        if n > self.room:
            raise ToyllmError(f"the session holds {n} tokens, and the context {self.room}: raise --context")
        self.step_back(0)
        for member, state in zip(members(self.cache), states, strict=True):
            member.restore(0, *(last_of(state, member.memory) if windowed(member) else state))
        self.ids, self.next = list(ids[:n]), ids[n] if len(ids) > n else None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def members(cache: Any) -> tuple[Any, ...]:
    """The caches that one for several kinds of layers is made of; of any other, the cache itself."""
    return getattr(cache, "caches", (cache,))


def windowed(cache: Any) -> bool:
    """Whether a cache forgets what has left a window."""
    return isinstance(cache, caches.SlidingWindowCache)


def last_of(state: State, n: int) -> State:
    """What a state says of its last n positions; a copy."""
    positions, keys, values = state
    return positions[-n:].copy(), keys[:, :, -n:].copy(), values[:, :, -n:].copy()
