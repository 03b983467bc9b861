"""The command that serves a page for trying models."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyclip.cli.terminal import Device, DType, Model, complete_model, say


def app(
    model: Model,
    index: Annotated[Path | None, typer.Option(help="Also search this index, which `tinyclip index` made.")] = None,
    student: Annotated[
        str | None, typer.Option(help="Also compare MODEL with this model.", autocompletion=complete_model)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    token: Annotated[str | None, typer.Option(help="Access token. Default: none on loopback, else random.")] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another host name that reaches the page, such as a proxy's."),
    ] = None,
    device: Device = "cpu",
    dtype: DType = "float32",
) -> None:
    """Serve a web page to try MODEL.

    Classify images with your own labels, search an index, compare a student with its teacher.
    """
    from tinyclip.app import guard, serving
    from tinyclip.app import page as pages
    from tinyclip.cli.terminal import say_computing
    from tinyclip.search.index import Index, check_model, open_model

    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit SIGINT as ignored
    names = allow_host or []
    for name in names:
        guard.check_host(name)
    if token is not None:
        guard.check_token(token)
    pages.check_gradio()
    place = serving.listen(host, port)
    if token is None and (names or not serving.is_loopback(place)):
        token = guard.new_token()
    opened = Index.open(index) if index else None
    clip, fingerprint = open_model(str(model), device, dtype)
    if opened and index:
        check_model(opened.facts, index, str(model), fingerprint)
    served = pages.Served(model.name, clip)  # visitors do not need to know its path
    second = pages.Served(Path(student).name, open_model(student, device, dtype)[0], served.lock) if student else None
    say_computing(clip.computing)
    address = serving.address(place) + (f"/?token={token}" if token else "")

    def ready() -> None:
        say(f"{address} (press Ctrl-C to stop)")
        if open_browser:
            import webbrowser

            webbrowser.open(address)

    with serving.ending(), pages.application(served, opened, second) as page:
        serving.run(guard.Gate(page, place, host, names, token), place, ready)


def _stop(*_: Any) -> None:
    sys.exit(143)
