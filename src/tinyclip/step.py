"""One optimiser step: features, loss terms, gradient, schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyclip.batch_norm import freeze
from tinyclip.data import Batch
from tinyclip.loss import affinity_loss, contrastive_loss
from tinyclip.model import CLIP
from tinyclip.recipe import Stage
from tinyclip.teacher import Teacher, image_input, shorten
from tinyclip.tokenizer import CLIPTokenizer
from tinyclip.transforms import Preprocess

LARGEST_LOGIT_SCALE = math.log(100)  # OpenAI's CLIP clamps a learned scale at 100


@dataclass
class Trainee:
    """A student in a stage, with what its steps need."""

    model: CLIP
    stage: Stage
    teacher: Teacher | None
    tokenizer: CLIPTokenizer
    preprocess: Preprocess
    precision: str

    def __post_init__(self) -> None:
        self.device = self.model.logit_scale.device
        self.optimizer = make_optimizer(self.model, self.stage)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")
        self._fix_logit_scale()

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

    def _scale(self, setting: str | float) -> Tensor | float:
        if setting == "learned":
            return self.model.logit_scale.exp()
        if setting == "teacher":
            assert self.teacher is not None, "the recipe's validation asks for a teacher here"
            return self.teacher.scale
        return float(setting)

    def loss_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted sum as `loss`, and each term that has a weight. Only the towers run in lower precision."""
        images = batch.images.to(self.device, non_blocking=True)
        context, end_id = self.model.config.text.context_length, self.tokenizer.end_id
        tokens = shorten(batch.tokens, end_id, context).to(self.device)
        settings, teacher_features = self.stage.loss, None
        dtype = getattr(torch, self.precision)
        with torch.autocast(self.device.type, dtype, enabled=self.precision != "float32"):
            image_features = self.model.encode_image(image_input(images, self.preprocess), normalize=True)
            text_features = self.model.encode_text(tokens, normalize=True)
            if settings.affinity:
                assert self.teacher is not None, "the recipe's validation asks for a teacher here"
                teacher_features = self.teacher.features(images, batch.tokens, end_id)
        image_features, text_features = image_features.float(), text_features.float()
        terms: dict[str, Tensor] = {}
        if teacher_features is not None:
            scales = self._scale(settings.student_scale), self._scale(settings.teacher_scale)
            terms["affinity"] = affinity_loss(image_features, text_features, *teacher_features, *scales)
        if settings.contrastive:
            groups = batch.groups.to(self.device) if settings.positives == "class" else None
            scale = self.model.logit_scale.exp()
            terms["contrastive"] = contrastive_loss(image_features, text_features, scale, groups)
        loss = torch.stack([getattr(settings, name) * term for name, term in terms.items()]).sum()
        return terms | {"loss": loss}

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step; returns the loss terms, the gradient norm and the learning rate.

        Raises:
            ValueError: when the loss or the gradient is not finite; the weights are then those before the step.
        """
        lr = learning_rate(step, self.stage)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        terms = self.loss_terms(batch)
        self._check("loss", terms["loss"], batch, step)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(terms["loss"]).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.stage.optimizer.grad_clip)
        if not self.scaler.is_enabled():  # the scaler skips such steps and lowers its scale
            self._check("gradient", norm, batch, step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
        return {name: term.detach() for name, term in terms.items()} | {"grad_norm": norm, "lr": torch.tensor(lr)}

    def _check(self, what: str, value: Tensor, batch: Batch, step: int) -> None:
        if not torch.isfinite(value):
            keys = ", ".join(batch.keys[:8])
            raise ValueError(
                f"the {what} of stage {self.stage.name} is {value.item()} at step {step + 1}; samples {keys}, ...; "
                "the last good checkpoint is kept. A lower optimizer.lr or precision float32 may help."
            )


def make_optimizer(student: CLIP, stage: Stage) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    settings = stage.optimizer
    parameters = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def learning_rate(step: int, stage: Stage) -> float:
    """Linear warm-up, then cosine to 0; `step` counts from 0."""
    settings = stage.optimizer
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, stage.steps - settings.warmup_steps)
    return settings.lr * (1 + math.cos(math.pi * done)) / 2
