"""Views as drawn numbers, against the function that they were before."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from PIL import Image

from tinyclip.augment import Augment, View, on_colour
from tinyclip.transforms import plain_mode

EMOJI = Augment(scale=(0.6, 1), rotate=20, shear=10, shrink=0.35, colour=0.4, background=True)
SETTINGS = [
    Augment(),
    EMOJI,
    Augment(scale=(0.05, 0.2), ratio=2),
    Augment(background=True),
    Augment(rotate=180),
    Augment(shrink=0.5, colour=1),
    Augment(shear=45, ratio=1, scale=(1, 1)),
]


def former_view(augment: Augment, image: Image.Image, size: int, rng: Random) -> np.ndarray:
    """A view as it was made while its numbers were drawn one by one on the way: the reference."""
    image = plain_mode(image)
    backdrop: tuple[int, int, int] = (255, 255, 255)
    if augment.background:
        backdrop = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        image = on_colour(image, backdrop)
    image = image.convert("RGB")
    if augment.rotate or augment.shear or augment.shrink:
        angle = math.radians(rng.uniform(-augment.rotate, augment.rotate))
        shear = math.tan(math.radians(rng.uniform(-augment.shear, augment.shear)))
        zoom = 1 / (1 - rng.uniform(0, augment.shrink * 0.999))
        cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
        a, b, d, e = cos, cos * shear + sin, -sin, -sin * shear + cos
        x, y = image.width / 2, image.height / 2
        coefficients = (a, b, x - a * x - b * y, d, e, y - d * x - e * y)
        affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        image = image.transform(image.size, affine, coefficients, bilinear, fillcolor=backdrop)
    left, top, width, height = augment._crop(image.width, image.height, rng)
    box = (left, top, left + width, top + height)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    if augment.colour:
        low, high = 1 - augment.colour, 1 + augment.colour
        brightness, contrast, saturation = (rng.uniform(low, high) for _ in range(3))
        x = pixels.astype(np.float32) * brightness
        x = x.mean() + (x - x.mean()) * contrast
        grey = x.mean(-1, keepdims=True)
        x = grey + (x - grey) * saturation
        pixels = np.clip(np.rint(x), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def picture(mode: str, seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    height, width = generator.integers(20, 70, 2)
    if mode == "P":
        return picture("RGB", seed).convert("P")
    shape = (height, width, {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2}[mode])
    return Image.fromarray(generator.integers(0, 256, shape, np.uint8).squeeze(), mode if mode == "LA" else None)


@pytest.mark.parametrize("augment", SETTINGS, ids=range(len(SETTINGS)))
def test_views_are_those_of_before_and_draw_the_same_numbers(augment: Augment) -> None:
    for seed in range(40):
        image = picture(("RGB", "RGBA", "L", "P", "LA")[seed % 5], seed)
        one, two = Random(seed), Random(seed)
        assert np.array_equal(augment.view(image, 24, one), former_view(augment, image, 24, two))
        assert one.getstate() == two.getstate()


def test_a_view_is_made_again_from_a_stored_row() -> None:
    for seed in range(20):
        image = picture("RGBA", seed)
        view = EMOJI.draw(*image.size, Random(seed))
        row = np.array(view, np.float64)
        assert np.array_equal(View(*row.tolist()).apply(image, 32), EMOJI.view(image, 32, Random(seed)))
