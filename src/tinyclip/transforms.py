"""Image preprocessing on Pillow and NumPy, equal to OpenAI's and OpenCLIP's evaluation transform. No torch here."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Annotated

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from tinyclip.faults import Fault

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# In these modes pixels are resized as they are and become RGB after, as torchvision's transform does.
RESIZED_AS_THEY_ARE = {"L", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}

LONGEST = 100  # times the shorter side
# A JPEG decoded at a fraction of its size may differ by a grey level on average where less than this many of its
# pixels go into one of the result (docs/embed.md).
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


_WARNINGS = Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of odd metadata, and pictures too large as errors. One thread at a time, as Python's filters of
    warnings are shared by all; decoding itself stays outside."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def open_image(source: str | Path | object, at_least: int | None = None) -> Image.Image:
    """Open a file (path or binary file object), decode it whole and apply its EXIF orientation.

    Args:
        at_least: a JPEG may come at 1/2, 1/4 or 1/8 of its size, as long as both sides have this many pixels.

    Raises:
        ValueError: when it is missing; as `Fault` when it is no picture, damaged, or too large (Pillow's
            decompression-bomb limit).
    """
    name = f"{source}: " if isinstance(source, (str, Path)) else ""
    try:
        with _quiet():
            opened = Image.open(source)  # type: ignore[arg-type]
        with opened as image:
            if image.format == "EPS":  # a program, which Pillow would have Ghostscript run
                raise UnidentifiedImageError
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            with _quiet():
                return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"{name}no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{name}a folder, not a picture") from None
    except UnidentifiedImageError:
        raise Fault("corrupt_image", f"{name}not a picture that Pillow can read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Fault("huge_image", f"{name}too large ({Image.MAX_IMAGE_PIXELS:,} pixels at most)") from None
    except OSError as error:
        if name and error.errno not in (None, errno.EINVAL):  # of the file, not of Pillow, also by a senseless seek
            raise ValueError(f"{name}cannot be read ({error.strerror})") from None
        raise Fault("corrupt_image", f"{name}damaged picture ({error or type(error).__name__})") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise Fault("corrupt_image", f"{name}damaged picture ({error or type(error).__name__})") from None


def plain_mode(image: Image.Image) -> Image.Image:
    """Bring rare modes to one that resizes well: palette and 1-bit to RGB, 16-bit to 8, Lab to sRGB."""
    if image.mode in RESIZED_AS_THEY_ARE:
        return image
    if image.mode.startswith("I"):  # 16-bit files open as I;16 or, from some formats, as I
        scaled = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None
        return converted
    if image.mode in ("La", "RGBa"):  # premultiplied alpha
        return image.convert(image.mode.upper())
    # By way of RGBA, since Pillow warns of a palette with transparency that becomes RGB.
    return image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB")


def _middle(image: Image.Image) -> Image.Image:
    """Of a picture longer than `LONGEST` to 1 the middle, as the whole of a thin one would fill the memory."""
    short, long = sorted(image.size)
    if long <= LONGEST * short:
        return image
    kept = LONGEST * short + (long - LONGEST * short) % 2  # so that the middle stays where it is
    left, top = ((side - min(side, kept)) // 2 for side in image.size)
    return image.crop((left, top, left + min(image.width, kept), top + min(image.height, kept)))


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size`, the longer in proportion (rounded down, as torchvision does)."""
    width, height = image.size
    if width <= height:
        target = (size, int(size * height / width))
    else:
        target = (int(size * width / height), size)
    return image if target == image.size else image.resize(target, Image.Resampling.BICUBIC)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The central (size, size) of a picture at least that large (torchvision's rounding)."""
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))
