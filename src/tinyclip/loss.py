"""Losses as pure functions of normalised features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    over rows (TinyCLIP, ICCV 2023, section 3.1).

    Args:
        student_image, student_text: (n, d) normalised features.
        teacher_image, teacher_text: (n, d') normalised features; d' may differ from d.
        student_scale, teacher_scale: exp(logit_scale) of each.
    """
    student_logits = student_scale * student_image @ student_text.T
    teacher_logits = teacher_scale * teacher_image @ teacher_text.T
    image_to_text = F.cross_entropy(student_logits, teacher_logits.softmax(1))
    text_to_image = F.cross_entropy(student_logits.T, teacher_logits.T.softmax(1))
    return (image_to_text + text_to_image) / 2


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, scale: Tensor | float, groups: Tensor | None = None
) -> Tensor:
    """CLIP's symmetric contrastive loss.

    Args:
        image_features, text_features: (n, d) normalised.
        scale: exp(logit_scale).
        groups: int (n,); pairs of one group are all positives of each other, with equal shares. By default
            each pair is its own group.
    """
    logits = scale * image_features @ text_features.T
    if groups is None:
        groups = torch.arange(len(logits), device=logits.device)
    same = (groups[:, None] == groups[None, :]).to(logits.dtype)
    targets = same / same.sum(1, keepdim=True)  # symmetric relation, so the same for both directions
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
