from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.runs import SHAPE, events_of, recipe, stage, stopped, weights
from tinyclip.recipe.recipe import load_recipe
from tinyclip.train import loop, tracking
from tinyclip.train.tracking import flat


def run(chosen: Any, stop_at: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """Return the events of a run, which may be stopped at a step."""
    events: list[dict[str, Any]] = []
    started = loop.start(chosen, **options)
    started.listener = events.append
    if stop_at is None:
        loop.run(started)
    else:
        stopped(started, stop_at)
    return events


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows: name -> (step, value)."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def logged(folder: Path, offsets: dict[str, int], name: str) -> list[tuple[int, float]]:
    """Return the values of one figure in metrics.jsonl."""
    steps = [e for e in events_of(folder) if e["event"] == "step"]
    return [(offsets[e["stage"]] + e["step"], pytest.approx(e[name], rel=1e-6)) for e in steps]


def test_metrics_have_what_a_run_is_judged_by(place: Path, tmp_path: Path) -> None:
    auto = {"target_sparsity": 0.2, "steps": 3}
    learned = stage(student={}, inherit="auto", auto=auto, steps=6, loss={"affinity": 1, "contrastive": 0.1})
    run(recipe(place, tmp_path / "run", stages=[learned]))
    steps = [e for e in events_of(tmp_path / "run") if e["event"] == "step"]
    everywhere = {"loss", "affinity", "contrastive", "lr", "grad_norm", "pairs_per_s", "data_wait_s", "data_wait_share"}
    everywhere |= {"memory_gb", "skipped", "skipped_by_cause", "skipped_steps"}
    assert len(steps) == 6 and all(everywhere <= e.keys() for e in steps)
    with_masks = {"mask_lr", "sparsity", "target_sparsity", "constraint"}
    assert [with_masks <= e.keys() for e in steps] == [True] * 3 + [False] * 3
    assert all(0 <= e["data_wait_share"] <= 1 and 0 <= e["data_wait_s"] < 10 and e["memory_gb"] > 0.05 for e in steps)
    assert steps[0]["mask_lr"] == 1.0  # for a mask phase as short as this


def test_waiting_for_data_is_measured(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    real = loop.next_batch

    def slow(*arguments: Any) -> Any:
        now[0] += 3.0
        return real(*arguments)

    def step(self: Any, *arguments: Any) -> Any:
        now[0] += 1.0
        return {"loss": torch.tensor(0.0)}

    monkeypatch.setattr(loop, "next_batch", slow)
    monkeypatch.setattr(loop.Trainee, "step", step)
    monkeypatch.setattr(loop.Trainee, "figures", lambda *_: {"loss": 0.0, "lr": 0.0})
    run(recipe(place, tmp_path / "run", stages=[stage(steps=4)]))
    last = [e for e in events_of(tmp_path / "run") if e["event"] == "step"][-1]
    assert (last["data_wait_s"], last["data_wait_share"], last["pairs_per_s"]) == (3.0, 0.75, 2.0)


def test_tensorboard_shows_the_whole_run_as_one_curve(place: Path, tmp_path: Path) -> None:
    stages = [stage("75", student={"text": {"layers": 1}}), stage("50", student=SHAPE)]
    evaluation = {"data": "unused", "every": 2}
    chosen = recipe(place, tmp_path / "run", tracking="tensorboard", stages=stages, evaluation=evaluation)
    assert chosen.tracking == ("tensorboard",)
    started = loop.start(chosen)
    started.evaluator = lambda *_: {"acc1": 0.5, "subsets": {"unseen": {"acc1": 0.25}}}
    loop.run(started)
    shown = scalars(tmp_path / "run")
    for name in ("loss", "affinity", "lr", "grad_norm", "pairs_per_s", "data_wait_s", "memory_gb", "skipped"):
        assert shown[f"train/{name}"] == logged(tmp_path / "run", {"75": 0, "50": 5}, name)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 11))
    assert shown["evaluation/acc1"] == [(step, 0.5) for step in (2, 4, 5, 7, 9, 10)]
    assert shown["evaluation/subsets/unseen/acc1"][0] == (2, 0.25)


