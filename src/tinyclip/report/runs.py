"""Tables, figures and the HTML report for one or more runs."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from tinyclip.common import faults
from tinyclip.common.faults import Skipped
from tinyclip.common.files import read_json_object
from tinyclip.common.progress import track
from tinyclip.evaluate import metrics
from tinyclip.inference.pipeline import load
from tinyclip.model.config import CLIPConfig
from tinyclip.model.model import CLIP
from tinyclip.model.speed import measure
from tinyclip.recipe.recipe import Evaluation, StoredTeachers, recipe_of
from tinyclip.report import html as page
from tinyclip.report.html import COLOURS
from tinyclip.report.structure import figure as structure_figure
from tinyclip.report.structure import parts
from tinyclip.teachers.foreign import is_foreign
from tinyclip.zoo.checkpoint import read_config

COLUMNS = (
    "model",
    "params",
    "% size",
    "GMACs",
    "pairs/s",
    "top-1 %",
    "top-5 %",
    "R@1 %",
    "unseen R@5 %",
)


@dataclass
class Entry:
    """A model in a report: its place, cost and accuracy."""

    name: str
    path: Path
    measured: dict[str, Any]
    evaluation: dict[str, Any]
    stored: bool = False  # from a teacher's cache, which has its shape but not its weights

    @property
    def parameters(self) -> int:
        """The number of parameters, without the token embedding."""
        return int(self.measured["params_image"] + self.measured["params_text"])


@dataclass
class Guess:
    """A picture, its class and each model's best guesses."""

    image: Image.Image
    truth: str
    guesses: dict[str, list[tuple[str, float]]]  # model -> (class, cosine), best first


def gather(runs: Sequence[str | Path]) -> list[Entry]:
    """Collect the runs' teacher and the result of every stage, measured side by side in this process.

    Raises:
        ValueError: for a folder that is not a finished run.
    """
    entries: list[Entry] = []
    for folder in map(Path, runs):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        if not (folder / "student").is_dir():
            ended = "it has not finished; go on with --resume" if (folder / "recipe.yaml").exists() else "no run in it"
            raise ValueError(f"{folder}: {ended}")
        recipe = recipe_of(folder)
        if recipe.teacher and not any(e.name == "teacher" for e in entries):
            entries += _teacher_entry(recipe.teacher, recipe.evaluation)
        for stage in recipe.stages:
            place = folder / "stages" / stage.name
            result = read_json_object(place / "result.json")
            name = f"{folder.name}/{stage.name}" if len(recipe.stages) > 1 else folder.name
            entries.append(Entry(name, place / "last", {}, result.get("evaluation") or {}))
    _measure_side_by_side(entries)
    return entries


