"""Locate tensor values in PyTorch files. Files are memory-mapped; values are read only when a tensor is requested."""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyclip.zoo.unpickle import Damaged, Inert

STORAGES = {
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float": torch.float32,
    "Double": torch.float64,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}


class Refused(Exception):
    """The file asks for something that we refuse; the message says what."""


@dataclass(eq=False, frozen=True)
class Storage:
    """Location of a tensor's values."""

    source: Any  # a `ZipStorages` or `StreamStorages`
    key: str
    dtype: torch.dtype | None  # None: unknown here
    length: int
    start: int = 0  # offset of a view into another storage


@dataclass(eq=False, frozen=True)
class Stored:
    """A tensor that has not been read yet."""

    storage: Storage
    offset: Any
    size: Any
    stride: Any
    dtype: torch.dtype | None

    def read(self, name: str) -> Tensor:
        """Return the tensor on the CPU, without a copy if it is aligned.

        Raises:
            Refused: if the storage is missing, or the tensor extends beyond it.
        """
        place, whole = self.storage, self.dtype
        numbers = (self.offset, *self.size, *self.stride)
        if whole is None or len(self.size) != len(self.stride):
            raise Refused(f"{name} is not a plain tensor")
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        count = math.prod(self.size)
        if any(n < 0 for n in numbers) or (count and self.offset + last >= place.length) or count > place.length:
            raise Refused(f"{name} claims more values than the file has")
        if not count:
            return torch.empty(self.size, dtype=whole)
        data = place.source.storage(place.key)
        expected = (place.start + place.length) * whole.itemsize
        if len(data) < expected or (not place.start and len(data) != expected):
            raise Refused(f"storage {place.key} has {len(data):,} bytes, not {expected:,}")
        if data.data_ptr() % whole.itemsize:
            data = data.clone()
        return data[place.start * whole.itemsize : expected].view(whole).as_strided(self.size, self.stride, self.offset)


def is_index(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


class StorageSource:
    """A file's storages by key."""

    def persistent(self, pid: Any) -> Any:
        """Return the storage for `pid`: ("storage", class, key, device, length); the old format adds a view (key,
        offset, length)."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not is_index(pid[4]):
            return Inert("a persistent id", (pid,))
        name = pid[1].name if isinstance(pid[1], Inert) else ""
        dtype = STORAGES.get(name.rpartition(".")[2].removesuffix("Storage")) if name.startswith("torch.") else None
        if name.endswith(".UntypedStorage"):
            dtype = torch.uint8
        view = pid[5] if len(pid) > 5 else None
        start, length = (view[1], view[2]) if isinstance(view, tuple) and len(view) == 3 else (0, pid[4])
        if not is_index(start) or not is_index(length) or min(start, length) < 0:
            return Inert("a view of a storage", (view,))
        storage = Storage(self, str(pid[2]), dtype, length, start)
        if dtype is not None:
            self._found(storage.key, dtype)
        return storage

    def _found(self, key: str, dtype: torch.dtype) -> None:
        """Note the dtype of a storage."""


class ZipStorages(StorageSource):
    """A PyTorch zip archive: its parts are never compressed and lie in one folder, whose name is arbitrary."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        with zipfile.ZipFile(path) as archive:
            self._parts = {item.filename: item for item in archive.infolist()}
        roots = sorted((name.removesuffix("data.pkl") for name in self._parts if name.endswith("/data.pkl")), key=len)
        if not roots:
            raise Damaged("a zip archive without data.pkl")
        self._root = roots[0]
        self._summed = self._is_whole("data.pkl")  # PyTorch can be set to write no checksums
        if self.has("byteorder") and self.small("byteorder") != b"little":
            raise Refused("its numbers are big-endian")

    def has(self, name: str) -> bool:
        return self._root + name in self._parts

    def small(self, name: str) -> bytes:
        start, end = self._span(name)
        return self._mapped[start:end]

    def storage(self, key: str) -> Tensor:
        start, end = self._span(f"data/{key}")
        if self._summed and not self._is_whole(f"data/{key}"):
            raise Refused(f"damaged, its data/{key} does not match its checksum")
        return _bytes_of(self._mapped, start, end - start)

    def _is_whole(self, name: str) -> bool:
        start, end = self._span(name)
        with memoryview(self._mapped) as whole, whole[start:end] as part:
            return zlib.crc32(part) == self._parts[self._root + name].CRC

    def _span(self, name: str) -> tuple[int, int]:
        """Return the start and end of a part in the file."""
        item = self._parts.get(self._root + name)
        if item is None:
            raise Refused(f"damaged, {name} is not in it")
        if item.compress_type or item.flag_bits & 1:  # so nothing unpacks to more than the file's size
            raise Refused(f"{item.filename} is compressed, which PyTorch never does")
        header = self._mapped[item.header_offset : item.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise Refused(f"damaged, {name} is not where its directory says")
        start = item.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + item.file_size > len(self._mapped):
            raise Refused(f"damaged, {name} ends after the file")
        return start, start + item.file_size


class StreamStorages(StorageSource):
    """Storages after the pickles of a non-zip file; each is its number of values, followed by the values."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._spans: dict[str, tuple[int, int]] = {}
        self._sizes: dict[str, int] = {}  # bytes per value

    def _found(self, key: str, dtype: torch.dtype) -> None:
        self._sizes[key] = dtype.itemsize

    def find(self, keys: Any, start: int) -> None:
        """Record where each storage lies."""
        for key in keys if isinstance(keys, list) else ():
            header = self._data[start : start + 8]
            if len(header) < 8:
                raise Damaged("it ends within its storages")
            if key not in self._sizes:
                raise Damaged("it has a storage of an unknown type")
            length = int.from_bytes(header, "little", signed=True) * self._sizes[key]
            if length < 0 or start + 8 + length > len(self._data):
                raise Damaged("it ends within its storages")
            self._spans[key] = (start + 8, length)
            start += 8 + length

    def storage(self, key: str) -> Tensor:
        if key not in self._spans:
            raise Refused(f"damaged, storage {key} is not in it")
        return _bytes_of(self._data, *self._spans[key])


def _bytes_of(data: Any, start: int, length: int) -> Tensor:
    """Return bytes of a file as a flat uint8 tensor, without a copy."""
    return torch.frombuffer(data, dtype=torch.uint8, count=length, offset=start) if length else torch.empty(0).byte()
