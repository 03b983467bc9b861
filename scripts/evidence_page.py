"""Figures, tables and verdicts of docs/evidence.md, from the results recorded by the runs of `evidence.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from tinyclip.model.axes import axis_table, count_parameters
from tinyclip.model.config import CLIPConfig
from tinyclip.model.costs import macs
from tinyclip.report.html import COLOURS

Curve = Sequence[tuple[float, float]]  # (pairs seen, top-1 in percent), in order of pairs
Results = dict[str, Any]  # {"runs": {name: {seed: record}}, "teacher": record}
START, END = "<!-- {}: scripts/evidence.py -->", "<!-- end of {} -->"
REFERENCE = "manual-50"


@dataclass(frozen=True)
class Section:
    """A comparison: the rows of a table; the first row is the baseline."""

    key: str
    rows: dict[str, str]  # name of the run -> description


SECTIONS = (
    Section("loss", {"manual-50": "affinity", "contrastive-50": "contrastive"}),
    Section("start", {"manual-50": "inherited", "random-50": "random weights, 5 times the steps"}),
    Section(
        "terms",
        {
            "manual-50": "affinity alone",
            "affinity-and-feature-50": "+ 4 x `feature`",
            "affinity-and-interactive-50": "+ `interactive`",
            "affinity-and-image-affinity-50": "+ `image_affinity`",
            "affinity-and-text-affinity-50": "+ `text_affinity`",
            "affinity-and-contrastive-50": "+ `contrastive`",
        },
    ),
    Section("ways50", {"manual-50": "manual", "calibrated-50": "calibrated", "auto-50": "auto"}),
    Section("ways25", {"manual-25": "manual", "calibrated-25": "calibrated", "auto-25": "auto"}),
    Section("stages", {"manual-25": "100 -> 50 -> 25 %", "one-stage-25": "100 -> 25 % in one stage"}),
    Section(
        "towers",
        {
            "calibrated-70": "both towers, one budget",
            "calibrated-70-image": "image tower alone",
            "calibrated-70-text": "text tower alone",
        },
    ),
)


# --- results of a run -------------------------------------------------------------------------------------------


def record(folder: Path) -> dict[str, Any]:
    """Return the figures of a finished one-stage run.

    `acc1` and similar are fractions; `curve` has (step, acc1) of each evaluation; `params` excludes the token
    embedding; `removed` is the sparsity of an auto stage at its cut.
    """
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [event for event in events if event["event"] == "evaluation"]
    last = evaluations[-1]
    result = {name: round(last[name], 5) for name in ("acc1", "acc5", "image_retrieval_recall@1")}
    result["steps"] = last["step"]
    result["curve"] = [(event["step"], round(event["acc1"], 5)) for event in evaluations]
    cuts = [event for event in events if event["event"] == "cut" and "sparsity" in event]
    if cuts:
        result |= {"removed": next(round(v, 4) for v in cuts[-1]["sparsity"].values())}
    return result | size(CLIPConfig.from_json(folder / "student" / "config.json"))


def teacher_record(folder: Path) -> dict[str, Any]:
    """Return the shipped teacher's size and results, and the curve of its own training, with 256 pairs per step."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "evaluation"]
    result = {name: round(evaluation[name], 5) for name in ("acc1", "acc5", "image_retrieval_recall@1")}
    result["curve"] = [(event["step"], round(event["acc1"], 5)) for event in events]
    return result | size(CLIPConfig.from_json(folder / "config.json"))


def size(config: CLIPConfig) -> dict[str, int]:
    """Return `params` without the token embedding, and `macs` for one picture and one text of full context length."""
    counts = count_parameters(axis_table(config))
    return {"params": counts["image"] + counts["text"], "macs": sum(macs(config).values())}


# --- aggregation ------------------------------------------------------------------------------------------------


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation; the latter is 0 for a single value."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def differences(records: dict[str, Any], reference: dict[str, Any]) -> list[float]:
    """Return top-1 differences in points between runs with the same seed, which saw the same data in the same order and
    views."""
    return [100 * (records[seed]["acc1"] - reference[seed]["acc1"]) for seed in records if seed in reference]


