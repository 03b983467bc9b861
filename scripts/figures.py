"""Draw the figures of docs/method.md and docs/design.md; `--check` only checks whether they are up to date."""

from __future__ import annotations

import ast
import io
import re
import sys
import textwrap
import tomllib
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from tinyclip.compress.inheritance import kept_blocks
from tinyclip.report.html import COLOURS

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
GREY, BLUE, GREEN = COLOURS[:3]
FAINT = "#e5e9f0"


def box(ax: Axes, x: float, y: float, width: float, height: float, colour: str, edge: str = "white") -> None:
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=edge, linewidth=1))


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = GREY) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=colour, linewidth=1.4))


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a white canvas whose unit is a tenth of an inch."""
    figure = Figure(figsize=(width / 10, height / 10), facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return figure, ax


def inheritance() -> Figure:
    """Draw which part of a matrix, and which blocks, the manual rule keeps."""
    figure, ax = canvas(82, 35)
    ax.text(16, 32.5, "Image tower: thinner", ha="center", weight="bold")
    cells, kept, size = 12, 8, 1.6
    for row in range(cells):
        for column in range(cells):
            inside = row < kept and column < kept
            box(ax, 2 + column * size, 27.5 - row * size, size, size, BLUE if inside else FAINT)
    arrow(ax, (22.2, 19.5), (27, 19.5))
    for row in range(kept):
        for column in range(kept):
            box(ax, 28 + column * size, 27.5 - row * size, size, size, BLUE)
    ax.text(11.6, 5.3, "a weight of the teacher\n12 x 12 channels", ha="center", va="center", color=GREY)
    ax.text(34.4, 5.3, "of the student\nthe first 8", ha="center", va="center", color=GREY)

    ax.text(63, 32.5, "Text tower: shallower", ha="center", weight="bold")
    keep = kept_blocks(12, 6)
    for block in range(12):
        y = 8.2 + block * 1.75
        box(ax, 50, y, 11, 1.5, GREEN if block in keep else FAINT)
        ax.text(55.5, y + 0.68, str(block), ha="center", va="center", size=7, color="white" if block in keep else GREY)
    for place, block in enumerate(keep):
        y = 8.2 + place * 1.75
        box(ax, 69, y, 11, 1.5, GREEN)
        ax.text(74.5, y + 0.68, str(block), ha="center", va="center", size=7, color="white")
        arrow(ax, (61.2, 8.95 + block * 1.75), (68.8, y + 0.75), GREEN)
    ax.text(55.5, 5.3, "12 blocks", ha="center", va="center", color=GREY)
    ax.text(74.5, 5.3, "every second one", ha="center", va="center", color=GREY)
    return figure


def affinity() -> Figure:
    """Draw the softmax over texts of teacher and student, and what is compared."""
    figure, ax = canvas(82, 34)
    pictures = ["fox", "wolf", "apple", "bike"]
    teacher = np.array([[8.0, 6.2, 1, 0], [6.4, 7.6, 0, 1], [1, 0, 8, 2], [0, 1, 2, 9]])
    student = teacher * 0.7 + np.array([[0, 1.6, 1, 0], [0, 0, 1.2, 1], [2, 0, 0, 1], [1, 0, 2.2, 0]])
    for title, logits, x, colour in (("teacher", teacher, 9, BLUE), ("student", student, 55, GREEN)):
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        ax.text(x + 10, 31.5, title, ha="center", weight="bold", color=colour)
        for row, name in enumerate(pictures):
            y = 20 - row * 5
            ax.text(x - 0.8, y + 2.4, name, ha="right", va="center", size=9, color=GREY)
            ax.text(x + 2.4 + row * 5, 26, name, ha="center", size=9, color=GREY, style="italic")
            for column in range(4):
                share = float(shares[row, column])
                box(ax, x + column * 5, y, 4.8, 4.8, FAINT)
                ax.add_patch(Rectangle((x + column * 5, y), 4.8, 4.8, facecolor=colour, alpha=share))
                light = "white" if share > 0.5 else "#222"
                ax.text(x + column * 5 + 2.4, y + 2.3, f"{share:.2f}", ha="center", va="center", size=8, color=light)
    arrow(ax, (31, 15), (50, 15))
    ax.text(40, 17, "cross-entropy,\nrow by row", ha="center", va="bottom", color=GREY)
    ax.text(40, 12.6, "and column by column\nfor texts over pictures", ha="center", va="top", color=GREY, size=8.5)
    ax.text(41, 1.6, "rows: pictures   columns: captions   each row adds up to 1", ha="center", size=9, color=GREY)
    return figure


def stages() -> Figure:
    """Draw the stages: each removes a quarter of the teacher, and the teacher stays the same."""
    figure, ax = canvas(82, 32)
    sides = [(100, 4.0), (75, 24.5), (50, 44.0), (25, 63.0)]
    box(ax, 4, 24.5, 74, 4, BLUE)
    ax.text(41, 26.4, "the teacher, the same in every stage", ha="center", va="center", color="white")
    for place, (percent, x) in enumerate(sides):
        height = 14 * percent / 100
        box(ax, x, 6, 11, height, BLUE if place == 0 else GREEN)
        ax.text(x + 5.5, 3.4, f"{percent} %", ha="center", va="center")
        if place:
            arrow(ax, (x + 5.5, 24.2), (x + 5.5, 6.3 + height), BLUE)
            before = sides[place - 1][1] + 11
            arrow(ax, (before + 0.5, 8.5), (x - 0.5, 8.5))
            ax.text((before + x) / 2, 9.4, "inherit", ha="center", size=8.5, color=GREY)
    ax.text(31.3, 21.8, "affinity", ha="left", size=8.5, color=BLUE)
    return figure


def layers() -> list[list[str]]:
    """Return the subpackages by layer, top first, from import-linter's contract; those in the same layer do not import
    each other."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (found,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return [layer.replace(" ", "").split("|") for layer in found]


