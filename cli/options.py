"""Options as every command writes them: one spelling, one environment twin each, and the groups that several commands share."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer


def option(text: str, *names: str, twin: bool = True, **settings: Any) -> Any:
    """A Typer option with its help text; `--max-tokens` can be set as TOYLLM_MAX_TOKENS too unless `twin` is off.

    Prompts, output paths and `--force` have no twin: what is written, and where, is said on the command line.
    """
    long = next(n for n in names if n.startswith("--")).split("/")[0]
    variable = "TOYLLM_" + long.removeprefix("--").replace("-", "_").upper()
    return typer.Option(*names, help=text, envvar=variable if twin else None, show_envvar=False, **settings)


def whole_text(context: typer.Context, parameter: typer.CallbackParam, value: list[str] | None) -> list[str] | None:
    """The stop text in TOYLLM_STOP is one, spaces included, where Typer would make each word one."""
    variable = os.environ.get(str(parameter.envvar))
    given = context.get_parameter_source(str(parameter.name))
    return [variable] if variable and given and given.name == "ENVIRONMENT" else value


DEFAULT_MODEL = "tales-gpt2"
Model = Annotated[
    str,
    option(
        "A folder, a .safetensors file, an embedded model (tales-gpt2 or tales-gpt-oss), or a repo id in the local Hugging Face cache.",
        "--model",
        "-m",
    ),
]
Json = Annotated[bool, option("One JSON document on stdout.", "--json")]
PromptIds = Annotated[str | None, option('Token ids instead of text: "464 3290".', "--prompt-ids", twin=False, metavar="IDS")]
Stats = Annotated[bool, option("Print counts, times and rates to stderr.", "--stats")]

Group = dict[str, tuple[Any, Any]]  # parameter -> (type, default)


def number(kind: Any, text: str, *names: str, shown: str | bool = False, **settings: Any) -> tuple[Any, None]:
    """An option that is None unless given; `shown` says what that comes to."""
    return Annotated[kind | None, option(text, *names, show_default=shown, **settings)], None


SAMPLING: Group = {
    "max_tokens": number(int, "The most tokens to add.", "--max-tokens", shown="200"),
    "temperature": number(float, "0 takes the likeliest token; higher is more varied.", "--temperature", "-t", shown="0.8"),
    "top_k": number(int, "Draw from the K likeliest tokens.", "--top-k", shown="off"),
    "top_p": number(float, "Draw from the likeliest tokens that together reach this probability.", "--top-p", shown="0.95"),
    "min_p": number(float, "Drop tokens below this share of the likeliest one's probability.", "--min-p", shown="off"),
    "repetition_penalty": number(float, "Divide the logits of tokens in the context by this.", "--repetition-penalty", shown="1, off"),
    "presence_penalty": number(float, "Subtract this from the logits of tokens in the context.", "--presence-penalty", shown="0"),
    "frequency_penalty": number(float, "Subtract this for each time a token is in the context.", "--frequency-penalty", shown="0"),
    "seed": number(int, "The seed of the draws.", "--seed", shown="drawn, and said"),
    "stop": number(list[str], "End before this text; may be given several times.", "--stop", metavar="TEXT", callback=whole_text),
    "logprobs": number(int, "Report each token's log-probability, and the N likeliest.", "--logprobs", metavar="N"),
}

RUNNING: Group = {
    "context_size": number(int, "Positions of the KV cache: prompt and continuation.", "--context", shown="the model's, or what fits"),
    "prefill_chunk": (Annotated[int, option("Tokens of the prompt a pass.", "--prefill-chunk")], 512),
    "cache_dtype": (
        Annotated[str, option("How keys and values are kept: f32, bf16, or q8 (8 bits).", "--cache-dtype")],
        "f32",
    ),
    "moe": (
        Annotated[str, option("How experts are mixed: auto, single, grouped, all, or budget (which drops some).", "--moe")],
        "auto",
    ),
    "tokens_per_expert_ratio": (
        Annotated[float, option("What --moe budget lets an expert take: 1 is the average share.", "--tokens-per-expert-ratio")],
        1.0,
    ),
    "threads": number(int, "Threads of the kernels.", "--threads", shown="the physical cores"),
    "backend": (Annotated[str, option("Which kernels: auto, avx512, avx2, portable, or numpy (the references).", "--backend")], "auto"),
    "exact": (
        Annotated[bool, option("Arithmetic in f32 throughout; else activations have 16 bits before MXFP4 weights.", "--exact")],
        False,
    ),
    "activations": (
        Annotated[str, option("What prompts are multiplied in: f32, or bf16 (8 bits, often twice as fast).", "--activations")],
        "f32",
    ),
    "weights": (
        Annotated[str, option("How dense weights are held: stored, or q8 (8 bits in blocks of 32, made while loading).", "--weights")],
        "stored",
    ),
    "attention": (
        Annotated[str, option("fused, or plain: scores, mask, softmax, values one by one.", "--attention")],
        "fused",
    ),
    "poison_cache": (
        Annotated[bool, option("Fill the KV cache with NaN, so that reading what was never written shows.", "--poison-cache")],
        False,
    ),
    "no_preload": (Annotated[bool, option("Do not read a file ahead that is not in memory yet.", "--no-preload")], False),
}


def takes(**groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of each group; they reach it as one dict a group, under the group's name."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name not in groups]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for group in groups.values()
            for name, (kind, default) in group.items()
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared

        @functools.wraps(command)
        def run(**given: Any) -> None:
            parts = {name: {key: given.pop(key) for key in group} for name, group in groups.items()}
            command(**given, **parts)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate
