"""The training loop, shared by teachers and students; a run goes through it once per stage.

A run's folder:

    recipe.yaml                 the recipe of the run
    metrics.jsonl               one line per log entry or evaluation
    skipped.jsonl               skipped shards and samples: shard, key, cause, reason
    stages/NAME/last, best      checkpoints (`last` holds state.pt to resume from until the stage is done)
    stages/NAME/step-000100     checkpoints older than `last`, kept until the stage is done
    stages/NAME/result.json     written when the stage is done
    student                     the final student, from the last stage
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyclip.common.distributed import PATIENCE, from_main, gather_objects, is_main, world_size
from tinyclip.common.faults import Skipped
from tinyclip.common.files import json_text, read_json_object, write_atomically
from tinyclip.common.folders import remove_leftovers
from tinyclip.common.ownership import LOCKS, MARKER, claim, discard
from tinyclip.common.progress import track
from tinyclip.compress.batch_norm import batch_norms, reestimate, synchronise
from tinyclip.data.loader import close_loader, image_input, next_batch
from tinyclip.model.model import CLIP
from tinyclip.recipe.stage import Stage
from tinyclip.train import run_card
from tinyclip.train.pruner import MASKS, Pruner, already_gone, off_target, saved_targets
from tinyclip.train.resume import Clock, Interrupted, finish, forget_metrics, restore, save, settle, stop_signals
from tinyclip.train.run import Progress, Run, attention, closing, loader_of, preprocess_for, share
from tinyclip.train.setup import start as start
from tinyclip.train.stage_start import mask_targets, measured_importance, starting_student
from tinyclip.train.step import Trainee
from tinyclip.train.tracking import FOLDERS as TRACKED
from tinyclip.train.tracking import peak_memory_gb, tracked
from tinyclip.zoo import card
from tinyclip.zoo.checkpoint import FILES, load_checkpoint, read_config, save_checkpoint
from tinyclip.zoo.resolve import STATE

UNTRAINED = {"recipe.yaml", "metrics.jsonl", "skipped.jsonl", MARKER, *LOCKS, *TRACKED}  # in a run before its start
NEAR = 0.02  # how far masks may end from their target sparsity without a warning


def run(run: Run) -> list[dict[str, Any]]:
    """Train every stage that is not done yet and return each stage's result.

    Under torchrun all processes call this. Only the first one writes, evaluates and notifies the run's listener.

    Raises:
        ValueError: if the loss is not finite or too many samples are bad; earlier checkpoints are kept.
        Interrupted: after SIGINT or SIGTERM, once the state is saved.
    """
    try:
        from_main(lambda: remove_leftovers(run.folder))  # from a killed run
        with run.watchdog.watching(), tracked(run):
            return _run_stages(run)
    except ValueError:
        if is_main() and {entry.name for entry in run.folder.iterdir()} <= UNTRAINED:
            discard(run.folder)  # nothing was trained: leave the place free for a corrected recipe
        raise
    finally:
        run.lock.release()


def _run_stages(run: Run) -> list[dict[str, Any]]:
    results = []
    student: CLIP | None = None
    for i, stage in enumerate(run.recipe.stages):
        folder = run.folder / "stages" / stage.name
        if (result := from_main(lambda folder=folder: _result(folder))) is not None:  # type: ignore[misc]
            student = load_checkpoint(folder / "last")[0].to(run.device)
            results.append(result)
            from_main(lambda i=i, result=result: _describe(run, i, result))  # type: ignore[misc]
            continue
        from_main(lambda i=i, folder=folder: _announce(run, i, *settle(folder / "last")))  # type: ignore[misc]
        run.watchdog.doing(f"preparing stage {stage.name}", PATIENCE.total_seconds())
        student = starting_student(run, i, student)
        student, result = _train_stage(run, i, student.to(run.device), folder)
        results.append(result)
        from_main(lambda i=i, result=result: _describe(run, i, result))  # type: ignore[misc]
    assert student is not None
    dtype = getattr(torch, run.recipe.save_dtype)
    facts = run_card.of_run(run.recipe, len(results) - 1, results[-1]["evaluation"])
    arguments = student, run.tokenizer, preprocess_for(run, student), dtype, facts
    from_main(lambda: save_checkpoint(run.folder / "student", *arguments, known=FILES))
    return results


def _result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished stage, None if it is not finished."""
    if not (folder / "result.json").exists():
        return None
    finish(folder / "last")  # the run may have been killed before this
    return read_json_object(folder / "result.json")


