"""Changes of activations: values put in place, scaled, added to or set to 0 while a model runs, at every name that can be read.

    ablate("blocks.5.attn.heads[:, 3]")     head 3 of block 5 says nothing, at any position
    patch("blocks.7.out[12]", clean)        position 12 goes on as it did in another run
    scale("blocks.*.mlp.out", 0.5)          every block's
    add("blocks.4.resid_mid", direction)    f32 [D], at every position
    experts(3, 7)                           each router has these to choose from

What is changed is a name, or a glob, with a slice behind it as `dump-tensor --slice` takes it. Positions, of tokens and of keys, count in
the whole sequence, prompt and continuation alike; negative ones count back from the prompt's end. A change is made where the activation is
made: whatever is computed from it later, now or in later passes by way of the KV cache, is computed from the changed one, and who reads
it reads that. Changes of one activation are made in the order in which they are given.

An array is the part that is written, or the activation whole, of which the slice is then taken too: its first axis, where that counts
tokens, begins at position 0, and positions behind its last row stay as they are. Without its first axes it is the same all along those.

A score is written before the softmax, a weight after it, and the heads are computed from them; keys that a query does not see stay
unseen. `router.logits` are written before the experts are chosen, `router.experts` (whole numbers) and `router.weights` after.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import ToyllmError
from .compare import numbers
from .compare_dump import Dump, fitted, open_dump
from .compare_names import AFTER, BEFORE, axes, names_of
from .compare_names import part as part_of
from .params import Sizes, sizes
from .taps import Write
from .tensor_slice import PART, parse_part, resolve_axis, slice_parts
from .tensor_values import as_slice

log = logging.getLogger("toyllm")

Value = float | np.generic | np.ndarray | Mapping[str, np.ndarray] | Dump | tuple[int, ...]

SLICED = re.compile(r"(.*?)\s*(\[[^\[\]]*\])\s*", re.DOTALL)
Placed = tuple[list[range], np.ndarray]  # places of every axis, and the values there: each axis as long as its places, or 1

KINDS = {"patch": "set", "scale": "scale", "add": "add", "ablate": "set", "experts": "add"}  # and what each does to what is there
MIXING = "router.experts", "router.weights", "experts.gate", "experts.up", "experts.hidden"  # what a budget of tokens an expert disregards


@dataclass(frozen=True)
class Change:
    """One change, as it is asked for; made by the functions below."""

    kind: str  # one of KINDS
    where: str  # a name or glob, and perhaps a slice
    value: Value = 0.0
    source: str = ""  # what the value is called: a number, a file

    def __str__(self) -> str:
        return f"--{self.kind} " + (self.source if self.kind == "experts" else self.where + f"={self.source}" * bool(self.source))


def ablate(where: str) -> Change:
    """Set it to 0."""
    return Change("ablate", where)


def patch(where: str, value: float | np.ndarray | Mapping[str, np.ndarray] | Dump, source: str = "") -> Change:
    """Put a number or an array in its place; of a mapping, such as `record` makes, or a file, what it has under the same name."""
    return Change("patch", where, value, source or described(value))


def scale(where: str, factor: float | np.ndarray, source: str = "") -> Change:
    """Multiply it."""
    return Change("scale", where, factor, source or described(factor))


def add(where: str, value: float | np.ndarray | Mapping[str, np.ndarray] | Dump, source: str = "") -> Change:
    """Add a number or an array to it; a mapping or a file as of `patch`."""
    return Change("add", where, value, source or described(value))


def experts(*allowed: int) -> Change:
    """Let routers choose among these experts only; a token goes to fewer than k where there are fewer."""
    return Change("experts", "blocks.*.router.logits", allowed, ",".join(map(str, allowed)))


def described(value: Any) -> str:
    """What a value is called where nobody has said it."""
    return str(value) if isinstance(value, int | float) else "(array)" if isinstance(value, np.ndarray) else "(arrays)"


def read_value(path: Path, map_path: Path | None = None) -> np.ndarray | Dump:
    """An array from a .npy file; or a .npz or .safetensors file of activations, under our names or a map's. Raises ToyllmError."""
    if path.suffix in (".npz", ".safetensors"):
        return open_dump(path, map_path)
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ToyllmError(f"{path}: cannot be read ({reason}); expected a .npy, .npz or .safetensors file, or a number") from error


