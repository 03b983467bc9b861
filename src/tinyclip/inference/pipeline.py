"""What `load` returns: a model with its own tokenizer and preprocessing, ready for images and texts."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tinyclip.common.devices import resolve_device, resolve_dtype
from tinyclip.common.progress import busy
from tinyclip.inference.exported import RuntimePipeline
from tinyclip.inputs.batching import (
    BATCH,
    at_once,
    batches,
    by_length,
    check_labels,
    is_tensor,
    picture_of,
    pictures,
    same_shape,
)
from tinyclip.inputs.tokenizer import CLIPTokenizer, clip_tokenizer, pad
from tinyclip.inputs.transforms import OPENAI_MEAN, OPENAI_STD, Preprocess
from tinyclip.model.config import CLIPConfig
from tinyclip.model.model import CLIP, cast, weights_hash
from tinyclip.zoo.card import Card
from tinyclip.zoo.checkpoint import load_checkpoint, save_checkpoint
from tinyclip.zoo.resolve import resolve

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


@dataclass(repr=False)
class Pipeline:
    """A CLIP with its tokenizer and preprocessing.

    `clip.model` is the plain `CLIP`; the methods here take ordinary inputs: paths, images, texts. A pipeline is
    thread-safe and can be pickled and sent to other processes.

    >>> import tinyclip
    >>> clip = tinyclip.load("emoji-student")
    >>> clip.encode_image(["photo.jpg", "photo.jpg"]).shape
    torch.Size([2, 192])
    """

    model: CLIP
    tokenizer: CLIPTokenizer
    preprocessing: Preprocess

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in; features are returned as float32."""
        return self.model.dtype

    @property
    def config(self) -> CLIPConfig:
        return self.model.config

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    def computing(self) -> dict[str, str]:
        """Names of `dtype` and `device`, as commands report them."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}

    @property
    def logit_scale(self) -> float:
        """The logarithm of the factor on similarities in `classify`."""
        return float(self.model.logit_scale.detach())

    def tokenize(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokenize with the model's own vocabulary, int64 (n, context_length); by default at the model's context."""
        length = self.model.config.text.context_length if context_length is None else context_length
        return torch.from_numpy(self.tokenizer(texts, length))

    def preprocess(self, image: Image.Image) -> Tensor:
        """Convert a PIL image to float32 (3, image_size, image_size), normalised for this model."""
        return torch.from_numpy(self.preprocessing(image))

    def __repr__(self) -> str:
        config, parameters = self.model.config, sum(p.numel() for p in self.model.parameters())
        towers = f"{config.vision.kind} at {config.vision.image_size} px, {config.text.context_length} tokens"
        return f"Pipeline({towers}, {parameters / 1e6:.1f} M parameters, {str(self.dtype)[6:]} on {self.device})"

    def encode_image(
        self, images: ImageLike | Sequence[ImageLike], *, batch_size: int | None = None, normalize: bool = True
    ) -> Tensor:
        """Return image_features, float32 (n, embed_dim), of paths, PIL images, uint8 arrays (h, w[, 3]), or a
        preprocessed float tensor (n, 3, s, s). Any number of them: threads decode images while the model computes, and
        only a few batches are in memory at a time.

        Args:
            batch_size: by default 32 on a CPU, 256 elsewhere.

        Raises:
            ValueError: for an unreadable image or a wrong shape.
        """
        items, size = _as_list(images), self.batch_size(batch_size)
        if isinstance(items, Tensor):
            ready: Iterable[Tensor] = items.split(size) if len(items) else ()
        else:
            ready = map(_stacked, batches(pictures(items, self._image), size))
        features = [self._empty()]
        with torch.inference_mode():
            for batch in ready:
                batch = batch.to(self.device, self.model.text_projection.dtype)
                features.append(_finished(self.model.encode_image(batch), normalize))
        return torch.cat(features)  # outside inference mode, so a probe can be trained on the result

    def encode_text(
        self, texts: str | Sequence[str], *, batch_size: int | None = None, normalize: bool = True
    ) -> Tensor:
        """Return text_features, float32 (n, embed_dim), of any number of texts.

        Texts are computed in order of length, each batch only as long as its longest text: with causal attention
        nothing after a text's end token matters.

        Args:
            batch_size: by default 64 on a CPU, 512 elsewhere.

        Raises:
            ValueError: if an item is not a text.
        """
        rows = self.tokenizer.rows(texts, self.model.config.text.context_length)
        features = self._empty(len(rows))
        with torch.inference_mode():
            for places in by_length(rows, self.batch_size(batch_size) * (1 if batch_size else 2)):
                tokens = torch.from_numpy(pad([rows[i] for i in places], len(rows[places[0]])))
                features[places] = _finished(self.model.encode_text(tokens.to(self.device)), normalize)
        return features

    def similarity(self, images: ImageLike | Sequence[ImageLike], texts: str | Sequence[str]) -> Tensor:
        """Return the cosine similarity of every image with every text, float32 (images, texts).

        >>> clip.similarity("photo.jpg", ["a red apple", "a dog"]).shape
        torch.Size([1, 2])
        """
        return self.encode_image(images) @ self.encode_text(texts).T

    def classify(self, images: ImageLike | Sequence[ImageLike], labels: str | Sequence[str]) -> Tensor:
        """Return each label's probability for each image: softmax of scaled similarities, float32 (images, labels).

        >>> probabilities = clip.classify("photo.jpg", ["a red apple", "a dog", "a bicycle"])
        >>> probabilities.shape, round(probabilities.sum().item(), 3)
        (torch.Size([1, 3]), 1.0)

        Raises:
            ValueError: without labels, or for an empty label.
        """
        check_labels(labels)
        logits = self.similarity(images, labels) * self.model.logit_scale.detach().float().exp()
        return logits.softmax(1)

    def save(self, path: str | Path, dtype: torch.dtype | None = None, card: Card | None = None) -> None:
        """Write a checkpoint directory that `load` reads (see `checkpoint.save_checkpoint`), replacing an existing
        tinyclip checkpoint.

        Raises:
            ValueError: if the path cannot be written, or holds anything other than a checkpoint written by tinyclip.
        """
        save_checkpoint(path, self.model, self.tokenizer, self.preprocessing, dtype, card)

    def fingerprint(self) -> str:
        """Hash of everything features depend on: weights in their current dtype, shape, vocabulary, preprocessing."""
        rest = (self.model.config.model_dump_json(), self.preprocessing.model_dump_json(), self.tokenizer.merges)
        return hashlib.blake2b(repr((weights_hash(self.model), *rest)).encode(), digest_size=16).hexdigest()

    def _image(self, item: ImageLike) -> Tensor:
        return item if is_tensor(item) else self.preprocess(picture_of(item))

    def batch_size(self, given: int | None = None) -> int:
        """Return the batch size for images, a default for the device unless given; texts use twice as many."""
        return at_once(given, BATCH if self.device.type == "cpu" else 8 * BATCH)

    def _empty(self, count: int = 0) -> Tensor:
        return torch.empty(count, self.model.config.embed_dim, device=self.device)


