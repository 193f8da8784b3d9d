"""Drawing tokens: penalties over the whole context, then the sampling kernel; random state belongs to the sequence."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.sampling import largest, log_sum_exp, sample_kernel, sample_scratch
from .nonfinite import UNDRAWABLE, NotFinite

if TYPE_CHECKING:
    from .generation import Settings


class Sampler:
    """One sequence's draws: its settings, its random numbers (PCG64 from the seed), and how often each token has occurred."""

    def __init__(self, settings: "Settings", context: Sequence[int], vocab_size: int) -> None:
        self._settings = settings
        self._random = np.random.Generator(np.random.PCG64(settings.seed))
        # floats throughout: an int among them would be another kernel to compile
        self._limits = float(settings.temperature), settings.top_k, float(settings.top_p), float(settings.min_p)
        self._scratch = sample_scratch(vocab_size) if settings.temperature else None
        self._counts = np.bincount(context, minlength=vocab_size).astype(np.float32)
        penalised = settings.repetition_penalty != 1 or settings.presence_penalty or settings.frequency_penalty
        self._penalised = np.empty(vocab_size, np.float32) if penalised else None

    def next(self, logits: np.ndarray) -> int:
        """The next token from logits f32 [V], which stay as they are. Raises NotFinite where none can be drawn."""
        s = self._settings
        if self._penalised is not None:
            np.copyto(self._penalised, logits)
            logits = self._penalised
            penalise(logits, self._counts, s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
        if not np.isfinite(logits.max()):
            raise NotFinite(f"{UNDRAWABLE}; are the weights damaged?")
        token = sample_kernel(logits, *self._limits, self._random.random(), self._scratch) if s.temperature else int(logits.argmax())
        self._counts[token] += 1
        return token

    def forget(self, ids: Sequence[int]) -> None:
        """Tokens that have left the context are no longer counted in it."""
        np.subtract.at(self._counts, np.asarray(ids, np.int64), 1)


def penalise(logits: np.ndarray, counts: np.ndarray, repetition: float, presence: float, frequency: float) -> None:
    """Make tokens that have occurred less likely, in place; logits and counts f32 [V].

    Repetition divides a positive logit and multiplies a negative one (Keskar et al. 2019, arXiv:1909.05858); then presence is subtracted
    once and frequency for each occurrence (the OpenAI API's definition).
    """
    seen = np.flatnonzero(counts)
    some = logits[seen]
    some = np.where(some > 0, some / np.float32(repetition), some * np.float32(repetition))
    logits[seen] = some - np.float32(presence) - counts[seen] * np.float32(frequency)


def logprobs(logits: np.ndarray, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """What to subtract from a logit for its log-probability, and the n likeliest tokens as (id, logprob), likeliest first."""
    total = log_sum_exp(logits)
    return total, tuple((int(i), float(logits[i]) - total) for i in largest(logits, n))
