"""Random operations on caches of every kind, held against a plain model: what each sequence stores, as a list.

The suite runs some hundred sequences of operations a kind. `TOYLLM_CACHE_EXAMPLES=10000 pytest tests/models/test_cache_random.py` runs so
many, other ones each time.
"""

import os
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toyllm.kernels.errors import ToyllmError
from toyllm.models.cache import BLOCK, CacheFull, CausalCache, ChunkedCache, EncoderCache, NotSupported, SlidingWindowCache, WrapperCache

reading = runpy.run_path(str(Path(__file__).parent / "cache_reading.py"))
L, G, DH, rows, choose, members = (reading[name] for name in ("L", "G", "DH", "rows", "choose", "members"))
EXAMPLES = int(os.environ.get("TOYLLM_CACHE_EXAMPLES", "150"))
SEQUENCES = (0, 1, 2, 90_000)

# ---- the plain model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A position of a sequence: the cell, which others may share, the token's number, and how far its key has moved."""

    position: int
    cell: int
    number: int
    moved: int = 0


State = dict[int, list[Stored]]  # by sequence


@dataclass
class Plain:
    """What a cache is to do. Operations return what is stored after them, or raise, and change nothing."""

    cells: int
    window: int | None = None
    memory: int | None = None
    chunk: int | None = None
    shifts: bool = True
    stored: State = field(default_factory=dict)
    _cell: Any = field(default_factory=count)

    def of(self, sequence: int) -> list[Stored]:
        return self.stored.get(sequence, [])

    def forward(self, batch: list[tuple[int, int, int]]) -> State:
        """Of (position, sequence, number)."""
        after = {s: list(mine) for s, mine in self.stored.items()}
        if self.memory is not None:
            for s in {s for _, s, _ in batch}:
                self.forget(after, s, min(p for p, other, _ in batch if other == s))
            if used(after) + len(batch) > self.cells:
                for s in after.keys() - {s for _, s, _ in batch}:
                    if after[s]:
                        self.forget(after, s, max(e.position for e in after[s]) + 1)
        if used(after) + len(batch) > self.cells:
            raise CacheFull
        for p, s, number in batch:
            after.setdefault(s, []).append(Stored(p, next(self._cell), number))
        return after

    def forget(self, state: State, sequence: int, position: int) -> None:
        assert self.memory is not None
        state[sequence] = [e for e in state.get(sequence, []) if e.position >= position - self.memory + 1]

    def sees(self, position: int, sequence: int, lifted: bool) -> list[Stored]:
        def visible(other: int) -> bool:
            inside = self.window is None or other > position - self.window
            return inside and (self.chunk is None or other // self.chunk == position // self.chunk) and (lifted or other <= position)

        return [e for e in self.of(sequence) if visible(e.position)]

    def can_resume(self, sequence: int, position: int) -> bool:
        here = {e.position for e in self.of(sequence)}
        return self.window is None or all(p in here for p in range(max(0, position - self.window + 1), position))

    def copy_prefix(self, source: int, target: int, length: int) -> State:
        return self.stored | {target: [e for e in self.of(source) if e.position < length]}

    def remove(self, sequence: int, begin: int, end: int | None) -> State:
        before = [e for e in self.of(sequence) if e.position < begin]
        behind = [e for e in self.of(sequence) if end is not None and e.position >= end]
        by = 0 if end is None else end - begin
        others = {e.cell for s, mine in self.stored.items() if s != sequence for e in mine}
        if behind and by and (not self.shifts or any(e.cell in others for e in behind)):
            raise NotSupported
        return self.stored | {sequence: before + [replace(e, position=e.position - by, moved=e.moved - by) for e in behind]}

    def restore(self, source: int, target: int) -> State:
        after = self.stored | {target: [replace(e, cell=next(self._cell)) for e in self.of(source)]}
        if used(after) > self.cells:
            raise CacheFull
        return after


def used(state: State) -> int:
    return len({e.cell for mine in state.values() for e in mine})


# ---- one beside the other ---------------------------------------------------------------------------------------------------

Make = Callable[[np.random.Generator], tuple[Any, list[Plain]]]


def sizes_of(rng: np.random.Generator) -> dict[str, Any]:
    sizes = {"max_sequences": int(rng.integers(1, 4)), "capacity": int(rng.choice([3, 8, 40, 100])), "max_batch": int(rng.integers(1, 9))}
    return {"layers": L, "kv_heads": G, "head_dim": DH, "shift": reading["shift"] if rng.random() < 0.8 else None, "poison": True} | sizes


def causal(rng: np.random.Generator) -> tuple[Any, list[Plain]]:
    sizes = sizes_of(rng)
    cells = sizes["max_sequences"] * sizes["capacity"]
    return CausalCache(**sizes), [Plain(cells, shifts=sizes["shift"] is not None)]


def chunked(rng: np.random.Generator) -> tuple[Any, list[Plain]]:
    sizes, chunk = sizes_of(rng), int(rng.integers(1, 6))
    cells = sizes["max_sequences"] * sizes["capacity"]
    return ChunkedCache(**sizes, chunk=chunk), [Plain(cells, chunk=chunk, shifts=sizes["shift"] is not None)]


def sliding(rng: np.random.Generator) -> tuple[Any, list[Plain]]:
    sizes, window = sizes_of(rng), int(rng.choice([1, 2, 3, 5, 20]))
    memory = window + int(rng.choice([0, 0, 1, 4]))
    cells = sizes["max_sequences"] * memory + sizes["max_batch"]
    return SlidingWindowCache(**sizes, window=window, memory=memory), [Plain(cells, window, memory, shifts=sizes["shift"] is not None)]


def wrapper(rng: np.random.Generator) -> tuple[Any, list[Plain]]:
    kinds = [(causal, chunked, sliding)[i] for i in rng.integers(0, 3, rng.integers(1, 4))]
    made = [make(rng) for make in kinds]
    return WrapperCache([cache for cache, _ in made]), [plain for _, plains in made for plain in plains]


KINDS: dict[str, Make] = {"causal": causal, "sliding": sliding, "chunked": chunked, "wrapper": wrapper}
OPERATIONS = ("decode", "decode", "prompt", "prompt", "any", "copy", "cut", "remove", "remove", "restore", "reserve", "wrong")


class Pair:
    """A cache, and a plain model for each of its members."""

    def __init__(self, make: Make, rng: np.random.Generator) -> None:
        self.cache, self.plains = make(rng)
        self.numbers = count()

    def do(self, plainly: Callable[[Plain], State], really: Callable[[], Any]) -> bool:
        """An operation on both: it is done, or refused with the error that a plain model has. Says whether it was done."""
        try:
            after = [plainly(plain) for plain in self.plains]
        except ToyllmError as refusal:
            before = self.reads()
            with pytest.raises(type(refusal)):
                really()
            for old, new in zip(before, self.reads(), strict=True):
                np.testing.assert_array_equal(old, new)
            return False
        really()
        for plain, state in zip(self.plains, after, strict=True):
            plain.stored = {s: mine for s, mine in state.items() if mine}
        return True

    def reads(self) -> list[np.ndarray]:
        """What the last pass reads."""
        return [array.copy() for _, member in members(self.cache) for array in (member.begin, member.end, *member.get())]

    def step(self, operation: str, rng: np.random.Generator) -> None:
        sequence, other = (int(s) for s in rng.choice(SEQUENCES, 2))
        if operation == "decode":
            self.forward([(self.next(s), s) for s in dict.fromkeys((sequence, other))], rng)
        elif operation == "prompt":
            n, first = int(rng.integers(1, 10)), self.next(sequence)
            mixed = [(first + i, sequence) for i in range(n)] + [(self.next(other), other)] * (other != sequence)
            self.forward([mixed[i] for i in (rng.permutation(len(mixed)) if rng.random() < 0.3 else range(len(mixed)))], rng)
        elif operation == "any":
            n = int(rng.integers(1, 7))
            drawn = zip(rng.integers(0, 15, n).tolist(), rng.choice(SEQUENCES, n).tolist(), strict=True)
            self.forward(list(drawn), rng)
        elif operation == "copy":
            length = int(rng.integers(0, 20))
            self.do(lambda plain: plain.copy_prefix(sequence, other, length), lambda: self.cache.copy_prefix(sequence, other, length))
        elif operation in ("cut", "remove"):
            begin = int(rng.integers(0, 15))
            end = None if operation == "cut" else begin + int(rng.integers(0, 6))
            self.do(lambda plain: plain.remove(sequence, begin, end), lambda: self.cache.remove(sequence, begin, end))
        elif operation == "restore":
            states = self.cache.state(sequence)
            given = (states,) if isinstance(self.cache, WrapperCache) else states
            self.do(lambda plain: plain.restore(sequence, other), lambda: self.cache.restore(other, *given))
        elif operation == "reserve":
            self.cache.start_forward([0, 1, 2], [sequence] * 3, reserve=True)
            for (_, member), plain in zip(members(self.cache), self.plains, strict=True):
                member.put(rows([0, 0, 0], 0), rows([0, 0, 0], 0))
                assert [len(array) for array in member.get()] == [plain.cells, plain.cells, 3]
        else:
            for call in (lambda: self.cache.start_forward([0, -1], [0, 0]), lambda: self.cache.remove(sequence, 3, 2)):
                with pytest.raises(ToyllmError):
                    call()
        self.check()

    def next(self, sequence: int) -> int:
        return max((e.position + 1 for plain in self.plains for e in plain.of(sequence)), default=0)

    def forward(self, batch: list[tuple[int, int]], rng: np.random.Generator) -> None:
        """A pass, causal or not, whose tokens then see what they should."""
        numbers = [next(self.numbers) for _ in batch]
        positions, sequences = [p for p, _ in batch], [s for _, s in batch]
        given = np.array if rng.random() < 0.5 else list
        tokens = list(zip(positions, sequences, numbers, strict=True))
        if not self.do(lambda plain: plain.forward(tokens), lambda: self.cache.start_forward(given(positions), given(sequences))):
            return
        reading["put"](self.cache, numbers)
        lifted = [False] * len(batch)
        if rng.random() < 0.3:
            enabled, chosen = bool(rng.random() < 0.5), np.flatnonzero(rng.random(len(batch)) < 0.3).tolist()
            self.cache.set_causal(enabled, except_=chosen)
            lifted = [(t in chosen) == enabled for t in range(len(batch))]
        for kind, plain in enumerate(self.plains):
            for layer in range(L):
                choose(self.cache, kind, layer)
                expected = [plain.sees(p, s, free) for (p, s), free in zip(batch, lifted, strict=True)]
                check_reads(self.cache, members(self.cache)[kind][1], layer, expected)

    def check(self) -> None:
        """What is stored, where a sequence can go on, and how many cells are left."""
        for (_, member), plain in zip(members(self.cache), self.plains, strict=True):
            assert member._cells.free == plain.cells - used(plain.stored)
            assert member._cells.free == int((member._cells._owners == 0).sum())
            assert member._cells._rows.keys() == plain.stored.keys()
        for s in SEQUENCES:
            for (_, member), plain in zip(members(self.cache), self.plains, strict=True):
                mine = sorted(plain.of(s), key=lambda e: e.position)
                assert member.positions(s).tolist() == [e.position for e in mine]
                assert member.next_position(s) == (mine[-1].position + 1 if mine else None)
            for p in (0, 1, 7, self.next(s)):
                assert self.cache.can_resume(s, p) == all(plain.can_resume(s, p) for plain in self.plains)


def check_reads(cache: Any, member: CausalCache, layer: int, expected: list[list[Stored]]) -> None:
    """Keys and values of each token, by `get` and as attention reads them."""
    every = [(t, e) for t, seen in enumerate(expected) for e in seen]
    token, number, moved = np.array([(t, e.number, e.moved) for t, e in every], np.int64).T
    order = np.lexsort((number, token))
    token, keys, values = token[order], rows(number, layer, moved)[order], -rows(number, layer)[order]

    def check(tokens: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
        order = np.lexsort((-value[:, 0, 0], tokens))  # by number, which a value tells
        for found, wanted in ((tokens[order], token), (key[order], keys), (value[order], values)):
            assert np.array_equal(found, wanted)

    key, value, mask = cache.get()
    assert mask.shape == (len(expected), len({e.cell for seen in expected for e in seen})) == (len(expected), len(key))
    tokens, cells = np.nonzero(mask)
    check(tokens, key[cells], value[cells])
    tokens = np.repeat(np.arange(len(expected)), member.end - member.begin)
    cells = np.concatenate([member.cells[begin:end] for begin, end in zip(member.begin, member.end, strict=True)])
    value = member.values[:, cells].swapaxes(0, 1)
    check(tokens, member.keys[:, cells].swapaxes(0, 1), value)
    inside = tokens[1:] == tokens[:-1]
    places = {(t, e.number): e.position for t, e in every}
    numbers = np.rint(-value[:, 0, 0] - layer / 8).astype(int).tolist()
    positions = np.array([places[key] for key in zip(tokens.tolist(), numbers, strict=True)])
    assert (np.diff(positions)[inside] >= 0).all(), "in order of position"
    if member.adjoining:
        assert (np.diff(cells)[inside] == 1).all()


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 150, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), steps=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**32)), min_size=5, max_size=20))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(7200)
def test_any_operations_do_what_the_plain_model_says(kind: str, seed: int, steps: list[tuple[str, int]]) -> None:
    pair = Pair(KINDS[kind], np.random.default_rng(seed))
    for operation, drawn in steps:
        pair.step(operation, np.random.default_rng(drawn))


