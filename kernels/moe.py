"""Mixture of experts: each token's few experts, clamped SwiGLU inside, and the weighted sum of what they give.

    h = gate_up[e] · x + b;   gate = min(h[0::2], limit);   up = clamp(h[1::2], −limit, limit)
    z = gate · sigmoid(α · gate) · (up + 1);   out = Σ_e weight_e · (down[e] · z + b)

x f32 [T, D]; gate_up[e] [2F, D], its even rows the gate and its odd ones up, and down[e] [D, F], in MXFP4 as stored or as matrices
[D, 2F] and [F, D] in f32, f16, bf16 or 8 bits. The sum over a token's experts runs by ascending expert, whichever algorithm computes it:

* `single`: one token, MXFP4; two parallel regions in which only the chosen experts' bytes are read.
* `assigned`: for each expert the tokens it is given, in one product. `group` gives it those that chose it (exact), `everything` all
  tokens, with weight 0 where it was not chosen (the check), `within_budget` at most a number of them.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numba
import numpy as np
from numba import prange

from .elementary import exp
from .errors import ToyllmError
from .fp4 import BLOCK, SCALES
from .jit import inline, kernel
from .matmul import ROWS
from .mxfp4 import one_rows, split_halves
from .q8 import Q8

ONE = np.float32(1)
log = logging.getLogger("toyllm")


class Mxfp4(NamedTuple):
    """A matrix, or one for each expert, in MXFP4: blocks u8 [..., N, K/32, 16] and scales u8 [..., N, K/32]."""

    blocks: np.ndarray
    scales: np.ndarray

    def of(self, e: int) -> "Mxfp4":
        """Expert e's matrix."""
        return Mxfp4(self.blocks[e], self.scales[e])


@dataclass(frozen=True)
class Experts:
    """The experts of a layer."""

    gate_up: Mxfp4 | np.ndarray | tuple[Q8, ...]  # [E, 2F, D], or a matrix [E, D, 2F], in 8 bits one by one
    gate_up_bias: np.ndarray  # f32 [E, 2F]
    down: Mxfp4 | np.ndarray | tuple[Q8, ...]  # [E, D, F], or a matrix [E, F, D]
    down_bias: np.ndarray  # f32 [E, D]
    limit: float
    alpha: float


Assignment = tuple[int, np.ndarray, np.ndarray]  # an expert, its tokens int64 [n] in ascending order, their weights f32 [n]
Matrix = Mxfp4 | np.ndarray | Q8
Product = Callable[[np.ndarray, Matrix, np.ndarray, np.ndarray], None]  # (x, w, bias, out)
Watch = Callable[[int, np.ndarray, str, np.ndarray], None]  # (an expert, its tokens, a part, its values)


@inline
def swiglu(gate, up, limit, alpha):
    """One clamped SwiGLU, f32, for kernels to call; NaN stays NaN."""
    gate = limit if gate > limit else gate  # noqa: FURB136 - min and max may lose a NaN
    up = limit if up > limit else up  # noqa: FURB136
    up = -limit if up < -limit else up  # noqa: FURB136
    return gate / (ONE + exp(-alpha * gate)) * (up + ONE)


def swiglu_reference(h: np.ndarray, limit: float, alpha: float) -> np.ndarray:
    """Clamped SwiGLU of h [n, 2F] in NumPy: [n, F]."""
    gate, up = np.minimum(h[:, 0::2], limit), np.clip(h[:, 1::2], -limit, limit)
    return gate / (1 + np.exp(-alpha * gate)) * (up + 1)


@kernel
def _swiglu_row(h, limit, alpha, out):
    for i in range(out.shape[0]):
        out[i] = swiglu(h[2 * i], h[2 * i + 1], limit, alpha)


@kernel(parallel=True)
def _swiglu_rows(h, limit, alpha, out):
    for n in prange(h.shape[0]):
        _swiglu_row(h[n], limit, alpha, out[n])


@kernel(parallel=True)
def _add_weighted(y, tokens, weights, out):
    for n in prange(y.shape[0]):  # an expert's tokens are different ones
        row = out[tokens[n]]
        for i in range(y.shape[1]):
            row[i] += weights[n] * y[n, i]


def group(experts: np.ndarray, weights: np.ndarray) -> list[Assignment]:
    """Each expert with the tokens that chose it; experts int64 [T, k], weights f32 [T, k]."""
    assigned = []
    for e in np.unique(experts):
        tokens, slots = np.nonzero(experts == e)
        assigned.append((int(e), tokens, weights[tokens, slots]))
    return assigned


def everything(experts: np.ndarray, weights: np.ndarray, E: int) -> list[Assignment]:
    """Each expert with every token."""
    T = len(experts)
    dense = np.zeros((T, E), np.float32)
    np.put_along_axis(dense, experts, weights, 1)
    return [(e, np.arange(T), np.ascontiguousarray(dense[:, e])) for e in range(E)]


