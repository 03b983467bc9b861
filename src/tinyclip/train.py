"""One training loop, for teachers and students alike; a run is a few stages of it.

A run's folder:

    recipe.yaml                 what is run
    metrics.jsonl               one line a log or evaluation
    skipped.jsonl               samples that were left out: shard, key, reason
    stages/NAME/last, best      checkpoints (`last` carries state.pt to resume from until the stage is done)
    stages/NAME/result.json     written when the stage is done
    student                     the last stage's result
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyclip.batch_norm import batch_norms, reestimate, synchronise
from tinyclip.calibrate import Calibration, calibrate, targets_for_latency
from tinyclip.checkpoint import load_checkpoint, read_config, save_into
from tinyclip.config import CLIPConfig, VisionConfig
from tinyclip.data import all_captions, close_loader, next_batch, prepare, training_loader
from tinyclip.distributed import best_precision, resolve_device
from tinyclip.files import atomic_directory, write_atomically
from tinyclip.inheritance import compact, inherit, manual_masks
from tinyclip.masks import HardConcrete, check_targets, sparsity
from tinyclip.measurement import fraction_for_latency, pair_latency_ms
from tinyclip.model import CLIP
from tinyclip.pruning import MASKS, TOWERS, Pruner, budgets, saved_targets, thinner
from tinyclip.recipe import Recipe, Stage
from tinyclip.resume import STATE, Interrupted, Progress, forget_metrics, restore, save, saved_step, stop_signals
from tinyclip.samples import samples
from tinyclip.step import Trainee
from tinyclip.teacher import Teacher, image_input
from tinyclip.tokenizer import CLIPTokenizer, clip_tokenizer
from tinyclip.transforms import Preprocess
from tinyclip.zoo import resolve

Evaluator = Callable[[CLIP, CLIPTokenizer, Preprocess], dict[str, Any]]
Listener = Callable[[dict[str, Any]], None]
# A resumed run may differ in these from the one that was started.
FREE_TO_CHANGE = ("description", "device", "log_every", "save_every")


@dataclass
class Run:
    """What a run needs at hand; made by `start`, used up by `run`."""

    recipe: Recipe
    folder: Path
    teacher: Teacher | None
    configs: list[CLIPConfig]
    tokenizer: CLIPTokenizer
    preprocess: Preprocess
    device: torch.device
    precision: str
    evaluator: Evaluator | None = None
    listener: Listener = field(default=lambda event: None)

    def emit(self, event: dict[str, Any]) -> None:
        """To metrics.jsonl and to the listener."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(event) + "\n")
        self.listener(event)


def start(recipe: Recipe, *, overwrite: bool = False, resume: bool = False) -> Run:
    """Check everything that can be checked before the first step, and make the run's folder.

    Raises:
        ValueError: for a folder that exists, data that is missing, or a student that does not fit its start.
    """
    samples = prepare(recipe.data)
    for i, stage in enumerate(recipe.stages):
        if stage.batch_size > samples:
            raise ValueError(
                f"stages.{i}.batch_size: {stage.batch_size} exceeds the {samples} samples of {recipe.data}"
            )
    device = resolve_device(recipe.device)
    precision = best_precision(device) if recipe.precision == "auto" else recipe.precision
    teacher = None
    if recipe.teacher is not None:
        model, tokenizer, preprocess = load_checkpoint(resolve(recipe.teacher))
        teacher = Teacher(model.to(device), preprocess)
        config = model.config
    else:
        assert recipe.model is not None, "the recipe's validation asks for a teacher or a model"
        tokenizer = _vocabulary(recipe, recipe.model.text.context_length)
        text = recipe.model.text.model_copy(update={"vocab_size": tokenizer.vocab_size})
        config = recipe.model.model_copy(update={"text": text})
        preprocess = Preprocess(image_size=config.vision.image_size)
    configs = plan(recipe, config)
    folder = Path(recipe.output)
    _open_folder(folder, recipe, overwrite, resume)
    return Run(recipe, folder, teacher, configs, tokenizer, preprocess, device, precision)


