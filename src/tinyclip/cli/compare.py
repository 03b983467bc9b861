"""The command that sets models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyclip.cli.terminal import (
    AsJson,
    CaptionColumn,
    ClassNames,
    Device,
    DType,
    ImageColumn,
    Images,
    MaxPixels,
    Overwrite,
    Split,
    Templates,
    check_free,
    complete_model,
    errors,
    print_faults,
    print_json,
    print_table,
    say,
    say_computing,
)


def compare(
    teacher: Annotated[
        str,
        typer.Argument(
            help="What the students are compared with: a checkpoint or a name.", autocompletion=complete_model
        ),
    ],
    students: Annotated[
        list[str],
        typer.Argument(
            help="One or several; each has its own tokenizer and image size.", autocompletion=complete_model
        ),
    ],
    data: Annotated[list[Path], typer.Option(help="Pictures with classes or captions, as `evaluate` reads them.")],
    templates: Templates = None,
    classes: ClassNames = None,
    split: Split = None,
    images: Images = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    max_pixels: MaxPixels = None,
    device: Device = "auto",
    dtype: DType = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for a report with figures.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Accuracy, agreement with TEACHER, calibration, size and speed of STUDENTS, with intervals and a paired test.

    Several --data make one table; what else is said of data goes for all of them. What is compared is read once for
    all models, and once more for the report.
    """
    from tinyclip.evaluate.compare import check, judge
    from tinyclip.evaluate.contenders import costs, labels, load_all
    from tinyclip.evaluate.metrics import open_dataset

    if output:
        check_free(output, overwrite, "comparison")
    columns = {"image_column": image_column, "caption_column": caption_column}
    datasets = [open_dataset(path, templates, classes=classes, split=split, images=images, **columns) for path in data]
    for dataset in datasets:
        check(dataset)
    contenders = load_all([teacher, *students], device, dtype)
    say_computing(contenders[0].clip.computing)
    outcomes = []
    for name, dataset in zip(labels([str(path) for path in data]), datasets, strict=True):
        outcomes.append(judge(contenders, dataset, name))
        if outcomes[-1].skipped:
            errors.print(f"{name}: left out:")
            print_faults(outcomes[-1].skipped, errors)
    measured = costs(contenders)

    from tinyclip.report.comparison import result, table, write

    if as_json:
        print_json(result(outcomes, measured))
    else:
        print_table(*table(outcomes, measured))
    if output:  # after the figures, which are then not lost when it cannot be written
        write(output, outcomes, measured)
        (errors.print if as_json else say)(f"report: {output / 'report.html'}")
