"""What `load` returns: a model with its own tokenizer and preprocessing, ready for pictures and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyclip.checkpoint import load_checkpoint, save_checkpoint
from tinyclip.distributed import resolve_device
from tinyclip.model import CLIP
from tinyclip.tokenizer import CLIPTokenizer, clip_tokenizer
from tinyclip.transforms import OPENAI_MEAN, OPENAI_STD, Preprocess, open_image
from tinyclip.zoo import resolve

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


@dataclass
class Pipeline:
    """A CLIP with its tokenizer and preprocessing.

    `clip.model` is the plain `CLIP`; the methods here take what people have: paths, pictures, words.
    """

    model: CLIP
    tokenizer: CLIPTokenizer
    preprocessing: Preprocess

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.logit_scale.dtype

    def tokenize(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """int64 (n, context_length) with the model's own vocabulary; the model's context by default."""
        length = self.model.config.text.context_length if context_length is None else context_length
        return torch.from_numpy(self.tokenizer(texts, length))

    def preprocess(self, image: Image.Image) -> Tensor:
        """A picture -> float32 (3, image_size, image_size), normalised as this model wants it."""
        return torch.from_numpy(self.preprocessing(image))

    @torch.inference_mode()
    def encode_image(
        self, images: ImageLike | Sequence[ImageLike], *, batch_size: int = 64, normalize: bool = True
    ) -> Tensor:
        """image_features (n, embed_dim) of paths, PIL pictures, uint8 arrays (h, w[, 3]), or a preprocessed
        float tensor (n, 3, s, s). Any number of them.

        Raises:
            ValueError: for an unreadable picture or a wrong shape.
        """
        items = _as_list(images)
        features = []
        for start in range(0, len(items), batch_size):
            tensors = [self._image(item) for item in items[start : start + batch_size]]
            shapes = {tuple(t.shape) for t in tensors}
            if len(shapes) > 1:
                raise ValueError(f"image tensors of several shapes: {', '.join(map(str, sorted(shapes)))}")
            batch = torch.stack(tensors)
            features.append(self.model.encode_image(batch.to(self.device, self.dtype), normalize=normalize))
        return torch.cat(features) if features else self._no_features()

    @torch.inference_mode()
    def encode_text(self, texts: str | Sequence[str], *, batch_size: int = 256, normalize: bool = True) -> Tensor:
        """text_features (n, embed_dim) of any number of texts."""
        tokens = self.tokenize(texts)
        features = [
            self.model.encode_text(self._shortest(batch).to(self.device), normalize=normalize)
            for batch in (tokens.split(batch_size) if len(tokens) else ())
        ]
        return torch.cat(features) if features else self._no_features()

    def _shortest(self, tokens: Tensor) -> Tensor:
        # Under causal attention nothing after the end token matters, so shorter rows give the same features.
        ends = (tokens == self.tokenizer.end_id).int().argmax(1)
        return tokens[:, : int(ends.max()) + 1]

    def similarity(self, images: ImageLike | Sequence[ImageLike], texts: str | Sequence[str]) -> Tensor:
        """Cosine similarity of every image with every text, (images, texts)."""
        return self.encode_image(images) @ self.encode_text(texts).T

    def classify(self, images: ImageLike | Sequence[ImageLike], labels: str | Sequence[str]) -> Tensor:
        """Probability of each label for each image, (images, labels): softmax of scaled similarities.

        Raises:
            ValueError: without labels, or for an empty one.
        """
        if not labels:
            raise ValueError("no labels to choose from")
        if not all(label.strip() for label in ([labels] if isinstance(labels, str) else labels)):
            raise ValueError("a label is empty")
        logits = self.similarity(images, labels) * self.model.logit_scale.detach().exp()
        return logits.float().softmax(1)

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint directory that `load` reads."""
        save_checkpoint(path, self.model, self.tokenizer, self.preprocessing, dtype)

    def _image(self, item: ImageLike) -> Tensor:
        if isinstance(item, Tensor):
            return item
        if isinstance(item, (str, Path)):
            item = open_image(item)
        if isinstance(item, np.ndarray):
            good = item.dtype == np.uint8 and 0 not in item.shape
            if not good or not (item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (3, 4))):
                raise ValueError(f"image array is {item.dtype} {item.shape}, expected uint8 (h, w) or (h, w, 3 or 4)")
            item = Image.fromarray(item)
        if not isinstance(item, Image.Image):
            raise ValueError(f"{type(item).__name__} is no image: give a path, a PIL picture, an array or a tensor")
        return self.preprocess(item)

    def _no_features(self) -> Tensor:
        return torch.empty(0, self.model.config.embed_dim, device=self.device, dtype=self.dtype)


def _as_list(images: Any) -> Any:
    if isinstance(images, Tensor):
        return images if images.ndim == 4 else images[None]
    return images if isinstance(images, (list, tuple)) else [images]


def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    activation: str | None = None,
    cache: str | Path | None = None,
) -> Pipeline:
    """A model ready to use, from a checkpoint of ours or of others (`docs/convert.md`), by its name in
    the zoo (`docs/zoo.md`), or from the Hugging Face hub (`org/name`).

    Args:
        activation: `gelu` or `quick_gelu`, for a file of others that cannot say it.
        device: where the weights go; "auto" takes CUDA, then MPS, then the CPU.
        dtype: of the weights; float32 by default.
        cache: folder of zoo downloads; $TINYCLIP_CACHE or the platform's by default.

    Raises:
        ValueError: when it is missing, cannot be downloaded, or anything in it does not fit.
    """
    model, tokenizer, preprocessing = load_checkpoint(resolve(name_or_path, cache), activation)
    device = resolve_device(device)
    return Pipeline(model.to(device=device, dtype=dtype or torch.float32), tokenizer, preprocessing)


def tokenize(texts: str | Sequence[str], context_length: int = 77) -> Tensor:
    """CLIP's own vocabulary: int64 (n, context_length), zero-padded; texts too long keep their end token."""
    return torch.from_numpy(clip_tokenizer()(texts, context_length))


@dataclass(frozen=True)
class TensorPreprocess:
    """Callable from a PIL picture to a float32 tensor (3, image_size, image_size)."""

    transform: Preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(self.transform(image))


def preprocess(
    image_size: int,
    mean: tuple[float, float, float] = OPENAI_MEAN,
    std: tuple[float, float, float] = OPENAI_STD,
) -> TensorPreprocess:
    """The evaluation transform for one image size; OpenAI's mean and std unless given."""
    return TensorPreprocess(Preprocess(image_size=image_size, mean=mean, std=std))
