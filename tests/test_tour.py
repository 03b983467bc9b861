"""The notebook in the docs runs from start to finish, and has no outputs committed."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.models import ROOT


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    shutil.copy(ROOT / "docs" / "tour.ipynb", tmp_path / "docs")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # otherwise it warns that this will become the default
    notebook = nbformat.read(tmp_path / "docs" / "tour.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "clear the outputs before a commit"

    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "docs")}}).execute()

    text = "".join(o.get("text", "") for cell in cells for o in cell.outputs)
    rows = re.findall(r"^(teacher|inherited|few steps|shipped) +([\d.]+) M .* R@1 ([\d.]+)%$", text, re.MULTILINE)
    assert [name for name, *_ in rows] == ["teacher", "inherited", "few steps", "shipped"]
    params = {name: float(value) for name, value, _ in rows}
    assert params["shipped"] < params["few steps"] == params["inherited"] < params["teacher"] / 2 < 2.5
    recall = {name: float(value) for name, _, value in rows}
    assert recall["teacher"] > recall["shipped"] > recall["inherited"] > 5  # chance is 0.5
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
    assert len(losses) == 4 and losses[-1] < losses[0]
