"""The linear probe: its solvers, its choice of C and its data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.judged import Oracle, grey
from tinyclip.cli.main import main
from tinyclip.data.datasets import open_dataset
from tinyclip.evaluate import probe as module
from tinyclip.evaluate.probe import Problem, fit_sklearn, fit_torch, probe, search, split
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import vit_clip
from tinyclip.model.model import CLIP
from tinyclip.zoo.checkpoint import save_checkpoint

CPU = torch.device("cpu")


def problem(classes: int, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    labels = 3 * (torch.arange(count) % classes) + 1  # numbers with gaps
    noise = torch.randn(count, 12, generator=generator)
    return torch.nn.functional.normalize(torch.eye(12)[labels % 12] + noise, dim=-1), labels


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_solvers_find_the_minimum(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the function in the docstring is 0 at the minimum, and both solvers find the same one."""
    features, labels = problem(classes)
    monkeypatch.setattr(module, "ROWS", 64)  # in chunks
    for c in (0.01, 1.0, 100.0):
        found = [fit_sklearn(Problem.of(features, labels), c), fit_torch(Problem.of(features, labels), c, CPU)]
        for linear in found:
            assert linear.converged and linear.classes.tolist() == sorted(set(labels.tolist()))
            weight, bias = (t.clone().requires_grad_() for t in (linear.weight, linear.bias))
            places = torch.searchsorted(linear.classes, labels)
            loss = torch.nn.functional.cross_entropy(features.double() @ weight.T + bias, places)
            (loss + weight.square().sum() / (2 * c * len(labels))).backward()
            assert weight.grad is not None and weight.grad[-1].abs().max() < 2e-5
        torch.testing.assert_close(found[0].weight, found[1].weight, atol=0.02, rtol=0.01)
        assert torch.equal(found[0].best(features, 2), found[1].best(features, 2))


def test_best_are_the_likeliest_labels() -> None:
    features, labels = problem(7)
    linear = fit_torch(Problem.of(features, labels), 10.0, CPU)
    scores = features.double() @ linear.weight.T + linear.bias
    assert torch.equal(linear.best(features, 5), linear.classes[scores.argsort(1, descending=True)[:, :5]])
    assert linear.best(features, 9).shape == (200, 7)


@pytest.mark.parametrize("top", [-6.0, -1.375, 0.0, 3.625, 6.0])
def test_the_search_finds_the_peak_in_few_steps(top: float) -> None:
    exponent, known = search(lambda e: -abs(e - top))
    assert exponent == top and len(known) <= 15 and all(-6 <= e <= 6 for e in known)
    assert search(lambda e: 0.5)[0] == -6  # with ties, choose the strongest regularisation


def test_a_fifth_of_each_class_is_held_out() -> None:
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] + [4] * 7)[torch.randperm(20)]
    features = torch.arange(20.0)[:, None]
    (kept, kept_labels), (left, left_labels) = split(features, labels, 0, "data")
    assert left_labels.bincount().tolist() == [2, 1, 0, 0, 1] and kept_labels.bincount().tolist() == [8, 1, 1, 0, 6]
    assert sorted(torch.cat([kept, left]).flatten().tolist()) == list(range(20))
    assert all(labels[int(i)] == label for i, label in zip(left, left_labels, strict=True))
    again, other = split(features, labels, 0, "data")[1][0], split(features, labels, 1, "data")[1][0]
    assert torch.equal(left, again) and not torch.equal(left, other)


def levels(root: Path, classes: dict[str, list[int]]) -> Path:
    for name, values in classes.items():
        (root / name).mkdir(parents=True)
        for i, level in enumerate(values):
            (root / name / f"{i}.png").write_bytes(grey(level))
    return root


def test_a_probe_of_greys(tmp_path: Path) -> None:
    train = {"dark": [*range(0, 60, 4)], "middle": [*range(90, 150, 4)], "light": [*range(180, 250, 4)]}
    given = open_dataset(levels(tmp_path / "train", train))
    # The test data orders its classes differently, and has one picture that looks like another class.
    judged = open_dataset(levels(tmp_path / "test", {"light": [200, 205], "dark": [10, 20, 240]}))
    result = probe(Oracle(), given, judged)
    assert result["acc1"] == pytest.approx(4 / 5) and result["mean_per_class_recall"] == pytest.approx((1 + 2 / 3) / 2)
    assert result["acc5"] == 1 and (result["n"], result["n_train"], result["classes"]) == (5, 47 + 1, 3)
    assert result["validation_acc1"] == max(row["acc1"] for row in result["sweep"]) == 1
    assert result["C"] == min(row["C"] for row in result["sweep"] if row["acc1"] == 1)
    alone = probe(Oracle(), given)  # a fifth is held out for validation
    assert alone["acc1"] > 0.8 and alone["n"] + alone["n_train"] == 48 and alone["test"] is None


def test_data_that_cannot_be_probed(tmp_path: Path) -> None:
    one = open_dataset(levels(tmp_path / "one", {"a": [1, 2]}))
    with pytest.raises(ValueError, match="one: a linear probe needs pictures of two classes"):
        probe(Oracle(), one)
    single = open_dataset(levels(tmp_path / "single", {"a": [1], "b": [2]}))
    with pytest.raises(ValueError, match="no class has two pictures"):
        probe(Oracle(), single)
    good = open_dataset(levels(tmp_path / "good", {"a": [1, 2], "b": [200, 201]}))
    other = open_dataset(levels(tmp_path / "other", {"a": [1, 2], "c": [2]}))
    with pytest.raises(ValueError, match="other: its class 'c' is not in"):
        probe(Oracle(), good, other)
    with pytest.raises(ValueError, match="solver 'svm': choose auto, sklearn, torch"):
        probe(Oracle(), good, solver="svm")


def test_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = open_dataset(levels(tmp_path, {"a": [1, 2, 3], "b": [200, 201, 202]}))
    assert probe(Oracle(), good)["solver"] == "sklearn"
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert probe(Oracle(), good)["solver"] == "torch"
    with pytest.raises(ValueError, match=r"needs scikit-learn: pip install tinyclip\[probe\]"):
        probe(Oracle(), good, solver="sklearn")


def test_the_command_takes_the_splits_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tokenizer = tokenizer.pruned(tokenizer.kept_ids(["a photo"]))
    config = vit_clip(
        24, (2, 32), (1, 32), 8, image_size=16, head_dim=8, context_length=8, vocab_size=tokenizer.vocab_size
    )
    save_checkpoint(tmp_path / "model", CLIP(config), tokenizer, Preprocess(image_size=16))
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name, colour in (("red", (200, 30, 30)), ("green", (30, 200, 30)), ("blue", (30, 30, 200))):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.integers(-30, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{i}.png")
    out = tmp_path / "figures.json"
    arguments = ["probe", tmp_path / "model", tmp_path / "data", "--device", "cpu", "-o", out]
    monkeypatch.setattr(sys, "argv", ["tinyclip", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().out
    assert not ended.value.code
    result = json.loads(out.read_text())
    assert result["acc1"] == 1 and (result["n"], result["n_train"], result["solver"]) == (12, 24, "sklearn")
    assert Path(result["train"]).name == "train" and Path(result["test"]).name == "test"
    assert "validation_acc1" in printed and "100.00 %" in printed
