"""Compare a teacher and its students on the same pictures: accuracy, agreement, calibration and cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tinyclip.common.faults import Skipped, Unusable, why
from tinyclip.common.progress import ended, heard, tell, track
from tinyclip.evaluate.contenders import Contender
from tinyclip.evaluate.metrics import Dataset, Example, as_tensor, class_features, encode_images
from tinyclip.evaluate.stats import Bootstrapped, bootstrap, calibration, mcnemar
from tinyclip.inputs.batching import batches
from tinyclip.inputs.transforms import thumbnail
from tinyclip.loss import affinity_loss

AT_ONCE = 64  # pictures decoded and held at once
TILE = 2**22  # similarities computed at once
RECALLS = (1, 5, 10)

Columns = dict[tuple[str, str], tuple[np.ndarray, np.ndarray | float]]  # (model, metric) -> input of `bootstrap`


@dataclass(frozen=True)
class Answers:
    """A model's choice for each picture among the classes or, without classes, among the captions."""

    choice: np.ndarray  # int64 (n,)
    confidence: np.ndarray  # (n,) probability of the choice: softmax of similarities at the model's own logit scale
    truth: np.ndarray  # (n,) probability of the truth; here and above, captions of one picture are summed
    right: np.ndarray  # bool (n, k): whether the top 1 to top k = 5 choices contain the truth


@dataclass
class Outcome:
    """The results of all models on one dataset; the first model is the teacher."""

    name: str
    dataset: Dataset
    kind: str  # what the models choose: class or caption
    choices: list[str]  # the classes or captions
    own: np.ndarray  # int64 (n,): each picture's class, or its number among the captioned ones
    groups: np.ndarray  # for each choice, the `own` of the pictures it is right for
    pictures: list[int]  # positions in the data of the answered pictures
    keys: list[str]
    answers: dict[str, Answers]
    facts: dict[str, Any]
    skipped: list[Skipped]
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, answers in self.answers.items():
            ece = calibration(answers.confidence, answers.right[:, 0]).error
            self.figures[name] = {"ece": ece, "intervals": {}}

    @property
    def main(self) -> str:
        """The metric under test: `acc1` or, without classes, recall@1 of captions."""
        return "acc1" if self.kind == "class" else "text_retrieval_recall@1"

    def truth(self, i: int) -> str:
        """Return the truth of an answered picture in words; the first caption, if there are several."""
        return self.choices[int(np.argmax(self.groups == self.own[i]))]


# --- what models make of the data ---------------------------------------------------------------------------------


def check(dataset: Dataset) -> None:
    """Check that the data has a picture with a caption, or with a class out of at least two.

    Raises:
        ValueError: when it has none.
    """
    some = False
    for example in dataset:
        if example.captions or (example.label is not None and len(dataset.classnames) > 1):
            return
        some = True
    if len(dataset.classnames) == 1:
        raise ValueError(f"{dataset.path}: only one class ({dataset.classnames[0]}), so every answer would be right")
    if some:
        raise ValueError(f"{dataset.path}: neither classes nor captions to compare the models on")
    raise Unusable(f"{dataset.path}: no readable pictures{why(dataset.skipped)}")


def judge(
    contenders: Sequence[Contender], dataset: Dataset, name: str, progress: Callable[[int], None] = lambda n: None
) -> Outcome:
    """Read the data once for all models, and compare their results.

    Args:
        contenders: the teacher first; each encodes with its own tokenizer and preprocessing.
        progress: called with the number of pictures read so far.

    Raises:
        ValueError: when nothing in the data can be read.
    """
    images, examples = _encode(contenders, dataset, progress)
    skipped = list(dataset.skipped)
    classed = [i for i, e in enumerate(examples) if e.label is not None] if len(dataset.classnames) > 1 else []
    captioned = [i for i, e in enumerate(examples) if e.captions]
    captions = [caption for i in captioned for caption in examples[i].captions]
    owner = np.array([n for n, i in enumerate(captioned) for _ in examples[i].captions], np.int64)
    prompts = [class_features(c.clip, dataset.classnames, dataset.templates) for c in contenders] if classed else []
    told = track(contenders, f"{name}: encoding captions", len(contenders), "models")
    texts = [as_tensor(c.clip.encode_text(captions)) for c in told] if captioned else []

    if classed:
        own = np.array([examples[i].label for i in classed], np.int64)
        choices, groups = list(dataset.classnames), np.arange(len(dataset.classnames))
    else:
        own, choices, groups = np.arange(len(captioned)), captions, owner
    pictures = classed or captioned
    answers = {
        c.name: answer(image[pictures], text, own, groups, exp(c.clip.logit_scale))
        for c, image, text in zip(contenders, images, prompts or texts, strict=True)
    }
    facts: dict[str, Any] = {"path": str(dataset.path), "pictures": len(examples), "captions": len(captions)}
    facts |= {"classes": len(choices) if classed else 0, "templates": len(dataset.templates) if classed else 0}
    kind, keys = "class" if classed else "caption", [examples[i].key for i in pictures]
    outcome = Outcome(name, dataset, kind, choices, own, groups, pictures, keys, answers, facts, skipped)
    if classed:
        _of_classes(outcome, [examples[i].subset for i in classed])
    if captioned:
        _of_captions(outcome, [image[captioned] for image in images], texts, owner)
    _alike(outcome, contenders, images, captioned or classed, texts or prompts)
    return outcome


