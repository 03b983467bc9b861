"""Size of a ResNet image tower under masks, differentiable in how many channels are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tinyclip.model.axes import axis_table, resnet_sizes
from tinyclip.model.config import CLIPConfig, ResNetConfig


def resnet_size(config: CLIPConfig, keep: Mapping[str, Tensor], unit: str) -> Tensor:
    """Weights of the convolutions and of the attention pool (`params`), or the products that they take for one
    image (`macs`), a scalar; norms, biases and position embeddings are left out.

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
    """How often a weight is used for one image: the positions of its convolution's outputs."""
    if "attnpool" in key:
        return vision.grid**2 + 1  # for every position, as `measurement.macs` counts it
    found = re.search(r"layer(\d)\.(\d+)\.(conv1|conv2)?", key)
    side = (vision.image_size + 1) // 2
    if found is None:
        return side**2
    stage, block, early = int(found[1]), int(found[2]), found[3] is not None
    # A stage after the first halves its side, behind conv2 of its first block.
    halvings = stage - (1 if early and block == 0 and stage > 1 else 0)
    for _ in range(halvings):
        side //= 2
    return side**2
