"""Estimate the cost of a recipe without running it: shapes, sizes, operations, memory and hours.

Sizes come from the axis table and operations from `model.costs.macs`. If a stage learns or measures its masks, its
final shape is not known in advance, so the plan shrinks all widths of its start by one factor until
it meets the target.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinyclip.compress.inheritance import manual_masks
from tinyclip.compress.size import sparsity, thinner
from tinyclip.data.shard_index import known_samples
from tinyclip.loss import TILE
from tinyclip.model.axes import axis_table, count_parameters
from tinyclip.model.config import CLIPConfig, ResNetConfig, TransformerConfig, VisionConfig
from tinyclip.model.costs import macs
from tinyclip.model.masks import Tower
from tinyclip.model.resnet import Bottleneck, ModifiedResNet
from tinyclip.recipe.recipe import Recipe
from tinyclip.recipe.stage import Stage, Target
from tinyclip.teachers.cache import read_info
from tinyclip.teachers.foreign import is_foreign
from tinyclip.train.pruner import budgets
from tinyclip.zoo.catalogue import cache_folder, find
from tinyclip.zoo.checkpoint import read_config

# Tiles alive at the same time in a distillation loss: similarities, the student's logits, their softmax, the targets.
LOSS_TILES = 4

Speed = Callable[[Stage, CLIPConfig], float]  # pairs/s per device when a stage trains a student of that shape


@dataclass(frozen=True)
class StageShapes:
    """The shapes a stage starts and ends with; with `learned` the end is an estimate."""

    start: CLIPConfig
    student: CLIPConfig
    learned: bool


# --- shapes -----------------------------------------------------------------------------------------------------


def teacher_config(recipe: Recipe) -> tuple[CLIPConfig, list[str]]:
    """Return the shape the stages begin with, and notes for the user about it.

    Raises:
        ValueError: if the teacher is neither available locally nor described by `teacher_shape`.
    """
    if recipe.teacher is None:
        assert recipe.model is not None, "the recipe's validation asks for a teacher or a model"
        return recipe.model, []
    name = recipe.caches[0] if recipe.caches else str(recipe.teacher)
    if _is_foreign(recipe):
        return _beside_foreign(recipe, name)
    if (shape := known_shape(name)) is not None:
        return shape, []
    if recipe.teacher_shape is None:
        raise ValueError(f"{name}: no such checkpoint; put it there, or set `teacher_shape` to a model name")
    return recipe.teacher_shape, [f"{name} is not here: using the shape in teacher_shape"]


def _is_foreign(recipe: Recipe) -> bool:
    """Whether the teacher comes from another library, so `CLIPConfig` may be unable to describe it."""
    if recipe.caches:
        folder = Path(recipe.caches[0])
        return (folder / "cache.json").is_file() and read_info(folder).foreign is not None
    return isinstance(recipe.teacher, str) and is_foreign(recipe.teacher)


def _beside_foreign(recipe: Recipe, name: str) -> tuple[CLIPConfig, list[str]]:
    """`teacher_config` for a teacher from another library, without loading it."""
    stage, given = recipe.stages[0], recipe.teacher_shape
    if stage.start in ("previous", "teacher") and stage.inherit != "none":
        if given is None:
            raise ValueError(f"{name}: its shape is unknown until it is loaded; set `teacher_shape` to a model name")
        return given, [f"{name}: using the shape in teacher_shape"]
    note = f"{name}: its own cost is not counted; set `teacher_shape` to a model of about its size"
    return first_start(recipe), [note] if given is None and not recipe.caches else []


def first_start(recipe: Recipe) -> CLIPConfig:
    """Return the shape a first stage starts from without its teacher; `ValueError` if the recipe does not give it."""
    stage = recipe.stages[0]
    named = stage.start not in ("previous", "teacher")
    shape = known_shape(stage.start) if named else stage.student.like
    if shape is None:
        absent = f"start: {stage.start} is not here" if named else "student: give the whole shape with `like: NAME`"
        raise ValueError(f"stages.0.{absent}")
    return shape


def known_shape(name_or_path: str) -> CLIPConfig | None:
    """Return the shape of a checkpoint or zoo model without downloading it; None if only the missing file could tell.

    Raises:
        ValueError: if the checkpoint cannot be read or the name is ambiguous.
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
    """Return the shapes of every stage, and notes for the user about them.

    Raises:
        ValueError: if a student does not fit its start; the message names the stage.
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
                    notes.append(
                        f"stage {stage.name} has a latency target, which only a run can measure: planned at full size"
                    )
        except ValueError as error:
            raise ValueError(f"stages.{i} ({stage.name}): {error}") from None
        shapes.append(StageShapes(start, student, stage.inherit in ("auto", "calibrated")))
    return shapes, notes


def expected_shape(
    start: CLIPConfig, original: CLIPConfig, target: Target, towers: Literal["both", "image", "text"] = "both"
) -> CLIPConfig:
    """Return `start` with all widths shrunk by the same factor until the target is met; never larger than `start`.

    As in training, sparsity is relative to `original`, with one budget for both towers or one per tower.
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
    """Format layers and width of both towers: `12 x 512, text 6 x 512`."""
    vision, text = config.vision, config.text
    image = f"{vision.layers} x {vision.width}" if isinstance(vision, VisionConfig) else _resnet_text(vision)
    return f"{image}, text {text.layers} x {text.width}"


