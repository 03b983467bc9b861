"""One optimizer step: features, loss terms, gradient, schedule."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinyclip.common.distributed import average, world_size
from tinyclip.compress.batch_norm import freeze
from tinyclip.data.loader import Batch
from tinyclip.inputs.tokenizer import CLIPTokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.loss import affinity_loss, contrastive_loss, feature_loss, interactive_loss, within_affinity_loss
from tinyclip.model.model import CLIP
from tinyclip.recipe.stage import Stage
from tinyclip.teachers.teacher import AnyTeacher, Features
from tinyclip.train.pruner import Pruner
from tinyclip.train.student import Student, make_projections, set_trained

LARGEST_LOGIT_SCALE = math.log(100)  # OpenAI's CLIP clamps a learned scale at 100
SMALLEST_LOSS_SCALE = 1.0  # float16 overflow at this scale is not caused by loss scaling
SHOWN = 8  # maximum number of a batch's keys to name in an error
MOST_UNREAD = 1000  # maximum number of steps whose figures may stay on the device
OTHER = {"image": "text", "text": "image"}  # the tower a stage does not train, by the one it trains


@dataclass(frozen=True)
class Unread:
    """The figures of a step, still on the device."""

    step: int
    keys: list[str]  # the first few keys of the batch
    lr: float
    names: tuple[str, ...]
    values: Tensor  # one per name


@dataclass
class Trainee:
    """A student and everything its training steps in one stage need.

    All processes must create it together, since they synchronise to the first process's weights. Each process gets
    its share of every batch.
    """

    model: CLIP
    stage: Stage
    teacher: AnyTeacher | None
    tokenizer: CLIPTokenizer
    preprocess: Preprocess
    precision: str
    pruner: Pruner | None = None

    def __post_init__(self) -> None:
        self.device, stage = self.model.logit_scale.device, self.stage
        set_trained(self.model, stage)
        self.model.set_grad_checkpointing(stage.grad_checkpointing)
        self.projections = make_projections(self.model, self.teacher, stage).to(self.model.logit_scale)
        end_id = self.tokenizer.end_id
        self.student = Student(
            self.model, self.projections, self.pruner, stage, self.preprocess, end_id, self.precision
        )
        self.parallel: DistributedDataParallel | None = None
        if world_size() > 1:
            self.parallel = DistributedDataParallel(self.student, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(self.trained, stage)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")
        self.overflowed = False  # whether the last step overflowed in float16 and was skipped
        self._unread: list[Unread] = []
        self._fix_logit_scale()
        # While masks are learned, the weights change their meaning with them; the average starts at the cut.
        averages = stage.ema is not None and self.pruner is None
        self.average = copy.deepcopy(self.model).requires_grad_(False) if averages else None

    @property
    def trained(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.projections.parameters()]

    @property
    def result(self) -> CLIP:
        """The model to evaluate and to keep: the average, if there is one."""
        return self.model if self.average is None else self.average

    def train(self) -> None:
        """Switch to training mode, except batch norm if the stage keeps its statistics."""
        self.model.train()
        if self.stage.freezes_batch_norm:
            freeze(self.model)

    def _fix_logit_scale(self) -> None:
        """If the stage does not learn the scale, store the one it trains with in the model."""
        loss = self.stage.loss
        if loss.contrastive == 0 and loss.student_scale != "learned":
            with torch.no_grad():
                self.model.logit_scale.copy_(torch.as_tensor(self._scale(loss.student_scale)).log())

    def _scale(self, setting: str | float, i: int = 0) -> Tensor | float:
        """Return the scale that the stage sets, or that of the i-th teacher."""
        if setting == "teacher":
            assert self.teacher is not None, "the recipe's validation asks for a teacher here"
            return self.teacher.scales[i]
        return float(setting)

    # --- one step -----------------------------------------------------------------------------------------------

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Take one optimizer step; return the loss terms, averaged over the processes, and the gradient norm. The
        values stay on the device, and nothing here waits for it. Reading them (`figures`, or `check` before a save)
        checks that they are finite.

        Only float16 synchronises at every step, to see whether it overflowed. If so, the step is skipped: weights and
        optimizer are unchanged, and the loss scale is lowered.

        Raises:
            ValueError: if float16 overflows even at the smallest loss scale, or figures that were unread for too long
                are not finite; raised in all processes.
        """
        if len(self._unread) >= MOST_UNREAD:
            self._read()
        lr, pruner = learning_rate(step, self.stage), self.pruner
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        optimizers: list[torch.optim.Optimizer] = [self.optimizer, *([pruner.optimizer] if pruner else [])]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        # Batch-norm statistics are updated before an overflow is detected.
        statistics = [(b, b.clone()) for b in self.model.buffers()] if self.scaler.is_enabled() else []
        terms = self.backward(batch, step)
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        parameters = self.trained + (pruner.parameters() if pruner else [])
        norm = nn.utils.clip_grad_norm_(parameters, self.stage.optimizer.grad_clip)
        metrics = terms | {"grad_norm": norm}
        unread = Unread(step, batch.keys[:SHOWN], lr, tuple(metrics), torch.stack(list(metrics.values())))
        self.overflowed = self.scaler.is_enabled() and not bool(unread.values.isfinite().all())
        if self.overflowed:
            for buffer, before in statistics:
                buffer.copy_(before)
            self._lower_loss_scale(unread)
            return metrics
        self._unread.append(unread)
        for optimizer in optimizers:
            optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        with torch.no_grad():
            if self.stage.loss.learns_scale:
                self.model.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
            if pruner is not None:
                pruner.hard.clamp_()
        self._update_average(step)
        return metrics

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        """Move the average towards the weights; early on by more, so that it does not stay at the first weights (as in
        TensorFlow's `ExponentialMovingAverage`). At the stage's last step the average becomes the model."""
        if self.average is None:
            return
        assert self.stage.ema is not None
        decay = min(self.stage.ema, (1 + step) / (10 + step))
        for mine, theirs in zip(state_tensors(self.average), state_tensors(self.model), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 1 - decay)
            else:
                mine.copy_(theirs)
        if step + 1 == self.stage.steps:
            for mine, theirs in zip(state_tensors(self.average), state_tensors(self.model), strict=True):
                theirs.copy_(mine)

    def figures(self, step: int) -> dict[str, Any]:
        """Return the last step's results as numbers, its learning rate, and the figures of the learned masks.
        Everything comes in one transfer from the device, together with the unread figures of earlier steps.

        Raises:
            ValueError: if the loss or gradient of any of these steps is not finite; raised in all processes.
        """
        last = self._unread[-1]
        row, masks = self._read()
        figures: dict[str, Any] = dict(zip(last.names, row, strict=True)) | {"lr": last.lr}
        return figures | (self.pruner.figures(step, masks) if self.pruner else {})

    def check(self) -> None:
        """Raise `ValueError` if a loss, gradient or weight is not finite, before it is saved over a good checkpoint."""
        last = self._unread[-1] if self._unread else None
        self._read()
        state = [*self.model.state_dict().values(), *self.projections.parameters()]
        state += self.pruner.parameters() if self.pruner else []
        if not torch.stack([value.detach().isfinite().all() for value in state]).all():
            raise ValueError(self._broken("a weight", "not finite", last))

    def _read(self) -> tuple[list[float], Tensor | None]:
        """Read all pending figures; return those of the last step, and the mask values."""
        unread, self._unread = self._unread, []
        if not unread:
            return [], None
        parts = [torch.stack([one.values for one in unread]).flatten()]
        read = torch.cat([*parts, *([self.pruner.values()] if self.pruner else [])]).cpu()
        rows = read[: parts[0].numel()].view(len(unread), -1)
        for one, row in zip(unread, rows.tolist(), strict=True):
            for name, what in (("loss", "the loss"), ("grad_norm", "the gradient")):
                if not math.isfinite(value := row[one.names.index(name)]):
                    raise ValueError(self._broken(what, f"{value}", one))
        return rows[-1].tolist(), read[parts[0].numel() :]

    def _lower_loss_scale(self, unread: Unread) -> None:
        scale = self.scaler.get_scale()
        lower = scale * self.scaler.get_backoff_factor()
        if lower < SMALLEST_LOSS_SCALE:
            found = dict(zip(unread.names, unread.values.tolist(), strict=True))
            text = f"too large for float16 in many batches in a row (loss {found['loss']}, loss scale {scale:g})"
            raise ValueError(self._broken("the gradient", text, unread))
        self.scaler.update(lower)

    def _broken(self, what: str, how: str, at: Unread | None) -> str:
        """Return the error message. All processes see the same values, so either all of them raise or none does."""
        place = f" at step {at.step + 1}; samples {', '.join(at.keys)}, ..." if at else ""
        return (
            f"{what} of stage {self.stage.name} is {how}{place}; a checkpoint from before it is kept, if there is one. "
            "A lower optimizer.lr or float32 may help."
        )

    def backward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Add the gradient of the loss, times the scaler's scale, to every `.grad`; return each term and their weighted
        sum as `loss`, detached.

        The loss takes the features of the whole batch as leaves. With micro-batches the features come from forward
        passes without a graph; each pass is then replayed with its original random state, and the gradient at the
        leaves is propagated through it (GradCache, Gao et al., RepL4NLP 2021). The gradient equals that of the whole
        batch for any number of pieces.
        """
        size = self.stage.micro_batch or len(batch.tokens)
        pieces = [slice(start, start + size) for start in range(0, len(batch.tokens), size)]
        replay = len(pieces) > 1
        outputs: list[dict[str, Tensor]] = []
        theirs: list[list[Features]] = []  # by piece, then by teacher
        states = []
        for piece in pieces:
            images = batch.images[piece].to(self.device, non_blocking=True)
            theirs.append(self._teacher_features(batch, piece, images))
            states.append(random_state(self.device))
            network = self.student if replay else self.parallel or self.student
            with torch.set_grad_enabled(not replay):
                outputs.append(network(images, batch.tokens[piece], step, *theirs[-1][:1]))
        leaves = {name: _join([output[name] for output in outputs]) for name in outputs[0]}
        for name in leaves.keys() - {OTHER.get(self.stage.towers)}:
            leaves[name].requires_grad_()
        terms = self._terms(leaves, _joined(theirs), batch)
        values = average(torch.stack([value.detach() for value in terms.values()]))
        self.scaler.scale(terms["loss"]).backward()
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            with nullcontext() if last or self.parallel is None else self.parallel.no_sync():
                if replay:
                    images = batch.images[piece].to(self.device, non_blocking=True)
                    with random_state_of(self.device, states[i]):
                        outputs[i] = (self.parallel or self.student)(images, batch.tokens[piece], step, *theirs[i][:1])
                _backward_through(outputs[i], leaves, piece, last)
        return dict(zip(terms, values, strict=True))

    def _teacher_features(self, batch: Batch, piece: slice, images: Tensor) -> list[Features]:
        """Return each teacher's features of a piece, if the stage needs them."""
        if self.teacher is None or not (self.stage.loss.distils or self.stage.towers != "both"):
            return []
        with torch.autocast(self.device.type, getattr(torch, self.precision), enabled=self.precision != "float32"):
            theirs = self.teacher.features_of(batch, piece, images)
        return [(image.clone(), text.clone()) for image, text in theirs]  # clones are no longer inference tensors

    # --- the loss -----------------------------------------------------------------------------------------------

    def _terms(self, ours: dict[str, Tensor], theirs: list[Features], batch: Batch) -> dict[str, Tensor]:
        """Return each term with a nonzero weight, for this process's pairs, and their weighted sum as `loss`; see
        `Student.forward` for `ours`."""
        settings = self.stage.loss
        groups = batch.groups.to(self.device, non_blocking=True) if settings.positives == "class" else None
        terms: dict[str, Tensor] = {}
        if theirs:
            terms |= self._teacher_terms(ours, theirs, groups)
        if settings.contrastive:
            terms["contrastive"] = contrastive_loss(ours["image"], ours["text"], ours["scale"], groups)
        loss = torch.stack([getattr(settings, name) * term for name, term in terms.items()]).sum()
        if "constraint" in ours:
            terms["constraint"] = ours["constraint"]
            loss = loss + ours["constraint"]
        return terms | {"loss": loss}

    def _teacher_terms(
        self, ours: dict[str, Tensor], theirs: list[Features], groups: Tensor | None
    ) -> dict[str, Tensor]:
        """Average the terms over teachers. The affinity's cross-entropy is linear in its target, so its mean over
        teachers equals the cross-entropy against the mean of their softmax targets."""
        each = [self._terms_of(i, ours, features, groups) for i, features in enumerate(theirs)]
        return {name: torch.stack([terms[name] for terms in each]).mean(0) for name in each[0]}

    def _terms_of(self, i: int, ours: dict[str, Tensor], theirs: Features, groups: Tensor | None) -> dict[str, Tensor]:
        """Return the loss terms of one teacher."""
        settings = self.stage.loss
        learned = settings.student_scale == "learned"
        scales = (
            ours.get("scale", 1.0) if learned else self._scale(settings.student_scale),
            self._scale(settings.teacher_scale, i),
        )
        wanted, terms = settings.distils, {}
        if "affinity" in wanted:
            terms["affinity"] = affinity_loss(ours["image"], ours["text"], *theirs, *scales)
        if "feature" in wanted:
            terms["feature"] = feature_loss(ours["projected_image"], ours["projected_text"], *theirs)
        if "interactive" in wanted:
            image, text = (F.normalize(ours[name], dim=-1) for name in ("projected_image", "projected_text"))
            terms["interactive"] = interactive_loss(image, text, *theirs, scales[0], groups)
        for name, mine, other in (("image_affinity", "image", theirs[0]), ("text_affinity", "text", theirs[1])):
            if name in wanted:
                terms[name] = within_affinity_loss(ours[mine], other, *scales)
        return terms


