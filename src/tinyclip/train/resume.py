"""Stop a stage at any step and resume it as if it had never stopped: checkpoints, their state, and stop signals."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

from tinyclip.common.distributed import any_of, from_main, gather_objects, is_main, rank, world_size
from tinyclip.common.files import checksum, json_text, read_json_object, write_atomically
from tinyclip.common.folders import atomic_directory, recover
from tinyclip.common.ownership import MARKER, adopt, carry, discard
from tinyclip.train.pruner import MASKS
from tinyclip.train.run import Progress
from tinyclip.train.step import Trainee
from tinyclip.zoo.checkpoint import FILES, WEIGHTS, load_checkpoint, save_into
from tinyclip.zoo.resolve import MANIFEST, STATE

PARTS = {"optimizer", "scaler", "progress", "projections", "masks", "layout", "ranks"}  # keys in the state file
SAVED = (*FILES, STATE, MANIFEST, MASKS)  # files in a checkpoint of a stage in progress
STEP = re.compile(r"step-(\d{6,})")  # folder name of a checkpoint older than `last`
# Errors raised when reading a truncated or malicious state.
DAMAGE = (
    *(OSError, RuntimeError, EOFError, AttributeError, TypeError, ValueError, LookupError, pickle.UnpicklingError),
)
# Classes in Energon's part of the state; nothing else is unpickled.
LOADER_PARTS: tuple[Any, ...] = (
    *(SavableDatasetCheckpoint, SavableDataLoaderState, SavableDatasetState, SliceState, SystemRngState, FlexState),
    *(np.ndarray, np.dtype, np.empty(0).__reduce__()[0]),
)
LOADER_STATE: dict[tuple[str, str], Any] = {(part.__module__, part.__qualname__): part for part in LOADER_PARTS}
# A decoding worker's random state is a tensor; torch's own loader would unpickle arbitrary objects from its storage.
LOADER_STATE |= {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): lambda data: torch.load(BytesIO(data), weights_only=True),
    ("collections", "OrderedDict"): OrderedDict,
}


class Interrupted(Exception):
    """The run was asked to stop by the signal `signal_number` and has saved its state."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.signal_number, self.step = signal_number, step


def save(place: Path, trainee: Trainee, loader: Any, progress: Progress, keep: int) -> None:
    """Write the student and everything `restore` needs, atomically. All processes call this; the first one writes.

    Args:
        place: the stage's `last`; its previous content moves to a sibling folder such as `step-000100`.
        keep: the most checkpoints to keep, including this one.

    Raises:
        ValueError: if the checkpoint cannot be written, or a trained value is not finite.
    """
    trainee.check()
    position = pickle.dumps(loader.save_state_rank(), protocol=4)
    mine = {"loader": torch.frombuffer(bytearray(position), dtype=torch.uint8), "random": torch.get_rng_state()}
    ranks, layout = gather_objects(mine), [world_size(), loader.num_workers]
    from_main(lambda: _write(place, trainee, progress, keep, {"layout": layout, "ranks": ranks}))
    progress.pause()


def _write(place: Path, trainee: Trainee, progress: Progress, keep: int, state: dict[str, Any]) -> None:
    state |= {
        "projections": trainee.projections.state_dict(),
        "masks": trainee.pruner.optimizer.state_dict() if trainee.pruner else None,
        "optimizer": trainee.optimizer.state_dict(),
        "average": None if trainee.average is None else trainee.average.state_dict(),
        "scaler": trainee.scaler.state_dict(),
        "progress": asdict(progress),
    }
    before = _manifest(place)["step"] if place.exists() else progress.step
    aside = place.with_name(f"step-{before:06d}") if keep > 1 and before < progress.step else None
    with atomic_directory(place, "model", aside, known=SAVED) as temporary:
        save_into(temporary, trainee.model, trainee.tokenizer, trainee.preprocess)
        if trainee.pruner is not None:
            trainee.pruner.save(temporary)
        try:
            torch.save(state, temporary / STATE)
        except RuntimeError as error:  # what torch raises when the disk is full
            raise ValueError(f"cannot write {place}: is the disk full? ({' '.join(str(error).split())})") from None
        sums = {file.name: checksum(file) for file in sorted(temporary.iterdir()) if file.name != MARKER}
        manifest = {"step": progress.step, "evaluated_step": progress.evaluated_step, "crc32": sums}
        (temporary / MANIFEST).write_text(json_text(manifest), encoding="utf-8")
    for old in older(place)[keep - 1 :]:
        _drop(old)


