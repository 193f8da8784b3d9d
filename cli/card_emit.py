"""`toyllm card --emit`: a model's cards as a script."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import output
from .options import Group, option

LANGUAGES = ("numpy",)
SCRIPT = option("Write the model's cards as a script that runs alone: numpy.", "--emit", metavar="LANGUAGE", twin=False, show_default=False)
FILE = option("Of --emit: the file.", "--output", "-o", metavar="FILE.py", twin=False, show_default="stdout")
EMITTING: Group = {
    "emit": (Annotated[str | None, SCRIPT], None),
    "to": (Annotated[Path | None, FILE], None),
    "force": (Annotated[bool, option("Write over a file that is there.", "--force", twin=False)], False),
}


def emit(model: str, others: dict[str, Any], emitting: dict[str, Any]) -> None:
    """Write the script of a model to stdout, or to a file, whole or not at all.

    `emitting` are the options of `EMITTING`, `others` what does not go together with them.
    """
    language, to, force = emitting["emit"], emitting["to"], emitting["force"]
    if language is None:
        raise typer.BadParameter("--output and --force are for a script: give --emit numpy too")
    if wrong := next((option for option, value in others.items() if value), None):
        raise typer.BadParameter(f"--emit writes the whole of a model: give it or {wrong}, not both")
    if language not in LANGUAGES:
        raise typer.BadParameter(f"--emit {language}: expected {' or '.join(LANGUAGES)}")

    from ..cards.emit import script
    from ..models.checkpoint import open_checkpoint
    from ..models.config import load_config
    from ..models.location import find_model
    from ..models.tensor_save import check_target
    from ..models.whole import whole_file

    if to is not None:
        check_target(to, (".py",), force)
    files = find_model(model)
    _, config = load_config(files)
    text = script(config, open_checkpoint(files), output.one_line(Path(files.name).name))
    if to is None:
        output.write(text)
        return
    with whole_file(to, force) as file:
        file.write(text.encode())
