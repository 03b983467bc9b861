"""Model cards: in the hub's format, with the known facts and nothing more."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from tests.helpers.models import random_model, small_config, small_tokenizer
from tests.helpers.shards import good, picture, write_shard
from tinyclip.cli.main import main
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import vit_clip
from tinyclip.recipe.recipe import Recipe
from tinyclip.train import loop
from tinyclip.train.run_card import of_run
from tinyclip.train.setup import evaluator
from tinyclip.zoo import card
from tinyclip.zoo.card import Card, card_text, known, made_from, read_card, shown
from tinyclip.zoo.convert import convert

FIGURES = {"acc1": 0.25, "acc5": 0.5, "n": 40, "data": "/home/her/eval", "image_retrieval_recall@1": 0.125}


def save(folder: Path, facts: Card | None = None) -> Path:
    tokenizer = small_tokenizer()
    model = random_model(small_config(vocab_size=tokenizer.vocab_size), dtype=torch.float32)
    Pipeline(model, tokenizer, Preprocess(image_size=32)).save(folder, card=facts)
    return folder


def recipe(**changes: Any) -> Recipe:
    stages = [{"name": "75", "steps": 5, "batch_size": 8}, {"name": "50", "steps": 9, "batch_size": 8}]
    data = {"teacher": "org/big", "data": "pairs", "output": "runs/mine", "stages": stages}
    return Recipe.model_validate(data | changes)


def front(folder: Path) -> dict[str, Any]:
    """Return the front matter as the hub's own library reads it."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_what_nobody_said_is_unknown(tmp_path: Path) -> None:
    folder = save(tmp_path / "mine")
    text = (folder / "README.md").read_text()
    assert "# mine\n" in text
    for section in (
        "How it was made\n\nUnknown",
        "Training data\n\nUnknown",
        "Figures\n\nNone",
        "Licence\n\nUnknown",
    ):
        assert f"## {section}" in text
    assert front(folder).keys() == {"library_name", "pipeline_tag", "tags", "tinyclip"}


def test_the_shape_is_that_of_the_model(tmp_path: Path) -> None:
    save(tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text()
    model = random_model(small_config(vocab_size=small_tokenizer().vocab_size))
    parts = [p.numel() for name, p in model.named_parameters() if name.startswith("visual.")]
    assert f"| parameters | {sum(parts):,} |" in text
    assert "| blocks x width | 3 x 32 | 2 x 24 |" in text and "ViT, 32 px, patch 8" in text


def test_the_hub_reads_what_is_known(tmp_path: Path) -> None:
    facts = of_run(recipe(), 1, FIGURES).model_copy(update={"licence": "mit"})
    found = ModelCard.load(save(tmp_path / "mine", facts) / "README.md").data
    assert (found.license, found.library_name, found.base_model) == ("mit", "tinyclip", "org/big")
    assert found.metrics == ["accuracy", "recall"] and "distillation" in found.tags
    assert found.eval_results is not None
    results = {result.metric_name: result.metric_value for result in found.eval_results}
    assert results == {"top-1": 0.25, "top-5": 0.5, "text to image, recall@1": 0.125}


def test_no_path_of_the_machine_gets_into_a_card() -> None:
    settings = recipe(
        data="/home/her/pairs/train",
        output="/home/her/runs/mine",
        evaluation={"data": "/home/her/eval"},
    )
    text = card_text(small_config(), of_run(settings, 1, FIGURES))
    assert "/home" not in text
    assert "The pairs in .../pairs/train" in text and "top-1" in text


def test_a_folder_is_never_taken_for_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "models" / "big")
    facts = of_run(recipe(teacher="models/big"), 1, None)
    assert "base_model" not in yaml.safe_load(card_text(small_config(), facts).split("---\n")[1])
    assert [shown(name) for name in ("models/big", "org/big", "/a/b/c")] == ["./models/big", "org/big", ".../b/c"]


@pytest.mark.parametrize(
    ("changes", "source", "teacher"),
    [
        ({}, "org/big", "org/big"),
        ({"teacher": "TinyCLIP-ViT-61M-32-Text-29M-LAION400M"}, *["TinyCLIP-ViT-61M-32-Text-29M-LAION400M"] * 2),
        ({"stages": [{"name": "50", "steps": 5, "batch_size": 8, "inherit": "none"}]}, "", "org/big"),
        ({"stages": [{"name": "50", "steps": 5, "batch_size": 8, "start": "org/other"}]}, "org/other", "org/big"),
    ],
)
def test_where_the_weights_come_from(changes: dict[str, Any], source: str, teacher: str) -> None:
    settings = recipe(**changes)
    facts = of_run(settings, len(settings.stages) - 1, None)
    assert (facts.source, facts.teacher) == (source, teacher)
    assert facts.licence == ("mit" if source.startswith("TinyCLIP") else "")


def test_trained_from_scratch_has_no_teacher() -> None:
    stage = {"name": "all", "steps": 5, "batch_size": 8, "inherit": "none", "loss": {"affinity": 0, "contrastive": 1}}
    shape = small_config().model_dump(mode="json")
    settings = recipe(teacher=None, model=shape, stages=[stage])
    text = card_text(small_config(), of_run(settings, 0, None))
    assert "Trained without a teacher" in text and "weights come from" not in text and "teacher was" not in text


