"""The live view of a run: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.text import Text

from tinyclip.cli.meter import Meter, columns, duration
from tinyclip.cli.terminal import plural
from tinyclip.common.faults import summary
from tinyclip.common.progress import listening
from tinyclip.model.axes import axis_sizes
from tinyclip.recipe.stage import TERMS

if TYPE_CHECKING:
    from tinyclip.recipe.stage import Stage
    from tinyclip.train.run import Run


def kept_lines(kept: dict[str, int]) -> list[str]:
    """Return what the masks keep, one line per tower and kind: `visual heads 6 5 6`."""
    rows: dict[str, list[str]] = {}
    for name, count in kept.items():
        tower, kind, *_ = name.split(".")
        rows.setdefault(f"{tower} {kind}", []).append(str(count))
    return [f"{name} {' '.join(counts)}" for name, counts in rows.items()]


MUCH_WAITING = 0.2  # share of time spent waiting for data
BARS = " ▁▂▃▄▅▆▇█"


def kept_bars(kept: dict[str, int], full: dict[str, int]) -> str:
    """Return the same as a line of bars, one character per block: `visual heads █▇▅  mlp ▇▇▆`."""
    rows: dict[str, str] = {}
    for name, count in kept.items():
        tower, kind, *block = name.split(".")
        share = count / max(full.get(name, count), 1)
        label = f"{tower} {kind}"
        rows[label] = rows.get(label, "") + (BARS[round(8 * min(share, 1))] if block else f"{100 * share:.0f} %")
    return "  ".join(f"{label} {bars}" for label, bars in rows.items())


def measured_on(batches: int, most: int) -> str:
    """Describe a calibration's batches, and whether it stopped early by itself."""
    enough = f" (of {most} at most; more would not change the result)" if batches < most else ""
    return f"{batches:,} batch{'' if batches == 1 else 'es'}{enough}"


class Bars(Progress):
    """A progress bar with an extra line below it."""

    line = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.line:
            yield Text(self.line, style="dim")


class Display:
    """Displays a run's events (see `run.Run.emit`)."""

    def __init__(self, console: Console, run: Run) -> None:
        self.console, self.run = console, run
        self.live = console.is_terminal
        self.progress = Bars(*columns(), console=console, disable=not self.live)
        self.meter = Meter(console, self.progress)
        self.listening = listening(self.meter)
        self.task: Any = None
        self.stage: Stage | None = None
        self.full: dict[str, int] = {}
        self.began: tuple[float, int] | None = None  # time and step at this process's first displayed step

    def __enter__(self) -> Display:
        run = self.run
        self.print(f"{run.folder}: {run.device}, {run.precision}, {run.recipe.data}")
        self.progress.start()
        self.listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.listening.__exit__(kind, error, trace)
        self.stop()

    def stop(self) -> None:
        self.meter.stop()
        self.progress.stop()

    def print(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, soft_wrap=True)

    def __call__(self, event: dict[str, Any]) -> None:
        getattr(self, f"_{event['event']}")(event)

    def _stage(self, event: dict[str, Any]) -> None:
        text = f"stage {event['stage']}"
        self.full = axis_sizes(self.run.configs[event["index"]])
        self.stage, self.began = self.run.recipe.stages[event["index"]], None
        if self.live:
            self.task = self.progress.add_task(text, total=event["steps"], figures="")
        else:
            self.print(f"{text}: {plural(event['steps'], 'step')}")

    def _tick(self, event: dict[str, Any]) -> None:
        if self.live:
            self.progress.update(self.task, completed=event["step"])

    def _step(self, event: dict[str, Any]) -> None:
        terms = ", ".join(f"{name} {event[name]:.3f}" for name in ("loss", *TERMS) if name in event)
        figures = f"{terms}, lr {event['lr']:.1e}, {event['pairs_per_s']:.0f} pairs/s"
        for name, now in event.get("sparsity", {}).items():
            what = "" if name == "both" else f"{name} "
            figures += f", {what}sparsity {100 * now:.1f} % (target {100 * event['target_sparsity'][name]:.1f})"
        if event["skipped"]:
            figures += f", {event['skipped']} skipped ({summary(event['skipped_by_cause'])})"
        if event["skipped_steps"]:
            figures += f", {plural(event['skipped_steps'], 'step')} left out (overflow in float16)"
        if event["data_wait_share"] > MUCH_WAITING:
            waiting = 100 * event["data_wait_share"]
            figures += f", {waiting:.0f} % of the time waiting for data (try more `workers`)"
        if self.live:
            self.progress.line = kept_bars(event["kept"], self.full) if "kept" in event else ""
            self.progress.update(self.task, completed=event["step"], figures=figures)
        else:
            self.print(f"  step {event['step']}: {figures}{self._left(event['step'])}")

    def _left(self, step: int) -> str:
        """Return the stage's remaining time, from its second line on."""
        now = time.monotonic()
        (since, first), steps = self.began or (now, step), self.stage.steps if self.stage else 0
        self.began = since, first
        return f", {duration((now - since) / (step - first) * (steps - step))} left" if first < step < steps else ""

    def _cut(self, event: dict[str, Any]) -> None:
        when = f"after {plural(event['step'], 'step')}"
        if not event["step"]:
            settings = self.stage.calibrated if self.stage else None
            most = settings.batches if settings else 0
            when = f"by importance, measured on {measured_on(event['batches'], most)}"
        for name, removed in event.get("removed", {}).items():
            what = "" if name == "both" else f"{name} "
            when += f", {what}sparsity {100 * removed:.1f} % (the masks': {100 * event['sparsity'][name]:.1f} %)"
        self.print(f"  cut {when}; kept:")
        for line in kept_lines(event["kept"]):
            self.print(f"    {line}")

    def _latency(self, event: dict[str, Any]) -> None:
        share = 100 * event["macs_removed"]
        self.print(f"  {event['latency_ms']:g} ms a pair requires removing about {share:.0f} % of the MACs")

    def _evaluation(self, event: dict[str, Any]) -> None:
        names = ("acc1", "acc5", "image_retrieval_recall@1", "text_retrieval_recall@1")
        figures = ", ".join(f"{name} {100 * event[name]:.1f} %" for name in names if name in event)
        self.print(f"  evaluation after {plural(event['step'], 'step')}: {figures}")

    def _resumed(self, event: dict[str, Any]) -> None:
        self.print(f"  resumed after {plural(event['step'], 'step')}")
        if self.live:
            self.progress.update(self.task, completed=event["step"])

    def _warning(self, event: dict[str, Any]) -> None:
        self.print(f"  warning: {event['text']}")

    def _batch_norm(self, event: dict[str, Any]) -> None:
        self.print(f"  batch-norm statistics re-estimated on {event['batches']} batches")


