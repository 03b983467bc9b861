"""One optimiser step: features, loss terms, gradient, schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyclip.batch_norm import freeze
from tinyclip.data import Batch
from tinyclip.loss import affinity_loss, contrastive_loss, feature_loss, interactive_loss, within_affinity_loss
from tinyclip.masks import Masks
from tinyclip.model import CLIP
from tinyclip.pruning import Pruner
from tinyclip.recipe import Stage
from tinyclip.teacher import CachedTeacher, Features, Teacher, image_input, shorten
from tinyclip.tokenizer import CLIPTokenizer
from tinyclip.transforms import Preprocess

LARGEST_LOGIT_SCALE = math.log(100)  # OpenAI's CLIP clamps a learned scale at 100


@dataclass
class Trainee:
    """A student in a stage, with what its steps need."""

    model: CLIP
    stage: Stage
    teacher: Teacher | CachedTeacher | None
    tokenizer: CLIPTokenizer
    preprocess: Preprocess
    precision: str
    pruner: Pruner | None = None

    def __post_init__(self) -> None:
        self.device = self.model.logit_scale.device
        freeze_other_tower(self.model, self.stage.towers)
        self.projections = make_projections(self.model, self.teacher, self.stage).to(self.device)
        self.optimizer = make_optimizer(self.trained, self.stage)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")
        self._fix_logit_scale()

    @property
    def trained(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.projections.parameters()]

    def train(self) -> None:
        """Training mode, but for batch norm whose statistics the stage keeps."""
        self.model.train()
        if self.stage.freezes_batch_norm:
            freeze(self.model)

    def _fix_logit_scale(self) -> None:
        """Where the scale is not learned, the saved model carries the one it was trained at."""
        loss = self.stage.loss
        if loss.contrastive == 0 and loss.student_scale != "learned":
            with torch.no_grad():
                self.model.logit_scale.copy_(torch.as_tensor(self._scale(loss.student_scale)).log())

    def _scale(self, setting: str | float, i: int = 0) -> Tensor | float:
        if setting == "learned":
            return self.model.logit_scale.exp()
        if setting == "teacher":
            assert self.teacher is not None, "the recipe's validation asks for a teacher here"
            return self.teacher.scales[i]
        return float(setting)

    def loss_terms(self, batch: Batch, masks: Masks | None = None) -> dict[str, Tensor]:
        """The weighted sum as `loss`, and each term that has a weight. Only the towers run in lower precision."""
        settings = self.stage.loss
        image, text, theirs = self._features(batch, masks)
        terms: dict[str, Tensor] = {}
        if theirs:
            terms |= self._teacher_terms(image, text, theirs, self._groups(batch))
        if settings.contrastive:
            terms["contrastive"] = contrastive_loss(image, text, self.model.logit_scale.exp(), self._groups(batch))
        loss = torch.stack([getattr(settings, name) * term for name, term in terms.items()]).sum()
        return terms | {"loss": loss}

    def _groups(self, batch: Batch) -> Tensor | None:
        return batch.groups.to(self.device) if self.stage.loss.positives == "class" else None

    def _teacher_terms(
        self, image: Tensor, text: Tensor, teachers: list[Features], groups: Tensor | None
    ) -> dict[str, Tensor]:
        """The cross-entropy of the affinities is linear in its target, so its mean over teachers is that against the
        mean of their softmax targets."""
        each = [self._terms_of(i, image, text, theirs, groups) for i, theirs in enumerate(teachers)]
        return {name: torch.stack([terms[name] for terms in each]).mean(0) for name in each[0]}

    def _terms_of(
        self, i: int, image: Tensor, text: Tensor, theirs: Features, groups: Tensor | None
    ) -> dict[str, Tensor]:
        """The terms of one teacher."""
        settings = self.stage.loss
        scales = self._scale(settings.student_scale), self._scale(settings.teacher_scale, i)
        wanted, terms = settings.distils, {}
        if "affinity" in wanted:
            terms["affinity"] = affinity_loss(image, text, *theirs, *scales)
        if self.projections:
            projected = self.projections["image"](image), self.projections["text"](text)
            if "feature" in wanted:
                terms["feature"] = feature_loss(*projected, *theirs)
            if "interactive" in wanted:
                unit = F.normalize(projected[0], dim=-1), F.normalize(projected[1], dim=-1)
                terms["interactive"] = interactive_loss(*unit, *theirs, scales[0], groups)
        for name, mine, other in (("image_affinity", image, theirs[0]), ("text_affinity", text, theirs[1])):
            if name in wanted:
                terms[name] = within_affinity_loss(mine, other, *scales)
        return terms

    def _features(self, batch: Batch, masks: Masks | None) -> tuple[Tensor, Tensor, list[Features]]:
        """Normalised image_features and text_features in float32, and each teacher's where they are needed."""
        images = batch.images.to(self.device, non_blocking=True)
        context, end_id = self.model.config.text.context_length, self.tokenizer.end_id
        towers, settings = self.stage.towers, self.stage.loss
        theirs: list[Features] = []
        with torch.autocast(self.device.type, getattr(torch, self.precision), enabled=self.precision != "float32"):
            if self.teacher is not None and (settings.distils or towers != "both"):
                theirs = self.teacher.features_of(batch, slice(None), images, end_id)
            # A tower that is left alone is the teacher's, so its features are at hand.
            if towers == "text" and theirs:
                image_features = theirs[0][0]
            else:
                image_features = self.model.encode_image(image_input(images, self.preprocess), masks, normalize=True)
            if towers == "image" and theirs:
                text_features = theirs[0][1]
            else:
                tokens = shorten(batch.tokens, end_id, context).to(self.device)
                text_features = self.model.encode_text(tokens, masks, normalize=True)
        return image_features.float(), text_features.float(), theirs

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step; returns the loss terms, the gradient norm and the learning rate.

        Raises:
            ValueError: when the loss or the gradient is not finite; the weights are then those before the step.
        """
        lr, pruner = learning_rate(step, self.stage), self.pruner
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        optimizers = [self.optimizer]
        parameters = self.trained
        terms = self.loss_terms(batch, pruner.sample(step) if pruner else None)
        if pruner is not None:
            optimizers.append(pruner.optimizer)
            parameters += pruner.parameters()
            terms["constraint"] = pruner.constraint(pruner.hard, step).to(self.device)
            terms["loss"] = terms["loss"] + terms["constraint"]
        self._check("loss", terms["loss"], batch, step)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(terms["loss"]).backward()
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.stage.optimizer.grad_clip)
        if not self.scaler.is_enabled():  # the scaler skips such steps and lowers its scale
            self._check("gradient", norm, batch, step)
        if torch.isfinite(norm):  # else none may step: what overflowed in one has spread to all through the norm
            for optimizer in optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        with torch.no_grad():
            if self.model.logit_scale.grad is not None:  # it is learned
                self.model.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
            if pruner is not None:
                pruner.hard.clamp_()
        return {name: term.detach() for name, term in terms.items()} | {"grad_norm": norm, "lr": torch.tensor(lr)}

    def _check(self, what: str, value: Tensor, batch: Batch, step: int) -> None:
        if not torch.isfinite(value):
            keys = ", ".join(batch.keys[:8])
            raise ValueError(
                f"the {what} of stage {self.stage.name} is {value.item()} at step {step + 1}; samples {keys}, ...; "
                "the last good checkpoint is kept. A lower optimizer.lr or precision float32 may help."
            )


def make_projections(student: CLIP, teacher: Teacher | CachedTeacher | None, stage: Stage) -> nn.ModuleDict:
    """Learned maps from the student's embedding to the teacher's, for the terms that need them; they start as the
    inherited one, the first dims. Not part of the student."""
    projections = nn.ModuleDict()
    if teacher is not None and {"feature", "interactive"} & set(stage.loss.distils):
        for name in ("image", "text"):
            projection = nn.Linear(student.config.embed_dim, teacher.config.embed_dim, bias=False)
            nn.init.eye_(projection.weight)
            projections[name] = projection
    return projections


def make_optimizer(parameters: Iterable[nn.Parameter], stage: Stage) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    settings = stage.optimizer
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def freeze_other_tower(model: CLIP, towers: str) -> None:
    """With `towers: image` the text tower gets no gradients, and the other way round."""
    for key, parameter in model.named_parameters():
        tower = "image" if key.startswith("visual.") else "text"
        parameter.requires_grad_(towers in ("both", tower) or key == "logit_scale")


def learning_rate(step: int, stage: Stage) -> float:
    """Linear warm-up (while masks are learned, if they are), then cosine to 0; `step` counts from 0."""
    settings = stage.optimizer
    warmup_steps = stage.auto.steps if stage.auto else settings.warmup_steps
    if step < warmup_steps:
        return settings.lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, stage.steps - warmup_steps)
    return settings.lr * (1 + math.cos(math.pi * done)) / 2
