"""Generated pictures, a model for them, and commands over them in several processes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.models import random_model, small_config, small_tokenizer
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.transforms import Preprocess


def drawing(seed: int, size: tuple[int, int] = (50, 40)) -> Image.Image:
    """A drawing with smooth colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embed") / "model"
    tokenizer = small_tokenizer()
    network = random_model(small_config(vocab_size=tokenizer.vocab_size), dtype=torch.float32)
    Pipeline(network, tokenizer, Preprocess(image_size=32)).save(path)
    return path
