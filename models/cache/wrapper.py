"""Several caches as one, for models whose layers differ."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ...kernels.errors import ToyllmError
from .causal import CausalCache, Commit
from .config import CacheConfig, NotSupported, check_batch
from .encoder import EncoderCache

Member = CausalCache | EncoderCache


class WrapperCache:
    """The caches of the layer types: `set_layer_type` chooses the one that `put` and `get` mean, until the next `start_forward`.

    Every member takes every batch; `copy_prefix`, `remove`, `restore`, `set_causal` and `set_config` are done by all of them, or, where
    one refuses, by none. `set_layer` goes to every member that has so many layers: members may have only those of their own type, then
    their layers are numbered among these.
    """

    def __init__(self, caches: Sequence[Member]) -> None:
        if not caches:
            raise ToyllmError("a WrapperCache: expected at least one cache")
        self.caches = tuple(caches)
        self.chosen: Any = self.caches[0]  # the member that the layer type means
        self._layer = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all members."""
        return sum(cache.nbytes for cache in self.caches)

    def length(self, sequence: int = 0) -> int:
        """How many positions a sequence has had."""
        return max(cache.length(sequence) for cache in self.caches)

    def next_position(self, sequence: int = 0) -> int | None:
        """The position behind the last one stored; None while the sequence is empty."""
        return max((p for cache in self.caches if (p := cache.next_position(sequence)) is not None), default=None)

    def positions(self, sequence: int = 0) -> np.ndarray:
        """The positions that any member stores of a sequence, int64 [n] in order, each once."""
        return np.unique(np.concatenate([cache.positions(sequence) for cache in self.caches]))

    def can_resume(self, sequence: int, position: int) -> bool:
        """Whether all members can."""
        return all(cache.can_resume(sequence, position) for cache in self.caches)

    def set_config(self, config: CacheConfig) -> None:
        """As each member's."""
        self._all([cache.prepare_config(config) for cache in self.caches])

    def start_forward(self, positions: object, sequences: object, reserve: bool = False) -> None:
        """As each member's; the layer type is 0 again."""
        batch = check_batch(positions, sequences)
        self._all([cache.prepare_forward(*batch, reserve) for cache in self.caches])
        self.chosen = self.caches[0]

    def check_room(self, positions: object, sequences: object, most: int) -> None:
        """As each member's."""
        for cache in self.caches:
            if isinstance(cache, CausalCache):
                cache.check_room(positions, sequences, most)

    def set_layer_type(self, i: int) -> None:
        """Choose the member that `put` and `get` mean."""
        if not 0 <= i < len(self.caches):
            raise ToyllmError(f"layer type {i}: expected 0 to {len(self.caches) - 1}")
        self.chosen = self.caches[i]

    def set_layer(self, layer: int) -> None:
        """Choose the layer, in every member that has it."""
        if not 0 <= layer < max(cache.layers for cache in self.caches):
            raise ToyllmError(f"layer {layer}: expected 0 to {max(cache.layers for cache in self.caches) - 1}")
        self._layer = layer
        for cache in self.caches:
            if layer < cache.layers:
                cache.set_layer(layer)

    def set_causal(self, enabled: bool = True, except_: Collection[int] = ()) -> None:
        """As each member's."""
        self._all([cache.prepare_causal(enabled, except_) for cache in self.caches])

    def put(self, key: np.ndarray, value: np.ndarray) -> None:
        """As the chosen member's."""
        self._member().put(key, value)

    def get(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """As the chosen member's."""
        return self._member().get()

    def _member(self) -> Member:
        """The chosen member. Raises ToyllmError where it has no such layer."""
        if self._layer >= self.chosen.layers:
            raise ToyllmError(f"layer {self._layer}: the chosen cache has {self.chosen.layers}")
        return self.chosen

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """As each member's."""
        self._all([cache.prepare_copy(source, target, length) for cache in self.caches])

    def remove(self, sequence: int, begin: int, end: int | None = None) -> None:
        """As each member's."""
        self._all([cache.prepare_remove(sequence, begin, end) for cache in self.caches])

    def state(self, sequence: int = 0) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Each member's state of a sequence. Raises NotSupported with an encoder among them."""
        return [cache.state(sequence) for cache in self._with_positions()]

    def restore(self, sequence: int, states: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Make a sequence hold what `state` has given; as each member's. Raises ToyllmError for another number of members."""
        members = self._with_positions()
        if len(states) != len(members):
            raise ToyllmError(f"states: expected one a member, {len(members)}, found {len(states)}")
        self._all([cache.prepare_restore(sequence, *state) for cache, state in zip(members, states, strict=True)])

    def _with_positions(self) -> list[CausalCache]:
        members = [cache for cache in self.caches if isinstance(cache, CausalCache)]
        if len(members) < len(self.caches):
            raise NotSupported("an encoder's input is not part of a sequence's state")
        return members

    @staticmethod
    def _all(commits: Sequence[Commit]) -> None:
        for commit in commits:
            commit()
