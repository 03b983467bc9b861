"""Calibrated against manual inheritance of the emoji teacher, at equal parameters, before and after equal training.

    python benchmarks/calibrated.py --seeds 3

Prints docs/calibrated.md's table. Every student has a folder in runs/calibrated with its `result.json`, so a stopped
benchmark resumes where it left off. The manual shapes are those of recipes/emoji-50.yaml and emoji-25.yaml, with the
same training in one stage. Seeds change the views, the data order and the labels that are drawn.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from tinyclip.common.files import json_text, write_atomically
from tinyclip.compress.calibrate import Calibration, Sample, calibrate
from tinyclip.compress.inheritance import compact, inherit
from tinyclip.data.loader import close_loader, training_loader
from tinyclip.evaluate.metrics import open_dataset, zero_shot
from tinyclip.inference.pipeline import Pipeline, load
from tinyclip.model.axes import axis_table, count_parameters
from tinyclip.model.config import CLIPConfig
from tinyclip.model.costs import macs
from tinyclip.model.model import CLIP
from tinyclip.recipe.recipe import Recipe, load_recipe, shape_from
from tinyclip.train import loop, run
from tinyclip.train.calibration_batches import samples
from tinyclip.train.setup import start

ROOT = Path(__file__).resolve().parent.parent
MANUAL = {50: ["vision.width=128", "text.layers=2"], 25: ["vision.width=96", "text.layers=1"]}
GUESS = {50: 0.54, 25: 0.759}  # initial target sparsity
# Name -> calibration settings; None is the manual rule.
METHODS: dict[str, dict[str, Any] | None] = {
    "manual": None,
    "calibrated": {},
    "calibrated, gates": {"gates": True},
    "calibrated, one round": {"rounds": 1},
    "activation": {"score": "activation"},
    "magnitude": {"score": "magnitude"},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(MANUAL))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--output", type=Path, default=ROOT / "runs/calibrated")
    options = parser.parse_args()
    results = [
        result(options, size, method, seed)
        for seed in range(options.seeds)
        for size in options.sizes
        for method in options.methods
    ]
    print("| size | method | parameters | MACs M | before training % | after % |\n|---|---|---|---|---|---|")
    for size in options.sizes:
        for method in options.methods:
            chosen = [r for r in results if (r["size"], r["method"]) == (size, method)]
            figures = [f"{statistics.mean(r['params'] for r in chosen):,.0f}"]
            figures.append(f"{statistics.mean(r['macs'] for r in chosen) / 1e6:.1f}")
            for name in ("before", "after"):
                values = [100 * r[name] for r in chosen]
                figures.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
            print(f"| {size} % | {method} | {' | '.join(figures)} |")


def result(options: argparse.Namespace, size: int, method: str, seed: int) -> dict[str, Any]:
    """Return one student's figures; create it if they do not exist yet."""
    folder = options.output / f"{size}-{method.replace(', ', '-').replace(' ', '-')}-{seed}"
    if (folder / "result.json").exists():
        return dict(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    shutil.rmtree(folder, ignore_errors=True)
    teacher = load(ROOT / "assets/emoji-teacher")
    settings = METHODS[method]
    manual = inherit(teacher.model, shape_from(MANUAL[size]).apply(teacher.model.config))
    recipe = recipe_of(folder, seed, options.steps)
    if settings is None:
        student = manual
    else:
        how = Calibration(teacher.model.logit_scale.exp().item(), batches=options.batches, seed=seed, **settings)
        student = calibrated(teacher, recipe, how, parameters(manual.config), GUESS[size])
    Pipeline(student, teacher.tokenizer, teacher.preprocessing).save(folder / "start")
    before = accuracy(folder / "start")
    begun = start(recipe)
    loop.run(begun)
    figures = {"size": size, "method": method, "seed": seed, "params": parameters(student.config)}
    figures |= {"macs": sum(macs(student.config).values()), "before": before}
    figures |= {"after": accuracy(folder / "run/student"), "config": student.config.model_dump(mode="json")}
    write_atomically(folder / "result.json", json_text(figures, indent=2) + "\n")
    print({k: v for k, v in figures.items() if k != "config"}, flush=True)
    return figures


def recipe_of(folder: Path, seed: int, steps: int) -> Recipe:
    """Return a one-stage recipe with the optimiser and views of recipes/emoji-50.yaml, starting from the student in
    `folder`."""
    data = load_recipe(ROOT / "recipes/emoji-50.yaml").model_dump(mode="json")
    stage = data["stages"][0] | {"name": "only", "start": str(folder / "start"), "student": {}, "steps": steps}
    places = {"teacher": str(ROOT / "assets/emoji-teacher"), "data": str(ROOT / "assets/emoji/train")}
    data |= places | {"stages": [stage], "output": str(folder / "run"), "evaluation": None, "seed": seed}
    return Recipe.model_validate(data)


def calibrated(teacher: Pipeline, recipe: Recipe, how: Calibration, limit: int, target: float) -> CLIP:
    """Return a student with at most `limit` parameters and within 1 % of it, for a fair comparison."""
    model = teacher.model.requires_grad_(False)
    loader = training_loader(
        recipe.data,
        tokenizer=teacher.tokenizer,
        context_length=model.config.text.context_length,
        image_size=model.config.vision.image_size,
        augment=recipe.stages[0].augment,
        batch_size=recipe.stages[0].batch_size,
        workers=1,
        seed=recipe.seed,
    )
    source = samples(loader, recipe.data, model, teacher.tokenizer, teacher.preprocessing)
    kept: list[Sample] = [next(source) for _ in range(how.batches)]
    close_loader(loader)
    for _ in range(6):
        with run.attention(model.logit_scale.device):
            student = compact(model, calibrate(model, kept, {"both": target}, how))
        over = parameters(student.config) - limit
        if -0.01 * limit <= over <= 0:
            return student
        target += (over + 0.004 * limit) / parameters(model.config)
    raise ValueError(f"no target found for {limit} parameters")


def parameters(config: CLIPConfig) -> int:
    counts = count_parameters(axis_table(config))
    return counts["image"] + counts["text"]


def accuracy(path: Path) -> float:
    """Return zero-shot top-1 on the held-out emoji."""
    dataset = open_dataset(ROOT / "assets/emoji/eval", ROOT / "assets/emoji/templates.txt")
    return float(zero_shot(load(path), dataset)["acc1"])


if __name__ == "__main__":
    main()
