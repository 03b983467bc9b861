"""One optimiser step: features, loss terms, gradient, schedule."""

from __future__ import annotations

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
SMALLEST_LOSS_SCALE = 1.0  # what overflows in float16 even at this one does so by itself
SHOWN = 8  # keys of a batch that an error names
MOST_UNREAD = 1000  # steps whose figures may wait on the device
OTHER = {"image": "text", "text": "image"}  # the tower that a stage leaves alone


@dataclass(frozen=True)
class Unread:
    """What a step found, still on the device."""

    step: int
    keys: list[str]  # of the batch, the first few
    lr: float
    names: tuple[str, ...]
    values: Tensor  # one for each name


@dataclass
class Trainee:
    """A student in a stage, with what its steps need.

    To be made by all processes at once, as they agree on the weights of the first; each has its share of every batch.
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
        self.overflowed = False  # in float16, by the last step, which was left out then
        self._unread: list[Unread] = []
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
        """A scale that the stage sets, or the i-th teacher's."""
        if setting == "teacher":
            assert self.teacher is not None, "the recipe's validation asks for a teacher here"
            return self.teacher.scales[i]
        return float(setting)

    # --- one step -----------------------------------------------------------------------------------------------

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step; returns the loss terms, averaged over the processes, and the gradient norm, which stay on
        the device: nothing here waits for it. Whether they are finite is found when they are read, by `figures` or
        before a save by `check`.

        In float16 alone each step asks the device whether it overflowed. Then it is left out: weights and optimiser
        stay as they are, and the loss scale falls.

        Raises:
            ValueError: when float16 overflows at any scale, or what was left unread long is not finite; in all
                processes.
        """
        if len(self._unread) >= MOST_UNREAD:
            self._read()
        lr, pruner = learning_rate(step, self.stage), self.pruner
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        optimizers: list[torch.optim.Optimizer] = [self.optimizer, *([pruner.optimizer] if pruner else [])]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        # Statistics of batch norm take in what overflows before anybody knows.
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
        return metrics

    def figures(self, step: int) -> dict[str, Any]:
        """Of the last step: what `step` returned as numbers, the learning rate, and how the learned masks stand. All
        come in one transfer from the device, with what earlier steps left there.

        Raises:
            ValueError: when the loss or the gradient of any of these steps is not finite, in all processes.
        """
        last = self._unread[-1]
        row, masks = self._read()
        figures: dict[str, Any] = dict(zip(last.names, row, strict=True)) | {"lr": last.lr}
        return figures | (self.pruner.figures(step, masks) if self.pruner else {})

    def check(self) -> None:
        """`ValueError` when a loss, a gradient or a weight is not finite, before it is saved over a good checkpoint."""
        last = self._unread[-1] if self._unread else None
        self._read()
        state = [*self.model.state_dict().values(), *self.projections.parameters()]
        state += self.pruner.parameters() if self.pruner else []
        if not torch.stack([value.detach().isfinite().all() for value in state]).all():
            raise ValueError(self._broken("a weight", "not finite", last))

    def _read(self) -> tuple[list[float], Tensor | None]:
        """The figures of the last unread step and the values of the masks; nothing is unread then."""
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
        """What was found is the same in all processes, so that all of them raise or none."""
        place = f" at step {at.step + 1}; samples {', '.join(at.keys)}, ..." if at else ""
        return (
            f"{what} of stage {self.stage.name} is {how}{place}; a checkpoint from before it is kept, if there is one. "
            "A lower optimizer.lr or float32 may help."
        )

    def backward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Add the gradient of the loss, times the scaler's scale, to every `.grad`; returns the weighted sum of the
        terms as `loss` and each of them, without gradient.

        The loss sees the features of the whole batch as leaves. With micro-batches they come from passes without
        graph, and what the loss says of them goes back through each pass once it is replayed, with the random state it
        had (GradCache, Gao et al., RepL4NLP 2021). The gradient is that of the whole batch, in any number of pieces.
        """
        size = self.stage.micro_batch or len(batch.tokens)
        pieces = [slice(start, start + size) for start in range(0, len(batch.tokens), size)]
        replay = len(pieces) > 1
        outputs: list[dict[str, Tensor]] = []
        theirs: list[list[Features]] = []  # by pieces and teachers
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
        """What each teacher says of a piece, where the stage needs it."""
        if self.teacher is None or not (self.stage.loss.distils or self.stage.towers != "both"):
            return []
        with torch.autocast(self.device.type, getattr(torch, self.precision), enabled=self.precision != "float32"):
            theirs = self.teacher.features_of(batch, piece, images)
        return [(image.clone(), text.clone()) for image, text in theirs]  # no inference tensors any more

    # --- the loss -----------------------------------------------------------------------------------------------

    def _terms(self, ours: dict[str, Tensor], theirs: list[Features], batch: Batch) -> dict[str, Tensor]:
        """Each term that has a weight, of this process's pairs, and the weighted sum as `loss`; see `Student.forward`
        for `ours`."""
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
        """The cross-entropy of the affinities is linear in its target, so its mean over teachers is that against the
        mean of their softmax targets."""
        each = [self._terms_of(i, ours, features, groups) for i, features in enumerate(theirs)]
        return {name: torch.stack([terms[name] for terms in each]).mean(0) for name in each[0]}

    def _terms_of(self, i: int, ours: dict[str, Tensor], theirs: Features, groups: Tensor | None) -> dict[str, Tensor]:
        """The terms of one teacher."""
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
    """Rows of all pieces, or a scalar that each piece has; without graph."""
    return (parts[0] if parts[0].ndim == 0 else torch.cat(parts)).detach()


def _joined(parts: list[list[Features]]) -> list[Features]:
    """Each teacher's features of all pieces."""
    return [(torch.cat([i for i, _ in one]), torch.cat([t for _, t in one])) for one in zip(*parts, strict=True)]


def _backward_through(outputs: dict[str, Tensor], leaves: dict[str, Tensor], piece: slice, last: bool) -> None:
    """Continue the gradients at the leaves into what they were computed from. A scalar's counts once, but every piece
    hands on one, as DistributedDataParallel waits for all parameters."""
    tensors, gradients = [], []
    for name, output in outputs.items():
        gradient = leaves[name].grad
        if gradient is not None and output.requires_grad:
            rows = gradient[piece] if gradient.ndim else gradient if last else torch.zeros_like(gradient)
            tensors.append(output)
            gradients.append(rows)
    torch.autograd.backward(tensors, gradients)
    outputs.clear()  # and the graph with them


def random_state(device: torch.device) -> list[Tensor]:
    """Of the generators that a forward pass may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def random_state_of(device: torch.device, states: list[Tensor]) -> Iterator[None]:
    """Draw again what was drawn after `random_state`."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, device)
        yield


def make_optimizer(parameters: Iterable[nn.Parameter], stage: Stage) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    settings = stage.optimizer
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def learning_rate(step: int, stage: Stage) -> float:
    """Linear warm-up (while masks are learned, if they are), then cosine to 0; `step` counts from 0."""
    settings = stage.optimizer
    warmup_steps = stage.auto.steps if stage.auto else settings.warmup_steps
    if step < warmup_steps:
        return settings.lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, stage.steps - warmup_steps)
    return settings.lr * (1 + math.cos(math.pi * done)) / 2