def older(last: Path) -> list[Path]:
    """Return the older checkpoints kept next to `last`, newest first."""
    found = {}
    for path in last.parent.iterdir() if last.parent.is_dir() else ():
        step = STEP.fullmatch(path.name)
        if step and not path.is_symlink() and any((path / name).exists() for name in (MARKER, MANIFEST, WEIGHTS)):
            found[path] = int(step[1])
    return sorted(found, key=lambda path: found[path], reverse=True)


def _drop(checkpoint: Path) -> None:
    """Remove a stage's checkpoint; files that tinyclip did not write stay."""
    adopt(checkpoint, SAVED)
    discard(checkpoint)


def settle(last: Path) -> tuple[int, list[str]]:
    """Make `last` the newest intact checkpoint of an unfinished stage, before anything reads it.

    Returns:
        The checkpoint's step (0 if there is none yet), and one line for each damaged checkpoint, which is removed.

    Raises:
        ValueError: if all checkpoints are damaged; none of them is changed.
    """
    faults: dict[Path, str] = {}
    recover(last)
    for place in [last, *older(last)]:
        if not place.exists():
            continue
        try:
            step = int(_check(place)["step"])
        except ValueError as error:
            faults[place] = str(error)
            continue
        if last in faults:
            adopt(last, SAVED)
            carry(last, place)
        for damaged in faults:
            _drop(damaged)
        if place != last:
            place.rename(last)
        return step, [f"{fault}; continuing from step {step}" for fault in faults.values()]
    if faults:
        first = next(iter(faults.values()))
        raise ValueError(f"{first}, and no older one is complete; remove {last.parent} to restart the stage")
    return 0, []


def saved_step(last: Path) -> int:
    """Return the step of a stage's newest intact checkpoint, 0 if there is none; changes nothing."""
    for place in [last, *older(last)]:
        with suppress(ValueError):
            if place.exists():
                return int(_check(place)["step"])
    return 0


def finish(last: Path) -> None:
    """Remove the files that only a stage in progress needs."""
    for old in older(last):
        _drop(old)
    for name in (MANIFEST, STATE):
        (last / name).unlink(missing_ok=True)


def _manifest(place: Path) -> dict[str, Any]:
    manifest = read_json_object(place / MANIFEST)
    if not isinstance(manifest.get("step"), int) or not isinstance(manifest.get("crc32"), dict):
        raise ValueError(f"{place / MANIFEST}: damaged")
    return manifest


def _check(place: Path) -> dict[str, Any]:
    """Return the manifest of an intact checkpoint; `ValueError` names the file that is missing or damaged."""
    manifest = _manifest(place)
    for name in sorted({STATE, *manifest["crc32"]}):
        try:
            found = checksum(place / name)
        except OSError as error:
            raise ValueError(f"{place / name}: {error.strerror}") from None
        if found != manifest["crc32"].get(name):
            raise ValueError(f"{place / name}: damaged")
    return manifest


def restore(place: Path, trainee: Trainee, progress: Progress, workers: int) -> Any:
    """Load what `save` wrote into the given objects.

    Returns:
        The loader's state, to be restored into a loader made with `progress.order`. None if there is no checkpoint, or
        if it was saved with another number of processes or workers: then the data order starts over, and
        `progress.order` is set to the current step.

    Raises:
        ValueError: if the checkpoint is damaged.
    """
    if not from_main((place / STATE).exists):
        return None
    trainee.model.load_state_dict(load_checkpoint(place)[0].state_dict())
    data = _read_state(place)
    trainee.optimizer.load_state_dict(data["optimizer"])
    trainee.projections.load_state_dict(data["projections"])
    if trainee.pruner is not None:
        trainee.pruner.load(place)
        trainee.pruner.optimizer.load_state_dict(data["masks"])
    if trainee.average is not None:
        trainee.average.load_state_dict(data["average"])
    if data["scaler"]:  # empty unless training in float16
        trainee.scaler.load_state_dict(data["scaler"])
    for name, value in data["progress"].items():
        setattr(progress, name, value)
    if data["layout"] != [world_size(), workers]:
        progress.order = progress.step
        return None
    mine = data["ranks"][rank()]
    torch.set_rng_state(mine["random"])
    return mine["loader"]


