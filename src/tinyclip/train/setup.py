"""Prepare a run: check everything that can be checked before the first step, and create the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from tinyclip.common import ownership
from tinyclip.common.devices import best_precision, resolve_device
from tinyclip.common.distributed import from_main, rank, world_size
from tinyclip.common.faults import append
from tinyclip.common.files import write_atomically
from tinyclip.common.locks import LOCK, Lock, lock_of, take
from tinyclip.common.watchdog import Watchdog
from tinyclip.compress.inheritance import manual_masks
from tinyclip.compress.learned_masks import HardConcrete, check_targets
from tinyclip.compress.size import TOWERS
from tinyclip.data.shard_index import check_readers, known_faults, prepare
from tinyclip.data.shards import all_captions
from tinyclip.evaluate import metrics
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.tokenizer import CLIPTokenizer, clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig, ResNetConfig, VisionConfig
from tinyclip.recipe.recipe import Recipe, recipe_of
from tinyclip.recipe.stage import Stage
from tinyclip.teachers.cache import Cache, open_caches
from tinyclip.teachers.foreign import load_teacher, local_part
from tinyclip.teachers.teacher import AnyTeacher, CachedTeacher, Teacher
from tinyclip.train.calibration_batches import calibration
from tinyclip.train.pruner import budgets
from tinyclip.train.run import Run
from tinyclip.train.student import check_compiler
from tinyclip.train.tracking import check_trackers
from tinyclip.zoo.checkpoint import load_checkpoint, read_config, read_tokenizer
from tinyclip.zoo.openai import own_tokenizer
from tinyclip.zoo.resolve import resolve

# Recipe keys that may change when a run is resumed.
FREE_TO_CHANGE = (
    *("description", "device", "keep", "log_every", "project", "save_every", "save_minutes", "stall_minutes"),
    *("tracking", "workers"),
)
FREE_IN_STAGES = ("micro_batch", "grad_checkpointing", "compile")
PATIENCE = 30.0  # seconds to wait for the processes of a killed run to end; each may be in a long step


def start(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> Run:
    """Check everything that can be checked before the first step, and create the run's folder.

    Under torchrun all processes call this.

    Raises:
        ValueError: if the folder exists or is in use by another run, data is missing, a student does not fit its
            start, or a batch cannot be divided among the processes.
    """
    for i, stage in enumerate(recipe.stages):
        if stage.batch_size % world_size():
            raise ValueError(
                f"stages.{i}.batch_size: {stage.batch_size} is not a multiple of the {world_size()} processes"
            )
    check_trackers(recipe)
    samples = from_main(lambda: prepare(recipe.data, keep=resume))
    for i, stage in enumerate(recipe.stages):
        if stage.batch_size > samples:
            raise ValueError(
                f"stages.{i}.batch_size: {stage.batch_size} exceeds the {samples} samples of {recipe.data}"
            )
    from_main(lambda: check_readers(recipe.data, recipe.workers, world_size()))
    device = resolve_device(recipe.device)
    precision = best_precision(device) if recipe.precision == "auto" else recipe.precision
    caches = open_caches(recipe.caches, recipe.data)
    teacher, (config, tokenizer, preprocess) = _origin(recipe, caches, device)
    if any(stage.compile for stage in recipe.stages):
        check_compiler(device)
    configs = plan(recipe, config, device)
    _check_vocabularies(recipe, tokenizer)
    if caches:
        _check_views(recipe, configs, caches[0])
    folder = Path(recipe.output)
    lock = lock_of(folder, PATIENCE)
    from_main(lambda: _open_folder(lock, folder, recipe, overwrite, resume))
    if not (folder / "recipe.yaml").exists():
        raise ValueError(f"{folder}: process {rank()} does not see it; it must be on a disk that all nodes share")
    who = f"process {rank()} of {world_size()}: " if world_size() > 1 else ""
    watchdog = Watchdog(recipe.stall_minutes, who)
    shapes = config, configs, tokenizer, preprocess
    return Run(recipe, folder, teacher, *shapes, device, precision, lock, caches=caches, watchdog=watchdog)


def _origin(
    recipe: Recipe, caches: Sequence[Cache], device: torch.device
) -> tuple[AnyTeacher | None, tuple[CLIPConfig, CLIPTokenizer, Preprocess]]:
    """Return the teacher, if there is one, and what the first student's shape is relative to."""
    if caches:
        first = caches[0]
        scales = [torch.tensor(cache.info.scale, device=device) for cache in caches]
        kind = first.info.foreign.kind if first.info.foreign is not None else None
        return CachedTeacher(first.embed_dim, scales), _first_start(recipe, kind) if kind else first.own
    if recipe.teacher is not None:
        assert isinstance(recipe.teacher, str), "a teacher is a checkpoint or a cache"
        try:
            loaded = load_teacher(recipe.teacher, device)
        except ValueError as error:
            raise ValueError(f"teacher: {error}") from None
        if not isinstance(loaded, Pipeline):  # no student can inherit from it
            return loaded, _first_start(recipe, loaded.kind)
        own = loaded.model.config, loaded.tokenizer, loaded.preprocessing
        return Teacher(loaded.model, loaded.preprocessing), own
    assert recipe.model is not None, "the recipe's validation asks for a teacher or a model"
    tokenizer = _vocabulary(recipe, recipe.model.text.context_length)
    text = recipe.model.text.model_copy(update={"vocab_size": tokenizer.vocab_size})
    config = recipe.model.model_copy(update={"text": text})
    return None, (config, tokenizer, Preprocess(image_size=config.vision.image_size))


