from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.judged import Oracle, grey, shards
from tests.helpers.models import random_model
from tests.helpers.shards import write_shard
from tinyclip.evaluate.metrics import (
    average_precision,
    class_features,
    encode_images,
    evaluate,
    open_dataset,
    retrieval,
    zero_shot,
)
from tinyclip.inference.pipeline import load
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig, vit_clip
from tinyclip.zoo.checkpoint import save_checkpoint
from tinyclip.zoo.convert import convert


def test_zero_shot_on_class_folders(tmp_path: Path) -> None:
    for name, levels in {
        "10": [10, 12, 200],
        "100": [100],
        "150_x": [150],
        "200": [199],
        "220": [221],
        "250": [],
    }.items():
        (tmp_path / name).mkdir()
        for level in levels:
            (tmp_path / name / f"{level}.png").write_bytes(grey(level))
    (tmp_path / "100" / "broken.png").write_bytes(b"junk")
    dataset = open_dataset(tmp_path)
    assert dataset.classnames == ["10", "100", "150 x", "200", "220"]  # a folder without pictures is not a class
    result = zero_shot(Oracle(), dataset)
    assert (result["acc1"], result["n"], result["classes"]) == (pytest.approx(6 / 7), 7, 5)
    assert result["acc5"] == 1
    assert [(s.key, s.cause) for s in dataset.skipped] == [("100/broken.png", "corrupt_image")]


def test_zero_shot_on_shards_with_subsets(tmp_path: Path) -> None:
    rows = [(10, "a"), (100, "a"), (101, "b"), (30, "b")]
    names = ["10", "100", "100", "250"]
    infos = [(g, {"class": n, "subset": s}) for (g, s), n in zip(rows, names, strict=True)]
    shards(tmp_path, infos)
    (tmp_path / "classnames.txt").write_text("10\n100\n250\n")
    (tmp_path / "templates.txt").write_text("level {c}\n{c}\n")
    result = zero_shot(Oracle(), open_dataset(tmp_path))
    assert result["acc1"] == 0.75 and result["templates"] == 2
    assert result["subsets"]["a"] == {"acc1": 1.0, "acc5": 1.0, "mean_per_class_recall": 1.0, "n": 2}
    assert result["subsets"]["b"]["acc1"] == 0.5


def test_prompt_ensemble_is_the_mean_of_normalised_features() -> None:
    class Texts:
        def encode_text(self, texts: Any, *, normalize: bool = True) -> Tensor:
            assert normalize
            return torch.stack(
                [torch.tensor([1.0, 0.0]) if t.startswith("a") else torch.tensor([0.0, 1.0]) for t in texts]
            )

    features = class_features(Texts(), ["x", "y"], ["a {c}", "b {c}", "a the {c}"])  # type: ignore[arg-type]
    assert torch.allclose(features, torch.tensor([[2.0, 1.0]]).expand(2, 2) / 5**0.5)


def test_retrieval_against_a_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    levels = rng.permutation(256)[:30].tolist()
    captions = [[f"{g + rng.uniform(-25, 25):.5f}" for _ in range(1 + i % 3)] for i, g in enumerate(levels)]
    captions = [[text.replace("-", "") for text in own] for own in captions]
    shards(tmp_path, [(g, {"captions": c}) for g, c in zip(levels, captions, strict=True)])
    result = retrieval(Oracle(), open_dataset(tmp_path))
    oracle = Oracle()
    images = torch.stack([oracle._point(g) for g in levels])
    for k in (1, 5, 10):
        text_hits, image_hits = [], []
        for i, own in enumerate(captions):
            everything = [(float(oracle._point(float(t)) @ images[i]), j) for j, c in enumerate(captions) for t in c]
            image_hits.append(i in [j for _, j in sorted(everything, key=lambda p: -p[0])[:k]])
            for text in own:
                order = (images @ oracle._point(float(text))).argsort(descending=True)[:k]
                text_hits.append(i in order.tolist())
        assert result[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(text_hits))
        assert result[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(image_hits))
    assert (result["n_images"], result["n_texts"]) == (30, sum(map(len, captions)))


