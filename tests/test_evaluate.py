from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from test_data import write_shard
from tinyclip.evaluate import class_features, evaluate, open_dataset, retrieval, zero_shot


class Oracle:
    """Encodes a grey level `g` and texts that name a level as a point on the half circle."""

    def encode_image(self, images: Any, *, normalize: bool = True) -> Tensor:
        return torch.stack([self._point(float(np.asarray(i.convert("L")).mean())) for i in images])

    def encode_text(self, texts: Any, *, normalize: bool = True) -> Tensor:
        return torch.stack([self._point(float(re.sub(r"[^0-9.]", "", t))) for t in texts])

    def _point(self, level: float) -> Tensor:
        angle = torch.tensor(level / 255 * np.pi)
        return torch.stack([angle.cos(), angle.sin()])


def grey(level: int) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.new("L", (8, 8), level).save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder: Path, rows: list[tuple[int, dict[str, Any]]]) -> Path:
    folder.mkdir(exist_ok=True)
    samples = [{"key": f"k{i}", "png": grey(g), "json": json.dumps(info).encode()} for i, (g, info) in enumerate(rows)]
    write_shard(folder / "0.tar", samples)
    return folder


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
    assert dataset.classnames == ["10", "100", "150 x", "200", "220"]  # a folder without pictures is no class
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


def test_data_that_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such data folder"):
        open_dataset(tmp_path / "missing")
    with pytest.raises(ValueError, match="neither class folders"):
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
    with pytest.raises(ValueError, match="no readable pictures"):
        evaluate(Oracle(), open_dataset(broken))