def _resnet_text(vision: ResNetConfig) -> str:
    """Format a ResNet as `[3, 4, 6, 3] x 56`; the first stage's inner channels stand for all stages."""
    return f"{list(vision.layers)} x {vision.conv2[0][0]}"


# --- operations, memory, hours ----------------------------------------------------------------------------------


def step_macs(student: CLIPConfig, stage: Stage, teacher: CLIPConfig | None, pairs: int | None = None) -> int:
    """Return the training MACs per pair: forward and backward pass of the student's trained towers (3x their forward
    pass), one more forward pass each for replaying micro-batches and for gradient checkpointing, and the teacher's
    forward pass. Captions count at full context, although training trims them to the longest in the batch.

    Args:
        pairs: pairs of the batch per device; by default all of them.
    """
    replays = stage.micro_batch is not None and stage.micro_batch < (pairs or stage.batch_size)
    passes = 3 + replays + stage.grad_checkpointing
    total = sum(passes * count for tower, count in macs(student).items() if stage.towers in ("both", tower))
    return total + (sum(macs(teacher).values()) if teacher is not None and needs_teacher(stage) else 0)


def needs_teacher(stage: Stage) -> bool:
    """Whether the teacher runs on every batch: for its loss terms, or because one tower stays the teacher's."""
    return bool(stage.loss.distils) or stage.towers != "both"


def memory(
    student: CLIPConfig, stage: Stage, teacher: CLIPConfig | None, pairs: int, dtype_bytes: int
) -> dict[str, float]:
    """Return the bytes a device needs with `pairs` pairs of the batch on it.

    Student: float32 weights, gradients and AdamW's two moments for trained parameters (4 + 4 + 8 bytes), and a copy
    of the weights in the autocast dtype; with `ema`, their average in float32. Teacher: float32 weights.
    Activations: those the backward pass needs (see `activation_bytes`); with `micro_batch`, those of one
    micro-batch, plus the features of all pairs. Loss: `LOSS_TILES` tiles, and the features of the whole batch with
    their gradients. Not counted: fragmentation, workspaces and the decoding workers.
    """
    counts = count_parameters(axis_table(student))
    trained = sum(n for part, n in counts.items() if stage.towers in ("both", "image" if part == "image" else "text"))
    weights = sum(counts.values())
    copy = dtype_bytes if dtype_bytes < 4 else 0
    # A pair's features in float32: the student's with their gradients, and the teacher's.
    features = 2 * 4 * (2 * student.embed_dim + (teacher.embed_dim if teacher else 0))
    result: dict[str, float] = {
        "weights": (4 + copy) * weights,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "average": 4 * weights if stage.ema else 0,
        "teacher": 4 * sum(count_parameters(axis_table(teacher)).values()) if teacher and needs_teacher(stage) else 0,
        "activations": min(pairs, stage.micro_batch or pairs)
        * activation_bytes(student, stage.towers, dtype_bytes, stage.grad_checkpointing),
        "features": pairs * features,
        "loss": LOSS_TILES * 4 * min(TILE, pairs * stage.batch_size) + stage.batch_size * features,
    }
    result["total"] = sum(result.values())
    return result


def activation_bytes(config: CLIPConfig, towers: str, dtype_bytes: int, checkpointed: bool = False) -> int:
    """Return the bytes per pair kept for the backward pass. Each token of a block keeps the residual stream before
    both norms in float32 and, in the autocast dtype, both norms' outputs, q, k, v, the attention output, and the MLP
    neurons before and after the activation; attention is fused. A ResNet keeps each convolution's output and the
    result of its batch norm and activation. With gradient checkpointing only the input of each block is kept, plus one
    complete block at a time."""
    vision, text = config.vision, config.text
    always, blocks = 0, []  # per block: bytes of its input, bytes inside
    if towers != "text" and isinstance(vision, VisionConfig):
        blocks += _transformer_blocks(vision, vision.grid**2 + 1, dtype_bytes)
    elif towers != "text":
        always, resnet = _resnet_blocks(config, dtype_bytes)
        blocks += resnet
    if towers != "image":
        blocks += _transformer_blocks(text, text.context_length, dtype_bytes)
    inputs, inside = [block[0] for block in blocks], [block[1] for block in blocks]
    return always + (sum(inputs) + max(inside, default=0) if checkpointed else sum(inside))