def test_a_resumed_run_goes_on_in_the_same_curve(place: Path, tmp_path: Path) -> None:
    """Even if steps after the checkpoint had been logged and are repeated."""
    chosen = recipe(place, tmp_path / "run", tracking="tensorboard", save_every=2, stages=[stage(steps=8)])
    started = loop.start(chosen)

    def fail(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            raise RuntimeError("killed")

    started.listener = fail
    with pytest.raises(RuntimeError, match="killed"):
        loop.run(started)
    run(chosen, resume=True)
    shown = scalars(tmp_path / "run")["train/loss"]
    assert shown == logged(tmp_path / "run", {"50": 0}, "loss") and len(shown) == 8


def test_tracking_changes_nothing_else(place: Path, tmp_path: Path) -> None:
    for name, trackers in (("with", ["tensorboard"]), ("without", [])):
        run(recipe(place, tmp_path / name, tracking=trackers, stages=[stage()]))
    one, two = (weights(tmp_path / name / "student") for name in ("with", "without"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not (tmp_path / "without" / "tracking.json").exists() and not (tmp_path / "without" / "tensorboard").exists()


# --- wandb and trackio: stand-ins with the signatures of wandb 0.31 and trackio 0.43, which were tested manually ---


class Recorded:
    """Calls of a module, and the run that its `init` returns."""

    def __init__(self, fail: Callable[[str], None]) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fail = fail

    def note(self, name: str, value: Any) -> None:
        self.fail(name)
        self.calls.append((name, value))

    def of(self, name: str) -> list[Any]:
        return [value for called, value in self.calls if called == name]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, fail: Callable[[str], None] = lambda call: None) -> Recorded:
    recorded = Recorded(fail)

    class Opened:
        if name == "wandb":

            def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
                recorded.note("log", data)

            def finish(self, exit_code: int | None = None, quiet: bool | None = None) -> None:
                recorded.note("finish", exit_code)

            def define_metric(self, name: str, step_metric: str | None = None) -> None:
                recorded.note("define_metric", (name, step_metric))

        else:

            def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
                recorded.note("log", metrics | {"step": step})

            def finish(self) -> None:
                recorded.note("finish", None)

    def wandb_init(
        *,
        project: str | None = None,
        name: str | None = None,
        id: str | None = None,
        resume: str | None = None,
        dir: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> Any:
        recorded.note("init", {"project": project, "name": name, "id": id, "resume": resume, "config": config})
        return Opened()

    def trackio_init(
        project: str,
        name: str | None = None,
        *,
        config: dict[str, Any] | None = None,
        resume: str = "never",
        embed: bool = True,
    ) -> Any:
        recorded.note("init", {"project": project, "id": name, "resume": resume, "config": config})
        return Opened()

    module = ModuleType(name)
    module.init = wandb_init if name == "wandb" else trackio_init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(tracking, "find_spec", lambda wanted: module)
    return recorded


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_every_figure_and_one_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls = stand_in(monkeypatch, name)
    chosen = recipe(place, tmp_path / "run", tracking=[name], project="mine", stages=[stage()])
    run(chosen, stop_at=3)
    run(chosen, resume=True)
    first, second = calls.of("init")
    assert first == second and first["id"].startswith("run-") and first["resume"] == "allow"
    assert first["project"] == "mine" and first["config"]["stages"][0]["name"] == "50"
    steps = [e for e in events_of(tmp_path / "run") if e["event"] == "step"]
    assert [(c["step"], c["train/loss"]) for c in calls.of("log")] == [(e["step"], e["loss"]) for e in steps]
    assert len(calls.of("finish")) == 2
    run(recipe(place, tmp_path / "run", tracking=[name], stages=[stage()]), overwrite=True)
    assert calls.of("init")[-1]["id"] != first["id"]  # another run, despite the same name


@pytest.mark.parametrize("when", ["log", "finish"])
def test_a_tracker_that_fails_does_not_end_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def fail(call: str) -> None:
        if call == when:
            raise ConnectionError("no\nroute")

    calls = stand_in(monkeypatch, "wandb", fail)
    events = run(recipe(place, tmp_path / "run", tracking=["wandb", "tensorboard"], stages=[stage()]))
    warnings = [e["text"] for e in events_of(tmp_path / "run") if e["event"] == "warning"]
    named = "wandb failed (ConnectionError: no route); continuing without it, metrics.jsonl has everything"
    assert warnings == [named] and sum(e["event"] == "step" for e in events) == 5
    assert len(calls.of("log")) == (0 if when == "log" else 5)
    assert len(scalars(tmp_path / "run")["train/loss"]) == 5  # the other tracker has everything


def test_a_tracker_that_cannot_be_opened(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start it is an error, before anything is done; a resumed run continues, as nobody may be watching it."""
    broken: list[bool] = [True]

    def fail(call: str) -> None:
        if call == "init" and broken[0]:
            raise PermissionError("not logged in")

    stand_in(monkeypatch, "wandb", fail)
    chosen = recipe(place, tmp_path / "run", tracking=["tensorboard", "wandb"], stages=[stage()])
    with pytest.raises(ValueError, match=r"^tracking: wandb cannot be opened \(PermissionError: not logged in\)$"):
        run(chosen)
    assert not (tmp_path / "run").exists()
    broken[0] = False
    run(chosen, stop_at=3)
    broken[0] = True
    events = run(chosen, resume=True)
    assert [e["text"] for e in events if e["event"] == "warning"] == [
        "wandb failed (PermissionError: not logged in); continuing without it, metrics.jsonl has everything"
    ]
    assert len(scalars(tmp_path / "run")["train/loss"]) == 5


def test_a_tracker_that_is_not_installed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "trackio" else sys)
    chosen = recipe(place, tmp_path / "run", tracking=["tensorboard", "trackio"])
    with pytest.raises(ValueError, match=r"^tracking: trackio not installed: `pip install trackio`[^\n]*$"):
        loop.start(chosen)
    assert not (tmp_path / "run").exists()


def test_trackers_may_change_when_a_run_is_resumed(place: Path, tmp_path: Path) -> None:
    run(recipe(place, tmp_path / "run", stages=[stage()]), stop_at=3)
    run(recipe(place, tmp_path / "run", tracking="tensorboard", stages=[stage()]), resume=True)
    assert [step for step, _ in scalars(tmp_path / "run")["train/loss"]] == [4, 5]


def test_figures_are_flat() -> None:
    event = {"event": "step", "stage": "a", "step": 3, "loss": 0.5, "sparsity": {"both": 0.1}, "evaluated": None}
    assert flat(event, "train") == {"train/loss": 0.5, "train/sparsity/both": 0.1}


def test_trackers_by_name_in_a_recipe_and_on_the_command_line(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place, tmp_path / "run", tracking=["wandb"]).model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(chosen))
    for text, expected in (("tensorboard", ["tensorboard"]), ("[trackio, wandb]", ["trackio", "wandb"]), ("null", [])):
        assert list(load_recipe(tmp_path / "recipe.yaml", [f"tracking={text}"]).tracking) == expected
    with pytest.raises(
        ValueError, match=r"^[^\n]*tracking.0: must be 'tensorboard', 'trackio' or 'wandb', not 'mlflow'$"
    ):
        load_recipe(tmp_path / "recipe.yaml", ["tracking=mlflow"])
    with pytest.raises(ValueError, match=r"^[^\n]*tracking: [^\n]*a tracker is named twice$"):
        load_recipe(tmp_path / "recipe.yaml", ["tracking=[wandb, wandb]"])