# ---- what they come to in a model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """Changes resolved against a model and a run."""

    made: tuple[Change, ...]  # as they were asked for
    writes: Mapping[str, Sequence[Write]]  # of each activation, in their order

    @property
    def of_scores(self) -> bool:
        """Whether attention's scores or weights are changed."""
        return any(name.endswith((".scores", "attn.weights")) for name in self.writes)


@dataclass(frozen=True)
class Run:
    """What changes are resolved against."""

    sizes: Sizes
    prompt: int | None  # its tokens; None where there is none, or not yet
    positions: int  # that the run can reach
    budget: bool  # whether experts take so many tokens and no more

    def length(self, letter: str) -> int:
        """The length of an axis."""
        return self.positions if letter in "TS" else getattr(self.sizes, letter)


def resolve(config: Any, changes: Iterable[Change], prompt: int | None, positions: int | None, budget: bool = False) -> Changes:
    """The changes as they are made in a model of this configuration.

    `prompt` tokens are what negative positions count back from, and `positions`, by default the model's context, those that there can be.
    Raises ToyllmError for a name that the model does not have, a slice beyond its axis, a value of another shape or kind, NaN in an array,
    and for a change that would reach nothing.
    """
    run = Run(sizes(config), prompt, positions or config.context, budget)
    made = tuple(changes)
    writes: dict[str, list[Write]] = {}
    for change in made:
        names, part = names_meant(change, config)
        if len(kinds := dict.fromkeys(map(part_of, names))) > 1:
            log.info("%s: changes %d activations: %s", change, len(names), ", ".join(kinds))
        for name in names:
            check_kind(change, name, run)
            writes.setdefault(name, []).append(write_for(change, name, part, run))
        if isinstance(change.value, tuple) and len(set(change.value)) < run.sizes.k:
            log.info("%s: a token goes to %d experts; those that are not allowed weigh 0", change, run.sizes.k)
    return Changes(made, writes)


def names_meant(change: Change, config: Any) -> tuple[list[str], str]:
    """The names that a change means, and its slice. Raises ToyllmError, listing what there is, where it means none."""
    s = sizes(config)
    known = names_of(s.L, bool(s.E))
    if change.kind == "experts" and not s.E:
        raise ToyllmError(f"{change}: this model has no mixture of experts")
    found = SLICED.fullmatch(change.where)
    looks_so = found is not None and all(PART.fullmatch(p.strip()) or p.strip() in ("", "...") for p in found[2][1:-1].split(","))
    readings = [(change.where.strip(), "")]
    if found:
        readings.insert(0 if looks_so else 1, (found[1], found[2]))
    for pattern, part in readings:
        names = [name for name in known if name == pattern or fnmatchcase(name, pattern)]
        if names:
            return names, part
    wanted = found[1] if found and looks_so else change.where.strip()
    close = get_close_matches(wanted, known, 2, 0.6)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    blocks = [name.removeprefix("blocks.0.") for name in known if name.startswith("blocks.0.")]
    there = f"{', '.join(BEFORE)}, blocks.0-{s.L - 1}.({' '.join(blocks)}), {', '.join(AFTER)}"
    raise ToyllmError(f"{change}: no activation of this model is called {wanted!r}; {meant}there are {there}")


def check_kind(change: Change, name: str, run: Run) -> None:
    """Raise ToyllmError for a change that has no meaning for an activation."""
    if name.endswith("router.experts") and change.kind != "patch":
        raise ToyllmError(f"{change}: {name} are numbers of experts: patch them, ablate router.weights, or take --experts")
    if run.budget and name.endswith(MIXING):
        raise ToyllmError(f"{change}: --moe budget moves and drops tokens by router.logits alone, whatever {name} are; take another --moe")


