"""What cases of the corpus are made of: small sound models, their parts as bytes, and what a command is to do about a bad one."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOLDENS = Path(__file__).parents[1] / "models" / "goldens"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I64": 8, "I8": 1}
NAN, INFINITY = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))

Make = Callable[[Path], object]  # writes the files of a case into an empty folder
Tensors = dict[str, tuple[str, list[int], bytes]]  # name -> dtype, shape, values as they are stored


@dataclass(frozen=True)
class Command:
    """A command line, in which {} stands for the folder, and how it is to end."""

    line: tuple[str, ...]
    code: int
    says: str  # a regular expression, found in stderr; for code 3, and for 0 where it names no note, in stdout


@dataclass(frozen=True)
class Case:
    """Files that a stranger could send, and the commands that meet them."""

    area: str
    name: str
    make: Make
    commands: tuple[Command, ...]

    def __str__(self) -> str:
        return f"{self.area}: {self.name}"


def params(says: str, code: int = 1) -> Command:
    """Headers alone are read."""
    return Command(("params", "-m", "{}"), code, says)


def check(says: str, code: int = 3) -> Command:
    """Everything is read, and each finding is a row."""
    return Command(("check", "-m", "{}"), code, says)


def dump(says: str, *more: str, code: int = 1) -> Command:
    """Weights are shown."""
    return Command(("dump-tensor", "-m", "{}", *more), code, says)


def generate(says: str = "", *more: str, code: int = 1, ids: str = "1 2 3") -> Command:
    """The model runs, on ids; with "" as `ids`, on the prompt in `more`."""
    prompt = ("--prompt-ids", ids) if ids else ()
    settings = () if any(word.startswith(("--temp", "--max")) for word in more) else ("--max-tokens", "3", "--temperature", "0")
    return Command(("generate", "-m", "{}", *prompt, *settings, *more), code, says)


def runs(says: str = "", *more: str, ids: str = "1 2 3") -> Command:
    """The model runs to the end."""
    return generate(says, *more, code=0, ids=ids)


# ---- models -----------------------------------------------------------------------------------------------------------------


def gpt2(folder: Path) -> Path:
    """A GPT-2 of three layers, 97 tokens and 64 positions, without a tokenizer."""
    return copied("gpt2/baseline", folder)


def gpt_oss(folder: Path) -> Path:
    """A GPT-OSS of three layers of eight experts in MXFP4, 97 tokens."""
    return copied("gpt_oss/baseline", folder)


def copied(golden: str, folder: Path) -> Path:
    """A copy of a checkpoint of the goldens."""
    shutil.copytree(GOLDENS / golden, folder, dirs_exist_ok=True)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    """What its config.json says."""
    return json.loads((folder / "config.json").read_text())


def with_config(base: Make = gpt2, **changes: Any) -> Make:
    """A model whose config.json says something else; a key of the value ... is left out."""

    def make(folder: Path) -> None:
        base(folder)
        document = {key: value for key, value in (config_of(folder) | changes).items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(document))

    return make


def with_file(name: str, content: str | bytes | object, base: Make = gpt2) -> Make:
    """A model with a file beside it, or another in its place: bytes, text, or what is to be written as JSON."""

    def make(folder: Path) -> None:
        base(folder)
        data = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))

    return make


def with_tensors(change: Callable[[Tensors], object], base: Make = gpt2) -> Make:
    """A model whose tensors are changed in place."""

    def make(folder: Path) -> None:
        base(folder)
        tensors = read_tensors(folder / WEIGHTS)
        change(tensors)
        (folder / WEIGHTS).write_bytes(file_of(tensors))

    return make


def poked(name: str, place: int, value: bytes, base: Make = gpt2) -> Make:
    """A model with other bytes at an element of a tensor, which has elements as long as `value`; a negative one counts from the end."""

    def change(tensors: Tensors) -> None:
        dtype, shape, data = tensors[name]
        at = place * len(value) % len(data)
        tensors[name] = dtype, shape, data[:at] + value + data[at + len(value) :]

    return with_tensors(change, base)


# ---- safetensors ------------------------------------------------------------------------------------------------------------


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file's bytes from any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: tuple[Any, ...] = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def read_tensors(path: Path) -> Tensors:
    """The tensors of a sound file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    spans = {name: [start + at for at in found["data_offsets"]] for name, found in header.items()}
    return {name: (found["dtype"], found["shape"], content[slice(*spans[name])]) for name, found in header.items()}


def file_of(tensors: Tensors) -> bytes:
    """A sound file of these tensors."""
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = entry(dtype, tuple(shape), end, end + len(data))
        end += len(data)
    return raw(header, b"".join(data for _, _, data in tensors.values()))


def sharded(folder: Path) -> Path:
    """The GPT-2 in two shards with their index."""
    gpt2(folder)
    tensors = read_tensors(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    for i in range(2):
        (folder / f"model-{i}.safetensors").write_bytes(file_of({name: tensors[name] for name in names[i::2]}))
    write_index(folder, {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    """Write an index."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_map(folder: Path) -> dict[str, str]:
    """What the index says."""
    return json.loads((folder / INDEX).read_text())["weight_map"]
