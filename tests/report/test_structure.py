from __future__ import annotations

from pathlib import Path

from matplotlib.image import imread

from tests.helpers.commands import tinyclip
from tests.helpers.models import small_config, uneven_config
from tinyclip.cli.live import kept_bars, kept_lines
from tinyclip.model.config import NAMED
from tinyclip.report.structure import figure, rows


def test_rows_state_every_block() -> None:
    assert rows(uneven_config()) == [
        ["image", "width", "27"],
        ["image", "heads", "3 0 - 1"],
        ["image", "neurons", "10 - 7 0"],
        ["text", "width", "19"],
        ["text", "heads", "- 2 3"],
        ["text", "neurons", "0 31 -"],
    ]
    resnet = {row[0] + " " + row[1]: row[2] for row in rows(NAMED["TinyCLIP-ResNet-19M-Text-19M"])}
    assert resnet["image width"] == "176, 352, 704, 1408"
    assert resnet["image channels, first"].split()[:4] == ["44", "44", "44", "88"]


def test_the_picture_has_what_is_kept_and_what_is_gone(tmp_path: Path) -> None:
    picture = figure(uneven_config(), small_config())
    heights = [[bar.get_height() for bar in panel.patches] for panel in picture.axes]
    assert heights[0] == [4, 4, 4, 3, 0, 0, 1]  # the original's three blocks, then the four shown
    assert "image tower, heads: 4 of 12 (width 27 of 32)" in picture.axes[0].get_title(loc="left")
    picture.savefig(tmp_path / "a.png")
    assert imread(tmp_path / "a.png").std() > 0.05
    tinyclip("structure", "emoji-student", "-o", tmp_path / "b.PNG")
    assert (tmp_path / "b.PNG").exists()
    alone = figure(NAMED["RN50"])
    assert len(alone.axes[0].patches) == 16


def test_lines_and_bars_of_masks() -> None:
    kept = {"visual.hidden": 12, "visual.heads.0": 4, "visual.heads.1": 2, "text.mlp.0": 0}
    full = {"visual.hidden": 16, "visual.heads.0": 4, "visual.heads.1": 4, "text.mlp.0": 8}
    assert kept_lines(kept) == ["visual hidden 12", "visual heads 4 2", "text mlp 0"]
    assert kept_bars(kept, full) == "visual hidden 75 %  visual heads █▄  text mlp  "
