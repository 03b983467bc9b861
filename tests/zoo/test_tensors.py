"""Other people's pickles are read as plain data, whatever they contain, and none of their code runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import importlib
import io
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tinyclip.zoo.storages import Refused, Stored
from tinyclip.zoo.tensors import read_entries, tensor_of
from tinyclip.zoo.unpickle import Damaged, Inert, unpickle

OLD = {"_use_new_zipfile_serialization": False}


def tensors(path: Path) -> dict[str, Tensor]:
    entries, _ = read_entries(path)
    return {".".join(e.path): tensor_of(e) for e in entries if isinstance(e.value, Tensor | Stored)}


def plain(data: bytes) -> Any:
    return unpickle(io.BytesIO(data), {}, lambda pid: Inert("id", (pid,)))


class Colour(enum.Enum):
    RED = 1


class Custom:
    def __init__(self) -> None:
        self.anything = {"nested": [self]}


class Names(collections.OrderedDict):  # type: ignore[type-arg]
    pass


class Slots:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


class Hostile:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> Any:
        return self.what


BESIDE: dict[str, Any] = {
    "NumPy scalar": np.float64(3e-4),
    "NumPy array": np.arange(6).reshape(2, 3),
    "NumPy dtype": np.dtype("float32"),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "Counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2]),
    "OrderedDict of ours": Names(a=1),
    "path": pathlib.PurePosixPath("/a/b"),
    "datetime": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    "Namespace": argparse.Namespace(lr=1e-4, path=pathlib.PurePosixPath("x")),
    "custom": Custom(),
    "slots": Slots(),
    "enum": Colour.RED,
    "dtype": torch.float16,
    "device": torch.device("cpu"),
    "size": torch.Size([1, 2]),
    "set": {1, (2, 3)},
    "frozenset": frozenset({"a"}),
    "complex": 1j,
    "big": 10**400,
    "bytes": bytearray(b"abc"),
    "sparse": torch.eye(2).to_sparse(),
    "range": range(3),
    "function": os.path.join,
    "class": Custom,
    "hostile": Hostile(os._exit, 7),
    "eval": Hostile(eval, "__import__('os')._exit(7)"),
    "tuple keys": {(1, "a"): {2: 3}, None: 4},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_what_lies_beside_the_weights_does_not_matter(protocol: int, options: dict[str, Any], tmp_path: Path) -> None:
    weights = {"a": torch.arange(4.0), "b": torch.arange(6).view(2, 3).t()}
    torch.save({"args": BESIDE, "state_dict": weights}, tmp_path / "x.pt", pickle_protocol=protocol, **options)
    read = tensors(tmp_path / "x.pt")
    assert {key for key in read if key.startswith("state_dict")} == {"state_dict.a", "state_dict.b"}
    for key, value in weights.items():
        assert torch.equal(read[f"state_dict.{key}"], value)


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.bool, torch.uint16],
)
def test_every_dtype(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    value = torch.arange(3).to(dtype)
    torch.save({"a": value}, tmp_path / "x.pt", **options)
    read = tensors(tmp_path / "x.pt")["a"]
    assert read.dtype == dtype and torch.equal(read.view(torch.uint8), value.view(torch.uint8))


def awkward() -> dict[str, Tensor]:
    base = torch.arange(24.0)
    shared = {"whole": base, "view": base.view(4, 6)[1:, ::2], "turned": base.view(4, 6).t()}
    return shared | {"parameter": nn.Parameter(base[:3].clone()), "empty": torch.empty(0, 3), "one": torch.tensor(2.5)}


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_views_parameters_and_shared_storages(kind: str, tmp_path: Path) -> None:
    values, path = awkward(), tmp_path / "x.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(values))
    else:
        torch.save(values, path, **({} if kind == "zip" else OLD))
    read = tensors(path)
    assert list(read) == list(values)
    assert all(torch.equal(read[key], value) for key, value in values.items())


def test_a_parameter_with_attributes(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "decay"  # type: ignore[attr-defined]
    torch.save({"a": parameter}, tmp_path / "x.pt")
    assert torch.equal(tensors(tmp_path / "x.pt")["a"], torch.ones(2))


class Scaled(Tensor):
    pass


def test_a_tensor_of_an_unknown_class_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(2).as_subclass(Scaled)}, tmp_path / "x.pt")
    entries, _ = read_entries(tmp_path / "x.pt")
    with pytest.raises(Exception, match=rf"b: refused, it asks for {__name__}\.Scaled; only tensors are read"):
        tensor_of(next(e for e in entries if e.key == "b"))


def test_a_whole_module_is_its_tensors(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save({"model": module}, tmp_path / "x.pt")
    read = {
        key.replace("_modules.", "").replace("_parameters.", "").replace("_buffers.", ""): value
        for key, value in tensors(tmp_path / "x.pt").items()
    }
    assert {key: value.tolist() for key, value in read.items()} == {
        f"model.{key}": value.tolist() for key, value in module.state_dict().items()
    }


def test_an_optimiser_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"optimizer": {"m": torch.ones(10_000)}, "model": {"a": torch.ones(3)}}, tmp_path / "x.pt")
    touched: list[int] = []
    whole = torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda *a, **k: touched.append(k["count"]) or whole(*a, **k))
    entries, _ = read_entries(tmp_path / "x.pt")
    tensor_of(next(e for e in entries if e.key == "a"))
    assert touched == [12]


# --- no code runs


def ran() -> None:
    raise AssertionError("it ran")


G = "c{}\n{}\n".format


def called(module: str, name: str, arguments: bytes) -> bytes:
    return G(module, name).encode() + b"(" + arguments + b"tR"


TEXT = b"X\x02\x00\x00\x00hi"
PICKLES = {
    "os.system": called("os", "system", TEXT),
    "eval": called("builtins", "eval", TEXT),
    "getattr": called("builtins", "getattr", G("os", "path").encode() + TEXT),
    "a call of a call": called("builtins", "getattr", G("os", "path").encode() + TEXT) + b"(" + TEXT + b"tR",
    "a method as a name": b"\x8c\x09posixpath\x8c\x09os.system\x93(" + TEXT + b"tR",
    "a trick of torch": called("torch._utils", "_rebuild_from_type_v2", G("os", "system").encode() + TEXT + b")N"),
    "import_from": called("torch.serialization", "load", TEXT),
    "nested bytes": called("torch.storage", "_load_from_bytes", b"B\x03\x00\x00\x00abc"),
    "instance": b"(" + TEXT + b"ios\nsystem\n",
    "object": b"(" + G("os", "system").encode() + TEXT + b"o",
    "new": G("subprocess", "Popen").encode() + b"(" + TEXT + b"t\x81",
    "new with names": G("subprocess", "Popen").encode() + b")}\x92",
    "setstate": G("os", "environ").encode()
    + b")\x81}X\x0c\x00\x00\x00__setstate__"
    + G("os", "system").encode()
    + b"sb",
    "class": G("os", "environ").encode() + b")\x81}X\x09\x00\x00\x00__class__" + G("os", "system").encode() + b"sb",
    "state of a class": G("os", "environ").encode() + b"}X\x08\x00\x00\x00__dict__" + TEXT + b"sb",
    "items into a stand-in": G("os", "environ").encode() + b")\x81(" + TEXT + TEXT + b"u",
    "values into a stand-in": G("os", "environ").encode() + b")\x81(" + TEXT + b"e" + TEXT + b"a",
    "extension": b"\x82\x01",
    "a call of a number": b"K\x05(tR",
    "persistent": b"Pabc\n",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_call_give_stand_ins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, attribute in ((os, "system"), (os, "_exit"), (pickle, "Unpickler"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(place, attribute, lambda *_: ran())
    monkeypatch.setattr(importlib, "import_module", lambda *_: ran())
    assert isinstance(plain(b"\x80\x04" + PICKLES[name] + b"."), Inert)


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_call_lie_beside_weights(name: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for part in good.infolist():
            data = good.read(part)
            if part.filename.endswith("data.pkl"):  # value of one additional key
                assert data[-2:] == b"s."
                data = data[:-1] + b"X\x01\x00\x00\x00x" + PICKLES[name] + b"s."
            bad.writestr(part.filename, data)
    assert torch.equal(tensors(tmp_path / "bad.pt")["a"], torch.ones(2))


LONG = b"X" + struct.pack("<I", 2**31)
BROKEN = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "nothing on the stack": b"\x80\x02.",
    "no mark": b"\x80\x02t.",
    "unknown opcode": b"\x80\x02\xff.",
    "memo": b"\x80\x02h\x07.",
    "a text that is longer than the file": b"\x80\x02" + LONG + b"abc.",
    "8 bytes of length": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "a huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",
    "a number with too many digits": b"I" + b"9" * 5000 + b"\n.",
    "half a pair": b"\x80\x02}(K\x01u.",
    "no name": b"\x80\x04K\x01K\x02\x93.",
    "a buffer outside": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pickles_are_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(Damaged):
        plain(BROKEN[name])
    (tmp_path / "x.pt").write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=r"x\.pt: damaged or not a file of weights") as error:
        read_entries(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_a_high_number_in_the_memo_takes_no_memory() -> None:
    assert plain(b"\x80\x02K\x01r" + struct.pack("<I", 2**31 - 1) + b".") == 1


NESTED = {
    "lists": b"(" * 200_000 + b"l" * 200_000,
    "tuples as a key": b"}" + b")" + b"\x85" * 200_000 + b"K\x01s",
    "dictionaries": b"}X\x01\x00\x00\x00a" * 200_000 + b"}" + b"s" * 200_000,
    "stand-ins": G("os", "system").encode() + b"\x85R" * 10,
}


@pytest.mark.parametrize("name", NESTED)
def test_deep_nesting_and_circles_end(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"\x80\x02" + NESTED[name] + b".")
    with pytest.raises(ValueError, match=r"x\.pt: ") as error:
        read_entries(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


def test_a_dictionary_in_itself(tmp_path: Path) -> None:
    data: dict[str, Any] = {"a": torch.ones(2)}
    data["self"] = [data, {"again": data}]
    torch.save(data, tmp_path / "x.pt")
    assert list(tensors(tmp_path / "x.pt")) == ["a"]


def test_too_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyclip.zoo.unpickle.OPCODES", 100)
    with pytest.raises(Damaged, match="more than 100 steps"):
        plain(b"]" * 200 + b".")


# --- damaged files


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_every_cut_is_one_line(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(100), "b": torch.ones(50)}, path, **options)
    data = path.read_bytes()
    for end in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"x\.pt: damaged or not a file of weights") as error:
            read_entries(path)
        assert "\n" not in str(error.value)


def test_flipped_bytes_are_read_or_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(3)}, path)
    data = path.read_bytes()
    numbers = np.random.default_rng(0)
    for place in numbers.integers(0, len(data), 300):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(numbers.integers(8))
        path.write_bytes(flipped)
        try:
            for entry in read_entries(path)[0]:
                tensor_of(entry)
        except Exception as error:
            assert type(error).__name__ in ("ValueError", "Refused") and "\n" not in str(error), repr(error)


def with_tensor(path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """Write a file whose tensor `a` uses another part of its storage of 24 values."""

    class Elsewhere:
        def __reduce_ex__(self, _: Any) -> Any:
            storage = torch.arange(24.0)._typed_storage()
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, collections.OrderedDict())

    torch.save({"a": Elsewhere(), "b": torch.ones(1)}, path)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (25,), (1,)),
        (20, (5,), (1,)),
        (-1, (2,), (1,)),
        (5, (3,), (-1,)),
        (0, (-1,), (1,)),
        (0, (3,), (12,)),
        (0, (10**6, 10**6), (0, 0)),
        (2**62, (2,), (2**62,)),
        (0, (2, 2), (1,)),
        (0, (0, 10**30), (1, 1)),
        (0, (0, 2**40, 2**40), (1, 1, 1)),
    ],
)
def test_tensors_that_reach_outside(
    offset: int, size: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    with_tensor(tmp_path / "x.pt", offset, size, stride)
    (entry,) = [entry for entry in read_entries(tmp_path / "x.pt")[0] if entry.key == "a"]
    with pytest.raises(Refused, match=r"a (claims more values than the file has|is not a plain tensor)"):
        tensor_of(entry)


def test_a_tensor_that_looks_elsewhere_in_its_storage(tmp_path: Path) -> None:
    with_tensor(tmp_path / "x.pt", 3, (2, 3), (6, 2))
    assert torch.equal(tensors(tmp_path / "x.pt")["a"], torch.arange(24.0).as_strided((2, 3), (6, 2), 3))


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "good.pt")
    for part in ("data.pkl", "data/0"):
        with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
            for item in good.infolist():
                packed = zipfile.ZIP_DEFLATED if item.filename.endswith(part) else zipfile.ZIP_STORED
                bad.writestr(item.filename, good.read(item), packed)
        with pytest.raises(Exception, match=rf"{part} is compressed, which PyTorch never does"):
            tensors(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", ""),
        (b"PK\x05\x06" + bytes(18), ""),
        (b"ustar", ""),
        (bytes(2000), r"\(not a pickle\)"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), r"\(not a pickle\)"),
        (b"\xff\xd8\xff\xe0" + bytes(20), r"\(not a pickle\)"),
    ],
)
def test_other_files(data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.pt: damaged or not a file of weights .*{why}"):
        read_entries(tmp_path / "x.pt")


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """The archive's checksums find it, unless PyTorch was told to write none."""
    path, weights = tmp_path / "weights.pt", torch.arange(1000, dtype=torch.float32)
    torch.save({"a": weights}, path)
    data = bytearray(path.read_bytes())
    data[data.index(weights.numpy().tobytes()) + 2001] ^= 8
    path.write_bytes(data)
    (entry,), _ = read_entries(path)
    with pytest.raises(Refused, match="damaged, its data/0 does not match its checksum"):
        tensor_of(entry)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": weights}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    (entry,), _ = read_entries(path)
    assert torch.equal(tensor_of(entry), weights)
