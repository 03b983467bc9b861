"""Time several alternatives in turn, so that other work on the machine affects them all equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def faster_than(self, other: Timing) -> tuple[float, float, float]:
        """Return the speedup over the other: median, minimum and maximum over the rounds."""
        ratios = sorted(theirs / mine for mine, theirs in zip(self.seconds, other.seconds, strict=True))
        return statistics.median(ratios), ratios[0], ratios[-1]

    def __add__(self, other: Timing) -> Timing:
        return Timing([a + b for a, b in zip(self.seconds, other.seconds, strict=True)])


def side_by_side(calls: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 0.2) -> dict[str, Timing]:
    """Time every call in turn, `rounds` times, after a warm-up. In each round a call is repeated for about
    `seconds`."""
    repeats = {}
    for name, call in calls.items():
        call()  # compiles, allocates
        repeats[name] = max(1, round(seconds / once(call)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            wait()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: Timing(values) for name, values in times.items()}


def once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(timing: Timing, other: Timing) -> str:
    middle, least, most = timing.faster_than(other)
    return f"{middle:.2f} ({least:.2f} to {most:.2f})"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; the first column is text, the others numbers."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *rows])


def peak_flops(dtype: torch.dtype, device: str, size: int = 2048, rounds: int = 5) -> float:
    """Return the best measured rate of a square matrix product, in floating-point operations per second."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    (timing,) = side_by_side({"product": lambda: a @ b}, rounds).values()
    return 2 * size**3 / min(timing.seconds)
