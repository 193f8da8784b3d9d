"""Arguments of caches that make no sense: one line, and nothing has changed."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toyllm.kernels.errors import ToyllmError
from toyllm.models.cache import (
    CacheConfig,
    CausalCache,
    EncoderCache,
    WrapperCache,
)

reading = runpy.run_path(str(Path(__file__).parent / "cache_reading.py"))
L, G, DH, causal, sliding, chunked, forward, put, rows, seen = (
    reading[name] for name in ("L", "G", "DH", "causal", "sliding", "chunked", "forward", "put", "rows", "seen")
)


BAD: dict[str, tuple[Callable[[CausalCache], Any], str]] = {
    "no tokens": (lambda c: c.start_forward([], []), "positions: expected a list of at least one integer, all from 0 on"),
    "other numbers of them": (lambda c: c.start_forward([1, 2], [0]), "positions and sequences: expected as many of both, found 2 and 1"),
    "negative positions": (lambda c: c.start_forward([-1], [0]), "positions: expected"),
    "negative sequences": (lambda c: c.start_forward([1], [-1]), "sequences: expected"),
    "fractions": (lambda c: c.start_forward([1.5], [0]), "positions: expected"),
    "text": (lambda c: c.start_forward("ab", [0]), "positions: expected"),
    "ragged": (lambda c: c.start_forward([[1], [1, 2]], [0]), "positions: expected"),
    "nothing at all": (lambda c: c.start_forward(None, None), "positions: expected"),
    "too far": (lambda c: c.start_forward([2**64], [0]), "positions: expected"),
    "far": (lambda c: c.start_forward([2**63 - 1], [0]), "positions: expected"),
    "a batch of another size": (
        lambda c: c.put(rows([1], 0), rows([1], 0)),
        r"key: expected \[3, 2, 3\], a row a token of the batch, found \[1, 2, 3\]",
    ),
    "values of another size": (lambda c: c.put(rows([1] * 3, 0), rows([1], 0)), "value: expected"),
    "keys of other heads": (lambda c: c.put(np.zeros((3, G + 1, DH), np.float32), rows([1] * 3, 0)), "key: expected"),
    "keys that are none": (lambda c: c.put("keys", rows([1] * 3, 0)), "key: expected an array of numbers"),
    "no such layer": (lambda c: c.set_layer(L), f"layer {L}: expected 0 to {L - 1}"),
    "a layer from behind": (lambda c: c.set_layer(-1), "layer -1: expected 0 to 1"),
    "outside the batch": (lambda c: c.set_causal(False, [3]), "except_ 3: expected indices of the batch, 0 to 2"),
    "before the batch": (lambda c: c.set_causal(True, [-1]), "except_ -1: expected an integer from 0 on"),
    "resume before": (lambda c: c.can_resume(0, -1), "position -1: expected an integer from 0 on"),
    "resume nobody": (lambda c: c.can_resume(-3, 1), "sequence -3: expected an integer from 0 on"),
    "copy to nobody": (lambda c: c.copy_prefix(0, -1, 1), "sequence -1: expected an integer from 0 on"),
    "copy less than nothing": (lambda c: c.copy_prefix(0, 1, -1), "length -1: expected an integer from 0 on"),
    "remove before": (lambda c: c.remove(0, -1), "begin -1: expected an integer from 0 on"),
    "remove backwards": (lambda c: c.remove(0, 3, 2), "end 2: expected an integer from 3 on"),
    "a configuration of another kind": (lambda c: causal().set_config({"padding": 4}), "set_config: expected a CacheConfig, found dict"),
    "no configuration": (lambda c: CacheConfig(padding=0), "padding 0: expected an integer from 1 on"),
    "no mask": (lambda c: CacheConfig(mask_dtype=np.int32), "mask_dtype <class 'numpy.int32'>: expected bool or a float dtype"),
    "no dtype": (lambda c: CacheConfig(mask_dtype="what"), "mask_dtype 'what': expected bool or a float dtype"),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments_that_make_no_sense_are_one_line_and_change_nothing(case: str) -> None:
    call, message = BAD[case]
    cache = causal()
    forward(cache, [0, 1, 2], [0] * 3)
    with pytest.raises(ToyllmError, match=message) as refused:
        call(cache)
    assert "\n" not in str(refused.value)
    assert seen(cache) == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: causal(layers=0), "layers 0: expected an integer from 1 on"),
        (lambda: causal(capacity=2.5), "capacity 2.5: expected an integer from 1 on"),
        (lambda: causal(max_batch=True), "max_batch True: expected"),
        (lambda: causal(dtype="f16"), "f16: expected"),
        (lambda: sliding(0), "window 0: expected an integer from 1 on"),
        (lambda: sliding(5, memory=4), "memory 4: expected an integer from 5 on"),
        (lambda: chunked(0), "chunk 0: expected an integer from 1 on"),
        (lambda: EncoderCache(L, G, DH, dtype="f16"), "f16: expected"),
        (lambda: EncoderCache(0, G, DH), "layers 0: expected"),
        (lambda: WrapperCache([]), "expected at least one cache"),
    ],
)
def test_sizes_that_are_none_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ToyllmError, match=message):
        make()
