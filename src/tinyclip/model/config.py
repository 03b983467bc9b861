"""Configs for every shape that a CLIP model can have, before and after compression.

Heads and MLP width are stated per block, so a full model, a manual student and an automatically cut one use the same
kind of config. In a block, `None` means that the branch is gone (with its bias and norm), and `0` that it has no
heads (or neurons) left, only its output bias.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from tinyclip.common.schema import LARGEST, Count, Positive, Strict, explain

MOST_BLOCKS, MOST_WEIGHTS = 1024, 20_000_000_000
LARGEST_IMAGE = 4096  # pixels; the same limit as in `transforms.Preprocess`
ImageSize = Annotated[int, Field(ge=1, le=LARGEST_IMAGE)]
Activation = Literal["gelu", "quick_gelu"]


class TransformerConfig(Strict):
    """A stack of residual blocks, with one entry of `heads` and `mlp_width` per block."""

    width: Positive = Field(description="channels of the residual stream")
    head_dim: Positive = Field(64, description="channels of one attention head")
    heads: tuple[Count | None, ...] = Field(
        max_length=MOST_BLOCKS, description="attention heads of each block; null: branch removed"
    )
    mlp_width: tuple[Count | None, ...] = Field(
        max_length=MOST_BLOCKS, description="MLP neurons of each block; null: branch removed"
    )

    @model_validator(mode="after")
    def _blocks_agree(self) -> TransformerConfig:
        if len(self.heads) != len(self.mlp_width):
            raise ValueError(f"heads has {len(self.heads)} blocks and mlp_width {len(self.mlp_width)}")
        for i, (heads, mlp) in enumerate(zip(self.heads, self.mlp_width, strict=True)):
            if heads is None and mlp is None:
                raise ValueError(f"block {i} has neither attention nor MLP: leave it out")
        return self

    @property
    def layers(self) -> int:
        return len(self.heads)

    @property
    def block_weights(self) -> int:
        """Number of weights in the blocks' matrices."""
        channels = sum(
            4 * (h or 0) * self.head_dim + 2 * (m or 0) for h, m in zip(self.heads, self.mlp_width, strict=True)
        )
        return self.width * channels


class VisionConfig(TransformerConfig):
    """Vision transformer."""

    kind: Literal["vit"] = "vit"
    image_size: ImageSize = Field(224, description="side of the square input, pixels")
    patch_size: Positive = Field(description="side of a patch, pixels")

    @model_validator(mode="after")
    def _patches_fit(self) -> VisionConfig:
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} exceeds image_size {self.image_size}")
        return self

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


Blocks = Annotated[tuple[Positive, ...], Field(min_length=1, max_length=MOST_BLOCKS)]


