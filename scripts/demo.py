"""`make demo`: compress the shipped teacher to 50 % and 25 %, by rule and by learned masks, with two controls from
random weights; write one table, a report, a picture of what the students find and cost, and one of what the masks kept.

Finished runs are not repeated; stopped ones are resumed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure, SubFigure
from PIL import Image

import tinyclip
from tinyclip.cli.compress import run_recipe
from tinyclip.cli.judge import write_run_report
from tinyclip.cli.terminal import fail, say
from tinyclip.evaluate.metrics import open_dataset
from tinyclip.recipe.recipe import Evaluation, load_recipe
from tinyclip.report.figures import draw_accuracy
from tinyclip.report.runs import Entry, accuracy_points
from tinyclip.report.structure import figure
from tinyclip.zoo.checkpoint import read_config

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "assets/emoji-teacher"
QUERIES = ("a green apple", "a sad cat", "something to eat")
FOUND = 5  # pictures shown for a query
RECIPES = ("emoji-50", "emoji-25", "emoji-auto", "emoji-50-random-affinity", "emoji-50-random-contrastive")


def main() -> None:
    os.chdir(ROOT)
    started = time.monotonic()
    runs = []
    for name in RECIPES:
        recipe = load_recipe(f"recipes/{name}.yaml")
        resume = (Path(recipe.output) / "recipe.yaml").exists()
        runs.append(run_recipe(recipe, overwrite=False, resume=resume, hint="make demo"))
    models = write_run_report(runs, Path("runs/report.html"), "tinyclip demo: a CLIP of emoji drawings, made small")
    assert recipe.evaluation is not None, "the table shows accuracies"
    composed(models, recipe.evaluation).savefig("runs/demo.png", dpi=150)
    say("what teacher and student find, and what they cost: runs/demo.png")
    student, teacher = (read_config(place) for place in ("runs/emoji-auto/student", TEACHER))
    figure(student, teacher).savefig("runs/structure.png", dpi=150)
    say("what learned masks kept at 25 %: runs/structure.png")
    minutes = (time.monotonic() - started) / 60
    say(f"{minutes:.1f} minutes. Try: .venv/bin/tinyclip classify runs/emoji-50/student PHOTO 'a red apple'")


def composed(models: Sequence[Entry], evaluation: Evaluation) -> Figure:
    """Draw what teacher and 25 % student find among the test pictures, above the accuracy and cost of all models."""
    whole = Figure(figsize=(11, 7.4), layout="constrained")
    upper, lower = whole.subfigures(2, 1, squeeze=False, height_ratios=(1.15, 1)).flat
    pictures = [example.image for example in open_dataset(evaluation.data, evaluation.templates)]
    sides = upper.subfigures(1, 2, squeeze=False, wspace=0.04).flat
    student = [model for model in models if model.path.is_relative_to("runs/emoji-25")][-1]
    for side, title, model in zip(sides, ("teacher", "student of 25 %"), (models[0], student), strict=True):
        clip = tinyclip.load(model.path)
        similarities = clip.encode_text([f"an emoji of {query}" for query in QUERIES]) @ clip.encode_image(pictures).T
        best = similarities.topk(FOUND).indices.tolist()
        show(side, f"{title}, {model.parameters / 1e6:.1f} M parameters", [[pictures[i] for i in row] for row in best])
    quantity, points = accuracy_points(models)
    panel = lower.subplots()
    draw_accuracy(panel, points, quantity)
    lower.legend(loc="outside right upper", frameon=False, fontsize=8)
    return whole


def show(side: SubFigure, title: str, found: Sequence[Sequence[Image.Image]]) -> None:
    """Draw one row of pictures for each query, the best first."""
    side.suptitle(title, fontsize=11)
    cells = side.subplots(len(QUERIES), FOUND)
    for query, row, pictures in zip(QUERIES, cells, found, strict=True):
        row[0].set_title(f"“{query}”", loc="left", fontsize=9)
        for cell, picture in zip(row, pictures, strict=True):
            cell.imshow(picture.convert("RGB"))
            cell.axis("off")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(f"{error} (remove the folder runs to start the demo over)", 2)
    except KeyboardInterrupt:
        sys.exit(130)
