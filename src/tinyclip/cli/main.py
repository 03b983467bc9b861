"""The command line: a command is a function of a `cli_` module; heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from tinyclip.cli import app as cli_app
from tinyclip.cli import compress, data, judge, machine, models, search, ship
from tinyclip.cli.arguments import Command
from tinyclip.cli.terminal import console, fail, meter
from tinyclip.common.faults import Unusable
from tinyclip.common.files import in_words
from tinyclip.common.progress import listening
from tinyclip.common.stopping import stoppable
from tinyclip.version import __version__

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Make CLIP models small.")
data_app = typer.Typer(no_args_is_help=True, help="Make and check training shards.")
vocab_app = typer.Typer(no_args_is_help=True, help="Reduce a model's vocabulary.")
for command in (
    *(compress.distill, compress.train, compress.plan, judge.report),
    *(compress.inherit, ship.convert, search.classify),
    *(judge.evaluate, judge.probe, judge.compare),
    data.cache,
    ship.export,
    *(search.index, search.search, cli_app.app),
    *(judge.measure, search.embed, judge.structure, models.zoo),
    *(ship.push, machine.doctor),
):
    app.command(cls=Command)(command)
data_app.command(cls=Command)(data.pack)
data_app.command(cls=Command)(data.prepare)
vocab_app.command(cls=Command)(compress.prune)
app.add_typer(data_app, name="data")
app.add_typer(vocab_app, name="vocab")

USAGE: Any = typer.BadParameter.__base__  # click's UsageError, which typer has under changing names


def main() -> None:
    """Entry point. Exit codes: 0, 1 when nothing of the data can be used, 2 for a request that can be mended, 130 and
    143 when stopped by Ctrl-C or SIGTERM."""
    try:
        with stoppable(), listening(meter):
            # Typer itself would make several lines of an error of usage.
            code = app(prog_name="tinyclip", standalone_mode=False) or 0
            sys.stdout.flush()  # a full disk behind it is an error of ours
            sys.exit(code)
    except USAGE as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        where = error.ctx.command_path if error.ctx else "tinyclip"
        fail(f"{error.format_message().rstrip('.')} (see `{where} --help`)", 2)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone
        sys.exit(1)
    except Unusable as error:
        fail(str(error), 1)
    except ValueError as error:
        fail(str(error), 2)
    except OSError as error:
        _give_up_output()
        fail(in_words(error), 2)
    except RuntimeError as error:
        if "Symlink loop" in str(error):  # of pathlib
            fail(str(error), 2)
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        fail("out of memory on the device; a lower batch_size may help", 2)
    finally:
        meter.stop()


def _give_up_output() -> None:
    """What stdout still holds and cannot take would be a second error as the process ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit
