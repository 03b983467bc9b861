from __future__ import annotations

import os
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.shards import WORDS, good, loader, picture, write_shard
from tinyclip.data.loader import next_batch
from tinyclip.data.samples import captions_of
from tinyclip.data.shard_index import prepare
from tinyclip.data.shards import find_shards, read_shards
from tinyclip.inputs.augment import Augment, jitter
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import on_colour


def test_batches_hold_uint8_images_tokens_and_class_groups(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "0.tar", [good(i, ("jpg", "png", "webp")[i % 3], **{"class": f"c{i % 2}"}) for i in range(12)]
    )
    batch = next(iter(loader(tmp_path)))
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (4, 3, 16, 16)
    assert batch.tokens.shape == (4, 16)
    for key, tokens, group in zip(batch.keys, batch.tokens, batch.groups, strict=True):
        i = int(key.rpartition("/")[2])
        assert clip_tokenizer().decode(tokens.tolist()) in (f"caption {WORDS[i]}", f"words {WORDS[i]}")
        same = [int(k.rpartition("/")[2]) % 2 == i % 2 for k in batch.keys]
        assert (batch.groups == group).tolist() == same


def test_every_sample_is_visited_and_every_caption_drawn(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [good(i) for i in range(8)])
    write_shard(tmp_path / "1.tar", [good(i) for i in range(8, 12)])
    batches = iter(loader(tmp_path))
    seen = [next(batches) for _ in range(24)]
    keys = [k.rpartition("/")[2] for b in seen for k in b.keys]
    assert sorted(set(keys)) == [f"{i:05d}" for i in range(12)]
    texts = {clip_tokenizer().decode(t.tolist()) for b in seen for t in b.tokens}
    assert texts == {f"{word} {WORDS[i]}" for i in range(12) for word in ("caption", "words")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_is_repeatable_and_resumes_exactly(tmp_path: Path, workers: int) -> None:
    write_shard(tmp_path / "0.tar", [good(i) for i in range(20)])
    augment = Augment(scale=(0.3, 1.0), rotate=20, colour=0.3)
    whole = loader(tmp_path, workers=workers, augment=augment)
    batches = iter(whole)
    first = [next(batches) for _ in range(3)]
    state = whole.save_state_rank()
    rest = [next(batches) for _ in range(4)]
    again = iter(loader(tmp_path, workers=workers, augment=augment))
    for batch in first:
        assert torch.equal(batch.images, next(again).images)
    resumed = loader(tmp_path, workers=workers, augment=augment)
    resumed.restore_state_rank(state)
    batches = iter(resumed)
    for batch in rest:
        other = next(batches)
        assert batch.keys == other.keys
        assert torch.equal(batch.images, other.images) and torch.equal(batch.tokens, other.tokens)
    different = next(iter(loader(tmp_path, workers=workers, augment=augment, seed=1)))
    assert not torch.equal(different.images, first[0].images)


def test_bad_samples_are_skipped_and_named(tmp_path: Path) -> None:
    bad = [
        {"key": "a", "jpg": picture(0)[:200], "txt": b"truncated"},
        {"key": "b", "jpg": picture(0)},
        {"key": "c", "jpg": picture(0), "json": b'{"caption": "  "}'},
        {"key": "d", "txt": b"no picture"},
        {"key": "e", "jpg": picture(0), "txt": b"\xff\xfe\xfa"},
        {"key": "f", "jpg": b"no picture", "txt": b"text"},
        {"key": "g", "jpg": picture(0), "json": b"[1"},
    ]
    write_shard(tmp_path / "0.tar", [good(i) for i in range(12)] + bad)
    batches = iter(loader(tmp_path))
    skipped = {(s.shard, s.key): s.reason for _ in range(12) for s in next(batches).skipped}
    assert {key for _, key in skipped} == set("abcdefg") and {shard for shard, _ in skipped} == {"0.tar"}
    reasons = {key: reason for (_, key), reason in skipped.items()}
    assert reasons["b"] == reasons["c"] == "no caption"
    assert "damaged" in reasons["a"] and "no picture" in reasons["d"] and "cannot be read" in reasons["e"]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_a_good_sample_fails_clearly(tmp_path: Path, workers: int) -> None:
    write_shard(tmp_path / "0.tar", [{"key": f"{i}", "jpg": b"junk", "txt": b"t"} for i in range(8)])
    batches = iter(loader(tmp_path, workers=workers))
    with pytest.raises(ValueError, match=r"^[^\n]*1,000 samples in a row are bad; the last: 0\.tar, \d: not a picture"):
        next_batch(batches, tmp_path)


def test_captions_of_the_usual_forms() -> None:
    assert captions_of({"txt": b"one\ntwo\n\n"}) == ["one", "two"]
    assert captions_of({"json": b'{"caption": "from json"}', "txt": b"from text"}) == ["from json"]
    assert captions_of({"json": b'{"width": 3}', "txt": b"from text"}) == ["from text"]
    assert captions_of({"json": b'{"captions": ["a", 3, " b "]}'}) == ["a", "b"]
    assert captions_of({}) == []
    with pytest.raises(ValueError, match="caption is int, not text"):
        captions_of({"json": b'{"caption": 12}'})


def test_prepare_follows_the_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [good(i) for i in range(3)])
    assert prepare(tmp_path) == 3
    written = (tmp_path / ".nv-meta" / "ready").stat().st_mtime_ns
    assert prepare(tmp_path) == 3 and (tmp_path / ".nv-meta" / "ready").stat().st_mtime_ns == written
    write_shard(tmp_path / "1.tar", [good(i) for i in range(3, 5)])
    assert prepare(tmp_path) == 5


