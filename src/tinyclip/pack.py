"""Make training shards from what people have: pictures with sidecar captions, tables, class folders. No torch."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import webdataset
from PIL import Image

from tinyclip.faults import Fault, Skipped, Unusable, counts, summary
from tinyclip.files import as_text, json_text, name_of
from tinyclip.finding import CONVERTED, COPIED, LeftOut, because, find_pictures
from tinyclip.folders import atomic_directory
from tinyclip.inputs import is_unicode
from tinyclip.ownership import check_replaceable
from tinyclip.transforms import open_image, plain_mode, resize_shorter

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "path", "file", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "sentences")
TABLES = {".csv", ".tsv", ".jsonl", ".parquet"}


@dataclass(frozen=True)
class Item:
    """A picture to pack: its file, captions, and its class where it has one."""

    path: Path
    captions: tuple[str, ...]
    name: str | None = None
    problem: Fault | None = None  # why there are none


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
) -> list[Item]:
    """The pictures of a source, in order.

    A table (.csv, .tsv, .jsonl, .parquet) has a column of paths, relative to `image_root` or to the table, and
    one of captions (a text or a list); rows of one picture are joined. A folder with `templates` has a folder
    for each class, and each template is a caption with `{c}` the class. Any other folder has captions beside
    its pictures: `photo.jpg` with `photo.txt` (a caption a line) or `photo.json` (`caption` or `captions`).

    Raises:
        ValueError: when the source, its columns or its pictures cannot be found.
    """
    source, left_out = Path(source), list[LeftOut]()
    if source.suffix.lower() in TABLES:
        items = _from_table(source, image_column, caption_column, Path(image_root or source.parent))
    elif not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    elif not source.is_dir():
        raise ValueError(f"{source}: neither a folder nor a table ({', '.join(sorted(TABLES))})")
    elif templates is not None:
        items = _from_class_folders(source, templates, left_out)
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
    from tinyclip.index import prepare

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise ValueError(f"{out} exists; choose another folder or replace it with --overwrite")
    if any(out.resolve() in item.path.resolve().parents for item in items):
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
        ending, data = _stored(item.path, resize)
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


def _encoded(image: Image.Image, ending: str) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    if ending == "jpg":
        image.convert("RGB").save(buffer, "JPEG", quality=95)
    else:
        (image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")).save(buffer, "PNG")
    return ending, buffer.getvalue()


def with_sidecar(path: Path) -> Item:
    """A picture with the captions in the file beside it, or what is wrong with that."""
    from tinyclip.shards import captions_of

    files = {ending: path.with_suffix(f".{ending}") for ending in ("txt", "json")}
    try:
        found = captions_of({ending: file.read_bytes() for ending, file in files.items() if file.is_file()})
    except Fault as fault:
        return Item(path, (), problem=fault)
    except OSError as error:
        return Item(path, (), problem=Fault("no_caption", f"caption cannot be read ({error.strerror})"))
    return Item(path, tuple(found))


def _from_class_folders(source: Path, templates: Sequence[str], left_out: list[LeftOut]) -> list[Item]:
    bad = next((t for t in templates if "{c}" not in t), None)
    if bad is not None or not templates:
        raise ValueError(f"each template needs {{c}} for the class name, {bad!r} has none")
    items = []
    for folder in sorted(p for p in source.iterdir() if p.is_dir()):
        name = as_text(folder.name).replace("_", " ")
        captions = tuple(t.replace("{c}", name) for t in templates)
        items += [Item(path, captions, name) for path in find_pictures(folder, left_out)]
    return items


def _from_table(table: Path, image_column: str | None, caption_column: str | None, root: Path) -> list[Item]:
    joined: dict[str, list[str]] = {}
    columns: tuple[str, str] | None = None
    for row in read_rows(table):
        if columns is None:
            columns = (
                find_column(table, row, image_column, IMAGE_COLUMNS, "--image-column"),
                find_column(table, row, caption_column, CAPTION_COLUMNS, "--caption-column"),
            )
        file, captions = row.get(columns[0]), row.get(columns[1])
        if not file:
            continue
        texts = captions if isinstance(captions, list) else [captions]
        joined.setdefault(str(file), []).extend(t.strip() for t in texts if isinstance(t, str) and t.strip())
    return [_of_row(root / file, captions) for file, captions in joined.items()]


def _of_row(path: Path, captions: Sequence[str]) -> Item:
    if not all(map(is_unicode, captions)):
        return Item(path, (), problem=Fault("bad_encoding", "caption is no UTF-8"))
    return Item(path, tuple(captions))


def find_column(table: Path, row: dict[str, Any], given: str | None, known: Sequence[str], option: str) -> str:
    """The column that was given, or the first known one in the row; `ValueError` naming `option` without it."""
    found = next((name for name in ([given] if given else known) if name in row), None)
    if found is None:
        wanted = repr(given) if given else "one of " + ", ".join(known)
        raise ValueError(
            f"{table}: no column {wanted}; it has {', '.join(map(str, row))}; name it with {option}, or rename it"
        )
    return found


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """A file of UTF-8. Bytes that are none come as halves of surrogate pairs (see `inputs.is_unicode`), so that a bad
    line costs no other.

    Raises:
        ValueError: for UTF-16.
    """
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{path}: UTF-16; save it as UTF-8")
    return path.open(newline=newline, encoding="utf-8-sig", errors="surrogateescape")


def read_rows(table: Path) -> Iterator[dict[str, Any]]:
    """Rows of a .csv, .tsv, .jsonl or .parquet table, texts as of `open_text`; `ValueError` when it cannot be read."""
    try:
        if table.suffix.lower() in (".csv", ".tsv"):
            with open_text(table, newline="") as file:
                yield from csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
        elif table.suffix.lower() == ".jsonl":
            with open_text(table) as file:
                for line in filter(str.strip, file):
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"a line is no JSON object: {line.strip()[:60]}")
                    yield row
        else:
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(table).iter_batches():
                yield from batch.to_pylist()
    except FileNotFoundError:
        raise ValueError(f"{table}: no such file") from None
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors
        if str(error).startswith(str(table)):
            raise
        raise ValueError(f"{table}: cannot be read ({error})") from None
