"""Size of a model under masks, differentiable in the number of kept elements, and the resulting sparsity."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinyclip.model.axes import axis_sizes, axis_table, resnet_sizes
from tinyclip.model.config import CLIPConfig, ResNetConfig, TransformerConfig, VisionConfig
from tinyclip.model.masks import Masks, Tower, Unit

BOTH: tuple[Tower, ...] = ("visual", "text")


def resnet_size(config: CLIPConfig, keep: Mapping[str, Tensor], unit: str) -> Tensor:
    """Weights of the convolutions and the attention pool (`params`), or their multiply-accumulates for one image
    (`macs`); a scalar. Norms, biases and position embeddings are not counted.

    Args:
        keep: by axis name, as masks; what is absent is kept whole.
    """
    vision = config.vision
    assert isinstance(vision, ResNetConfig)
    sizes = resnet_sizes(vision) | {"embed": config.embed_dim}
    kept = {name: keep[name].sum() if name in keep else torch.tensor(float(size)) for name, size in sizes.items()}
    total = torch.zeros(())
    for key, entry in axis_table(config).items():
        if not key.startswith("visual.") or len(entry.shape) < 2 or key.endswith("positional_embedding"):
            continue
        weights = kept[entry.branch] if entry.branch else torch.ones(())
        for length, axis in zip(entry.shape, entry.axes, strict=True):
            weights = weights * (length if axis is None else axis.outer * axis.inner * kept[axis.name])
        total = total + weights * (_places(key, vision) if unit == "macs" else 1)
    if unit == "macs":  # both products of the pool's queries with keys and values
        total = total + 2 * (vision.grid**2 + 1) ** 2 * kept["visual.pool_heads"] * vision.head_dim
    return total


def _places(key: str, vision: ResNetConfig) -> int:
    """Return how often a weight is used for one image: the number of output positions of its convolution."""
    if "attnpool" in key:
        return vision.grid**2 + 1  # for every position, as `costs.macs` counts it
    found = re.search(r"layer(\d)\.(\d+)\.(conv1|conv2)?", key)
    side = (vision.image_size + 1) // 2
    if found is None:
        return side**2
    stage, block, early = int(found[1]), int(found[2]), found[3] is not None
    # Every stage after the first halves the side, after conv2 of its first block.
    halvings = stage - (1 if early and block == 0 and stage > 1 else 0)
    for _ in range(halvings):
        side //= 2
    return side**2


def tower_of(config: CLIPConfig, tower: Tower) -> TransformerConfig:
    """Return the config of a tower that supports learned masks.

    Raises:
        ValueError: for a ResNet, whose channels are cut only by rule or by importance.
    """
    part = config.vision if tower == "visual" else config.text
    if not isinstance(part, TransformerConfig):
        raise ValueError(f"a {part.kind} image tower cannot learn masks; use `inherit: calibrated` or `towers: text`")
    return part


def tower_size(config: CLIPConfig, original: CLIPConfig, keep: Masks, tower: Tower, unit: Unit) -> Tensor:
    """Size of a tower's blocks under masks or probabilities of keeping; a scalar, differentiable.

    In parameters: sum(hidden x heads) * 4 * head_dim * (1 + 1/d) + 2 * sum(hidden x mlp), over all blocks, with d
    the original width (reference code, `l0_module`). In MACs: the products for one image, or for one text of full
    context. Embeddings and norms are not counted. For a ResNet: `resnet_size`.

    Args:
        keep: by axis name, as masks; what is absent is kept whole.
    """
    if tower == "visual" and isinstance(config.vision, ResNetConfig):
        return resnet_size(config, keep, unit)
    part, width = tower_of(config, tower), tower_of(original, tower).width
    sizes = axis_sizes(config)

    def kept(name: str) -> Tensor:
        return keep[name].sum() if name in keep else torch.tensor(float(sizes[name]))

    hidden, length, total = kept(f"{tower}.hidden"), kept_length(part), torch.zeros(())
    for i, (heads, mlp) in enumerate(zip(part.heads, part.mlp_width, strict=True)):
        if heads is not None:
            inner = part.head_dim * kept(f"{tower}.heads.{i}") * kept(f"{tower}.attn.{i}")
            weights = 4 * hidden * inner
            total = total + (
                weights * (1 + 1 / width) if unit == "params" else length * weights + 2 * length**2 * inner
            )
        if mlp is not None:
            weights = 2 * hidden * kept(f"{tower}.mlp.{i}") * kept(f"{tower}.ffn.{i}")
            total = total + (weights if unit == "params" else length * weights)
    return total


def prunable_size(original: CLIPConfig, tower: Tower, unit: Unit) -> int:
    """Return the reference for `tower_size`: all blocks of the original tower; in parameters, biases included."""
    if unit == "macs" or (tower == "visual" and isinstance(original.vision, ResNetConfig)):
        return int(tower_size(original, original, {}, tower, unit).item())
    part = tower_of(original, tower)
    inner = [(heads or 0) * part.head_dim for heads in part.heads]
    mlp = [m or 0 for m in part.mlp_width]
    d = part.width
    return sum(4 * d * n + 3 * n + d for n in inner) + sum(2 * d * m + d + m for m in mlp)


def kept_length(part: TransformerConfig) -> int:
    return part.grid**2 + 1 if isinstance(part, VisionConfig) else part.context_length  # type: ignore[attr-defined]


def sparsity(config: CLIPConfig, original: CLIPConfig, keep: Masks, towers: tuple[Tower, ...], unit: Unit) -> Tensor:
    """Fraction of the original's size that is removed, with the towers' sizes added up; a scalar."""
    # Added one by one: the size of a tower without masks is a CPU scalar, which combines with any device.
    remaining = sum((tower_size(config, original, keep, t, unit) for t in towers), torch.zeros(()))
    return 1 - remaining / sum(prunable_size(original, t, unit) for t in towers)


TOWERS: dict[str, tuple[Tower, ...]] = {"both": BOTH, "image": ("visual",), "text": ("text",)}


def thinner(config: CLIPConfig, removed: float, towers: tuple[Tower, ...]) -> CLIPConfig:
    """Return a shape with about `1 - removed` of these towers' MACs: widths, heads and neurons scaled by one factor. It
    stands in for a shape that is not yet learned, to time it."""
    factor = (1 - removed) ** 0.5

    def scaled(part: TransformerConfig) -> TransformerConfig:
        def thin(count: int | None) -> int | None:
            return count and max(1, round(count * factor))

        update = {"width": thin(part.width), "heads": tuple(map(thin, part.heads))}
        return part.model_copy(update=update | {"mlp_width": tuple(map(thin, part.mlp_width))})

    parts: dict[str, Any] = {}
    if "visual" in towers:
        assert isinstance(config.vision, TransformerConfig), "HardConcrete refuses other towers"
        parts["vision"] = scaled(config.vision)
    if "text" in towers:
        parts["text"] = scaled(config.text)
    return config.model_copy(update=parts)
