"""The model a stage starts from: sliced by rule, cut by importance, or randomly initialised."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tinyclip.common.distributed import from_main
from tinyclip.common.progress import Counted, ended
from tinyclip.compress.calibrate import WORK, Calibration, calibrate, telling
from tinyclip.compress.importance import Sample as Sample
from tinyclip.compress.inheritance import compact, inherit
from tinyclip.compress.latency import fraction_for_latency, pair_latency_ms, targets_for_latency
from tinyclip.compress.size import TOWERS, sparsity, thinner
from tinyclip.model.model import CLIP
from tinyclip.recipe.stage import Stage
from tinyclip.teachers.teacher import Teacher
from tinyclip.train.calibration_batches import calibration, samples
from tinyclip.train.pruner import already_gone, budgets
from tinyclip.train.run import Run, attention, closing, loader_of, preprocess_for, share
from tinyclip.zoo.checkpoint import load_checkpoint
from tinyclip.zoo.resolve import STATE, resolve


def starting_student(run: Run, i: int, previous: CLIP | None) -> CLIP:
    stage, recipe = run.recipe.stages[i], run.recipe
    torch.manual_seed(recipe.seed + i)
    from_teacher = stage.start == "teacher" or (stage.start == "previous" and previous is None)
    own = isinstance(run.teacher, Teacher)
    if (recipe.teacher is None and i == 0) or (from_teacher and not own):  # random weights, nothing to slice
        return CLIP(run.configs[i])
    base, state = _base(run, i, previous), run.folder / "stages" / stage.name / "last" / STATE
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if stage.inherit == "none":
            student = CLIP(stage.student.apply(base.config)).to(run.device)
        elif stage.inherit == "manual":
            student = inherit(base, stage.student.apply(base.config))
        elif stage.inherit == "calibrated" and not from_main(state.exists):
            student = calibrated_student(run, i, base)
        else:  # auto is cut later; a resumed calibrated stage is already cut in its checkpoint
            student = compact(base, {})
    for warning in caught:
        run.warn(stage, str(warning.message))
    if stage.towers != "both":
        assert isinstance(run.teacher, Teacher), "the recipe's validation asks for a live teacher here"
        _keep_tower(student, run.teacher.model, stage.towers)
    return student


def calibrated_student(run: Run, i: int, base: CLIP) -> CLIP:
    """Return the student of a stage with `inherit: calibrated`: the base, measured on the stage's data and cut."""
    pairs = share(run.recipe.stages[i])
    masks, batches = from_main(lambda: _measured_masks(run, i, base, pairs))
    kept = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    run.emit({"event": "cut", "stage": run.recipe.stages[i].name, "step": 0, "batches": batches, "kept": kept})
    return compact(compact(base, {}).eval(), {name: mask.to(run.device) for name, mask in masks.items()})


@contextmanager
def _measuring(run: Run, i: int, base: CLIP, pairs: int) -> Iterator[tuple[CLIP, Counted[Sample]]]:
    """Yield a copy of the base to measure, and the batches to measure on."""
    loader, model = loader_of(run, i, pairs=pairs), compact(base, {}).eval()
    source = samples(loader, run.recipe.data, model, run.tokenizer, preprocess_for(run, base))
    with attention(run.device), closing(loader):
        yield model, Counted(source)


def _measured_masks(run: Run, i: int, base: CLIP, pairs: int) -> tuple[dict[str, Tensor], int]:
    """Return the measured masks, on the CPU since they may go to other processes, and the number of batches used."""
    stage = run.recipe.stages[i]
    settings = stage.calibrated
    assert settings is not None, "the caller checks"
    targets = budgets(settings, stage.towers)
    how = calibration(settings, run.original, _scale(run, stage), run.recipe.seed + i)
    with _measuring(run, i, base, pairs) as (model, source):
        if targets is None:
            assert settings.latency_ms is not None, "the recipe's validation asks for one of the two"
            towers = TOWERS[stage.towers]
            targets, removed = targets_for_latency(model, source, settings.latency_ms, towers, how)
            figures = {"latency_ms": settings.latency_ms, "macs_removed": removed}
            run.emit({"event": "latency", "stage": stage.name} | figures)
        left = {}
        for name, target in targets.items():
            gone = how.sparsity(model.config, {}, name)
            if gone < target:
                left[name] = target
            else:
                run.warn(stage, already_gone(gone, target))
        masks = calibrate(model, source, left, how) if left else {}
    return {name: mask.cpu() for name, mask in masks.items()}, source.count


def measured_importance(run: Run, i: int, student: CLIP, sizes: Mapping[str, int], batches: int) -> dict[str, Tensor]:
    """Return the importance of the elements of these axes, on the CPU; the first process measures."""
    pairs = share(run.recipe.stages[i])

    def measured() -> dict[str, Tensor]:
        how = Calibration(_scale(run, run.recipe.stages[i]))
        masks = {name: torch.ones(size) for name, size in sizes.items()}
        with _measuring(run, i, student, pairs) as (model, source):
            found = how.measure(model, telling(source, 0, batches, batches), masks, run.recipe.seed + i)
        ended(WORK)
        return {name: value.cpu() for name, value in found.items()}

    return from_main(measured)


def _scale(run: Run, stage: Stage) -> float:
    """Return exp(logit_scale) of the affinity that importance is measured with."""
    assert run.teacher is not None, "the recipe's validation asks for a teacher here"
    return float(run.teacher.scale) if stage.loss.teacher_scale == "teacher" else stage.loss.teacher_scale


def _base(run: Run, i: int, previous: CLIP | None) -> CLIP:
    """Return the model that a stage starts from; the caller must not change it."""
    stage = run.recipe.stages[i]
    if stage.start == "previous" and previous is not None:
        return previous
    if stage.start in ("previous", "teacher"):
        assert isinstance(run.teacher, Teacher), "the recipe's validation asks for a live teacher here"
        return run.teacher.model
    return load_checkpoint(resolve(stage.start))[0].to(run.device)


@torch.no_grad()
def _keep_tower(student: CLIP, teacher: CLIP, towers: str) -> None:
    """Copy the teacher's weights into the tower of the student that the stage does not train."""
    own = student.state_dict()
    for key, value in teacher.state_dict().items():
        if key != "logit_scale" and key.startswith("visual.") != (towers == "image"):
            own[key].copy_(value)


def mask_targets(run: Run, stage: Stage, student: CLIP) -> dict[str, float]:
    assert stage.auto is not None and run.teacher is not None, "the recipe's validation asks for both here"
    targets = budgets(stage.auto, stage.towers)
    if targets is not None:
        return targets
    assert stage.auto.latency_ms is not None, "the recipe's validation asks for one of the two"
    config, towers = student.config, TOWERS[stage.towers]

    def latency_ms(removed: float) -> float:
        return pair_latency_ms(CLIP(thinner(config, removed, towers)).eval().to(run.device))

    goal = stage.auto.latency_ms
    removed = from_main(lambda: fraction_for_latency(latency_ms, goal))
    run.emit({"event": "latency", "stage": stage.name, "latency_ms": goal, "macs_removed": removed})
    start = sparsity(config, run.original, {}, towers, "macs").item()
    return {"both" if stage.towers == "both" else towers[0]: start + (1 - start) * removed}
