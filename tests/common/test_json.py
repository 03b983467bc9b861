"""Files of figures are strict JSON, whatever the figures are; files of older versions can still be read."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from tests.helpers.commands import strict
from tests.helpers.runs import recipe, stage
from tinyclip.cli.terminal import print_json
from tinyclip.common import faults
from tinyclip.common.faults import Skipped
from tinyclip.common.files import json_text
from tinyclip.report.figures import curves
from tinyclip.report.runs import _percent
from tinyclip.train.run import Run

ODD = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, None, True, "NaN")}], "d": np.float64("nan"), "e": 3}
PLAIN = {"a": None, "b": [1.5, None, {"c": [None, None, True, "NaN"]}], "d": None, "e": 3}


def test_a_number_that_is_not_finite_becomes_null() -> None:
    assert strict(json_text(ODD)) == PLAIN
    assert strict(json_text(ODD, indent=2, ensure_ascii=False)) == PLAIN


def test_metrics_lists_and_output_are_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[dict[str, Any]] = []
    Run.emit(SimpleNamespace(folder=tmp_path, listener=heard.append), ODD)  # type: ignore[arg-type]
    assert strict((tmp_path / "metrics.jsonl").read_text()) == PLAIN and heard == [ODD]
    faults.append(tmp_path / "skipped.jsonl", [Skipped("s", "k", "no_image", "r")], loss=math.nan)
    assert strict((tmp_path / "skipped.jsonl").read_text())["loss"] is None
    print_json(ODD)
    assert strict(capsys.readouterr().out) == PLAIN


@pytest.mark.parametrize("bad", ["NaN", "null"])
def test_a_report_reads_runs_with_figures_that_are_none(tmp_path: Path, bad: str) -> None:
    events = [f'"step", "step": 1, "loss": {bad}', '"step", "step": 2, "loss": 0.5', f'"evaluation", "acc1": {bad}']
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"stage": "50", "event": {e}}}\n' for e in events))
    chosen = recipe(tmp_path, tmp_path, stages=[stage(batch_size=8)])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(chosen.model_dump(mode="json")))
    assert curves([tmp_path]).values == {"loss": {tmp_path.name: [(16, 0.5)]}}
    assert _percent({"acc1": None}, "acc1") == "-"
