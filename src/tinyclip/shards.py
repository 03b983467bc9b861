"""Shards on disk: finding, indexing and reading them, whatever state they are in.

A shard is a `.tar` of samples `KEY.jpg|jpeg|png|webp` + `KEY.txt|json`, as img2dataset writes them. Captions:
`captions` (list) or `caption` in the JSON, else the lines of the text file; of several, one is drawn a visit.
What cannot be used is left out and listed (see `faults`).
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from PIL import Image

from tinyclip.faults import Fault, Skipped
from tinyclip.finding import ENDINGS
from tinyclip.inputs import is_unicode
from tinyclip.transforms import open_image

USUAL = ("jpg", "jpeg", "png", "webp")
IMAGE_TYPES = (*USUAL, *sorted({ending[1:] for ending in ENDINGS}.difference(USUAL)))
LARGEST_SAMPLE = 2**29  # bytes; a header that claims more is damaged, and reading it might take all memory
LONGEST_END = 2**20  # bytes of zeros that may end a tar
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error)


def find_shards(folder: str | Path) -> list[Path]:
    """The `.tar` and `.tar.gz` shards of a folder, sorted; of `x.tar` and `x.tar.gz` the one that is newer.

    Raises:
        ValueError: when the folder is missing or holds no shards.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such data folder")
    packed = [p for p in folder.glob("*.tar.gz") if not unpacked(p)]
    stale = {p.with_suffix("") for p in packed}
    shards = sorted([*packed, *(p for p in folder.glob("*.tar") if p not in stale)])
    if not shards:
        raise ValueError(f"{folder}: no .tar shards in it; make some with `tinyclip data pack`")
    return shards


def unpacked(packed: Path) -> bool:
    """Whether a `.tar.gz` has its plain `.tar` beside it, no older than itself."""
    plain = packed.with_suffix("")
    return plain.exists() and plain.stat().st_mtime >= packed.stat().st_mtime


# --- one shard --------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A sample as it stands in a shard: its parts by lower-case file ending."""

    key: str
    offset: int  # of its first header, bytes
    parts: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    fault: Fault | None = None  # why it is to be left out

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts.values())


def entries(tar: tarfile.TarFile) -> Iterator[Entry]:
    """The samples of an open tar as far as they are whole.

    Raises:
        Fault: after the last whole one, when the tar does not end as it should.
    """
    seen: dict[str, int] = {}
    entry: Entry | None = None
    problem: str | None = None
    number = 0
    while problem is None:
        try:
            member = tar.next()
        except TAR_ERRORS as error:
            member, problem = None, words(error)
        tar.members.clear()  # type: ignore[attr-defined]  # else they fill memory
        name = split_name_re.match(member.name) if member and member.isreg() else None
        if name is not None and skip_meta_re.match(name.string):
            name = None
        part = name.group(2).lower() if name else ""
        if entry and (member is None or (name and (name.group(1) != entry.key or part in entry.parts))):
            # The last sample before a damage counts when all of its bytes are there.
            if member is not None or _has(tar, entry):
                entry.fault = _fault(entry, number + 1, seen)
                number += 1
                seen.setdefault(entry.key, number)
                yield entry
            else:
                problem = problem or "unexpected end of data"
            entry = None
        if member is None:
            break
        if name:
            entry = entry or Entry(name.group(1), member.offset)
            entry.parts[part] = member
    problem = problem or _end_problem(tar)
    if problem:
        raise Fault("truncated_shard" if number else "damaged_shard", f"ends after {number:,} samples ({problem})")


def _fault(entry: Entry, number: int, seen: dict[str, int]) -> Fault | None:
    if entry.key in seen:
        return Fault("duplicate_key", f"sample {number} has the key of sample {seen[entry.key]}")
    if entry.size > LARGEST_SAMPLE:
        return Fault("huge_image", f"{entry.size:,} bytes ({LARGEST_SAMPLE:,} at most)")
    return None


def _has(tar: tarfile.TarFile, entry: Entry) -> bool:
    """Whether the last byte of a sample is there."""
    last = list(entry.parts.values())[-1]
    if last.size == 0:
        return True
    assert tar.fileobj is not None
    try:
        tar.fileobj.seek(last.offset_data + last.size - 1)
        return len(tar.fileobj.read(1)) == 1
    except TAR_ERRORS:
        return False


def _end_problem(tar: tarfile.TarFile) -> str | None:
    """What is wrong after the last member, which `tarfile` itself passes over: a tar ends with blocks of zeros."""
    assert tar.fileobj is not None
    try:
        tar.fileobj.seek(tar.offset)
        rest = tar.fileobj.read(LONGEST_END + 1)
    except TAR_ERRORS as error:
        return words(error)
    if len(rest) < tarfile.BLOCKSIZE:
        return "no end mark"
    return "no valid header follows" if len(rest) > LONGEST_END or rest.strip(b"\0") else None


