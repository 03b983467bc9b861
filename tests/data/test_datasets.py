"""Evaluation data in every layout, as published."""

from __future__ import annotations

import io
import json
import os
import tarfile
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest

from tests.helpers.shards import picture, write_shard
from tinyclip.data.classnames import imagenet, imagenet_templates
from tinyclip.data.datasets import Dataset, find_splits, open_dataset


def labels_of(dataset: Dataset) -> dict[str, str]:
    """Return key -> class name."""
    return {e.key: dataset.classnames[e.label] for e in dataset if e.label is not None}


def folders(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "a.jpg").write_bytes(picture(i))
    return root


def tar(path: Path, files: dict[str, bytes]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def benchmark(root: Path, split: str = "test", **files: list[dict[str, Any]]) -> Path:
    """Write CLIP_benchmark's tree: shards by name, each a list of samples."""
    (root / split).mkdir(parents=True, exist_ok=True)
    for name, samples in files.items():
        write_shard(root / split / f"{name.strip('_')}.tar", samples)
    (root / split / "nshards.txt").write_text(f"{len(files)}\n")
    return root


def test_the_included_lists_are_those_of_others() -> None:
    open_clip, timm = (Path(str(find_spec(name).origin)).parent for name in ("open_clip", "timm"))  # type: ignore[union-attr]
    theirs = run_path(str(open_clip / "zero_shot_metadata.py"))
    assert list(imagenet().values()) == list(theirs["IMAGENET_CLASSNAMES"])
    expected = [template("{c}") for template in theirs["OPENAI_IMAGENET_TEMPLATES"]]
    assert list(imagenet_templates()) == expected and len(expected) == 80
    for name in ("imagenet", "imagenet-a", "imagenet-r"):
        file = timm / "data" / "_info" / f"{name.replace('-', '_')}_synsets.txt"
        assert list(imagenet(name)) == file.read_text().split()


def test_imagenet_folders_by_wordnet_ids_and_by_number(tmp_path: Path) -> None:
    some = open_dataset(folders(tmp_path / "val", ["n01440764", "n02119789", "n15075141"]))
    assert some.classnames == ["tench", "kit fox", "toilet paper"] and len(some.templates) == 80
    assert labels_of(some)["n02119789/a.jpg"] == "kit fox"
    everything = open_dataset(tmp_path / "val", classes="imagenet")  # the same pictures with all classes
    assert len(everything.classnames) == 1000 and labels_of(everything) == labels_of(some)
    ours = folders(tmp_path / "a", ["n01498041", "n03250847"])
    assert len(open_dataset(ours, classes="imagenet-a").classnames) == 200
    assert labels_of(open_dataset(ours, classes="imagenet-a"))["n01498041/a.jpg"] == "stingray"
    with pytest.raises(
        ValueError, match="imagenet-r names 200 classes, but there are 2 folders, and folder 'n03250847'"
    ):
        open_dataset(ours, classes="imagenet-r")
    v2 = folders(tmp_path / "v2", ["0", "10", "2", "999"])
    assert open_dataset(v2).classnames == ["0", "10", "2", "999"]  # could mean anything
    assert list(labels_of(open_dataset(v2, classes="imagenet")).values()) == [
        "tench",
        "brambling",
        "great white shark",
        "toilet paper",
    ]
    with pytest.raises(ValueError, match="n00000001 is not one of ImageNet's 1,000 classes"):
        open_dataset(folders(tmp_path / "21k", ["n00000001", "n01440764"]))


def test_all_thousand_numbers_are_imagenet_v2(tmp_path: Path) -> None:
    data = picture(0)
    for i in range(1000):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "x.jpeg").write_bytes(data)
    dataset = open_dataset(tmp_path)
    assert dataset.classnames == list(imagenet().values()) and dataset.templates == list(imagenet_templates())
    _, item = next(dataset.reader(lambda number: True, []))
    assert (item.key, item.label) == ("0/x.jpeg", 0)
    keys = {item.key: item.label for _, item in dataset.reader(lambda number: True, [])}
    assert keys["10/x.jpeg"] == 10 and keys["999/x.jpeg"] == 999


