"""Writes tests/models/goldens/dump: tensors as text, by the anchor's procedure walked over flat numbers, apart from toyllm's code.

python tests/models/make_dump_goldens.py
"""

import math
from pathlib import Path

GOLDENS = Path(__file__).parent / "goldens" / "dump"

# name -> shape, edge items, precision, threshold, scientific, integers
CASES: dict[str, tuple[tuple[int, ...], int, int, int, bool, bool]] = {
    "rank_0": ((), 3, 4, 1000, False, False),
    "rank_0_integer": ((), 3, 4, 1000, False, True),
    "rank_1": ((7,), 3, 4, 1000, False, False),
    "rank_1_cut": ((7,), 3, 4, 6, False, False),
    "rank_1_edge_1": ((7,), 1, 2, 0, False, False),
    "rank_1_not_longer_than_its_ends": ((6,), 3, 4, 0, False, False),
    "rank_1_integers_cut": ((1001,), 3, 4, 1000, False, True),
    "rank_1_at_the_threshold": ((20,), 2, 0, 20, False, False),
    "rank_2": ((3, 4), 3, 4, 1000, False, False),
    "rank_2_cut": ((9, 8), 3, 4, 71, False, False),
    "rank_2_rows_cut": ((9, 2), 2, 6, 0, False, False),
    "rank_2_columns_cut": ((2, 9), 2, 0, 0, False, False),
    "rank_2_integers_edge_1": ((40, 30), 1, 4, 1000, False, True),
    "rank_2_scientific": ((3, 4), 3, 3, 1000, True, False),
    "rank_3": ((2, 2, 3), 3, 4, 1000, False, False),
    "rank_3_integers": ((2, 2, 2), 3, 4, 1000, False, True),
    "rank_3_cut": ((7, 8, 9), 3, 1, 100, False, False),
    "rank_4": ((2, 1, 3, 2), 3, 4, 1000, False, False),
    "rank_4_cut": ((3, 5, 3, 4), 1, 4, 0, False, False),
    "rank_5": ((2, 1, 2, 2, 2), 3, 2, 1000, False, False),
    "rank_5_cut": ((3, 1, 3, 3, 5), 1, 4, 1, False, False),
    "no_elements": ((2, 0, 3), 3, 4, 1000, False, False),
}


def numbers(shape: tuple[int, ...], integers: bool) -> list[float]:
    """Flat row-major values: 0, 1, 2, … as integers; else eighths of a scrambled order, both signs, exact in every float."""
    count = math.prod(shape)
    return list(range(count)) if integers else [((i * 37 + 11) % 101 - 50) / 8 for i in range(count)]


def dump(flat: list[float], shape: tuple[int, ...], edge: int, precision: int, threshold: int, scientific: bool, integers: bool) -> str:
    """One closing text out of single characters of state: which axes open and close between two neighbours that are shown."""

    def text(value: float) -> str:
        return str(value) if integers else f"{value:.{precision}{'e' if scientific else 'f'}}"

    if not shape:
        return text(flat[0])
    if not flat:
        return "[]"
    keep = [[i for i in range(n) if len(flat) <= threshold or n <= 2 * edge or i < edge or i >= n - edge] for n in shape]
    out = "[" * len(shape)
    at = [0] * len(shape)  # places in `keep`
    while True:
        value = text(flat[sum(keep[a][p] * math.prod(shape[a + 1 :]) for a, p in enumerate(at))])
        out += value if value.startswith("-") else f" {value}"
        axis = len(shape) - 1
        while axis >= 0 and at[axis] == len(keep[axis]) - 1:
            at[axis], axis, out = 0, axis - 1, out + "]"
        if axis < 0:
            return out
        at[axis] += 1
        between = ", " if axis == len(shape) - 1 else "," + "\n" * (len(shape) - 1 - axis) + " " * (axis + 1)
        skipped = keep[axis][at[axis]] != keep[axis][at[axis] - 1] + 1
        out += (between + "..." if skipped else "") + between + "[" * (len(shape) - 1 - axis)


def main() -> None:
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for name, (shape, edge, precision, threshold, scientific, integers) in CASES.items():
        text = dump(numbers(shape, integers), shape, edge, precision, threshold, scientific, integers)
        (GOLDENS / f"{name}.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