def _first_start(recipe: Recipe, kind: str) -> tuple[CLIPConfig, CLIPTokenizer, Preprocess]:
    """Return the start of a run whose teacher provides no weights: the checkpoint that the first stage names, else the
    shape it gives, with CLIP's tokenizer.

    Raises:
        ValueError: if a stage needs the teacher's weights.
    """
    for i, stage in enumerate(recipe.stages):
        if stage.towers != "both":
            raise ValueError(f"stages.{i}.towers: the other tower would be copied from the teacher, which is {kind}")
        if stage.start != "teacher" and (stage.start != "previous" or i > 0):
            continue
        if stage.inherit != "none":
            raise ValueError(
                f"stages.{i}.inherit: {stage.inherit} needs a CLIP to inherit from, and the teacher is {kind}; name a "
                "checkpoint with `start`, or use `inherit: none` with `student: {like: NAME}`"
            )
        if stage.student.like is None:
            raise ValueError(
                f"stages.{i}.student: give the whole shape with `like: NAME`, since the teacher, {kind}, has no "
                "shape to be relative to"
            )
    start, like = recipe.stages[0].start, recipe.stages[0].student.like
    if start not in ("previous", "teacher"):
        model, tokenizer, preprocess = load_checkpoint(resolve(start))
        return model.config, tokenizer, preprocess
    assert like is not None, "checked above"
    return like, own_tokenizer(like, "stages.0.student.like"), Preprocess(image_size=like.vision.image_size)


def plan(recipe: Recipe, first: CLIPConfig, device: torch.device) -> list[CLIPConfig]:
    """Return the config of every stage's student, checked against the model it inherits from.

    Raises:
        ValueError: if a stage does not fit; the message names the stage.
    """
    configs: list[CLIPConfig] = []
    for i, stage in enumerate(recipe.stages):
        try:
            if stage.start not in ("previous", "teacher"):
                base = read_config(resolve(stage.start))
            else:
                base = configs[-1] if stage.start == "previous" and configs else first
            config = stage.student.apply(base)  # auto and calibrated: the base, since the final shape is not known yet
            if stage.inherit == "manual":
                manual_masks(base, config)
            _check_towers(stage, base, config, first)
            if isinstance(config.vision, VisionConfig) and (stage.batch_norm or stage.batch_norm_batches):
                raise ValueError("batch_norm: a ViT has no batch norm; leave the key out")
            if isinstance(config.vision, ResNetConfig) and not stage.freezes_batch_norm:
                _check_batch_norm(stage, device)
            if config.text.vocab_size != first.text.vocab_size:
                sizes = f"{config.text.vocab_size} tokens, the teacher's {first.text.vocab_size}"
                raise ValueError(f"the student's vocabulary has {sizes}; they must be the same")
        except ValueError as error:
            raise ValueError(f"stages.{i} ({stage.name}): {error}") from None
        configs.append(config)
    return configs


