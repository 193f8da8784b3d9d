"""Cards as text: `render` writes the one canonical layout, `parse` reads it and what people write by hand. LANGUAGE.md describes both.

Reading is work on lines alone. Expressions stay strings, in their canonical spelling, until `language` reads them.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter

from .structure import (
    Card,
    CardError,
    Declaration,
    Hyper,
    HyperValue,
    Place,
    Step,
    arrange,
    closes,
    names_of,
    value_text,
)

MARGIN = 70  # the column, from 0, at which shapes and notes begin
LABEL = 12  # columns of a label
RULE = "─── sub-algorithms ".ljust(72, "─")
FILE = "card"  # where a text comes from, if nothing else is known
DIGITS = 300  # of a number, at most: an integer of so many is still a float
WIDTH = 10_000  # characters of a line, at most: what is read in no time, whatever it is
VALUES = 10_000  # of a hyper that is a sequence, at most: the layers of a model

# ---- writing ----------------------------------------------------------------------------------------------------------------


def render(card: Card) -> str:
    """The card in the canonical layout, a line feed at its end."""
    lines = [f"Algorithm: {card.signature}" + (f"      [{card.family}]" if card.family else "")]
    remarks = [f"({line})" for line in card.lines]
    hypers = " ".join(h.name if h.value is None else f"{h.name}={value_text(h.value)}" for h in card.hypers)
    sections = {
        "Input": [declaration_text(d) for d in card.inputs],
        "Output": [declaration_text(d) for d in card.outputs],
        "Hyper": [hypers] if hypers else [],
        "Param": [declaration_text(d) for d in card.params] + remarks,
    }
    for label, rows in sections.items():
        for number, row in enumerate(rows):
            lines.append((f"  {label}:" if number == 0 else "").ljust(LABEL) + row)
    for number, step in enumerate(card.steps, 1):
        body, margin = f"{number:>4}: {'   ' * step.depth}{body_text(card.steps, number - 1)}", margin_text(step)
        gap = MARGIN - len(body)
        lines.append(body + (" " * gap if gap > 1 else "   ") + margin if margin else body)
    return "\n".join(lines) + "\n"


def render_full(cards: Sequence[Card]) -> str:
    """The first card, a rule, and the cards that it calls."""
    first, *others = map(render, cards)
    return "\n".join([first, *([RULE + "\n"] if others else []), *others])


def declaration_text(d: Declaration) -> str:
    """A declaration as its line has it."""
    tail = [f"({d.note})"] if d.note else []
    if d.keys:
        tail.append(f"[{', '.join(key or '-' for key in d.keys)}]")
    return f"{', '.join(d.names)} ∈ {d.type}" + (f"   {' '.join(tail)}" if tail else "")


def body_text(steps: Sequence[Step], at: int) -> str:
    """What a step does, without number, shape and note."""
    step = steps[at]
    match step.kind:
        case "for":
            return f"for {step.variables[0]} {'←' if is_sequence(step.expression) else '∈'} {step.expression} do"
        case "if":
            return f"if {step.expression} then"
        case "else":
            return f"else if {step.expression} then" if step.expression else "else"
        case "end":
            return f"end {closes(steps, at)}"
        case "return":
            return f"return {step.expression}"
        case "comment":
            return f"▷ {step.note}"
        case _:
            return f"{', '.join(step.variables)} ← {step.expression}"


def margin_text(step: Step) -> str:
    """What stands to the right of a step: shapes, note, names of activations."""
    if step.kind == "comment":
        return ""
    grouped = groupby(zip(step.shapes, step.variables, strict=False), key=itemgetter(0))
    shapes = ", ".join(f"{', '.join(v for _, v in same)} ∈ {shape}" for shape, same in grouped)
    taps = f"[{', '.join(tap or '-' for tap in step.taps)}]" if step.taps else ""
    note = " ".join(filter(None, (step.note, taps)))
    return "   ".join(filter(None, (shapes, f"▷ {note}" if note else "")))


def is_sequence(expression: str) -> bool:
    """Whether a loop counts (`0, …, L-1`) and does not go through a vector."""
    return ", …, " in expression


# ---- ASCII spellings --------------------------------------------------------------------------------------------------------

ASCII = {
    "<=": "≤", ">=": "≥", "!=": "≠", "==": "=", "...": "…", "@": "·", "*": "⊙", "and": "∧", "or": "∨", "not": "¬", "in": "∈", "not in": "∉",
    "inf": "∞", "pi": "π",
}  # fmt: skip
QUOTED = r'"(?:[^"\\]|\\.)*"'
SPELLINGS = re.compile(QUOTED + r"|<=|>=|!=|==|\.\.\.|@|\*|\bnot\s+in\b|\b(?:and|or|not|in|inf|pi)\b|\s+")
TYPE_SPELLINGS = re.compile(r"\s*×\s*|\s+x\s+|\binf\b|\bpi\b|\A[ℝNZ](?=\^|\s|\Z)|\s+")
TYPE_SIGNS = {"ℝ": "R", "N": "ℕ", "Z": "ℤ", "inf": "∞", "pi": "π"}


def canonical(text: str) -> str:
    """An expression in its canonical spelling."""
    return spelled(text, SPELLINGS)[0]


def canonical_type(text: str) -> str:
    """A type in its canonical spelling."""
    return spelled(text, TYPE_SPELLINGS)[0]


def spelled(text: str, pattern: re.Pattern[str]) -> tuple[str, list[int]]:
    """A text in its canonical spelling, and from where in `text` each of its characters comes, the end included."""
    result, origins, at = [], [], 0
    for found in pattern.finditer(text):
        sign = found.group()
        word = " ".join(sign.split())
        new = (
            sign if sign.startswith('"') else "×" if word in ("×", "x") else (ASCII if pattern is SPELLINGS else TYPE_SIGNS).get(word, " ")
        )
        result += [text[at : found.start()], new]
        origins += [*range(at, found.start()), *(range(found.start(), found.end()) if new == sign else [found.start()] * len(new))]
        at = found.end()
    return "".join([*result, text[at:]]), [*origins, *range(at, len(text) + 1)]


def error_at(place: Place, what: str, offset: int = 0) -> CardError:
    """The error at an offset of the canonical text of what stands at `place`: the column is that of the file."""
    for pattern in (SPELLINGS, TYPE_SPELLINGS):
        origins = spelled(place.raw, pattern)[1]
        if offset < len(origins):
            return CardError(place, what, origins[offset])
    return CardError(place, what, min(offset, len(place.raw)))


# ---- reading ----------------------------------------------------------------------------------------------------------------

HEADLINE = re.compile(r"\s*Algorithm:\s*([^\s()\[\];,]+)\s*\(([^()]*)\)\s*(?:\[(.*)\])?\s*")
LABELLED = re.compile(r"\s*(Input|Output|Hyper|Param)\s*:")
NUMBER = re.compile(r"\s*\d+\s*:\s*")
STEP_LIKE = re.compile(r"(for|if|else|end|return)\b|▷|//|[^(](?:(?!∈|\bin\b).)*?(←|\s<-\s)")
PASSED_OVER = re.compile(r"\s*(#.*|[─═-]{3,}.*)?")
GAP = re.compile(QUOTED + r"|[ \t]{2,}|\t")
NOTE = re.compile(r"(?:\A|(?<=\s))(?:▷|//)\s*")
NAMED = re.compile(r"(?:(?P<note>.*?)\s*)??\[(?P<names>[^\[\]]*)\]")  # a note with names at its end
HYPER = re.compile(rf"([^\s=]+?)=({QUOTED}|\((?:[^()]|\([^()]*\))*\)\S*|[^\s]+)|([^\s=]+)")


def parse(text: str, file: str = FILE) -> Card:
    """The one card of a text. Raises CardError, with line and column, where it is none."""
    card, *others = parse_all(text, file)
    if others:
        raise CardError(others[0].place, "expected one card, and here begins another")
    return card


def parse_all(text: str, file: str = FILE) -> tuple[Card, ...]:
    """All cards of a text, in order, at least one. Raises CardError where they are none, or have the same name."""
    groups: list[list[Place]] = []
    for number, source in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        source = source.rstrip()
        if PASSED_OVER.fullmatch(source):
            continue
        place = Place(file, number, len(source) - len(source.lstrip()) + 1, len(source) + 1, source)
        if len(source) > WIDTH:
            raise CardError(place, f"a line of {len(source):,} characters; at most {WIDTH:,}")
        if place.raw.startswith("Algorithm"):
            groups.append([])
        if not groups:
            raise CardError(place, "expected a card, which begins with `Algorithm: NAME(inputs)`")
        groups[-1].append(place)
    if not groups:
        raise CardError(Place(file), "no card in it; a card begins with `Algorithm: NAME(inputs)`")
    cards = tuple(map(read_card, groups))
    seen: set[str] = set()
    for card in cards:
        if card.name in seen:
            raise CardError(card.place, f"a second card named {card.name}; give it another name")
        seen.add(card.name)
    return cards


def read_card(lines: list[Place]) -> Card:
    """A card from its lines."""
    head = lines[0]
    found = HEADLINE.fullmatch(head.source)
    if not found:
        raise CardError(head, "expected a headline such as `Algorithm: LN(x; γ, β)      [GPT-2 family]`")
    name, arguments, family = found[1], found[2], found[3] or ""
    names, _, given = arguments.partition(";")
    sections: dict[str, list[Place]] = {"Input": [], "Output": [], "Hyper": [], "Param": []}
    label, steps = "", []
    for line in lines[1:]:
        if labelled := LABELLED.match(line.source):
            if steps:
                raise CardError(line, f"`{labelled[1]}:` belongs above the steps")
            label, line = labelled[1], part(line, labelled.end(), len(line.source))
        elif steps or NUMBER.match(line.source) or STEP_LIKE.match(line.raw):
            steps.append(read_step(line))
            continue
        if not label:
            raise CardError(line, "expected `Input:`, `Output:`, `Hyper:`, `Param:` or a step")
        if line.raw:
            sections[label].append(line)
    inputs = tuple(map(read_declaration, sections["Input"]))
    params = [line for line in sections["Param"] if not line.raw.startswith("(")]
    card = Card(
        name,
        " ".join(family.split()),
        inputs,
        tuple(map(read_declaration, sections["Output"])),
        tuple(h for line in sections["Hyper"] for h in read_hypers(line)),
        tuple(map(read_declaration, params)),
        tuple(read_remark(line) for line in sections["Param"] if line not in params),
        arrange(inputs, steps),
        tuple(listed(given)),
        head,
    )
    if listed(names) != list(card.arguments):
        raise CardError(
            head, f"the headline has the inputs ({names.strip()}), the `Input` lines ({', '.join(card.arguments)})", found.start(2)
        )
    check_ends(card)
    check_names(card)
    return card


def part(place: Place, start: int, end: int) -> Place:
    """The place of columns start to end, from 0, of the same line, without the spaces at either side."""
    text = place.source[start:end]
    start += len(text) - len(text.lstrip())
    return Place(place.file, place.line, start + 1, max(start, len(place.source[:end].rstrip())) + 1, place.source)


def listed(text: str) -> list[str]:
    """Names between commas."""
    return [" ".join(name.split()) for name in split_top(text) if name.strip()]


def split_top(text: str, separator: str = ",") -> list[str]:
    """A text cut at the separators that stand in no brackets and in no quotes."""
    pieces, depth, start = [], 0, 0
    for found in re.finditer(QUOTED + r"|[\[({]|[\])}]|" + re.escape(separator), text):
        sign = found.group()
        depth += (sign in "[({") - (sign in "])}")
        if sign == separator and depth == 0:
            pieces.append(text[start : found.start()])
            start = found.end()
    return [*pieces, text[start:]]


def read_names(text: str) -> tuple[str, ...]:
    """The names of tensors or activations between brackets; "-" is none."""
    return tuple("" if name == "-" else name for name in listed(text))


def read_declaration(line: Place) -> Declaration:
    """A line such as `γ, β ∈ R^D   (of the norm) [norm_1.weight, norm_1.bias]`."""
    found = re.match(r"(.*?)\s*(?:∈|\bin\b)\s*", line.raw)
    if not found or not found[1]:
        raise CardError(line, "expected a declaration such as `x ∈ R^{T×D}   (note)`")
    start = line.column - 1 + found.end()
    rest = line.source[start:]
    gap = re.search(r"[ \t]{2,}(?=[(\[])|\s(?=\[)", rest)
    tail = rest[gap.end() :] if gap else ""
    place = part(line, start, start + (gap.start() if gap else len(rest)))
    noted = re.fullmatch(r"(?:\((?P<note>.*)\))?\s*(?:\[(?P<keys>[^\[\]]*)\])?", tail)
    if not place.raw or not noted:
        raise CardError(line, "expected a declaration such as `W ∈ R^{D×F}   (note) [tensor]`", found.end() if not place.raw else 0)
    names, keys = tuple(listed(found[1])), read_names(noted["keys"] or "")
    if keys and len(keys) != len(names):
        raise CardError(line, f"{len(names)} names but {len(keys)} in brackets; give one for each, `-` for none")
    return Declaration(names, canonical_type(place.raw), " ".join((noted["note"] or "").split()), keys, place)


def read_remark(line: Place) -> str:
    """A remark below the parameters, without its parentheses."""
    if not line.raw.endswith(")"):
        raise CardError(line, "a remark ends with `)`")
    return " ".join(line.raw[1:-1].split())


def read_hypers(line: Place) -> list[Hyper]:
    """The hypers of a line such as `V=50257 D=768 tied`."""
    hypers, at = [], 0
    for found in HYPER.finditer(line.raw):
        if line.raw[at : found.start()].strip():
            raise CardError(line, "expected hypers such as `D=768 ε`", at)
        at = found.end()
        try:
            hypers.append(Hyper(found[3]) if found[3] else Hyper(found[1], read_value(found[2])))
        except ValueError:
            said = found[0] if len(found[0]) <= 60 else found[0][:59] + "…"
            raise CardError(line, f"{said}: expected a number, a word, a text in quotes or a sequence", found.start(2)) from None
    if line.raw[at:].strip():
        raise CardError(line, "expected hypers such as `D=768 ε`", at)
    return hypers


def read_value(text: str) -> HyperValue:
    """A hyper's value, the reverse of `value_text`. Raises ValueError."""
    constants = {"true": True, "false": False, "∞": float("inf"), "-∞": float("-inf"), "inf": float("inf"), "NaN": float("nan")}
    if text in constants:
        return constants[text]
    if text.startswith('"'):
        import json

        return json.loads(text)
    if found := re.fullmatch(r"\((.*)\)(?:[×x](\d+))?", text):
        values, times = tuple(read_value(v.strip()) for v in split_top(found[1]) if v.strip()), int(found[2] or 1)
        if len(values) * times > VALUES:
            raise ValueError(f"more than {VALUES} values")
        return values * times
    if re.fullmatch(r"[+-]?\d+", text):
        if len(text) > DIGITS:
            raise ValueError(f"more than {DIGITS} digits")
        return int(text)
    if text[0].isalpha() and not set(text) & set('=()",'):
        return text
    return float(text)


