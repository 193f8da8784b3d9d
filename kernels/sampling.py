"""From logits to a token: temperature, top-k, top-p, min-p, draw; and log-probabilities.

    w[i] = exp((logits[i] − max) / temperature)
    top-k keeps the k largest w, ties to the lower id
    top-p keeps, from the largest down, tokens until their share of what top-k kept reaches p; the one that crosses p stays
    min-p keeps w ≥ min_p · max(w)
    draw: the first kept id, ascending, at which the running sum of w exceeds u times the kept sum, u in [0, 1)

logits f32 [V], all finite or −∞, at least one finite. Weights are f32, their sums f64. The nucleus (top-p: Holtzman et al. 2020,
arXiv:1904.09751; min-p: Nguyen et al. 2024, arXiv:2407.01082) is found without sorting the vocabulary: weights are counted by their upper
bits, and only the bucket in which a limit falls is sorted.
"""

import math

import numpy as np

from .checks import check_array, check_number
from .elementary import exp
from .errors import ToyllmError
from .jit import inline, kernel
from .simd.sums import total_f64

BUCKETS = 1024  # f32 weights in [0, 1] by their upper 12 bits: sign 0, exponent, 3 bits of the fraction
SHIFT = np.uint32(20)
STRIP = 1024  # weights that are made, then added up
NOTHING = np.int64(-1)
MOST, LEAST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)  # an inverse temperature, so that no weight is 0 · ∞


def sample_reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """The definition in NumPy f64, by sorting everything."""
    w = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-w, kind="stable")
    if top_k:
        order = order[:top_k]
    running = np.cumsum(w[order])
    order = order[: np.searchsorted(running, top_p * running[-1]) + 1]
    kept = np.sort(order[w[order] >= min_p])
    running = np.cumsum(w[kept])
    return int(kept[np.searchsorted(running, u * running[-1], side="right")])


@inline
def _cut(weights, counts, keys, limit, target):
    """Zero all weights behind the largest: at most `limit` tokens stay, and none after their running sum has reached `target`."""
    V, bits, sums = weights.shape[0], weights.view(np.uint32), counts[BUCKETS:]
    counts[:] = 0
    for i in range(V):
        counts[bits[i] >> SHIFT] += 1.0
        sums[bits[i] >> SHIFT] += weights[i]
    kept, bucket, total = 0, BUCKETS - 1, 0.0
    while counts[bucket] == 0 or (bucket > 0 and kept + counts[bucket] < limit and total + sums[bucket] < target):
        kept += int(counts[bucket])
        total += sums[bucket]
        bucket -= 1
    n = 0  # the tokens of the bucket that a limit falls in, by descending weight, then ascending id
    for i in range(V):
        if (bits[i] >> SHIFT) == bucket:
            keys[n] = ((np.uint64(0xFFFFFFFF) - np.uint64(bits[i])) << np.uint64(32)) | np.uint64(i)
            n += 1
        elif (bits[i] >> SHIFT) < bucket:
            weights[i] = 0
    keys[:n].sort()
    reached = False
    for j in range(n):
        i = np.int64(keys[j] & np.uint64(0xFFFFFFFF))
        if reached or kept >= limit:
            weights[i] = 0
        else:
            total += weights[i]
            kept += 1
            reached = total >= target


@kernel
def _sample(logits, top, temperature, top_k, top_p, min_p, u, weights, counts, keys):
    V = logits.shape[0]
    inverse = np.float32(min(max(1.0 / temperature, LEAST), MOST))
    for i in range(V):
        weights[i] = exp((logits[i] - top) * inverse)
    if 0 < top_k < V:
        _cut(weights, counts, keys, top_k, np.inf)
    if top_p < 1:
        total = 0.0
        for i in range(V):
            total += weights[i]
        _cut(weights, counts, keys, V, top_p * total)
    total, least = 0.0, np.float32(min_p)
    for i in range(V):
        if weights[i] < least:
            weights[i] = 0
        total += weights[i]
    target, running, last = u * total, 0.0, NOTHING
    for i in range(V):
        if weights[i] > 0:
            running += weights[i]
            last = i
            if running > target:
                break
    return last


def sample_scratch(V: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scratch for `sample` over V tokens: weights f32 [V], counts and sums f64 [2 · BUCKETS], keys u64 [V]."""
    return np.empty(V, np.float32), np.empty(2 * BUCKETS), np.empty(V, np.uint64)


def sample_kernel(logits, temperature, top_k, top_p, min_p, u, scratch) -> int:
    """The kernel, unchecked."""
    return int(_sample(logits, logits.max(), temperature, top_k, top_p, min_p, u, *scratch))


def sample(logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, u: float = 0.0) -> int:
    """Draw a token id from logits f32 [V] with a number u of [0, 1).

    temperature > 0; top_k 0 is off; top_p in [0, 1], 1 is off; min_p in [0, 1], 0 is off. Raises ToyllmError outside these, and for logits
    that hold NaN or +infinity or nothing above −infinity.
    """
    (V,) = check_array("logits", logits, (None,))
    check_number("top_k", top_k, whole=True)
    for name, number in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p), ("u", u)):
        check_number(name, number)
    if not (temperature > 0 and top_k >= 0 and 0 <= top_p <= 1 and 0 <= min_p <= 1 and 0 <= u < 1):
        found = f"temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}, u {u}"
        raise ToyllmError(f"sample: {found}: expected > 0, >= 0, [0, 1], [0, 1], [0, 1)")
    if V == 0 or not np.isfinite(logits.max()):
        raise ToyllmError("logits: expected a largest one that is finite")
    return sample_kernel(logits, float(temperature), int(top_k), float(top_p), float(min_p), float(u), sample_scratch(V))


@kernel
def _sum_exp(logits, top):
    weights, whole = np.empty(STRIP, np.float32), 0.0
    for first in range(0, len(logits), STRIP):
        n = min(STRIP, len(logits) - first)
        for i in range(n):
            weights[i] = exp(logits[first + i] - top)
        whole += total_f64(weights[:n])
    return whole


def log_sum_exp(logits: np.ndarray) -> float:
    """Ln Σ exp(logits) of f32 [V], in f64: a token's log-probability is its logit less this. Raises ToyllmError on other arrays."""
    if check_array("logits", logits, (None,)) == (0,):
        raise ToyllmError("logits: expected at least one")
    top = logits.max()
    return float(top) + math.log(_sum_exp(logits, top))


@kernel
def _largest(logits, n, ids):
    found = 0
    for i in range(logits.shape[0]):
        if found == n and not logits[i] > logits[ids[n - 1]]:
            continue
        at = min(found, n - 1)
        while at > 0 and logits[i] > logits[ids[at - 1]]:
            ids[at] = ids[at - 1]
            at -= 1
        ids[at] = i
        found = min(found + 1, n)


def largest(logits: np.ndarray, n: int) -> np.ndarray:
    """Ids of the n largest of logits f32 [V], largest first, ties to the lower id; int64 [min(n, V)]. Cost: V + V · n at worst.

    Raises ToyllmError on other arrays and numbers.
    """
    (V,) = check_array("logits", logits, (None,))
    check_number("n", n, whole=True)
    ids = np.empty(max(0, min(n, V)), np.int64)
    if len(ids):
        _largest(logits, len(ids), ids)
    return ids
