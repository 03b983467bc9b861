"""A stage of a recipe as data, with its sections: inheritance, losses, optimiser."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from tinyclip.common.schema import Count, Positive, Strict
from tinyclip.inputs.augment import Augment
from tinyclip.recipe.student_shape import StudentShape


def _not_empty(value: str) -> str:
    """Refuse an empty path, which would mean the current folder."""
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
        None, description="instead of target_sparsity: milliseconds per pair on the run's device, batch of 32"
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
        """The unit of sparsity; a latency target is met through MACs."""
        return self.unit if self.latency_ms is None else "macs"


# A step of Adam changes a log_alpha by about the learning rate. From the clamp at 4.6 to the value where elements are
# removed on average, -1.6, it has to go this far.
MASK_TRAVEL = 6.0


class Auto(Target):
    """Masks learned while distilling (TinyCLIP's automatic inheritance), then cut."""

    steps: Positive = Field(description="optimizer steps with masks, at the start of the stage")
    ramp_steps: Positive | None = Field(
        None, description="steps over which the target rises from the stage's start; default: 1000, at most `steps`"
    )
    lr: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="learning rate of masks and multipliers; default: 0.02, or 6 / `steps` if that is more"
    )
    importance_batches: Positive | None = Field(
        None, description="start the masks in the order of importance, measured on this many batches; default: equal"
    )

    @model_validator(mode="after")
    def _ramp_fits(self) -> Auto:
        if self.ramp_steps is not None and self.ramp_steps > self.steps:
            raise ValueError(
                f"ramp_steps {self.ramp_steps} exceeds steps {self.steps}: the target would not be reached"
            )
        return self

    @property
    def mask_lr(self) -> float:
        """The learning rate: the released recipes' 0.02, or in a shorter mask phase one that gets as far."""
        return self.lr or min(1.0, max(0.02, MASK_TRAVEL / self.steps))

    @property
    def too_slow(self) -> str | None:
        """A note for the user if the masks cannot get to their target in time."""
        if (share := self.mask_lr * self.steps / MASK_TRAVEL) >= 0.99:
            return None
        return (
            f"{self.steps} steps at auto.lr {self.mask_lr:g} move the masks only {100 * share:.0f} % of the way, so "
            "the cut decides for them; use more auto.steps, or leave auto.lr out"
        )


class Calibrated(Target):
    """Masks of 0 and 1 from the importance of heads, neurons and channels, measured on the training data."""

    score: Literal["taylor", "activation", "magnitude"] = Field(
        "taylor",
        description="change of the affinity loss to second order, mean square of activations, or weights alone",
    )
    batches: Positive = Field(200, description="most batches to measure; stops early once more would change nothing")


TERMS = ("affinity", "contrastive", "feature", "interactive", "image_affinity", "text_affinity")
TEACHER_TERMS = tuple(term for term in TERMS if term != "contrastive")


class Loss(Strict):
    """Weights of the loss terms and the scales of the affinity."""

    affinity: float = Field(1.0, ge=0, description="weight of affinity mimicking (needs a teacher)")
    contrastive: float = Field(0.0, ge=0, description="weight of the image-text contrastive loss")
    feature: float = Field(0.0, ge=0, description="weight of feature mimicking, through a learned projection")
    interactive: float = Field(0.0, ge=0, description="weight of the contrastive loss between student and teacher")
    image_affinity: float = Field(0.0, ge=0, description="weight of the image-image affinity")
    text_affinity: float = Field(0.0, ge=0, description="weight of the text-text affinity")
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
        """The terms with a nonzero weight that need a teacher."""
        return [name for name in TEACHER_TERMS if getattr(self, name) > 0]

    @property
    def learns_scale(self) -> bool:
        """Whether a term depends on the student's own scale."""
        return self.contrastive > 0 or (self.student_scale == "learned" and set(self.distils) != {"feature"})


class Optimizer(Strict):
    """AdamW with linear warm-up and cosine decay to 0."""

    lr: float = Field(1e-4, gt=0, le=1, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="decay of the gradient's mean and square")
    eps: float = Field(1e-6, gt=0, description="added to the denominator")
    weight_decay: float = Field(0.2, ge=0, description="on matrices only; not on norms, biases, gains, logit scale")
    warmup_steps: Count = Field(0, description="steps of linear warm-up")
    grad_clip: float = Field(5.0, gt=0, description="largest gradient norm")


class Stage(Strict):
    """One student, trained from the previous stage's student (or the teacher)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="folder of the stage's checkpoint")
    student: StudentShape = Field(StudentShape(), description="shape, relative to what the stage starts from")
    inherit: Literal["manual", "auto", "calibrated", "none"] = Field(
        "manual", description="manual rule, learned masks, measured importance, or none: random weights"
    )
    auto: Auto | None = Field(None, description="with `inherit: auto`")
    calibrated: Calibrated | None = Field(None, description="with `inherit: calibrated`")
    towers: Literal["both", "image", "text"] = Field(
        "both", description="towers to compress and train; the other stays the teacher's"
    )
    start: Place = Field("previous", description="what to inherit from: previous, teacher, or a checkpoint's path")
    steps: Positive = Field(description="optimizer steps")
    batch_size: int = Field(256, ge=2, description="pairs per step")
    micro_batch: Positive | None = Field(
        None, description="pairs per device in memory at once, recomputation keeps gradients exact; default: all"
    )
    grad_checkpointing: bool = Field(False, description="keep only each block's input and recompute the rest")
    compile: bool = Field(False, description="torch.compile of the towers")
    loss: Loss = Field(Loss(), description="terms and scales of the loss")
    optimizer: Optimizer = Field(Optimizer(), description="AdamW and its schedule")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay of an exponential moving average of the weights, e.g. 0.999; the average is evaluated and "
        "becomes the stage's student; default: the last weights",
    )
    augment: Augment = Field(Augment(), description="random views of the images")
    batch_norm: Literal["frozen", "train"] | None = Field(
        None,
        description="for a ResNet: frozen re-estimates the batch-norm statistics before the first step and keeps them, "
        "train uses each batch's; default: frozen, or train with `inherit: none`",
    )
    batch_norm_batches: Positive | None = Field(
        None, description="batches for the re-estimation with `batch_norm: frozen`; default: 20"
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
                    f"{key}: computes parts of the batch twice, so batch norm cannot learn; use `batch_norm: frozen`"
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
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} must be below steps {self.steps}; lower it"
            )
        for name in ("auto", "calibrated"):
            if (self.inherit == name) != (getattr(self, name) is not None):
                raise ValueError(f"`inherit: {name}` and a section `{name}` must be given together")
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
        """How much the masks must remove; None when the shape is given."""
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