def _check_vocabularies(recipe: Recipe, tokenizer: CLIPTokenizer) -> None:
    """Check that every stage starts with the run's vocabulary."""
    for i, stage in enumerate(recipe.stages):
        named = stage.start not in ("previous", "teacher")
        if named and read_tokenizer(resolve(stage.start)).merges != tokenizer.merges:
            raise ValueError(f"stages.{i}.start: {stage.start} has a different vocabulary from the teacher")


def _check_towers(stage: Stage, base: CLIPConfig, student: CLIPConfig, teacher: CLIPConfig) -> None:
    """Fail early if a tower that must stay the teacher's differs, or if masks cannot reach their targets."""
    kept = {"image": ("text",), "text": ("vision",), "both": ()}[stage.towers]
    for name in kept:
        if getattr(student, name) != getattr(base, name) or student.embed_dim != base.embed_dim:
            raise ValueError(f"towers: {stage.towers} leaves the {name} tower as it is, but the student's differs")
        if getattr(base, name) != getattr(teacher, name) or base.embed_dim != teacher.embed_dim:
            raise ValueError(f"towers: {stage.towers} needs a start whose {name} tower is still the teacher's")
        if len({student.activation, base.activation, teacher.activation}) > 1:
            raise ValueError(f"towers: {stage.towers} keeps the teacher's activation, {teacher.activation}")
    if stage.auto is not None:
        auto = stage.auto
        hard = HardConcrete(base, teacher, towers=TOWERS[stage.towers], gates=auto.gates, unit=auto.counted)
        check_targets(hard, budgets(auto, stage.towers) or {})
    if stage.calibrated is not None:
        calibration(stage.calibrated, teacher).check(base, budgets(stage.calibrated, stage.towers) or {})


def _check_batch_norm(stage: Stage, device: torch.device) -> None:
    """Fail early if trained batch norm would not see the whole batch."""
    for key in ("micro_batch", "grad_checkpointing"):
        if getattr(stage, key):
            raise ValueError(f"{key}: this stage trains batch norm, which must see the whole batch once; leave it out")
    if world_size() > 1 and device.type != "cuda":
        raise ValueError("batch_norm: processes without GPUs cannot share batch statistics; train in one process")


def _check_views(recipe: Recipe, configs: list[CLIPConfig], cache: Cache) -> None:
    """Check that the cached views match the augmentation and image size of every stage."""
    for i, (stage, config) in enumerate(zip(recipe.stages, configs, strict=True)):
        for name, stored in cache.info.augment:
            if getattr(stage.augment, name) != stored:
                raise ValueError(
                    f"stages.{i}.augment.{name}: {getattr(stage.augment, name)}, but the views of {cache.folder} have "
                    f"{stored}; use that, or make a cache with `tinyclip cache --recipe`"
                )
        if config.vision.image_size > cache.info.image_size:
            raise ValueError(
                f"stages.{i} ({stage.name}): the student sees {config.vision.image_size} px, but the views of "
                f"{cache.folder} have {cache.info.image_size}; make a cache with `tinyclip cache --recipe`"
            )


def _vocabulary(recipe: Recipe, context_length: int) -> CLIPTokenizer:
    tokenizer = clip_tokenizer()
    merges = tokenizer.merges
    if recipe.vocabulary == "data":
        merges = from_main(lambda: tokenizer.pruned(tokenizer.kept_ids(all_captions(recipe.data))).merges)
    return CLIPTokenizer(merges, context_length)


