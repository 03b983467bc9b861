"""What a teacher is: a frozen model that turns a training batch into features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyclip.model import CLIP
from tinyclip.transforms import Preprocess


@dataclass
class Teacher:
    """A live teacher. Its model is put in evaluation mode and never updated."""

    model: CLIP
    preprocess: Preprocess

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    @torch.inference_mode()
    def features(self, images: Tensor, tokens: Tensor, end_id: int) -> tuple[Tensor, Tensor]:
        """Normalised image_features and text_features, (n, embed_dim) in float32 (float64 of such a model). They are
        inference tensors: clone what a backward pass is to keep.

        Args:
            images: uint8 (n, 3, s, s).
            tokens: int64 (n, length).
        """
        device = self.model.logit_scale.device
        tokens = shorten(tokens, end_id, self.model.config.text.context_length).to(device)
        pixels = image_input(images, self.preprocess).to(self.model.logit_scale.dtype)
        features = self.model.encode_image(pixels, normalize=True), self.model.encode_text(tokens, normalize=True)
        image_features, text_features = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in features)
        return image_features, text_features

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale)"""
        return self.model.logit_scale.exp()


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
