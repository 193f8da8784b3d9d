"""One tensor's values read once, a few megabytes at a time: NaN, infinities, the NaN of MXFP4's scales, and matrices of zeros.

Two maxima tell whether a run of floats is sound: of their bits as unsigned integers, where infinities and NaN of negative sign come
last, and as signed ones, where those of positive sign do. Only a run that is not is looked at closely. A scale byte of 255 is the format's
NaN; from 253 on codes of 4 and 6 exceed the largest f32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path

import numpy as np

from ..kernels.errors import ToyllmError
from .checkpoint import DTYPES, Tensor, brief

CHUNK = 2 * 2**20  # bytes a read: both maxima then come from the processor's caches
LARGEST_SCALE, NAN_SCALE = 252, 255  # a scale byte s is 2^(s − 127): the last with which every code is finite in f32, and NaN
ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Format:
    """A float's bits: as unsigned and signed integers, and the least pattern without sign that is not finite, infinity's."""

    unsigned: np.dtype
    signed: np.dtype
    infinity: int


FORMATS = {
    "F64": Format(np.dtype("<u8"), np.dtype("<i8"), 0x7FF << 52),
    "F32": Format(np.dtype("<u4"), np.dtype("<i4"), 0xFF << 23),
    "F16": Format(np.dtype("<u2"), np.dtype("<i2"), 0x1F << 10),
    "BF16": Format(np.dtype("<u2"), np.dtype("<i2"), 0xFF << 7),
}


@dataclass(frozen=True)
class Finding:
    """Something that does not hold (an error) or that a person should look at (a warning)."""

    severity: str
    kind: str  # "file", "index", "config", "missing", "extra", "twice", "shape", "dtype", "nan", "inf", "scale", "zero"
    message: str
    path: Path
    tensor: str | None = None
    place: tuple[int, ...] | None = None  # the index of the first
    experts: tuple[int, ...] = ()
    count: int | None = None


@dataclass
class Tally:
    """What has been found in one tensor so far, by kind: how many, the first one's flat index, and in which experts."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    experts: dict[str, set[int]] = field(default_factory=dict)

    def add(self, kind: str, at: np.ndarray, expert: int) -> None:
        """Take flat indices int64 [n] in."""
        if len(at):
            self.counts[kind] = self.counts.get(kind, 0) + len(at)
            self.first.setdefault(kind, int(at[0]))
            self.experts.setdefault(kind, set()).add(expert)


def values(file: FileIO, t: Tensor, key: str | None, scratch: np.ndarray, advance: Callable[[int], None]) -> list[Finding]:
    """Read a tensor, expert by expert where it has them, and say which of its values are wrong, or that all are zero.

    `key` is our name, "" for a buffer that the model does not read, None for what is no part of it.
    """
    experts = t.shape[0] if key and has_experts(t, key) else 1
    scales, matrix = is_scales(t, key), len(t.shape) > 1 and bool(key) and not str(key).endswith((".scales", ".bias"))
    itemsize = FORMATS[t.dtype].unsigned.itemsize if t.dtype in FORMATS else 1
    tally, zeros, begin = Tally(), [], 0
    file.seek(t.offset)
    for expert in range(experts):
        zero = t.nbytes > 0
        for run in chunks(file, t, t.nbytes // experts, scratch):
            zero &= examine(run, t.dtype, scales, tally, begin, expert)
            begin += len(run) // itemsize
            advance(len(run))
        if zero and matrix:
            zeros.append(expert)
    findings = [finding(t, key or "", kind, tally, experts) for kind in tally.counts]
    if key == "":
        findings = [replace(f, severity=WARNING) for f in findings]
    if zeros:
        message = "all zero" if len(zeros) == experts else f"all zero in {len(zeros)} of {experts} experts"
        findings.append(Finding(WARNING, "zero", message, t.path, t.name, experts=tuple(zeros) if experts > 1 else ()))
    return findings


def has_experts(t: Tensor, key: str) -> bool:
    """Whether a tensor's first axis counts experts: GPT-OSS's matrices and their biases, where GPT-2's have an axis less."""
    stacked = key.split(".")[1:2] in (["gate_up"], ["down"]) and len(t.shape) > (1 if key.endswith(".bias") else 2)
    return stacked and t.dtype in DTYPES and t.shape[0] > 0


def is_scales(t: Tensor, key: str | None) -> bool:
    """Whether a tensor is the scales of MXFP4 weights."""
    return key is not None and key.endswith(".scales") and t.dtype == "U8"


def chunks(file: FileIO, t: Tensor, nbytes: int, scratch: np.ndarray) -> Iterator[np.ndarray]:
    """The next bytes of a file, u8, some at a time, each time in `scratch`. Raises ToyllmError where the file ends before them."""
    while nbytes:
        run = scratch[: min(nbytes, len(scratch))]
        filled = 0
        while filled < len(run):
            count = file.readinto(run[filled:].data)
            if not count:
                raise ToyllmError(f"{t.path}: changed while open: it ends within tensor {brief(t.name)}")
            filled += count
        nbytes -= filled
        yield run


def examine(run: np.ndarray, dtype: str, scales: bool, tally: Tally, begin: int, expert: int) -> bool:
    """Take what is wrong in a run of bytes into the tally; True if all its values are zero. `begin` is its first value's flat index."""
    if scales:
        if run.max() > LARGEST_SCALE:
            tally.add("scale", begin + np.flatnonzero(run == NAN_SCALE), expert)
            tally.add("large", begin + np.flatnonzero((run > LARGEST_SCALE) & (run < NAN_SCALE)), expert)
        return False
    if dtype not in FORMATS:
        return not run.max()
    form = FORMATS[dtype]
    unsigned, sign = run.view(form.unsigned), 1 << (8 * form.unsigned.itemsize - 1)
    top, top_signed = int(unsigned.max()), int(run.view(form.signed).max())
    if top >= sign + form.infinity or top_signed >= form.infinity:
        magnitude = unsigned & form.unsigned.type(sign - 1)
        tally.add("nan", begin + np.flatnonzero(magnitude > form.infinity), expert)
        tally.add("inf", begin + np.flatnonzero(magnitude == form.infinity), expert)
    return top_signed <= 0 and top in (0, sign)


WORDS = {
    "nan": "NaN",
    "inf": "infinity",
    "scale": "scale 255, the format's NaN",
    "large": "scale 253 or 254, with which codes of 4 and 6 exceed f32",
}


def index_of(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A flat index as one an axis."""
    return tuple(int(i) for i in np.unravel_index(flat, shape)) if shape else ()


def finding(t: Tensor, key: str, kind: str, tally: Tally, experts: int) -> Finding:
    """What a tally says of one kind, with the place of the first."""
    place = index_of(tally.first[kind], t.shape)
    message = f"{WORDS[kind]}: {tally.counts[kind]:,}, the first at {list(place)}"
    if experts > 1:
        message += f", in expert {place[0]}"
        if key.split(".")[1] == "gate_up":
            row = place[-1] if key.endswith(".weight") else place[1]
            message += f", row {row // 2} of {'up' if row % 2 else 'gate'}"
    severity, kind_shown = (WARNING, "scale") if kind == "large" else (ERROR, kind)
    hit = tuple(sorted(tally.experts[kind])) if experts > 1 else ()
    return Finding(severity, kind_shown, message, t.path, t.name, place, hit, tally.counts[kind])
