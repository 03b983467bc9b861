"""One module opens pictures of every format and size for all commands."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

import tinyclip
from tests.golden import fill
from tests.helpers.models import random_model, small_config, small_tokenizer
from tinyclip.cli.main import main
from tinyclip.common import faults
from tinyclip.common.faults import Fault
from tinyclip.data.samples import image_of
from tinyclip.data.shards import check
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.augment import Augment
from tinyclip.inputs.decoding import open_image, pixels_at_most
from tinyclip.inputs.transforms import Preprocess
from tinyclip.search.sheet import small_copy

SCENE = Image.fromarray(fill.picture(96, 64, 0))
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, tokenizer = tmp_path_factory.mktemp("opening") / "model", small_tokenizer()
    network = random_model(small_config(vocab_size=tokenizer.vocab_size))
    Pipeline(network.float(), tokenizer, Preprocess(image_size=32)).save(path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tinyclip", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out + said.err

    return command


# --- HEIC and AVIF


@pytest.fixture
def heic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files, in a process that has not opened a HEIC picture yet."""
    import pillow_heif

    folder = tmp_path / "heic"
    for name in ("cat/a.heic", "cat/b.HEIF"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pillow_heif.from_pillow(SCENE).save(folder / name, quality=100)
    Image.init()  # once, into the real list
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    return folder


@pytest.fixture
def without_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


NAMED = r"a HEIC picture needs pillow-heif: pip install 'tinyclip\[heif\]'"


def test_heic_is_a_picture_like_any_other(heic: Path) -> None:
    for source in (
        heic / "cat" / "a.heic",
        str(heic / "cat" / "a.heic"),
        io.BytesIO((heic / "cat/a.heic").read_bytes()),
    ):
        found = np.asarray(open_image(source).convert("RGB")).astype(int)
        assert np.abs(found - np.asarray(SCENE)).mean() < 10
    assert image_of({"heic": (heic / "cat/a.heic").read_bytes()}).size == SCENE.size


def test_threads_may_meet_the_first_heic_at_once(heic: Path) -> None:
    sizes = list[tuple[int, int]]()

    def opened() -> None:
        sizes.append(open_image(heic / "cat" / "a.heic").size)

    threads = [threading.Thread(target=opened) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [SCENE.size] * 8


def test_without_the_extra_a_line_names_it(
    heic: Path, without_extra: None, model: Path, run: Run, tmp_path: Path
) -> None:
    picture = heic / "cat" / "a.heic"
    with pytest.raises(Fault, match=NAMED) as fault:
        open_image(picture)
    assert fault.value.cause == "needs_extra"
    with pytest.raises(Fault, match=NAMED):
        open_image(io.BytesIO(picture.read_bytes()))
    with pytest.raises(ValueError, match=NAMED):
        tinyclip.load(model).encode_image([picture])
    code, said = run("classify", model, picture, "a dog")
    assert (code, said.count("\n")) == (2, 1) and "tinyclip[heif]" in said
    SCENE.save(heic / "cat" / "c.png")
    code, said = run("embed", model, heic, "-o", tmp_path / "features")
    assert code == 0 and "needs_extra" in said
    rows = faults.read(tmp_path / "features" / "skipped.jsonl")
    assert [(row.key, row.cause) for row in rows] == [("cat/a.heic", "needs_extra"), ("cat/b.HEIF", "needs_extra")]


def test_an_index_takes_heic_up_once_the_extra_is_there(
    heic: Path, model: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SCENE.save(heic / "cat" / "c.png")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        assert run("index", model, heic, "-o", tmp_path / "index")[0] == 0
        code, said = run("index", model, heic, "-o", tmp_path / "index", "--json")
        assert json.loads(said)["skipped_by_cause"] == {"needs_extra": 2}
    code, said = run("index", model, heic, "-o", tmp_path / "index", "--json")
    result = json.loads(said)
    assert (result["pictures"], result["added"], result["skipped"]) == (3, 2, 0)


def test_avif_is_a_picture_like_any_other(tmp_path: Path) -> None:
    SCENE.save(tmp_path / "a.avif", quality=100)
    assert np.abs(np.asarray(open_image(tmp_path / "a.avif")).astype(int) - np.asarray(SCENE)).mean() < 10


def test_a_pillow_without_avif_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SCENE.save(tmp_path / "a.avif")
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name not in ("AVIF", "HEIF")])
    monkeypatch.setattr(Image, "EXTENSION", {".png": "PNG"})
    with pytest.raises(Fault, match=r"needs Pillow 11\.3") as fault:
        open_image(tmp_path / "a.avif")
    assert fault.value.cause == "needs_extra"


@pytest.mark.parametrize(
    "data", [b"\0\0\0\x18ftypheic", b"\0\0\0\x18ftypheic" + bytes(500), b"\0\0\0\x18ftypavif" + bytes(500)]
)
def test_a_damaged_one_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(data)
    with pytest.raises(Fault, match=r"a\.heic: (damaged|not a picture)") as fault:
        open_image(tmp_path / "a.heic")
    assert fault.value.cause == "corrupt_image"


# --- other kinds


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(Fault, match=r"a\.jpg: a pipe or a device"):
        open_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_of_several_pictures_the_first_is_used(format: str) -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ((200, 30, 30), (30, 200, 30), (30, 30, 200))]
    frames[0].save(file, format, save_all=True, append_images=frames[1:])
    with Image.open(file) as opened:
        assert opened.n_frames == 3  # type: ignore[attr-defined]
    for source in (file, io.BytesIO(file.getvalue())):
        file.seek(0)
        pixels = Preprocess(image_size=32).pixels(open_image(source)).astype(int)
        assert np.abs(pixels.mean((1, 2)) - (200, 30, 30)).max() < 6


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "LAB"])
def test_every_mode_of_files_is_seen_alike_in_training_and_evaluation(mode: str, tmp_path: Path) -> None:
    from PIL import ImageCms

    square = SCENE.crop((0, 0, 64, 64))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(square, *profiles, outputMode="LAB")
        assert image is not None
    else:
        image = square.convert(mode)
    image.save(tmp_path / "a.tif")
    opened = open_image(tmp_path / "a.tif")
    assert opened.mode == mode
    view = Augment(scale=(1, 1), ratio=1).view(opened, 32, Random(0)).astype(int)
    assert np.abs(view - Preprocess(image_size=32).pixels(opened)).mean() < 2


