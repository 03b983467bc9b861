"""The command that opens a page to try models on."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyclip.terminal import Device, DType, Model, complete_model, errors, say


def app(
    model: Model,
    index: Annotated[Path | None, typer.Option(help="Also search this index, which `tinyclip index` made.")] = None,
    student: Annotated[
        str | None, typer.Option(help="Also compare MODEL with this one.", autocompletion=complete_model)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
    device: Device = "cpu",
    dtype: DType = "float32",
) -> None:
    """Serve a page: classify pictures among your labels, search an index, compare a student with its teacher."""
    from tinyclip import app as pages
    from tinyclip.search import Index, check_model, open_model
    from tinyclip.terminal import say_computing

    pages.gradio()
    place = pages.listen(host, port)
    opened = Index.open(index) if index else None
    clip, fingerprint = open_model(str(model), device, dtype)
    if opened and index:
        check_model(opened.facts, index, str(model), fingerprint)
    served = pages.Served(model.name, clip)  # visitors need not know where it is
    second = pages.Served(Path(student).name, open_model(student, device, dtype)[0], served.lock) if student else None
    say_computing(clip.computing)
    if not pages.is_loopback(place):
        errors.print("warning: everyone who can reach this machine can use the page; it has no password")

    def ready() -> None:
        say(f"{pages.address(place)} (Ctrl-C ends it)")
        if open_browser:
            import webbrowser

            webbrowser.open(pages.address(place))

    def stop(*_: Any) -> None:
        sys.exit(143)

    signal.signal(signal.SIGTERM, stop)  # so that uploads are removed also then
    pages.serve(lambda: pages.page(served, opened, second), place, ready)
