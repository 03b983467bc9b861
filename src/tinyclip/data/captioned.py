"""Pictures with captions as people keep them: in tables, and in files beside the pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from tinyclip.common.faults import Fault, Skipped
from tinyclip.data.picture_files import CONVERTED, COPIED, LeftOut, because, find_pictures
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
    """A picture to pack: its file, captions, and its class where it has one. Of a row of a table that cannot be used,
    where it is and why."""

    path: Path
    captions: tuple[str, ...]
    name: str | None = None
    problem: Fault | None = None  # why there are none
    inside: Inside | None = None  # where the picture is when it is in a table and has no file

    def picture(self) -> Path | Image.Image:
        """What to open, or of a picture in a table the open one."""
        return open_image(io.BytesIO(self.inside.read())) if self.inside else self.path


def captioned(
    source: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: str | Path | None = None,
    separator: str | None = None,
) -> list[Item]:
    """The pictures of a source and their captions, in order.

    A table (.csv, .tsv, .jsonl, .parquet) has a column of paths, relative to `image_root` or to the table, and
    one of captions (a text or a list); rows of one picture are joined, and those that cannot be read come last, as
    items with their problem. A .parquet may have the pictures themselves in the column. A folder has captions beside
    its pictures: `photo.jpg` with `photo.txt` (a caption a line) or `photo.json` (`caption` or `captions`).

    Args:
        separator: of a .csv or .tsv, by default as its header shows.

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
    """The items, and those that were left out on the way with their fault; `ValueError` when there are none."""
    if not items:
        kinds = ", ".join(sorted([*COPIED, *CONVERTED]))
        raise ValueError(f"{source}: no pictures ({kinds}) in it{because(left_out)}")
    return items + [Item(path, (), problem=fault) for path, fault in left_out]


def sidecars(path: Path) -> list[Path]:
    """The files of captions beside a picture; cameras and Windows write endings in capitals too."""
    names = [[f".{ending}", f".{ending.upper()}", f".{ending.title()}"] for ending in ("txt", "json")]
    found = (next((f for f in map(path.with_suffix, some) if f.is_file()), None) for some in names)
    return [file for file in found if file is not None]


def with_sidecar(path: Path) -> Item:
    """A picture with the captions in the file beside it, or what is wrong with that."""
    try:
        found = captions_of({file.suffix[1:].lower(): file.read_bytes() for file in sidecars(path)})
    except Fault as fault:
        return Item(path, (), problem=fault)
    except OSError as error:
        return Item(path, (), problem=Fault("no_caption", f"caption cannot be read ({error.strerror})"))
    return Item(path, tuple(found))


@dataclass
class _Found:
    """What rows say of one picture."""

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
    """What rows of one picture have in common, its path, and whether it is inside the table; a `Fault` without one."""
    name = value.get("path") if isinstance(value, dict) else value
    if picture_in(value) is not None:
        return f"row {row.number}", Path(name if name and isinstance(name, str) else table.place(row)), True
    if isinstance(name, str) and name:
        if "\0" in name:
            raise Fault("bad_row", f"NUL bytes in {column}")
        return name, Path(name), False
    kind = "" if name is None or name == "" else f", but {type(name).__name__}"
    raise Fault("bad_row", f"no picture in {column}{kind}")
