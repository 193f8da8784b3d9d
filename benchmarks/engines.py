"""One engine in a process of its own: toyllm, llama.cpp or transformers, which peers.py asks to be timed.

    python benchmarks/engines.py ENGINE MODEL THREADS OPTIONS

reads a request a line from stdin, in JSON, and answers each with a line: {"prompt": 128, "tokens": 32} runs a prompt of that many ids and
then that many steps of one id each, and answers the seconds of both; "save" in it names a file for the logits [tokens + 1, V] behind the
prompt and each step. The first line of all says what runs: versions and settings.

All engines do the same work: fixed ids, one sequence, a KV cache that is emptied between requests (transformers makes a new one), logits
of the last position only, no sampling. Only the engine asked for is imported: the environments of the peers need not have toyllm.
"""

import ctypes
import json
import os
import platform
import re
import sys
import time
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np

ROOM = 1024  # positions of the KV cache


class Engine(Protocol):
    """What is timed."""

    vocabulary: int
    about: dict[str, str]

    def start(self) -> None:
        """Empty the KV cache."""

    def step(self, ids: np.ndarray) -> None:
        """Run ids, int32 [T], behind those that ran before; done when it returns."""

    def logits(self) -> np.ndarray:
        """Of the last id that ran, f32 [V]."""


class Toyllm:
    """The Python API, `toyllm.load(**options)`; the option "round_as" "llama.cpp" is for comparing, and slow."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        import toyllm
        from toyllm.kernels.threads import threading_layer

        rounding = options.pop("round_as", None)
        self.model = toyllm.load(model, threads=threads, **options)
        if rounding == "llama.cpp":
            self.model.kernels = rounding_as_llama_cpp(self.model.kernels)
        self.cache = self.model.new_cache(ROOM)
        self.vocabulary = self.model.vocab_size
        self.out = np.empty((1, self.vocabulary), np.float32)
        self.about = {"toyllm": toyllm.__version__, "numba": version("numba")}
        self.about |= {"backend": self.model.kernels.name, "threading layer": threading_layer()}

    def start(self) -> None:
        self.cache.remove(0, 0)

    def step(self, ids: np.ndarray) -> None:
        first = self.cache.length()
        self.model.forward(ids, np.arange(first, first + len(ids)), np.zeros(len(ids), np.int64), self.cache, out=self.out)

    def logits(self) -> np.ndarray:
        return self.out[0]


def rounding_as_llama_cpp(kernels: Any) -> Any:
    """toyllm's kernels behind llama.cpp's roundings of activations.

    To bf16 before matrices in bf16, but for the router, which its files have in f32; before MXFP4 to 8 bits
    in blocks of 32 with a scale in f16.
    """
    from dataclasses import replace

    from toyllm.kernels.dtypes import BF16, to_bf16, widen

    def matmul(x, w, *others) -> None:
        router = w.shape[1] <= 128  # experts; no other matrix has so few outputs
        kernels.matmul(widen(to_bf16(x)) if w.dtype == BF16 and not router else x, w, *others)

    def matmul_mxfp4(x, *others) -> None:
        blocks = x.reshape(len(x), -1, 32)
        scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
        codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
        rounded = codes * scale.astype(np.float16).astype(np.float32)
        kernels.matmul_mxfp4(rounded.reshape(x.shape), *others)

    return replace(kernels, matmul=matmul, matmul_mxfp4=matmul_mxfp4, single=None)


class LlamaCpp:
    """llama.cpp through the C interface that llama-cpp-python ships, with its defaults."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        import llama_cpp as api

        self.api = api
        self.silent = api.llama_log_callback(lambda *_: None)  # kept: the library holds no reference
        api.llama_log_set(self.silent, ctypes.c_void_p())
        api.llama_backend_init()
        loaded = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = ROOM, threads, threads
        for name, value in options.items():
            setattr(settings, name, value)
        self.context = api.llama_init_from_model(loaded, settings)
        if not loaded or not self.context:
            raise RuntimeError(f"llama.cpp does not load {model}")
        self.memory = api.llama_get_memory(self.context)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
        features = re.findall(r"(\w+) = 1", api.llama_print_system_info().decode())
        self.about = {"llama-cpp-python": api.__version__, "built with": " ".join(features)}

    def start(self) -> None:
        self.api.llama_memory_clear(self.memory, False)

    def step(self, ids: np.ndarray) -> None:
        tokens = (self.api.llama_token * len(ids)).from_buffer_copy(ids)
        if status := self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode: status {status}")
        self.api.llama_synchronize(self.context)

    def logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocabulary,)).copy()


class Transformers:
    """Hugging Face transformers on torch, eager, in the dtype that the options name."""

    def __init__(self, model: str, threads: int, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options["dtype"])).eval()
        self.vocabulary = self.model.config.vocab_size
        self.about = {"torch": torch.__version__, "transformers": version("transformers")}

    def start(self) -> None:
        self.past = None

    def step(self, ids: np.ndarray) -> None:
        tokens = self.torch.from_numpy(ids).long()[None]
        self.output = self.model(tokens, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past = self.output.past_key_values

    def logits(self) -> np.ndarray:
        return self.output.logits[0, -1].float().numpy()


ENGINES = {"toyllm": Toyllm, "llama.cpp": LlamaCpp, "transformers": Transformers}


def token_ids(count: int, vocabulary: int) -> np.ndarray:
    """The ids that every engine runs, int32."""
    return np.random.default_rng(0).integers(0, vocabulary, count, np.int32)


def answer(engine: Engine, prompt: int, tokens: int, save: str | None = None) -> dict[str, float]:
    """Run one request: seconds of the prompt and of the steps behind it."""
    ids = token_ids(prompt + tokens, engine.vocabulary)
    kept = []
    engine.start()
    began = time.perf_counter()
    engine.step(ids[:prompt])
    between = time.perf_counter()
    for i in range(prompt, prompt + tokens):
        if save:
            kept.append(engine.logits().copy())
        engine.step(ids[i : i + 1])
    ended = time.perf_counter()
    if save:
        np.save(save, np.stack([*kept, engine.logits()]))
    return {"prompt": between - began, "tokens": ended - between}


def main() -> None:
    name, model, threads, options = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever an engine prints goes to stderr
    engine = ENGINES[name](model, int(threads), json.loads(options))
    print(json.dumps({"python": platform.python_version()} | engine.about), file=replies)
    for line in sys.stdin:
        print(json.dumps(answer(engine, **json.loads(line))), file=replies)


if __name__ == "__main__":
    main()
