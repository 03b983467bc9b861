"""Commands about tinyclip itself and its place in the world: doctor, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyclip.cli.terminal import AsJson, Model, fail, plural, print_json, print_table, say


def doctor(
    cache: Annotated[Path | None, typer.Option(help="Folder of downloads; default: $TINYCLIP_CACHE.")] = None,
    as_json: AsJson = False,
) -> None:
    """What this machine has for tinyclip: versions, device, precision, and what is missing. Exit code 2 where
    something is broken."""
    from tinyclip import doctor as examination

    facts = examination.examine(cache)
    if as_json:
        print_json(facts)
    else:
        print_table(("what", "here", "remark"), examination.rows(facts), figures=False)
    if facts["problems"]:
        fail("; ".join(facts["problems"]), 2)


def push(
    model: Model,
    repository: Annotated[str, typer.Argument(help="org/name on the Hugging Face hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Only for those who may see it.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", "--branch", help="Branch; default: the main one.")
    ] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload by tinyclip",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it and list what would be uploaded.")] = False,
) -> None:
    """Upload MODEL's folder, with its card, to the Hugging Face hub. The token is that of `hf auth login`, or
    HF_TOKEN."""
    from tinyclip.zoo import push as pushing

    what = pushing.plan(model, repository)
    if dry_run:
        print_table(("file", "bytes"), [[name, f"{size:,}"] for name, size in what.files.items()])
        say(f"would upload {plural(len(what.files), 'file')}, {what.bytes / 1e6:.1f} MB, to {repository}")
        return
    address = pushing.push(what, private, revision, message)
    say(f"uploaded {plural(len(what.files), 'file')}, {what.bytes / 1e6:.1f} MB: {address}")
    say(f'to use it: tinyclip.load("{repository}{f"@{revision}" if revision else ""}")')
