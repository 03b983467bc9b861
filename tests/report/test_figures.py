"""The figures of a run report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.runs import recipe, stage
from tinyclip.report.figures import Curves, accuracy_figure, curve_figure, curves


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder of a run with two stages of different batches, of which the second was resumed."""
    stages = [stage("75", steps=4, batch_size=8), stage("50", steps=2, batch_size=16)]
    chosen = recipe(tmp_path, tmp_path / "run", stages=stages)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(chosen.model_dump(mode="json")))
    events = [{"event": "stage", "stage": "75"}]
    events += [{"event": "step", "stage": "75", "step": i, "loss": 5 - i} for i in range(1, 5)]
    events += [{"event": "evaluation", "stage": "75", "step": i, "acc1": i / 10} for i in (2, 4)]
    for i in (1, 2):
        events += [{"event": "stage", "stage": "50"}, {"event": "step", "stage": "50", "step": i, "loss": 0.5}]
    events += [{"event": "evaluation", "stage": "50", "step": 2, "acc1": 0.3}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return tmp_path / "run"


def test_curves_are_over_samples_of_all_stages(run: Path) -> None:
    found = curves([run])
    assert found.values["top-1, %"]["run"] == [
        (16, pytest.approx(20)),
        (32, pytest.approx(40)),
        (64, pytest.approx(30)),
    ]
    assert found.values["loss"]["run"] == [(8, 4), (16, 3), (24, 2), (32, 1), (48, 0.5), (64, 0.5)]
    assert found.ends == {"run": [(32, "75"), (64, "50")]}
    panels = curve_figure(found).axes
    assert [panel.get_ylabel() for panel in panels] == ["top-1, %", "loss"]
    assert [text.get_text() for text in panels[0].texts] == ["75", "50"] and not panels[1].texts
    assert [text.xy for text in panels[0].texts] == [(32, 40), (64, 30)]


def test_many_losses_are_averaged() -> None:
    losses = [(i, float(i % 2)) for i in range(1000)]
    (panel,) = curve_figure(Curves({"loss": {"run": losses}}, {"run": [(1000, "a")]})).axes
    values = panel.lines[0].get_ydata()
    assert len(values) == 100 and set(values) == {0.5}


def test_accuracy_and_cost_of_every_model_with_the_stages_of_a_run_joined() -> None:
    points = [("teacher", 0.16, 20.0), ("half/75", 0.12, 15.0), ("half/50", 0.08, 14.0), ("random", 0.08, 5.0)]
    (panel,) = accuracy_figure(points, "top-1, %").axes
    assert [text.get_text() for text in panel.texts] == ["75", "50"]
    assert [line.get_label() for line in panel.lines] == ["teacher", "half", "random"]
    assert [len(line.get_xdata()) for line in panel.lines] == [1, 2, 1]
    assert panel.get_xlim()[0] == panel.get_ylim()[0] == 0 and panel.get_ylabel() == "top-1, %"
    (none,) = accuracy_figure([("a", 0.1, 0.0), ("b", 0.2, 0.0)], "top-1, %").axes
    assert none.get_ylim()[1] > 0