def words(error: Exception) -> str:
    """What an error of a file system or a decoder says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def open_shard(shard: Path) -> tarfile.TarFile:
    """Raises `Fault` for what is no tar."""
    try:
        return tarfile.open(shard, "r:gz" if shard.suffix == ".gz" else "r:")
    except TAR_ERRORS as error:
        raise Fault("damaged_shard", f"damaged shard ({words(error)})") from None


def read_shards(folder: str | Path, skipped: list[Skipped] | None = None) -> Iterator[dict[str, Any]]:
    """Every raw sample of a folder's shards once, in order: `__key__`, `__shard__`, and bytes by file ending.

    Args:
        skipped: gets what is left out because of faults in the shards.

    Raises:
        ValueError: when the folder holds no shards; without `skipped` also for the first fault, naming it.
    """

    for shard in find_shards(folder):
        yield from read_shard(shard, skipped)


def read_shard(
    shard: Path, skipped: list[Skipped] | None = None, wanted: Callable[[int], bool] = lambda number: True
) -> Iterator[dict[str, Any]]:
    """`read_shards` of a single one.

    Args:
        wanted: of which samples, numbered from 0, the files are read; others come with `__key__` and `__shard__` alone.
    """

    def leave_out(key: str, fault: Fault) -> None:
        if skipped is None:
            raise ValueError(f"{shard}: {f'{key}: ' if key else ''}{fault}") from None
        skipped.append(Skipped(shard.name, key, fault.cause, fault.reason))

    try:
        with open_shard(shard) as tar:
            found, number = False, 0
            for entry in entries(tar):
                found = True
                if entry.fault:
                    leave_out(entry.key, entry.fault)
                else:
                    files = _bytes_of(tar, entry) if wanted(number) else {}
                    yield {"__key__": entry.key, "__shard__": shard.name} | files
                    number += 1
            if not found:
                raise Fault("empty_shard", "an empty shard")
    except Fault as fault:
        leave_out("", fault)


def _bytes_of(tar: tarfile.TarFile, entry: Entry) -> dict[str, bytes]:
    try:
        return {ending: tar.extractfile(part).read() for ending, part in entry.parts.items()}  # type: ignore[union-attr]
    except TAR_ERRORS as error:
        raise Fault("truncated_shard", f"ends at {entry.key} ({words(error)})") from None


# --- what a raw sample holds ------------------------------------------------------------------------------------


def captions_of(sample: dict[str, Any]) -> list[str]:
    """Captions of a raw sample (file endings -> bytes); empty when there is none.

    Raises:
        Fault: when the text is no UTF-8 or the JSON does not parse, or has another type there.
    """
    data = info_of(sample)
    found: Any = data.get("captions") or data.get("caption")
    if not found and "txt" in sample:
        try:
            found = sample["txt"].decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise Fault("bad_encoding", f"caption cannot be read ({error})") from None
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list | None):
        raise Fault("bad_json", f"caption is {type(found).__name__}, not text")
    captions = [c.strip() for c in found or [] if isinstance(c, str) and c.strip()]
    if not captions and not data and "json" in sample and (other := json.loads(sample["json"])) != {}:
        raise Fault("bad_json", f"JSON is {type(other).__name__}, not an object")
    if not all(map(is_unicode, captions)):
        raise Fault("bad_encoding", "caption has half a surrogate pair")
    return captions


def all_captions(folder: str | Path) -> Iterator[str]:
    """Every readable caption of a folder's shards; samples without one are what training would skip too."""
    for sample in read_shards(folder, []):
        with contextlib.suppress(Fault):
            yield from captions_of(sample)


def image_of(sample: dict[str, Any], at_least: int | None = None) -> Image.Image:
    """The decoded picture of a raw sample; `Fault` when there is none or it is damaged.

    Args:
        at_least: see `open_image`.
    """
    for ending in IMAGE_TYPES:
        if ending in sample:
            return open_image(io.BytesIO(sample[ending]), at_least)
    raise Fault("no_image", f"no picture (looked for {', '.join(USUAL)} and others)")


def check(folder: str | Path, progress: Callable[[], None] = lambda: None) -> tuple[int, list[Skipped]]:
    """Open every sample of a folder as training would: the number of good ones, and what is wrong with the rest.

    Args:
        progress: called after every sample.

    Raises:
        ValueError: when the folder holds no shards.
    """
    good, skipped = 0, list[Skipped]()
    for sample in read_shards(folder, skipped):
        try:
            if not captions_of(sample):
                raise Fault("no_caption", "no caption")
            image_of(sample)
            good += 1
        except Fault as fault:
            skipped.append(Skipped(sample["__shard__"], sample["__key__"], fault.cause, fault.reason))
        progress()
    return good, skipped


def info_of(sample: dict[str, Any]) -> dict[str, Any]:
    """The JSON part of a raw sample, or {}; `Fault` when it does not parse."""
    try:
        data = json.loads(sample["json"]) if "json" in sample else {}
    except UnicodeDecodeError as error:
        raise Fault("bad_encoding", f"caption cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise Fault("bad_json", f"caption cannot be read ({error})") from None
    return data if isinstance(data, dict) else {}
