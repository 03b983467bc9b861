"""Make training shards from what people have: pictures with sidecar captions, tables, class folders. No torch."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

from tinyclip.common.faults import Fault, Skipped, Unusable, counts, summary
from tinyclip.common.files import as_text, json_text, name_of
from tinyclip.common.folders import atomic_directory
from tinyclip.common.ownership import check_replaceable
from tinyclip.data.picture_files import CONVERTED, COPIED, LeftOut, because, find_pictures
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
from tinyclip.inputs.transforms import open_image, plain_mode, resize_shorter


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


@dataclass
class Report:
    """What `pack` did."""

    packed: int
    captions: int
    shards: int
    skipped: list[Skipped]  # the key is the file


def find_items(
    source: str | Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_root: str | Path | None = None,
    templates: Sequence[str] | None = None,
    separator: str | None = None,
    split: str | None = None,
    classes: str | Path | None = None,
) -> list[Item]:
    """The pictures of a source, in order.

    A table (.csv, .tsv, .jsonl, .parquet) has a column of paths, relative to `image_root` or to the table, and
    one of captions (a text or a list); rows of one picture are joined, and those that cannot be read come last, as
    items with their problem. A .parquet may have the pictures themselves in the column. A folder with `templates` has
    a folder for each class, and each template is a caption with `{c}` the class, named as `open_dataset` names it. Any
    other folder has captions beside its pictures: `photo.jpg` with `photo.txt` (a caption a line) or `photo.json`
    (`caption` or `captions`).

    Args:
        separator: of a .csv or .tsv, by default as its header shows.
        split: of class folders in several parts; train by default.
        classes: names of the classes, as `open_dataset` takes them.

    Raises:
        ValueError: when the source, its columns, its pictures or the names of its classes cannot be found, or more
            than half of a table's rows cannot be read.
    """
    source, left_out = Path(source), list[LeftOut]()
    if source.suffix.lower() in TABLES:
        table = open_table(source, separator, [name for name in (image_column, caption_column) if name])
        items = _from_table(table, image_column, caption_column, Path(image_root or source.parent))
    elif not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    elif not source.is_dir():
        raise ValueError(f"{source}: neither a folder nor a table ({', '.join(sorted(TABLES))})")
    elif templates is not None:
        items = _from_class_folders(source, templates, split, classes, left_out)
    else:
        items = [with_sidecar(path) for path in find_pictures(source, left_out)]
        if items and not any(item.captions for item in items):
            raise ValueError(
                f"{source}: no picture has a caption beside it (photo.txt or photo.json); "
                "for class folders give --templates, for a list of captions give the table"
            )
    if not items:
        kinds = ", ".join(sorted([*COPIED, *CONVERTED]))
        raise ValueError(f"{source}: no pictures ({kinds}) in it{because(left_out)}")
    return items + [Item(path, (), problem=fault) for path, fault in left_out]


def pack(
    items: Sequence[Item],
    out: str | Path,
    *,
    shard_size: int = 5000,
    resize: int | None = None,
    overwrite: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Report:
    """Write shards of pictures and captions, `skipped.jsonl`, and the index that training needs.

    The folder appears only when it is whole. Pictures that cannot be read, and those without a caption, are
    skipped and counted.

    Args:
        shard_size: pictures a shard.
        resize: store pictures with their shorter side at most this, pixels.
        progress: called after every picture.

    Raises:
        ValueError: when the folder exists or cannot be written, or nothing is left to pack.
    """
    from tinyclip.data.shard_index import prepare

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ValueError(f"{out} exists; choose another folder or replace it with --overwrite")
    files, place = (item.path for item in items if not (item.problem or item.inside)), Path(os.path.realpath(out))
    if any(place in Path(os.path.realpath(file)).parents for file in files):
        raise ValueError(f"{out} holds the pictures to pack; choose another folder")
    check_replaceable(out, "shards")
    report = Report(0, 0, 0, [])
    with atomic_directory(out, "shards") as folder:
        pattern = str(folder).replace("%", "%%") + "/shard-%05d.tar"
        with webdataset.ShardWriter(pattern, maxcount=shard_size, maxsize=4e9, verbose=0, mtime=0) as writer:
            for item in items:
                _pack_one(item, writer, resize, report)
                progress()
        if report.packed == 0:
            causes, first = summary(counts(report.skipped)), report.skipped[0]
            raise Unusable(f"nothing to pack, all {len(items)} pictures were skipped ({causes}), first {first}")
        names = sorted({item.name for item in items if item.name is not None})
        if names:
            (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        skipped = (json_text({"file": s.key, "cause": s.cause, "reason": s.reason}) + "\n" for s in report.skipped)
        (folder / "skipped.jsonl").write_text("".join(skipped), encoding="utf-8")
        report.shards = len(list(folder.glob("*.tar")))
        prepare(folder)
    return report


def _pack_one(item: Item, writer: Any, resize: int | None, report: Report) -> None:
    try:
        if not item.captions:
            raise item.problem or Fault("no_caption", "no caption")
        ending, data = _stored_inside(item.inside.read(), resize) if item.inside else _stored(item.path, resize)
    except ValueError as error:
        reason = str(error).removeprefix(f"{item.path}: ")
        report.skipped.append(Skipped("", name_of(item.path), getattr(error, "cause", "no_image"), reason))
        return
    info: dict[str, Any] = {"captions": list(item.captions), "file": as_text(item.path.name)}
    if item.name is not None:
        info["class"] = item.name
    text = json_text(info, ensure_ascii=False)
    writer.write({"__key__": f"{report.packed:09d}", ending: data, "json": text.encode()})
    report.packed += 1
    report.captions += len(item.captions)


def _stored(path: Path, resize: int | None) -> tuple[str, bytes]:
    """File ending and bytes to store; `ValueError` for what is no whole picture."""
    image = open_image(path)
    ending = COPIED.get(path.suffix.lower())
    if resize is not None and min(image.size) > resize:
        image = resize_shorter(plain_mode(image), resize)
        return _encoded(image, "jpg" if ending == "jpg" else "png")
    data = path.read_bytes() if ending else b""
    if ending is None or data[4:8] == b"ftyp":  # phones name HEIC files .jpg, and training may lack the extra
        return _encoded(plain_mode(image), "png")
    return ending, data


def _stored_inside(data: bytes, resize: int | None) -> tuple[str, bytes]:
    """The same of a picture that is inside a table, whose kind its bytes tell."""
    image = open_image(io.BytesIO(data))
    with Image.open(io.BytesIO(data)) as opened:
        ending = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(opened.format or "")
    if resize is not None and min(image.size) > resize:
        return _encoded(resize_shorter(plain_mode(image), resize), "jpg" if ending == "jpg" else "png")
    return (ending, data) if ending else _encoded(plain_mode(image), "png")


def _encoded(image: Image.Image, ending: str) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    if ending == "jpg":
        image.convert("RGB").save(buffer, "JPEG", quality=95)
    else:
        (image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")).save(buffer, "PNG")
    return ending, buffer.getvalue()


def sidecars(path: Path) -> list[Path]:
    """The files of captions beside a picture; cameras and Windows write endings in capitals too."""
    names = [[f".{ending}", f".{ending.upper()}", f".{ending.title()}"] for ending in ("txt", "json")]
    found = (next((f for f in map(path.with_suffix, some) if f.is_file()), None) for some in names)
    return [file for file in found if file is not None]


def with_sidecar(path: Path) -> Item:
    """A picture with the captions in the file beside it, or what is wrong with that."""
    from tinyclip.data.samples import captions_of

    try:
        found = captions_of({file.suffix[1:].lower(): file.read_bytes() for file in sidecars(path)})
    except Fault as fault:
        return Item(path, (), problem=fault)
    except OSError as error:
        return Item(path, (), problem=Fault("no_caption", f"caption cannot be read ({error.strerror})"))
    return Item(path, tuple(found))


def _from_class_folders(
    source: Path, templates: Sequence[str], split: str | None, classes: str | Path | None, left_out: list[LeftOut]
) -> list[Item]:
    from tinyclip.data.datasets import named_folders

    bad = next((t for t in templates if "{c}" not in t), None)
    if not templates:
        raise ValueError("no templates are given; each is a text with {c} for the class name")
    if bad is not None:
        raise ValueError(f"each template needs {{c}} for the class name, {bad!r} has none")
    place, names, loose = named_folders(source, split, classes)
    items = []
    for folder, name in names.items():
        captions = tuple(t.replace("{c}", name) for t in templates)
        items += [Item(path, captions, name) for path in find_pictures(place / folder, left_out)]
    return items + [Item(path, (), problem=Fault("unknown_class", "in no class folder")) for path in loose]


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