def _describe(run: Run, i: int, result: dict[str, Any]) -> None:
    """Write the model card of a finished stage if it is missing; the run may have been killed before writing it."""
    place = run.folder / "stages" / run.recipe.stages[i].name / "last"
    if not (place / card.FILE).exists():
        claim(place, "model", [card.FILE])
        card.write_card(place, read_config(place), run_card.of_run(run.recipe, i, result["evaluation"]))


def _announce(run: Run, i: int, step: int, faults: list[str]) -> None:
    """Report that a stage starts, or resumes after a step; drop its log entries after that step, since those steps
    run again."""
    stage = run.recipe.stages[i]
    last = run.folder / "stages" / stage.name / "last"
    for log in ("metrics.jsonl", "skipped.jsonl"):
        forget_metrics(run.folder / log, stage.name, step, last)
    event = {"event": "stage", "stage": stage.name, "index": i, "steps": stage.steps}
    (run.listener if step else run.emit)(event)
    for fault in faults:
        run.warn(stage, fault)
    if step:
        run.emit({"event": "resumed", "stage": stage.name, "step": step})


# --- one stage --------------------------------------------------------------------------------------------------


def _train_stage(run: Run, i: int, student: CLIP, folder: Path) -> tuple[CLIP, dict[str, Any]]:
    stage, last = run.recipe.stages[i], folder / "last"
    # Only the first process looks: other nodes may see a stale view of a shared disk.
    resumed, masked = from_main(lambda: ((last / STATE).exists(), (last / MASKS).exists()))
    if stage.auto is not None and (masked or not resumed):
        trainee, progress = _learn_masks(run, i, student, folder, masked)
        progress = _loop(run, i, trainee, folder, stage.steps, progress)
    else:
        trainee = _begun(run, i, student, last, resumed)
        progress = _loop(run, i, trainee, folder, stage.steps)
    _evaluate(run, trainee, progress, folder)
    result = {"stage": stage.name, "steps": stage.steps, "samples": progress.samples} | progress.left_out()
    result |= {"seconds": progress.seconds, "best_step": progress.best_step, "evaluation": progress.evaluation}
    from_main(lambda: write_atomically(folder / "result.json", json_text(result, indent=2) + "\n"))
    from_main(lambda: finish(last))  # the state is needed up to here
    return trainee.model.eval(), result


def _begun(run: Run, i: int, student: CLIP, last: Path, resumed: bool) -> Trainee:
    """Return a trainee without masks, new or restored, ready for its next step."""
    stage = run.recipe.stages[i]
    if resumed:
        student = load_checkpoint(last)[0].to(run.device)
    if not stage.freezes_batch_norm:  # frozen statistics are measured by the first process only
        synchronise(student, run.device)
    trainee = Trainee(student, stage, run.teacher, run.tokenizer, preprocess_for(run, student), run.precision)
    if not resumed and stage.freezes_batch_norm and stage.towers != "text" and batch_norms(student):
        _reestimate(run, i, trainee)
    return trainee


