"""Reading shards by their index while training: a shard that cannot be read costs its samples, not the run."""

from __future__ import annotations

import contextlib
import struct
import tarfile
import time
from bisect import bisect_right
from typing import Any

from megatron.energon import CrudeWebdataset
from megatron.energon.flavors.webdataset.itar import ITarRawSamplePartPointer
from megatron.energon.source_info import SourceInfo

from tinyclip.common.faults import Fault
from tinyclip.data.shard_index import faults_in, rows_in
from tinyclip.data.shards import (
    words,
)

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries of a shard that cannot be opened
LENT_AFTER = 100  # samples in a row that a worker could not read
READ_ERRORS = (OSError, tarfile.TarError, ValueError, EOFError, IndexError, struct.error)


class Shards(CrudeWebdataset):
    """Energon's data set of raw samples, in which faults of shards are samples with `__fault__` (named by
    `.nv-meta/dataset.yaml`). So the order of samples, and with it a saved position, does not depend on faults."""

    def build(self, worker_rotation_offset: int = 0) -> Any:
        dataset = super().build(worker_rotation_offset)
        meta = (self.path / ".nv-meta").local_path()
        known = {f["sample"]: f for f in faults_in(meta) if "sample" in f}
        linked = {row["sample"]: row for row in rows_in(meta / "linked.jsonl")}
        dataset.dataset.join_readers = [Patient(reader, known, linked) for reader in dataset.dataset.join_readers]
        return dataset


class Patient:
    """A reader of samples that tries again, with growing pauses, when a shard cannot be opened.

    A shard that stays away costs its pauses once; later samples of it are tried once each, so that it counts again
    when it comes back. Where one after the other is away, as a whole file system may be, only the first is waited for.
    A worker that has no other shard is lent samples of those that others read.
    """

    def __init__(self, reader: Any, known: dict[int, dict[str, Any]], linked: dict[int, dict[str, Any]]) -> None:
        self.reader, self.known, self.linked = reader, known, linked
        self.gone: set[str] = set()
        self.missed = 0  # samples in a row

    def __getitem__(self, index: int) -> Any:
        if index in self.known:
            fault = self.known[index]
            return self._instead(index, fault["shard"], fault["key"], Fault(fault["cause"], fault["reason"]))
        shard = self._shard_of(index)
        for pause in (*PAUSES, 0.0):
            try:
                sample = self._read(index, shard)
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
                    return self._read(other, self._shard_of(other))
        return None

    def _read(self, index: int, shard: str) -> Any:
        """A sample as Energon reads it, and the parts that are links, which it passes over."""
        linked = self.linked.get(index)
        if linked is None:
            return self.reader[index]
        sample = self._plain(index, shard, linked["key"]) if linked["alone"] else self.reader[index]
        number = self.reader.tar_filenames.index(shard)
        for ending, (offset, size) in linked["parts"].items():
            pointer = ITarRawSamplePartPointer(tar_file_id=number, raw_byte_offset=offset, raw_byte_size=size)
            data, _ = self.reader._get_part_by_raw_sample_pointer(pointer, ending)
            if len(data) != size:
                raise ValueError("unexpected end of data")
            sample[ending] = data
        return sample

    def _plain(self, index: int, shard: str, key: str) -> dict[str, Any]:
        source = SourceInfo(dataset_path=self.reader.base_path, index=index, shard_name=shard, file_names=())
        where = {"__restore_key__": ("Webdataset", index), "__sources__": (source,)}
        return {"__key__": key, "__shard__": shard, **where}

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
        return self._plain(index, shard, key) | {"__fault__": fault}
