"""Captioned pictures from users' own data: tables, and caption files next to the pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tinyclip.common.faults import Fault, Skipped
from tinyclip.data.picture_files import LeftOut, because, find_pictures
from tinyclip.data.samples import captions_of
from tinyclip.data.tables import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    TABLES,
    Inside,
    Pictures,
    Row,
    Table,
    captions_in,
    check_bad_rows,
    open_table,
    picture_in,
)
from tinyclip.inputs.transforms import open_image


@dataclass(frozen=True)
class Item:
    """A picture to pack: its file, its captions and, if it has one, its class. For an unusable table row: its place and
    what is wrong with it."""

    path: Path
    captions: tuple[str, ...]
    name: str | None = None
    problem: Fault | None = None  # why the item has no captions
    inside: Inside | None = None  # place of a picture that is stored in a table, not in a file

    def picture(self) -> Path | Image.Image:
        """Return the path to open, or the opened picture if it is stored in a table."""
        return open_image(io.BytesIO(self.inside.read())) if self.inside else self.path


def captioned(
    source: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: str | Path | None = None,
    separator: str | None = None,
) -> list[Item]:
    """Return the pictures of a source with their captions, in order.

    A table (.csv, .tsv, .jsonl, .parquet) has a column of paths, relative to `image_root` or to the table, and a column
    of captions (a text or a list). Rows of the same picture are merged; unreadable rows come last, as items with their
    problem. In a .parquet, the image column may hold the pictures themselves. In a folder, captions are next to the
    pictures: `photo.jpg` with `photo.txt` (one caption per line) or `photo.json` (`caption` or `captions`).

    Args:
        separator: separator of a .csv or .tsv; detected from the header by default.

    Raises:
        ValueError: when the source, its columns or its pictures cannot be found, or more than half of a table's rows
            cannot be read.
    """
    source, left_out = Path(source), list[LeftOut]()
    if source.suffix.lower() in TABLES:
        table = open_table(source, separator, [name for name in (image_column, caption_column) if name])
        items = _from_table(table, image_column, caption_column, Path(image_root or source.parent))
    elif not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    elif not source.is_dir():
        raise ValueError(f"{source}: neither a folder nor a table ({', '.join(sorted(TABLES))})")
    else:
        items = [with_sidecar(path) for path in find_pictures(source, left_out)]
        if items and not any(item.captions for item in items):
            raise ValueError(
                f"{source}: no picture has a caption beside it (photo.txt or photo.json); "
                "for class folders give --templates, for a list of captions give the table"
            )
    return complete(source, items, left_out)


def complete(source: Path, items: list[Item], left_out: Sequence[LeftOut]) -> list[Item]:
    """Append the paths that were left out, as items with their fault; `ValueError` when there are no items."""
    if not items:
        raise ValueError(f"{source}: contains no pictures{because(left_out)}")
    return items + [Item(path, (), problem=fault) for path, fault in left_out]


def sidecars(path: Path) -> list[Path]:
    """Return the caption files next to a picture. Cameras and Windows also write extensions in capitals."""
    names = [[f".{ending}", f".{ending.upper()}", f".{ending.title()}"] for ending in ("txt", "json")]
    found = (next((f for f in map(path.with_suffix, some) if f.is_file()), None) for some in names)
    return [file for file in found if file is not None]


def with_sidecar(path: Path) -> Item:
    """Return a picture with the captions from its sidecar file, or with the problem of that file."""
    try:
        found = captions_of({file.suffix[1:].lower(): file.read_bytes() for file in sidecars(path)})
    except Fault as fault:
        return Item(path, (), problem=fault)
    except OSError as error:
        return Item(path, (), problem=Fault("no_caption", f"caption cannot be read ({error.strerror})"))
    return Item(path, tuple(found))


@dataclass
class _Found:
    """Everything the rows of a table say about one picture."""

    path: Path
    captions: list[str] = field(default_factory=list)
    inside: Inside | None = None
    problem: Fault | None = None


def _from_table(table: Table, image_column: str | None, caption_column: str | None, root: Path) -> list[Item]:
    image = table.column(image_column, IMAGE_COLUMNS, "--image-column")
    caption = table.column(caption_column, CAPTION_COLUMNS, "--caption-column")
    pictures = Pictures(table, image)
    found: dict[str, _Found] = {}
    bad: list[Item] = []
    total = 0
    for row in table.rows([image, caption]):
        total += 1
        try:
            if row.fault:
                raise row.fault
            key, path, inside = _picture_of(row.fields.get(image), image, table, row)
        except Fault as fault:
            bad.append(Item(Path(table.place(row)), (), problem=fault))
            continue
        one = found.setdefault(key, _Found(root / path))
        one.inside = Inside(pictures, row.number) if inside else None
        try:
            one.captions += captions_in(row.fields.get(caption))
        except Fault as fault:
            one.problem = fault
    check_bad_rows(table, [Skipped("", str(item.path), "bad_row", str(item.problem)) for item in bad], total)
    items = [
        Item(one.path, tuple(one.captions), problem=None if one.captions else one.problem, inside=one.inside)
        for one in found.values()
    ]
    return [*items, *bad]


def _picture_of(value: Any, column: str, table: Table, row: Row) -> tuple[str, Path, bool]:
    """Return the key that rows of one picture share, its path, and whether it is inside the table; else `Fault`."""
    name = value.get("path") if isinstance(value, dict) else value
    if picture_in(value) is not None:
        return f"row {row.number}", Path(name if name and isinstance(name, str) else table.place(row)), True
    if isinstance(name, str) and name:
        if "\0" in name:
            raise Fault("bad_row", f"NUL bytes in {column}")
        return name, Path(name), False
    kind = "" if name is None or name == "" else f", but {type(name).__name__}"
    raise Fault("bad_row", f"no picture in {column}{kind}")
