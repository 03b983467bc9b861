"""Build the inputs of `calibrate` from a recipe and shards: the settings and the batches to measure on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyclip.compress.calibrate import Calibration
from tinyclip.compress.importance import Sample
from tinyclip.data.loader import image_input, next_batch, shorten, training_loader
from tinyclip.data.shard_index import prepare
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.augment import Augment
from tinyclip.inputs.tokenizer import CLIPTokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig
from tinyclip.model.model import CLIP
from tinyclip.recipe.stage import Calibrated


def calibration(settings: Calibrated, original: CLIPConfig, scale: float = 1.0, seed: int = 0) -> Calibration:
    """Return the calibration that a recipe asks for; the scale matters only if something is measured."""
    return Calibration(
        scale,
        original,
        score=settings.score,
        unit=settings.counted,
        gates=settings.gates,
        align=settings.align,
        batches=settings.batches,
        seed=seed,
    )


def samples(
    loader: Any, folder: str | Path, model: CLIP, tokenizer: CLIPTokenizer, preprocess: Preprocess
) -> Iterator[Sample]:
    """Yield a loader's batches endlessly, preprocessed for the model and on its device."""
    device, context, batches = model.logit_scale.device, model.config.text.context_length, iter(loader)
    while True:
        batch = next_batch(batches, folder)
        images = image_input(batch.images.to(device, non_blocking=True), preprocess)
        yield Sample(images, shorten(batch.tokens, tokenizer.end_id, context).to(device))


def plain_loader(folder: str | Path, clip: Pipeline, batch_size: int) -> Any:
    """Return a training loader for a model without a recipe, with the augmentation of the released recipes.

    Raises:
        ValueError: if the folder holds no usable shards, or fewer samples than a batch.
    """
    found = prepare(folder)
    if batch_size > found:
        raise ValueError(f"batch size {batch_size} exceeds the {found} samples of {folder}")
    return training_loader(
        folder,
        tokenizer=clip.tokenizer,
        context_length=clip.model.config.text.context_length,
        image_size=clip.model.config.vision.image_size,
        augment=Augment(),
        batch_size=batch_size,
        workers=1,
        seed=0,
    )
