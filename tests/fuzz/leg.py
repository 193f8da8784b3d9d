"""What every leg of fuzzing shares: a trial makes one input from its own seed, and says how it ended or raises a find."""

import contextlib
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from toyllm.kernels.errors import ToyllmError

LONGEST = 4000  # characters of an error: one line that a person reads, whatever the file holds

Trial = Callable[[Random], str]  # makes an input, tries it, and says how it ended; whatever it raises is a find


class Find(Exception):  # noqa: N818 - named for what it says
    """Something does not hold that should hold for any input."""


@dataclass(frozen=True)
class Leg:
    """One kind of input. `prepare` makes the trial, which may use a scratch folder."""

    about: str
    prepare: Callable[[Path], Trial]


@dataclass
class Result:
    """What came of a leg: how many trials ended in each way, and the finds by the number of their trial."""

    ended: Counter[str] = field(default_factory=Counter)
    finds: dict[int, BaseException] = field(default_factory=dict)
    seconds: float = 0.0


def run(leg: Leg, seed: int, trials: range, seconds: float | None = None, progress: Callable[[int], None] = lambda _: None) -> Result:
    """Trials of a leg by number, each with its own random numbers, so that any of them can be had again alone."""
    result, start = Result(), time.perf_counter()
    with ready(leg) as trial:
        for number in trials:
            try:
                result.ended[trial(Random(f"{seed} {number}"))] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 - a panic of a Rust library is a BaseException
                result.ended["find"] += 1
                result.finds[number] = error
            if seconds is not None and time.perf_counter() - start > seconds:
                break
            progress(number + 1 - trials.start)
    result.seconds = time.perf_counter() - start
    return result


@contextlib.contextmanager
def ready(leg: Leg) -> Iterator[Trial]:
    """A leg's trial, in a scratch folder; warnings are finds: a person would see them on the terminal, over several lines."""
    with scratch_folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        yield leg.prepare(folder)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in memory, where the system has one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


def refused(error: ToyllmError) -> str:
    """An error's line, held to be one that a person can read. Raises Find."""
    line = str(error)
    if not line or "\n" in line or "\r" in line:
        raise Find(f"the error is not one line: {line!r}")
    if len(line) > LONGEST:
        raise Find(f"the error has {len(line):,} characters: {line[:200]!r}")
    return line
