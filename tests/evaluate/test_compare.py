from __future__ import annotations

import csv
import json
import math
import re
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import special
from torch import Tensor

from tests.helpers.judged import grey, shards
from tests.helpers.models import random_model, small_config, small_tokenizer
from tinyclip.cli import main
from tinyclip.evaluate import compare, stats
from tinyclip.evaluate.compare import affinity_divergence, check, differences, judge, thumbnails
from tinyclip.evaluate.contenders import Contender, costs, disk_size, labels
from tinyclip.evaluate.metrics import evaluate, open_dataset
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.transforms import Preprocess
from tinyclip.report import comparison

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
SUBSETS = ["new", "old"]


@dataclass
class Noisy:
    """A model that sees a picture's grey level; the more noise it has, the more errors it makes."""

    noise: float
    dim: int
    logit_scale: float = math.log(12)
    computing = {"dtype": "float32", "device": "cpu"}  # noqa: RUF012
    config = small_config()

    def encode_image(self, images: Any, *, normalize: bool = True) -> Tensor:
        if isinstance(images, Tensor):
            return torch.ones(len(images), self.dim)
        levels = [round(float(np.asarray(image.convert("L")).mean())) for image in images]
        return torch.stack([self._feature(level % len(CLASSES), level + 1) for level in levels])

    def encode_text(self, texts: Sequence[str], *, normalize: bool = True) -> np.ndarray | Tensor:
        classes = [next((i for i, name in enumerate(CLASSES) if name in text), 0) for text in texts]
        seeds = [zlib.crc32(text.encode()) for text in texts]
        return torch.stack([self._feature(c, seed) for c, seed in zip(classes, seeds, strict=True)])

    def _feature(self, kind: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 10_000 * self.dim)
        signal = torch.zeros(self.dim)
        signal[kind] = 1
        return torch.nn.functional.normalize(signal + self.noise * torch.randn(self.dim, generator=generator), dim=0)

    def preprocess(self, image: Image.Image) -> Tensor:
        return torch.zeros(3, 8, 8)

    def tokenize(self, texts: str) -> Tensor:
        return torch.zeros(1, 5)


def contender(name: str, noise: float, dim: int = 12, scale: float = 12.0) -> Contender:
    return Contender(name, f"models/{name}", Noisy(noise, dim, math.log(scale)), 1000)