def write_for(change: Change, name: str, text: str, run: Run) -> Write:
    """A change of one activation."""
    letters = axes(name)
    along = axes_of(change, name, text, run)
    chosen, value = [a.places for a in along], change.value
    if isinstance(value, tuple):
        array = mask(change, value, run)
    elif isinstance(value, int | float | np.generic):
        array = checked(change, name, np.full([1] * len(along), value), run, scalar=True)
    else:
        given = array_of(change, value, name, run)
        placed = as_part(given, along, run) or as_whole(given, along, run)
        if placed is None:
            raise ToyllmError(f"{labelled(change, name)}: found shape {list(given.shape)}, expected {shapes(along, run)}")
        chosen, array = placed[0], checked(change, name, placed[1], run)
    return Write(KINDS[change.kind], tuple(chosen), tuple(letter in "TS" for letter in letters), array)


def mask(change: Change, allowed: tuple[int, ...], run: Run) -> np.ndarray:
    """What is added to router logits, f32 [1, E], where only these experts are allowed."""
    E = run.sizes.E
    if not allowed or not 0 <= min(allowed) <= max(allowed) < E:
        raise ToyllmError(f"{change}: expected numbers from 0 to {E - 1}, this model's experts")
    added = np.full((1, E), -np.inf, np.float32)
    added[0, list(allowed)] = 0
    return added


# ---- slices -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """What of an axis is written."""

    letter: str
    length: int
    places: range
    expected: int  # how many of them an array of the part has: of a slice of positions without an end, those of the prompt
    dropped: bool = False  # an index takes it, so that a part does not have it
    free: bool = False  # all positions: an array may have fewer, from the first on
    bounded: bool = True  # whether it ends before there are no more positions


def axes_of(change: Change, name: str, text: str, run: Run) -> list[Axis]:
    """What a change writes of each axis of an activation."""
    letters = axes(name)
    lengths = [run.length(letter) for letter in letters]
    try:
        parts = slice_parts(text, lengths, name)
        return [axis_of(letter, part, i, text, name, run) for i, (letter, part) in enumerate(zip(letters, parts, strict=True))]
    except ToyllmError as error:
        raise ToyllmError(f"{change}: {str(error).removeprefix(f'--slice {text!r}: ')}") from error


def axis_of(letter: str, part: str, number: int, text: str, name: str, run: Run) -> Axis:
    """What one part of a slice takes of an axis. Raises ToyllmError for nothing, and for what is no ascending slice."""
    length = run.length(letter)
    where = f"{part!r} at axis {number} of {name}"
    if letter not in "TS":
        found = resolve_axis(part, number, length, text, name)
        places = range(found, found + 1) if isinstance(found, int) else found
        axis = Axis(letter, length, places, len(places), isinstance(found, int))
    else:
        bounds = parse_part(part, where)
        if isinstance(bounds, int):
            at = position(bounds, where, run)
            if not 0 <= at < length:
                raise ToyllmError(f"{where}: expected one of the run's positions, 0 to {length - 1}")
            axis = Axis(letter, length, range(at, at + 1), 1, dropped=True)
        else:
            start, stop = (None if n is None else max(0, position(n, where, run)) for n in (bounds.start, bounds.stop))
            places = range(length)[start : stop : bounds.step]
            within = places if stop is not None or run.prompt is None else range(places.start, min(places.stop, run.prompt), places.step)
            free = bounds == slice(None) or bounds == slice(None, None, 1)
            axis = Axis(letter, length, places, len(within) or len(places), free=free, bounded=stop is not None)
    if axis.places.step < 0:
        raise ToyllmError(f"{where}: expected ascending places, so a step above 0")
    if not axis.places:
        raise ToyllmError(f"{where}: takes nothing of the {length} {'positions of the run' if letter in 'TS' else 'there are'}")
    return axis


def position(number: int, where: str, run: Run) -> int:
    """A position; a negative one counts back from the prompt's end."""
    if number < 0 and run.prompt is None:
        raise ToyllmError(f"{where}: a negative position counts back from a prompt's end, and here is none: count from 0")
    return number if number >= 0 else number + (run.prompt or 0)


# ---- values -----------------------------------------------------------------------------------------------------------------


