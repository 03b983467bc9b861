"""Switch off what slows tests down without affecting what they check."""

from __future__ import annotations

import gc
import time
from types import SimpleNamespace
from typing import Any

import torch
from megatron.energon.wrappers import gc_dataset

from tinyclip.evaluate import contenders
from tinyclip.model import speed


def quick() -> None:
    """Energon collects garbage whenever a loader starts, and scans every object in each decoding process. With all the
    libraries imported that takes half a second, and many tests start loaders.

    Runs and comparisons end by timing their models for seconds; no test checks a speed, so a call or two is enough."""
    gc.set_threshold(10_000, 20, 100)  # a full collection scans all the libraries for half a second
    gc_dataset.gc = SimpleNamespace(collect=int, freeze=int, unfreeze=int, get_objects=list)
    median_seconds = speed.median_seconds

    def brief(call: Any, device: torch.device, seconds: float) -> float:
        if seconds < 0.1:
            return median_seconds(call, device, seconds)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    speed.median_seconds = brief
    contenders.ROUNDS, contenders.SECONDS = 2, 0.0
