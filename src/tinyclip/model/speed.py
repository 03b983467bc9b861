"""Measuring a model: parameters, multiply-accumulates, and how fast it is here."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from tinyclip.common.progress import ended, tell
from tinyclip.model.costs import counted
from tinyclip.model.model import CLIP


def measure(model: CLIP, *, batch_size: int = 32, seconds: float = 2.0) -> dict[str, Any]:
    """Measure `params_image`, `params_text` (both without the token embedding), `params_embedding`, `macs_image`,
    `macs_text`, and throughput on this machine: `images_per_s`, `texts_per_s`, `pairs_per_s` (median of several runs).

    Args:
        model: on the device and in the dtype to time; texts have the full context length.
        seconds: time to spend on timing each tower; 0 skips the throughput.

    >>> import tinyclip
    >>> figures = tinyclip.measure(tinyclip.load("emoji-student").model, seconds=0)
    >>> figures["params_image"], figures["params_text"], figures["macs_image"]
    (1048840, 213669, 40080768)
    """
    result = counted(model.config)
    if seconds > 0:
        weight, text = model.text_projection, model.config.text
        size = model.config.vision.image_size
        images = torch.rand(batch_size, 3, size, size, device=weight.device, dtype=weight.dtype)
        tokens = torch.randint(text.vocab_size - 1, (batch_size, text.context_length), device=weight.device)
        tokens[:, -1] = text.vocab_size - 1
        image_s = median_seconds(lambda: model.encode_image(images), weight.device, seconds)
        text_s = median_seconds(lambda: model.encode_text(tokens), weight.device, seconds)
        result |= {"images_per_s": batch_size / image_s, "texts_per_s": batch_size / text_s}
        result |= {"pairs_per_s": batch_size / (image_s + text_s), "batch_size": batch_size}
        result |= {"device": str(weight.device), "dtype": str(model.dtype).removeprefix("torch.")}
    return result


@torch.inference_mode()
def median_seconds(call: Any, device: torch.device, seconds: float) -> float:
    """Return the median seconds of a call, after a warm-up."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        tell("measuring speed", len(times), None, "runs")
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    ended("measuring speed")
    return statistics.median(times[1:])
