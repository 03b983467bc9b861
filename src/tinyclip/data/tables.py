"""Tables of pictures and captions: .csv, .tsv, .jsonl, .parquet. No torch here.

A row is either read completely or reported as a fault that names it. It is never truncated, and never swallows the next
one.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TextIO

from tinyclip.common.faults import Fault, Skipped
from tinyclip.common.files import as_text
from tinyclip.data.csv_text import (
    SEPARATORS,
    Dialect,
    end_of_first,
    fields_of,
    is_quoted,
    one_letter,
    records_of,
    separator_of,
)
from tinyclip.inputs.batching import is_unicode

TABLES = {".csv", ".tsv", ".jsonl", ".parquet"}
IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "path", "file", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "sentence", "sentences")
LOOKED_AT = 1000  # rows of a .jsonl that are scanned for its columns
BATCH = 64  # rows of a .parquet read at once: they may contain pictures


@dataclass(frozen=True)
class Row:
    """A row: its number as counted by an editor or reader of the format, and its fields or its fault."""

    number: int  # the line, from 1, or the row of a .parquet
    fields: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None


@dataclass(frozen=True)
class Table:
    """A table whose rows can be streamed any number of times."""

    path: Path
    columns: list[str]
    rows: Callable[[Sequence[str]], Iterator[Row]]  # yields the given columns of every non-blank row
    count: int = 0  # rows of a .parquet

    def place(self, row: Row) -> str:
        """Describe where a row is, for messages."""
        return f"{self.path.name}, {'row' if self.path.suffix.lower() == '.parquet' else 'line'} {row.number}"

    def column(self, given: str | None, known: Sequence[str], option: str) -> str:
        """Return the given column, or the first known one, ignoring case; `ValueError` when it is missing (naming
        `option`) or occurs twice."""
        wanted = [given] if given else known
        lower = {name.lower(): name for name in reversed(self.columns)}
        found = next((name for name in wanted if name in self.columns), None)
        found = found or next((lower[name.lower()] for name in wanted if name.lower() in lower), None)
        if found is None:
            asked = repr(given) if given else "one of " + ", ".join(known)
            has = ", ".join(as_text(name)[:60] for name in self.columns[:20])
            raise ValueError(
                f"{self.path}: no column {asked} (it has {has}); name the right one with {option}, or rename it"
            )
        if self.columns.count(found) > 1:
            raise ValueError(f"{self.path}: {self.columns.count(found)} columns are named {found!r}; rename the others")
        return found


def open_table(path: Path, separator: str | None = None, known: Sequence[str] = ()) -> Table:
    """Open a table and read its header.

    Args:
        separator: separator of a .csv or .tsv; by default whichever of `,`, `;`, tab and `|` gives the most known
            columns in the header.
        known: column names in addition to the usual ones.

    Raises:
        ValueError: when the table cannot be read, or has no header.
    """
    suffix = path.suffix.lower()
    if separator is not None and suffix not in SEPARATORS:
        raise ValueError(f"{path}: only .csv and .tsv tables have a separator")
    try:
        if suffix == ".parquet":
            return _parquet(path)
        if suffix == ".jsonl":
            return _jsonl(path)
        return _separated(path, one_letter(separator), [*IMAGE_COLUMNS, *CAPTION_COLUMNS, *known])
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: cannot be read ({error})") from None


def check_bad_rows(table: Table, bad: Sequence[Skipped], total: int) -> None:
    """Raise `ValueError` when more than half of the rows are bad."""
    if 2 * len(bad) > total:
        raise ValueError(f"{table.path}: {len(bad):,} of its {total:,} rows cannot be read, the first: {bad[0]}")


def open_text(path: Path) -> TextIO:
    """Open a UTF-8 file whose lines end at `\\n`, `\\r\\n` and `\\r` only. Invalid bytes become lone surrogates (see
    `inputs.batching.is_unicode`), so a bad line does not affect the others.

    Raises:
        ValueError: for UTF-16.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start.count(0) > len(start) // 4:
        raise ValueError(f"{path}: UTF-16; save it as UTF-8")
    return path.open(encoding="utf-8-sig", errors="surrogateescape")


# --- .jsonl -----------------------------------------------------------------------------------------------------


def _jsonl(path: Path) -> Table:
    def rows(columns: Sequence[str]) -> Iterator[Row]:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip("\ufeff \t\n"):
                    yield _of_json(number, line)

    columns: dict[str, None] = {}
    looked = 0
    for row in rows(()):
        looked += 1
        columns |= dict.fromkeys(row.fields)
        if looked >= LOOKED_AT and columns:
            break
    if not columns:
        found = f"none of its {looked:,} lines is a JSON object with a field" if looked else "nothing in it"
        raise ValueError(f"{path}: {found}")
    return Table(path, list(columns), rows)


def _of_json(number: int, line: str) -> Row:
    try:
        value = json.loads(line.strip("\ufeff \t\n"))
    except RecursionError:
        return Row(number, fault=Fault("bad_row", "JSON that is nested too deeply"))
    except ValueError as error:
        return Row(number, fault=Fault("bad_row", f"not complete JSON ({error})"))
    if not isinstance(value, dict):
        return Row(number, fault=Fault("bad_row", f"JSON {type(value).__name__}, not an object"))
    return Row(number, value)


# --- .parquet ---------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Table:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return Table(path, file.schema_arrow.names, partial(parquet_rows, path), file.metadata.num_rows)


