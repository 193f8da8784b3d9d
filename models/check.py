"""A checkpoint examined whole: files, names, shapes, dtypes, every value; all that does not hold is found, not only the first."""

from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.errors import ToyllmError
from .check_values import CHUNK, ERROR, WARNING, Finding, values
from .checkpoint import Tensor, map_file, no_weights, shard_path
from .config import load_config
from .json_files import brief, read_object
from .location import ModelFiles
from .params import sizes, specs_for
from .weights import Spec

MATRIX_DTYPES = ("F32", "F16", "BF16")


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
    document = read_object(index)
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
        specs = specs_for(family, config, [t.name for t in tensors])
    except ToyllmError as error:
        where = files.config or files.folder
        return {}, [Finding(ERROR, "config", f"{error}; names and shapes were not held against an architecture", where)]
    ours = {spec.name: key for key, spec in specs.items()}
    keys: dict[str, str] = {}
    s, findings = sizes(config), []
    if any(key.endswith(".blocks") for key in specs) and (s.D % 32 or s.F % 32):
        message = f"MXFP4 needs sizes that are multiples of 32, found hidden_size {s.D}, intermediate_size {s.F}"
        findings.append(Finding(ERROR, "config", message, files.config or files.folder))
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
