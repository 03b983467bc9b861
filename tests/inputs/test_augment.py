"""Views from predrawn numbers, compared with the function that they replaced."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from PIL import Image

from tinyclip.inputs.augment import Augment, View
from tinyclip.inputs.transforms import Preprocess, on_colour, plain_mode, thumbnail

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
    """Reference: make a view as before, with the random numbers drawn one by one along the way."""
    image = plain_mode(image)
    backdrop: tuple[int, int, int] = (255, 255, 255)
    if augment.background:
        backdrop = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        image = on_colour(image, backdrop)
    image = image.convert("RGBA" if image.mode in ("LA", "RGBA") else "RGB")
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
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box).convert("RGB"))
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


# --- transparency

WHOLE = Augment(scale=(1, 1), ratio=1)


def disc(side: int, mode: str = "RGBA") -> Image.Image:
    """Return a red disc with a soft edge; its transparent pixels hide white."""
    rows, columns = np.mgrid[0:side, 0:side]
    alpha = np.clip((0.34 * side - np.hypot(rows - side / 2, columns - side / 2)) * 25 + 128, 0, 255).astype(np.uint8)
    pixels = np.full((side, side, 4), 255, np.uint8)
    pixels[alpha > 0, :3] = (220, 30, 30)
    pixels[..., 3] = alpha
    image = Image.fromarray(pixels)
    if mode == "P":
        plain = image.convert("RGB").quantize(8)
        plain.info["transparency"] = plain.getpixel((0, 0))
        return plain
    if mode in ("RGB", "L"):
        plain = image.convert(mode)
        plain.info["transparency"] = plain.getpixel((0, 0))
        return plain
    return image.convert("LA").convert("La") if mode == "La" else image.convert(mode)


@pytest.mark.parametrize("side", [64, 150, 448], ids=["of its size", "reduced", "twice"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "P", "PA", "RGB", "L"])
def test_transparency_is_the_same_in_training_as_in_evaluation(mode: str, side: int) -> None:
    image = disc(side, "P") if mode == "PA" else disc(side, mode)
    if mode == "PA":
        image = image.convert("PA")
    wanted = Preprocess(image_size=64).pixels(image)
    assert np.array_equal(WHOLE.view(image, 64, Random(0)), wanted)
    assert np.abs(np.asarray(thumbnail(image).resize((64, 64))).transpose(2, 0, 1).astype(int) - wanted).mean() < 12


@pytest.mark.parametrize("side", [64, 150, 448])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa"])
def test_hidden_colours_are_never_seen(mode: str, side: int) -> None:
    image = disc(side, mode)
    turned = Augment(scale=(0.5, 1), rotate=5, shrink=0.1, colour=0.1)
    views = [Preprocess(image_size=64).pixels(image), *(WHOLE.view(image, 64, Random(n)) for n in range(3))]
    for pixels in (*views, np.asarray(thumbnail(image)).transpose(2, 0, 1)):
        corner = side // 40 or 1
        assert pixels[:, :corner, :corner].max() == 0
        # Rounding at an alpha of 1 to 255 leaves single bright pixels on a soft edge, here and in Pillow itself.
        assert (pixels.min(0) > 120).mean() < 0.01, "white shines through"  # the disc itself is darker, in grey too
    for seed in range(20):  # a view's own background, outside the picture, is white
        pixels = turned.view(image, 64, Random(seed))
        assert np.median(pixels[:, 30:34, 30:34]) < 240
        assert (pixels.max(0) < 10).any()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "P", "RGB", "L"])
def test_a_random_background_is_seen_through_whatever_is_transparent(mode: str) -> None:
    augment = Augment(scale=(1, 1), ratio=1, background=True)
    for seed in range(5):
        colour = augment.draw(150, 150, Random(seed))[:3]
        assert augment.view(disc(150, mode), 64, Random(seed))[:, 0, 0].tolist() == list(colour)


def test_a_picture_that_hides_nothing_is_not_copied() -> None:
    image = Image.new("RGBA", (8, 8), (9, 9, 9, 255))
    assert plain_mode(image) is image
