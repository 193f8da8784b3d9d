"""`toyllm dump-tensor`: the tensors inside a model, weights and activations: a list, their values, what these come to, plots, files."""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..kernels.errors import ToyllmError
from .changing import CHANGING, changes_entry, read_changes
from .options import DEFAULT_MODEL, RUNNING, Group, Json, Model, PromptIds, option, takes
from .prompt import read_prompt
from .running import settings_entry

if TYPE_CHECKING:
    from ..models.changes import Change
    from ..models.checkpoint import Checkpoint
    from ..models.model import Model as LoadedModel
    from ..models.tensor_values import Values

RUN: Group = {key: value for key, value in RUNNING.items() if key != "context_size"}  # the cache is as large as the run needs
LAYOUT: Group = {
    "edge_items": (Annotated[int, option("Items shown at each end of an axis that is cut.", "--edge-items", metavar="N", min=0)], 3),
    "precision": (Annotated[int, option("Digits after the point.", "--precision", metavar="N", min=0, max=1000)], 4),
    "threshold": (Annotated[int, option("Elements above which axes are cut.", "--threshold", metavar="N", min=0)], 1000),
    "full": (Annotated[bool, option("Show every element.", "--full")], False),
    "scientific": (Annotated[bool, option("Write 1.2345e-01; --precision 8 is then exact for f32, 16 for f64.", "--scientific")], False),
}
IMAGES = (".png", ".svg", ".pdf")
ACTIVATION = re.compile(r"embed|norm_f|logits|blocks\b.*")


@takes(layout=LAYOUT, changing=CHANGING, running=RUN)
def dump_tensor(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Names or globs, such as 'h.*.ln_1.*'; without any, all are listed.", metavar="[NAME]...", show_default=False),
    ] = None,
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[
        str | None, option("Run this text, - reads stdin; names are then activations: blocks.0.attn.weights.", "--prompt", twin=False)
    ] = None,
    prompt_ids: PromptIds = None,
    step: Annotated[int, option("The pass over the Nth token that greedy decoding adds; 0: the prompt.", "--step", metavar="N", min=0)] = 0,
    regex: Annotated[bool, option("Names are regular expressions, found anywhere in a name.", "--regex")] = False,
    only_list: Annotated[bool, option("Only list: name, dtype, shape, bytes, shard.", "--list")] = False,
    stats: Annotated[bool, option("Only a table of statistics, a row a tensor.", "--stats")] = False,
    plot: Annotated[bool, option("A histogram and, of a matrix, a heat map; --plot FILE.png writes an image.", "--plot")] = False,
    save: Annotated[
        Path | None, option("Write a .npy, .npz, .safetensors, .csv or .json file.", "--save", twin=False, metavar="FILE")
    ] = None,
    force: Annotated[bool, option("Write over a file that is there.", "--force", twin=False)] = False,
    slices: Annotated[str | None, option('A part of each tensor, as NumPy takes it: "0, :5, -3:".', "--slice", metavar="SLICE")] = None,
    raw: Annotated[bool, option("Show bits in hexadecimal, and MXFP4 as blocks with their scales.", "--raw/--decoded")] = False,
    no_header: Annotated[bool, option("Leave out the line of facts above the values.", "--no-header")] = False,
    json: Json = False,
    *,
    layout: dict[str, Any],
    changing: dict[str, Any],
    running: dict[str, Any],
) -> None:
    """Show tensors: weights or, with a prompt, activations of a real run.

    Only what is selected is read, and statistics are of that: min, max, mean and std of its finite values.

    Activations can be changed as they are computed: patched, then scaled, then added to, then ablated; what is shown is what was computed
    with. Positions count from 0 over prompt and steps; negative ones count back from the prompt's end.
    """
    one_of(context, {"--list": only_list, "--stats": stats, "--plot": plot, "--save": save})
    one_of(context, {"--json": json, "--plot": plot, "--save": save})
    one_of(context, {"--list": only_list, "--slice": slices})
    one_of(context, {"--raw": raw, "--stats": stats, "--plot": plot, "--save": save})
    patterns, image = split_image(names or []) if plot else (names or [], None)
    if not patterns and (plot or save or slices):
        raise typer.BadParameter("which tensors? give names or globs; without, all are listed", ctx=context, param_hint="NAME")
    has_prompt = prompt is not None or prompt_ids is not None
    if step and not has_prompt:
        raise typer.BadParameter("a step follows a prompt; give --prompt or --prompt-ids", ctx=context, param_hint="--step")
    refuse_changes(context, has_prompt)
    prepare_files(save, image, force)

    listing = only_list or not (patterns or stats)
    if has_prompt:
        text_or_ids, changes = read_prompt(context, prompt, prompt_ids), read_changes(context, changing)
        loaded, ids = load_changed(model, text_or_ids, step, changes, running)
        found, checkpoint = find_activations(loaded, ids, step, patterns, regex, listing), None
        said = {"settings": settings_entry(loaded, len(ids) + step) | {"step": step} | changes_entry(loaded)}
    else:
        found, checkpoint = find_weights(model, patterns, regex)
        said = {}

    from . import tensors

    if listing:
        tensors.show_list(found, checkpoint, json, said)
        return
    found = [values.part(slices) for values in found]
    if save:
        tensors.save(save, found, force)
    elif image:
        tensors.save_image(image, found, force)
    elif stats:
        tensors.show_statistics(found, json, said)
    elif plot:
        tensors.show_plots(found, slices, header=not no_header)
    else:
        tensors.show_values(found, checkpoint, layout, slices, raw=raw, header=not no_header, json=json, said=said)


