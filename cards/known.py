"""What an expression comes to where only hypers are known: sizes such as `3H·Dh`, conditions such as `activation = "gelu"`.

This reads arithmetic alone, so that a card can be filled without the parser, whose import takes longer than all the rest. What it reads
means what `language` says (the tests hold them against each other); of all else, and of names without a value, it says nothing: None.
"""

import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from .structure import HyperValue
from .text import QUOTED

WORD = r"[^\W\d]\w*[′']*"
TOKEN = re.compile(rf"\s*({QUOTED}|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|{WORD}|\S)")
CONSTANTS = {"∞": float("inf"), "true": True, "false": False}
NOT = 2  # the level in front of which `¬` stands


class Unknown(Exception):  # noqa: N818 - named for what it says
    """An expression that is not arithmetic with known values."""


def quotient(a: Any, b: Any) -> Any:
    """An integer where the division leaves no rest."""
    return a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b


LEVELS: tuple[dict[str, Callable[[Any, Any], Any]], ...] = (  # from the weakest binding to the strongest
    {"∨": lambda a, b: a or b},
    {"∧": lambda a, b: a and b},
    {"=": operator.eq, "≠": operator.ne, "<": operator.lt, "≤": operator.le, ">": operator.gt, "≥": operator.ge},
    {"+": operator.add, "-": operator.sub},
    {"·": operator.mul, "⊙": operator.mul, "/": quotient},
)


def known(text: str, values: Mapping[str, HyperValue | None]) -> HyperValue | None:
    """The value of an expression, None where it cannot be told from these values."""
    tokens = TOKEN.findall(text)[::-1]
    try:
        value = level(tokens, values, 0)
    except (Unknown, IndexError, TypeError, ValueError, ArithmeticError, RecursionError):
        return None
    return value if not tokens else None


def size(text: str, values: Mapping[str, HyperValue | None]) -> int | None:
    """A size, None where it cannot be told."""
    value = known(text, values)
    return value if type(value) is int and value >= 0 else None


def level(tokens: list[str], values: Mapping[str, HyperValue | None], at: int) -> Any:
    """Operands between the operators of one level; of comparisons one, as chains are not read."""
    if at == len(LEVELS):
        return factor(tokens, values)
    if at == NOT and tokens[-1] == "¬":
        tokens.pop()
        return not truth(level(tokens, values, at))
    left = level(tokens, values, at + 1)
    while tokens and tokens[-1] in LEVELS[at]:
        sign = tokens.pop()
        right = level(tokens, values, at + 1)
        operand = truth if at < NOT else number if at > NOT else same
        left = LEVELS[at][sign](operand(left), operand(right))
        if at == NOT:
            break
    return left


def truth(value: Any) -> bool:
    """A truth value. Raises Unknown for another one."""
    if not isinstance(value, bool):
        raise Unknown
    return value


def number(value: Any) -> Any:
    """A number, or a truth value as one. Raises Unknown for a text, of which Python would make a longer one."""
    if not isinstance(value, int | float):
        raise Unknown
    return value


def same(value: Any) -> Any:
    """Anything can be compared."""
    return value


def factor(tokens: list[str], values: Mapping[str, HyperValue | None]) -> Any:
    """A number (before a name: times that), a name, a text, or an expression in parentheses."""
    sign = tokens.pop()
    if sign == "-":
        return -factor(tokens, values)
    if sign == "(":
        value = level(tokens, values, 0)
        if tokens.pop() != ")":
            raise Unknown
        return value
    if sign[0].isdecimal():
        count = int(sign) if sign.isdecimal() else float(sign)
        return count * number(factor(tokens, values)) if tokens and re.fullmatch(WORD, tokens[-1]) and tokens[-1] != "mod" else count
    if sign.startswith('"'):
        return json.loads(sign)
    value = CONSTANTS.get(sign, values.get(sign))
    if value is None or isinstance(value, tuple):
        raise Unknown
    return value
