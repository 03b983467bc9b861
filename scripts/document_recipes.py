"""Write the tables of every recipe key into docs/recipes.md; `--check` only checks whether they are up to date."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tinyclip.inputs import augment
from tinyclip.recipe import recipe, stage, student_shape

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
START, END = "<!-- tables: scripts/document_recipes.py -->", "<!-- end of tables -->"
SECTIONS: dict[str, type[BaseModel]] = {
    "The recipe": recipe.Recipe,
    "A stage": stage.Stage,
    "`teacher`, stored": recipe.StoredTeachers,
    "`student`": student_shape.StudentShape,
    "`student.vision`": student_shape.VisionShape,
    "`student.text`": student_shape.TextShape,
    "`auto`": stage.Auto,
    "`calibrated`": stage.Calibrated,
    "`loss`": stage.Loss,
    "`optimizer`": stage.Optimizer,
    "`augment`": augment.Augment,
    "`evaluation`": recipe.Evaluation,
}


def shown(default: Any) -> str:
    """Return a default as written in YAML."""
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        return "see below"
    if isinstance(default, tuple):
        return "[" + ", ".join(f"{x:g}" for x in default) + "]"
    if isinstance(default, float):
        return f"{default:g}"
    if isinstance(default, bool):
        return str(default).lower()
    return {None: "none", "": "empty"}.get(default, str(default))


def tables() -> str:
    lines = []
    for title, model in SECTIONS.items():
        lines += [f"### {title}", "", "| key | default | what it is |", "|---|---|---|"]
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            lines.append(f"| `{name}` | {shown(field.default)} | {field.description} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    after = rest.split(END)[1]
    written = f"{before}{START}\n\n{tables()}\n{END}{after}"
    if "--check" in sys.argv:
        return int(written != page)
    PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
