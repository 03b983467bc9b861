"""Commands that plan and run recipes, and cut models."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyclip.cli.judge import write_run_report
from tinyclip.cli.terminal import (
    AsJson,
    Device,
    Model,
    Overwrite,
    Sets,
    check_free,
    complete_shape,
    console,
    fail,
    print_json,
    print_table,
    read_lines,
    say,
)
from tinyclip.common.progress import Counted, track
from tinyclip.common.stopping import Terminated

RecipePath = Annotated[Path, typer.Argument(help="A recipe (YAML), see docs/recipes.md.")]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Dry run: two steps per stage on random weights and made-up data.")
]
Small = Annotated[bool, typer.Option("--small", help="With --smoke: a quarter of every width, done in seconds.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume a stopped run.")]


def distill(
    recipe: RecipePath,
    sets: Sets = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    smoke: Smoke = False,
    small: Small = False,
) -> None:
    """Compress a teacher, stage by stage, following RECIPE.

    Ends with a table of results and report.html in the run's folder.
    """
    _run(_recipe_for(recipe, sets or [], distil=True), overwrite, resume, smoke, small)


def train(
    recipe: RecipePath,
    sets: Sets = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    smoke: Smoke = False,
    small: Small = False,
) -> None:
    """Train a model from scratch, from a RECIPE without a teacher."""
    _run(_recipe_for(recipe, sets or [], distil=False), overwrite, resume, smoke, small)


def _recipe_for(path: Path, sets: list[str], distil: bool) -> Any:
    from tinyclip.recipe.recipe import load_recipe

    recipe = load_recipe(path, sets)
    if distil != (recipe.teacher is not None):
        other = "train" if distil else "distill"
        raise ValueError(f"{path} has {'no' if distil else 'a'} teacher: use `tinyclip {other}`")
    return recipe


def _run(recipe: Any, overwrite: bool, resume: bool, smoke: bool, small: bool) -> None:
    if smoke or small:
        _smoke(recipe, smoke, small)
        return
    from tinyclip.common.devices import resolve_device
    from tinyclip.common.distributed import from_main, processes

    with processes(resolve_device(recipe.device)):
        folder = run_recipe(recipe, overwrite=overwrite, resume=resume, hint=_hint())
        from_main(lambda: write_run_report([folder], folder / "report.html", folder.name))


def _hint() -> str:
    """Return the command that resumes this run, including torchrun's part; or describes it if that is unknown."""
    words = ["tinyclip", *sys.argv[1:]]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        try:
            started = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
            first = next(i for i, word in enumerate(started) if Path(word).name == "torchrun")
        except (OSError, StopIteration):
            return "the same command with --resume"
        words = ["torchrun", *started[first + 1 :]]
    return shlex.join([*(word for word in words if word not in ("--overwrite", "--resume")), "--resume"])


def _smoke(recipe: Any, smoke: bool, small: bool) -> None:
    from tinyclip.train.resume import Interrupted
    from tinyclip.train.setup import evaluator
    from tinyclip.train.smoke import smoke as tried

    if not smoke:
        raise ValueError("--small needs --smoke")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--smoke runs in one process; start it without torchrun")
    try:
        results = tried(recipe, small, lambda data: evaluator(data, None))
    except (Interrupted, KeyboardInterrupt, Terminated) as stop:
        fail("the dry run was stopped", 128 + getattr(stop, "signal_number", signal.SIGINT))
    for result in results:
        say(f"stage {result['stage']}: ok, {result['shape']}, {result['seconds']:.1f} s")


def run_recipe(recipe: Any, *, overwrite: bool, resume: bool, hint: str) -> Path:
    """Run a recipe with a live display and return the run's folder. Exits with 130 or 143 when interrupted."""
    from tinyclip.cli.live import Display
    from tinyclip.common.distributed import from_main, is_main
    from tinyclip.train import loop as training
    from tinyclip.train.resume import Interrupted
    from tinyclip.train.setup import evaluator

    evaluation, checks = recipe.evaluation, []
    if evaluation:  # only the first process evaluates
        from_main(lambda: checks.append(evaluator(evaluation.data, evaluation.templates)))
    run = training.start(recipe, overwrite=overwrite, resume=resume)
    run.evaluator = checks[0] if checks else None
    with Display(console, run) if is_main() else nullcontext() as display:
        run.listener = display or run.listener
        try:
            training.run(run)
        except Interrupted as stop:
            text, code = f"{stop} and saved in {run.folder}", 128 + stop.signal_number
        except (KeyboardInterrupt, Terminated) as stop:
            text, code = "stopped", 128 + getattr(stop, "signal_number", signal.SIGINT)
        else:
            return run.folder
        if display:
            display.stop()
        fail(f"{text}; resume with: {hint}", code)
    raise AssertionError("unreachable: `fail` exits")


