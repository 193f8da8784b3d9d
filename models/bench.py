"""Measuring a model: prefill and decode, at a depth of context, repeated, held against the machine.

A test is one of two kinds, named as llama-bench names them: `pp512` runs 512 tokens in passes of the model's prefill chunk, `tg128` runs
128 tokens one at a time, `tg128 @ d4096` the same behind 4096 positions that a prefill has filled. Both run `Model.forward` as generation
does. Decoding looks for the likeliest of each token's logits, but the next token is not that one: every position has a token drawn from the
vocabulary by a fixed seed, so that all backends and threads do the same work, and no tokenizer is needed.

Decoding is bounded by memory: beside its time stand the bytes that a token has to read, and how fast this machine reads, measured between
the repetitions. Prefill is bounded by arithmetic: beside its time stand the operations. Both are counted as params.py and memory.py
count them, each weight once as it is held, in a mixture those of the experts that run on the token; the head is computed once a prompt.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.errors import ToyllmError
from ..kernels.stream import read_stream, stream_array
from ..kernels.threads import set_threads
from .generation import Settings, clock
from .memory import Running, held, per_token
from .model import RESERVE
from .params import Anatomy, anatomy, sizes
from .parts import Part, whole
from .preload import available_memory
from .sampling import Sampler

if TYPE_CHECKING:
    from .model import Model

PREFILL, DECODE = "pp", "tg"
SEED = 0  # of the tokens
READS = 3  # of the stream, before, between and after the repetitions
STREAM, SMALLEST_STREAM = 2**31, 2**26  # bytes of the stream, and of one where memory is short

log = logging.getLogger("toyllm")

# ---- tests ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Test:
    """What to measure."""

    kind: str  # PREFILL or DECODE
    tokens: int
    depth: int  # positions before them
    threads: int

    @property
    def end(self) -> int:
        """Positions that the context has after them."""
        return self.depth + self.tokens

    @property
    def name(self) -> str:
        """As llama-bench names it: pp512, tg128 @ d4096."""
        return f"{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")


def combine(prompts: Sequence[int], lengths: Sequence[int], depths: Sequence[int], threads: Sequence[int]) -> tuple[Test, ...]:
    """All combinations, depth by depth, so that each is filled once, then threads; a size of 0 is none."""
    kinds = [(PREFILL, n) for n in prompts if n] + [(DECODE, n) for n in lengths if n]
    return tuple(Test(kind, n, depth, count) for depth in depths for count in threads for kind, n in kinds)


def check_room(tests: Sequence[Test], most: int, context: int | None = None) -> None:
    """Raise ToyllmError, naming the first, where a test needs more than the model's positions, or than those of a smaller context."""
    for test in tests:
        if test.end > (context or most):
            ways = [*["--depth"][: test.depth], "--prompt-sizes" if test.kind == PREFILL else "--generation-lengths"]
            way = f"lower {' or '.join(ways)}" + (", or raise --context" if test.end <= most else "")
            raise ToyllmError(f"{test.name} takes {test.end} positions, the context has {context or most}: {way}")


# ---- what a test has to do --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one repetition of a test has to do."""

    flops: int  # of matrix products and attention
    weight_bytes: int = 0  # that a decoded token reads; 0 for prefill, whose tokens share what is read
    cache_bytes: float = 0  # keys and values that a decoded token reads, on average

    @property
    def token_bytes(self) -> float:
        """All that a decoded token reads."""
        return self.weight_bytes + self.cache_bytes


def work_of(a: Anatomy, test: Test, cache_dtype: str, every_expert: bool = False, weights: str = "stored") -> Work:
    """Counted; `every_expert` says that a decoded token runs all experts, `weights` how dense ones are held."""
    entries = held(whole(a).entries, weights)
    position = per_token(a, Part("a layer", (), range(1)), Running(1, cache_dtype))  # of attention, for one that a query sees
    seen = sum(n * positions_seen(window, test) for window, n in Counter(sizes(a.config).windows).items())
    head = sum(e.flops for e in entries if e.multiplied and e.component in ("embedding", "head"))
    body = sum(e.flops for e in entries) - head
    if test.kind == PREFILL:
        return Work(test.tokens * body + head + seen * position.flops)
    read = sum((replace(e, share=(1, 1)) if every_expert else e).read for e in entries)
    return Work(test.tokens * (body + head) + seen * position.flops, read, seen * position.cache_bytes / test.tokens)


