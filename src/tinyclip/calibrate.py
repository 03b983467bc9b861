"""Calibrated inheritance: masks of 0 and 1 from the importance of every element, measured on a few batches.

Importance is what the affinity loss gains when an element goes, so heads, neurons and channels of both towers are
comparable. A greedy cut then removes what matters least for the size that it saves, in several rounds: what is
left is measured again before more of it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyclip.axes import axis_sizes, axis_table
from tinyclip.config import CLIPConfig
from tinyclip.loss import affinity_loss
from tinyclip.masks import Masks, Tower, Unit, prunable_size, sparsity, tower_size
from tinyclip.model import CLIP

Score = Literal["taylor", "activation", "magnitude"]
TOWERS: tuple[Tower, ...] = ("visual", "text")
BUDGETS: dict[str, tuple[Tower, ...]] = {"visual": ("visual",), "text": ("text",), "both": TOWERS}
NAMES = {"visual": "the image tower", "text": "the text tower", "both": "both towers"}
GATES = ("attn", "ffn")
# Of what is still to be removed, the part that goes before costs are worked out anew.
CHUNK = 1 / 16
GATE_BATCHES = 2


@dataclass(frozen=True)
class Sample:
    """A batch to calibrate on, on the model's device."""

    images: Tensor  # (n, 3, s, s), as the model takes them
    tokens: Tensor  # int64 (n, length)
    teacher_image: Tensor  # (n, d) normalised features
    teacher_text: Tensor  # (n, d)


# --- importance -------------------------------------------------------------------------------------------------


def prunable(config: CLIPConfig, towers: Iterable[Tower] = TOWERS, gates: bool = False) -> dict[str, int]:
    """Axes that may be cut, with their lengths; gates last."""
    skipped = {"context", "vocab"} if gates else {"context", "vocab", *GATES}
    return {
        name: size
        for name, size in axis_sizes(config).items()
        if name.split(".")[0] in towers and name.split(".")[1] not in skipped
    }