# ---- the encoder's ----------------------------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 150, database=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["pass", "store", "reserve"]), st.integers(0, 6), st.sampled_from([3, 3, 3, 4])),
            st.tuples(st.just("remove"), st.integers(0, 6), st.integers(0, 3)),
        ),
        max_size=20,
    )
)
@pytest.mark.timeout(7200)
def test_an_encoder_holds_what_was_given_last_until_its_position_goes(steps: list[tuple[str, int, int]]) -> None:
    cache, held, at = EncoderCache(L, G, DH), None, 0  # what is held: sequence, position, rows
    for what, position, argument in steps:
        if what == "remove":
            cache.remove(3, position, position + argument)
            if held and held[0] == 3:
                moved = held[1] - argument if held[1] >= position + argument else held[1]
                held = None if position <= held[1] < position + argument else (3, moved, held[2])
        elif held and held[0] != argument:
            with pytest.raises(NotSupported):
                cache.start_forward([position], [argument])
        else:
            cache.start_forward([position], [argument], reserve=what == "reserve")
            at += 1
            for layer in range(L if what != "pass" else 0):
                cache.set_layer(layer)
                cache.put(rows(range(at), layer), -rows(range(at), layer))
            held = (argument, position, at) if what == "store" else held
        assert cache.cached == (held is not None)
        if held and what != "reserve":
            for layer in range(L):
                cache.set_layer(layer)
                cache.start_forward([position], [held[0]])
                np.testing.assert_array_equal(cache.get()[:2], (rows(range(held[2]), layer), -rows(range(held[2]), layer)))


