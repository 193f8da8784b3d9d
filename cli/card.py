"""`toyllm card`: the algorithms of a model as cards, filled from its configuration; and cards that a person writes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..kernels.errors import ToyllmError
from . import output
from .options import DEFAULT_MODEL, Model, option

if TYPE_CHECKING:
    from ..cards.cost import Filled
    from ..cards.structure import Card

EMBEDDED = {"gpt2": "tales-gpt2", "gpt-oss": "tales-gpt-oss"}  # the model that fills a family's cards, unless one is named


def card(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            help="A card, such as gpt2, gpt2.block or mxfp4, or a FILE.card; without, the model's.",
            metavar="[NAME | FILE.card]",
            show_default=False,
        ),
    ] = None,
    model: Model = DEFAULT_MODEL,
    config: Annotated[
        Path | None, option("Fill the cards from a config.json alone, before downloading.", "--config", metavar="FILE", show_default=False)
    ] = None,
    full: Annotated[bool, option("The card and every card that it calls, each once.", "--full")] = False,
    listing: Annotated[bool, option("List the cards, with what each is.", "--list")] = False,
    form: Annotated[str, option("How to write them: text, markdown, latex or json.", "--format", metavar="FORMAT")] = "text",
    inputs: Annotated[
        list[str] | None,
        option(
            "Run the card on this, a JSON number or list, or a .npy file; once for each input.",
            "--input",
            twin=False,
            metavar="NAME=VALUE",
            show_default=False,
        ),
    ] = None,
    group: Annotated[
        str | None,
        option("Of --input: where among the model's tensors the card's are: blocks.0.", "--group", metavar="NAME", show_default=False),
    ] = None,
) -> None:
    """Show an algorithm as a card: shape-annotated pseudocode with the model's sizes, and what it costs. No weight is read.

    A FILE.card is checked, and shown in the canonical form; what is wrong in it is told with line and column.
    """
    from .card_shown import FORMATS

    named = any(is_given(context, parameter) for parameter in ("model", "config"))
    if config is not None and is_given(context, "model"):
        raise typer.BadParameter("give --model or --config, not both")
    if form not in FORMATS:
        raise typer.BadParameter(f"--format {form}: expected {' or '.join(FORMATS)}")
    if group and not inputs:
        raise typer.BadParameter("--group is for a run: give --input too")

    if listing:
        show_list(form)
    elif name is not None and is_file(name):
        from .card_file import run_file, show_file

        cards = filled(model, config) if named else None
        if inputs:
            run_file(Path(name), cards, model, group, inputs, form)
        else:
            show_file(Path(name), cards, full, form)
    else:
        found, cards, model = choose(name, model, config, named)
        if inputs:
            from .card_file import run_card

            run_card(found, cards.cards, inputs, cards, model, group, form)
        else:
            from ..cards.catalogue import reading

            FORMATS[form](reading(found, cards.cards) if full else [found], cards)


def is_given(context: typer.Context, parameter: str) -> bool:
    """Whether a person said so, on the command line or in the environment."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def is_file(name: str) -> bool:
    """Whether a name is that of a file of cards."""
    return name.endswith(".card") or Path(name).is_file()


def filled(model: str, config: Path | None) -> "Filled":
    """The cards of a model, filled from its configuration."""
    from ..cards.cost import filled_cards
    from ..models.params import anatomy
    from .params import model_files

    return filled_cards(anatomy(model_files(model, config)))


def choose(name: str | None, model: str, config: Path | None, named: bool) -> "tuple[Card, Filled, str]":
    """The card that is meant, the cards of the model that fills it, and which that is: the named, or the embedded of the card's family."""
    from ..cards.catalogue import READING, family_of, find_card, library

    if name is None or named:
        cards = filled(model, config)
        if name is None:
            return cards.cards[cards.family], cards, model
        found = find_card(name, cards.cards, (cards.family, *READING))
        if family_of(found.name) not in (None, cards.family):
            found_of = family_of(found.name)
            raise ToyllmError(
                f"{name}: a card of {found_of}, but {config or model} is a {cards.family}; name a model of {found_of}, or none"
            )
        return found, cards, model
    embedded = EMBEDDED[family_of(find_card(name, library()).name) or "gpt2"]
    cards = filled(embedded, None)
    return find_card(name, cards.cards), cards, embedded


def show_list(form: str) -> None:
    """All cards of the library, with what each is."""
    from ..cards.catalogue import WHAT

    if form == "json":
        output.write_json("card", {"library": [{"name": name, "what": what} for name, what in WHAT.items()]})
        return
    output.table(("card", "what it is"), WHAT.items())
