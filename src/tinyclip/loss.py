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
    targets = _shares(logits, groups)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def feature_loss(student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    """Feature mimicking: squared distance of the student's features, projected to the teacher's size, from the
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
    teacher's images, each to find its own (CLIP-KD, CVPR 2024, section 3.2.4).

    Args:
        student_image, student_text: (n, d) projected to the teacher's size and normalised.
        teacher_image, teacher_text: (n, d) normalised.
        scale: exp(logit_scale).
        groups: as in `contrastive_loss`.
    """
    logits = scale * student_image @ teacher_text.T
    targets = _shares(logits, groups)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(scale * student_text @ teacher_image.T, targets)) / 2


def within_affinity_loss(
    student: Tensor, teacher: Tensor, student_scale: Tensor | float, teacher_scale: Tensor | float
) -> Tensor:
    """Affinity of one modality with itself: the student copies how the teacher's features of the batch resemble each
    other. Each row's similarity with itself, which is always 1, is left out.

    Cross-entropy against the teacher's softmax, averaged over rows (the form of `affinity_loss`; the idea is
    similarity-preserving distillation, Tung and Mori, ICCV 2019).

    Args:
        student: (n, d) normalised features.
        teacher: (n, d') normalised features, n at least 2.
    """
    others = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    student_logits = (student_scale * student @ student.T)[others].view(len(student), -1)
    teacher_logits = (teacher_scale * teacher @ teacher.T)[others].view(len(teacher), -1)
    return F.cross_entropy(student_logits, teacher_logits.softmax(1))


def _shares(logits: Tensor, groups: Tensor | None) -> Tensor:
    """(n, n): what each row's target gives to each column; pairs of one group share equally."""
    if groups is None:
        groups = torch.arange(len(logits), device=logits.device)
    same = (groups[:, None] == groups[None, :]).to(logits)
    return same / same.sum(1, keepdim=True)  # symmetric relation, so the same for both directions
