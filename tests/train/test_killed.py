"""Runs that are killed, stopped or damaged resume as if nothing had happened: bit for bit, with one process or two."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import runs
from tests.helpers.processes import SERVER, assert_same, begin, end, kill, last_step, start, until
from tests.helpers.runs import auto, events_of, recipe, resnet_recipe, run, stage, stopped
from tinyclip.common.distributed import gather_objects, processes, rank
from tinyclip.data import loader as data
from tinyclip.recipe.recipe import Recipe
from tinyclip.train import loop
from tinyclip.train.resume import Interrupted, restore, save
from tinyclip.train.run import Progress, loader_of
from tinyclip.train.step import Trainee
from tinyclip.zoo.resolve import MANIFEST

# --- processes --------------------------------------------------------------------------------------------------


# --- kills ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_kills_at_random_moments_change_nothing(place: Path, tmp_path: Path, count: int) -> None:
    """Kill all processes or one, once in the middle of writing a checkpoint."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown when the test fails
    moments = random.Random(seed)
    changes = {"stages": [stage("a", steps=14), stage("b", steps=10)], "save_every": 2, "workers": 2 - count}
    whole, parts = (recipe(place, tmp_path / name, **changes) for name in ("whole", "parts"))
    first = SERVER.Process(target=int)  # starts the fork server, which should not be timed
    first.start()
    end([first])
    began = time.monotonic()
    assert end(begin(whole, count)) == [0] * count
    took = time.monotonic() - began
    out = Path(parts.output)
    for moment in ("any", "writing", "any"):
        before = set(out.glob("stages/*/.last.*.tmp"))  # from the previous kill
        begun = begin(parts, count)
        if moment == "writing":
            until(lambda before=before: bool(set(out.glob("stages/*/.last.*.tmp")) - before), begun)  # type: ignore[misc]
            victim = begun.pop(0)
        else:
            time.sleep(took * moments.uniform(0.05, 0.4))  # a whole run takes longer than this
            victim = begun.pop(moments.randrange(count))
        victim.kill()
        assert end([victim]) == [-signal.SIGKILL]
        if moment == "writing":
            assert list(out.glob("stages/*/.last.*.tmp"))
            assert end(begun) in ([], [2])
        kill(begun)
    for index in range(count):
        said = (tmp_path / f"parts-{index}.err").read_text().splitlines()
        assert len(said) <= 1 and all("another process has died; run the same command again" in line for line in said)
    assert end(begin(parts, count)) == [0] * count
    assert_same(Path(whole.output), out)


@pytest.mark.parametrize(("step", "before"), [(4, True), (4, False), (12, True), (12, False), (16, True)])
def test_evaluations_and_cuts_are_told_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, before: bool
) -> None:
    """Kill the run before or after the checkpoint that includes them: evaluations are every 4 steps and at the end, 16;
    a cut is at 12. At each of these steps the second save includes them; the last evaluation has none."""
    changes = {"stages": [auto()], "evaluation": {"data": "unused", "every": 4}}
    whole, parts = (recipe(place, tmp_path / name, **changes) for name in ("whole", "parts"))

    def started(chosen: Recipe, resume: bool = False) -> Any:
        made = loop.start(chosen, resume=resume)
        made.evaluator = lambda model, *_: {"acc1": sum(p.sum().item() for p in model.parameters())}
        return made

    loop.run(started(whole))
    saves: list[int] = []

    def killed(*args: Any) -> None:
        saves.append(args[3].step)
        if not before:
            save(*args)
        if saves.count(step) == 2:
            raise KeyboardInterrupt
        if before:
            save(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if step == 16:
            patch.setattr(loop, "write_atomically", lambda *args: killed(None, None, None, Progress(step=16)))
        patch.setattr(loop, "save", killed)
        loop.run(started(parts))
    loop.run(started(parts, resume=True))
    assert_same(Path(whole.output), Path(parts.output))


# --- other numbers of processes ---------------------------------------------------------------------------------


def test_a_run_goes_on_with_other_numbers_of_processes(place: Path, tmp_path: Path) -> None:
    """Two processes, one, then two again; every change warns once that the order of the data differs."""
    chosen = recipe(place, tmp_path / "run", stages=[auto()], save_every=1)
    out = Path(chosen.output)
    for count, step in ((2, 3), (1, 8)):
        begun = begin(chosen, count)
        until(lambda step=step: last_step(out) >= step, begun)
        kill(begun)
    assert end(begin(chosen, 2)) == [0, 0]
    events = events_of(out)
    warned = [e["text"] for e in events if e["event"] == "warning" and "processes" in e["text"]]
    assert warned == ["resuming with a different number of processes or workers, so the order of the data changes"] * 2
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 17))
    assert json.loads((out / "stages" / "50" / "result.json").read_text())["samples"] == 16 * 8


