"""Build and read the index of a folder of shards, whatever state the shards are in.

The index consists of Energon's files (the sample offsets next to each tar, and the sample counts in `.nv-meta`) and two
of ours: `faults.jsonl` lists what is left out, and `ready` lists the indexed shards. Energon's own indexing accepts
neither truncated tars nor duplicate keys. Users' tars are never written to.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import shutil
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.energon import __version__
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar import TarIndexWriter

from tinyclip.common.faults import Fault, Skipped, Unusable
from tinyclip.common.files import in_words, remove_halves, replacing, write_atomically
from tinyclip.common.locks import Lock
from tinyclip.common.progress import ended, tell_bytes, track
from tinyclip.data.samples import IMAGE_TYPES, RENAME, long_endings, part_of
from tinyclip.data.shards import (
    Entry,
    check_is_file,
    entries,
    find_shards,
    lack_of,
    misnamed,
    open_shard,
    unpacked,
    words,
)
from tinyclip.version import __version__ as own_version

FORMAT = 3  # of our files in .nv-meta
# The dataset class with which Energon opens the folder.
READER = {"__module__": "tinyclip.data.shard_reader", "__class__": "Shards"}
KEPT_FORMATS = (2, FORMAT)  # formats with which a run can be resumed
MOST_TIMES, FREE_SIZE = 100, 2**28  # most that a .tar.gz may unpack to: times its size, or bytes


def prepare(folder: str | Path, keep: bool = False) -> int:
    """Make a folder of shards ready for training: unpack each `.tar.gz` next to itself, write Energon's index.

    Does nothing when the index is up to date. Returns the number of usable samples; `known_faults` then lists what was
    left out.

    Args:
        keep: keep an index whose shards are unchanged, even if shards were removed or added, since the position of a
            run refers to it.

    Raises:
        ValueError: when the folder has no usable sample, most of its samples cannot be used, or it cannot be written.
    """
    folder = Path(folder)
    meta = folder / ".nv-meta"
    # Checked before taking the lock, so that it also works in a read-only folder.
    if not (_is_current(meta, find_shards(folder), keep) and _names_reader(meta)):
        try:
            _check_ours(meta)
            with Lock(folder / ".prepare.lock"):
                damaged = [s for packed in folder.glob("*.tar.gz") if (s := _unpack(packed))]
                if not _is_current(meta, find_shards(folder), keep):  # else another process has just indexed it
                    _index(folder, damaged)
                else:
                    _write(meta / "dataset.yaml", READER)  # an older version's index names another class
        except OSError as error:
            raise ValueError(f"{folder}: cannot write its index ({in_words(error)})") from None
    return _usable(meta)


def _unpack(packed: Path) -> Skipped | None:
    """Unpack a `.tar.gz` to a `.tar` next to it, as far as it is readable; return a fault if none of it is."""
    plain = packed.with_suffix("")
    remove_halves(plain)
    if unpacked(packed):
        return None
    try:
        check_is_file(packed)
        with replacing(plain) as temporary:
            size, problem = _gunzip(packed, temporary)
            if not size:
                raise Fault("damaged_shard", f"damaged shard ({problem})")
            os.utime(temporary, ns=(packed.stat().st_mtime_ns,) * 2)
    except Fault as fault:
        return Skipped(packed.name, "", fault.cause, fault.reason)
    return None


def _gunzip(packed: Path, target: Path) -> tuple[int, str]:
    """Unpack the intact part of a file. Return the number of bytes, and why it stopped there.

    Raises:
        ValueError: when it unpacks to more than pictures could, which hardly compress.
        OSError: when it unpacks to more than the free disk space.
    """
    whole, room = packed.stat().st_size, shutil.disk_usage(packed.parent).free
    most, size, problem = max(MOST_TIMES * whole, FREE_SIZE), 0, "no data"
    with packed.open("rb") as raw, gzip.open(raw) as source, target.open("wb") as file:
        while True:
            try:
                block = source.read1(2**16)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                problem, block = misnamed(packed) or words(error), b""
            if not block:
                break
            size += len(block)
            if size > most:
                text = f"its {whole:,} bytes unpack to over {most:,}, too many for a shard of pictures"
                raise ValueError(f"{packed}: {text}; if it is right, unpack it with `gunzip --keep`")
            if size > room:
                raise OSError(errno.ENOSPC, f"{room:,} bytes are free, but it unpacks to more")
            file.write(block)
            tell_bytes(f"unpacking {packed.name}", raw.tell(), whole)
    ended(f"unpacking {packed.name}")
    return size, problem


@dataclass
class _Indexed:
    """The contents of a shard according to its headers."""

    count: int = 0
    left_out: list[tuple[int | None, Skipped]] = field(default_factory=list)  # with their number in the shard, or None
    lacking: list[Skipped] = field(default_factory=list)  # samples without a picture or a caption
    beside: list[Skipped] = field(default_factory=list)  # samples with additional, unused pictures
    linked: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # samples with links, see `Patient`
    apart: list[str] = field(default_factory=list)  # keys whose picture and caption are not adjacent


def _index(folder: Path, damaged: list[Skipped]) -> None:
    shards, state = sorted(folder.glob("*.tar")), _state(find_shards(folder))
    faults = [asdict(s) for s in damaged]
    counts: dict[str, int] = {}
    linked: list[dict[str, Any]] = []
    if len(shards) > 8:
        try:
            with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                found = list(track(pool.map(_index_shard, shards), f"indexing {folder}", len(shards), "shards"))
        except BrokenProcessPool:
            raise ValueError(f"{folder}: a process that indexed shards died, possibly from lack of memory") from None
    else:
        found = [_index_shard(shard) for shard in track(shards, f"indexing {folder}", len(shards), "shards")]
    for shard, one in zip(shards, found, strict=True):
        start = sum(counts.values())
        # Samples are identified by their number in the whole index.
        faults += [asdict(s) | ({"sample": start + i} if i is not None else {}) for i, s in one.left_out]
        linked += [{"sample": start + i} | parts for i, parts in one.linked]
        if one.count:
            counts[shard.name] = one.count
    _check_usable(folder, sum(counts.values()), faults, found)
    meta = folder / ".nv-meta"
    (meta / "ready").unlink(missing_ok=True)  # without it the index is invalid
    _write(meta / "dataset.yaml", READER)  # JSON is YAML
    _write(meta / ".info.json", {"energon_version": __version__, "shard_counts": counts})
    _write(meta / "split.yaml", {"split_parts": {"train": list(counts)}, "exclude": []})
    _write_lines(meta / "faults.jsonl", faults)
    _write_lines(meta / "linked.jsonl", linked)
    _write_lines(meta / "lacking.jsonl", [asdict(s) for one in found for s in one.lacking])
    _write_lines(meta / "beside.jsonl", [asdict(s) for one in found for s in one.beside])
    _write(meta / "ready", {"tinyclip": own_version, "format": FORMAT, "shards": state})


def _check_ours(meta: Path) -> None:
    """Refuse to overwrite an index that is not ours; someone may have made it by hand."""
    if not meta.is_dir() or not any(entry.suffix != ".tmp" for entry in meta.iterdir()):
        return
    try:
        ours = "tinyclip" in json.loads((meta / "dataset.yaml").read_text(encoding="utf-8"))["__module__"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise ValueError(f"{meta} was not written by tinyclip, which keeps its index there; move it away")


def _check_usable(folder: Path, total: int, faults: list[dict[str, Any]], found: list[_Indexed]) -> None:
    """Raise `Unusable` when training would find no usable sample, or more than half are bad."""
    lacking, apart = [s for one in found for s in one.lacking], [key for one in found for key in one.apart]
    bad = [f for f in faults if "sample" in f]
    left = total - len(bad) - len(lacking)
    if left > 0 and 2 * left >= total:
        return
    first = [f"{folder / f['shard']}: {f['reason']}" for f in faults[:3]]
    first += [f"{folder / s.shard}: {s.key}: {s.reason}" for s in lacking[: 3 - len(first)]]
    if apart:
        text = f"picture and caption of {len(apart):,} keys ({apart[0]}) are not adjacent in the tar"
        first = [f"{text}; repack it with `tar --sort=name`"]
    what = f"{total - left:,} of its {total:,} samples cannot be used" if total else "none of its shards can be used"
    raise Unusable(f"{folder}: {what}; {'; '.join(first)}")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value))


def _index_shard(shard: Path) -> _Indexed:
    """Write Energon's index of a shard: the offsets of its samples."""
    found = _Indexed()
    offsets: list[int] = []
    end = 0
    alone: dict[str, str] = {}  # key -> what is missing, for samples with only a picture or only a caption
    try:
        with open_shard(shard) as tar:
            for entry in entries(tar):
                lack = lack_of(entry)
                if lack and alone.setdefault(entry.key, lack.cause) != lack.cause:
                    found.apart.append(entry.key)
                if entry.fault:
                    found.left_out.append((len(offsets), _skipped(shard, entry.key, entry.fault)))
                elif lack:
                    found.lacking.append(_skipped(shard, entry.key, lack))
                elif several := _others(entry):
                    reason = f"{len(several)} more pictures ({several[0]}) share its key; {RENAME}"
                    found.beside.append(_skipped(shard, entry.key, Fault("shared_key", reason)))
                if entry.linked and not entry.fault:
                    found.linked.append((len(offsets), _places(entry)))
                offsets.append(entry.offset)
                tell_bytes(f"indexing {shard.name}", entry.offset, shard.stat().st_size)
                end = entry.end
        if not offsets:
            raise Fault("empty_shard", "an empty shard")
    except Fault as fault:
        found.left_out.append((None, _skipped(shard, "", fault)))
    ended(f"indexing {shard.name}")
    if offsets:
        with TarIndexWriter(EPath(shard)) as writer:
            for offset in (*offsets, end):
                writer.append(offset)
    found.count = len(offsets)
    return found


