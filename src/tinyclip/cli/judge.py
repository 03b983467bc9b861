"""Commands that evaluate models: zero-shot, retrieval, linear probe, comparison and measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Overwrite,
    Runtime,
    Separator,
    Split,
    Templates,
    check_file,
    check_free,
    complete_model,
    complete_shape,
    console,
    errors,
    print_faults,
    print_json,
    print_table,
    say,
    say_computing,
)
from tinyclip.common.files import json_text

if TYPE_CHECKING:
    from tinyclip.evaluate.contenders import Contender
    from tinyclip.report.runs import Entry

Output = Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures to this file.")]
Students = Annotated[
    list[str],
    typer.Argument(help="One or more models; each keeps its tokenizer and image size.", autocompletion=complete_model),
]
PerClass = Annotated[bool, typer.Option("--per-class", help="Also report every class.")]
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
    """Measure zero-shot accuracy and retrieval recall of MODEL on DATA.

    Under torchrun, the processes share the work.
    """
    from tinyclip.common.devices import resolve_device
    from tinyclip.common.distributed import is_main, processes
    from tinyclip.evaluate import metrics as evaluation
    from tinyclip.loading import load_encoder

    check_file(output)
    columns = {"image_column": image_column, "caption_column": caption_column, "separator": separator}
    dataset = evaluation.open_dataset(data, templates, classes=classes, split=split, images=images, **columns)
    if (templates or per_class) and not dataset.classnames:
        option = "--templates" if templates else "--per-class"
        raise ValueError(f"{data}: there are no class names, so {option} has no effect; leave it out")
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
    train: Annotated[Path, typer.Argument(help="Images with classes, as for `evaluate`; uses the train split.")],
    test: Annotated[
        Path | None, typer.Argument(help="Test data; default: TRAIN's test split, or a fifth of TRAIN.")
    ] = None,
    classes: ClassNames = None,
    solver: Annotated[str, typer.Option(help="Solver: auto, sklearn or torch.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the held-out split.")] = 0,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    dtype: DType = "auto",
    compile: Compile = False,
    runtime: Runtime = "auto",
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Fit a linear probe on MODEL's image features.

    Logistic regression on TRAIN, evaluated on TEST.
    """
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
    """Report on stderr which data was left out."""
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


