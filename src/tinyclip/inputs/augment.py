"""Random training views of an image, on Pillow. No torch here.

Randomness comes only from the generator passed in, so a view can be reproduced exactly. A view is drawn as plain
numbers and then applied, so that it can also be stored.
"""

from __future__ import annotations

import math
from random import Random
from typing import Annotated, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from tinyclip.common.schema import Strict
from tinyclip.inputs.transforms import on_colour, plain_mode

Fraction = Annotated[float, Field(gt=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1)]


class Augment(Strict):
    """What a training view may change. The default, as in the released recipes, is only a random resized crop."""

    scale: tuple[Fraction, Fraction] = Field((0.9, 1.0), description="area of the crop as a fraction of the image")
    ratio: float = Field(4 / 3, ge=1, le=4, description="largest aspect ratio of the crop, either way")
    rotate: float = Field(0.0, ge=0, le=180, description="largest rotation either way, degrees")
    shear: float = Field(0.0, ge=0, le=45, description="largest horizontal shear either way, degrees")
    shrink: Strength = Field(0.0, description="shrink the image by up to this share of its side")
    colour: Strength = Field(0.0, description="strength of random brightness, contrast and saturation")
    background: bool = Field(False, description="put transparent images on a random plain colour")

    @model_validator(mode="after")
    def _ordered(self) -> Augment:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: {self.scale[0]} exceeds {self.scale[1]}")
        return self

    def view(self, image: Image.Image, size: int, rng: Random) -> np.ndarray:
        """A random view, uint8 (3, size, size)."""
        return self.draw(image.width, image.height, rng).apply(image, size)

    def draw(self, width: int, height: int, rng: Random) -> View:
        """Draw all random numbers of a view of an image of this size, in pixels."""
        red, green, blue = (rng.randrange(256) for _ in range(3)) if self.background else (-1, -1, -1)
        angle, shear, zoom = 0.0, 0.0, 1.0
        if self.rotate or self.shear or self.shrink:
            angle = math.radians(rng.uniform(-self.rotate, self.rotate))
            shear = math.tan(math.radians(rng.uniform(-self.shear, self.shear)))
            zoom = 1 / (1 - rng.uniform(0, self.shrink * 0.999))
        box = self._crop(width, height, rng)
        low, high = 1 - self.colour, 1 + self.colour
        colour = [rng.uniform(low, high) for _ in range(3)] if self.colour else (1.0, 1.0, 1.0)
        return View(red, green, blue, angle, shear, zoom, *box, *colour)

    def _crop(self, width: int, height: int, rng: Random) -> tuple[float, float, float, float]:
        """Random resized crop as (left, top, width, height), in pixels."""
        for _ in range(10):
            area = rng.uniform(*self.scale) * width * height
            ratio = math.exp(rng.uniform(-math.log(self.ratio), math.log(self.ratio)))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                return rng.uniform(0, width - w), rng.uniform(0, height - h), w, h
        side = min(width, height)
        return (width - side) / 2, (height - side) / 2, side, side


class View(NamedTuple):
    """One view as plain numbers, so that it can be stored and reproduced bit for bit."""

    red: float  # of the background, 0 to 255; below 0: transparency as in the evaluation transform
    green: float
    blue: float
    angle: float  # radians
    shear: float  # tangent of the horizontal shear's angle
    zoom: float  # image pixels per view pixel
    left: float  # of the crop, in image pixels
    top: float
    width: float
    height: float
    brightness: float  # factors; 1 changes nothing
    contrast: float
    saturation: float

    def apply(self, image: Image.Image, size: int) -> np.ndarray:
        """Apply this view to an image: uint8 (3, size, size)."""
        backdrop = (255, 255, 255)
        if self.red >= 0:
            backdrop = (int(self.red), int(self.green), int(self.blue))
            image = on_colour(image, backdrop)
        image = plain_mode(image)
        image = image.convert("RGBA" if image.mode in ("LA", "RGBA") else "RGB")  # Pillow then resizes premultiplied
        if (self.angle, self.shear, self.zoom) != (0, 0, 1):
            image = self._warp(image, backdrop)
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box).convert("RGB"))
        colour = (self.brightness, self.contrast, self.saturation)
        if colour != (1, 1, 1):
            pixels = jitter(pixels, *colour)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _warp(self, image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
        """Rotate, shear and shrink around the centre, in one resampling."""
        cos, sin = math.cos(self.angle) * self.zoom, math.sin(self.angle) * self.zoom
        a, b, d, e = cos, cos * self.shear + sin, -sin, -sin * self.shear + cos  # output -> input
        x, y = image.width / 2, image.height / 2
        coefficients = (a, b, x - a * x - b * y, d, e, y - d * x - e * y)
        method = Image.Transform.AFFINE
        return image.transform(image.size, method, coefficients, Image.Resampling.BILINEAR, fillcolor=fill)


def jitter(pixels: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Multiply brightness, contrast and saturation of uint8 (h, w, 3) by these factors."""
    x = pixels.astype(np.float32) * brightness
    x = x.mean() + (x - x.mean()) * contrast
    grey = x.mean(-1, keepdims=True)
    x = grey + (x - grey) * saturation
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)
