"""The functions of the language: what each takes. `operations` computes them, `shapes` knows the shapes of their results."""

from dataclasses import dataclass

from .language import Call
from .structure import Card


class Refused(Exception):  # noqa: N818 - named for what it says
    """An operation that cannot be done, and why; whoever knows the place tells it."""


@dataclass(frozen=True)
class Signature:
    """How many arguments a function takes (`most` None: any number), and which options."""

    least: int
    most: int | None
    options: tuple[str, ...] = ()


ONE = Signature(1, 1)
ALONG = Signature(1, 1, ("axis",))

FUNCTIONS: dict[str, Signature] = {
    **dict.fromkeys(("exp", "log", "sin", "cos", "tanh", "sqrt", "square", "abs", "erf"), ONE),
    **dict.fromkeys(("sigmoid", "SiLU", "ReLU", "GELU", "GELU_tanh", "floor", "ceil"), ONE),
    "clamp": Signature(3, 3),
    "minimum": Signature(2, 2),
    "maximum": Signature(2, 2),
    "where": Signature(3, 3),
    **dict.fromkeys(("sum", "mean", "variance", "std", "max", "min", "any", "all"), ALONG),
    **dict.fromkeys(("softmax", "cumsum", "argmax", "argsort"), ALONG),
    "top_k": Signature(2, 2),
    "concat": Signature(1, None, ("axis",)),
    "stack": Signature(1, None, ("axis",)),
    "split": Signature(2, 2, ("axis",)),
    "repeat": Signature(2, 2, ("axis",)),
    "pad": Signature(3, 3, ("axis", "value")),
    "reshape": Signature(1, None),
    "permute": Signature(1, None),
    "transpose": ONE,
    "gather": Signature(2, 2, ("axis",)),
    "scatter": Signature(3, 3),
    "scatter_add": Signature(3, 3),
    "put": Signature(3, 3),
    "nonzero": ONE,
    "range": Signature(1, 2),
    "zeros": Signature(0, None),
    "full": Signature(1, None),
    "one_hot": Signature(2, 2),
    "size": Signature(1, 1, ("axis",)),
    "causal": Signature(2, 2),
    "window": Signature(3, 3),
    "mask": Signature(2, 2),
}


def misuse(call: Call) -> str:
    """What is wrong with how a function is called, apart from shapes; empty where nothing is."""
    signature = FUNCTIONS[call.name]
    n, least, most = len(call.inputs), signature.least, signature.most
    if call.given:
        return f"{call.name}: a function takes nothing behind a semicolon; only cards do"
    if n < least or (most is not None and n > most):
        wanted = (
            f"{least} or more arguments" if most is None else f"{least} or {most} arguments" if least != most else some(least, "argument")
        )
        return f"{call.name}: expected {wanted}, found {n}"
    for name, _ in call.options:
        if name not in signature.options:
            known = f"; it knows {' and '.join(f'{o}=' for o in signature.options)}" if signature.options else ""
            return f"{call.name}: no option {name}={known}"
    if call.name == "size" and not call.options:
        return "size: expected the axis that is meant, as in size(x, axis=0)"
    return ""


def miscalled(call: Call, card: Card) -> str:
    """What is wrong with how a card is called, apart from shapes; empty where nothing is."""
    for found, names, where in ((call.inputs, card.arguments, ""), (call.given, card.given, " behind the semicolon")):
        if len(found) != len(names):
            return f"{card.name} takes {some(len(names), 'argument')}{where} ({', '.join(names) or 'none'}), found {len(found)}"
    return f"{card.name}: a card has no option {call.options[0][0]}=" if call.options else ""


def some(n: int, word: str) -> str:
    """How many there are."""
    return f"{n} {word}{'s' * (n != 1)}"
