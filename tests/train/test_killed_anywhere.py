"""A run that is killed at any stage still ends as if nothing had happened; a run that hangs ends by itself and reports
where."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from functools import partial, reduce
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.helpers.models import ROOT
from tests.helpers.processes import SERVER, assert_same, begin, end
from tests.helpers.runs import auto, calibrated, recipe, resnet_recipe, stage
from tinyclip.common import watchdog
from tinyclip.common.watchdog import Stalled, Watchdog
from tinyclip.recipe.recipe import Recipe
from tinyclip.train import loop, setup
from tinyclip.train.resume import Interrupted

# Where a process kills itself: a function, before or after, which of its calls, and which of two processes.
Moment = tuple[str, str, int, int]
STAGES: list[Moment] = [
    ("train.setup.write_atomically", "after", 0, 0),  # only the recipe is written
    ("train.stage_start.calibrate", "after", 0, 0),
    ("train.loop.next_batch", "after", 0, 0),
    ("train.resume.save_into", "after", 0, 0),
    ("train.loop.save", "after", 0, 0),  # step 2 is saved but not evaluated
    ("train.loop.save_checkpoint", "before", 0, 0),  # best
    ("train.loop._judge", "after", 0, 0),
    ("train.loop.save", "after", 1, 0),  # step 4, the last
    ("train.loop.write_atomically", "after", 0, 0),  # result.json
    ("zoo.card.write_card", "before", 0, 0),
    # the stage with masks: evaluated at 2, cut at 4, evaluated at 4 and at 6
    ("train.loop.save", "after", 0, 0),
    ("train.loop.save", "after", 1, 0),
    ("train.pruner.Pruner.cut", "after", 0, 0),
    ("train.loop.save", "after", 0, 0),  # the cut student
    ("train.loop._judge", "before", 0, 0),
    ("train.loop.save", "after", 0, 0),
    ("train.loop.save", "after", 0, 0),  # step 6 is saved but not evaluated
    ("train.loop.save", "after", 1, 0),  # step 7, the last
    ("train.loop.finish", "before", 0, 0),
    ("train.loop.save_checkpoint", "before", 0, 0),  # student
]
OF_TWO: list[Moment] = [  # where processes wait for each other
    ("train.stage_start.calibrate", "after", 0, 0),
    ("train.loop.next_batch", "after", 0, 1),
    ("train.resume.save_into", "after", 0, 0),
    ("train.loop.save", "after", 0, 1),
    ("train.loop._judge", "after", 0, 0),
    ("train.loop.write_atomically", "before", 0, 0),
    ("train.loop.save", "after", 0, 0),
    ("train.loop.save", "after", 1, 1),
    ("train.pruner.Pruner.cut", "after", 0, 1),
    ("train.loop.save", "after", 0, 0),
    ("train.loop._judge", "before", 0, 0),
    ("train.loop.save", "after", 0, 1),
    ("train.loop.finish", "before", 0, 0),
]
STATISTICS: list[Moment] = [
    ("train.loop._reestimate", "before", 0, 1),
    ("train.loop.reestimate", "after", 0, 0),
    ("train.loop._reestimate", "after", 0, 0),
    ("train.loop.next_batch", "after", 1, 1),
]


def judged(model: Any, *_: Any) -> dict[str, float]:
    """Make the first evaluation of a stage its best."""
    return {"acc1": 1.0, "weights": sum(p.sum().item() for p in model.parameters())}


def evaluated(chosen: Recipe, **options: Any) -> Any:
    started = OWN_START(chosen, **options)
    started.evaluator = judged
    return started


OWN_START = setup.start


def doomed(moment: Moment | None, rank: int) -> None:
    """In a new process, arrange for it to kill itself at the given moment."""
    loop.start = evaluated  # type: ignore[assignment]
    if moment is None or rank != moment[3]:
        return
    name, when, which, _ = moment
    room, module, *attributes = name.split(".")
    owner = reduce(getattr, attributes[:-1], import_module(f"tinyclip.{room}.{module}"))
    own, calls = getattr(owner, attributes[-1]), itertools.count()

    def last(*args: Any, **options: Any) -> Any:
        mine = next(calls) == which
        if mine and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = own(*args, **options)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, attributes[-1], last)


def kill_at_each(whole: Recipe, parts: Recipe, moments: list[Moment], count: int) -> None:
    assert end(begin(whole, count, partial(doomed, None))) == [0] * count
    for name, when, which, rank in moments:
        moment = name, when, which, rank % count
        codes = end(begin(parts, count, partial(doomed, moment)))
        others = codes[: rank % count] + codes[rank % count + 1 :]
        assert codes[rank % count] == -signal.SIGKILL and others == [2] * (count - 1), (moment, codes)
    assert end(begin(parts, count, partial(doomed, None))) == [0] * count
    assert_same(Path(whole.output), Path(parts.output))


@pytest.mark.parametrize("moments", [STAGES, OF_TWO])
def test_a_kill_at_any_stage_of_a_run_changes_nothing(place: Path, tmp_path: Path, moments: list[Moment]) -> None:
    """With evaluations while the shape is measured, masks are learned, cut, and trained on; with decoding processes,
    whose state is requested at every save."""
    masks = auto("b", 0.6, auto={"steps": 4, "ramp_steps": 2, "gates": True}, steps=7)
    changes = {"stages": [calibrated("a", 0.3, batches=2), masks], "workers": 1, "save_every": 100}
    changes |= {"evaluation": {"data": "unused", "every": 2}}
    whole, parts = (recipe(place, tmp_path / name, **changes) for name in ("whole", "parts"))
    kill_at_each(whole, parts, moments, 1 if moments is STAGES else 2)


@pytest.mark.parametrize("count", [1, 2])
def test_a_kill_around_batch_statistics_changes_nothing(resnet_place: Path, tmp_path: Path, count: int) -> None:
    whole, parts = (resnet_recipe(resnet_place, tmp_path / name) for name in ("whole", "parts"))
    kill_at_each(whole, parts, STATISTICS, count)


def test_evaluations_that_fall_on_the_cut_go_on(place: Path, tmp_path: Path) -> None:
    """With decoding processes, and without a kill."""
    stages = [auto(auto={"steps": 4, "ramp_steps": 2}, steps=7)]
    chosen = recipe(place, tmp_path / "run", stages=stages, workers=1, evaluation={"data": "unused", "every": 4})
    assert end(begin(chosen, 1, partial(doomed, None))) == [0]


# --- stops ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("late", [False, True])
def test_a_stop_does_not_wait_for_an_evaluation(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, late: bool
) -> None:
    """The previous step is saved; the signal comes during the evaluation, or just before it."""
    changes = {"stages": [stage(steps=6)], "workers": 1, "evaluation": {"data": "unused", "every": 2}}
    whole, parts = (recipe(place, tmp_path / name, **changes) for name in ("whole", "parts"))
    loop.run(evaluated(whole))
    started, own = evaluated(parts), loop.save

    def stopped(*args: Any) -> dict[str, float]:
        os.kill(os.getpid(), number)
        raise AssertionError("the evaluation went on")

    def saved(*args: Any) -> None:
        own(*args)
        if args[3].step == 2:
            os.kill(os.getpid(), number)

    if late:
        started.evaluator = stopped
    else:
        monkeypatch.setattr(loop, "save", saved)
    with pytest.raises(Interrupted, match="stopped at step 2") as raised:
        loop.run(started)
    assert raised.value.signal_number == number
    monkeypatch.undo()
    loop.run(evaluated(parts, resume=True))
    assert_same(Path(whole.output), Path(parts.output))


# --- the watchdog -----------------------------------------------------------------------------------------------


def test_a_wait_past_the_bound_says_where(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data stops coming after the run is asked to stop; it resumes once the data is there."""
    whole, parts = (recipe(place, tmp_path / name, stages=[stage()], workers=1) for name in ("whole", "parts"))
    loop.run(setup.start(whole))
    started, own, told = setup.start(parts), loop.next_batch, list[dict[str, Any]]()
    started.listener = told.append

    def waits(batches: Any, folder: Any) -> Any:
        if sum(e["event"] == "step" for e in told) == 3:
            monkeypatch.setattr(watchdog, "HURRIED", 0.2)
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait()
        return own(batches, folder)

    monkeypatch.setattr(loop, "next_batch", waits)
    where = r"waiting for the data of step 4 of stage 50 \(threading.py:\d+ wait, called by loop.py:\d+ _loop\)"
    with pytest.raises(Stalled, match=rf"no progress for \S+ minutes while {where}; continue .* --resume"):
        loop.run(started)
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
    monkeypatch.undo()
    loop.run(setup.start(parts, resume=True))
    assert_same(Path(whole.output), Path(parts.output))


