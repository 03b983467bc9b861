"""Read other people's weight files without running any code from them.

PyTorch files are zip archives (including TorchScript) or use the older non-zip format; their pickle is read as plain
data (see `unpickle`). Storages are memory-mapped and read only when a tensor is requested, so an optimiser next to the
weights costs nothing.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tinyclip.zoo.storages import Refused, Storage, Stored, StreamStorages, ZipStorages, is_index
from tinyclip.zoo.unpickle import Inert, printable, unpickle

Kind = Literal["safetensors", "pytorch", "torchscript"]
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of PyTorch's non-zip files
DEEPEST = 64  # nesting limit for dictionaries and modules
# Attributes where a pickled `torch.nn.Module` keeps its parts; its other attributes are hooks.
MODULE_PARTS = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Entry:
    """A value in a file: the keys of the dictionaries or modules around it, and its own key. A tensor may be a
    `Stored`; the value may also be something other than a tensor."""

    around: tuple[str, ...]
    key: str
    value: Any
    attribute: bool = False  # a module's attribute, so not a state dict entry

    @property
    def path(self) -> tuple[str, ...]:
        """All keys, split at dots."""
        return tuple(part for key in (*self.around, self.key) for part in key.split("."))


def read_entries(path: Path) -> tuple[list[Entry], Kind]:
    """Return all values of a safetensors, PyTorch or TorchScript file. Tensors from the last two are `Stored`.

    Raises:
        ValueError: if the file is missing or damaged, or has no tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:9] == b"{" or path.suffix == ".safetensors":  # a safetensors header: its length, then JSON
            kind: Kind = "safetensors"
            entries = [Entry((), printable(key), value) for key, value in load_file(path).items()]
        else:
            data, kind = _pytorch(path, start.startswith(b"PK"))
            if not isinstance(data, dict | Inert):
                kind_of_it = "tensor" if isinstance(data, Stored) else type(data).__name__
                raise Refused(f"it holds a {kind_of_it}, not a state dict")
            entries = list(_entries(data))
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None
    except Exception as error:  # a damaged archive can raise anything
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:150]
        raise ValueError(f"{path}: damaged or not a file of weights ({reason})") from None
    if not any(isinstance(entry.value, Tensor | Stored) for entry in entries):
        named = next((entry.value for entry in entries if isinstance(entry.value, Inert)), None)
        raise ValueError(f"{path}: {_beyond_tensors(named.name) if named else 'no tensors in it'}")
    return entries, kind


def _beyond_tensors(name: str) -> str:
    if name.endswith(("multiarray._reconstruct", "numeric._frombuffer")):
        return (
            "refused, its weights are NumPy arrays and only tensors are read; convert them with torch.from_numpy first"
        )
    return f"refused, it asks for {name}; only tensors are read, and no code from a file is run"


def tensor_of(entry: Entry) -> Tensor:
    """Return an entry's tensor.

    Raises:
        Refused: if it is not a tensor, or does not match its description.
    """
    value = entry.value
    if isinstance(value, Inert):
        if value.name.startswith("torch._utils._rebuild"):
            raise Refused(f"{entry.key} is not a plain tensor ({value.name})")
        raise Refused(f"{entry.key}: {_beyond_tensors(value.name)}")
    if isinstance(value, Stored):
        try:
            return value.read(entry.key)
        except (RuntimeError, TypeError, OverflowError) as error:  # sizes that torch rejects
            raise Refused(f"{entry.key} is not a plain tensor ({str(error).splitlines()[0][:100]})") from None
    if not isinstance(value, Tensor):
        raise Refused(f"{entry.key} is a {type(value).__name__}, not a tensor")
    return value


def _entries(data: Any) -> Iterator[Entry]:
    """Yield the values in nested dictionaries, lists and modules; a container that appears repeatedly is read once."""
    stack: list[tuple[tuple[str, ...], Any, bool]] = [((), data, False)]
    seen = set[int]()
    while stack:
        place, value, attribute = stack.pop()
        inner = _inner(value)
        if inner is None:
            if place and value is not None:  # modules record an absent bias as None
                yield Entry(place[:-1], place[-1], value, attribute)
        elif id(value) not in seen and len(place) < DEEPEST:
            seen.add(id(value))
            named = [
                (printable(str(k)), v) for k, v in inner if isinstance(k, str) or (type(k) is int and abs(k) < 2**63)
            ]
            of_module = isinstance(value, Inert) and value.items is None
            stack += [((*place, name), item, of_module) for name, item in reversed(named)]


