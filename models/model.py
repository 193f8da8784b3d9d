"""A loaded model: its family's functions with the weights, buffers and kernels they run on."""

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.checks import check_array
from ..kernels.errors import OutOfMemory, ToyllmError
from .cache import DTYPES
from .checkpoint import Checkpoint, open_checkpoint
from .config import GenerationDefaults, generation_defaults, load_config
from .location import ModelFiles, find_model
from .preload import address_space, available_memory
from .taps import Reader, Tap
from .tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger("toyllm")

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..kernels.backends import Backend
    from .changes import Change, Changes
    from .generation import Event, Settings

RESERVE = 256 * 2**20  # bytes of memory left for the interpreter, the kernels and their buffers
COMPILER = 384 * 2**20  # bytes of address space: LLVM, kernels and their threads' stacks, measured with a little room
PREFILL_CHUNK = 512  # tokens a pass: enough to keep the processor busy, and the buffers stay in its caches


@dataclass
class Model:
    """A checkpoint ready to run. Made by `load`."""

    files: ModelFiles
    family: ModuleType
    config: Any
    checkpoint: Checkpoint
    weights: Any
    tokenizer: Tokenizer | None
    kernels: "Backend"
    threads: int
    prefill_chunk: int = PREFILL_CHUNK
    cache_dtype: str = "f32"
    poison_cache: bool = False
    changes: "Changes | None" = None
    _buffers: Any = field(default=None, repr=False)

    @cached_property
    def defaults(self) -> GenerationDefaults:
        """What generation_config.json says."""
        return generation_defaults(self.files)

    @property
    def vocab_size(self) -> int:
        """V: rows of the embedding, the ids the model takes."""
        return self.config.vocab_size

    def changed(self, changes: "Iterable[Change]", prompt: int | None = None, positions: int | None = None) -> "Model":
        """This model with changes of its activations made in every pass, in their order; those it had before are no longer made.

        See `models.changes`. Negative positions count back from the end of a prompt of so many tokens; `positions` is how many there can
        be (default: the model's context). Weights and buffers are this model's own. Raises ToyllmError for a name, slice or value that
        does not fit, and for a change that would reach nothing.
        """
        from .changes import resolve

        budget = self.kernels.mixing.algorithm == "budget"
        return replace(self, changes=resolve(self.config, changes, prompt, positions, budget))

    @property
    def mapped_bytes(self) -> int:
        """Bytes of the files that tokens read: all, but those of weights that have copies in 8 bits."""
        if self.kernels.weights == "stored":
            return sum(path.stat().st_size for path in self.checkpoint.shards)
        from .memory import of_model, total

        return total(of_model(self, 1), "weights")

    def context_for(self, wanted: int | None) -> int:
        """Positions to make a KV cache for: `wanted`, or the model's context reduced, with a note, to what fits in memory.

        Raises ToyllmError, with the figures, for more than the model knows and for more than fits.
        """
        most = self.config.context
        if wanted is not None and not 1 <= wanted <= most:
            raise ToyllmError(f"--context {wanted}: expected 1 to {most}, the positions this model knows")
        room = self.free_for_cache()
        if room is None:
            return wanted or most
        needs = self.cache_bytes
        if needs(wanted or most) <= room:
            return wanted or most
        fits = bisect_right(range(1, most + 1), room, key=needs)
        figures = f"the KV cache takes {needs(wanted or most) / 1e9:.2f} GB, {max(0, room) / 1e9:.2f} GB are free beside the weights"
        if not fits:
            raise OutOfMemory(f"no context fits in memory: {figures}; close other programs, or take a smaller model", wanted or most)
        if wanted is not None:
            raise OutOfMemory(f"--context {wanted}: {figures}; try --context {fits}", wanted)
        log.info("context reduced from %d to %d: %s", most, fits, figures)
        return fits

    def free_for_cache(self) -> int | None:
        """Bytes of memory that a KV cache may take: beside the weights, where both fit. None where the system does not tell."""
        free, limit = available_memory(), address_space()  # of the limit the mapped weights are taken off already
        weights = self.mapped_bytes
        room = [] if free is None else [free - weights if free > weights else free]  # the file should stay in memory, where it can
        room += [] if limit is None else [limit]
        return min(room) - RESERVE if room else None

    def cache_bytes(self, context: int, sequences: int = 1) -> int:
        """Bytes of a KV cache for so many sequences of so many positions."""
        return self.family.cache_bytes(self.config, context, self.prefill_chunk, self.cache_dtype, sequences)

    def new_cache(self, context: int | None = None, sequences: int = 1, keep: int = 0) -> Any:
        """A KV cache for `sequences` sequences of up to `context` positions (default: the model's); see `models.cache`.

        `keep` is how many positions a sequence can step back from where a pass began, for layers that would have forgotten what it then
        sees. Raises OutOfMemory.
        """
        room = self.config.context if context is None else context
        sizes = (self.prefill_chunk, self.cache_dtype)
        try:
            return self.family.make_cache(self.config, sequences, room, *sizes, self.poison_cache, keep)
        except MemoryError as error:
            nbytes = self.family.cache_bytes(self.config, room, *sizes, sequences, keep)
            text = f"--context {room}: the KV cache takes {nbytes / 1e9:.2f} GB, which the system does not give; try a smaller --context"
            raise OutOfMemory(text, room) from error

    def forward(
        self,
        tokens: Sequence[int] | np.ndarray,
        positions: Sequence[int] | np.ndarray,
        sequences: Sequence[int] | np.ndarray,
        cache: Any,
        taps: Reader | None = None,
        all_logits: bool = False,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Run tokens [T] at their positions [T] in their sequences [T] of the cache; f32 logits [1, V] of the last, or [T, V] of all.

        Prefill and decode, one sequence or many, are this one path. More than `prefill_chunk` tokens run in passes of that many, which
        changes no logits. `out` f32 [n, V], if given, takes the logits of the last n and is returned. `taps(name, array)` is called with
        each activation as it is made, and changed where the model's are: a buffer that the next one overwrites; copy it to keep it. Raises
        ToyllmError for ids, positions or sequences that do not fit; CacheFull where the cache has no room.
        """
        named = {"tokens": tokens, "positions": positions, "sequences": sequences}
        tokens, positions, sequences = (integers(name, array) for name, array in named.items())
        self._check_batch(tokens, positions, sequences)
        self.checkpoint.check_whole()
        check_follows(cache, positions, sequences)
        T = len(tokens)
        if self.prefill_chunk < T:
            cache.check_room(positions, sequences, self.prefill_chunk)
        if self._buffers is None or len(self._buffers.x) < min(T, self.prefill_chunk):
            self._buffers = self.family.make_buffers(self.config, min(self.prefill_chunk, max(T, 1)))
        logits = np.empty((T if all_logits else 1, self.vocab_size), np.float32) if out is None else out
        n, _ = check_array("out", logits, (T if all_logits else None, self.vocab_size))
        if n > T:
            raise ToyllmError(f"out: expected at most {T} rows, a token's logits each, found {n}")
        writes = self.changes.writes if self.changes else {}
        for first in range(0, T, self.prefill_chunk):
            last = min(first + self.prefill_chunk, T)
            wanted = logits[max(0, first - T + n) : max(0, last - T + n)]
            cache.start_forward(positions[first:last], sequences[first:last])
            at = positions[first:last]
            tap = Tap(at, taps, writes) if taps or writes else None
            with np.errstate(all="ignore"):  # NaN and infinity come from the weights; NumPy would warn of them over several lines
                self.family.forward(self.weights, self.config, self.kernels, self._buffers, tokens[first:last], at, cache, wanted, tap)
        return logits

    def _check_batch(self, tokens: np.ndarray, positions: np.ndarray, sequences: np.ndarray) -> None:
        if tokens.ndim != 1 or tokens.shape != positions.shape or tokens.shape != sequences.shape or not len(tokens):
            raise ToyllmError(
                f"tokens, positions, sequences: expected the same length of at least 1, "
                f"found shapes {list(tokens.shape)}, {list(positions.shape)}, {list(sequences.shape)}"
            )
        check_ids(tokens, self.vocab_size)
        if positions.min() < 0 or positions.max() >= self.config.context:
            raise ToyllmError(f"positions: expected 0 to {self.config.context - 1}, found {positions.min()} to {positions.max()}")
        if self.changes and self.changes.of_scores and (sequences != sequences[0]).any():
            raise ToyllmError("sequences: expected one at a time where attn.scores or attn.weights are changed")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """f32 logits [T, V] after each of the ids [T], from position 0. Raises ToyllmError for bad ids or too many."""
        T = len(ids)
        if not 0 < T <= self.config.context:
            raise ToyllmError(f"ids: expected 1 to {self.config.context}, found {T}")
        return self.forward(ids, np.arange(T), np.zeros(T, np.int64), self.new_cache(T), all_logits=True)

    def generate(
        self, prompt: str | Sequence[int], settings: "Settings | None" = None, context: int | None = None, keep: int | None = None
    ) -> "Iterator[Event]":
        """Continue a text or token ids; where the context is full, behind its first `keep` tokens. See `generation.generate`."""
        from .generation import Settings, encode_prompt, generate

        return generate(self, encode_prompt(self, prompt), settings or Settings(), context, keep=keep)


def check_follows(cache: Any, positions: np.ndarray, sequences: np.ndarray) -> None:
    """Raise ToyllmError, naming the sequence, where positions do not follow those that the cache holds; an empty one begins anywhere."""
    for sequence in dict.fromkeys(sequences.tolist()):
        mine = positions if len(positions) == 1 else positions[sequences == sequence]
        stored = cache.next_position(sequence)
        expected = int(mine[0]) if stored is None else stored
        if mine[0] != expected or (len(mine) > 1 and (np.diff(mine) != 1).any()):
            raise ToyllmError(f"sequence {sequence}: expected positions from {expected} on, one after the other")


def check_ids(ids: np.ndarray | Sequence[int], vocab_size: int) -> None:
    """Raise ToyllmError, naming the first, where an id is no row of the embedding."""
    array = integers("ids", ids)
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(outside):
        raise ToyllmError(f"token id {array[outside[0]]} (number {outside[0] + 1} of {len(array)}): expected 0 to {vocab_size - 1}")


def integers(name: str, values: np.ndarray | Sequence[int]) -> np.ndarray:
    """The values as int64. Raises ToyllmError for what are no whole numbers: NumPy would cut off what follows the point."""
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise ToyllmError(f"{name}: expected integers of 64 bits, found {array.dtype}")
    return array.astype(np.int64, copy=False)


def check_compiler_fits() -> None:
    """Raise ToyllmError where a limit leaves too little address space for kernels: LLVM ends a process that runs out of it."""
    limit = address_space()
    if limit is not None and limit < COMPILER:
        figures = f"{limit / 1e6:.0f} MB of address space are left, and kernels take up to {COMPILER / 1e6:.0f} MB beside the model"
        raise ToyllmError(f"{figures}; raise the limit (ulimit -v)")


def ignore(*_: object) -> None:
    """Nothing is to be done."""


def load(
    name: str,
    backend: str = "auto",
    threads: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    cache_dtype: str = "f32",
    poison_cache: bool = False,
    moe: str = "auto",
    tokens_per_expert_ratio: float = 1.0,
    exact: bool = False,
    activations: str = "f32",
    attention: str = "fused",
    weights: str = "stored",
    preload: Callable[[tuple[Path, ...]], None] = ignore,
    progress: Callable[[int, int], None] = ignore,
) -> Model:
    """Load a model: a folder, a .safetensors file, an embedded model's name, or a repo id in the local Hugging Face cache.

    The weights stay in the memory map; with `weights` "q8" the dense ones are copied in 8 bits, and the copies used. `backend` is one of
    kernels.host.BACKENDS or "auto", `threads` the number of threads (default: the physical cores), `prefill_chunk` the most tokens a
    pass, `cache_dtype` how keys and values are kept ("f32", "bf16" or "q8"); `poison_cache` fills the KV cache with NaN; `moe` is one of
    kernels.moe.ALGORITHMS, `tokens_per_expert_ratio` its budget. Activations before MXFP4 weights are held in 16 bits where the
    processor gains by it, and with `activations` "bf16" those of products of many rows in 8; `exact` forbids both, and copies.
    `attention` is one of kernels.backends.ATTENTION: "plain" computes it unfused, to check. `preload` is called with the files when all
    is found right and before they are read, `progress` with the bytes of weights copied so far and in all, where that takes long.
    Raises ToyllmError for what cannot be found, read or run.
    """
    for option, value, usual in (("activations", activations, "f32"), ("weights", weights, "stored")):
        if exact and value != usual:
            raise ToyllmError(f"--exact is f32 throughout, --{option} {value} is not: drop one of them")
    if prefill_chunk < 1:
        raise ToyllmError(f"--prefill-chunk {prefill_chunk}: expected at least 1")
    if cache_dtype not in DTYPES:
        raise ToyllmError(f"--cache-dtype {cache_dtype}: expected {' or '.join(DTYPES)}")
    files = find_model(name)
    check_compiler_fits()
    family, config = load_config(files)
    checkpoint = open_checkpoint(files)

    from ..kernels.host import compile_for

    backend = compile_for(backend)
    stored = family.load_weights(checkpoint, config)
    tokenizer = load_tokenizer(files)

    from ..kernels.backends import backend as choose
    from ..kernels.moe import check_mixing
    from ..kernels.threads import set_threads

    kernels = choose(backend, check_mixing(moe, tokens_per_expert_ratio), activations, attention, weights, exact)
    threads = set_threads(threads)
    model = Model(files, family, config, checkpoint, stored, tokenizer, kernels, threads, prefill_chunk, cache_dtype, poison_cache)
    preload(checkpoint.shards)
    if weights == "q8":
        from .quantise import quantise

        quantise(model, progress)
    return model