def test_a_library_that_wraps_the_error_does_not_hide_it() -> None:
    dog = Watchdog(minutes=0.001)
    with pytest.raises(Stalled, match=r"no progress for \S+ minutes while compiling"), dog.watching():
        dog.doing("compiling")
        try:
            threading.Event().wait()
        except Stalled as error:
            raise RuntimeError("internal error") from error
    with pytest.raises(RuntimeError, match="another"), Watchdog(minutes=1).watching():
        raise RuntimeError("another")


def deaf(said: str) -> None:
    """Block the main thread so that no signal wakes it, as in a library call that never returns."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    watchdog.GRACE = 0.2
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    dog = Watchdog(minutes=0.002, who="process 1 of 2: ")
    with dog.watching():
        dog.doing("computing step 7")
        threading.Event().wait()


def test_a_process_that_no_signal_wakes_is_ended(tmp_path: Path) -> None:
    process = SERVER.Process(target=deaf, args=(str(tmp_path / "said"),))
    process.start()
    assert end([process]) == [2]
    line = r"tinyclip: process 1 of 2: no progress for 0.\d+ minutes while computing step 7 \(threading.py:.*\n"
    assert re.fullmatch(line, (tmp_path / "said").read_text())


def test_what_moves_on_is_left_alone_and_a_stopped_process_has_not_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    dog, ticks = Watchdog(minutes=0.01), list[float]()
    own = watchdog._wait
    monkeypatch.setattr(watchdog, "_wait", lambda *args: ticks.append(own(*args)) or ticks[-1])
    with dog.watching():
        while len(ticks) < 30:  # three times the limit
            dog.doing("moving on")
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=iter([0.0, 3600.0]).__next__))
    assert own(threading.Event(), 1.0) == pytest.approx(0.2)


# --- commands in the docs ---------------------------------------------------------------------------------------


def test_the_command_for_two_processes_of_a_cpu_ends_with_its_report(tmp_path: Path) -> None:
    """As printed on the page, with the teacher's evaluation for the report, but with fewer pairs and pictures."""
    page = (ROOT / "docs" / "distributed.md").read_text()
    (printed,) = re.findall(r"^    (torchrun .*--set device=cpu)$", page, re.MULTILINE)
    for name in ("red apple", "dog"):
        (tmp_path / "eval" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(tmp_path / "eval" / name / "0.png")
    output = tmp_path / "run"
    fewer = [f"output={output}", f"evaluation.data={tmp_path / 'eval'}", "evaluation.every=1"]
    fewer += [f"stages.{i}.{key}" for i in (0, 1) for key in ("steps=2", "batch_size=8", "optimizer.warmup_steps=0")]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = [*shlex.split(printed), *(f"--set={one}" for one in fewer)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"report: {output / 'report.html'}") == 1 and (output / "report.html").stat().st_size
    (teacher,) = [line for line in done.stdout.splitlines() if line.split()[:1] == ["teacher"]]
    assert "50.0" in teacher.split()  # one of two identical pictures
