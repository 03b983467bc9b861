"""A model that knows the answers, and data for it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.shards import write_shard


class Oracle:
    """Encodes a grey level `g`, and texts that name a level, as a point on the half circle."""

    def encode_image(self, images: Any, *, normalize: bool = True) -> Tensor:
        return torch.stack([self._point(float(np.asarray(i.convert("L")).mean())) for i in images])

    def encode_text(self, texts: Any, *, normalize: bool = True) -> Tensor:
        return torch.stack([self._point(float(re.sub(r"[^0-9.]", "", t))) for t in texts])

    def _point(self, level: float) -> Tensor:
        angle = torch.tensor(level / 255 * np.pi)
        return torch.stack([angle.cos(), angle.sin()])


def grey(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), level).save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder: Path, rows: list[tuple[int, dict[str, Any]]]) -> Path:
    folder.mkdir(exist_ok=True)
    samples = [{"key": f"k{i}", "png": grey(g), "json": json.dumps(info).encode()} for i, (g, info) in enumerate(rows)]
    write_shard(folder / "0.tar", samples)
    return folder
