"""What a run believes and does at each layer: norms of the residual stream, the logit lens, attention, and the experts of each token.

    norm     = ‖x‖₂ of the stream where it enters the first block, behind each attention, and behind each block
    lens     = softmax(head · norm_f(out)): the next token if the model stopped behind this block (nostalgebraist 2020, "interpreting
               GPT: the logit lens"); behind the last block it is the model's own answer
    sink     = 1 − Σ_s w[s], what of a head's attention goes to its sink (gpt-oss)
    entropy  = −Σ_s w[s] ln w[s], in nats, over the keys and the sink

Sums are f64 over the model's f32. The prompt runs in passes, and of each only what is measured is kept: memory grows with T · L by some
numbers a head, never by a vocabulary; attention maps, where they are asked for, are a byte a weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.errors import ToyllmError
from ..kernels.matmul import NO_BIAS, panels_for
from ..kernels.threads import thread_scratch
from .model import check_ids
from .params import sizes
from .score import measure

if TYPE_CHECKING:
    from .model import Model

LOGITS = 2**26  # bytes of logits held at a time
WEIGHTS = 2**26  # bytes of attention weights of one pass
MAPS = 2**27  # bytes of attention maps, of all layers together


@dataclass(frozen=True)
class Lens:
    """What the model would say behind one block, after each of T tokens. Where its logits are not finite: NaN, and ids and ranks of -1."""

    ids: np.ndarray  # int64 [T, N], the likeliest, likeliest first; of equally likely ones the lower id comes first
    probabilities: np.ndarray  # f64 [T, N]
    entropy: np.ndarray  # f64 [T], nats
    following: np.ndarray  # f64 [T], probability of the token that follows in the prompt; NaN for the last
    rank: np.ndarray  # int64 [T], its rank, 1 for the likeliest; -1 for the last


@dataclass(frozen=True)
class Routing:
    """Where the router of one block sends T tokens: experts int64 [T, k] by descending weight, weights f32 [T, k], of E experts."""

    experts: np.ndarray
    weights: np.ndarray
    counts: np.ndarray  # int64 [E], tokens of each expert; one whose weight is 0 is not sent there

    @property
    def shares(self) -> np.ndarray:
        """Each expert's part of all choices, f64 [E]; they sum to 1."""
        return self.counts / max(1, self.counts.sum())

    @property
    def imbalance(self) -> float:
        """The most loaded expert's count over the mean: 1 where all are loaded alike, E at worst."""
        return float(self.counts.max() * len(self.counts) / max(1, self.counts.sum()))


@dataclass(frozen=True)
class Layer:
    """What was measured of one block."""

    number: int
    resid_mid: np.ndarray  # f64 [T], norms
    out: np.ndarray  # f64 [T], norms
    lens: Lens
    entropy: np.ndarray  # f64 [H, T], of each head's attention
    sink: np.ndarray | None  # f64 [H, T]; None where heads have none
    maps: np.ndarray | None  # u8 [H, T (T + 1) / 2], `quantise`d weights, a row a query, on its keys; None where they were not kept
    routing: Routing | None  # None where there are no experts


@dataclass(frozen=True)
class Trace:
    """A prompt of T tokens through some of a model's layers."""

    ids: list[int]
    embed: np.ndarray  # f64 [T], norms
    layers: list[Layer]


def quantise(weights: np.ndarray) -> np.ndarray:
    """Attention weights in [0, 1] as bytes, round(255 √w): w is b² / 255², off by at most √w / 255; NaN as 0.

    The root keeps small weights apart: 1/300, what each of 300 tokens gets of even attention, comes back within 7 % of itself.
    """
    return np.rint(255 * np.sqrt(np.nan_to_num(np.clip(weights, 0, 1)))).astype(np.uint8)


def map_bytes(model: "Model", T: int, layers: int) -> int:
    """Bytes of the attention maps of so many layers over T tokens."""
    return layers * sizes(model.config).H * T * (T + 1) // 2


