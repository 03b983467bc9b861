"""Contact sheets: a grid of pictures with captions below them. No torch here."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tinyclip.common.files import write_atomically
from tinyclip.inputs.transforms import open_image, plain_mode

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SIDE, GAP, LINE, FONT = 200, 16, 22, 15  # pixels
COLUMNS = 5
MOST = 500  # pictures on a sheet; nobody looks at more, and they would fill memory
PAPER, INK, PALE, TILE = "#ffffff", "#202124", "#5f6368", "#eceff1"


@dataclass(frozen=True)
class Tile:
    """A picture and the lines of text below it."""

    file: Path
    lines: tuple[str, ...]


def check(path: Path, tiles: int) -> None:
    """Check before the search what `draw` would refuse.

    Raises:
        ValueError: for an unsupported file type, or more pictures than fit.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a sheet is written as {', '.join(FORMATS)}")
    if tiles > MOST:
        raise ValueError(f"{tiles:,} pictures are too many for a sheet, which has at most {MOST}; lower --top")


def draw(path: Path, sections: Sequence[tuple[str | Path, Sequence[Tile]]]) -> None:
    """Write a sheet of sections, each below its title: a text or a picture.

    A picture that can no longer be read becomes an empty tile that says so.

    Raises:
        ValueError: when the file cannot be written.
    """
    check(path, sum(len(tiles) for _, tiles in sections))
    font, title = _font(FONT), _font(FONT + 7)
    columns = max(1, min(COLUMNS, max((len(tiles) for _, tiles in sections), default=1)))
    width = max(GAP + columns * (SIDE + GAP), 2 * (SIDE + GAP))
    heights = [_head(head) + _rows(tiles, columns) * _step(tiles) for head, tiles in sections]
    sheet = Image.new("RGB", (width, GAP + sum(heights)), PAPER)
    pen, top = ImageDraw.Draw(sheet), GAP
    for (head, tiles), height in zip(sections, heights, strict=True):
        if isinstance(head, Path):
            sheet.paste(_thumbnail(head, SIDE // 2), (GAP, top))
            pen.text((2 * GAP + SIDE // 2, top + SIDE // 4), _fit(head.name, title, width - SIDE), INK, title, "lm")
        else:
            pen.text((GAP, top), _fit(head, title, width - 2 * GAP), INK, title)
        for i, tile in enumerate(tiles):
            left = GAP + i % columns * (SIDE + GAP)
            upper = top + _head(head) + i // columns * _step(tiles)
            sheet.paste(_thumbnail(tile.file, SIDE), (left, upper))
            for n, line in enumerate(tile.lines):
                place = (left, upper + SIDE + 4 + n * LINE)
                pen.text(place, _fit(line, font, SIDE), PALE if n else INK, font)
        top += height
    buffer = io.BytesIO()
    sheet.save(buffer, FORMATS[path.suffix.lower()])
    write_atomically(path, buffer.getvalue())


def _head(head: str | Path) -> int:
    return (SIDE // 2 if isinstance(head, Path) else LINE + 8) + GAP


def _rows(tiles: Sequence[Tile], columns: int) -> int:
    return -(-len(tiles) // columns)


def _step(tiles: Sequence[Tile]) -> int:
    """Return the distance from one row to the next, in pixels."""
    return SIDE + GAP + LINE * max((len(tile.lines) for tile in tiles), default=0)


def _thumbnail(file: Path, side: int) -> Image.Image:
    """Return the whole picture, centred in a square and as large as fits."""
    square = Image.new("RGB", (side, side), TILE)
    try:
        picture = small_copy(file, side)
    except ValueError as error:
        word = "damaged" if hasattr(error, "cause") else "missing"
        ImageDraw.Draw(square).text((side // 2, side // 2), word, PALE, _font(FONT), "mm")
        return square
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2), picture)
    return square


def small_copy(file: Path, side: int) -> Image.Image:
    """Return the whole picture in RGBA, its longer side `side`.

    Raises:
        ValueError: when it cannot be read (see `open_image`).
    """
    picture = open_image(file, side)
    picture = (picture if picture.mode in ("P", "PA") else plain_mode(picture)).convert("RGBA")
    size = [max(1, round(length * side / max(picture.size))) for length in picture.size]
    return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path  # has a font with most alphabets

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the text, with its middle elided if it is too wide."""
    if font.getlength(text) <= width:
        return text
    kept = len(text)
    while kept > 2 and font.getlength(_shortened(text, kept)) > width:
        kept -= 1
    return _shortened(text, kept)


def _shortened(text: str, kept: int) -> str:
    return text[: -(-kept // 2)] + "…" + text[len(text) - kept // 2 :]
