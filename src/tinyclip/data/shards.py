"""Shards on disk: finding, indexing and reading them, whatever state they are in.

A shard is a `.tar` of samples `KEY.jpg|jpeg|png|webp` + `KEY.txt|json`, as img2dataset writes them. Captions:
`captions` (list) or `caption` in the JSON, else the lines of the text file; of several, one is drawn a visit.
What cannot be used is left out and listed (see `faults`).
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import posixpath
import stat
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from PIL import Image

from tinyclip.common.faults import Fault, Skipped
from tinyclip.common.files import lines_of
from tinyclip.data.picture_files import ENDINGS
from tinyclip.inputs.batching import is_unicode
from tinyclip.inputs.transforms import open_image

USUAL = ("jpg", "jpeg", "png", "webp")
IMAGE_TYPES = (*USUAL, *sorted({ending[1:] for ending in ENDINGS}.difference(USUAL)))
TEXT_TYPES = ("txt", "json")
RENAME = "a key ends at the first dot of a name, so rename them with dashes for dots (photo-1.jpg for photo.1.jpg)"
LARGEST_SAMPLE = 2**29  # bytes; a header that claims more is damaged, and reading it might take all memory
LONGEST_END = 2**20  # bytes of zeros that may end a tar
LONGEST_NAME = 2**20  # bytes that a header may take for a name and what else is told of a member
TAR_ERRORS = (
    *(tarfile.TarError, OSError, EOFError, ValueError, zlib.error),
    *(IndexError, OverflowError, RecursionError),  # `tarfile` raises these for headers that make no sense
)


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


class Header(tarfile.TarInfo):
    """A header of which `tarfile` is not to believe everything: a negative size would send it back for ever, and a
    long name is read into memory whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.InvalidHeaderError("negative size")  # type: ignore[attr-defined]
        if header.type in EXTENSIONS and header.size > LONGEST_NAME:
            raise tarfile.InvalidHeaderError("a name of over 1 MiB")  # type: ignore[attr-defined]
        return header


EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


@dataclass
class Entry:
    """A sample as it stands in a shard: its parts by lower-case file ending."""

    key: str
    offset: int  # of its first header, bytes
    end: int = 0  # of its last part, bytes
    linked: set[str] = field(default_factory=set)  # parts that are links, and have the bytes of an earlier member
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
    links = _Links()
    entry: Entry | None = None
    problem: str | None = None
    number = 0
    while problem is None:
        try:
            member = tar.next()
        except TAR_ERRORS as error:
            member, problem = None, words(error)
        if member and (member.size < 0 or tar.offset <= member.offset):  # by an extended header
            member, problem = None, "negative size"
        tar.members.clear()  # type: ignore[attr-defined]  # else they fill memory
        linked = member is not None and (member.islnk() or member.issym())
        member = links.resolved(member) if member else None
        ended = member is None and not linked
        name = split_name_re.match(member.name) if member and member.isreg() else None
        if name is not None and skip_meta_re.match(name.string):
            name = None
        part = name.group(2).lower() if name else ""
        if entry and (ended or (name and (name.group(1) != entry.key or part in entry.parts))):
            # The last sample before a damage counts when all of its bytes are there.
            if not ended or _has(tar, entry):
                entry.fault = _fault(entry, number + 1, seen)
                number += 1
                seen.setdefault(entry.key, number)
                yield entry
            else:
                problem = problem or "unexpected end of data"
            entry = None
        if ended:
            break
        if name and member:
            entry = entry or Entry(name.group(1), member.offset)
            entry.parts[part] = member
            entry.end = tar.offset
            if linked:
                entry.linked.add(part)
    problem = problem or _end_problem(tar)
    if problem:
        raise Fault("truncated_shard" if number else "damaged_shard", f"ends after {number:,} samples ({problem})")


class _Links:
    """What links in a tar lead to: earlier members of the same tar, and nothing else."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[int, int]] = {}  # first byte and size of every plain member so far

    def resolved(self, member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        """The member itself, or of a link a member of its name with the other's bytes; None when that is not there."""
        if member.isreg() and not member.issparse():
            self.places[posixpath.normpath(member.name)] = member.offset_data, member.size
        if not (member.islnk() or member.issym()):
            return member
        folder = posixpath.dirname(member.name) if member.issym() else ""
        place = self.places.get(posixpath.normpath(posixpath.join(folder, member.linkname)))
        if place is None:
            return None
        self.places[posixpath.normpath(member.name)] = place
        found = copy.copy(member)
        found.type, (found.offset_data, found.size) = tarfile.REGTYPE, place
        return found


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
    check_is_file(shard)
    try:
        return tarfile.open(shard, "r:gz" if shard.suffix == ".gz" else "r:", tarinfo=Header)
    except TAR_ERRORS as error:
        raise Fault("damaged_shard", f"damaged shard ({misnamed(shard) or words(error)})") from None


def check_is_file(shard: Path) -> None:
    """Raises `Fault` for a link to nothing, and for a pipe, which might never end."""
    try:
        if not stat.S_ISREG(shard.stat().st_mode):
            raise Fault("damaged_shard", "damaged shard (no file, but a folder, a pipe or a device)")
    except OSError as error:
        raise Fault("damaged_shard", f"damaged shard ({error.strerror})") from None


