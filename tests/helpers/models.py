"""Small models, their inputs, and the results of the authors' code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.golden import fill
from tinyclip.compress.batch_norm import batch_norms
from tinyclip.inputs.tokenizer import CLIPTokenizer, clip_tokenizer
from tinyclip.model.axes import axis_sizes
from tinyclip.model.config import CLIPConfig, resnet_tower, vit_clip
from tinyclip.model.model import CLIP

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TEXTS = [
    "a photo of a cat",
    "two dogs playing in the snow",
    "",
    "an extremely long caption " * 30,
    "a diagram",
    "ZÜRICH café — 2024!!",
    "3/4 cup of sugar & salt",
    "日本語のテキスト",
]


def golden(name: str) -> Any:
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


def filled(config: CLIPConfig, salt: int) -> CLIP:
    """Return a model with `fill.py`'s weights for this salt."""
    model = CLIP(config)
    state = {k: torch.from_numpy(np.asarray(fill.fill(k, tuple(v.shape), salt))) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def images(config: CLIPConfig, salt: int) -> torch.Tensor:
    return torch.from_numpy(fill.images(2, config.vision.image_size, salt))


def small_config(**changes: Any) -> CLIPConfig:
    """Return a ViT CLIP config with a few thousand parameters."""
    arguments: dict[str, Any] = {"image_size": 32, "head_dim": 8, "context_length": 12} | changes
    return vit_clip(24, (3, 32), (2, 24), 8, **arguments)


def uneven_config(**changes: Any) -> CLIPConfig:
    """Return a ViT CLIP config as pruning leaves it: unequal blocks, missing branches, empty ones, odd widths."""
    vision = {"image_size": 33, "patch_size": 8, "width": 27, "head_dim": 8}
    vision |= {"heads": (3, 0, None, 1), "mlp_width": (10, None, 7, 0)}
    text = {"width": 19, "head_dim": 4, "heads": (None, 2, 3), "mlp_width": (0, 31, None)}
    text |= {"vocab_size": 50, "context_length": 9}
    return CLIPConfig.from_dict({"embed_dim": 13, "vision": vision | {"kind": "vit"}, "text": text} | changes)


def random_model(config: CLIPConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> CLIP:
    """Return a model with no parameter at its initial 0 or 1, so that a forgotten one shows."""
    torch.manual_seed(seed)
    model = CLIP(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=dtype), alpha=0.2)
    return model


def random_inputs(config: CLIPConfig, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return three images, and three texts of 2 to 7 tokens, zero-padded to the context length."""
    generator = torch.Generator().manual_seed(7)
    size, text = config.vision.image_size, config.text
    pixels = torch.randn(3, 3, size, size, generator=generator, dtype=dtype)
    tokens = torch.zeros(3, text.context_length, dtype=torch.long)
    for row, length in zip(tokens, (2, 5, 7), strict=True):
        row[:length] = torch.randint(1, text.vocab_size - 1, (length,), generator=generator)
        row[length - 1] = text.vocab_size - 1
    return pixels, tokens


def random_masks(config: CLIPConfig, seed: int) -> dict[str, torch.Tensor]:
    """Return graded masks with zeros on every axis of the features, including gates; each tower keeps two channels and
    its last branch."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, size in axis_sizes(config).items():
        mask = torch.rand(size, generator=generator, dtype=torch.float64) + 0.2
        mask[torch.rand(size, generator=generator) < 0.35] = 0
        masks[name] = mask
    gates = [name for name in masks if ".attn." in name or ".ffn." in name]
    last = [[name for name in gates if name.startswith(tower)][-1] for tower in ("visual", "text")]
    for name in ("embed", "visual.hidden", "text.hidden", *last):
        masks[name][:2] = 0.7
    return {name: mask for name, mask in masks.items() if name not in ("text.context", "text.vocab")}


def small_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer with CLIP's byte tokens and first 88 merges: 602 tokens."""
    return CLIPTokenizer(clip_tokenizer().merges[:88], context_length=12)


def resnet_config(layers: tuple[int, ...] = (1, 2, 3, 1), width: int = 4, **changes: Any) -> CLIPConfig:
    """Return a ResNet CLIP config with some ten thousand parameters, 64 px: the last feature map is 2 x 2."""
    fields: dict[str, Any] = {"image_size": 64, "head_dim": 8} | changes.pop("vision", {})
    base = small_config(**({"vocab_size": 60} | changes))
    return base.model_copy(update={"vision": resnet_tower(layers, width, **fields)})


def random_resnet(config: CLIPConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> CLIP:
    """Return a ResNet CLIP with no parameter or running statistic at its initial value."""
    model = random_model(config, seed, dtype)
    for norm in batch_norms(model):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_(std=0.3)
        norm.running_var.uniform_(0.5, 2)
    return model