def verdict(differences: Sequence[float]) -> str:
    """Return `better` or `worse` if every seed agrees and the mean exceeds the standard deviation; needs more than one
    seed."""
    middle, spread = mean_and_spread(differences)
    if len(differences) < 2:
        return "one seed only"
    if abs(middle) <= spread or min(differences) * max(differences) <= 0:
        return "within the spread"
    return "better" if middle > 0 else "worse"


def reached(curve: Curve, accuracy: float) -> float | None:
    """Return the pairs at which a curve first reaches an accuracy, interpolated linearly between evaluations; None:
    never.

    Nothing is known before the first evaluation, so an accuracy reached there counts from that evaluation.
    """
    before: tuple[float, float] | None = None
    for pairs, value in curve:
        if value >= accuracy:
            if before is None:
                return pairs
            return before[0] + (pairs - before[0]) * (accuracy - before[1]) / (value - before[1])
        before = pairs, value
    return None


def times_fewer(fast: Curve, slow: Curve, accuracy: float) -> str:
    """Return how many times fewer pairs the fast one needs for an accuracy; with > if the slow one never reached it,
    and < if the slow one had it at its first evaluation, so perhaps earlier."""
    mine, other = reached(fast, accuracy), reached(slow, accuracy)
    if mine is None:
        return "-"
    if other == slow[0][0]:
        return f"< {other / mine:.1f}"
    return f"{other / mine:.1f}" if other is not None else f"> {slow[-1][0] / mine:.1f}"


def mean_curve(records: Iterable[dict[str, Any]], batch_size: int) -> list[tuple[float, float]]:
    """Return the mean over seeds of top-1 in percent at each evaluation, by pairs seen."""
    curves = [record["curve"] for record in records]
    points = zip(*curves, strict=True)
    return [(batch_size * seeds[0][0], 100 * mean(value for _, value in seeds)) for seeds in points]


def to_json(results: Results) -> str:
    """Return the results as JSON with one line per recipe, so that a diff shows which one changed."""
    runs = ",\n".join(f"{json.dumps(name)}: {json.dumps(seeds)}" for name, seeds in results["runs"].items())
    return f'{{"teacher": {json.dumps(results["teacher"])},\n"runs": {{\n{runs}\n}}}}\n'


# --- tables -----------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["--:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def section_table(section: Section, results: Results) -> str:
    """Return a table with one row per run that has results; the first row is the baseline."""
    runs, rows = results["runs"], []
    teacher = results["teacher"]
    first = next(iter(section.rows))
    for name, words in section.rows.items():
        records = list(runs.get(name, {}).values())
        if not records:
            rows.append([words, f"`{name}`", *["-"] * 5, "not run"])
            continue
        scores = [100 * record["acc1"] for record in records]
        apart = differences(runs[name], runs.get(first, {})) if name != first else []
        judged = f"{plus_minus(apart, sign='+')}, {verdict(apart)}" if apart else ""
        if len(records) != 3:
            words = f"{words} ({len(records)} seed{'s' * (len(records) > 1)})"
        params, operations = (mean(record[key] for record in records) for key in ("params", "macs"))
        rows.append(
            [
                words,
                f"`{name}`",
                f"{params / 1e6:.2f} M ({100 * params / teacher['params']:.0f} %)",
                f"{operations / 1e9:.3f}",
                plus_minus(scores),
                plus_minus([100 * record["acc5"] for record in records]),
                plus_minus([100 * record["image_retrieval_recall@1"] for record in records]),
                judged,
            ]
        )
    return table(("", "recipe", "params", "GMACs", "top-1 %", "top-5 %", "R@1 %", "difference, top-1"), rows)


def plus_minus(values: Sequence[float], sign: str = "") -> str:
    middle, spread = mean_and_spread(values)
    return f"{middle:{sign}.1f} ± {spread:.1f}" if len(values) > 1 else f"{middle:{sign}.1f}"


