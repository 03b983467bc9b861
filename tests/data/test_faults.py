"""Data with every known fault, created here and used for indexing, loading, training and reports."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tinyclip
from tests.helpers.runs import place as place
from tests.helpers.runs import recipe, stage, stopped, weights
from tests.helpers.shards import LOADERS, good, loader, picture, write_shard
from tinyclip.cli import data as cli_data
from tinyclip.cli import judge
from tinyclip.common import faults
from tinyclip.common.faults import CAUSES, Fault, Skipped
from tinyclip.data import shard_reader
from tinyclip.data.loader import close_loader, next_batch
from tinyclip.data.samples import captions_of
from tinyclip.data.shard_index import known_faults, prepare
from tinyclip.data.shards import read_shards
from tinyclip.evaluate.metrics import open_dataset
from tinyclip.inputs.transforms import open_image
from tinyclip.report.runs import report
from tinyclip.train import loop


@pytest.fixture(autouse=True)
def close_loaders() -> Iterator[None]:
    yield
    while LOADERS:
        close_loader(LOADERS.pop())


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "PAUSES", (0.0, 0.0))


def bomb(side: int = 50_000) -> bytes:
    """Return a tiny PNG that claims to be `side` x `side`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# Key -> (cause, parts)
BAD: dict[str, tuple[str, dict[str, bytes]]] = {
    "junk": ("corrupt_image", {"jpg": b"no picture", "txt": b"text"}),
    "empty": ("corrupt_image", {"jpg": b"", "txt": b"text"}),
    "cut": ("corrupt_image", {"jpg": picture(0)[:200], "txt": b"text"}),
    "cut-png": ("corrupt_image", {"png": picture(0, "png")[:200], "txt": b"text"}),
    "bomb": ("huge_image", {"png": bomb(), "txt": b"text"}),
    "half-a-bomb": ("huge_image", {"png": bomb(10_000), "txt": b"text"}),
    "no-picture": ("no_image", {"txt": b"text"}),
    "no-caption": ("no_caption", {"jpg": picture(0)}),
    "blank": ("no_caption", {"jpg": picture(0), "json": b'{"caption": " \\n"}'}),
    "blank-text": ("no_caption", {"jpg": picture(0), "txt": b"\n \n"}),
    "latin": ("bad_encoding", {"jpg": picture(0), "txt": "café".encode("latin-1")}),
    "latin-json": ("bad_encoding", {"jpg": picture(0), "json": '{"caption": "café"}'.encode("latin-1")}),
    "surrogate": ("bad_encoding", {"jpg": picture(0), "json": b'{"caption": "\\ud83d"}'}),
    "torn": ("bad_json", {"jpg": picture(0), "json": b'{"caption": "te'}),
    "deep": ("bad_json", {"jpg": picture(0), "json": b"[" * 100_000}),
    "list": ("bad_json", {"jpg": picture(0), "json": b'["text"]'}),
    "null": ("bad_json", {"jpg": picture(0), "json": b"null"}),
    "number": ("bad_json", {"jpg": picture(0), "json": b'{"caption": 12}'}),
}


def bad_samples() -> list[dict[str, Any]]:
    return [{"key": key, **parts} for key, (_, parts) in BAD.items()]


def broken_folder(folder: Path) -> Path:
    """Write 30 good samples, all of `BAD`, two duplicate keys, and shards with every kind of damage."""
    folder.mkdir()
    write_shard(folder / "good.tar", [good(i) for i in range(20)] + bad_samples())
    write_shard(folder / "twice.tar", [good(i) for i in (0, 1, 2, 0, 3, 3)])
    whole = tar_of([good(i) for i in range(10, 20)])
    (folder / "cut.tar").write_bytes(whole[0][: whole[1][6] + 700])  # in the middle of a picture
    (folder / "junk.tar").write_bytes(b"this is no tar" * 100)
    (folder / "nothing.tar").write_bytes(b"")
    (folder / "packed.tar.gz").write_bytes(b"\x1f\x8bno gzip")
    write_shard(folder / "empty.tar", [])
    return folder


