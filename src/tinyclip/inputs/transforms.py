"""Image preprocessing on Pillow and NumPy, equal to OpenAI's and OpenCLIP's evaluation transform. No torch here."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from PIL import Image, ImageCms
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from tinyclip.inputs.bit_depth import eight_bit
from tinyclip.inputs.decoding import open_image as open_image

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# Images of these modes are resized first and then converted to RGB, as in torchvision's transform.
RESIZED_AS_THEY_ARE = {"L", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"}  # LA and RGBA too

LONGEST = 100  # largest aspect ratio
# A JPEG decoded at a fraction of its size may differ by one grey level on average if fewer than this many of its
# pixels go into one result pixel (docs/embed.md).
DRAFT = 4

Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Preprocess(BaseModel):
    """Resize the shorter side (bicubic, antialiased), crop the centre, normalise.

    Called with a picture it returns float32 (3, image_size, image_size).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int = Field(ge=1, le=4096, description="side of the square result, pixels")
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = OPENAI_MEAN
    std: tuple[Deviation, Deviation, Deviation] = OPENAI_STD

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8 (3, image_size, image_size), not yet normalised."""
        image = centre_crop(resize_shorter(_middle(plain_mode(image)), self.image_size), self.image_size)
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (..., 3, h, w) -> float32 of the same shape."""
        mean = np.asarray(self.mean, np.float32).reshape(3, 1, 1)
        std = np.asarray(self.std, np.float32).reshape(3, 1, 1)
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    def __call__(self, image: Image.Image) -> np.ndarray:
        return self.normalise(self.pixels(image))


def plain_mode(image: Image.Image) -> Image.Image:
    """Convert rare modes to one that resizes well: palette and 1-bit to RGB, 16 and 32 bits to 8, Lab to sRGB. Fully
    transparent pixels become black; transparency of a palette or a single colour is ignored (docs/data.md)."""
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "RGBA"):
        return _nothing_hidden(image)
    if image.mode in RESIZED_AS_THEY_ARE:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return eight_bit(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    # Through RGBA, since Pillow warns when a palette with transparency is converted to RGB.
    return image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB")


def _nothing_hidden(image: Image.Image) -> Image.Image:
    """Make fully transparent pixels black, as resizing does, so that a model never sees hidden content, even in an
    image that already has the right size."""
    transparent = image.getchannel("A").point(lambda alpha: 0 if alpha else 255)
    if transparent.getbbox() is None:
        return image
    image = image.copy()
    image.paste((0,) * len(image.getbands()), None, transparent)
    return image


def _middle(image: Image.Image) -> Image.Image:
    """Crop an image longer than `LONGEST` to 1 to its middle, since resizing a thin one whole would fill the memory."""
    short, long = sorted(image.size)
    if long <= LONGEST * short:
        return image
    kept = LONGEST * short + (long - LONGEST * short) % 2  # so that the middle stays where it is
    left, top = ((side - min(side, kept)) // 2 for side in image.size)
    return image.crop((left, top, left + min(image.width, kept), top + min(image.height, kept)))


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size`, the longer in proportion (rounded down, as torchvision does)."""
    width, height = image.size
    if width <= height:
        target = (size, int(size * height / width))
    else:
        target = (int(size * width / height), size)
    return image if target == image.size else image.resize(target, Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop the central (size, size) of an image at least that large, with torchvision's rounding."""
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def on_colour(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Composite an image with transparency (alpha, palette or one colour) onto a plain colour; return others as is."""
    if not image.has_transparency_data or image.mode.startswith("I"):
        return image
    image = image.convert(image.mode.upper()).convert("RGBA")  # La and RGBa through LA and RGBA
    backdrop = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(backdrop, image).convert("RGB")


THUMBNAIL = 144  # pixels: twice the displayed size, for high-density screens


def thumbnail(image: Image.Image) -> Image.Image:
    """Return a small RGB copy, with the colours that a model sees."""
    small = plain_mode(image).copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small.convert("RGB")