def test_class_names_of_a_file(tmp_path: Path) -> None:
    root = folders(tmp_path / "d", ["fox", "wolf_dog"])
    (tmp_path / "names.txt").write_text("\ufeffRed fox \nWolfdog\n\n", encoding="utf-8")
    assert open_dataset(root, classes=tmp_path / "names.txt").classnames == ["Red fox", "Wolfdog"]
    (root / "classnames.txt").write_text("owl\nwolf dog\nfox\n")  # more names than folders: matched by name
    assert labels_of(open_dataset(root)) == {"fox/a.jpg": "fox", "wolf_dog/a.jpg": "wolf dog"}
    (root / "classnames.txt").write_text("wolf dog\nfox\n")  # as many, same names: also by name
    assert labels_of(open_dataset(root)) == {"fox/a.jpg": "fox", "wolf_dog/a.jpg": "wolf dog"}
    (root / "classnames.txt").write_text("owl\nwolf dog\nfoxes\n")
    with pytest.raises(ValueError, match=r"classnames\.txt names 3 classes, but there are 2 folders, and folder 'fox'"):
        open_dataset(root)
    (root / "classnames.txt").write_text("owl\n\nfox\n")
    with pytest.raises(ValueError, match="line 2 is blank"):
        open_dataset(root)
    (root / "classnames.txt").write_text(" \n")
    with pytest.raises(ValueError, match="contains no class names"):
        open_dataset(root)
    with pytest.raises(ValueError, match="no such file"):
        open_dataset(root, classes="nowhere.txt")


def test_templates_by_name_and_of_clip_benchmark(tmp_path: Path) -> None:
    root = folders(tmp_path / "d", ["fox"])
    assert open_dataset(root, "imagenet").templates == list(imagenet_templates())
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n")
    assert open_dataset(root).templates == ["a photo of {c}."]
    (root / "templates.txt").write_text("{c}\n")
    assert open_dataset(root).templates == ["{c}"]


def test_the_authors_tar_and_a_tar_of_tars(tmp_path: Path) -> None:
    names = ["n02119789", "n01440764"]
    files = {f"val/{name}/{name}_{i}.JPEG": picture(i) for name in names for i in range(2)}
    files["val/n01440764/broken.JPEG"] = b"junk"
    tar(tmp_path / "imagenet" / "val.tar", files | {"val/readme.txt": b"x"})
    inner = {
        f"{name}.tar": tar(tmp_path / "inner.tar", {f"{name}_{i}.JPEG": picture(i)}) for i, name in enumerate(names)
    }
    tar(tmp_path / "imagenet" / "train.tar", inner)
    dataset = open_dataset(tmp_path / "imagenet")
    assert dataset.classnames == ["tench", "kit fox"]
    found = labels_of(dataset)
    assert len(found) == 4 and found["val/n02119789/n02119789_1.JPEG"] == "kit fox"
    assert [(s.key, s.cause) for s in dataset.skipped] == [("val/n01440764/broken.JPEG", "corrupt_image")]
    examples = {e.key: np.asarray(e.image) for e in dataset}
    expected = {e.key: np.asarray(e.image) for e in open_dataset(tmp_path / "imagenet" / "val.tar")}
    assert all(np.array_equal(examples[key], expected[key]) for key in expected) and len(expected) == 4
    nested = open_dataset(tmp_path / "imagenet", split="train")
    assert labels_of(nested) == {"n02119789_0.JPEG": "kit fox", "n01440764_1.JPEG": "tench"}
    whole = (tmp_path / "imagenet" / "val.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    cut = open_dataset(tmp_path / "cut.tar")
    assert 0 < len(labels_of(cut)) < 4 and {s.cause for s in cut.skipped} == {"truncated_shard"}


def test_a_damaged_tar_in_a_tar_is_left_out_alone(tmp_path: Path) -> None:
    whole = tar(tmp_path / "inner.tar", {"a.jpg": picture(0), "b.jpg": picture(1)})
    inner = {"cat.tar": whole, "cow.tar": b"junk" * 300, "dog.tar": whole[:600], "fox.tar": whole}
    tar(tmp_path / "all.tar", inner)
    dataset = open_dataset(tmp_path / "all.tar")
    assert [dataset.classnames[e.label or 0] for e in dataset] == ["cat", "cat", "fox", "fox"]
    assert [(s.shard, s.key) for s in dataset.skipped] == [("all.tar", "cow.tar"), ("all.tar", "dog.tar")]


def test_keys_can_be_written_whatever_the_names_are(tmp_path: Path) -> None:
    root = folders(tmp_path / "d", ["fox"])
    (root / "fox" / "a.jpg").rename(os.fsdecode(bytes(root) + b"/fox/caf\xe9.jpg"))
    assert [e.key for e in open_dataset(root)] == ["fox/caf\\xe9.jpg"]


def test_the_tree_of_clip_benchmark(tmp_path: Path) -> None:
    def sample(i: int, label: str) -> dict[str, Any]:
        return {"key": f"s{i:07d}", "cls": label.encode(), "webp": picture(i, "webp")}

    root = benchmark(tmp_path / "wds", _0=[sample(0, "0"), sample(1, "1")], _1=[sample(2, "2"), sample(3, "fox")])
    benchmark(root, "train", _0=[sample(4, "0")])
    (root / "classnames.txt").write_text("fox\nwolf\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n")
    dataset = open_dataset(root)
    assert labels_of(dataset) == {"s0000000": "fox", "s0000001": "wolf", "s0000003": "fox"}
    assert [str(s) for s in dataset.skipped] == [
        f"1.tar, s0000002: class number 2, but {root}/classnames.txt names 2, from 0"
    ]
    assert dataset.templates == ["a photo of {c}."] and list(find_splits(root)) == ["test", "train"]
    for place in (root / "test", root / "test" / "0.tar"):  # names are found in the folder above
        assert open_dataset(place).classnames == ["fox", "wolf"]
    assert len(labels_of(open_dataset(root, split="train"))) == 1
    with pytest.raises(ValueError, match="no split 'val'; it has test, train"):
        open_dataset(root, split="val")
    (root / "test" / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"lists 2 shards, 1 of them missing \(1\.tar\); download the rest"):
        open_dataset(root)


def test_several_classes_of_a_picture(tmp_path: Path) -> None:
    def sample(i: int, array: Any) -> dict[str, Any]:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return {"key": f"s{i}", "jpg": picture(i), "npy": buffer.getvalue()}

    rows = [sample(0, np.array([1, 0, 1])), sample(1, np.zeros(3)), sample(2, np.zeros(4))]
    root = benchmark(tmp_path, _0=[*rows, {"key": "s3", "jpg": picture(3), "npy": b"junk"}])
    (root / "classnames.txt").write_text("a\nb\nc\n")
    dataset = open_dataset(root)
    assert [e.labels for e in dataset] == [(0, 2), ()]
    assert [s.cause for s in dataset.skipped] == ["unknown_class"] * 2


def test_captions_of_clip_benchmark_and_of_pictures_beside(tmp_path: Path) -> None:
    sample = {"key": "s0", "jpg": picture(0), "txt": b"a fox\n\nred animal \n"}
    root = benchmark(tmp_path / "wds", _0=[sample])
    (root / "dataset_type.txt").write_text("retrieval\n")
    assert [e.captions for e in open_dataset(root)] == [("a fox", "red animal")]
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "0.jpg").write_bytes(picture(0))
    (tmp_path / "flat" / "0.txt").write_text("a fox\n")
    assert [(e.key, e.captions) for e in open_dataset(tmp_path / "flat")] == [("0.jpg", ("a fox",))]


