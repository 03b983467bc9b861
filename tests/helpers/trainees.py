"""Small trainees of every kind, and batches for them; also used in tests that start separate processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.models import (
    random_model,
    random_resnet,
    resnet_config,
    small_config,
    small_tokenizer,
    uneven_config,
)
from tinyclip.data.loader import Batch
from tinyclip.inputs.transforms import Preprocess
from tinyclip.recipe.stage import TERMS, Stage
from tinyclip.teachers.teacher import Teacher
from tinyclip.train.pruner import Pruner
from tinyclip.train.step import Trainee

ALL = {"affinity": 1, "contrastive": 0.5, "feature": 2, "interactive": 1, "image_affinity": 1, "text_affinity": 0.7}
MASKS = {"target_sparsity": 0.6, "steps": 4, "ramp_steps": 2}


def only(term: str, **more: Any) -> dict[str, Any]:
    towers = {"image_affinity": "image", "text_affinity": "text"}.get(term, "both")
    return {"loss": {"affinity": 0, term: 1} | more, "towers": towers}


CASES: dict[str, dict[str, Any]] = {
    **{term: only(term) for term in TERMS},
    "scale learned": {"loss": ALL | {"student_scale": "learned", "teacher_scale": 20, "positives": "class"}},
    "scale fixed": {"loss": {"student_scale": 30, "teacher_scale": 50}},
    "masks": {"inherit": "auto", "auto": MASKS},
    "masks, all terms": {
        "inherit": "auto",
        "auto": MASKS | {"gates": True},
        "loss": ALL | {"student_scale": "learned"},
    },
    "masks of the image": {"inherit": "auto", "auto": MASKS, "towers": "image"},
    "text tower": {"towers": "text", "loss": ALL},
    "uneven": {"loss": ALL},
    "resnet": {"loss": ALL, "batch_norm": "frozen"},
    "checkpointed": {"loss": ALL, "grad_checkpointing": True},
    "resnet, checkpointed": {"loss": ALL, "batch_norm": "frozen", "grad_checkpointing": True},
}


def stage_of(case: str, **changes: Any) -> Stage:
    settings: dict[str, Any] = {"name": "s", "steps": 10, "batch_size": 8, "optimizer": {"lr": 1e-3}}
    return Stage.model_validate(settings | CASES[case] | changes)


def trainee_of(case: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Trainee:
    """Return the same trainee at every call."""
    stage, tokens = stage_of(case, **changes), small_tokenizer().vocab_size
    config = small_config(vocab_size=tokens)
    if "resnet" in case:
        config = resnet_config(vocab_size=tokens)
    elif "uneven" in case:
        config = uneven_config(text=uneven_config().text.model_dump() | {"vocab_size": tokens, "context_length": 12})
    original = config if stage.towers != "both" else small_config(vocab_size=tokens, image_size=16)
    teacher = Teacher(random_model(original, 1, dtype), Preprocess(image_size=original.vision.image_size))
    student = (random_resnet(config) if "resnet" in case else random_model(config, 2, dtype)).to(dtype)
    if stage.towers != "both":
        kept = [key for key in student.state_dict() if key.startswith("visual.") == (stage.towers == "text")]
        student.load_state_dict({key: teacher.model.state_dict()[key] for key in kept}, strict=False)
    pruner = None
    if stage.auto:
        budget = "both" if stage.towers == "both" else "visual"
        pruner = Pruner(config, config, stage, {budget: 0.6}, seed=3)
        pruner.hard.to(dtype)
        pruner.constraint.to(dtype)
    trainee = Trainee(
        student, stage, teacher, small_tokenizer(), Preprocess(image_size=config.vision.image_size), "float32", pruner
    )
    with torch.no_grad():
        for projection in trainee.projections.values():
            projection.weight.add_(torch.randn(projection.weight.shape, dtype=dtype), alpha=0.1)
    trainee.train()
    return trainee


def batch_of(size: int = 32, pairs: int = 8) -> Batch:
    """Return noise images, texts of 2 to 9 tokens, and three classes."""
    generator = torch.Generator().manual_seed(5)
    tokenizer = small_tokenizer()
    tokens = torch.zeros(pairs, 12, dtype=torch.long)
    for i in range(pairs):
        length = 2 + (i * 3) % 8
        tokens[i, :length] = torch.randint(1, 500, (length,), generator=generator)
        tokens[i, length - 1] = tokenizer.end_id
    images = torch.randint(256, (pairs, 3, size, size), generator=generator, dtype=torch.uint8)
    return Batch(images, tokens, torch.arange(pairs) % 3, [f"{i:05d}" for i in range(pairs)])


def part_of(batch: Batch, piece: slice) -> Batch:
    return Batch(batch.images[piece], batch.tokens[piece], batch.groups[piece], batch.keys[piece])


def named(trainee: Trainee) -> dict[str, nn.Parameter]:
    """Return all trained parameters by name."""
    return {name: p for name, p in trainee.student.named_parameters() if p.requires_grad}


def gradients(trainee: Trainee, batch: Batch, step: int = 1) -> dict[str, Tensor]:
    """Return the gradients of the training step; check that every trained parameter has one."""
    trainee.student.zero_grad()
    trainee.backward(batch, step)
    found = {}
    for name, parameter in named(trainee).items():
        assert parameter.grad is not None, f"{name} takes no part in the loss"
        found[name] = parameter.grad.clone()
    return found


def plain_gradients(trainee: Trainee, batch: Batch, step: int = 1) -> dict[str, Tensor]:
    """Return the gradients of the whole batch in one graph, without feature leaves or replay."""
    teacher, student = trainee.teacher, trainee.student
    assert teacher is not None
    theirs = tuple(x.clone() for x in teacher.features(batch.images, batch.tokens))
    outputs = student(batch.images, batch.tokens, step, theirs)
    loss = trainee._terms(outputs, [theirs], batch)["loss"]
    names = named(trainee)
    return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))


def assert_near(ours: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float) -> None:
    """Compare relative to each tensor's norm, or to a thousandth of the largest norm, because some are 0 except for
    rounding."""
    assert ours.keys() == reference.keys()
    largest = max(value.norm().item() for value in reference.values())
    for name, value in reference.items():
        error = (ours[name] - value).norm().item() / max(value.norm().item(), 1e-3 * largest)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def infinite(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * math.inf
