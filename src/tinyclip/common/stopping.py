"""How a command is asked to stop: Ctrl-C and SIGTERM raise wherever it is, so that every `finally` clears up."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

TWICE = 2.0  # seconds: `timeout` and groups of processes send a signal twice, which must not cut short the clearing up


class Terminated(SystemExit):
    """SIGTERM. Exit code 143."""

    signal_number = signal.SIGTERM

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `KeyboardInterrupt` at a SIGINT, `Terminated` at a SIGTERM; in the main thread, for others have no say."""
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
        """Where nothing can be raised, as in a destructor, it is raised again after."""
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
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
