from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import tinyclip
from tests.helpers.models import random_model
from tests.helpers.pictures import drawing, encoded
from tests.helpers.processes import end, kill, start_command, until
from tinyclip.cli.main import main
from tinyclip.common import faults
from tinyclip.common.ownership import MARKER
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.transforms import DRAFT, Preprocess, open_image
from tinyclip.search.embed import embed
from tinyclip.search.feature_files import Plan
from tinyclip.search.sources import open_source

CAPTIONS = [["a red apple", "an apple"], ["the sea"], []]


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def clip(model: Path) -> Pipeline:
    return tinyclip.load(model)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven pictures, one in a subfolder, and two files that are not pictures."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for i in range(6):
        (folder / f"{i}.png").write_bytes(encoded(drawing(i)))
    (folder / "more" / "6.jpg").write_bytes(encoded(drawing(6), "JPEG"))
    (folder / "3b.png").write_bytes(encoded(drawing(3))[:60])
    (folder / "words.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards; the second has a sample without captions, one with a broken picture and one with a broken caption."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        files = {}
        for i, captions in enumerate(CAPTIONS):
            files[f"{number}{i}.png"] = encoded(drawing(10 * number + i))
            files[f"{number}{i}.json"] = json.dumps({"captions": captions}).encode()
        if number:
            files |= {"18.jpg": b"nothing", "18.txt": b"of use", "19.png": encoded(drawing(19)), "19.txt": b"\xff"}
        write_shard(folder / f"s{number}.tar", files)
    return folder


def read(out: Path, kind: str) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return the rows without features, and the features, of all parts."""
    rows: list[dict[str, Any]] = []
    features = []
    for path in sorted(out.glob(f"{kind}-*.parquet")):
        table = pyarrow.parquet.read_table(path)
        flat = table.column("features").combine_chunks()
        features.append(flat.flatten().to_numpy().reshape(len(table), flat.type.list_size))
        rows += table.drop_columns(["features"]).to_pylist()
    for path in sorted(out.glob(f"{kind}-*.npy")):
        features.append(np.load(path))
        rows += [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    return rows, np.concatenate(features)


def skipped(out: Path) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in map(json.loads, (out / "skipped.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_pictures_become_features_under_their_paths(
    kind: str, dtype: str, clip: Pipeline, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = embed(clip, open_source(pictures, 4), out, Plan("m", format=kind, dtype=dtype, part_size=4))
    rows, features = read(out, "image")
    keys = [row["key"] for row in rows]
    assert keys == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "more/6.jpg"]
    expected = clip.encode_image([pictures / key for key in keys]).numpy()
    assert features.dtype == dtype
    np.testing.assert_allclose(features, expected, atol=1e-3 if dtype == "float16" else 1e-6)
    assert sorted(p.name for p in out.glob("image-*0*")) == sorted(
        f"image-0000{i}.{ending}" for i in range(3) for ending in ([kind] if kind == "parquet" else [kind, "jsonl"])
    )
    assert {key: reason.split(" (")[0] for key, reason in skipped(out).items()} == {
        "3b.png": "damaged picture",
        "words.jpg": "not a picture that Pillow can read",
    }
    assert {(s.shard, s.cause) for s in faults.read(out / "skipped.jsonl")} == {("", "corrupt_image")}
    assert (result["images"], result["texts"], result["skipped"], result["computed"]) == (7, 0, 2, 7)
    assert result["skipped_by_cause"] == {"corrupt_image": 2}
    told = json.loads((out / "embed.json").read_text())
    assert told.items() <= result.items()
    assert (told["done"], told["embed_dim"], told["parts"], told["dtype"]) == (True, 24, 3, dtype)
    assert {path.name for path in out.iterdir() if path.name.startswith(".")} <= {".parts", ".lock", MARKER}


def test_a_shard_is_a_part_with_its_pictures_and_captions(clip: Pipeline, shards: Path, tmp_path: Path) -> None:
    embed(clip, open_source(shards), tmp_path / "out", Plan("m", dtype="float32"))
    rows, features = read(tmp_path / "out", "image")
    assert [row["key"] for row in rows] == ["00", "01", "02", "10", "11", "12", "19"]
    expected = clip.encode_image([drawing(i) for i in (0, 1, 2, 10, 11, 12, 19)]).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-6)
    rows, features = read(tmp_path / "out", "text")
    wanted = [(f"{n}{i}", k, c) for n in range(2) for i, own in enumerate(CAPTIONS) for k, c in enumerate(own)]
    assert [tuple(row.values()) for row in rows] == [*wanted, ("18", 0, "of use")]
    np.testing.assert_allclose(features, clip.encode_text([row["caption"] for row in rows]).numpy(), atol=1e-6)
    assert skipped(tmp_path / "out").keys() == {"18", "19"}
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 4


@pytest.mark.parametrize("what", ["image", "text"])
def test_of_shards_one_kind_may_be_enough(what: str, clip: Pipeline, shards: Path, tmp_path: Path) -> None:
    embed(clip, open_source(shards / "s0.tar"), tmp_path / "out", Plan("m", what=what))
    assert {path.name for path in tmp_path.glob("out/*.parquet")} == {f"{what}-00000.parquet"}


def test_of_a_damaged_shard_stays_what_was_whole(clip: Pipeline, shards: Path, tmp_path: Path) -> None:
    data = (shards / "s0.tar").read_bytes()
    (shards / "s0.tar").write_bytes(data[: len(data) // 2])
    embed(clip, open_source(shards), tmp_path / "out", Plan("m"))
    keys = [row["key"] for row in read(tmp_path / "out", "image")[0]]
    assert keys[0] == "00" and keys[-4:] == ["10", "11", "12", "19"] and len(keys) < 7
    (cut,) = [s for s in faults.read(tmp_path / "out" / "skipped.jsonl") if s.shard == "s0.tar"]
    assert (cut.key, cut.cause) == ("", "truncated_shard") and "ends after 2 samples" in cut.reason


@pytest.mark.parametrize(
    ("name", "content", "columns", "expected"),
    [
        ("t.txt", "a cat\n\n  the dog \n", {}, [("1", 0, "a cat"), ("3", 0, "the dog")]),
        (
            "t.csv",
            "id,caption\nx,a cat\ny,\nz,the dog\n",
            {"key_column": "id"},
            [("x", 0, "a cat"), ("z", 0, "the dog")],
        ),
        ("t.tsv", "other\tcaption\nthe sea\ta cat\n", {"text_column": "other"}, [("1", 0, "the sea")]),
        (
            "t.jsonl",
            '{"captions": ["a cat", "", "the cat"]}\n{"captions": []}\n{"captions": "the dog"}\n',
            {},
            [("1", 0, "a cat"), ("1", 1, "the cat"), ("3", 0, "the dog")],
        ),
    ],
)
def test_texts_have_the_number_of_their_row_or_a_column_as_key(
    name: str, content: str, columns: dict[str, str], expected: list[Any], clip: Pipeline, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    embed(clip, open_source(tmp_path / name, 1, **columns), tmp_path / "out", Plan("m", format="npy", part_size=1))
    rows, features = read(tmp_path / "out", "text")
    assert [tuple(row.values()) for row in rows] == expected
    wanted = clip.encode_text([caption for _, _, caption in expected]).numpy()
    np.testing.assert_allclose(features, wanted, atol=1e-3)
    assert len(list(tmp_path.glob("out/*.npy"))) == len(expected)


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_names_of_any_kind(kind: str, clip: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Including a dangling link."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for i, name in enumerate((b"a b#?%.png", b"new\nline.png", b"\xff.png", "ß 日本.png".encode())):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(encoded(drawing(i)))
    Path(os.fsdecode(bytes(folder) + b"/\xfe.png")).write_text("no picture")
    (folder / "link.png").symlink_to("nowhere.png")
    embed(clip, open_source(folder), tmp_path / "out", Plan("m", format=kind))
    rows, _ = read(tmp_path / "out", "image")
    assert [row["key"] for row in rows] == ["a b#?%.png", "new\nline.png", "ß 日本.png", "\\xff.png"]
    assert skipped(tmp_path / "out") == {"link.png": "no such file", "\\xfe.png": "not a picture that Pillow can read"}


def test_a_bad_line_costs_no_other(clip: Pipeline, tmp_path: Path) -> None:
    for name, content in (("a.txt", b"a cat\ncaf\xe9\r\na dog"), ("b.csv", b"text\na cat\ncaf\xe9\na dog\n")):
        (tmp_path / name).write_bytes(content)
        out = tmp_path / f"{name}-out"
        assert embed(clip, open_source(tmp_path / name), out, Plan("m"))["texts"] == 2
        assert skipped(out) == {"2": "not UTF-8, or an unpaired surrogate"}


def test_keys_of_a_table_can_be_written(clip: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"file,text\ncaf\xe9//1.jpg,a cat\n,a dog\n")
    (tmp_path / "b.jsonl").write_text('{"file": "\\ud800", "text": "a cat"}\n')
    for name, expected in (("a.csv", ["caf\\xe9//1.jpg", ""]), ("b.jsonl", ["\\ud800"])):
        out = tmp_path / f"{name}-out"
        embed(clip, open_source(tmp_path / name, key_column="file"), out, Plan("m"))
        assert pyarrow.parquet.read_table(out / "text-00000.parquet")["key"].to_pylist() == expected


def test_half_a_surrogate_pair_is_left_out(clip: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a cat"}\n{"text": "\\ud800"}\n')
    assert embed(clip, open_source(tmp_path / "a.jsonl"), tmp_path / "out", Plan("m"))["texts"] == 1
    assert skipped(tmp_path / "out") == {"2": "not UTF-8, or an unpaired surrogate"}


def test_features_that_are_no_numbers_are_not_written(model: Path, pictures: Path, tmp_path: Path) -> None:
    broken = tinyclip.load(model)
    broken.model.visual.proj.data.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="not finite numbers"):
        embed(broken, open_source(pictures), tmp_path / "out", Plan("m"))
    assert not list((tmp_path / "out").glob("image-*"))


# --- resuming


def states(out: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("image-*")}


@pytest.fixture
def many(tmp_path: Path) -> Path:
    (tmp_path / "many").mkdir()
    for i in range(150):
        (tmp_path / "many" / f"{i:03}.png").write_bytes(encoded(drawing(i)))
    return tmp_path / "many"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_goes_on_without_computing_finished_parts_again(
    processes: int, model: Path, clip: Pipeline, many: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--part-size", 1, "--compute-dtype", "float32", "--device", "cpu", "--json")
    command = ("embed", model, many, "-o", out, *options)
    started = start_command(tmp_path, *command, count=processes)
    until(lambda: len(list(out.glob(".parts/*.json"))) >= 5, started)
    kill(started)
    records = {int(path.stem) for path in out.glob(".parts/*.json")}
    assert 5 <= len(records) < 150
    before = {name: state for name, state in states(out).items() if int(name[6:11]) in records}
    assert len(before) == len(records)

    again = tmp_path / "again"
    again.mkdir()
    assert end(start_command(again, *command, count=processes)) == [0] * processes
    spoken = [(again / f"{i}.out").read_text() for i in range(processes)]
    told = json.loads(spoken[0])
    assert (told["computed"], told["images"], told["parts"]) == (150 - len(records), 150, 150)
    assert spoken[1:] == [""] * (processes - 1)
    assert before.items() <= states(out).items()
    embed(clip, open_source(many), tmp_path / "whole", Plan("m"))
    assert read(out, "image")[0] == read(tmp_path / "whole", "image")[0]
    np.testing.assert_allclose(read(out, "image")[1], read(tmp_path / "whole", "image")[1], atol=1e-3)


def test_what_is_complete_is_left_alone(clip: Pipeline, pictures: Path, tmp_path: Path) -> None:
    embed(clip, open_source(pictures, 4), tmp_path / "out", Plan("m", part_size=4))
    before = states(tmp_path / "out")
    assert embed(clip, open_source(pictures, 4), tmp_path / "out", Plan("m", part_size=4))["computed"] == 0
    assert states(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_what_is_damaged_or_missing_is_computed_again(kind: str, clip: Pipeline, shards: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "out", Plan("m", format=kind)
    before = embed(clip, open_source(shards), out, plan)
    whole = {path.name: path.read_bytes() for path in out.glob("*-*")}
    flipped = bytearray(whole[f"image-00000.{kind}"])
    flipped[-9] ^= 1
    for damage in ("flip", "cut", "remove", "remove the keys"):
        if damage == "remove the keys" and kind == "npy":
            (out / "text-00000.jsonl").unlink()
        elif damage == "flip":
            (out / f"image-00000.{kind}").write_bytes(flipped)
        elif damage == "cut":
            (out / f"image-00000.{kind}").write_bytes(whole[f"image-00000.{kind}"][:-9])
        else:
            (out / f"text-00000.{kind}").unlink()
        other = out / f"image-00001.{kind}"
        untouched = other.stat().st_mtime_ns
        result = embed(clip, open_source(shards), out, plan)
        assert result["computed"] == 6, damage  # the first shard's 3 pictures and 3 captions
        assert result["skipped"] == before["skipped"] and result["done"]
        assert {path.name: path.read_bytes() for path in out.glob("*-*")} == whole
        assert other.stat().st_mtime_ns == untouched


@pytest.fixture
def changed(clip: Pipeline, pictures: Path) -> Callable[[str], tuple[Pipeline, Plan]]:
    def change(what: str) -> tuple[Pipeline, Plan]:
        other = Pipeline(random_model(clip.model.config, 1, torch.float32), clip.tokenizer, clip.preprocessing)
        half = Pipeline(random_model(clip.model.config, dtype=torch.bfloat16), clip.tokenizer, clip.preprocessing)
        if what == "source":
            (pictures / "7.png").write_bytes(encoded(drawing(7)))
        plan = {
            "format": Plan("m", format="npy"),
            "dtype": Plan("m", dtype="float32"),
            "part size": Plan("m", part_size=9),
        }
        return {"model": other, "compute dtype": half}.get(what, clip), plan.get(what, Plan("m"))

    return change


@pytest.mark.parametrize("what", ["model", "compute dtype", "source", "format", "dtype", "part size"])
def test_a_change_is_refused_and_overwritten_on_demand(
    what: str, changed: Callable[[str], tuple[Pipeline, Plan]], clip: Pipeline, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    embed(clip, open_source(pictures), out, Plan("m"))
    before = states(out)
    other, plan = changed(what)
    with pytest.raises(ValueError, match=f"made with another {what} .*--overwrite"):
        embed(other, open_source(pictures, plan.part_size), out, plan)
    assert states(out) == before
    embed(other, open_source(pictures, plan.part_size), out, plan, overwrite=True)
    expected = other.encode_image([pictures / row["key"] for row in read(out, "image")[0]])
    np.testing.assert_allclose(read(out, "image")[1], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text_column": "title"}, r"another text column \(caption, now title\)"),
        ({"key_column": "id"}, r"another key column \(none, now id\)"),
    ],
)
def test_other_columns_are_refused(columns: dict[str, str], message: str, clip: Pipeline, tmp_path: Path) -> None:
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("id,caption,title\nx,a cat,the sea\n")
    embed(clip, open_source(table), out, Plan("m"))
    assert embed(clip, open_source(table, text_column="caption"), out, Plan("m"))["computed"] == 0  # the default
    with pytest.raises(ValueError, match=message):
        embed(clip, open_source(table, **columns), out, Plan("m"))


# --- bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "none: no such file or folder"),
        ("a.txt", b"\xff", r"a\.txt: contains no texts; 1 bad_encoding, the first: 1: not UTF-8"),
        ("a.txt", "a cat\n".encode("utf-16"), r"a\.txt: UTF-16; save it as UTF-8"),
        ("a.csv", "text\na cat\n".encode("utf-16"), r"a\.csv: UTF-16; save it as UTF-8"),
        ("a.txt", b"\n \n", r"a\.txt: contains no texts"),
        ("a.csv", b"name,size\nx,3\n", r"a\.csv: no column one of caption"),
        ("a.jsonl", b"[]\n", r"a\.jsonl: "),
        ("a.bin", b"x", r"a\.bin: not a picture, texts"),
        ("folder", None, "folder: contains no pictures or"),
    ],
)
def test_a_bad_source_is_named(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / name)


def test_columns_go_with_tables(pictures: Path) -> None:
    with pytest.raises(ValueError, match="not a table"):
        open_source(pictures, key_column="id")


@pytest.mark.parametrize("place", ["file", "full"])
def test_a_bad_place_is_named_and_left_alone(place: str, clip: Pipeline, pictures: Path, tmp_path: Path) -> None:
    out = pictures if place == "full" else pictures / "notes.txt"
    before = sorted(pictures.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="choose a"):
            embed(clip, open_source(pictures), out, Plan("m"), overwrite=overwrite)
    assert sorted(pictures.rglob("*")) == before


@pytest.mark.parametrize("options", [{"format": "csv"}, {"dtype": "int8"}, {"what": "sound"}])
def test_a_bad_option_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="choose"):
        Plan("m", **options)


def test_pictures_have_no_text_features(clip: Pipeline, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text features"):
        embed(clip, open_source(pictures), tmp_path / "out", Plan("m", what="text"))


def test_nothing_readable_is_an_error(clip: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        (tmp_path / "pictures" / f"{i}.jpg").write_text("no picture")
    for _ in range(2):  # a rerun reports the same
        message = r"nothing could be embedded: 3 corrupt_image; the first: 0\.jpg: not a picture"
        with pytest.raises(ValueError, match=message):
            embed(clip, open_source(tmp_path / "pictures"), tmp_path / "out", Plan("m"))
        assert skipped(tmp_path / "out").keys() == {"0.jpg", "1.jpg", "2.jpg"}
        assert {path.name for path in (tmp_path / "out").iterdir()} <= {"skipped.jsonl", ".lock", MARKER}
    (tmp_path / "pictures" / "0.jpg").write_bytes(encoded(drawing(0), "JPEG"))
    (tmp_path / "out" / ".embed.json.abc.tmp").touch()  # left by a run that was killed at its start
    assert embed(clip, open_source(tmp_path / "pictures"), tmp_path / "out", Plan("m"))["images"] == 1


def test_a_second_run_into_a_folder_is_refused(
    clip: Pipeline, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyclip.common.locks.PATIENCE", 0.0)
    out = tmp_path / "out"
    refused: list[str] = []

    def second(tally: object) -> None:
        with pytest.raises(ValueError) as error:
            embed(clip, open_source(pictures), out, Plan("m"), overwrite=True)
        refused.append(str(error.value))

    assert embed(clip, open_source(pictures), out, Plan("m"), progress=second)["images"] == 7
    assert refused == [f"{out}: another `tinyclip embed` is running here; wait for it or stop it"]
    assert embed(clip, open_source(pictures), out, Plan("m"), overwrite=True)["computed"] == 7


@pytest.mark.parametrize("wrong", ["file", "full", "what", "changed"])
def test_errors_that_need_no_model_come_before_it(
    wrong: str, clip: Pipeline, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, options = tmp_path / "out", []
    if wrong == "file":
        out.write_text("mine")
    elif wrong == "full":
        out = pictures
    elif wrong == "what":
        options = ["--what", "text"]
    else:
        embed(clip, open_source(pictures), out, Plan("m"))
        options = ["--dtype", "float32"]
    command = ["tinyclip", "embed", str(tmp_path / "no model"), str(pictures), "-o", str(out), *options]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    expected = {"file": "is a file", "full": "is not empty", "what": "no text features", "changed": "another dtype"}
    assert expected[wrong] in said


# --- decoding at a reduced scale


def photographs() -> Iterator[tuple[str, np.ndarray]]:
    """Float (h, w, 3) at sizes where reduction just begins, at 1/2 and 1/4: smooth, edges, noise, fine waves."""
    rng = np.random.default_rng(0)
    for height, width in ((64 * 8 + 8, 700), (64 * 16 + 8, 1100)):
        y, x = np.mgrid[:height, :width]
        smooth = np.stack([255 * x / width, 255 * y / height, 127 + 127 * np.sin(x / 37 + y / 53)], -1)
        noise = rng.integers(0, 256, (height, width, 3)).astype(float)
        waves = np.repeat((127 + 127 * np.sin((x**2 + y**2) / 2400))[..., None], 3, -1)
        edges = np.where(((x // 90 + y // 70) % 2 == 0)[..., None], smooth, 255 - smooth)
        blocks = np.repeat(255.0 * ((x // 3 + y // 3) % 2)[..., None], 3, -1)
        yield from (("smooth", smooth), ("noise", noise), ("film", 0.7 * smooth + 0.3 * noise))
        yield from (("waves", waves), ("edges", edges), ("blocks", blocks))


def test_a_reduced_jpeg_stays_within_a_grey_level() -> None:
    transform, size = Preprocess(image_size=64), 64
    for name, picture in photographs():
        for options in ({"quality": 75}, {"quality": 95, "subsampling": 0}):
            data = encoded(Image.fromarray(picture.clip(0, 255).astype(np.uint8)), "JPEG", **options)
            whole, reduced = open_image(io.BytesIO(data)), open_image(io.BytesIO(data), DRAFT * size)
            assert reduced.width * 2 <= whole.width + 1
            assert min(reduced.size) >= DRAFT * size
            difference = np.abs(transform.pixels(reduced).astype(float) - transform.pixels(whole)).mean()
            assert difference <= 1, (name, whole.size, options)


def test_a_small_jpeg_and_a_png_come_whole() -> None:
    for data, kind in ((encoded(drawing(0, (300, 250)), "JPEG"), "JPEG"), (encoded(drawing(0, (900, 900))), "PNG")):
        whole, asked = open_image(io.BytesIO(data)), open_image(io.BytesIO(data), 200 if kind == "JPEG" else 64)
        assert np.array_equal(np.asarray(whole), np.asarray(asked))