class ResNetConfig(Strict):
    """CLIP's modified ResNet with its attention pool.

    An uncut tower needs only `layers` (bottlenecks of each stage) and `width`; the rest follows as in OpenAI's models:
    stem width/2, width/2, width; stage i has bottlenecks of width * 2^i and 4 times as many channels between them;
    the pool has as many heads of `head_dim` as fit into the last stage.
    """

    kind: Literal["resnet"] = "resnet"
    image_size: int = Field(224, ge=31, le=LARGEST_IMAGE, description="side of the square input, pixels")
    stem: tuple[Positive, Positive, Positive] = Field(description="channels of the three first convolutions")
    channels: tuple[Positive, Positive, Positive, Positive] = Field(description="channels between a stage's blocks")
    conv1: tuple[Blocks, Blocks, Blocks, Blocks] = Field(description="of each stage's blocks: first inner channels")
    conv2: tuple[Blocks, Blocks, Blocks, Blocks] = Field(description="of each stage's blocks: second inner channels")
    heads: Positive = Field(description="heads of the attention pool")
    head_dim: Positive = Field(64, description="channels of one of its heads")

    @model_validator(mode="before")
    @classmethod
    def _from_width(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.keys() & {"layers", "width"}:
            return data
        stated = {key: value for key, value in data.items() if key not in ("layers", "width")}
        layers, width, head_dim = data.get("layers"), data.get("width"), data.get("head_dim", 64)
        if not isinstance(layers, list | tuple) or len(layers) != 4 or not all(_is_positive(n) for n in layers):
            raise ValueError(f"layers must give the blocks of each of four stages, e.g. [3, 4, 6, 3], not {layers}")
        if max(layers) > MOST_BLOCKS:
            raise ValueError(f"layers: at most {MOST_BLOCKS:,} blocks per stage")
        if not isinstance(width, int) or not _is_positive(width) or width > LARGEST:
            raise ValueError(
                f"width must be the channels of the first bottleneck, 1 to {LARGEST:,}, not {str(width)[:20]}"
            )
        inner = [[width * 2**i] * n for i, n in enumerate(layers)]
        derived: dict[str, Any] = {"stem": [max(1, width // 2)] * 2 + [width], "conv1": inner, "conv2": inner}
        derived["channels"] = [width * 2**i * 4 for i in range(4)]
        if isinstance(head_dim, int) and _is_positive(head_dim):
            derived["heads"] = max(1, derived["channels"][3] // head_dim)
        return derived | stated

    @model_validator(mode="after")
    def _blocks_agree(self) -> ResNetConfig:
        for stage, (one, two) in enumerate(zip(self.conv1, self.conv2, strict=True), 1):
            if len(one) != len(two):
                raise ValueError(f"conv1 has {len(one)} blocks in stage {stage} and conv2 {len(two)}")
        return self

    @property
    def layers(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""
        return tuple(len(stage) for stage in self.conv1)

    @property
    def width(self) -> int:
        """Channels of the first bottleneck; in an uncut tower all others follow from it."""
        return self.conv1[0][0]

    @property
    def block_weights(self) -> int:
        """Number of weights in the blocks' 3 x 3 kernels, the bulk of all weights."""
        return sum(
            9 * a * b
            for ones, twos in zip(self.conv1, self.conv2, strict=True)
            for a, b in zip(ones, twos, strict=True)
        )

    @property
    def grid(self) -> int:
        """Side of the last feature map: the stem halves twice, stages 2 to 4 once each."""
        return (self.image_size + 1) // 2 // 16


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class TextConfig(TransformerConfig):
    """Causal text transformer; the feature is read at the end token, the highest id."""

    vocab_size: Annotated[int, Field(ge=2, le=2**24)] = 49408
    context_length: Annotated[int, Field(ge=2, le=LARGEST)] = Field(
        77, description="longest text, start and end tokens included"
    )


class CLIPConfig(Strict):
    """A whole model: two towers into one embedding."""

    embed_dim: Positive = Field(description="size of the shared embedding")
    vision: VisionConfig | ResNetConfig = Field(discriminator="kind")
    text: TextConfig
    activation: Activation = Field("gelu", description="non-linearity of the transformers' MLPs")

    @model_validator(mode="after")
    def _could_be(self) -> CLIPConfig:
        text, vision = self.text, self.vision
        weights = text.block_weights + text.width * (text.vocab_size + text.context_length + self.embed_dim)
        weights += vision.block_weights + vision.width * (vision.grid**2 + self.embed_dim)
        if weights > MOST_WEIGHTS:
            raise ValueError(f"more than {MOST_WEIGHTS:,} weights, too many for a CLIP")
        return self

    @classmethod
    def from_dict(cls, data: Any, where: str = "config") -> CLIPConfig:
        """Validate plain data; `ValueError` names each key that does not fit."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(f"{where}: {explain(error)}") from None

    @classmethod
    def from_json(cls, path: str | Path) -> CLIPConfig:
        """Read a config file; `ValueError` when it is missing, not JSON, or does not fit."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
        return cls.from_dict(data, str(path))

    @classmethod
    def named(cls, name: str) -> CLIPConfig:
        """Return the config of a published model, e.g. `ViT-B-32` or `TinyCLIP-ViT-40M-32-Text-19M`.

        Raises `ValueError` for an unknown name, and for an automatically compressed model, whose shape
        is only known from its checkpoint.

        >>> import tinyclip
        >>> config = tinyclip.CLIPConfig.named("TinyCLIP-ViT-40M-32-Text-19M")
        >>> config.vision.width, config.text.layers
        (512, 6)
        """
        if name.startswith("TinyCLIP-auto-") or name in AUTO_NAMES:
            raise ValueError(
                f"{name} was cut automatically: its shape is in its checkpoint, not in its name; load the file"
            )
        if name not in NAMED:
            raise ValueError(f"no model named {name!r}; known: {', '.join(NAMED)}")
        return NAMED[name]


def vit_clip(
    embed_dim: int,
    vision: tuple[int, int],
    text: tuple[int, int],
    patch_size: int,
    *,
    image_size: int = 224,
    head_dim: int = 64,
    vocab_size: int = 49408,
    context_length: int = 77,
    activation: Activation = "gelu",
) -> CLIPConfig:
    """Return a ViT CLIP of equal blocks; `vision` and `text` are (layers, width), with MLPs of 4 * width."""
    (layers, width), (text_layers, text_width) = vision, text
    return CLIPConfig(
        embed_dim=embed_dim,
        vision=VisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            head_dim=head_dim,
            heads=(width // head_dim,) * layers,
            mlp_width=(4 * width,) * layers,
        ),
        text=_text(text_layers, text_width, head_dim, vocab_size, context_length),
        activation=activation,
    )


def _text(layers: int, width: int, head_dim: int = 64, vocab_size: int = 49408, context_length: int = 77) -> TextConfig:
    return TextConfig(
        width=width,
        head_dim=head_dim,
        heads=(width // head_dim,) * layers,
        mlp_width=(4 * width,) * layers,
        vocab_size=vocab_size,
        context_length=context_length,
    )


def resnet_tower(layers: Sequence[int], width: int, **fields: Any) -> ResNetConfig:
    """Return a ResNet tower from `layers` and `width` (see `ResNetConfig`); `fields` override the rest."""
    return ResNetConfig.model_validate({"layers": layers, "width": width} | fields)


def _resnet(width: int, text_layers: int) -> CLIPConfig:
    return CLIPConfig(embed_dim=1024, vision=resnet_tower((3, 4, 6, 3), width), text=_text(text_layers, 512))


# TinyCLIP paper, table of models; OpenCLIP's ViT-B-32 trained on LAION-2B uses GELU, OpenAI's own uses QuickGELU.
NAMED: dict[str, CLIPConfig] = {
    "ViT-B-32": vit_clip(512, (12, 768), (12, 512), 32),
    "ViT-B-16": vit_clip(512, (12, 768), (12, 512), 16),
    "RN50": _resnet(64, 12),
    "TinyCLIP-ViT-61M-32-Text-29M": vit_clip(512, (12, 640), (9, 512), 32),
    "TinyCLIP-ViT-40M-32-Text-19M": vit_clip(512, (12, 512), (6, 512), 32),
    "TinyCLIP-ViT-39M-16-Text-19M": vit_clip(512, (12, 512), (6, 512), 16),
    "TinyCLIP-ViT-8M-16-Text-3M": vit_clip(512, (10, 256), (3, 256), 16),
    "TinyCLIP-ResNet-30M-Text-29M": _resnet(56, 9),
    "TinyCLIP-ResNet-19M-Text-19M": _resnet(44, 6),
}
AUTO_NAMES = ("TinyCLIP-ViT-63M-32-Text-31M", "TinyCLIP-ViT-45M-32-Text-18M", "TinyCLIP-ViT-22M-32-Text-10M")
