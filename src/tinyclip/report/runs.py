"""Tables, figures and the HTML report for one or more runs."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from tinyclip.report.figures import QUANTITIES, Curves, accuracy_figure, curve_figure, curves
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


def write_report(
    path: str | Path,
    title: str,
    entries: Sequence[Entry],
    found: Curves,
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
    training = (
        "Stages follow one another; a dot with its name marks the end of each. A cut lowers the accuracy, training "
        "brings it back. Losses of different terms cannot be compared."
    )
    seen = (
        "Pictures evenly spread over the evaluation data, with each model's three best classes by the first prompt, "
        "and their cosine similarity. Green: the right one."
    )
    body = [
        f"<h2>Models</h2>{page.table(COLUMNS, table(entries))}{page.note(costs)}",
        _accuracy(entries),
        f"<h2>Training</h2>{page.note(training)}{page.framed(page.svg(curve_figure(found)))}",
        _structures(entries),
        f'<h2>What the models see</h2>{page.note(seen)}<div class="grid">{"".join(map(_card, grid))}</div>',
        _faults(left_out),
    ]
    write_atomically(path, page.page(title, "\n".join(body)))


def accuracy_points(entries: Sequence[Entry]) -> tuple[str, list[tuple[str, float, float]]]:
    """Return the name of the accuracy that all models were evaluated for, and name, GMACs and percent of each model;
    no points where nothing was evaluated."""
    for quantity, key in QUANTITIES.items():
        points = [
            (e.name, (e.measured["macs_image"] + e.measured["macs_text"]) / 1e9, 100 * e.evaluation[key])
            for e in entries
            if e.evaluation.get(key) is not None
        ]
        if points:
            return quantity, points
    return "", []


def _accuracy(entries: Sequence[Entry]) -> str:
    quantity, points = accuracy_points(entries)
    if len(points) < 2:
        return ""
    return f"<h2>Accuracy and cost</h2>{page.framed(page.svg(accuracy_figure(points, quantity)))}"


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