def karpathy(root: Path, filepath: str | None = None) -> Path:
    rows = []
    for i, split in enumerate(["train", "test", "val", "test"]):
        row = {"filename": f"{i}.jpg", "split": split, "sentences": [{"raw": f" {i} {c}"} for c in "abcde"]}
        rows.append(row | ({"filepath": filepath} if filepath else {}))
    root.mkdir()
    (root / "split.json").write_text(json.dumps({"images": rows, "dataset": "x"}))
    return root / "split.json"


def test_captions_beside_pictures_in_folders(tmp_path: Path) -> None:
    root = folders(tmp_path / "photos", ["2023", "2024"])
    (root / "2023" / "a.txt").write_text("a fox")
    (root / "2024" / "a.json").write_text('{"caption": "two foxes"}')
    both = open_dataset(root)  # the caller decides whether the folders are classes
    assert labels_of(both) == {"2023/a.jpg": "2023", "2024/a.jpg": "2024"}
    assert {e.key: e.captions for e in both} == {"2023/a.jpg": ("a fox",), "2024/a.jpg": ("two foxes",)}
    (root / "top.jpg").write_bytes(picture(5))
    (root / "top.txt").write_bytes(b"caf\xe9")
    captioned = open_dataset(root)
    assert not captioned.classnames
    assert {e.key: e.captions for e in captioned} == {"2023/a.jpg": ("a fox",), "2024/a.jpg": ("two foxes",)}
    assert [(s.key, s.cause) for s in captioned.skipped] == [("top.jpg", "bad_encoding")]


def test_pictures_beside_class_folders_have_no_class(tmp_path: Path) -> None:
    root = folders(tmp_path / "classes", ["fox", "owl"])
    (root / "loose.jpg").write_bytes(picture(5))
    dataset = open_dataset(root)
    assert labels_of(dataset) == {"fox/a.jpg": "fox", "owl/a.jpg": "owl"}
    assert [str(s) for s in dataset.skipped] == ["loose.jpg: not in a class folder"]


