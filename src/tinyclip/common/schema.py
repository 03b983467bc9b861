"""Settings and configs that are checked: unknown keys are errors, and an error is one line. No torch here."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

# Far beyond every CLIP that there is: a size from a damaged or hostile file is refused before anything of it is
# allocated.
LARGEST = 2**20
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
# In pydantic's paths.
UNION_MEMBERS = r"vit|TowerSparsity|StoredTeachers|str$|resnet|float|constrained-|tuple\[|function-|literal\["


def explain(error: ValidationError) -> str:
    """One line for people out of a pydantic error: `key.path: what is wrong; ...`."""
    parts: dict[str, str] = {}
    for item in error.errors(include_url=False):
        # Pydantic also names the member of a union that it tried; people know only the key.
        path = ".".join(str(p) for p in item["loc"] if not re.match(UNION_MEMBERS, str(p)))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key"
        # Of the members of a union the first one's error is said, unless another's lies deeper.
        if not any(known.startswith(f"{path}.") or known == path for known in parts if path):
            parts = {known: text for known, text in parts.items() if not (known and path.startswith(f"{known}."))}
            parts[path or message] = message
    return "; ".join(f"{path}: {message}" if path != message else message for path, message in parts.items())


class Strict(BaseModel):
    """Base of every config here: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Precision = Literal["bfloat16", "float16", "float32"]
