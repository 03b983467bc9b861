"""Atomic folder writes: into a temporary folder next to the target, then swapped in in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyclip.common import ownership
from tinyclip.common.files import flush
from tinyclip.common.ownership import MARKER, Marker


@contextmanager
def atomic_directory(
    path: str | Path, kind: str, aside: Path | None = None, known: Collection[str] = ()
) -> Iterator[Path]:
    """Yield a new directory to fill; on success it replaces `path`, on an error it is removed. It gets a marker with a
    record of its files (see `ownership`).

    Args:
        kind: what it is, one of `ownership.KINDS`.
        aside: where to move the replaced directory, on the same file system; by default it is removed.
        known: for a checkpoint inside one of our runs, the names it consists of: foreign files in the old one move to
            the new one. Without it, an old directory that is not ours, or holds foreign files, is refused.

    Raises:
        ValueError: when the path cannot be written, or holds something that is not ours to replace.
    """
    path = Path(path).resolve()  # a link to a folder stays a link
    try:
        if path.exists() and not path.is_dir():
            raise ValueError(f"cannot write {path}: it is a file")
        if not known:
            _check(path, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise ValueError(f"cannot write to {path.parent}: {error.strerror}") from None
    try:
        temporary.chmod(0o755)
        ownership.write_marker(temporary, Marker(kind, unfinished=True))
        yield temporary
        ownership.record(temporary, kind)
        for file in temporary.rglob("*"):
            if file.is_file():
                flush(file)
        flush(temporary)
        if path.exists():
            _replace(path, temporary, kind, aside, known)
        else:
            temporary.rename(path)
        flush(path.parent)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    except ValueError as error:
        if type(error) is not ValueError or str(temporary) not in str(error):
            raise
        said = str(error).replace(str(temporary / MARKER), str(path))
        raise ValueError(said.replace(str(temporary), str(path))) from None  # the path that the user knows
    finally:
        ownership.discard(temporary)


def _check(path: Path, kind: str) -> None:
    ownership.check_replaceable(path, kind)
    try:
        here = Path.cwd()
    except OSError:  # it has been removed
        return
    if path.exists() and here.is_relative_to(path):
        raise ValueError(f"{path} is the current folder, so it is not replaced; change to another folder first")


def _replace(path: Path, new: Path, kind: str, aside: Path | None, known: Collection[str]) -> None:
    """Put a new folder in place of an old one, which moves to `aside`, or to where the new one was."""
    if known:
        ownership.adopt(path, known)
    else:
        _check(path, kind)  # something may have appeared in the meantime
    _exchange(new, path)
    if known:
        ownership.carry(new, path)
    if aside is not None:
        new.rename(aside)


def _exchange(one: Path, two: Path) -> None:
    """Swap two directories atomically, so that a kill at any moment leaves a complete one in each place.

    On file systems that cannot (NFS, exFAT), use three renames; a kill between them leaves the old one as `*.old`.
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


def recover(path: Path) -> None:
    """Restore a directory that a kill between the three renames left as `*.old`."""
    if path.exists() or not path.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(path.name)}\.\w+\.old")
    if aside := sorted(entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)):
        aside[-1].rename(path)


def remove_leftovers(folder: Path) -> None:
    """Clean up after writers that were killed anywhere in a folder of ours."""
    for left, place in list(ownership.leftovers(folder)):
        if left.suffix == ".old":
            recover(place)
    for left, _ in list(ownership.leftovers(folder)):
        if left.is_dir():
            ownership.discard(left)
        else:
            left.unlink(missing_ok=True)
