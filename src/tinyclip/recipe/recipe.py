"""Recipes: a YAML file that says everything of a run, validated into `Recipe` and `Stage`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from tinyclip.common.devices import Precision
from tinyclip.common.schema import Count, Positive, Strict, explain
from tinyclip.common.yaml_text import read_yaml
from tinyclip.inputs.augment import Augment
from tinyclip.recipe.overrides import model_from, override
from tinyclip.recipe.student_shape import Shape, StudentShape


def _not_empty(value: str) -> str:
    """An empty path would be the folder that one is in."""
    if not value.strip():
        raise ValueError("is empty")
    return value


Beta = Annotated[float, Field(ge=0, lt=1)]
Scale = Annotated[float, Field(gt=0, le=1000)]
Place = Annotated[str, AfterValidator(_not_empty)]
Sparsity = Annotated[float, Field(ge=0, lt=1)]


class TowerSparsity(Strict):
    """A budget for each tower."""

    image: Sparsity = Field(description="fraction to remove of the image tower")
    text: Sparsity = Field(description="fraction to remove of the text tower")


class Target(Strict):
    """How much learned or measured masks remove."""

    target_sparsity: Sparsity | TowerSparsity | None = Field(
        None,
        description="fraction of the original teacher to remove, embeddings and norms not counted: one number is a "
        "budget that the towers share, {image: .., text: ..} is one each",
    )
    unit: Literal["params", "macs"] = Field("params", description="what is counted")
    latency_ms: Annotated[float, Field(gt=0)] | None = Field(
        None, description="instead of target_sparsity: milliseconds a pair on the run's device, batch of 32"
    )
    gates: bool = Field(False, description="also remove whole attention and MLP branches")
    align: Positive = Field(1, description="round kept neurons and channels up to a multiple of this")

    @model_validator(mode="after")
    def _one_target(self) -> Target:
        if (self.target_sparsity is None) == (self.latency_ms is None):
            raise ValueError("give either target_sparsity or latency_ms")
        return self

    @property
    def counted(self) -> Literal["params", "macs"]:
        """What sparsity counts; a latency is found by way of MACs."""
        return self.unit if self.latency_ms is None else "macs"


class Auto(Target):
    """Masks learned while distilling (TinyCLIP's automatic inheritance), then cut."""

    steps: Positive = Field(description="optimiser steps with masks, the first ones of the stage")
    ramp_steps: Positive | None = Field(
        None, description="steps over which the target rises from the stage's start; default: 1000, at most `steps`"
    )
    lr: float = Field(0.02, gt=0, le=1, description="learning rate of masks and multipliers")

    @model_validator(mode="after")
    def _ramp_fits(self) -> Auto:
        if self.ramp_steps is not None and self.ramp_steps > self.steps:
            raise ValueError(
                f"ramp_steps {self.ramp_steps} exceeds steps {self.steps}: the target would not be reached"
            )
        return self


class Calibrated(Target):
    """Masks of 0 and 1 from the importance of heads, neurons and channels, measured on the training data."""

    score: Literal["taylor", "activation", "magnitude"] = Field(
        "taylor",
        description="change of the affinity loss to second order, mean square of activations, or weights alone",
    )
    batches: Positive = Field(200, description="batches measured, at most: it stops when more would change nothing")


TEACHER_TERMS = ("affinity", "feature", "interactive", "image_affinity", "text_affinity")


class Loss(Strict):
    """Weights of the loss terms and the scales of the affinity."""

    affinity: float = Field(1.0, ge=0, description="weight of affinity mimicking (needs a teacher)")
    contrastive: float = Field(0.0, ge=0, description="weight of the image-text contrastive loss")
    feature: float = Field(0.0, ge=0, description="weight of feature mimicking, through a learned projection")
    interactive: float = Field(0.0, ge=0, description="weight of the contrastive loss between student and teacher")
    image_affinity: float = Field(0.0, ge=0, description="weight of the affinity of pictures with pictures")
    text_affinity: float = Field(0.0, ge=0, description="weight of the affinity of texts with texts")
    student_scale: Literal["teacher", "learned"] | Scale = Field(
        "teacher", description="exp(logit_scale) of the student in the affinity: the teacher's, its own, or a number"
    )
    teacher_scale: Literal["teacher"] | Scale = Field("teacher", description="the same for the teacher")
    positives: Literal["pair", "class"] = Field(
        "pair", description="contrastive terms: only the pair itself, or all pairs of one `class` in the batch"
    )

    @model_validator(mode="after")
    def _something(self) -> Loss:
        if self.contrastive == 0 and not self.distils:
            raise ValueError("all loss weights are 0")
        return self

    @property
    def distils(self) -> list[str]:
        """The terms with a weight that need a teacher."""
        return [name for name in TEACHER_TERMS if getattr(self, name) > 0]

    @property
    def learns_scale(self) -> bool:
        """Whether a term depends on the student's own scale."""
        return self.contrastive > 0 or (self.student_scale == "learned" and set(self.distils) != {"feature"})


class Optimizer(Strict):
    """AdamW with linear warm-up and cosine decay to 0."""

    lr: float = Field(1e-4, gt=0, le=1, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="decay of the gradient's mean and square")
    eps: float = Field(1e-6, gt=0, description="added to the root of the mean square")
    weight_decay: float = Field(0.2, ge=0, description="on matrices only; not on norms, biases, gains, logit scale")
    warmup_steps: Count = Field(0, description="steps of linear warm-up")
    grad_clip: float = Field(5.0, gt=0, description="largest gradient norm")


class Stage(Strict):
    """One student, trained from the one before (or the teacher)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="folder of the stage's checkpoint")
    student: StudentShape = Field(StudentShape(), description="shape relative to what it starts from")
    inherit: Literal["manual", "auto", "calibrated", "none"] = Field(
        "manual", description="manual rule, learned masks, measured importance, or none: random weights"
    )
    auto: Auto | None = Field(None, description="with `inherit: auto`")
    calibrated: Calibrated | None = Field(None, description="with `inherit: calibrated`")
    towers: Literal["both", "image", "text"] = Field(
        "both", description="towers that are compressed and trained; the other stays the teacher's, untouched"
    )
    start: Place = Field("previous", description="what is inherited from: previous, teacher, or a checkpoint's path")
    steps: Positive = Field(description="optimiser steps")
    batch_size: int = Field(256, ge=2, description="pairs a step")
    micro_batch: Positive | None = Field(
        None, description="pairs of a device's share that are in memory at once, by exact replay; default: all"
    )
    grad_checkpointing: bool = Field(False, description="keep each block's input alone and compute the rest again")
    compile: bool = Field(False, description="torch.compile of the towers")
    loss: Loss = Field(Loss(), description="terms and scales of the loss")
    optimizer: Optimizer = Field(Optimizer(), description="AdamW and its schedule")
    augment: Augment = Field(Augment(), description="random views of the pictures")
    batch_norm: Literal["frozen", "train"] | None = Field(
        None,
        description="of a ResNet: keep the batch-norm statistics, re-estimated before the first step, or go on with "
        "each batch's; default: frozen, with `inherit: none` train",
    )
    batch_norm_batches: Positive | None = Field(
        None, description="training batches of the re-estimation with `batch_norm: frozen`; default: 20"
    )

    @property
    def freezes_batch_norm(self) -> bool:
        return (
            self.towers == "text" or (self.batch_norm or ("train" if self.inherit == "none" else "frozen")) == "frozen"
        )

    @model_validator(mode="after")
    def _batch_norm_fits(self) -> Stage:
        if self.inherit == "none" and self.batch_norm == "frozen":
            raise ValueError("batch_norm: random weights have no statistics to freeze; set it to train")
        if self.batch_norm_batches is not None and not self.freezes_batch_norm:
            raise ValueError("batch_norm_batches: only with `batch_norm: frozen`")
        for key in ("micro_batch", "grad_checkpointing"):
            if self.batch_norm == "train" and getattr(self, key):
                raise ValueError(
                    f"{key}: computes parts of the batch twice, so batch norm cannot learn; take `batch_norm: frozen`"
                )
        return self

    @model_validator(mode="after")
    def _reaches_the_towers(self) -> Stage:
        terms = {*self.loss.distils, *(["contrastive"] if self.loss.contrastive else [])}
        for term, tower, other in (("image_affinity", "image", "text"), ("text_affinity", "text", "image")):
            if terms == {term} and self.towers != tower:
                raise ValueError(
                    f"loss: {term} alone does not train the {other} tower; add a term or set `towers: {tower}`"
                )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Stage:
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(f"optimizer.warmup_steps {self.optimizer.warmup_steps} must be below steps {self.steps}")
        for name in ("auto", "calibrated"):
            if (self.inherit == name) != (getattr(self, name) is not None):
                raise ValueError(f"`inherit: {name}` and a section `{name}` need each other")
        if self.target is not None:
            self._shape_is_found(self.target)
        if self.towers != "both":
            other = "text" if self.towers == "image" else "vision"
            default = StudentShape()
            for key in (other, "embed_dim", "activation"):
                if getattr(self.student, key) != getattr(default, key):
                    raise ValueError(f"towers: {self.towers} leaves the other tower as it is; leave student.{key} out")
        return self

    @property
    def target(self) -> Target | None:
        """What masks are to remove, where the shape is not given."""
        return self.auto or self.calibrated

    def _shape_is_found(self, target: Target) -> None:
        if self.student != StudentShape():
            raise ValueError(f"inherit: {self.inherit} finds the student's shape; leave `student` out")
        if isinstance(target.target_sparsity, TowerSparsity) and self.towers != "both":
            raise ValueError(f"{self.inherit}.target_sparsity: one number, since towers is {self.towers}")
        if self.auto is not None:
            if self.auto.steps >= self.steps:
                raise ValueError(
                    f"auto.steps {self.auto.steps} must be below steps {self.steps}, to train on after the cut"
                )
            if self.optimizer.warmup_steps:
                raise ValueError(
                    "optimizer.warmup_steps: the learning rate rises while masks are learned; leave it out"
                )


class Evaluation(Strict):
    """Data never trained on."""

    data: Place = Field(description="class folders, or shards with `class` or `captions`")
    templates: Place | None = Field(None, description="file of prompt templates, one a line, {c} for the class")
    every: Positive | None = Field(None, description="steps between evaluations; always at a stage's end")


class StoredTeachers(Strict):
    """Teachers whose features `tinyclip cache` has stored; of several the affinities are averaged."""

    cache: Place | Annotated[tuple[Place, ...], Field(min_length=1)] = Field(
        description="folder that `tinyclip cache` has made, or a list of several teachers' for the same views"
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
        None, description="a whole config, or a model name: what `plan` and `--smoke` take while the teacher is absent"
    )
    model: Shape = Field(None, description="without a teacher: a whole config, or a model name")
    vocabulary: Literal["clip", "data"] = Field("clip", description="without a teacher: CLIP's, or tokens of the data")
    data: Place = Field(description="folder of training shards")
    output: Place = Field(description="folder of the run, made by it")
    evaluation: Evaluation | None = Field(None, description="data to judge students by")
    stages: list[Stage] = Field(min_length=1, description="one after the other")
    seed: Count = Field(0, description="of weights, order of the data, and views")
    workers: Count = Field(1, description="processes that decode images")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: CUDA, else MPS, else the CPU")
    precision: Literal["auto"] | Precision = Field(
        "auto", description="bfloat16, float16 or float32; auto: the fastest that the device computes in"
    )
    tracking: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        (), description="one or several of tensorboard, trackio, wandb; metrics.jsonl is written in any case"
    )
    project: str = Field("tinyclip", min_length=1, description="project of trackio and wandb that the run belongs to")
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    save_every: Positive = Field(100, description="steps between checkpoints in a stage")
    save_minutes: float | None = Field(
        None, gt=0, description="minutes between checkpoints in a stage, where these come first"
    )
    stall_minutes: float | None = Field(
        60.0, gt=0, description="minutes without a step, after which the run ends and says where it hangs; null: never"
    )
    keep: Positive = Field(2, description="checkpoints of a stage in progress that are kept, the newest included")
    save_dtype: Literal["float32", "float16"] = Field("float32", description="of `student`; stages keep float32")

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
            raise ValueError("two stages have one name")
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
        """Folders of the teachers' stored features; empty with a live teacher, or none."""
        return self.teacher.folders if isinstance(self.teacher, StoredTeachers) else ()


def _check_stored(i: int, stage: Stage, teachers: int) -> None:
    """A cache has the teacher's features, not its weights; several teachers have no feature space in common."""
    if stage.inherit != "none" and (stage.start == "teacher" or (stage.start == "previous" and i == 0)):
        raise ValueError(
            f"stages.{i}.start: name the checkpoint to inherit from, since a cache has the teacher's features and not "
            "its weights"
        )
    if stage.towers != "both":
        raise ValueError(f"stages.{i}.towers: the other tower would be the teacher's, of which a cache has no weights")
    for name in ("feature", "interactive"):
        if teachers > 1 and getattr(stage.loss, name) > 0:
            raise ValueError(f"stages.{i}.loss.{name}: needs one teacher, as {teachers} have no common feature space")


def _check_rise(i: int, stage: Stage, before: Stage | None) -> None:
    """Sparsity counts from the original teacher, so it must rise from stage to stage. A shape cannot be given relative
    to one that is yet to be found."""
    if before is None or stage.start != "previous" or before.target is None:
        return
    if stage.inherit == "manual" and stage.student != StudentShape():
        raise ValueError(
            f"stages.{i}.student: the stage before finds its shape, so that of this one cannot be given; "
            "take `inherit: auto` or `calibrated`, or `start` from the result in a recipe of its own"
        )
    if stage.target is None:
        return
    now, then = stage.target.target_sparsity, before.target.target_sparsity
    comparable = stage.towers == before.towers and stage.target.counted == before.target.counted
    if comparable and isinstance(now, float) and isinstance(then, float) and now <= then:
        raise ValueError(
            f"stages.{i}.{stage.inherit}.target_sparsity: {now} must exceed the {then} of the stage before, since both "
            "count from the original teacher"
        )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `key.path=value`, values as in YAML (`stages.0.steps=200`).

    Raises:
        ValueError: when the file is missing or no YAML, or a key or value does not fit, with the key's path.
    """
    try:
        data = read_yaml(Path(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such recipe") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys, see docs/recipes.md")
    data = json.loads(json.dumps(data, default=str))  # so that what YAML aliases share can be set apart
    for text in overrides:
        override(data, text)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None


def recipe_of(run: Path) -> Recipe:
    """The recipe that a run has written into its folder; `ValueError` when it is damaged, or there is none."""
    path = run / "recipe.yaml"
    try:
        return load_recipe(path)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: missing or damaged, so {run} cannot be read as a run ({reason})") from None


def shape_from(overrides: Sequence[str]) -> StudentShape:
    """A shape from `vision.width=128` and the like; `ValueError` for an unknown key or value."""
    return model_from(StudentShape, "--shape", overrides, "vision.width=128")


def augment_from(overrides: Sequence[str]) -> Augment:
    """Views from `rotate=20` and the like; `ValueError` for an unknown key or value."""
    return model_from(Augment, "--augment", overrides, "rotate=20")


def calibrated_from(settings: dict[str, Any]) -> Calibrated:
    """Settings of calibrated inheritance given on the command line; `ValueError` for a bad value."""
    try:
        return Calibrated.model_validate(settings)
    except ValidationError as error:
        raise ValueError(f"--calibrate: {explain(error)}") from None
