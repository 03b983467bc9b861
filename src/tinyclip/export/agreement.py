"""Check that an exported model agrees with its original: run the same images and texts through both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tinyclip.common.faults import Fault, Skipped, Unusable
from tinyclip.common.progress import track
from tinyclip.data.captioned import captioned
from tinyclip.data.samples import captions_of, image_of
from tinyclip.data.shards import find_shards, read_shard
from tinyclip.evaluate import metrics
from tinyclip.inference.exported import RuntimePipeline
from tinyclip.inference.pipeline import Pipeline, Tensors
from tinyclip.inputs.transforms import open_image

COUNT = 300  # images and captions to calibrate and compare on
HELD_OUT = 5  # one in this many is held out from calibration, for the comparison
PIECES = (1, 2, 5)  # sizes of the first batches; the rest is one batch


@dataclass(frozen=True)
class Samples:
    """Images and texts that models are calibrated and compared on."""

    pixels: np.ndarray  # float32 (n, 3, image_size, image_size), preprocessed
    texts: list[str]
    real: bool = True  # the user's data, not synthetic

    def part(self, held_out: bool) -> Samples:
        """Return the samples to compare on, or those to calibrate on; all of them if there are too few to split."""
        if min(len(self.pixels), len(self.texts)) < 2 * HELD_OUT:
            return self

        def chosen(count: int) -> list[int]:
            return [i for i in range(count) if (i % HELD_OUT == 0) == held_out]

        texts = [self.texts[i] for i in chosen(len(self.texts))]
        return Samples(self.pixels[chosen(len(self.pixels))], texts, self.real)


def samples_of(path: str | Path, clip: Pipeline) -> Samples:
    """Return the first images and captions of each shard in a folder, or some from a folder of images with caption
    files; at most `COUNT`.

    Raises:
        ValueError: if there are none.
    """
    path = Path(path)
    pixels, texts, first = list[np.ndarray](), list[str](), ""
    for picture in track(islice(_pictures(path), COUNT), "reading pictures", COUNT, "pictures"):
        try:
            image, captions = picture
            pixels.append(clip.preprocessing(open_image(image) if isinstance(image, Path) else image))
            texts += captions[:1]
        except ValueError as error:
            first = first or str(error)
    if not pixels or not texts:
        what = "readable picture" if not pixels else "caption"
        raise Unusable(f"{path}: no {what} to calibrate on{f'; the first: {first}' if first else ''}")
    return Samples(np.stack(pixels), texts)


def _pictures(path: Path) -> Iterator[tuple[Path | Image.Image, list[str]]]:
    if path.is_dir() and (any(path.glob("*.tar")) or any(path.glob("*.tar.gz"))):
        shards, skipped = find_shards(path), list[Skipped]()
        for shard in shards:
            left = math.ceil(COUNT / len(shards))
            for sample in read_shard(shard, skipped):
                try:
                    yield image_of(sample), captions_of(sample)
                except Fault:
                    continue
                left -= 1
                if not left:
                    break
        return
    items = captioned(path)
    for i in np.random.default_rng(0).permutation(len(items))[:COUNT]:
        yield items[i].picture(), list(items[i].captions)


def synthetic(clip: Pipeline, count: int = 16) -> Samples:
    """Return synthetic images, from uniform to noisy, and texts of every length, for use without real data."""
    random = np.random.default_rng(0)
    side, context = clip.preprocessing.image_size, clip.model.config.text.context_length
    pixels = []
    for i in range(count):
        detail = min(side, 2 ** (i % 8))  # squares along one side
        picture = Image.fromarray(random.integers(0, 256, (detail, detail, 3), np.uint8))
        pixels.append(clip.preprocessing(picture.resize((side, side), Image.Resampling.BICUBIC)))
    lengths = np.linspace(0, context, count).astype(int)  # the last text is truncated
    words = clip.tokenizer.start_id
    texts = [clip.tokenizer.decode(random.integers(0, words, length).tolist()) for length in lengths]
    return Samples(np.stack(pixels), texts, real=False)


@dataclass(frozen=True)
class Answers:
    """A model's results on samples: normalised features (n, embed_dim), and its accuracy on evaluation data."""

    image: np.ndarray
    text: np.ndarray
    acc1: float | None


def answers(clip: Pipeline | RuntimePipeline, samples: Samples, dataset: metrics.Dataset | None) -> Answers:
    """Compute a model's answers in batches of several sizes, and therefore several text lengths; `ValueError` if the
    data has no classes."""
    encoder = Tensors(clip) if isinstance(clip, RuntimePipeline) else clip
    image = torch.cat([encoder.encode_image(some) for some in _pieces(torch.from_numpy(samples.pixels))])
    text = torch.cat([encoder.encode_text(some) for some in _pieces(samples.texts)])
    acc1 = None if dataset is None else metrics.zero_shot(encoder, dataset)["acc1"]
    return Answers(image.numpy(), text.numpy(), acc1)


def compare(ours: Answers, theirs: Answers, real: bool) -> dict[str, Any]:
    """Return `image_max_error`, `image_min_cosine`, `image_mean_cosine` and the same for texts; for real samples also
    `top1_agreement` (how often an image's best caption is the same); for evaluation data `acc1` of both models. Rates
    are fractions."""
    figures: dict[str, Any] = {"images": len(ours.image), "texts": len(ours.text)}
    for what in ("image", "text"):
        mine, other = getattr(ours, what), getattr(theirs, what)
        cosines = (mine * other).sum(1)
        figures[f"{what}_max_error"] = float(np.abs(mine - other).max())
        figures[f"{what}_min_cosine"], figures[f"{what}_mean_cosine"] = float(cosines.min()), float(cosines.mean())
    if real:
        best = [(found.image @ found.text.T).argmax(1) for found in (ours, theirs)]
        figures["top1_agreement"] = float((best[0] == best[1]).mean())
    if ours.acc1 is not None:
        figures |= {"acc1_model": ours.acc1, "acc1": theirs.acc1}
    return figures


def _pieces(items: Any) -> Iterator[Any]:
    start = 0
    for size in (*PIECES, len(items)):
        if start < len(items):
            yield items[start : start + size]
        start += size


# How much an export may differ. float32 does the same computation in another order; bfloat16 rounds each value to
# 8 bits of precision, int8 to one of 256 values.
LEAST = {"float32": 0.9999, "bfloat16": 0.99, "int8": 0.95}  # cosine of each image and text with the model's
MOST_LOST = {"float32": 0.002, "bfloat16": 0.005, "int8": 0.01}  # loss of accuracy on `--data`


def refuse(figures: dict[str, Any], precision: str, what: str) -> None:
    """Raise `ValueError` if the figures from `compare` exceed the bounds for this precision."""
    for tower in ("image", "text"):
        cosine = figures[f"{tower}_min_cosine"]
        if not cosine >= LEAST[precision]:  # also catches NaN
            raise ValueError(
                f"the {what} disagrees with the model: {tower} features have cosines down to {cosine:.4f}, but "
                f"{precision} requires at least {LEAST[precision]}; nothing was written"
            )
    lost = figures.get("acc1_model", 0) - figures.get("acc1", 0)
    if lost > MOST_LOST[precision]:
        raise ValueError(
            f"the {what} loses {100 * lost:.2f} points of top-1 accuracy, {100 * MOST_LOST[precision]:.1f} at most are "
            f"allowed in {precision}; nothing was written"
        )