def test_all_but_the_order_of_the_data_goes_on_exactly(place: Path, tmp_path: Path) -> None:
    started = stopped(loop.start(recipe(place, tmp_path / "run", stages=[stage()])), 3)
    last = started.folder / "stages" / "50" / "last"

    def restored(workers: int) -> tuple[Trainee, Progress, Any]:
        student, progress = loop.load_checkpoint(last)[0], Progress()
        trainee = Trainee(student, started.recipe.stages[0], started.teacher, started.tokenizer, started.preprocess,
                          "float32")  # fmt: skip
        return trainee, progress, restore(last, trainee, progress, workers)

    (same, progress, position), (other, moved, nowhere) = restored(0), restored(2)
    assert position is not None and progress.order == 0 and nowhere is None and moved.order == moved.step == 3
    one, two = same.optimizer.state_dict(), other.optimizer.state_dict()
    for index, state in one["state"].items():
        assert all(torch.equal(value, two["state"][index][name]) for name, value in state.items())
    keys = []
    for order in (0, 3):
        loader = loader_of(started, 0, order=order)
        keys.append(next(iter(loader)).keys)
    assert keys[0] != keys[1]


def test_two_processes_see_different_pairs_and_end_with_equal_weights(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place, tmp_path / "run", stages=[stage(steps=3)])
    assert end(start(compared, 2, chosen.model_dump(mode="json"))) == [0, 0]


def compared(settings: dict[str, Any]) -> None:
    with processes():
        started = loop.start(Recipe.model_validate(settings))
        seen: list[list[str]] = []
        ends: list[dict[str, torch.Tensor]] = []
        step, finish = Trainee.step, loop._evaluate

        def watched(self: Trainee, batch: Any, number: int) -> Any:
            seen.append(batch.keys)
            return step(self, batch, number)

        def ended(run: Any, trainee: Trainee, progress: Progress, folder: Path) -> None:
            ends.append(trainee.model.state_dict())
            finish(run, trainee, progress, folder)

        Trainee.step, loop._evaluate = watched, ended  # type: ignore[method-assign, assignment]
        (result,) = loop.run(started)
        both, weights_of_both = gather_objects(seen), gather_objects(ends[0])
    assert [len(keys) for keys in seen] == [4] * 3 and result["samples"] == 24
    assert all(not set(one) & set(two) for one, two in zip(*both, strict=True))
    assert all(torch.equal(value, weights_of_both[1][name]) for name, value in weights_of_both[0].items())


def test_what_the_first_process_measures_all_cut_by(place: Path, tmp_path: Path) -> None:
    """Importance by the affinity loss, and a latency: neither may wait for other processes that are waiting for it."""
    measured = {"inherit": "calibrated", "calibrated": {"target_sparsity": 0.4, "batches": 2}}
    timed = auto("b", None, auto={"latency_ms": 1e-3, "steps": 2, "ramp_steps": 2}) | {"steps": 4}
    chosen = recipe(place, tmp_path / "run", stages=[stage("a", student={}, **measured), timed])
    assert end(begin(chosen, 2)) == [2, 2]  # no model is that fast
    said = "".join((tmp_path / f"run-{i}.err").read_text() for i in range(2))
    assert said.count("\n") == 1 and "latency_ms 0.001 cannot be reached" in said
    (cut,) = [e for e in events_of(Path(chosen.output)) if e["event"] == "cut"]
    alone = recipe(place, tmp_path / "alone", stages=[stage("a", batch_size=4, student={}, **measured)])
    run(alone)
    assert [e for e in events_of(Path(alone.output)) if e["event"] == "cut"] == [cut]


