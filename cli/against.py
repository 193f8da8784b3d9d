"""The run that another is compared with: another model, or the same one under other options."""

import shlex
from typing import Any

import typer
from typer.main import get_command

from .options import Group, number, takes

UsageError: Any = typer.BadParameter.__mro__[1]

COMPARING: Group = {
    "against": number(str, "Compare with this model, of the same vocabulary.", "--against", metavar="MODEL"),
    "against_options": number(
        str,
        'Compare with a run under these options in place of this run\'s, such as "--cache-dtype bf16".',
        "--against-options",
        metavar="OPTIONS",
    ),
}


def read_options(context: typer.Context, name: str, text: str, group: Group) -> dict[str, Any]:
    """The options of a group as a text gives them, such as "--cache-dtype bf16 --exact", read as a command line's are.

    Raises a usage error, for the option `name` that has the text, where it is no list of them.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings={"help_option_names": []})

    @app.command()
    @takes(group=group)
    def options(*, group: dict[str, Any]) -> None:
        del group

    try:
        parsed = get_command(app).make_context(name, shlex.split(text))
    except UsageError as error:
        raise typer.BadParameter(error.format_message(), ctx=context, param_hint=name) from error
    except ValueError as error:  # a quotation that does not end
        raise typer.BadParameter(str(error), ctx=context, param_hint=name) from error
    return {key: parsed.params[key] for key in group}