def plan(recipe: Recipe, first: CLIPConfig) -> list[CLIPConfig]:
    """The config of every stage's student, checked against what it inherits from.

    Raises:
        ValueError: naming the stage that does not fit.
    """
    configs: list[CLIPConfig] = []
    for i, stage in enumerate(recipe.stages):
        try:
            if stage.start not in ("previous", "teacher"):
                base = read_config(resolve(stage.start))
            else:
                base = configs[-1] if stage.start == "previous" and configs else first
            config = stage.student.apply(base)  # for auto and calibrated, whose shape is yet to be found, the base
            if stage.inherit == "manual":
                manual_masks(base, config)
            _check_towers(stage, base, first)
            if isinstance(config.vision, VisionConfig) and (stage.batch_norm or stage.batch_norm_batches):
                raise ValueError("batch_norm: a ViT has none; leave the key out")
            if config.text.vocab_size != first.text.vocab_size:
                sizes = f"{config.text.vocab_size} tokens, not {first.text.vocab_size}"
                raise ValueError(f"the student's vocabulary has {sizes} as the teacher's")
        except ValueError as error:
            raise ValueError(f"stages.{i} ({stage.name}): {error}") from None
        configs.append(config)
    return configs


def _check_towers(stage: Stage, base: CLIPConfig, teacher: CLIPConfig) -> None:
    """Early errors for a tower that is to stay the teacher's, and for masks that cannot do what is asked."""
    kept = {"image": ("text",), "text": ("vision",), "both": ()}[stage.towers]
    for name in kept:
        if getattr(base, name) != getattr(teacher, name) or base.embed_dim != teacher.embed_dim:
            raise ValueError(f"towers: {stage.towers} needs a start whose {name} tower is still the teacher's")
    if stage.auto is not None:
        auto = stage.auto
        hard = HardConcrete(base, teacher, towers=TOWERS[stage.towers], gates=auto.gates, unit=auto.counted)
        check_targets(hard, budgets(auto, stage.towers) or {})
    if stage.calibrated is not None:
        Calibration.of(stage.calibrated, teacher).check(base, budgets(stage.calibrated, stage.towers) or {})


def _vocabulary(recipe: Recipe, context_length: int) -> CLIPTokenizer:
    tokenizer = clip_tokenizer()
    if recipe.vocabulary == "data":
        tokenizer = tokenizer.pruned(tokenizer.kept_ids(all_captions(recipe.data)))
    return CLIPTokenizer(tokenizer.merges, context_length)


def _open_folder(folder: Path, recipe: Recipe, overwrite: bool, resume: bool) -> None:
    settings, known = recipe.model_dump(mode="json"), folder / "recipe.yaml"
    if overwrite and resume:
        raise ValueError("give either --overwrite or --resume")
    try:
        if resume:
            if not known.exists():
                raise ValueError(f"{folder}: no run to resume")
            before = yaml.safe_load(known.read_text(encoding="utf-8"))
            changed = [k for k in settings if settings[k] != before.get(k) and k not in FREE_TO_CHANGE]
            if changed:
                raise ValueError(f"{folder} was started from another recipe, which differs in {', '.join(changed)}")
        elif folder.exists() and any(folder.iterdir()):
            if not overwrite:
                raise ValueError(f"{folder} exists; continue it with --resume or replace it with --overwrite")
            _check_replaceable(folder, recipe)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(known, yaml.safe_dump(settings, sort_keys=False))
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None


def _check_replaceable(folder: Path, recipe: Recipe) -> None:
    """Refuse to delete what is no run, or what this run reads."""
    if not (folder / "recipe.yaml").exists():
        raise ValueError(f"{folder} is no run of tinyclip; remove it by hand or choose another output")
    evaluation = recipe.evaluation.data if recipe.evaluation else None
    for source in (recipe.teacher, recipe.data, evaluation, *(stage.start for stage in recipe.stages)):
        if source is not None and Path(source).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{source} lies in {folder}, which --overwrite would delete")