def _others(entry: Entry) -> list[str]:
    """Return a sample's unused pictures, which share its key because their names have more dots."""
    used = part_of(entry.parts, IMAGE_TYPES)
    return [ending for ending in long_endings(entry.parts, IMAGE_TYPES) if ending != used]


def _places(entry: Entry) -> dict[str, Any]:
    """Locate the data of a sample's links, which Energon ignores: first byte and size by ending."""
    parts = {ending: [entry.parts[ending].offset_data, entry.parts[ending].size] for ending in sorted(entry.linked)}
    return {"key": entry.key, "parts": parts, "alone": len(parts) == len(entry.parts)}


def _skipped(shard: Path, key: str, fault: Fault) -> Skipped:
    return Skipped(shard.name, key, fault.cause, fault.reason)


def shard_counts(folder: str | Path, keep: bool = False) -> dict[str, int]:
    """Return the number of samples in each shard used, including bad ones. Indexes the folder like `prepare`."""
    prepare(folder, keep)
    return _counts(Path(folder) / ".nv-meta")


def check_readers(folder: str | Path, workers: int, processes: int) -> None:
    """Check that every worker of every process gets at least one sample of an indexed folder; otherwise raise a
    `ValueError` that says how to fix it."""
    samples, readers = sum(_counts(Path(folder) / ".nv-meta").values()), max(1, workers) * processes
    if samples >= readers:
        return
    text = f"{folder}: {samples:,} samples are too few for {processes:,} processes of {max(1, workers):,} workers each"
    most = samples // processes
    mend = f"set `workers` to {most:,} at most" if most else f"start {samples:,} processes at most"
    raise ValueError(f"{text}, since every worker reads its own samples; {mend}, or add data")