def trace(
    model: "Model",
    ids: Sequence[int],
    layers: Sequence[int] | None = None,
    top: int = 1,
    maps: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
) -> Trace:
    """Run ids [T] from position 0 and measure these layers (all), the lens with its `top` likeliest, with attention maps if `maps`.

    `progress(done, total)` is told of tokens as they pass. Raises ToyllmError for ids and layers that the model does not have, for
    more ids than it has positions, and for maps of more than MAPS bytes.
    """
    L, T = sizes(model.config).L, len(ids)
    numbers = list(range(L)) if layers is None else sorted(set(layers))
    if odd := [i for i in numbers if not 0 <= i < L]:
        raise ToyllmError(f"layer {odd[0]}: expected 0 to {L - 1}")
    check_ids(ids, model.vocab_size)
    if not 0 < T <= model.config.context:
        raise ToyllmError(f"a prompt of {T} tokens: expected 1 to {model.config.context}, the positions this model has")
    if maps and map_bytes(model, T, len(numbers)) > MAPS:
        raise ToyllmError(f"attention maps of {T} tokens and {len(numbers)} layers: expected at most {MAPS} bytes; take fewer layers")
    tracing = Tracing(model, ids, numbers, top, maps)
    cache = model.new_cache(T)
    rows = pass_rows(model, T)
    for first in range(0, T, rows):
        positions = np.arange(first, min(first + rows, T))
        tracing.positions = positions
        model.forward(ids[first : first + rows], positions, np.zeros_like(positions), cache, taps=tracing.tap)
        progress(int(positions[-1]) + 1, T)
    return Trace(list(ids), tracing.embed, [tracing.layer(i) for i in numbers])


