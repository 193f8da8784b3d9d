"""A file of prompts, a JSON object a line: what each asks for, or what is wrong with it."""

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..kernels.errors import ToyllmError

if TYPE_CHECKING:
    from ..models.generation import Settings
    from ..models.model import Model as LoadedModel

WHOLE, NUMBER, TEXTS, COUNT = "a whole number", "a number", "a text or a list of texts", "a whole number from 1"
SETTINGS = {  # of a line: what its value is
    "max_tokens": WHOLE,
    "temperature": NUMBER,
    "top_k": WHOLE,
    "top_p": NUMBER,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "seed": WHOLE,
    "stop": TEXTS,
    "logprobs": WHOLE,
    "n": COUNT,
}
KEYS = ("prompt", "prompt_ids", "id", *SETTINGS)
EXAMPLE = '{"prompt": "Once upon a time"}'
MARK = b"\xef\xbb\xbf"
LARGEST = 2**63


@dataclass(frozen=True)
class Line:
    """One line of the input: a prompt with its settings and how many samples of it are wanted, or what is wrong."""

    number: int  # from 1
    id: str | int | None = None
    prompt: tuple[int, ...] = ()
    settings: "Settings | None" = None
    samples: int = 1
    error: str | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Which line an answer is to, as its document begins."""
        return {"line": self.number} | ({} if self.id is None else {"id": self.id})

    def seeded(self, sample: int) -> "Settings":
        """The settings of a sample: each one's seed is one more than that of the sample before it."""
        if self.settings is None:
            raise RuntimeError(f"line {self.number} has no settings to run with")
        return replace(self.settings, seed=((self.settings.seed or 0) + sample) % LARGEST)


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a file without their ends; behind the last line end there is none. A byte order mark is no text."""
    lines = data.removeprefix(MARK).split(b"\n")
    return lines if lines[-1] else lines[:-1]


def read_line(number: int, data: bytes, model: "LoadedModel", base: "Settings", samples: int, special: bool, room: int) -> Line:
    """A line of the input: its settings are `base` but for what it says itself, its seed is `line_seed` unless it gives one.

    Whatever is wrong, a prompt that does not fit `room` positions included, is in its `error`.
    """
    name = None
    try:
        asked = object_in(data)
        name = checked_id(asked.get("id"))
        found = settings_of(asked, number)
        if found.get("stop") and model.tokenizer is None:
            raise ToyllmError("stop: this model has no tokenizer, so no text to stop at")  # noqa: TRY301
        prompt = prompt_of(asked, model, special)
        if len(prompt) > room:
            raise ToyllmError(f"the prompt has {len(prompt)} tokens and the context {room}: shorten the prompt, or raise --context")  # noqa: TRY301
    except ToyllmError as error:
        return Line(number, name, error=" ".join(str(error).split()))
    count = found.pop("n", samples)
    return Line(number, name, tuple(prompt), replace(base, **{"seed": line_seed(base.seed or 0, number)} | found), count)


def line_seed(seed: int, number: int) -> int:
    """The seed of a line that gives none: the first 32 bits of NumPy's SeedSequence([the run's seed, the line's number])."""
    import numpy as np

    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def object_in(data: bytes) -> dict[str, Any]:
    """The object in a line of JSON, all its keys known, without those that are null. Raises ToyllmError."""
    from ..models.json_files import brief, parse

    try:
        found = parse(data)
    except UnicodeDecodeError as error:
        raise ToyllmError(f"byte {error.start} (0x{data[error.start]:02x}): expected UTF-8 ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        raise ToyllmError(f"expected a JSON object such as {EXAMPLE}: {error}") from error
    if not isinstance(found, dict):
        raise ToyllmError(f"expected a JSON object such as {EXAMPLE}, found {short(found)}")
    unknown = next((key for key in found if key not in KEYS), None)
    if unknown is not None:
        raise ToyllmError(f"unknown key {brief(unknown)}: expected {', '.join(KEYS)}")
    return {key: value for key, value in found.items() if value is not None}


def prompt_of(asked: dict[str, Any], model: "LoadedModel", special: bool) -> list[int]:
    """The ids of a line's prompt, checked. Raises ToyllmError."""
    from ..models.generation import encode_prompt

    if ("prompt" in asked) == ("prompt_ids" in asked):
        raise ToyllmError("expected prompt or prompt_ids, " + ("not both" if "prompt" in asked else "found neither"))
    if "prompt" in asked:
        if not isinstance(asked["prompt"], str):
            raise ToyllmError(f"prompt: expected a text, found {short(asked['prompt'])}")
        return encode_prompt(model, asked["prompt"], special)
    ids = asked["prompt_ids"]
    if not isinstance(ids, list) or not all(is_whole(i) and 0 <= i < LARGEST for i in ids):
        raise ToyllmError(f"prompt_ids: expected a list of token ids such as [464, 3290], found {short(ids)}")
    return encode_prompt(model, ids)


def settings_of(asked: dict[str, Any], number: int) -> dict[str, Any]:
    """The settings of a line of that number, found right. Raises ToyllmError."""
    from ..models.generation import check_bounds

    given = {key: asked[key] for key in SETTINGS if key in asked}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    for key, value in given.items():
        if not fits(SETTINGS[key], value):
            raise ToyllmError(f"{key}: expected {SETTINGS[key]}, found {short(asked[key])}")
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    check_bounds(given, f"line {number}")
    return given


def fits(kind: str, value: Any) -> bool:
    """Whether a value of a line is what its setting takes."""
    if kind == TEXTS:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if kind == NUMBER and isinstance(value, float):
        return math.isfinite(value)
    return is_whole(value) and abs(value) < LARGEST and (kind != COUNT or value > 0)


def checked_id(value: Any) -> str | int | None:
    """A line's id, which its answer repeats. Raises ToyllmError."""
    if value is None or isinstance(value, str) or (is_whole(value) and abs(value) < LARGEST):
        return value
    raise ToyllmError(f"id: expected a text or a whole number, found {short(value)}")


def is_whole(value: Any) -> bool:
    """Whether a value is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def short(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