def tar_of(samples: list[dict[str, Any]]) -> tuple[bytes, list[int]]:
    """Return a tar, and the position where each sample starts."""
    file = io.BytesIO()
    starts = []
    with tarfile.open(fileobj=file, mode="w") as tar:
        for sample in samples:
            starts.append(file.tell())
            for ending, data in sample.items():
                if ending != "key":
                    info = tarfile.TarInfo(f"{sample['key']}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return file.getvalue(), starts


def keys(folder: Path) -> list[str]:
    return [s["__key__"] for s in read_shards(folder, [])]


def drawn(folder: Path, batches: int, **changes: Any) -> tuple[set[str], list[Skipped]]:
    """Return the keys and the skipped samples in some batches of a training loader."""
    source = iter(loader(folder, **changes))
    seen = [next_batch(source, folder) for _ in range(batches)]
    return {k for b in seen for k in b.keys}, [s for b in seen for s in b.skipped]


# --- shards -----------------------------------------------------------------------------------------------------


def test_a_tar_is_used_as_far_as_it_is_whole_wherever_it_is_cut(tmp_path: Path) -> None:
    """Compare with the known positions where samples start and end."""
    samples = [good(i) for i in range(5)]
    data, starts = tar_of(samples)
    ends = [*starts[1:], None]
    middles = [starts[1], starts[1] + 100, starts[2] + 513, starts[3] - 1, starts[4]]
    places = [0, 1, 511, 512, 700, *middles, len(data) - 5000]
    for n, cut in enumerate(places):
        folder = tmp_path / str(n)
        folder.mkdir()
        write_shard(folder / "a.tar", [good(9)])
        (folder / "b.tar").write_bytes(data[:cut])
        whole = sum(end is not None and _data_end(data, end) <= cut for end in ends)
        ended = cut == len(data) - 5000
        expected = [s["key"] for s in samples[: 5 if ended else whole]]
        assert keys(folder) == ["00009", *expected], cut
        assert prepare(folder) == 1 + len(expected), cut
        causes = [s.cause for s in known_faults(folder)]
        assert causes == ([] if ended else ["truncated_shard" if whole else "damaged_shard"]), cut
        found, skipped = drawn(folder, 8, batch_size=2)
        assert found == {"00009", *expected} and not skipped, cut


def _data_end(data: bytes, end: int) -> int:
    """Return the last byte of a sample's data, before the padding of its last block."""
    return len(data[:end].rstrip(b"\0"))


@pytest.mark.parametrize("filler", [b"\0", b"\x01"])
def test_holes_and_garbage_in_a_tar_are_found(tmp_path: Path, filler: bytes) -> None:
    """`tarfile` itself silently stops there. Downloads that reserve their space leave zeros."""
    data, starts = tar_of([good(i) for i in range(8)])
    write_shard(tmp_path / "a.tar", [good(9)])
    (tmp_path / "b.tar").write_bytes(data[: starts[3]] + filler * (len(data) - starts[3]) + filler * 2**20)
    assert prepare(tmp_path) == 4
    assert [(s.shard, s.cause) for s in known_faults(tmp_path)] == [("b.tar", "truncated_shard")]
    assert "after 3 samples" in known_faults(tmp_path)[0].reason


def test_a_cut_gzip_is_unpacked_as_far_as_it_goes(tmp_path: Path) -> None:
    data, starts = tar_of([good(i) for i in range(20)])
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(data)[:-4000])
    before = keys(tmp_path)
    assert 0 < len(before) < 20
    assert prepare(tmp_path) == len(before)
    assert keys(tmp_path) == before and (tmp_path / "a.tar").read_bytes() == data[: (tmp_path / "a.tar").stat().st_size]
    assert [s.cause for s in known_faults(tmp_path)] == ["truncated_shard"]