# ---- steps ------------------------------------------------------------------------------------------------------------------

FORMS = (
    ("for", re.compile(r"for\s+(?P<variable>.+?)\s*(?:←|<-|∈|\bin\b)\s*(?P<expression>.+?)\s*\bdo")),
    ("if", re.compile(r"if\b\s*(?P<expression>.+?)\s*\bthen")),
    ("else", re.compile(r"else(?:\s+if\b\s*(?P<expression>.+?)\s*\bthen)?")),
    ("end", re.compile(r"end(?:\s+(?:for|if))?")),
    ("return", re.compile(r"return\b\s*(?P<expression>.+)")),
)
KEYWORD = re.compile(r"(for|if|else|end|return)\b(?!\s*(←|<-))")
EXPECTED = {
    "for": "`for ℓ ← 0, …, L-1 do` or `for t ∈ x do`",
    "if": "`if condition then`",
    "else": "`else` or `else if condition then`",
    "end": "`end for` or `end if`",
    "return": "`return y`",
}


def read_step(line: Place) -> Step:
    """A step from its line; its depth, and whether it is an update, are found by `arrange`."""
    numbered = NUMBER.match(line.source)
    line = part(line, numbered.end() if numbered else 0, len(line.source))
    if not line.raw:
        raise CardError(line, "a step without text")
    if found := NOTE.match(line.raw):
        return Step("comment", note=" ".join(line.raw[found.end() :].split()), targets=line)
    keyword = KEYWORD.match(line.raw)
    body, margin = cut_margin(line, shapes=not keyword)
    note, taps, shapes_end = read_note(margin)
    if not keyword:
        return read_assignment(body, part(line, margin.column - 1, shapes_end), note, taps)
    form = next(pattern for kind, pattern in FORMS if kind == keyword[1]).fullmatch(body.raw)
    if not form or taps:
        raise CardError(body, f"expected {EXPECTED[keyword[1]]}" + (", without the name of an activation" if form else ""))
    groups = form.groupdict()
    variables = (" ".join(groups["variable"].split()),) if "variable" in groups else ()
    place = (
        part(body, body.column - 1 + form.start("expression"), body.column - 1 + form.end("expression"))
        if groups.get("expression")
        else body
    )
    expression = canonical(place.raw) if groups.get("expression") else ""
    if variables:
        expression = re.sub(r"\s*,\s*…\s*,\s*", ", …, ", expression)
    return Step(keyword[1], variables, expression, note=note, place=place, targets=body)


