"""Where NaN or an infinity begins in a run: the first activation that is not finite, found by running the beginning of it once more."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.errors import ToyllmError

if TYPE_CHECKING:
    from .model import Model

TOKENS = 512  # of the run that are looked at: most weights that are damaged show with the first
UNDRAWABLE = "no token can be drawn: the logits hold NaN or infinity"
CHUNK = 32  # tokens a pass: attention's scores are made for whoever looks, a row a token


class NotFinite(ToyllmError):  # noqa: N818 - named for what it says
    """Logits from which no token can be drawn: NaN or +infinity among them, or nothing above -infinity."""


class Found(Exception):  # noqa: N818 - ends the run that looks
    """An activation that is not finite."""


def explained(model: "Model", ids: Sequence[int]) -> NotFinite:
    """What to raise for logits after these ids that are not finite: where that began, as far as a look at the first ids tells."""
    where = origin(model, ids[:TOKENS])
    begins = f", which begins in {where}" if where else ""
    return NotFinite(f"{UNDRAWABLE}{begins}; are the weights damaged? `toyllm check` reads them all")


def origin(model: "Model", ids: Sequence[int]) -> str | None:
    """The name of the first activation of a run over the ids that is not finite, and its token; None where all are."""

    def look(name: str, array: np.ndarray) -> None:
        if name.endswith((".scores", ".weights")) or array.dtype.kind != "f":  # invisible keys have score -infinity
            return
        rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
        if len(rows):
            raise Found(f"{name}, at position {done + len(part) - len(array) + rows[0]}")  # logits are the last token's alone

    cache, done, part = model.new_cache(len(ids)), 0, ids
    together = min(CHUNK, model.prefill_chunk)  # one pass, so that the rows of what is seen are those of the part
    try:
        for done in range(0, len(ids), together):
            part = ids[done : done + together]
            model.forward(part, np.arange(done, done + len(part)), np.zeros(len(part), np.int64), cache, taps=look)
    except Found as found:
        return str(found)
    return None
