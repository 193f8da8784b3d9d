"""Models that speak harmony, for tests: a small random checkpoint, and a stand-in that says what it is told.

    python tests/harmony_model.py '["<|channel|>final<|message|>Hello.<|return|>"]' chat -m scripted

runs `toyllm` on the stand-in, which writes a byte in a hundredth of a second.
"""

import functools
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from toyllm.cli import running
from toyllm.cli.main import main
from toyllm.models.cache import CausalCache
from toyllm.models.config import GenerationDefaults
from toyllm.models.tokenizer import Tokenizer, parse

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@functools.cache
def maker() -> ModuleType:
    """benchmarks/make_harmony.py, as when it is run as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("make_harmony")


@functools.cache
def tokenizer() -> Tokenizer:
    """A token for each byte, ids 0 to 255; gpt-oss's special tokens from 256 on."""
    library = parse("bytes", json.dumps(maker().tokenizer_of(None)).encode())
    return Tokenizer(library, {i: token.content for i, token in library.get_added_tokens_decoder().items()})


class Scripted:
    """A stand-in for a model: in each turn its likeliest tokens are those of the next answer, and then <|return|>.

    `fed` are the ids of each pass. Ctrl-C comes in pass number `interrupt`, counted from 0, after the cache has taken its cells.
    """

    vocab_size = 280
    prefill_chunk, cache_dtype, threads, changes = 512, "f32", 1, None
    mixing = SimpleNamespace(algorithm="auto", ratio=1.0, ran={"single"}, dropped=0)
    kernels = SimpleNamespace(name="numpy", mixing=mixing, activations="f32", weights="stored", exact=False)

    def __init__(self, *answers: str, context: int = 4096, interrupt: int | None = None, pause: float = 0) -> None:
        self.tokenizer = tokenizer()
        self.answers = [self.tokenizer.encode(answer) for answer in answers]
        self.files, self.defaults = SimpleNamespace(name="scripted"), GenerationDefaults()
        self.config = SimpleNamespace(context=context, bos_token_id=(), eos_token_id=())
        self.interrupt, self.pause = interrupt, pause
        self.fed: list[list[int]] = []

    def context_for(self, wanted: int | None) -> int:
        return wanted or self.config.context

    def new_cache(self, context: int, keep: int = 0) -> CausalCache:
        return CausalCache(1, 1, 1, 1, context, 512)

    def forward(self, tokens: Any, positions: Any, sequences: Any, cache: CausalCache, out: np.ndarray | None = None) -> np.ndarray:
        cache.start_forward(np.asarray(positions), np.asarray(sequences))
        self.fed.append([int(i) for i in tokens])
        if len(self.fed) - 1 == self.interrupt:
            raise KeyboardInterrupt
        time.sleep(self.pause)
        if out is None:  # a prompt
            self.script = self.answers.pop(0)
        logits = np.zeros((1, self.vocab_size), np.float32) if out is None else out
        logits[:] = 0
        if not len(logits):
            return logits
        logits[0, self.script.pop(0) if self.script else self.tokenizer.id_of("<|return|>")] = 1
        return logits


if __name__ == "__main__":
    from toyllm.cli import chat, generate

    model = Scripted(*json.loads(sys.argv.pop(1)), pause=0.01)
    for command in (running, chat, generate):
        command.load = lambda name, options, changes=(): model
    main()