def test_the_first_of_several_samples_with_a_key_counts(tmp_path: Path) -> None:
    samples = [good(i) for i in (0, 1, 0, 2, 2, 3, 0)]
    for i, sample in enumerate(samples):
        sample["json"] = json.dumps({"caption": f"place {i}"}).encode()
    write_shard(tmp_path / "a.tar", samples)
    write_shard(tmp_path / "b.tar", [good(0)])  # in another shard, so another sample
    assert prepare(tmp_path) == 5
    texts = [captions_of(s)[0] for s in read_shards(tmp_path, [])]
    assert texts[:4] == ["place 0", "place 1", "place 3", "place 5"]
    source = iter(loader(tmp_path, batch_size=1))
    drawn_texts, skipped = set(), set()
    for _ in range(40):
        batch = next(source)
        drawn_texts.add(tuple(batch.tokens[0].tolist()))
        skipped |= set(batch.skipped)
    assert len(drawn_texts) == 4 + 2  # those four, and two captions from the other shard
    assert skipped == set(known_faults(tmp_path)) and {s.cause for s in skipped} == {"duplicate_key"}
    assert sorted(s.key for s in skipped) == ["00000", "00000", "00002"]


def test_keys_that_every_shard_starts_anew_are_no_duplicates(tmp_path: Path) -> None:
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", [good(i) for i in range(3)])
    assert prepare(tmp_path) == 6 and not known_faults(tmp_path)
    batch = next(iter(loader(tmp_path, batch_size=6)))
    assert len(set(batch.groups.tolist())) > 3  # so they are not positives of each other either


@pytest.mark.parametrize("when", ["indexing", "reading"])
def test_keys_with_folders_are_listed_whole(tmp_path: Path, when: str) -> None:
    bad = {"jpg": picture(0)[:200]} if when == "reading" else {}
    keys = {f"{name}/0001" for name in "abc"}
    samples = [good(i) | {"key": key} | bad for i, key in enumerate(sorted(keys))]
    copies = samples if when == "indexing" else []  # duplicate keys
    write_shard(tmp_path / "0.tar", [*samples, *copies, *(good(i) | {"key": f"d/{i}"} for i in range(9))])
    skipped = drawn(tmp_path, 40)[1]
    assert {s.key for s in skipped} == keys and {s.shard for s in skipped} == {"0.tar"}


def test_a_folder_with_every_fault(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path / "data")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert prepare(folder) == 20 + len(BAD) + 4 + 6
    assert faults.counts(known_faults(folder)) == {
        "truncated_shard": 1,
        "damaged_shard": 3,
        "empty_shard": 1,
        "duplicate_key": 2,
    }
    assert all((folder / name).read_bytes() == data for name, data in before.items())
    for workers in (0, 2):
        found, skipped = drawn(folder, 60, workers=workers)
        assert found == {f"{i:05d}" for i in range(20)}
        causes = {s.key: s.cause for s in skipped if s.shard == "good.tar"}
        assert causes == {key: cause for key, (cause, _) in BAD.items()}
        assert {s.key for s in skipped if s.shard == "twice.tar"} == {"00000", "00003"}


def test_data_of_which_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"junk" * 500)
    write_shard(tmp_path / "b.tar", [])
    with pytest.raises(ValueError, match=r"none of its shards can be used; .*a\.tar: damaged shard .*b\.tar: an empty"):
        prepare(tmp_path)
    assert not (tmp_path / ".nv-meta").exists()


def test_the_command_lists_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli_data.prepare(broken_folder(tmp_path / "data"))
    output = capsys.readouterr().out
    assert f"{30 + len(BAD)} samples" in output
    assert all(word in output for word in ("truncated_shard", "cut.tar", "duplicate_key", "empty_shard", "junk.tar"))
    cli_data.prepare(tmp_path / "data", check=True)
    output = capsys.readouterr().out
    assert "30 of them usable" in output and all(cause in output for cause, _ in BAD.values())


def test_many_shards_are_indexed_by_several_processes(tmp_path: Path) -> None:
    for i in range(10):
        write_shard(tmp_path / f"{i}.tar", [good(i)])
    assert prepare(tmp_path) == 10
    assert drawn(tmp_path, 10)[0] == {f"{i:05d}" for i in range(10)}


# --- vanished shards --------------------------------------------------------------------------------------------


