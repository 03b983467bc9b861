from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.models import ROOT, small_config
from tinyclip.recipe.recipe import Recipe, load_recipe, shape_from
from tinyclip.recipe.student_shape import StudentShape

MINIMAL: dict[str, Any] = {"teacher": "t", "data": "d", "output": "o", "stages": [{"name": "50", "steps": 20}]}


def write(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_say_their_command(path: Path) -> None:
    recipe = load_recipe(path)
    command = "train" if recipe.teacher is None else "distill"
    assert f"tinyclip {command} recipes/{path.name}" in recipe.description


def test_defaults_are_the_released_ones(tmp_path: Path) -> None:
    stage = load_recipe(write(tmp_path)).stages[0]
    assert (stage.loss.affinity, stage.loss.contrastive) == (1, 0)
    assert stage.loss.student_scale == stage.loss.teacher_scale == "teacher"
    assert (stage.optimizer.lr, stage.optimizer.betas, stage.optimizer.eps) == (1e-4, (0.9, 0.98), 1e-6)
    assert (stage.optimizer.weight_decay, stage.optimizer.grad_clip, stage.augment.scale) == (0.2, 5, (0.9, 1))


def test_overrides(tmp_path: Path) -> None:
    sets = ["stages.0.steps=7", "stages.0.optimizer.lr=1e-2", "stages.0.loss.student_scale=50", "device=cpu"]
    recipe = load_recipe(write(tmp_path), sets)
    stage = recipe.stages[0]
    assert (stage.steps, stage.optimizer.lr, stage.loss.student_scale, recipe.device) == (7, 0.01, 50, "cpu")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stages.0.stepz=1", "stages.0.stepz: unknown key"),
        ("stages.0.steps=0", "stages.0.steps"),
        ("stages.0.steps=many", "stages.0.steps"),
        ("stages.3.steps=1", "there is no stages.3.steps"),
        ("nonsense", "write key.path=value"),
        ("stages.0.optimizer.lr=[", "not valid YAML"),
        ("stages.0.optimizer.warmup_steps=20", "must be below steps"),
        ("stages.0.loss={affinity: 0}", "all loss weights are 0"),
        ("stages.0.loss.student_scale=other", "stages.0.loss.student_scale"),
        ("stages.0.augment.scale=[0, 2]", "stages.0.augment.scale"),
        ("stages.0.student.vision.depth=3", "stages.0.student.vision.depth: unknown key"),
        ("stages=[]", "stages"),
        ("stages.0={name: a, steps: 9, inherit: auto, auto: {steps: 2, target_sparsity: 1.5}}", "must be below 1"),
        (
            "stages.0={name: a, steps: 9, inherit: auto, auto: {steps: 2, target_sparsity: {image: 0.3}}}",
            "y.text: missing",
        ),
        ("teacher=null", "either `teacher` .* or `model`"),
        ("device=tpu", "device"),
        ("precision=int8", "precision"),
        ("stages.0.name=../x", "stages.0.name"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, override: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load_recipe(write(tmp_path), [override])


def test_two_stages_of_one_name_and_affinity_without_teacher(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two stages have the same name"):
        load_recipe(write(tmp_path, stages=MINIMAL["stages"] * 2))
    with pytest.raises(ValueError, match=r"stages.0.loss.affinity: needs a teacher"):
        load_recipe(write(tmp_path, teacher=None, model="ViT-B-32"))


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such recipe"):
        load_recipe(tmp_path / "missing.yaml")
    path = tmp_path / "bad.yaml"
    for text, named in (("a: [", "not valid YAML"), ("- 1", "a mapping"), ("", "a mapping")):
        path.write_text(text)
        with pytest.raises(ValueError, match=named):
            load_recipe(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        load_recipe(path)


def test_a_shape_changes_only_what_it_says() -> None:
    base = small_config()
    assert StudentShape().apply(base) == base
    config = shape_from(["vision.width=16", "text.layers=1", "embed_dim=8"]).apply(base)
    assert (config.vision.width, config.vision.heads, config.vision.mlp_width) == (16, (2,) * 3, (64,) * 3)
    assert (config.text.layers, config.text.width, config.embed_dim) == (1, 24, 8)
    config = shape_from(["vision.heads=1", "vision.mlp_width=5", "text.context_length=6"]).apply(base)
    assert (config.vision.heads, config.vision.mlp_width, config.text.context_length) == ((1,) * 3, (5,) * 3, 6)


def test_aliases_are_set_apart(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    stages = "stages: [{name: a, steps: 9, optimizer: &o {lr: 0.1}}, {name: b, steps: 9, optimizer: *o}]"
    path.write_text(f"teacher: t\ndata: d\noutput: o\n{stages}\n")
    rates = [s.optimizer.lr for s in load_recipe(path, ["stages.0.optimizer.lr=0.2"]).stages]
    assert rates == [0.2, 0.1]


def test_a_shape_on_unequal_blocks() -> None:
    base = small_config()
    vision = base.vision.model_copy(update={"heads": (4, None, 2)})
    uneven = base.model_copy(update={"vision": vision})
    assert shape_from(["text.layers=1"]).apply(uneven).vision == vision
    with pytest.raises(ValueError, match=r"student\.vision\.heads: the blocks to inherit are unequal"):
        shape_from(["vision.layers=2"]).apply(uneven)
    with pytest.raises(ValueError, match=r"vision\.colour: unknown key"):
        shape_from(["vision.colour=2"])


def test_recipes_are_immutable_and_round_trip(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
