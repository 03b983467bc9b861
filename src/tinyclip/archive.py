"""Tensors out of other people's weight files, without running anything that the files hold.

PyTorch files are read with `weights_only`; of TorchScript archives only the data pickle and the raw storages
are read, by an unpickler that knows tensors and puts inert objects in place of modules.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Kind = Literal["safetensors", "pytorch", "torchscript"]
STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Kind]:
    """The tensors of a safetensors, PyTorch or TorchScript file by their keys, on the CPU.

    Raises:
        ValueError: when the file is missing, damaged, holds no tensors, or asks for more than tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:9] == b"{" or path.suffix == ".safetensors":  # a safetensors header: its length, then JSON
            kind: Kind = "safetensors"
            state: Any = load_file(path)
        elif start.startswith(b"PK") and (root := _torchscript_root(path)) is not None:
            kind, state = "torchscript", _torchscript_tensors(path, root)
        else:
            kind, state = "pytorch", _pytorch_tensors(path, start.startswith(b"PK"))
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or no safetensors file ({error})") from None
    except Exception as error:  # a damaged pickle can raise anything
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path}: {_beyond_tensors(found[1])}") from None
        if isinstance(error, pickle.UnpicklingError):
            reason = "no pickle of tensors"
        else:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:150]
        raise ValueError(f"{path}: damaged or no file of weights ({reason})") from None
    for key, value in state.items():
        _check_plain(path, key, value)
    if not state:
        raise ValueError(f"{path}: no tensors in it")
    return state, kind


class Refused(Exception):
    """What a file asks for is not given; the message says what."""


def _beyond_tensors(name: str) -> str:
    return f"refused, it asks for {name}; only tensors are read, and no code from a file is run"


def _check_plain(path: Path, key: Any, value: Any) -> None:
    """A strided tensor in memory that does not claim more than it stores."""
    if not isinstance(key, str) or not isinstance(value, Tensor):
        raise ValueError(f"{path}: {str(key)[:100]} is a {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        raise ValueError(f"{path}: {key} is no plain tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{path}: {key} claims more values than the file has")


def _pytorch_tensors(path: Path, mapped: bool) -> Mapping[Any, Any]:
    # The authors' training files carry their arguments as a Namespace; its fields are plain values.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickles in other protocols, which are refused or read all the same
        # Mapped, so that the optimiser of a training file is never read.
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping):
        raise Refused(f"a {type(data).__name__} is in it, not a state dict")
    return data


# --- TorchScript -------------------------------------------------------------------------------------------------


def _torchscript_root(path: Path) -> str | None:
    """The folder inside a TorchScript archive; None for another kind of zip."""
    with zipfile.ZipFile(path) as archive:
        roots = [name.removesuffix("constants.pkl") for name in archive.namelist() if name.endswith("/constants.pkl")]
    return roots[0] if roots else None


def _torchscript_tensors(path: Path, root: str) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        # A code file may be compressed; the data is not, so nothing can unpack to more than the file's size.
        for item in archive.infolist():
            if item.filename.startswith((f"{root}data", f"{root}byteorder")) and item.compress_type:
                raise Refused(f"{item.filename} is compressed, which PyTorch never does")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise Refused("its numbers are big-endian")
        module = _TensorUnpickler(archive, root).load()
    found: dict[str, Tensor] = {}
    stack, seen = [("", module)], set[int]()
    while stack:
        prefix, value = stack.pop()
        if isinstance(value, Tensor):
            found[prefix[:-1]] = value
        elif isinstance(value, _Inert) and id(value) not in seen:
            seen.add(id(value))
            stack += [(f"{prefix}{name}.", item) for name, item in reversed(vars(value).items())]
    # A causal mask is a plain attribute, which traced modules keep.
    return {key: value for key, value in found.items() if key.rpartition(".")[2] != "attn_mask"}


class _Inert:
    """Stands where the archive has a module: attributes, no behaviour."""


class _TensorUnpickler(pickle.Unpickler):
    """Reads `data.pkl` of an archive; every name but the few below is refused before anything is called."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return type("_Inert", (_Inert,), {})
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_doublelist", "build_boollist"):
            return list
        raise Refused(_beyond_tensors(f"{module}.{name}"))

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage as a flat tensor; `pid` is ("storage", dtype, key, device, length)."""
        tag, dtype, key, _, length = pid
        if tag != "storage" or not isinstance(dtype, torch.dtype):
            raise Refused(f"a {tag!r} instead of a tensor's storage is in it")
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            if len(data) != length * dtype.itemsize:
                raise Refused(f"storage {key} has {len(data):,} bytes, not {length * dtype.itemsize:,}")
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]

    @staticmethod
    def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        if math.prod(size) > storage.numel():
            raise Refused("a tensor claims more values than its storage has")
        return storage.as_strided(size, stride, offset)
