"""Stopping a command: Ctrl-C and SIGTERM raise an exception wherever it is, so that every `finally` cleans up."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes
TWICE = 2.0  # seconds: `timeout` and process groups send a signal twice, which must not interrupt the cleanup


class Terminated(SystemExit):
    """SIGTERM. Exit code 143."""

    signal_number = signal.SIGTERM

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def stoppable(exiting: bool = False) -> Iterator[None]:
    """Raise `KeyboardInterrupt` on SIGINT and `Terminated` on SIGTERM; only the main thread can handle signals.

    Args:
        exiting: the process exits afterwards. After a stop it ignores further signals, so that it exits with its own
            code and finishes what `atexit` does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last = -TWICE

    def handle(number: int, frame: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= TWICE:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def unraisable(lost: sys.UnraisableHookArgs, /) -> None:
        """Send the signal again later if it was raised where exceptions are lost, e.g. in a destructor."""
        nonlocal last
        if isinstance(lost.exc_value, (KeyboardInterrupt, Terminated)):
            last = -TWICE
            number = getattr(lost.exc_value, "signal_number", signal.SIGINT)
            threading.Timer(0.05, signal.raise_signal, (number,)).start()
        else:
            hook(lost)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, handle) for number in numbers}
    stopped = False
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt) or getattr(error, "code", None) in STOPPED
        raise
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if exiting and stopped else handler)
