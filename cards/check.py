"""Cards held against the engine: both run the same tokens on the same weights, and what a step names, and the results, are compared.

A prompt is prefilled, the tokens behind it are decoded one by one (the card `Step`, over the KV cache that the model's card returned),
and what a model does not call that way is held against the engine's own functions (`check_apart`). A difference is max|a − b| / max|b|
over a tensor, b the engine's; cards run in float64, the engine in f32.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.errors import ToyllmError
from ..models import gpt2
from ..models.activations import Recording
from ..models.compare import Tally
from .catalogue import CALL, reached
from .evaluate import Bound
from .interpreter import Limits, Run, run
from .settings import hypers, is_tied, source
from .structure import Card, CardError, HyperValue
from .text import body_text

if TYPE_CHECKING:
    from ..models.model import Model

RTOL = 1e-4
LIMITS = Limits(steps=1 << 24, elements=1 << 30, held=1 << 36, work=1 << 46)  # gpt-oss-20b's cards stay within them
PREFILL, DECODE, ALONE = "prefill", "decode", "alone"

Part = tuple[str, Callable[[], None]]  # of a check: what it is, and what carries it out


@dataclass(frozen=True)
class Held:
    """One tensor of a card's run, held against the engine's."""

    stage: str  # PREFILL, DECODE, or ALONE: against a function of the engine
    card: str
    step: int  # its number in the card, from 1
    text: str
    place: str  # where it stands: file and line, empty for a card that is from no file
    name: str  # of the activation, `blocks.0.attn.q`, or what else is compared
    difference: float  # max|a − b| / max|b|; infinite where shapes differ or one of two numbers is none
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether card and engine agree."""
        return self.difference <= self.tolerance

    @property
    def activation(self) -> str:
        """The name without its block."""
        group, _, rest = self.name.partition(".")
        return f"blocks.*.{rest.partition('.')[2]}" if group == "blocks" else self.name


@dataclass(frozen=True)
class Row:
    """All comparisons of one activation of one step: every block, every decoded token."""

    held: tuple[Held, ...]

    @property
    def worst(self) -> Held:
        """The one with the largest difference, the first of equals."""
        return max(self.held, key=lambda h: h.difference)

    @property
    def holds(self) -> bool:
        """Whether all agree."""
        return all(h.holds for h in self.held)


@dataclass(frozen=True)
class Report:
    """What came of it. `held` are in the order in which they were computed."""

    ids: tuple[int, ...]
    start: int  # tokens prefilled, the rest is decoded
    rtol: float
    held: tuple[Held, ...]
    ran: frozenset[str]  # names of the cards that ran
    unstated: tuple[str, ...]  # activations of the prompt that the engine has and no step names
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Row]:
        """The comparisons by step and activation, in the order of their first."""
        groups: dict[tuple[str, str, int, str], list[Held]] = {}
        for h in self.held:
            groups.setdefault((h.stage, h.card, h.step, h.activation), []).append(h)
        return [Row(tuple(group)) for group in groups.values()]

    @property
    def first(self) -> Held | None:
        """The first that departs."""
        return next((h for h in self.held if not h.holds), None)

    @property
    def holds(self) -> bool:
        """Whether cards and engine agree throughout."""
        return self.first is None

    def about(self, name: str, library: Mapping[str, Card]) -> "Report":
        """What concerns one card: its steps and those of the cards that it calls, and the steps that call it."""
        inside = reached([library[name]], library)

        def calls(h: Held) -> bool:
            namespace = library[h.card].namespace
            return any(name in (f"{namespace}.{called}", called) for called in CALL.findall(h.text))

        return replace(self, held=tuple(h for h in self.held if h.card in inside or calls(h)))