def refuse_changes(context: typer.Context, has_prompt: bool) -> None:
    """Refuse a change of an activation on a command line that runs nothing."""
    for name in () if has_prompt else CHANGING:
        source = context.get_parameter_source(name)
        if source and source.name == "COMMANDLINE":
            option = "--map" if name == "map_file" else f"--{name}"
            raise typer.BadParameter("has no meaning without a run; give --prompt or --prompt-ids", ctx=context, param_hint=option)


def one_of(context: typer.Context, options: dict[str, Any]) -> None:
    """Refuse a command line that has two of these options."""
    given = [name for name, value in options.items() if value]
    if len(given) > 1:
        raise typer.BadParameter("give one of them", ctx=context, param_hint=", ".join(given))


def split_image(names: list[str]) -> tuple[list[str], Path | None]:
    """The names and, where one of them is an image file's, that: `--plot` is a flag, so that it swallows no tensor's name."""
    images = [name for name in names if name.lower().endswith(IMAGES)]
    return [name for name in names if name not in images[-1:]], Path(images[-1]) if images else None


def prepare_files(save: Path | None, image: Path | None, force: bool) -> None:
    """Refuse a file that cannot be written before anything is read or run for it."""
    if save is None and image is None:
        return
    from ..models.tensor_save import FORMATS, check_target

    if save is not None:
        check_target(save, tuple(FORMATS), force)
    if image is not None:
        from .plot import require_matplotlib

        check_target(image, IMAGES, force)
        require_matplotlib()


def matcher(pattern: str, regex: bool) -> Callable[[str], bool]:
    """Whether a name is meant: the very name, a glob, or a regular expression. Raises ToyllmError for one that is none."""
    if not regex:
        return lambda name: name == pattern or fnmatchcase(name, pattern)
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ToyllmError(f"--regex {pattern!r}: not a regular expression: {error}") from error
    return lambda name: compiled.search(name) is not None


def choose(patterns: list[str], regex: bool, names: Iterable[str], unknown: Callable[[str], ToyllmError]) -> list[str]:
    """Those of `names` that any pattern means, in their order; all, without patterns. Raises `unknown` of a pattern that means none."""
    names, matches = list(names), [matcher(pattern, regex) for pattern in patterns]
    for pattern, match in zip(patterns, matches, strict=True):
        if not any(map(match, names)):
            raise unknown(pattern)
    return [name for name in names if not matches or any(match(name) for match in matches)]


def nearest(pattern: str, names: Iterable[str]) -> str:
    """A few names that look like `pattern`, as the end of an error message."""
    close = get_close_matches(pattern, names, 3, 0.5)
    return f"did you mean {' or '.join(close)}?" if close else "`toyllm dump-tensor` without a name lists them"


def find_weights(model: str, patterns: list[str], regex: bool) -> "tuple[list[Values], Checkpoint]":
    """The weights that the patterns mean. Nothing but headers is read."""
    from ..models.checkpoint import open_checkpoint
    from ..models.location import find_model
    from ..models.tensor_values import weights

    checkpoint = open_checkpoint(find_model(model))
    known = weights(checkpoint)

    def unknown(pattern: str) -> ToyllmError:
        if ACTIVATION.fullmatch(pattern):
            return ToyllmError(f"{pattern}: an activation, which only a run has: give it a --prompt or --prompt-ids")
        return ToyllmError(f"{model}: no tensor {pattern!r}; {nearest(pattern, known)}")

    return [known[name] for name in choose(patterns, regex, known, unknown)], checkpoint


def load_changed(
    model: str, prompt: str | list[int], step: int, changes: "list[Change]", running: dict[str, Any]
) -> "tuple[LoadedModel, list[int]]":
    """The model, with these changes made where it runs, and the prompt's ids."""
    from ..models.generation import encode_prompt
    from .running import load

    loaded = load(model, running, changes)
    ids = encode_prompt(loaded, prompt)
    return (loaded.changed(changes, len(ids), len(ids) + step) if changes else loaded), ids


def find_activations(loaded: "LoadedModel", ids: list[int], step: int, patterns: list[str], regex: bool, listing: bool) -> "list[Values]":
    """The activations that the patterns mean, of a run over the prompt; where they are only to be listed, without their values."""
    import numpy as np

    from ..models.activations import record
    from ..models.tensor_values import of_array, weights

    matches = [matcher(pattern, regex) for pattern in patterns]
    arrays, kinds = record(loaded, ids, lambda name: not listing and (not matches or any(match(name) for match in matches)), step)

    def unknown(pattern: str) -> ToyllmError:
        if any(map(matcher(pattern, regex), weights(loaded.checkpoint))):
            return ToyllmError(f"{pattern}: a weight, not an activation of a run: leave out the prompt")
        return ToyllmError(f"{loaded.files.name}: no activation {pattern!r}; {nearest(pattern, kinds)}")

    names = choose(patterns, regex, kinds, unknown)
    if listing:
        return [of_array(name, np.broadcast_to(np.zeros((), kinds[name][0]), kinds[name][1])) for name in names]
    return [of_array(name, arrays[name]) for name in names]