def importance(
    model: CLIP, samples: Iterable[Sample], masks: Masks, *, score: Score, scale: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """What matters how much, for every element of every axis in `masks`.

    Args:
        masks: of ones for what is measured, zeros for what is gone.
        scale: exp(logit_scale) of the affinity.
    """
    source = iter(samples)
    few = list(islice(source, GATE_BATCHES))
    gates = [name for name in masks if name.split(".")[1] in GATES]
    return taylor(model, chain(few, source), masks, scale, generator) | removal(model, few, masks, gates, scale)


def taylor(
    model: CLIP, samples: Iterable[Sample], masks: Masks, scale: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Second-order Taylor estimate of what the affinity loss gains when an element's mask goes from 1 to 0.

    gain = -g + h / 2 with g the loss's gradient in the mask and h its curvature. A first-order estimate alone is of
    no use: for a student that still is its teacher, softmax(student) - softmax(teacher) is 0, so g is exactly 0. The
    curvature is the Fisher information, E[gradient^2] of a cross-entropy whose labels are drawn from the student's
    own affinity (Martens, "New insights and perspectives on the natural gradient method", 2020, section 5). With
    n rows drawn independently, the mean loss has h = 2 n E[gradient^2] for the mean of both directions.

    Args:
        masks: of ones for what is measured, zeros for what is gone.
    """
    gains = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    count = 0
    for sample in samples:
        live = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
        image_features, text_features, _ = model(sample.images, sample.tokens, live)
        features = image_features.float(), text_features.float()
        loss = affinity_loss(*features, sample.teacher_image, sample.teacher_text, scale, scale)
        first = torch.autograd.grad(loss, list(live.values()), retain_graph=True)
        second = torch.autograd.grad(_drawn_loss(scale * features[0] @ features[1].T, generator), list(live.values()))
        for name, g, d in zip(live, first, second, strict=True):
            gains[name] += len(sample.tokens) * d.square() - g
        count += 1
    return {name: gain / count for name, gain in gains.items()}


def _drawn_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy in both directions against labels drawn from the logits' own distribution."""
    chances = [x.detach().softmax(1).cpu() for x in (logits, logits.T)]
    rows, columns = (p.multinomial(1, generator=generator).flatten().to(logits.device) for p in chances)
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2


@torch.no_grad()
def removal(
    model: CLIP, samples: Iterable[Sample], masks: Masks, names: Iterable[str], scale: float
) -> dict[str, Tensor]:
    """What the affinity loss gains when a gate is closed, by closing it."""
    gains = {name: torch.zeros_like(masks[name]) for name in names}
    count = 0
    for sample in samples:
        encoders = {
            "visual": lambda z, s=sample: model.encode_image(s.images, z, normalize=True).float(),
            "text": lambda z, s=sample: model.encode_text(s.tokens, z, normalize=True).float(),
        }
        before = {tower: encode(masks) for tower, encode in encoders.items()}

        def loss(features: dict[str, Tensor], s: Sample = sample) -> Tensor:
            return affinity_loss(features["visual"], features["text"], s.teacher_image, s.teacher_text, scale, scale)

        base = loss(before)
        for name in gains:
            tower = name.split(".")[0]
            features = before | {tower: encoders[tower]({**masks, name: torch.zeros_like(masks[name])})}
            gains[name] += loss(features) - base
        count += 1
    return {name: gain / count for name, gain in gains.items()}


# --- the greedy cut ---------------------------------------------------------------------------------------------


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

    Sizes are linear in the length of each axis, so an element's cost is the gradient of the size in that length.
    Elements go in units of `align`; a chunk of units goes before the costs are worked out at the new shape.
    """
    orders, axis, score, count = {}, [], [], []
    for i, (name, value) in enumerate(importance.items()):
        kind = name.split(".")[1]
        value = value.detach().double().cpu().masked_fill(kept[name] == 0, -torch.inf)
        orders[name] = value.argsort(stable=True)
        lengths = _units(int(kept[name].sum()), 1 if kind in ("heads", *GATES) else align)
        ranked = value[orders[name]][len(value) - sum(lengths) :].split(lengths)
        ranked = ranked[: len(ranked) - (kind == "hidden")]  # a tower keeps its last channels
        axis += [i] * len(ranked)
        score += [unit.mean() for unit in ranked]
        count += [len(unit) for unit in ranked]
    axes, scores, counts = torch.tensor(axis), torch.stack(score), torch.tensor(count)
    left = torch.stack([kept[name].double().sum() for name in importance])
    alive = torch.ones(len(axes), dtype=torch.bool)
    while True:
        left.requires_grad_()
        now = size(dict(kept) | dict(zip(importance, left[:, None], strict=True)))
        cost = torch.autograd.grad(now, left)[0][axes] if left.requires_grad else left
        excess, left = now.item() - allowed, left.detach()
        saves = alive & (cost > 0)
        if excess <= 0 or not saves.any():
            break
        ratio = torch.where(saves, scores / cost, torch.inf)
        ranked_units = ratio.argsort(stable=True)[: int(saves.sum())]
        within = (cost * counts)[ranked_units].cumsum(0) <= excess * CHUNK
        chosen = ranked_units[: max(1, int(within.sum()))]
        alive[chosen] = False
        left.index_add_(0, axes[chosen], -counts[chosen].double())
    for (name, order), length in zip(orders.items(), left, strict=True):
        kept[name] = torch.zeros(len(order)).index_fill(0, order[len(order) - int(length) :], 1.0)
    return excess <= 0


def _units(length: int, align: int) -> list[int]:
    """Lengths of the units of an axis, least important first, so that multiples of `align` are left."""
    rest = [length % align] if length % align else []
    return rest + [align] * (length // align)


# --- rounds -----------------------------------------------------------------------------------------------------


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
    rounds: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Masks of 0 and 1 for the model that meet the target; `inheritance.compact` cuts by them.

    The sizes of the rounds fall by one factor each, and each round has its share of the batches.

    Args:
        scale: exp(logit_scale) of the affinity.
        original: the teacher's config, which sparsity counts from; by default the model's.
        batches: taken from `samples` in all.

    Raises:
        ValueError: for a target that is out of reach or already met, or too little data.
    """
    original = original or model.config
    generator, source = torch.Generator().manual_seed(seed), iter(samples)
    towers = tuple(t for t in TOWERS if any(t in BUDGETS[budget] for budget in target_sparsity))
    device = model.logit_scale.device
    sizes = prunable(model.config, towers, gates)
    masks = {name: torch.ones(size) for name, size in sizes.items()}
    start = {name: sparsity(model.config, original, {}, BUDGETS[name], unit).item() for name in target_sparsity}
    for r in range(1, rounds + 1):
        share = islice(source, batches * r // rounds - batches * (r - 1) // rounds)
        live = {name: mask.to(device) for name, mask in masks.items()}
        found = importance(model, share, live, score=score, scale=scale, generator=generator)
        targets = {
            name: 1 - (1 - start[name]) * ((1 - target) / (1 - start[name])) ** (r / rounds)
            for name, target in target_sparsity.items()
        }
        masks = fill_budget(found, model.config, targets, original=original, masks=masks, unit=unit, align=align)
    return masks
