"""Parameters and multiply-accumulates of a shape, computed from its config. No torch here."""

from __future__ import annotations

from typing import Any

from tinyclip.model.axes import axis_table, count_parameters
from tinyclip.model.config import CLIPConfig, ResNetConfig, TransformerConfig, VisionConfig


def macs(config: CLIPConfig) -> dict[str, int]:
    """Count the multiply-accumulates of one image and one text of full context, `image` and `text`.

    Counts matrix products and convolutions, including both attention products, but not norms, activations and
    additions. Follows published counts: outputs that this implementation skips because nothing reads them count too.
    """
    vision, text = config.vision, config.text
    image = _vit(vision, config.embed_dim) if isinstance(vision, VisionConfig) else _resnet(vision, config.embed_dim)
    return {
        "image": image,
        "text": _transformer(text, text.context_length) + text.width * config.embed_dim,
    }


def _vit(config: VisionConfig, embed_dim: int) -> int:
    patches = config.grid**2
    convolution = patches * config.width * 3 * config.patch_size**2
    return convolution + _transformer(config, patches + 1) + config.width * embed_dim


def _resnet(config: ResNetConfig, embed_dim: int) -> int:
    side = (config.image_size + 1) // 2
    first, second, inputs = config.stem
    total = side**2 * 9 * (3 * first + first * second + second * inputs)
    side //= 2
    for stage, (outputs, ones, twos) in enumerate(zip(config.channels, config.conv1, config.conv2, strict=True), 1):
        for i, (one, two) in enumerate(zip(ones, twos, strict=True)):
            total += side**2 * (inputs * one + 9 * one * two)
            if i == 0:
                side //= 2 if stage > 1 else 1
                total += side**2 * inputs * outputs  # the shortcut
            total += side**2 * two * outputs
            inputs = outputs
    length, inner = config.grid**2 + 1, config.heads * config.head_dim
    # The published pool computes an output for every position; ours only for the first, the one that is used.
    return total + length * (3 * inputs * inner + 2 * length * inner + inner * embed_dim)


def _transformer(config: TransformerConfig, length: int) -> int:
    total = 0
    for heads, mlp in zip(config.heads, config.mlp_width, strict=True):
        inner = (heads or 0) * config.head_dim
        total += length * (4 * inner * config.width + 2 * (mlp or 0) * config.width)
        total += 2 * length * length * inner
    return total


def counted(config: CLIPConfig) -> dict[str, Any]:
    """Return the parameters and MACs of a shape, under the names of `measure`."""
    counts, operations = count_parameters(axis_table(config)), macs(config)
    return {f"params_{k}": n for k, n in counts.items()} | {f"macs_{k}": n for k, n in operations.items()}
