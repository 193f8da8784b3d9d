"""KV caches: the keys and values of the tokens seen so far, for one sequence or many, which may share them.

| cache | what a query at position p sees of its own sequence |
|---|---|
| `CausalCache` | the positions up to p |
| `SlidingWindowCache` | the last `window` of them, p included; forgets what lies `memory` or more behind |
| `ChunkedCache` | those of p's chunk of `chunk` positions, p // chunk |
| `EncoderCache` | an encoder's output, whole: it has no positions and no mask |
| `WrapperCache` | several caches as one, for models whose layers differ |

**Layout.** Keys and values are [L, G, C, W] each: layers, key/value heads, cells, and a head's row as stored (f32 or bf16, W = Dh; or 8
bits with scales among them, see `kernels.cells`). A pool of C cells is shared by all layers and sequences: max_sequences · capacity of
them, with a window max_sequences · memory + max_batch. A cell holds one position, of one sequence or of several that share a prefix. Any
cell can hold any position, so that as long as cells are free there is room; sequences are any integers from 0, and positions too: they
need neither begin at 0 nor follow one another, may come in any order, and one that is stored twice is seen twice.

**A forward pass** is `start_forward`, then for each layer `set_layer`, `put`, and `get`; or, without gathering anything, the arrays that
the attention kernels read: `keys`, `values` (those of the layer), `cells`, `begin`, `end` and `adjoining`: query t sees
cells[begin[t] : end[t]], in order of position; `adjoining` says that these are neighbours. A position's place in `cells` is, modulo 64, its
index in its sequence (what was forgotten counts too), so that the sums of attention have the same order however the sequence was cut into
passes, whatever else is in them and whatever is still kept. One token of one sequence costs the same at any depth.

**Errors.** `CacheFull` and `NotSupported`, and `ToyllmError` for arguments that make no sense. After any of them nothing has changed.
Operations other than a forward pass's (`remove`, `copy_prefix`, `restore`) end the pass under way.
"""

from ...kernels.cells import DTYPES
from .causal import CausalCache, ChunkedCache, SlidingWindowCache
from .cells import BLOCK
from .config import CacheConfig, CacheFull, NotSupported
from .encoder import EncoderCache
from .wrapper import WrapperCache

__all__ = [
    "BLOCK",
    "DTYPES",
    "CacheConfig",
    "CacheFull",
    "CausalCache",
    "ChunkedCache",
    "EncoderCache",
    "NotSupported",
    "SlidingWindowCache",
    "WrapperCache",
]
