"""What a stage needs to be stopped at any step and to go on as if it had not been."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

from tinyclip.checkpoint import load_checkpoint, save_into
from tinyclip.faults import Skipped, append, summary
from tinyclip.files import atomic_directory, write_atomically
from tinyclip.step import Trainee

STATE = "state.pt"
ENOUGH = 500  # bad samples, before they are judged
PARTS = {"optimizer", "scaler", "loader", "progress", "random", "projections", "masks"}  # of it
# What Energon's part of it is made of; nothing else is unpickled.
LOADER_PARTS: tuple[Any, ...] = (
    *(SavableDatasetCheckpoint, SavableDataLoaderState, SavableDatasetState, SliceState, SystemRngState, FlexState),
    *(np.ndarray, np.dtype, np.empty(0).__reduce__()[0]),
)
LOADER_STATE: dict[tuple[str, str], Any] = {(part.__module__, part.__qualname__): part for part in LOADER_PARTS}
# The random state of a decoding worker is a tensor, whose storage torch itself would unpickle with anything in it.
LOADER_STATE |= {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): lambda data: torch.load(BytesIO(data), weights_only=True),
    ("collections", "OrderedDict"): OrderedDict,
}


class Interrupted(Exception):
    """The run was asked to stop and has saved itself; `signal_number` says by what."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.signal_number, self.step = signal_number, step


@dataclass
class Progress:
    """Where a stage stands; saved with it."""

    step: int = 0
    samples: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # by cause, each time that a sample came up
    seconds: float = 0.0
    evaluated_step: int = 0
    best_step: int | None = None
    best_score: float = -1.0
    evaluation: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._since = time.perf_counter()
        self._recent: list[tuple[float, int]] = []
        self._vanished: set[str] = set()
        self._waits: list[float] = []

    def advance(self, count: int, skipped: list[Skipped], log: Path, stage: str) -> list[Skipped]:
        """After a step on `count` samples; what was left out goes to the log. Returns the first sample of each shard
        that has just vanished.

        Raises:
            ValueError: when more than half of the data is bad. Vanished shards say nothing of the data as it was.
        """
        now = time.perf_counter()
        self._recent = [*self._recent[-49:], (now - self._since, count)]
        self.seconds += now - self._since
        self._since = now
        self.step += 1
        self.samples += count
        for s in skipped:
            self.skipped[s.cause] = self.skipped.get(s.cause, 0) + 1
        append(log, skipped, stage=stage, step=self.step)
        vanished = {s.shard: s for s in skipped if s.cause == "vanished_shard" and s.shard not in self._vanished}
        self._vanished |= vanished.keys()
        bad = {cause: n for cause, n in self.skipped.items() if cause != "vanished_shard"}
        if sum(bad.values()) > max(self.samples, ENOUGH):
            raise ValueError(f"more than half of the samples are bad ({summary(bad)}); the last: {skipped[-1]}")
        return list(vanished.values())

    def waited(self, seconds: float) -> None:
        """Note how long the step that begins has waited for its data; the first also for the workers to start."""
        self._waits = [*self._waits[-49:], seconds] if self._recent else []

    def pause(self) -> None:
        """Leave out of pairs/s what is not training (evaluation, saving)."""
        self._since = time.perf_counter()

    def figures(self) -> dict[str, Any]:
        """Speed and waiting of the last 50 steps, and what was left out so far."""
        seconds = [s for s, _ in self._recent]
        speed = {"pairs_per_s": sum(n for _, n in self._recent) / max(sum(seconds), 1e-9)}
        waits = self._waits or [0.0]
        speed["data_wait_s"] = sum(waits) / len(waits)
        speed["data_wait_share"] = sum(waits) / max(sum(seconds[-len(waits) :]), 1e-9)
        return speed | self.left_out()

    def left_out(self) -> dict[str, Any]:
        """Samples that were skipped, in all and by cause."""
        return {"skipped": sum(self.skipped.values()), "skipped_by_cause": dict(self.skipped)}


