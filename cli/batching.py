"""Options for many prompts, and for several samples of one: what they are, and what does not go together with them."""

from typing import Annotated

import typer

from .changing import CHANGING
from .lasting import on_command_line
from .options import Group, number, option

BATCHING: Group = {
    "input": (
        Annotated[
            str | None,
            option("Continue each prompt of FILE, a JSON object a line; - reads stdin.", "--input", twin=False, metavar="FILE"),
        ],
        None,
    ),
    "answers": (
        Annotated[
            str | None,
            option("Write the answers to FILE, and go on where it ends. Without, stdout.", "--output", twin=False, metavar="FILE"),
        ],
        None,
    ),
    "batch_size": number(
        int, "Sequences that run together, of --input or --samples.", "--batch-size", metavar="N", shown="8, or what fits"
    ),
    "samples": (Annotated[int, option("Samples of each prompt; each one's seed is one more.", "--samples", "-n", metavar="N", min=1)], 1),
}


# What is about one prompt, and so has no meaning with --input; and what is about one sequence, which has none with --samples either.
ONE_PROMPT = ("prompt", "prompt_ids", *CHANGING)
ONE_SEQUENCE = ("chat", "session", "context_shift", "keep")


def check_batching(context: typer.Context) -> None:
    """Refuse what has no meaning with many prompts or samples, wherever it was set, and on the command line what has none without."""
    given = context.params
    many = "--input" if given["input"] is not None else "--samples" if given["samples"] > 1 else None

    def refuse(name: str, text: str) -> None:
        hint = "PROMPT" if name == "prompt" else "--" + name.removesuffix("_file").replace("_", "-")
        raise typer.BadParameter(f"has no meaning {text}", ctx=context, param_hint=hint)

    for name in (*ONE_PROMPT, *ONE_SEQUENCE) if many == "--input" else ONE_SEQUENCE if many else ():
        if given[name] or (name == "keep" and given[name] is not None):
            refuse(name, f"with {many}")
    if given["answers"] is not None and given["input"] is None:
        refuse("output", "without --input")
    if not many and on_command_line(context, "batch_size"):
        refuse("batch_size", "without --input or --samples")
