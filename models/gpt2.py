"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), as Hugging Face stores and runs it.

    x = wte[token] + wpe[position]
    for each block:  x = x + attention(LN(x));  x = x + gelu(LN(x) · W_up + b) · W_down + b
    logits = LN(x) · wteᵀ

The arithmetic is transformers' models/gpt2/modeling_gpt2.py in f32. Shapes: T tokens, D width, H heads of Dh, F feed-forward
width, V vocabulary, P positions.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.cells import cell_bytes
from ..kernels.dtypes import widen
from ..kernels.errors import ToyllmError
from .cache import CausalCache
from .checkpoint import Checkpoint
from .config import layers, optional_size, positive, size
from .json_files import brief
from .taps import Tap, tap_scores
from .weights import Spec, log, match, matrix, vector

if TYPE_CHECKING:
    from ..kernels.backends import Backend
    from ..kernels.q8 import Q8

# ---- configuration ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """config.json of model_type gpt2, under its own names; the defaults are transformers' GPT2Config."""

    vocab_size: int = size(50257)  # V
    n_positions: int = size(1024)  # P
    n_embd: int = size(768)  # D
    n_layer: int = layers(12)  # L
    n_head: int = size(12)  # H
    n_inner: int | None = optional_size()  # F; null = 4 D
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = positive(1e-5)
    scale_attn_weights: bool = True  # scores divided by √Dh
    scale_attn_by_inverse_layer_idx: bool = False  # scores divided by layer index + 1
    tie_word_embeddings: bool = True
    add_cross_attention: bool = False
    bos_token_id: tuple[int, ...] = (50256,)
    eos_token_id: tuple[int, ...] = (50256,)

    @property
    def width(self) -> int:
        """D."""
        return self.n_embd

    @property
    def inner(self) -> int:
        """F."""
        return self.n_inner or 4 * self.n_embd

    @property
    def context(self) -> int:
        """The most positions the model knows."""
        return self.n_positions


def normalise(document: dict[str, Any]) -> dict[str, Any]:
    """config.json under the names of `Config`: GPT-2 has only one spelling."""
    return document


ACTIVATIONS = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu": "gelu"}


def check(c: Config, where: Path) -> None:
    """Raise ToyllmError for a configuration that no GPT-2 can have, or that toyllm does not run."""
    if c.n_embd % c.n_head:
        raise ToyllmError(f"{where}: n_head: {c.n_head} does not divide n_embd {c.n_embd}")
    if c.activation_function not in ACTIVATIONS:
        raise ToyllmError(f"{where}: activation_function: expected {' or '.join(ACTIVATIONS)}, found {brief(c.activation_function)}")
    if c.add_cross_attention:
        raise ToyllmError(f"{where}: add_cross_attention: toyllm runs decoders without an encoder only")


# ---- names in the checkpoint ------------------------------------------------------------------------------------------------

PREFIXES = ("transformer.", "")  # GPT2LMHeadModel writes the first, GPT2Model the second
IGNORED = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # buffers of the causal mask, no weights


def specs(c: Config) -> dict[str, Spec]:
    """Every tensor of the architecture: our name -> name in the checkpoint, shape, shard axis. Conv1D matrices are [in, out]."""
    V, P, D, F = c.vocab_size, c.n_positions, c.n_embd, c.inner
    table = {
        "embed": Spec("wte.weight", (V, D), 0),
        "position": Spec("wpe.weight", (P, D)),
        "norm_f.weight": Spec("ln_f.weight", (D,)),
        "norm_f.bias": Spec("ln_f.bias", (D,)),
        "head": Spec("lm_head.weight", (V, D), 0, optional=c.tie_word_embeddings),
    }
    for i in range(c.n_layer):
        table |= {
            f"{i}.norm_1.weight": Spec(f"h.{i}.ln_1.weight", (D,)),
            f"{i}.norm_1.bias": Spec(f"h.{i}.ln_1.bias", (D,)),
            f"{i}.qkv.weight": Spec(f"h.{i}.attn.c_attn.weight", (D, 3 * D), 1),
            f"{i}.qkv.bias": Spec(f"h.{i}.attn.c_attn.bias", (3 * D,), 0),
            f"{i}.out.weight": Spec(f"h.{i}.attn.c_proj.weight", (D, D), 0),
            f"{i}.out.bias": Spec(f"h.{i}.attn.c_proj.bias", (D,)),
            f"{i}.norm_2.weight": Spec(f"h.{i}.ln_2.weight", (D,)),
            f"{i}.norm_2.bias": Spec(f"h.{i}.ln_2.bias", (D,)),
            f"{i}.up.weight": Spec(f"h.{i}.mlp.c_fc.weight", (D, F), 1),
            f"{i}.up.bias": Spec(f"h.{i}.mlp.c_fc.bias", (F,), 0),
            f"{i}.down.weight": Spec(f"h.{i}.mlp.c_proj.weight", (F, D), 0),
            f"{i}.down.bias": Spec(f"h.{i}.mlp.c_proj.bias", (D,)),
        }
    return table