def test_gzipped_shards_are_unpacked_once(tmp_path: Path) -> None:
    import gzip

    write_shard(tmp_path / "0.tar", [good(i) for i in range(3)])
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").unlink()
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(data))
    assert prepare(tmp_path) == 3
    assert (tmp_path / "0.tar").read_bytes() == data
    assert [p.name for p in find_shards(tmp_path)] == ["0.tar"]
    assert [s["__key__"] for s in read_shards(tmp_path)] == ["00000", "00001", "00002"]
    write_shard(tmp_path / "new.tar", [good(i) for i in range(4)])
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress((tmp_path / "new.tar").read_bytes()))
    (tmp_path / "new.tar").unlink()
    later = (tmp_path / "0.tar").stat().st_mtime + 10
    os.utime(tmp_path / "0.tar.gz", (later, later))
    assert [p.name for p in find_shards(tmp_path)] == ["0.tar.gz"]
    assert prepare(tmp_path) == 4
    assert [p.name for p in find_shards(tmp_path)] == ["0.tar"]


def test_folders_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such data folder"):
        prepare(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no \.tar shards"):
        prepare(tmp_path)
    write_shard(tmp_path / "0.tar", [good(i) for i in range(30)])
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(b"this is no tar" * 100)
    for read in (prepare, lambda folder: list(read_shards(folder))):
        with pytest.raises(ValueError, match=r"0\.tar: damaged shard"):
            read(tmp_path)
    (tmp_path / "0.tar").unlink()
    (tmp_path / "0.tar.gz").write_bytes(data[:1000])
    for read in (prepare, lambda folder: list(read_shards(folder))):
        with pytest.raises(ValueError, match=r"0\.tar\.gz: damaged shard"):
            read(tmp_path)
    (tmp_path / "0.tar.gz").unlink()
    write_shard(tmp_path / "0.tar", [])
    with pytest.raises(ValueError, match=r"0\.tar: an empty shard"):
        prepare(tmp_path)
    write_shard(tmp_path / "0.tar", [good(1), good(1), good(1)])
    with pytest.raises(ValueError, match=r"2 of its 3 samples cannot be used; .*0\.tar: sample 2 has the same key as"):
        prepare(tmp_path)


def test_augmentation_is_a_function_of_its_generator() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8), "RGBA")
    augment = Augment(scale=(0.5, 1), rotate=20, shear=10, shrink=0.3, colour=0.4, background=True)
    one, two, other = (augment.view(image, 24, Random(seed)) for seed in (1, 1, 2))
    assert one.shape == (3, 24, 24) and one.dtype == np.uint8
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_the_default_view_is_a_crop_of_the_picture() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 64, 3))
    views = [Augment(scale=(0.25, 0.25), ratio=1).view(Image.fromarray(ramp.copy()), 32, Random(i)) for i in range(20)]
    for view in views:  # half the ramp's width, so half its range, and still increasing
        row = view[0, 0].astype(int)
        assert 100 < row[-1] - row[0] < 140 and (np.diff(row) >= 0).all()
    assert len({int(v[0, 0, 0]) for v in views}) > 5


def test_backgrounds_and_colour() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert on_colour(clear, (1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    solid = Image.new("RGB", (8, 8), (9, 9, 9))
    assert on_colour(solid, (1, 2, 3)) is solid
    grey = np.full((4, 4, 3), 100, np.uint8)
    assert [int(jitter(grey, b, 1, 1)[0, 0, 0]) for b in (0.5, 1, 1.5, 3)] == [50, 100, 150, 255]
    views = [Augment(colour=0.5).view(Image.fromarray(grey), 4, Random(i)) for i in range(50)]
    values = {int(view[0, 0, 0]) for view in views}
    assert min(values) >= 50 and max(values) <= 150 and len(values) > 20


@pytest.mark.parametrize("field", ["scale: [0, 1]", "rotate: 181", "colour: -1", "unknown: 1"])
def test_impossible_augmentations_are_refused(field: str) -> None:
    import yaml

    with pytest.raises(ValueError, match=field.partition(":")[0]):
        Augment.model_validate(yaml.safe_load(field))


def test_the_index_of_an_older_version_stays_and_names_todays_reader(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [good(i) for i in range(8)])
    prepare(tmp_path)
    named, counts = tmp_path / ".nv-meta" / "dataset.yaml", tmp_path / ".nv-meta" / ".info.json"
    named.write_text('{"__module__": "tinyclip.index", "__class__": "Shards"}')
    before = counts.stat()
    assert len(next(iter(loader(tmp_path))).keys) == 4
    assert counts.stat().st_mtime_ns == before.st_mtime_ns and "shard_reader" in named.read_text()
