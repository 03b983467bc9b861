from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinyclip.config import CLIPConfig, vit_clip
from tinyclip.model import CLIP

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(GOLDEN))

import fill  # noqa: E402  (golden/fill.py)

TEXTS = [
    "a photo of a cat",
    "two dogs playing in the snow",
    "",
    "an extremely long caption " * 30,
    "a diagram",
    "ZÜRICH café — 2024!!",
    "3/4 cup of sugar & salt",
    "日本語のテキスト",
]


def golden(name: str) -> Any:
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


def filled(config: CLIPConfig, salt: int) -> CLIP:
    """A model whose weights are `fill.py`'s for this salt."""
    model = CLIP(config)
    state = {k: torch.from_numpy(np.asarray(fill.fill(k, tuple(v.shape), salt))) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def images(config: CLIPConfig, salt: int) -> torch.Tensor:
    return torch.from_numpy(fill.images(2, config.vision.image_size, salt))


def small_config(**changes: Any) -> CLIPConfig:
    """A ViT CLIP of a few thousand parameters."""
    arguments: dict[str, Any] = {"image_size": 32, "head_dim": 8, "context_length": 12} | changes
    return vit_clip(24, (3, 32), (2, 24), 8, **arguments)


@pytest.fixture
def small_model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(small_config()).eval()
