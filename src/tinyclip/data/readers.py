"""Readers of labelled pictures, one per layout on disk. They open no picture by themselves."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyclip.common.faults import Fault, Skipped
from tinyclip.common.files import name_of, read_json_object
from tinyclip.data.captioned import Item as Captioned
from tinyclip.data.captioned import sidecars, with_sidecar
from tinyclip.data.classnames import Classes
from tinyclip.data.picture_files import (
    LeftOut,
    find_pictures,
    first_picture,
    has_pictures,
    is_apple_double,
    is_picture,
    is_theirs,
    skipped_of,
)
from tinyclip.data.samples import captions_of, image_of, info_of
from tinyclip.data.shards import TAR_ERRORS, Header, entries, open_shard, read_shard, words
from tinyclip.data.tables import Inside
from tinyclip.inputs.transforms import open_image

Mine = Callable[[int], bool]  # whether the sample with this number belongs to this process


@dataclass(frozen=True)
class Item:
    """A picture that is not opened yet, with its labels and captions."""

    key: str
    open: Callable[[], Image.Image]
    label: int | None = None
    labels: tuple[int, ...] | None = None  # for multi-label data
    captions: tuple[str, ...] = ()
    subset: str | None = None
    shard: str = ""


# Yields the samples that are `mine`, with their numbers, and appends unreadable ones to the list.
Reader = Callable[[Mine, list[Skipped]], Iterator[tuple[int, Item]]]


# --- files ------------------------------------------------------------------------------------------------------


def class_folders(place: Path) -> list[str]:
    """Return the names of the subfolders that contain pictures, sorted."""
    folders = sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [p.name for p in folders if not is_theirs(p.name) and has_pictures(p)]


def has_captions(pictures: Iterable[Path]) -> bool:
    """Whether any of these pictures has a caption file next to it."""
    return any(sidecars(file) for file in pictures)


def loose_pictures(place: Path) -> list[Path]:
    """Return the pictures directly in a folder, sorted."""
    return sorted(f for f in place.iterdir() if is_picture(f) and f.is_file() and not is_apple_double(f))


def first_pictures(place: Path, folders: Sequence[str]) -> Iterator[Path]:
    """Yield the first picture found in each of these folders."""
    for name in folders:
        if found := first_picture(place / name):
            yield found


def folders(place: Path, classes: Classes, with_captions: bool) -> Reader:
    """Return a reader of class folders, with pictures at any depth. Pictures next to the folders have no class.

    Args:
        with_captions: whether to read the caption files next to the pictures as well.
    """

    def items(skipped: list[Skipped]) -> Iterator[Item]:
        for file in loose_pictures(place):
            yield Item(name_of(Path(file.name)), partial(_refused, Fault("unknown_class", "not in a class folder")))
        for folder, label in classes.labels.items():
            left_out = list[LeftOut]()
            pictures = find_pictures(place / folder, left_out)
            skipped += skipped_of(left_out, place)
            for file in pictures:
                picture = with_sidecar(file) if with_captions else Captioned(file, ())
                yield _of_file(picture, place, label)

    return _numbered(items)


def pictures_in(place: Path, folders: Sequence[str]) -> int:
    """Count the pictures in class folders, at any depth."""
    return sum(1 for folder in folders for _ in find_pictures(place / folder))


def captioned(place: Path, pictures: Sequence[Captioned]) -> Reader:
    """Return a reader of captioned files; keys are paths relative to `place` where possible."""

    def items(skipped: list[Skipped]) -> Iterator[Item]:
        for picture in pictures:
            yield _of_file(picture, place)

    return _numbered(items)


def _of_file(picture: Captioned, place: Path, label: int | None = None) -> Item:
    file, problem = picture.path, picture.problem
    key = name_of(file.relative_to(place) if file.is_relative_to(place) else file)
    opened = (
        partial(_refused, problem) if problem else partial(_open_inside, picture.inside) if picture.inside else None
    )
    opened = opened or partial(_open_file, file)
    return Item(key, opened, label, captions=picture.captions)


def _numbered(items: Callable[[list[Skipped]], Iterable[Item]]) -> Reader:
    def read(mine: Mine, skipped: list[Skipped]) -> Iterator[tuple[int, Item]]:
        return ((number, item) for number, item in enumerate(items(skipped)) if mine(number))

    return read


def _refused(problem: Fault) -> Image.Image:
    raise problem


def _open_inside(inside: Inside) -> Image.Image:
    return open_image(io.BytesIO(inside.read()))


def _open_file(file: Path) -> Image.Image:
    try:
        return open_image(file)
    except Fault as fault:
        raise Fault(fault.cause, fault.reason.removeprefix(f"{file}: ")) from None
    except ValueError as error:
        raise Fault("no_image", str(error).removeprefix(f"{file}: ")) from None


def karpathy(file: Path, split: str, images: Path | None) -> list[Captioned]:
    """Return the pictures and captions of one split of `dataset_flickr30k.json`, `dataset_coco.json` or similar files.

    Args:
        images: folder of the pictures; by default the first that has some of the file's own and its subfolders.

    Raises:
        ValueError: when the file is of another kind, has no such split, or its pictures are not found.
    """
    rows, found = read_json_object(file).get("images"), []
    if not isinstance(rows, list):
        raise ValueError(f'{file}: no list of `"images"`, which Karpathy\'s split files have')
    for i, row in enumerate(rows):
        try:
            captions = [sentence["raw"].strip() for sentence in row["sentences"]]
            found.append((Path(row.get("filepath", "")) / row["filename"], captions, row["split"]))
        except (TypeError, KeyError, AttributeError):
            wanted = "lacks `filename`, `split`, or `sentences` with `raw`, which Karpathy's split files have"
            raise ValueError(f"{file}: images[{i}] {wanted}") from None
    chosen = [(name, [c for c in captions if c]) for name, captions, part in found if part == split]
    if not chosen:
        parts = sorted({part for *_, part in found})
        raise ValueError(f"{file}: no split {split!r}; it has {', '.join(map(str, parts)) or 'none'}")
    if images is not None and not images.is_dir():
        raise ValueError(f"{images}: no such folder of pictures")
    near = [file.parent, *sorted(p for p in file.parent.iterdir() if p.is_dir() and not p.name.startswith("."))]
    for place in [images] if images else near:
        for strip in (False, True):  # COCO's `filepath`, val2014, may name the folder itself
            files = [(place / (name.name if strip else name), captions) for name, captions in chosen]
            if any(path.is_file() for path, _ in files):
                return [Captioned(path, tuple(captions)) for path, captions in files]
    where = images or f"{file.parent} and its folders"
    raise ValueError(f"{file}: none of the {len(chosen):,} pictures is in {where}; name their folder with --images")


# --- a tar of class folders -------------------------------------------------------------------------------------


def tar_folders(tar: Path) -> list[str]:
    """Return the names of the class folders in a tar, sorted. As in timm, a picture's class is its folder or, in nested
    tars, the name of the inner tar. Empty for shards: pictures outside folders, or next to other files.

    Raises:
        ValueError: when the tar cannot be read.
    """
    names: set[str] = set()
    try:
        with open_shard(tar) as opened:
            for entry in entries(opened):
                inner = {Path(part.name).stem for ending, part in entry.parts.items() if ending == "tar"}
                outer = [Path(part.name).parent.name for part in entry.parts.values() if _is_picture(part)]
                if not names and ("" in outer or len(entry.parts) > len(inner) + len(outer)):
                    return []
                names |= inner.union(outer)
    except Fault as fault:
        if not names:
            raise ValueError(f"{tar}: {fault}") from None
    return sorted(names - {""})


def in_tar(tar: Path, classes: Classes) -> Reader:
    """Return a reader of a tar of class folders, or of a tar with one inner tar per class."""

    def read(mine: Mine, skipped: list[Skipped]) -> Iterator[tuple[int, Item]]:
        number = 0
        for folder, name, start, size in _members(tar, skipped):
            if folder in classes.labels:
                if mine(number):
                    yield number, Item(name, partial(_open_part, tar, start, size), classes.labels[folder])
                number += 1

    return read


def _members(tar: Path, skipped: list[Skipped]) -> Iterator[tuple[str, str, int, int]]:
    """Yield the class folder, name, first byte and size of every picture."""
    try:
        with open_shard(tar) as opened:
            for entry in entries(opened):
                for ending, part in entry.parts.items():
                    if ending == "tar":
                        yield from _inner(tar, opened, part, skipped)
                    elif _is_picture(part):
                        yield Path(part.name).parent.name, part.name, part.offset_data, part.size
    except Fault as fault:
        skipped.append(Skipped(tar.name, "", fault.cause, fault.reason))


def _inner(
    tar: Path, opened: tarfile.TarFile, part: tarfile.TarInfo, skipped: list[Skipped]
) -> Iterator[tuple[str, str, int, int]]:
    """Do the same for an inner tar; of a damaged one, yield what comes before the damage."""
    try:
        with tarfile.open(fileobj=opened.extractfile(part), mode="r:", tarinfo=Header) as inner:
            for item in entries(inner):
                for picture in filter(_is_picture, item.parts.values()):
                    first = part.offset_data + picture.offset_data
                    yield Path(part.name).stem, picture.name, first, picture.size
    except (Fault, *TAR_ERRORS) as error:
        fault = error if isinstance(error, Fault) else Fault("damaged_shard", f"damaged shard ({words(error)})")
        skipped.append(Skipped(tar.name, part.name, fault.cause, fault.reason))


def _is_picture(part: tarfile.TarInfo) -> bool:
    return is_picture(part.name)


def _open_part(tar: Path, start: int, size: int) -> Image.Image:
    try:
        with tar.open("rb") as file:
            file.seek(start)
            return open_image(io.BytesIO(file.read(size)))
    except OSError as error:
        raise Fault("vanished_shard", f"cannot be read ({error.strerror})") from None


# --- WebDataset shards ------------------------------------------------------------------------------------------


def shards(files: Sequence[Path], classes: Classes) -> Reader:
    """Return a reader of WebDataset shards. The class comes from `class` in the JSON (a name), `cls` (a number or a
    name), or `npy` (multi-label: 1 or 0 per class); captions as in training data; the subset from `subset` in the
    JSON."""

    def read(mine: Mine, skipped: list[Skipped]) -> Iterator[tuple[int, Item]]:
        number = 0
        for shard in files:
            for sample in read_shard(shard, skipped, partial(_after, number, mine)):
                if mine(number):
                    try:
                        yield number, _item(sample, classes)
                    except Fault as fault:
                        skipped.append(Skipped(shard.name, sample["__key__"], fault.cause, fault.reason))
                number += 1

    return read


def samples_in(files: Sequence[Path]) -> int | None:
    """Count the undamaged samples of shards; None where the shards would have to be unpacked."""
    if any(file.suffix == ".gz" for file in files):
        return None
    count = 0
    for file in files:
        with suppress(Fault), open_shard(file) as tar:
            for _ in entries(tar):
                count += 1
    return count


def _after(start: int, mine: Mine, number: int) -> bool:
    return mine(start + number)


def _item(sample: dict[str, Any], classes: Classes) -> Item:
    info = info_of(sample)
    return Item(
        sample["__key__"],
        partial(image_of, sample),
        _label(sample, info, classes),
        _labels(sample, classes) if "npy" in sample else None,
        tuple(captions_of(sample)),
        str(info["subset"]) if info.get("subset") else None,
        sample["__shard__"],
    )


def _label(sample: dict[str, Any], info: dict[str, Any], classes: Classes) -> int | None:
    """Return a sample's label. Raises `Fault` for a class that is not in the list."""
    name = str(info.get("class") or "")
    if "cls" in sample:
        name = sample["cls"].decode("utf-8-sig", "replace").strip()
        if name.isdecimal():
            if classes.names and int(name) >= len(classes.names):
                named = f"{classes.source} names {len(classes.names):,}, from 0"
                raise Fault("unknown_class", f"class number {name}, but {named}")
            return int(name)
    if not name or not classes.names:
        return None
    if name not in classes.labels:
        raise Fault("unknown_class", f"class {name!r} is not in {Path(classes.source).name}")
    label = classes.labels[name]
    if label is None:
        raise Fault("unknown_class", f"class {name!r} is listed more than once in {Path(classes.source).name}")
    return label


def _labels(sample: dict[str, Any], classes: Classes) -> tuple[int, ...]:
    try:
        array = np.load(io.BytesIO(sample["npy"]), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise Fault("unknown_class", f"classes cannot be read ({error})") from None
    if array.ndim != 1 or (classes.names and len(array) != len(classes.names)):
        raise Fault("unknown_class", f"classes of shape {array.shape}, expected ({len(classes.names)},)")
    return tuple(np.flatnonzero(array).tolist())
