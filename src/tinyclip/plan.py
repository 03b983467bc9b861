"""What a recipe would take, without running it: shapes, sizes, operations, memory and hours.

Sizes come from the axis table and operations from `measurement.macs`. The shape of a stage whose masks are learned or
measured is not known before: it is planned as if every width of its start shrank alike until the target is met.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinyclip.axes import axis_table, count_parameters
from tinyclip.checkpoint import read_config
from tinyclip.config import CLIPConfig, ResNetConfig, TransformerConfig, VisionConfig
from tinyclip.index import known_samples
from tinyclip.inheritance import manual_masks
from tinyclip.masks import Tower, sparsity
from tinyclip.measurement import macs
from tinyclip.pruning import budgets, thinner
from tinyclip.recipe import Recipe, Stage, Target
from tinyclip.resnet import ModifiedResNet
from tinyclip.zoo import cache_folder, find

# (n, n) float32 matrices alive at once in a distillation loss: both models' logits, two softmaxes, two
# log-softmaxes, two gradients (see `loss.affinity_loss`).
LOSS_MATRICES = 8

Speed = Callable[[Stage, CLIPConfig], float]  # pairs/s a device of a stage's student of that shape


@dataclass(frozen=True)
class StageShapes:
    """What a stage starts from and what it ends with; `learned`: the end is an estimate."""

    start: CLIPConfig
    student: CLIPConfig
    learned: bool


# --- shapes -----------------------------------------------------------------------------------------------------


def teacher_config(recipe: Recipe) -> tuple[CLIPConfig, list[str]]:
    """Shape of what the stages begin with, and what people should know of it.

    Raises:
        ValueError: when the teacher is neither here nor described by `teacher_shape`.
    """
    if recipe.teacher is None:
        assert recipe.model is not None, "the recipe's validation asks for a teacher or a model"
        return recipe.model, []
    name = recipe.caches[0] if recipe.caches else str(recipe.teacher)
    if (shape := known_shape(name)) is not None:
        return shape, []
    if recipe.teacher_shape is None:
        raise ValueError(f"{name}: no such checkpoint; put it there, or set `teacher_shape` to a model name")
    return recipe.teacher_shape, [f"{name} is not here: its shape is taken from teacher_shape"]


def known_shape(name_or_path: str) -> CLIPConfig | None:
    """Shape of a checkpoint or a name of the zoo, without a download; None when only the absent file says it.

    Raises:
        ValueError: for a checkpoint that cannot be read, or a name of several models.
    """
    if Path(name_or_path).exists():
        return read_config(name_or_path)
    entry = find(name_or_path)
    if entry is None:
        return None
    file = cache_folder() / entry.file
    if file.exists():
        return read_config(file)
    return CLIPConfig.named(entry.shape) if entry.shape else None


def stage_shapes(recipe: Recipe, teacher: CLIPConfig) -> tuple[list[StageShapes], list[str]]:
    """The shapes of every stage, and what people should know of them.

    Raises:
        ValueError: naming the stage whose student does not fit its start.
    """
    shapes: list[StageShapes] = []
    notes: list[str] = []
    for i, stage in enumerate(recipe.stages):
        start = shapes[-1].student if stage.start == "previous" and shapes else teacher
        if stage.start not in ("previous", "teacher"):
            known = known_shape(stage.start)
            start = known or teacher
            if known is None:
                notes.append(f"{stage.start}, where stage {stage.name} starts, is not here: planned from the teacher")
        try:
            student = stage.student.apply(start)
            if stage.inherit == "manual":
                manual_masks(start, student)
            elif stage.inherit != "none":
                target = stage.target
                assert target is not None, "the recipe's validation asks for the section"
                start, student = student, expected_shape(student, teacher, target, stage.towers)
                if target.latency_ms is not None:
                    notes.append(f"stage {stage.name} aims at a latency, which only its run can measure: full size")
        except ValueError as error:
            raise ValueError(f"stages.{i} ({stage.name}): {error}") from None
        shapes.append(StageShapes(start, student, stage.inherit in ("auto", "calibrated")))
    return shapes, notes


def expected_shape(
    start: CLIPConfig, original: CLIPConfig, target: Target, towers: Literal["both", "image", "text"] = "both"
) -> CLIPConfig:
    """`start` with all widths shrunk alike until the target is met; never larger than `start`.

    The budget counts from `original`, as in training: a shared one over both towers, or one for each.
    """
    shape = start
    for name, goal in (budgets(target, towers) or {}).items():
        group: tuple[Tower, ...] = ("visual", "text") if name == "both" else (name,)  # type: ignore[assignment]

        def reached(thousandths: int, group: tuple[Tower, ...] = group, goal: float = goal) -> bool:
            smaller = thinner(start, thousandths / 1000, group)
            return sparsity(smaller, original, {}, group, target.counted).item() >= goal

        shape = thinner(shape, bisect_left(range(1000), True, key=reached) / 1000, group)
    return shape


def shape_text(config: CLIPConfig) -> str:
    """`12 x 512, text 6 x 512`: layers and width of both towers."""
    vision, text = config.vision, config.text
    image = f"{vision.layers} x {vision.width}" if isinstance(vision, VisionConfig) else _resnet_text(vision)
    return f"{image}, text {text.layers} x {text.width}"


def _resnet_text(vision: ResNetConfig) -> str:
    """`[3, 4, 6, 3] x 56`; the first stage's inner channels stand for all."""
    return f"{list(vision.layers)} x {vision.conv2[0][0]}"