def fewer_table(results: Results, batch_size: int) -> str:
    """Return the pairs to each accuracy that the inherited start passes, and how many times more the others need."""
    runs = results["runs"]
    if not runs.get(REFERENCE):
        return "not run"
    inherited = mean_curve(runs[REFERENCE].values(), batch_size)
    slow = {"teacher": [(256 * step, 100 * value) for step, value in results["teacher"]["curve"]]}
    if runs.get("random-50"):
        slow["random"] = mean_curve(runs["random-50"].values(), batch_size)
    levels = [value for _, value in inherited]
    if "random" in slow:
        levels = [max(value for _, value in slow["random"]), *levels]
    rows = [
        [
            f"{level:.1f} %",
            f"{reached(inherited, level) or 0:,.0f}",
            times_fewer(inherited, slow["random"], level) if "random" in slow else "not run",
            times_fewer(inherited, slow["teacher"], level),
        ]
        for level in levels
        if level <= max(value for _, value in inherited)
    ]
    return table(("top-1", "pairs, inherited", "times fewer than random", "times fewer than the teacher took"), rows)


def cut_table(results: Results, targets: dict[str, float]) -> str:
    """Return the table of learned masks: the target, and the sparsity reached with each seed."""
    rows = []
    for name, target in targets.items():
        removed = [100 * record["removed"] for record in results["runs"].get(name, {}).values()]
        if removed:
            rows.append([f"`{name}`", f"{100 * target:.1f}", ", ".join(f"{value:.1f}" for value in removed)])
    return table(("recipe", "target, % removed", "removed, % (each seed)"), rows)


# --- the page ---------------------------------------------------------------------------------------------------


def filled(page: str, parts: dict[str, str]) -> str:
    """Return the page with each part between its markers replaced.

    Raises:
        ValueError: if the page lacks the markers of a part.
    """
    for key, text in parts.items():
        start, end = START.format(key), END.format(key)
        if start not in page or end not in page:
            raise ValueError(f"docs/evidence.md: the markers of {key} are missing; put back {start} and {end}")
        before, rest = page.split(start)
        page = f"{before}{start}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


def parts(results: Results, batch_size: int, targets: dict[str, float]) -> dict[str, str]:
    """Return every generated part of the page by its marker."""
    tables = {section.key: section_table(section, results) for section in SECTIONS}
    return tables | {"fewer": fewer_table(results, batch_size), "cuts": cut_table(results, targets)}


# --- figures ----------------------------------------------------------------------------------------------------


def save_figure(figure: Figure, path: Path) -> None:
    """Save as SVG; the same results give the same file."""
    with rc_context({"svg.hashsalt": "evidence"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def overview_figure(results: Results) -> Figure:
    """Plot the top-1 of every run, one dot per seed and a bar at the mean, grouped by comparison."""
    sections = [s for s in SECTIONS if any(results["runs"].get(name) for name in s.rows)]
    heights = [sum(bool(results["runs"].get(name)) for name in s.rows) for s in sections]
    figure = Figure(figsize=(8, 0.7 + 0.32 * sum(heights) + 0.25 * len(heights)), layout="constrained")
    panels = figure.subplots(len(sections), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for panel, section, colour in zip(panels, sections, COLOURS, strict=False):
        names = [name for name in section.rows if results["runs"].get(name)][::-1]
        for y, name in enumerate(names):
            scores = [100 * record["acc1"] for record in results["runs"][name].values()]
            panel.barh(y, mean(scores), color=colour, alpha=0.25, height=0.7)
            panel.plot(scores, [y] * len(scores), "o", color=colour, markersize=4)
        panel.set_yticks(range(len(names)), [section.rows[name].replace("`", "") for name in names], fontsize=8)
        panel.set_ylim(-0.6, len(names) - 0.4)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", alpha=0.25)
    panels[-1].set_xlabel("top-1, % (dots: seeds, bar: mean)")
    return figure


def curve_figure(results: Results, batch_size: int) -> Figure:
    """Plot top-1 by pairs seen: inherited, random, and the teacher's own training."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    teacher = results["teacher"]["curve"]
    curves = {
        "inherited, 50 % (mean of seeds)": mean_curve(results["runs"].get("manual-50", {}).values(), batch_size),
        "random weights, 50 % (mean of seeds)": mean_curve(results["runs"].get("random-50", {}).values(), batch_size),
        "the teacher's own training": [(256 * step, 100 * value) for step, value in teacher],
    }
    for (label, curve), colour in zip(curves.items(), COLOURS[1:], strict=False):
        if curve:
            axes.plot(*zip(*curve, strict=True), "o-", label=label, color=colour, markersize=3)
    axes.set(xscale="log", xlabel="pairs seen", ylabel="top-1, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
