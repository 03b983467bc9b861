"""The one place where files are decoded into images, whatever state they are in. No torch here."""

from __future__ import annotations

import errno
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from tinyclip.common.faults import Fault
from tinyclip.inputs.metadata import ORIENTATION, TURNS, bare, may_be_bare, upright

WARNINGS = Lock()  # Python's warning filters are shared by all threads
LARGEST_MENDED = 2**28  # largest file, in bytes, whose metadata is repaired
# Metadata to keep, if it has one of these types.
KEPT: dict[str, tuple[type, ...]] = {"transparency": (int, bytes, tuple), "icc_profile": (bytes,)}
SIXTEEN_BITS = {"PNG", "PPM", "JPEG2000"}  # formats whose mode-I images have values up to 65,535
HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1", b"heif"}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings about odd metadata and turn those about oversized images into errors. One thread at a time;
    decoding itself stays outside."""
    with WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def pixels_at_most(count: int | None) -> Iterator[None]:
    """Limit the pixels of images opened inside, by any thread, through Pillow's own `PIL.Image.MAX_IMAGE_PIXELS`, which
    is restored at the end. None leaves it as it is."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = count or before
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def open_image(source: Any, at_least: int | None = None) -> Image.Image:
    """Open a file (path or binary file object), decode it fully and apply its EXIF or XMP orientation. Broken metadata
    is ignored.

    Args:
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep this many pixels.

    Raises:
        ValueError: when it is missing; as `Fault` when it is not an image, is damaged, needs an extra for its format,
            or is too large (see `pixels_at_most`).
    """
    name = f"{source}: " if isinstance(source, (str, Path)) else ""
    try:
        return _decoded(source, at_least)
    except FileNotFoundError:
        raise ValueError(f"{name}no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{name}a folder, not a picture") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Fault("huge_image", f"{name}{_too_large(error)}") from None
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        if name and isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            # from the file, not from Pillow; also caused by an invalid seek
            raise ValueError(f"{name}cannot be read ({error.strerror})") from None
        reason = str(error) or type(error).__name__
        if isinstance(error, Fault):
            raise Fault(error.cause, f"{name}{reason}") from None
        if (mended := _mended(source, at_least)) is not None:
            return mended
        if isinstance(error, UnidentifiedImageError):
            raise Fault("corrupt_image", f"{name}not a picture that Pillow can read") from None
        raise Fault("corrupt_image", f"{name}damaged picture ({reason})") from None


def _decoded(source: Any, at_least: int | None, exif: bytes = b"") -> Image.Image:
    """Decode an image; raises whatever Pillow raises."""
    if isinstance(source, (str, Path)):
        mode = Path(source).stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise Fault("corrupt_image", "a pipe or a device, not a picture")  # reading it might never end
    with _opened(source) as image:
        if image.format == "EPS":  # a program that Pillow would run with Ghostscript
            raise UnidentifiedImageError
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        if image.format == "TIFF":
            _keep_orientation(image)
        image.load()
        turned = upright(_as_numbers(image), exif)
    turned.info = {key: turned.info[key] for key, kind in KEPT.items() if isinstance(turned.info.get(key), kind)}
    return turned


def _opened(source: Any) -> Image.Image:
    """Open an image without decoding it; raises `Fault` for a format that needs an extra."""
    try:
        with _quiet():
            return Image.open(source)
    except UnidentifiedImageError:
        if (brand := _start(source)[8:12]) not in HEIF_BRANDS:
            if brand in (b"avif", b"avis") and "AVIF" not in Image.registered_extensions().values():
                raise Fault("needs_extra", "an AVIF picture needs Pillow 11.3 or newer: update it") from None
            raise
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise Fault("needs_extra", "a HEIC picture needs pillow-heif: pip install 'tinyclip[heif]'") from None
    register_heif_opener()
    with _quiet():
        return Image.open(source)


def _start(source: Any, size: int = 12) -> bytes:
    if isinstance(source, (str, Path)):
        with Path(source).open("rb") as file:
            return file.read(size)
    source.seek(0)
    start: bytes = source.read(size)
    source.seek(0)
    return start


def _keep_orientation(image: Image.Image) -> None:
    """Keep only the orientation of a TIFF's metadata, which Pillow reads while decoding and rewrites when it rotates
    the image."""
    value: Any = None
    with _quiet():
        with suppress(Exception):
            value = image.tag_v2.get(ORIENTATION)  # type: ignore[attr-defined]
        with suppress(Exception):
            value = image.getexif().get(ORIENTATION, value)
        exif = image.getexif()  # what could be read, even after an error
        for tag in list(exif):
            del exif[tag]
        if value in TURNS:
            exif[ORIENTATION] = value
    image.info.pop("xmp", None)


def _as_numbers(image: Image.Image) -> Image.Image:
    """Convert pixels to a mode that states their bit depth."""
    if image.mode == "I" and image.format in SIXTEEN_BITS:
        return image.convert("I;16")
    if image.mode == "I" and image.format == "TIFF" and 339 not in image.tag_v2:  # type: ignore[attr-defined]
        values = np.asarray(image)
        if (values < 0).any():  # tag 339 says whether values are signed; Pillow reads all as signed
            return Image.fromarray(values.view(np.uint32).astype(np.float32))
    return image


def _mended(source: Any, at_least: int | None) -> Image.Image | None:
    """Decode a file without its metadata, in case the metadata was the broken part."""
    with suppress(Exception):
        data = _start(source, LARGEST_MENDED + 1) if may_be_bare(_start(source)) else b""
        found = bare(data) if len(data) <= LARGEST_MENDED else None
        return _decoded(BytesIO(found[0]), at_least, found[1]) if found else None
    return None


def _too_large(error: Exception) -> str:
    has = re.search(r"\((\d+) pixels\)", str(error))
    way = f"; --max-pixels {has[1]} opens it" if has else ""
    return f"too large ({Image.MAX_IMAGE_PIXELS:,} pixels at most{way})"