def pass_rows(model: "Model", T: int) -> int:
    """Tokens a pass: the model's own number, or fewer where their attention weights would take too much memory.

    A token's activations do not depend on it, but for a budget of experts, which is one of each pass.
    """
    if model.kernels.mixing.algorithm == "budget":
        return model.prefill_chunk
    return max(1, min(model.prefill_chunk, WEIGHTS // (4 * sizes(model.config).H * T)))


@dataclass
class Tracing:
    """The measuring of one run: `tap` is shown the activations of `positions`, and fills these arrays, each with a row a layer."""

    model: "Model"
    ids: Sequence[int]
    numbers: list[int]
    top: int
    maps: bool
    positions: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        s, n, T = sizes(self.model.config), len(self.numbers), len(self.ids)
        N = max(0, min(self.top, s.V))
        self.embed = np.empty(T)
        self.resid_mid, self.out, self.lens_entropy, self.following = (np.empty((n, T)) for _ in range(4))
        self.rank, self.likeliest, self.probabilities = np.empty((n, T), np.int64), np.empty((n, T, N), np.int64), np.empty((n, T, N))
        self.entropy, self.sink = np.empty((n, s.H, T)), np.empty((n, s.H, T))
        self.has_sinks = hasattr(self.model.weights.blocks[0], "sinks")
        self.packed = np.empty((n, s.H, T * (T + 1) // 2 if self.maps else 0), np.uint8)
        self.E = s.E
        self.experts, self.expert_weights = np.empty((n, T, s.k), np.int64), np.empty((n, T, s.k), np.float32)
        self.logits = np.empty((max(1, min(T, LOGITS // (4 * s.V))), s.V), np.float32)
        self.norm = np.empty((len(self.logits), s.D), np.float32)
        self.panels = thread_scratch(panels_for(s.D))

    def tap(self, name: str, array: np.ndarray) -> None:
        """Measure one activation of this pass, if it is one to measure."""
        part, _, rest = name.partition(".")
        if part == "embed":
            self.embed[self.positions] = norms(array)
        number, _, rest = rest.partition(".")
        if part != "blocks" or int(number) not in self.numbers:
            return
        i = self.numbers.index(int(number))
        if rest == "resid_mid":
            self.resid_mid[i, self.positions] = norms(array)
        elif rest == "out":
            self.out[i, self.positions] = norms(array)
            self.read_out(i, array)
        elif rest == "attn.weights":
            self.look(i, array)
        elif rest == "router.experts":
            self.experts[i, self.positions] = array
        elif rest == "router.weights":
            self.expert_weights[i, self.positions] = array

    def read_out(self, i: int, x: np.ndarray) -> None:
        """The lens on x f32 [n, D], as many rows at a time as the buffer has."""
        for at in range(0, len(x), len(self.logits)):
            positions = self.positions[at : at + len(self.logits)]
            logits = lens_logits(self.model, x[at : at + len(self.logits)], self.norm, self.panels, self.logits)
            broken = np.logical_not(np.isfinite(logits).all(-1, keepdims=True))[:, 0]
            logits[broken] = 0
            following = np.array([self.ids[t + 1] if t + 1 < len(self.ids) else 0 for t in positions])
            found = measure(int(positions[0]), following, [logits], self.probabilities.shape[-1])
            unknown = broken | (positions + 1 == len(self.ids))
            self.likeliest[i, positions] = np.where(broken[:, None], -1, found.top)
            self.probabilities[i, positions] = np.where(broken[:, None], np.nan, np.exp(found.top_logprobs))
            self.lens_entropy[i, positions] = np.where(broken, np.nan, found.entropies)
            self.following[i, positions] = np.where(unknown, np.nan, np.exp(found.logprobs))
            self.rank[i, positions] = np.where(unknown, -1, found.ranks)

    def look(self, i: int, weights: np.ndarray) -> None:
        """Attention weights f32 [H, n, S] of this pass."""
        first, last = int(self.positions[0]), int(self.positions[-1]) + 1
        place = slice(first * (first + 1) // 2, last * (last + 1) // 2)
        seen = np.arange(weights.shape[2]) <= self.positions[:, None]
        for h, w in enumerate(weights):
            exact = w.astype(np.float64)
            sink = np.maximum(1 - exact.sum(-1), 0) if self.has_sinks else np.zeros(len(w))
            self.sink[i, h, self.positions] = sink
            self.entropy[i, h, self.positions] = surprise(exact).sum(-1) + surprise(sink)
            if self.maps:
                self.packed[i, h, place] = quantise(w[seen])

    def layer(self, number: int) -> Layer:
        """What was found of a layer, when all passes are done."""
        i = self.numbers.index(number)
        lens = Lens(self.likeliest[i], self.probabilities[i], self.lens_entropy[i], self.following[i], self.rank[i])
        sink, maps = self.sink[i] if self.has_sinks else None, self.packed[i] if self.maps else None
        counts = np.bincount(self.experts[i][self.expert_weights[i] != 0], minlength=self.E)
        routing = Routing(self.experts[i], self.expert_weights[i], counts) if self.E else None
        return Layer(number, self.resid_mid[i], self.out[i], lens, self.entropy[i], sink, maps, routing)


def norms(x: np.ndarray) -> np.ndarray:
    """‖x‖₂ of each row of f32 [n, D], f64 [n]."""
    return np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))


def surprise(w: np.ndarray) -> np.ndarray:
    """−w ln w, 0 where w is; NaN where a change made a weight negative."""
    with np.errstate(invalid="ignore"):
        return -w * np.log(np.where(w == 0, 1, w))


def lens_logits(model: "Model", x: np.ndarray, norm: np.ndarray, panels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Logits of the residual stream x f32 [n, D], by the model's own last norm and head, in the first n rows of `logits`."""
    norm, logits = norm[: len(x)], logits[: len(x)]
    model.family.final_norm(x, model.weights, model.config, model.kernels, norm)
    model.kernels.matmul(norm, model.weights.head, NO_BIAS, logits, panels)
    return logits