def array_of(change: Change, value: np.ndarray | Mapping[str, np.ndarray] | Dump, name: str, run: Run) -> np.ndarray:
    """The array for a name, without a batch of 1 and with its last axes apart, where that is all that differs from its shape."""
    letters = axes(name)

    def shape(T: int) -> tuple[int, ...]:
        return tuple(T if letter in "TS" else run.length(letter) for letter in letters)

    if isinstance(value, Dump | Mapping) and name not in (value.arrays if isinstance(value, Dump) else value):
        raise ToyllmError(f"{change}: it has no {name}")
    if isinstance(value, Dump):
        ids = value.ids()
        T = len(ids) if ids else run.prompt
        return value.raw(name, None) if T is None else value.read(name, shape(T))
    array = np.asarray(value[name] if isinstance(value, Mapping) else value)
    return array if run.prompt is None else fitted(array, shape(run.prompt))


def as_part(array: np.ndarray, along: Sequence[Axis], run: Run) -> Placed | None:
    """An array that is the part that is written, or its last axes."""
    kept = [i for i, a in enumerate(along) if not a.dropped]
    last = kept[len(kept) - array.ndim :]
    chosen, shape = [a.places for a in along], [1] * len(along)
    for i, n in zip(last, array.shape, strict=False):
        if n != along[i].expected and not (along[i].free and 0 < n <= run.positions):
            return None
        chosen[i], shape[i] = along[i].places[:n], n
    return (chosen, array.reshape(shape)) if array.ndim <= len(kept) else None


def as_whole(array: np.ndarray, along: Sequence[Axis], run: Run) -> Placed | None:
    """An array that is the activation whole, or its last axes: what it has of the part that is written."""
    first = len(along) - array.ndim
    chosen = [a.places for a in along]
    for i, n in enumerate(array.shape, first):
        if first < 0 or (n != along[i].length if along[i].letter not in "TS" else along[i].free and n > run.positions):
            return None
        chosen[i] = along[i].places[: len(range(along[i].places.start, n, along[i].places.step))]
        if not chosen[i] or (along[i].bounded and len(chosen[i]) < len(along[i].places)):
            return None
    found = array[tuple(as_slice(places) for places in chosen[first:])]
    return chosen, found.reshape([1] * first + [*found.shape])


def shapes(along: Sequence[Axis], run: Run) -> str:
    """The shapes that an array may have, in words."""
    part = [a.letter if a.free else str(a.expected) for a in along if not a.dropped]
    whole = [a.letter if a.letter in "TS" else str(a.length) for a in along]
    letters = [letter for letter in "TS" if letter in part + whole]
    either = f"[{', '.join(part)}] or, whole, [{', '.join(whole)}]" if part != whole else f"[{', '.join(whole)}]"
    return f"{either}, or their last axes; {' and '.join(letters)} up to {run.positions}"


def labelled(change: Change, name: str) -> str:
    """A change, and which of the names that it means."""
    return str(change) if change.where.partition("[")[0].strip() == name else f"{change}: {name}"


def checked(change: Change, name: str, array: np.ndarray, run: Run, scalar: bool = False) -> np.ndarray:
    """The values as they are written: f32, or int64 of experts. Raises ToyllmError for what is none, and for a NaN in an array.

    A number alone may be NaN, which is then meant: what becomes NaN has been computed from it.
    """
    array = numbers(array)
    if array.dtype.kind not in "fiub":
        raise ToyllmError(f"{labelled(change, name)}: expected numbers, found dtype {array.dtype}")
    if name.endswith("router.experts"):
        E = run.sizes.E
        if scalar and float(array.flat[0]).is_integer():
            array = array.astype(np.int64)
        if array.dtype.kind not in "iu" or not ((array >= 0) & (array < E)).all():
            raise ToyllmError(f"{labelled(change, name)}: expected whole numbers from 0 to {E - 1}, this model's experts")
        return array.astype(np.int64)
    with np.errstate(over="ignore"):
        found = array.astype(np.float32)
    wrong = np.argwhere((np.isnan(found) & (not scalar)) | (np.isinf(found) & np.isfinite(array)))
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        place = "" if scalar else f" at {list(at)} of what is written"
        raise ToyllmError(f"{labelled(change, name)}: expected numbers of f32, found {array[at]}{place}")
    return found
