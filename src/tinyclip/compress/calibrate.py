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
from tinyclip.compress.importance import BOTH, Enough, Score, importance, never, prunable
from tinyclip.compress.importance import Sample as Sample
from tinyclip.compress.size import prunable_size, sparsity, tower_size
from tinyclip.model.axes import GATES, NEEDED, axis_kind
from tinyclip.model.config import CLIPConfig
from tinyclip.model.masks import Masks, Tower, Unit
from tinyclip.model.model import CLIP

BUDGETS: dict[str, tuple[Tower, ...]] = {"visual": ("visual",), "text": ("text",), "both": BOTH}
NAMES = {"visual": "the image tower", "text": "the text tower", "both": "both towers"}
# Fraction of the excess size to remove before costs are recomputed.
CHUNK = 1 / 16
FIRST_TRIAL = 8  # batches of a round before the first trial cut
SETTLED = 0.05  # tolerated relative difference in the importance that a cut loses
WORK = "calibrating"
GATE_OF = {"heads": "attn", "mlp": "ffn"}
UNALIGNED = (*GATES, "heads", "pool_heads")  # not aligned: a head is already head_dim wide


def fill_budget(
    importance: Mapping[str, Tensor],
    config: CLIPConfig,
    target_sparsity: Mapping[str, float],
    *,
    original: CLIPConfig | None = None,
    masks: Masks | None = None,
    unit: Unit = "params",
    align: int = 1,
) -> dict[str, Tensor]:
    """Remove the elements with the least importance per size saved until the target is met; return masks of 0 and 1.

    Args:
        importance: by axis name; axes that are absent are not cut.
        target_sparsity: fraction of the original to remove (see `size.sparsity`), of `visual`, `text` or `both`.
        original: the teacher's config, which sparsity counts from; by default the model itself.
        masks: 0 for elements that are already removed.
        unit: what sparsity counts.
        align: keep a multiple of this many neurons and channels.

    Raises:
        ValueError: for a target that is out of reach, or already met.
    """
    original, kept = original or config, {name: torch.ones(len(value)) for name, value in importance.items()}
    kept |= {name: mask.detach().cpu().float() for name, mask in (masks or {}).items()}
    for budget, target in target_sparsity.items():
        towers = BUDGETS[budget]
        full = sum(prunable_size(original, tower, unit) for tower in towers)

        def size(keep: Masks, towers: tuple[Tower, ...] = towers) -> Tensor:
            return torch.stack([tower_size(config, original, keep, tower, unit) for tower in towers]).sum()

        reached = 1 - size(kept).item() / full
        what = f"target_sparsity {target} of {NAMES[budget]}"
        if reached >= target:
            raise ValueError(f"{what} needs no cut: {reached:.3f} of the original teacher has already been removed")
        mine = {name: value for name, value in importance.items() if name.split(".")[0] in towers}
        if not _remove(kept, mine, size, (1 - target) * full, align):
            reached = 1 - size(kept).item() / full
            raise ValueError(f"{what} cannot be reached: at most {reached:.3f} can be removed")
    return kept


def _remove(
    kept: dict[str, Tensor],
    importance: Mapping[str, Tensor],
    size: Callable[[Masks], Tensor],
    allowed: float,
    align: int,
) -> bool:
    """Close masks of `kept`, least importance per size first, until `size` is `allowed`; return whether that succeeded.

    Sizes are linear in the length of each axis, so the cost of an element is the gradient with respect to that length.
    Elements are removed in units of `align`, and costs are recomputed for the new shape after each chunk of units.
    """
    names, orders, axis, score, count = list(importance), [], [], [], []
    lasting = _lasting(importance, kept)
    for i, name in enumerate(names):
        value = importance[name].detach().double().cpu().masked_fill(kept[name] == 0, -torch.inf)
        orders.append(value.argsort(stable=True))
        lengths = _units(int(kept[name].sum()), 1 if axis_kind(name) in UNALIGNED else align)
        units = value[orders[i]][len(value) - sum(lengths) :].split(lengths)
        units = units[: len(units) - (axis_kind(name) in NEEDED or name in lasting)]  # the last unit stays
        axis += [i] * len(units)
        score += [unit.mean().item() for unit in units]
        count += [len(unit) for unit in units]
    axes, scores, counts = torch.tensor(axis), torch.tensor(score, dtype=torch.double), torch.tensor(count)
    left = torch.stack([kept[name].double().sum() for name in names])
    alive = torch.ones(len(axes), dtype=torch.bool)
    while True:
        lengths_now = left.clone().requires_grad_()
        now = size(kept | dict(zip(names, lengths_now.unsqueeze(1), strict=True)))
        excess = now.item() - allowed
        if excess <= 0:
            break
        cost = torch.autograd.grad(now, lengths_now)[0][axes]
        saves = alive & (cost > 0)  # nothing is saved in a branch whose gate is closed
        if not saves.any():
            break
        ranked = torch.where(saves, scores / cost, torch.inf).argsort(stable=True)[: int(saves.sum())]
        fits = (cost * counts)[ranked].cumsum(0) <= excess * CHUNK
        chosen = ranked[: max(1, int(fits.sum()))]
        alive[chosen] = False
        left.index_add_(0, axes[chosen], -counts[chosen].double())
    for name, order, length in zip(names, orders, left.int().tolist(), strict=True):
        kept[name] = torch.zeros(len(order)).index_fill(0, order[len(order) - length :], 1.0)
    return excess <= 0


def _lasting(importance: Mapping[str, Tensor], kept: Masks) -> set[str]:
    """Return, for each transformer, the heads or neurons axis with the most important element, and its gate. They are
    never removed completely, so that a tower always computes something."""
    names: set[str] = set()
    for tower in BOTH:
        inner = [n for n in importance if n.startswith(f"{tower}.") and axis_kind(n) in GATE_OF and kept[n].any()]
        if inner:
            best = max(inner, key=lambda name: importance[name].cpu()[kept[name] != 0].max().item())
            kind, block = best.split(".")[1:]
            names |= {best, f"{tower}.{GATE_OF[kind]}.{block}"}
    return names


def _units(length: int, align: int) -> list[int]:
    """Return the lengths of an axis's units, least important first; removing any leaves a multiple of `align`."""
    rest = [length % align] if length % align else []
    return rest + [align] * (length // align)


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
