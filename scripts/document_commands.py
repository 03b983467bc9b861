"""Write docs/cli.md: every command with its options; `--check` only checks whether it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tinyclip.cli.main import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """# Commands

<!-- written by scripts/document_commands.py -->

Every command explains itself with `--help`. Where a command takes a MODEL, give a checkpoint's path, a
[published model's](zoo.md) name, `org/name` on the Hugging Face hub, or `emoji-student`, which ships with the package.

| exit code | |
|---|---|
| 0 | done; data that was left out is counted and named |
| 1 | the data was read, but none of it is usable; or the reader of a pipe is gone |
| 2 | an invalid request: one line on standard error says what is wrong |
| 130, 143 | stopped by Ctrl-C or SIGTERM; temporary files are removed, and a run that has begun says how to resume |

Long work shows its progress and the time left on standard error: a bar on a terminal, and in a log a plain line every
ten seconds, later every minute. Results go to standard output. Names in data, files and checkpoints are untrusted, so
control characters in them are shown as `\\x1b`, and CSV cells that a spreadsheet would run as a formula start with an
apostrophe.
"""


def commands(group: Any, name: str, panel: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield every command in a group: its help panel, its full name and the command."""
    for key, command in group.commands.items():
        own = panel or command.rich_help_panel
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {key}", own)
        else:
            yield own, f"{name} {key}", command


def page() -> str:
    parts, found = [HEAD], list(commands(typer.main.get_command(app), "tinyclip"))
    panels = list(dict.fromkeys(panel for panel, _, _ in found))
    for panel, name, command in sorted(found, key=lambda one: panels.index(one[0])):
        if f"## {panel}\n" not in parts:
            parts.append(f"## {panel}\n")
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        usage = " ".join([name, *map(_written, arguments), *(["[options]"] if options else [])])
        parts += [f"### {name}\n", f"{_line(command.help)}\n", f"    {usage}\n"]
        rows = [(f"`{_written(p)}`", p.help) for p in arguments if p.help]
        rows += [(", ".join(f"`{o}`" for o in (*p.opts, *p.secondary_opts)), _option(p)) for p in options]
        if rows:
            parts.append("\n".join(["| what | |", "|---|---|", *(f"| {a} | {_line(b)} |" for a, b in rows)]) + "\n")
        parts.append(f"Example:\n\n    {command.epilog.removeprefix('Example: ')}\n")
    return "\n".join(parts)


def _written(argument: Any) -> str:
    name = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _option(option: Any) -> str:
    default = option.default
    plain = isinstance(default, str | int | float) and not isinstance(default, bool) and default != ""
    shown = f" Default: {default}." if plain else ""
    return f"{option.help or ''}{' Required.' if option.required else ''}{shown}"


def _line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    text = page()
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE} is not up to date: run scripts/document_commands.py")
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
