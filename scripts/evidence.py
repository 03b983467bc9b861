"""The evidence on the emoji data: run the recipes in recipes/evidence with several seeds and write docs/evidence.md.

    python scripts/evidence.py                    run what is not finished, then write the page
    python scripts/evidence.py --only manual-50   run only these recipes (and those that they start from)
    python scripts/evidence.py --page             only write the page, from existing runs
    python scripts/evidence.py --check            only check whether the page matches docs/evidence.json

Finished runs are not repeated and stopped ones are resumed. Figures of runs whose folders are gone stay in
docs/evidence.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import evidence_page
from filelock import FileLock

from tinyclip.common.files import write_atomically
from tinyclip.recipe.recipe import Recipe, load_recipe
from tinyclip.train.resume import Interrupted

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FIRST_SEED = "/seed-0"  # in the recipes' output and start; replaced by the other seeds

# Most important first, but after the recipes that they start from.
NAMES = (
    "manual-50",
    "contrastive-50",
    "auto-50",
    "manual-25",
    "auto-25",
    "one-stage-25",
    "affinity-and-feature-50",
    "affinity-and-interactive-50",
    "affinity-and-image-affinity-50",
    "affinity-and-text-affinity-50",
    "affinity-and-contrastive-50",
    "random-50",
    "calibrated-50",
    "calibrated-25",
    "calibrated-70",
    "calibrated-70-image",
    "calibrated-70-text",
)


def recipe_of(name: str, seed: int) -> Recipe:
    """Return the committed recipe with another seed and output, and another start if that is a run of the evidence."""
    path = ROOT / "recipes" / "evidence" / f"{name}.yaml"
    recipe = load_recipe(path, [f"seed={seed}"])
    changed = [f"output={recipe.output.replace(FIRST_SEED, f'/seed-{seed}')}", f"seed={seed}"]
    for i, stage in enumerate(recipe.stages):
        changed += [f"stages.{i}.start={stage.start.replace(FIRST_SEED, f'/seed-{seed}')}"]
    return load_recipe(path, changed)


def needs(name: str) -> list[str]:
    """Return the names of the runs that a recipe starts from."""
    starts = [Path(stage.start) for stage in recipe_of(name, 0).stages]
    return [start.parent.parent.name for start in starts if start.is_relative_to("runs/evidence")]


def finished(name: str, seed: int) -> bool:
    return (Path(recipe_of(name, seed).output) / "student").is_dir()


def run_one(name: str, seed: int) -> None:
    """Run one recipe with one seed in this process, or resume it."""
    import torch

    from tinyclip.train import loop
    from tinyclip.train.setup import evaluator

    torch.set_num_threads(1)
    recipe = recipe_of(name, seed)
    assert recipe.evaluation is not None, "tests/test_evidence.py holds this"
    folder = Path(recipe.output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # the script may also be running elsewhere, with other recipes
        if finished(name, seed):
            return
        run = loop.start(recipe, resume=(folder / "recipe.yaml").exists())
        run.evaluator = evaluator(recipe.evaluation.data, recipe.evaluation.templates)
        loop.run(run)


def run_all(names: list[str], seeds: list[int], jobs: int) -> list[str]:
    """Run every recipe with every seed in separate processes; return those that failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done: dict[tuple[str, int], Future[bool]] = {}

    def one(name: str, seed: int) -> bool:
        # A run's starting runs were submitted before it, so this never waits for one that is still queued.
        if not all(done[before, seed].result() for before in needs(name) if (before, seed) in done):
            return False
        if finished(name, seed):
            return True
        command = [sys.executable, str(Path(__file__).resolve()), "--run", name, "--seeds", str(seed)]
        return subprocess.run(command, env=environment, check=False).returncode == 0

    with ThreadPoolExecutor(jobs) as pool:
        for name in names:
            for seed in seeds:
                done[name, seed] = pool.submit(one, name, seed)
        try:
            return [f"{name}, seed {seed}" for (name, seed), future in done.items() if not future.result()]
        except KeyboardInterrupt:  # the active runs got it too, and save their state
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# --- the page ---------------------------------------------------------------------------------------------------


def collect(seeds: list[int]) -> evidence_page.Results:
    """Return the committed results, updated with every finished run found here."""
    results: evidence_page.Results = json.loads((DOCS / "evidence.json").read_text(encoding="utf-8"))
    for name in NAMES:
        for seed in seeds:
            if finished(name, seed):
                record = evidence_page.record(ROOT / recipe_of(name, seed).output)
                results["runs"].setdefault(name, {})[str(seed)] = record
    results["teacher"] = evidence_page.teacher_record(ROOT / "assets" / "emoji-teacher")
    return results


def targets() -> dict[str, float]:
    """Return the target sparsity of each recipe that learns masks."""
    autos = {name: recipe_of(name, 0).stages[-1].auto for name in NAMES}
    return {name: float(str(auto.target_sparsity)) for name, auto in autos.items() if auto}


def page_of(results: evidence_page.Results) -> str:
    """Return docs/evidence.md with the parts generated from these results."""
    page = (DOCS / "evidence.md").read_text(encoding="utf-8")
    batch_size = recipe_of(NAMES[0], 0).stages[0].batch_size
    return evidence_page.filled(page, evidence_page.parts(results, batch_size, targets()))


def write_page(seeds: list[int]) -> None:
    results = collect(seeds)
    write_atomically(DOCS / "evidence.json", evidence_page.to_json(results))
    write_atomically(DOCS / "evidence.md", page_of(results))
    batch_size = recipe_of(NAMES[0], 0).stages[0].batch_size
    figures = {"evidence": evidence_page.overview_figure(results)}
    figures["evidence-steps"] = evidence_page.curve_figure(results, batch_size)
    for name, figure in figures.items():
        evidence_page.save_figure(figure, DOCS / "images" / f"{name}.svg")


def up_to_date() -> bool:
    results = json.loads((DOCS / "evidence.json").read_text(encoding="utf-8"))
    return page_of(results) == (DOCS / "evidence.md").read_text(encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help="recipes to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--page", action="store_true", help="write the page without running anything")
    parser.add_argument("--check", action="store_true", help="exit with 1 where the page is not what its results give")
    parser.add_argument("--run", choices=NAMES, metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(ROOT)
    if options.check:
        return int(not up_to_date())
    if options.page:
        write_page(options.seeds)
        return 0
    if options.run:
        for seed in options.seeds:
            run_one(options.run, seed)
        return 0
    wanted = set(options.only or NAMES)
    wanted |= {before for name in wanted for before in needs(name)}
    failed = run_all([name for name in NAMES if name in wanted], options.seeds, options.jobs)
    write_page(options.seeds)
    if failed:
        sys.exit(f"not finished: {'; '.join(failed)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"evidence: {error}")
    except (Interrupted, KeyboardInterrupt):
        sys.exit("evidence: stopped; run the same command to resume")
