"""A batch of pictures and texts, and what a model takes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyclip.common.faults import Skipped
from tinyclip.inputs.transforms import Preprocess


@dataclass
class Batch:
    """What the training loop gets. Images travel as uint8 and are normalised on the device."""

    images: Tensor  # uint8 (n, 3, s, s)
    tokens: Tensor  # int64 (n, context_length)
    groups: Tensor  # int64 (n,): equal for samples of one class (JSON field `class`), else one a sample
    keys: list[str]
    skipped: list[Skipped] = field(default_factory=list)  # since the worker's last batch
    teacher: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # stored (n, embed_dim) image and text features
    teacher_tokens: Tensor | None = None  # int64 (n, length), of a teacher that has another tokenizer

    def pin_memory(self) -> Batch:
        images, tokens, groups = (t.pin_memory() for t in (self.images, self.tokens, self.groups))
        teacher = [(image.pin_memory(), text.pin_memory()) for image, text in self.teacher]
        theirs = None if self.teacher_tokens is None else self.teacher_tokens.pin_memory()
        return Batch(images, tokens, groups, self.keys, self.skipped, teacher, theirs)


Tokenize = Callable[[Sequence[str]], np.ndarray]  # texts -> int64 (n, length)


def image_input(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 (n, 3, s, s) -> normalised float32 (n, 3, image_size, image_size) on the same device."""
    x = images.float() / 255
    if x.shape[-1] != preprocess.image_size:
        size = (preprocess.image_size, preprocess.image_size)
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    # Made there, each would wait for the device.
    mean, std = (
        torch.tensor(v).view(3, 1, 1).to(x.device, non_blocking=True) for v in (preprocess.mean, preprocess.std)
    )
    return (x - mean) / std


def shorten(tokens: Tensor, end_id: int, context_length: int) -> Tensor:
    """Cut token rows to the longest text of the batch, exact under causal attention, and to the context; a text
    that is too long for it keeps its end token. (n, length) -> (n, shorter)."""
    ends = (tokens == end_id).int().argmax(1)
    length = min(int(ends.max()) + 1, context_length)
    cut = tokens[:, :length].clone()
    cut[ends >= length, -1] = end_id
    return cut
