"""A watchdog that ends a stalled run and reports where it hangs. No torch here."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

HURRIED = 120.0  # seconds a step may take after a stop signal, unless earlier steps took longer
GRACE = 60.0  # seconds to end by itself before the process is killed
GO_ON = "continue from the last checkpoint with --resume"
PACKAGE = Path(__file__).parent.parent


class Stalled(ValueError):
    """Raised when there has been no progress for too long; the message says where."""


@dataclass(eq=False)
class Work:
    """One task of the main thread; `seconds`: how long it may take, if longer than the usual limit."""

    name: str
    seconds: float = 0.0


class Watchdog:
    """A thread that watches the main thread.

    Args:
        minutes: how long one task may take; None: no limit.
        who: name of this process in the message, if there are several.
    """

    def __init__(self, minutes: float | None = None, who: str = "") -> None:
        self.minutes, self.who = minutes, who
        self._work = Work("starting")
        self._hurried = False
        self._text = ""

    def doing(self, name: str, seconds: float = 0.0) -> None:
        """Note what the main thread does next, which also shows that it is alive."""
        self._work = Work(name, seconds)

    def hurry(self) -> None:
        """Shorten the time limit of the current task, because the run was asked to stop."""
        self._hurried = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the body in the main thread. In another thread, which receives no signals, do nothing.

        Raises:
            Stalled: in the body, where it hangs. If that cannot be raised, e.g. in a library call that never returns,
                the process prints the message and exits with code 2.
        """
        if self.minutes is None or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            raise Stalled(self._text)

        before = signal.signal(signal.SIGALRM, stop)
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(60 * self.minutes, over), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        except Exception:
            if self._text:  # the library that it was raised in may have wrapped it, as PyTorch's compiler does
                raise Stalled(self._text) from None
            raise
        finally:
            over.set()
            thread.join()
            signal.signal(signal.SIGALRM, before)

    def _watch(self, bound: float, over: threading.Event) -> None:
        work, waited, longest = self._work, 0.0, 0.0
        while waited < (patience := self._patience(work, bound, longest)):
            passed = _wait(over, patience)
            if over.is_set():
                return
            if work is not self._work:
                longest = longest if work.seconds else max(longest, waited)
                work, waited = self._work, 0.0
            waited += passed
        self._text = f"{self.who}no progress for {waited / 60:.3g} minutes while {work.name} ({_place()}); {GO_ON}"
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        left = GRACE
        while left > 0 and not over.is_set():
            left -= _wait(over, GRACE)
        if not over.is_set():
            print(f"tinyclip: {self._text}", file=sys.stderr, flush=True)
            os._exit(2)

    def _patience(self, work: Work, bound: float, longest: float) -> float:
        bound = max(bound, work.seconds)
        return min(bound, max(HURRIED, 3 * longest)) if self._hurried else bound


def _wait(over: threading.Event, patience: float) -> float:
    """Wait a little and return for how long. Time while the process was suspended, e.g. by Ctrl-Z, does not count."""
    tick, began = min(1.0, patience / 10), time.monotonic()
    over.wait(tick)
    return min(time.monotonic() - began, 2 * tick)


def _place() -> str:
    """Describe where the main thread is: its innermost line, and the innermost line in tinyclip."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    places: list[str] = []
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        ours = file.is_relative_to(PACKAGE)
        if ours or not places:
            places.append(f"{file.name}:{frame.f_lineno} {frame.f_code.co_name}")
        if ours:
            break
        frame = frame.f_back
    return ", called by ".join(places)
