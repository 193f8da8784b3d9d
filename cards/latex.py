"""Cards as LaTeX: a document of their algorithms, with amsmath, amssymb and algpseudocode.

What cannot be read as an expression is set as it is written. Letters beyond Latin and Greek need XeLaTeX or LuaLaTeX, and a font.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial

from .functions import FUNCTIONS
from .language import (
    Array,
    Binary,
    Call,
    Compare,
    Index,
    Literal,
    Name,
    New,
    Node,
    Power,
    Rest,
    Slice,
    Transpose,
    Unary,
    Values,
    expression,
    type_of,
)
from .language import Sequence as Counting
from .language import sequence as counting
from .structure import Card, CardError, Declaration, Step, closes, value_text

DOCUMENT = r"""\documentclass{article}
\usepackage{amsmath, amssymb}
\usepackage{algpseudocode}
\setlength{\parindent}{0pt}
\begin{document}

%s
\end{document}
"""

GREEK = re.compile(
    "GREEK (SMALL|CAPITAL) LETTER (ALPHA|BETA|GAMMA|DELTA|EPSILON|ZETA|ETA|THETA|IOTA|KAPPA|LAMDA|MU|NU|XI|PI|RHO"
    "|SIGMA|TAU|UPSILON|PHI|CHI|PSI|OMEGA)"
)
LATIN = ("Alpha", "Beta", "Epsilon", "Zeta", "Eta", "Iota", "Kappa", "Mu", "Nu", "Rho", "Tau", "Chi")  # capitals without a command
ACCENTS = {"\u0302": "hat", "\u0303": "tilde", "\u0304": "bar", "\u0307": "dot", "\u0308": "ddot", "\u20d7": "vec", "\u030c": "check"}
SIGNS = {
    "←": "gets",
    "→": "to",
    "·": "cdot",
    "⊙": "odot",
    "⊤": "top",
    "×": "times",
    "√": "surd",
    "∞": "infty",
    "…": "ldots",
    "ℓ": "ell",
    "≤": "le",
    "≥": "ge",
    "≠": "ne",
    "∈": "in",
    "∉": "notin",
    "∧": "land",
    "∨": "lor",
    "¬": "lnot",
    "≈": "approx",
    "±": "pm",
    "⌊": "lfloor",
    "⌋": "rfloor",
    "⌈": "lceil",
    "⌉": "rceil",
    "▷": "triangleright",
    "−": "-",
    "²": "^2",
    "³": "^3",
    "′": "'",
    "ℕ": "mathbb{N}",
    "ℤ": "mathbb{Z}",
    "ℝ": "mathbb{R}",
}
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {c: f"\\{c}" for c in "&%$#_{}"}

# ---- cards ------------------------------------------------------------------------------------------------------------------


def render_latex(cards: Iterable[Card], remarks: Mapping[str, Sequence[str]] | None = None) -> str:
    """A LaTeX document of cards, each with the `remarks` on it, by name."""
    return DOCUMENT % "\n".join(algorithm(card, (remarks or {}).get(card.name, ())) for card in cards)


def algorithm(card: Card, remarks: Sequence[str] = ()) -> str:
    """One card, without a document around it."""
    given = f"; {', '.join(map(math_name, card.given))}" if card.given else ""
    family = f" [{plain(card.family)}]" if card.family else ""
    head = rf"\textbf{{Algorithm}} $\operatorname{{{plain(card.name)}}}({', '.join(map(math_name, card.arguments))}{given})${family}"
    lines = [head, r"\begin{algorithmic}[1]"]
    hypers = ", ".join(f"${math_name(h.name)}" + ("$" if h.value is None else f" = {value(value_text(h.value))}$") for h in card.hypers)
    for label, rows in (
        ("Input", [declaration(d) for d in card.inputs]),
        ("Output", [declaration(d) for d in card.outputs]),
        ("Hyper", [hypers] if hypers else []),
        ("Param", [declaration(d) for d in card.params] + [f"({plain(line)})" for line in card.lines]),
    ):
        for number, row in enumerate(rows):
            label_box = rf"\textbf{{{label}:}}" if number == 0 else ""
            lines.append(rf"\Statex \makebox[4em][l]{{{label_box}}}{row}")
    lines += [step_line(card.steps, at) for at in range(len(card.steps))]
    lines += [rf"\Statex {plain(line)}" for line in remarks]
    return "\n".join([*lines, r"\end{algorithmic}", r"\bigskip", ""])


def declaration(d: Declaration) -> str:
    """A declaration."""
    note = f" ({plain(d.note)})" if d.note else ""
    keys = rf" \texttt{{[{plain(', '.join(key or '-' for key in d.keys))}]}}" if d.keys else ""
    return f"${', '.join(map(math_name, d.names))} \\in {math_type(d.type)}${note}{keys}"


def step_line(steps: Sequence[Step], at: int) -> str:
    """One step; a comment is a line too, so that the numbers are the card's."""
    step = steps[at]
    comment = margin(step)
    match step.kind:
        case "for":
            sign = r"\gets" if ", …, " in step.expression else r"\in"
            body = rf"\For{{${math_name(step.variables[0])} {sign} {math_text(step.expression)}$}}"
        case "if":
            body = rf"\If{{${math_text(step.expression)}$}}"
        case "else":
            body = rf"\ElsIf{{${math_text(step.expression)}$}}" if step.expression else r"\Else"
        case "end":
            body = r"\EndFor" if closes(steps, at) == "for" else r"\EndIf"
        case "return":
            body = rf"\State \Return ${math_text(step.expression)}$"
        case "comment":
            body = r"\State"
        case _:
            body = rf"\State ${', '.join(map(math_text, step.variables))} \gets {math_text(step.expression)}$"
    return f"{'  ' * step.depth}{body}" + (rf" \Comment{{{comment}}}" if comment else "")