def test_a_bad_line_of_a_table_costs_no_other(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(picture(1))
    (tmp_path / "t.csv").write_bytes(b"image,caption\na.jpg,a fox\nb.jpg,caf\xe9\n")
    dataset = open_dataset(tmp_path / "t.csv")
    assert [e.key for e in dataset] == ["a.jpg"]
    assert [(s.key, s.cause) for s in dataset.skipped] == [("b.jpg", "bad_encoding")]


@pytest.mark.parametrize("filepath", [None, "val2014"])
def test_split_files_of_karpathy(tmp_path: Path, filepath: str | None) -> None:
    file = karpathy(tmp_path / "d", filepath)
    with pytest.raises(ValueError, match=r"none of the 2 pictures is in .* name their folder with --images"):
        open_dataset(file)
    place = tmp_path / "d" / (filepath or "flickr30k-images")
    place.mkdir()
    (place / "3.jpg").write_bytes(picture(3))
    dataset = open_dataset(file)
    assert [(Path(e.key).name, e.captions) for e in dataset] == [("3.jpg", tuple(f"3 {c}" for c in "abcde"))]
    assert [(Path(s.key).name, s.cause, s.reason) for s in dataset.skipped] == [("1.jpg", "no_image", "no such file")]
    assert len(list(open_dataset(file, images=place))) == 1  # COCO's `filepath` may be the folder itself
    with pytest.raises(ValueError, match="no split 'dev'; it has test, train, val"):
        open_dataset(file, split="dev")
    file.rename(file.with_name("dataset_coco.json"))
    assert len(list(open_dataset(tmp_path / "d"))) == 1
    rows = json.loads((tmp_path / "d" / "dataset_coco.json").read_text())["images"]
    for content, named in (
        ("[]", "a JSON list"),
        ("{}", r'no list of `"images"`'),
        ('{"images": {"a": 1}}', r'no list of `"images"`'),
        ("junk", "cannot be read as JSON"),
        *(
            (json.dumps({"images": [*rows, odd]}), r"images\[4\] lacks `filename`, `split`")
            for odd in (1, {"filename": 1})
        ),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"split\.json: {named}"):
            open_dataset(file)


def test_captioned_pictures_have_no_classes_to_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "a.csv").write_text("image,caption\na.jpg,a cat\n")
    for data in (tmp_path, tmp_path / "a.csv"):
        assert [e.captions for e in open_dataset(data)] == [("a cat",)]
        with pytest.raises(ValueError, match="captions, not classes"):
            open_dataset(data, classes="imagenet")


def test_tables(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(picture(i))
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n0.jpg,a fox\n1.jpg,a wolf\n0.jpg,red\n9.jpg,gone\n")
    dataset = open_dataset(table, images=tmp_path / "pictures")
    assert [e.captions for e in dataset] == [("a fox", "red"), ("a wolf",)]
    assert [(s.key, s.cause) for s in dataset.skipped] == [("pictures/9.jpg", "no_image")]
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"where": "pictures/0.jpg", "words": ["a fox", "red"]}\n')
    options: dict[str, Any] = {"image_column": "where", "caption_column": "words"}
    assert [e.captions for e in open_dataset(lines, **options)] == [("a fox", "red")]
    with pytest.raises(ValueError, match=r"no column one of .* name the right one with --image-column"):
        open_dataset(lines)
    with pytest.raises(ValueError, match="it has no splits"):
        open_dataset(table, split="test")
    with pytest.raises(ValueError, match="is not a table, so it has no columns"):
        open_dataset(tmp_path, image_column="where")
    with pytest.raises(ValueError, match="--images is for a table"):
        open_dataset(folders(tmp_path / "f", ["fox"]), images=tmp_path)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match=r"x\.txt: not a folder, a"):
        open_dataset(tmp_path / "x.txt")


def test_splits_of_class_folders(tmp_path: Path) -> None:
    for split, names in (("train", ["fox", "wolf"]), ("val", ["fox"])):
        folders(tmp_path / "d" / split, names)
    assert open_dataset(tmp_path / "d").classnames == ["fox"]
    assert open_dataset(tmp_path / "d", split="train").classnames == ["fox", "wolf"]
    folders(tmp_path / "e", ["train", "car"])  # classes, one of them with the name of a split
    assert open_dataset(tmp_path / "e").classnames == ["car", "train"]
    folders(tmp_path / "d", ["other"])
    assert open_dataset(tmp_path / "d").classnames == ["other", "train", "val"]


def test_a_share_is_opened_alone(tmp_path: Path) -> None:
    """A process does not read the others' pictures; together the shares are the whole, with the same indices."""
    files = {f"{c}/{i}.jpg": picture(i) for c in "ab" for i in range(3)}
    tar(tmp_path / "t.tar", files)
    folders(tmp_path / "f", ["a", "b", "c", "d"])
    write_shard(tmp_path / "s.tar", [{"key": str(i), "jpg": picture(i), "json": b"{}"} for i in range(5)])
    for place in (tmp_path / "t.tar", tmp_path / "f", tmp_path / "s.tar"):
        dataset = open_dataset(place)
        whole = {n: e.key for n, e in dataset.share(lambda n: True)}
        parts = [{n: e.key for n, e in dataset.share(lambda n, r=r: n % 2 == r)} for r in (0, 1)]  # type: ignore[misc]
        assert parts[0] | parts[1] == whole and set(parts[0]) == {n for n in whole if n % 2 == 0}
