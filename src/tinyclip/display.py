"""The live view of a run: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from tinyclip.train import Run

TERMS = ("loss", "affinity", "contrastive")


class Display:
    """Listens to a run's events (see `train.Run.emit`)."""

    def __init__(self, console: Console, run: Run) -> None:
        self.console, self.run = console, run
        self.live = console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not self.live,
        )
        self.task: Any = None

    def __enter__(self) -> Display:
        run = self.run
        self.print(f"{run.folder}: {run.device}, {run.precision}, {run.recipe.data}")
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self.progress.stop()

    def print(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, soft_wrap=True)

    def __call__(self, event: dict[str, Any]) -> None:
        getattr(self, f"_{event['event']}")(event)

    def _stage(self, event: dict[str, Any]) -> None:
        text = f"stage {event['stage']}"
        if self.live:
            self.task = self.progress.add_task(text, total=event["steps"], figures="")
        else:
            self.print(f"{text}: {event['steps']} steps")

    def _tick(self, event: dict[str, Any]) -> None:
        if self.live:
            self.progress.update(self.task, completed=event["step"])

    def _step(self, event: dict[str, Any]) -> None:
        terms = ", ".join(f"{name} {event[name]:.3f}" for name in TERMS if name in event)
        figures = f"{terms}, lr {event['lr']:.1e}, {event['pairs_per_s']:.0f} pairs/s"
        if event["skipped"]:
            figures += f", {event['skipped']} skipped"
        if self.live:
            self.progress.update(self.task, completed=event["step"], figures=figures)
        else:
            self.print(f"  step {event['step']}: {figures}")

    def _evaluation(self, event: dict[str, Any]) -> None:
        names = ("acc1", "acc5", "image_retrieval_recall@1", "text_retrieval_recall@1")
        figures = ", ".join(f"{name} {100 * event[name]:.1f} %" for name in names if name in event)
        self.print(f"  evaluation after {event['step']} steps: {figures}")

    def _resumed(self, event: dict[str, Any]) -> None:
        self.print(f"  resumed after {event['step']} steps")
        if self.live:
            self.progress.update(self.task, completed=event["step"])

    def _warning(self, event: dict[str, Any]) -> None:
        self.print(f"  warning: {event['text']}")

    def _batch_norm(self, event: dict[str, Any]) -> None:
        self.print(f"  batch-norm statistics re-estimated on {event['batches']} batches")
