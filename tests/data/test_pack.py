from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tests.helpers.commands import tinyclip
from tests.helpers.shards import loader
from tinyclip.cli import terminal
from tinyclip.common.faults import Skipped
from tinyclip.common.files import read_json_object
from tinyclip.data import classnames
from tinyclip.data.pack import find_items, pack
from tinyclip.data.samples import captions_of, image_of, info_of
from tinyclip.data.shards import read_shards
from tinyclip.search.sources import open_source


def picture(path: Path, size: tuple[int, int] = (30, 20), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 50).convert(mode).save(path)
    return path


def packed(folder: Path) -> list[tuple[str, list[str]]]:
    return [(info_of(s)["file"], captions_of(s)) for s in read_shards(folder)]


def test_sidecar_captions(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("a.jpg", "b.png", "sub/c.webp", "d.bmp", "e.tif", "nothing.jpg"):
        picture(source / name)
    (source / "a.txt").write_text("first\nsecond\n")
    (source / "b.json").write_text('{"caption": "of b"}')
    (source / "sub" / "c.txt").write_text("of c")
    (source / "d.txt").write_text("of d")
    (source / "e.txt").write_text("of e")
    (source / "broken.jpg").write_bytes((source / "a.jpg").read_bytes()[:300])
    (source / "broken.txt").write_text("broken")
    (source / "phone.heic").write_bytes(b"heic")
    (source / "phone.txt").write_text("of a phone")
    picture(source / "wrong.jpg")
    (source / "wrong.txt").write_bytes(b"\xff\xfe")
    report = pack(find_items(source), tmp_path / "out", shard_size=2)
    assert packed(tmp_path / "out") == [
        ("a.jpg", ["first", "second"]),
        ("b.png", ["of b"]),
        ("d.bmp", ["of d"]),
        ("e.tif", ["of e"]),
        ("c.webp", ["of c"]),
    ]
    assert (report.packed, report.captions, report.shards) == (5, 6, 3)
    skipped = {Path(s.key).name: s.reason for s in report.skipped}
    assert "cannot be read" in skipped["wrong.jpg"]
    assert skipped["nothing.jpg"] == "no caption" and skipped["broken.jpg"].startswith("damaged picture")
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert {Path(json.loads(line)["file"]).name for line in lines} == {
        "nothing.jpg",
        "broken.jpg",
        "wrong.jpg",
        "phone.heic",
    }
    first = next(iter(read_shards(tmp_path / "out")))
    assert first["jpg"] == (source / "a.jpg").read_bytes()
    assert next(iter(loader(tmp_path / "out", batch_size=5))).images.shape == (5, 3, 16, 16)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(tmp_path: Path, ending: str) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "pictures" / name)
    rows = [("a.jpg", 'one, "quoted"'), ("b.jpg", "two"), ("a.jpg", "three"), ("gone.jpg", "four")]
    table = tmp_path / f"table.{ending}"
    if ending in ("csv", "tsv"):
        mark = "," if ending == "csv" else "\t"
        quoted = [f"{file}{mark}" + '"' + text.replace('"', '""') + '"' for file, text in rows]
        table.write_text("\n".join([f"file{mark}words", *quoted]))
    elif ending == "jsonl":
        table.write_text("\n".join(json.dumps({"file": file, "words": [text]}) for file, text in rows))
    else:
        columns = {"file": [r[0] for r in rows], "words": [r[1] for r in rows]}
        pyarrow.parquet.write_table(pyarrow.table(columns), table)
    items = find_items(table, caption_column="words", image_root=tmp_path / "pictures")
    report = pack(items, tmp_path / "out")
    assert packed(tmp_path / "out") == [("a.jpg", ['one, "quoted"', "three"]), ("b.jpg", ["two"])]
    assert report.skipped == [Skipped("", str(tmp_path / "pictures" / "gone.jpg"), "no_image", "no such file")]


def test_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "red_fox" / "1.png")
    picture(tmp_path / "in" / "owl" / "1.png")
    pack(find_items(tmp_path / "in", templates=["a photo of a {c}", "the {c}"]), tmp_path / "out")
    samples = list(read_shards(tmp_path / "out"))
    assert [info_of(s)["class"] for s in samples] == ["owl", "red fox"]
    assert (tmp_path / "out" / "classnames.txt").read_text() == "owl\nred fox\n"
    assert captions_of(samples[1]) == ["a photo of a red fox", "the red fox"]


