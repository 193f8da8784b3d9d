"""Causal attention over a KV cache: one fused step for decode, tiles of queries for a prompt.

    out[t, h] = Σ_s softmax_s(scale · q[t, h] · key[s]) value[s],   s over the keys that query t sees

With a sink S_h the softmax has one more term, exp(S_h), and no value for it: the weights sum to less than 1 (gpt-oss; Xiao et al. 2023,
arXiv:2309.17453). sinks f32 [H], or [0] for none.

q, out f32 [T, H, Dh]; keys, values [G, C, W], the cache of one layer as `kernels.cells` stores rows of Dh: f32, bf16 or 8 bits, which are
widened exactly as they are read, so that these give the bits of the f32 they stand for; C cells in any order; head h reads key/value head
h // (H / G) (grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245). cells i32 [·] names the cells in position
order; query t sees cells[begin[t] : end[t]], at least one. No T x S matrix exists: keys come in blocks of 64, and the softmax
is kept up to date from block to block (online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867).

Blocks are cut at multiples of 64 of the index into `cells`, and a query's sums never depend on the other queries, so a token gives the
same bits in a prompt of any chunk size and as a decode step. A score of −∞ weighs nothing; scores that are all −∞ give NaN, as do +∞
and NaN in a visible key. NaN in a visible value makes that element of the head NaN.
Cost: K and V of every visible cell are read once for 16 queries of 8 heads that share them.

What the steps gave, one core of an EPYC with AVX-512, gpt-oss' 64 heads on 8, K and V from memory at depth 8192: each head through all
keys alone 6.3 GB/s; all heads of a block of keys 11.8, 4 heads x 4 keys a tile (8 x 2 keys 9.5, 8 heads x 4 keys 8.2, 16 keys 6.6; blocks
of 32 keys 10.0); 16 sums added up together 11.9; the next block's keys and values asked for 13.6 (2 cores: 23).
Half of the multipliers' time goes into adding up lanes: 64 elements a key are only 4 vectors.
"""

import numba
import numpy as np
from numba import prange

from .cells import DTYPES, I8, load, width
from .checks import check_array, check_number
from .elementary import exp, scale_at, value
from .errors import ToyllmError
from .host import supports
from .jit import inline, kernel
from .simd.ir import LANES
from .simd.sums import largest, products, total
from .simd.tiles import axpy_tile, dot_tile
from .threads import thread_scratch

BLOCK = 64  # keys a block
QUERIES, HEADS = 16, 8  # queries and heads of a task: they share the keys of a block
TILE = 4 if supports("avx512") else 1  # of these, how many run at once: queries of one head, or heads of one query
ROWS = QUERIES * HEADS
SCRATCH = 2 * ROWS + TILE * BLOCK  # f32 values a thread needs: each row's maximum and sum of weights, and scores of a block
NO_SINKS = np.empty(0, np.float32)
KEYS, VALUES = 4, 4 * LANES  # keys that are scored together, elements of a value that are summed together
LOWEST = np.float32(np.finfo(np.float32).min)  # the maximum of no scores: finite, so that a whole block of −∞ weighs 0 and is not NaN

