"""GPT-OSS (OpenAI 2025, arXiv:2508.10925), in the checkpoints of Hugging Face and of OpenAI, its experts in MXFP4 as stored.

    x = embed[token]
    for each block:  x = x + attention(RMSNorm(x));  x = x + Σ_e weight_e · expert_e(RMSNorm(x))
    logits = RMSNorm(x) · headᵀ

The arithmetic is openai/gpt-oss torch/model.py in f32. Shapes: T tokens, D width, H query and G key/value heads of Dh, E experts of
width F, k of them a token, V vocabulary.
"""

import functools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.cells import cell_bytes
from ..kernels.dtypes import widen
from ..kernels.errors import ToyllmError
from .cache import CausalCache, SlidingWindowCache, WrapperCache
from .checkpoint import Checkpoint
from .gpt_oss_config import FULL, SLIDING, Config, check, normalise  # noqa: F401 - the family's own, as `load_config` asks for them
from .taps import Tap, tap_inside, tap_scores
from .weights import Spec, match, matrix, mxfp4_bytes, vector

if TYPE_CHECKING:
    from ..kernels.backends import Backend
    from ..kernels.moe import Experts, Mxfp4
    from ..kernels.q8 import Q8

# ---- names in the checkpoint ------------------------------------------------------------------------------------------------

PREFIXES = ("model.", "")
IGNORED = re.compile(r".*rotary_emb\.inv_freq")  # a buffer that some re-saved files carry


def has_dense_experts(names: frozenset[str]) -> bool:
    """Whether the experts are stored as matrices, not in MXFP4."""
    return any(name.endswith("experts.gate_up_proj") for name in names)


