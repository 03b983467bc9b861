"""Validated settings and configs: unknown keys are errors, and an error is one line. No torch here."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        # For a union, keep the first member's error, unless another member's error is nested deeper.
        if not any(known.startswith(f"{path}.") or known == path for known in parts if path):
            parts = {known: text for known, text in parts.items() if not (known and path.startswith(f"{known}."))}
            parts[path or message] = message
    return "; ".join(f"{path}: {message}" if path != message else message for path, message in parts.items())


class Strict(BaseModel):
    """Base of every config here: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Precision = Literal["bfloat16", "float16", "float32"]
