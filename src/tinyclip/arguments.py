"""What is refused of any command's arguments before the command sees them."""

from __future__ import annotations

import math
from typing import Any

import typer
from typer.core import TyperCommand

LARGEST = 2**53  # what also a float holds


class Command(TyperCommand):
    """A command whose arguments are given: an empty text, which as a path would be the folder that one is in, is an
    error, as it comes from a variable that is not set; and numbers are numbers of this world."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, *_ = self.make_parser(ctx).parse_args(list(args))
        rest = super().parse_args(ctx, args)
        for param in self.get_params(ctx):
            name = param.opts[0] if param.opts[0].startswith("-") else str(param.name).upper()
            for text in _each(given.get(param.name)):
                if text == "":
                    raise typer.BadParameter(f"{name} is empty; give it a value or leave it out", ctx=ctx)
            for value in _each(ctx.params.get(param.name)):
                if isinstance(value, float) and not math.isfinite(value):
                    raise typer.BadParameter(f"{name}: {value} is no number to work with", ctx=ctx)
                if isinstance(value, int | float) and abs(value) > LARGEST:
                    raise typer.BadParameter(f"{name}: {value:.3g} is too large", ctx=ctx)
        return rest


def _each(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