def specs(c: Config, names: frozenset[str] = frozenset()) -> dict[str, Spec]:
    """Every tensor of the architecture: our name -> name in the checkpoint, shape, shard axis.

    `names` are the checkpoint's own, which tell the dialect: OpenAI's (fused qkv, other names), Hugging Face's (without names, too), or
    the latter with experts as dequantised matrices [in, out]. Linear weights are [out, in].
    """
    V, D, F, E = c.vocab_size, c.hidden_size, c.intermediate_size, c.num_local_experts
    Q, KV = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    openai = "embedding.weight" in names
    dense = has_dense_experts(names)
    table = {
        "embed": Spec("embedding.weight" if openai else "embed_tokens.weight", (V, D), 0),
        "norm_f": Spec("norm.scale" if openai else "norm.weight", (D,)),
        "head": Spec("unembedding.weight" if openai else "lm_head.weight", (V, D), 0, optional=c.tie_word_embeddings),
    }
    for i in range(c.num_hidden_layers):
        at, attn, mlp = (f"block.{i}", "attn", "mlp") if openai else (f"layers.{i}", "self_attn", "mlp")
        if openai:
            table |= {
                f"{i}.norm_1": Spec(f"{at}.attn.norm.scale", (D,)),
                f"{i}.qkv.weight": Spec(f"{at}.attn.qkv.weight", (Q + 2 * KV, D), 0),
                f"{i}.qkv.bias": Spec(f"{at}.attn.qkv.bias", (Q + 2 * KV,), 0),
                f"{i}.norm_2": Spec(f"{at}.mlp.norm.scale", (D,)),
            }
        else:
            table |= {
                f"{i}.norm_1": Spec(f"{at}.input_layernorm.weight", (D,)),
                f"{i}.q.weight": Spec(f"{at}.self_attn.q_proj.weight", (Q, D), 0),
                f"{i}.q.bias": Spec(f"{at}.self_attn.q_proj.bias", (Q,), 0),
                f"{i}.k.weight": Spec(f"{at}.self_attn.k_proj.weight", (KV, D), 0),
                f"{i}.k.bias": Spec(f"{at}.self_attn.k_proj.bias", (KV,), 0),
                f"{i}.v.weight": Spec(f"{at}.self_attn.v_proj.weight", (KV, D), 0),
                f"{i}.v.bias": Spec(f"{at}.self_attn.v_proj.bias", (KV,), 0),
                f"{i}.norm_2": Spec(f"{at}.post_attention_layernorm.weight", (D,)),
            }
        out, router = ("out", "gate") if openai else ("o_proj", "router")
        table |= {
            f"{i}.sinks": Spec(f"{at}.{attn}.sinks", (c.num_attention_heads,), 0),
            f"{i}.out.weight": Spec(f"{at}.{attn}.{out}.weight", (D, Q), 1),
            f"{i}.out.bias": Spec(f"{at}.{attn}.{out}.bias", (D,)),
            f"{i}.router.weight": Spec(f"{at}.{mlp}.{router}.weight", (E, D)),
            f"{i}.router.bias": Spec(f"{at}.{mlp}.{router}.bias", (E,)),
        }
        for ours, theirs, number, rows, columns in (("gate_up", "gate_up_proj", 1, 2 * F, D), ("down", "down_proj", 2, D, F)):
            stem = f"{at}.mlp.mlp{number}" if openai else f"{at}.mlp.experts.{theirs}"
            weight, dot = (f"{stem}_weight", ".") if openai else (stem, "_")
            table[f"{i}.{ours}.bias"] = Spec(f"{stem}_bias", (E, rows), 0)
            if dense:
                table[f"{i}.{ours}.weight"] = Spec(weight, (E, columns, rows), 0)
            else:
                table[f"{i}.{ours}.blocks"] = Spec(f"{weight}{dot}blocks", (E, rows, -(-columns // 32), 16), 0)
                table[f"{i}.{ours}.scales"] = Spec(f"{weight}{dot}scales", (E, rows, -(-columns // 32)), 0)
    return table


@dataclass(frozen=True)
class Linear:
    """A weight [in, out], a transposed view of the stored one or in 8 bits, with its bias f32 [out]."""

    weight: "np.ndarray | Q8"
    bias: np.ndarray


@dataclass(frozen=True)
class Block:
    """The weights of one block."""

    norm_1: np.ndarray
    q: Linear
    k: Linear
    v: Linear
    sinks: np.ndarray
    out: Linear
    norm_2: np.ndarray
    router: Linear
    experts: "Experts"


DENSE = ("q", "k", "v", "out")  # the parts of a block that are products with a matrix, but for the small router


@dataclass(frozen=True)
class Weights:
    """The weights of the model: matrices and experts as stored, in the memory map, dense ones perhaps in 8 bits (models.quantise)."""

    embed: np.ndarray  # [V, D]
    blocks: tuple[Block, ...]
    norm_f: np.ndarray
    head: "np.ndarray | Q8"  # [D, V], a transposed view


def load_weights(checkpoint: Checkpoint, c: Config) -> Weights:
    """The checkpoint's tensors as the model's. Raises ToyllmError where they are not this architecture's."""
    from ..kernels.moe import Experts, Mxfp4

    names = frozenset(checkpoint.tensors)
    if (c.intermediate_size % 32 or c.hidden_size % 32) and not has_dense_experts(names):
        sizes = f"hidden_size {c.hidden_size}, intermediate_size {c.intermediate_size}"
        raise ToyllmError(f"{checkpoint.shards[0]}: MXFP4 needs sizes that are multiples of 32, found {sizes}")
    found = match(checkpoint, specs(c, names), PREFIXES, IGNORED)
    Q, KV = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    def linear(name: str, rows: slice = slice(None)) -> Linear:
        weight, bias = matrix(checkpoint, found[f"{name}.weight"]), vector(checkpoint, found[f"{name}.bias"])
        return Linear(weight[rows].T, bias[rows])

    def projections(i: int) -> list[Linear]:
        if f"{i}.qkv.weight" in found:
            return [linear(f"{i}.qkv", rows) for rows in (slice(Q), slice(Q, Q + KV), slice(Q + KV, Q + 2 * KV))]
        return [linear(f"{i}.{part}") for part in "qkv"]

    def expert(name: str) -> "Mxfp4 | np.ndarray":
        if f"{name}.weight" in found:
            return matrix(checkpoint, found[f"{name}.weight"])
        return Mxfp4(*(mxfp4_bytes(checkpoint, found[f"{name}.{part}"]) for part in ("blocks", "scales")))

    def plain(name: str) -> np.ndarray:
        return vector(checkpoint, found[name])

    def block(i: int) -> Block:
        q, k, v = projections(i)
        return Block(
            norm_1=plain(f"{i}.norm_1"),
            q=q,
            k=k,
            v=v,
            sinks=plain(f"{i}.sinks"),
            out=linear(f"{i}.out"),
            norm_2=plain(f"{i}.norm_2"),
            router=linear(f"{i}.router"),
            experts=Experts(
                gate_up=expert(f"{i}.gate_up"),
                gate_up_bias=plain(f"{i}.gate_up.bias"),
                down=expert(f"{i}.down"),
                down_bias=plain(f"{i}.down.bias"),
                limit=c.swiglu_limit,
                alpha=c.swiglu_alpha,
            ),
        )

    blocks = tuple(block(i) for i in range(c.num_hidden_layers))
    embed = matrix(checkpoint, found["embed"])
    return Weights(embed, blocks, plain("norm_f"), (matrix(checkpoint, found["head"]) if "head" in found else embed).T)


# ---- buffers and cache ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Buffers:
    """What a forward pass works in, allocated once for passes of up to `rows` tokens; f32 but for `experts`."""

    x: np.ndarray  # [rows, D], the residual stream
    norm: np.ndarray  # [rows, D]
    q: np.ndarray  # [rows, H Dh]
    k: np.ndarray  # [rows, G Dh]
    v: np.ndarray  # [rows, G Dh]
    heads: np.ndarray  # [rows, H Dh]
    router: np.ndarray  # [rows, E]
    experts: np.ndarray  # int64 [rows, k]
    weights: np.ndarray  # [rows, k]
    h: np.ndarray  # [k, 2 F], one token's experts before the activation
    z: np.ndarray  # [k, F], and after it
    halves: np.ndarray  # [1, D]
    added: np.ndarray  # [rows, D], what a sub-layer adds to the stream
    panels: np.ndarray  # a row a thread: weights expanded for products
    scores: np.ndarray  # a row a thread: attention scores of a block


def make_buffers(c: Config, rows: int) -> Buffers:
    """Buffers for passes of up to `rows` tokens."""
    from ..kernels.attention import SCRATCH
    from ..kernels.matmul import panels_for
    from ..kernels.threads import thread_scratch

    D, F, k = c.hidden_size, c.intermediate_size, c.num_experts_per_tok
    Q, KV = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    def f32(*shape: int) -> np.ndarray:
        return np.empty(shape, np.float32)

    return Buffers(
        x=f32(rows, D),
        norm=f32(rows, D),
        q=f32(rows, Q),
        k=f32(rows, KV),
        v=f32(rows, KV),
        heads=f32(rows, Q),
        router=f32(rows, c.num_local_experts),
        experts=np.zeros((rows, k), np.int64),
        weights=f32(rows, k),
        h=f32(k, 2 * F),
        z=f32(k, F),
        halves=f32(1, D),
        added=f32(rows, D),
        panels=thread_scratch(panels_for(max(D, F, Q))),
        scores=thread_scratch(SCRATCH),
    )


def make_cache(
    c: Config, sequences: int, capacity: int, chunk: int, dtype: str = "f32", poison: bool = False, keep: int = 0
) -> WrapperCache:
    """A KV cache for so many sequences of up to `capacity` positions in passes of up to `chunk` tokens.

    Sliding layers remember their window and, so that a sequence can step back, the `keep` positions before it.
    """
    sizes = (c.num_key_value_heads, c.head_dim, sequences, capacity)
    memory, batch = sliding_room(c, sequences, capacity, chunk, keep)
    shift = functools.partial(shifted, c)
    caches: list[CausalCache] = []
    if n := sum(c.sliding):
        sliding = SlidingWindowCache(n, *sizes, batch, dtype, shift, window=min(c.sliding_window, memory), memory=memory, poison=poison)
        caches.append(sliding)
    if n := len(c.sliding) - sum(c.sliding):
        caches.append(CausalCache(n, *sizes, chunk, dtype, shift, poison=poison))
    return WrapperCache(caches)


def cache_bytes(c: Config, capacity: int, chunk: int, dtype: str = "f32", sequences: int = 1, keep: int = 0) -> int:
    """Bytes of keys and values of such a cache."""
    cell = 2 * cell_bytes(c.head_dim, dtype) * c.num_key_value_heads
    memory, batch = sliding_room(c, sequences, capacity, chunk, keep)
    sliding = sum(c.sliding)
    return cell * (sliding * (sequences * memory + batch) + (len(c.sliding) - sliding) * sequences * capacity)


def sliding_room(c: Config, sequences: int, capacity: int, chunk: int, keep: int) -> tuple[int, int]:
    """A sliding layer's memory, and the most tokens of a pass: no more than there can be."""
    return min(c.sliding_window + keep, capacity), min(chunk, sequences * capacity)


@functools.cache
def layer_places(c: Config) -> tuple[tuple[int, int], ...]:
    """Of each layer, its type in the cache, and its number among those of the type."""
    full = int(any(c.sliding))  # the sliding ones come first, if there are any
    return tuple((0 if slides else full, c.sliding[:i].count(slides)) for i, slides in enumerate(c.sliding))


def shifted(c: Config, layer: int, key: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Keys f32 [n, G, Dh] as they would be at positions by `offsets` int64 [n] higher; in place.

    Turned by the angle alone, formed in f64: YaRN's factor is on them already.
    """
    from ..kernels.rotary import rotate_kernel

    del layer  # all turn alike
    angles = offsets[:, None] * frequencies(c)[0].astype(np.float32).astype(np.float64)  # the frequencies of `rotations`
    rotate_kernel(key, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), not c.hf_rope_impl)
    return key


# ---- attention, mixture of experts, block, forward --------------------------------------------------------------------------


@functools.cache
def frequencies(c: Config) -> tuple[np.ndarray, float]:
    """The rotary embedding's frequencies f64 [Dh/2] and the factor on cos and sin: the same for every pass."""
    from ..kernels import rotary

    if c.rope_type == "yarn":
        settings = (c.rope_factor, c.rope_original_context, c.rope_beta_fast, c.rope_beta_slow, c.rope_truncate)
        return rotary.yarn_frequencies(c.head_dim, c.rope_theta, *settings)
    return c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim), 1.0


def rotations(c: Config, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin f32 [T, Dh/2] of the rotary embedding at these positions, YaRN's factor on both."""
    from ..kernels import rotary

    return rotary.rotations(positions, *frequencies(c))


def attention(
    x: np.ndarray,
    w: Block,
    i: int,
    c: Config,
    k: "Backend",
    buffers: Buffers,
    cache: CausalCache,
    turn: tuple[np.ndarray, np.ndarray],
    tap: Tap | None,
) -> np.ndarray:
    """Grouped-query attention of block i with sinks, over the cache, output projection included: [T, D] -> [T, D]."""
    T, H, G, Dh = len(x), c.num_attention_heads, c.num_key_value_heads, c.head_dim
    q, key, value = buffers.q[:T], buffers.k[:T], buffers.v[:T]
    for part, to in ((w.q, q), (w.k, key), (w.v, value)):
        k.matmul(x, part.weight, part.bias, to, buffers.panels)
    q, key, value, heads = q.reshape(T, H, Dh), key.reshape(T, G, Dh), value.reshape(T, G, Dh), buffers.heads[:T].reshape(T, H, Dh)
    k.rotate(q, *turn, not c.hf_rope_impl)
    k.rotate(key, *turn, not c.hf_rope_impl)
    name = f"blocks.{i}.attn"
    if tap:
        tap(f"{name}.q", q)
        tap(f"{name}.k", key)
        tap(f"{name}.v", value)
    cache.put(key, value)
    scale = 1 / math.sqrt(Dh)
    k.attention(q, cache.keys, cache.values, cache.cells, cache.adjoining, cache.begin, cache.end, scale, heads, buffers.scores, w.sinks)
    if tap:
        tap_scores(tap, name, q, cache, scale, heads, w.sinks)
        tap(f"{name}.heads", heads)
    out = buffers.added[:T]
    k.matmul(heads.reshape(T, H * Dh), w.out.weight, w.out.bias, out, buffers.panels)
    if tap:
        tap(f"{name}.out", out)
    return out


def mixture(x: np.ndarray, w: Block, i: int, c: Config, k: "Backend", buffers: Buffers, tap: Tap | None) -> np.ndarray:
    """Router and experts of block i: [T, D] -> [T, D]."""
    T = len(x)
    logits, experts, weights, out = buffers.router[:T], buffers.experts[:T], buffers.weights[:T], buffers.added[:T]
    name = f"blocks.{i}"
    k.matmul(x, w.router.weight, w.router.bias, logits, buffers.panels)
    if tap:
        tap(f"{name}.router.logits", logits)
    k.route(logits, experts, weights)
    if tap:
        tap(f"{name}.router.experts", experts)
        tap(f"{name}.router.weights", weights)
    inside = tap_inside(tap, name, experts, c.intermediate_size) if tap else None
    scratch = (buffers.h, buffers.z, buffers.halves, buffers.panels)
    k.mixture(x, logits, experts, weights, w.experts, out, scratch, inside.watch if inside else None)
    if inside:
        inside.read()
    if tap:
        tap(f"{name}.mlp.out", out)
    return out


def block(
    x: np.ndarray,
    w: Block,
    i: int,
    c: Config,
    k: "Backend",
    buffers: Buffers,
    cache: CausalCache,
    turn: tuple[np.ndarray, np.ndarray],
    tap: Tap | None,
) -> None:
    """Block i, in place on the residual stream x [T, D]: each sub-layer reads a norm of it and adds to it."""
    norm = buffers.norm[: len(x)]
    k.rms_norm(x, w.norm_1, c.rms_norm_eps, norm)
    if tap:
        tap(f"blocks.{i}.norm_1", norm)
    x += attention(norm, w, i, c, k, buffers, cache, turn, tap)
    if tap:
        tap(f"blocks.{i}.resid_mid", x)
    k.rms_norm(x, w.norm_2, c.rms_norm_eps, norm)
    if tap:
        tap(f"blocks.{i}.norm_2", norm)
    x += mixture(norm, w, i, c, k, buffers, tap)
    if tap:
        tap(f"blocks.{i}.out", x)


def final_norm(x: np.ndarray, w: Weights, c: Config, k: "Backend", out: np.ndarray) -> None:
    """What the head reads of the residual stream x [T, D]: out f32 [T, D]."""
    k.rms_norm(x, w.norm_f, c.rms_norm_eps, out)


def forward(
    w: Weights,
    c: Config,
    k: "Backend",
    buffers: Buffers,
    tokens: np.ndarray,
    positions: np.ndarray,
    cache: WrapperCache,
    logits: np.ndarray,
    tap: Tap | None = None,
) -> None:
    """One pass over tokens and positions, int64 [T], for which the cache has taken cells; logits f32 [n, V] are the last n tokens'."""
    T = len(tokens)
    x = buffers.x[:T]
    x[...] = widen(w.embed[tokens])
    if tap:
        tap("embed", x)
    turn = rotations(c, positions)
    for i, (weights, (kind, number)) in enumerate(zip(w.blocks, layer_places(c), strict=True)):
        cache.set_layer_type(kind)
        cache.set_layer(number)
        block(x, weights, i, c, k, buffers, cache.chosen, turn, tap)
    n = T if tap and tap.reader else len(logits)
    if not n:
        return
    norm = buffers.norm[:n]
    final_norm(x[T - n :], w, c, k, norm)
    if tap:
        tap("norm_f", norm)
    k.matmul(norm[n - len(logits) :], w.head, NO_BIAS, logits, buffers.panels)
    if tap:
        tap("logits", logits)


NO_BIAS = np.empty(0, np.float32)
