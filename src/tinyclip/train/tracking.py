"""Log a run's figures to TensorBoard, trackio or wandb; `metrics.jsonl` is always written.

A tracker is an open run in one of these, with `log(figures, step)` and `finish()`. Steps are counted across all stages,
so each run has one curve.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from tinyclip.common.distributed import is_main
from tinyclip.common.files import read_json_object, write_atomically
from tinyclip.recipe.recipe import Recipe
from tinyclip.train.resume import saved_step
from tinyclip.train.run import Run

FOLDERS = ("tensorboard", "wandb", "tracking.json")  # files that trackers write in the run's folder


def check_trackers(recipe: Recipe) -> None:
    """Raise `ValueError` if a tracker named in the recipe is not installed."""
    missing = [name for name in recipe.tracking if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"tracking: {' and '.join(missing)} not installed: `pip install {' '.join(missing)}`, or all three with "
            "`pip install 'tinyclip[tracking]'`"
        )


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Send a run's events to the trackers named in its recipe. Only the first process tracks.

    A tracker that fails during the run is dropped with a warning.

    Raises:
        ValueError: if a tracker cannot be opened at the start of a run; a resumed run continues without it.
    """
    if not (run.recipe.tracking and is_main()):
        yield
        return
    trackers = Trackers(run)
    show = run.listener

    def listen(event: dict[str, Any]) -> None:
        show(event)
        trackers(event)

    run.listener = listen
    try:
        trackers.open()
        yield
    finally:
        run.listener = show
        trackers.close()


class Trackers:
    """The open trackers of a run; call it with each event."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.open_ones: dict[str, Any] = {}
        stages = run.recipe.stages
        self.before = {stage.name: sum(s.steps for s in stages[:i]) for i, stage in enumerate(stages)}

    def open(self) -> None:
        state = self.run.folder / "tracking.json"
        resumed = state.exists()
        if not resumed:
            write_atomically(state, json.dumps({"id": secrets.token_hex(4)}) + "\n")
        name, done = f"{self.run.folder.name}-{read_json_object(state).get('id')}", self._done()
        for tracker in self.run.recipe.tracking:
            try:
                self.open_ones[tracker] = OPEN[tracker](self.run, name, done if resumed else None)
            except Exception as error:  # third-party code, networks and accounts may raise anything
                if not resumed:
                    raise ValueError(f"tracking: {tracker} cannot be opened ({_line(error)})") from None
                self._warn(tracker, error)

    def _done(self) -> int:
        """Return the number of steps a resumed run does not repeat."""
        for stage in self.run.recipe.stages:
            folder = self.run.folder / "stages" / stage.name
            if not (folder / "result.json").exists():
                return self.before[stage.name] + saved_step(folder / "last")
        return sum(stage.steps for stage in self.run.recipe.stages)

    def __call__(self, event: dict[str, Any]) -> None:
        kinds = {"step": "train", "evaluation": "evaluation"}
        if event["event"] in kinds:
            step = self.before[event["stage"]] + event["step"]
            figures = flat(event, kinds[event["event"]])
            self._each(lambda tracker: tracker.log(figures, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.finish())

    def _each(self, call: Callable[[Any], None]) -> None:
        for name, tracker in list(self.open_ones.items()):
            try:
                call(tracker)
            except Exception as error:  # as above; the run matters more than its curves
                del self.open_ones[name]
                self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        text = f"{name} failed ({_line(error)}); continuing without it, metrics.jsonl has everything"
        self.run.emit({"event": "warning", "text": text})


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def flat(event: dict[str, Any], prefix: str) -> dict[str, float]:
    """Return the numbers of an event under `prefix/name`, those in mappings under `prefix/name/key`."""
    found: dict[str, float] = {}
    for name, value in event.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and name != "step":
            found[f"{prefix}/{name}"] = value
    return found


# --- the three --------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, run: Run, name: str, done: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Figures logged after the checkpoint that the run resumes from will be logged again.
        purge = None if done is None else done + 1
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge)
        if done is None:
            settings = json.dumps(run.recipe.model_dump(mode="json"), indent=2)
            self.writer.add_text("recipe", f"```json\n{settings}\n```")

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def _wandb(run: Run, name: str, done: int | None) -> Any:
    """Open a wandb run. wandb's own step may only increase, so our step is logged as a figure that every chart uses as
    its axis."""
    import wandb

    opened = wandb.init(
        project=run.recipe.project,
        name=run.folder.name,
        id=name,
        resume="allow",
        dir=str(run.folder),
        config=run.recipe.model_dump(mode="json"),
    )
    opened.define_metric("step")
    opened.define_metric("*", step_metric="step")
    return Wandb(opened)


class Wandb:
    def __init__(self, opened: Any) -> None:
        self.opened = opened

    def log(self, figures: dict[str, float], step: int) -> None:
        self.opened.log(figures | {"step": step})

    def finish(self) -> None:
        self.opened.finish(exit_code=int(sys.exc_info()[0] is not None))


def _trackio(run: Run, name: str, done: int | None) -> Any:
    import trackio

    config = run.recipe.model_dump(mode="json")
    return trackio.init(project=run.recipe.project, name=name, resume="allow", config=config, embed=False)


OPEN: dict[str, Callable[[Run, str, int | None], Any]] = {
    "tensorboard": TensorBoard,
    "trackio": _trackio,
    "wandb": _wandb,
}


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory so far in GB (1e9 bytes): the GPU's, or without one this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