def save(place: Path, trainee: Trainee, loader: Any = None, progress: Progress | None = None) -> None:
    """Write the student, and with a loader and progress all that `restore` needs, in one piece.

    Raises:
        ValueError: when it cannot be written.
    """
    with atomic_directory(place) as temporary:
        save_into(temporary, trainee.model, trainee.tokenizer, trainee.preprocess)
        if progress is not None:
            if trainee.pruner is not None:
                trainee.pruner.save(temporary)
            data = {
                "projections": trainee.projections.state_dict(),
                "masks": trainee.pruner.optimizer.state_dict() if trainee.pruner else None,
                "optimizer": trainee.optimizer.state_dict(),
                "scaler": trainee.scaler.state_dict(),
                "loader": torch.frombuffer(
                    bytearray(pickle.dumps(loader.save_state_rank(), protocol=4)), dtype=torch.uint8
                ),
                "progress": asdict(progress),
                "random": torch.get_rng_state(),
            }
            try:
                torch.save(data, temporary / STATE)
            except RuntimeError as error:  # torch's own word for a full disk
                raise ValueError(f"cannot write {place}: is the disk full? ({' '.join(str(error).split())})") from None
            progress.pause()


def restore(place: Path, trainee: Trainee, loader: Any, progress: Progress) -> bool:
    """Load what `save` wrote into the given objects; False when there is nothing to go on from.

    Raises:
        ValueError: when the checkpoint is damaged.
    """
    for leftover in place.parent.glob(".*.tmp"):  # of a run that was killed while it saved
        shutil.rmtree(leftover, ignore_errors=True)
    if not (place / STATE).exists():
        return False
    trainee.model.load_state_dict(load_checkpoint(place)[0].state_dict())
    data = _read_state(place)
    trainee.optimizer.load_state_dict(data["optimizer"])
    trainee.projections.load_state_dict(data["projections"])
    if trainee.pruner is not None:
        trainee.pruner.load(place)
        trainee.pruner.optimizer.load_state_dict(data["masks"])
    trainee.scaler.load_state_dict(data["scaler"])
    loader.restore_state_rank(data["loader"])
    torch.set_rng_state(data["random"])
    for name, value in data["progress"].items():
        setattr(progress, name, value)
    return True


def saved_step(place: Path) -> int:
    """The step that a checkpoint of a stage stands at; 0 when there is nothing to go on from."""
    return int(_read_state(place)["progress"]["step"]) if (place / STATE).exists() else 0


def _read_state(place: Path) -> dict[str, Any]:
    try:
        # On the CPU, since the workers take their random states from it; the optimiser moves its own tensors.
        data = dict(torch.load(place / STATE, weights_only=True, map_location="cpu"))
        if not (missing := PARTS - data.keys()):
            data["loader"] = _LoaderState(BytesIO(data["loader"].numpy().tobytes())).load()
    except (OSError, RuntimeError, EOFError, AttributeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        text = " ".join(str(error).split())[:120]
        raise ValueError(f"{place / STATE}: damaged ({text}); remove {place} to start the stage anew") from None
    if missing:
        parts = ", ".join(sorted(missing))
        raise ValueError(f"{place / STATE}: damaged (no {parts}); remove {place} to start the stage anew")
    return data


class _LoaderState(pickle.Unpickler):
    """Reads what Energon's state is made of, and refuses every other name before anything is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in LOADER_STATE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return LOADER_STATE[module, name]


def forget_metrics(path: Path, stage: str, step: int) -> None:
    """Drop what a stage logged after `step`, which is about to be done again, and a line torn by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("stage") != stage or (step > 0 and event.get("step", 0) <= step):
            kept.append(line)
    write_atomically(path, "".join(kept))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT or SIGTERM, so that the loop can finish its step and save. A second SIGINT
    raises. Workers are forked with these handlers, so a Ctrl-C in a terminal does not kill them first."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
