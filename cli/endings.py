"""How signals end a run: Ctrl-C, `kill`, `timeout` and a closing terminal all leave what was printed, and nothing half-written."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130
AGAIN_S = 0.01  # until a signal comes again whose exception was dropped


class Ended(SystemExit):
    """SIGTERM or SIGHUP. It is no KeyboardInterrupt: a chat goes on after one."""


INTERRUPTS = (KeyboardInterrupt, Ended)


def end(*_: Any) -> None:
    """Raise `Ended`: the handler of a signal."""
    raise Ended(INTERRUPTED)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the block SIGINT raises KeyboardInterrupt, and SIGTERM and SIGHUP raise `Ended`; on the main thread, where they arrive.

    A signal that is ignored stays so, as under `nohup`. Where Python has to drop an exception, as in a function that LLVM calls
    while it loads a kernel, the signal comes again a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: end, signal.SIGHUP: end}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    drop = sys.unraisablehook

    def again(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, INTERRUPTS):
            drop(unraisable)
            return
        number = signal.SIGTERM if issubclass(unraisable.exc_type, Ended) else signal.SIGINT
        timer = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = drop
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(error: BaseException | None) -> bool:
    """Whether an exception is an interrupt, or came of one: the end of a line that nobody reads any more fails behind it."""
    while error is not None:
        if isinstance(error, INTERRUPTS):
            return True
        error = error.__context__
    return False