def run(run: Run) -> list[dict[str, Any]]:
    """Train every stage that is not done yet; returns each stage's result.

    Raises:
        ValueError: for a loss that is not finite, or data of which too much is bad; the last checkpoint is kept.
        Interrupted: after SIGINT or SIGTERM, the state saved.
    """
    results = []
    student: CLIP | None = None
    for i, stage in enumerate(run.recipe.stages):
        folder = run.folder / "stages" / stage.name
        if (folder / "result.json").exists():
            student = load_checkpoint(folder / "last")[0]
            results.append(json.loads((folder / "result.json").read_text(encoding="utf-8")))
            continue
        _announce(run, i, saved_step(folder / "last"))
        student = _starting_student(run, i, student)
        student, result = _train_stage(run, i, student.to(run.device), folder)
        results.append(result)
    assert student is not None
    with atomic_directory(run.folder / "student") as place:
        dtype = getattr(torch, run.recipe.save_dtype)
        save_into(place, student, run.tokenizer, _preprocess_for(run, student), dtype)
    return results


def _announce(run: Run, i: int, step: int) -> None:
    """Say that a stage begins, or goes on after a step; what it logged after that is about to be done again."""
    stage = run.recipe.stages[i]
    forget_metrics(run.folder / "metrics.jsonl", stage.name, step)
    event = {"event": "stage", "stage": stage.name, "index": i, "steps": stage.steps}
    (run.listener if step else run.emit)(event)
    if step:
        run.emit({"event": "resumed", "stage": stage.name, "step": step})


def _starting_student(run: Run, i: int, previous: CLIP | None) -> CLIP:
    stage, recipe = run.recipe.stages[i], run.recipe
    torch.manual_seed(recipe.seed + i)
    if recipe.teacher is None and i == 0:
        return CLIP(run.configs[i])
    base = _base(run, i, previous)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if stage.inherit == "none":
            student = CLIP(stage.student.apply(base.config)).to(run.device)
        elif stage.inherit == "manual":
            student = inherit(base, stage.student.apply(base.config))
        elif stage.inherit == "calibrated" and not (run.folder / "stages" / stage.name / "last" / STATE).exists():
            student = calibrated_student(run, i, base)
        else:  # auto cuts it later; a calibrated one that is resumed is already cut in its checkpoint
            student = compact(base, {})
    for warning in caught:
        run.emit({"event": "warning", "stage": stage.name, "text": str(warning.message)})
    if stage.towers != "both":
        assert run.teacher is not None, "the recipe's validation asks for a teacher here"
        _keep_tower(student, run.teacher.model, stage.towers)
    return student


def calibrated_student(run: Run, i: int, base: CLIP) -> CLIP:
    """The student of a stage with `inherit: calibrated`: the base, measured on the stage's data and cut."""
    stage = run.recipe.stages[i]
    settings, preprocess = stage.calibrated, _preprocess_for(run, base)
    assert settings is not None and run.teacher is not None, "the recipe's validation asks for both here"
    scale = run.teacher.scale.item() if stage.loss.teacher_scale == "teacher" else stage.loss.teacher_scale
    model, targets, loader = compact(base, {}).eval(), budgets(settings, stage.towers), _loader(run, i)
    source = samples(loader, run.recipe.data, model, run.tokenizer, preprocess)
    how = Calibration.of(settings, run.teacher.model.config, float(scale), run.recipe.seed + i)
    with attention(run.device), _closing(loader):
        if targets is None:
            assert settings.latency_ms is not None, "the recipe's validation asks for one of the two"
            towers = TOWERS[stage.towers]
            targets, removed = targets_for_latency(model, source, settings.latency_ms, towers, how)
            figures = {"latency_ms": settings.latency_ms, "macs_removed": removed}
            run.emit({"event": "latency", "stage": stage.name} | figures)
        masks = calibrate(model, source, targets, how)
    kept = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    run.emit({"event": "cut", "stage": stage.name, "step": 0, "kept": kept})
    return compact(model, masks)


def _base(run: Run, i: int, previous: CLIP | None) -> CLIP:
    """The model that a stage starts from; the caller must not change it."""
    stage = run.recipe.stages[i]
    if stage.start == "previous" and previous is not None:
        return previous
    if stage.start in ("previous", "teacher"):
        assert run.teacher is not None, "the recipe's validation asks for a teacher here"
        return run.teacher.model
    base, tokenizer, _ = load_checkpoint(resolve(stage.start))
    if tokenizer.merges != run.tokenizer.merges:
        raise ValueError(f"stages.{i}.start: {stage.start} has another vocabulary than the teacher")
    return base.to(run.device)


