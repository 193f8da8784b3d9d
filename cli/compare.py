"""`toyllm compare`: two checkpoints, or two runs over the same tokens, and where they first part."""

import logging
import math
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..kernels.errors import ToyllmError
from . import output
from .against import read_options
from .options import RUNNING, Group, Json, PromptIds, number, option, takes, whole_text
from .prompt import read_prompt

if TYPE_CHECKING:
    from ..models.compare_dump import Dump
    from ..models.model import Model

log = logging.getLogger("toyllm")

DIFFERENT = 3
RUN: Group = {key: value for key, value in RUNNING.items() if key != "context_size"}  # the cache is as large as the run needs
RUN["prefill_chunk"] = (Annotated[int, option("Tokens of the prompt a pass; their activations are held.", "--prefill-chunk")], 64)
RUN_RTOL = 1e-4  # sums of f32 in another order come to some 1e-6
TOLERANCE: Group = {
    "rtol": number(float, "What is tolerated, as a share of the largest value of B's tensor.", "--rtol", shown="1e-4 for runs, else 0"),
    "atol": (Annotated[float, option("What is tolerated on top of that.", "--atol")], 0.0),
}


@takes(tolerance=TOLERANCE, running=RUN)
def compare(
    context: typer.Context,
    a: Annotated[str, typer.Argument(help="A model, as -m takes it elsewhere; or a file of activations.", metavar="A", show_default=False)],
    b: Annotated[
        str | None,
        typer.Argument(help="The model, or file, to hold it against; A where only options differ.", metavar="[B]", show_default=False),
    ] = None,
    prompt: Annotated[str | None, option("Compare runs over this text; - reads stdin.", "--prompt", twin=False)] = None,
    prompt_ids: PromptIds = None,
    map_file: Annotated[
        Path | None, option("A TOML or JSON file that says which of B's arrays is which activation.", "--map", metavar="FILE")
    ] = None,
    against_options: Annotated[
        str | None,
        option("Run B with these options, as one text, in place of those below.", "--against-options", metavar="OPTIONS"),
    ] = None,
    only: Annotated[
        list[str] | None, option("Compare only activations of this name or glob.", "--only", metavar="NAME", callback=whole_text)
    ] = None,
    show_all: Annotated[bool, option("Show all tensors, not only the first that depart.", "--all")] = False,
    json: Json = False,
    *,
    tolerance: dict[str, Any],
    running: dict[str, Any],
) -> None:
    """Compare two checkpoints or two runs. Exit code 3 where they differ.

    Two models are compared weight by weight, whatever the names and dtypes in their files. With a prompt, or where B is a .npz or
    .safetensors file of activations, runs are, and the first activation that departs is named.

    Such a file has what another implementation computed, under the names that `dump-tensor` lists for a prompt, or with a map from its own,
    and the token ids as "ids", unless a prompt is given. models/REFERENCES.md makes one from transformers in ten lines.

    An element departs where |a - b| > atol + rtol max|b|. Errors are max|a - b| / max|b|, over a tensor. NaN equals NaN. Without a
    tolerance weights of one dtype are to be equal bit for bit; another dtype with the same values is no difference, nor are names.
    """
    check_tolerance(context, tolerance)

    from ..models.compare_dump import is_dump

    if b is None and against_options is None:
        raise typer.BadParameter("with what? give a second model or file", ctx=context, param_hint="B")
    b = a if b is None else b
    dumped = is_dump(Path(a), mapped=False), is_dump(Path(b), mapped=map_file is not None)
    if map_file and not dumped[1]:
        raise typer.BadParameter(f"{b} is no .npz or .safetensors file", ctx=context, param_hint="--map")
    prompted = prompt is not None or prompt_ids is not None
    if not (any(dumped) or prompted or against_options):
        refuse(context, ("only", *RUN), "has no meaning for checkpoints; with a --prompt runs are compared")
        same = compare_checkpoints(a, b, (tolerance["rtol"] or 0.0, tolerance["atol"]), show_all, json)
    else:
        if all(dumped):
            refuse(context, ("prompt", "prompt_ids", "against_options", *RUN), "has no meaning for two files of activations")
        elif any(dumped):
            refuse(context, ("against_options",), "has no meaning where a file of activations is compared")
        elif not prompted:
            raise typer.BadParameter("runs need a text: give --prompt or --prompt-ids", ctx=context, param_hint="--against-options")
        given = read_prompt(context, prompt, prompt_ids) if prompted else None
        options = running if against_options is None else read_options(context, "--against-options", against_options, RUN)
        runs = open_runs((a, b), dumped, map_file, (running, options))
        rtol = RUN_RTOL if tolerance["rtol"] is None else tolerance["rtol"]
        same = compare_runs(runs, given, only or [], (rtol, tolerance["atol"]), show_all, json)
    if not same:
        raise typer.Exit(DIFFERENT)


def check_tolerance(context: typer.Context, tolerance: dict[str, Any]) -> None:
    """Refuse tolerances that nothing, or everything, would be within."""
    for name, value in tolerance.items():
        if value is not None and not 0 <= value < math.inf:
            raise typer.BadParameter(f"expected a number from 0, found {value:g}", ctx=context, param_hint=f"--{name}")


def refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Refuse options that have no meaning for what is compared, where the command line has them."""
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name in names and source and source.name == "COMMANDLINE":
            raise typer.BadParameter(why, ctx=context, param=parameter)


def compare_checkpoints(a: str, b: str, tolerance: tuple[float, float], show_all: bool, json: bool) -> bool:
    """Compare two models' weights; whether they agree."""
    from ..models.compare_weights import compare_checkpoints as compare
    from ..models.location import find_model
    from .compare_shown import show_checkpoints

    began = time.perf_counter()
    files = find_model(a), find_model(b)
    with output.byte_bar(f"comparing {a} and {b}") as progress:
        report = compare(*files, progress)
    show_checkpoints(report, (a, b), time.perf_counter() - began, tolerance, show_all=show_all, json=json)
    return report.agrees(*tolerance)


def open_runs(
    names: tuple[str, str], dumped: tuple[bool, bool], map_file: Path | None, options: tuple[dict[str, Any], dict[str, Any]]
) -> "tuple[Model | Dump, Model | Dump]":
    """The two runs' models, loaded, or files."""
    from ..models.compare_dump import open_dump
    from .running import load

    runs: list[Any] = [None, None]
    for i in (0, 1):
        if dumped[i]:
            runs[i] = open_dump(Path(names[i]), map_file if i else None)
    if not any(dumped):
        check_backends([running["backend"] for running in options])
    for i in sorted((0, 1), key=lambda i: options[i]["backend"] != "avx2"):  # whose kernels must be the first that are loaded
        if not dumped[i]:
            runs[i] = load(names[i], options[i])
    if not any(dumped):
        from ..models.compare_match import require_one_family

        require_one_family(*((model.files.name, model.family) for model in runs))
    return runs[0], runs[1]


def check_backends(names: list[str]) -> None:
    """Refuse two sets of kernels that one process cannot have."""
    from ..kernels.host import choose_backend

    if {choose_backend(name) for name in names} == {"avx512", "avx2"}:
        raise ToyllmError(
            "avx512 and avx2 kernels do not run in one process: write one run with `toyllm dump-tensor '*' --prompt TEXT --backend avx2 "
            "--save avx2.safetensors`, and compare the other with the file"
        )


def compare_runs(
    runs: "tuple[Model | Dump, Model | Dump]",
    given: str | list[int] | None,
    only: list[str],
    tolerance: tuple[float, float],
    show_all: bool,
    json: bool,
) -> bool:
    """Compare two runs over a prompt, or over the ids that a file has; whether they agree."""
    from ..models.compare_runs import compare_runs as compare
    from .compare_shown import show_runs

    ids = token_ids(runs, given)
    with output.token_bar("comparing") as progress:
        found = compare(*runs, ids, lambda name: not only or any(fnmatchcase(name, pattern) for pattern in only), progress)
    note_names(runs)
    show_runs(found, runs, ids, tolerance, show_all=show_all, json=json)
    return found.first(*tolerance) is None


def token_ids(runs: "tuple[Model | Dump, Model | Dump]", given: str | list[int] | None) -> list[int]:
    """The ids to run: the prompt's, those that a file has; none for two files. Raises ToyllmError where they are unknown or disagree."""
    from ..models.compare_dump import Dump
    from ..models.generation import encode_prompt
    from ..models.model import check_ids

    known = {run.path.name: ids for run in runs if isinstance(run, Dump) and (ids := run.ids())}
    models = [run for run in runs if not isinstance(run, Dump)]
    if given is not None and models:
        known = {"the prompt": encode_prompt(models[0], given)} | known
        if isinstance(given, str) and len(models) == 2 and models[1].tokenizer and encode_prompt(models[1], given) != known["the prompt"]:
            log.warning("the two tokenizers make other ids of this prompt; those of %s are run", models[0].files.name)
    if not known and models:
        path = next(run.path for run in runs if isinstance(run, Dump))
        raise ToyllmError(f"{path}: has no ids; give the text that it is of with --prompt, or its ids with --prompt-ids")
    (first, ids), *others = known.items() if known else [("", [])]
    for name, found in others:
        if found != ids:
            at = next((i for i, (x, y) in enumerate(zip(ids, found, strict=False)) if x != y), min(len(ids), len(found)))
            figures = f"{len(ids)} and {len(found)} ids, the first to differ at position {at}"
            raise ToyllmError(f"{first} and {name} are of other tokens: {figures}; compare runs over the same")
    for model in models:
        check_ids(ids, model.vocab_size)
    return ids if models else []


def note_names(runs: "tuple[Model | Dump, Model | Dump]") -> None:
    """Say what of the files was not compared."""
    from ..models.compare_dump import Dump

    for run in runs:
        if isinstance(run, Dump) and run.unknown:
            log.info("%s: %d of its arrays stand for no activation, such as %s", run.path, len(run.unknown), run.unknown[0])
        if isinstance(run, Dump) and run.unmatched:
            log.info("%s: has nothing of these names in the map: %s", run.path, ", ".join(run.unmatched))
