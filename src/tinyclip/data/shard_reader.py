"""Read indexed shards during training: an unreadable shard costs its samples, not the run."""

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

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between attempts to open a shard
LENT_AFTER = 100  # consecutive samples that a worker could not read
READ_ERRORS = (OSError, tarfile.TarError, ValueError, EOFError, IndexError, struct.error)


class Shards(CrudeWebdataset):
    """Energon's dataset of raw samples, with shard faults as samples that have `__fault__`. The order of samples, and
    hence a saved position, does not depend on faults. `.nv-meta/dataset.yaml` names this class."""

    def build(self, worker_rotation_offset: int = 0) -> Any:
        dataset = super().build(worker_rotation_offset)
        meta = (self.path / ".nv-meta").local_path()
        known = {f["sample"]: f for f in faults_in(meta) if "sample" in f}
        linked = {row["sample"]: row for row in rows_in(meta / "linked.jsonl")}
        dataset.dataset.join_readers = [Patient(reader, known, linked) for reader in dataset.dataset.join_readers]
        return dataset


class Patient:
    """A sample reader that retries, with growing pauses, when a shard cannot be opened.

    A missing shard costs these pauses once. Its later samples are tried once each, so it is used again when it
    reappears. If several shards in a row are missing (a whole file system, for example), the reader waits only for the
    first. A worker without any other shard borrows samples from the other workers' shards.
    """

    def __init__(self, reader: Any, known: dict[int, dict[str, Any]], linked: dict[int, dict[str, Any]]) -> None:
        self.reader, self.known, self.linked = reader, known, linked
        self.gone: set[str] = set()
        self.missed = 0  # consecutive samples

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
                reason = f"has changed since it was indexed ({words(error)})"
                return self._instead(index, shard, f"sample {index}", Fault("damaged_shard", reason))
        self.gone.add(shard)
        self.missed += 1
        lent = self._lent(index) if self.missed > LENT_AFTER else None
        return lent or self._instead(index, shard, f"sample {index}", gone)

    def _lent(self, index: int) -> Any:
        """Return a sample of the next available shard, or None."""
        counts = self.reader.shard_count_cumsum
        for step in range(len(counts) - 1):
            number = (index + step) % (len(counts) - 1)
            other = counts[number] + index % (counts[number + 1] - counts[number])
            if other not in self.known and self._shard_of(other) not in self.gone:
                with contextlib.suppress(*READ_ERRORS):
                    return self._read(other, self._shard_of(other))
        return None

    def _read(self, index: int, shard: str) -> Any:
        """Read a sample through Energon, and add the linked parts that Energon ignores."""
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
        """Close a shard's file handle after a read error."""
        file = self.reader.itar_files_cache.pop(self.reader.tar_filenames.index(shard), None)
        if file is not None:
            with contextlib.suppress(OSError):
                file.fileobj.close()

    def _instead(self, index: int, shard: str, key: str, fault: Fault) -> dict[str, Any]:
        return self._plain(index, shard, key) | {"__fault__": fault}