# ---- blocks -----------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 70), min_size=1, max_size=12), window=st.sampled_from([None, 2, 4, 64, 65, 130]), data=st.data())
def test_blocks_are_cut_by_the_index_in_the_sequence(cuts: list[int], window: int | None, data: st.DataObject) -> None:
    """Whatever the window has forgotten, after steps back, with another sequence beside it, and in a copy."""
    sizes: dict[str, Any] = {"layers": 1, "kv_heads": 1, "head_dim": 1, "max_sequences": 3, "capacity": 900, "max_batch": 140}
    cache = SlidingWindowCache(**sizes, window=window, memory=window + 20) if window else CausalCache(**sizes)
    at, sequence = 0, 0
    for n in cuts:
        beside = data.draw(st.integers(0, 3))
        others = cache.length(99)
        cache.start_forward([*range(at, at + n), *range(others, others + beside)], [sequence] * n + [99] * beside)
        at += n
        first = [max(0, p + 1 - (window or 10**6)) for p in range(at - n, at)]
        assert (cache.begin[:n] % BLOCK).tolist() == [i % BLOCK for i in first]
        assert cache.begin[0] + cache.origin == first[0]
        if data.draw(st.booleans()):
            cache.copy_prefix(sequence, sequence + 1, at)
            cache.remove(sequence, 0)
            sequence += 1
        back = at - data.draw(st.integers(0, min(20, at - 1)))
        if cache.can_resume(sequence, back):
            cache.remove(sequence, back)
            at = back