def test_evaluate_gives_what_the_data_allows(tmp_path: Path) -> None:
    both = shards(tmp_path / "both", [(10, {"class": "10", "captions": ["10"], "subset": "s"})])
    (both / "classnames.txt").write_text("10\n")
    result = evaluate(Oracle(), open_dataset(both))
    assert result["acc1"] == 1 and result["image_retrieval_recall@1"] == 1
    assert result["subsets"]["s"]["text_retrieval_recall@1"] == 1
    captions = evaluate(Oracle(), open_dataset(shards(tmp_path / "captions", [(10, {"caption": "10"})])))
    assert "acc1" not in captions and captions["image_retrieval_recall@1"] == 1


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `model`, the same in OpenCLIP's and Hugging Face's format, `classes` of pictures, and a `table`."""
    folder = tmp_path_factory.mktemp("ours")
    config = vit_clip(24, (2, 128), (2, 128), 16, image_size=32).model_dump() | {"activation": "gelu"}
    model = random_model(CLIPConfig.from_dict(config), dtype=torch.float32)
    save_checkpoint(folder / "model", model, clip_tokenizer(), Preprocess(image_size=32))
    convert(folder / "model", folder / "open_clip", "open_clip")
    convert(folder / "model", folder / "hf", "hf")
    rng, rows = np.random.default_rng(0), ["image,caption"]
    for label, name in enumerate(["fox", "red_wolf", "owl", "a pike", "city", "tea pot", "chair"]):
        (folder / "classes" / name).mkdir(parents=True)
        for i in range(4 + label):
            pixels = rng.integers(0, 256, (3 + i, 4, 3), dtype=np.uint8)
            file = folder / "classes" / name / f"{i}.png"
            Image.fromarray(pixels).resize((40 + 3 * i, 50), Image.Resampling.BILINEAR).save(file)
            rows += [f"classes/{name}/{i}.png,{name} number {n} of {i}" for n in range(1 + i % 3)]
    (folder / "classes" / "templates.txt").write_text("a photo of a {c}.\na drawing of the {c}\n{c}\n")
    (folder / "table.csv").write_text("\n".join(rows))
    return folder


def test_classification_equals_open_clip(ours: Path, others: Callable[[str], ModuleType]) -> None:
    """Compare with OpenCLIP's model, transform, tokenizer and prompt ensemble, and scikit-learn's figures."""
    open_clip, metrics = others("open_clip"), others("sklearn.metrics")
    name = f"local-dir:{ours / 'open_clip'}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    files = sorted((ours / "classes").glob("*/*.png"))
    folders = sorted({file.parent.name for file in files})
    names, templates = [f.replace("_", " ") for f in folders], ["a photo of a {}.", "a drawing of the {}", "{}"]
    labels = [folders.index(file.parent.name) for file in files]
    with torch.no_grad():
        images = torch.stack([transform(Image.open(file)) for file in files])
        features = model.eval().encode_image(images, normalize=True)
        tokenizer = open_clip.get_tokenizer(name)
        classes = open_clip.build_zero_shot_classifier_legacy(model, tokenizer, names, templates)
    scores = features @ classes
    dataset, clip = open_dataset(ours / "classes"), load(ours / "model")
    torch.testing.assert_close(encode_images(clip, dataset)[0], features, atol=1e-5, rtol=0)
    found = class_features(clip, dataset.classnames, dataset.templates)
    torch.testing.assert_close(found, classes.T, atol=1e-5, rtol=0)
    result = evaluate(clip, dataset, per_class=True)
    guesses = scores.argmax(1)
    assert result["acc1"] == pytest.approx(metrics.accuracy_score(labels, guesses))
    assert result["acc5"] == pytest.approx(metrics.top_k_accuracy_score(labels, scores.numpy(), k=5))
    assert result["mean_per_class_recall"] == pytest.approx(metrics.balanced_accuracy_score(labels, guesses))
    each = metrics.recall_score(labels, guesses, average=None, zero_division=0)
    assert [row["acc1"] for row in result["per_class"]] == pytest.approx(each.tolist())
    assert [(row["class"], row["n"]) for row in result["per_class"]] == [
        (n, labels.count(i)) for i, n in enumerate(names)
    ]
    assert 0 < result["acc1"] < result["acc5"] < 1  # otherwise the test would prove little


def test_retrieval_equals_transformers(ours: Path, others: Callable[[str], ModuleType]) -> None:
    """Compare with the model and tokenizer of `transformers`, OpenCLIP's transform, and ranks counted one by one."""
    transformers = others("transformers")
    model = transformers.CLIPModel.from_pretrained(ours / "hf").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(ours / "hf")
    transform = others("open_clip.transform").image_transform(32, is_train=False)
    rows = [line.rsplit(",", 1) for line in (ours / "table.csv").read_text().splitlines()[1:]]
    files = list(dict.fromkeys(file for file, _ in rows))
    tokens = tokenizer([text for _, text in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        both = model(**tokens, pixel_values=torch.stack([transform(Image.open(ours / file)) for file in files]))
    scores = both.logits_per_text.double().numpy()  # (texts, images)
    right = np.array([[file == f for f in files] for file, _ in rows])
    result = evaluate(load(ours / "model"), open_dataset(ours / "table.csv"))
    assert (result["n_images"], result["n_texts"]) == (len(files), len(rows))
    for k in (1, 5, 10):
        above = [(row > row[own].max()).sum() for row, own in zip(scores, right, strict=True)]
        assert result[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(np.array(above) < k))
        above = [(row > row[own].max()).sum() for row, own in zip(scores.T, right.T, strict=True)]
        assert result[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(np.array(above) < k))


def test_mean_average_precision_equals_scikit_learn(others: Callable[[str], ModuleType]) -> None:
    generator = torch.Generator().manual_seed(0)
    features, classes = (torch.randn(n, 8, generator=generator) for n in (50, 6))
    right = torch.rand(50, 6, generator=generator) < 0.3
    right[:, 4] = False  # a class without pictures
    result, each = average_precision(features, classes, [row.nonzero().flatten().tolist() for row in right])
    expected = others("sklearn.metrics").average_precision_score
    chosen = [0, 1, 2, 3, 5]
    values = [expected(right[:, c].numpy(), (features @ classes[c]).numpy()) for c in chosen]
    assert [each[c]["average_precision"] for c in chosen] == pytest.approx(values) and list(each) == chosen
    assert result == {"mean_average_precision": pytest.approx(np.mean(values)), "n": 50}


def test_pictures_of_several_classes(tmp_path: Path) -> None:
    samples = []
    for i, (level, own) in enumerate([(10, [1, 0]), (200, [0, 1]), (100, [1, 1]), (220, [0, 0])]):
        buffer = io.BytesIO()
        np.save(buffer, np.array(own))
        samples.append({"key": str(i), "png": grey(level), "npy": buffer.getvalue()})
    write_shard(tmp_path / "0.tar", samples)
    (tmp_path / "classnames.txt").write_text("0\n255\n")
    result = evaluate(Oracle(), open_dataset(tmp_path), per_class=True)
    assert result["mean_average_precision"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2) and result["n"] == 4
    assert [row["class"] for row in result["per_class"]] == ["0", "255"]


class Arrays(Oracle):
    """A runtime that returns NumPy arrays."""

    def _point(self, level: float) -> Any:
        return super()._point(level).numpy()

    def encode_image(self, images: Any, *, normalize: bool = True) -> Any:
        return np.stack([self._point(float(np.asarray(i.convert("L")).mean())) for i in images])

    def encode_text(self, texts: Any, *, normalize: bool = True) -> Any:
        return np.stack([self._point(float(re.sub(r"[^0-9.]", "", t))) for t in texts])


def test_features_as_arrays_and_features_that_are_no_numbers(tmp_path: Path) -> None:
    infos: list[tuple[int, dict[str, Any]]] = [(g, {"class": str(g), "captions": [str(g)]}) for g in (10, 100, 250)]
    dataset = open_dataset(shards(tmp_path, infos), classes=_lines(tmp_path / "names.txt", "10", "100", "250"))
    assert evaluate(Arrays(), dataset) == evaluate(Oracle(), dataset)

    class Broken(Oracle):
        def _point(self, level: float) -> Tensor:
            return torch.full((2,), torch.nan)

    class BrokenWords(Oracle):
        def encode_text(self, texts: Any, *, normalize: bool = True) -> Any:
            return super().encode_text(texts, normalize=normalize) * torch.nan

    for broken in (Broken(), BrokenWords()):
        with pytest.raises(ValueError, match="not finite numbers"):
            evaluate(broken, dataset)


def _lines(file: Path, *lines: str) -> Path:
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def test_thousands_of_labels(tmp_path: Path) -> None:
    """More prompts than are encoded at once."""
    names = _lines(tmp_path / "names.txt", *(f"{i / 20:.2f}" for i in range(5100)))
    dataset = open_dataset(shards(tmp_path, [(g, {"class": f"{g:.2f}"}) for g in (3, 100, 254)]), classes=names)
    result = zero_shot(Oracle(), dataset)
    assert (result["acc1"], result["classes"], result["n"]) == (1, 5100, 3)


def test_data_that_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such data folder"):
        open_dataset(tmp_path / "missing")
    with pytest.raises(ValueError, match="contains no class folders"):
        open_dataset(tmp_path)
    folder = shards(tmp_path / "s", [(10, {"class": "10"}), (10, {"class": "nine"})])
    with pytest.raises(ValueError, match="no such file of templates"):
        open_dataset(folder, tmp_path / "none.txt")
    (tmp_path / "t.txt").write_text("a photo of {c}\na photo\n")
    with pytest.raises(ValueError, match="'a photo' has none"):
        open_dataset(folder, tmp_path / "t.txt")
    with pytest.raises(ValueError, match=r"classnames\.txt"):
        zero_shot(Oracle(), open_dataset(folder))
    (folder / "classnames.txt").write_text("10\n")
    dataset = open_dataset(folder)
    assert zero_shot(Oracle(), dataset)["n"] == 1
    assert [str(s) for s in dataset.skipped] == ["0.tar, k1: class 'nine' is not in classnames.txt"]
    with pytest.raises(ValueError, match="no captions"):
        retrieval(Oracle(), dataset)
    broken = tmp_path / "broken"
    broken.mkdir()
    write_shard(broken / "0.tar", [{"key": "a", "png": b"junk", "txt": b"t"}])
    with pytest.raises(ValueError, match=r"no readable pictures .*\(1 corrupt_image; the first: 0\.tar, a: not a pict"):
        evaluate(Oracle(), open_dataset(broken))
    names = _lines(tmp_path / "names.txt", "10", "10")
    twice = open_dataset(folder, classes=names)
    with pytest.raises(ValueError, match=r"2 unknown_class; the first: .* '10' is listed more than once in names\.txt"):
        evaluate(Oracle(), twice)
    short = shards(tmp_path / "short", [(g, {"class": str(g)}) for g in (10, 20, 30)])
    with pytest.raises(ValueError, match="short: 2 of 3 pictures have a class that is not in its list"):
        evaluate(Oracle(), open_dataset(short, classes=_lines(tmp_path / "one.txt", "10")))
    bare = shards(tmp_path / "bare", [(10, {})])
    with pytest.raises(ValueError, match="no classes; samples need a `class`"):
        evaluate(Oracle(), open_dataset(bare))
    with pytest.raises(ValueError, match="no picture has a class"):
        evaluate(Oracle(), open_dataset(bare, classes=names))
