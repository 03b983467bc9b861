"""The state of a run, and helpers its parts share: batches, attention kernel, preprocessing."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyclip.common.distributed import is_main, rank, world_size
from tinyclip.common.faults import Skipped, append, summary
from tinyclip.common.files import append_text, json_text
from tinyclip.common.locks import Lock
from tinyclip.common.watchdog import GO_ON, Watchdog
from tinyclip.data import loader as data
from tinyclip.data.loader import training_loader
from tinyclip.inputs.tokenizer import CLIPTokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig
from tinyclip.model.model import CLIP
from tinyclip.recipe.recipe import Recipe
from tinyclip.recipe.stage import Stage
from tinyclip.teachers.cache import Cache, draw_stored
from tinyclip.teachers.teacher import AnyTeacher, ForeignTeacher, Teacher

Evaluator = Callable[[CLIP, CLIPTokenizer, Preprocess], dict[str, Any]]
Listener = Callable[[dict[str, Any]], None]


@dataclass
class Run:
    """Everything a run needs; created by `start`, consumed by `run`."""

    recipe: Recipe
    folder: Path
    teacher: AnyTeacher | None
    original: CLIPConfig  # base of the sparsity: the shape of the teacher, else of the first stage's start
    configs: list[CLIPConfig]
    tokenizer: CLIPTokenizer
    preprocess: Preprocess
    device: torch.device
    precision: str
    lock: Lock  # the folder's lock, held by the first process until the run ends
    evaluator: Evaluator | None = None
    listener: Listener = field(default=lambda event: None)
    caches: list[Cache] = field(default_factory=list)  # caches of a cached teacher
    watchdog: Watchdog = field(default_factory=Watchdog)

    def emit(self, event: dict[str, Any]) -> None:
        """Send an event to metrics.jsonl and to the listener; only the first process does."""
        if not is_main():
            return
        append_text(self.folder / "metrics.jsonl", json_text(event) + "\n")
        self.listener(event)

    def warn(self, stage: Stage, text: str) -> None:
        self.emit({"event": "warning", "stage": stage.name, "text": text})


def preprocess_for(run: Run, model: CLIP) -> Preprocess:
    return run.preprocess.model_copy(update={"image_size": model.config.vision.image_size})


def share(stage: Stage) -> int:
    """Return the pairs of a step that one process computes, which fit in its memory. Not inside `from_main`, where
    the world is one process."""
    return stage.batch_size // world_size()


def loader_of(run: Run, i: int, cut: bool = False, order: int = 0, pairs: int | None = None) -> Any:
    """Return the loader for this process's share of a stage's batches.

    Args:
        cut: whether an auto stage is past its cut.
        order: the step at which the data order last started over, see `resume.restore`.
        pairs: batch size of this process; by default its share of the stage's batch size.
    """
    stage, config = run.recipe.stages[i], run.configs[i]
    size, context, teacher = config.vision.image_size, config.text.context_length, run.teacher
    if isinstance(teacher, Teacher | ForeignTeacher):
        size = max(size, teacher.preprocess.image_size)
    if isinstance(teacher, Teacher):  # this teacher reads the same tokens
        context = max(context, teacher.config.text.context_length)
    return training_loader(
        run.recipe.data,
        tokenizer=run.tokenizer,
        context_length=context,
        image_size=run.caches[0].info.image_size if run.caches else size,
        augment=stage.augment,
        batch_size=pairs or share(stage),
        workers=run.recipe.workers,
        # Each stage, and each part of a stage, sees the data in a different order.
        seed=run.recipe.seed + i + 1000 * cut + 1_000_003 * order,
        rank=rank(),
        world_size=world_size(),
        stored=partial(draw_stored, run.caches) if run.caches else None,
        teacher_tokenize=teacher.tokenize if isinstance(teacher, ForeignTeacher) else None,
    )


def closing(loader: Any) -> AbstractContextManager[None]:
    """`data.closing` for a run, which can be resumed after a worker died."""
    return data.closing(loader, GO_ON)


def attention(device: torch.device) -> AbstractContextManager[None]:
    """Select the attention kernel to train with. On CPUs the fused kernel's backward pass is slower than the plain one
    (`benchmarks/attention.py`)."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    return context


ENOUGH = 500  # bad samples before their share can stop the run


@dataclass
class Progress:
    """The progress of a stage, saved in its checkpoints."""

    step: int = 0
    samples: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # by cause, counted each time a sample comes up
    skipped_steps: int = 0  # batches that overflowed in float16; not counted as steps
    seconds: float = 0.0
    order: int = 0  # step at which the data order last started over, after the number of processes or workers changed
    evaluated_step: int = 0
    precision: str = ""  # precision of the steps so far
    best_step: int | None = None
    best_score: float = -1.0
    evaluation: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._since = time.perf_counter()
        self._recent: list[tuple[float, int]] = []
        self._vanished: set[str] = set()
        self._waits: list[float] = []

    def advance(self, count: int, stepped: bool = True) -> None:
        """Record a step on `count` samples, summed over all processes. A skipped step (`stepped` false) uses up its
        batch, but neither the step count nor the schedule advances."""
        now = time.perf_counter()
        self._recent = [*self._recent[-49:], (now - self._since, count)]
        self.seconds += now - self._since
        self._since = now
        self.step += stepped
        self.skipped_steps += not stepped
        self.samples += count

    def skip(self, skipped: list[Skipped], log: Path, stage: str) -> list[Skipped]:
        """Record the samples that all processes skipped at this step; the first process logs them. Return the first
        sample of each shard that has just vanished.

        Raises:
            ValueError: if more than half of the data is bad. Vanished shards do not count, as their data may be good.
        """
        for s in skipped:
            self.skipped[s.cause] = self.skipped.get(s.cause, 0) + 1
        if is_main():
            append(log, skipped, stage=stage, step=self.step)
        vanished = {s.shard: s for s in skipped if s.cause == "vanished_shard" and s.shard not in self._vanished}
        self._vanished |= vanished.keys()
        bad = {cause: n for cause, n in self.skipped.items() if cause != "vanished_shard"}
        if sum(bad.values()) > max(self.samples, ENOUGH):
            raise ValueError(f"more than half of the samples are bad ({summary(bad)}); the last: {skipped[-1]}")
        return list(vanished.values())

    def waited(self, seconds: float) -> None:
        """Record how long a step waited for its data; the first one is ignored because it includes worker start-up."""
        self._waits = [*self._waits[-49:], seconds] if self._recent else []

    def pause(self) -> None:
        """Exclude time not spent on training (evaluation, saving) from pairs/s."""
        self._since = time.perf_counter()

    def figures(self) -> dict[str, Any]:
        """Return speed and data wait over the last 50 steps, and the number of skipped samples and steps so far."""
        seconds = [s for s, _ in self._recent]
        speed = {"pairs_per_s": sum(n for _, n in self._recent) / max(sum(seconds), 1e-9)}
        waits = self._waits or [0.0]
        speed["data_wait_s"] = sum(waits) / len(waits)
        speed["data_wait_share"] = sum(waits) / max(sum(seconds[-len(waits) :]), 1e-9)
        return speed | self.left_out()

    def left_out(self) -> dict[str, Any]:
        """Return the number of skipped samples, in total and by cause, and of skipped steps."""
        samples = {"skipped": sum(self.skipped.values()), "skipped_by_cause": dict(self.skipped)}
        return samples | {"skipped_steps": self.skipped_steps}
