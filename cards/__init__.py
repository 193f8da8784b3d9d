r"""Algorithm cards: pseudocode that is executed against the running kernels. LANGUAGE.md describes their language.

>>> from toyllm import cards
>>> norm = cards.library()["gpt2.LN"]
>>> print(cards.render(norm).splitlines()[0])
Algorithm: gpt2.LN(x; γ, β, ε)      [GPT-2 family]
>>> cards.run(norm, inputs={"x": [[1, 3]], "γ": [1, 1], "β": [0, 0], "ε": 0}).outputs["y"]
array([[-1.,  1.]])
>>> mine = cards.parse("Algorithm: F(x)\nInput: x ∈ R^{T×D}\nreturn x · x")
>>> print(cards.problems(mine)[0])
card:3:8: `·`: expected R^{…×D} · R^{D×…}, found R^{T×D} · R^{T×D}; transpose the right side?
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalogue import library
    from .interpreter import Limits, Run, run
    from .latex import render_latex
    from .notation import from_json, render_markdown, to_json
    from .shapes import all_problems, problems
    from .structure import Card, CardError
    from .text import parse, parse_all, render

__all__ = [
    "Card",
    "CardError",
    "Limits",
    "Run",
    "all_problems",
    "from_json",
    "library",
    "parse",
    "parse_all",
    "problems",
    "render",
    "render_latex",
    "render_markdown",
    "run",
    "to_json",
]

WHERE = {
    **dict.fromkeys(("Card", "CardError"), "structure"),
    **dict.fromkeys(("Limits", "Run", "run"), "interpreter"),
    **dict.fromkeys(("all_problems", "problems"), "shapes"),
    **dict.fromkeys(("from_json", "render_markdown", "to_json"), "notation"),
    **dict.fromkeys(("parse", "parse_all", "render"), "text"),
    "library": "catalogue",
    "render_latex": "latex",
}


def __getattr__(name: str) -> Any:
    # The parser and NumPy are imported only when a card is checked or run: showing cards stays light.
    if name in WHERE:
        return getattr(import_module(f".{WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
