"""The `toyllm` command, as `python -m toyllm` runs it too."""

import os
import signal
import sys


def main() -> None:
    """Run one command and end the process.

    Ctrl-C ends it with 130 from here on: while the commands are imported at once, for nothing has been begun, then as each command has it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from .cli.main import main as run_command

    run_command()


if __name__ == "__main__":
    sys.exit(main())
