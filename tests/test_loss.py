from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import golden
from tinyclip.loss import affinity_loss, contrastive_loss, feature_loss, interactive_loss, within_affinity_loss

# The golden file calls them logit scales, but they multiply the similarities as they are.
SCALES = ("student_logit_scale", "teacher_logit_scale")
FEATURES = ("student_image", "student_text", "teacher_image", "teacher_text")


def features(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def test_affinity_and_its_gradients_equal_the_authors() -> None:
    expected = golden("affinity.npz")
    si, st, ti, tt = (torch.from_numpy(expected[name]).requires_grad_() for name in FEATURES)
    student_scale, teacher_scale = (float(expected[name]) for name in SCALES)
    loss = affinity_loss(si, st, ti, tt, student_scale, teacher_scale)
    loss.backward()
    assert loss.item() == pytest.approx(float(expected["loss"]), abs=1e-9)
    assert loss.item() == pytest.approx(float(expected["image_to_text"] + expected["text_to_image"]) / 2, abs=1e-9)
    assert si.grad is not None
    assert st.grad is not None
    assert np.abs(si.grad.numpy() - expected["grad_student_image"]).max() < 1e-9
    assert np.abs(st.grad.numpy() - expected["grad_student_text"]).max() < 1e-9


def test_contrastive_equals_the_authors() -> None:
    expected = golden("affinity.npz")
    image, text = (torch.from_numpy(expected[name]) for name in ("student_image", "student_text"))
    loss = contrastive_loss(image, text, float(expected["student_logit_scale"]))
    assert loss.item() == pytest.approx(float(expected["contrastive"]), abs=1e-9)


def test_pairs_of_one_group_share_the_target() -> None:
    image, text, groups = features(6, 5, 1), features(6, 5, 2), [4, 4, 0, 9, 0, 4]
    total = 0.0
    for rows, columns in ((image, text), (text, image)):
        for i in range(6):
            probabilities = (10 * columns @ rows[i]).softmax(0)
            positives = [j for j in range(6) if groups[j] == groups[i]]
            total -= sum(probabilities[j].log().item() for j in positives) / len(positives) / 6 / 2
    assert contrastive_loss(image, text, 10, torch.tensor(groups)).item() == pytest.approx(total, rel=1e-12)


def test_gradients_by_finite_differences() -> None:
    si, st, ti, tt = features(4, 3, 1), features(4, 3, 2), features(4, 7, 3), features(4, 7, 4)
    scale = torch.tensor(5.0, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (si, st, scale)]
    assert torch.autograd.gradcheck(lambda i, t, s: affinity_loss(i, t, ti, tt, s, 4.0), inputs)
    groups = torch.tensor([0, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda i, t, s: contrastive_loss(i, t, s, groups), inputs)


def test_a_perfect_student_has_the_teachers_entropy_and_no_gradient() -> None:
    image, text = features(5, 4, 1), features(5, 4, 2)
    # The teacher's features are the student's in a larger space.
    student_image, student_text = image.clone().requires_grad_(), text.clone().requires_grad_()
    loss = affinity_loss(student_image, student_text, F.pad(image, (0, 3)), F.pad(text, (0, 3)), 20.0, 20.0)
    logits = 20 * image @ text.T
    entropies = [-(x.softmax(1) * x.log_softmax(1)).sum(1).mean() for x in (logits, logits.T)]
    assert loss.item() == pytest.approx(sum(entropies).item() / 2, rel=1e-12)
    loss.backward()
    assert student_image.grad is not None
    assert student_image.grad.abs().max() < 1e-12


# --- further terms, against loops written from their papers


def test_feature_mimicking_is_the_squared_distance() -> None:
    si, st, ti, tt = (features(5, 8, seed) for seed in range(4))
    expected = sum(
        (float(((si[k] - ti[k]) ** 2).sum()) + float(((st[k] - tt[k]) ** 2).sum())) / 5 for k in range(5)
    )  # fmt: skip
    assert feature_loss(si, st, ti, tt).item() == pytest.approx(expected, abs=1e-12)
    assert feature_loss(ti, tt, ti, tt).item() == 0


def test_interactive_contrasts_with_the_teacher() -> None:
    si, st, ti, tt = (features(5, 8, seed) for seed in range(4))
    expected = 0.0
    for k in range(5):
        image = torch.stack([20 * si[k] @ tt[b] for b in range(5)])
        text = torch.stack([20 * st[k] @ ti[b] for b in range(5)])
        expected -= float(image[k] - image.logsumexp(0) + text[k] - text.logsumexp(0)) / 10
    assert interactive_loss(si, st, ti, tt, 20.0).item() == pytest.approx(expected, abs=1e-12)
    assert interactive_loss(ti, tt, ti, tt, 20.0).item() == pytest.approx(contrastive_loss(ti, tt, 20.0).item())
    groups = torch.tensor([0, 1, 0, 2, 3])
    same = interactive_loss(ti, tt, ti, tt, 20.0, groups).item()
    assert same == pytest.approx(contrastive_loss(ti, tt, 20.0, groups).item())


def test_affinity_within_a_modality_leaves_out_the_diagonal() -> None:
    student, teacher = features(5, 6, 0), features(5, 8, 1)
    expected = 0.0
    for k in range(5):
        others = [b for b in range(5) if b != k]
        target = torch.stack([50 * teacher[k] @ teacher[b] for b in others]).softmax(0)
        expected -= (
            float((target * torch.stack([30 * student[k] @ student[b] for b in others]).log_softmax(0)).sum()) / 5
        )
    assert within_affinity_loss(student, teacher, 30.0, 50.0).item() == pytest.approx(expected, abs=1e-12)


def test_the_teacher_itself_has_the_least_affinity_loss_within() -> None:
    teacher = features(6, 8, 1)
    student = teacher.clone().requires_grad_()
    within_affinity_loss(student, teacher, 30.0, 30.0).backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-9