def _finished(features: Tensor, normalize: bool) -> Tensor:
    features = features.float()
    return F.normalize(features, dim=-1) if normalize else features


def _stacked(tensors: list[Tensor]) -> Tensor:
    same_shape(tuple(t.shape) for t in tensors)
    return torch.stack(tensors)


def _as_list(images: Any) -> Any:
    if is_tensor(images):
        return images if images.ndim == 4 else images[None]
    return images if isinstance(images, (list, tuple)) else [images]


@dataclass
class Tensors:
    """An exported model for code that uses torch: like a `Pipeline` it returns tensors."""

    clip: RuntimePipeline

    def __getattr__(self, name: str) -> Any:
        if name == "clip" or name.startswith("__"):  # copy and pickle ask for these before `clip` exists
            raise AttributeError(name)
        return getattr(self.clip, name)

    def preprocess(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(self.clip.preprocess(image))

    def encode_image(self, images: Any, *, batch_size: int | None = None, normalize: bool = True) -> Tensor:
        return torch.from_numpy(self.clip.encode_image(images, batch_size=batch_size, normalize=normalize))

    def encode_text(self, texts: Any, *, batch_size: int | None = None, normalize: bool = True) -> Tensor:
        return torch.from_numpy(self.clip.encode_text(texts, batch_size=batch_size, normalize=normalize))


def load(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    activation: str | None = None,
    cache: str | Path | None = None,
    compile: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Pipeline:
    """`tinyclip.load` for checkpoints only, for code that needs the weights.

    Raises:
        ValueError: as `tinyclip.load`, and for an export.
    """
    device = resolve_device(device)
    precision = resolve_dtype(dtype, device)
    path = resolve(name_or_path, cache)
    with busy(f"loading {name_or_path}"):
        model, tokenizer, preprocessing = load_checkpoint(path, activation, mean, std)
        cast(model.to(device), precision)
    if compile:
        with busy("compiling"):
            compile_towers(model)
    return Pipeline(model, tokenizer, preprocessing)


def compile_towers(model: CLIP) -> None:
    """Compile the blocks of both towers in place, immediately, for any batch size and length; weights become constants.
    Layers before and after the blocks, and a ResNet's convolutions, are not compiled.

    Raises:
        ValueError: if this machine has no compiler.
    """
    weight, text, size = model.text_projection, model.config.text, model.config.vision.image_size
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if weight.device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(f"compile needs a C++ compiler, and {compiler} is missing; install one or leave compile out")
    for tower in (getattr(model.visual, "transformer", None), model.transformer):
        if tower is not None:
            tower.compile(dynamic=True, options={"freezing": True})
    try:
        with torch.inference_mode():  # as in later use: code is compiled for inference tensors
            model.encode_image(torch.zeros(2, 3, size, size, dtype=weight.dtype, device=weight.device))
            model.encode_text(torch.full((2, min(4, text.context_length)), text.vocab_size - 1, device=weight.device))
    except RuntimeError as error:  # raised by torch's compilers
        raise ValueError(f"compile failed ({str(error).splitlines()[0]}); leave compile out") from None


def tokenize(texts: str | Sequence[str], context_length: int = 77) -> Tensor:
    """Tokenize with CLIP's own vocabulary: int64 (n, context_length), zero-padded; cut texts keep their end token.

    >>> import tinyclip
    >>> tinyclip.tokenize("a photo of a cat", context_length=8).tolist()
    [[49406, 320, 1125, 539, 320, 2368, 49407, 0]]
    """
    return torch.from_numpy(clip_tokenizer()(texts, context_length))


@dataclass(frozen=True)
class TensorPreprocess:
    """Callable that converts a PIL image to a float32 tensor (3, image_size, image_size)."""

    transform: Preprocess

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(self.transform(image))


def preprocess(
    image_size: int,
    mean: tuple[float, float, float] = OPENAI_MEAN,
    std: tuple[float, float, float] = OPENAI_STD,
) -> TensorPreprocess:
    """Return the evaluation transform for an image size, with OpenAI's mean and std by default.

    >>> import tinyclip
    >>> from PIL import Image
    >>> tinyclip.preprocess(224)(Image.open("photo.jpg")).shape
    torch.Size([3, 224, 224])
    """
    return TensorPreprocess(Preprocess(image_size=image_size, mean=mean, std=std))