@torch.no_grad()
def _keep_tower(student: CLIP, teacher: CLIP, towers: str) -> None:
    """Give the student the teacher's own weights in the tower that is left alone."""
    own = student.state_dict()
    for key, value in teacher.state_dict().items():
        if key != "logit_scale" and key.startswith("visual.") != (towers == "image"):
            own[key].copy_(value)


def _preprocess_for(run: Run, model: CLIP) -> Preprocess:
    return run.preprocess.model_copy(update={"image_size": model.config.vision.image_size})


# --- one stage --------------------------------------------------------------------------------------------------


def _train_stage(run: Run, i: int, student: CLIP, folder: Path) -> tuple[CLIP, dict[str, Any]]:
    stage, last = run.recipe.stages[i], folder / "last"
    if stage.auto is not None and not _is_cut(last):
        _learn_masks(run, i, student, folder)
    resumed = (last / STATE).exists()
    if resumed:
        student = load_checkpoint(last)[0].to(run.device)
    synchronise(student, run.device)
    trainee = Trainee(student, stage, run.teacher, run.tokenizer, _preprocess_for(run, student), run.precision)
    if not resumed and stage.freezes_batch_norm and stage.towers != "text" and batch_norms(student):
        _reestimate(run, i, trainee)
    progress = _loop(run, i, trainee, folder, stage.steps)
    _evaluate(run, trainee, progress, folder)
    result = {"stage": stage.name, "steps": stage.steps, "samples": progress.samples, "skipped": progress.skipped}
    result |= {"seconds": progress.seconds, "best_step": progress.best_step, "evaluation": progress.evaluation}
    write_atomically(folder / "result.json", json.dumps(result, indent=2) + "\n")
    (last / STATE).unlink()  # only now is it of no use
    return student.eval(), result


def _is_cut(last: Path) -> bool:
    """Whether an auto stage's masks have already been folded into its student."""
    return (last / STATE).exists() and not (last / MASKS).exists()


def _learn_masks(run: Run, i: int, student: CLIP, folder: Path) -> None:
    """The first part of an auto stage; leaves the cut student in `last`, ready for the second."""
    stage, last = run.recipe.stages[i], folder / "last"
    assert stage.auto is not None and run.teacher is not None, "the recipe's validation asks for both here"
    targets = saved_targets(last) if (last / MASKS).exists() else _targets(run, stage, student)
    pruner = Pruner(student.config, run.teacher.model.config, stage, targets, run.recipe.seed + i, run.device)
    for name, start in pruner.constraint.start.items():
        if start >= targets[name]:  # a stage before may overshoot, since the constraint is one-sided
            text = f"{start:.3f} of the original teacher is gone already, target_sparsity {targets[name]:.3f} adds none"
            run.emit({"event": "warning", "stage": stage.name, "text": text})
    trainee = Trainee(student, stage, run.teacher, run.tokenizer, _preprocess_for(run, student), run.precision, pruner)
    progress = _loop(run, i, trainee, folder, stage.auto.steps)
    cut = pruner.cut(student)
    figures = pruner.figures(progress.step)
    run.emit({"event": "cut", "stage": stage.name, "step": progress.step} | figures)
    # From here on it is a student like any other, with a new optimiser.
    after = Trainee(cut, stage, run.teacher, run.tokenizer, trainee.preprocess, run.precision)
    after.projections.load_state_dict(trainee.projections.state_dict())
    loader = _loader(run, i, cut=True)
    save(last, after, loader, progress)
    close_loader(loader)


def _targets(run: Run, stage: Stage, student: CLIP) -> dict[str, float]:
    assert stage.auto is not None and run.teacher is not None, "the recipe's validation asks for both here"
    targets = budgets(stage.auto, stage.towers)
    if targets is not None:
        return targets
    assert stage.auto.latency_ms is not None, "the recipe's validation asks for one of the two"
    config, towers = student.config, TOWERS[stage.towers]

    def latency_ms(removed: float) -> float:
        return pair_latency_ms(CLIP(thinner(config, removed, towers)).eval().to(run.device))

    removed = fraction_for_latency(latency_ms, stage.auto.latency_ms)
    run.emit({"event": "latency", "stage": stage.name, "latency_ms": stage.auto.latency_ms, "macs_removed": removed})
    start = sparsity(config, run.teacher.model.config, {}, towers, "macs").item()
    return {"both" if stage.towers == "both" else towers[0]: start + (1 - start) * removed}


