"""OpenAI's ModifiedResNet: three stem convolutions, average pooling before every strided convolution, an attention
pool at the end. State-dict keys are OpenAI's, batch-norm statistics included."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyclip.model.config import ResNetConfig
from tinyclip.model.masks import Masks


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut; the first of a stage changes channels and may stride."""

    def __init__(self, inputs: int, inner: tuple[int, int], outputs: int, stride: int, first: bool) -> None:
        super().__init__()
        one, two = inner
        self.conv1 = nn.Conv2d(inputs, one, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(one)
        self.conv2 = nn.Conv2d(one, two, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(two)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(two, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if first:
            parts = [("-1", nn.AvgPool2d(stride)), ("0", nn.Conv2d(inputs, outputs, 1, bias=False))]
            self.downsample = nn.Sequential(OrderedDict([*parts, ("1", nn.BatchNorm2d(outputs))]))

    def forward(self, x: Tensor, masks: dict[str, Tensor]) -> Tensor:
        """x: (n, inputs, h, w) -> (n, outputs, h/stride, w/stride); masks: `conv1`, `conv2`, `stage`, `block`."""
        y = _masked(F.relu(self.bn1(self.conv1(x))), masks.get("conv1"))
        y = _masked(F.relu(self.bn2(self.conv2(y))), masks.get("conv2"))
        y = _masked(self.bn3(self.conv3(self.avgpool(y))), masks.get("block"))
        shortcut = x if self.downsample is None else self.downsample(x)
        return _masked(F.relu(y + shortcut), masks.get("stage"))


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x: (n, channels, h, w); mask: (channels,) or (1,)."""
    return x if mask is None else (x * mask.view(-1, 1, 1)).to(x.dtype)


class AttentionPool(nn.Module):
    """Attention pooling: the mean over positions attends to itself and to every position."""

    def __init__(self, channels: int, grid: int, heads: int, head_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, channels))
        self.k_proj = nn.Linear(channels, heads * head_dim)
        self.q_proj = nn.Linear(channels, heads * head_dim)
        self.v_proj = nn.Linear(channels, heads * head_dim)
        self.c_proj = nn.Linear(heads * head_dim, embed_dim)

    def forward(self, x: Tensor, stage: Tensor | None = None, heads: Tensor | None = None) -> Tensor:
        """x: (n, channels, grid, grid) -> (n, embed_dim); masks: stage (channels,), heads (heads,)."""
        x = x.flatten(2).transpose(1, 2)
        positions = self.positional_embedding if stage is None else self.positional_embedding * stage
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + positions  # (n, grid^2 + 1, channels)
        x = x.to(self.q_proj.weight.dtype)
        n, length, _ = x.shape
        q = self.q_proj(x[:, :1]).view(n, 1, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(n, length, self.heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(n, length, self.heads, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)  # (n, heads, 1, head_dim)
        if heads is not None:
            y = (y * heads.view(-1, 1, 1)).to(y.dtype)
        return self.c_proj(y.reshape(n, self.heads * self.head_dim))


class ModifiedResNet(nn.Module):
    def __init__(self, config: ResNetConfig, embed_dim: int) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.input_resolution = config.image_size
        first, second, third = config.stem
        self.conv1 = nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(third)
        inputs = third
        for stage, outputs in enumerate(config.channels, 1):
            inner = zip(config.conv1[stage - 1], config.conv2[stage - 1], strict=True)
            blocks = []
            for i, sizes in enumerate(inner):
                blocks.append(Bottleneck(inputs, sizes, outputs, 2 if i == 0 and stage > 1 else 1, i == 0))
                inputs = outputs
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(inputs, config.grid, config.heads, config.head_dim, embed_dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise weights as OpenAI does: each block's branch starts at 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
        std = self.attnpool.q_proj.in_features**-0.5
        for linear in (self.attnpool.q_proj, self.attnpool.k_proj, self.attnpool.v_proj, self.attnpool.c_proj):
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.attnpool.positional_embedding, std=std)

    def forward(self, images: Tensor, masks: Masks | None = None) -> Tensor:
        """images: (n, 3, image_size, image_size), normalised -> (n, embed_dim)."""
        masks = masks or {}
        x = images.contiguous(memory_format=torch.channels_last)  # the faster layout for convolutions
        for i in (1, 2, 3):
            if i == 2 and self.conv2.weight.dtype.itemsize < x.dtype.itemsize:
                x = x.to(self.conv2.weight.dtype)  # pixels went through float32 (see `model.cast`)
            x = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x))
            x = _masked(F.relu(x), masks.get(f"visual.stem.{i}"))
        x = F.avg_pool2d(x, 2)
        for stage in (1, 2, 3, 4):
            for i, block in enumerate(self.get_submodule(f"layer{stage}").children()):
                own = _block_masks(masks, stage, i)
                x = checkpoint(block, x, own, use_reentrant=False) if self.grad_checkpointing else block(x, own)
        return self.attnpool(x, masks.get("visual.stage.4"), masks.get("visual.pool_heads"))


def _block_masks(masks: Masks, stage: int, block: int) -> dict[str, Tensor]:
    names = {kind: f"visual.{kind}.{stage}.{block}" for kind in ("conv1", "conv2", "block")}
    names["stage"] = f"visual.stage.{stage}"
    return {kind: masks[name] for kind, name in names.items() if name in masks}