def _read_state(place: Path) -> dict[str, Any]:
    try:
        # On the CPU, because the workers take their random states from here; the optimizer moves its own tensors.
        data = dict(torch.load(place / STATE, weights_only=True, map_location="cpu"))
        if not (missing := PARTS - data.keys()) and rank() < len(data["ranks"]):
            mine = data["ranks"][rank()]
            mine["loader"] = _LoaderState(BytesIO(mine["loader"].numpy().tobytes())).load()
    except DAMAGE as error:
        text = " ".join(str(error).split())[:120]
        raise ValueError(f"{place / STATE}: damaged ({text}); remove {place} to restart the stage") from None
    if missing:
        parts = ", ".join(sorted(missing))
        raise ValueError(f"{place / STATE}: damaged (no {parts}); remove {place} to restart the stage")
    return data


class _LoaderState(pickle.Unpickler):
    """Unpickler for Energon's state; refuses any name outside `LOADER_STATE` before calling anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in LOADER_STATE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return LOADER_STATE[module, name]


def forget_metrics(path: Path, stage: str, step: int, last: Path) -> None:
    """Drop a stage's log entries after the `step` of its checkpoint `last`, since those steps run again, and any line
    truncated by a kill. Evaluations and cuts are logged before the checkpoint that includes them."""
    if not path.exists():
        return
    until = {}
    if step:
        until["evaluation"] = _manifest(last).get("evaluated_step", step)
    if (last / MASKS).exists():
        until["cut"] = 0
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("stage") != stage or (step > 0 and event.get("step", 0) <= until.get(event.get("event"), step)):
            kept.append(line)
    write_atomically(path, "".join(kept))


class Clock:
    """Timer for the minutes between two checkpoints (None: never due). Only the first process's clock
    counts."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    def is_late(self) -> bool:
        return self.minutes is not None and is_main() and time.monotonic() - self._since >= 60 * self.minutes


@dataclass
class Stops:
    """Requests to stop this process: SIGINT, SIGTERM, or the death of the torchrun that started it."""

    received: list[int] = field(default_factory=list)
    parent: int = field(default_factory=os.getppid)
    saved: int | None = None  # the saved step while stopping at once loses nothing, else None

    def alone(self) -> int:
        """Return the signal received by a single-process run, else 0; several processes use `agreed` once per step."""
        return self.received[0] if self.received and world_size() == 1 else 0

    def agreed(self, *flags: bool, device: torch.device) -> tuple[int, ...]:
        """Return the signal any process received (0 if none), and for each flag whether any process raised it. Costs
        one small exchange per step; a single process needs none."""
        orphaned = world_size() > 1 and os.getppid() != self.parent
        terminate = signal.SIGTERM in self.received or orphaned
        interrupt, terminate, *others = any_of(signal.SIGINT in self.received, terminate, *flags, device=device)
        return (signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0), *others

    @contextmanager
    def at_once(self, step: int) -> Iterator[None]:
        """Raise `Interrupted` as soon as a signal arrives, or if one already has; for long work right after a save."""
        self.saved = step
        try:
            if stop := self.alone():
                raise Interrupted(stop, step)
            yield
        finally:
            self.saved = None


@contextmanager
def stop_signals(noted: Callable[[], None] = lambda: None) -> Iterator[Stops]:
    """Record SIGINT and SIGTERM and call `noted`, so the loop can finish its step and save. A second SIGINT raises
    `KeyboardInterrupt`. Decoding workers ignore both signals (see `data.loader.bind_worker`)."""
    stops = Stops()
    if threading.current_thread() is not threading.main_thread():
        yield stops
        return

    def handle(number: int, frame: object) -> None:
        if stops.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        stops.received.append(number)
        noted()
        if stops.saved is not None:
            raise Interrupted(number, stops.saved)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
