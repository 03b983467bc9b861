"""Typical user code for the Python API. `scripts/check` runs mypy over it, and test_python.py runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch
from PIL import Image

import tinyclip


def main(picture: Path) -> None:
    clip = tinyclip.load("emoji-student", device="cpu", dtype="float32")
    assert_type(clip, tinyclip.Pipeline)
    paths = [picture, picture]
    assert_type(clip.encode_image(paths), torch.Tensor)
    assert_type(clip.encode_image([str(picture), Image.open(picture)]), torch.Tensor)
    assert_type(clip.encode_image(np.zeros((8, 9, 3), np.uint8)), torch.Tensor)
    assert_type(clip.encode_text("a dog"), torch.Tensor)
    assert_type(clip.similarity(picture, ["a dog", "a cat"]), torch.Tensor)
    assert_type(clip.classify(picture, ["a dog", "a cat"]), torch.Tensor)

    model, preprocess = tinyclip.clip.load("emoji-student", device="cpu")
    pixels = preprocess(Image.open(picture))
    assert_type(pixels, torch.Tensor)
    logits_per_image, logits_per_text = model.forward(pixels[None], tinyclip.clip.tokenize("a dog"))
    assert_type(logits_per_image, torch.Tensor)
    assert_type(tinyclip.clip.available_models(), list[str])

    config = tinyclip.CLIPConfig.from_dict(model.config.model_dump() | {"embed_dim": 64})
    student = tinyclip.inherit(model, config)
    assert_type(student, tinyclip.CLIP)
    assert_type(tinyclip.measure(student, seconds=0), dict[str, Any])
