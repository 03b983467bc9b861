"""`make demo`: compress the shipped teacher to 50 % and 25 %, by rule and by learned masks, with two controls from
random weights; write one table, a report, and a picture of what the masks kept.

Finished runs are not repeated; stopped ones are resumed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tinyclip.cli.compress import run_recipe
from tinyclip.cli.judge import write_run_report
from tinyclip.cli.terminal import fail, say
from tinyclip.recipe.recipe import load_recipe
from tinyclip.report.structure import figure
from tinyclip.zoo.checkpoint import read_config

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("emoji-50", "emoji-25", "emoji-auto", "emoji-50-random-affinity", "emoji-50-random-contrastive")


def main() -> None:
    os.chdir(ROOT)
    started = time.monotonic()
    runs = []
    for name in RECIPES:
        recipe = load_recipe(f"recipes/{name}.yaml")
        resume = (Path(recipe.output) / "recipe.yaml").exists()
        runs.append(run_recipe(recipe, overwrite=False, resume=resume, hint="make demo"))
    write_run_report(runs, Path("runs/report.html"), "tinyclip demo: a CLIP of emoji drawings, made small")
    student, teacher = (read_config(place) for place in ("runs/emoji-auto/student", "assets/emoji-teacher"))
    figure(student, teacher).savefig("runs/structure.png", dpi=150)
    say("what learned masks kept at 25 %: runs/structure.png")
    minutes = (time.monotonic() - started) / 60
    say(f"{minutes:.1f} minutes. Try: .venv/bin/tinyclip classify runs/emoji-50/student PHOTO 'a red apple'")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(f"{error} (remove the folder runs to start the demo over)", 2)
    except KeyboardInterrupt:
        sys.exit(130)
