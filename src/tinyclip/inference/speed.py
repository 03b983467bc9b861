"""Parameters, multiply-accumulates and throughput of a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyclip.common.progress import ended, tell
from tinyclip.inference.exported import RuntimePipeline
from tinyclip.model.costs import counted
from tinyclip.model.model import CLIP


def measure(model: CLIP, *, batch_size: int = 32, seconds: float = 2.0) -> dict[str, Any]:
    """`params_image`, `params_text` (both without the token embedding), `params_embedding`, `macs_image`,
    `macs_text`, and the throughput here: `images_per_s`, `texts_per_s`, `pairs_per_s` (median of several runs).

    Args:
        model: on the device and in the dtype to time; texts have the full context.
        seconds: time to spend on timing each tower; 0 leaves the throughput out.

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
        image_s = _seconds(lambda: model.encode_image(images), weight.device, seconds)
        text_s = _seconds(lambda: model.encode_text(tokens), weight.device, seconds)
        result |= {"images_per_s": batch_size / image_s, "texts_per_s": batch_size / text_s}
        result |= {"pairs_per_s": batch_size / (image_s + text_s), "batch_size": batch_size}
        result |= {"device": str(weight.device), "dtype": str(model.dtype).removeprefix("torch.")}
    return result


def measure_export(clip: RuntimePipeline, *, batch_size: int = 32, seconds: float = 2.0) -> dict[str, Any]:
    """`measure` of an exported model, with `size_mb` of its folder; several batches are under way at once."""
    config = clip.config
    result = counted(config) | {"size_mb": clip.size() / 1e6}
    size, count = config.vision.image_size, 4 * batch_size
    images = np.random.default_rng(0).random((count, 3, size, size), np.float32)
    texts = ["a " * config.text.context_length] * count  # as long as can be
    cpu = torch.device("cpu")
    image_s = _seconds(lambda: clip.encode_image(images, batch_size=batch_size), cpu, seconds)
    text_s = _seconds(lambda: clip.encode_text(texts, batch_size=batch_size), cpu, seconds)
    result |= {"images_per_s": count / image_s, "texts_per_s": count / text_s}
    return result | {"pairs_per_s": count / (image_s + text_s), "batch_size": batch_size} | clip.computing


def pair_latency_ms(model: CLIP, batch_size: int = 32) -> float:
    """Milliseconds an image-text pair, in a batch, texts of full context; median of a few runs."""
    every_kernel = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(every_kernel):  # training may have chosen one
        return 1000 / float(measure(model, batch_size=batch_size, seconds=0.5)["pairs_per_s"])


def fraction_for_latency(latency_ms: Callable[[float], float], wanted_ms: float, tries: int = 6) -> float:
    """The smallest fraction to remove whose latency is at most `wanted_ms`, by bisection.

    Args:
        latency_ms: measures a model with that fraction of its MACs removed.

    Raises:
        ValueError: when removing 97 % is not enough, or nothing needs to be removed.
    """
    low, high = 0.0, 0.97
    whole, least = latency_ms(low), latency_ms(high)
    if wanted_ms < least:
        raise ValueError(f"latency_ms {wanted_ms:g} cannot be reached: {least:.3g} with 97 % of the MACs removed")
    if wanted_ms >= whole:
        raise ValueError(f"latency_ms {wanted_ms:g} is nothing to do: it takes {whole:.3g} as it is")
    for _ in range(tries):
        middle = (low + high) / 2
        low, high = (low, middle) if latency_ms(middle) <= wanted_ms else (middle, high)
    return high


@torch.inference_mode()
def _seconds(call: Any, device: torch.device, seconds: float) -> float:
    """Median seconds of a call, after a warm-up."""
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