def _learn_masks(run: Run, i: int, student: CLIP, folder: Path, masked: bool) -> tuple[Trainee, Progress]:
    """Run the first part of an auto stage, starting fresh or from the masks in `last`. Save the cut student in `last`
    and return it with the stage's progress, ready for the second part."""
    stage, last = run.recipe.stages[i], folder / "last"
    assert stage.auto is not None and run.teacher is not None, "the recipe's validation asks for both here"
    targets = saved_targets(last) if masked else mask_targets(run, stage, student)
    pruner = Pruner(student.config, run.original, stage, targets, run.recipe.seed + i, run.device)
    if stage.auto.importance_batches and not masked:
        sizes = {name: len(value) for name, value in pruner.hard.named_log_alpha()}
        pruner.hard.start_from(measured_importance(run, i, student, sizes, stage.auto.importance_batches))
    for name, gone in pruner.constraint.start.items():
        if gone >= targets[name]:  # an earlier stage may overshoot, since the constraint is one-sided
            run.warn(stage, already_gone(gone, targets[name]))
    trainee = Trainee(student, stage, run.teacher, run.tokenizer, preprocess_for(run, student), run.precision, pruner)
    progress = _loop(run, i, trainee, folder, stage.auto.steps)
    cut, facts = pruner.cut(student)
    # From here on the cut student is an ordinary student with a new optimizer.
    after = Trainee(cut, stage, run.teacher, run.tokenizer, trainee.preprocess, run.precision)
    after.projections.load_state_dict(trainee.projections.state_dict())
    figures = pruner.figures(progress.step)
    run.emit({"event": "cut", "stage": stage.name, "step": progress.step} | figures | facts)
    for name, target in targets.items():
        reached = figures["sparsity"][name]
        if abs(reached - target) > NEAR and target > pruner.constraint.start[name]:
            run.warn(stage, off_target(reached, target))
    loader = loader_of(run, i, cut=True, order=progress.order)
    save(last, after, loader, progress, run.recipe.keep)
    close_loader(loader)
    return after, Progress(**asdict(progress))


def _loop(run: Run, i: int, trainee: Trainee, folder: Path, until: int, cut: Progress | None = None) -> Progress:
    """Train up to step `until` of the stage, starting from its last checkpoint or from a cut just made."""
    stage, every = trainee.stage, run.recipe.evaluation.every if run.recipe.evaluation else None
    progress, last = cut or Progress(), folder / "last"
    loader = loader_of(run, i, True, cut.order) if cut else _restored(run, i, trainee, last, progress)
    clock, doing = Clock(run.recipe.save_minutes), run.watchdog.doing

    def keep() -> None:
        doing(f"saving step {progress.step} of stage {stage.name}")
        save(last, trainee, loader, progress, run.recipe.keep)
        clock.restart()

    def judge() -> None:
        with stops.at_once(progress.step):
            _evaluate(run, trainee, progress, folder)
        keep()

    trainee.train()
    with stop_signals(run.watchdog.hurry) as stops:
        with attention(run.device), closing(loader):
            due = every is not None and 0 < progress.step < until and progress.step % every == 0
            if due and progress.evaluated_step < progress.step:  # the run stopped between saving and evaluating
                judge()
            # Not before a save: Energon would ask the workers for their state, but they start with the first batch.
            batches = iter(loader)
            while progress.step < until:
                began, step = time.perf_counter(), f"step {progress.step + 1} of stage {stage.name}"
                doing(f"waiting for the data of {step}")
                batch = next_batch(batches, run.recipe.data)
                progress.waited(time.perf_counter() - began)
                doing(f"computing {step}")
                trainee.step(batch, progress.step)
                stepped = not trainee.overflowed
                progress.advance(len(batch.keys) * world_size(), stepped)
                stop, late, some = stops.agreed(clock.is_late(), bool(batch.skipped), device=run.device)
                if some:
                    skipped = [one for rank in gather_objects(batch.skipped) for one in rank]
                    _left_out(run, stage, progress, skipped)
                done = progress.step == until
                if not stepped:
                    _overflowed(run, trainee, progress)
                elif progress.step % run.recipe.log_every == 0 or done:
                    figures = trainee.figures(progress.step) | progress.figures()
                    figures["memory_gb"] = peak_memory_gb(run.device)
                    run.emit({"event": "step", "stage": stage.name, "step": progress.step} | figures)
                else:
                    run.listener({"event": "tick", "stage": stage.name, "step": progress.step})
                stop = stop or stops.alone()
                evaluate = stepped and every is not None and progress.step % every == 0 and not done
                if stop or late or done or evaluate or (stepped and progress.step % run.recipe.save_every == 0):
                    keep()
                if stop:
                    raise Interrupted(stop, progress.step)
                if evaluate:
                    judge()
        if stop := stops.agreed(device=run.device)[0] or stops.alone():  # the signal came while the last step was saved
            raise Interrupted(stop, progress.step)
    return progress


def _overflowed(run: Run, trainee: Trainee, progress: Progress) -> None:
    scale = trainee.scaler.get_scale()
    text = f"a batch overflowed in float16 and was skipped; the loss scale drops to {scale:g}"
    # Logged under the step that was due: a resumed run repeats that step, so the warning appears once.
    run.emit({"event": "warning", "stage": trainee.stage.name, "step": progress.step + 1, "text": text})


def _left_out(run: Run, stage: Stage, progress: Progress, skipped: list[Skipped]) -> None:
    """Count the samples that all processes skipped at a step, and warn about vanished shards."""
    try:
        vanished = progress.skip(skipped, run.folder / "skipped.jsonl", stage.name)
    except ValueError as error:
        raise ValueError(f"{run.recipe.data}: {error}") from None
    for first in vanished:
        run.warn(stage, f"{first.shard} {first.reason}; continuing without it until it is back")


def _restored(run: Run, i: int, trainee: Trainee, last: Path, progress: Progress) -> Any:
    """Restore trainee and progress from the last checkpoint, and return a loader at the same position."""
    position = restore(last, trainee, progress, run.recipe.workers)
    cut = trainee.stage.auto is not None and trainee.pruner is None
    loader = loader_of(run, i, cut, progress.order)
    loader.restore_state_rank(position)
    if 0 < progress.step == progress.order:
        text = "resuming with a different number of processes or workers, so the order of the data changes"
        run.warn(trainee.stage, text)
    if progress.precision not in ("", trainee.precision):
        text = f"resuming in {trainee.precision}, chosen for this device; earlier steps used {progress.precision}"
        run.warn(trainee.stage, text)
    progress.precision = trainee.precision
    return loader


def _reestimate(run: Run, i: int, trainee: Trainee) -> None:
    """Re-estimate batch-norm statistics on the first batches of the stage's data. A separate loader is used, so the
    training loader still starts at its first batch, and a resumed run restores it at the right position."""
    batches, pairs = trainee.stage.batch_norm_batches or 20, share(trainee.stage)

    def measured() -> list[dict[str, Tensor]]:
        loader = loader_of(run, i, pairs=pairs)
        with closing(loader):
            sources = track([iter(loader)] * batches, "re-estimating batch norm", batches, "batches")
            chosen = (next_batch(source, run.recipe.data).images for source in sources)
            reestimate(trainee.model, (image_input(images.to(run.device), trainee.preprocess) for images in chosen))
        return [{k: v.cpu() for k, v in norm.state_dict().items()} for norm in batch_norms(trainee.model)]

    for norm, state in zip(batch_norms(trainee.model), from_main(measured), strict=True):
        norm.load_state_dict(state)
    run.emit({"event": "batch_norm", "stage": trainee.stage.name, "batches": batches})


def _evaluate(run: Run, trainee: Trainee, progress: Progress, folder: Path) -> None:
    """Evaluate in the first process and share the result with all processes."""

    def judged() -> dict[str, Any]:
        _judge(run, trainee, progress, folder)
        return asdict(progress)

    what = f"evaluating step {progress.step} of stage {trainee.stage.name}"
    run.watchdog.doing(what, PATIENCE.total_seconds())
    for name, value in from_main(judged).items():
        setattr(progress, name, value)
    progress.pause()


def _judge(run: Run, trainee: Trainee, progress: Progress, folder: Path) -> None:
    if run.evaluator is None:
        return
    student = trainee.pruner.cut_now(trainee.model) if trainee.pruner else trainee.result
    progress.evaluation = run.evaluator(student.eval(), run.tokenizer, trainee.preprocess)
    progress.evaluated_step = progress.step
    trainee.train()
    event = {"event": "evaluation", "stage": trainee.stage.name, "step": progress.step}
    run.emit(event | progress.evaluation)
    score = progress.evaluation.get("acc1", progress.evaluation.get("image_retrieval_recall@1", 0.0))
    if score > progress.best_score and trainee.pruner is None:  # while masks still change there is no student
        progress.best_score, progress.best_step = score, progress.step
        stage = run.recipe.stages.index(trainee.stage)
        facts = run_card.of_run(run.recipe, stage, progress.evaluation, progress.step)
        save_checkpoint(folder / "best", trainee.result, trainee.tokenizer, trainee.preprocess, card=facts, known=FILES)