def _measure_side_by_side(entries: Sequence[Entry], rounds: int = 3) -> None:
    """Time the models in turns, so that a slowdown of the machine affects all; take the median of the rounds."""
    models = [CLIP(read_config(e.path)).eval() if e.stored else load(e.path).model for e in entries]
    turns = [
        [measure(model, seconds=0.4) for model in models]
        for _ in track(range(rounds), "timing the models", rounds, "rounds")
    ]
    for i, entry in enumerate(entries):
        mine = sorted((turn[i] for turn in turns), key=lambda figures: figures["pairs_per_s"])
        entry.measured = mine[rounds // 2]


def _teacher_entry(teacher: str | StoredTeachers, evaluation: Evaluation | None) -> list[Entry]:
    """Return the teacher of a recipe. For stored teachers, the first one, without accuracies, if its cache exists;
    none for a teacher from another library, which cannot be measured next to ours."""
    if isinstance(teacher, str) and is_foreign(teacher):
        return []
    if not isinstance(teacher, str):
        stored = Path(teacher.folders[0])
        known = (stored / "config.json").exists()  # missing for a teacher from another library
        return [Entry("teacher", stored, {}, {}, stored=True)] if known else []
    path, clip = Path(teacher), load(teacher)
    figures: dict[str, Any] = {}
    if evaluation:
        figures = metrics.evaluate(clip, metrics.open_dataset(evaluation.data, evaluation.templates))
    return [Entry("teacher", path, {}, figures)]


def table(entries: Sequence[Entry]) -> list[list[str]]:
    """Return rows of text for `COLUMNS`, with a dash for metrics that were not computed."""
    reference = next((e.parameters for e in entries if e.name == "teacher"), None)
    rows = []
    for e in entries:
        macs = (e.measured["macs_image"] + e.measured["macs_text"]) / 1e9
        share = f"{100 * e.parameters / reference:.0f}" if reference else "-"
        unseen = e.evaluation.get("subsets", {}).get("unseen", {})
        figures = [
            _percent(e.evaluation, "acc1"),
            _percent(e.evaluation, "acc5"),
            _percent(e.evaluation, "image_retrieval_recall@1"),
            _percent(unseen, "image_retrieval_recall@5"),
        ]
        pairs = f"{e.measured['pairs_per_s']:.0f}"
        rows.append([e.name, f"{e.parameters / 1e6:.2f} M", share, f"{macs:.3f}", pairs, *figures])
    return rows


def _percent(figures: dict[str, Any], name: str) -> str:
    return f"{100 * figures[name]:.1f}" if figures.get(name) is not None else "-"


def curves(runs: Sequence[str | Path]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return metric name -> run -> (step, value): `acc1` in percent and the loss, over consecutive stages."""
    result: dict[str, dict[str, list[tuple[int, float]]]] = {"top-1, %": {}, "retrieval R@1, %": {}, "loss": {}}
    for folder in map(Path, runs):
        offsets: dict[str, int] = {}  # first step of each stage; a resumed stage is announced twice
        before = 0
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["event"] == "stage":
                offset = offsets.setdefault(event["stage"], before)
            elif event["event"] == "evaluation":
                for quantity, name in (("top-1, %", "acc1"), ("retrieval R@1, %", "image_retrieval_recall@1")):
                    if event.get(name) is not None:
                        points = result[quantity].setdefault(folder.name, [])
                        points.append((offset + event["step"], 100 * event[name]))
            elif event["event"] == "step":
                if event["loss"] is not None:
                    result["loss"].setdefault(folder.name, []).append((offset + event["step"], event["loss"]))
                before = offset + event["step"]
    return {quantity: points for quantity, points in result.items() if points}


def guesses(entries: Sequence[Entry], data: str | Path, templates: str | None, count: int = 12) -> list[Guess]:
    """Return evaluation pictures spread evenly over the data, with each model's three best classes."""
    dataset = metrics.open_dataset(data, templates)
    chosen = _spread((e for e in dataset if e.label is not None), count)
    result = [Guess(e.image, dataset.classnames[e.label or 0], {}) for e in chosen]
    for entry in (e for e in entries if not e.stored):
        clip = load(entry.path)
        classes = metrics.class_features(clip, dataset.classnames, dataset.templates[:1])
        best = (clip.encode_image([e.image for e in chosen]).float() @ classes.T).topk(min(3, len(classes)))
        for guess, values, indices in zip(result, best.values, best.indices, strict=True):
            named = [(dataset.classnames[i], v) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
            guess.guesses[entry.name] = named
    return result


def _spread(examples: Iterable[metrics.Example], count: int) -> list[metrics.Example]:
    """Pick about `count` evenly spaced examples, holding at most twice as many in memory."""
    kept: list[metrics.Example] = []
    distance = 1
    for i, example in enumerate(examples):
        if i % distance == 0:
            kept.append(example)
        if len(kept) == 2 * count:
            kept, distance = kept[::2], 2 * distance
    return kept[:: max(1, len(kept) // count)][:count]


def curve_figure(series: dict[str, dict[str, list[tuple[int, float]]]]) -> Figure:
    """Plot one panel per quantity, over training steps."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(series)))
    for panel, (quantity, runs) in zip(axes, series.items(), strict=True):
        for colour, (name, points) in zip(COLOURS[1:], runs.items(), strict=False):
            steps, values = zip(*points, strict=True)
            panel.plot(steps, values, label=name, color=colour, marker="o" if len(points) < 20 else None, markersize=3)
        panel.set(xlabel="step", ylabel=quantity)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def write_report(
    path: str | Path,
    title: str,
    entries: Sequence[Entry],
    series: dict[str, dict[str, list[tuple[int, float]]]],
    grid: Sequence[Guess],
    left_out: Sequence[Skipped] = (),
) -> None:
    """Write a self-contained HTML report."""
    from tinyclip.common.files import write_atomically

    measured = entries[0].measured
    costs = (
        f"Parameters without the token embedding. pairs/s: {measured['dtype']} on {measured['device']}, batch "
        f"{measured['batch_size']}, texts of full length, the models taking turns in one process."
    )
    training = "Stages are plotted one after another. Losses of different terms cannot be compared."
    seen = (
        "Pictures evenly spread over the evaluation data, with each model's three best classes by the first prompt, "
        "and their cosine similarity. Green: the right one."
    )
    body = [
        f"<h2>Models</h2>{page.table(COLUMNS, table(entries))}{page.note(costs)}",
        f"<h2>Training</h2>{page.note(training)}{page.framed(page.svg(curve_figure(series)))}",
        _structures(entries),
        f'<h2>What the models see</h2>{page.note(seen)}<div class="grid">{"".join(map(_card, grid))}</div>',
        _faults(left_out),
    ]
    write_atomically(path, page.page(title, "\n".join(body)))


def _faults(left_out: Sequence[Skipped]) -> str:
    """Return a table of what was left out of the training data, by cause."""
    if not left_out:
        return ""
    note = "Each sample is listed once, even if several epochs met it; skipped.jsonl in the run's folder has them all."
    rows = [(*row, faults.CAUSES[row[0]]) for row in faults.rows(left_out)]
    table = page.table((*faults.COLUMNS, "what it is"), rows, "words")
    return f"<h2>Left out of the training data</h2>{page.note(note)}{table}"


def _structures(entries: Sequence[Entry]) -> str:
    """Draw every model whose blocks differ in size, next to the teacher."""
    configs = {e.name: CLIPConfig.from_json(e.path / "config.json") for e in entries if e.name != "teacher"}
    teacher = next((e for e in entries if e.name == "teacher"), None)
    original = read_config(teacher.path) if teacher else None
    found = {name: config for name, config in configs.items() if any(len(set(p.counts)) > 1 for p in parts(config))}
    if not found:
        return ""
    note = "Heads and neurons of each block that learned or measured masks kept; grey: the teacher's."
    pictures = (
        f"<h3>{html.escape(name)}</h3>{page.framed(page.svg(structure_figure(config, original)))}"
        for name, config in found.items()
    )
    return f"<h2>Structure</h2>{page.note(note)}{''.join(pictures)}"


def _card(guess: Guess) -> str:
    said = {
        model: [(f"{name} {value:.2f}", name == guess.truth) for name, value in named]
        for model, named in guess.guesses.items()
    }
    return page.card(guess.image, guess.truth, said)


def report(runs: Sequence[str | Path], path: str | Path, title: str) -> list[Entry]:
    """Gather the runs, write their report and return the entries."""
    entries = gather(runs)
    evaluation, grid = recipe_of(Path(runs[0])).evaluation, list[Guess]()
    if evaluation and any("acc1" in e.evaluation for e in entries):
        grid = guesses(entries, evaluation.data, evaluation.templates)
    left_out = [skipped for run in runs for skipped in faults.read(Path(run) / "skipped.jsonl")]
    write_report(path, title, entries, curves(runs), grid, left_out)
    return entries
