"""Commands that make, index and cache shards."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyclip.cli.terminal import (
    ClassNames,
    Device,
    MaxPixels,
    Overwrite,
    Separator,
    Split,
    complete_model,
    fail,
    plural,
    print_faults,
    read_lines,
    say,
)
from tinyclip.common.faults import Unusable
from tinyclip.common.progress import busy, counter, tell
from tinyclip.common.stopping import Terminated

if TYPE_CHECKING:
    from tinyclip.teachers.make_cache import Report


Teacher = Annotated[
    str,
    typer.Argument(
        help="As in recipes: a checkpoint, a name, open_clip:.., transformers:..", autocompletion=complete_model
    ),
]


def pack(
    source: Annotated[Path, typer.Argument(help="Folder of images, or a .csv, .tsv, .jsonl or .parquet table.")],
    output: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    image_column: Annotated[str | None, typer.Option(help="Column with image paths.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Caption column.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths in a table are relative to.")] = None,
    templates: Annotated[
        Path | None, typer.Option(help="For class folders: captions, one per line, {c} for the class.")
    ] = None,
    split: Split = None,
    classes: ClassNames = None,
    separator: Separator = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Images per shard.")] = 5000,
    resize: Annotated[
        int | None, typer.Option(min=8, max=65_535, help="Limit the shorter side to this many pixels.")
    ] = None,
    max_pixels: MaxPixels = None,
    overwrite: Overwrite = False,
) -> None:
    """Make training shards from your own images and captions."""
    from tinyclip.data.datasets import find_splits
    from tinyclip.data.pack import find_items, pack

    lines = read_lines(templates) if templates else None
    if lines == []:
        raise ValueError(f"{templates}: contains no templates; write one per line, with {{c}} for the class name")
    if templates is None and (split or classes):
        raise ValueError("--split and --classes are for class folders and need --templates")
    columns = {"image_column": image_column, "caption_column": caption_column, "separator": separator}
    with busy(f"looking into {source}"):
        items = find_items(source, **columns, image_root=image_root, templates=lines, split=split, classes=classes)
    if templates and split is None and (splits := find_splits(source)):
        say(f"using the training split of {', '.join(splits)}; choose another with --split")
    progress = counter("packing", len(items), "pictures")
    report = pack(items, output, shard_size=shard_size, resize=resize, overwrite=overwrite, progress=progress)
    what = f"{plural(report.packed, 'picture')} with {plural(report.captions, 'caption')}"
    say(f"packed {what} into {plural(report.shards, 'shard')} in {output}")
    if report.skipped:
        say(f"skipped {len(report.skipped)}, see {output / 'skipped.jsonl'}:")
        print_faults(report.skipped)
    say(f"ready to train on: set `data: {output}` in a recipe")


def prepare(
    folder: Annotated[Path, typer.Argument(help="Folder of WebDataset shards.")],
    check: Annotated[bool, typer.Option("--check", help="Also open every image and caption.")] = False,
) -> None:
    """Index existing shards and list unusable samples.

    Training does this by itself; run it to check shards beforehand, such as those made by img2dataset.
    """
    from tinyclip.data import shards
    from tinyclip.data.shard_index import known_faults, known_lacks, prepare

    found = prepare(folder)
    faults = known_faults(folder)
    lacking, beside = known_lacks(folder)
    good, bad = shards.check_some(folder)
    if check or sum(bool(one.key) for one in bad) > good:
        good, lacking = shards.check(folder, counter("checking", found, "samples"))
        faults, what = [], f"{found} samples in {folder}, {good} of them usable"
    else:
        good = found - len(lacking)
        what = f"{found} samples in {folder}" + (f", {good} with picture and caption" if lacking else "")
    if left_out := [*faults, *lacking, *beside]:
        print_faults(left_out)
    if not good or 2 * good < found:
        raise Unusable(f"{what}: training needs at least half of them; not ready; the first fault: {left_out[0]}")
    say(f"{what}, ready to train on")


def cache(
    teacher: Teacher,
    shards: Annotated[Path, typer.Argument(help="Folder of training shards.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Cache folder; default: SHARDS/cache-TEACHER.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, max=10_000, help="Random views per image.")] = 4,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe that will use the cache; sets augmentation and image size.")
    ] = None,
    augment: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Or set the augmentation directly: rotate=20.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=4096, help="Side of the views in pixels; default: the largest among teacher and students."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the views.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, max=10**6, help="Views per teacher batch.")] = 64,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Processes that decode images.")] = 1,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option(help="bfloat16, float16, float32, or auto: the fastest on this device.")
    ] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Store a TEACHER's features of all images and captions in SHARDS.

    Recipes use them with `teacher: {cache: ..}`. Run the command again after a stop: finished shards are kept."""
    from tinyclip.common.devices import best_precision, resolve_device
    from tinyclip.common.distributed import from_main, is_main, processes
    from tinyclip.recipe.recipe import augment_from
    from tinyclip.teachers.foreign import load_teacher, short_name
    from tinyclip.teachers.make_cache import check_place

    if recipe and augment:
        raise ValueError("give either --recipe or --augment")
    if precision not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"--precision {precision}: bfloat16, float16, float32 or auto")
    views = augment_from(augment or [])
    place = output or shards / f"cache-{short_name(teacher)}"
    where = resolve_device(device)
    with processes(where):
        from_main(lambda: check_place(place, overwrite))  # before loading a model
        clip = load_teacher(teacher, where)
        if recipe:
            views, largest = _views_of(recipe, clip)
            image_size = image_size or largest
        settings: dict[str, Any] = {"draws": draws, "seed": seed, "batch_size": batch_size, "workers": workers}
        settings |= {"precision": best_precision(where) if precision == "auto" else precision}
        settings |= {"augment": views, "image_size": image_size, "overwrite": overwrite}
        report = _cached(clip, teacher, shards, place, settings)
        if is_main():
            _say_report(report, place, draws)