def margin(step: Step) -> str:
    """The shapes and the note of a step."""
    if len(set(step.shapes)) == 1:
        shapes = f"${', '.join(map(math_text, step.variables))} \\in {math_type(step.shapes[0])}$"
    else:
        shapes = ", ".join(f"${math_text(v)} \\in {math_type(s)}$" for v, s in zip(step.variables, step.shapes, strict=False))
    taps = rf"\texttt{{[{plain(', '.join(tap or '-' for tap in step.taps))}]}}" if step.taps else ""
    return " ".join(filter(None, (shapes + (";" if shapes and step.note else ""), plain(step.note), taps)))


# ---- texts ------------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text in which nothing is markup; mathematical signs and Greek letters are set as such."""
    return "".join(map(plain_sign, text))


def plain_sign(sign: str) -> str:
    """One character of a text."""
    if sign in SPECIAL:
        return SPECIAL[sign]
    if found := sign_command(sign):
        return f"${found}$"
    return sign if sign.isprintable() else f"\\textbackslash{{}}x{ord(sign):02x}"


@cache
def sign_command(sign: str) -> str:
    """The command of a mathematical sign or a Greek letter; empty for others."""
    if sign in SIGNS:
        return f"\\{SIGNS[sign]}" if SIGNS[sign][0].isalpha() else SIGNS[sign]
    found = GREEK.fullmatch(unicodedata.name(sign, ""))
    if not found:
        return ""
    word = found[2].lower().replace("lamda", "lambda")
    word = word.capitalize() if found[1] == "CAPITAL" else f"var{word}" if word in ("epsilon", "phi") else word
    return rf"\mathrm{{{unicodedata.normalize('NFD', word)[0]}}}" if word in LATIN else f"\\{word}"


def value(text: str) -> str:
    """A hyper's value: numbers as such, all else as text."""
    if re.fullmatch(r"-?(\d+(\.\d+)?([eE][+-]?\d+)?|∞)", text):
        return math_text(text)
    return rf"\text{{{plain(text)}}}"


def math_text(text: str) -> str:
    """An expression as it is written in a step."""
    try:
        return math_node(counting(text))
    except CardError:
        return rf"\text{{{plain(text)}}}"


