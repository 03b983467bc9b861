"""Losses as pure functions of normalised features.

Computed in tiles: the full rows-by-columns matrix is never held, forward or backward, so memory grows linearly with the
batch. With several processes, each compares its own rows with the columns of all and returns the mean over its rows;
the mean over processes, of values and gradients alike, is the loss of the joint batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinyclip.common.distributed import gather, rank

TILE = 2**23  # elements of a tile: 32 MB in float32

Targets = Callable[[slice], Tensor]  # (rows, n) for a slice of rows, each row summing to 1


def affinity_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> Tensor:
    """Affinity mimicking: the student copies the teacher's image-text similarity distribution.

    Half the cross-entropy image-to-text plus half text-to-image, against the teacher's softmax, averaged
    over rows (TinyCLIP, ICCV 2023, section 3.1). The teacher's side takes no gradient.

    The same holds for a teacher trained with a sigmoid loss (SigLIP, ICCV 2023), which gives each pair its own
    probability p_ij = sigmoid(x_ij) with x_ij = scale * cosine + bias. Given that exactly one text of a row matches,
    text j has a probability proportional to p_ij * prod_{k != j}(1 - p_ik), hence to the odds p_ij / (1 - p_ij) =
    exp(x_ij): the softmax of the row, in which the bias cancels. The shares p_ij / sum_k p_ik are close to that while
    all p are small, but flat where several pairs are near 1, which would hide the best match.

    Args:
        student_image: (n, d) normalised features.
        student_text: (n, d) normalised features.
        teacher_image: (n, d') normalised features; d' may differ from d.
        teacher_text: (n, d') normalised features.
        student_scale: exp(logit_scale) of the student.
        teacher_scale: exp(logit_scale) of the teacher.

    >>> import torch, tinyclip
    >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in "it")
    >>> tinyclip.affinity_loss(image, text, image, text, 50.0, 50.0).shape  # a scalar
    torch.Size([])
    """
    image_to_text = _softmax_targets(teacher_image, teacher_text, teacher_scale)
    text_to_image = _softmax_targets(teacher_text, teacher_image, teacher_scale)
    image = cross_entropy(student_image, student_text, student_scale, image_to_text)
    return (image + cross_entropy(student_text, student_image, student_scale, text_to_image)) / 2


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, scale: Tensor | float, groups: Tensor | None = None
) -> Tensor:
    """CLIP's symmetric contrastive loss.

    Args:
        image_features: (n, d) normalised.
        text_features: (n, d) normalised.
        scale: exp(logit_scale).
        groups: int (n,); pairs of one group are all positives of each other, with equal weight. By default each
            pair is its own group.
    """
    targets = _shares(image_features, groups)
    image = cross_entropy(image_features, text_features, scale, targets)
    return (image + cross_entropy(text_features, image_features, scale, targets)) / 2


def feature_loss(student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    """Feature mimicking: squared distance between the student's features, projected to the teacher's size, and the
    teacher's, summed over both modalities and averaged over pairs (CLIP-KD, CVPR 2024, section 3.2.2).

    Args:
        student_image, student_text: (n, d) after the projection.
        teacher_image, teacher_text: (n, d) normalised.
    """
    image = (student_image - teacher_image).square().sum(1)
    return (image + (student_text - teacher_text).square().sum(1)).mean()


def interactive_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    scale: Tensor | float,
    groups: Tensor | None = None,
) -> Tensor:
    """Interactive contrastive learning: the student's images against the teacher's texts, and its texts against the
    teacher's images (CLIP-KD, CVPR 2024, section 3.2.4).

    Args:
        student_image, student_text: (n, d) projected to the teacher's size and normalised.
        teacher_image, teacher_text: (n, d) normalised.
        scale: exp(logit_scale).
        groups: as in `contrastive_loss`.
    """
    targets = _shares(student_image, groups)
    image = cross_entropy(student_image, teacher_text, scale, targets)
    return (image + cross_entropy(student_text, teacher_image, scale, targets)) / 2


def within_affinity_loss(
    student: Tensor, teacher: Tensor, student_scale: Tensor | float, teacher_scale: Tensor | float
) -> Tensor:
    """Affinity within one modality: the student copies the similarities among the teacher's features of the batch. Each
    row's similarity with itself, which is always 1, is left out.

    Cross-entropy against the teacher's softmax, averaged over rows (the form of `affinity_loss`; the idea is
    similarity-preserving distillation, Tung and Mori, ICCV 2019).

    Args:
        student: (n, d) normalised features.
        teacher: (n, d') normalised features, n at least 2.
    """
    targets = _softmax_targets(teacher, teacher, teacher_scale, without_self=True)
    return cross_entropy(student, student, student_scale, targets, without_self=True)


# --- in tiles ---------------------------------------------------------------------------------------------------


def cross_entropy(
    rows: Tensor, columns: Tensor, scale: Tensor | float, targets: Targets, without_self: bool = False
) -> Tensor:
    """Mean over rows of the cross-entropy of softmax(scale * rows @ columns.T) against soft targets; a scalar.

    Args:
        rows, columns: (n, d) of this process; columns are gathered from all processes, with gradient.
        targets: return the targets of a slice of rows over all columns; they take no gradient.
        without_self: leave out each row's own column.
    """
    columns = gather(columns)
    own = rank() * len(rows) if without_self else None
    factor = scale if isinstance(scale, Tensor) else rows.new_full((), scale)
    factor = factor.to(rows, non_blocking=True)
    loss: Tensor = _CrossEntropy.apply(rows, columns, factor, targets, own)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradients with the loss, tile by tile; backward only multiplies them by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, targets: Targets, own: int | None) -> Tensor:
        loss = rows.new_zeros(())
        inputs = rows, columns, scale
        for_rows, for_columns, for_scale = (
            torch.zeros_like(x) if needed else None for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        )
        for part in _tiles(len(rows), len(columns)):
            similarity = rows[part] @ columns.T
            log_p = (scale * similarity).log_softmax(1) if own is None else _without(similarity * scale, part, own)
            target = targets(part)
            loss -= (target * log_p).sum()
            if not any(ctx.needs_input_grad[:3]):
                continue
            gradient = log_p.exp_().sub_(target).div_(len(rows))  # of the logits
            if own is not None:
                gradient[_diagonal(gradient, part, own)] = 0
            if for_rows is not None:
                torch.mm(gradient, columns, out=for_rows[part]).mul_(scale)
            if for_columns is not None:
                for_columns.addmm_(gradient.T, rows[part] * scale)
            if for_scale is not None:
                for_scale += (gradient * similarity).sum()
        ctx.save_for_backward(for_rows, for_columns, for_scale)
        return loss / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if g is None else g * incoming for g in ctx.saved_tensors)
        return *gradients, None, None


def _tiles(rows: int, columns: int) -> list[slice]:
    size = max(1, TILE // columns)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _diagonal(tile: Tensor, part: slice, first: int) -> tuple[Tensor, Tensor]:
    """Where each row of a tile meets its own column; `first` is the column of row 0."""
    here = torch.arange(len(tile), device=tile.device)
    return here, here + first + part.start


def _without(logits: Tensor, part: slice, own: int) -> Tensor:
    """log_softmax over all columns except each row's own, which becomes 0 (its target is 0)."""
    place = _diagonal(logits, part, own)
    logits[place] = -torch.inf
    log_p = logits.log_softmax(1)
    log_p[place] = 0
    return log_p


def _softmax_targets(rows: Tensor, columns: Tensor, scale: Tensor | float, without_self: bool = False) -> Targets:
    rows, columns, first = rows.detach(), gather(columns.detach()), rank() * len(rows)
    factor = scale.detach() if isinstance(scale, Tensor) else scale

    def targets(part: slice) -> Tensor:
        logits = (rows[part] @ columns.T).mul_(factor)
        if without_self:
            logits[_diagonal(logits, part, first)] = -torch.inf
        return logits.softmax(1)

    return targets


def _shares(rows: Tensor, groups: Tensor | None) -> Targets:
    """Targets of each row over the columns; pairs of one group share equally."""
    n = len(rows)
    mine = torch.arange(rank() * n, (rank() + 1) * n, device=rows.device) if groups is None else groups
    everyones = gather(mine)

    def targets(part: slice) -> Tensor:
        same = (mine[part, None] == everyones).to(rows)
        return same.div_(same.sum(1, keepdim=True))

    return targets