def test_a_card_goes_on_from_the_one_before(tmp_path: Path) -> None:
    save(tmp_path / "first", of_run(recipe(), 1, FIGURES).model_copy(update={"licence": "mit"}))
    convert(tmp_path / "first", tmp_path / "second")
    again = read_card(tmp_path / "second")
    assert (again.figures["acc1"], again.licence, again.data) == (0.25, "mit", "The pairs in pairs")
    small = made_from(tmp_path / "second", "Cut.")
    assert (small.figures, small.licence, small.data) == ({}, "mit", "The pairs in pairs")  # its figures differ


def test_cards_of_others_and_of_the_zoo_are_read(tmp_path: Path) -> None:
    entry = known("ViT-40M-32-Text-19M")
    assert (entry.licence, entry.data, entry.figures) == ("mit", "LAION-400M", {"acc1": pytest.approx(0.598)})
    text = "---\nlicense: apache-2.0\ndatasets:\n- laion/laion2b\n---\n# Theirs\n"
    (tmp_path / "README.md").write_text(text)
    theirs = known(tmp_path)
    assert (theirs.licence, theirs.data) == ("apache-2.0", "laion/laion2b")


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\n: : :\n---\n", "---\n- a\n---\n", "---\ntinyclip: 3\n---\n", "\xff"]
)
def test_a_card_that_says_nothing_is_no_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert read_card(tmp_path) == Card()


@pytest.mark.parametrize(("to", "library"), [("open_clip", "open_clip"), ("hf", "transformers")])
def test_other_formats_say_what_loads_them(to: str, library: str, tmp_path: Path) -> None:
    config = vit_clip(24, (2, 64), (2, 64), 16, image_size=32)
    torch.save(random_model(config, dtype=torch.float32).state_dict(), tmp_path / "weights.pt")
    convert(tmp_path / "weights.pt", tmp_path / "out", to)
    assert front(tmp_path / "out")["library_name"] == library
    assert ("open_clip.create_model" if to == "open_clip" else "CLIPModel") in (tmp_path / "out/README.md").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished two-stage run with evaluation."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "data").mkdir()
    write_shard(folder / "data" / "0.tar", [good(i) for i in range(20)])
    for name in ("cat", "dog"):
        (folder / "eval" / name).mkdir(parents=True)
        (folder / "eval" / name / "1.jpg").write_bytes(picture(len(name)))
    settings = recipe(
        teacher=str(save(folder / "teacher", Card(licence="mit"))),
        data=str(folder / "data"),
        output=str(folder / "run"),
        evaluation={"data": str(folder / "eval"), "every": 3},
        workers=0,
        device="cpu",
        precision="float32",
    )
    started = loop.start(settings)
    started.evaluator = evaluator(str(folder / "eval"), None)
    loop.run(started)
    return folder / "run"


def test_every_model_of_a_run_has_its_card_with_figures(finished: Path) -> None:
    for place, name in (("student", "run/50"), ("stages/50/last", "run/50"), ("stages/75/last", "run/75")):
        text = (finished / place / "README.md").read_text()
        assert f"# {name}\n" in text and "| top-1 |" in text
        assert front(finished / place)["license"] == "mit"
    last = json.loads((finished / "stages/50/result.json").read_text())
    assert read_card(finished / "student").figures["acc1"] == last["evaluation"]["acc1"]
    best = last["best_step"]
    stopped = f"as it was after step {best} of the last"
    assert (stopped in (finished / "stages/50/best/README.md").read_text()) == (best < 9)
    assert (finished / "student/README.md").read_text().count("| cut by rule |") == 2


def test_a_run_that_was_killed_before_a_card_was_written_writes_it(finished: Path) -> None:
    text = (finished / "stages/75/last/README.md").read_text()
    for place in ("stages/75/last", "student"):
        (finished / place / "README.md").unlink()
    settings = Recipe.model_validate(yaml.safe_load((finished / "recipe.yaml").read_text()))
    loop.run(loop.start(settings, resume=True))
    assert (finished / "stages/75/last/README.md").read_text() == text
    assert (finished / "student/README.md").exists()


def test_the_commands_say_what_they_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "teacher", Card(licence="mit", figures={"acc1": 0.5}))
    (tmp_path / "texts.txt").write_text("the thing\n")
    commands = {
        "cut": ("inherit", "teacher", "cut", "--shape", "text.layers=1"),
        "pruned": ("vocab", "prune", "teacher", "pruned", "--texts", "texts.txt"),
    }
    monkeypatch.chdir(tmp_path)
    for output, command in commands.items():
        for more in ((), ("--overwrite",)):  # the card is replaced too
            monkeypatch.setattr(sys, "argv", ["tinyclip", *command, *more])
            with pytest.raises(SystemExit) as stopped:
                main()
            assert not stopped.value.code
        found = read_card(tmp_path / output)
        assert (found.source, found.licence, found.figures) == ("teacher", "mit", {})
    assert "Cut by rule" in read_card(tmp_path / "cut").how
    assert "of its 602 tokens" in read_card(tmp_path / "pruned").how


def test_the_shipped_student_says_where_it_comes_from() -> None:
    folder = card.shipped("emoji-student")
    text = (folder / "README.md").read_text()
    assert "./assets/emoji-teacher" in text and "assets/emoji/train" in text and "13.1 %" in text
    assert front(folder)["license"] == "mit"
