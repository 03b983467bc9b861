"""The models of a comparison: under short names, with what they cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tinyclip.common.progress import track
from tinyclip.evaluate.metrics import as_tensor
from tinyclip.model.costs import counted
from tinyclip.zoo.resolve import STATE

ROUNDS, SECONDS = 10, 0.1  # of timing: turns of the models, and seconds for each tower in a turn


@dataclass(frozen=True)
class Contender:
    """A model under a short name that no other has."""

    name: str
    source: str
    clip: Any  # a `Pipeline`, or what does the same on another runtime
    size: int  # bytes on disk


def labels(sources: Sequence[str]) -> list[str]:
    """Short names that differ: as many of the last parts of each path as it takes; a number for what is given twice."""
    parts = [[part for part in Path(source).parts if part not in ("/", ".")] or [source] for source in sources]
    taken = [1] * len(parts)
    while True:
        names = ["/".join(own[-n:]) for own, n in zip(parts, taken, strict=True)]
        longer = [i for i, name in enumerate(names) if names.count(name) > 1 and taken[i] < len(parts[i])]
        if not longer:
            break
        for i in longer:
            taken[i] += 1
    for i, name in enumerate(names):
        if name in names[:i]:
            number = 2
            while f"{name} ({number})" in names:
                number += 1
            names[i] = f"{name} ({number})"
    return names


def disk_size(path: Path) -> int:
    """Bytes of a file, or of a folder's files without the state of a training."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name != STATE)


def costs(contenders: Sequence[Contender]) -> dict[str, dict[str, Any]]:
    """Of each model its size (`params_*` and `macs_*` as `measure` counts them; `bytes`) and
    speed: `pairs_per_s` in batches of 32 and `latency_ms` of one pair alone, each with the range over the rounds.

    Speed is that of `encode_image` of prepared pictures and `encode_text` of texts of full context, the models turn by
    turn, so that a machine that slows down slows all.
    """
    result: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        result[contender.name] = {"source": contender.source, "bytes": contender.size} | counted(contender.clip.config)
        result[contender.name] |= contender.clip.computing | {"logit_scale": contender.clip.logit_scale}
    for batch, key in ((32, "pairs_per_s"), (1, "latency_ms")):
        speed = (lambda s: 32 / s) if batch > 1 else (lambda s: 1000 * s)
        for name, times in _side_by_side(contenders, batch).items():
            result[name][key] = speed(statistics.median(times))
            result[name][f"{key}_range"] = sorted(speed(s) for s in (min(times), max(times)))
    return result


def _side_by_side(contenders: Sequence[Contender], batch: int) -> dict[str, list[float]]:
    """Seconds of a batch of pairs, in each round."""
    calls = {c.name: _calls(c.clip, batch) for c in contenders}
    for call in chain(*calls.values()):
        call()  # warm
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(ROUNDS), f"timing batches of {batch}", ROUNDS, "rounds"):
        for name, towers in calls.items():
            times[name].append(sum(_median_seconds(call) for call in towers))
    return times


def _calls(clip: Any, batch: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Both towers; the results come to the CPU, so that a device is waited for."""
    pixels = torch.rand(batch, *clip.preprocess(Image.new("RGB", (8, 8))).shape)
    texts = [" ".join(["a"] * clip.tokenize("a").shape[1])] * batch  # more than fits
    return lambda: as_tensor(clip.encode_image(pixels)), lambda: as_tensor(clip.encode_text(texts))


def _median_seconds(call: Callable[[], Any]) -> float:
    times: list[float] = []
    while not times or sum(times) < SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
