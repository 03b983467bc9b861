"""Commands about the tinyclip installation: doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyclip.cli.terminal import AsJson, fail, print_json, print_table


def doctor(
    cache: Annotated[Path | None, typer.Option(help="Download folder; default: $TINYCLIP_CACHE.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, device, precision, missing extras.

    Exits with 2 if something is broken.
    """
    from tinyclip import doctor as examination

    facts = examination.examine(cache)
    if as_json:
        print_json(facts)
    else:
        print_table(("what", "here", "remark"), examination.rows(facts), figures=False)
    if facts["problems"]:
        fail("; ".join(facts["problems"]), 2)
