"""Find the picture files in a folder. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinyclip.common.faults import Fault, Skipped
from tinyclip.common.files import name_of

JPEG = (".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".jfi", ".pjpeg", ".pjp")
COPIED = {**dict.fromkeys(JPEG, "jpg"), ".png": "png", ".webp": "webp"}  # stored unchanged in shards
CONVERTED = {".bmp", ".gif", ".tif", ".tiff"}  # stored as PNG
OTHERS = {".avif", ".heic", ".heif", ".hif", ".jp2", ".jxl"}  # stored as PNG if readable, else reported
ENDINGS = {*COPIED, *CONVERTED, *OTHERS}

# Internal folders of operating systems and file managers: thumbnails, copies, trash.
THEIRS = {".thumbnails", "@eadir", ".@__thumb", "__macosx", ".appledouble", ".trash", ".trashes", "$recycle.bin"}
THEIRS |= {"#recycle", "@recycle", "system volume information", ".git", ".fseventsd", ".spotlight-v100", ".dtrash"}
APPLE_DOUBLE = b"\0\5\x16\7"  # magic number of `._photo.jpg` files, macOS's metadata for `photo.jpg`


LeftOut = tuple[Path, Fault]


def is_picture(path: Path | str) -> bool:
    """Whether a path has the extension of a picture."""
    return Path(path).suffix.lower() in ENDINGS


def is_theirs(name: str) -> bool:
    """Whether a folder of this name belongs to the system or a file manager."""
    return name.lower() in THEIRS or name.startswith(".Trash-")


def is_apple_double(path: Path) -> bool:
    if not path.name.startswith("._"):
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) == APPLE_DOUBLE
    except OSError:
        return False


def find_pictures(folder: Path, left_out: list[LeftOut] | None = None) -> list[Path]:
    """Return the pictures below a folder, sorted. Links to folders are followed, but each real folder is visited once
    and parents of `folder` never. File managers' folders are left out, unless `folder` itself is one.

    Args:
        left_out: list that receives the places that were left out, with the reason.
    """
    found, theirs = list[Path](), dict[Path, int]()  # file managers' folders -> number of pictures in them
    unread = list[LeftOut]()
    for place, names in _walk(folder, unread):
        below, top = place.relative_to(folder).parts, None
        for depth, name in enumerate(below, 1):
            if is_theirs(name):
                top = folder.joinpath(*below[:depth])
                break
        for path in (place / name for name in names if is_picture(name)):
            if top is None and not is_apple_double(path):
                found.append(path)
            else:
                key = top or place / "._*"
                theirs[key] = theirs.get(key, 0) + 1
    if left_out is not None:
        for path, count in sorted(theirs.items()):
            way = "" if path.name == "._*" else "; to use them, give that folder itself"
            what = "picture" if count == 1 else "pictures"
            left_out.append((path, Fault("file_manager", f"{count:,} {what} kept by a file manager{way}")))
        left_out += sorted(unread, key=lambda place: place[0])
    return sorted(found)


def has_pictures(folder: Path) -> bool:
    """Whether a folder has pictures. True as well if it cannot be opened, so that this is reported, not ignored."""
    unread = list[LeftOut]()
    return first_picture(folder, unread) is not None or any(path == folder for path, _ in unread)


def first_picture(folder: Path, unread: list[LeftOut] | None = None) -> Path | None:
    """Return the first picture found below a folder, searching as `find_pictures` does."""
    for place, names in _walk(folder, [] if unread is None else unread, leave_theirs=True):
        for path in (place / name for name in names if is_picture(name)):
            if not is_apple_double(path):
                return path
    return None


def _walk(folder: Path, unread: list[LeftOut], leave_theirs: bool = False) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder with its file names: first the real folders, then those behind links."""
    seen = {identity for place in (folder, *folder.resolve().parents) if (identity := _identity(place))}
    starts = [folder]

    def note(error: OSError) -> None:
        unread.append((Path(error.filename), Fault("unreadable_folder", f"cannot be opened ({error.strerror})")))

    while starts:
        links = list[Path]()
        for start in starts:
            if start != folder and not _is_new(start, seen):
                continue
            for top, folders, names in os.walk(start, onerror=note):
                place = Path(top)
                yield place, names
                # Broken links whose names look like folders, for example to an unmounted disk.
                lost = [place / name for name in names if "." not in name and (place / name).is_symlink()]
                unread += [
                    (path, Fault("unreadable_folder", "a broken link")) for path in lost if _identity(path) is None
                ]
                paths = [place / name for name in folders if not (leave_theirs and is_theirs(name))]
                links += [path for path in paths if path.is_symlink()]
                folders[:] = [path.name for path in paths if not path.is_symlink() and _is_new(path, seen)]
        starts = sorted(links)


def _is_new(folder: Path, seen: set[tuple[int, int]]) -> bool:
    identity = _identity(folder)
    if identity is None or identity in seen:
        return False
    seen.add(identity)
    return True


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        state = folder.stat()
    except OSError:  # deleted meanwhile
        return None
    return state.st_dev, state.st_ino


def skipped_of(left_out: Sequence[LeftOut], root: Path) -> list[Skipped]:
    """Convert what was left out to `Skipped`, with paths relative to `root`."""
    return [Skipped("", name_of(path.relative_to(root)), fault.cause, fault.reason) for path, fault in left_out]


def because(left_out: Sequence[LeftOut]) -> str:
    """Return the end of a message that says why there may be no pictures."""
    return f"; left out: {left_out[0][0]}: {left_out[0][1]}" if left_out else ""
