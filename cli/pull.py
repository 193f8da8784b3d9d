"""`toyllm pull`: download a model into the local Hugging Face cache. The only command that opens a connection."""

import logging
import sys
from typing import Annotated

import typer

from ..kernels.errors import ToyllmError
from . import output
from .endings import INTERRUPTS
from .models import size_text
from .options import option


def pull(
    context: typer.Context,
    repo: Annotated[str, typer.Argument(help="A repo id, such as openai-community/gpt2.", show_default=False)],
    revision: Annotated[str | None, option("A branch, a tag or a commit.", "--revision", show_default="main")] = None,
    dry_run: Annotated[bool, option("List what would be downloaded, and download nothing.", "--dry-run")] = False,
) -> None:
    """Download a model's safetensors, configuration and tokenizer, and print the folder they are in.

    What is downloaded already is not downloaded again. HF_TOKEN opens gated and private repositories, HF_HOME and
    HF_HUB_CACHE say where the files go, HF_ENDPOINT names another hub.
    """
    from ..models import hub
    from ..models.config import FAMILIES
    from ..models.location import cache_folder, embedded, is_repo, join_name

    if repo in embedded():
        raise ToyllmError(f"{repo} comes with toyllm: there is nothing to download")
    if not is_repo(repo):
        raise typer.BadParameter(f"{repo} is not a repo id; expected OWNER/NAME", ctx=context, param_hint="REPO")
    quieten()
    listing = hub.list_files(repo, revision)
    total = sum(file.nbytes for file in listing.files)
    sizes = f"{len(listing.files)} files, {size_text(total)}; {size_text(listing.missing)} to download"
    output.say(f"{repo}: {sizes}, {size_text(hub.free_space())} free in {cache_folder()}")
    if listing.model_type and listing.model_type not in FAMILIES:
        output.say(f"note: its model_type is {output.one_line(listing.model_type)}; toyllm runs {', '.join(FAMILIES)}")
    if dry_run:
        rows = [(file.name, f"{file.nbytes:,}", "yes" if file.cached else "no") for file in listing.files]
        output.table(("file", "bytes", "downloaded"), rows, right=(1,))
        return
    try:
        folder = hub.download(listing)
    except INTERRUPTS:
        output.say("\ninterrupted: finished files are kept, and the same command goes on from there")
        raise
    output.write(f"{folder}\n")
    output.say(f'next: toyllm generate -m {join_name(repo, revision)} "Once upon a time"')


def quieten() -> None:
    """Bars only where they belong, and huggingface_hub's warnings as lines of toyllm's."""
    from huggingface_hub.utils import disable_progress_bars

    if not output.colours(sys.stderr):
        disable_progress_bars()
    logging.getLogger("huggingface_hub").handlers[:] = [output.Notes()]
