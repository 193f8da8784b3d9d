"""What the three scripts of the recipe share: a line to stderr, late imports, files that appear whole, one way to end."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...kernels.errors import ToyllmError


def say(text: str) -> None:
    """A line of progress, to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def imported(name: str) -> Any:
    """The module `name` of torch or transformers, which training needs and the package does not."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        message = f"training needs {error.name}, which is not installed. Run: pip install torch==2.13.0 transformers==5.23.0"
        raise ToyllmError(message) from error


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """An empty folder to write files in; they replace those of `folder` if the block succeeds, and vanish if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        yield Path(partial)
        for file in sorted(Path(partial).iterdir()):
            file.replace(folder / file.name)


def run(main: Callable[[list[str]], None]) -> None:
    """Run a script on the command line's arguments; a failure is one line on stderr and exit code 1."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ToyllmError, OSError) as error:
        say(f"error: {error}")
        sys.exit(1)
