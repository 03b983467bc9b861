"""Class names and prompt templates, from ImageNet, files or folders. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tinyclip.common.files import lines_of, read_text

VOCABULARY = Path(__file__).parent.parent / "vocabulary"
IMAGENET_SETS = {"imagenet": "", "imagenet-a": "a", "imagenet-r": "r"}  # set -> its letter in imagenet.tsv
DEFAULT_TEMPLATES = ("a photo of a {c}",)
WNID = re.compile(r"n\d{8}")


@cache
def imagenet(name: str = "imagenet") -> dict[str, str]:
    """Map WordNet ids to class names, in ImageNet's order: all 1,000, or the 200 of `imagenet-a` or `imagenet-r`."""
    rows = [line.split("\t") for line in (VOCABULARY / "imagenet.tsv").read_text(encoding="utf-8").splitlines()]
    return {wnid: label for wnid, sets, label in rows if IMAGENET_SETS[name] in sets}


@cache
def imagenet_templates() -> tuple[str, ...]:
    """Return OpenAI's 80 prompt templates for ImageNet."""
    return tuple((VOCABULARY / "imagenet_templates.txt").read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset: their names in label order, and the label of each name that the data uses."""

    names: tuple[str, ...] = ()
    labels: Mapping[str, int | None] = field(default_factory=dict)  # None: several classes share the name
    source: str = "the data"  # where the names come from, for error messages
    of_imagenet: bool = False


def of_samples(source: Path | str | None) -> Classes:
    """Return the classes for samples that give their class by name or number.

    Args:
        source: a file of class names or one of `IMAGENET_SETS`; None when the data has neither.

    Raises:
        ValueError: when the file has no class names.
    """
    if source is None:
        return Classes()
    names, known = _names(source)
    labels: dict[str, int | None] = {}
    for i, name in enumerate(names):
        labels[name] = None if name in labels else i
    return Classes(names, labels, str(source), bool(known))


def of_folders(place: Path, folders: Sequence[str], source: Path | str | None) -> Classes:
    """Return the classes of a dataset with one folder per class.

    Folders are named by WordNet id, class number or class name. Otherwise, a file with as many names as there are
    folders names them in order. Without a file, WordNet ids and the numbers 0 to 999 stand for ImageNet's classes.

    Args:
        place: the dataset's path, for error messages.
        folders: the folder names, sorted.
        source: a file of class names, or one of `IMAGENET_SETS`.

    Raises:
        ValueError: when the folders and the names do not match.
    """
    wnids = all(map(WNID.fullmatch, folders))
    if source is None and any(map(WNID.fullmatch, folders)):
        known = imagenet()
        if other := next((folder for folder in folders if WNID.fullmatch(folder) and folder not in known), None):
            raise ValueError(f"{place}: {other} is not one of ImageNet's 1,000 classes; name them with --classes FILE")
        names = tuple(known.get(folder) or folder.replace("_", " ") for folder in folders)
        return Classes(names, _numbered(folders), "ImageNet", wnids)
    if source is None and set(folders) == set(map(str, range(1000))):
        source = "imagenet"
    if source is None:
        return Classes(tuple(folder.replace("_", " ") for folder in folders), _numbered(folders))
    names, known = _names(source)
    if known and wnids:
        places = _numbered(list(known))
    elif all(map(str.isdecimal, folders)) and max(map(int, folders)) < len(names):
        places = {folder: int(folder) for folder in folders}
    else:
        places = {folder: i for i, name in enumerate(names) for folder in (name, name.replace(" ", "_"))}
        if len(names) == len(folders) and not known and not places.keys() >= set(folders):
            places = _numbered(folders)
    if other := next((folder for folder in folders if folder not in places), None):
        counts = f"{Path(source).name} names {len(names):,} classes, but there are {len(folders):,} folders"
        raise ValueError(f"{place}: {counts}, and folder {other!r} is not one of them")
    return Classes(names, {folder: places[folder] for folder in folders}, str(source), bool(known))


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


def _names(source: Path | str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the class names, and their WordNet ids if they are ImageNet's."""
    if str(source) in IMAGENET_SETS and not Path(source).is_file():
        known = imagenet(str(source))
        return tuple(known.values()), known
    names = tuple(read_lines(source, "class names"))
    if "" in names:
        raise ValueError(f"{source}: line {names.index('') + 1} is blank, so the class numbers are ambiguous")
    return names, imagenet() if names == tuple(imagenet().values()) else {}


def read_templates(given: Path | str | None, places: Sequence[Path], of_imagenet: bool = False) -> list[str]:
    """Return the prompt templates: the given ones (a file, or `imagenet` for its 80), else those of a file in one of
    the places, else ImageNet's if the classes are ImageNet's, else "a photo of a {c}".

    Raises:
        ValueError: when the file does not exist, or one of its lines lacks the `{c}` for the class name.
    """
    names = ("templates.txt", "zeroshot_classification_templates.txt")
    file = next((place / name for place in places for name in names if (place / name).exists()), None)
    if given is not None:
        file = Path(given)
        if str(given) == "imagenet" and not file.exists():
            return list(imagenet_templates())
        if not file.exists():
            raise ValueError(f"{file}: no such file of templates")
    if file is None:
        return list(imagenet_templates() if of_imagenet else DEFAULT_TEMPLATES)
    lines = [line for line in read_lines(file, "templates") if line]
    bad = next((line for line in lines if "{c}" not in line), None)
    if bad is not None:
        raise ValueError(f"{file}: each line needs {{c}} for the class name, {bad!r} has none")
    return lines


def read_lines(file: Path | str, what: str) -> list[str]:
    """Return the lines of a file, stripped, without blank lines at the end.

    Raises:
        ValueError: when the file does not exist, is empty, or is not text.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file}: a folder, not a file of {what}" if file.exists() else f"{file}: no such file")
    lines = [line.strip() for line in lines_of(read_text(file).rstrip())]
    if not any(lines):
        raise ValueError(f"{file}: contains no {what}")
    return lines