def cut_margin(line: Place, shapes: bool) -> tuple[Place, Place]:
    """A step's body, and the shapes and note to its right: behind two spaces or more."""
    start = line.column - 1
    for found in GAP.finditer(line.raw):
        rest = line.raw[found.end() :] if found[0].isspace() else ""
        if NOTE.match(rest) or (shapes and re.match(r"[^▷←]*?\s(∈|in)\s", rest)):
            return part(line, start, start + found.start()), part(line, start + found.end(), len(line.source))
    return line, part(line, len(line.source), len(line.source))


def read_note(margin: Place) -> tuple[str, tuple[str, ...], int]:
    """The note of a margin, the activations that it names, and the column, from 0, at which it begins."""
    found = NOTE.search(margin.raw)
    if not found:
        return "", (), len(margin.source)
    text = margin.raw[found.end() :].strip()
    named = NAMED.fullmatch(text)
    note, taps = ((named["note"] or ""), read_names(named["names"])) if named else (text, ())
    return " ".join(note.split()), taps, margin.column - 1 + found.start()


def read_assignment(body: Place, shapes: Place, note: str, taps: tuple[str, ...]) -> Step:
    """A step that binds or updates variables."""
    arrow = re.search(r"\s*←\s*", body.raw) or re.search(r"\s+<-\s+", body.raw)
    if not arrow or not arrow.start() or arrow.end() == len(body.raw):
        raise CardError(body, "expected a step: `y ← expression`, for, if, else, end, return, or a remark after `▷`")
    start = body.column - 1
    targets, place = part(body, start, start + arrow.start()), part(body, start + arrow.end(), body.end - 1)
    variables = tuple(canonical(v.strip()) for v in split_top(targets.raw))
    if not all(variables):
        raise CardError(targets, "a variable without a name")
    if taps and len(taps) != len(variables):
        raise CardError(targets, f"{len(variables)} variables but {len(taps)} activations in brackets; give one for each, `-` for none")
    types, margins = read_shapes(shapes, variables)
    return Step("bind", variables, canonical(place.raw), types, note, taps, 0, place, targets, margins)


