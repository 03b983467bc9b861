"""The command that lists published models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tinyclip.cli.terminal import (
    AsJson,
    complete_model,
    errors,
    print_json,
    print_table,
    say,
)


def zoo(
    name: Annotated[
        str | None, typer.Argument(help="Show the details of this model.", autocompletion=complete_model)
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Download it if it is not cached yet.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read the whole file and check its SHA-256.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Download folder; default: $TINYCLIP_CACHE.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the published models, or show the details of NAME."""
    from tinyclip.zoo import catalogue, listing
    from tinyclip.zoo import resolve as models

    if name is None:
        if download or verify:
            raise ValueError("--download and --verify need the name of a model")
        listed = [listing.describe(entry, cache) for entry in catalogue.ENTRIES]
        if as_json:
            print_json({"models": listed, "shipped": list(catalogue.SHIPPED)})
        else:
            print_table(listing.COLUMNS, [listing.row(facts) for facts in listed])
            say(f"shipped with tinyclip, trained on emoji drawings: {', '.join(catalogue.SHIPPED)}")
        return
    if name in catalogue.SHIPPED:
        _say_zoo(listing.describe_shipped(name), as_json)
        return
    entry = catalogue.get(name)
    first = verify and listing.unrecorded(entry, cache)  # before verification records it
    if download:
        models.local_file(entry, cache)
    if verify:
        digest = listing.verify(entry, cache)
        if first:
            path = catalogue.cache_folder(cache) / entry.file
            errors.print(f"{path}: no checksum was recorded, so there was nothing to compare; recorded now: {digest}")
    facts = listing.describe(entry, cache)
    _say_zoo(facts if as_json else dict(listing.details(facts)), as_json)


def _say_zoo(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        say(f"{key:26} {value}")
