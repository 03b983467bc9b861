"""The model card of a run's student: how it was trained, and how it scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tinyclip.recipe.recipe import Recipe
from tinyclip.recipe.stage import TERMS, Stage
from tinyclip.zoo.card import COUNTS, FIGURES, HOW, Card, known, shown


def of_run(recipe: Recipe, i: int, evaluation: dict[str, Any] | None, step: int | None = None) -> Card:
    """Return the model card for the student of stage `i` of a run, after a step or at the stage's end."""
    stages, first = recipe.stages[: i + 1], recipe.stages[0]
    live = recipe.teacher if isinstance(recipe.teacher, str) else None
    teacher = live or ", ".join(f"the stored features in {shown(folder)}" for folder in recipe.caches)
    source = ""
    for stage in stages:  # find the last stage that does not continue from the one before
        if stage.inherit == "none":
            source = ""
        elif stage.start == "teacher" or (stage is first and stage.start == "previous"):
            source = live or ""
        elif stage.start != "previous":
            source = stage.start
    how = "Distilled from its teacher" if recipe.teacher else "Trained without a teacher"
    how += f" with tinyclip in {len(stages)} stage{'s' if len(stages) > 1 else ''}"
    how += f", as it was after step {step:,} of the last." if step and step < stages[-1].steps else "."
    settings = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"description"})
    return Card(
        name=f"{Path(recipe.output).name}/{stages[-1].name}",
        how=f"{how} {recipe.description.strip()}".strip(),
        source=shown(source) if source else "",
        teacher=shown(live) if live else teacher,
        data=f"The pairs in {shown(recipe.data)}",
        licence=known(source).licence if source else "",
        figures=_kept(evaluation or {}),
        figures_of=shown(recipe.evaluation.data) if recipe.evaluation and evaluation else "",
        stages=[_stage(stage) for stage in stages],
        recipe=yaml.safe_dump(_public(settings), sort_keys=False),
    )


def _kept(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the figures and counts of an evaluation, including those of its subsets, but no paths."""
    kept = {key: value for key, value in evaluation.items() if key in FIGURES or key in COUNTS}
    subsets = {name: _kept(figures) for name, figures in evaluation.get("subsets", {}).items()}
    return kept | ({"subsets": subsets} if subsets else {})


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return shown(value) if isinstance(value, str) and Path(value).is_absolute() else value


def _stage(stage: Stage) -> dict[str, Any]:
    terms = {name: weight for name, weight in stage.loss.model_dump().items() if name in TERMS and weight}
    loss = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in terms.items())
    facts = {"stage": stage.name, "start": HOW[stage.inherit], "steps": stage.steps, "pairs a step": stage.batch_size}
    return facts | {"learning rate": f"{stage.optimizer.lr:g}", "loss": loss}