# --- size limits


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class folders of pictures with 6,144 pixels, where 2,000 are allowed."""
    for name in ("cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/b.jpg"):
        place = tmp_path / "large" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        SCENE.save(place)
        place.with_suffix(".txt").write_text(f"a {name}\n")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    return tmp_path / "large"


COMMANDS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "classify": lambda model, large, out: ["classify", model, large / "cat" / "a.jpg", "a cat"],
    "embed": lambda model, large, out: ["embed", model, large, "-o", out],
    "index": lambda model, large, out: ["index", model, large, "-o", out],
    "evaluate": lambda model, large, out: ["evaluate", model, large],
    "compare": lambda model, large, out: ["compare", model, model, "--data", large, "--device", "cpu"],
    "data pack": lambda model, large, out: ["data", "pack", large, out],
    "probe": lambda model, large, out: ["probe", model, large, large],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_picture_too_large_names_the_option_that_opens_it(
    name: str, model: Path, large: Path, run: Run, tmp_path: Path
) -> None:
    words = COMMANDS[name](model, large, tmp_path / "out")
    code, said = run(*words)
    assert code == (2 if name == "classify" else 1), said
    assert "too large (2,000 pixels at most; --max-pixels 6144 opens it)" in said
    for count, good in ((6143, False), (6144, True)):
        code, said = run(*words, "--max-pixels", count)
        assert (code == 0) == good, said
        assert ("too large" in said) != good
    assert Image.MAX_IMAGE_PIXELS == 2000  # unchanged


def test_search_opens_a_large_picture_to_search_by(model: Path, large: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "index"
    assert run("index", model, large, "-o", out, "--max-pixels", 10_000)[0] == 0
    words = ["search", out, "--image", large / "cat" / "a.jpg", "--sheet", tmp_path / "sheet.png"]
    code, said = run(*words)
    assert code == 2 and "--max-pixels 6144" in said
    code, said = run(*words, "--max-pixels", 6144)
    assert code == 0 and "a.jpg" in said


def test_an_index_takes_a_large_picture_up_once_it_may(model: Path, large: Path, run: Run, tmp_path: Path) -> None:
    SCENE.resize((20, 20)).save(large / "small.png")
    code, said = run("index", model, large, "-o", tmp_path / "index", "--json")
    assert json.loads(said)["skipped_by_cause"] == {"huge_image": 4}
    code, said = run("index", model, large, "-o", tmp_path / "index", "--json", "--max-pixels", 6144)
    assert (json.loads(said)["pictures"], json.loads(said)["skipped"]) == (5, 0)


def test_training_does_not_open_them(large: Path, run: Run, tmp_path: Path) -> None:
    """`data prepare --check` reports them, and packing smaller copies is the remedy."""
    assert run("data", "pack", large, tmp_path / "a", "--max-pixels", 10_000)[0] == 0
    assert {s.cause for s in check(tmp_path / "a")[1]} == {"huge_image"}
    assert run("data", "pack", large, tmp_path / "b", "--max-pixels", 10_000, "--resize", 16)[0] == 0
    assert check(tmp_path / "b") == (4, [])


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_a_senseless_limit_is_refused(count: str, model: Path, run: Run) -> None:
    code, said = run("classify", model, "a.png", "a dog", "--max-pixels", count)
    assert code == 2 and "--max-pixels" in said


def test_the_limit_is_put_back_also_after_an_error(large: Path) -> None:
    with pytest.raises(KeyError), pixels_at_most(10_000):
        assert open_image(large / "cat" / "a.jpg").size == SCENE.size
        assert small_copy(large / "cat" / "a.jpg", 40).size == (40, 27)
        raise KeyError
    assert Image.MAX_IMAGE_PIXELS == 2000
    with pixels_at_most(None), pytest.raises(ValueError, match="too large"):
        open_image(large / "cat" / "a.jpg")


def test_links_to_nothing_and_pipes_cost_no_other_picture(model: Path, run: Run, tmp_path: Path) -> None:
    """In every command each one is counted, and nothing blocks on a pipe."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("a red square")
    (folder / "self.png").symlink_to("self.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    for words in (["data", "pack", folder], ["embed", model, folder, "-o"], ["index", model, folder, "-o"]):
        out = tmp_path / str(words[0])
        code, said = run(*words, out)
        assert code == 0 and "skipped 3" in said
        skipped = (out / "skipped.jsonl").read_text()
        assert all(skipped.count(f"{name}.png") == 1 for name in ("self", "gone", "pipe"))
    code, said = run("data", "pack", folder, folder / "self.png")
    assert code == 2 and "Symlink loop" in said