def math_type(text: str) -> str:
    """A type."""
    try:
        kind = type_of(text)
    except CardError:
        return rf"\text{{{plain(text)}}}"
    size = partial(math_node, flat=True)
    first, last = (size(end) if end else "" for end in (kind.first, kind.last))
    domain = {
        "R": r"\mathbb{R}",
        "ℕ": r"\mathbb{N}",
        "ℤ": r"\mathbb{Z}",
        "bool": r"\{0, 1\}",
        "range": rf"\{{{first}, \ldots, {last}\}}",
        "card": rf"\operatorname{{{plain(kind.card)}}}",
    }[kind.domain]
    sizes = r" \times ".join(size(s, PRODUCT) for s in kind.sizes)
    power = f"^{{{sizes}}}" if sizes else ""
    ranges = [rf"{math_name(r.index)} = {size(r.first)}, \ldots, {size(r.last)}" for r in kind.ranges]
    return domain + power + (rf" \quad ({', '.join(ranges)})" if ranges else "")


def math_name(name: str) -> str:
    """A name with its scripts."""
    try:
        return math_node(expression(name))
    except CardError:
        return rf"\mathrm{{{plain(name)}}}"


# ---- expressions ------------------------------------------------------------------------------------------------------------

LEVELS = {"∨": 1, "∧": 2, "&": 5, "<<": 6, ">>": 6, "+": 7, "-": 7, "·": 8, "⊙": 8, "mod": 8, "/": 8}
OPERATORS = {"&": r"\mathbin{\&}", "<<": r"\ll", ">>": r"\gg", "+": "+", "-": "-", "mod": r"\bmod", "/": "/", "<": "<", ">": ">", "=": "="}
NEGATION, COMPARISON, PRODUCT, UNARY, POSTFIX = 3, 4, 8, 9, 10


def math_node(node: Node, level: int = 0, flat: bool = False) -> str:
    """An expression; in parentheses where it binds weaker than `level`. `flat` sets quotients on one line."""
    text, own = math_parts(node, flat)
    return rf"\left({text}\right)" if own < level else text


def sign_of(operator: str) -> str:
    """An operator's sign."""
    return OPERATORS.get(operator) or sign_command(operator)


def math_parts(node: Node, flat: bool) -> tuple[str, int]:
    """An expression, and how strongly it binds."""
    inner = partial(math_node, flat=flat)
    match node:
        case Literal():
            return number(node.value)
        case Name():
            return name(node.name, flat), POSTFIX
        case Unary():
            return one_operand(node, flat)
        case Binary():
            return binary(node, flat)
        case Compare(left, rest):
            return " ".join([inner(left, COMPARISON + 1), *(f"{sign_of(r)} {inner(n, COMPARISON + 1)}" for r, n in rest)]), COMPARISON
        case Transpose() | Power():
            return power(node, flat), UNARY
        case Index():
            return index(node, flat), POSTFIX
        case Call():
            return call(node, flat), POSTFIX
        case Array():
            return f"[{', '.join(map(inner, node.items))}]", POSTFIX
        case Values():
            return r",\; ".join(map(inner, node.items)), 0
        case Counting():
            return rf"{inner(node.first)}, \ldots, {inner(node.last)}", 0
    raise TypeError(type(node).__name__)


def one_operand(node: Unary, flat: bool) -> tuple[str, int]:
    """An operator before, or around, an operand."""
    inner = partial(math_node, node.operand, flat=flat)
    match node.operator:
        case "-":
            return f"-{inner(UNARY)}", UNARY
        case "¬":
            return rf"\lnot {inner(NEGATION)}", NEGATION
        case "√":
            return rf"\sqrt{{{inner()}}}", UNARY
        case sign:
            side = "floor" if sign == "⌊" else "ceil"
            return rf"\left\l{side} {inner()} \right\r{side}", POSTFIX


def binary(node: Binary, flat: bool) -> tuple[str, int]:
    """An operator between two operands; quotients as fractions, and no sign between a number and what it multiplies."""
    inner, own = partial(math_node, flat=flat), LEVELS[node.operator]
    if node.operator == "/" and not flat:
        return rf"\frac{{{inner(node.left)}}}{{{inner(node.right)}}}", UNARY
    if node.operator == "⊙" and isinstance(node.left, Literal) and not isinstance(node.right, Binary | Unary) and not is_number(node.right):
        return rf"{inner(node.left)} {inner(node.right, UNARY)}", UNARY
    return f"{inner(node.left, own)} {sign_of(node.operator)} {inner(node.right, own + 1)}", own


