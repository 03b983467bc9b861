"""Atomic file writes, so that a reader never sees a partial file, and safe reading of text and JSON."""

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
    """Return a path with `/` separators, cleaned by `as_text`."""
    return as_text(path.as_posix())


def as_text(text: str) -> str:
    """Escape text so that every file and terminal accepts it: bytes that were not UTF-8 become `\\xe9`, other lone
    surrogates `\\ud800`."""
    try:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def check_utf8(path: str | Path) -> None:
    """Raise `ValueError` for a path that is not valid UTF-8, which safetensors and USearch cannot open."""
    if as_text(str(path)) != str(path):
        raise ValueError(f"{as_text(str(path))}: this path is not valid UTF-8; rename it, or choose another")


LARGEST_TEXT = 2**31  # bytes of a text file

# Characters that move the cursor, end a line or change the text direction.
_STEERS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
STEERING = {code: ascii(chr(code))[1:-1] for code in _STEERS}


def printable(text: str) -> str:
    """Escape text to one line that cannot control a terminal: as `as_text`, and control characters become `\\x1b`."""
    return as_text(text).translate(STEERING)


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file: enough to detect truncation or bit flips, at disk speed."""
    value = 0
    for piece in _pieces(path):
        value = zlib.crc32(piece, value)
    return value


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
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
    """Yield a temporary file that replaces `path` once filled, so that a reader sees the old or the new file, never a
    part; it is removed on an error. A path that is not a regular file, such as `/dev/stdout`, is yielded as is.

    Raises:
        ValueError: for an `OSError` raised while it is filled, e.g. a full disk, or when the path cannot be written.
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
    """Remove temporary files left by killed writers; call it with the lock held, so that no other writer is active."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")
    for entry in path.parent.iterdir():
        if name.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
            entry.unlink(missing_ok=True)


def json_text(value: Any, **options: Any) -> str:
    """Dump strict JSON, with null for non-finite numbers, which JSON cannot express. All figures go through here;
    `options` are those of `json.dumps`."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file through `replacing`, text as UTF-8; raises its `ValueError`."""
    with replacing(path) as file:
        file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def append_text(path: Path, text: str) -> None:
    """Append to a file; `ValueError` when it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None


def in_words(error: OSError) -> str:
    """Format an `OSError` in one line, with the file if it is known."""
    said = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.ENOSPC and error.filename is None:
        return f"{said}: the disk being written to is full"
    return f"{as_text(os.fsdecode(error.filename))}: {said}" if isinstance(error.filename, str | bytes) else said


def lines_of(text: str) -> list[str]:
    """Split a text into lines as editors do: at `\\n`, `\\r\\n` and `\\r` only, not at the other separators of
    `str.splitlines` (U+2028, U+0085, form feeds), which occur inside captions."""
    lines = re.split(r"\r\n|\r|\n", text)
    return lines[:-1] if not lines[-1] else lines


def read_text(path: Path) -> str:
    """Read a UTF-8 file without its byte order mark; `ValueError` when it cannot be read or is not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_TEXT + 1)
        if len(data) > LARGEST_TEXT:
            raise ValueError(f"{path}: not a list of texts, since it is over {LARGEST_TEXT / 1e9:.1f} GB or endless")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; `ValueError` when the file is missing or holds anything else."""
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
    """Wait until a file, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
