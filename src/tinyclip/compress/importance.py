"""The importance of every head, neuron and channel of a model, measured on a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyclip.compress.size import BOTH
from tinyclip.loss import affinity_loss
from tinyclip.model.axes import GATES, TOWERS, axis_kind, axis_sizes, axis_table
from tinyclip.model.config import CLIPConfig, TransformerConfig
from tinyclip.model.masks import Masks, Tower
from tinyclip.model.model import CLIP

Score = Literal["taylor", "activation", "magnitude"]
GATE_BATCHES = 2  # removing a branch changes the loss a lot, so a few batches suffice


@dataclass(frozen=True)
class Sample:
    """A batch to calibrate on, on the model's device."""

    images: Tensor  # (n, 3, s, s), preprocessed
    tokens: Tensor  # int64 (n, length)


# Whether this many batches are enough, given the importance found so far.
Enough = Callable[[int, Callable[[], Mapping[str, Tensor]]], bool]


def never(count: int, found: Callable[[], Mapping[str, Tensor]]) -> bool:
    return False


def prunable(config: CLIPConfig, towers: tuple[Tower, ...] = BOTH, gates: bool = False) -> dict[str, int]:
    """Return the non-empty axes that may be cut, with their lengths."""
    skipped = {"context", "vocab"} if gates else {"context", "vocab", *GATES}
    sizes = axis_sizes(config).items()
    return {name: n for name, n in sizes if n and name.split(".")[0] in towers and axis_kind(name) not in skipped}


def importance(
    model: CLIP,
    samples: Iterable[Sample],
    masks: Masks,
    *,
    scale: float,
    score: Score = "taylor",
    generator: torch.Generator | None = None,
    enough: Enough = never,
) -> dict[str, Tensor]:
    """Return the importance of every element of every axis in `masks`.

    `taylor` and gates are in units of the affinity loss; `activation` and `magnitude` are shares of a tower.

    Args:
        masks: 1 for elements to measure, 0 for removed ones.
        scale: exp(logit_scale) of the affinity.
        generator: on the CPU, for the labels drawn by `taylor`.
        enough: called after every batch; measuring stops when it returns True.

    Raises:
        ValueError: when there are no samples, or the score does not apply to the model.
    """
    source = iter(samples)
    few = list(islice(source, GATE_BATCHES))
    if not few:
        raise ValueError("calibration: no batches to measure on")
    gates = [name for name in masks if axis_kind(name) in GATES]
    if score == "magnitude":
        return magnitude(model, masks)
    if score == "activation":
        return activation(model, chain(few, source), masks, enough)
    closed = removal(model, few, masks, gates, scale)

    def with_gates(count: int, found: Callable[[], Mapping[str, Tensor]]) -> bool:
        return enough(count, lambda: {**found(), **closed})

    return taylor(model, chain(few, source), masks, scale, generator, with_gates) | closed


def taylor(
    model: CLIP,
    samples: Iterable[Sample],
    masks: Masks,
    scale: float,
    generator: torch.Generator | None = None,
    enough: Enough = never,
) -> dict[str, Tensor]:
    """Second-order Taylor estimate of the increase in affinity loss when an element's mask goes from 1 to 0.

    The loss compares the pruned model with the unpruned one. At the unpruned model its gradient is exactly 0, being
    softmax(student) - softmax(teacher): a first-order estimate would be 0, so the increase is half the curvature.
    The curvature is the Fisher information, E[gradient^2] of a cross-entropy whose labels are drawn from the model's
    own affinity (Martens, "New insights and perspectives on the natural gradient method", 2020, section 9.2). With
    n independent labels, the mean loss has 2 n E[gradient^2] where rows and columns count half each.
    """
    gains = {name: torch.zeros_like(mask) for name, mask in masks.items()}

    def found() -> dict[str, Tensor]:
        return {name: gain / count for name, gain in gains.items()}

    for count, sample in enumerate(samples, 1):
        live = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
        image_features, text_features, _ = model(sample.images, sample.tokens, live)
        loss = drawn_loss(scale * image_features.float() @ text_features.float().T, generator)
        for name, gradient in zip(live, torch.autograd.grad(loss, list(live.values())), strict=True):
            gains[name] += len(sample.tokens) * gradient.square()
        if enough(count, found):
            break
    return found()