def _transformer_blocks(config: TransformerConfig, length: int, dtype_bytes: int) -> list[tuple[int, int]]:
    """Return input and inner bytes per block. After the last attention, only the position that is read out
    is computed."""
    last = max((i for i, heads in enumerate(config.heads) if heads), default=-1)
    stream = config.width * (4 + dtype_bytes)  # per token: before and after a norm
    blocks = []
    for i, (heads, mlp) in enumerate(zip(config.heads, config.mlp_width, strict=True)):
        before, after = (length if i <= last else 1), (length if i < last else 1)
        channels = dtype_bytes * (heads or 0) * config.head_dim
        inside = before * ((heads is not None) * stream + 2 * channels)  # keys and values
        inside += after * (2 * channels + (mlp is not None) * stream + 2 * dtype_bytes * (mlp or 0))
        blocks.append((before * config.width * 4, inside))
    return blocks


def _resnet_blocks(config: CLIPConfig, dtype_bytes: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the bytes of the stem for one image, and the input and inner bytes of each block."""
    assert isinstance(config.vision, ResNetConfig)
    inputs: dict[str, int] = {}
    inside: dict[str, int] = {}

    def count(name: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, Bottleneck):
            inputs[name] = dtype_bytes * arguments[0].numel()
        else:
            block = ".".join(name.split(".")[:2]) if name.startswith("layer") else "stem"
            inside[block] = inside.get(block, 0) + 2 * dtype_bytes * output.numel()

    with torch.device("meta"):
        tower = ModifiedResNet(config.vision, config.embed_dim).eval()
        for name, module in tower.named_modules():
            if isinstance(module, nn.Conv2d | Bottleneck):
                module.register_forward_hook(partial(count, name))
        tower(torch.empty(1, 3, config.vision.image_size, config.vision.image_size))
    return inside["stem"], [(inputs[name], inside[name]) for name in inputs]


def plan(
    recipe: Recipe,
    *,
    devices: int = 1,
    samples: int | None = None,
    tflops: float | None = None,
    speed: Speed | None = None,
) -> dict[str, Any]:
    """Return everything that `tinyclip plan` prints: `teacher`, `stages`, `total`, `notes`.

    Args:
        devices: number of devices that share the batch.
        samples: pairs in the data; by default taken from its index, if it has one.
        tflops: sustained TFLOP/s per device, for `hours`.
        speed: pairs/s per device, instead of `tflops`.

    Raises:
        ValueError: if the teacher's shape is unknown, or a student does not fit its start.
    """
    first, notes = teacher_config(recipe)
    shapes, more = stage_shapes(recipe, first)
    more += [f"stage {stage.name}: {note}" for stage in recipe.stages if stage.auto and (note := stage.auto.too_slow)]
    teacher = first if recipe.teacher is not None else None
    if _is_foreign(recipe):
        teacher = recipe.teacher_shape
    live = None if recipe.caches else teacher  # stored features cost nothing here
    samples = samples or known_samples(recipe.data)
    if tflops is not None:
        speed = _speed_of(tflops, live, devices)
    stages = [
        _stage_plan(recipe, stage, shape, live, devices, samples, speed)
        for stage, shape in zip(recipe.stages, shapes, strict=True)
    ]
    total: dict[str, Any] = {name: sum(s[name] for s in stages) for name in ("steps", "samples", "flops")}
    total["epochs"] = sum(s["epochs"] for s in stages) if samples else None
    total["memory_bytes"] = max(s["memory_bytes"]["total"] for s in stages)
    total["hours"] = sum(s["hours"] for s in stages) if speed else None
    start = {"shape": shape_text(teacher)} | _sizes(teacher) if teacher else None
    return {"teacher": start, "devices": devices, "stages": stages, "total": total, "notes": notes + more}


def _speed_of(tflops: float, teacher: CLIPConfig | None, devices: int) -> Speed:
    def speed(stage: Stage, student: CLIPConfig) -> float:
        return tflops * 1e12 / (2 * step_macs(student, stage, teacher, -(-stage.batch_size // devices)))

    return speed


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
    # Steps with masks run at the size of the start, steps after the cut at the size of the student.
    masked = stage.batch_size * (stage.auto.steps if stage.auto else 0)
    phases = [(shapes.start, masked), (shapes.student, seen - masked)]
    if stage.calibrated:
        phases.append((shapes.start, stage.calibrated.batches * stage.batch_size))
    largest = shapes.start if shapes.learned else shapes.student
    dtype_bytes = 4 if recipe.precision == "float32" else 2
    pairs = -(-stage.batch_size // devices)
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
        "flops": sum(2 * n * step_macs(config, stage, teacher, pairs) for config, n in phases),
        "memory_bytes": memory(largest, stage, teacher, pairs, dtype_bytes),
        "hours": hours,
    }
