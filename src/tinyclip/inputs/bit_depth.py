"""Images with 16- or 32-bit pixels, as written by scanners, microscopes and other software. No torch here."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
from PIL import Image

from tinyclip.inputs.decoding import WARNINGS

TOPS = (1, 255, 65_535)  # upper ends of the usual ranges
FILLED = 16  # values must fill 1/16 of a range for it to apply: 12-bit values read as 16-bit are almost black
SLACK = 1e-3  # fraction of a range by which resampled floats may exceed it


def eight_bit(image: Image.Image) -> Image.Image:
    """Convert an image of mode I, I;16 or F to 8-bit grey: 16-bit values from 0 to 65,535, 32-bit ones by their range.
    NaN becomes black."""
    values = np.asarray(image).astype(np.float64)
    low, high = (0.0, 65_535.0) if image.mode.startswith("I;16") else _range(values)
    scaled = np.nan_to_num((values - low) * (255 / ((high - low) or 1)), nan=0, posinf=255, neginf=0)
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the values of black and white: 0 and 1, 255 or 65,535 where that fits, else the minimum and maximum."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    for top in TOPS:
        if low >= -SLACK * top and high <= (1 + SLACK) * top and (top == 1 or high >= top / FILLED):
            return 0.0, float(top)
    _say(f"{low:g} to {high:g}")
    return low, high


@cache
def _told() -> list[str]:
    return []


def _say(found: str) -> None:
    """Warn once per process."""
    with WARNINGS:
        if not _told():
            _told().append(found)
            warnings.warn(
                f"a picture has values from {found}; such a picture is scaled so that its lowest value is black "
                "and its highest white",
                stacklevel=2,
            )