@pytest.fixture(scope="module")
def contenders() -> list[Contender]:
    return [contender("teacher", 0.25), contender("student", 0.45), contender("wide", 0.4, dim=9, scale=20)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred pictures, one of them damaged: most have a class, most have one to three captions, half are in a
    subset."""
    rows: list[tuple[int, dict[str, Any]]] = []
    for level in range(100):
        name = CLASSES[level % len(CLASSES)]
        info: dict[str, Any] = {"class": name} if level % 9 else {}
        if level % 11:
            info["captions"] = [f"{name} {level} {i}" for i in range(1 + level % 3)]
        if level % 4 < 2:
            info["subset"] = SUBSETS[level % 2]
        rows.append((level, info))
    folder = shards(tmp_path_factory.mktemp("data") / "both", rows)
    (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    return folder


@pytest.fixture
def outcome(contenders: list[Contender], data: Path, monkeypatch: pytest.MonkeyPatch) -> compare.Outcome:
    monkeypatch.setattr(compare, "TILE", 1000)
    monkeypatch.setattr(compare, "AT_ONCE", 7)
    return judge(contenders, open_dataset(data), "both")


def test_accuracy_and_recall_are_those_of_evaluate(
    outcome: compare.Outcome, contenders: list[Contender], data: Path
) -> None:
    for one in contenders:
        expected = evaluate(one.clip, open_dataset(data))
        found = outcome.figures[one.name]
        names = ["acc1", "acc5", *(f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10))]
        assert {name: found[name] for name in names} == pytest.approx({name: expected[name] for name in names})
        for subset in SUBSETS:
            assert found[f"acc1 {subset}"] == pytest.approx(expected["subsets"][subset]["acc1"])
        for name in names:
            low, high = found["intervals"][name]
            assert low <= found[name] <= high
        low, high = found["intervals"]["acc1"]
        assert 0 < high - low < 0.3
    assert outcome.figures["teacher"]["acc1"] > outcome.figures["student"]["acc1"]
    assert outcome.figures["teacher"]["acc1"] < 1


def test_answers_agreement_and_test_against_plain_loops(outcome: compare.Outcome, contenders: list[Contender]) -> None:
    levels = [level for level in range(100) if level % 9]
    prompts = [f"a photo of a {name}" for name in CLASSES]
    right, chosen = {}, {}
    for one in contenders:
        answers, clip = outcome.answers[one.name], one.clip
        texts = clip.encode_text(prompts).double().numpy()
        right[one.name], chosen[one.name], gaps = [], [], []
        for i, level in enumerate(levels):
            image = clip.encode_image([Image.new("L", (8, 8), level)]).double().numpy()[0]
            chances = special.softmax(math.exp(clip.logit_scale) * texts @ image)
            assert answers.choice[i] == chances.argmax()
            assert answers.confidence[i] == pytest.approx(chances.max(), rel=1e-5)
            assert answers.truth[i] == pytest.approx(chances[level % 7], rel=1e-5)
            right[one.name].append(chances.argmax() == level % 7)
            chosen[one.name].append(chances.argmax())
            gaps.append(chances.max())
        ece = stats.calibration(np.array(gaps), np.array(right[one.name])).error
        assert outcome.figures[one.name]["ece"] == pytest.approx(ece, abs=1e-6)
    for student in ("student", "wide"):
        figures = outcome.figures[student]
        pairs = list(zip(right["teacher"], right[student], strict=True))
        assert (figures["lost"], figures["won"]) == (pairs.count((True, False)), pairs.count((False, True)))
        assert figures["p_value"] == stats.mcnemar(figures["lost"], figures["won"])
        assert figures["change"] == pytest.approx(np.mean(right[student]) - np.mean(right["teacher"]))
        same = [a == b for a, b in zip(chosen["teacher"], chosen[student], strict=True)]
        assert figures["agreement"] == pytest.approx(np.mean(same)) and 0 < figures["agreement"] < 1
        low, high = figures["intervals"]["change"]
        assert low < figures["change"] < high
    assert "agreement" not in outcome.figures["teacher"]


def test_cosines_only_where_widths_agree(outcome: compare.Outcome, contenders: list[Contender]) -> None:
    pictures = [Image.new("L", (8, 8), level) for level in range(100)]
    one, two = (c.clip.encode_image(pictures).double() for c in contenders[:2])
    assert outcome.figures["student"]["image_cosine"] == pytest.approx((one * two).sum(1).mean().item(), abs=1e-6)
    assert 0 < outcome.figures["student"]["text_cosine"] < 1
    assert outcome.figures["wide"]["image_cosine"] is None and outcome.figures["wide"]["text_cosine"] is None


def features(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def test_affinity_divergence_is_the_kl_divergence_both_ways() -> None:
    image, text, teacher_image, teacher_text = (features(*s) for s in ((6, 4, 0), (9, 4, 1), (6, 7, 2), (9, 7, 3)))
    student, teacher = (
        (30 * (image @ text.T)).double().numpy(),
        (55 * (teacher_image @ teacher_text.T)).double().numpy(),
    )
    ways = []
    for axis in (1, 0):
        q, p = special.softmax(student, axis=axis), special.softmax(teacher, axis=axis)
        ways.append(special.rel_entr(p, q).sum(axis=axis).mean())
    found = affinity_divergence(image, text, teacher_image, teacher_text, 30, 55)
    assert found == pytest.approx(sum(ways) / 2, rel=1e-5)
    assert affinity_divergence(image, text, image, text, 30, 30) == 0
    assert affinity_divergence(image, text, image, text, 30, 31) > 0


def test_captions_alone(tmp_path: Path, contenders: list[Contender]) -> None:
    rows = [
        (level, {"captions": [f"{CLASSES[level % 7]} {level} {i}" for i in range(1 + level % 2)]})
        for level in range(40)
    ]
    outcome = judge(contenders, open_dataset(shards(tmp_path / "captions", rows)), "captions")
    assert outcome.main == "text_retrieval_recall@1" and outcome.kind == "caption"
    for name, figures in outcome.figures.items():
        assert "acc1" not in figures
        assert figures["text_retrieval_recall@1"] == pytest.approx(outcome.answers[name].right[:, 0].mean())
    student, right = outcome.figures["student"], {n: a.right[:, 0] for n, a in outcome.answers.items()}
    assert student["lost"] == (right["teacher"] & ~right["student"]).sum() > 0
    owner = [level for level, info in rows for _ in info["captions"]]
    chosen = {}
    for one in contenders:  # captions of the same picture count together
        texts = one.clip.encode_text([caption for _, info in rows for caption in info["captions"]]).double().numpy()
        answers, chosen[one.name] = outcome.answers[one.name], []
        for level in range(40):
            image = one.clip.encode_image([Image.new("L", (8, 8), level)]).double().numpy()[0]
            chances = special.softmax(math.exp(one.clip.logit_scale) * texts @ image)
            best = owner[int(chances.argmax())]
            chosen[one.name].append(best)
            assert answers.confidence[level] == pytest.approx(chances[np.array(owner) == best].sum(), rel=1e-5)
            assert answers.truth[level] == pytest.approx(chances[np.array(owner) == level].sum(), rel=1e-5)
    same = [a == b for a, b in zip(chosen["teacher"], chosen["student"], strict=True)]
    assert student["agreement"] == pytest.approx(np.mean(same))
    assert outcome.truth(3) == "dog 3 0"
    own = {caption for i, (_, info) in enumerate(rows) if i == 3 for caption in info["captions"]}
    said = outcome.choices[outcome.answers["teacher"].choice[3]]
    assert bool(right["teacher"][3]) == (said in own)


def test_the_pictures_on_which_they_differ(outcome: compare.Outcome) -> None:
    teacher, student, wide = outcome.answers.values()
    found = differences(outcome, count=5)
    assert len(found["lost"]) == 5
    for kind, wanted in (("lost", True), ("won", False)):
        for i in found[kind]:
            others = [bool(a.right[i, 0]) for a in (student, wide)]
            assert bool(teacher.right[i, 0]) is wanted and (not wanted) in others

    def gap(i: int) -> float:
        return max(teacher.truth[i] - a.truth[i] for a in (student, wide) if not a.right[i, 0])

    gaps = [gap(i) for i in differences(outcome, count=100)["lost"]]
    assert gaps == sorted(gaps, reverse=True)
    assert [gap(i) for i in found["lost"]] == gaps[:5]


def test_thumbnails_are_of_the_right_pictures_and_leave_out_what_changed(outcome: compare.Outcome) -> None:
    levels = [level for level in range(100) if level % 9]
    outcome.keys[4] = "another"
    found = thumbnails(outcome, [0, 4, 50])
    assert {i: image.getpixel((0, 0)) for i, image in found.items()} == {i: (levels[i],) * 3 for i in (0, 50)}


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["assets/teacher", "runs/a/student"], ["teacher", "student"]),
        (["runs/a/student", "runs/b/student", "x"], ["a/student", "b/student", "x"]),
        (["/m/student", "student", "./student"], ["m/student", "student", "student (2)"]),
        (["x/a (2)", "a", "a"], ["a (2)", "a", "a (3)"]),
        (["TinyCLIP-ViT-8M-16-Text-3M-YFCC15M", "wkcn/T"], ["TinyCLIP-ViT-8M-16-Text-3M-YFCC15M", "T"]),
    ],
)
def test_labels_are_short_and_differ(sources: list[str], expected: list[str]) -> None:
    assert labels(sources) == expected


def test_data_that_nothing_can_be_compared_by(tmp_path: Path) -> None:
    (tmp_path / "one" / "cat").mkdir(parents=True)
    (tmp_path / "one" / "cat" / "1.png").write_bytes(grey(1))
    with pytest.raises(ValueError, match=r"only one class \(cat\)"):
        check(open_dataset(tmp_path / "one"))
    with pytest.raises(ValueError, match="neither classes nor captions"):
        check(open_dataset(shards(tmp_path / "bare", [(1, {}), (2, {})])))
    junk = shards(tmp_path / "junk", [(1, {"caption": "x"})])
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    (tmp_path / "pictures" / "b").mkdir()
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / "pictures" / name).write_bytes(b"junk")
    with pytest.raises(ValueError, match="no readable pictures"):
        check(open_dataset(tmp_path / "pictures"))
    (junk / "classnames.txt").write_text("x\n")
    check(open_dataset(junk))  # captions are enough


def test_size_on_disk_leaves_out_the_state_of_a_training(tmp_path: Path) -> None:
    for name, size in {"model.safetensors": 100, "config.json": 20, "state.pt": 5000}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert disk_size(tmp_path) == 120
    assert disk_size(tmp_path / "config.json") == 20


def test_the_table_has_a_dash_for_what_a_model_does_not_have(
    outcome: compare.Outcome, contenders: list[Contender]
) -> None:
    config = small_config(vocab_size=small_tokenizer().vocab_size)
    pipeline = Pipeline(random_model(config, dtype=torch.float32), small_tokenizer(), Preprocess(image_size=32))
    measured = costs([contenders[0], Contender("student", "s", pipeline, 2000), contenders[2]])
    assert all(cost["params_image"] > 0 and cost["macs_image"] > 0 for cost in measured.values())
    for cost in measured.values():
        for key in ("pairs_per_s", "latency_ms"):
            assert 0 < cost[f"{key}_range"][0] <= cost[key] <= cost[f"{key}_range"][1]
    measured["wide"] |= {"dtype": "int8", "runtime": "openvino"}
    columns, rows = comparison.table([outcome], measured)
    table = {row[0]: row[1:] for row in rows}
    assert columns == ["", "teacher", "student", "wide"]
    assert table["computed in"] == ["float32 on cpu"] * 2 + ["int8 on cpu, openvino"]
    assert table["cosine of images"][0] == table["cosine of images"][2] == "-"
    figures = outcome.figures["student"]
    low, high = figures["intervals"]["acc1"]
    assert table["top-1, %"][1] == f"{100 * figures['acc1']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    assert table["McNemar's p"][0] == "-" and float(table["McNemar's p"][1]) == pytest.approx(
        figures["p_value"], rel=0.1
    )


def test_the_report_is_one_safe_file(outcome: compare.Outcome, contenders: list[Contender], tmp_path: Path) -> None:
    hostile = {"teacher": "_$x$<b>", "student": "猫 $", "wide": "<script>alert(1)</script>"}
    outcome.choices[:] = [f"{name} $\\bad$ 犬 <i>" for name in outcome.choices]
    outcome.answers = {hostile[name]: answers for name, answers in outcome.answers.items()}
    outcome.figures = {hostile[name]: figures for name, figures in outcome.figures.items()}
    renamed = [Contender(hostile[c.name], c.source, c.clip, c.size) for c in contenders]
    comparison.write(tmp_path / "out", [outcome], costs(renamed))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "<i>" not in page and "<b>&lt;" not in page.replace("<b>ant", "")
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("data:image/png;base64,") == sum(map(len, differences(outcome).values())) > 0
    for words in ("Accuracy and cost", "Calibration", "Only the teacher is right", "probability of the right class"):
        assert (words in page) is (
            words != "probability of the right class"
        )  # classes have enough pictures for an accuracy
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert saved["data"]["both"]["models"]["猫 $"]["lost"] == outcome.figures["猫 $"]["lost"]
    with (tmp_path / "out" / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(outcome.keys)
    share = np.mean([int(row["猫 $, right"]) for row in rows])
    assert share == pytest.approx(outcome.figures["猫 $"]["acc1"])
    drawn = sorted(file.name for file in (tmp_path / "out" / "figures").iterdir())
    assert drawn == ["1-accuracy.svg", "1-calibration.svg", "1-classes-1.svg", "1-classes-2.svg"]
    for file in drawn:
        ElementTree.parse(tmp_path / "out" / "figures" / file)


def test_classes_of_few_pictures_are_shown_by_probability(outcome: compare.Outcome) -> None:
    with comparison.drawing():
        figure = comparison.class_figure(outcome, "student")
        assert figure is not None and figure.axes[0].get_xlabel() == "top-1, %"
        before, after = (line.get_xdata() for line in figure.axes[0].get_lines())
        expected = [_recall(outcome, "student", c) - _recall(outcome, "teacher", c) for c in range(len(CLASSES))]
        assert after - before == pytest.approx(sorted(change for change in expected if change < 0))
        accuracy = outcome.answers
        keep = slice(0, 12)
        outcome.own = outcome.own[keep]
        outcome.answers = {
            name: compare.Answers(a.choice[keep], a.confidence[keep], a.truth[keep], a.right[keep])
            for name, a in accuracy.items()
        }
        figure = comparison.class_figure(outcome, "student")
        assert figure is not None and figure.axes[0].get_xlabel().startswith("probability")
        assert comparison.class_figure(outcome, "teacher") is None  # no predictions changed


def _recall(outcome: compare.Outcome, model: str, label: int) -> float:
    own = outcome.own == label
    return float(100 * outcome.answers[model].right[own, 0].mean())


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher`, a narrower `a/student`, a `b/student` of another size, and class folders `classes`."""
    folder = tmp_path_factory.mktemp("command")
    tokenizer = small_tokenizer()
    for i, (name, changes) in enumerate(
        {"teacher": {}, "a/student": {"context_length": 8}, "b/student": {"image_size": 16}}.items()
    ):
        config = small_config(vocab_size=tokenizer.vocab_size, **changes)
        size = Preprocess(image_size=config.vision.image_size)
        Pipeline(random_model(config, seed=i, dtype=torch.float32), tokenizer, size).save(folder / name)
    for name in ("cat", "dog"):
        (folder / "classes" / name).mkdir(parents=True)
        for i in range(3):
            (folder / "classes" / name / f"{i}.png").write_bytes(grey(60 * i + len(name)))
    (folder / "classes" / "cat" / "broken.png").write_bytes(b"junk")
    return folder


def run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0
) -> str:
    """Return the output of `tinyclip compare`, or its error line if it should fail."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["tinyclip", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert (ended.value.code or 0) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_the_command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    models = ("teacher", "a/student", "b/student", "--data", "classes")

    def tinyclip(*arguments: object, code: int = 0) -> str:
        return run(place, monkeypatch, capsys, *arguments, code=code)

    printed = json.loads(tinyclip(*models, "--json", "-o", "out"))
    saved = json.loads((place / "out" / "compare.json").read_text())
    assert printed == saved
    assert list(saved["models"]) == ["teacher", "a/student", "b/student"]
    facts = saved["data"]["classes"]
    assert (facts["pictures"], facts["classes"], facts["skipped"]) == (6, 2, 1)
    assert facts["models"]["a/student"]["change"] == pytest.approx(
        facts["models"]["a/student"]["acc1"] - facts["models"]["teacher"]["acc1"]
    )
    assert "Left out" in (place / "out" / "report.html").read_text()
    assert "out exists" in tinyclip(*models, "-o", "out", code=2)
    assert "report: out/report.html" in tinyclip(
        "teacher", "a/student", "--data", "classes", "-o", "out", "--overwrite"
    )
    assert list(json.loads((place / "out" / "compare.json").read_text())["models"]) == ["teacher", "student"]
    assert "classes has no .tinyclip.json" in tinyclip(*models, "-o", "classes", "--overwrite", code=2)
    assert len(list(place.iterdir())) == 5  # nothing else is left


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("teacher", "nowhere", "--data", "classes"), "nowhere: no such checkpoint"),
        (("teacher", "a/student", "--data", "missing"), "missing: no such data folder"),
        (("teacher", "a/student", "--data", "classes/cat"), "contains no class folders"),
        (("teacher", "a/student"), "--data"),
        (("teacher", "--data", "classes"), "STUDENTS"),
    ],
)
def test_bad_input_is_said_before_anything_runs(
    arguments: tuple[str, ...],
    line: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compare, "judge", None)
    said = run(place, monkeypatch, capsys, *arguments, "-o", "none", code=2)
    assert line in said and not (place / "none").exists()


def test_a_comparison_that_fails_leaves_nothing(
    outcome: compare.Outcome, contenders: list[Contender], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = costs(contenders)

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "_write_answers", stop)
    with pytest.raises(KeyboardInterrupt):
        comparison.write(tmp_path / "out", [outcome], measured)
    assert list(tmp_path.iterdir()) == []