def positions_seen(window: int | None, test: Test) -> int:
    """How many positions the test's tokens see in a layer, themselves included, all together: Σ min(n, window), n = depth + 1 ..."""
    first, last = test.depth + 1, test.end
    edge = last if window is None else min(max(window, test.depth), last)  # up to this one a token sees all before it
    return (first + edge) * (edge - test.depth) // 2 + (last - edge) * (window or 0)


# ---- what came of it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A test's times; rates are a second. Those of bytes and operations are the median repetition's, against the median read."""

    test: Test
    work: Work
    seconds: tuple[float, ...]  # a repetition
    stream_bytes: int
    stream_seconds: tuple[float, ...]  # a read of the stream; none with prefill

    @property
    def rates(self) -> tuple[float, ...]:
        """Tokens a second, of each repetition."""
        return tuple(self.test.tokens / s for s in self.seconds)

    @property
    def byte_rate(self) -> float | None:
        """Bytes of weights, keys and values that are read; None for prefill."""
        nbytes = self.work.token_bytes * self.test.tokens
        return nbytes / median(self.seconds) if self.test.kind == DECODE else None

    @property
    def stream_rate(self) -> float | None:
        """Bytes that the machine reads with nothing else to do, on the same threads; None for prefill."""
        return self.stream_bytes / median(self.stream_seconds) if self.stream_seconds else None

    @property
    def share(self) -> float | None:
        """Of the streaming speed, what the model reached; None for prefill."""
        return self.byte_rate / self.stream_rate if self.byte_rate is not None and self.stream_rate else None

    @property
    def flop_rate(self) -> float:
        """Operations."""
        return self.work.flops / median(self.seconds)


@dataclass(frozen=True)
class Summary:
    """Of several numbers."""

    mean: float
    sd: float | None  # of the sample, n − 1; None for a single number
    median: float
    min: float
    max: float


def summary(numbers: Sequence[float]) -> Summary:
    """Of at least one."""
    return Summary(mean(numbers), stdev(numbers) if len(numbers) > 1 else None, median(numbers), min(numbers), max(numbers))


# ---- measuring --------------------------------------------------------------------------------------------------------------

WARM_UP, REPETITION, FILLING = "warm-up", "repetition", "filling the context"
Tell = Callable[[str, int, int], None]  # which of these is being done, how much of it, of how much
Clock = Callable[[], float]  # `clock` stands still while kernels are loaded or compiled


@dataclass(frozen=True)
class Bench:
    """A model set up to be measured: all tests share one KV cache, so that a depth need not be filled for each."""

    model: "Model"
    anatomy: Anatomy
    room: int  # positions of the cache
    ids: list[int]  # the token at each position
    cache: Any
    logits: np.ndarray  # f32 [1, V]
    sampler: Sampler
    stream: np.ndarray | None  # what is read to measure streaming; None where nothing is decoded


def set_up(model: "Model", tests: Sequence[Test], room: int) -> Bench:
    """Everything that the tests need, in a KV cache of `room` positions.

    Raises ToyllmError for threads that the machine does not have, and where memory does not suffice.
    """
    for test in tests:
        set_threads(test.threads)
    cache = model.new_cache(room, keep=max((test.tokens for test in tests if test.depth), default=0))
    stream = make_stream(model, cache.nbytes) if any(test.kind == DECODE for test in tests) else None
    ids = np.random.default_rng(SEED).integers(0, model.vocab_size, room).tolist()
    sampler = Sampler(Settings(temperature=0), (), model.vocab_size)
    return Bench(model, anatomy(model.files), room, ids, cache, np.empty((1, model.vocab_size), np.float32), sampler, stream)


