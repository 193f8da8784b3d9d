"""What it takes to run a model, known before it is loaded: memory piece by piece, and the bytes and operations of a decoded token.

A plan is a tuple of `Allocation`s. Whoever makes them marks them allocated or failed, so that one table shows what was planned and what
came of it. Weights are pages of the memory map, which the system may drop and read again; all else has to stay. Of weights that have a
copy in 8 bits the map is not read any more, and does not count.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..kernels.cells import cell_bytes
from ..kernels.errors import ToyllmError
from .cache import BLOCK, DTYPES
from .params import Anatomy, Entry, anatomy, one_layer, sizes
from .parts import Part, whole

PLANNED, ALLOCATED, FAILED = "planned", "allocated", "failed"
KINDS = ("weights", "quantised", "widened", "cache", "work")
WEIGHTS = ("stored", "q8")
Q8, Q8_BLOCK, Q8_BYTES = "Q8", 32, 34  # a dtype: weights of a block, and its bytes, an integer each and a scale in f16
ENGINE = 256 * 2**20  # bytes for the interpreter, the compiled kernels and what they allocate in passing


@dataclass(frozen=True)
class Running:
    """How a model would run."""

    context: int
    cache_dtype: str = "f32"
    prefill_chunk: int = 512
    weights: str = "stored"  # or "q8": dense ones are copied in 8 bits
    sequences: int = 1  # that run together, each with the context
    keep: int = 0  # positions that windows can step back


def running(a: Anatomy, context: int | None, cache_dtype: str, prefill_chunk: int, weights: str = "stored", sequences: int = 1) -> Running:
    """Checked; a `context` of None is the model's. Raises ToyllmError."""
    most = a.config.context
    if context is not None and not 1 <= context <= most:
        raise ToyllmError(f"--context {context}: expected 1 to {most}, the positions this model knows")
    if cache_dtype not in DTYPES:
        raise ToyllmError(f"--cache-dtype {cache_dtype}: expected {' or '.join(DTYPES)}")
    if prefill_chunk < 1:
        raise ToyllmError(f"--prefill-chunk {prefill_chunk}: expected at least 1")
    if weights not in WEIGHTS:
        raise ToyllmError(f"--weights {weights}: expected {' or '.join(WEIGHTS)}")
    if sequences < 1:
        raise ToyllmError(f"--batch-size {sequences}: expected at least 1")
    return Running(most if context is None else context, cache_dtype, prefill_chunk, weights, sequences)


def held(entries: Iterable[Entry], weights: str) -> tuple[Entry, ...]:
    """The tensors as a run holds them: with "q8" the copies in place of dense matrices; a tied embedding is looked up as stored."""
    if weights == "stored":
        return tuple(entries)
    made = []
    for e in entries:
        if e.inputs is None or not e.multiplied:
            made.append(e)
            continue
        if e.looked_up:
            made.append(replace(e, multiplied=False))
        K = e.shape[e.inputs]
        nbytes = math.prod(e.shape) // max(K, 1) * -(-K // Q8_BLOCK) * Q8_BYTES
        made.append(replace(e, dtype=Q8, nbytes=nbytes, looked_up=False))
    return tuple(made)


# ---- memory -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allocation:
    """One piece of memory."""

    part: str  # "input", "layer 3", "head", "buffers", "engine"
    kind: str  # of KINDS: mapped weights, copies in 8 bits, copies in f32, keys and values, work space
    nbytes: int
    status: str = PLANNED