def compare(
    teacher: Annotated[
        str,
        typer.Argument(help="Reference model: a checkpoint or a name.", autocompletion=complete_model),
    ],
    students: Students,
    data: Annotated[list[Path], typer.Option(help="Images with classes or captions, as for `evaluate`.")],
    templates: Templates = None,
    classes: ClassNames = None,
    split: Split = None,
    images: Images = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    dtype: DType = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a report with figures to this folder.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compare STUDENTS with TEACHER: accuracy, agreement, size, speed.

    Includes calibration, confidence intervals and a paired test. Several --data make one table, and the other data
    options apply to all of them. Data is read once for all models, and once more for the report.
    """
    from tinyclip.evaluate.compare import check, judge
    from tinyclip.evaluate.contenders import costs, labels
    from tinyclip.evaluate.metrics import open_dataset

    if output:
        check_free(output, overwrite, "comparison")
    columns = {"image_column": image_column, "caption_column": caption_column}
    datasets = [open_dataset(path, templates, classes=classes, split=split, images=images, **columns) for path in data]
    for dataset in datasets:
        check(dataset)
    contenders = _load_all([teacher, *students], device, dtype)
    say_computing(contenders[0].clip.computing)
    names = labels([str(path) for path in data])
    outcomes = [judge(contenders, dataset, name) for name, dataset in zip(names, datasets, strict=True)]
    for outcome in outcomes:
        if outcome.skipped:
            errors.print(f"{outcome.name}: left out:")
            print_faults(outcome.skipped, errors)
    measured = costs(contenders)

    from tinyclip.report.comparison import result, table, write

    if as_json:
        print_json(result(outcomes, measured))
    else:
        print_table(*table(outcomes, measured))
    if output:  # after printing the metrics, so they are not lost if it cannot be written
        write(output, outcomes, measured)
        (errors.print if as_json else say)(f"report: {output / 'report.html'}")


def _load_all(sources: Sequence[str], device: str, dtype: str) -> list[Contender]:
    """Load the models by path or name, each with its size on disk, all before anything is computed."""
    from tinyclip.evaluate.contenders import Contender, disk_size, labels
    from tinyclip.loading import load_encoder
    from tinyclip.zoo.resolve import find_export, resolve

    names = labels(sources)
    return [
        Contender(name, source, load_encoder(source, device, dtype), disk_size(find_export(source) or resolve(source)))
        for name, source in zip(names, sources, strict=True)
    ]


def measure(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, an export, or the name of a published model or shape.", autocompletion=complete_shape
        ),
    ],
    device: Device = "cpu",
    dtype: DType = "auto",
    runtime: Runtime = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure parameters, MACs and speed of MODEL on this machine.

    For an export, also its size on disk.
    """
    from tinyclip.common.devices import resolve_device, resolve_dtype
    from tinyclip.inference.export_speed import measure_export
    from tinyclip.inference.pipeline import Tensors
    from tinyclip.loading import load_encoder
    from tinyclip.model.config import NAMED, CLIPConfig
    from tinyclip.model.model import CLIP, cast
    from tinyclip.model.speed import measure as measured

    if model in NAMED and not Path(model).exists():
        if runtime not in ("auto", "torch"):
            raise ValueError(f"{model} is only a shape, without weights; it runs with torch, not {runtime}")
        place = resolve_device(device)
        network = CLIP(CLIPConfig.named(model)).eval().to(place)
        found = measured(cast(network, resolve_dtype(dtype, place)))
    else:
        clip = load_encoder(model, device, dtype, runtime=runtime)
        found = measure_export(clip.clip) if isinstance(clip, Tensors) else measured(clip.model)
    result = {"model": model} | found
    if as_json:
        print_json(result)
        return
    rows = [
        [k, f"{v:,.1f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v] for k, v in result.items()
    ]
    print_table(("figure", "value"), rows)


def structure(
    model: Model,
    of: Annotated[Path | None, typer.Option(help="Original model, drawn in grey behind MODEL.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also save a drawing as .png, .svg or .pdf.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show MODEL's width, and the heads and neurons of each block."""
    from tinyclip.common.files import replacing
    from tinyclip.inference.pipeline import load
    from tinyclip.report import structure as drawing

    check_file(output)
    if output and output.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{output}: the picture must be a .png, .svg or .pdf file")
    if of and not output:
        raise ValueError("--of needs --output, the file to draw to")
    config = load(model).model.config
    if output:
        picture = drawing.figure(config, load(of).model.config if of else None)
        with replacing(output) as file:
            picture.savefig(file, dpi=150, format=output.suffix[1:].lower())
    if as_json:
        print_json(config.model_dump(mode="json"))
    else:
        print_table(("tower", "what", "in each block"), drawing.rows(config))


def write_run_report(runs: list[Path], path: Path, title: str) -> list[Entry]:
    """Write the report of the runs, print its table and what was left out of the data, and return the models."""
    from tinyclip.common import faults
    from tinyclip.report.runs import COLUMNS, report, table

    entries = report(runs, path, title)
    print_table(COLUMNS, table(entries))
    for run in runs:
        if left_out := faults.read(run / "skipped.jsonl"):
            say(f"left out of the training data ({run / 'skipped.jsonl'}):")
            print_faults(left_out)
    say(f"report: {path}")
    return entries


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Report heading.")] = "tinyclip",
) -> None:
    """Compare finished RUNS in one table and one HTML report."""
    check_file(output)
    write_run_report(runs, output, title)
