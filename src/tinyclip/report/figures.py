"""Figures of a run report: accuracy against cost, and the course of the training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tinyclip.recipe.recipe import recipe_of
from tinyclip.report.html import COLOURS

QUANTITIES = {"top-1, %": "acc1", "retrieval R@1, %": "image_retrieval_recall@1"}
LOSS_POINTS = 100  # a curve of losses is averaged down to this many points
Points = list[tuple[int, float]]


@dataclass
class Curves:
    """What runs logged, over samples seen.

    Args:
        values: quantity -> run -> (samples, value).
        ends: run -> (samples, stage) at the end of each stage.
    """

    values: dict[str, dict[str, Points]] = field(default_factory=dict)
    ends: dict[str, list[tuple[int, str]]] = field(default_factory=dict)


def curves(runs: Sequence[str | Path]) -> Curves:
    """Read the evaluations in percent, and the losses, of consecutive stages."""
    values: dict[str, dict[str, Points]] = {name: {} for name in (*QUANTITIES, "loss")}
    ends: dict[str, list[tuple[int, str]]] = {}
    for folder in map(Path, runs):
        recipe = recipe_of(folder)
        before, start = 0, {}
        for stage in recipe.stages:
            start[stage.name] = before, stage.batch_size
            before += stage.steps * stage.batch_size
            ends.setdefault(folder.name, []).append((before, stage.name))
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["event"] not in ("evaluation", "step"):
                continue
            offset, batch_size = start[event["stage"]]
            found = {"loss": event.get("loss")} if event["event"] == "step" else {}
            if event["event"] == "evaluation":
                found = {quantity: event.get(name) for quantity, name in QUANTITIES.items()}
            for quantity, value in found.items():
                if value is not None and math.isfinite(value):
                    shown = value if quantity == "loss" else 100 * value
                    points = values[quantity].setdefault(folder.name, [])
                    points.append((offset + event["step"] * batch_size, shown))
    return Curves({quantity: points for quantity, points in values.items() if points}, ends)


def curve_figure(found: Curves) -> Figure:
    """Plot one panel per quantity, over samples seen; a dot and its name mark the end of each stage."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(found.values)))
    colours = dict(zip(found.ends, COLOURS[1:] * len(found.ends), strict=False))
    for panel, (quantity, runs) in zip(panels, found.values.items(), strict=True):
        for name, points in runs.items():
            drawn = _averaged(points) if quantity == "loss" else points
            samples, values = zip(*drawn, strict=True)
            panel.plot(samples, values, label=name, color=colours[name], linewidth=1.3)
            if quantity != "loss" and len(found.ends[name]) > 1:
                _mark_ends(panel, dict(points), found.ends[name], colours[name])
        panel.set(xlabel="samples seen", ylabel=quantity)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _count(x)))
        _plain(panel)
    lines = {line.get_label(): line for panel in panels for line in panel.lines if line.get_label() in colours}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def accuracy_figure(points: Sequence[tuple[str, float, float]], ylabel: str) -> Figure:
    """Plot the accuracy of models against their cost; the stages of a run are joined and named.

    Args:
        points: name, GMACs of a pair, accuracy in percent. `RUN/STAGE` is a stage of a run.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    draw_accuracy(figure.subplots(), points, ylabel)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def draw_accuracy(panel: Axes, points: Sequence[tuple[str, float, float]], ylabel: str) -> None:
    """Draw what `accuracy_figure` shows on a panel, without the legend."""
    groups: dict[str, list[tuple[str, float, float]]] = {}
    for point in points:
        groups.setdefault(point[0].partition("/")[0], []).append(point)
    for colour, (run, group) in zip(COLOURS * len(groups), groups.items(), strict=False):
        names, costs, values = zip(*group, strict=True)
        panel.plot(costs, values, label=run, color=colour, marker="o", markersize=5, linewidth=1)
        for name, cost, value in group:
            _label(panel, name.partition("/")[2], cost, value, colour)
    panel.set(xlabel="GMACs of a pair", ylabel=ylabel)
    panel.set_xlim(0, 1.1 * panel.dataLim.x1)
    panel.set_ylim(0, 1.1 * max(panel.dataLim.y1, 1.0))
    _plain(panel)


def _averaged(points: Points) -> Points:
    """Average neighbouring points, down to `LOSS_POINTS`."""
    groups = np.array_split(np.array(points), min(LOSS_POINTS, len(points)))
    return [(int(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups]


def _mark_ends(panel: Axes, values: dict[int, float], ends: Sequence[tuple[int, str]], colour: str) -> None:
    for samples, stage in ends:
        if samples in values:
            panel.plot(samples, values[samples], color=colour, marker="o", markersize=4)
            _label(panel, stage, samples, values[samples], colour)


def _label(panel: Axes, text: str, x: float, y: float, colour: str) -> None:
    if text:
        panel.annotate(text, (x, y), (4, 4), textcoords="offset points", color=colour, fontsize=7)


def _plain(panel: Axes) -> None:
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _count(x: float) -> str:
    """Return a number of samples in short: 64k, 1.5M."""
    if x >= 1e6:
        return f"{x / 1e6:g}M"
    return f"{x / 1e3:g}k" if x >= 1e3 else f"{x:g}"