def two_shards(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_shard(folder / "a.tar", [good(i) for i in range(12)])
    write_shard(folder / "b.tar", [good(i) for i in range(12, 24)])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_without_a_vanished_shard_and_with_it_when_it_is_back(
    tmp_path: Path, no_pauses: None, workers: int
) -> None:
    folder = two_shards(tmp_path / "data")
    prepare(folder)
    (folder / "b.tar").rename(tmp_path / "b.tar")
    source = iter(loader(folder, workers=workers))
    seen = [next(source) for _ in range(12)]
    assert {k for b in seen for k in b.keys} == {f"{i:05d}" for i in range(12)}
    gone = [s for b in seen for s in b.skipped]
    assert {(s.shard, s.cause) for s in gone} == {("b.tar", "vanished_shard")} and len(set(gone)) == 12
    assert "No such file" in gone[0].reason
    (tmp_path / "b.tar").rename(folder / "b.tar")
    assert {k for _ in range(40) for k in next(source).keys} == {f"{i:05d}" for i in range(24)}


def test_a_shard_that_comes_back_within_the_pauses_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = two_shards(tmp_path / "data")
    prepare(folder)
    (folder / "b.tar").rename(tmp_path / "b.tar")
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            (tmp_path / "b.tar").rename(folder / "b.tar")

    monkeypatch.setattr(shard_reader.time, "sleep", sleep)
    found, skipped = drawn(folder, 24)
    assert found == {f"{i:05d}" for i in range(24)} and not skipped
    assert tuple(pauses) == shard_reader.PAUSES[:3] and list(pauses) == sorted(pauses)


def test_a_file_system_that_is_gone_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_shards(tmp_path / "data")
    made = loader(folder)
    for shard in folder.glob("*.tar"):
        shard.unlink()
    pauses: list[float] = []
    monkeypatch.setattr(shard_reader.time, "sleep", pauses.append)
    with pytest.raises(ValueError, match="1,000 samples in a row are bad"):
        next_batch(iter(made), folder)
    assert tuple(pauses) == (*shard_reader.PAUSES, 0.0)


def test_the_order_of_samples_does_not_depend_on_what_has_vanished(tmp_path: Path, no_pauses: None) -> None:
    """A position saved with all shards is valid without one of them, and vice versa."""
    folder = two_shards(tmp_path / "data")
    whole = loader(folder, batch_size=1)
    source = iter(whole)
    for _ in range(10):
        next(source)
    state = whole.save_state_rank()
    rest = [next(source).keys[0] for _ in range(60)]
    (folder / "b.tar").unlink()
    resumed = loader(folder, batch_size=1)
    resumed.restore_state_rank(state)
    source = iter(resumed)
    assert [next(source).keys[0] for _ in range(20)] == [k for k in rest if int(k) < 12][:20]


def test_a_shard_that_changed_under_its_index_is_no_crash(tmp_path: Path, no_pauses: None) -> None:
    folder = two_shards(tmp_path / "data")
    made = loader(folder)
    (folder / "b.tar").write_bytes(b"junk" * 3000)
    source = iter(made)
    seen = [next(source) for _ in range(12)]
    assert {k for b in seen for k in b.keys} == {f"{i:05d}" for i in range(12)}
    assert {(s.shard, s.cause) for b in seen for s in b.skipped} == {("b.tar", "damaged_shard")}


@pytest.mark.parametrize("workers", [0, 1])
def test_when_every_shard_is_gone_the_run_ends(tmp_path: Path, no_pauses: None, workers: int) -> None:
    folder = two_shards(tmp_path / "data")
    made = loader(folder, workers=workers)
    for shard in folder.glob("*.tar"):
        shard.unlink()
    source = iter(made)
    with pytest.raises(ValueError, match=r"^[^\n]*data: 1,000 samples in a row are bad; the last: [ab]\.tar, [^\n]*$"):
        next_batch(source, folder)


# --- pictures and captions --------------------------------------------------------------------------------------


def test_bombs_take_no_memory() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for side in (10_000, 50_000):
        with pytest.raises(Fault, match="too large") as error:
            open_image(io.BytesIO(bomb(side)))
        assert error.value.cause == "huge_image"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB; the small one claims 300 MB


def test_a_member_that_claims_too_much_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyclip.data.shards.LARGEST_SAMPLE", 5000)
    large = good(1) | {"jpg": picture(1, size=100)}
    write_shard(tmp_path / "a.tar", [good(0), large, good(2)])
    assert prepare(tmp_path) == 2 and keys(tmp_path) == ["00000", "00002"]
    found, skipped = drawn(tmp_path, 10, batch_size=2)
    assert found == {"00000", "00002"} and {(s.key, s.cause) for s in skipped} == {("00001", "huge_image")}


def test_a_long_thin_picture_is_resized_within_bounds() -> None:
    """Resized whole it would have 4 billion pixels. Only its middle is needed."""
    from tinyclip.inputs.transforms import Preprocess

    thin = Image.new("RGB", (60_000, 1), (10, 20, 30))
    pixels = Preprocess(image_size=256).pixels(thin)
    assert pixels.shape == (3, 256, 256) and (pixels[0] == 10).all()
    ramp = Image.linear_gradient("L").resize((1, 3000))
    plain = ramp.resize((32, 96_000), Image.Resampling.BICUBIC).crop((0, 47_984, 32, 48_016)).convert("RGB")
    ours = Preprocess(image_size=32).pixels(ramp)
    assert abs(ours.transpose(1, 2, 0).astype(int) - np.asarray(plain)).max() <= 1


def test_damaged_pictures_of_every_kind_are_faults_and_nothing_else() -> None:
    """Random bytes are changed or cut off in files of all formats."""
    import random

    rng = random.Random(0)
    for ending in ("jpg", "png", "webp"):
        data = picture(3, ending, size=24)
        for _ in range(150):
            broken = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.4 else data)
            for _ in range(rng.randrange(6) if broken else 0):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            try:
                open_image(io.BytesIO(bytes(broken))).convert("RGB")
            except Fault as fault:
                assert fault.cause in ("corrupt_image", "huge_image")