@dataclass(frozen=True)
class Affine:
    """A weight with its bias: a Conv1D ([in, out] as stored or in 8 bits, [out] f32) or a LayerNorm ([D] f32 both)."""

    weight: "np.ndarray | Q8"
    bias: np.ndarray


@dataclass(frozen=True)
class Block:
    """The weights of one block."""

    norm_1: Affine
    qkv: Affine
    out: Affine
    norm_2: Affine
    up: Affine
    down: Affine


DENSE = ("qkv", "out", "up", "down")  # the parts of a block that are products with a matrix


@dataclass(frozen=True)
class Weights:
    """The weights of the model: matrices as stored, in the memory map, those of products perhaps in 8 bits (models.quantise)."""

    embed: np.ndarray  # [V, D]
    position: np.ndarray  # [P, D]
    blocks: tuple[Block, ...]
    norm_f: Affine
    head: "np.ndarray | Q8"  # [D, V], a transposed view


def load_weights(checkpoint: Checkpoint, c: Config) -> Weights:
    """The checkpoint's tensors as the model's. Raises ToyllmError where they are not this architecture's."""
    found = match(checkpoint, specs(c), PREFIXES, IGNORED)

    def affine(name: str) -> Affine:
        weight, bias = found[f"{name}.weight"], found[f"{name}.bias"]
        return Affine((vector if len(weight.shape) == 1 else matrix)(checkpoint, weight), vector(checkpoint, bias))

    embed = matrix(checkpoint, found["embed"])
    head = matrix(checkpoint, found["head"]) if "head" in found else embed
    if head is not embed and head.dtype == embed.dtype and np.array_equal(head.view(np.uint8), embed.view(np.uint8)):
        head = embed  # stored twice, tied all the same
    if head is not embed and c.tie_word_embeddings:
        log.info("lm_head.weight differs from wte.weight although config.json ties them; the stored head is used")
    parts = ("norm_1", "qkv", "out", "norm_2", "up", "down")
    blocks = tuple(Block(*(affine(f"{i}.{part}") for part in parts)) for i in range(c.n_layer))
    return Weights(embed, matrix(checkpoint, found["position"]), blocks, affine("norm_f"), head.T)


# ---- buffers and cache ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Buffers:
    """What a forward pass works in, allocated once for passes of up to `rows` tokens; f32."""

    x: np.ndarray  # [rows, D], the residual stream
    norm: np.ndarray  # [rows, D]
    qkv: np.ndarray  # [rows, 3 D]
    q: np.ndarray  # [rows, H, Dh]
    heads: np.ndarray  # [rows, H, Dh]
    hidden: np.ndarray  # [rows, F]
    added: np.ndarray  # [rows, D], what a sub-layer adds to the stream
    panels: np.ndarray  # a row a thread: weights expanded for products
    scores: np.ndarray  # a row a thread: attention scores of a block


def make_buffers(c: Config, rows: int) -> Buffers:
    """Buffers for passes of up to `rows` tokens."""
    from ..kernels.attention import SCRATCH
    from ..kernels.matmul import panels_for
    from ..kernels.threads import thread_scratch

    D, F, H, Dh = c.n_embd, c.inner, c.n_head, c.n_embd // c.n_head
    return Buffers(
        x=np.empty((rows, D), np.float32),
        norm=np.empty((rows, D), np.float32),
        qkv=np.empty((rows, 3 * D), np.float32),
        q=np.empty((rows, H, Dh), np.float32),
        heads=np.empty((rows, H, Dh), np.float32),
        hidden=np.empty((rows, F), np.float32),
        added=np.empty((rows, D), np.float32),
        panels=thread_scratch(panels_for(max(D, F))),
        scores=thread_scratch(SCRATCH),
    )