def known_samples(folder: str | Path) -> int | None:
    """Return the number of usable samples if the folder's index is up to date, else None; writes nothing."""
    meta = Path(folder) / ".nv-meta"
    return _usable(meta) if meta.exists() and _is_current(meta, find_shards(folder)) else None


def known_faults(folder: str | Path) -> list[Skipped]:
    """Return what the index of a folder leaves out."""
    return [_of_row(row) for row in faults_in(Path(folder) / ".nv-meta")]


def known_lacks(folder: str | Path) -> tuple[list[Skipped], list[Skipped]]:
    """Return the samples without a picture or a caption, which `prepare` still counts since the order is that of the
    tars; and the samples with additional, unused pictures."""
    meta = Path(folder) / ".nv-meta"
    lacking, beside = ([_of_row(row) for row in rows_in(meta / f"{name}.jsonl")] for name in ("lacking", "beside"))
    return lacking, beside


def _of_row(row: dict[str, Any]) -> Skipped:
    return Skipped(row["shard"], row["key"], row["cause"], row["reason"])


def faults_in(meta: Path) -> list[dict[str, Any]]:
    return rows_in(meta / "faults.jsonl")


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _usable(meta: Path) -> int:
    return sum(_counts(meta).values()) - sum("sample" in f for f in faults_in(meta))


def _counts(meta: Path) -> dict[str, int]:
    counts: dict[str, int] = json.loads((meta / ".info.json").read_text(encoding="utf-8"))["shard_counts"]
    return counts


def _state(shards: list[Path]) -> dict[str, list[int]]:
    """Return the size and time of every shard; an empty list if it cannot be accessed (a broken link)."""
    state: dict[str, list[int]] = {}
    for shard in shards:
        state[shard.name] = []
        with contextlib.suppress(OSError):
            now = shard.stat()
            state[shard.name] = [now.st_size, now.st_mtime_ns]
    return state


def _names_reader(meta: Path) -> bool:
    try:
        return bool(json.loads((meta / "dataset.yaml").read_text(encoding="utf-8")) == READER)
    except (OSError, ValueError):
        return False


def _is_current(meta: Path, shards: list[Path], keep: bool = False) -> bool:
    """Whether the index is complete and matches these shards; with `keep`, only those in the index must match."""
    try:
        ready = json.loads((meta / "ready").read_text(encoding="utf-8"))
        known = ready["shards"] if ready["format"] in (KEPT_FORMATS if keep else (FORMAT,)) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    state = _state(shards)
    if keep:
        both = known.keys() & state.keys()
        return bool(both) and all(known[name] == state[name] for name in both)
    return bool(known == state)
