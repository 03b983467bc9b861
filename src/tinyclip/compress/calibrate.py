"""Calibrated inheritance: masks of 0 and 1 from the importance of every element, measured on a few batches.

Importance (see `importance`) is the increase of the affinity loss when an element is removed, so heads, neurons and
channels of both towers are comparable. A greedy cut removes the elements with the least importance per size saved, in
a few rounds; each round measures the remaining elements again. There is no training; `inheritance.compact` applies
the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tinyclip.common.progress import ended, tell
from tinyclip.compress.budget import BUDGETS, fill_budget
from tinyclip.compress.importance import Enough, Score, importance, never, prunable
from tinyclip.compress.importance import Sample as Sample
from tinyclip.compress.size import BOTH, sparsity
from tinyclip.model.config import CLIPConfig
from tinyclip.model.masks import Masks, Unit
from tinyclip.model.model import CLIP

FIRST_TRIAL = 8  # batches of a round before the first trial cut
SETTLED = 0.05  # tolerated relative difference in the importance that a cut loses
WORK = "calibrating"


@dataclass(frozen=True)
class Calibration:
    """How importance is measured and what may be removed.

    Args:
        scale: exp(logit_scale) of the affinity.
        original: the teacher's config, which sparsity counts from; by default the model's.
        batches: largest total number of batches to measure.
        rounds: each reduces the size by the same factor and measures on its share of the batches.
        seed: for the labels drawn by the score `taylor`.
        unit, gates, align: as in `fill_budget` and `prunable`.
    """

    scale: float
    original: CLIPConfig | None = None
    score: Score = "taylor"
    unit: Unit = "params"
    gates: bool = False
    align: int = 1
    batches: int = 200
    rounds: int = 4
    seed: int = 0

    def measure(
        self, model: CLIP, samples: Iterable[Sample], masks: Masks, seed: int, enough: Enough = never
    ) -> dict[str, Tensor]:
        """Measure importance under masks, which may be on another device than the model."""
        placed = {name: mask.to(model.logit_scale.device) for name, mask in masks.items()}
        generator = torch.Generator().manual_seed(seed)
        how: dict[str, Any] = {"score": self.score, "scale": self.scale, "generator": generator, "enough": enough}
        return importance(model, samples, placed, **how)

    def fill(
        self, found: Mapping[str, Tensor], config: CLIPConfig, targets: Mapping[str, float], masks: Masks | None = None
    ) -> dict[str, Tensor]:
        settings: dict[str, Any] = {"original": self.original, "unit": self.unit, "align": self.align}
        return fill_budget(found, config, targets, masks=masks, **settings)

    def sparsity(self, config: CLIPConfig, masks: Masks, budget: str) -> float:
        return sparsity(config, self.original or config, masks, BUDGETS[budget], self.unit).item()

    def check(self, config: CLIPConfig, targets: Mapping[str, float]) -> None:
        """`ValueError` for a target that is out of reach or already met; measures nothing."""
        for name, target in targets.items():
            sizes = prunable(config, BUDGETS[name], self.gates)
            self.fill({axis: torch.ones(size) for axis, size in sizes.items()}, config, {name: target})


def calibrate(
    model: CLIP, samples: Iterable[Sample], target_sparsity: Mapping[str, float], how: Calibration
) -> dict[str, Tensor]:
    """Return masks of 0 and 1 that meet the target; the model does not change.

    A round ends early when more batches would not change what it keeps (see `settled`).

    Args:
        model: in evaluation mode.
        samples: on the model's device; only those that are measured are consumed.
        target_sparsity: as in `fill_budget`.

    Raises:
        ValueError: for a target that is out of reach or already met, or too few samples.
    """
    config, source = model.config, iter(samples)
    how.check(config, target_sparsity)
    towers = tuple(tower for tower in BOTH if any(tower in BUDGETS[name] for name in target_sparsity))
    masks = {name: torch.ones(size) for name, size in prunable(config, towers, how.gates).items()}
    left = {name: 1 - how.sparsity(config, {}, name) for name in target_sparsity}
    rounds = min(how.rounds, how.batches)
    for r in range(1, rounds + 1):
        start, end = (how.batches * n // rounds for n in (r - 1, r))
        goals = {}
        for name, target in target_sparsity.items():
            goal = 1 - left[name] * ((1 - target) / left[name]) ** (r / rounds) if r < rounds else target
            if how.sparsity(config, masks, name) < goal:  # else an earlier round overshot this goal
                goals[name] = goal
        cut = partial(how.fill, config=config, targets=goals, masks=masks)
        found = how.measure(
            model, telling(source, start, end, how.batches), masks, how.seed * 1000 + r, settled(cut, masks)
        )
        masks = cut(found)
    ended(WORK)
    return masks


def telling(samples: Iterator[Sample], start: int, end: int, batches: int) -> Iterator[Sample]:
    """Yield the samples of a round, batches `start` up to (excluding) `end`, and report progress."""
    for number, sample in enumerate(islice(samples, end - start), start):
        tell(WORK, number, batches, "batches")
        yield sample


def settled(cut: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], masks: Masks) -> Enough:
    """Whether the cut has settled: more batches would not change what it keeps.

    A trial cut is made each time the number of batches has doubled. Elements near the threshold always swap, since they
    matter equally little. So the cut counts as settled when the previous trial, judged by the importance over all
    batches, loses hardly more than the new one.

    Args:
        masks: at the start of the round.
    """
    due, before = FIRST_TRIAL, dict[str, Tensor]()

    def enough(count: int, found: Callable[[], Mapping[str, Tensor]]) -> bool:
        nonlocal due, before
        if count < due:
            return False
        due *= 2
        known = {name: value.detach().double().cpu() * masks[name].cpu() for name, value in found().items()}
        with torch.enable_grad():  # sizes are differentiated, also where importance needs none
            half, before = before, cut(known)
        return bool(half) and _loss_of(half, known) <= (1 + SETTLED) * _loss_of(before, known)

    return enough


def _loss_of(masks: Masks, importance: Mapping[str, Tensor]) -> float:
    """Return the importance of the elements that are closed."""
    return sum(((1 - masks[name]) * value).sum().item() for name, value in importance.items())