def parquet_rows(path: Path, columns: Sequence[str], first: int = 1) -> Iterator[Row]:
    """Yield the rows of a .parquet from number `first` on; earlier row groups are not read."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups, number = list(range(file.num_row_groups)), 1
            while groups and number + (size := file.metadata.row_group(groups[0]).num_rows) <= first:
                number += size
                del groups[0]
            for batch in file.iter_batches(BATCH, groups, columns=list(columns)) if groups else ():
                skipped = min(len(batch), max(0, first - number))
                for i, fields in enumerate(batch.slice(skipped).to_pylist(), number + skipped):
                    yield Row(i, fields)
                number += len(batch)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"{path}: cannot be read ({error})") from None


def captions_in(value: Any) -> list[str]:
    """Return the captions in a row's field; `Fault` if it is not text."""
    texts = value if isinstance(value, list) else [value]
    if other := next((text for text in texts if text is not None and not isinstance(text, str)), None):
        raise Fault("no_caption", f"caption is {type(other).__name__}, not text")
    captions = [text.strip() for text in texts if text and text.strip()]
    if not all(map(is_unicode, captions)):
        raise Fault("bad_encoding", "caption is not UTF-8")
    return captions


def picture_in(value: Any) -> bytes | None:
    """Return the bytes of a picture inside a table: a plain value, or a dict as in Hugging Face datasets."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else None


class Pictures:
    """The pictures inside a table, read on demand by threads that ask roughly in row order."""

    def __init__(self, table: Table, column: str) -> None:
        self.table, self.column = table, column
        self.lock = Lock()
        self.rows: Iterator[Row] = iter(())
        self.kept: dict[int, bytes | None] = {}  # the last few, by row number
        self.last = 0

    def read(self, number: int) -> bytes:
        """Return a row's picture. Raises `Fault` when it has none, or the table has changed."""
        with self.lock:
            if number not in self.kept and (number <= self.last or not self.last):
                self.rows, self.kept, self.last = self.table.rows([self.column]), {}, 0
            while number not in self.kept:
                row = next(self.rows, None)
                if row is None:
                    raise Fault("no_image", "is no longer in the table")
                self.last = row.number
                if row.number > number - BATCH:
                    self.kept[row.number] = picture_in(row.fields.get(self.column))
                if len(self.kept) > BATCH:
                    del self.kept[next(iter(self.kept))]
            data = self.kept[number]
        if data is None:
            raise Fault("no_image", "no picture in the row")
        return data


def pictures_column(table: Table) -> str | None:
    """Return the column that contains pictures, judging by its first non-empty value."""
    for column in (name for name in table.columns if name.lower() in IMAGE_COLUMNS):
        values = (row.fields.get(column) for row in table.rows([column]))
        if picture_in(next((value for value in values if value is not None), None)) is not None:
            return column
    return None


@dataclass(frozen=True)
class Inside:
    """A picture inside a table."""

    pictures: Pictures
    number: int  # row number

    def read(self) -> bytes:
        """Return the picture's bytes. Raises `Fault` when it is missing."""
        return self.pictures.read(self.number)


# --- .csv and .tsv ----------------------------------------------------------------------------------------------


def _separated(path: Path, separator: str | None, known: Sequence[str]) -> Table:
    with open_text(path) as file:
        lines = ((number, line.rstrip("\n")) for number, line in enumerate(file, 1))
        first, header = next(((n, line) for n, line in lines if line.strip()), (0, ""))
        if (stated := re.fullmatch(r"sep=(.)", header)) is not None:  # written by Excel
            separator = separator or stated[1]
            first, header = next(((n, line) for n, line in lines if line.strip()), (0, ""))
    if not first:
        raise ValueError(f"{path}: is empty")
    suffix = path.suffix.lower()
    separator = separator or separator_of(header, SEPARATORS[suffix], known)
    quoted = Dialect(separator, True)
    names = [name.strip().strip("\ufeff") for name in fields_of(header, quoted) or ()]
    if not names:
        raise ValueError(f"{path}: line {first}: a quote in its header is not closed")

    def records(dialect: Dialect) -> Iterator[tuple[int, str, list[str] | None]]:
        with open_text(path) as file:
            lines = ((n, line.removesuffix("\n")) for n, line in enumerate(file, 1) if n > first)
            yield from records_of(lines, dialect, len(names))

    dialect = quoted if suffix == ".csv" or is_quoted(records(quoted), separator) else Dialect(separator, False)

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        last = names.index(columns[-1]) if columns and columns[-1] in names else None
        for number, record, fields in records(dialect):
            yield _row(number, record, fields, names, dialect, joined=last == len(names) - 1)

    return Table(path, names, rows)


def _row(number: int, record: str, fields: list[str] | None, names: list[str], dialect: Dialect, joined: bool) -> Row:
    if fields is None:
        return Row(number, fault=Fault("bad_row", "a quote is not closed"))
    if "\0" in record:
        return Row(number, fault=Fault("bad_row", "NUL bytes"))
    while len(fields) > len(names) and not fields[-1].strip():
        fields = fields[:-1]
    if len(fields) > len(names) == 2 and joined:
        # An unquoted caption with separators in it; kept as it is, since quotes may be part of it.
        fields = [fields[0], record[record.index(dialect.separator, end_of_first(record, dialect)) + 1 :]]
    if len(fields) != len(names):
        shown = {"\t": "tabs", " ": "spaces"}.get(dialect.separator, repr(dialect.separator))
        text = f"{len(fields)} fields separated by {shown}, but the header has {len(names)}"
        return Row(number, fault=Fault("bad_row", text))
    return Row(number, dict(zip(names, (value.strip() for value in fields), strict=True)))