def plan(a: Anatomy, part: Part, run: Running) -> tuple[Allocation, ...]:
    """Everything that the part allocates, in the order of a forward pass."""
    by_layer: dict[int | None, list[Entry]] = {}
    for e in held(part.entries, run.weights):
        by_layer.setdefault(e.layer, []).append(e)

    def weights(name: str, layer: int | None, head: bool = False) -> list[Allocation]:
        mine = [e for e in by_layer.get(layer, ()) if layer is not None or head != e.looked_up]
        figures = {
            "weights": sum(e.nbytes for e in mine if e.dtype != Q8),
            "quantised": sum(e.nbytes for e in mine if e.dtype == Q8),
            "widened": sum(e.widened for e in mine),
        }
        return [Allocation(name, kind, nbytes) for kind, nbytes in figures.items() if nbytes]

    pieces = weights("input", None)
    for i in part.layers:
        pieces += weights(f"layer {i}", i)
        sizes = (run.context, run.prefill_chunk, run.cache_dtype, run.sequences, run.keep)
        nbytes = a.family.cache_bytes(one_layer(a.config, i), *sizes)
        pieces.append(Allocation(f"layer {i}", "cache", nbytes // part.shards))
    pieces += weights("head", None, head=True)
    return (*pieces, Allocation("buffers", "work", buffer_bytes(a, part, run)), Allocation("engine", "work", ENGINE))


def buffer_bytes(a: Anatomy, part: Part, run: Running) -> int:
    """Bytes of the family's `Buffers` and of the logits; of the experts' passing ones, those for the average share of a chunk."""
    s, rows = sizes(a.config), min(run.prefill_chunk, run.context * run.sequences)
    H, G, F = s.H // part.shards, s.G // part.shards, s.F if s.E else s.F // part.shards
    Q, KV = H * s.Dh, G * s.Dh
    if s.E:
        cells = rows * (3 * s.D + 2 * Q + 2 * KV + s.E + s.k) + 3 * s.k * F + s.D
        crowd = -(-rows * s.k // s.E)
        nbytes = 4 * (cells + crowd * (2 * s.D + 3 * F)) + 8 * rows * s.k
    else:
        nbytes = 4 * rows * (3 * s.D + Q + 2 * KV + 2 * Q + F)
    panel = 64 * (max(s.D, F, Q if s.E else 0) + 1)  # of the widest kernels
    logits = s.V if any(e.multiplied and e.component in ("embedding", "head") for e in part.entries) else 0
    return nbytes + 4 * (threads() * (panel + 8 * BLOCK) + logits * run.sequences)


def threads() -> int:
    """The most threads that kernels may run on, each with scratch of its own: as Numba finds them."""
    given = os.environ.get("NUMBA_NUM_THREADS", "")
    return int(given) if given.isdecimal() else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def of_model(model: Any, context: int, sequences: int = 1, keep: int = 0) -> tuple[Allocation, ...]:
    """What a loaded model allocates to run so many sequences together, each of so many positions; `keep` as in `Model.new_cache`."""
    a = anatomy(model.files)
    return plan(a, whole(a), Running(context, model.cache_dtype, model.prefill_chunk, model.kernels.weights, sequences, keep))


def mark(pieces: Iterable[Allocation], kind: str, status: str) -> tuple[Allocation, ...]:
    """The plan with all pieces of a kind allocated, or failed."""
    return tuple(replace(p, status=status) if p.kind == kind else p for p in pieces)


def total(pieces: Iterable[Allocation], *kinds: str) -> int:
    """Bytes of the pieces of these kinds; of all, without any."""
    return sum(p.nbytes for p in pieces if not kinds or p.kind in kinds)


def memory_rows(pieces: Iterable[Allocation]) -> list[tuple[str, dict[str, int], str]]:
    """A plan as a table: a row a part with the bytes of each kind, and its status, or its statuses by kind where they differ."""
    rows: dict[str, list[Allocation]] = {}
    for piece in pieces:
        rows.setdefault(piece.part, []).append(piece)

    def status(mine: list[Allocation]) -> str:
        if len({p.status for p in mine}) == 1:
            return mine[0].status
        return ", ".join(f"{p.kind} {p.status}" for p in mine)

    return [(part, {p.kind: p.nbytes for p in mine}, status(mine)) for part, mine in rows.items()]


def verdict(needed: int, mapped: int, available: int | None) -> str:
    """Whether so many bytes, so many of them mapped weights, fit into what is available, in words."""
    if available is None:
        return "unknown: this system does not tell its available memory"
    if needed <= available:
        return "fits"
    if needed - mapped <= available:
        return "does not fit: it would run, but read weights from the disk for every token"
    return "does not fit"


# ---- a decoded token --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerToken:
    """What decoding one token takes, at the last position of the context."""

    weight_bytes: int  # as stored, or in 8 bits
    cache_bytes: int
    flops: int  # of matrix products and attention

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return self.weight_bytes + self.cache_bytes

    def rate(self, bandwidth: float) -> float:
        """The most tokens a second at so many bytes a second."""
        return bandwidth / self.nbytes if self.nbytes else 0.0


def per_token(a: Anatomy, part: Part, run: Running) -> PerToken:
    """Bytes and operations of one decoded token in a part."""
    s = sizes(a.config)
    seen = sum(min(run.context, s.windows[i] or run.context) for i in part.layers)
    cell = 2 * s.G // part.shards * cell_bytes(s.Dh, run.cache_dtype)
    attention = 4 * s.H // part.shards * s.Dh * seen  # q · k and the sum of v, a product and a sum each
    entries = held(part.entries, run.weights)
    return PerToken(sum(e.read for e in entries), cell * seen, sum(e.flops for e in entries) + attention)
