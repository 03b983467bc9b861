"""Fill a budget: remove the least important elements of both towers until exactly the target size is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tinyclip.compress.size import BOTH, prunable_size, tower_size
from tinyclip.model.axes import GATES, NEEDED, axis_kind
from tinyclip.model.config import CLIPConfig
from tinyclip.model.masks import Masks, Tower, Unit

BUDGETS: dict[str, tuple[Tower, ...]] = {"visual": ("visual",), "text": ("text",), "both": BOTH}
NAMES = {"visual": "the image tower", "text": "the text tower", "both": "both towers"}
# Costs are recomputed after removing this fraction of the excess size, or this fraction of the target size.
CHUNK, LEAST_CHUNK = 1 / 16, 1e-3
SLACK = 5e-3  # fraction of the target size that the last element may remove too much
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
    per_size: bool = True,
) -> dict[str, Tensor]:
    """Remove the least important elements until the target is met; return masks of 0 and 1.

    Args:
        importance: by axis name; axes that are absent are not cut.
        target_sparsity: fraction of the original to remove (see `size.sparsity`), of `visual`, `text` or `both`.
        original: the teacher's config, which sparsity counts from; by default the model itself.
        masks: 0 for elements that are already removed.
        unit: what sparsity counts.
        align: keep a multiple of this many neurons and channels.
        per_size: rank by importance per size saved, not by importance alone.

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
        if not _remove(kept, mine, size, (1 - target) * full, align, per_size):
            reached = 1 - size(kept).item() / full
            raise ValueError(f"{what} cannot be reached: at most {reached:.3f} can be removed")
    return kept


def _remove(
    kept: dict[str, Tensor],
    importance: Mapping[str, Tensor],
    size: Callable[[Masks], Tensor],
    allowed: float,
    align: int,
    per_size: bool,
) -> bool:
    """Close masks of `kept`, least important elements first, until `size` is `allowed`; return whether that succeeded.

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
        saved = cost * counts
        open_ = alive & (cost > 0)  # nothing is saved in a branch whose gate is closed
        if not open_.any():
            break
        fits = open_ & (saved <= excess + SLACK * allowed)
        if not fits.any():  # the end: miss the target by as little as possible
            fits = open_ & (saved == saved[open_].min())
        rank = torch.where(fits, scores / cost if per_size else scores, torch.inf)
        ranked = rank.argsort(stable=True)[: int(fits.sum())]
        chunk = min(excess, max(excess * CHUNK, allowed * LEAST_CHUNK))
        enough = int((saved[ranked].cumsum(0) <= chunk).sum())
        chosen = ranked[: max(1, enough)]
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
