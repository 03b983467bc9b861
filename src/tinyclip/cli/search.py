"""Commands that index and search pictures, write features, and classify a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyclip.cli.terminal import (
    AsJson,
    Compile,
    Device,
    DType,
    MaxPixels,
    Model,
    Overwrite,
    Runtime,
    Separator,
    check_file,
    complete_model,
    console,
    errors,
    plural,
    print_faults,
    print_json,
    print_table,
    read_lines,
    say,
    say_computing,
)
from tinyclip.common.faults import read
from tinyclip.common.progress import busy, tell

if TYPE_CHECKING:
    from tinyclip.search.index import Index, Match


def index(
    model: Annotated[
        str, typer.Argument(help="A checkpoint or a published model's name.", autocompletion=complete_model)
    ],
    folder: Annotated[Path, typer.Argument(help="Folder of images, searched recursively.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Index folder.")],
    moved: Annotated[bool, typer.Option("--moved", help="FOLDER is the indexed folder's new location.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Recompute everything.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="Batch size; default: chosen by device.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Decoding threads; default: one per core, at most 8.")
    ] = None,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    dtype: DType = "auto",
    compile: Compile = False,
    as_json: AsJson = False,
) -> None:
    """Index the images in FOLDER for search.

    Run it again to add new images and drop deleted ones.
    """
    from tinyclip.search.build import SKIPPED, build, check, scan
    from tinyclip.search.index import open_model

    with busy(f"looking into {folder}"):
        found = scan(folder)
    check(found, output, overwrite=overwrite, moved=moved)  # before loading a model
    clip, fingerprint = open_model(model, device, dtype, compile)
    if not as_json:
        say_computing(clip.computing)
    name = str(Path(model).absolute()) if Path(model).exists() else model
    options: dict[str, Any] = {"overwrite": overwrite, "moved": moved, "batch_size": batch_size, "workers": workers}
    result = build(clip, found, output, model=name, fingerprint=fingerprint, progress=_tell, **options)
    if as_json:
        print_json(result)
        return
    _say_index(result, output)
    if result["skipped"]:
        say(f"skipped {result['skipped']:,}, see {output / SKIPPED}:")
        print_faults(read(output / SKIPPED))


def _say_index(result: dict[str, Any], output: Path) -> None:
    done = f"{plural(result['pictures'], 'picture')} in {output}"
    changes = [f"{result[name]:,} {name}" for name in ("added", "changed", "removed") if result[name]]
    if not changes:
        say(f"{done}, nothing has changed")
        return
    rate = [f"{result['images_per_s']:,.1f} images/s"] if result["computed"] else []
    say(f"{done} ({', '.join(changes + rate)})")


def _tell(what: str, done: int, total: int) -> None:
    tell(what, done, total, "pictures")


def search(
    index: Annotated[Path, typer.Argument(help="An index made by `tinyclip index`.")],
    query: Annotated[list[str] | None, typer.Argument(help="Text to search for; each is a separate query.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Find images like this one; may be repeated.")] = None,
    queries: Annotated[Path | None, typer.Option(help="Text file with one query per line.")] = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Results per query.")] = 10,
    sheet: Annotated[Path | None, typer.Option(help="Also draw the results to a .png, .jpg or .webp file.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Search exhaustively, even in a large index.")] = False,
    model: Annotated[str | None, typer.Option(help="New location of the index's model.")] = None,
    max_pixels: MaxPixels = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    as_json: AsJson = False,
) -> None:
    """Find images in INDEX by text or by a similar image."""
    from tinyclip.inputs.transforms import open_image
    from tinyclip.search import sheet as drawing
    from tinyclip.search.index import Index, pixels, plain, queries_from

    check_file(sheet)
    texts = queries_from([*(query or []), *(read_lines(queries) if queries else [])])
    images = image or []
    asked: list[str | Path] = [*texts, *images]
    if not asked:
        raise ValueError(
            f"{queries}: contains no queries" if queries else "nothing to search for: give a text or --image"
        )
    for path in images:  # before loading the model, which is slower
        open_image(path)
    with Index.open(index) as opened:
        if sheet:
            drawing.check(sheet, len(asked) * min(top, len(opened)))
        name = model or opened.facts["model"]
        clip = _model_of(opened, index, name, device, dtype)
        features = [*plain(clip.encode_text(texts))] if texts else []
        if images:
            features += [*plain(clip.encode_image([pixels(clip, path) for path in images]))]
        found = opened.search(features, top, exact or None)
        if top > len(opened):
            errors.print(f"{index} has only {plural(len(opened), 'picture')}")
        if not opened.root.is_dir():
            errors.print(
                f"{opened.root} does not exist; if it has moved, run: tinyclip index {name} FOLDER -o {index} --moved"
            )
        if sheet:
            drawing.draw(sheet, [(one, _tiles(opened, matches)) for one, matches in zip(asked, found, strict=True)])
        rows = [_listed(opened, matches) for matches in found]
    if as_json:
        told = [_asked(one) | {"results": listed} for one, listed in zip(asked, rows, strict=True)]
        print_json({"index": str(index), "pictures": len(opened), "queries": told} | clip.computing)
        return
    _print(asked, rows)
    if sheet:
        errors.print(f"drawn: {sheet}")


def _model_of(opened: Index, index: Path, name: str, device: str, dtype: str) -> Any:
    """Load the model that made an index, or one with the same weights."""
    from tinyclip.search.index import check_model, open_model
    from tinyclip.zoo.catalogue import SHIPPED

    try:
        clip, fingerprint = open_model(name, device, dtype)
    except ValueError as error:
        if Path(name).exists() or name in SHIPPED:
            raise
        raise ValueError(f"{error} (the model of {index}; give its new location with --model)") from None
    check_model(opened.facts, index, name, fingerprint)
    return clip


def _asked(query: str | Path) -> dict[str, str]:
    return {"image": str(query)} if isinstance(query, Path) else {"text": query}


def _listed(index: Index, matches: Sequence[Match]) -> list[dict[str, Any]]:
    files = [index.file(match.path) for match in matches]
    return [
        {"rank": rank, "cosine": match.cosine, "path": str(file), "missing": not file.is_file()}
        for rank, (match, file) in enumerate(zip(matches, files, strict=True), 1)
    ]


def _tiles(index: Index, matches: Sequence[Match]) -> list[Any]:
    from tinyclip.search.index import shown
    from tinyclip.search.sheet import Tile

    return [
        Tile(index.file(match.path), (f"{rank}   {match.cosine:.3f}", shown(Path(match.path).name)))
        for rank, match in enumerate(matches, 1)
    ]


def _print(asked: Sequence[str | Path], rows: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Print lines without wrapping, so other programs can parse them."""
    for i, (query, listed) in enumerate(zip(asked, rows, strict=True)):
        if len(asked) > 1:
            if i:
                console.print()
            say(str(query))
        say(f"{'rank':>4}  {'cosine':>6}  path")
        for row in listed:
            mark = "  (missing)" if row["missing"] else ""
            say(f"{row['rank']:>4}  {row['cosine']:>6.3f}  {row['path']}{mark}")


