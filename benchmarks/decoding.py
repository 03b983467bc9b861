"""JPEGs decoded at full size, and at a reduced scale as in `tinyclip embed`: difference in grey levels, and time.

    python benchmarks/decoding.py

For each drawn picture: the mean difference of the pixels that a model with 224 pixels receives, by how many pixels of
the reduced picture remain for each of them (`transforms.DRAFT` is the value in use), and the milliseconds from file to
pixels.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tinyclip.inputs.transforms import DRAFT, Preprocess, open_image

SIZE = 224


def pictures(height: int, width: int) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([255 * x / width, 255 * y / height, 127 + 127 * np.sin(x / 37 + y / 53)], -1)
    noise = rng.integers(0, 256, (height, width, 3)).astype(float)
    edges = np.where(((x // 90 + y // 70) % 2 == 0)[..., None], smooth, 255 - smooth)
    waves = np.repeat((127 + 127 * np.sin((x**2 + y**2) / (4 * max(height, width))))[..., None], 3, -1)
    yield from (("smooth", smooth), ("edges", edges), ("film grain", 0.9 * smooth + 0.1 * noise))
    yield from (("waves", waves), ("white noise", noise))


def pixels(data: bytes, at_least: int | None) -> tuple[np.ndarray, float]:
    """Return the model's input pixels, and the median milliseconds of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        found = Preprocess(image_size=SIZE).pixels(open_image(io.BytesIO(data), at_least))
        times.append(1000 * (time.perf_counter() - start))
    return found.astype(float), statistics.median(times)


def main() -> None:
    print(f"{'picture':12} {'size':>12}   reduced to at least 2, 3, {DRAFT} times {SIZE}")
    for height, width in ((8 * SIZE, 2400), (3000, 4000)):
        for name, picture in pictures(height, width):
            buffer = io.BytesIO()
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            whole, before = pixels(buffer.getvalue(), None)
            cells = []
            for factor in (2, 3, DRAFT):
                reduced, after = pixels(buffer.getvalue(), factor * SIZE)
                cells.append(f"{np.abs(reduced - whole).mean():.2f} levels, {before:.0f} -> {after:.0f} ms")
            print(f"{name:12} {width:>5} x {height:>4}   " + "   ".join(f"{cell:28}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
