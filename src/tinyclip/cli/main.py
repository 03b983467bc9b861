"""The `tinyclip` command. Each subcommand is a function in the module of its help panel, and imports heavy modules
only when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tinyclip.cli import app as serve
from tinyclip.cli import compress, data, judge, machine, models, search, ship
from tinyclip.cli.arguments import Command
from tinyclip.cli.terminal import console, fail, meter
from tinyclip.common.faults import Unusable
from tinyclip.common.files import in_words
from tinyclip.common.progress import listening
from tinyclip.common.stopping import stoppable
from tinyclip.version import __version__

# The panels of `tinyclip --help`, each command with the example at the end of its own --help.
PANELS: dict[str, list[tuple[Callable[..., None], str]]] = {
    "Compress": [
        (compress.distill, "distill recipes/emoji-50.yaml --set output=runs/mine"),
        (compress.train, "train recipes/emoji-teacher.yaml --set output=runs/teacher"),
        (compress.inherit, "inherit emoji-student runs/half --shape vision.width=48"),
        (compress.plan, "plan recipes/vit-b-32-auto.yaml --devices 8 --samples 15000000 --tflops 100"),
        (compress.prune, "vocab prune my-clip my-clip-pruned --texts shards"),
    ],
    "Data": [
        (data.cache, "cache my-clip shards -o features --recipe recipe.yaml"),
        (data.pack, "data pack photos shards"),
        (data.prepare, "data prepare shards --check"),
    ],
    "Judge": [
        (judge.evaluate, "evaluate emoji-student photos --classes names.txt --templates templates.txt"),
        (judge.probe, "probe emoji-student photos/train photos/test"),
        (judge.compare, "compare my-clip runs/mine/student --data photos/test -o comparison"),
        (judge.measure, "measure emoji-student"),
        (judge.structure, "structure runs/mine/student"),
        (judge.report, "report runs/mine runs/other -o report.html"),
    ],
    "Ship": [
        (ship.export, "export emoji-student --to onnx -o student.onnx"),
        (ship.convert, "convert ViT-B-32.pt my-clip"),
        (ship.push, "push runs/mine/student my-name/my-clip --private"),
    ],
    "Search": [
        (search.classify, 'classify emoji-student photo.jpg "a red apple" "a dog"'),
        (search.index, "index emoji-student photos -o photos-index"),
        (search.search, 'search photos-index "a dog on a beach" --sheet found.png'),
        (search.embed, "embed emoji-student shards -o features"),
        (serve.app, "app emoji-student --index photos-index"),
    ],
    "Models": [(models.zoo, "zoo TinyCLIP-ViT-40M-32-Text-19M-LAION400M")],
    "This machine": [(machine.doctor, "doctor")],
}
GROUPS = {"data": "Make and check training shards.", "vocab": "Reduce a model's vocabulary."}


def _group(help: str, example: str, **options: Any) -> typer.Typer:
    return typer.Typer(no_args_is_help=True, help=help, epilog=f"Example: tinyclip {example}", **options)


def _commands() -> typer.Typer:
    """Register every command; one whose example begins with a group's name belongs to that group."""
    root = _group("Make CLIP models small.", PANELS["Search"][0][1], pretty_exceptions_enable=False)
    groups: dict[str, typer.Typer] = {}
    for panel, commands in PANELS.items():
        for function, example in commands:
            name = example.split()[0]
            if name in GROUPS and name not in groups:
                groups[name] = _group(GROUPS[name], example)
                root.add_typer(groups[name], name=name, rich_help_panel=panel)
            home, within = (groups[name], None) if name in groups else (root, panel)
            home.command(cls=Command, rich_help_panel=within, epilog=f"Example: tinyclip {example}")(function)
    return root


app = _commands()
USAGE: Any = typer.BadParameter.__base__  # click's UsageError, which typer exposes under changing names


def main() -> None:
    """Entry point. Exit codes: 0, 1 if none of the data is usable, 2 if the request is invalid, 130 and
    143 when stopped by Ctrl-C or SIGTERM."""
    try:
        with stoppable(), listening(meter):
            # Typer itself would print a usage error on several lines.
            code = app(prog_name="tinyclip", standalone_mode=False) or 0
            sys.stdout.flush()  # so that a full disk is reported as our error
            sys.exit(code)
    except USAGE as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        where = error.ctx.command_path if error.ctx else "tinyclip"
        fail(f"{error.format_message().rstrip('.')} (see `{where} --help`)", 2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has exited
        sys.exit(1)
    except Unusable as error:
        fail(str(error), 1)
    except ValueError as error:
        fail(str(error), 2)
    except OSError as error:
        _give_up_output()
        fail(in_words(error), 2)
    except RuntimeError as error:
        if "Symlink loop" in str(error):  # raised by pathlib
            fail(str(error), 2)
        if type(error).__name__ != "OutOfMemoryError":  # torch's error; torch is not imported here
            raise
        fail("out of memory on the device; a lower batch_size may help", 2)
    finally:
        meter.stop()


def _give_up_output() -> None:
    """Discard buffered output that cannot be written; it would cause a second error at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit
