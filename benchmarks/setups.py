"""What peers.py compares: models, the work they are given, who runs them, and what is aimed at. A row of the tables is a line here."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Work:
    """A prompt to be timed, or the steps of one token behind it."""

    name: str
    prompt: int
    tokens: int = 0  # 0: the prompt is timed


@dataclass(frozen=True)
class Check:
    """How it is shown that an engine computes toyllm's model, where as they are timed the two round too differently to tell."""

    how: str
    ours: dict[str, Any]  # options of toyllm
    theirs: dict[str, Any]  # and of the engine
    tolerance: float


@dataclass(frozen=True)
class Runner:
    """A row of the tables: an engine and how it runs. The first of a model is toyllm as it comes."""

    name: str
    engine: str  # of engines.ENGINES
    options: dict[str, Any] = field(default_factory=dict)
    works: tuple[str, ...] = ()  # how their names begin; none: all
    tolerance: float | None = 1e-4  # of logits against toyllm's, max|a - b| / max|b|, the median over positions
    check: Check | None = None  # what decides, where `tolerance` is None
    weight_factor: float = 1  # bytes of weights that it reads, against the checkpoint's
    cache_bytes: int = 2  # of an element of its KV cache


@dataclass(frozen=True)
class Model:
    """A checkpoint, made here, and who runs it."""

    name: str
    title: str
    maker: tuple[str, ...]
    runners: tuple[Runner, ...]
    works: tuple[Work, ...]
    gigabytes: float  # on disk, GGUF included
    quick: bool = True


TOYLLM = Runner("toyllm", "toyllm", cache_bytes=4)
NARROW = (  # the kernels of lesser processors, decoding
    Runner("toyllm --backend avx2", "toyllm", {"backend": "avx2"}, ("decode at 128",), cache_bytes=4),
    Runner("toyllm --backend portable", "toyllm", {"backend": "portable"}, ("decode at 128",), cache_bytes=4),
)
PREFILL = Work("prefill of 512", 512)
SAME_ROUNDING = Check(
    "llama.cpp, f32 cache, no flash attention; toyllm with its roundings of activations",
    {"round_as": "llama.cpp"},
    {"flash_attn_type": 0, "type_k": 0, "type_v": 0},  # off; GGML_TYPE_F32
    tolerance=0.1,
)
BF16_PREFILL = Runner("toyllm --activations bf16", "toyllm", {"activations": "bf16"}, ("prefill",), tolerance=0.02, cache_bytes=4)
GPT_OSS = {
    "runners": (TOYLLM, replace(BF16_PREFILL, tolerance=0.1), Runner("llama.cpp", "llama.cpp", tolerance=None, check=SAME_ROUNDING)),
    "works": (Work("decode at 128", 128, 16), PREFILL),
}
MODELS = (
    Model(
        "gpt2",
        "GPT-2 124M, bf16",
        ("make_gpt2.py", "--dtype", "bf16"),
        (
            TOYLLM,
            Runner("toyllm --cache-dtype bf16", "toyllm", {"cache_dtype": "bf16"}, ("decode",), tolerance=0.02),
            BF16_PREFILL,
            *NARROW,
            Runner("llama.cpp BF16", "llama.cpp", tolerance=0.02),
            Runner("transformers bf16", "transformers", {"dtype": "bfloat16"}, tolerance=0.05),
            Runner("transformers f32", "transformers", {"dtype": "float32"}, weight_factor=2, cache_bytes=4),
        ),
        (Work("decode at 128", 128, 32), Work("decode at 1000", 1000, 16), PREFILL),
        gigabytes=0.6,
    ),
    Model("gpt-oss-4", "gpt-oss, 4 layers, full vocabulary, bf16 and MXFP4", ("make_gpt_oss.py", "--layers", "4"), **GPT_OSS, gigabytes=9),
    Model(
        "gpt-oss-8",
        "gpt-oss, 8 layers, full vocabulary, bf16 and MXFP4",
        ("make_gpt_oss.py", "--layers", "8"),
        **GPT_OSS,
        gigabytes=13.5,
        quick=False,
    ),
)
START = "toyllm generate 'Once upon a time' --max-tokens 1"


@dataclass(frozen=True)
class Goal:
    """What a runner is to reach: a ratio to another runner, a share of streaming or of a plain read, or seconds."""

    model: str
    work: str
    against: str
    goal: float
    stretch: float | None = None
    runner: str = "toyllm"


GOALS = (
    *(
        goal
        for cut in ("gpt-oss-4", "gpt-oss-8")
        for goal in (
            Goal(cut, "decode at 128", "llama.cpp", 1.4, 1.5),
            Goal(cut, "decode at 128", "streaming", 0.85, 0.95),
            Goal(cut, PREFILL.name, "llama.cpp", 4, 10),
            Goal(cut, PREFILL.name, "llama.cpp", 6, 10, runner=BF16_PREFILL.name),
        )
    ),
    *(Goal("gpt2", f"decode at {depth}", "llama.cpp BF16", 1.3, 1.6) for depth in (128, 1000)),
    *(Goal("gpt2", f"decode at {depth}", "transformers bf16", 2) for depth in (128, 1000)),
    Goal("gpt2", PREFILL.name, "transformers bf16", 1, 1.5),
    Goal("gpt2", PREFILL.name, "transformers bf16", 1.3, 1.5, runner=BF16_PREFILL.name),
    Goal("gpt2", PREFILL.name, "llama.cpp BF16", 3),
    Goal("gpt2", "decode at 128", "streaming", 0.7, runner="toyllm --backend avx2"),
    Goal("gpt2", "decode at 128", "streaming", 0.4, runner="toyllm --backend portable"),
    Goal("kernels", "attention_step[gpt_oss-8192-f32]", "a plain read", 0.6, 0.85),
    Goal("tales-gpt2", "start", "the clock", 0.8, 0.5),
)
