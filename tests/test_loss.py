from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.models import golden
from tinyclip import loss
from tinyclip.loss import affinity_loss, contrastive_loss, feature_loss, interactive_loss, within_affinity_loss

# The golden file calls these logit scales, but they multiply the similarities directly, without exp.
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


# --- other terms, against loops written from their papers


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


# --- in tiles, against the plain version: whole matrices and torch's own cross-entropy


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def plain_affinity(si: Tensor, st: Tensor, ti: Tensor, tt: Tensor, scale: Tensor) -> Tensor:
    logits, targets = scale * si @ st.T, 40 * ti @ tt.T
    return (plain(logits, targets.softmax(1)) + plain(logits.T, targets.T.softmax(1))) / 2


def plain_contrast(rows: Tensor, columns: Tensor, others: Tensor, own: Tensor, scale: Tensor) -> Tensor:
    same = (GROUPS[:, None] == GROUPS).to(rows)
    shares = same / same.sum(1, keepdim=True)
    return (plain(scale * rows @ columns.T, shares) + plain(scale * others @ own.T, shares)) / 2


def plain_within(student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
    others = ~torch.eye(len(student), dtype=torch.bool)
    logits = (scale * student @ student.T)[others].view(len(student), -1)
    return plain(logits, (40 * teacher @ teacher.T)[others].view(len(student), -1).softmax(1))


GROUPS = torch.arange(23) // 3
FORMS = {
    "affinity": (lambda i, t, ti, tt, s: affinity_loss(i, t, ti, tt, s, 40.0), plain_affinity),
    "contrastive": (
        lambda i, t, ti, tt, s: contrastive_loss(i, t, s, GROUPS),
        lambda i, t, ti, tt, s: plain_contrast(i, t, t, i, s),
    ),
    "interactive": (
        lambda i, t, ti, tt, s: interactive_loss(i, t, ti, tt, s, GROUPS),
        lambda i, t, ti, tt, s: plain_contrast(i, tt, t, ti, s),
    ),
    "within": (
        lambda i, t, ti, tt, s: within_affinity_loss(i, ti, s, 40.0) + 0 * t.sum(),
        lambda i, t, ti, tt, s: plain_within(i, ti, s) + 0 * t.sum(),
    ),
}


@pytest.mark.parametrize("elements", [1, 23 * 5, 2**23])
@pytest.mark.parametrize("form", FORMS)
def test_tiles_give_the_plain_loss_and_gradients(form: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "TILE", elements)  # one row per tile, five, all
    teacher, results = [features(23, 8, seed) for seed in (3, 4)], []
    for function in FORMS[form]:
        inputs = [features(23, 8, 1), features(23, 8, 2), torch.tensor(30.0, dtype=torch.float64)]
        inputs = [x.requires_grad_() for x in inputs]
        value = 3 * function(*inputs[:2], *teacher, inputs[2])
        results.append([value, *torch.autograd.grad(value, inputs)])
    for tiled, whole in zip(*results, strict=True):
        assert (tiled - whole).abs().max() <= 1e-10 * whole.abs().max()


def test_no_tile_is_larger_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "TILE", 512)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    si, st, ti, tt = (features(64, 4, seed).requires_grad_() for seed in range(4))
    with Watch():
        total = affinity_loss(si, st, ti, tt, 20.0, 20.0) + contrastive_loss(si, st, 20.0)
        (total + interactive_loss(si, st, ti, tt, 20.0) + within_affinity_loss(si, ti, 20.0, 20.0)).backward()
    assert largest == 512  # the batch alone would be 4,096


def test_without_gradient_the_loss_is_the_same() -> None:
    si, st, ti, tt = (features(7, 4, seed) for seed in range(4))
    value = affinity_loss(si, st, ti, tt, 20.0, 30.0)
    assert not value.requires_grad
    assert value.item() == affinity_loss(si.requires_grad_(), st, ti, tt, 20.0, 30.0).item()
