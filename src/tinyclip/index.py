"""The index of a folder of shards, and reading by it; whatever state the shards are in.

Energon's own files, beside each tar the offsets of its samples and in `.nv-meta` their numbers, with two of ours:
`faults.jsonl`, what is left out, and `ready`, the shards that the index is of. Energon's own indexing takes no
truncated tar and no key twice. Users' tars are never written to.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import struct
import tarfile
import time
import zlib
from bisect import bisect_right
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from megatron.energon import CrudeWebdataset, __version__
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar import TarIndexWriter
from megatron.energon.source_info import SourceInfo

from tinyclip.faults import Fault, Skipped
from tinyclip.files import atomic_directory
from tinyclip.shards import entries, find_shards, open_shard, unpacked, words

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries of a shard that cannot be opened
LENT_AFTER = 100  # samples in a row that a worker could not read
FORMAT = 2  # of our files in .nv-meta
READ_ERRORS = (OSError, tarfile.TarError, ValueError, EOFError, IndexError, struct.error)


def prepare(folder: str | Path, keep: bool = False) -> int:
    """Make a folder of shards ready for training: unpack `.tar.gz` beside themselves, write Energon's index.

    Does nothing when the index is that of the shards as they are. Returns the number of usable samples; `known_faults`
    then has what was left out.

    Args:
        keep: an index whose shards have not changed stays, though some may be gone and others have come, since the
            position of a run counts in it.

    Raises:
        ValueError: for a folder without a usable sample, or of which most repeat a key, or that cannot be written.
    """
    folder = Path(folder)
    meta = folder / ".nv-meta"
    if not _is_current(meta, find_shards(folder), keep):  # before the lock, also where the folder cannot be written
        try:
            with FileLock(folder / ".prepare.lock"):
                damaged = [s for packed in folder.glob("*.tar.gz") if (s := _unpack(packed))]
                if not _is_current(meta, find_shards(folder), keep):  # else another process was faster
                    _index(folder, damaged)
        except OSError as error:
            raise ValueError(f"{folder}: cannot write its index ({error.strerror or error})") from None
    return _usable(meta)


def _unpack(packed: Path) -> Skipped | None:
    """Put the plain `.tar` beside a `.tar.gz`, as far as it is whole; a fault when nothing of it is."""
    plain = packed.with_suffix("")
    if unpacked(packed):
        return None
    temporary = plain.with_name(f".{plain.name}.tmp")
    problem = "no data"
    with gzip.open(packed) as source, temporary.open("wb") as target:
        while True:
            try:
                block = source.read1(2**16)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                problem, block = words(error), b""
            if not block:
                break
            target.write(block)
        size = target.tell()
    if not size:
        temporary.unlink()
        return Skipped(packed.name, "", "damaged_shard", f"damaged shard ({problem})")
    os.utime(temporary, ns=(packed.stat().st_mtime_ns,) * 2)
    temporary.rename(plain)
    return None


def _index(folder: Path, damaged: list[Skipped]) -> None:
    shards, state = sorted(folder.glob("*.tar")), _state(find_shards(folder))
    faults = [asdict(s) for s in damaged]
    counts: dict[str, int] = {}
    if len(shards) > 8:
        try:
            with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                found = list(pool.map(_index_shard, shards))
        except BrokenProcessPool:
            raise ValueError(f"{folder}: a process that indexed shards died, perhaps for lack of memory") from None
    else:
        found = [_index_shard(shard) for shard in shards]
    for shard, (count, left_out) in zip(shards, found, strict=True):
        start = sum(counts.values())
        # Samples are known by their number in the whole index.
        faults += [asdict(s) | ({"sample": start + i} if i is not None else {}) for i, s in left_out]
        if count:
            counts[shard.name] = count
    total, bad = sum(counts.values()), [f for f in faults if "sample" in f]
    if len(bad) == total or 2 * len(bad) > total:
        first = "; ".join(f"{folder / f['shard']}: {f['reason']}" for f in faults[:3])
        what = f"{len(bad):,} of its {total:,} samples cannot be used" if total else "none of its shards can be used"
        raise ValueError(f"{folder}: {what}; {first}")
    with atomic_directory(folder / ".nv-meta") as meta:
        _write(meta / ".info.json", {"energon_version": __version__, "shard_counts": counts})
        _write(meta / "split.yaml", {"split_parts": {"train": list(counts)}, "exclude": []})  # JSON is YAML
        _write(meta / "dataset.yaml", {"__module__": __name__, "__class__": Shards.__name__})
        (meta / "faults.jsonl").write_text("".join(json.dumps(f) + "\n" for f in faults), encoding="utf-8")
        _write(meta / "ready", {"format": FORMAT, "shards": state})


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _index_shard(shard: Path) -> tuple[int, list[tuple[int | None, Skipped]]]:
    """Write Energon's index of a shard, the offsets of its samples. Returns their number, and what is to be left out:
    samples with their place in the shard, or what concerns the shard itself with None."""
    left_out: list[tuple[int | None, Skipped]] = []
    offsets: list[int] = []
    end = 0
    try:
        with open_shard(shard) as tar:
            for entry in entries(tar):
                if entry.fault:
                    left_out.append((len(offsets), _skipped(shard, entry.key, entry.fault)))
                offsets.append(entry.offset)
                last = list(entry.parts.values())[-1]
                end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if not offsets:
            raise Fault("empty_shard", "an empty shard")
    except Fault as fault:
        left_out.append((None, _skipped(shard, "", fault)))
    if offsets:
        with TarIndexWriter(EPath(shard)) as writer:
            for offset in (*offsets, end):
                writer.append(offset)
    return len(offsets), left_out


def _skipped(shard: Path, key: str, fault: Fault) -> Skipped:
    return Skipped(shard.name, key, fault.cause, fault.reason)


def shard_counts(folder: str | Path, keep: bool = False) -> dict[str, int]:
    """Samples of each shard that is read of a folder, bad ones included; it is indexed as `prepare` does."""
    prepare(folder, keep)
    return _counts(Path(folder) / ".nv-meta")


def check_readers(folder: str | Path, workers: int, processes: int) -> None:
    """Whether each process's workers, which share the samples of an indexed folder, get at least one; `ValueError` that
    says what would do when not."""
    samples, readers = sum(_counts(Path(folder) / ".nv-meta").values()), max(1, workers) * processes
    if samples >= readers:
        return
    text = f"{folder}: {samples:,} samples are too few for {processes:,} processes of {max(1, workers):,} workers each"
    most = samples // processes
    mend = f"set `workers` to {most:,} at most" if most else f"start {samples:,} processes at most"
    raise ValueError(f"{text}, as every worker reads samples of its own; {mend}, or add data")


def known_samples(folder: str | Path) -> int | None:
    """Usable samples of a folder that is indexed as it stands, else None; writes nothing."""
    meta = Path(folder) / ".nv-meta"
    return _usable(meta) if meta.exists() and _is_current(meta, find_shards(folder)) else None


def known_faults(folder: str | Path) -> list[Skipped]:
    """What the index of a folder leaves out."""
    return [Skipped(f["shard"], f["key"], f["cause"], f["reason"]) for f in _faults(Path(folder) / ".nv-meta")]


def _faults(meta: Path) -> list[dict[str, Any]]:
    file = meta / "faults.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _usable(meta: Path) -> int:
    return sum(_counts(meta).values()) - sum("sample" in f for f in _faults(meta))


def _counts(meta: Path) -> dict[str, int]:
    counts: dict[str, int] = json.loads((meta / ".info.json").read_text(encoding="utf-8"))["shard_counts"]
    return counts


def _state(shards: list[Path]) -> dict[str, list[int]]:
    """Size and time of every shard."""
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in shards}


def _is_current(meta: Path, shards: list[Path], keep: bool = False) -> bool:
    """Whether the index is whole, of just these shards as they are now; with `keep`, of those of them that it has."""
    try:
        ready = json.loads((meta / "ready").read_text(encoding="utf-8"))
        known = ready["shards"] if ready["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    state = _state(shards)
    if keep:
        both = known.keys() & state.keys()
        return bool(both) and all(known[name] == state[name] for name in both)
    return bool(known == state)


# --- reading by the index ---------------------------------------------------------------------------------------


class Shards(CrudeWebdataset):
    """Energon's data set of raw samples, in which faults of shards are samples with `__fault__` (named by
    `.nv-meta/dataset.yaml`). So the order of samples, and with it a saved position, does not depend on faults."""

    def build(self, worker_rotation_offset: int = 0) -> Any:
        dataset = super().build(worker_rotation_offset)
        known = {f["sample"]: f for f in _faults((self.path / ".nv-meta").local_path()) if "sample" in f}
        dataset.dataset.join_readers = [Patient(reader, known) for reader in dataset.dataset.join_readers]
        return dataset


class Patient:
    """A reader of samples that tries again, with growing pauses, when a shard cannot be opened.

    A shard that stays away costs its pauses once; later samples of it are tried once each, so that it counts again
    when it comes back. Where one after the other is away, as a whole file system may be, only the first is waited for.
    A worker that has no other shard is lent samples of those that others read.
    """

    def __init__(self, reader: Any, known: dict[int, dict[str, Any]]) -> None:
        self.reader, self.known = reader, known
        self.gone: set[str] = set()
        self.missed = 0  # samples in a row

    def __getitem__(self, index: int) -> Any:
        if index in self.known:
            fault = self.known[index]
            return self._instead(index, fault["shard"], fault["key"], Fault(fault["cause"], fault["reason"]))
        shard = self._shard_of(index)
        for pause in (*PAUSES, 0.0):
            try:
                sample = self.reader[index]
                self.gone.discard(shard)
                self.missed = 0
                return sample
            except OSError as error:
                gone = Fault("vanished_shard", f"cannot be read ({words(error)})")
                self._close(shard)
                if self.missed or shard in self.gone:
                    break
                time.sleep(pause)
            except READ_ERRORS as error:
                reason = f"is not as it was when it was indexed ({words(error)})"
                return self._instead(index, shard, f"sample {index}", Fault("damaged_shard", reason))
        self.gone.add(shard)
        self.missed += 1
        lent = self._lent(index) if self.missed > LENT_AFTER else None
        return lent or self._instead(index, shard, f"sample {index}", gone)

    def _lent(self, index: int) -> Any:
        """A sample of the next shard that is there, or None."""
        counts = self.reader.shard_count_cumsum
        for step in range(len(counts) - 1):
            number = (index + step) % (len(counts) - 1)
            other = counts[number] + index % (counts[number + 1] - counts[number])
            if other not in self.known and self._shard_of(other) not in self.gone:
                with contextlib.suppress(*READ_ERRORS):
                    return self.reader[other]
        return None

    def _shard_of(self, index: int) -> str:
        number = bisect_right(self.reader.shard_count_cumsum, index) - 1
        return str(self.reader.tar_filenames[self.reader.shard_tar_file_idxs[number]])

    def _close(self, shard: str) -> None:
        """A handle of a file that cannot be read is of no use."""
        file = self.reader.itar_files_cache.pop(self.reader.tar_filenames.index(shard), None)
        if file is not None:
            with contextlib.suppress(OSError):
                file.fileobj.close()

    def _instead(self, index: int, shard: str, key: str, fault: Fault) -> dict[str, Any]:
        source = SourceInfo(dataset_path=self.reader.base_path, index=index, shard_name=shard, file_names=())
        where = {"__restore_key__": ("Webdataset", index), "__sources__": (source,)}
        return {"__key__": key, "__shard__": shard, "__fault__": fault, **where}
