"""Shared by all commands: output, errors and common options."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from tinyclip.cli.meter import Meter
from tinyclip.common.faults import COLUMNS, Skipped, rows
from tinyclip.common.files import STEERING, json_text, lines_of, printable, read_text
from tinyclip.common.ownership import check_replaceable


class PlainConsole(Console):
    """A console that shows control characters instead of obeying them, since names in data and files are untrusted.

    A string is printed as one line; in drawn objects (tables, bars), the line breaks are rich's own.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        if any(isinstance(item, str | Table) for item in objects):  # not the control codes of the bars themselves
            meter.close()
        super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else text.translate(DRAWN), style, control)


DRAWN = {code: shown for code, shown in STEERING.items() if chr(code) != "\n"}
# Wide enough for every table when piped.
console = PlainConsole(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False)
errors = PlainConsole(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
meter = Meter(errors)


def complete_model(incomplete: str) -> list[str]:
    """Complete the names of published and shipped models. If none matches, or nothing is typed yet, the shell completes
    files."""
    from tinyclip.zoo.catalogue import ENTRIES, SHIPPED

    return _begun([*(entry.name for entry in ENTRIES), *SHIPPED], incomplete)


def complete_shape(incomplete: str) -> list[str]:
    """Complete model names, including names of shapes without weights."""
    from tinyclip.model.config import NAMED

    return complete_model(incomplete) + _begun(NAMED, incomplete)


def _begun(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if incomplete and name.startswith(incomplete)]


Model = Annotated[
    Path, typer.Argument(help="A checkpoint, a published model's name, or a hub id.", autocompletion=complete_model)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
Device = Annotated[str, typer.Option(help="Device: cpu, cuda, mps or auto.")]
DType = Annotated[str, typer.Option(help="Dtype: auto, float32, bfloat16 or float16.")]
Compile = Annotated[bool, typer.Option("--compile", help="Use torch.compile: slow to start, faster afterwards.")]
Runtime = Annotated[str, typer.Option(help="Runtime: auto, openvino, onnxruntime or torch.")]


def _allow(context: typer.Context, count: int | None) -> int | None:
    """Set the pixel limit until the command ends, since many places and threads open pictures."""
    if count is not None:
        from tinyclip.inputs.decoding import pixels_at_most

        context.with_resource(pixels_at_most(count))
    return count


MaxPixels = Annotated[int | None, typer.Option(min=1, callback=_allow, help="Allow images of up to this many pixels.")]
Mean = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="Normalisation mean (three numbers), if the weights file does not say."),
]
Std = Annotated[str | None, typer.Option(metavar="R,G,B", help="Use with --mean.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key: stages.0.steps=200.")
]
ClassNames = Annotated[str | None, typer.Option(help="Class names: a file, or imagenet, imagenet-a, imagenet-r.")]
Split = Annotated[str | None, typer.Option(help="Which split to read: test, val or train.")]
Images = Annotated[Path | None, typer.Option(help="Image folder of a table or split file.")]
ImageColumn = Annotated[str | None, typer.Option(help="Image column of a table.")]
CaptionColumn = Annotated[str | None, typer.Option(help="Caption column of a table.")]
Separator = Annotated[
    str | None, typer.Option(help="Separator of a .csv or .tsv: one character, or tab; default: detected.")
]
Templates = Annotated[
    Path | None, typer.Option(help="Prompt templates: a file (one per line, {c} for the class), or imagenet.")
]


def say(text: str) -> None:
    """Print a line without highlighting or wrapping."""
    console.print(text, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a notice to stderr."""
    errors.print(f"warning: {' '.join(text.split())}")


def three(text: str | None, option: str) -> tuple[float, ...] | None:
    """Parse the numbers of `--mean` and `--std`; `ValueError` if there are not three."""
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3:
        raise ValueError(f"{option} {text}: give three numbers separated by commas, such as 0.5,0.5,0.5")
    return numbers


def plural(n: int, name: str) -> str:
    """Return the count with its noun: 1 part, 2 parts."""
    return f"{n:,} {name}" if n == 1 else f"{n:,} {name}s"


def say_computing(computing: dict[str, str]) -> None:
    """Print to stderr a model's compute dtype and device."""
    runtime = f" with {computing['runtime']}" if "runtime" in computing else ""
    errors.print(f"computing in {computing['dtype']} on {computing['device']}{runtime}")


def fail(text: str, code: int) -> NoReturn:
    """Exit with a line on stderr; under torchrun, only the first process with this text prints it."""
    line = f"tinyclip: {' '.join(text.split())}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from tinyclip.common.distributed import claim

        if not claim(line):
            sys.exit(code)
    errors.print(line)
    sys.exit(code)


def print_table(columns: Any, rows: Any, figures: bool = True) -> None:
    """Print a table of text; with `figures`, all columns but the first are right-aligned."""
    justified = ["left" if i == 0 or not figures else "right" for i, _ in enumerate(columns)]
    console.print(_table(columns, rows, justified))


def _table(columns: Any, rows: Any, justified: Sequence[Any]) -> Table:
    table = Table(box=None, header_style="bold")
    for column, justify in zip(columns, justified, strict=True):
        table.add_column(printable(column), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    return table


def print_faults(skipped: Sequence[Skipped], where: Console = console) -> None:
    """Print which data was left out: cause, count, examples."""
    justified = ["right" if column == "left out" else "left" for column in COLUMNS]
    where.print(_table(COLUMNS, rows(skipped), justified), highlight=False)


def print_json(result: dict[str, Any]) -> None:
    meter.close()
    print(json_text(result))


def read_lines(path: Path) -> list[str]:
    """Return the non-blank lines of a file; `ValueError` when it cannot be read."""
    return [line for line in lines_of(read_text(path)) if line.strip()]


def check_file(path: Path | None) -> None:
    """Refuse an output path that cannot be a file, before doing the work."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; choose a file")
    if not path.exists() or path.is_file():  # not for a device or a pipe
        check_parent(path.resolve())


def check_parent(path: Path) -> None:
    """Refuse a path in a folder that is not writable."""
    parent = next(parent for parent in path.parents if parent.exists())
    if not parent.is_dir():
        raise ValueError(f"{parent} is a file, so {path.name} cannot be in it")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ValueError(f"cannot write to {parent}: {error.strerror}") from None


def check_free(path: Path, overwrite: bool, kind: str = "model") -> None:
    """Refuse a path that exists (with `overwrite`, only if its content is not ours, see `ownership`) or is not
    writable."""
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another or replace it with --overwrite")
    check_replaceable(path, kind)
    check_parent(path.resolve())
