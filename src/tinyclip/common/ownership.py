"""Ownership of folders: which files tinyclip may replace or remove. No torch here.

Every folder that tinyclip creates carries a marker, `.tinyclip.json`: our name and version, the kind of folder, and a
record of its files. Only a folder with such a marker is replaced or removed, and only the files in its record.
Anything else in it belongs to somebody else: it is named and left alone. Links are never followed, and the marker is
removed last, so that an interrupted removal can be repeated.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tinyclip.common.files import as_text, read_json_object, write_atomically

MARKER, VERSION = ".tinyclip.json", 1
LOCKS = (".lock", ".lock.lease", ".prepare.lock", ".prepare.lock.lease")  # never data, whoever left them
KINDS = {
    "run": "a run",
    "model": "a checkpoint",  # or an export
    "shards": "shards",
    "cache": "a cache",
    "features": "features",
    "index": "an index",
    "comparison": "a comparison",
}
_WANDB = r"wandb/(?:offline-)?run-\d{8}_\d{6}-\w[\w-]*"
# Entries of a run whose names are not known in advance: folders with their own marker, files, and links.
_STEP = re.compile(r"stages/[^/]+/step-\d{6,}")
_TRACKED = re.compile(
    r"tensorboard(?:/events\.out\.tfevents\.\d+\.[^/]+\.\d+\.\d+)?"
    rf"|wandb|{_WANDB}(?:/files|/logs|/tmp|/tmp/code)?|{_WANDB}/run-[\w-]+\.wandb(?:\.synced)?"
    rf"|{_WANDB}/files/(?:config\.yaml|output\.log|requirements\.txt|wandb-(?:metadata|summary)\.json)"
    rf"|{_WANDB}/logs/debug(?:-internal|-core)?\.log"
)
_LINKS = re.compile(r"wandb/(?:latest-run|debug(?:-internal|-core)?\.log)")
_TEMPORARY = re.compile(r"\.(.+)\.(?:tmp|old)")
NAMED = 3  # foreign files listed in an error


@dataclass
class Marker:
    """The content of `.tinyclip.json`."""

    kind: str
    files: set[str] = field(
        default_factory=set
    )  # paths relative to the folder, with `/`; a folder with its own marker ends in `/`
    unfinished: bool = False  # still being written as a temporary folder: everything in it is ours

    @property
    def folders(self) -> set[str]:
        return {str(parent) for name in self.files for parent in Path(name.rstrip("/")).parents}


def read_marker(folder: Path) -> Marker | None:
    """Return the marker of a folder, or None.

    Raises:
        ValueError: when it is damaged, not ours, or from a newer tinyclip.
    """
    path = folder / MARKER
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError(f"{path} is not a file, so tinyclip cannot tell which files in {folder} it wrote")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    said = read_json_object(path)
    version, kind, files = said.get("version"), said.get("kind"), said.get("files")
    if isinstance(version, int) and version > VERSION and "tinyclip" in said:
        raise ValueError(f"{path} was written by a newer tinyclip ({said['tinyclip']}); {folder} is left unchanged")
    names = isinstance(files, list) and all(isinstance(name, str) for name in files)
    if version != VERSION or kind not in KINDS or not names or not isinstance(said.get("tinyclip"), str):
        raise ValueError(f"{path} is damaged or not ours, so tinyclip cannot tell which files in {folder} it wrote")
    return Marker(kind, set(files or ()), said.get("unfinished") is True)


def write_marker(folder: Path, marker: Marker) -> None:
    """Write a folder's marker; `ValueError` when it cannot be written."""
    from tinyclip.version import __version__

    said = {"tinyclip": __version__, "kind": marker.kind, "version": VERSION, "files": sorted(marker.files)}
    if marker.unfinished:
        said["unfinished"] = True
    write_atomically(folder / MARKER, json.dumps(said, indent=1) + "\n")


def claim(folder: Path, kind: str, names: Iterable[str]) -> None:
    """Add names to a folder's record before they are written. A folder from an older tinyclip, without a marker, gets
    none, since its other contents are unknown.

    Raises:
        ValueError: as `read_marker`, for a folder of another kind, or when it cannot be written.
    """
    if is_free(folder):
        write_marker(folder, Marker(kind, set(names)))
    elif (marker := read_marker(folder)) is not None:
        if marker.kind != kind:
            raise ValueError(f"{folder} is {KINDS[marker.kind]} from tinyclip, not {KINDS[kind]}; choose another place")
        if new := set(names) - marker.files:
            marker.files |= new
            write_marker(folder, marker)