def _open_folder(lock: Lock, folder: Path, recipe: Recipe, overwrite: bool, resume: bool) -> None:
    """Write the recipe into the run's folder, taking the folder's lock before the first change."""
    if overwrite and resume:
        raise ValueError("give either --overwrite or --resume")
    try:
        _check_folder(folder, recipe, overwrite, resume)  # before taking the lock: a refused run leaves no trace
        take(lock, "tinyclip distill")
        _check_folder(folder, recipe, overwrite, resume)  # again: another run may have held the lock until now
        if overwrite:
            ownership.remove(folder, "run", keep=ownership.LOCKS)
        ownership.claim(folder, "run", _written(recipe))
        write_atomically(folder / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        if not resume:  # bad samples are logged when they come up
            append(folder / "skipped.jsonl", (s for s in known_faults(recipe.data) if not s.key))
    except OSError as error:
        lock.release()
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None
    except ValueError:
        lock.release()
        raise


def _check_folder(folder: Path, recipe: Recipe, overwrite: bool, resume: bool) -> None:
    """Check that the run may use the folder in its current state."""
    settings, known = recipe.model_dump(mode="json"), folder / "recipe.yaml"
    if resume:
        if not known.exists() or not _is_run(folder):
            raise ValueError(f"{folder}: no run to resume")
        before = recipe_of(folder).model_dump(mode="json")
        fixed = [k for k in settings if k not in FREE_TO_CHANGE]
        changed = [name for k in fixed for name in _differences(k, _fixed(before, k), _fixed(settings, k))]
        if changed:
            raise ValueError(f"{folder} was started from a different recipe; the difference is in {', '.join(changed)}")
    elif not ownership.is_free(folder):
        if not overwrite:
            raise ValueError(f"{folder} exists; continue it with --resume or replace it with --overwrite")
        _check_replaceable(folder, recipe)


def _is_run(folder: Path) -> bool:
    """Whether a folder with a `recipe.yaml` is a run, possibly from an older tinyclip that wrote no markers."""
    marker = ownership.read_marker(folder)
    if marker is not None:
        return marker.kind == "run"
    return any((folder / name).exists() for name in (LOCK, "metrics.jsonl", "stages"))


def _written(recipe: Recipe) -> list[str]:
    """Return the paths a run writes in its folder; those with their own marker end in `/`."""
    files = ["recipe.yaml", "metrics.jsonl", "skipped.jsonl", "tracking.json", "report.html", "student/"]
    for stage in recipe.stages:
        files += [f"stages/{stage.name}/{name}" for name in ("result.json", "last/", "best/")]
    return files


def _fixed(settings: dict[str, Any], key: str) -> Any:
    """Return the part of a setting that a resumed run may not change."""
    value = settings.get(key)
    if key == "stages" and isinstance(value, list) and all(isinstance(stage, dict) for stage in value):
        return [{k: v for k, v in stage.items() if k not in FREE_IN_STAGES} for stage in value]
    return value


def _differences(key: str, one: Any, two: Any) -> list[str]:
    """Return the dotted names of the settings that differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        return [name for k in {**one, **two} for name in _differences(f"{key}.{k}", one.get(k), two.get(k))]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return [name for i, values in pairs for name in _differences(f"{key}.{i}", *values)]
    return [key] if one != two else []


def _check_replaceable(folder: Path, recipe: Recipe) -> None:
    """Refuse to overwrite a folder that is not a run, or that holds inputs of this run."""
    ownership.check_replaceable(folder, "run")
    evaluation = (recipe.evaluation.data, recipe.evaluation.templates) if recipe.evaluation else ()
    teacher = recipe.caches or ((local_part(str(recipe.teacher)),) if recipe.teacher is not None else ())
    for source in (*teacher, recipe.data, *evaluation, *(stage.start for stage in recipe.stages)):
        if source is not None and Path(source).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{source} is inside {folder}, which --overwrite would delete")


def evaluator(data: str, templates: str | None) -> Any:
    """Return the function the training loop calls to evaluate a student."""
    dataset = metrics.open_dataset(data, templates)
    return lambda model, tokenizer, preprocess: metrics.evaluate(Pipeline(model, tokenizer, preprocess), dataset)