def test_a_byte_order_mark_and_capital_endings_are_fine(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [{"key": "k", "JPG": picture(0), "TXT": b"\xef\xbb\xbfa caption"}])
    assert [captions_of(s) for s in read_shards(tmp_path)] == [["a caption"]]
    assert drawn(tmp_path, 1, batch_size=1)[0] == {"k"}


def test_a_long_path_leaves_room_for_the_reason() -> None:
    reason = "a HEIC picture needs pillow-heif: pip install 'tinyclip[heif]'"
    ((_, _, example),) = faults.rows([Skipped("", "a/" * 60 + "holiday.heic", "needs_extra", reason)])
    assert example.startswith("...") and example.endswith(f"holiday.heic: {reason}")
    assert len(example) == faults.LONGEST_EXAMPLE
    ((_, _, example),) = faults.rows([Skipped("", "a.png", "corrupt_image", "x" * 200)])
    assert example == "a.png: " + "x" * 90 + "..."


def test_every_cause_that_is_raised_is_in_the_list() -> None:
    source = "".join(p.read_text() for p in Path(tinyclip.__file__).parent.rglob("*.py") if p.name != "faults.py")
    assert [cause for cause in CAUSES if f'"{cause}"' not in source] == []
    with pytest.raises(AssertionError):
        Fault("no_cause", "?")


