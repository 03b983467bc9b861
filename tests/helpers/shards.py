"""Generated shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinyclip.data.loader import close_loader, training_loader
from tinyclip.inputs.augment import Augment
from tinyclip.inputs.tokenizer import clip_tokenizer

WORDS = [f"{a}{b}" for a in "abcdef" for b in "aeiou"]


def picture(seed: int, ending: str = "jpg", size: int = 20) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[ending])
    return buffer.getvalue()


def write_shard(path: Path, samples: list[dict[str, Any]]) -> None:
    """Write a tar of samples; each has a `key`, and bytes by file extension."""
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for ending, data in sample.items():
                if ending != "key":
                    info = tarfile.TarInfo(f"{sample['key']}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def good(i: int, ending: str = "jpg", **info: Any) -> dict[str, Any]:
    data = {"captions": [f"caption {WORDS[i]}", f"words {WORDS[i]}"]} | info
    return {"key": f"{i:05d}", ending: picture(i, ending), "json": json.dumps(data).encode()}


LOADERS: list[Any] = []


def loader(folder: Path, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "tokenizer": clip_tokenizer(),
        "context_length": 16,
        "image_size": 16,
        "augment": Augment(),
        "batch_size": 4,
        "workers": 0,
        "seed": 0,
    }
    made = training_loader(folder, **(arguments | changes))
    LOADERS.append(made)
    return made


@pytest.fixture(autouse=True)
def close_loaders() -> Iterator[None]:
    yield
    while LOADERS:
        close_loader(LOADERS.pop())