# --- operations, memory, hours ----------------------------------------------------------------------------------


def step_macs(student: CLIPConfig, stage: Stage, teacher: CLIPConfig | None) -> int:
    """MACs a pair in training: forward and backward of the student's trained towers (3x their forward), forward of
    the teacher; texts at full context, which training cuts to the longest of the batch."""
    total = sum(3 * count for tower, count in macs(student).items() if stage.towers in ("both", tower))
    return total + (sum(macs(teacher).values()) if teacher is not None and needs_teacher(stage) else 0)


def needs_teacher(stage: Stage) -> bool:
    """Whether the teacher sees every batch: for its terms of the loss, or for a tower that stays its own."""
    return bool(stage.loss.distils) or stage.towers != "both"


def memory(
    student: CLIPConfig, stage: Stage, teacher: CLIPConfig | None, pairs: int, dtype_bytes: int
) -> dict[str, float]:
    """Bytes a device needs with `pairs` of the batch on it.

    Student: float32 weights, gradients and AdamW's two moments of what is trained (4 + 4 + 8 bytes), and a copy in the
    autocast dtype. Teacher: float32 weights. Activations: what the backward pass needs, see `activation_bytes`.
    Loss: `LOSS_MATRICES` matrices of the device's rows against the whole batch. Fragmentation, workspaces and the
    decoding processes come on top.
    """
    counts = count_parameters(axis_table(student))
    trained = sum(n for part, n in counts.items() if stage.towers in ("both", "image" if part == "image" else "text"))
    weights = sum(counts.values())
    copy = dtype_bytes if dtype_bytes < 4 else 0
    result: dict[str, float] = {
        "weights": (4 + copy) * weights,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "teacher": 4 * sum(count_parameters(axis_table(teacher)).values()) if teacher and needs_teacher(stage) else 0,
        "activations": pairs * activation_bytes(student, stage.towers, dtype_bytes),
        "loss": LOSS_MATRICES * 4 * pairs * stage.batch_size,
    }
    result["total"] = sum(result.values())
    return result


def activation_bytes(config: CLIPConfig, towers: str, dtype_bytes: int) -> int:
    """Bytes kept for the backward pass, a pair. A token of a block keeps the residual stream before both norms in
    float32, and in the autocast dtype both norms' outputs, q, k, v and the attention's output, and the neurons before
    and after the activation; attention is fused, without checkpointing. A ResNet keeps each convolution's output and
    what its batch norm and activation make of it."""
    vision, text = config.vision, config.text
    total = 0
    if towers != "text" and isinstance(vision, VisionConfig):
        total += _kept(vision, vision.grid**2 + 1, dtype_bytes)
    elif towers != "text":
        total += 2 * dtype_bytes * _convolved(config)
    if towers != "image":
        total += _kept(text, text.context_length, dtype_bytes)
    return total