@dataclass
class Bench:
    """A model, the cards that are held against it, and what has been compared so far."""

    model: "Model"
    library: Mapping[str, Card]
    rtol: float = RTOL
    dtype: Any = np.float64
    held: list[Held] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)

    @property
    def family(self) -> str:
        """The namespace of the model's cards."""
        return "gpt2" if isinstance(self.model.config, gpt2.Config) else "gpt-oss"

    @cached_property
    def hypers(self) -> dict[str, HyperValue]:
        """The hypers of the model as it runs."""
        model, mixing = self.model, self.model.kernels.mixing
        tied = is_tied(model.checkpoint, model.config)
        return hypers(model.config, model.checkpoint.tensors, tied) | {"moe": mixing.algorithm, "ρ": mixing.ratio}

    @cached_property
    def source(self) -> Callable[[str], np.ndarray]:
        """Its parameters."""
        return source(self.model.checkpoint, self.model.config)

    def card(self, name: str) -> Card:
        """A card of the family. Raises ToyllmError where there is none."""
        for whole in (f"{self.family}.{name}" if name else self.family, name):
            if whole in self.library:
                return self.library[whole]
        raise ToyllmError(f"no card {name or self.family}: --check needs the library's cards")

    def run(self, name: str, *inputs: Any, given: Mapping[str, Any] | None = None, group: str = "", **settings: HyperValue) -> "Ran":
        """Run a card of the family on its inputs, in order. Raises CardError."""
        card, bound = self.card(name), {}
        if len(inputs) != len(card.arguments):
            raise CardError(card.place, f"{card.name}: --check calls it with {len(inputs)} inputs, found {', '.join(card.arguments)}")

        def watch(what: Bound) -> None:
            self.ran.add(what.card.name)
            if what.activation:
                bound.pop(what.activation, None)  # the order is that in which they are complete
                bound[what.activation] = what

        named = dict(zip(card.arguments, inputs, strict=True)) | dict(given or {})
        made = run(
            card,
            self.library,
            named,
            self.hypers | settings,
            self.source,
            group=group,
            dtype=self.dtype,
            limits=LIMITS,
            watch=watch,
        )
        self.ran.add(card.name)
        return Ran(card, made, bound)

    def hold(self, stage: str, card: Card, step: int, name: str, ours: Any, engine: Any, tolerance: float | None = None) -> None:
        """Compare one tensor."""
        at, allowed = card.steps[step].targets, self.rtol if tolerance is None else tolerance
        place = f"{at.file}:{at.line}" if at.line else ""
        text = body_text(card.steps, step)
        self.held.append(Held(stage, card.name, step + 1, text, place, name, difference(ours, engine), allowed))

    def hold_steps(self, stage: str, ran: "Ran", engine: Mapping[str, np.ndarray], every: bool = True) -> None:
        """Compare each activation that a step named with the engine's; those that the engine does not have are refused, if `every`."""
        for name, what in ran.bound.items():
            if name in engine:
                self.hold(stage, what.card, number(what), name, ran.run.activations[name], engine[name])
            elif every:
                raise CardError(what.step.targets, f"[{name}]: the engine has no such activation; toyllm dump-tensor --list names all")

    def hold_result(self, stage: str, ran: "Ran", at: int, name: str, engine: Any, tolerance: float | None = None) -> None:
        """Compare a card's result with the engine's; `name` says what it is."""
        last = max((i for i, s in enumerate(ran.card.steps) if s.kind == "return"), default=len(ran.card.steps) - 1)
        results = ran.run.results
        if at >= len(results):
            raise CardError(ran.card.place, f"{ran.card.name}: result {at + 1} should be {name}, but it returns {len(results)}")
        self.hold(stage, ran.card, last, name, results[at], engine, tolerance)


@dataclass(frozen=True)
class Ran:
    """A card that has run, and which step bound each activation."""

    card: Card
    run: Run
    bound: Mapping[str, Bound]


def number(what: Bound) -> int:
    """The index of the step among its card's: the very one, not one that says the same."""
    return next(i for i, step in enumerate(what.card.steps) if step is what.step)


def difference(ours: Any, engine: Any) -> float:
    """max|a − b| / max|b|; infinite for other shapes."""
    a, b = np.asarray(ours), np.asarray(engine)
    if a.shape != b.shape:
        return math.inf
    tally = Tally()
    tally.add(a, b)
    return tally.result().error


# ---- the check --------------------------------------------------------------------------------------------------------------


def check(
    model: "Model",
    library: Mapping[str, Card],
    ids: Sequence[int] | None = None,
    start: int | None = None,
    rtol: float = RTOL,
    dtype: Any = np.float64,
    progress: Callable[[str], None] = lambda text: None,  # noqa: ARG005
    stop: bool = False,
) -> Report:
    """Hold the cards of a model's family against the model.

    `library` has the cards by name, one of a user's own in place of the library's. `ids` [T] default to random ones, enough to reach past
    a sliding window; the first `start` are prefilled, the others decoded. Reals are computed in `dtype`, float64 or float32. `progress`
    is told what is about to run. With `stop` the check ends after the part in which something departs.

    Raises CardError for a card that cannot run, and ToyllmError for ids and starts that do not fit the model.
    """
    from .check_apart import apart

    ids = default_ids(model) if ids is None else list(ids)
    T = len(ids)
    if start is not None and not 1 <= start <= T:
        raise ToyllmError(f"--start {start}: expected 1 to {T}, the tokens of the prompt")
    N = default_start(T) if start is None else start
    bench = Bench(model, library, rtol, dtype)
    progress("the engine")
    engine = engine_passes(model, ids, N)
    progress(f"prefill of {N} tokens")
    prefilled = hold_prefill(bench, ids[:N], engine[0])
    parts = [*decoding(bench, ids, N, prefilled.run.results[1], engine), *apart(bench, ids[:N], engine[0])]
    for what, hold in parts:
        if stop and not all(h.holds for h in bench.held):
            break
        progress(what)
        hold()
    unstated = tuple(name for name in engine[0].taps if name not in prefilled.bound)
    return Report(tuple(ids), N, rtol, tuple(bench.held), frozenset(bench.ran), unstated, tuple(notes(bench, T, N)))


