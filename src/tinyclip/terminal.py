"""What the commands share: their output, their errors, their common options."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tinyclip.faults import COLUMNS, Skipped, rows
from tinyclip.files import CHECKPOINT_FILES, check_replaceable, lines_of, read_text

# Piped output is wide enough for every table.
console = Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def complete_model(incomplete: str) -> list[str]:
    """For the shell: published and shipped models whose names begin so. Where there is none, and before anything is
    typed, the shell completes files."""
    from tinyclip.zoo import ENTRIES, SHIPPED

    return _begun([*(entry.name for entry in ENTRIES), *SHIPPED], incomplete)


def complete_shape(incomplete: str) -> list[str]:
    """For the shell: also names that stand for a shape alone."""
    from tinyclip.config import NAMED

    return complete_model(incomplete) + _begun(NAMED, incomplete)


def _begun(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if incomplete and name.startswith(incomplete)]


Model = Annotated[
    Path, typer.Argument(help="A checkpoint, a published model's name, or a hub id.", autocompletion=complete_model)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Compile = Annotated[bool, typer.Option("--compile", help="Through torch.compile: a minute first, faster after.")]
Runtime = Annotated[str, typer.Option(help="auto, openvino, onnxruntime or torch.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override: stages.0.steps=200.")]
ClassNames = Annotated[str | None, typer.Option(help="Class names: a file, or imagenet, imagenet-a, imagenet-r.")]
Split = Annotated[str | None, typer.Option(help="Of data that has several: test, val, train.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the pictures of a table or split file.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column of the pictures in a table.")]
CaptionColumn = Annotated[str | None, typer.Option(help="Column of the captions in a table.")]
Separator = Annotated[str | None, typer.Option(help="Of a .csv or .tsv: one character, or tab; else as it shows.")]
Templates = Annotated[Path | None, typer.Option(help="Prompts, one a line, {c} for the class: a file, or imagenet.")]


def say(text: str) -> None:
    """Print a line as it is."""
    console.print(text, highlight=False, soft_wrap=True)


def plural(n: int, name: str) -> str:
    """1 part, 2 parts."""
    return f"{n:,} {name}" if n == 1 else f"{n:,} {name}s"


def say_computing(computing: dict[str, str]) -> None:
    """On stderr, what a model computes in and where."""
    runtime = f" with {computing['runtime']}" if "runtime" in computing else ""
    errors.print(f"computing in {computing['dtype']} on {computing['device']}{runtime}")


def fail(text: str, code: int) -> None:
    """End with a line on the standard error; of processes that torchrun started, the first with this text speaks."""
    line = f"tinyclip: {' '.join(text.split())}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from tinyclip.distributed import claim

        if not claim(line):
            sys.exit(code)
    errors.print(line)
    sys.exit(code)


def print_table(columns: Any, rows: Any, figures: bool = True) -> None:
    """A table of text; `figures` after the first column are set to the right."""
    table = Table(box=None, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or not figures else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_faults(skipped: Sequence[Skipped], where: Console = console) -> None:
    """What was left out of data: cause, count, examples."""
    table = Table(box=None, header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column == "left out" else "left", overflow="fold")
    for row in rows(skipped):
        table.add_row(*row)
    where.print(table, highlight=False)


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result))


def read_lines(path: Path) -> list[str]:
    """The lines of a file that are not blank; `ValueError` when it cannot be read."""
    return [line for line in lines_of(read_text(path)) if line.strip()]


def check_file(path: Path | None) -> None:
    """Refuse a place for a file that cannot be one, before the work that it is to hold."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; choose a file")
    for parent in path.parents:
        if parent.exists():
            if not parent.is_dir():
                raise ValueError(f"{parent} is a file, so there can be no {path.name} in it")
            if not os.access(parent, os.W_OK):
                raise ValueError(f"cannot write to {parent}")
            return


def check_free(
    path: Path, overwrite: bool, replaceable: set[str] = CHECKPOINT_FILES, what: str = "a checkpoint"
) -> None:
    """Refuse a place that is taken: with `overwrite`, by other than what such an output is made of."""
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another or replace it with --overwrite")
    check_replaceable(path, replaceable, what)