def plan(
    recipe: RecipePath,
    sets: Sets = None,
    devices: Annotated[int, typer.Option(min=1, max=10**6, help="Devices sharing each batch.")] = 1,
    samples: Annotated[
        int | None, typer.Option(min=1, max=10**12, help="Number of pairs, if the data is not on this machine.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=1e-6, max=1e6, help="Estimate hours from sustained TFLOP/s per device.")
    ] = None,
    pairs_per_s: Annotated[
        float | None, typer.Option(min=1e-6, max=1e9, help="Estimate hours from pairs/s per device.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Estimate hours from a few steps timed here.")] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate the cost of RECIPE: shapes, MACs, memory, hours.

    Trains and writes nothing.
    """
    from tinyclip.cli.live import plan_table
    from tinyclip.recipe.recipe import load_recipe
    from tinyclip.train.plan import plan as planned

    if (tflops is not None) + (pairs_per_s is not None) + measure > 1:
        raise ValueError("give only one of --tflops, --pairs-per-s and --measure")
    chosen = load_recipe(recipe, sets or [])
    speed: Any = (lambda stage, config: pairs_per_s) if pairs_per_s is not None else None
    if measure:
        from tinyclip.train.smoke import measured_speed

        speed = measured_speed(chosen)
    result = planned(chosen, devices=devices, samples=samples, tflops=tflops, speed=speed)
    if as_json:
        print_json(result)
        return
    print_table(*plan_table(result))
    for note in result["notes"]:
        say(f"note: {note}")


def prune(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder for the smaller model.")],
    texts: Annotated[Path, typer.Option(help="Text file (one per line) or folder of shards whose tokens to keep.")],
    overwrite: Overwrite = False,
) -> None:
    """Keep only the tokens that TEXTS need.

    The model gives exactly the same features for texts made of these tokens.
    """
    from tinyclip.compress.inheritance import prune_vocabulary
    from tinyclip.data.shards import all_captions
    from tinyclip.inference.pipeline import Pipeline, load
    from tinyclip.zoo.card import made_from

    check_free(output, overwrite)
    found = all_captions(texts) if texts.is_dir() else iter(read_lines(texts))
    first = next(found, None)
    if first is None:
        raise ValueError(f"{texts}: contains no texts, so there are no tokens to keep")
    clip = load(model)
    kept = clip.tokenizer.kept_ids(track(chain([first], found), "reading texts", None, "texts"))
    small = Pipeline(prune_vocabulary(clip.model, kept), clip.tokenizer.pruned(kept), clip.preprocessing)
    how = f"The same model with {len(kept):,} of its {clip.tokenizer.vocab_size:,} tokens (`tinyclip vocab prune`)."
    small.save(output, card=made_from(model, how))
    saved = (clip.tokenizer.vocab_size - len(kept)) * clip.model.config.text.width
    say(f"kept {len(kept)} of {clip.tokenizer.vocab_size} tokens, {saved:,} parameters fewer: {output}")


def inherit(
    teacher: Model,
    output: Annotated[Path, typer.Argument(help="Folder for the student.")],
    like: Annotated[
        str | None,
        typer.Option(help="Shape of a known model, e.g. TinyCLIP-ViT-40M-32-Text-19M.", autocompletion=complete_shape),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Set a shape key: vision.width=128, text.layers=3.")
    ] = None,
    calibrate: Annotated[Path | None, typer.Option(help="Choose by importance, measured on these shards.")] = None,
    target: Annotated[float, typer.Option(help="With --calibrate: fraction of block weights to remove.")] = 0.5,
    unit: Annotated[str, typer.Option(help="What --target counts: params or macs.")] = "params",
    towers: Annotated[str, typer.Option(help="Towers to cut: both (one budget), image or text.")] = "both",
    gates: Annotated[bool, typer.Option("--gates", help="Also remove whole attention and MLP branches.")] = False,
    align: Annotated[int, typer.Option(help="Keep neurons and channels in multiples of this.")] = 1,
    score: Annotated[str, typer.Option(help="Importance score: taylor, activation or magnitude.")] = "taylor",
    batches: Annotated[int, typer.Option(help="Batches to measure on.")] = 200,
    batch_size: Annotated[int, typer.Option(min=2, max=10**6, help="Pairs per batch.")] = 128,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Cut a student out of TEACHER without training.

    The student's shape follows from the manual rule (--like or --shape) or from measured importance (--calibrate).
    """
    from tinyclip.compress.inheritance import describe, manual_masks
    from tinyclip.compress.inheritance import inherit as cut
    from tinyclip.inference.pipeline import Pipeline, load
    from tinyclip.model.config import CLIPConfig
    from tinyclip.recipe.recipe import shape_from
    from tinyclip.recipe.stage import Calibrated
    from tinyclip.zoo.card import HOW, made_from

    check_free(output, overwrite)
    if [like is not None, bool(shape), calibrate is not None].count(True) != 1:
        raise ValueError("give one of --like, --shape and --calibrate")
    settings = {"target_sparsity": target, "unit": unit, "gates": gates, "align": align, "score": score}
    settings |= {"batches": batches}
    if calibrate is not None:
        _calibrate(teacher, output, calibrate, settings, towers, batch_size, device)
        return
    if settings != {"target_sparsity": 0.5} | Calibrated(target_sparsity=0.5).model_dump(include=set(settings)):
        raise ValueError("--target, --unit, --gates, --align, --score and --batches need --calibrate")
    if towers != "both":
        raise ValueError("--towers needs --calibrate")
    wanted = CLIPConfig.named(like) if like else shape_from(shape or [])  # before the teacher, which is slow to load
    clip = load(teacher)
    config = wanted if isinstance(wanted, CLIPConfig) else wanted.apply(clip.model.config)
    student = cut(clip.model, config)
    preprocessing = clip.preprocessing.model_copy(update={"image_size": config.vision.image_size})
    card = made_from(teacher, f"{HOW['manual'].capitalize()} (`tinyclip inherit`), not trained since.")
    Pipeline(student, clip.tokenizer, preprocessing).save(output, card=card)
    rows = describe(clip.model.config, manual_masks(clip.model.config, config))
    print_table(("axis", "teacher", "student", "kept"), rows)


def _calibrate(
    teacher: Path, output: Path, data: Path, settings: dict[str, Any], towers: str, batch_size: int, device: str
) -> None:
    from tinyclip.cli.live import measured_on
    from tinyclip.compress.calibrate import calibrate
    from tinyclip.compress.inheritance import compact, describe
    from tinyclip.compress.size import TOWERS
    from tinyclip.data.loader import AGAIN, closing
    from tinyclip.inference.pipeline import Pipeline, load
    from tinyclip.model.axes import axis_table, count_parameters
    from tinyclip.recipe.recipe import calibrated_from
    from tinyclip.train.calibration_batches import calibration, plain_loader, samples
    from tinyclip.train.pruner import budgets
    from tinyclip.train.run import attention
    from tinyclip.zoo.card import HOW, made_from, shown

    if towers not in TOWERS:
        raise ValueError(f"--towers {towers}: choose {', '.join(TOWERS)}")
    chosen, clip = calibrated_from(settings), load(teacher, device=device)
    model, targets = clip.model, budgets(chosen, towers) or {}
    how = calibration(chosen, model.config, model.logit_scale.exp().item())
    how.check(model.config, targets)
    loader = plain_loader(data, clip, batch_size)
    source = Counted(samples(loader, data, model, clip.tokenizer, clip.preprocessing))
    with attention(model.logit_scale.device), closing(loader, AGAIN):
        masks = calibrate(model.requires_grad_(False), source, targets, how)
    student = compact(clip.model, masks)
    how_made = f"{HOW['calibrated'].capitalize()} on {shown(data)} (`tinyclip inherit`), not trained since."
    card = made_from(teacher, how_made)
    Pipeline(student, clip.tokenizer, clip.preprocessing).save(output, card=card)
    print_table(("axis", "teacher", "student", "kept"), describe(clip.model.config, masks, "the {} most important"))
    counts = [count_parameters(axis_table(m.config)) for m in (clip.model, student)]
    before, after = (c["image"] + c["text"] for c in counts)
    say(f"measured on {measured_on(source.count, how.batches)} of {batch_size} pairs")
    say(f"{before:,} parameters before, {after:,} after ({100 * after / before:.1f} %), token embedding not counted")
