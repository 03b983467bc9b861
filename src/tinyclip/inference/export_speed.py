"""Parameters, multiply-accumulates and throughput of an exported model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tinyclip.inference.exported import RuntimePipeline
from tinyclip.model.costs import counted
from tinyclip.model.speed import median_seconds


def measure_export(clip: RuntimePipeline, *, batch_size: int = 32, seconds: float = 2.0) -> dict[str, Any]:
    """`measure` for an exported model, plus `size_mb` of its folder; several batches run in parallel."""
    config = clip.config
    result = counted(config) | {"size_mb": clip.size() / 1e6}
    size, count = config.vision.image_size, 4 * batch_size
    images = np.random.default_rng(0).random((count, 3, size, size), np.float32)
    texts = ["a " * config.text.context_length] * count  # as long as possible
    cpu = torch.device("cpu")
    image_s = median_seconds(lambda: clip.encode_image(images, batch_size=batch_size), cpu, seconds)
    text_s = median_seconds(lambda: clip.encode_text(texts, batch_size=batch_size), cpu, seconds)
    result |= {"images_per_s": count / image_s, "texts_per_s": count / text_s}
    return result | {"pairs_per_s": count / (image_s + text_s), "batch_size": batch_size} | clip.computing
