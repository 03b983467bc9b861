"""Masks as data: one multiplier per element of a named axis, and one per branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from tinyclip.model.axes import axis_sizes
from tinyclip.model.config import CLIPConfig, ResNetConfig

Masks = Mapping[str, Tensor]
Tower = Literal["visual", "text"]
Unit = Literal["params", "macs"]


def validate(masks: Masks, config: CLIPConfig) -> None:
    """Check that every mask names an axis of the model and has its length.

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
