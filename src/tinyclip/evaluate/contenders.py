"""The models of a comparison: short names and costs."""

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

ROUNDS, SECONDS = 10, 0.1  # timing: rounds, and seconds per tower in a round


@dataclass(frozen=True)
class Contender:
    """A model under a unique short name."""

    name: str
    source: str
    clip: Any  # a `Pipeline`, or its equivalent on another runtime
    size: int  # bytes on disk


def labels(sources: Sequence[str]) -> list[str]:
    """Return unique short names: as many trailing path parts as needed, and numbers for repeated sources."""
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
    """Return the bytes of a file, or of a folder's files without training state."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name != STATE)


def costs(contenders: Sequence[Contender]) -> dict[str, dict[str, Any]]:
    """Return each model's size (`params_*` and `macs_*` as in `measure`; `bytes`) and speed: `pairs_per_s` in batches
    of 32, and `latency_ms` of a single pair, each with its range over the rounds.

    Speed is measured with `encode_image` on prepared pictures and `encode_text` on texts of full context length. The
    models take turns, so a machine that slows down affects all of them.
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
    """Return the seconds per batch of pairs in each round."""
    calls = {c.name: _calls(c.clip, batch) for c in contenders}
    for call in chain(*calls.values()):
        call()  # warm-up
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(ROUNDS), f"timing batches of {batch}", ROUNDS, "rounds"):
        for name, towers in calls.items():
            times[name].append(sum(_median_seconds(call) for call in towers))
    return times


def _calls(clip: Any, batch: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a call for each tower; results are copied to the CPU, which waits for the device."""
    pixels = torch.rand(batch, *clip.preprocess(Image.new("RGB", (8, 8))).shape)
    texts = [" ".join(["a"] * clip.tokenize("a").shape[1])] * batch  # longer than the context
    return lambda: as_tensor(clip.encode_image(pixels)), lambda: as_tensor(clip.encode_text(texts))


def _median_seconds(call: Callable[[], Any]) -> float:
    times: list[float] = []
    while not times or sum(times) < SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
