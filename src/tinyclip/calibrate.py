"""Calibrated inheritance: masks of 0 and 1 from the importance of every element, measured on a few batches.

Importance (see `importance`) is what the affinity loss gains when an element goes, so heads, neurons and channels
of both towers are comparable. A greedy cut removes what matters least for the size that it saves, in a few rounds:
what is left is measured again before more of it goes. There is no training; `inheritance.compact` cuts by the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor

from tinyclip.axes import GATES, NEEDED, axis_kind
from tinyclip.config import CLIPConfig
from tinyclip.importance import BOTH, Score, importance, prunable
from tinyclip.importance import Sample as Sample
from tinyclip.masks import Masks, Tower, Unit, prunable_size, sparsity, tower_size
from tinyclip.model import CLIP

BUDGETS: dict[str, tuple[Tower, ...]] = {"visual": ("visual",), "text": ("text",), "both": BOTH}
NAMES = {"visual": "the image tower", "text": "the text tower", "both": "both towers"}
# Of what is still to go, the part that goes before costs are worked out anew.
CHUNK = 1 / 16
ROUNDS = 4
UNALIGNED = (*GATES, "heads", "pool_heads")  # a head is head_dim wide


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
    """Remove what is least important for the size it saves until the target is met: masks of 0 and 1.

    Args:
        importance: by axis name; elements of axes that are absent stay.
        target_sparsity: fraction of the original to remove (see `masks.sparsity`), of `visual`, `text` or `both`.
        original: the teacher's config, which sparsity counts from; by default the model itself.
        masks: of 0 for what is gone already.
        unit: what sparsity counts.
        align: neurons and channels go so that a multiple of this is left.

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
            raise ValueError(f"{what} is nothing to do: {reached:.3f} of the original teacher is already gone")
        mine = {name: value for name, value in importance.items() if name.split(".")[0] in towers}
        if not _remove(kept, mine, size, (1 - target) * full, align):
            reached = 1 - size(kept).item() / full
            raise ValueError(f"{what} cannot be reached: without its last channel {reached:.3f} would be gone")
    return kept


def _remove(
    kept: dict[str, Tensor],
    importance: Mapping[str, Tensor],
    size: Callable[[Masks], Tensor],
    allowed: float,
    align: int,
) -> bool:
    """Close masks of `kept`, least importance per size first, until `size` is `allowed`; whether it could be.

    Sizes are linear in the length of each axis, so what an element costs is the gradient in that length. Elements
    go in units of `align`, and a chunk of units goes before the costs are worked out at the new shape.
    """
    names, orders, axis, score, count = list(importance), [], [], [], []
    for i, name in enumerate(names):
        value = importance[name].detach().double().cpu().masked_fill(kept[name] == 0, -torch.inf)
        orders.append(value.argsort(stable=True))
        lengths = _units(int(kept[name].sum()), 1 if axis_kind(name) in UNALIGNED else align)
        units = value[orders[i]][len(value) - sum(lengths) :].split(lengths)
        units = units[: len(units) - (axis_kind(name) in NEEDED)]  # the last unit stays
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


def _units(length: int, align: int) -> list[int]:
    """Lengths of the units of an axis, least important first, so that multiples of `align` are left."""
    rest = [length % align] if length % align else []
    return rest + [align] * (length // align)


def calibrate(
    model: CLIP,
    samples: Iterable[Sample],
    target_sparsity: Mapping[str, float],
    *,
    scale: float,
    original: CLIPConfig | None = None,
    score: Score = "taylor",
    unit: Unit = "params",
    gates: bool = False,
    align: int = 1,
    batches: int = 200,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Masks of 0 and 1 for the model that meet the target.

    The size falls by one factor a round, and each round measures on its share of the batches.

    Args:
        model: left as it is; in evaluation mode.
        samples: on the model's device; `batches` are taken.
        target_sparsity: as in `fill_budget`.
        scale: exp(logit_scale) of the affinity.
        original: the teacher's config, which sparsity counts from; by default the model's.
        seed: of the labels that the score `taylor` draws.

    Raises:
        ValueError: for a target that is out of reach or already met, or no data.
    """
    original = original or model.config
    towers = tuple(tower for tower in BOTH if any(tower in BUDGETS[name] for name in target_sparsity))
    masks = {name: torch.ones(size) for name, size in prunable(model.config, towers, gates).items()}
    start = {name: sparsity(model.config, original, {}, BUDGETS[name], unit).item() for name in target_sparsity}
    check_reachable(model.config, target_sparsity, original=original, unit=unit, gates=gates, align=align)
    generator, source = torch.Generator().manual_seed(seed), iter(samples)
    rounds = min(rounds, batches)
    for r in range(1, rounds + 1):
        share = islice(source, batches * r // rounds - batches * (r - 1) // rounds)
        placed = {name: mask.to(model.logit_scale.device) for name, mask in masks.items()}
        found = importance(model, share, placed, score=score, scale=scale, generator=generator)
        goals = {
            name: 1 - (1 - start[name]) * ((1 - target) / (1 - start[name])) ** (r / rounds)
            for name, target in target_sparsity.items()
        }
        masks = fill_budget(found, model.config, goals, original=original, masks=masks, unit=unit, align=align)
    return masks


def check_reachable(
    config: CLIPConfig,
    target_sparsity: Mapping[str, float],
    *,
    original: CLIPConfig | None = None,
    unit: Unit = "params",
    gates: bool = False,
    align: int = 1,
) -> None:
    """`ValueError` for a target that no masks can meet, or that is already met; nothing is measured."""
    for name, target in target_sparsity.items():
        axes = {axis: torch.ones(size) for axis, size in prunable(config, BUDGETS[name], gates).items()}
        fill_budget(axes, config, {name: target}, original=original, unit=unit, align=align)
