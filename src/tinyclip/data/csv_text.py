"""Parsing of .csv and .tsv text: separators, quotes, and records with an unclosed quote."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|"}  # the first is the default


@dataclass(frozen=True)
class Dialect:
    """How a file separates and quotes its fields."""

    separator: str
    quoted: bool  # whether quotes around a field are syntax, not part of its text


def one_letter(separator: str | None) -> str | None:
    found = {"tab": "\t", "\\t": "\t"}.get(separator or "", separator)
    if found is not None and (len(found) != 1 or found in '"\n\r'):
        raise ValueError(f"separator {separator!r}: give one character, or tab")
    return found


def separator_of(header: str, separators: str, known: Sequence[str]) -> str:
    """Return the separator that yields the most known columns in the header; the default one in case of a tie."""
    wanted = {name.lower() for name in known}

    def known_in(separator: str) -> int:
        fields = fields_of(header, Dialect(separator, True)) or ()
        return len({name.strip().strip("\ufeff").lower() for name in fields} & wanted)

    return max(separators, key=lambda one: (known_in(one), -separators.index(one)))


def end_of_first(record: str, dialect: Dialect) -> int:
    found = _quoted_field(dialect.separator).match(record) if dialect.quoted else None
    return found.end() if found else 0


def fields_of(record: str, dialect: Dialect) -> list[str] | None:
    """Return the fields of a record; None when a quote is still open at its end. A field that begins with a quote but
    is not properly quoted is kept as it is."""
    if not dialect.quoted or '"' not in record:
        return record.split(dialect.separator)
    found = _split(record, dialect.separator)
    return None if found is None else [value for value, _ in found]


def _split(record: str, separator: str) -> list[tuple[str, bool]] | None:
    """Return every field, and whether it was quoted."""
    pattern, fields, start = _quoted_field(separator), list[tuple[str, bool]](), 0
    while True:
        if found := pattern.match(record, start):
            fields.append((found[1].replace('""', '"'), True))
            end = found.end()
        elif _OPEN.match(record, start):
            return None
        else:
            end = record.find(separator, start)
            end = len(record) if end < 0 else end
            fields.append((record[start:end], False))
        if end >= len(record):
            return fields
        start = end + 1


_OPEN = re.compile(r' *"(?:[^"]|"")*\Z')


@cache
def _quoted_field(separator: str) -> re.Pattern[str]:
    return re.compile(rf' *"((?:[^"]|"")*)" *(?={re.escape(separator)}|\Z)')


def records_of(
    lines: Iterable[tuple[int, str]], dialect: Dialect, columns: int
) -> Iterator[tuple[int, str, list[str] | None]]:
    """Yield the first line number, text and fields of every non-blank record. The fields are None when a quote is never
    closed, or only after lines that look like other rows; those lines then come as records of their own."""
    waiting: list[tuple[int, str]] = []
    source = iter(lines)
    while True:
        number, line = waiting.pop(0) if waiting else next(source, (0, ""))
        if not number:
            return
        if not line.strip():
            continue
        fields = fields_of(line, dialect)
        if fields is None:
            text, taken = line, list[tuple[int, str]]()
            for more in chain(waiting, source):
                taken.append(more)
                text += "\n" + more[1]
                # Only a line with a quote can close one.
                if len(taken) > LONGEST_FIELD or _looks_like_a_row(line, more[1], dialect, columns):
                    break
                if '"' in more[1] and (fields := fields_of(text, dialect)) is not None:
                    break
            rest = waiting[len(taken) :]
            if fields is not None and len(fields) >= columns:
                waiting, line = rest, text
            else:
                waiting, fields = [*taken, *rest], None
        yield number, line, fields


LONGEST_FIELD = 1000  # lines in one quoted field


def _looks_like_a_row(first: str, line: str, dialect: Dialect, columns: int) -> bool:
    """Whether a line is a row of its own rather than the continuation of a quoted field: it has as many fields, and
    those other than the one with the open quote have the same form (`images/1.jpg` and `images/2.jpg`)."""
    plain = Dialect(dialect.separator, False)
    one, two = fields_of(first, plain), fields_of(line, dialect) or fields_of(line, plain)
    if columns < 2 or not one or not two or len(two) < columns or len(one) < columns:
        return False
    place = next((i for i, value in enumerate(one) if value.lstrip().startswith('"')), 0)
    beside = range(place) if place else [columns - 1]
    return all(_form(one[i]) == _form(two[i]) for i in beside)


def _form(value: str) -> str:
    """Return the pattern of a field, with letters and digits generalised: `a/9.a`."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "9", value.strip().strip('"')))


def is_quoted(records: Iterable[tuple[int, str, list[str] | None]], separator: str) -> bool:
    """Whether the quotes in a .tsv are CSV quoting, which most .tsv files (CC3M, LAION) do not use. They are if every
    field with a quote is fully quoted, and quotes or tabs inside, or quotes in every row, show that it is intended."""
    shown, quotes, rows = False, 0, 0
    for _, record, fields in records:
        rows += 1
        if '"' not in record:
            continue
        found = _split(record, separator) if fields is not None else None
        if found is None or any('"' in value for value, quoted in found if not quoted):
            return False
        quotes += 1
        shown = shown or any(quoted and re.search(f'["\n{separator}]', value) for value, quoted in found)
    return shown or (quotes > 0 and quotes == rows)