# --- runs -------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_broken_data_resumes_exactly_and_counts_the_same(place: Path, tmp_path: Path, workers: int) -> None:
    data = str(broken_folder(tmp_path / "data"))
    common = {"data": data, "workers": workers, "stages": [stage(steps=9)]}
    whole = loop.run(loop.start(recipe(place, tmp_path / "whole", **common)))[0]
    chosen = recipe(place, tmp_path / "run", **common)
    started = loop.start(chosen)
    stopped(started, 5)
    with (tmp_path / "run" / "skipped.jsonl").open("a") as file:  # of steps that were completed but not saved
        file.write(json.dumps({"shard": "s", "key": "k", "cause": "no_image", "reason": "", "stage": "50", "step": 6}))
    result = loop.run(loop.start(chosen, resume=True))[0]
    one, two = (weights(tmp_path / name / "student") for name in ("whole", "run"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert result["skipped_by_cause"] == whole["skipped_by_cause"] and result["skipped"] == whole["skipped"] > 0
    logs = [lines(tmp_path / name / "skipped.jsonl") for name in ("whole", "run")]
    assert logs[0] == logs[1]
    visits = Counter(line["cause"] for line in logs[0] if "step" in line)
    assert visits == result["skipped_by_cause"]
    ahead = {line["cause"] for line in logs[0] if "step" not in line}
    assert ahead == {"truncated_shard", "damaged_shard", "empty_shard"}
    last = [e for e in lines(tmp_path / "run" / "metrics.jsonl") if e["event"] == "step"][-1]
    assert last["skipped_by_cause"] == result["skipped_by_cause"] and last["skipped"] == result["skipped"]


def test_the_report_lists_what_was_left_out(place: Path, tmp_path: Path) -> None:
    data = str(broken_folder(tmp_path / "data"))
    loop.run(loop.start(recipe(place, tmp_path / "run", data=data, stages=[stage(steps=9)])))
    report([tmp_path / "run"], tmp_path / "report.html", "title")
    text = (tmp_path / "report.html").read_text()
    logged = {line["cause"] for line in lines(tmp_path / "run" / "skipped.jsonl")}
    assert len(logged) > 5 and all(f"<td>{cause}</td>" in text for cause in logged)
    assert "cut.tar: ends after" in text


def test_a_shard_deleted_during_a_run_is_reported_and_the_run_resumes(
    place: Path, tmp_path: Path, no_pauses: None
) -> None:
    folder = two_shards(tmp_path / "data")
    (folder / "c.tar").write_bytes((folder / "b.tar").read_bytes())
    chosen = recipe(place, tmp_path / "run", data=str(folder), stages=[stage(steps=12)])
    started = loop.start(chosen)
    texts: list[str] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "warning":
            texts.append(event["text"])
        if event.get("step") == 2:
            # An open file can still be read after deletion, so empty it instead.
            (folder / "b.tar").write_bytes(b"")
            (folder / "c.tar").unlink()

    started.listener = listen
    stopped(started, 9)
    (folder / "b.tar").unlink()
    resumed = loop.start(chosen, resume=True)
    resumed.listener = listen
    result = loop.run(resumed)[0]
    assert result["skipped_by_cause"]["vanished_shard"] > 0
    assert any(text.startswith("b.tar") and "continuing without it" in text for text in texts)
    assert texts == sorted(set(texts), key=texts.index)  # each one once


def test_a_fresh_start_sees_the_shards_that_are_there(tmp_path: Path) -> None:
    folder = two_shards(tmp_path / "data")
    assert prepare(folder) == 24
    (folder / "b.tar").unlink()
    assert prepare(folder, keep=True) == 24 and prepare(folder) == 12
    write_shard(folder / "c.tar", [good(5)])
    assert prepare(folder, keep=True) == 12 and prepare(folder) == 13
    write_shard(folder / "c.tar", [good(5), good(6)])
    assert prepare(folder, keep=True) == 14  # the old index cannot read a changed shard


def test_evaluation_counts_by_cause(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = broken_folder(tmp_path / "data")
    dataset = open_dataset(folder)
    list(dataset)
    counted = faults.counts(dataset.skipped)
    expected = Counter(cause for cause, _ in BAD.values())
    del expected["no_caption"]  # pictures without captions can still be evaluated
    assert counted == expected | {"truncated_shard": 1, "damaged_shard": 3, "empty_shard": 1, "duplicate_key": 2}
    judge.evaluate(place / "teacher", folder, device="cpu", output=tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["skipped_by_cause"] == counted and result["skipped"] == sum(counted.values())
    lines = capsys.readouterr().err.splitlines()
    assert [next(line.split()[1] for line in lines if line.split()[:1] == [cause]) for cause in counted] == [
        str(n) for n in counted.values()
    ]
    assert any("good.tar, junk: not a picture" in line for line in lines)
