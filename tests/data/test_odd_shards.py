"""Shards from tar and other tools: what `prepare` counts is what training reads."""

from __future__ import annotations

import errno
import gzip
import io
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import tinyclip
from tests.helpers.shards import close_loaders, good, loader, picture, write_shard
from tinyclip.common.faults import Skipped
from tinyclip.data import shard_index
from tinyclip.data.loader import next_batch
from tinyclip.data.samples import captions_of, class_of, image_of
from tinyclip.data.shard_index import known_faults, known_lacks, prepare
from tinyclip.data.shards import read_shards

__all__ = ["close_loaders"]  # a fixture of every test here

Member = tuple[str, bytes | tarfile.TarInfo]


def tar(path: Path, members: list[Member], kind: int = tarfile.GNU_FORMAT, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=kind) as file:  # type: ignore[call-overload]
        for name, data in members:
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
            file.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return path.parent


def pair(name: str, i: int, endings: tuple[str, str] = ("jpg", "txt")) -> list[Member]:
    return [(f"{name}.{endings[0]}", picture(i)), (f"{name}.{endings[1]}", f"caption {i}".encode())]


def link(name: str, to: str, kind: bytes = tarfile.LNKTYPE) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return name, info


def check_same(folder: Path, count: int) -> list[list[str]]:
    """Check that the captions are in order, and that training reads the same bytes as `read_shards`."""
    ours = list(read_shards(folder, []))
    assert prepare(folder) == len(ours) == count
    for sample in ours:
        image_of(sample)
    seen: dict[str, dict[str, Any]] = {}

    def image_of_training(sample: dict[str, Any]) -> Any:
        seen[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
        return image_of(sample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyclip.data.loader.image_of", image_of_training)
        batches = iter(loader(folder, batch_size=1))
        for _ in range(6 * count):
            assert not next_batch(batches, folder).skipped
    assert seen == {s["__key__"]: {name: s[name] for name in s if not name.startswith("__")} for s in ours}
    output = tinyclip("data", "prepare", folder)
    assert output.strip() == f"{count} samples in {folder}, ready to train on"
    assert f"{count} of them usable, ready to train on" in tinyclip("data", "prepare", folder, "--check")
    return [captions_of(sample) for sample in ours]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_kind(tmp_path: Path, kind: int) -> None:
    long = "d" * 90 + "/" + "n" * 90
    members = [
        ("./._0.jpg", b"of macOS"),
        *pair("./0", 0),
        ("._1.jpg", b"of macOS"),
        *pair("a.b/1", 1),
        *pair(long, 2),
        *pair("\u00e9\u4e2d", 3, ("JPG", "TXT")),
        *pair("4", 4, ("jpeg", "txt")),
        link("folder", "", tarfile.DIRTYPE),
        *pair("2021.05.06", 5),
    ]
    folder = tar(tmp_path / "data" / "0.tar", members, kind)
    assert check_same(folder, 6) == [[f"caption {i}"] for i in range(6)]


def test_links_have_the_bytes_of_earlier_members(tmp_path: Path) -> None:
    members = [
        *pair("./a/0", 0),
        link("a/1.jpg", "a/0.jpg"),
        ("a/1.txt", b"one"),
        ("a/2.jpg", picture(2)),
        link("a/2.txt", "a/1.txt"),
        link("a/3.jpg", "2.jpg", tarfile.SYMTYPE),
        link("a/3.txt", "../a/0.txt", tarfile.SYMTYPE),
        link("a/4.jpg", "a/3.jpg"),
        link("a/4.txt", "a/2.txt"),
    ]
    folder = tar(tmp_path / "data" / "0.tar", members)
    assert check_same(folder, 5) == [["caption 0"], ["one"], ["one"], ["caption 0"], ["one"]]
    pictures = [sample["jpg"] for sample in read_shards(folder)]
    assert pictures == [picture(i) for i in (0, 0, 2, 2, 2)]


def test_links_to_elsewhere_are_no_pictures(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture(9))
    outside = [
        link("x.jpg", str(secret), tarfile.SYMTYPE),
        ("x.txt", b"x"),
        link("y.jpg", "later.jpg"),
        ("y.txt", b"y"),
    ]
    folder = tar(tmp_path / "data" / "0.tar", [*outside, *(m for i in range(4) for m in pair(str(i), i))])
    output = tinyclip("data", "prepare", folder)
    assert "6 samples" in output and "4 with picture and caption, ready to train on" in output and "no_image" in output
    assert {s.key for s in known_lacks(folder)[0]} == {"x", "y"} and not known_faults(folder)


def test_endings_of_several_parts(tmp_path: Path) -> None:
    members = [m for i in range(4) for m in (*pair(f"s{i}", i, ("input.jpg", "outputs.txt")), (f"s{i}.seg.npy", b"n"))]
    assert check_same(tar(tmp_path / "data" / "0.tar", members), 4) == [[f"caption {i}"] for i in range(4)]


def test_other_data_of_a_sample_is_no_caption() -> None:
    sample = {"txt": b"right", "meta.json": b'{"caption": "wrong", "class": "wrong"}', "jpg": b""}
    assert captions_of(sample) == ["right"] and class_of(sample) is None
    assert captions_of({"meta.json": b'{"caption": "only"}'}) == ["only"]
    assert captions_of({"a.txt": b"one", "b.txt": b"two"}) == []


@pytest.mark.parametrize(
    "json", [b'{"caption": NaN}', b'{"caption": null}', b'{"caption": 3}', b"[1]", b'{"cap', b"\xff"]
)
def test_a_json_without_a_caption_leaves_that_of_the_text(tmp_path: Path, json: bytes) -> None:
    members = [m for i in range(3) for m in (*pair(str(i), i), (f"{i}.json", json))]
    assert check_same(tar(tmp_path / "data" / "0.tar", members), 3) == [[f"caption {i}"] for i in range(3)]


def test_captions_end_at_line_breaks_alone() -> None:
    inside = "a\u2028b\u0085c\x0bd\x0ce\x1cf\x1dg\x1eh\u2029i"
    assert captions_of({"txt": f"\ufeff{inside}\r\ntwo\rthree\n".encode()}) == [inside, "two", "three"]


# --- unprepared -------------------------------------------------------------------------------------------------


def test_names_that_are_one_key_are_told(tmp_path: Path) -> None:
    folder = tar(tmp_path / "data" / "0.tar", [m for i in range(5) for m in pair(f"photo.v{i}", i)])
    error = tinyclip("data", "prepare", folder, code=1)
    assert "5 pictures share the key photo (v0.jpg, v1.jpg, v2.jpg, ...)" in error and "rename" in error
    assert "ready" not in error and error.count("\n") == 1
    some = [m for i in range(4) for m in pair(str(i), i)]
    folder = tar(tmp_path / "some" / "0.tar", [*pair("photo", 7), ("photo.v2.jpg", picture(8)), *some])
    output = tinyclip("data", "prepare", folder)
    assert (
        "shared_key" in output and "1 more pictures (v2.jpg) share its key" in output and "ready to train on" in output
    )


def test_pictures_and_captions_far_apart_are_told(tmp_path: Path) -> None:
    members = [(f"{i}.jpg", picture(i)) for i in range(5)] + [(f"{i}.txt", b"text") for i in range(5)]
    error = tinyclip("data", "prepare", tar(tmp_path / "data" / "0.tar", members), code=1)
    assert "picture and caption of 5 keys (0) are not adjacent in the tar; repack it with `tar --sort=name`" in error


def test_samples_without_a_usable_caption_are_not_ready(tmp_path: Path) -> None:
    members = [m for i in range(5) for m in ((f"{i}.jpg", picture(i)), (f"{i}.json", b'{"width": 3}'))]
    error = tinyclip("data", "prepare", tar(tmp_path / "data" / "0.tar", members), code=1)
    assert (
        "0 of them usable: training needs at least half of them; not ready; the first fault: 0.tar, 0: no caption"
        in error
    )


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz"])
def test_shards_with_another_ending_are_told(tmp_path: Path, name: str) -> None:
    folder = tar(tmp_path / "data" / name, pair("0", 0), mode="w:gz" if name == "0.tar" else "w")
    word = "compressed with gzip; name it 0.tar.gz" if name == "0.tar" else "not compressed; name it 0.tar"
    assert word in tinyclip("data", "prepare", folder, code=1)


# --- malicious --------------------------------------------------------------------------------------------------


def negative(kind: str) -> bytes:
    """Return a member with a size that would send a reader back to the same member."""
    info = tarfile.TarInfo("9.jpg")
    if kind == "extended":
        info.pax_headers = {"size": "-1536"}
        return info.tobuf(tarfile.PAX_FORMAT)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + b"\xfa\x00" if kind == "binary" else b"-0000001000\0"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize("kind", ["extended", "binary", "octal"])
@pytest.mark.parametrize("first", [True, False])
def test_a_negative_size_ends_the_shard(tmp_path: Path, kind: str, first: bool) -> None:
    folder = tar(tmp_path / "data" / "0.tar", [] if first else [m for i in range(3) for m in pair(str(i), i)])
    data = (folder / "0.tar").read_bytes().rstrip(b"\0")
    data += b"\0" * (-len(data) % 512)
    (folder / "0.tar").write_bytes(data + negative(kind) + b"\0" * 4096)
    start = time.perf_counter()
    if first:
        with pytest.raises(ValueError, match=r"damaged shard|ends after 0 samples"):
            prepare(folder)
    else:
        assert prepare(folder) == len(list(read_shards(folder, []))) == 3
        assert [s.cause for s in known_faults(folder)] == ["truncated_shard"]
    assert time.perf_counter() - start < 30


def test_what_a_gz_unpacks_to_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_index, "FREE_SIZE", 2**20)
    folder = tar(tmp_path / "data" / "0.tar.gz", [*pair("0", 0), ("1.jpg", bytes(2**23))], mode="w:gz")
    with pytest.raises(ValueError, match=r"0\.tar\.gz: its [\d,]+ bytes unpack to over [\d,]+ .*; .*`gunzip --keep`"):
        prepare(folder)
    assert [p.name for p in folder.iterdir() if p.suffix != ".lock"] == ["0.tar.gz"]
    with gzip.open(folder / "0.tar.gz") as source:
        (folder / "0.tar").write_bytes(source.read())
    assert prepare(folder) == 2


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tar(tmp_path / "data" / "0.tar.gz", pair("0", 0), mode="w:gz")
    usage = shard_index.shutil.disk_usage(folder)
    monkeypatch.setattr(shard_index.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"cannot write .*data/0\.tar: 1,000 bytes are free"):
        prepare(folder)
    monkeypatch.setattr(shard_index.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(Path, "replace", _full)
    with pytest.raises(ValueError, match=r"cannot write .*data/0\.tar: No space left"):
        prepare(folder)
    assert [p.name for p in folder.iterdir() if p.suffix != ".lock"] == ["0.tar.gz"]


def test_what_a_killed_unpacking_left_is_cleared_up(tmp_path: Path) -> None:
    folder = tar(tmp_path / "data" / "0.tar.gz", pair("0", 0), mode="w:gz")
    for name in (".0.tar.ab12_d34.tmp", ".0.tar.notes.tmp", ".1.tar.ab12_d34.tmp"):
        (folder / name).write_text("x")
    assert prepare(folder) == 1
    assert sorted(p.name for p in folder.glob(".*.tmp")) == [".0.tar.notes.tmp", ".1.tar.ab12_d34.tmp"]


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("count", "workers", "processes"), [(3, 4, 1), (1, 0, 2), (5, 2, 3)])
def test_fewer_samples_than_readers_are_told(tmp_path: Path, count: int, workers: int, processes: int) -> None:
    write_shard(tmp_path / "0.tar", [good(i) for i in range(count)])
    mend = (
        f"set `workers` to {count // processes} at most" if count >= processes else f"start {count} processes at most"
    )
    with pytest.raises(ValueError, match=f"{count} samples are too few for {processes} processes of .*; {mend}"):
        loader(tmp_path, batch_size=1, workers=workers, world_size=processes)
    loader(tmp_path, batch_size=1, workers=min(2, count // processes), world_size=min(count, processes))


def test_a_run_that_is_resumed_keeps_an_index_of_before(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [good(i) for i in range(3)])
    prepare(tmp_path)
    ready = tmp_path / ".nv-meta" / "ready"
    ready.write_text(ready.read_text().replace(f'"format": {shard_index.FORMAT}', '"format": 2'))
    assert prepare(tmp_path, keep=True) == 3 and '"format": 2' in ready.read_text()
    assert prepare(tmp_path) == 3 and f'"format": {shard_index.FORMAT}' in ready.read_text()


def test_links_to_nothing_and_pipes_are_damaged_shards(tmp_path: Path) -> None:
    """The reader does not block on a pipe, and uses the other shards."""
    folder = tar(tmp_path / "data" / "0.tar", pair("0", 0))
    (folder / "1.tar").symlink_to("nowhere")
    (folder / "2.tar").symlink_to("2.tar")
    for name in ("3.tar", "4.tar.gz"):
        os.mkfifo(folder / name)
    output = tinyclip("data", "prepare", folder)
    assert "damaged_shard         4" in output and "1 samples in" in output
    skipped: list[Skipped] = []
    assert [sample["__key__"] for sample in read_shards(folder, skipped)] == ["0"]
    assert sorted(one.shard for one in skipped) == ["1.tar", "2.tar", "3.tar", "4.tar.gz"]