def make_cache(
    c: Config, sequences: int, capacity: int, chunk: int, dtype: str = "f32", poison: bool = False, keep: int = 0
) -> CausalCache:
    """A KV cache for so many sequences of up to `capacity` positions in passes of up to `chunk` tokens.

    All layers see all positions, so `keep` does not matter. A key has its position inside, and cannot be moved to another.
    """
    del keep
    return CausalCache(c.n_layer, c.n_head, c.n_embd // c.n_head, sequences, capacity, chunk, dtype, poison=poison)


def cache_bytes(c: Config, capacity: int, chunk: int, dtype: str = "f32", sequences: int = 1, keep: int = 0) -> int:
    """Bytes of keys and values of such a cache."""
    del chunk, keep
    return 2 * cell_bytes(c.n_embd // c.n_head, dtype) * c.n_layer * c.n_head * sequences * capacity


# ---- attention, feed-forward, block, forward --------------------------------------------------------------------------------


def attention(
    x: np.ndarray, w: Block, i: int, c: Config, k: "Backend", buffers: Buffers, cache: CausalCache, tap: Tap | None
) -> np.ndarray:
    """Causal multi-head attention of block i over the cache, output projection included: [T, D] -> [T, D]."""
    T, H, Dh = len(x), c.n_head, c.n_embd // c.n_head
    qkv, q, heads, out = buffers.qkv[:T], buffers.q[:T], buffers.heads[:T], buffers.added[:T]
    k.matmul(x, w.qkv.weight, w.qkv.bias, qkv, buffers.panels)
    split = qkv.reshape(T, 3, H, Dh)
    np.copyto(q, split[:, 0])
    name = f"blocks.{i}.attn"
    if tap:
        tap(f"{name}.q", q)
        tap(f"{name}.k", split[:, 1])
        tap(f"{name}.v", split[:, 2])
    cache.put(split[:, 1], split[:, 2])
    scale = (1 / math.sqrt(Dh) if c.scale_attn_weights else 1.0) / (i + 1 if c.scale_attn_by_inverse_layer_idx else 1)
    k.attention(q, cache.keys, cache.values, cache.cells, cache.adjoining, cache.begin, cache.end, scale, heads, buffers.scores)
    if tap:
        tap_scores(tap, name, q, cache, scale, heads)
        tap(f"{name}.heads", heads)
    k.matmul(heads.reshape(T, H * Dh), w.out.weight, w.out.bias, out, buffers.panels)
    if tap:
        tap(f"{name}.out", out)
    return out


def feed_forward(x: np.ndarray, w: Block, i: int, c: Config, k: "Backend", buffers: Buffers, tap: Tap | None) -> np.ndarray:
    """gelu(x · W_up + b) · W_down + b: [T, D] -> [T, D]."""
    hidden, out = buffers.hidden[: len(x)], buffers.added[: len(x)]
    k.matmul(x, w.up.weight, w.up.bias, hidden, buffers.panels)
    getattr(k, ACTIVATIONS[c.activation_function])(hidden)
    if tap:
        tap(f"blocks.{i}.mlp.hidden", hidden)
    k.matmul(hidden, w.down.weight, w.down.bias, out, buffers.panels)
    if tap:
        tap(f"blocks.{i}.mlp.out", out)
    return out


def block(x: np.ndarray, w: Block, i: int, c: Config, k: "Backend", buffers: Buffers, cache: CausalCache, tap: Tap | None) -> None:
    """Block i, in place on the residual stream x [T, D]: each sub-layer reads a norm of it and adds to it."""
    norm = buffers.norm[: len(x)]
    k.layer_norm(x, w.norm_1.weight, w.norm_1.bias, c.layer_norm_epsilon, norm)
    if tap:
        tap(f"blocks.{i}.norm_1", norm)
    x += attention(norm, w, i, c, k, buffers, cache, tap)
    if tap:
        tap(f"blocks.{i}.resid_mid", x)
    k.layer_norm(x, w.norm_2.weight, w.norm_2.bias, c.layer_norm_epsilon, norm)
    if tap:
        tap(f"blocks.{i}.norm_2", norm)
    x += feed_forward(norm, w, i, c, k, buffers, tap)
    if tap:
        tap(f"blocks.{i}.out", x)


def final_norm(x: np.ndarray, w: Weights, c: Config, k: "Backend", out: np.ndarray) -> None:
    """What the head reads of the residual stream x [T, D]: out f32 [T, D]."""
    k.layer_norm(x, w.norm_f.weight, w.norm_f.bias, c.layer_norm_epsilon, out)


def forward(
    w: Weights,
    c: Config,
    k: "Backend",
    buffers: Buffers,
    tokens: np.ndarray,
    positions: np.ndarray,
    cache: CausalCache,
    logits: np.ndarray,
    tap: Tap | None = None,
) -> None:
    """One pass over tokens and positions, int64 [T], for which the cache has taken cells; logits f32 [n, V] are the last n tokens'."""
    T = len(tokens)
    x = buffers.x[:T]
    np.add(widen(w.embed[tokens]), widen(w.position[positions]), out=x)
    if tap:
        tap("embed", x)
    for i, weights in enumerate(w.blocks):
        cache.set_layer(i)
        block(x, weights, i, c, k, buffers, cache, tap)
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
