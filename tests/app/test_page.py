"""What the page computes and refuses; the page itself is tested in a browser (`tests/browser`)."""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tinyclip as package
from tests.helpers.commands import tinyclip
from tinyclip.app import door, guard, page
from tinyclip.inference.pipeline import Pipeline


@pytest.fixture(scope="module")
def clip() -> Pipeline:
    return package.load("emoji-student")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)).save(file)
    return file


def test_labels_are_taken_apart() -> None:
    assert page.labels_from(" a cat,a dog\r\n\n, a cat ,an apple") == ["a cat", "a dog", "an apple"]
    for text, message in (
        (None, "No labels"),
        (" ,\n ", "No labels"),
        ("\n".join(map(str, range(2000))), "2,000 labels are too many"),
        ("a" * 301, "too long"),
    ):
        with pytest.raises(ValueError, match=message):
            page.labels_from(text)


def test_probabilities_are_those_of_classify(clip: Pipeline, picture: Path) -> None:
    labels = ["a red apple", "a dog", "the sea"]
    result = page.Served("m", clip).classify(page.picture_from(io.BytesIO(picture.read_bytes())), labels)
    assert result.chances == pytest.approx(clip.classify(picture, labels)[0].double().numpy(), abs=1e-5)
    assert result.chances.sum() == pytest.approx(1)


def test_bars_are_in_order_and_safe() -> None:
    result = page.Timed(np.array([0.25, 0.75]), 1.25, 2.0)
    text = page.bars(["<b>${1}{{2}}</b>", "dog"], result, "m", times=True)
    assert text.index("75.0 %") < text.index("25.0 %") and "1.2 ms for the picture, 2.0 ms for 2 labels" in text
    assert not re.search(r"<b>|[{}$`]", text)
    many = page.bars([str(i) for i in range(50)], page.Timed(np.full(50, 0.02), 1, 1), "m")
    assert many.count("<li>") == page.MOST_BARS and "30 less probable labels" in many


def test_pictures_that_cannot_be_used(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = guard.Uploads(100, 1, 100, 100, 60)
    for name, message in ((None, "No picture"), ("", "No picture"), (str(picture), "has expired")):
        with pytest.raises(ValueError, match=message):
            page.uploaded(uploads, name)
    with pytest.raises(ValueError, match="not a picture"):
        page.picture_from(io.BytesIO(b"no picture"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="too large"):
        page.picture_from(io.BytesIO(picture.read_bytes()))


def test_thumbnails_are_data(picture: Path, tmp_path: Path) -> None:
    found = re.fullmatch(
        r'<img alt="a&quot;b.png" src="data:image/webp;base64,(.+)">', page.thumbnail(picture, 'a"b.png')
    )
    assert found
    assert Image.open(io.BytesIO(base64.b64decode(found[1]))).size == (240, 144)
    os.mkfifo(tmp_path / "pipe.png")  # reading it would never end
    for name in ("gone.png", "pipe.png"):
        assert "missing" in page.thumbnail(tmp_path / name, name)


def test_without_gradio_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert tinyclip("app", "emoji-student", code=2) == "tinyclip: the page needs gradio: pip install tinyclip[app]\n"


def test_a_call_holds_texts_and_numbers() -> None:
    assert door._text(None) is None and door._text("日本🍏") == "日本🍏"
    assert door._number(12) == 12 and door._number(1.5) == 1.5
    for value in (5, True, [], {}, "\ud800"):
        with pytest.raises(guard.Refused):
            door._text(value)
    for number in (None, "5", True, float("inf"), 10**400, [5]):
        with pytest.raises(guard.Refused):
            door._number(number)
