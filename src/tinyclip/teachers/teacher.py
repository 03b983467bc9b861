"""Teachers: a frozen model that turns a training batch into features, or its features from a cache.

All have `embed_dim`, `scale`, `scales` and `features_of`; several cached teachers form an ensemble.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyclip.data.loader import Batch, Tokenize, image_input, shorten
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig
from tinyclip.model.model import CLIP

Features = tuple[Tensor, Tensor]  # normalised image_features and text_features, (n, embed_dim), at least float32


@dataclass
class Teacher:
    """A live teacher with our own model, which is put in evaluation mode and never updated."""

    model: CLIP
    preprocess: Preprocess

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    def features_of(self, batch: Batch, piece: slice, images: Tensor) -> list[Features]:
        """Return each teacher's features for a piece of a batch, here of one teacher. `images` are the piece's images,
        on the device."""
        return [self.features(images, batch.tokens[piece])]

    def features(self, images: Tensor, tokens: Tensor) -> Features:
        """Return normalised image_features and text_features, (n, embed_dim) in float32 (float64 for a float64 model).
        They are inference tensors: clone them before use in a backward pass.

        Args:
            images: uint8 (n, 3, s, s).
            tokens: int64 (n, length).
        """
        return self.image_features(images), self.text_features(tokens)

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """uint8 (n, 3, s, s) on the model's device -> (n, embed_dim), as `features`."""
        pixels = image_input(images, self.preprocess).to(self.model.logit_scale.dtype)
        return _at_least_float32(self.model.encode_image(pixels, normalize=True))

    @torch.inference_mode()
    def text_features(self, tokens: Tensor) -> Tensor:
        """int64 (n, length) -> (n, embed_dim), as `features`."""
        text = self.config.text  # the highest id is the end token
        tokens = shorten(tokens, text.vocab_size - 1, text.context_length)
        tokens = tokens.to(self.model.logit_scale.device, non_blocking=True)
        return _at_least_float32(self.model.encode_text(tokens, normalize=True))

    @property
    def config(self) -> CLIPConfig:
        return self.model.config

    @property
    def network(self) -> nn.Module:
        return self.model

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    def scale(self) -> Tensor:
        """The factor on similarities, exp(logit_scale)."""
        return self.model.logit_scale.exp()

    @property
    def scales(self) -> list[Tensor]:
        """`scale` of each teacher."""
        return [self.scale]


@dataclass
class ForeignTeacher:
    """A live teacher run by another library (see `foreign.load_teacher`), with its own tokenizer, resolution and
    normalisation. It is put in evaluation mode and never updated.

    It sees the same views as the student, resized by `image_input`, and the same captions in its own tokens. For a
    model trained with a sigmoid loss (SigLIP) the affinity is the same softmax of scaled cosines; see
    `loss.affinity_loss` for why its bias has no effect.
    """

    network: nn.Module
    encode_image: Callable[[Tensor], Tensor]  # normalised pixels (n, 3, s, s) -> (n, embed_dim)
    encode_text: Callable[[Tensor], Tensor]  # tokens (n, length) -> (n, embed_dim)
    tokenize: Tokenize
    preprocess: Preprocess
    scale: Tensor  # exp(logit_scale)
    embed_dim: int
    kind: str  # in words, e.g. "a SigLIP"; explains why no student can inherit from it

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    def features_of(self, batch: Batch, piece: slice, images: Tensor) -> list[Features]:
        """Like `Teacher.features_of`; the batch also has the teacher's tokens."""
        assert batch.teacher_tokens is not None, "the loader was made for this teacher"
        return [(self.image_features(images), self.text_features(batch.teacher_tokens[piece]))]

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """uint8 (n, 3, s, s) on the network's device -> (n, embed_dim), normalised, float32."""
        return F.normalize(self.encode_image(image_input(images, self.preprocess)).float(), dim=-1)

    @torch.inference_mode()
    def text_features(self, tokens: Tensor) -> Tensor:
        """int64 (n, length), its own tokens -> (n, embed_dim), normalised, float32."""
        return F.normalize(self.encode_text(tokens.to(self.scale.device, non_blocking=True)).float(), dim=-1)

    @property
    def scales(self) -> list[Tensor]:
        """`scale` of each teacher."""
        return [self.scale]


@dataclass
class CachedTeacher:
    """One or several teachers whose features are read from caches and come with the batches; no models are loaded.

    Where only one teacher can count, it is the first: with `student_scale: teacher` the student takes its scale.
    """

    embed_dim: int  # of the first teacher; loss terms that need it take only one teacher
    scales: list[Tensor]

    def features_of(self, batch: Batch, piece: slice, images: Tensor) -> list[Features]:
        """Return each teacher's features for a piece of a batch."""
        pairs = [(_placed(image[piece], images), _placed(text[piece], images)) for image, text in batch.teacher]
        return [(_at_least_float32(image), _at_least_float32(text)) for image, text in pairs]

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale) of the first teacher"""
        return self.scales[0]


AnyTeacher = Teacher | ForeignTeacher | CachedTeacher


def _placed(stored: Tensor, images: Tensor) -> Tensor:
    return stored.to(images.device, non_blocking=True)


def _at_least_float32(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
