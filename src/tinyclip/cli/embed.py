"""The command that turns files into features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tinyclip.cli.terminal import (
    AsJson,
    Compile,
    Device,
    MaxPixels,
    Overwrite,
    Runtime,
    Separator,
    complete_model,
    plural,
    print_faults,
    print_json,
    say,
    say_computing,
)
from tinyclip.common.faults import read
from tinyclip.common.progress import busy, tell


def embed(
    model: Annotated[str, typer.Argument(help="A checkpoint, or a name of the zoo.", autocompletion=complete_model)],
    source: Annotated[Path, typer.Argument(help="Pictures, WebDataset shards, or texts (.txt or a table).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the features.")],
    what: Annotated[str, typer.Option(help="Of shards: both, image or text.")] = "both",
    format: Annotated[str, typer.Option(help="parquet or npy.")] = "parquet",
    dtype: Annotated[str, typer.Option(help="Of the features on disk: float16 or float32.")] = "float16",
    part_size: Annotated[int, typer.Option(min=1, help="Pictures or texts a part; a shard is always one.")] = 10_000,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts in a table.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Column of the keys; else the row's number.")] = None,
    separator: Separator = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="Items at once; chosen by the device.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads that decode; one a core, at most 8.")
    ] = None,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    compute_dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    compile: Compile = False,
    runtime: Runtime = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the features of SOURCE, in parts with their keys; run again, it goes on where it was stopped."""
    from tinyclip.common.devices import resolve_device
    from tinyclip.common.distributed import is_main, processes
    from tinyclip.loading import load_encoder
    from tinyclip.search.embed import check
    from tinyclip.search.embed import embed as embedded
    from tinyclip.search.feature_files import Plan
    from tinyclip.search.sources import open_source

    plan = Plan(str(model), what, format, dtype, part_size, batch_size, workers)
    with busy(f"looking into {source}"):
        found = open_source(source, part_size, text_column, key_column, separator)
    check(found, output, plan, overwrite)  # before a model is loaded
    place = resolve_device(device)
    with processes(place):
        clip = load_encoder(model, device, compute_dtype, compile, runtime)
        if is_main():
            say_computing(clip.computing)
        result = embedded(clip, found, output, plan, overwrite=overwrite, progress=_tell)
        if not is_main():
            return
    if as_json:
        print_json(result)
        return
    _summary(result, output)


def _summary(result: dict[str, Any], output: Path) -> None:
    names = [name for name in ("images", "texts") if result[name]]
    counts = " and ".join(plural(result[name], name.removesuffix("s")) for name in names)
    done = f"{counts} in {plural(result['parts'], 'part')}: {output}"
    if result["computed"]:
        rates = ", ".join(f"{result[f'{name}_per_s']:,.1f} {name}/s" for name in names)
        say(f"{done} ({result['computed']:,} computed now, {rates})")
    else:
        say(f"{done}, complete before")
    if result["skipped"]:
        say(f"skipped {result['skipped']}, see {output / 'skipped.jsonl'}:")
        print_faults(read(output / "skipped.jsonl"))


def _tell(tally: Any) -> None:
    """What of this process's parts is done."""
    unit = "pictures" if tally.images else "texts"
    tell("embedding", tally.images or tally.texts, tally.total, unit)
