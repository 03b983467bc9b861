"""Evaluation data: `open_dataset` detects the layout automatically (`docs/evaluation.md`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from tinyclip.common.faults import Fault, Skipped
from tinyclip.common.files import as_text
from tinyclip.data import readers
from tinyclip.data.captioned import Item as Captioned
from tinyclip.data.captioned import captioned
from tinyclip.data.classnames import Classes, of_folders, of_samples, read_lines, read_templates
from tinyclip.data.readers import Item, Mine, Reader
from tinyclip.data.shards import find_shards
from tinyclip.data.tables import TABLES
from tinyclip.inputs.batching import ahead

# The first of these that exists is the default.
SPLITS = ("test", "testing", "val", "valid", "validation", "dev", "train", "training")
SHARDS = (".tar", ".tar.gz")


@dataclass(frozen=True)
class Example:
    """A labelled picture."""

    key: str
    image: Image.Image
    label: int | None = None
    captions: tuple[str, ...] = ()
    subset: str | None = None  # metrics are also reported per subset
    labels: tuple[int, ...] | None = None  # for multi-label data


@dataclass
class Dataset:
    """Labelled pictures, read from disk on every pass."""

    path: Path
    classnames: list[str]
    templates: list[str]
    reader: Reader
    skipped: list[Skipped] = field(default_factory=list)  # filled by a pass
    about: Callable[[], int | None] = lambda: None  # number of pictures, if quick to count

    def __iter__(self) -> Iterator[Example]:
        return (example for _, example in self.share(lambda number: True))

    def share(self, mine: Mine) -> Iterator[tuple[int, Example]]:
        """Yield the examples whose numbers are `mine`, with their numbers; the others are not opened. Numbers of
        unreadable pictures are missing."""
        self.skipped.clear()
        for number, item, image in ahead(_opened, self.reader(mine, self.skipped)):
            if isinstance(image, Fault):
                self.skipped.append(Skipped(item.shard, item.key, image.cause, image.reason))
            else:
                yield number, Example(item.key, image, item.label, item.captions, item.subset, item.labels)


def _opened(numbered: tuple[int, Item]) -> tuple[int, Item, Image.Image | Fault]:
    number, item = numbered
    try:
        return number, item, item.open()
    except Fault as fault:
        return number, item, fault


@dataclass(frozen=True)
class Options:
    """What the user specifies about the data besides its path."""

    templates: Path | str | None = None
    classes: Path | str | None = None
    split: str | None = None
    images: Path | None = None
    image_column: str | None = None
    caption_column: str | None = None
    separator: str | None = None


def open_dataset(
    path: str | Path,
    templates: str | Path | None = None,
    *,
    classes: str | Path | None = None,
    split: str | None = None,
    images: str | Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    separator: str | None = None,
) -> Dataset:
    """Open evaluation data in any of these layouts: class folders, or a `.tar` of them; WebDataset shards, in a folder
    or in CLIP_benchmark's tree; Karpathy's split files; tables of pictures and captions; captioned pictures.

    Args:
        templates: file of prompt templates, one per line, `{c}` for the class name, or `imagenet` for its 80; by
            default `templates.txt` or `zeroshot_classification_templates.txt` next to the data, else ImageNet's if the
            classes are ImageNet's, else "a photo of a {c}".
        classes: file of class names, one per line, or `imagenet`, `imagenet-a`, `imagenet-r`; by default
            `classnames.txt` next to the data, else the names of the class folders.
        split: which split to read; by default the first of test, val, validation, train that exists.
        images: folder of the pictures of a table or a split file.
        image_column: column of a table; by default the first known one (`docs/data.md`).
        caption_column: likewise, for the captions.
        separator: separator of a .csv or .tsv; detected from the header by default.

    Raises:
        ValueError: when the data is missing, has none of these layouts, or does not match the class names.
    """
    place = Path(path)
    options = Options(
        templates, classes, split, Path(images) if images else None, image_column, caption_column, separator
    )
    if not place.exists():
        raise ValueError(f"{path}: no such data folder or file")
    suffix = place.suffix.lower()
    table, karpathy = suffix in TABLES, place if suffix == ".json" else _split_file(place)
    if images and not (table or karpathy):
        raise ValueError(f"{path}: --images is for a table or one of Karpathy's split files")
    if (image_column or caption_column) and not table:
        raise ValueError(f"{path} is not a table, so it has no columns")
    if table:
        _no_split(place, options)
        columns = {"image_column": image_column, "caption_column": caption_column, "separator": separator}
        items = captioned(place, image_root=images, **columns)
        return _captioned(place, options, items, place.parent)
    if karpathy:
        chosen = split or "test"
        return _captioned(place, options, readers.karpathy(karpathy, chosen, options.images), karpathy.parent)
    if place.name.lower().endswith(SHARDS):
        _no_split(place, options)
        return _tar(place, options, _homes(place.parent))
    if place.is_file():
        raise ValueError(f"{path}: not a folder, a .tar, a table or a .json split file")
    return _folder(place, options)


def _folder(place: Path, options: Options) -> Dataset:
    part, homes = _part(place, options)
    if part.is_file():
        return _tar(part, options, homes)
    if _has_shards(part):
        classes = of_samples(options.classes or _names_beside(homes))
        files = _shards(part)
        about = partial(readers.samples_in, files)
        return _dataset(part, classes, readers.shards(files, classes), options, homes, about)
    if readers.has_captions(readers.loose_pictures(part)):
        return _captioned(part, options, captioned(part), part)
    if names := readers.class_folders(part):
        classes = of_folders(part, names, options.classes or _names_beside(homes))
        with_captions = readers.has_captions(readers.first_pictures(part, names))
        reader = readers.folders(part, classes, with_captions)
        return _dataset(part, classes, reader, options, homes, partial(readers.pictures_in, part, list(classes.labels)))
    raise ValueError(f"{part}: contains no class folders, .tar shards or captioned pictures")


def find_splits(place: str | Path) -> dict[str, Path]:
    """Return the splits in a folder, named as in `SPLITS`: folders of shards or class folders, or tars. Empty when the
    folder holds anything else to read."""
    place = Path(place)
    splits: dict[str, Path] = {}
    there = {p.name.lower(): p for p in sorted(place.iterdir(), reverse=True)} if place.is_dir() else {}
    for name in SPLITS:
        folder, tar = there.get(name, place / name), there.get(f"{name}.tar", place / f"{name}.tar")
        if folder.is_dir() and (_has_shards(folder) or readers.class_folders(folder)):
            splits[name] = folder
        elif tar.is_file():
            splits[name] = tar
    if splits:
        others = {p for p in place.iterdir() if p.name.lower().endswith(SHARDS)}
        others |= {place / name for name in readers.class_folders(place)}
        return {} if others - set(splits.values()) else splits
    return splits


def named_folders(
    place: Path, split: str | None = None, classes: str | Path | None = None
) -> tuple[Path, dict[str, str], list[Path]]:
    """Find class folders for training: the folder that holds them (the training split, if there are several), the class
    names by folder, and loose pictures next to the folders.

    Raises:
        ValueError: when there are no class folders, the split is ambiguous, or the names do not match.
    """
    splits = find_splits(place)
    learned = split or next((name for name in reversed(SPLITS) if name in splits and name.startswith("train")), None)
    if splits and learned is None:
        raise ValueError(f"{place}: its folders are splits ({', '.join(splits)}); choose one with --split")
    part, homes = _part(place, Options(split=learned))
    if not part.is_dir() or _has_shards(part):
        raise ValueError(f"{part}: these are shards, not class folders; train on them as they are")
    found = readers.class_folders(part)
    for name in found:
        if name.lower() in SPLITS and readers.class_folders(part / name) and not readers.loose_pictures(part / name):
            raise ValueError(
                f"{part}: {name} looks like a split, but has other folders beside it; give the folder of one split"
            )
    if not found:
        raise ValueError(f"{part}: contains no class folders with pictures")
    named = of_folders(part, found, classes or _names_beside(homes))
    labels = {folder: label for folder, label in named.labels.items() if label is not None}
    return part, {folder: as_text(named.names[label]) for folder, label in labels.items()}, readers.loose_pictures(part)


def _part(place: Path, options: Options) -> tuple[Path, list[Path]]:
    """Return the part of a folder to read, and the folders that may hold files of names."""
    splits = find_splits(place)
    if not splits:
        _no_split(place, options)
        return place, _homes(place)
    if options.split and options.split not in splits:
        raise ValueError(f"{place}: no split {options.split!r}; it has {', '.join(splits)}")
    return splits[options.split or next(iter(splits))], [place]


def _homes(place: Path) -> list[Path]:
    """Return the folder and, if it is a split, its parent."""
    inside = place.name in SPLITS or (place / "nshards.txt").exists()
    return [place, place.parent] if inside else [place]


def _tar(tar: Path, options: Options, homes: list[Path]) -> Dataset:
    """Open a tar of class folders, or a single shard."""
    names = readers.tar_folders(tar)
    source = options.classes or _names_beside(homes)
    if not names:
        classes = of_samples(source)
        reader = readers.shards([tar], classes)
        return _dataset(tar, classes, reader, options, homes, partial(readers.samples_in, [tar]))
    if tar.suffix == ".gz":
        raise ValueError(f"{tar}: class folders in a compressed tar; unpack it with gunzip")
    classes = of_folders(tar, names, source)
    return _dataset(tar, classes, readers.in_tar(tar, classes), options, homes)


def _dataset(
    place: Path,
    classes: Classes,
    reader: Reader,
    options: Options,
    homes: Sequence[Path],
    about: Callable[[], int | None] = lambda: None,
) -> Dataset:
    templates = read_templates(options.templates, homes, classes.of_imagenet)
    return Dataset(place, list(classes.names), templates, reader, about=about)


def _captioned(place: Path, options: Options, pictures: Sequence[Captioned], root: Path) -> Dataset:
    if options.classes:
        raise ValueError(f"{place}: its pictures have captions, not classes, so class names do not apply")
    return Dataset(place, [], [], readers.captioned(root, pictures), about=lambda: len(pictures))


def _no_split(place: Path, options: Options) -> None:
    if options.split:
        raise ValueError(f"{place}: it has no splits, so there is no {options.split!r}")


def _split_file(place: Path) -> Path | None:
    """Return Karpathy's split file in a folder."""
    found = [place / f"dataset_{name}.json" for name in ("flickr30k", "coco", "flickr8k")]
    return next((file for file in found if file.is_file()), None)


def _names_beside(places: Sequence[Path]) -> Path | None:
    return next((place / "classnames.txt" for place in places if (place / "classnames.txt").exists()), None)


def _has_shards(place: Path) -> bool:
    return any(any(place.glob(f"*{ending}")) for ending in SHARDS)


def _shards(place: Path) -> list[Path]:
    """Return the shards of a folder, checked against its `nshards.txt`.

    Raises:
        ValueError: when shards are missing.
    """
    found = find_shards(place)
    if (place / "nshards.txt").exists():
        count = read_lines(place / "nshards.txt", "numbers")[0]
        names = [f"{i}.tar" for i in range(int(count) if count.isdecimal() else 0)]
        if missing := [name for name in names if not (place / name).exists()]:
            counts = f"nshards.txt lists {len(names)} shards, {len(missing)} of them missing ({missing[0]})"
            raise ValueError(f"{place}: {counts}; download the rest")
    return found
