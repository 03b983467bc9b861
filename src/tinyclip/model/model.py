"""CLIP with a ViT or ResNet image tower and a text transformer, in any shape that `CLIPConfig` can express.

State-dict keys are OpenAI's and OpenCLIP's. Everything is batch-first. `masks` (see `masks.py`) scale the residual
writes, heads, neurons and branches; `inheritance.compact` cuts whatever they close, without changing outputs.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinyclip.common.progress import track
from tinyclip.model.config import CLIPConfig, TransformerConfig, VisionConfig
from tinyclip.model.masks import Masks, validate
from tinyclip.model.resnet import ModifiedResNet


def layer_norm(norm: nn.LayerNorm, x: Tensor, hidden: Tensor | None) -> Tensor:
    """LayerNorm over the kept channels only, 0 elsewhere: what a model cut to those channels computes.

    x: (..., width); hidden: (width,) or None. A channel is kept where `hidden` is not 0.
    """
    if hidden is None:
        return norm(x)
    kept = (hidden != 0).to(x.dtype)
    count = kept.sum()
    mean = (x * kept).sum(-1, keepdim=True) / count
    centred = (x - mean) * kept
    variance = centred.square().sum(-1, keepdim=True) / count
    normalised = centred * torch.rsqrt(variance + norm.eps)
    return (normalised * norm.weight + norm.bias) * kept


def at(x: Tensor, read: Tensor) -> Tensor:
    """x: (n, length, width), read: int64 (n,), a position in each row -> (n, 1, width)."""
    return x[torch.arange(x.shape[0], device=x.device), read].unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection; heads may be any number, none included."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(3 * heads * head_dim, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * heads * head_dim))
        self.out_proj = Linear(heads * head_dim, width)

    def forward(self, x: Tensor, causal: bool, mask: Tensor | None = None, read: Tensor | None = None) -> Tensor:
        """x: (n, length, width) -> (n, length, width), or (n, 1, width) for only the positions `read` (n,);
        mask: (heads,)."""
        if self.heads == 0:
            return self.out_proj.bias.expand_as(x if read is None else x[:, :1])
        n, length, _ = x.shape
        if read is None:
            q, k, v = self._project(x, 0, 3)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (n, heads, length, head_dim)
        else:
            (q,), (k, v) = self._project(at(x, read), 0, 1), self._project(x, 1, 3)
            seen = torch.arange(length, device=x.device) <= read.view(-1, 1, 1, 1) if causal else None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # (n, heads, 1, head_dim)
        if mask is not None:
            y = (y * mask.view(-1, 1, 1)).to(y.dtype)  # masks stay in float32 when the weights do not
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, first: int, stop: int) -> Tensor:
        """x: (n, length, width) -> its projections `first` up to (excluding) `stop` of queries, keys, values (0, 1, 2):
        (stop - first, n, heads, length, head_dim)."""
        inner = self.heads * self.head_dim
        rows = slice(first * inner, stop * inner)
        parts = F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        return parts.view(x.shape[0], -1, stop - first, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)


class Linear(nn.Linear):
    """A Linear that leaves initialisation to `CLIP.reset_parameters`; may have no inputs or outputs."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """An Embedding that skips initialisation on the meta device, where it would make torch import its compiler."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's own weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class MLP(nn.Module):
    def __init__(self, width: int, mlp_width: int, activation: str) -> None:
        super().__init__()
        self.c_fc = Linear(width, mlp_width)
        self.act = ACTIVATIONS[activation]()
        self.c_proj = Linear(mlp_width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (n, length, width) -> the same; mask: (mlp_width,), applied after the non-linearity."""
        # Runtimes do not support empty matrices; DDP needs every parameter used.
        if self.c_fc.out_features == 0 and not self.training:
            return self.c_proj.bias.expand_as(x)
        x = self.act(self.c_fc(x))
        return self.c_proj(x if mask is None else (x * mask).to(x.dtype))


class Block(nn.Module):
    """Pre-norm residual block; either branch may be missing."""

    def __init__(self, width: int, heads: int | None, head_dim: int, mlp_width: int | None, activation: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width) if heads is not None else None
        self.attn = Attention(width, heads, head_dim) if heads is not None else None
        self.ln_2 = nn.LayerNorm(width) if mlp_width is not None else None
        self.mlp = MLP(width, mlp_width, activation) if mlp_width is not None else None

    @property
    def mixes(self) -> bool:
        """Whether positions interact in this block."""
        return self.attn is not None and self.attn.heads > 0

    def forward(
        self, x: Tensor, causal: bool, masks: dict[str, Tensor] | None = None, read: Tensor | None = None
    ) -> Tensor:
        """x: (n, length, width) -> the same, or (n, 1, width) for only the positions `read` (n,); masks: this
        block's `hidden`, `heads`, `mlp`, `attn`, `ffn`."""
        masks = masks or {}
        hidden = masks.get("hidden")
        if self.attn is not None and self.ln_1 is not None:
            y = layer_norm(self.ln_1, x, hidden).to(self.attn.in_proj_weight.dtype)
            y = self.attn(y, causal, masks.get("heads"), read)
            x = _sum(x if read is None else at(x, read), _scaled(y, hidden, masks.get("attn")))
        if self.mlp is not None and self.ln_2 is not None:
            y = self.mlp(layer_norm(self.ln_2, x, hidden).to(self.mlp.c_fc.weight.dtype), masks.get("mlp"))
            x = _sum(x, _scaled(y, hidden, masks.get("ffn")))
        return x


def _sum(x: Tensor, y: Tensor) -> Tensor:
    """Add x + y; in place under `torch.inference_mode`, as x is no longer needed. Compilers plan memory themselves."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():  # in this order: the second one
        return x + y  # cannot be traced, so it would cut the graph of each block into three
    return x.add_(y)


def _scaled(x: Tensor, *factors: Tensor | None) -> Tensor:
    for factor in factors:
        if factor is not None:
            x = x * factor
    return x


class Transformer(nn.Module):
    def __init__(self, config: TransformerConfig, activation: str, tower: str) -> None:
        super().__init__()
        self.tower = tower
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            Block(config.width, heads, config.head_dim, mlp, activation)
            for heads, mlp in zip(config.heads, config.mlp_width, strict=True)
        )

    def forward(self, x: Tensor, causal: bool, read: Tensor, masks: Masks | None = None) -> Tensor:
        """x: (n, length, width), read: int64 (n,), the position to read in each row -> (n, width).

        From the last block in which positions interact, only the positions to read are computed.
        """
        mixing = [i for i, block in enumerate(self.resblocks) if block.mixes]
        last = mixing[-1] if mixing else None
        if last is None:
            x = at(x, read)
        for i, block in enumerate(self.resblocks):
            own = _block_masks(masks, self.tower, i) if masks else None
            arguments = x, causal, own, read if i == last else None
            x = checkpoint(block, *arguments, use_reentrant=False) if self.grad_checkpointing else block(*arguments)
        return x[:, 0]


def _block_masks(masks: Masks, tower: str, block: int) -> dict[str, Tensor]:
    names = {kind: f"{tower}.{kind}.{block}" for kind in ("heads", "mlp", "attn", "ffn")}
    names["hidden"] = f"{tower}.hidden"
    return {kind: masks[name] for kind, name in names.items() if name in masks}


class VisionTransformer(nn.Module):
    def __init__(self, config: VisionConfig, embed_dim: int, activation: str) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.patch_size, self.input_resolution = patch, config.image_size
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(config.grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(config, activation, "visual")
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))

    def forward(self, images: Tensor, masks: Masks | None = None) -> Tensor:
        """images: (n, 3, image_size, image_size), normalised -> (n, embed_dim)."""
        hidden = masks.get("visual.hidden") if masks else None
        x = self._patches(images)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], 1) + self.positional_embedding
        x = layer_norm(self.ln_pre, _scaled(x, hidden), hidden)
        x = self.transformer(x, False, torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), masks)
        return layer_norm(self.ln_post, x, hidden) @ self.proj

    def _patches(self, images: Tensor) -> Tensor:
        """images: (n, 3, s, s) -> (n, grid^2, width); leftover pixels at the right and bottom are dropped."""
        n, _, side, _ = images.shape
        size, grid, weight = self.patch_size, side // self.patch_size, self.conv1.weight
        if images.dtype.itemsize <= weight.dtype.itemsize:
            return self.conv1(images).flatten(2).transpose(1, 2)
        # In a low-precision dtype, all pixels of a uniform area would be rounded the same way, and the errors would add
        # up over a patch. So only the difference from the patch's mean is rounded; the mean has its own product. A
        # matrix product is also twice as fast as a convolution in bfloat16 on a CPU.
        cut = images[:, :, : grid * size, : grid * size].view(n, 3, grid, size, grid, size)
        patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(n, grid**2, 3, size**2)
        mean = patches.mean(-1, keepdim=True)
        details = (patches - mean).flatten(2).to(weight.dtype)
        sums = weight.flatten(2).sum(-1, dtype=images.dtype)  # (width, 3)
        return F.linear(details, weight.flatten(1)) + F.linear(mean.squeeze(-1), sums)


class CLIP(nn.Module):
    """Image and text towers into one embedding.

    Args:
        config: the shape; weights are random (OpenCLIP's initialisation) until loaded.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        vision, text = config.vision, config.text
        self.config = config
        self.visual: VisionTransformer | ModifiedResNet
        if isinstance(vision, VisionConfig):
            self.visual = VisionTransformer(vision, config.embed_dim, config.activation)
        else:
            self.visual = ModifiedResNet(vision, config.embed_dim)
        self.token_embedding = Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.transformer = Transformer(text, config.activation, "text")
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products: the narrowest of the weights' (see `cast`)."""
        return min((p.dtype for p in self.parameters()), key=lambda dtype: dtype.itemsize)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise weights as OpenCLIP does (scaled by width and depth); does nothing on the meta device."""
        if self.logit_scale.is_meta:
            return
        vision, text = self.config.vision, self.config.text
        transformers: list[tuple[Transformer, TransformerConfig]] = [(self.transformer, text)]
        if isinstance(self.visual, VisionTransformer):
            assert isinstance(vision, VisionConfig)
            nn.init.normal_(self.visual.class_embedding, std=vision.width**-0.5)
            nn.init.normal_(self.visual.positional_embedding, std=vision.width**-0.5)
            nn.init.normal_(self.visual.proj, std=vision.width**-0.5)
            transformers.insert(0, (self.visual.transformer, vision))
        else:
            self.visual.reset_parameters()
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=text.width**-0.5)
        for tower, config in transformers:
            out_std = config.width**-0.5 * (2 * max(1, config.layers)) ** -0.5
            for block in tower.resblocks:
                assert isinstance(block, Block)
                if block.attn is not None:
                    nn.init.normal_(block.attn.in_proj_weight, std=config.width**-0.5)
                    nn.init.zeros_(block.attn.in_proj_bias)
                    nn.init.normal_(block.attn.out_proj.weight, std=out_std)
                    nn.init.zeros_(block.attn.out_proj.bias)
                if block.mlp is not None:
                    nn.init.normal_(block.mlp.c_fc.weight, std=(2 * config.width) ** -0.5)
                    nn.init.zeros_(block.mlp.c_fc.bias)
                    nn.init.normal_(block.mlp.c_proj.weight, std=out_std)
                    nn.init.zeros_(block.mlp.c_proj.bias)
        self.logit_scale.fill_(math.log(1 / 0.07))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass and recompute the rest."""
        for module in self.modules():
            if isinstance(module, Transformer | ModifiedResNet):
                module.grad_checkpointing = enable

    def encode_image(self, images: Tensor, masks: Masks | None = None, normalize: bool = False) -> Tensor:
        """images: float (n, 3, image_size, image_size), normalised pixels -> image_features (n, embed_dim).

        Pass pixels in float32, whatever the model's dtype.

        Raises:
            ValueError: for another shape.
        """
        if masks:
            validate(masks, self.config)
        size = self.config.vision.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (n, 3, {size}, {size})")
        return self._finish(self.visual(images, masks), masks, normalize)

    def encode_text(self, tokens: Tensor, masks: Masks | None = None, normalize: bool = False) -> Tensor:
        """tokens: int (n, length), length up to context_length, zero-padded -> text_features (n, embed_dim).

        Raises:
            ValueError: for another shape, or more tokens than the context length.
        """
        if masks:
            validate(masks, self.config)
        context = self.config.text.context_length
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= context:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected (n, 1 to {context})")
        hidden = masks.get("text.hidden") if masks else None
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        # The end token is the highest id, so argmax finds its first position.
        x = self.transformer(_scaled(x, hidden), True, tokens.argmax(-1), masks)
        return self._finish(layer_norm(self.ln_final, x, hidden) @ self.text_projection, masks, normalize)

    def _finish(self, features: Tensor, masks: Masks | None, normalize: bool) -> Tensor:
        if masks and "embed" in masks:
            features = features * masks["embed"]
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, tokens: Tensor, masks: Masks | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised image_features and text_features (n, embed_dim), and exp(logit_scale)."""
        image_features = self.encode_image(images, masks, normalize=True)
        return image_features, self.encode_text(tokens, masks, normalize=True), self.logit_scale.exp()


def weights_hash(network: nn.Module) -> str:
    """Hash all parameters and buffers, to detect a different model of the same name."""
    digest = hashlib.sha256()
    state = network.state_dict()
    for key, value in track(sorted(state.items()), "hashing the weights", len(state), "tensors"):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy() if value.ndim else repr(value.item()).encode())
    return digest.hexdigest()


def cast(model: CLIP, dtype: torch.dtype) -> CLIP:
    """Cast weights to `dtype`, in place. Below 32 bits, cast only the blocks' matrices and convolutions (except a
    ResNet's first): pixels, the residual stream, norms, embeddings, projections and the logit scale stay in float32
    (`docs/inference.md`)."""
    if dtype.itemsize >= 4:
        return model.to(dtype)
    of_pixels = model.visual.conv1 if isinstance(model.visual, ModifiedResNet) else None
    for module in model.modules():
        if isinstance(module, Attention | nn.Linear | nn.Conv2d) and module is not of_pixels:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model


def unfilled(config: CLIPConfig) -> CLIP:
    """Return a model of shapes alone, on the meta device. Callers that load all weights give it memory with `to_empty`;
    drawing random weights first would take seconds in a large model."""
    with torch.device("meta"):
        return CLIP(config)
