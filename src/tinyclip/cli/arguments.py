"""Checks of arguments that apply to every command, before it runs."""

from __future__ import annotations

import math
from typing import Any

import typer
from typer.core import TyperCommand

LARGEST = 2**53  # largest integer that a float holds exactly


class Command(TyperCommand):
    """A command that rejects empty arguments (usually an unset shell variable; an empty path would mean the current
    folder), and numbers that are not finite or are absurdly large."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for param in self.params:  # show arguments in capitals, as in the help texts
            if param.param_type_name == "argument":
                param.metavar = param.name.upper() + ("..." if param.nargs == -1 else "")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the usage line's pieces, as in `[OPTIONS] INDEX [QUERY...]`."""
        arguments = [param for param in self.get_params(ctx) if param.param_type_name == "argument"]
        return [str(self.options_metavar), *(str(p.metavar) if p.required else f"[{p.metavar}]" for p in arguments)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, *_ = self.make_parser(ctx).parse_args(list(args))
        for param in self.get_params(ctx):
            if "" in _each(given.get(param.name)):
                raise typer.BadParameter(f"{_shown(param)} is empty; give it a value or leave it out", ctx=ctx)
        rest = super().parse_args(ctx, args)
        for param in self.get_params(ctx):
            for value in _each(ctx.params.get(param.name)):
                if isinstance(value, float) and not math.isfinite(value):
                    raise typer.BadParameter(f"{_shown(param)}: {value} is not a usable number", ctx=ctx)
                if isinstance(value, int | float) and abs(value) > LARGEST:
                    raise typer.BadParameter(f"{_shown(param)}: {value:.3g} is too large", ctx=ctx)
        return rest


def _each(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _shown(param: Any) -> str:
    return str(param.opts[0] if param.opts[0].startswith("-") else param.name.upper())
