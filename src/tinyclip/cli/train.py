"""Commands that run recipes, plan them and report on them."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyclip.cli.terminal import (
    AsJson,
    Overwrite,
    Sets,
    check_file,
    console,
    fail,
    print_faults,
    print_json,
    print_table,
    say,
)
from tinyclip.common.stopping import Terminated

Smoke = Annotated[bool, typer.Option("--smoke", help="Try every stage for two steps: random weights, made-up data.")]
Small = Annotated[bool, typer.Option("--small", help="With --smoke: at a quarter of every width, in seconds.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")]


def distill(
    recipe: Path,
    sets: Sets = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    smoke: Smoke = False,
    small: Small = False,
) -> None:
    """Compress a teacher in the stages of a RECIPE; ends with a table and report.html."""
    _run(_recipe_for(recipe, sets or [], distil=True), overwrite, resume, smoke, small)


def train(
    recipe: Path,
    sets: Sets = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    smoke: Smoke = False,
    small: Small = False,
) -> None:
    """Train a model from scratch by a RECIPE without teacher."""
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
    """The command that goes on with this run, torchrun's part of it included; in words where that is unknown."""
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
        raise ValueError("--small goes with --smoke")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--smoke runs in one process; start it without torchrun")
    try:
        results = tried(recipe, small, lambda data: evaluator(data, None))
    except (Interrupted, KeyboardInterrupt, Terminated) as stop:
        fail("the dry run was stopped", 128 + getattr(stop, "signal_number", signal.SIGINT))
    for result in results:
        say(f"stage {result['stage']}: ok, {result['shape']}, {result['seconds']:.1f} s")


def run_recipe(recipe: Any, *, overwrite: bool, resume: bool, hint: str) -> Path:
    """Run a recipe with a live display; returns the run's folder. Exits with 130 or 143 when interrupted."""
    from tinyclip.cli.live import Display
    from tinyclip.common.distributed import from_main, is_main
    from tinyclip.train import loop as training
    from tinyclip.train.resume import Interrupted
    from tinyclip.train.setup import evaluator

    evaluation, checks = recipe.evaluation, []
    if evaluation:  # the first process evaluates
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
        fail(f"{text}; go on with: {hint}", code)
    raise AssertionError("it has failed")


def write_run_report(runs: list[Path], path: Path, title: str) -> None:
    from tinyclip.common import faults
    from tinyclip.report.runs import COLUMNS, report, table

    entries = report(runs, path, title)
    print_table(COLUMNS, table(entries))
    for run in runs:
        if left_out := faults.read(run / "skipped.jsonl"):
            say(f"left out of the training data ({run / 'skipped.jsonl'}):")
            print_faults(left_out)
    say(f"report: {path}")


def plan(
    recipe: Path,
    sets: Sets = None,
    devices: Annotated[int, typer.Option(min=1, max=10**6, help="Devices that share each batch.")] = 1,
    samples: Annotated[
        int | None, typer.Option(min=1, max=10**12, help="Pairs of the data, where it is not here.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=1e-6, max=1e6, help="Hours at these sustained TFLOP/s a device.")
    ] = None,
    pairs_per_s: Annotated[float | None, typer.Option(min=1e-6, max=1e9, help="Hours at this speed a device.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Hours at the speed of a few steps timed here.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a RECIPE would take: shapes, parameters, MACs, steps, memory, FLOPs, hours. Runs and writes nothing."""
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


def report(
    runs: list[Path],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "tinyclip",
) -> None:
    """Compare finished RUNS in one table and HTML report."""
    check_file(output)
    write_run_report(runs, output, title)