def plan_table(plan: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the columns and rows for the result of `plan.plan`."""
    columns = ["stage", "shape", "params M", "GMACs", "steps", "pairs", "epochs", "FLOPs", "GB a device", "hours"]
    rows = [["teacher", plan["teacher"]["shape"], *_sizes(plan["teacher"]), *[""] * 6]] if plan["teacher"] else []
    for stage in plan["stages"]:
        shape = f"about {stage['shape']}" if stage["estimated"] else stage["shape"]
        rows.append([stage["stage"], shape, *_sizes(stage), *_costs(stage, stage["memory_bytes"]["total"])])
    rows.append(["total", "", "", "", *_costs(plan["total"], plan["total"]["memory_bytes"])])
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return tuple(columns[i] for i in used), [[row[i] for i in used] for row in rows]


def _sizes(entry: dict[str, Any]) -> list[str]:
    parameters = [f"{entry[f'params_{tower}'] / 1e6:.1f}" for tower in ("image", "text")]
    operations = [f"{entry[f'macs_{tower}'] / 1e9:.3g}" for tower in ("image", "text")]
    return [" + ".join(parameters), " + ".join(operations)]


def _costs(entry: dict[str, Any], memory_bytes: float) -> list[str]:
    epochs, hours = (
        "" if entry[k] is None else f"{entry[k]:,.{1 if entry[k] >= 1 else 3}f}" for k in ("epochs", "hours")
    )
    steps, memory = f"{entry['steps']:,}", f"{memory_bytes / 1e9:,.1f}"
    return [steps, _prefixed(entry["samples"]), epochs, _prefixed(entry["flops"]), memory, hours]


def _prefixed(number: float) -> str:
    """Format three digits with an SI prefix: 2.4 G."""
    number = float(f"{number:.3g}")  # so 999.9 becomes 1 k
    power = min(6, max(0, int(math.log10(max(number, 1))) // 3))
    return f"{number / 1000**power:.3g} {' kMGTPE'[power]}".rstrip()
