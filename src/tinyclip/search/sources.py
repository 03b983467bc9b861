"""What `tinyclip embed` reads: a folder of pictures or shards, a picture, a shard, a table or a file of texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tinyclip.common import faults
from tinyclip.common.faults import Skipped, Unusable
from tinyclip.common.files import as_text
from tinyclip.data.picture_files import LeftOut, because, find_pictures, is_picture, skipped_of
from tinyclip.data.shards import find_shards
from tinyclip.data.tables import (
    CAPTION_COLUMNS,
    TABLES,
    Table,
    check_bad_rows,
    open_table,
    open_text,
    parquet_rows,
    pictures_column,
)
from tinyclip.inputs.batching import batches, is_unicode

TEXTS = {".txt", *TABLES}


@dataclass(frozen=True)
class Text:
    """One text; for captions, with its number among the sample's captions, from 0."""

    key: str
    number: int
    caption: str


@dataclass(frozen=True)
class Rows:
    """A range of rows of a .parquet that contains pictures."""

    table: Table
    image: str
    caption: str | None
    first: int  # from 1
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __iter__(self) -> Iterator[tuple[int, Any, Any]]:
        """Yield each row's number, picture and caption."""
        columns = [self.image, self.caption] if self.caption else [self.image]
        for row in islice(parquet_rows(self.table.path, columns, self.first), len(self)):
            yield row.number, row.fields.get(self.image), row.fields.get(self.caption) if self.caption else None


@dataclass(frozen=True)
class Source:
    """The data to embed, in parts: lists of paths (pictures) or of `Text`, single shards, or `Rows` of a table."""

    kind: str  # pictures, texts, shards or rows
    root: Path
    parts: list[Any]
    fingerprint: str
    skipped: list[Skipped] = field(default_factory=list)  # found before anything is computed
    text_column: str | None = None  # of a table
    key_column: str | None = None  # of a table; None: the row's number


def open_source(
    path: str | Path,
    part_size: int = 10_000,
    text_column: str | None = None,
    key_column: str | None = None,
    separator: str | None = None,
) -> Source:
    """Open a folder of shards or of pictures (with subfolders), a shard, a picture, a text file or a table.

    Args:
        part_size: pictures or texts per part; with shards, each part is one shard.
        text_column: column of a table; one of `tables.CAPTION_COLUMNS` by default.
        key_column: column of a table; the row number, from 1, by default.
        separator: separator of a .csv or .tsv; detected from the header by default.

    Raises:
        ValueError: when it has nothing to embed.
    """
    path = Path(path)
    name = path.name.lower()
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if (text_column or key_column or separator) and path.suffix.lower() not in TABLES:
        raise ValueError(f"{path} is not a table, so it has no columns")
    if path.is_dir() and (any(path.glob("*.tar")) or any(path.glob("*.tar.gz"))):
        return _of_files("shards", path, find_shards(path), 1)
    if name.endswith((".tar", ".tar.gz")):
        return _of_files("shards", path.parent, [path], 1)
    if path.is_dir():
        left_out = list[LeftOut]()
        pictures = find_pictures(path, left_out)
        if not pictures:
            raise ValueError(f"{path}: contains no pictures or .tar shards{because(left_out)}")
        return _of_files("pictures", path, pictures, part_size, skipped_of(left_out, path))
    if is_picture(path):
        return _of_files("pictures", path.parent, [path], part_size)
    if path.suffix.lower() not in TEXTS:
        raise ValueError(f"{path}: not a picture, texts ({', '.join(sorted(TEXTS))}) or a .tar shard")
    if path.suffix.lower() == ".parquet" and key_column is None:
        table = open_table(path)
        if image := pictures_column(table):
            return _of_rows(table, image, text_column, part_size)
    texts, skipped, text_column = _read_texts(path, text_column, key_column, separator)
    if not texts:
        why = f"; {faults.summary(faults.counts(skipped))}, the first: {skipped[0]}" if skipped else ""
        raise (Unusable if skipped else ValueError)(f"{path}: contains no texts{why}")
    state = digest([_file_state(path, path)])
    return Source("texts", path, list(batches(texts, part_size)), state, skipped, text_column, key_column)


def _of_files(kind: str, root: Path, files: list[Path], part_size: int, skipped: Sequence[Skipped] = ()) -> Source:
    states = [_file_state(file, root) for file in files]
    parts = files if kind == "shards" else list(batches(files, part_size))
    return Source(kind, root, list(parts), digest(states), list(skipped))


def _of_rows(table: Table, image: str, text_column: str | None, part_size: int) -> Source:
    caption = text_column and table.column(text_column, (), "--text-column")
    caption = caption or next((name for name in CAPTION_COLUMNS if name in table.columns), None)
    starts = range(1, table.count + 1, part_size)
    parts = [Rows(table, image, caption, start, min(start + part_size - 1, table.count)) for start in starts]
    state = digest([_file_state(table.path, table.path)])
    return Source("rows", table.path, list(parts), state, text_column=caption)


def _file_state(file: Path, root: Path) -> str:
    try:
        state = file.stat()
    except OSError:  # a broken or circular link, or deleted since: skipped when read
        return f"{file.relative_to(root)} missing\n"
    return f"{file.relative_to(root)} {state.st_size} {state.st_mtime_ns}\n"


def digest(lines: Iterable[str]) -> str:
    return hashlib.blake2b("".join(lines).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _read_texts(
    path: Path, text_column: str | None, key_column: str | None, separator: str | None
) -> tuple[list[Text], list[Skipped], str | None]:
    """Return the texts, the rows without one, and the column they come from."""
    rows: list[tuple[str, Any]] = []
    skipped = list[Skipped]()
    if path.suffix.lower() == ".txt":
        with open_text(path) as file:
            text = file.read()
        lines = text.removesuffix("\n").split("\n")  # as editors count them
        rows = [(str(i), line) for i, line in enumerate(lines, 1)]
    else:
        table = open_table(path, separator, [name for name in (text_column, key_column) if name])
        text_column = table.column(text_column, CAPTION_COLUMNS, "--text-column")
        key_column = key_column and table.column(key_column, (), "--key-column")
        columns = [key_column, text_column] if key_column else [text_column]
        for i, row in enumerate(table.rows(columns), 1):
            if row.fault:
                skipped.append(Skipped("", table.place(row), row.fault.cause, row.fault.reason))
            else:
                key = as_text(str(row.fields.get(key_column))) if key_column else str(i)
                rows.append((key, row.fields.get(text_column)))
        check_bad_rows(table, skipped, len(rows) + len(skipped))
    texts = list[Text]()
    for key, found in rows:
        captions = [c.strip() for c in (found if isinstance(found, list) else [found]) if isinstance(c, str)]
        if not all(map(is_unicode, captions)):
            skipped.append(Skipped("", key, "bad_encoding", "not UTF-8, or an unpaired surrogate"))
            continue
        texts += [Text(key, number, caption) for number, caption in enumerate(filter(None, captions))]
        if not any(captions):
            skipped.append(Skipped("", key, "no_caption", "no text"))
    return texts, skipped, text_column