def test_batch_statistics_of_the_first_process_are_everyones(resnet_place: Path, tmp_path: Path) -> None:
    chosen = resnet_recipe(resnet_place, tmp_path / "run")
    assert end(begin(chosen, 2)) == [0, 0]
    alone = resnet_recipe(resnet_place, tmp_path / "alone", batch_size=4)
    loop.run(loop.start(alone))
    one, two = (runs.buffers(Path(r.output) / "student") for r in (chosen, alone))
    assert one and all(torch.equal(value, two[name]) for name, value in one.items())


# --- stops ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["save", "close_loader"])
def test_a_stop_at_the_end_of_a_stage_is_not_forgotten(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """In either part of a stage with masks, and in a stage with others after it."""
    stages = [stage("a", student={}), auto("b")]
    whole, parts = (recipe(place, tmp_path / name, stages=stages) for name in ("whole", "parts"))
    run(whole)
    for i, last in enumerate((5, 12, 16)):
        with monkeypatch.context() as patch:
            started = loop.start(parts, resume=i > 0)
            started.listener = interrupting(patch, moment, last)
            with pytest.raises(Interrupted, match=f"stopped at step {last}$"):
                loop.run(started)
    run(parts, resume=True)
    assert_same(Path(whole.output), Path(parts.output))


def interrupting(patch: pytest.MonkeyPatch, moment: str, step: int) -> Callable[[dict[str, Any]], None]:
    """Return a listener that sends SIGTERM at a step, in the middle of what follows."""
    place = loop if moment == "save" else data
    own, told = getattr(place, moment), [0]

    def interrupted(*args: Any) -> None:
        if told[-1] == step:
            told.append(0)
            os.kill(os.getpid(), signal.SIGTERM)
        own(*args)

    patch.setattr(place, moment, interrupted)
    return lambda event: told.append(event["step"]) if event["event"] == "step" else None


def test_two_processes_stop_at_the_end_of_a_stage(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place, tmp_path / "run", stages=[stage("a", steps=3), stage("b", steps=3, student={})])
    assert end(start(interrupted_late, 2, chosen.model_dump(mode="json"))) == [0, 0]


def interrupted_late(settings: dict[str, Any]) -> None:

    def saved(*args: Any) -> None:
        save(*args)
        if rank() == 1 and args[3].step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with processes():
        started = loop.start(Recipe.model_validate(settings))
        loop.save = saved
        with pytest.raises(Interrupted, match=r"stopped at step 3$"):
            loop.run(started)
    assert not (started.folder / "stages" / "b").exists()


# --- damaged checkpoints ----------------------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.pt", cut_short),
        ("state.pt", flipped),
        ("model.safetensors", flipped),
        ("masks.safetensors", cut_short),
        ("masks.safetensors", Path.unlink),
        ("config.json", flipped),
        (MANIFEST, cut_short),
        (MANIFEST, Path.unlink),
    ],
)
def test_the_newest_whole_checkpoint_is_taken(
    place: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], whole: Path
) -> None:
    chosen = recipe(place, tmp_path / "run", stages=[auto()], save_every=2, keep=3)
    stages = stopped(loop.start(chosen), 5).folder / "stages" / "50"
    assert sorted(p.name for p in stages.iterdir()) == ["last", "step-000002", "step-000004"]
    damage(stages / "last" / name)
    _, events = run(chosen, resume=True)
    (warned,) = [e["text"] for e in events if "continuing from" in e.get("text", "")]
    assert name in warned and warned.endswith("; continuing from step 4") and "\n" not in warned
    assert [e["step"] for e in events if e["event"] == "resumed"] == [4]
    assert_same(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one auto stage."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(recipe(place, folder, stages=[auto()]))
    return folder


def test_a_stage_without_a_whole_checkpoint_is_one_clear_line(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place, tmp_path / "run", stages=[stage()])
    stages = stopped(loop.start(chosen), 3).folder / "stages" / "50"
    for place_ in stages.iterdir():
        flipped(place_ / "state.pt")
    before = sorted(stages.rglob("*"))
    with pytest.raises(
        ValueError,
        match=r"^[^\n]*last/state.pt: damaged, and no older one is complete; remove .*stages/50 to restart the stage",
    ):
        run(chosen, resume=True)
    assert sorted(stages.rglob("*")) == before
    shutil.rmtree(stages)
    run(chosen, resume=True)


def test_a_kill_between_two_renames_is_mended(place: Path, tmp_path: Path) -> None:
    """`last` is not yet back in place, or moved aside on a disk without atomic exchange; leftovers of other writers."""
    whole, parts = (recipe(place, tmp_path / name, stages=[stage()]) for name in ("whole", "parts"))
    run(whole)
    stages = stopped(loop.start(parts), 3).folder / "stages" / "50"
    shutil.rmtree(stages / "last")
    (stages / ".last.abc.tmp").mkdir()
    (stages / ".result.json.abc.tmp").touch()
    _, events = run(parts, resume=True)
    assert [e["step"] for e in events if e["event"] == "resumed"] == [2]
    assert_same(tmp_path / "whole", tmp_path / "parts")
    again = recipe(place, tmp_path / "again", stages=[stage()])
    stages = stopped(loop.start(again), 3).folder / "stages" / "50"
    (stages / "last").rename(stages / ".last.xyz.old")
    _, events = run(again, resume=True)
    assert [e["step"] for e in events if e["event"] == "resumed"] == [3]
    assert_same(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize(("keep", "found"), [(1, []), (2, [5]), (3, [4, 5])])
def test_as_many_checkpoints_are_kept_as_asked_for(place: Path, tmp_path: Path, keep: int, found: list[int]) -> None:
    chosen = recipe(place, tmp_path / "run", stages=[stage(steps=9)], save_every=1, keep=keep)
    folder = stopped(loop.start(chosen), 6).folder / "stages" / "50"
    assert sorted(p.name for p in folder.iterdir()) == ["last", *(f"step-{step:06d}" for step in found)]
    run(chosen, resume=True)
    assert sorted(p.name for p in folder.iterdir()) == ["last", "result.json"]
    assert not {"state.pt", MANIFEST} & {p.name for p in (folder / "last").iterdir()}


def test_checkpoints_come_after_minutes_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []

    def noted(place: Path, trainee: Any, loader: Any, progress: Progress, keep: int) -> None:
        saved.append(progress.step)
        save(place, trainee, loader, progress, keep)

    monkeypatch.setattr(loop, "save", noted)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    started = loop.start(recipe(place, tmp_path / "run", stages=[stage(steps=9)], save_every=7, save_minutes=0.25))
    started.listener = lambda e: now.__setitem__(0, now[0] + 10) if e["event"] == "step" else None
    loop.run(started)
    assert saved == [3, 6, 7, 9]  # at least 15 seconds after the last; the steps of save_every; the end


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_two_runs_do_not_share_a_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    """The second run is refused before it changes anything, and the first finishes as if alone."""
    monkeypatch.setattr("tinyclip.train.setup.PATIENCE", 0.1)
    chosen, alone = (recipe(place, tmp_path / name, stages=[stage()]) for name in ("run", "alone"))
    other: list[str] = []

    def intrude(event: dict[str, Any]) -> None:
        if event.get("step") == 3:
            before = {path: path.stat().st_ino for path in started.folder.rglob("*")}
            with pytest.raises(ValueError, match="another `tinyclip distill` is running here") as error:
                loop.start(chosen, **options)
            assert {path: path.stat().st_ino for path in started.folder.rglob("*")} == before
            other.append(str(error.value))

    started = loop.start(chosen)
    with pytest.raises(ValueError, match="another `tinyclip distill` is running here"):
        loop.start(chosen, **options)  # the first run has not begun
    started.listener = intrude
    loop.run(started)
    assert len(other) == 1
    run(alone)
    assert_same(Path(alone.output), Path(chosen.output))
    assert len(run(chosen, **options)[0]) == 1  # the folder is free again
