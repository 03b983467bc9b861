"""Validated settings and configs: unknown keys are errors, and an error is one line. No torch here."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

# Far beyond any existing CLIP: a size from a damaged or hostile file is refused before anything is allocated.
LARGEST = 2**20
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
# Names of union members and validators in pydantic's error paths.
UNION_MEMBERS = r"vit|TowerSparsity|StoredTeachers|str$|resnet|float|constrained-|tuple\[|function-|literal\["


def explain(error: ValidationError) -> str:
    """Turn a pydantic error into one readable line: `key.path: what is wrong; ...`."""
    parts: dict[str, str] = {}
    for item in error.errors(include_url=False):
        # Pydantic also names the union member that it tried; users know only the key.
        path = ".".join(str(p) for p in item["loc"] if not re.match(UNION_MEMBERS, str(p)))
        message = _in_words(item)
        # For a union, keep the first member's error, unless another member's error is nested deeper.
        if not any(known.startswith(f"{path}.") or known == path for known in parts if path):
            parts = {known: text for known, text in parts.items() if not (known and path.startswith(f"{known}."))}
            parts[path or message] = message
    return "; ".join(f"{path}: {message}" if path != message else message for path, message in parts.items())


# What pydantic's error types mean to someone who writes a recipe; others keep pydantic's own words.
IN_WORDS = {
    "extra_forbidden": "unknown key",
    "missing": "missing",
    "int_parsing": "must be a whole number, not {input!r}",
    "int_type": "must be a whole number, not {input!r}",
    "int_from_float": "must be a whole number, not {input!r}",
    "float_parsing": "must be a number, not {input!r}",
    "float_type": "must be a number, not {input!r}",
    "bool_parsing": "must be true or false, not {input!r}",
    "bool_type": "must be true or false, not {input!r}",
    "string_type": "must be text, not {input!r}; put it in quotes",
    "string_pattern_mismatch": "must be letters, digits and . _ - only, not {input!r}",
    "literal_error": "must be {expected}, not {input!r}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
}


def _in_words(item: ErrorDetails) -> str:
    form, given = IN_WORDS.get(item["type"]), item["input"]
    shown = isinstance(given, str | int | float | None) and len(str(given)) <= 60
    if form is None or ("{input" in form and not shown):
        return item["msg"].removeprefix("Value error, ")
    return form.format(input=given if shown else "", **item.get("ctx", {}))


class Strict(BaseModel):
    """Base of every config here: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Precision = Literal["bfloat16", "float16", "float32"]
