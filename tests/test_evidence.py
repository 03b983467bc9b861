"""The evidence: its aggregation on made-up metrics, its recipes, and that the committed page matches its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import ROOT, small_config
from tests.helpers.processes import PATIENCE
from tinyclip.recipe.recipe import load_recipe

sys.path.insert(0, str(ROOT / "scripts"))

import evidence
import evidence_page as page


def made_up(*accuracies: float, **changes: Any) -> dict[str, dict[str, Any]]:
    """Records of one recipe, one per seed."""
    common = {"acc5": 0.3, "image_retrieval_recall@1": 0.1, "steps": 60, "params": 50_000_000, "macs": 2_000_000_000}
    return {str(seed): common | {"acc1": value} | changes for seed, value in enumerate(accuracies)}


TEACHER = {"acc1": 0.5, "params": 100_000_000, "macs": 4_000_000_000, "curve": [(10, 0.1), (20, 0.2)]}


def test_mean_and_spread() -> None:
    assert page.mean_and_spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert page.mean_and_spread([4.0]) == (4.0, 0.0)
    assert page.plus_minus([10.0, 12.0]) == "11.0 ± 1.4" and page.plus_minus([3.0], "+") == "+3.0"


@pytest.mark.parametrize(
    ("differences", "judged"),
    [
        ([1, 1.5, 2], "better"),
        ([-1, -1.5, -2], "worse"),
        ([0.1, 0.1, 4], "within the spread"),  # the mean is below the standard deviation
        ([3, 3, -0.1], "within the spread"),  # one seed disagrees
        ([5], "one seed only"),
    ],
)
def test_only_what_all_seeds_agree_on_is_called_better(differences: list[float], judged: str) -> None:
    assert page.verdict(differences) == judged


def test_seeds_are_compared_with_their_like() -> None:
    apart = page.differences(made_up(0.2, 0.3, 0.9), {"1": {"acc1": 0.25}, "0": {"acc1": 0.1}, "7": {"acc1": 0}})
    assert apart == pytest.approx([10, 5])


def test_steps_to_an_accuracy() -> None:
    fast, slow = [(100, 2.0), (200, 10.0), (300, 9.0)], [(100, 0.0), (1100, 6.0)]
    assert page.reached(fast, 2) == page.reached(fast, 1) == 100, "before the first evaluation nothing is known"
    assert page.reached(fast, 6) == 150 and page.reached(fast, 10) == 200
    assert page.reached(fast, 10.1) is None
    assert page.times_fewer(fast, slow, 6) == f"{1100 / 150:.1f}" == "7.3"
    assert page.times_fewer(fast, slow, 10) == "> 5.5", "the slow one never got there"
    assert page.times_fewer(slow, fast, 10) == "-"
    assert page.times_fewer([(50, 2.0)], fast, 2) == "< 2.0", "the slow one may have been there before"


def test_a_curve_is_the_mean_over_seeds() -> None:
    records = [{"curve": [(10, 0.1), (20, 0.3)]}, {"curve": [(10, 0.2), (20, 0.5)]}]
    assert page.mean_curve(records, 8) == [(80, pytest.approx(15)), (160, pytest.approx(40))]


def test_a_table_compares_with_its_first_row_and_says_what_is_missing() -> None:
    section = page.Section("x", {"a": "first", "b": "second", "c": "third"})
    results = {"teacher": TEACHER, "runs": {"a": made_up(0.1, 0.2), "b": made_up(0.25, 0.25)}}
    rows = page.section_table(section, results).splitlines()[2:]
    assert rows[0] == "| first (2 seeds) | `a` | 50.00 M (50 %) | 2.000 | 15.0 ± 7.1 | 30.0 ± 0.0 | 10.0 ± 0.0 |  |"
    assert rows[1].endswith("| 25.0 ± 0.0 | 30.0 ± 0.0 | 10.0 ± 0.0 | +10.0 ± 7.1, better |")
    assert rows[2].startswith("| third | `c` | -") and rows[2].endswith("not run |")


def test_times_fewer_at_each_accuracy_that_was_passed() -> None:
    runs = {
        "manual-50": made_up(0.12, curve=[(10, 0.06), (20, 0.12)]),
        "random-50": made_up(0.03, curve=[(50, 0.01), (100, 0.03)]),
    }
    rows = page.fewer_table({"teacher": TEACHER, "runs": runs}, 128).splitlines()[2:]
    assert rows[0] == "| 3.0 % | 1,280 | 10.0 | < 2.0 |"
    assert rows[1].startswith("| 6.0 % | 1,280 | > 10.0 |") and rows[2].startswith("| 12.0 % | 2,560 | > 5.0 | 1.2 |")


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    def evaluation(step: int, acc1: float) -> dict[str, Any]:
        return {"event": "evaluation", "step": step, "acc1": acc1, "acc5": 0.5, "image_retrieval_recall@1": 0.2}

    cut = {"event": "cut", "stage": "50", "step": 3, "sparsity": {"both": 0.5}}
    events = [{"event": "stage"}, evaluation(5, 0.1), cut, evaluation(9, 0.3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text(small_config().model_dump_json())
    result = page.record(tmp_path)
    assert (result["acc1"], result["steps"], result["removed"]) == (0.3, 9, 0.5)
    assert result["curve"] == [(5, 0.1), (9, 0.3)] and result["params"] > 10_000


def test_parts_stand_between_their_markers() -> None:
    text = "a\n<!-- x: scripts/evidence.py -->\nold\n<!-- end of x -->\nb"
    assert page.filled(text, {"x": "new"}) == text.replace("old", "\nnew\n")
    with pytest.raises(ValueError, match="the markers of y are missing"):
        page.filled(text, {"y": "new"})


@pytest.mark.parametrize("name", evidence.NAMES)
def test_recipes_load_for_any_seed(name: str) -> None:
    path = ROOT / "recipes" / "evidence" / f"{name}.yaml"
    recipe = load_recipe(path)
    assert f"scripts/evidence.py --only {name}" in recipe.description
    assert recipe.output == f"runs/evidence/{name}/seed-0" and recipe.evaluation is not None
    assert len(recipe.stages) == 1, "one record a run"
    other = evidence.recipe_of(name, 2)
    assert (other.seed, other.output) == (2, f"runs/evidence/{name}/seed-2")
    before = evidence.needs(name)
    assert [other.stages[0].start] == ([f"runs/evidence/{n}/seed-2/student" for n in before] or ["previous"])
    assert all(evidence.NAMES.index(n) < evidence.NAMES.index(name) for n in before)


def test_every_recipe_has_its_row() -> None:
    files = {path.stem for path in (ROOT / "recipes" / "evidence").glob("*.yaml")}
    shown = {name for section in page.SECTIONS for name in section.rows}
    assert files == set(evidence.NAMES) == shown


def test_a_run_waits_for_what_it_starts_from(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, str]] = []

    def fake(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append((command[3], command[5]))
        return subprocess.CompletedProcess(command, int(command[3] == "manual-50" and command[5] == "1"))

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(evidence, "finished", lambda name, seed: name == "contrastive-50")
    failed = evidence.run_all(["manual-50", "contrastive-50", "manual-25"], [0, 1], jobs=2)
    assert failed == ["manual-50, seed 1", "manual-25, seed 1"]
    assert set(ran) == {("manual-50", "0"), ("manual-50", "1"), ("manual-25", "0")}
    assert ran.index(("manual-50", "0")) < ran.index(("manual-25", "0"))


def test_the_committed_page_is_what_its_results_give() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "evidence.py"), "--check"]
    assert subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=PATIENCE).returncode == 0
