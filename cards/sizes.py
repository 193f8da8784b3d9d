"""Sizes that are not numbers yet: polynomials in letters, with rational coefficients. `3D`, `H·Dh`, `T + 1`, `Dh/2`.

A letter is a name of the card's (`T`), a loose one (it begins with "?") a size that cannot be told beforehand, and what is no polynomial
is a letter that is spelled as its expression, such as `minimum(T, w)`. Of the last two nobody can say that they differ from something.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from itertools import count

Monomial = tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """A sum of products of letters: each product's letters, ascending, and its coefficient, which is not 0."""

    terms: tuple[tuple[Monomial, Fraction], ...] = ()

    @property
    def number(self) -> Fraction | None:
        """Its value where it has no letters."""
        return None if any(letters for letters, _ in self.terms) else sum((c for _, c in self.terms), Fraction(0))

    @property
    def letters(self) -> set[str]:
        """The letters in it."""
        return {letter for letters, _ in self.terms for letter in letters}

    def __add__(self, other: "Size") -> "Size":
        return total((*self.terms, *other.terms))

    def __neg__(self) -> "Size":
        return Size(tuple((letters, -c) for letters, c in self.terms))

    def __sub__(self, other: "Size") -> "Size":
        return self + -other

    def __mul__(self, other: "Size") -> "Size":
        return total((tuple(sorted(a + b)), c * d) for a, c in self.terms for b, d in other.terms)

    def __str__(self) -> str:
        text = ""
        for letters, c in sorted(self.terms, key=lambda term: (term[1] < 0, not term[0], term[0])):
            text += (" - " if text else "-") if c < 0 else " + " if text else ""
            text += product_text(letters, abs(c))
        return text or "0"


def product_text(letters: Monomial, c: Fraction) -> str:
    """One product: `3D`, `H·Dh/2`, `4`."""
    shown = "·".join("?" if letter.startswith("?") else letter for letter in letters)
    top = "" if c.numerator == 1 and letters else str(c.numerator)
    return f"{top}{shown}" + (f"/{c.denominator}" if c.denominator != 1 else "")


def total(terms: Iterable[tuple[Monomial, Fraction]]) -> Size:
    """The sum of products."""
    sums: dict[Monomial, Fraction] = {}
    for letters, c in terms:
        sums[letters] = sums.get(letters, Fraction(0)) + c
    return Size(tuple(sorted((letters, c) for letters, c in sums.items() if c)))


def fixed(number: int | Fraction) -> Size:
    """A number as a size."""
    return Size((((), Fraction(number)),)) if number else Size()


def letter(name: str) -> Size:
    """A letter as a size."""
    return Size((((name,), Fraction(1)),))


UNKNOWN = count(1)


def unknown() -> Size:
    """A size that cannot be told beforehand."""
    return letter(f"?{next(UNKNOWN)}")


ONE = fixed(1)


def product(sizes: Iterable[Size]) -> Size:
    """All multiplied."""
    return reduce(Size.__mul__, sizes, ONE)


def quotient(a: Size, b: Size) -> Size | None:
    """a / b; None where that is no polynomial."""
    if (n := b.number) is not None:
        return Size(tuple((letters, c / n) for letters, c in a.terms)) if n else None
    (divisor, d), *more = b.terms
    if more:
        return None
    terms = []
    for letters, c in a.terms:
        rest = list(letters)
        for name in divisor:
            if name not in rest:
                return None
            rest.remove(name)
        terms.append((tuple(rest), c / d))
    return total(terms)


def substituted(size: Size, values: Mapping[str, Size]) -> Size:
    """The size with letters replaced."""
    if not size.letters & values.keys():
        return size
    result = Size()
    for letters, c in size.terms:
        result += product((fixed(c), *(values.get(name) or letter(name) for name in letters)))
    return result


def computed(name: str, function: Callable[..., Fraction | int], *sizes: Size) -> Size:
    """A function of sizes that is no polynomial: a number where they are, else a letter spelled like a call."""
    known = [size.number for size in sizes]
    if all(n is not None for n in known):
        return fixed(function(*known))
    return letter(f"{name}({', '.join(map(str, sizes))})")


def is_loose(name: str) -> bool:
    """Whether a letter may turn out to be any size."""
    return name.startswith("?") or name.endswith(")")


def same(a: Size, b: Size, values: Mapping[str, Size]) -> bool | None:
    """Whether two sizes are equal; None where that cannot be told. `values` are those of letters."""
    difference = substituted(a - b, values)
    if not difference.terms:
        return True
    if any(map(is_loose, difference.letters)):
        return None
    return False


def solved(size: Size, name: str, length: Size) -> Size | None:
    """The value of a letter at which `size` is `length`; None where it has none that can be told."""
    with_it = [(letters, c) for letters, c in size.terms if name in letters]
    if len(with_it) != 1 or with_it[0][0].count(name) != 1:
        return None
    rest = Size(tuple(term for term in size.terms if term not in with_it))
    letters, c = with_it[0]
    others = list(letters)
    others.remove(name)
    return quotient(length - rest, Size(((tuple(others), c),)))