def misnamed(shard: Path) -> str | None:
    """What a file is whose ending says something else."""
    try:
        with shard.open("rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if shard.suffix != ".gz" and start.startswith(b"\x1f\x8b"):
        return f"compressed with gzip; name it {shard.name}.gz"
    if shard.suffix == ".gz" and start[257:262] == b"ustar":
        return f"not compressed; name it {shard.name.removesuffix('.gz')}"
    return None


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
    """Captions of a raw sample (file endings -> bytes): of its JSON, else the lines of its text; empty when there is
    none.

    Raises:
        Fault: when there is none because the text is no UTF-8, or the JSON does not parse, or has another type there.
    """
    problem: Fault | None = None
    for read in (_json_captions, _text_captions):
        try:
            if captions := read(sample):
                return captions
        except Fault as fault:
            problem = problem or fault
    if problem:
        raise problem
    return []


def _json_captions(sample: dict[str, Any]) -> list[str]:
    data = info_of(sample)
    found = data.get("captions") or data.get("caption")
    name = "json" if data else part_of(sample, ("json",))
    if name in sample and not data and (other := json.loads(sample[name])) != {}:
        raise Fault("bad_json", f"JSON is {type(other).__name__}, not an object")
    if found and not isinstance(found, str | list):
        raise Fault("bad_json", f"caption is {type(found).__name__}, not text")
    return _usable([found] if isinstance(found, str) else found or [])


def _text_captions(sample: dict[str, Any]) -> list[str]:
    name = part_of(sample, ("txt",))
    try:
        return _usable(lines_of(sample[name].decode("utf-8-sig"))) if name else []
    except UnicodeDecodeError as error:
        raise Fault("bad_encoding", f"caption cannot be read ({error})") from None


def _usable(found: list[Any]) -> list[str]:
    captions = [c.strip() for c in found if isinstance(c, str) and c.strip()]
    if not all(map(is_unicode, captions)):
        raise Fault("bad_encoding", "caption has half a surrogate pair")
    return captions


def part_of(sample: Collection[str], types: Sequence[str]) -> str | None:
    """The ending of a sample's part of one of these types: just that, else the only one that ends in it, as the
    pictures of `key.input.jpg` and `key.outputs.txt` do. A text and a JSON beside each other are taken by their plain
    endings alone, so that other data in a sample is no caption."""
    plain = next((ending for ending in types if ending in sample), None)
    if plain or (types[0] in TEXT_TYPES and any(ending in sample for ending in TEXT_TYPES)):
        return plain
    found = long_endings(sample, types)
    return found[0] if len(found) == 1 else None


def long_endings(sample: Collection[str], types: Sequence[str]) -> list[str]:
    """The endings of several parts, `input.jpg`, of which the last is one of these types."""
    return [ending for ending in sample if "." in ending and ending.rpartition(".")[2] in types]


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
    if ending := part_of(sample, IMAGE_TYPES):
        return open_image(io.BytesIO(sample[ending]), at_least)
    raise no_image(sample.get("__key__", ""), sample)


def no_image(key: str, sample: Collection[str]) -> Fault:
    """Why a sample has no picture to use."""
    if several := long_endings(sample, IMAGE_TYPES):
        return Fault("shared_key", f"{len(several)} pictures share the key {key} ({_some(several)}); {RENAME}")
    return Fault("no_image", f"no picture (looked for {', '.join(USUAL)} and others)")


def lack_of(entry: Entry) -> Fault | None:
    """Why training cannot use a sample, as far as its headers show."""
    if part_of(entry.parts, IMAGE_TYPES) is None:
        return no_image(entry.key, entry.parts)
    if not any(part_of(entry.parts, (ending,)) for ending in TEXT_TYPES):
        return Fault("no_caption", f"no caption (looked for {', '.join(TEXT_TYPES)})")
    return None


def class_of(sample: dict[str, Any]) -> str | None:
    """The class that the JSON of a raw sample says, if it can be read."""
    with contextlib.suppress(Fault):
        return str(info_of(sample).get("class") or "") or None
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def check(folder: str | Path, progress: Callable[[], None] = lambda: None) -> tuple[int, list[Skipped]]:
    """Open every sample of a folder as training would: the number of good ones, and what is wrong with the rest.

    Args:
        progress: called after every sample.

    Raises:
        ValueError: when the folder holds no shards.
    """
    skipped = list[Skipped]()
    return _checked(read_shards(folder, skipped), skipped, progress)


def check_some(folder: str | Path, shards: int = 16, samples: int = 4) -> tuple[int, list[Skipped]]:
    """The same of the first samples of shards here and there."""
    found, skipped = find_shards(folder), list[Skipped]()
    some = found[:: -(-len(found) // shards)]
    return _checked((s for shard in some for s in islice(read_shard(shard, skipped), samples)), skipped, lambda: None)


def _checked(
    samples: Iterator[dict[str, Any]], skipped: list[Skipped], progress: Callable[[], None]
) -> tuple[int, list[Skipped]]:
    good = 0
    for sample in samples:
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
        name = part_of(sample, ("json",))
        data = json.loads(sample[name]) if name else {}
    except UnicodeDecodeError as error:
        raise Fault("bad_encoding", f"caption cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise Fault("bad_json", f"caption cannot be read ({error})") from None
    return data if isinstance(data, dict) else {}
