"""An interrupt anywhere inside an operation of a cache: what a sequence has is right, and no cell is lost."""

import copy
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from toyllm.models.cache import CausalCache, SlidingWindowCache

reading = runpy.run_path(str(Path(__file__).parent / "cache_reading.py"))
causal, sliding, wrapper = (reading[name] for name in ("causal", "sliding", "wrapper"))


def interrupted(call: Callable[[], Any], line: int) -> bool:
    """Run it, with Ctrl-C at the so-manieth line of the cache's code; whether there was one."""
    seen = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if "/models/cache/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def filled(make: Callable[..., Any]) -> Any:
    cache = make(max_sequences=2, capacity=20)
    for batch in ([0, 1, 2, 3, 4], [5, 6], [7]):
        cache.start_forward(batch, [0] * len(batch))
    cache.start_forward([0, 1], [1, 1])
    return cache


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "decode": lambda cache: cache.start_forward([8, 2], [0, 1]),
    "a prompt": lambda cache: cache.start_forward(list(range(8, 16)), [0] * 8),
    "another sequence": lambda cache: cache.start_forward([0, 1, 2], [7] * 3),
    "in between": lambda cache: cache.start_forward([9, 6, 0], [0, 0, 0]),
    "a step back": lambda cache: cache.remove(0, 6),
    "from the middle": lambda cache: cache.remove(0, 6, 7),
    "all of it": lambda cache: cache.remove(0, 0),
    "a copy": lambda cache: cache.copy_prefix(0, 1, 7),
    "a restored one": lambda cache: cache.restore(1, *cache.state(0)),
}


@pytest.mark.parametrize("make", [causal, lambda **sizes: sliding(3, memory=4, **sizes)], ids=["causal", "sliding"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_interrupt_leaves_whole_sequences_and_every_cell(make: Callable[..., CausalCache], operation: str) -> None:
    cache, after = filled(make), filled(make)
    OPERATIONS[operation](after)
    line = 0
    while True:
        line += 1
        other = copy.deepcopy(cache)
        if not interrupted(lambda other=other: OPERATIONS[operation](other), line):
            break
        for sequence in (0, 1, 7):
            found, allowed = other.positions(sequence).tolist(), [which.positions(sequence).tolist() for which in (cache, after)]
            partly = [p for p in allowed[0] if p in allowed[1] and (operation != "from the middle" or p < 6)]
            without = [[]] if operation == "a restored one" and sequence else []
            assert found in (*allowed, partly, *without), (operation, line)
        held: dict[int, list[int]] = {}
        for sequence in other._cells._rows:
            for cell, position in zip(other._cells.stored(sequence).tolist(), other.positions(sequence).tolist(), strict=True):
                held.setdefault(cell, []).append(position)
        assert all(len(set(positions)) == 1 for positions in held.values()), "a cell holds one position, whoever shares it"
        for sequence in (0, 1, 7):
            other.remove(sequence, 0)
        count = other._cells.count
        other.start_forward(list(range(count)), [3] * count)
        assert len(set(other._cells.new.tolist())) == count
    assert line > 20


def test_a_cell_that_two_hold_is_not_given_to_a_third() -> None:
    """Where an interrupt has lost count: it is found again before the cache is called full."""
    cache = filled(lambda **sizes: sliding(3, memory=4, **sizes))
    assert isinstance(cache, SlidingWindowCache)
    cache._cells.free = 0
    cache.start_forward([8], [0])
    assert cache.positions(0).tolist() == [5, 6, 7, 8]
