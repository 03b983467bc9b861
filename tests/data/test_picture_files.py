"""Which pictures in a folder are found; the rules are the same for every command."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyclip.cli import main
from tinyclip.data.datasets import open_dataset
from tinyclip.data.pack import find_items, pack
from tinyclip.data.picture_files import ENDINGS, LeftOut, find_pictures
from tinyclip.data.samples import IMAGE_TYPES, image_of
from tinyclip.data.shards import read_shards
from tinyclip.search.build import scan
from tinyclip.search.sources import open_source


def put(*places: Path) -> None:
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(place.name), 9, 9)).save(place, "PNG")


def link(place: Path, to: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(to, target_is_directory=True)


def found(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_pictures(folder)]


def left_out(folder: Path) -> list[tuple[str, str]]:
    places = list[LeftOut]()
    find_pictures(folder, places)
    return [(path.relative_to(folder).as_posix(), fault.cause) for path, fault in places]


# --- links


def test_linked_folders_are_followed_at_any_depth(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    put(root / "a.png", other / "b.png", other / "deep" / "c.png", tmp_path / "third" / "d.png")
    link(root / "link", other)
    link(other / "deep" / "further", tmp_path / "third")
    assert found(root) == ["a.png", "link/b.png", "link/deep/c.png", "link/deep/further/d.png"]
    assert left_out(root) == []


def test_each_real_folder_is_read_once_and_where_it_really_is(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    put(root / "z" / "a.png", other / "b.png", other / "inner" / "c.png")
    link(root / "a", root / "z")
    link(root / "b", other)
    link(root / "c", other)
    link(root / "d", other / "inner")
    assert found(root) == ["b/b.png", "b/inner/c.png", "z/a.png"]


@pytest.mark.parametrize("to", [".", "..", "sub", "sub/back", "nothing", "../.."])
def test_loops_end(to: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    put(root / "a.png", root / "sub" / "b.png")
    put(tmp_path / "outside.png")
    link(root / "sub" / "back", root / to)
    assert found(root) == ["a.png", "sub/b.png"]


@pytest.mark.parametrize("to", ["nothing", "lost"], ids=["to nothing", "to itself"])
def test_a_link_that_leads_nowhere_is_named(to: str, tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "file").symlink_to(tmp_path / "a.png")
    link(tmp_path / "lost", tmp_path / to)
    assert found(tmp_path) == ["a.png"]
    assert left_out(tmp_path) == [("lost", "unreadable_folder")]


def test_two_linked_folders_that_link_to_each_other(tmp_path: Path) -> None:
    root = tmp_path / "root"
    put(root / "a.png", tmp_path / "one" / "b.png", tmp_path / "two" / "c.png")
    link(root / "one", tmp_path / "one")
    link(tmp_path / "one" / "two", tmp_path / "two")
    link(tmp_path / "two" / "one", tmp_path / "one")
    assert found(root) == ["a.png", "one/b.png", "one/two/c.png"]


def test_without_links_the_order_is_that_of_paths(tmp_path: Path) -> None:
    put(
        *(tmp_path / name for name in ("b.png", "a/z.png", "a.png", "a-b/c.png", "Z.png", "b/c/d.JPG", ".hidden/e.png"))
    )
    assert find_pictures(tmp_path) == sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() in ENDINGS)


def test_a_folder_named_like_a_picture_is_none(tmp_path: Path) -> None:
    put(tmp_path / "album.jpg" / "a.png")
    assert found(tmp_path) == ["album.jpg/a.png"]


def test_linked_folders_are_read_by_every_command(tmp_path: Path) -> None:
    root = tmp_path / "root"
    put(tmp_path / "other" / "b.png", tmp_path / "cats" / "deep" / "c.png")
    (tmp_path / "other" / "b.txt").write_text("a caption")
    link(root / "link", tmp_path / "other")
    assert [item.path for item in find_items(root)] == [root / "link" / "b.png"]
    assert open_source(root).parts == [[root / "link" / "b.png"]]
    assert list(scan(root).files) == ["link/b.png"]
    link(tmp_path / "classes" / "cat" / "inner", tmp_path / "cats")
    dataset = open_dataset(tmp_path / "classes")
    assert [example.key for example in dataset] == ["cat/inner/deep/c.png"]
    assert dataset.classnames == ["cat"]


# --- ignored files


THUMBNAILS = (".thumbnails", "@eaDir", ".Trash-1000", ".Trashes", "__MACOSX", ".AppleDouble", "$RECYCLE.BIN", ".git")


def with_thumbnails(folder: Path) -> None:
    """Write a photo, and the files that file managers keep next to it."""
    put(folder / "photo.png", *(folder / "sub" / name / "deep" / "small.png" for name in THUMBNAILS))
    (folder / "sub" / "._photo.jpg").write_bytes(b"\0\5\x16\7" + bytes(80))
    (folder / "Thumbs.db").write_bytes(b"db")


def test_what_file_managers_keep_is_left_out_and_counted(tmp_path: Path) -> None:
    with_thumbnails(tmp_path)
    places = list[LeftOut]()
    assert find_pictures(tmp_path, places) == [tmp_path / "photo.png"]
    told = {path.relative_to(tmp_path).as_posix(): str(fault) for path, fault in places}
    assert set(told) == {"sub/._*", *(f"sub/{name}" for name in THUMBNAILS)}
    assert {words.split(" kept by a file manager")[0] for words in told.values()} == {"1 picture"}


def test_such_a_folder_is_read_where_it_is_named(tmp_path: Path) -> None:
    with_thumbnails(tmp_path)
    assert found(tmp_path / "sub" / ".thumbnails") == ["deep/small.png"]


def test_without_pictures_in_them_nothing_is_said(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    assert left_out(tmp_path) == []


def test_a_good_picture_of_such_a_name_is_used(tmp_path: Path) -> None:
    put(tmp_path / "._photo.png", tmp_path / "thumbnails" / "a.png", tmp_path / ".hidden" / "b.png")
    assert found(tmp_path) == ["._photo.png", ".hidden/b.png", "thumbnails/a.png"]


def test_every_command_says_what_it_leaves_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with_thumbnails(root)
    (root / "photo.txt").write_text("a caption")
    count = len(THUMBNAILS) + 1
    report = pack(find_items(root), tmp_path / "packed")
    assert (report.packed, [s.cause for s in report.skipped]) == (1, ["file_manager"] * count)
    assert [s.cause for s in open_source(root).skipped] == ["file_manager"] * count
    assert [s.cause for s in scan(root).left_out] == ["file_manager"] * count
    dataset = open_dataset(root)
    assert [example.key for example in dataset] == ["photo.png"]
    assert [s.cause for s in dataset.skipped] == ["file_manager"] * count


def test_folders_of_file_managers_are_no_classes(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "a.png", tmp_path / "cat" / "@eaDir" / "a.png", tmp_path / "__MACOSX" / "cat" / "b.png")
    dataset = open_dataset(tmp_path)
    assert ([example.key for example in dataset], dataset.classnames) == (["cat/a.png"], ["cat"])
    assert [(s.key, s.cause) for s in dataset.skipped] == [("cat/@eaDir", "file_manager")]


def close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make folders named `closed` unreadable, even for root."""
    real = os.scandir

    def scandir(place: str) -> object:
        if Path(place).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)


