"""Progress display: a bar on a terminal, occasional plain lines in a log."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tinyclip.common.files import printable

WAIT = 5.0  # seconds before work is reported
BAR_WAIT = 1.0  # the same on a terminal; keeps quick work from flickering
RARELY, RAREST = 10.0, 60.0  # seconds between lines, at first and at most; grows over time


def duration(seconds: float) -> str:
    """Format a duration: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"


def columns() -> tuple[TextColumn | BarColumn | MofNCompleteColumn | TimeRemainingColumn, ...]:
    """Return the columns of a bar, whose tasks have a field `figures`."""
    texts = [TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[figures]}")]
    return texts[0], BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), texts[1]


@dataclass
class Work:
    """A task in progress."""

    since: float
    first: int  # amount done at the start
    due: float  # time of the next display
    done: int
    bar: TaskID | None = None
    timer: threading.Timer | None = None


class Meter:
    """Displays what `progress.tell` reports; under torchrun, only the first process shows anything."""

    def __init__(self, console: Console, bars: Progress | None = None, wait: float | None = None) -> None:
        """
        Args:
            bars: an existing display to join; by default bars appear when needed and are removed afterwards.
            wait: seconds until work is shown.
        """
        self.console, self.bars, self.own = console, bars, bars is None
        self.given = wait
        self.works: dict[str, Work] = {}
        self.process, self.lock = os.getpid(), threading.RLock()  # forked workers and threads report as well

    def __call__(self, what: str, done: int, total: int | None, unit: str) -> None:
        if os.environ.get("RANK", "0") != "0" or os.getpid() != self.process:
            return
        with self.lock:
            self._take(what, done, total, unit)

    def _take(self, what: str, done: int, total: int | None, unit: str) -> None:
        now = time.monotonic()
        if total is not None and done >= total:
            self._end(what)
            return
        if what in self.works and done < self.works[what].done:  # it restarted without ending
            self._end(what)
        if what not in self.works:
            self.works[what] = Work(now, done, now + self.wait, done)
            if total is None and not unit:
                self._alone(what)
        work = self.works[what]
        work.done = done
        if now < work.due:
            return
        if self.draws:
            self._draw(what, work, total, unit)
        else:
            work.due = now + min(RAREST, max(RARELY, (now - work.since) / 20))
            self.console.print(_line(what, work, total, unit, now), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bars while something else is printed; the next progress shows them again."""
        if self.own and self.bars is not None:
            self.bars.stop()
            self.bars = None
            for work in self.works.values():
                work.bar = None

    def stop(self) -> None:
        """Forget all work, which has ended or failed."""
        for what in list(self.works):
            self._end(what)
        self.close()

    @property
    def draws(self) -> bool:
        """Whether the output can be redrawn."""
        return self.console.is_terminal and self.console.is_interactive

    @property
    def wait(self) -> float:
        return self.given if self.given is not None else BAR_WAIT if self.draws else WAIT

    def _alone(self, what: str) -> None:
        """Show a task without intermediate progress, by a timer."""

        work = self.works[what]

        def speak() -> None:
            if self.works.get(what) is work:
                self(what, 0, None, "")
                arm(RARELY)

        def arm(seconds: float) -> None:
            work.timer = threading.Timer(seconds, speak)
            work.timer.daemon = True
            work.timer.start()

        arm(self.wait)

    def _draw(self, what: str, work: Work, total: int | None, unit: str) -> None:
        if self.bars is None:
            # Else rich would redirect printed text to the bar's console, even if stdout is piped.
            apart: dict[str, Any] = {"redirect_stdout": False, "redirect_stderr": False}
            self.bars = Progress(*columns(), console=self.console, transient=True, **apart)
            self.bars.start()
        if work.bar is None:
            work.bar = self.bars.add_task(printable(what), total=total, figures=printable(unit), completed=work.done)
        self.bars.update(work.bar, total=total, completed=work.done)

    def _end(self, what: str) -> None:
        work = self.works.pop(what, None)
        if work is None:
            return
        if work.timer is not None:
            work.timer.cancel()
        if self.bars is not None and work.bar is not None:
            self.bars.remove_task(work.bar)
            if self.own and not self.bars.tasks:
                self.close()


def _line(what: str, work: Work, total: int | None, unit: str, now: float) -> str:
    """Return a progress line: `calibrating: 50 of 200 batches (25 %), 4 min left`."""
    passed, done = now - work.since, work.done - work.first
    if total is None:
        return f"{what}: {work.done:,} {unit}".rstrip() if unit else f"{what}, for {duration(passed)} now"
    text = f"{what}: {work.done:,} of {total:,} {unit}".rstrip() + f" ({100 * work.done / total:.0f} %)"
    return f"{text}, {duration(passed / done * (total - work.done))} left" if done > 0 else text
