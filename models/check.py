"""A checkpoint examined whole: every file, every tensor's name, shape and dtype, every value; all that does not hold, not only the first.

Values are read once, a few megabytes at a time. Two maxima tell whether a run of floats is sound: of their bits as unsigned integers,
where infinities and NaN of negative sign come last, and as signed ones, where those of positive sign do. Only a run that is not is
looked at closely. Of MXFP4 the scales are: 255 is the format's NaN; from 253 on codes of 4 and 6 exceed the largest f32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import ToyllmError
from .checkpoint import DTYPES, MAX_JSON, Tensor, brief, map_file, no_weights, parse_object, require_file, shard_path
from .config import load_config
from .location import ModelFiles
from .params import specs_for
from .weights import Spec

CHUNK = 2 * 2**20  # bytes a read: both maxima then come from the processor's caches
LARGEST_SCALE, NAN_SCALE = 252, 255  # a scale byte s is 2^(s − 127): the last with which every code is finite in f32, and NaN
ERROR, WARNING = "error", "warning"
MATRIX_DTYPES = ("F32", "F16", "BF16")


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


@dataclass(frozen=True)
class Report:
    """What was read, and everything found."""

    tensors: int
    nbytes: int  # of values
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        """Whether there is no error."""
        return all(finding.severity != ERROR for finding in self.findings)


def check(files: ModelFiles, progress: Callable[[int, int], None] | None = None) -> Report:
    """Examine a model's weights, calling progress(bytes done, bytes in all).

    Raises ToyllmError only where there are no weights at all, or where a file cannot be read on; all else is a finding.
    """
    tensors, findings = structure(files)
    keys, more = architecture(files, tensors)
    findings += more
    total, done = sum(t.nbytes for t in tensors), 0
    scratch = np.empty(CHUNK, np.uint8)

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    for path in dict.fromkeys(t.path for t in tensors):
        try:
            with FileIO(path) as file:
                for t in tensors:
                    if t.path == path:
                        findings += values(file, t, keys.get(t.name), scratch, advance)
        except OSError as error:
            raise ToyllmError(f"{path}: cannot be read ({error.strerror})") from error
    return Report(len(tensors), done, tuple(findings))


# ---- files ------------------------------------------------------------------------------------------------------------------


def structure(files: ModelFiles) -> tuple[list[Tensor], list[Finding]]:
    """The tensors of all files that can be read, in file order, and what is wrong with the files and their index."""
    if files.weights is not None:
        return read_shard(files.weights)
    if files.index is None:
        raise no_weights(files.folder)
    try:
        weight_map, size = read_weight_map(files.index)
    except ToyllmError as error:
        return [], [Finding(ERROR, "index", str(error), files.index)]
    tensors: list[Tensor] = []
    findings: list[Finding] = []
    for name in sorted(set(weight_map.values())):
        try:
            path = shard_path(files.index, name)
        except ToyllmError as error:
            findings.append(Finding(ERROR, "file", str(error), files.index.parent / name))
            continue
        found, wrong = read_shard(path)
        tensors += found
        findings += wrong
    return tensors, findings + held_against_index(files.index, weight_map, size, tensors, findings)


def read_shard(path: Path) -> tuple[list[Tensor], list[Finding]]:
    """One file's tensors, or why it has none."""
    try:
        return map_file(path)[1], []
    except ToyllmError as error:
        return [], [Finding(ERROR, "file", str(error), path)]


def read_weight_map(index: Path) -> tuple[dict[str, str], Any]:
    """An index's names of tensors with those of their files, and the total size it gives, if any. Raises ToyllmError."""
    require_file(index)
    if index.stat().st_size > MAX_JSON:
        raise ToyllmError(f"{index}: larger than {MAX_JSON:,} bytes; no index of shards is")
    document = parse_object(index.read_bytes(), index)
    weight_map, metadata = document.get("weight_map"), document.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ToyllmError(f'{index}: expected "weight_map" with tensor names and their files; download it again')
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def held_against_index(index: Path, weight_map: dict[str, str], size: Any, tensors: list[Tensor], known: list[Finding]) -> list[Finding]:
    """Where index and shards disagree; shards that are known to be damaged are not complained of once more."""
    findings = []
    where = {(t.name, t.path.name) for t in tensors}
    damaged = {finding.path.name for finding in known}
    for name, shard in weight_map.items():
        if (name, Path(shard).name) not in where and Path(shard).name not in damaged:
            findings.append(Finding(ERROR, "index", f"{shard} has no such tensor, which the index says is there", index, name))
    for t in tensors:
        if t.name not in weight_map:
            findings.append(Finding(ERROR, "index", f"in {t.path.name}, but not in the index", t.path, t.name))
    nbytes = sum(t.nbytes for t in tensors)
    if type(size) is int and size != nbytes and not damaged:
        findings.append(Finding(WARNING, "index", f"total_size {size:,}, the shards hold {nbytes:,} bytes of tensors", index))
    return findings


# ---- names, shapes, dtypes --------------------------------------------------------------------------------------------------


def architecture(files: ModelFiles, tensors: list[Tensor]) -> tuple[dict[str, str], list[Finding]]:
    """Our names of the tensors, by the checkpoint's, and what differs from the architecture; empty for a buffer that is not read."""
    try:
        family, config = load_config(files)
    except ToyllmError as error:
        where = files.config or files.folder
        return {}, [Finding(ERROR, "config", f"{error}; names and shapes were not held against an architecture", where)]
    specs = specs_for(family, config, [t.name for t in tensors])
    ours = {spec.name: key for key, spec in specs.items()}
    keys: dict[str, str] = {}
    findings: list[Finding] = []
    first: dict[str, Tensor] = {}
    for t in tensors:
        bare = next(t.name.removeprefix(p) for p in family.PREFIXES if t.name.startswith(p))
        if family.IGNORED.fullmatch(bare):
            keys[t.name] = ""
        elif bare not in ours:
            findings.append(Finding(ERROR, "extra", "not part of this architecture", t.path, t.name))
        elif bare in first:
            findings.append(
                Finding(ERROR, "twice", f"the same weight as {brief(first[bare].name)} in {first[bare].path.name}", t.path, t.name)
            )
        else:
            first[bare], keys[t.name] = t, ours[bare]
            findings += fits(t, ours[bare], specs[ours[bare]])
    missing = [spec.name for spec in specs.values() if spec.name not in first and not spec.optional]
    return keys, findings + [
        Finding(ERROR, "missing", "not in the checkpoint", files.index or files.weights or files.folder, n) for n in missing
    ]


def fits(t: Tensor, key: str, spec: Spec) -> list[Finding]:
    """Whether a tensor has the shape and one of the dtypes that the architecture wants."""
    findings = []
    if t.shape != spec.shape:
        findings.append(Finding(ERROR, "shape", f"expected {list(spec.shape)}, found {brief(list(t.shape))}", t.path, t.name))
    allowed = ("U8",) if key.endswith((".blocks", ".scales")) else MATRIX_DTYPES
    if t.dtype not in allowed:
        findings.append(Finding(ERROR, "dtype", f"expected {' or '.join(allowed)}, found {t.dtype}", t.path, t.name))
    return findings


# ---- values -----------------------------------------------------------------------------------------------------------------


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