def purpose(room: str) -> str:
    """Return the first sentence of a subpackage's docstring."""
    place = ROOT / "src" / "tinyclip" / room
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(said.replace("`", "").split()).split(". ")[0].removesuffix(".")


def rooms() -> Figure:
    """Draw who may import whom: each may import what is below it."""
    found = [layer for layer in layers() if layer not in (["__main__"], ["version"])]
    height, width, gap = 6.4, 104, 0.9
    figure, ax = canvas(width, height * len(found) + 3)
    for number, layer in enumerate(reversed(found)):
        y, room_width = 2 + number * height, (width - 4 - gap * (len(layer) - 1)) / len(layer)
        for place, room in enumerate(layer):
            x = 2 + place * (room_width + gap)
            is_package = (ROOT / "src" / "tinyclip" / room).is_dir()
            box(ax, x, y, room_width, height - gap, BLUE if is_package else GREEN)
            middle = x + room_width / 2
            name = f"{room}/" if is_package else f"{room}.py"
            ax.text(middle, y + 4.2, name, ha="center", va="center", color="white", weight="bold")
            lines = textwrap.wrap(purpose(room), max(18, int(room_width * 1.5)))[:2]
            ax.text(middle, y + 1.8, "\n".join(lines), ha="center", va="center", color="white", size=7.5)
    return figure


def main() -> None:
    figures = {f"method-{draw.__name__}": draw for draw in (inheritance, affinity, stages)} | {"rooms": rooms}
    for name, draw in figures.items():
        file, drawn = IMAGES / f"{name}.svg", io.StringIO()
        with rc_context({"svg.hashsalt": "figures", "font.size": 10}):
            draw().savefig(drawn, format="svg", metadata={"Date": None})
        if sys.argv[1:] != ["--check"]:
            file.write_text(drawn.getvalue(), encoding="utf-8")
        elif words(drawn.getvalue()) != words(file.read_text(encoding="utf-8")):
            sys.exit(f"{file} is out of date: run scripts/figures.py")


def words(svg: str) -> list[str]:
    """Return the texts of a figure; outlines may differ between versions of Matplotlib."""
    return re.findall(r"<!-- (.*?) -->", svg)


if __name__ == "__main__":
    main()