def embed(
    model: Annotated[
        str, typer.Argument(help="A checkpoint or a published model's name.", autocompletion=complete_model)
    ],
    source: Annotated[Path, typer.Argument(help="Images, WebDataset shards, or texts (.txt or a table).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the features.")],
    what: Annotated[str, typer.Option(help="What to embed from shards: both, image or text.")] = "both",
    format: Annotated[str, typer.Option(help="File format: parquet or npy.")] = "parquet",
    dtype: Annotated[str, typer.Option(help="Dtype of the stored features: float16 or float32.")] = "float16",
    part_size: Annotated[
        int, typer.Option(min=1, help="Images or texts per part; a shard is always one part.")
    ] = 10_000,
    text_column: Annotated[str | None, typer.Option(help="Text column of a table.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Key column; default: the row number.")] = None,
    separator: Separator = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=10**6, help="Batch size; default: chosen by device.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Decoding threads; default: one per core, at most 8.")
    ] = None,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    compute_dtype: Annotated[str, typer.Option(help="Dtype: auto, float32, bfloat16 or float16.")] = "auto",
    compile: Compile = False,
    runtime: Runtime = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the features of SOURCE to files, with their keys.

    Written in parts: run the command again to resume.
    """
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
    check(found, output, plan, overwrite)  # before loading a model
    place = resolve_device(device)
    with processes(place):
        clip = load_encoder(model, device, compute_dtype, compile, runtime)
        if is_main():
            say_computing(clip.computing)
        result = embedded(clip, found, output, plan, overwrite=overwrite, progress=_tell_tally)
        if not is_main():
            return
    if as_json:
        print_json(result)
        return
    _say_features(result, output)


def _say_features(result: dict[str, Any], output: Path) -> None:
    names = [name for name in ("images", "texts") if result[name]]
    counts = " and ".join(plural(result[name], name.removesuffix("s")) for name in names)
    done = f"{counts} in {plural(result['parts'], 'part')}: {output}"
    if result["computed"]:
        rates = ", ".join(f"{result[f'{name}_per_s']:,.1f} {name}/s" for name in names)
        say(f"{done} ({result['computed']:,} computed now, {rates})")
    else:
        say(f"{done}, already complete")
    if result["skipped"]:
        say(f"skipped {result['skipped']}, see {output / 'skipped.jsonl'}:")
        print_faults(read(output / "skipped.jsonl"))


def _tell_tally(tally: Any) -> None:
    """Print how many of this process's parts are done."""
    unit = "pictures" if tally.images else "texts"
    tell("embedding", tally.images or tally.texts, tally.total, unit)


def classify(
    model: Model,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    labels: Annotated[list[str], typer.Argument(help="What it may show, each in quotes if it has spaces.")],
    max_pixels: MaxPixels = None,
    device: Device = "cpu",
    dtype: DType = "auto",
    runtime: Runtime = "auto",
    as_json: AsJson = False,
) -> None:
    """Rank LABELS by how well they fit IMAGE."""
    from tinyclip.inputs.batching import check_labels
    from tinyclip.inputs.transforms import open_image
    from tinyclip.loading import load

    check_labels(labels)  # before loading the model, which is slower
    if twice := next((label for i, label in enumerate(labels) if label in labels[:i]), None):
        raise ValueError(f"the label {twice!r} is given twice, which would split its probability")
    picture = open_image(image)
    clip = load(model, device=device, dtype=dtype, runtime=runtime)
    chances = clip.classify(picture, labels)[0].tolist()
    ranked = sorted(zip(labels, chances, strict=True), key=lambda pair: -pair[1])
    if as_json:
        listed = [{"label": name, "probability": p} for name, p in ranked]
        print_json({"image": str(image), "labels": listed} | clip.computing)
    else:
        say_computing(clip.computing)
        print_table(("label", "probability"), [[name, f"{100 * p:.1f} %"] for name, p in ranked])
