"""Options as every command writes them: one spelling, and an environment twin for each."""

from typing import Annotated, Any

import typer


def option(text: str, *names: str, twin: bool = True, **settings: Any) -> Any:
    """A Typer option with its help text; `--max-tokens` can be set as TOYLLM_MAX_TOKENS too unless `twin` is off.

    Prompts, output paths and `--force` have no twin: what is written, and where, is said on the command line.
    """
    long = next(n for n in names if n.startswith("--")).split("/")[0]
    variable = "TOYLLM_" + long.removeprefix("--").replace("-", "_").upper()
    return typer.Option(*names, help=text, envvar=variable if twin else None, show_envvar=False, **settings)


Model = Annotated[
    str,
    option("A folder, a .safetensors file, an embedded model (tales-gpt2), or a repo id in the local Hugging Face cache.", "--model", "-m"),
]
Json = Annotated[bool, option("One JSON document on stdout.", "--json")]
PromptIds = Annotated[str | None, option('Token ids instead of text: "464 3290".', "--prompt-ids", twin=False, metavar="IDS")]
Threads = Annotated[int | None, option("Threads of the kernels.", "--threads", show_default="the physical cores")]
Backend = Annotated[str, option("Which kernels: auto, avx512, avx2, portable, or numpy (the references).", "--backend")]

DEFAULT_MODEL = "tales-gpt2"
