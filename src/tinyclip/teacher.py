"""What a teacher is: a frozen model that turns a training batch into features, or its features in a cache.

Both have `config`, `scale`, `scales` and `features_of`; several stored teachers are an ensemble.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyclip.config import CLIPConfig
from tinyclip.data import Batch
from tinyclip.model import CLIP
from tinyclip.transforms import Preprocess

Features = tuple[Tensor, Tensor]  # normalised image_features and text_features, (n, embed_dim), at least float32


@dataclass
class Teacher:
    """A live teacher. Its model is put in evaluation mode and never updated."""

    model: CLIP
    preprocess: Preprocess

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    def features_of(self, batch: Batch, piece: slice, images: Tensor, end_id: int) -> list[Features]:
        """What each teacher says of a piece of a batch, here the one. `images` are the piece's, on the device."""
        return [self.features(images, batch.tokens[piece], end_id)]

    def features(self, images: Tensor, tokens: Tensor, end_id: int) -> Features:
        """Normalised image_features and text_features, (n, embed_dim) in float32 (float64 of such a model). They are
        inference tensors: clone what a backward pass is to keep.

        Args:
            images: uint8 (n, 3, s, s).
            tokens: int64 (n, length).
        """
        return self.image_features(images), self.text_features(tokens, end_id)

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """uint8 (n, 3, s, s) on the model's device -> (n, embed_dim), as `features`."""
        pixels = image_input(images, self.preprocess).to(self.model.logit_scale.dtype)
        return _at_least_float32(self.model.encode_image(pixels, normalize=True))

    @torch.inference_mode()
    def text_features(self, tokens: Tensor, end_id: int) -> Tensor:
        """int64 (n, length) -> (n, embed_dim), as `features`."""
        tokens = shorten(tokens, end_id, self.config.text.context_length).to(self.model.logit_scale.device)
        return _at_least_float32(self.model.encode_text(tokens, normalize=True))

    @property
    def config(self) -> CLIPConfig:
        return self.model.config

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale)"""
        return self.model.logit_scale.exp()

    @property
    def scales(self) -> list[Tensor]:
        """`scale` of each teacher."""
        return [self.scale]


@dataclass
class CachedTeacher:
    """One or several teachers whose features come with the batches, read from caches; the models are not here.

    The first one speaks for all where there can be only one: its shape is what sparsity counts from, its scale what
    the student takes with `student_scale: teacher`.
    """

    config: CLIPConfig
    scales: list[Tensor]

    def features_of(self, batch: Batch, piece: slice, images: Tensor, end_id: int) -> list[Features]:
        """What each teacher says of a piece of a batch."""
        pairs = [(image[piece].to(images.device), text[piece].to(images.device)) for image, text in batch.teacher]
        return [(_at_least_float32(image), _at_least_float32(text)) for image, text in pairs]

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale) of the first"""
        return self.scales[0]


def _at_least_float32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def image_input(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 (n, 3, s, s) -> normalised float32 (n, 3, image_size, image_size) on the same device."""
    x = images.float() / 255
    if x.shape[-1] != preprocess.image_size:
        size = (preprocess.image_size, preprocess.image_size)
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    return (x - mean) / std


def shorten(tokens: Tensor, end_id: int, context_length: int) -> Tensor:
    """Cut token rows to the longest text of the batch, exact under causal attention, and to the context; a text
    that is too long for it keeps its end token. (n, length) -> (n, shorter)."""
    ends = (tokens == end_id).int().argmax(1)
    length = min(int(ends.max()) + 1, context_length)
    cut = tokens[:, :length].clone()
    cut[ends >= length, -1] = end_id
    return cut