def read_shapes(margin: Place, variables: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[Place, ...]]:
    """The type of each variable, and its place, from `k, v ∈ R^{T×D}` or `k ∈ R^{T×D}, n ∈ ℕ`."""
    types: list[str] = []
    places: list[Place] = []
    waiting: list[str] = []
    names: list[str] = []
    start = margin.column - 1
    for piece in split_top(margin.raw) if margin.raw else ():
        sign = re.search(r"\s(?:∈|in)\s", piece)
        waiting.append(canonical(piece[: sign.start() if sign else len(piece)].strip()))
        if sign:
            place = part(margin, start + sign.end(), start + len(piece))
            names += waiting
            types += [canonical_type(place.raw)] * len(waiting)
            places += [place] * len(waiting)
            waiting = []
        start += len(piece) + 1
    if margin.raw and (waiting or names != list(variables)):
        raise CardError(margin, f"expected the shape of {', '.join(variables)}, found that of {', '.join(names + waiting)}")
    return tuple(types), tuple(places)


def check_ends(card: Card) -> None:
    """Raise CardError where an `end for` closes an if, or the reverse."""
    for at, step in enumerate(card.steps):
        said = step.targets.raw.split()[1:2] if step.kind == "end" else []
        if said and said[0] != closes(card.steps, at):
            raise CardError(step.targets, f"`end {said[0]}` where an `end {closes(card.steps, at)}` belongs")


def check_names(card: Card) -> None:
    """Raise CardError where a name is declared twice, or handed over without being declared."""
    seen: set[str] = set()
    for place, name in declared(card):
        if name in seen:
            raise CardError(place, f"{name} is declared twice")
        seen.add(name)
    ours = {h.name for h in card.hypers} | set(names_of(card.params))
    for name in card.given:
        if name not in ours and not name.startswith("θ"):
            raise CardError(card.place, f"{name} is behind the semicolon of the headline, but no `Param` or `Hyper`")


def declared(card: Card) -> Iterable[tuple[Place, str]]:
    """Every name that the lines above the steps declare for the steps to use, with its place."""
    for declaration in (*card.inputs, *card.params):
        for name in declaration.names:
            yield declaration.place, name
    for hyper in card.hypers:
        yield card.place, hyper.name
