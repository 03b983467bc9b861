"""Progress of long work: a bar on a terminal, plain lines elsewhere, nothing when called from Python."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable

import pytest

from tinyclip.cli import meter
from tinyclip.cli.meter import Meter, duration
from tinyclip.cli.terminal import PlainConsole
from tinyclip.common import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that advances only when told to."""
    now = [1000.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def log() -> tuple[io.StringIO, PlainConsole]:
    file = io.StringIO()
    return file, PlainConsole(file=file, width=120)


def test_a_log_gets_a_plain_line_now_and_then(clock: Callable[[float], None]) -> None:
    file, console = log()
    with progress.listening(Meter(console)):
        for _ in progress.track(range(2000), "calibrating", 2000, "batches"):
            clock(0.5)
    lines = file.getvalue().splitlines()
    assert lines[0] == "calibrating: 10 of 2,000 batches (0 %), 17 min left"
    assert lines[1] == "calibrating: 30 of 2,000 batches (2 %), 16 min left"
    assert 20 < len(lines) < 100  # in 1,000 seconds: at first ten seconds apart, then further and further
    assert not any(ord(letter) < 32 for line in lines for letter in line)


def test_quick_work_and_python_alone_hear_nothing(clock: Callable[[float], None]) -> None:
    file, console = log()
    with progress.listening(Meter(console)):
        for _ in progress.track(range(100), "checking", 100, "samples"):
            clock(0.02)
    assert list(progress.track(range(3), "alone")) == [0, 1, 2] and not progress.heard()
    assert file.getvalue() == ""


def test_work_of_unknown_length_and_work_that_goes_on(clock: Callable[[float], None]) -> None:
    file, console = log()
    listener = Meter(console)
    with progress.listening(listener):
        progress.tell("reading", 0, None, "texts")
        clock(6)
        progress.tell("reading", 1234, None, "texts")
        progress.tell("caching", 500, 1000, "pictures")  # half of them were already there
        clock(10)
        progress.tell("caching", 600, 1000, "pictures")
        progress.ended("reading")
        progress.ended("caching")
        progress.ended("never begun")
    assert file.getvalue().splitlines() == [
        "reading: 1,234 texts",
        "caching: 600 of 1,000 pictures (60 %), 40 s left",
    ]
    assert not listener.works


def test_work_of_one_piece_is_spoken_for() -> None:
    spoken, (file, console) = threading.Event(), log()

    class Speaking(PlainConsole):
        def print(self, *objects: object, **options: object) -> None:
            super().print(*objects, **options)  # type: ignore[arg-type]
            spoken.set()

    console = Speaking(file=file)
    listener = Meter(console, wait=0.01)
    with progress.listening(listener), progress.busy("loading x"):
        assert spoken.wait(30)
    assert file.getvalue().startswith("loading x, for 1 s now") and not listener.works


def test_a_bar_is_taken_back_and_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    console = PlainConsole(file=file, force_terminal=True, width=120)
    listener = Meter(console, wait=0)
    with progress.listening(listener):
        for number in progress.track(range(3), "packing", 3, "pictures"):
            assert listener.bars is not None and len(listener.bars.tasks) == 1
            if number == 1:
                listener.close()
        assert listener.bars is None
    assert "packing" in file.getvalue() and file.getvalue().rstrip().endswith("\x1b[?25h")


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    file, console = log()
    listener = Meter(console, wait=0)
    monkeypatch.setenv("RANK", "1")
    listener("packing", 1, 3, "pictures")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(meter.os, "getpid", lambda: -1)  # a forked worker
    listener("packing", 1, 3, "pictures")
    assert file.getvalue() == ""


def test_durations() -> None:
    said = [duration(seconds) for seconds in (0, 1, 89, 90, 600, 5300, 5400, 100_000)]
    assert said == ["1 s", "1 s", "89 s", "2 min", "10 min", "88 min", "1 h 30 min", "27 h 47 min"]


def test_megabytes() -> None:
    heard: list[tuple[object, ...]] = []
    with progress.listening(lambda *told: heard.append(told)):
        for done in (0, 1_500_000, 2_500_000):
            progress.tell_bytes("x", done, 2_500_000)
        progress.tell_bytes("y", 1, None)
    assert heard == [("x", 0, 3, "MB"), ("x", 1, 3, "MB"), ("x", 2, 2, "MB"), ("y", 0, None, "MB")]
