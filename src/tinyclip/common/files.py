"""Writing so that a reader never sees half of anything."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinyclip.common.progress import tell_bytes


def name_of(path: Path) -> str:
    """A path, with `/`, as `as_text`."""
    return as_text(path.as_posix())


def as_text(text: str) -> str:
    """Text that every file and terminal can take: bytes that were no UTF-8 stand as `\\xe9`, other halves of surrogate
    pairs as `\\ud800`."""
    try:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


LARGEST_TEXT = 2**31  # bytes of a file of texts

# What moves the cursor, ends a line or turns the direction of writing.
_STEERS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
STEERING = {code: ascii(chr(code))[1:-1] for code in _STEERS}


def printable(text: str) -> str:
    """Text in one line that steers no terminal: as `as_text`, and a control character stands as `\\x1b`."""
    return as_text(text).translate(STEERING)


def checksum(path: Path) -> int:
    """CRC-32 of a file: enough to find a torn or flipped one, at the speed of the disk."""
    value = 0
    for piece in _pieces(path):
        value = zlib.crc32(piece, value)
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    for piece in _pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece
            tell_bytes(f"checking {path.name}", file.tell(), size)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a new file to fill, which then takes the place of `path`, so that a reader sees the old or the new one,
    never a part; on an error it vanishes. What is no plain file, as `/dev/stdout`, is given itself.

    Raises:
        ValueError: for an `OSError` of whoever fills it, a full disk for one, or when the place cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            if path.is_dir():
                raise ValueError(f"cannot write {path}: it is a folder")
            yield path
            return
        place = path.resolve()  # a link stays a link
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        flush(temporary)
        temporary.replace(place)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_halves(path: Path) -> None:
    """Remove what killed writers left that were to replace a file; for who holds the lock, as no other writes then."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")
    for entry in path.parent.iterdir():
        if name.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
            entry.unlink(missing_ok=True)


def json_text(value: Any, **options: Any) -> str:
    """Strict JSON: null stands for a number that is not finite, as JSON has no word for it. All figures go through
    here; `options` are those of `json.dumps`."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file by `replacing`, text as UTF-8; `ValueError` as there."""
    with replacing(path) as file:
        file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file; `ValueError` when it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None


def in_words(error: OSError) -> str:
    """What the system said, in one line with the file, where it is known."""
    said = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.ENOSPC and error.filename is None:
        return f"{said}: the disk that is written to is full"
    return f"{as_text(os.fsdecode(error.filename))}: {said}" if isinstance(error.filename, str | bytes) else said


def lines_of(text: str) -> list[str]:
    """The lines of a text as editors count them: at `\\n`, `\\r\\n` and `\\r` alone, not at the other characters that
    `str.splitlines` takes (U+2028, U+0085, form feeds), which stand inside captions."""
    lines = re.split(r"\r\n|\r|\n", text)
    return lines[:-1] if not lines[-1] else lines


def read_text(path: Path) -> str:
    """A file of UTF-8, without a byte order mark; `ValueError` when it cannot be read or is no such text."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_TEXT + 1)
        if len(data) > LARGEST_TEXT:
            raise ValueError(f"{path}: no list of texts, as it has over {LARGEST_TEXT / 1e9:.1f} GB or does not end")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; `ValueError` when it is missing or anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a JSON {type(data).__name__}, not an object")
    return data


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