def test_resize_only_shrinks(tmp_path: Path) -> None:
    for name, size in (("big.jpg", (300, 200)), ("small.jpg", (30, 20)), ("deep.png", (100, 100))):
        picture(tmp_path / "in" / name, size)
        (tmp_path / "in" / name).with_suffix(".txt").write_text("text")
    Image.fromarray(np.full((100, 100), 40000, np.uint16)).save(tmp_path / "in" / "deep.png")
    pack(find_items(tmp_path / "in"), tmp_path / "out", resize=50)
    sizes = {info_of(s)["file"]: image_of(s).size for s in read_shards(tmp_path / "out")}
    assert sizes == {"big.jpg": (75, 50), "small.jpg": (30, 20), "deep.png": (50, 50)}


def test_sources_that_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        find_items(tmp_path / "missing")
    with pytest.raises(ValueError, match="no such file"):
        find_items(tmp_path / "missing.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        find_items(tmp_path / "empty")
    picture(tmp_path / "in" / "a.jpg")
    with pytest.raises(ValueError, match="no picture has a caption beside it"):
        find_items(tmp_path / "in")
    with pytest.raises(ValueError, match=r"needs \{c\}"):
        find_items(tmp_path / "in", templates=["a photo"])
    (tmp_path / "t.csv").write_text("url,alt\na.jpg,hello\n")
    with pytest.raises(ValueError, match=r"it has url, alt\); name the right one with --image-column"):
        find_items(tmp_path / "t.csv")
    with pytest.raises(ValueError, match="no column 'nope'"):
        find_items(tmp_path / "t.csv", image_column="url", caption_column="nope")
    (tmp_path / "t.jsonl").write_text('{"image": "a.jpg", "caption": "x"}\n{broken\n[1]')
    with pytest.raises(
        ValueError, match=r"t\.jsonl: 2 of its 3 rows cannot be read, the first: t\.jsonl, line 2: not complete"
    ):
        find_items(tmp_path / "t.jsonl")
    (tmp_path / "t.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"t\.parquet: cannot be read"):
        find_items(tmp_path / "t.parquet")


def test_nothing_half_written(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "a.txt").write_text("text")
    items = find_items(tmp_path / "in")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(items, tmp_path / "out", progress=stop)
    (tmp_path / "in" / "a.jpg").write_bytes(b"junk")
    with pytest.raises(
        ValueError, match=r"all 1 pictures were skipped \(1 corrupt_image\); the first: .*a\.jpg: not a"
    ):
        pack(items, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ValueError, match="--overwrite"):
        pack(items, tmp_path / "out")
    (tmp_path / "file").touch()
    picture(tmp_path / "in" / "a.jpg")
    with pytest.raises(ValueError, match="cannot write"):
        pack(items, tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="holds the pictures to pack"):
        pack(items, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"out has no \.tinyclip\.json.* \(precious\), so it is left alone"):
        pack(items, tmp_path / "out", overwrite=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
    (tmp_path / "out" / "precious").unlink()
    for _ in range(2):
        pack(items, tmp_path / "out", overwrite=True)


def test_names_and_captions_that_are_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in (b"caf\xe9", b"good", b"bad"):
        picture(Path(os.fsdecode(os.fsencode(folder) + b"/" + name + b".jpg")))
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name + b".txt")).write_bytes(b"\xff" if name == b"bad" else b"a")
    report = pack(find_items(folder), tmp_path / "out")
    assert [info_of(s)["file"] for s in read_shards(tmp_path / "out")] == ["caf\\xe9.jpg", "good.jpg"]
    assert [s.cause for s in report.skipped] == ["bad_encoding"]
    (folder / "t.jsonl").write_bytes(b'{"path": "good.jpg", "text": "\xff"}\n{"path": "bad.jpg", "text": "b"}\n')
    good, bad = find_items(folder / "t.jsonl")
    assert good.problem is not None and good.problem.cause == "bad_encoding" and bad.captions == ("b",)


# --- class folders ----------------------------------------------------------------------------------------------


def captions_in(folder: Path) -> list[str]:
    return [caption for sample in read_shards(folder) for caption in captions_of(sample)]


def class_tree(root: Path, *places: str) -> Path:
    for place in places:
        picture(root / place / "1.png")
    return root


def pack_classes(source: Path, out: Path, *options: object, code: int = 0) -> str:
    templates = out.with_suffix(".txt")
    templates.write_bytes(b"\xef\xbb\xbfa photo of a {c}\r\n")
    return tinyclip("data", "pack", source, out, "--templates", templates, *options, code=code)


def test_splits_of_class_folders_are_no_classes(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "in", "train/bus", "train/red_car", "val/bus", "val/van")
    output = pack_classes(root, tmp_path / "out")
    assert "using the training split of val, train; choose another with --split" in output
    assert captions_in(tmp_path / "out") == ["a photo of a bus", "a photo of a red car"]
    pack_classes(root, tmp_path / "val", "--split", "val")
    assert captions_in(tmp_path / "val") == ["a photo of a bus", "a photo of a van"]
    assert "no split 'test'; it has val, train" in pack_classes(root, tmp_path / "no", "--split", "test", code=2)
    pack_classes(root / "train", tmp_path / "train")
    assert captions_in(tmp_path / "train") == ["a photo of a bus", "a photo of a red car"]


@pytest.mark.parametrize("names", [("valid", "test"), ("VAL", "Test"), ("validation", "dev")])
def test_splits_without_one_to_train_on_are_asked_for(tmp_path: Path, names: tuple[str, str]) -> None:
    root = class_tree(tmp_path / "in", *(f"{name}/bus" for name in names))
    assert "its folders are splits (" in (error := pack_classes(root, tmp_path / "out", code=2)) and "--split" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_splits_beside_other_folders_are_refused(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "in", "train/bus", "val/bus", "extra/van")
    assert "train looks like a split, but has other folders beside it" in pack_classes(root, tmp_path / "out", code=2)
    trains = class_tree(tmp_path / "vehicles", "bus", "train")  # contains pictures of trains
    pack_classes(trains, tmp_path / "out")
    assert captions_in(tmp_path / "out") == ["a photo of a bus", "a photo of a train"]


def test_wordnet_ids_become_names(tmp_path: Path) -> None:
    pack_classes(class_tree(tmp_path / "in", "n01440764", "n02123045", "my_dog"), tmp_path / "out")
    assert captions_in(tmp_path / "out") == ["a photo of a my dog", "a photo of a tench", "a photo of a tabby cat"]
    root = class_tree(tmp_path / "unknown", "n01440764", "n99999999")
    error = pack_classes(root, tmp_path / "no", code=2)
    assert "n99999999 is not one of ImageNet's 1,000 classes; name them with --classes FILE" in error


def test_an_empty_file_of_templates(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf\n \n")
    root = class_tree(tmp_path / "in", "fox")
    error = tinyclip("data", "pack", root, tmp_path / "out", "--templates", tmp_path / "t.txt", code=2)
    assert "t.txt: contains no templates; write one per line, with {c} for the class name" in error


def test_class_folders_that_are_no_utf8(tmp_path: Path) -> None:
    class_tree(tmp_path / "in", os.fsdecode(b"caf\xe9"), "bar")
    pack_classes(tmp_path / "in", tmp_path / "out")
    assert captions_in(tmp_path / "out") == ["a photo of a bar", "a photo of a caf\\xe9"]


def test_names_of_classes_are_read(tmp_path: Path) -> None:
    root = class_tree(tmp_path / "in", "train/0", "train/1", "loose")
    (root / "loose" / "1.png").rename(root / "train" / "loose.png")
    (root / "loose").rmdir()
    (root / "classnames.txt").write_bytes("\ufeffred fox\r\nbarn\u2028owl\r\n".encode())
    output = pack_classes(root, tmp_path / "out")
    assert captions_in(tmp_path / "out") == ["a photo of a red fox", "a photo of a barn\u2028owl"]
    assert "unknown_class" in output and "loose.png" in output
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    pack_classes(root, tmp_path / "other", "--classes", tmp_path / "names.txt")
    assert captions_in(tmp_path / "other") == ["a photo of a cat", "a photo of a dog"]


def test_sidecars_with_capital_endings(tmp_path: Path) -> None:
    for name, text in (("a.TXT", "a"), ("b.JSON", '\ufeff{"caption": "b"}'), ("c.Txt", "\ufeffc\u2028d")):
        picture((tmp_path / "in" / name).with_suffix(".PNG"))
        (tmp_path / "in" / name).write_text(text, encoding="utf-8")
    pack(find_items(tmp_path / "in"), tmp_path / "out")
    assert captions_in(tmp_path / "out") == ["a", "b", "c\u2028d"]


def test_marks_are_dropped_from_every_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufefffirst\r\nsecond\u2028half\rthird\n".encode())
    lines = ["first", "second\u2028half", "third"]
    assert terminal.read_lines(tmp_path / "a.txt") == lines == classnames.read_lines(tmp_path / "a.txt", "names")
    assert [text.caption for text in open_source(tmp_path / "a.txt").parts[0]] == lines
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"image": "a.jpg", "text": "b"}\n')
    assert find_items(tmp_path / "a.jsonl")[0].captions == ("b",)
