"""Writing so that a reader never sees half of anything."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

# What checkpoints (ours, OpenCLIP's, Hugging Face's) and exports are made of.
CHECKPOINT_FILES = {
    *("config.json", "model.safetensors", "tokenizer.json", "preprocess.json", "README.md"),
    *("open_clip_config.json", "open_clip_model.safetensors"),
    *("preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
    *("tinyclip.json", "image.onnx", "text.onnx", "image.onnx.data", "text.onnx.data", "image.pt2", "text.pt2"),
    *("image.xml", "image.bin", "text.xml", "text.bin"),
}


def check_replaceable(path: Path, known: Collection[str], what: str) -> None:
    """Refuse to replace a file by a folder, or a folder that holds anything else than what is to be written there.

    Args:
        known: patterns of the names that `what` is made of.

    Raises:
        ValueError: naming what would be lost.
    """
    if path.is_file():
        raise ValueError(f"{path} is a file, so it is not replaced by a folder; choose another place")
    found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if other := [name for name in found if not any(fnmatchcase(name, pattern) for pattern in known)]:
        raise ValueError(f"{path} holds more than {what} ({other[0]}), so it is not replaced; choose another place")


@contextmanager
def atomic_directory(path: str | Path, aside: Path | None = None) -> Iterator[Path]:
    """Give a new directory to fill; on success it takes the place of `path`, on an error it vanishes.

    Args:
        aside: where the directory that it replaces goes, on the same file system; by default that is removed.

    Raises:
        ValueError: when the place cannot be written.
    """
    path = Path(path).resolve()  # a link to a folder stays a link
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"cannot write {path}: it is a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise ValueError(f"cannot write to {path.parent}: {error.strerror}") from None
    try:
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                flush(file)
        flush(temporary)
        if path.exists():
            _exchange(temporary, path)
            if aside is not None:
                temporary.rename(aside)
        else:
            temporary.rename(path)
        flush(path.parent)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, two: Path) -> None:
    """Swap two directories in one step, so that a kill at any moment leaves a whole one in each place.

    Where the file system cannot (NFS, exFAT), in three steps; a kill between them leaves the old one as `*.old`.
    """
    try:
        _swap(one, two)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
        aside = one.with_suffix(".old")
        two.rename(aside)
        one.rename(two)
        aside.rename(one)


def recover(path: Path) -> None:
    """Put back a directory that a kill between the three steps left as `*.old`."""
    aside = sorted(path.parent.glob(f".{path.name}.*.old"))
    if aside and not path.exists():
        aside[-1].rename(path)


def remove_leftovers(folder: Path) -> None:
    """Clear up after writers that were killed anywhere in a folder."""
    for path in folder.rglob(".*.old"):
        recover(path.with_name(path.name.split(".")[1]))
    for path in [*folder.rglob(".*.tmp"), *folder.rglob(".*.old")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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


def checksum(path: Path) -> int:
    """CRC-32 of a file: enough to find a torn or flipped one, at the speed of the disk."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value


def _swap(one: Path, two: Path) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(two)
    if sys.platform == "darwin":
        failed = library.renamex_np(*names, 2)  # RENAME_SWAP
    else:
        here = -100  # AT_FDCWD
        failed = library.renameat2(here, names[0], here, names[1], 2)  # RENAME_EXCHANGE
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, so that a reader sees the old or the new one, never a part.

    Raises:
        ValueError: when it cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def lines_of(text: str) -> list[str]:
    """The lines of a text as editors count them: at `\\n`, `\\r\\n` and `\\r` alone, not at the other characters that
    `str.splitlines` takes (U+2028, U+0085, form feeds), which stand inside captions."""
    lines = re.split(r"\r\n|\r|\n", text)
    return lines[:-1] if not lines[-1] else lines


def read_text(path: Path) -> str:
    """A file of UTF-8, without a byte order mark; `ValueError` when it cannot be read or is no such text."""
    try:
        return path.read_bytes().decode("utf-8-sig")
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
