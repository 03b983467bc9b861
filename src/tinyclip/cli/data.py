"""Commands that make shards, and vocabularies from them."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from tinyclip.cli.terminal import (
    ClassNames,
    MaxPixels,
    Model,
    Overwrite,
    Separator,
    Split,
    check_free,
    plural,
    print_faults,
    read_lines,
    say,
)
from tinyclip.common.faults import Unusable
from tinyclip.common.progress import busy, counter, track


def pack(
    source: Annotated[Path, typer.Argument(help="Folder of pictures, or a .csv, .tsv, .jsonl or .parquet table.")],
    output: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    image_column: Annotated[str | None, typer.Option(help="Column of picture paths.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of captions.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that paths in a table start from.")] = None,
    templates: Annotated[
        Path | None, typer.Option(help="Class folders: captions, one a line, {c} for the class.")
    ] = None,
    split: Split = None,
    classes: ClassNames = None,
    separator: Separator = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Pictures a shard.")] = 5000,
    resize: Annotated[int | None, typer.Option(min=8, max=65_535, help="Shorter side at most, pixels.")] = None,
    max_pixels: MaxPixels = None,
    overwrite: Overwrite = False,
) -> None:
    """Make training shards from your own pictures and captions."""
    from tinyclip.data.datasets import find_splits
    from tinyclip.data.pack import find_items, pack

    lines = read_lines(templates) if templates else None
    if lines == []:
        raise ValueError(f"{templates}: no templates in it; each is a line with {{c}} for the class name")
    if templates is None and (split or classes):
        raise ValueError("--split and --classes go with class folders, so with --templates")
    columns = {"image_column": image_column, "caption_column": caption_column, "separator": separator}
    with busy(f"looking into {source}"):
        items = find_items(source, **columns, image_root=image_root, templates=lines, split=split, classes=classes)
    if templates and split is None and (splits := find_splits(source)):
        say(f"taking the split to train on of {', '.join(splits)}; --split takes another")
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
    check: Annotated[bool, typer.Option("--check", help="Also open every picture and caption.")] = False,
) -> None:
    """Index existing shards (of img2dataset, say), and list what cannot be used; training does it by itself."""
    from tinyclip.data import shards
    from tinyclip.data.shard_index import known_faults, known_lacks, prepare

    found = prepare(folder)
    faults = known_faults(folder)
    lacking, beside = known_lacks(folder)
    good, bad = shards.check_some(folder)
    if check or sum(bool(one.key) for one in bad) > good:
        good, lacking = shards.check(folder, counter("checking", found, "samples"))
        faults, what = [], f"{found} samples in {folder}, {good} of them good"
    else:
        good = found - len(lacking)
        what = f"{found} samples in {folder}" + (f", {good} with picture and caption" if lacking else "")
    if left_out := [*faults, *lacking, *beside]:
        print_faults(left_out)
    if not good or 2 * good < found:
        raise Unusable(f"{what}: training needs at least half of them; not ready, the first: {left_out[0]}")
    say(f"{what}, ready to train on")


def prune(
    model: Model,
    output: Path,
    texts: Annotated[Path, typer.Option(help="File of texts, one a line, or folder of shards, whose tokens are kept.")],
    overwrite: Overwrite = False,
) -> None:
    """Keep only the tokens that TEXTS need: for them the model stays exactly the same."""
    from tinyclip.compress.inheritance import prune_vocabulary
    from tinyclip.data.shards import all_captions
    from tinyclip.inference.pipeline import Pipeline, load
    from tinyclip.zoo.card import made_from

    check_free(output, overwrite)
    found = all_captions(texts) if texts.is_dir() else iter(read_lines(texts))
    first = next(found, None)
    if first is None:
        raise ValueError(f"{texts}: no texts in it, so no tokens to keep")
    clip = load(model)
    kept = clip.tokenizer.kept_ids(track(chain([first], found), "reading texts", None, "texts"))
    small = Pipeline(prune_vocabulary(clip.model, kept), clip.tokenizer.pruned(kept), clip.preprocessing)
    how = f"The same model with {len(kept):,} of its {clip.tokenizer.vocab_size:,} tokens (`tinyclip vocab prune`)."
    small.save(output, card=made_from(model, how))
    saved = (clip.tokenizer.vocab_size - len(kept)) * clip.model.config.text.width
    say(f"kept {len(kept)} of {clip.tokenizer.vocab_size} tokens, {saved:,} parameters fewer: {output}")