def make_stream(model: "Model", cache_bytes: int) -> np.ndarray:
    """Memory to read: `STREAM` bytes, or what is free beside weights and cache, which is said. Raises ToyllmError."""
    nbytes = stream_bytes(available_memory(), model.mapped_bytes, cache_bytes)
    while True:
        try:
            stream = stream_array(nbytes)
        except MemoryError as error:
            if nbytes == SMALLEST_STREAM:
                raise ToyllmError(f"the system gives no {nbytes / 1e6:.0f} MB to measure streaming with; close other programs") from error
            nbytes = max(nbytes // 2, SMALLEST_STREAM)
        else:
            if nbytes < STREAM:
                log.info("streaming is measured over %.2f GB, all that is free, not %.2f", stream.nbytes / 1e9, STREAM / 1e9)
            return stream


def stream_bytes(free: int | None, weights: int, cache: int) -> int:
    """How much to read, of so many bytes available, unless unknown: the weights should stay in memory, where they can."""
    if free is None:
        return STREAM
    return min(STREAM, max(SMALLEST_STREAM, (free - weights if free > weights else free) - cache - RESERVE))


def measure(bench: Bench, test: Test, repetitions: int, tell: Tell, now: Clock = clock) -> Measured:
    """Run a test so many times, and once before, uncounted. Raises ToyllmError where the logits hold NaN or infinity."""

    def prepare() -> None:
        set_threads(bench.model.threads)
        fill(bench, test.depth, tell)
        set_threads(test.threads)

    def read() -> object:
        return None if bench.stream is None else read_stream(bench.stream)

    prefills = test.kind == PREFILL
    step = prefill if prefills else decode
    seconds, reads = repeat(prepare, lambda: step(bench, test.depth, test.end), None if prefills else read, repetitions, tell, now)
    return Measured(test, work(bench, test), seconds, 0 if prefills or bench.stream is None else bench.stream.nbytes, reads)


def work(bench: Bench, test: Test) -> Work:
    """What the test has to do, as the model runs."""
    every_expert = bench.model.kernels.mixing.algorithm in ("all", "budget")  # a single token's budget is never below all of them
    return work_of(bench.anatomy, test, bench.model.cache_dtype, every_expert, bench.model.kernels.weights)


def repeat(
    prepare: Callable[[], object], step: Callable[[], object], read: Callable[[], object] | None, repetitions: int, tell: Tell, now: Clock
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of each repetition, and of each read: `READS` before, between and after them, if there is something to read.

    One more repetition comes first, which is not counted: it loads kernels and faults pages in.
    """
    tell(WARM_UP, 1, 1)
    prepare()
    step()
    seconds, reads = [], []
    for n in range(repetitions + 1):
        reads += [timed(read, now) for _ in range(READS)] if read else []
        if n < repetitions:
            tell(REPETITION, n + 1, repetitions)
            prepare()
            seconds.append(timed(step, now))
    return tuple(seconds), tuple(reads)


def timed(step: Callable[[], object], now: Clock) -> float:
    """Seconds that it takes."""
    began = now()
    step()
    return now() - began


def fill(bench: Bench, depth: int, tell: Tell) -> None:
    """Bring the cache to the first `depth` positions: what it has of them stays, if it can step back, and a prefill adds the rest."""
    kept = min(bench.cache.length(), depth)
    bench.cache.remove(0, kept if bench.cache.can_resume(0, kept) else 0)
    for first in range(bench.cache.length(), depth, bench.model.prefill_chunk):
        tell(FILLING, first, depth)
        prefill(bench, first, min(first + bench.model.prefill_chunk, depth))


def prefill(bench: Bench, begin: int, end: int) -> None:
    """Run the tokens at these positions as a prompt."""
    positions = np.arange(begin, end)
    bench.model.forward(bench.ids[begin:end], positions, np.zeros_like(positions), bench.cache, out=bench.logits)


def decode(bench: Bench, begin: int, end: int) -> None:
    """Run the tokens at these positions one by one, and find the likeliest after each."""
    for at in range(begin, end):
        bench.model.forward([bench.ids[at]], [at], [0], bench.cache, out=bench.logits)
        bench.sampler.next(bench.logits[0])


# ---- the machine ------------------------------------------------------------------------------------------------------------


def last_cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Bytes of the last caches of the processors that this process may run on, all together; None where the system does not tell."""
    found: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
            last = max((cpus / f"cpu{cpu}" / "cache").glob("index*"), key=lambda index: int((index / "level").read_text()))
            found[(last / "shared_cpu_list").read_text()] = 1024 * int((last / "size").read_text().rstrip("K\n"))
    return sum(found.values()) or None
