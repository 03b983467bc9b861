"""The command that stores a teacher's features."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyclip.terminal import Device, Overwrite, complete_model, errors, fail, plural, print_faults, say

if TYPE_CHECKING:
    from tinyclip.make_cache import Report


def cache(
    teacher: Annotated[
        str,
        typer.Argument(
            help="As in recipes: a checkpoint, a name, open_clip:.., transformers:..", autocompletion=complete_model
        ),
    ],
    shards: Annotated[Path, typer.Argument(help="Folder of training shards.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the cache; default: SHARDS/cache-TEACHER.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Random views a picture.")] = 4,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe that is to use it: its augmentation and picture size are taken.")
    ] = None,
    augment: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Or a setting of the augmentation: rotate=20.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Side of the views, pixels; default: the largest of teacher and students."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the views.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Views that the teacher sees at a time.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode pictures.")] = 1,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: the device's fastest.")] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Store a TEACHER's features of all pictures and captions of SHARDS, for recipes with `teacher: {cache: ..}`.

    Run it again after a stop: shards that are done are kept."""
    from tinyclip.distributed import best_precision, is_main, processes, resolve_device
    from tinyclip.foreign_teacher import load_teacher, short_name
    from tinyclip.make_cache import make_cache
    from tinyclip.recipe import augment_from
    from tinyclip.resume import Interrupted

    if recipe and augment:
        raise ValueError("give either --recipe or --augment")
    if precision not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"--precision {precision}: bfloat16, float16, float32 or auto")
    place = output or shards / f"cache-{short_name(teacher)}"
    where = resolve_device(device)
    with processes(where):
        clip = load_teacher(teacher, where)
        views = augment_from(augment or [])
        if recipe:
            views, largest = _views_of(recipe, clip)
            image_size = image_size or largest
        settings: dict[str, Any] = {"draws": draws, "seed": seed, "batch_size": batch_size, "workers": workers}
        settings |= {"precision": best_precision(where) if precision == "auto" else precision}
        settings |= {"augment": views, "image_size": image_size, "overwrite": overwrite}
        try:
            with _cache_progress() as progress:
                report = make_cache(clip, teacher, shards, place, **settings, progress=progress)
        except (Interrupted, KeyboardInterrupt) as stop:
            code = 128 + getattr(stop, "signal_number", signal.SIGINT)
            fail(f"stopped; finished shards are kept in {place}, the same command goes on", code)
        if is_main():
            _say_report(report, place, draws)


def _say_report(report: Report, place: Path, draws: int) -> None:
    kept = report.shards - report.computed
    what = f"{plural(report.samples, 'sample')} with {plural(draws, 'view')} and {plural(report.captions, 'caption')}"
    say(f"{what} in {plural(report.shards, 'shard')}")
    there = f", {plural(kept, 'shard')} of it {'was' if kept == 1 else 'were'} there" if kept else ""
    say(f"{report.bytes / 1e6:.1f} MB in {place}{there}")
    if report.skipped:
        say(f"skipped {len(report.skipped)}, see {place / 'skipped.jsonl'}:")
        print_faults(report.skipped)
    say(f"to use it, set in a recipe: teacher: {{cache: {place}}}")


def _views_of(path: Path, clip: Any) -> tuple[Any, int]:
    """The augmentation of a recipe's stages, and the largest picture that teacher and students take."""
    from tinyclip.pipeline import Pipeline
    from tinyclip.plan import first_start, stage_shapes
    from tinyclip.recipe import load_recipe

    recipe = load_recipe(path)
    first, *others = recipe.stages
    for stage in others:
        if stage.augment != first.augment:
            raise ValueError(
                f"{path}: stages {first.name} and {stage.name} differ in `augment`, and a cache has the views of one; "
                "make them equal, or two recipes of them"
            )
    own = isinstance(clip, Pipeline)
    shapes, _ = stage_shapes(recipe, clip.model.config if own else first_start(recipe))
    size = (clip.preprocessing if own else clip.preprocess).image_size
    return first.augment, max(size, *(s.student.vision.image_size for s in shapes))


@contextmanager
def _cache_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal of the first process, with its own samples. Raises `Interrupted` after a signal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tinyclip.distributed import is_main, world_size
    from tinyclip.resume import Interrupted, stop_signals

    name = "caching" if world_size() == 1 else f"caching (1 of {world_size()} processes)"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    shown = errors.is_terminal and is_main()
    with stop_signals() as stops, Progress(*columns, TimeRemainingColumn(), console=errors, disable=not shown) as bar:
        task, start = bar.add_task(name, total=None, speed=""), time.perf_counter()

        def progress(done: int, total: int) -> None:
            if stops.received:
                raise Interrupted(stops.received[0], done)
            speed = done / (time.perf_counter() - start)
            bar.update(task, completed=done, total=total, speed=f"{speed:.0f} pictures/s")

        yield progress
