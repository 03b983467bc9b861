from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fill
import numpy as np
import pytest
import torch
from PIL import Image

import tinyclip
from conftest import random_model, small_config, small_tokenizer
from tinyclip.pipeline import Pipeline
from tinyclip.transforms import Preprocess


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `model` and pictures `0.png` to `2.png`."""
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer = small_tokenizer()
    model = random_model(small_config(vocab_size=tokenizer.vocab_size), dtype=torch.float32)
    Pipeline(model, tokenizer, Preprocess(image_size=32)).save(folder / "model")
    for i in range(3):
        Image.fromarray(fill.picture(50 + i, 40, i)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def clip(folder: Path) -> Pipeline:
    return tinyclip.load(folder / "model")


def test_load_gives_what_was_saved(folder: Path, clip: Pipeline) -> None:
    assert isinstance(clip, Pipeline)
    assert not clip.model.training
    assert (clip.device.type, clip.dtype) == ("cpu", torch.float32)
    half = tinyclip.load(str(folder / "model"), device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    features = half.encode_image(folder / "0.png").float()
    assert torch.nn.functional.cosine_similarity(features, clip.encode_image(folder / "0.png")) > 0.99


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such checkpoint"):
        tinyclip.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "give",
    [
        lambda path: path,
        lambda path: str(path),
        lambda path: [path],
        lambda path: (Image.open(path),),
        lambda path: Image.open(path),
        lambda path: np.asarray(Image.open(path)),
        lambda path: [np.asarray(Image.open(path))],
        lambda path: np.asarray(Image.open(path).convert("RGBA")),
        lambda path: tinyclip.preprocess(32)(Image.open(path)),
        lambda path: tinyclip.preprocess(32)(Image.open(path))[None],
        lambda path: [tinyclip.preprocess(32)(Image.open(path))],
    ],
)
def test_a_picture_may_come_in_any_form(give: Callable[[Path], Any], folder: Path, clip: Pipeline) -> None:
    path = folder / "0.png"
    pixels = clip.preprocess(Image.open(path))[None]
    with torch.inference_mode():
        expected = clip.model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(clip.encode_image(give(path)), expected)


def test_forms_may_be_mixed_and_batches_change_nothing(folder: Path, clip: Pipeline) -> None:
    images = [folder / "0.png", Image.open(folder / "1.png"), np.asarray(Image.open(folder / "2.png"))]
    together = clip.encode_image(images)
    assert together.shape == (3, 24)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    for batch_size in (1, 2, 3):
        torch.testing.assert_close(clip.encode_image(images, batch_size=batch_size), together)
    torch.testing.assert_close(clip.encode_image(torch.stack([clip.preprocess(i) for i in images[1:2]])), together[1:2])
    raw = clip.encode_image(images, normalize=False)
    torch.testing.assert_close(raw / raw.norm(dim=1, keepdim=True), together)


def test_texts_may_be_one_or_many_and_batches_change_nothing(clip: Pipeline) -> None:
    texts = ["a cat", "", "the other thing in there", "a" * 99]
    together = clip.encode_text(texts)
    with torch.inference_mode():
        whole_rows = clip.model.encode_text(torch.from_numpy(clip.tokenizer(texts, 12)), normalize=True)
    torch.testing.assert_close(together, whole_rows)
    for batch_size in (1, 3, 4):
        torch.testing.assert_close(clip.encode_text(texts, batch_size=batch_size), together)
    torch.testing.assert_close(clip.encode_text(texts[0]), together[:1])
    assert clip.tokenize(texts).shape == (4, 12)


def test_nothing_gives_no_features(clip: Pipeline) -> None:
    assert clip.encode_image([]).shape == (0, 24)
    assert clip.encode_text([]).shape == (0, 24)


def test_classify_gives_a_distribution_for_each_picture(folder: Path, clip: Pipeline) -> None:
    images, labels = [folder / f"{i}.png" for i in range(3)], ["a cat", "a dog", "the sea", "an hour"]
    probabilities = clip.classify(images, labels)
    assert probabilities.shape == (3, 4)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    logits = clip.similarity(images, labels) * clip.model.logit_scale.exp()
    torch.testing.assert_close(probabilities, logits.softmax(1))
    torch.testing.assert_close(clip.classify(images[1], "a cat"), torch.ones(1, 1))


def test_no_labels_are_an_error(folder: Path, clip: Pipeline) -> None:
    with pytest.raises(ValueError, match="no labels"):
        clip.classify(folder / "0.png", [])


@pytest.mark.parametrize(
    "image",
    [
        pytest.param("none.png", id="no file"),
        pytest.param("model/config.json", id="another file"),
        pytest.param(3, id="int"),
        pytest.param(None, id="None"),
        pytest.param(np.zeros((8, 8, 3), np.float32), id="float array"),
        pytest.param(np.zeros((2, 8, 8, 3), np.uint8), id="array of two"),
        pytest.param(np.zeros((8, 8, 5), np.uint8), id="array of five channels"),
        pytest.param(np.zeros((0, 8, 3), np.uint8), id="empty array"),
        pytest.param(torch.zeros(3, 31, 32), id="tensor of another size"),
        pytest.param(torch.zeros(32, 32), id="tensor without channels"),
        pytest.param([torch.zeros(3, 32, 32), torch.zeros(3, 31, 32)], id="tensors of two sizes"),
    ],
)
def test_what_is_no_picture_is_refused(image: Any, folder: Path, clip: Pipeline) -> None:
    with pytest.raises(ValueError):
        clip.encode_image(folder / image if isinstance(image, str) else image)


def test_an_unreadable_picture_is_named(folder: Path, clip: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"none\.png: no such file"):
        clip.encode_image([folder / "0.png", folder / "none.png"])