def _loop(run: Run, i: int, trainee: Trainee, folder: Path, until: int) -> Progress:
    """Train until a step of the stage, from where its last checkpoint stands."""
    stage, every = trainee.stage, run.recipe.evaluation.every if run.recipe.evaluation else None
    cut = stage.auto is not None and trainee.pruner is None
    loader, progress, last = _loader(run, i, cut), Progress(), folder / "last"
    restore(last, trainee, loader, progress)
    batches = iter(loader)
    trainee.train()
    with stop_signals() as stop, attention(run.device), _closing(loader):
        while progress.step < until:
            batch = next_batch(batches, run.recipe.data)
            metrics = trainee.step(batch, progress.step)
            progress.advance(len(batch.keys), batch.skipped, run.folder / "skipped.jsonl")
            done = progress.step == until
            if progress.step % run.recipe.log_every == 0 or done:
                figures = {name: value.item() for name, value in metrics.items()} | progress.figures()
                figures |= trainee.pruner.figures(progress.step) if trainee.pruner else {}
                run.emit({"event": "step", "stage": stage.name, "step": progress.step} | figures)
            else:
                run.listener({"event": "tick", "stage": stage.name, "step": progress.step})
            evaluate = every is not None and progress.step % every == 0 and not done
            if stop or done or evaluate or progress.step % run.recipe.save_every == 0:
                save(last, trainee, loader, progress)
            if stop:
                raise Interrupted(stop[0], progress.step)
            if evaluate:
                _evaluate(run, trainee, progress, folder)
    return progress


def _reestimate(run: Run, i: int, trainee: Trainee) -> None:
    """Batch-norm statistics from the first batches of the stage's data. They come from a loader of their own, so
    that the training's starts at its first batch and a resumed run finds it where it was."""
    batches, loader = trainee.stage.batch_norm_batches or 20, _loader(run, i)
    with _closing(loader):
        chosen = (next_batch(source, run.recipe.data).images for source in [iter(loader)] * batches)
        reestimate(trainee.model, (image_input(images.to(run.device), trainee.preprocess) for images in chosen))
    run.emit({"event": "batch_norm", "stage": trainee.stage.name, "batches": batches})


def _loader(run: Run, i: int, cut: bool = False) -> Any:
    stage, config = run.recipe.stages[i], run.configs[i]
    teacher = run.teacher.model.config if run.teacher else config
    return training_loader(
        run.recipe.data,
        tokenizer=run.tokenizer,
        context_length=max(config.text.context_length, teacher.text.context_length),
        image_size=max(config.vision.image_size, teacher.vision.image_size),
        augment=stage.augment,
        batch_size=stage.batch_size,
        workers=run.recipe.workers,
        seed=run.recipe.seed + i + 1000 * cut,  # stages, and their parts, see the data in different orders
    )


def _evaluate(run: Run, trainee: Trainee, progress: Progress, folder: Path) -> None:
    if run.evaluator is None:
        return
    student = trainee.pruner.cut(trainee.model) if trainee.pruner else trainee.model
    progress.evaluation = run.evaluator(student.eval(), run.tokenizer, trainee.preprocess)
    trainee.train()
    event = {"event": "evaluation", "stage": trainee.stage.name, "step": progress.step}
    run.emit(event | progress.evaluation)
    score = progress.evaluation.get("acc1", progress.evaluation.get("image_retrieval_recall@1", 0.0))
    if score > progress.best_score and trainee.pruner is None:  # masks that still move make no student
        progress.best_score, progress.best_step = score, progress.step
        save(folder / "best", trainee)
    progress.pause()


@contextmanager
def _closing(loader: Any) -> Iterator[None]:
    """Stop the loader's workers at the end; a worker that died is an error for people."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        text = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{text}; go on from the last checkpoint with --resume") from None
    finally:
        close_loader(loader)


def attention(device: torch.device) -> AbstractContextManager[None]:
    """The attention kernel to train with. On CPUs the fused kernel's backward pass is the slower one
    (`benchmarks/attention.py`)."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    return context