def _join(parts: list[Tensor]) -> Tensor:
    """Concatenate the rows of all pieces, or return the scalar that all pieces share; detached."""
    return (parts[0] if parts[0].ndim == 0 else torch.cat(parts)).detach()


def _joined(parts: list[list[Features]]) -> list[Features]:
    """Concatenate each teacher's features of all pieces."""
    return [(torch.cat([i for i, _ in one]), torch.cat([t for _, t in one])) for one in zip(*parts, strict=True)]


def _backward_through(outputs: dict[str, Tensor], leaves: dict[str, Tensor], piece: slice, last: bool) -> None:
    """Propagate the gradients at the leaves into the outputs they were copied from. A scalar's gradient counts only in
    the last piece; the others pass zeros, because DistributedDataParallel waits for every parameter."""
    tensors, gradients = [], []
    for name, output in outputs.items():
        gradient = leaves[name].grad
        if gradient is not None and output.requires_grad:
            rows = gradient[piece] if gradient.ndim else gradient if last else torch.zeros_like(gradient)
            tensors.append(output)
            gradients.append(rows)
    torch.autograd.backward(tensors, gradients)
    outputs.clear()  # this also frees the graph


def random_state(device: torch.device) -> list[Tensor]:
    """Return the states of the random generators that a forward pass may use."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def random_state_of(device: torch.device, states: list[Tensor]) -> Iterator[None]:
    """Restore the states saved by `random_state` inside the block, so the same numbers are drawn again."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, device)
        yield


def state_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield all parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def make_optimizer(parameters: Iterable[nn.Parameter], stage: Stage) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    settings = stage.optimizer
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def learning_rate(step: int, stage: Stage) -> float:
    """Return the learning rate at `step` (from 0): linear warm-up, which lasts through mask learning in an auto stage,
    then cosine decay to 0."""
    settings = stage.optimizer
    warmup_steps = stage.auto.steps if stage.auto else settings.warmup_steps
    if step < warmup_steps:
        return settings.lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, stage.steps - warmup_steps)
    return settings.lr * (1 + math.cos(math.pi * done)) / 2