def drawn_loss(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Cross-entropy in both directions against labels drawn from the logits' own distribution; logits: (n, n)."""
    chances = [x.detach().softmax(1).cpu() for x in (logits, logits.T)]
    rows, columns = (p.multinomial(1, generator=generator).flatten().to(logits.device) for p in chances)
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2


@torch.no_grad()
def removal(
    model: CLIP, samples: Iterable[Sample], masks: Masks, names: Iterable[str], scale: float
) -> dict[str, Tensor]:
    """Measure the increase in affinity loss from closing a gate by closing it: a whole branch is not a small step, so
    its curvature says little (too small by a factor of hundreds for the emoji teacher's first text attention)."""
    gains = {name: torch.zeros_like(masks[name]) for name in names}
    count = 0
    for sample in samples:
        image, text = _encode(model, sample, masks, "visual"), _encode(model, sample, masks, "text")
        before = affinity_loss(image, text, image, text, scale, scale)
        for name, gain in gains.items():
            tower = name.split(".")[0]
            closed = _encode(model, sample, {**masks, name: torch.zeros_like(masks[name])}, tower)
            features = (closed, text) if tower == "visual" else (image, closed)
            gain += affinity_loss(*features, image, text, scale, scale) - before
        count += 1
    return {name: gain / count for name, gain in gains.items()}


def _encode(model: CLIP, sample: Sample, masks: Masks, tower: str) -> Tensor:
    encode, inputs = (model.encode_image, sample.images) if tower == "visual" else (model.encode_text, sample.tokens)
    return encode(inputs, masks, normalize=True).float()


# --- alternatives that do not use the loss ----------------------------------------------------------------------


@torch.no_grad()
def activation(model: CLIP, samples: Iterable[Sample], masks: Masks, enough: Enough = never) -> dict[str, Tensor]:
    """Mean square of an element's activation as a share of its axis (see `_shares`)."""
    sums = {name: torch.zeros_like(mask) for name, mask in masks.items() if axis_kind(name) not in GATES}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float().square()
            x = x.sum((0, 2, 3)) if x.ndim == 4 else x.flatten(0, -2).sum(0)
            sums[name] += x.view(len(sums[name]), -1).sum(1)  # a head has several dims

        return add

    handles = [
        model.get_submodule(place).register_forward_pre_hook(watch(name))
        for name, place in _readers(model.config)
        if name in sums
    ]
    try:
        for count, sample in enumerate(samples, 1):
            model(sample.images, sample.tokens, masks)
            if enough(count, lambda: _shares(model.config, sums, masks)):
                break
    finally:
        for handle in handles:
            handle.remove()
    return _shares(model.config, sums, masks)


def _readers(config: CLIPConfig) -> Iterator[tuple[str, str]]:
    """Return axes, each with a module that reads it as input; a residual stream is read by every block."""
    for tower, part in (("visual", config.vision), ("text", config.text)):
        if isinstance(part, TransformerConfig):
            for i in range(part.layers):
                block = f"{TOWERS[tower]}.{i}"
                yield f"{tower}.hidden", block
                yield f"{tower}.heads.{i}", f"{block}.attn.out_proj"
                yield f"{tower}.mlp.{i}", f"{block}.mlp.c_proj"
            continue
        yield from (("visual.stem.1", "visual.conv2"), ("visual.stem.2", "visual.conv3"))
        yield from (("visual.stem.3", "visual.layer1.0"), ("visual.pool_heads", "visual.attnpool.c_proj"))
        for stage, layers in enumerate(part.layers, 1):
            yield f"visual.stage.{stage}", f"visual.layer{stage + 1}.0" if stage < 4 else "visual.attnpool"
            for i in range(layers):
                yield f"visual.conv1.{stage}.{i}", f"visual.layer{stage}.{i}.conv2"
                yield f"visual.conv2.{stage}.{i}", f"visual.layer{stage}.{i}.conv3"


@torch.no_grad()
def magnitude(model: CLIP, masks: Masks) -> dict[str, Tensor]:
    """Sum of squares of the weights that go with an element, as a share of its axis (see `_shares`)."""
    sums = {name: torch.zeros_like(mask) for name, mask in masks.items() if axis_kind(name) not in GATES}
    for key, entry in axis_table(model.config).items():
        for dim, axis in enumerate(entry.axes):
            if axis is None or axis.name not in sums or entry.buffer:
                continue
            weight = model.get_parameter(key).float().square().movedim(dim, 0)
            weight = weight.reshape(len(weight), -1).sum(1)
            sums[axis.name] += weight.view(axis.outer, -1, axis.inner).sum((0, 2))
    return _shares(model.config, sums, masks)


def _shares(config: CLIPConfig, sums: Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """Return what the branches lose with each element, as shares that sum to 1 per branch: an axis shared by n
    branches, such as a residual stream, sums to n, and a gate to 1."""
    branches: dict[str, set[str | None]] = {}
    for entry in axis_table(config).values():
        for axis in entry.axes:
            if axis is not None:
                branches.setdefault(axis.name, set()).add(entry.branch)
    result = {name: torch.ones_like(mask) for name, mask in masks.items()}
    for name, value in sums.items():
        value = value * masks[name]
        result[name] = len(branches[name]) * value / value.sum().clamp(min=torch.finfo(value.dtype).tiny)
    return result