dot_keys, dot_key = dot_tile(KEYS, 1), dot_tile(1, 1)
dot_keys_rows, add_values_rows = dot_tile(KEYS, TILE), axpy_tile(VALUES // LANES, TILE, onto=True)
add_values = axpy_tile(VALUES // LANES, 1, onto=True, asks=False)
add_rest = axpy_tile(1, 1, partial=True, onto=True, asks=False)


def _numbers(stored: np.ndarray, Dh: int) -> np.ndarray:
    """As `cells.load`, and f64 as it is."""
    return stored if stored.dtype == np.float64 else load(stored, Dh)


def attention_reference(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    cells: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    scale: float,
    out: np.ndarray,
    sinks: np.ndarray = NO_SINKS,
) -> None:
    """The formula in NumPy, one query at a time; f64 in, f64 arithmetic."""
    T, H, Dh = q.shape
    group = H // keys.shape[0]
    for t in range(T):
        seen = cells[begin[t] : end[t]]
        for h in range(H):
            scores = _numbers(keys[h // group, seen], Dh) @ q[t, h] * scale
            top = max(scores.max(), sinks[h]) if sinks.size else scores.max()
            weights = np.exp(scores - top)
            out[t, h] = weights @ _numbers(values[h // group, seen], Dh) / (weights.sum() + (np.exp(sinks[h] - top) if sinks.size else 0))


def attention_plain(q, keys, values, cells, adjoining, begin, end, scale, out, scratch=None, sinks=NO_SINKS) -> None:  # noqa: ARG001
    """Unfused and in f32, a head after the other: all scores, mask, softmax, values. Arguments as of `attention_kernel`, unchecked."""
    places = np.arange(begin.min(), end.max())
    visible = (places >= begin[:, None]) & (places < end[:, None])
    _, H, Dh = q.shape
    group = H // keys.shape[0]
    for h in range(H):
        scores = q[:, h] @ load(keys[h // group, cells[places]], Dh).T * np.float32(scale)
        scores = np.where(visible, scores, np.float32(-np.inf))
        top = scores.max(1, keepdims=True)
        if sinks.size:
            top = np.maximum(top, sinks[h])
        weights = np.exp(scores - top)
        sums = weights.sum(1, keepdims=True)
        if sinks.size:
            sums += np.exp(sinks[h] - top)
        out[:, h] = weights / sums @ load(values[h // group, cells[places]], Dh)


@inline
def _update(scores, count, scale, tops, totals, row):
    """One row's softmax after a block of raw scores, which become weights; returns what earlier sums shrink by."""
    for s in range(count):
        scores[s] *= scale
    before = tops[row]
    top = max(before, largest(scores.ctypes.data, count))
    for s in range(count):
        scores[s] = exp(scores[s] - top)
    kept = exp(before - top)
    tops[row] = top
    totals[row] = totals[row] * kept + total(scores[:count])
    return kept


@inline
def _share(top, weights, sinks, h):
    """What a row's weighted sum is multiplied with in the end: 1 over the sum of its weights, the sink's included."""
    if sinks.size:
        weights += exp(np.float32(sinks[h] - top))  # infinity where it takes everything
    return np.float32(1) / weights


@inline
def _score(rows, q, q_at, q_stride, keys, at, key_bytes, count, s_at):
    """Raw scores of `count` neighbouring keys for one row of q, or for `TILE` of them, `BLOCK` scores a row."""
    Dh = q.shape[2]
    whole = count // KEYS * KEYS
    for s in range(0, whole, KEYS):
        if rows == TILE:
            dot_keys_rows(keys, q, at + s * key_bytes, key_bytes, q_at, q_stride, Dh, s_at + 4 * s, 4 * BLOCK, BLOCK * key_bytes)
        else:
            dot_keys(keys, q, at + s * key_bytes, key_bytes, q_at, 0, Dh, s_at + 4 * s, 0, 0)
    for m in range(rows):
        for s in range(whole, count):
            dot_key(keys, q, at + s * key_bytes, key_bytes, q_at + m * q_stride, 0, Dh, s_at + 4 * (m * BLOCK + s), 0, 0)


@inline
def _add(rows, values, at, key_bytes, count, s_at, Dh, y_at, y_stride):
    """Add `count` neighbouring values, each times its weight, to one row of sums, or to `TILE` of them."""
    for d in range(0, Dh // VALUES * VALUES, VALUES):
        v, scales = at + values.itemsize * d, Dh - d + d // 32 * 2
        if rows == TILE:
            add_values_rows(values, v, key_bytes, scales, s_at, 4 * BLOCK, count, y_at + 4 * d, y_stride, 0, BLOCK)
        else:
            add_values(values, v, key_bytes, scales, s_at, 0, count, y_at + 4 * d, 0, 0, 0)
    for m in range(rows):
        for d in range(Dh // VALUES * VALUES, Dh, LANES):
            v, scales = at + values.itemsize * d, Dh - d + d // 32 * 2
            add_rest(values, v, key_bytes, scales, s_at + 4 * m * BLOCK, 0, count, y_at + m * y_stride + 4 * d, 0, Dh - d, 0)


@inline
def _run(cells, adjoining, first, count):
    """How many of `count` cells, from number `first` on, are neighbours of the one before."""
    n = 1
    while not adjoining and n < count and cells[first + n] == cells[first] + n:
        n += 1
    return count if adjoining else n


@inline
def _block(rows, along, t, h, row, q, keys, values, cells, adjoining, seen, count, scale, out, g, tops, totals, scores):
    """A block's keys, `count` from cells[seen] on, for query t and head h; for `TILE` heads, or with `along` 1 `TILE` queries, at once."""
    H, Dh = q.shape[1], q.shape[2]
    key_bytes = keys.shape[2] * keys.itemsize
    k_at = keys.ctypes.data + g * keys.shape[1] * key_bytes
    v_at = values.ctypes.data + g * keys.shape[1] * key_bytes
    stride = 4 * Dh * (H if along else 1)
    q_at, y_at, s_at = q[t, h].ctypes.data, out[t, h].ctypes.data, scores.ctypes.data
    s = 0
    while s < count:  # neighbouring cells are one run of rows; the order of sums is the same
        n = _run(cells, adjoining, seen + s, count - s)
        _score(rows, q, q_at, stride, keys, k_at + cells[seen + s] * key_bytes, key_bytes, n, s_at + 4 * s)
        s += n
    for m in range(rows):
        kept = _update(scores[m * BLOCK : (m + 1) * BLOCK], count, scale, tops, totals, row + m)
        sums = out[t + m * along, h + m * (1 - along)]
        for d in range(Dh):
            sums[d] *= kept
    s = 0
    while s < count:
        n = _run(cells, adjoining, seen + s, count - s)
        _add(rows, values, v_at + cells[seen + s] * key_bytes, key_bytes, n, s_at + 4 * s, Dh, y_at, stride)
        s += n


@inline
def _alike(begin, end, t, block):
    """Whether `TILE` queries from t on see the same keys of a block."""
    low, high = max(block, begin[t]), min(block + BLOCK, end[t])
    for other in range(t + 1, t + TILE):  # noqa: SIM110 - a kernel has no generators
        if max(block, begin[other]) != low or min(block + BLOCK, end[other]) != high:
            return False
    return True


@inline
def _tile(q, keys, values, cells, adjoining, begin, end, scale, sinks, out, g, h, heads, first, last, own):
    """Queries first..last of `heads` heads from h on, which read key/value head g; `own` is this thread's scratch.

    A block of keys stays in the first-level cache while all of them see it.
    """
    Dh = q.shape[2]
    tops, totals, scores = own[:ROWS], own[ROWS : 2 * ROWS], own[2 * ROWS :]
    low, high = begin[first], end[first]
    for t in range(first, last):
        low, high = min(low, begin[t]), max(high, end[t])
    tops[:] = LOWEST
    totals[:] = 0
    out[first:last, h : h + heads] = 0
    for block in range(low // BLOCK * BLOCK, high, BLOCK):
        t = first
        while t < last:
            seen, count = max(block, begin[t]), min(block + BLOCK, end[t]) - max(block, begin[t])
            along = 1 if heads == 1 and t + TILE <= last and _alike(begin, end, t, block) else 0
            i = 0
            while i < heads and count > 0:
                rows = TILE if along or i + TILE <= heads else 1
                row = (t - first) * heads + i
                _block(rows, along, t, h + i, row, q, keys, values, cells, adjoining, seen, count, scale, out, g, tops, totals, scores)
                i += 1 if along else rows
            t += TILE if along else 1
    for t in range(first, last):
        for i in range(heads):
            row = (t - first) * heads + i
            share = _share(tops[row], totals[row], sinks, h + i)
            for d in range(Dh):
                out[t, h + i, d] *= share


@kernel(parallel=True)
def _attention(q, keys, values, cells, adjoining, begin, end, scale, sinks, out, scratch):
    T, H = q.shape[0], q.shape[1]
    group = H // keys.shape[0]
    tiles, parts = (T + QUERIES - 1) // QUERIES, (group + HEADS - 1) // HEADS
    for task in prange(keys.shape[0] * parts * tiles):  # heads outermost: equal halves for two threads, although late tiles see more keys
        first = task % tiles * QUERIES
        last = min(first + QUERIES, T)
        g, h = task // tiles // parts, task // tiles % parts * HEADS
        heads = min(HEADS, group - h)
        own = scratch[numba.get_thread_id()]
        _tile(q, keys, values, cells, adjoining, begin, end, scale, sinks, out, g, g * group + h, heads, first, last, own)


def attention_kernel(q, keys, values, cells, adjoining, begin, end, scale, out, scratch, sinks=NO_SINKS) -> None:
    """The kernel, unchecked. `scratch` f32 [threads, SCRATCH].

    `adjoining`: cells[i + 1] == cells[i] + 1 throughout; otherwise runs of neighbours are looked for, block by block.
    """
    _attention(q, keys, values, cells, adjoining, begin, end, np.float32(scale), sinks, out, scratch)


@inline
def _add_row(sums, weight, row):
    for d in range(len(sums)):  # over arrays of its own, a loop that LLVM makes vectors of
        sums[d] += weight * value(row[d])


@kernel(parallel=True)
def _portable(q, keys, values, cells, begin, end, scale, sinks, out, scratch):
    """The same algorithm in plain loops: the twin that any processor, the bounds checker and plain Python run."""
    T, H, Dh = q.shape
    group = H // keys.shape[0]
    step = 32 if keys.itemsize == 1 else Dh  # numbers that share a scale
    for task in prange(T * H):
        t, h = task // H, task % H
        g = h // group
        scores = scratch[numba.get_thread_id()]
        top, weights = LOWEST, np.float32(0)
        for d in range(Dh):
            out[t, h, d] = 0
        for block in range(begin[t] // BLOCK * BLOCK, end[t], BLOCK):
            seen, unseen = max(block, begin[t]), min(block + BLOCK, end[t])
            highest = top
            for s in range(seen, unseen):
                dot, key = np.float32(0), keys[g, cells[s]]
                for d in range(0, Dh, step):
                    last = min(d + step, Dh)
                    dot += products(q[t, h, d:last], key[d:last]) * scale_at(key, Dh + d // 16)
                scores[s - seen] = dot * scale
                highest = max(highest, scores[s - seen])
            kept = exp(np.float32(top - highest))
            weights *= kept
            for d in range(Dh):
                out[t, h, d] *= kept
            for s in range(seen, unseen):
                weight, row = exp(np.float32(scores[s - seen] - highest)), values[g, cells[s]]
                weights += weight
                for d in range(0, Dh, step):
                    last = min(d + step, Dh)
                    _add_row(out[t, h, d:last], weight * scale_at(row, Dh + d // 16), row[d:last])
            top = highest
        share = _share(top, weights, sinks, h)
        for d in range(Dh):
            out[t, h, d] *= share


def attention_portable(q, keys, values, cells, adjoining, begin, end, scale, out, scratch, sinks=NO_SINKS) -> None:  # noqa: ARG001
    """The portable kernel, unchecked; arguments as of `attention_kernel`."""
    _portable(q, keys, values, cells, begin, end, np.float32(scale), sinks, out, scratch)


def attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    cells: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    scale: float,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Attention of q f32 [T, H, Dh] over keys and values [G, C, W], f32, BF16 or in 8 bits (kernels.cells); a new f32 [T, H, Dh].

    Query t sees cells[begin[t]:end[t]] (cells int32, begin and end int64 [T]); sinks f32 [H] or none. Raises ToyllmError on other
    arrays, on cells outside the cache, and on a query that sees nothing.
    """
    T, H, Dh = check_array("q", q, (None, None, None))
    check_number("scale", scale)
    in_8_bits = isinstance(keys, np.ndarray) and keys.dtype == I8
    W = width(Dh, "q8" if in_8_bits else "f32")
    G, C, _ = check_array("keys", keys, (None, None, W), tuple(DTYPES.values()))
    check_array("values", values, (G, C, W), (keys.dtype,))
    if sinks is None:
        sinks = NO_SINKS
    else:
        check_array("sinks", sinks, (H,))
    check_array("cells", cells, (None,), (np.dtype(np.int32),))
    check_array("begin", begin, (T,), (np.dtype(np.int64),))
    check_array("end", end, (T,), (np.dtype(np.int64),))
    if G == 0 or H % G:
        raise ToyllmError(f"q has {H} heads and the cache {G}: expected a multiple")
    if cells.size and not 0 <= cells.min() <= cells.max() < C:
        raise ToyllmError(f"cells: expected indices from 0 to {C - 1}, found {cells.min()} to {cells.max()}")
    if T and not ((begin >= 0) & (begin < end) & (end <= len(cells))).all():
        raise ToyllmError(f"begin, end: expected 0 <= begin < end <= {len(cells)} for every query")
    out = np.empty((T, H, Dh), np.float32)
    if out.size:
        adjoining = bool((np.diff(cells) == 1).all())
        attention_kernel(q, keys, values, cells, adjoining, begin, end, scale, out, thread_scratch(SCRATCH), sinks)
    return out