def record(folder: Path, kind: str) -> None:
    """Mark a folder that was built as a temporary one, recording everything in it."""
    names = set[str]()
    for place, folders, files in os.walk(folder):
        below = Path(place).relative_to(folder)
        marked = [name for name in folders if (Path(place) / name / MARKER).exists()]
        names |= {(below / name).as_posix() + "/" for name in marked}
        names |= {(below / name).as_posix() for name in files} - {MARKER}
        folders[:] = [name for name in folders if name not in marked]
    write_marker(folder, Marker(kind, names))


def adopt(folder: Path, known: Collection[str]) -> None:
    """Mark a checkpoint inside one of our runs that lacks a valid marker, because an older tinyclip wrote it or the
    disk is faulty; only the `known` names in it are ours."""
    with suppress(ValueError):
        if read_marker(folder) is not None:
            return
    names = {name for name in known if stat.S_ISREG(_mode(folder / name))}
    if names:
        write_marker(folder, Marker("model", names))


# --- what is in a folder ------------------------------------------------------------------------------------------


def is_free(folder: Path) -> bool:
    """Whether there is nothing to lose: no folder, or one that holds only locks and a marker."""
    return not folder.exists() or all(entry.name in (*LOCKS, MARKER) for entry in folder.iterdir())


def check_replaceable(folder: Path, kind: str) -> None:
    """Refuse to replace anything that is not ours.

    Args:
        kind: what will be written there, one of `KINDS`.

    Raises:
        ValueError: for a file, a folder without our marker or of another kind, or one that holds entries missing from
            its record (they are named).
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, so it is not replaced by a folder; choose another place")
    if is_free(folder):
        return
    what, kept = KINDS[kind], "so it is left alone"
    marker = read_marker(folder)
    if marker is None:
        first = min(entry.name for entry in folder.iterdir() if entry.name not in LOCKS)
        raise ValueError(
            f"{folder} has no {MARKER}, so tinyclip cannot tell whether it wrote what is there ({as_text(first)}), "
            f"{kept}; choose another place, or remove it by hand"
        )
    if marker.kind != kind:
        raise ValueError(f"{folder} is {KINDS[marker.kind]} from tinyclip, not {what}, {kept}; choose another place")
    _, others = _sorted(folder, marker)
    if others:
        shown = ", ".join(as_text(path.relative_to(folder).as_posix()) for path in others[:NAMED])
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        raise ValueError(
            f"{folder} also holds files that tinyclip did not write ({shown}{more}), {kept}; move them away, or choose "
            "another place"
        )


def _sorted(folder: Path, marker: Marker) -> tuple[list[Path], list[Path]]:
    """Split a folder's entries into ours, in the order in which they can be removed, and foreign ones."""
    ours, others = list[Path](), list[Path]()
    _sort(folder, "", marker, marker.folders, ours, others)
    if (folder / MARKER).exists():
        ours.append(folder / MARKER)
    return ours, others


def _sort(place: Path, below: str, marker: Marker, known: set[str], ours: list[Path], others: list[Path]) -> None:
    """Sort the entries of a folder of ours, at `below` relative to its top; `known` are the record's folders."""
    for entry in sorted(place.iterdir()):
        name, mode = below + entry.name, _mode(entry)
        if name == MARKER:
            continue
        tracked = marker.kind == "run" and _TRACKED.fullmatch(name) is not None
        if stat.S_ISDIR(mode):
            before = len(others)
            own = f"{name}/" in marker.files or (marker.kind == "run" and _STEP.fullmatch(name) is not None)
            temporary = _half_of(name, marker) is not None
            if own or temporary:
                _sort_marked(entry, temporary, ours, others)
            elif name in known or tracked:
                _sort(entry, f"{name}/", marker, known, ours, others)
            else:
                others.append(entry)
            if len(others) == before:
                ours.append(entry)
        elif stat.S_ISREG(mode):
            mine = name in marker.files or name in LOCKS or tracked or _half_of(name, marker) is not None
            (ours if mine else others).append(entry)
        else:
            link = stat.S_ISLNK(mode) and marker.kind == "run" and _LINKS.fullmatch(name) is not None
            (ours if link else others).append(entry)


def _sort_marked(folder: Path, temporary: bool, ours: list[Path], others: list[Path]) -> None:
    """Sort a folder that should have its own marker. If it has none, only temporary files of the marker are ours; an
    unfinished temporary folder is ours with everything in it."""
    try:
        marker = read_marker(folder)
    except ValueError:
        marker = None
    if marker is None:
        halves = _halves_of_marker(folder)
        ours.extend(halves)
        others.extend(sorted(set(folder.iterdir()).difference(halves)))
    elif temporary and marker.unfinished:
        ours.extend(_everything(folder))
    else:
        mine, rest = _sorted(folder, marker)
        ours.extend(mine)
        others.extend(rest)


