"""Show a comparison as a table, as figures, and as a folder with a self-contained page."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from tinyclip.common import faults
from tinyclip.common.files import json_text
from tinyclip.common.folders import atomic_directory
from tinyclip.evaluate.compare import RECALLS, Outcome, differences, thumbnails
from tinyclip.evaluate.stats import BINS, LEVEL, RESAMPLES, calibration
from tinyclip.report import html

MARKERS = "osD^vP*X"
CLASSES = 10  # classes shown with the largest losses, and gains
COARSE = 5  # pictures per class below which accuracy says little
FORMULAS = "=+-@\t\r\n＝＋－＠"  # first characters of a spreadsheet formula
LONGEST = 36  # characters of a class name in a figure

Costs = Mapping[str, Mapping[str, Any]]


def result(outcomes: Sequence[Outcome], costs: Costs) -> dict[str, Any]:
    """Return all metrics as written to `compare.json`: fractions, 95 % intervals, nats."""
    data = {
        outcome.name: outcome.facts
        | {"skipped": len(outcome.skipped), "skipped_by_cause": faults.counts(outcome.skipped)}
        | {"tested": outcome.main, "models": outcome.figures}
        for outcome in outcomes
    }
    return {"teacher": next(iter(costs)), "models": dict(costs), "data": data}


# --- the table ----------------------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome], costs: Costs) -> tuple[list[str], list[list[str]]]:
    """Return columns, one per model, and rows, one per metric; a row of one cell names the data of those below."""
    rows = [
        _row("parameters, M", costs, lambda c: f"{(c['params_image'] + c['params_text']) / 1e6:.2f}"),
        _row("MACs, G", costs, lambda c: f"{(c['macs_image'] + c['macs_text']) / 1e9:.3f}"),
        _row("computed in", costs, _computing),
        _row("size on disk, MB", costs, lambda c: f"{c['bytes'] / 1e6:.1f}"),
        _row("pairs/s", costs, lambda c: f"{c['pairs_per_s']:,.0f}"),
        _row("latency of a pair, ms", costs, lambda c: f"{c['latency_ms']:.2f}"),
    ]
    for outcome in outcomes:
        rows += [[heading(outcome)], *_quality(outcome)]
    return ["", *costs], [row for row in rows if len(row) == 1 or set(row[1:]) != {"-"}]


def heading(outcome: Outcome) -> str:
    facts = outcome.facts
    counts = ((facts["pictures"], "pictures"), (facts["classes"], "classes"), (facts["captions"], "captions"))
    return f"{outcome.name}: " + ", ".join(f"{n:,} {what}" for n, what in counts if n)


def _quality(outcome: Outcome) -> list[list[str]]:
    figures = outcome.figures
    subsets = [key for key in next(iter(figures.values())) if key.startswith("acc1 ")]
    shares = {"acc1": "top-1, %", "acc5": "top-5, %"}
    shares |= {key: f"top-1 of {key.removeprefix('acc1 ')}, %" for key in subsets}
    for k in RECALLS:
        shares |= {f"image_retrieval_recall@{k}": f"image R@{k}, %", f"text_retrieval_recall@{k}": f"text R@{k}, %"}
    rows = []
    for key, words in sorted(shares.items(), key=lambda item: item[0] != outcome.main):  # the metric under test first
        rows.append(_row(words, figures, lambda f, key=key: _percent(f[key], f["intervals"][key])))
        if key == outcome.main:
            rows.append(
                _row("change from the teacher", figures, lambda f: _points(f["change"], f["intervals"]["change"]))
            )
            rows.append(_row("pictures lost and won", figures, lambda f: f"{f['lost']:,} and {f['won']:,}"))
            rows.append(_row("McNemar's p", figures, lambda f: f"{f['p_value']:.2g}"))
    agreement = lambda f: _percent(f["agreement"], f["intervals"]["agreement"])  # noqa: E731
    rows.append(_row("same answers as the teacher, %", figures, agreement))
    rows.append(_row("affinity divergence, nats", figures, lambda f: f"{f['affinity_divergence']:.3f}"))
    rows.append(_row("cosine of images", figures, lambda f: f"{f['image_cosine']:.3f}"))
    rows.append(_row("cosine of texts", figures, lambda f: f"{f['text_cosine']:.3f}"))
    rows.append(_row("calibration error, %", figures, lambda f: f"{100 * f['ece']:.1f}"))
    return rows


def _row(words: str, models: Mapping[str, Mapping[str, Any]], cell: Any) -> list[str]:
    """Return a table row, with a dash for models without this metric."""
    row = [words]
    for facts in models.values():
        try:
            row.append(cell(facts))
        except (KeyError, TypeError):
            row.append("-")
    return row


def _computing(cost: Mapping[str, Any]) -> str:
    return f"{cost['dtype']} on {cost['device']}" + (f", {cost['runtime']}" if "runtime" in cost else "")


def _percent(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:.1f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _points(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:+.1f} ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"


# --- figures ------------------------------------------------------------------------------------------------------


@contextmanager
def drawing() -> Iterator[None]:
    """Draw figures with names as plain text (not mathtext), in fonts that the reader's machine provides."""
    with rc_context({"text.parse_math": False, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def accuracy_figure(outcome: Outcome, costs: Costs) -> Figure:
    """Plot the metric under test with its interval, against MACs and the latency of a pair with its range."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    shown = {}
    for i, (name, cost) in enumerate(costs.items()):
        figures = outcome.figures[name]
        value, ends = 100 * figures[outcome.main], [100 * end for end in figures["intervals"][outcome.main]]
        style = {"color": html.COLOURS[i % len(html.COLOURS)], "marker": MARKERS[i % len(MARKERS)], "capsize": 3}
        style["yerr"] = _distances(value, ends)
        wide = _distances(cost["latency_ms"], cost["latency_ms_range"])
        shown[name] = panels[1].errorbar(cost["latency_ms"], value, xerr=wide, **style)
        panels[0].errorbar((cost["macs_image"] + cost["macs_text"]) / 1e9, value, **style)
    panels[0].set_xlabel("GMACs of a pair")
    panels[1].set_xlabel("latency of a pair, ms")
    panels[0].set_ylabel("top-1, %" if outcome.main == "acc1" else "text R@1, %")
    for panel in panels:
        panel.set_xlim(0, 1.08 * panel.dataLim.x1)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _distances(value: float, ends: Sequence[float]) -> list[list[float]]:
    """Convert an interval to the distances that `errorbar` takes."""
    return [[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]]


def class_figure(outcome: Outcome, student: str) -> Figure | None:
    """Plot the classes with the largest losses and gains from teacher to student: in accuracy or, if classes have fewer
    than `COARSE` pictures on average, in mean probability of the right class. None when no class changed."""
    models = list(outcome.answers)
    teacher, colour = models[0], html.COLOURS[models.index(student) % len(html.COLOURS)]
    labels, size = outcome.own, len(outcome.choices)
    counts = np.bincount(labels, minlength=size)
    coarse = len(labels) < COARSE * np.count_nonzero(counts)

    def mean(model: str) -> np.ndarray:
        answers = outcome.answers[model]
        values = answers.truth if coarse else answers.right[:, 0].astype(np.float64)
        return 100 * np.bincount(labels, weights=values, minlength=size) / np.maximum(counts, 1)

    before, after = mean(teacher), mean(student)
    order = np.argsort(after - before, kind="stable")
    lost = [i for i in order[:CLASSES] if after[i] < before[i]]
    won = [i for i in order[::-1][:CLASSES] if after[i] > before[i]]
    if not lost and not won:
        return None
    figure = Figure(figsize=(10, 0.7 + 0.27 * max(len(lost), len(won), 3)), layout="constrained")
    for panel, title, places in zip(figure.subplots(1, 2), ("lost most", "won most"), (lost, won), strict=True):
        y = np.arange(len(places))[::-1]
        panel.hlines(y, before[places], after[places], color="#c8ccd4", linewidth=3, zorder=1)
        handles = panel.plot(before[places], y, "o", color=html.COLOURS[0])
        handles += panel.plot(after[places], y, "D", color=colour)
        panel.set_yticks(y, [f"{_short(outcome.choices[i])} ({counts[i]})" for i in places], fontsize=8)
        panel.set_xlim(-3, 103)
        panel.set_xlabel("probability of the right class, %" if coarse else "top-1, %", fontsize=9)
        panel.set_title(f"{title} (number of pictures)", fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", alpha=0.25)
    figure.legend(handles, [teacher, student], loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def _short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def reliability_figure(outcome: Outcome) -> Figure:
    """Plot each model's accuracy by confidence and, below, the share of its answers."""
    models = list(outcome.answers)
    width = min(4, len(models))
    lines = -(-len(models) // width)
    figure = Figure(figsize=(2.7 * width + 0.4, 3.4 * lines), layout="constrained")
    panels = figure.subplots(2 * lines, width, squeeze=False, sharex=True, height_ratios=[3, 1] * lines)
    centres = (np.arange(BINS) + 0.5) / BINS
    for i in range(lines * width):
        above, below = panels[2 * (i // width)][i % width], panels[2 * (i // width) + 1][i % width]
        if i >= len(models):
            above.set_axis_off()
            below.set_axis_off()
            continue
        answers = outcome.answers[models[i]]
        found = calibration(answers.confidence, answers.right[:, 0])
        colour = html.COLOURS[i % len(html.COLOURS)]
        above.plot([0, 1], [0, 1], color="#999", linewidth=1, linestyle="--")
        above.bar(centres, found.accuracy, width=0.9 / BINS, color=colour)
        above.set_title(f"{_short(models[i], 28)}\nerror {100 * found.error:.1f} %", fontsize=9)
        below.bar(centres, 100 * found.counts / found.counts.sum(), width=0.9 / BINS, color=colour, alpha=0.5)
        below.set_xlabel("confidence", fontsize=8)
        above.set(xlim=(0, 1), ylim=(0, 1))
        for panel, words in ((above, "accuracy"), (below, "answers, %")):
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
            if i % width == 0:
                panel.set_ylabel(words, fontsize=8)
    return figure


def figures(outcome: Outcome, costs: Costs) -> dict[str, tuple[str, Figure]]:
    """Return name -> title and figure, for the figures that the data allow."""
    teacher, *students = outcome.answers
    drawn = {
        "accuracy": ("Accuracy and cost", accuracy_figure(outcome, costs)),
        "calibration": ("Calibration", reliability_figure(outcome)),
    }
    for number, student in enumerate(students if outcome.kind == "class" else [], 1):
        if figure := class_figure(outcome, student):
            drawn[f"classes-{number}"] = f"Classes: {student} against {teacher}", figure
    return drawn


# --- the folder ---------------------------------------------------------------------------------------------------


def write(folder: Path, outcomes: Sequence[Outcome], costs: Costs) -> None:
    """Write `report.html`, `compare.json`, `answers.csv` (each model's answer for each picture) and the figures. Reads
    the data once more, for the pictures on which the models differ.

    Raises:
        ValueError: when the folder cannot be written, or holds anything but a comparison of ours.
    """
    teacher = next(iter(costs))
    columns, rows = table(outcomes, costs)
    body = [html.table(columns, rows), *(html.note(text) for text in _notes())]
    with atomic_directory(folder, "comparison") as place:
        (place / "figures").mkdir()
        for number, outcome in enumerate(outcomes, 1):
            body.append(f"<h2>{html.escaped(heading(outcome))}</h2>")
            with drawing():
                for name, (title, figure) in figures(outcome, costs).items():
                    drawn = html.svg(figure)
                    body.append(f"<h3>{html.escaped(title)}</h3>{html.framed(drawn)}")
                    (place / "figures" / f"{number}-{name}.svg").write_text(drawn, encoding="utf-8")
            body += [_cards(outcome), _skipped(outcome)]
        (place / "report.html").write_text(html.page(f"{teacher} and its students", "\n".join(body)), encoding="utf-8")
        text = json_text(result(outcomes, costs), indent=2) + "\n"
        (place / "compare.json").write_text(text, encoding="utf-8")
        _write_answers(place / "answers.csv", outcomes)


def _notes() -> list[str]:
    return [
        f"In brackets: {100 * LEVEL:.0f} % intervals, percentiles of {RESAMPLES:,} bootstrap samples of the "
        "pictures, with classes and captions fixed. McNemar's exact test: the probability that equally good models "
        "would split the lost and won pictures this unevenly; not corrected for the number of students.",
        "Affinity divergence: mean KL divergence of the student's distributions of texts for an image and of images "
        f"for a text from the teacher's. Calibration error: expected, over {BINS} bins of confidence. Both at each "
        "model's own logit scale.",
        "Parameters without the token embedding. Speed with texts of full length: pairs/s in batches of 32, latency "
        "of a single pair, the models taking turns in one process.",
    ]


def _cards(outcome: Outcome) -> str:
    found = differences(outcome)
    pictures = thumbnails(outcome, [i for places in found.values() for i in places])
    titles = {"lost": "Only the teacher is right", "won": "Only students are right"}
    parts = []
    for kind, places in found.items():
        cards = [_card(outcome, i, pictures[i]) for i in places if i in pictures]
        if cards:
            parts.append(f'<h3>{titles[kind]}</h3><div class="grid">{"".join(cards)}</div>')
    note = "Each model's answer and its confidence; sorted by how much the probability of the right answer differs."
    return html.note(note) + "".join(parts) if parts else ""


def _card(outcome: Outcome, i: int, image: Any) -> str:
    said = {
        model: [(f"{outcome.choices[a.choice[i]]}, {100 * a.confidence[i]:.0f} %", bool(a.right[i, 0]))]
        for model, a in outcome.answers.items()
    }
    return html.card(image, outcome.truth(i), said)


def _skipped(outcome: Outcome) -> str:
    if not outcome.skipped:
        return ""
    rows = faults.rows(outcome.skipped)
    return f"<h3>Left out</h3>{html.table(faults.COLUMNS, rows, 'words')}"


def _write_answers(path: Path, outcomes: Sequence[Outcome]) -> None:
    models = list(outcomes[0].answers)
    columns = [f"{model}{what}" for model in models for what in ("", ", right", ", confidence")]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["data", "key", "truth", *map(cell, columns)])
        for outcome in outcomes:
            for i, key in enumerate(outcome.keys):
                row = [cell(outcome.name), cell(key), cell(outcome.truth(i))]
                for a in outcome.answers.values():
                    row += [cell(outcome.choices[a.choice[i]]), str(int(a.right[i, 0])), f"{a.confidence[i]:.4f}"]
                writer.writerow(row)


def cell(text: str) -> str:
    """Escape text for a CSV: anything a spreadsheet would run as a formula gets an apostrophe, except numbers."""
    number = re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", text)
    return f"'{text}" if text[:1] in FORMULAS and text and not number else text