def _inner(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the named parts of a container; None for anything else."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple):
        return [(i, item) for i, item in enumerate(value) if not isinstance(item, int | float | str | bytes)]
    if not isinstance(value, Inert) or value.arguments is None:
        return None
    if value.items is not None:
        return list(value.items.items())
    if isinstance(value.state, dict):
        parts = [(key, value.state[key]) for key in MODULE_PARTS if key in value.state]
        return parts or list(value.state.items())
    return None


# --- PyTorch's formats --------------------------------------------------------------------------------------------


def _pytorch(path: Path, zipped: bool) -> tuple[Any, Kind]:
    with path.open("rb") as file:
        # A private mapping: torch needs it writable, but nothing is written to it.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if not zipped:
        return _read_stream(mapped, mapped), "pytorch"
    archive = ZipStorages(path, mapped)
    kind: Kind = "torchscript" if archive.has("constants.pkl") else "pytorch"
    return unpickle(BytesIO(archive.small("data.pkl")), _builders(), archive.persistent), kind


def _builders() -> dict[str, Callable[..., Any]]:
    """Return the functions for the few names that build tensors and dictionaries."""
    return {
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_of_type,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
        "torch._tensor._rebuild_from_type_v2": _typed,
        "torch.storage._load_from_bytes": _of_bytes,
        "collections.OrderedDict": _ordered,
    }


def _ordered(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    """Build an OrderedDict; old pickles give its items as a list of pairs."""
    return {key: value for key, value in pairs if isinstance(key, str)}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    known = isinstance(storage, Storage)
    return _strided(storage, offset, size, stride, storage.dtype if known else None, rest[2:])


def _tensor_of_type(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """Build a tensor with a dtype that has no storage class; the storage length is in bytes."""
    dtype = rest[2] if len(rest) > 2 else None
    found = DTYPES.get(dtype.name) if isinstance(dtype, Inert) else None
    if isinstance(storage, Storage) and found is not None:
        storage = Storage(storage.source, storage.key, found, storage.length // found.itemsize)
    return _strided(storage, offset, size, stride, found, rest[3:])


def _strided(
    storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None, metadata: tuple[Any, ...]
) -> Any:
    plain = isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
    # Metadata marks values to be conjugated or negated.
    if not plain or any(metadata) or not all(map(is_index, (offset, *size, *stride))):
        return Inert("torch._utils._rebuild_tensor_v2", (storage, offset, size, stride))
    return Stored(storage, offset, size, stride, dtype)


def _typed(function: Any = None, kind: Any = None, arguments: Any = (), *_: Any) -> Any:
    """Build a tensor with attributes. Only PyTorch's own classes: any other class may give its values another
    meaning."""
    name = kind.name if isinstance(kind, Inert) else type(kind).__name__
    build = _builders().get(function.name) if isinstance(function, Inert) else None
    if build is None or not isinstance(arguments, tuple) or not name.startswith("torch."):
        return Inert(name, (arguments,))
    return build(*arguments)


def _of_bytes(data: Any = b"") -> Any:
    """Read a storage inside a plain pickle; it is itself a whole file in the non-zip format."""
    try:
        return _read_stream(BytesIO(data), bytearray(data))
    except Exception:  # damaged, which matters only if it holds a weight
        return Inert("torch.storage._load_from_bytes", ())


def _read_stream(file: Any, data: Any) -> Any:
    """Read the non-zip format (five pickles, then the storages) or a plain pickle.

    Args:
        file, data: the same bytes, as a file and as a writable buffer.
    """
    stream = StreamStorages(data)
    first = unpickle(file, _builders(), stream.persistent)
    if first != MAGIC:
        return first
    if (version := unpickle(file, {}, stream.persistent)) != PROTOCOL:
        raise Refused(f"its format version is {str(version)[:20]}, only {PROTOCOL} is supported")
    system = unpickle(file, {}, stream.persistent)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise Refused("its numbers are big-endian")
    builders = _builders()
    del builders["torch.storage._load_from_bytes"]  # PyTorch never nests these
    value = unpickle(file, builders, stream.persistent)
    stream.find(unpickle(file, {}, stream.persistent), file.tell())
    return value