def _encode(
    contenders: Sequence[Contender], dataset: Dataset, progress: Callable[[int], None]
) -> tuple[list[Tensor], list[Example]]:
    """Return each model's features (pictures, embed_dim), and the examples without their pictures."""
    found: list[list[Tensor]] = [[] for _ in contenders]
    examples: list[Example] = []
    count = dataset.about() if heard() else None
    for batch in batches(dataset, AT_ONCE):
        for mine, contender in zip(found, contenders, strict=True):
            features, done = encode_images(contender.clip, batch)
            mine.append(features)
        examples += done
        progress(len(examples))
        tell(f"comparing on {dataset.path}", len(examples), count and max(count, len(examples) + 1), "pictures")
    ended(f"comparing on {dataset.path}")
    if not examples:
        raise Unusable(f"{dataset.path}: no readable pictures{why(dataset.skipped)}")
    return [torch.cat(mine) for mine in found], examples


def answer(images: Tensor, texts: Tensor, own: np.ndarray, groups: np.ndarray, scale: float) -> Answers:
    """Return the model's choice for each picture.

    Args:
        images: (n, d) normalised.
        texts: (m, d) normalised, one per choice.
        own, groups: int (n,) and (m,): a choice is right for pictures with the same number.
        scale: the factor of the similarities, exp(logit_scale).
    """
    mine, theirs = torch.from_numpy(own), torch.from_numpy(groups)
    count = 1 + int(max(own.max(), groups.max()))
    parts: list[tuple[Tensor, ...]] = []
    for part in _tiles(len(images), len(texts)):
        cosines, right = images[part] @ texts.T, mine[part, None]
        best = cosines.topk(min(5, len(texts)), dim=1).indices
        chances = torch.zeros(len(cosines), count).index_add_(1, theirs, (scale * cosines).softmax(1))
        chosen = theirs[best]
        hits = (chosen == right).cummax(1).values
        parts.append((best[:, 0], chances.gather(1, chosen[:, :1])[:, 0], chances.gather(1, right)[:, 0], hits))
    return Answers(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


def recalled(rows: Tensor, columns: Tensor, own: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return bool (n, 3): whether the nearest 1, 5 and 10 columns of each row include one with its number."""
    mine, theirs = torch.from_numpy(own), torch.from_numpy(groups)
    found = []
    for part in _tiles(len(rows), len(columns)):
        best = (rows[part] @ columns.T).topk(min(max(RECALLS), len(columns)), dim=1).indices
        hits = theirs[best] == mine[part, None]
        found.append(torch.stack([hits[:, :k].any(1) for k in RECALLS], dim=1))
    return torch.cat(found).numpy()


def _tiles(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, TILE // columns)
    return (slice(start, start + size) for start in range(0, rows, size))


# --- figures ------------------------------------------------------------------------------------------------------


def _of_classes(outcome: Outcome, subsets: Sequence[str | None]) -> None:
    """Add `acc1` and `acc5`, overall and per subset, and the students' changes."""
    columns: Columns = {}
    members = {subset: np.array([s == subset for s in subsets]) for subset in sorted({s for s in subsets if s})}
    for name, answers in outcome.answers.items():
        first = answers.right[:, 0]
        columns |= {(name, "acc1"): (first, 1.0), (name, "acc5"): (answers.right[:, -1], 1.0)}
        columns |= {(name, f"acc1 {subset}"): (first & inside, inside) for subset, inside in members.items()}
    _note(outcome, columns | _agreement(outcome))


def _of_captions(outcome: Outcome, images: Sequence[Tensor], texts: Sequence[Tensor], owner: np.ndarray) -> None:
    """Add recall in both directions. Bootstrap samples take a picture with all its captions from a fixed gallery."""
    columns: Columns = {}
    numbers = np.arange(len(images[0]))
    captions = np.bincount(owner, minlength=len(numbers))
    for name, image, text in zip(outcome.answers, images, texts, strict=True):
        to_text, to_image = recalled(image, text, numbers, owner), recalled(text, image, owner, numbers)
        for i, k in enumerate(RECALLS):
            hits = np.bincount(owner, weights=to_image[:, i], minlength=len(numbers))
            columns[name, f"image_retrieval_recall@{k}"] = hits, captions
            columns[name, f"text_retrieval_recall@{k}"] = to_text[:, i], 1.0
    _note(outcome, columns | (_agreement(outcome) if outcome.kind == "caption" else {}))


def _agreement(outcome: Outcome) -> Columns:
    """Return the columns of `agreement`: the share of pictures for which the student chooses the teacher's class, or a
    caption of the same picture as the teacher."""
    chosen = {name: outcome.groups[answers.choice] for name, answers in outcome.answers.items()}
    teacher, *students = chosen
    return {(student, "agreement"): (chosen[student] == chosen[teacher], 1.0) for student in students}


def _note(outcome: Outcome, columns: Columns) -> None:
    """Store metrics and intervals; for the main metric also each student's change and its test."""
    found = bootstrap(columns)
    for (name, key), figure in found.items():
        outcome.figures[name][key] = figure.value
        outcome.figures[name]["intervals"][key] = figure.interval
    teacher, *students = outcome.answers
    if (teacher, outcome.main) not in found:
        return
    before = outcome.answers[teacher].right[:, 0]
    for student in students:
        _change(outcome, student, found[student, outcome.main].minus(found[teacher, outcome.main]), before)


def _change(outcome: Outcome, student: str, change: Bootstrapped, before: np.ndarray) -> None:
    after = outcome.answers[student].right[:, 0]
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    figures = outcome.figures[student]
    figures |= {"change": change.value, "lost": lost, "won": won, "p_value": mcnemar(lost, won)}
    figures["intervals"]["change"] = change.interval


def _alike(
    outcome: Outcome,
    contenders: Sequence[Contender],
    images: Sequence[Tensor],
    paired: list[int],
    texts: Sequence[Tensor],
) -> None:
    """Add `affinity_divergence`, and cosines if the embedding widths agree."""
    first = contenders[0]
    for student, image, text in zip(contenders[1:], images[1:], texts[1:], strict=True):
        scales = exp(student.clip.logit_scale), exp(first.clip.logit_scale)
        figures = outcome.figures[student.name]
        figures["affinity_divergence"] = affinity_divergence(image[paired], text, images[0][paired], texts[0], *scales)
        same = image.shape[1] == images[0].shape[1]
        figures["image_cosine"] = F.cosine_similarity(image, images[0]).mean().item() if same else None
        figures["text_cosine"] = F.cosine_similarity(text, texts[0]).mean().item() if same else None


def affinity_divergence(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: float,
    teacher_scale: float,
) -> float:
    """Return the distance between the student's and the teacher's affinities, in nats: half the mean over images of
    KL(teacher's distribution over all texts || student's), plus half the mean over texts of the same over all images. A
    distribution is the softmax of cosines times the model's own scale. The result is the affinity loss (TinyCLIP, ICCV
    2023, section 3.1) minus its minimum, the teacher's entropy; it is 0 for the teacher itself.

    Args:
        student_image, teacher_image: (n, d) normalised features; d may differ between the models.
        student_text, teacher_text: (m, d) features of the captions or, without captions, of the classes.
        student_scale, teacher_scale: exp(logit_scale) of each model.
    """
    student = student_image.double(), student_text.double()
    teacher = teacher_image.double(), teacher_text.double()
    loss = affinity_loss(*student, *teacher, student_scale, teacher_scale)
    entropy = affinity_loss(*teacher, *teacher, teacher_scale, teacher_scale)
    return max(0.0, (loss - entropy).item())  # rounding may make it negative


# --- the pictures on which they differ ----------------------------------------------------------------------------


def differences(outcome: Outcome, count: int = 12) -> dict[str, list[int]]:
    """Return the answered pictures that the teacher gets right and at least one student gets wrong (`lost`), and those
    that only students get right (`won`), at most `count` of each, the largest differences in the truth's probability
    first."""
    teacher, *students = outcome.answers.values()
    right = teacher.right[:, 0]
    result = {}
    for kind, sign, wanted in (("lost", 1, right), ("won", -1, ~right)):
        gap = np.full(len(right), -np.inf)
        for student in students:
            apart = wanted & (student.right[:, 0] != right)
            gap = np.where(apart, np.maximum(gap, sign * (teacher.truth - student.truth)), gap)
        order = np.argsort(-gap, kind="stable")[:count]
        result[kind] = [int(i) for i in order if gap[i] > -np.inf]
    return result


def thumbnails(outcome: Outcome, wanted: Sequence[int]) -> dict[int, Image.Image]:
    """Return thumbnails of answered pictures from a second pass; pictures changed since the first are left out."""
    places = {outcome.pictures[i]: i for i in wanted}
    found: dict[int, Image.Image] = {}
    last = max(places, default=-1)
    for place, example in enumerate(outcome.dataset):
        if place > last:
            break
        if place in places and example.key == outcome.keys[places[place]]:
            found[places[place]] = thumbnail(example.image)
    return found