def _convolved(config: CLIPConfig) -> int:
    """Outputs of a ResNet's convolutions for one image."""
    assert isinstance(config.vision, ResNetConfig)
    total = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel()

    with torch.device("meta"):
        tower = ModifiedResNet(config.vision, config.embed_dim).eval()
        for module in tower.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        tower(torch.empty(1, 3, config.vision.image_size, config.vision.image_size))
    return total


def _kept(config: TransformerConfig, length: int, dtype_bytes: int) -> int:
    total = 0
    for heads, mlp in zip(config.heads, config.mlp_width, strict=True):
        branches = (heads is not None) + (mlp is not None)
        total += branches * config.width * (4 + dtype_bytes)
        total += dtype_bytes * (4 * (heads or 0) * config.head_dim + 2 * (mlp or 0))
    return length * total


def plan(
    recipe: Recipe,
    *,
    devices: int = 1,
    samples: int | None = None,
    tflops: float | None = None,
    speed: Speed | None = None,
) -> dict[str, Any]:
    """Everything that `tinyclip plan` prints: `teacher`, `stages`, `total`, `notes`.

    Args:
        devices: the batch is divided among them.
        samples: pairs of the data; by default what its index says, if there is one.
        tflops: sustained TFLOP/s a device, for `hours`.
        speed: instead of tflops, pairs/s a device.

    Raises:
        ValueError: for a teacher of unknown shape, or a student that does not fit its start.
    """
    first, notes = teacher_config(recipe)
    shapes, more = stage_shapes(recipe, first)
    teacher = first if recipe.teacher is not None else None
    live = None if recipe.caches else teacher  # stored features cost nothing here
    samples = samples or known_samples(recipe.data)
    if tflops is not None:
        speed = _speed_of(tflops, live)
    stages = [
        _stage_plan(recipe, stage, shape, live, devices, samples, speed)
        for stage, shape in zip(recipe.stages, shapes, strict=True)
    ]
    total: dict[str, Any] = {name: sum(s[name] for s in stages) for name in ("steps", "samples", "flops")}
    total["epochs"] = sum(s["epochs"] for s in stages) if samples else None
    total["memory_bytes"] = max(s["memory_bytes"]["total"] for s in stages)
    total["hours"] = sum(s["hours"] for s in stages) if speed else None
    start = {"shape": shape_text(first)} | _sizes(first) if teacher else None
    return {"teacher": start, "devices": devices, "stages": stages, "total": total, "notes": notes + more}


def _speed_of(tflops: float, teacher: CLIPConfig | None) -> Speed:
    return lambda stage, student: tflops * 1e12 / (2 * step_macs(student, stage, teacher))


def _sizes(config: CLIPConfig) -> dict[str, int]:
    counts, operations = count_parameters(axis_table(config)), macs(config)
    return {f"params_{k}": n for k, n in counts.items()} | {f"macs_{k}": n for k, n in operations.items()}


def _stage_plan(
    recipe: Recipe,
    stage: Stage,
    shapes: StageShapes,
    teacher: CLIPConfig | None,
    devices: int,
    samples: int | None,
    speed: Speed | None,
) -> dict[str, Any]:
    seen = stage.steps * stage.batch_size
    # Masked steps work at the size of the start, those after the cut at the size of the student.
    masked = stage.batch_size * (stage.auto.steps if stage.auto else 0)
    phases = [(shapes.start, masked), (shapes.student, seen - masked)]
    if stage.calibrated:
        phases.append((shapes.start, stage.calibrated.batches * stage.batch_size))
    largest = shapes.start if shapes.learned else shapes.student
    dtype_bytes = 4 if recipe.precision == "float32" else 2
    hours = sum(n / speed(stage, config) for config, n in phases if n) / devices / 3600 if speed else None
    return {
        "stage": stage.name,
        "inherit": stage.inherit,
        "shape": shape_text(shapes.student),
        "estimated": shapes.learned,
        **_sizes(shapes.student),
        "steps": stage.steps,
        "batch_size": stage.batch_size,
        "samples": seen,
        "epochs": seen / samples if samples else None,
        "flops": sum(2 * n * step_macs(config, stage, teacher) for config, n in phases),
        "memory_bytes": memory(largest, stage, teacher, -(-stage.batch_size // devices), dtype_bytes),
        "hours": hours,
    }
