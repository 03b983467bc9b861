"""Commands that judge a model: zero-shot and retrieval figures, and the linear probe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tinyclip.cli.terminal import (
    AsJson,
    CaptionColumn,
    ClassNames,
    Compile,
    Device,
    DType,
    ImageColumn,
    Images,
    MaxPixels,
    Model,
    Runtime,
    Separator,
    Split,
    Templates,
    check_file,
    console,
    errors,
    print_faults,
    print_json,
    print_table,
    say_computing,
)
from tinyclip.common.files import json_text

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures to this file.")]
PerClass = Annotated[bool, typer.Option("--per-class", help="Also the figures of each class.")]
COUNTS = ("n", "n_images", "n_texts", "classes", "templates")


def evaluate(
    model: Model,
    data: Annotated[Path, typer.Argument(help="Class folders, shards, a val.tar, a table or a split file.")],
    templates: Templates = None,
    classes: ClassNames = None,
    split: Split = None,
    images: Images = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    separator: Separator = None,
    per_class: PerClass = False,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    dtype: DType = "auto",
    compile: Compile = False,
    runtime: Runtime = "auto",
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Zero-shot accuracy and retrieval recall of MODEL on DATA; under torchrun the processes share the work."""
    from tinyclip.common.devices import resolve_device
    from tinyclip.common.distributed import is_main, processes
    from tinyclip.evaluate import metrics as evaluation
    from tinyclip.loading import load_encoder

    check_file(output)
    columns = {"image_column": image_column, "caption_column": caption_column, "separator": separator}
    dataset = evaluation.open_dataset(data, templates, classes=classes, split=split, images=images, **columns)
    if (templates or per_class) and not dataset.classnames:
        option = "--templates" if templates else "--per-class"
        raise ValueError(f"{data}: no names of classes are there, so {option} has no use; leave it out")
    place = resolve_device(device)
    with processes(place):
        clip = load_encoder(model, device, dtype, compile, runtime)
        figures = evaluation.evaluate(clip, dataset, per_class=per_class)
        if not is_main():
            return
    result = {"model": str(model)} | clip.computing | figures
    _say_skipped(dataset)
    if output:
        _write(output, result)
    if as_json:
        print_json(result)
        return
    say_computing(clip.computing)
    _print_figures(result)


def probe(
    model: Model,
    train: Annotated[Path, typer.Argument(help="Pictures with classes, as for evaluate; of splits, train.")],
    test: Annotated[Path | None, typer.Argument(help="To judge on; by default TRAIN's test split, or a fifth.")] = None,
    classes: ClassNames = None,
    solver: Annotated[str, typer.Option(help="auto, sklearn or torch.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of the held-out parts.")] = 0,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    dtype: DType = "auto",
    compile: Compile = False,
    runtime: Runtime = "auto",
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Linear probe of MODEL: logistic regression on its image features of TRAIN, judged on TEST."""
    from tinyclip.common.devices import resolve_device
    from tinyclip.common.distributed import is_main, processes
    from tinyclip.data.datasets import find_splits, open_dataset
    from tinyclip.data.tables import TABLES
    from tinyclip.evaluate.probe import check_solver
    from tinyclip.evaluate.probe import probe as probed
    from tinyclip.loading import load_encoder

    check_file(output)
    check_solver(solver)
    for data in (train, test):
        if data is not None and data.suffix.lower() in TABLES:
            raise ValueError(
                f"{data}: a table of captions has no classes, which a probe needs; give class folders or shards"
            )
    splits = find_splits(train)
    given = open_dataset(train, classes=classes, split="train" if "train" in splits else None)
    other = test or (train if "train" in splits and len(splits) > 1 else None)
    judged = open_dataset(other, classes=classes) if other else None
    place = resolve_device(device)
    with processes(place):
        clip = load_encoder(model, device, dtype, compile, runtime)
        figures = probed(clip, given, judged, solver=solver, seed=seed, device=place)
        if not is_main():
            return
    result = {"model": str(model)} | clip.computing | figures
    for dataset in (given, judged):
        if dataset:
            _say_skipped(dataset)
    if output:
        _write(output, result)
    if as_json:
        print_json(result)
        return
    say_computing(clip.computing)
    fractions = ("acc1", "acc5", "mean_per_class_recall", "validation_acc1")
    rows = [[name, _figure(result[name])] for name in (*fractions, "n", "n_train", "classes")]
    print_table(("figure", "value"), [*rows, ["C", f"{result['C']:.3g}"], ["solver", result["solver"]]])


def _say_skipped(dataset: Any) -> None:
    """On stderr, what of the data was left out."""
    if dataset.skipped:
        print_faults(dataset.skipped, errors)


def _write(output: Path, result: dict[str, Any]) -> None:
    from tinyclip.common.files import write_atomically

    write_atomically(output, json_text(result, indent=2) + "\n")


def _print_figures(result: dict[str, Any]) -> None:
    subsets = result.get("subsets", {})
    names = [k for k, v in result.items() if isinstance(v, float)] + [k for k in COUNTS if k in result]
    rows = [[name, *(_figure(figures.get(name)) for figures in (result, *subsets.values()))] for name in names]
    print_table(("figure", "all", *subsets), rows)
    if "per_class" in result:
        each = sorted(result["per_class"], key=lambda row: list(row.values())[1])
        console.print()
        print_table(list(each[0]), [[row["class"], *map(_figure, list(row.values())[1:])] for row in each])


def _figure(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.2f} %" if isinstance(value, float) else f"{value:,}"