def budget_for(T: int, k: int, E: int, ratio: float) -> int:
    """Tokens an expert may take: floor(ratio · T · k / E), at least 1, rounded up to a multiple of 8. More than T is as T."""
    return -(-max(1, int(min(ratio * T * k / E, T))) // 8) * 8


def within_budget(logits: np.ndarray, k: int, budget: int) -> tuple[list[Assignment], int]:
    """Each expert with the tokens it takes and keeps, and how many of the tokens' own k choices were dropped.

    Router logits f32 [T, E]. Expert e prefers tokens by p(e|t) ** rank, p the softmax over all experts, rank 1 the token's first choice,
    ties to the earlier token, and takes `budget` of them. A token keeps the k best experts that took it, weighed by the softmax of
    those logits; one that nobody took gets nothing.
    """
    T, E = logits.shape
    rank = np.argsort(np.argsort(-logits, axis=1, kind="stable"), axis=1) + 1
    below = logits.astype(np.float64) - logits.max(1, keepdims=True)
    preference = rank * (below - np.log(np.exp(below).sum(1, keepdims=True)))  # in logarithms: most powers of many experts are 0
    taken = np.zeros((T, E), bool)
    for e in range(E):
        taken[np.argsort(-preference[:, e], kind="stable")[:budget], e] = True
    best = np.argsort(np.where(taken, rank, E + 1), axis=1, kind="stable")[:, :k]  # the k best that took it come first
    kept = np.zeros((T, E), bool)
    np.put_along_axis(kept, best, np.take_along_axis(taken, best, 1), 1)
    raw = np.where(kept, logits, -np.inf)
    top = raw.max(1, keepdims=True)
    weights = np.exp(raw - np.where(np.isfinite(top), top, 0))
    weights = (weights / np.maximum(weights.sum(1, keepdims=True), np.finfo(np.float32).tiny)).astype(np.float32)
    dropped = T * k - int((kept & (rank <= k)).sum())
    return [(e, tokens, weights[tokens, e]) for e in range(E) if len(tokens := np.flatnonzero(kept[:, e]))], dropped


def assigned(
    x: np.ndarray,
    assignments: Iterable[Assignment],
    w: Experts,
    product: Product,
    out: np.ndarray,
    watch: Watch | None = None,
) -> None:
    """out f32 [T, D] = the weighted sum of each token's experts, expert by expert; `product` computes x · wᵀ + bias. Unchecked.

    `watch(e, tokens, part, array)` is shown what is inside each expert before it is used, and may write there: "gate_up" f32 [n, 2F]
    before the clamp, then "hidden" f32 [n, F].
    """
    out[...] = 0
    for e, tokens, weights in assignments:
        h = np.empty((len(tokens), w.gate_up_bias.shape[1]), np.float32)
        z = np.empty((len(tokens), h.shape[1] // 2), np.float32)
        y = np.empty((len(tokens), x.shape[1]), np.float32)
        product(x[tokens], matrix_of(w.gate_up, e), w.gate_up_bias[e], h)
        if watch:
            watch(e, tokens, "gate_up", h)
        _swiglu_rows(h, np.float32(w.limit), np.float32(w.alpha), z)
        if watch:
            watch(e, tokens, "hidden", z)
        product(z, matrix_of(w.down, e), w.down_bias[e], y)
        _add_weighted(y, tokens, weights, out)


def matrix_of(w: Mxfp4 | np.ndarray | tuple[Q8, ...], e: int) -> Matrix:
    """Expert e's matrix."""
    return w.of(e) if isinstance(w, Mxfp4) else w[e]


@kernel(parallel=True)
def _single_up(x, blocks, scales, table, bias, experts, limit, alpha, h, z):
    """h f32 [k, 2F] and z f32 [k, F], its blocks in halves, for the chosen experts; x f32 [1, D], its blocks in halves."""
    _, N, n, _ = blocks.shape
    groups = N // ROWS
    w_at, s_at, t_at, x_at, h_at = blocks.ctypes.data, scales.ctypes.data, table.ctypes.data, x.ctypes.data, h.ctypes.data
    for task in prange(len(experts) * groups):
        i, first = task // groups, task % groups * ROWS
        row = experts[i] * N + first
        one_rows(w_at + row * n * 16, n * 16, s_at + row * n, n, t_at, x_at, 0, n, h_at + (i * N + first) * 4, 0)
        for j in range(first, first + ROWS, 2):
            h[i, j] += bias[experts[i], j]
            h[i, j + 1] += bias[experts[i], j + 1]
            f = j // 2
            z[i, f // BLOCK * BLOCK + (f % 2) * (BLOCK // 2) + f % BLOCK // 2] = swiglu(h[i, j], h[i, j + 1], limit, alpha)


@kernel(parallel=True)
def _single_down(z, blocks, scales, table, bias, experts, weights, out, panels):
    """out f32 [1, D]: each row of down of every chosen expert, weighed and summed; D is a multiple of BLOCK, and so of ROWS."""
    _, N, n, _ = blocks.shape
    w_at, s_at, t_at, z_at = blocks.ctypes.data, scales.ctypes.data, table.ctypes.data, z.ctypes.data
    for task in prange(N // ROWS):
        y = panels[numba.get_thread_id()]
        first = task * ROWS
        for j in range(first, first + ROWS):
            out[0, j] = 0
        for i in range(len(experts)):
            row = experts[i] * N + first
            one_rows(w_at + row * n * 16, n * 16, s_at + row * n, n, t_at, z_at + i * n * BLOCK * 4, 0, n, y.ctypes.data, 0)
            for j in range(ROWS):
                y[j] += bias[experts[i], first + j]
                out[0, first + j] += weights[i] * y[j]


Scratch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def single(x: np.ndarray, experts: np.ndarray, weights: np.ndarray, w: Experts, scratch: Scratch, out: np.ndarray) -> None:
    """One token's experts, int64 [k], and weights, f32 [k], in any order: out f32 [1, D], unchecked. The experts are in MXFP4.

    Scratch: h f32 [k, 2F], z f32 [k, F], halves f32 [1, D], panels f32 [threads, at least ROWS].
    """
    h, z, halves, panels = scratch
    order = experts.argsort()
    experts, weights = experts[order], weights[order]
    split_halves(x, halves)
    up, down = cast("Mxfp4", w.gate_up), cast("Mxfp4", w.down)
    _single_up(halves, up.blocks, up.scales, SCALES, w.gate_up_bias, experts, np.float32(w.limit), np.float32(w.alpha), h, z)
    _single_down(z, down.blocks, down.scales, SCALES, w.down_bias, experts, weights, out, panels)


ALGORITHMS = ("auto", "single", "grouped", "all", "budget")


@dataclass
class Mixing:
    """Which algorithm mixes experts, and what came of it."""

    algorithm: str = "auto"  # single for one token, grouped for more
    ratio: float = 1.0  # budget: an expert's share of the tokens, 1 is the average
    ran: set[str] = field(default_factory=set)
    dropped: int = 0  # of the tokens' own choices, by budget

    def choose(self, T: int, k: int, E: int) -> str:
        """The algorithm for T tokens: one of ALGORITHMS but auto."""
        chosen = self.algorithm if self.algorithm != "auto" else "single" if T == 1 else "grouped"
        if chosen == "budget" and 3 * budget_for(T, k, E, self.ratio) > 2 * T:
            chosen = "all"
            if "all" not in self.ran:
                log.info(
                    "--moe budget: %d tokens an expert is most of %d, so all experts run on all tokens", budget_for(T, k, E, self.ratio), T
                )
        self.ran.add(chosen)
        return chosen


def check_mixing(algorithm: str, ratio: float) -> Mixing:
    """A `Mixing` of these. Raises ToyllmError for an unknown algorithm and for a ratio that is not above 0."""
    if algorithm not in ALGORITHMS:
        raise ToyllmError(f"--moe {algorithm}: expected one of {', '.join(ALGORITHMS)}")
    if not 0 < ratio < np.inf:
        raise ToyllmError(f"--tokens-per-expert-ratio {ratio}: expected a number above 0")
    return Mixing(algorithm, ratio)


def mix(mixing, matmul, matmul_mxfp4, single, x, logits, experts, weights, w, out, scratch, watch=None) -> None:
    """out f32 [T, D] = the weighted sum of each token's experts, int64 [T, k] and f32 [T, k] by descending router logit, f32 [T, E].

    `matmul`, `matmul_mxfp4` and `single`, which may be None, are a backend's. `scratch` is h, z, halves and panels, as of `single`;
    `watch` as of `assigned`. Unchecked.
    """
    E, k = logits.shape[1], experts.shape[1]
    panels = scratch[-1]

    def product(x: np.ndarray, matrix: Matrix, bias: np.ndarray, out: np.ndarray) -> None:
        if isinstance(matrix, Mxfp4):
            matmul_mxfp4(x, matrix.blocks, matrix.scales, bias, out, panels)
        else:
            matmul(x, matrix, bias, out, panels)

    algorithm = mixing.choose(len(x), k, E)
    if algorithm == "single":
        for t in range(len(x)):
            if single and watch is None and isinstance(w.gate_up, Mxfp4):
                single(x[t : t + 1], experts[t], weights[t], w, scratch, out[t : t + 1])
            else:
                shift = None if watch is None else (lambda e, tokens, part, array, t=t: watch(e, tokens + t, part, array))
                assigned(x[t : t + 1], group(experts[t : t + 1], weights[t : t + 1]), w, product, out[t : t + 1], shift)
        return
    if algorithm == "all":
        assignments = everything(experts, weights, E)
    elif algorithm == "budget":
        assignments, dropped = within_budget(logits, k, budget_for(len(x), k, E, mixing.ratio))
        mixing.dropped += dropped
    else:
        assignments = group(experts, weights)
    assigned(x, assignments, w, product, out, watch)