def _cached(clip: Any, teacher: str, shards: Path, place: Path, settings: dict[str, Any]) -> Report:
    from tinyclip.teachers.make_cache import make_cache
    from tinyclip.train.resume import Interrupted

    try:
        with _cache_progress() as progress:
            return make_cache(clip, teacher, shards, place, **settings, progress=progress)
    except (Interrupted, KeyboardInterrupt, Terminated) as stop:
        code = 128 + getattr(stop, "signal_number", signal.SIGINT)
        fail(f"stopped; finished shards are kept in {place}, run the same command to resume", code)


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
    """Return the augmentation of a recipe's stages, and the largest image size of teacher and students."""
    from tinyclip.inference.pipeline import Pipeline
    from tinyclip.recipe.recipe import load_recipe
    from tinyclip.train.plan import first_start, stage_shapes

    recipe = load_recipe(path)
    first, *others = recipe.stages
    for stage in others:
        if stage.augment != first.augment:
            raise ValueError(
                f"{path}: stages {first.name} and {stage.name} differ in `augment`, but a cache has the views of one; "
                "make them equal, or use two recipes"
            )
    own = isinstance(clip, Pipeline)
    shapes, _ = stage_shapes(recipe, clip.model.config if own else first_start(recipe))
    size = (clip.preprocessing if own else clip.preprocess).image_size
    return first.augment, max(size, *(s.student.vision.image_size for s in shapes))


@contextmanager
def _cache_progress() -> Iterator[Callable[[int, int], None]]:
    """Show the progress on this process's samples. Raises `Interrupted` after a signal."""
    from tinyclip.train.resume import Interrupted, stop_signals

    with stop_signals() as stops:

        def progress(done: int, total: int) -> None:
            if stops.received:
                raise Interrupted(stops.received[0], done)
            tell("caching", done, total, "pictures")

        yield progress
