"""Find, check and read shards on disk, whatever state they are in.

A shard is a `.tar` of samples `KEY.jpg|jpeg|png|webp` + `KEY.txt|json`, as img2dataset writes them. Captions:
`captions` (list) or `caption` in the JSON, else the lines of the text file; if there are several, each visit draws one.
Unusable samples are left out and listed (see `faults`).
"""

from __future__ import annotations

import contextlib
import copy
import posixpath
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re

from tinyclip.common.faults import Fault, Skipped
from tinyclip.data.samples import IMAGE_TYPES, TEXT_TYPES, captions_of, image_of, no_image, part_of

LARGEST_SAMPLE = 2**29  # bytes; a header that claims more is damaged, and could exhaust memory
LONGEST_END = 2**20  # bytes of zeros at the end of a tar
LONGEST_NAME = 2**20  # bytes of a header's name and other metadata
TAR_ERRORS = (
    *(tarfile.TarError, OSError, EOFError, ValueError, zlib.error),
    *(IndexError, OverflowError, RecursionError),  # `tarfile` raises these for corrupt headers
)


def find_shards(folder: str | Path) -> list[Path]:
    """Return the `.tar` and `.tar.gz` shards of a folder, sorted; if both `x.tar` and `x.tar.gz` exist, the newer one.

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
        raise ValueError(f"{folder}: contains no .tar shards; make some with `tinyclip data pack`")
    return shards


def unpacked(packed: Path) -> bool:
    """Whether a `.tar.gz` has an unpacked `.tar` next to it that is not older."""
    plain = packed.with_suffix("")
    return plain.exists() and plain.stat().st_mtime >= packed.stat().st_mtime


# --- one shard --------------------------------------------------------------------------------------------------


class Header(tarfile.TarInfo):
    """A tar header with checks that `tarfile` lacks: a negative size would make it loop forever, and a long name is
    read into memory whole."""

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
    """A sample in a shard: its parts by lower-case file ending."""

    key: str
    offset: int  # of its first header, bytes
    end: int = 0  # of its last part, bytes
    linked: set[str] = field(default_factory=set)  # parts that link to the data of an earlier member
    parts: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    fault: Fault | None = None  # why to leave it out

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts.values())


def entries(tar: tarfile.TarFile) -> Iterator[Entry]:
    """Yield the intact samples of an open tar.

    Raises:
        Fault: after the last intact sample, when the tar does not end properly.
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
        if member and (member.size < 0 or tar.offset <= member.offset):  # from an extended header
            member, problem = None, "negative size"
        tar.members.clear()  # type: ignore[attr-defined]  # else they accumulate in memory
        linked = member is not None and (member.islnk() or member.issym())
        member = links.resolved(member) if member else None
        ended = member is None and not linked
        name = split_name_re.match(member.name) if member and member.isreg() else None
        if name is not None and skip_meta_re.match(name.string):
            name = None
        part = name.group(2).lower() if name else ""
        if entry and (ended or (name and (name.group(1) != entry.key or part in entry.parts))):
            # The last sample before the damage counts if it is complete.
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
    """Resolves links in a tar, to earlier members of the same tar only."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[int, int]] = {}  # first byte and size of every plain member so far

    def resolved(self, member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        """Return the member itself or, for a link, one with its name and the target's data; None if broken."""
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
        return Fault("duplicate_key", f"sample {number} has the same key as sample {seen[entry.key]}")
    if entry.size > LARGEST_SAMPLE:
        return Fault("huge_image", f"{entry.size:,} bytes ({LARGEST_SAMPLE:,} at most)")
    return None


def _has(tar: tarfile.TarFile, entry: Entry) -> bool:
    """Whether a sample is complete, up to its last byte."""
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
    """Say what is wrong after the last member, which `tarfile` ignores: a tar must end with blocks of zeros."""
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
    """Return the text of a file system's or decoder's error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def open_shard(shard: Path) -> tarfile.TarFile:
    """Open a shard. Raises `Fault` if it is not a tar."""
    check_is_file(shard)
    try:
        return tarfile.open(shard, "r:gz" if shard.suffix == ".gz" else "r:", tarinfo=Header)
    except TAR_ERRORS as error:
        raise Fault("damaged_shard", f"damaged shard ({misnamed(shard) or words(error)})") from None


def check_is_file(shard: Path) -> None:
    """Raise `Fault` for a broken link, and for a pipe, which might never end."""
    try:
        if not stat.S_ISREG(shard.stat().st_mode):
            raise Fault("damaged_shard", "damaged shard (a folder, a pipe or a device, not a file)")
    except OSError as error:
        raise Fault("damaged_shard", f"damaged shard ({error.strerror})") from None


def misnamed(shard: Path) -> str | None:
    """Describe a file whose content does not match its extension."""
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
    """Yield each raw sample of a folder's shards, in order: `__key__`, `__shard__`, and bytes by file ending.

    Args:
        skipped: list that receives what is left out because of faults in the shards.

    Raises:
        ValueError: when the folder holds no shards; without `skipped`, also on the first fault, naming it.
    """

    for shard in find_shards(folder):
        yield from read_shard(shard, skipped)


def read_shard(
    shard: Path, skipped: list[Skipped] | None = None, wanted: Callable[[int], bool] = lambda number: True
) -> Iterator[dict[str, Any]]:
    """Do what `read_shards` does for a single shard.

    Args:
        wanted: whether to read a sample's files, by its number from 0; others get only `__key__` and `__shard__`.
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


def all_captions(folder: str | Path) -> Iterator[str]:
    """Yield every readable caption of a folder's shards; training would also skip samples without one."""
    for sample in read_shards(folder, []):
        with contextlib.suppress(Fault):
            yield from captions_of(sample)


def lack_of(entry: Entry) -> Fault | None:
    """Return why training cannot use a sample, judging by its headers."""
    if part_of(entry.parts, IMAGE_TYPES) is None:
        return no_image(entry.key, entry.parts)
    if not any(part_of(entry.parts, (ending,)) for ending in TEXT_TYPES):
        return Fault("no_caption", f"no caption (looked for {', '.join(TEXT_TYPES)})")
    return None


def check(folder: str | Path, progress: Callable[[], None] = lambda: None) -> tuple[int, list[Skipped]]:
    """Open every sample of a folder as in training. Return the number of good ones, and the faults of the rest.

    Args:
        progress: called after every sample.

    Raises:
        ValueError: when the folder holds no shards.
    """
    skipped = list[Skipped]()
    return _checked(read_shards(folder, skipped), skipped, progress)


def check_some(folder: str | Path, shards: int = 16, samples: int = 4) -> tuple[int, list[Skipped]]:
    """Do the same for the first samples of evenly spaced shards."""
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
