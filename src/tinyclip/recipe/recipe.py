"""Recipes: a YAML file that fully describes a run, validated into `Recipe` and `Stage`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from tinyclip.common.schema import Count, Positive, Strict, explain
from tinyclip.common.yaml_text import read_yaml
from tinyclip.inputs.augment import Augment
from tinyclip.recipe.overrides import model_from, override
from tinyclip.recipe.stage import Calibrated, Place, Stage
from tinyclip.recipe.student_shape import Shape, StudentShape


class Evaluation(Strict):
    """Evaluation data, never trained on."""

    data: Place = Field(description="class folders, or shards with `class` or `captions`")
    templates: Place | None = Field(None, description="file of prompt templates, one per line, {c} for the class")
    every: Positive | None = Field(None, description="steps between evaluations; always at a stage's end")


class StoredTeachers(Strict):
    """Teachers whose features `tinyclip cache` has stored; the affinities of several teachers are averaged."""

    cache: Place | Annotated[tuple[Place, ...], Field(min_length=1)] = Field(
        description="folder made by `tinyclip cache`, or a list of them: several teachers on the same views"
    )

    @property
    def folders(self) -> tuple[str, ...]:
        return (self.cache,) if isinstance(self.cache, str) else self.cache


class Recipe(Strict):
    """A whole run."""

    description: str = Field("", description="what it does, its command, expected time and result")
    teacher: Place | StoredTeachers | None = Field(
        None,
        description="checkpoint of the teacher, open_clip:NAME/TAG or transformers:NAME of another library, or "
        "{cache: ..}: stored features; none: train from scratch",
    )
    teacher_shape: Shape = Field(
        None, description="a full config or a model name, used by `plan` and `--smoke` while the teacher is missing"
    )
    model: Shape = Field(None, description="without a teacher: a full config or a model name")
    vocabulary: Literal["clip", "data"] = Field(
        "clip", description="without a teacher: CLIP's vocabulary, or only the tokens in the data"
    )
    data: Place = Field(description="folder of training shards")
    output: Place = Field(description="folder of the run, created by it")
    evaluation: Evaluation | None = Field(None, description="data to evaluate students on")
    stages: list[Stage] = Field(min_length=1, description="the stages, in order")
    seed: Count = Field(0, description="random seed of weights, data order and views")
    workers: Count = Field(1, description="processes that decode images")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: CUDA, else MPS, else the CPU")
    precision: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="bfloat16, float16 or float32; auto: the fastest the device supports"
    )
    tracking: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        (), description="any of tensorboard, trackio, wandb; metrics.jsonl is always written"
    )
    project: str = Field("tinyclip", min_length=1, description="trackio or wandb project")
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    save_every: Positive = Field(100, description="steps between checkpoints in a stage")
    save_minutes: float | None = Field(
        None, gt=0, description="minutes between checkpoints, if they pass before `save_every` steps"
    )
    stall_minutes: float | None = Field(
        60.0, gt=0, description="end the run after this many minutes without a step and say where it hangs; null: never"
    )
    keep: Positive = Field(2, description="checkpoints kept while a stage is in progress, including the newest")
    save_dtype: Literal["float32", "float16"] = Field("float32", description="dtype of `student`; stages keep float32")

    @field_validator("tracking", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value or []

    @field_validator("tracking")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a tracker is named twice")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("two stages have the same name")
        if (self.teacher is None) == (self.model is None):
            raise ValueError("give either `teacher` (to distil) or `model` (to train from scratch)")
        if self.teacher is None and self.teacher_shape is not None:
            raise ValueError("teacher_shape: there is no teacher")
        for i, stage in enumerate(self.stages):
            if self.caches:
                _check_stored(i, stage, len(self.caches))
            if self.teacher is None and stage.loss.distils:
                raise ValueError(f"stages.{i}.loss.{stage.loss.distils[0]}: needs a teacher; set it to 0")
            if self.teacher is None and stage.start == "teacher":
                raise ValueError(f"stages.{i}.start: there is no teacher")
            if self.teacher is None and i == 0 and stage.inherit != "none":
                raise ValueError(f"stages.{i}.inherit: there is no teacher to inherit from; set it to none")
            if self.teacher is None and (stage.target is not None or stage.towers != "both"):
                key = "towers" if stage.towers != "both" else "inherit"
                raise ValueError(f"stages.{i}.{key}: needs a teacher")
            _check_rise(i, stage, self.stages[i - 1] if i else None)
        return self

    @property
    def caches(self) -> tuple[str, ...]:
        """Folders of the teachers' stored features; empty with a live teacher or without one."""
        return self.teacher.folders if isinstance(self.teacher, StoredTeachers) else ()