def default_ids(model: "Model") -> list[int]:
    """Random ids, the same every time: more than a sliding window sees, unless the model is so large that it would take long."""
    window = getattr(model.config, "sliding_window", 16)
    large = sum(path.stat().st_size for path in model.checkpoint.shards) > 1 << 30
    T = min(model.config.context, 16 if large else max(window + 16, 32))
    return np.random.default_rng(0).integers(0, model.vocab_size, T).tolist()


def default_start(T: int) -> int:
    """How many of T tokens are prefilled: all but the last few."""
    return T - min(T // 2, 6)


def notes(bench: Bench, T: int, start: int) -> Iterable[str]:
    """What a run like this cannot show."""
    window = getattr(bench.model.config, "sliding_window", 0)
    if window >= T and any(bench.model.config.sliding):
        yield f"a window of {window} hides nothing from {T} tokens: give more, to see it at work"
    elif window >= start and window and any(bench.model.config.sliding):
        yield f"a window of {window} hides nothing from the {start} tokens that are prefilled: raise --start"
    if start == T:
        yield "no token was decoded: lower --start"


# ---- the engine -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """What the engine made of one pass: its activations, and its logits without taps, as it usually runs."""

    taps: dict[str, np.ndarray]
    logits: np.ndarray


def engine_passes(model: "Model", ids: Sequence[int], start: int) -> list[Pass]:
    """The prefill of the first `start` ids, then each of the others. Raises ToyllmError for ids that the model does not take."""
    T = len(ids)
    if not 1 <= T <= model.config.context:
        raise ToyllmError(f"the prompt has {T} tokens: expected 1 to {model.config.context}, the positions this model knows")
    caches, passes = [model.new_cache(T) for _ in range(2)], []
    for first, last in [(0, start), *((t, t + 1) for t in range(start, T))]:
        recording = Recording(lambda name: True, last - first, last)  # noqa: ARG005
        batch = ids[first:last], np.arange(first, last), np.zeros(last - first, np.int64)
        model.forward(*batch, caches[0], taps=recording.tap, all_logits=True)
        passes.append(Pass(recording.arrays, model.forward(*batch, caches[1], all_logits=True)))
    return passes


def keys_and_values(passes: Iterable[Pass], L: int) -> np.ndarray:
    """What the KV cache holds after these passes, by position: [L, 2, T, G, Dh]."""
    taken = list(passes)
    return np.stack([[np.concatenate([p.taps[f"blocks.{i}.attn.{part}"] for p in taken]) for part in "kv"] for i in range(L)])


# ---- prefill and decode -----------------------------------------------------------------------------------------------------


def hold_prefill(bench: Bench, ids: Sequence[int], engine: Pass) -> Ran:
    """The model's card on a prompt."""
    ran = bench.run("", np.asarray(ids))
    bench.hold_steps(PREFILL, ran, engine.taps)
    bench.hold_result(PREFILL, ran, 0, "logits, without taps", engine.logits)
    bench.hold_result(PREFILL, ran, 1, "keys and values", keys_and_values([engine], int(bench.hypers["L"])))  # type: ignore[arg-type]
    return ran


def decoding(bench: Bench, ids: Sequence[int], start: int, cache: np.ndarray, engine: Sequence[Pass]) -> Iterator[Part]:
    """The card of a decode step on each id behind the prompt, over the cache that the prompt's card returned."""
    ringed, T = bench.family == "gpt-oss", len(ids)
    L: Any = bench.hypers["L"]
    what = "keys and values in rings" if ringed else "keys and values"

    def hold_rings() -> None:
        nonlocal cache
        ran = bench.run("Rings", cache, np.int64(T))
        bench.hold_result(DECODE, ran, 0, what, rings(bench, engine[:1], L, T))
        cache = ran.run.results[0]

    def hold_step(t: int) -> None:
        nonlocal cache
        inputs = (np.int64(ids[t]), np.int64(t), cache) if ringed else (np.int64(ids[t]), cache)
        ran, passes = bench.run("Step", *inputs), engine[: t - start + 2]
        bench.hold_steps(DECODE, ran, passes[-1].taps)
        bench.hold_result(DECODE, ran, 0, "logits, without taps", passes[-1].logits)
        bench.hold_result(DECODE, ran, 1, what, rings(bench, passes, L, T) if ringed else keys_and_values(passes, L))
        cache = ran.run.results[1]

    if ringed and start < T:
        yield "the rings", hold_rings
    for t in range(start, T):
        yield f"decode of token {t + 1} of {T}", partial(hold_step, t)


def rings(bench: Bench, passes: Sequence[Pass], L: int, R: int) -> np.ndarray:
    """Keys and values as rings hold them: [L, 2, R, G, Dh], of a layer that sees w positions only the first min(w, R) cells in use."""
    known = keys_and_values(passes, L)
    T = known.shape[2]
    found = np.zeros((L, 2, R, *known.shape[3:]), known.dtype)
    windows: Any = bench.hypers["w"]
    for i in range(L):
        n = int(min(windows[i], R))
        latest = np.arange(max(0, T - n), T)
        found[i][:, latest % n] = known[i][:, latest]
    return found