def _everything(folder: Path) -> list[Path]:
    """Return all entries of an unfinished folder in the order in which they can be removed: its marker last, so that
    an interrupted removal can be repeated."""
    return sorted(folder.rglob("*"), key=lambda path: (-len(path.parts), path.name == MARKER))


def _halves_of_marker(folder: Path) -> list[Path]:
    """Return the temporary files left in a new folder by a writer that was killed while writing the marker."""
    nothing = Marker("model")
    return [p for p in sorted(folder.iterdir()) if stat.S_ISREG(_mode(p)) and _half_of(p.name, nothing) == MARKER]


def _half_of(name: str, marker: Marker) -> str | None:
    """Return the recorded name that `.NAME.tmp`, `.NAME.SOMETHING.tmp` or `.NAME.SOMETHING.old` belongs to."""
    above, _, last = name.rpartition("/")
    found = _TEMPORARY.fullmatch(last)
    if found is None:
        return None
    start = f"{above}/" if above else ""
    for whole in (found[1], found[1].rpartition(".")[0]):
        base = start + whole
        if whole and (base in marker.files or f"{base}/" in marker.files or base == MARKER):
            return base
        if whole and marker.kind == "run" and _STEP.fullmatch(base):
            return base
    return None


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


# --- removal ------------------------------------------------------------------------------------------------------


def remove(folder: Path, kind: str, keep: Collection[str] = ()) -> None:
    """Empty a folder of ours, and remove it unless something is to be kept.

    Args:
        keep: names in it to keep.

    Raises:
        ValueError: as in `check_replaceable`, before anything is removed; or when something cannot be removed.
    """
    check_replaceable(folder, kind)
    if not folder.exists():
        return
    ours, _ = _sorted(folder, read_marker(folder) or Marker(kind))
    try:
        _remove(path for path in ours if path.parent != folder or path.name not in keep)
        if not keep:
            folder.rmdir()
    except OSError as error:
        raise ValueError(f"cannot remove {error.filename}: {error.strerror}") from None


def discard(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove our files from a folder as far as possible, and the folder too if that empties it."""
    with suppress(ValueError, OSError):
        marker = read_marker(folder)
        if marker is None:
            _remove(_halves_of_marker(folder))
        elif marker.unfinished:
            _remove(_everything(folder))
        else:
            ours, _ = _sorted(folder, marker)
            _remove(path for path in ours if path.parent != folder or path.name not in keep)
    with suppress(OSError):
        folder.rmdir()


def drop(folder: Path, names: Collection[str]) -> None:
    """Remove recorded files from a folder as far as possible, and delete them from its record."""
    for name in names:
        if stat.S_ISREG(_mode(folder / name)):
            with suppress(OSError):
                (folder / name).unlink()
    marker = read_marker(folder)
    gone = {name for name in names if not os.path.lexists(folder / name)}
    if marker is not None and marker.files & gone:
        marker.files -= gone
        with suppress(ValueError):  # e.g. a full disk: an extra name in the record does no harm
            write_marker(folder, marker)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if stat.S_ISDIR(_mode(path)):
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def leftovers(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Return what killed writers left in a folder of ours, each with its intended path."""
    marker = read_marker(folder)
    if marker is None or not folder.is_dir():
        return
    for place in sorted(name for name in {"."} | marker.folders if _is_inside(folder, name)):
        for entry in sorted((folder / place).iterdir()):
            base = _half_of(entry.relative_to(folder).as_posix(), marker)
            if base is not None and not stat.S_ISLNK(_mode(entry)):
                yield entry, folder / base
    for name in sorted(name for name in marker.files if name.endswith("/") and _is_inside(folder, name)):
        with suppress(ValueError):  # a damaged marker is for those who read that folder
            yield from leftovers(folder / name)


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a recorded folder exists and no link leads to it."""
    path = Path(name)
    return all(stat.S_ISDIR(_mode(folder / part)) for part in (path, *path.parents[:-1]))


def carry(old: Path, new: Path) -> None:
    """Move foreign files from a checkpoint of a run to the one that replaces it."""
    marker = read_marker(old)
    others = _sorted(old, marker)[1] if marker is not None else list(old.iterdir())
    for path in others:
        target = new / path.relative_to(old)
        while os.path.lexists(target):
            target = target.with_name(f"{target.name}.kept")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