def _check_stored(i: int, stage: Stage, teachers: int) -> None:
    """Check a stage against stored teachers: a cache has features but no weights, and several teachers share no
    feature space."""
    if stage.inherit != "none" and (stage.start == "teacher" or (stage.start == "previous" and i == 0)):
        raise ValueError(
            f"stages.{i}.start: name the checkpoint to inherit from, since a cache has the teacher's features, "
            "not its weights"
        )
    if stage.towers != "both":
        raise ValueError(f"stages.{i}.towers: the other tower would be the teacher's, and a cache has no weights")
    for name in ("feature", "interactive"):
        if teachers > 1 and getattr(stage.loss, name) > 0:
            raise ValueError(
                f"stages.{i}.loss.{name}: needs one teacher, since {teachers} have no common feature space"
            )


def _check_rise(i: int, stage: Stage, before: Stage | None) -> None:
    """Check that sparsity rises from stage to stage, since it is relative to the original teacher, and that no shape is
    relative to one that is not known yet."""
    if before is None or stage.start != "previous" or before.target is None:
        return
    if stage.inherit == "manual" and stage.student != StudentShape():
        raise ValueError(
            f"stages.{i}.student: the previous stage determines its own shape, so this one cannot set one; "
            "use `inherit: auto` or `calibrated`, or `start` from its result in a separate recipe"
        )
    if stage.target is None:
        return
    now, then = stage.target.target_sparsity, before.target.target_sparsity
    comparable = stage.towers == before.towers and stage.target.counted == before.target.counted
    if comparable and isinstance(now, float) and isinstance(then, float) and now <= then:
        raise ValueError(
            f"stages.{i}.{stage.inherit}.target_sparsity: {now} must exceed the {then} of the previous stage, since "
            "both count from the original teacher"
        )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `key.path=value`, values as in YAML (`stages.0.steps=200`).

    Raises:
        ValueError: when the file is missing or not YAML, or a key or value is invalid, with the key's path.
    """
    try:
        data = read_yaml(Path(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such recipe") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a recipe must be a mapping of keys, see docs/recipes.md")
    data = json.loads(json.dumps(data, default=str))  # so that values shared by YAML aliases can be set separately
    for text in overrides:
        override(data, text)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None


def recipe_of(run: Path) -> Recipe:
    """Return the recipe that a run wrote into its folder; `ValueError` when it is missing or damaged."""
    path = run / "recipe.yaml"
    try:
        return load_recipe(path)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: missing or damaged, so {run} cannot be read as a run ({reason})") from None


def shape_from(overrides: Sequence[str]) -> StudentShape:
    """Build a shape from overrides like `vision.width=128`; `ValueError` for an unknown key or bad value."""
    return model_from(StudentShape, "--shape", overrides, "vision.width=128")


def augment_from(overrides: Sequence[str]) -> Augment:
    """Build an `Augment` from overrides like `rotate=20`; `ValueError` for an unknown key or bad value."""
    return model_from(Augment, "--augment", overrides, "rotate=20")


def calibrated_from(settings: dict[str, Any]) -> Calibrated:
    """Validate settings of calibrated inheritance from the command line; `ValueError` for a bad value."""
    try:
        return Calibrated.model_validate(settings)
    except ValidationError as error:
        raise ValueError(f"--calibrate: {explain(error)}") from None
