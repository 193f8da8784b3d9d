"""`toyllm card` on a person's own files: cards read, checked and shown; and any card run on inputs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..kernels.errors import ToyllmError
from . import output

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from ..cards.cost import Filled
    from ..cards.structure import Card


MOST = 2**20  # bytes of a file of cards: the whole library has 34,000
MIXING = {"moe": "auto", "ρ": 1.0}  # hypers that are options of a run, not a model's


def read_cards(path: Path) -> "tuple[Card, ...]":
    """The cards of a file. Raises ToyllmError, for what is wrong in it with line and column."""
    from ..cards.text import parse_all

    if path.exists() and not path.is_file():
        raise ToyllmError(f"{path}: not a file; expected one with cards")
    try:
        with path.open("rb") as file:
            data = file.read(MOST + 1)
        if len(data) > MOST:
            raise ToyllmError(f"{path}: larger than {MOST:,} bytes, which no file of cards is")
        text = data.decode()
    except OSError as error:
        raise ToyllmError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ToyllmError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    return parse_all(text, str(path))


def checked_cards(path: Path, library: "Mapping[str, Card]") -> "tuple[Card, ...]":
    """The cards of a file, checked: names, shapes, calls of each other and of the library's. Raises CardError; of several, all are said."""
    from ..cards.shapes import all_problems

    cards = read_cards(path)
    problems = all_problems(cards, library)
    for problem in problems[:-1]:
        output.say(f"error: {output.one_line(str(problem))}\n{output.printable(problem.excerpt)}")
    if problems:
        raise problems[-1]
    return cards


def show_file(path: Path, model: "Filled | None", full: bool, form: str) -> None:
    """Check and show the cards of a file, filled where a model is named; in full also those of the library that they call."""
    from ..cards.catalogue import library, reached
    from ..cards.fill import fill
    from .card_shown import FORMATS

    known = model.cards if model else library()
    cards = checked_cards(path, known)
    if model:
        cards = tuple(fill(card, model.hypers) for card in cards)
    everything = {**known, **{card.name: card for card in cards}}
    FORMATS[form](list(reached(cards, everything).values()) if full else cards, None)


def run_file(path: Path, model: "Filled | None", where: str, group: str | None, inputs: Sequence[str], form: str) -> None:
    """Check the cards of a file, and run the first."""
    from ..cards.catalogue import library

    known = model.cards if model else library()
    cards = checked_cards(path, known)
    run_card(cards[0], {**known, **{card.name: card for card in cards}}, inputs, model, where, group, form)


def parse_input(text: str) -> "tuple[str, np.ndarray]":
    """`NAME=VALUE`: a name with a JSON number or list, or a .npy file."""
    import numpy as np

    name, sign, value = (part.strip() for part in text.partition("="))
    if not sign or not name or not value:
        raise typer.BadParameter(f"--input {text}: expected NAME=VALUE, such as x='[[1, 2], [3, 4]]' or x=x.npy")
    if value.endswith(".npy"):
        try:
            return name, np.load(value)
        except OSError as error:
            raise ToyllmError(f"{value}: cannot be read ({error.strerror})") from error
        except (ValueError, EOFError) as error:
            raise ToyllmError(f"--input {text}: not an array of numbers in NumPy's format ({error})") from error
    try:
        array = np.asarray(json.loads(value))
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "bif":
        raise typer.BadParameter(f"--input {text}: expected a JSON number, a list of them (of equal lengths), or a .npy file")
    return name, array


def run_card(
    card: "Card",
    library: "Mapping[str, Card]",
    inputs: Sequence[str],
    model: "Filled | None",
    where: str,
    group: str | None,
    form: str,
) -> None:
    """Run a card, and show its results. Its parameters are read from the model at `where`. Raises ToyllmError."""
    from ..cards.interpreter import run
    from ..models.tensor_text import Layout
    from ..models.tensor_values import of_array
    from .tensors import document, show_values

    stated = {h.name for h in card.hypers if h.value is not None}
    hypers = {name: value for name, value in {**MIXING, **(model.hypers if model else {})}.items() if name not in stated}
    made = run(card, library, dict(map(parse_input, inputs)), hypers, parameters(model, where), group=group or "")
    results = made.outputs or {f"result {n}": value for n, value in enumerate(made.results)}
    found = [of_array(name, value) for name, value in results.items()]
    settings: dict[str, Any] = {"edge_items": 3, "precision": 4, "threshold": 1000, "full": False, "scientific": False}
    if form == "json":
        entries = [document(values, None, Layout(3, 4, 1000, False), raw=False) for values in found]
        output.write_json("card", {"card": card.name, "results": entries})
        return
    show_values(found, None, settings, None, raw=False, header=True, json=False, said={})


def parameters(model: "Filled | None", where: str) -> "Callable[[str], np.ndarray]":
    """What reads a model's parameters; the model is opened when the first is needed."""
    opened: list[Callable[[str], np.ndarray]] = []

    def read(name: str) -> "np.ndarray":
        from ..cards.settings import source
        from ..models.checkpoint import open_checkpoint
        from ..models.location import find_model

        if model is None or not model.anatomy.files:
            raise ToyllmError(f"{name}: a parameter, which only a model with weights has; name one with -m")
        if not opened:
            opened.append(source(open_checkpoint(find_model(where)), model.anatomy.config))
        return opened[0](name)

    return read