def test_folders_that_cannot_be_opened_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.png", tmp_path / "closed" / "b.png")
    close(monkeypatch)
    assert found(tmp_path) == ["a.png"]
    assert left_out(tmp_path) == [("closed", "unreadable_folder")]
    (tmp_path / "a.png").unlink()
    for look in (scan, open_source, find_items):
        with pytest.raises(ValueError, match=r"closed: cannot be opened \(Permission denied\)"):
            look(tmp_path)


def test_a_class_folder_that_cannot_be_opened_is_still_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "cat" / "a.png", tmp_path / "closed" / "b.png")
    close(monkeypatch)
    dataset = open_dataset(tmp_path)
    assert ([example.key for example in dataset], dataset.classnames) == (["cat/a.png"], ["cat", "closed"])
    assert [(s.key, s.cause) for s in dataset.skipped] == [("closed", "unreadable_folder")]


# --- file extensions


@pytest.mark.parametrize("ending", sorted(ENDINGS))
def test_every_ending_is_a_picture_everywhere(ending: str, tmp_path: Path) -> None:
    for name in (f"a{ending}", f"B{ending.upper()}"):
        put(tmp_path / "cat" / name)
    names = [f"B{ending.upper()}", f"a{ending}"]
    assert [path.name for path in find_pictures(tmp_path)] == names
    assert [path.name for path in open_source(tmp_path).parts[0]] == names
    assert [example.key for example in open_dataset(tmp_path)] == [f"cat/{name}" for name in names]
    assert open_source(tmp_path / "cat" / names[0]).kind == "pictures"
    assert ending[1:] in IMAGE_TYPES


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".pjpeg", ".JPG"])
def test_pictures_of_other_names_are_packed_as_they_are(ending: str, tmp_path: Path) -> None:
    place = tmp_path / "in" / f"a{ending}"
    place.parent.mkdir()
    Image.new("RGB", (8, 8)).save(place, "JPEG")
    place.with_suffix(".txt").write_text("a caption")
    pack(find_items(place.parent), tmp_path / "out")
    (sample,) = read_shards(tmp_path / "out")
    assert sample["jpg"] == place.read_bytes()


@pytest.mark.parametrize("format", ["HEIF", "AVIF"])
def test_a_picture_that_only_some_can_read_is_packed_as_png(format: str, tmp_path: Path) -> None:
    """Phones may give such files any extension."""
    import pillow_heif

    pillow_heif.register_heif_opener()
    for name in ("a.heic", "b.jpg"):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "in" / name, format)
        (tmp_path / "in" / name).with_suffix(".txt").write_text("a caption")
    pack(find_items(tmp_path / "in"), tmp_path / "out")
    samples = list(read_shards(tmp_path / "out"))
    assert [sorted(ending for ending in sample if "_" not in ending) for sample in samples] == [["json", "png"]] * 2
    for sample in samples:
        assert np.abs(np.asarray(image_of(sample)).astype(int) - (200, 30, 30)).max() < 6


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: Sequence[str]) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["tinyclip", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main.main()
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out + said.err


def test_pack_prints_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_thumbnails(tmp_path / "in")
    (tmp_path / "in" / "photo.txt").write_text("a caption")
    code, said = run(capsys, monkeypatch, "data", "pack", tmp_path / "in", tmp_path / "out")
    assert code == 0
    assert "packed 1 picture " in said
    assert "file_manager" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {row["cause"] for row in rows} == {"file_manager"}