def is_number(node: Node) -> bool:
    """Whether a node is written in digits."""
    return isinstance(node, Literal) and node.value not in (math.pi, math.inf)


def power(node: Node, flat: bool) -> str:
    """A base with all its superscripts in one."""
    above: list[str] = []
    while isinstance(node, Transpose | Power):
        if isinstance(node, Transpose):
            above.insert(0, r"\top")
            node = node.operand
        elif above and above[0] != r"\top":
            break  # a power of a power
        else:
            exponent = node.exponent
            above.insert(0, script(exponent.name, flat) if isinstance(exponent, Name) else math_node(exponent, flat=True))
            node = node.base
    return f"{math_node(node, POSTFIX, flat)}^{{{' '.join(above)}}}"


def index(node: Index, flat: bool) -> str:
    """A part of an array."""
    return f"{math_node(node.operand, POSTFIX, flat)}[{', '.join(item(i, flat) for i in node.items)}]"


def item(node: Node, flat: bool) -> str:
    """One item of an index."""
    match node:
        case Slice(start, stop, step):
            ends = [math_node(end, flat=flat) if end else "" for end in (start, stop, *([step] if step else []))]
            return ":".join(ends)
        case Rest():
            return r"\ldots"
        case New():
            return r"\mathrm{new}"
        case _:
            return math_node(node, flat=flat)


def call(node: Call, flat: bool) -> str:
    """A call."""
    inner = partial(math_node, flat=flat)
    called = rf"\operatorname{{{plain(node.name)}}}" if len(node.name) > 1 or node.name in FUNCTIONS else node.name
    inputs = [*map(inner, node.inputs), *(rf"\mathrm{{{option}}}={inner(v)}" for option, v in node.options)]
    given = f"; {', '.join(map(inner, node.given))}" if node.given else ""
    return f"{called}({', '.join(inputs)}{given})"


def number(found: float | bool | str) -> tuple[str, int]:
    """A number, a truth value or a text, and how strongly it binds."""
    if isinstance(found, str):
        return rf"\text{{``{plain(found)}''}}", POSTFIX
    if isinstance(found, bool):
        return rf"\mathrm{{{str(found).lower()}}}", POSTFIX
    if found == math.pi:
        return r"\pi", POSTFIX
    if not math.isfinite(found):
        return (r"\mathrm{NaN}" if math.isnan(found) else r"\infty"), POSTFIX
    mantissa, _, exponent = repr(found).partition("e")
    if not exponent:
        return mantissa, POSTFIX
    return ("" if mantissa == "1" else rf"{mantissa} \cdot ") + f"10^{{{int(exponent)}}}", PRODUCT


def name(text: str, flat: bool) -> str:
    """A name: its root, primes and subscripts."""
    found = re.fullmatch(r"([^_′']*)([′']*)(.*?)([′']*)", text)
    root, primes, below, more = found.groups() if found else (text, "", "", "")
    scripts = [script(part.strip("{}"), flat) for part in re.findall(r"_(\{[^{}]*\}|[^_]+)", below)]
    under = f"_{{{', '.join(scripts)}}}" if scripts else ""
    return letters(root, "mathit") + "'" * len(primes) + under + "'" * len(more)


def script(text: str, flat: bool) -> str:
    """A subscript or superscript: a word upright, and what is no word as an expression."""
    if re.fullmatch(r"[^\W_]{2,}", text) and not text.isdecimal():
        return letters(text, "mathrm")
    try:
        return math_node(expression(text), flat=flat)
    except CardError:
        return rf"\text{{{plain(text)}}}"


def letters(text: str, font: str) -> str:
    """A word or a letter: Greek by its command, accents above, more than one letter in a font."""
    result: list[str] = []
    for sign in unicodedata.normalize("NFD", text):
        if sign in ACCENTS and result:
            result[-1] = f"\\{ACCENTS[sign]}{{{result[-1]}}}"
        elif unicodedata.combining(sign) and result:
            result[-1] += sign
        else:
            result.append(sign_command(sign) or sign)
    if len(result) == 1:
        return result[0]
    joined = "".join(part + " " * (part.startswith("\\") and part[-1].isalpha()) for part in result)
    return f"\\{font}{{{joined.strip()}}}"
