"""Masks: one multiplier for each element of a named axis, and one for each branch.

`Masks` maps axis names (see `axes`) to 1-D tensors. A name that is absent is not masked; an element at 0 is
removed, one between is graded. Gates (`visual.attn.3`, `text.ffn.3`) have one element. The masks of a ResNet
image tower are 0 or 1 only, as batch norm and shared channels leave no one place to fold a grade into.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tinyclip.axes import axis_sizes
from tinyclip.config import CLIPConfig, ResNetConfig

Masks = Mapping[str, Tensor]


def validate(masks: Masks, config: CLIPConfig) -> None:
    """Check that every mask belongs to the model and has its length.

    Raises:
        ValueError: naming the mask, its shape, and what the model has; a graded mask for a ResNet tower.
    """
    sizes = axis_sizes(config)
    for name, mask in masks.items():
        if name not in sizes:
            raise ValueError(f"mask {name!r}: the model has no such axis")
        if tuple(mask.shape) != (sizes[name],):
            raise ValueError(f"mask {name!r}: shape {tuple(mask.shape)}, expected ({sizes[name]},)")
        if isinstance(config.vision, ResNetConfig) and name.startswith("visual."):
            values = mask.detach()
            if not ((values == 0) | (values == 1)).all():
                raise ValueError(f"mask {name!r}: a ResNet tower takes masks of 0 and 1 only")
