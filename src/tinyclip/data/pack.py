"""Make training shards from pictures with sidecar captions, tables or class folders. No torch."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

from tinyclip.common.faults import Fault, Skipped, Unusable, counts, summary
from tinyclip.common.files import as_text, json_text, name_of
from tinyclip.common.folders import atomic_directory
from tinyclip.common.ownership import check_replaceable
from tinyclip.data.captioned import Item, captioned, complete
from tinyclip.data.datasets import named_folders
from tinyclip.data.picture_files import COPIED, LeftOut, find_pictures
from tinyclip.data.shard_index import prepare
from tinyclip.data.tables import (
    TABLES,
)
from tinyclip.inputs.transforms import open_image, plain_mode, resize_shorter


@dataclass
class Report:
    """The result of `pack`."""

    packed: int
    captions: int
    shards: int
    skipped: list[Skipped]  # with the file as key


def find_items(
    source: str | Path,
    *,
    templates: Sequence[str] | None = None,
    split: str | None = None,
    classes: str | Path | None = None,
    **table: Any,
) -> list[Item]:
    """Return the pictures of a source, in order.

    With `templates`, a folder has one subfolder per class, and each template gives a caption with the class name in
    place of `{c}`, named as in `open_dataset`. All other sources have their own captions, see `captioned`.

    Args:
        split: split of the class folders, if there are several; train by default.
        classes: class names, as for `open_dataset`.
        table: options of `captioned`.

    Raises:
        ValueError: as `captioned`, and when the class names cannot be found.
    """
    source, left_out = Path(source), list[LeftOut]()
    if templates is None or not source.is_dir() or source.suffix.lower() in TABLES:
        return captioned(source, **table)
    return complete(source, _from_class_folders(source, templates, split, classes, left_out), left_out)


def pack(
    items: Sequence[Item],
    out: str | Path,
    *,
    shard_size: int = 5000,
    resize: int | None = None,
    overwrite: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Report:
    """Write shards of pictures and captions, `skipped.jsonl`, and the index for training.

    The folder appears only once it is complete. Pictures that are unreadable or have no caption are skipped and
    counted.

    Args:
        shard_size: pictures per shard.
        resize: largest shorter side of stored pictures, in pixels; larger ones are scaled down.
        progress: called after every picture.

    Raises:
        ValueError: when the folder exists or cannot be written, or nothing is left to pack.
    """
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
            raise Unusable(f"nothing to pack: all {len(items)} pictures were skipped ({causes}); the first: {first}")
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
    """Return the file ending and the bytes to store; `ValueError` for a damaged picture."""
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
    """Do the same for a picture inside a table, with the format detected from its bytes."""
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


def _from_class_folders(
    source: Path, templates: Sequence[str], split: str | None, classes: str | Path | None, left_out: list[LeftOut]
) -> list[Item]:
    bad = next((t for t in templates if "{c}" not in t), None)
    if not templates:
        raise ValueError("no templates given; each is a text with {c} for the class name")
    if bad is not None:
        raise ValueError(f"each template needs {{c}} for the class name, {bad!r} has none")
    place, names, loose = named_folders(source, split, classes)
    items = []
    for folder, name in names.items():
        captions = tuple(t.replace("{c}", name) for t in templates)
        items += [Item(path, captions, name) for path in find_pictures(place / folder, left_out)]
    return items + [Item(path, (), problem=Fault("unknown_class", "not in a class folder")) for path in loose]
