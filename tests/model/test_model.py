from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden import fill
from tests.helpers.models import (
    TEXTS,
    filled,
    golden,
    images,
    random_inputs,
    random_masks,
    random_model,
    small_config,
    uneven_config,
)
from tinyclip.compress.inheritance import compact
from tinyclip.inference.pipeline import tokenize
from tinyclip.model.axes import axis_sizes
from tinyclip.model.config import NAMED, Activation, CLIPConfig, TransformerConfig, VisionConfig
from tinyclip.model.model import CLIP, Transformer, VisionTransformer, cast, layer_norm

# --- the whole forward pass against other implementations


def test_features_equal_the_authors() -> None:
    name = "TinyCLIP-ViT-8M-16-Text-3M"
    expected = golden(f"forward-{name}.npz")
    model = filled(NAMED[name], int(expected["salt"]))
    tokens = torch.from_numpy(expected["tokens"].astype(np.int64))
    with torch.inference_mode():
        image_features, text_features, scale = model(images(model.config, int(expected["salt"])), tokens)
    assert np.abs(image_features.numpy() - expected["image_features"]).max() < 1e-5
    assert np.abs(text_features.numpy() - expected["text_features"]).max() < 1e-5
    assert scale.item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_features_equal_transformers(activation: Activation, others: Callable[[str], ModuleType]) -> None:
    clip = others("transformers.models.clip")
    config = small_config(vocab_size=60, activation=activation)
    model = random_model(config, dtype=torch.float32)
    pixels, tokens = random_inputs(config, torch.float32)
    towers = {}
    for name, tower in (("vision", config.vision), ("text", config.text)):
        assert isinstance(tower, TransformerConfig)
        towers[f"{name}_config"] = {
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp_width[0],
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads[0],
            "hidden_act": activation,
        }
    towers["vision_config"] |= {"image_size": 32, "patch_size": 8}
    towers["text_config"] |= {"vocab_size": 60, "max_position_embeddings": 12, "eos_token_id": 59, "bos_token_id": 58}
    theirs = clip.CLIPModel(clip.CLIPConfig(projection_dim=24, **towers)).eval()
    missing, unexpected = theirs.load_state_dict(transformers_state(model), strict=False)
    assert not unexpected
    assert all(key.endswith("position_ids") for key in missing)
    with torch.inference_mode():
        output = theirs(input_ids=tokens, pixel_values=pixels)
        image_features, text_features, _ = model(pixels, tokens)
    torch.testing.assert_close(output.image_embeds, image_features, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.text_embeds, text_features, rtol=0, atol=1e-5)


def transformers_state(model: CLIP) -> dict[str, Tensor]:
    """Return our weights under the keys of `transformers.CLIPModel`."""
    ours = model.state_dict()
    renamed = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.": "vision_model.pre_layrnorm.",
        "visual.ln_post.": "vision_model.post_layernorm.",
        "token_embedding.": "text_model.embeddings.token_embedding.",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.": "text_model.final_layer_norm.",
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
        "transformer.resblocks.": "text_model.encoder.layers.",
        "logit_scale": "logit_scale",
    }
    inside = {
        ".attn.out_proj.": ".self_attn.out_proj.",
        ".ln_1.": ".layer_norm1.",
        ".ln_2.": ".layer_norm2.",
        ".mlp.c_fc.": ".mlp.fc1.",
        ".mlp.c_proj.": ".mlp.fc2.",
    }
    state = {
        "visual_projection.weight": ours.pop("visual.proj").T.contiguous(),
        "text_projection.weight": ours.pop("text_projection").T.contiguous(),
    }
    for key, value in ours.items():
        start = next(prefix for prefix in renamed if key.startswith(prefix))
        name = renamed[start] + key.removeprefix(start)
        for old, new in inside.items():
            name = name.replace(old, new)
        if ".attn.in_proj_" in name:
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                state[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = tensor
        else:
            state[name] = value
    return state


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_features_equal_openclip(activation: Activation, others: Callable[[str], ModuleType]) -> None:
    open_clip = others("open_clip")
    config = small_config(vocab_size=60, activation=activation)
    assert isinstance(config.vision, VisionConfig)
    model = random_model(config, dtype=torch.float32)
    pixels, tokens = random_inputs(config, torch.float32)
    text = config.text
    theirs = open_clip.model.CLIP(
        config.embed_dim,
        open_clip.CLIPVisionCfg(
            layers=config.vision.layers, width=config.vision.width, head_width=8, patch_size=8, image_size=32
        ),
        open_clip.CLIPTextCfg(
            context_length=text.context_length, vocab_size=60, width=text.width, heads=text.heads[0], layers=text.layers
        ),
        quick_gelu=activation == "quick_gelu",
    ).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    with torch.inference_mode():
        expected = theirs.encode_image(pixels, normalize=True), theirs.encode_text(tokens, normalize=True)
        actual = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# --- shapes


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 3, 33, 32), (2, 3, 32, 24), (1, 2, 3, 32, 32)])
def test_images_of_another_shape_are_refused(small_model: CLIP, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images have shape .* expected \(n, 3, 32, 32\)"):
        small_model.encode_image(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(12,), (2, 13), (2, 0), (2, 12, 1)])
def test_tokens_of_another_shape_are_refused(small_model: CLIP, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens have shape .* expected \(n, 1 to 12\)"):
        small_model.encode_text(torch.zeros(shape, dtype=torch.long))


def test_rows_cut_after_the_last_end_token_give_the_same_features() -> None:
    model = random_model(small_config(vocab_size=60))
    _, tokens = random_inputs(model.config)
    torch.testing.assert_close(model.encode_text(tokens[:, :7]), model.encode_text(tokens), rtol=1e-12, atol=1e-12)


def test_the_text_feature_is_read_at_the_first_end_token() -> None:
    model = random_model(small_config(vocab_size=60))
    _, tokens = random_inputs(model.config)
    noisy = tokens.clone()
    noisy[0, 2:] = 59
    noisy[1, 5:] = 3
    torch.testing.assert_close(model.encode_text(noisy), model.encode_text(tokens), rtol=1e-12, atol=1e-12)


# --- computes only what is needed


def blocks_config(vision: tuple[Any, Any], text: tuple[Any, Any]) -> CLIPConfig:
    """Return `small_config` with these heads and MLP widths."""
    config = small_config(vocab_size=60)
    parts: dict[str, Any] = {"vision": config.vision, "text": config.text}
    for name, (heads, mlp) in (("vision", vision), ("text", text)):
        parts[name] = parts[name].model_copy(update={"heads": heads, "mlp_width": mlp})
    return config.model_copy(update=parts)


SHAPES = {
    "equal": small_config(vocab_size=60),
    "uneven": uneven_config(),
    "attention early": blocks_config(((2, None, 0), (9, 5, None)), ((1, 0, None), (9, None, 8))),
    "attention last": blocks_config(((None, 3), (9, None)), ((0, 2), (None, 0))),
    "no attention": blocks_config(((None, 0), (9, 5)), ((0, None), (None, 8))),
}
NO_BLOCKS = blocks_config(((), ()), ((), ()))


def plain_features(model: CLIP, pixels: Tensor, tokens: Tensor, masks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute all positions through all blocks, with a convolution for the patches."""
    visual, hidden = model.visual, masks.get("visual.hidden", torch.ones(()))
    assert isinstance(visual, VisionTransformer)
    x = F.conv2d(pixels, visual.conv1.weight, stride=visual.conv1.stride).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x = layer_norm(visual.ln_pre, x * hidden, masks.get("visual.hidden"))
    x = all_blocks(visual.transformer, x, False, masks)
    image = layer_norm(visual.ln_post, x[:, 0], masks.get("visual.hidden")) @ visual.proj
    x = (model.token_embedding(tokens) + model.positional_embedding) * masks.get("text.hidden", torch.ones(()))
    x = all_blocks(model.transformer, x, True, masks)
    x = layer_norm(model.ln_final, x, masks.get("text.hidden"))[range(len(x)), tokens.argmax(-1)]
    embed = masks.get("embed", torch.ones(()))
    return image * embed, x @ model.text_projection * embed


def all_blocks(tower: Transformer, x: Tensor, causal: bool, masks: dict[str, Tensor]) -> Tensor:
    for i, block in enumerate(tower.resblocks):
        own = {kind: masks.get(f"{tower.tower}.{kind}.{i}") for kind in ("heads", "mlp", "attn", "ffn")}
        own["hidden"] = masks.get(f"{tower.tower}.hidden")
        x = block(x, causal, {kind: mask for kind, mask in own.items() if mask is not None})
    return x


CASES = [*((config, masked) for config in SHAPES.values() for masked in (False, True)), (NO_BLOCKS, False)]


@pytest.mark.parametrize(
    ("config", "masked"), CASES, ids=[*(f"{s}-{m}" for s in SHAPES for m in ("plain", "masked")), "no blocks"]
)
def test_features_and_gradients_are_those_of_all_positions(config: CLIPConfig, masked: bool) -> None:
    model, (pixels, tokens) = random_model(config), random_inputs(config)
    masks = random_masks(config, 1) if masked else {}
    for mask in masks.values():
        mask.requires_grad_()
    inputs = [*model.parameters(), *masks.values()]
    results = []
    for image, text in (plain_features(model, pixels, tokens, masks), model(pixels, tokens, masks)[:2]):
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        loss = (image @ text.T).square().sum()
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        results.append([image, text, *gradients])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


# --- masks


def test_masks_of_ones_change_nothing() -> None:
    model = random_model(small_config(vocab_size=60))
    pixels, tokens = random_inputs(model.config)
    ones = {name: torch.ones(size) for name, size in axis_sizes(model.config).items()}
    torch.testing.assert_close(model(pixels, tokens, masks=ones), model(pixels, tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [small_config(vocab_size=60), uneven_config()], ids=["equal", "uneven"])
@pytest.mark.parametrize("seed", range(4))
def test_the_masked_forward_is_that_of_the_method(config: CLIPConfig, seed: int) -> None:
    model, masks = random_model(config), random_masks(config, seed)
    pixels, tokens = random_inputs(config)
    slow = SlowCLIP(model, masks)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(model.encode_image(pixels, masks), slow.encode_image(pixels), **close)
    torch.testing.assert_close(model.encode_text(tokens, masks), slow.encode_text(tokens), **close)


@pytest.mark.parametrize("config", [small_config(vocab_size=60), uneven_config()], ids=["equal", "uneven"])
def test_masks_of_a_model_in_bfloat16(config: CLIPConfig) -> None:
    model = random_model(config, dtype=torch.float32)
    pixels, tokens = random_inputs(config, torch.float32)
    masks = {name: mask.float() for name, mask in random_masks(config, 0).items()}
    wanted = model.encode_image(pixels, masks), model.encode_text(tokens, masks)
    cast(model, torch.bfloat16)
    found = model.encode_image(pixels, masks), model.encode_text(tokens, masks)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.cosine_similarity(ours, theirs).min() > 0.999


class SlowCLIP:
    """A direct implementation of METHOD section 3, "Masked forward": one picture or text, and one head, at a time."""

    def __init__(self, model: CLIP, masks: dict[str, Tensor]) -> None:
        self.config, self.weights, self.masks = model.config, model.state_dict(), masks

    def mask(self, name: str, size: int) -> Tensor:
        return self.masks.get(name, torch.ones(size, dtype=torch.float64))

    def encode_image(self, pixels: Tensor) -> Tensor:
        vision, w = self.config.vision, self.weights
        assert isinstance(vision, VisionConfig)
        hidden, p = self.mask("visual.hidden", vision.width), vision.patch_size
        features = []
        for picture in pixels:
            rows = [w["visual.class_embedding"]]
            for y in range(vision.grid):
                for x in range(vision.grid):
                    patch = picture[:, y * p : (y + 1) * p, x * p : (x + 1) * p]
                    rows.append((w["visual.conv1.weight"] * patch).sum((1, 2, 3)))
            stream = (torch.stack(rows) + w["visual.positional_embedding"]) * hidden
            stream = self.norm("visual.ln_pre", stream, hidden)
            stream = self.blocks(stream, "visual", "visual.transformer", vision, causal=False)
            features.append(self.norm("visual.ln_post", stream[:1], hidden)[0] @ w["visual.proj"])
        return torch.stack(features) * self.mask("embed", self.config.embed_dim)

    def encode_text(self, tokens: Tensor) -> Tensor:
        text, w = self.config.text, self.weights
        hidden = self.mask("text.hidden", text.width)
        features = []
        for row in tokens:
            end = row.tolist().index(text.vocab_size - 1)
            stream = (w["token_embedding.weight"][row] + w["positional_embedding"]) * hidden
            stream = self.blocks(stream, "text", "transformer", text, causal=True)
            features.append(self.norm("ln_final", stream[end : end + 1], hidden)[0] @ w["text_projection"])
        return torch.stack(features) * self.mask("embed", self.config.embed_dim)

    def norm(self, key: str, stream: Tensor, hidden: Tensor) -> Tensor:
        kept = [i for i, value in enumerate(hidden.tolist()) if value != 0]
        out = torch.zeros_like(stream)
        x = stream[:, kept]
        x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + 1e-5)
        out[:, kept] = x * self.weights[f"{key}.weight"][kept] + self.weights[f"{key}.bias"][kept]
        return out

    def blocks(self, stream: Tensor, tower: str, prefix: str, config: TransformerConfig, causal: bool) -> Tensor:
        hidden = self.mask(f"{tower}.hidden", config.width)
        for i, (heads, neurons) in enumerate(zip(config.heads, config.mlp_width, strict=True)):
            key = f"{prefix}.resblocks.{i}"
            if heads is not None:
                read = self.norm(f"{key}.ln_1", stream, hidden)
                written = self.attention(f"{key}.attn", read, self.mask(f"{tower}.heads.{i}", heads), config, causal)
                stream = stream + written * hidden * self.mask(f"{tower}.attn.{i}", 1)
            if neurons is not None:
                w = {name: self.weights[f"{key}.mlp.{name}"] for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight")}
                read = self.norm(f"{key}.ln_2", stream, hidden) @ w["c_fc.weight"].T + w["c_fc.bias"]
                if self.config.activation == "gelu":
                    active = read * (1 + torch.erf(read / math.sqrt(2))) / 2
                else:
                    active = read * torch.sigmoid(1.702 * read)
                active = active * self.mask(f"{tower}.mlp.{i}", neurons)
                written = active @ w["c_proj.weight"].T + self.weights[f"{key}.mlp.c_proj.bias"]
                stream = stream + written * hidden * self.mask(f"{tower}.ffn.{i}", 1)
        return stream

    def attention(self, key: str, read: Tensor, mask: Tensor, config: TransformerConfig, causal: bool) -> Tensor:
        d, heads = config.head_dim, len(mask)
        weight, bias = self.weights[f"{key}.in_proj_weight"], self.weights[f"{key}.in_proj_bias"]
        written = self.weights[f"{key}.out_proj.bias"].expand(len(read), -1)
        for h in range(heads):
            rows = [slice((part * heads + h) * d, (part * heads + h + 1) * d) for part in range(3)]
            q, k, v = (read @ weight[r].T + bias[r] for r in rows)
            scores = q @ k.T / math.sqrt(d)
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            head = F.softmax(scores, 1) @ v * mask[h]
            written = written + head @ self.weights[f"{key}.out_proj.weight"][:, h * d : (h + 1) * d].T
        return written


def test_unknown_masks_are_refused(small_model: CLIP) -> None:
    with pytest.raises(ValueError, match=r"visual\.head\.0"):
        small_model.encode_image(torch.rand(1, 3, 32, 32), masks={"visual.head.0": torch.ones(4)})


def learned_masks(config: CLIPConfig, salt: int) -> dict[str, torch.Tensor]:
    """Return the deterministic masks of METHOD 3 for `fill.py`'s log-alphas."""

    def values(log_alpha: torch.Tensor) -> torch.Tensor:
        kept = 1 - torch.sigmoid(math.log((0.1 / 1.2) / (1.1 / 1.2)) * 2 / 3 - log_alpha)
        mask = torch.sigmoid(log_alpha / (2 / 3) * 0.8)
        mask[mask.argsort()[: round((1 - kept).sum().item())]] = 0
        return mask

    masks = {}
    for tower, part in (("visual", config.vision), ("text", config.text)):
        assert isinstance(part, TransformerConfig)
        masks[f"{tower}.hidden"] = values(torch.from_numpy(fill.log_alpha(tower, "hidden", (part.width,), salt)))
        for kind, name, size in (("heads", "heads", part.heads[0]), ("mlp", "intermediate", part.mlp_width[0])):
            rows = torch.from_numpy(fill.log_alpha(tower, name, (part.layers, size or 0), salt))
            masks |= {f"{tower}.{kind}.{i}": values(row) for i, row in enumerate(rows)}
    return masks


def test_a_masked_model_and_its_cut_match_the_authors_masked_features() -> None:
    numbers, config = golden("auto-ViT-B-32.json"), CLIPConfig.named("ViT-B-32")
    model, masks = filled(config, numbers["salt"]), learned_masks(config, numbers["salt"])
    assert masks["visual.hidden"].tolist() == pytest.approx(numbers["visual"]["hidden_values"], abs=1e-6)
    tokens, pixels = tokenize(TEXTS), images(config, numbers["salt"])
    for network, given in ((model, masks), (compact(model, masks), None)):
        with torch.no_grad():
            image_features = network.encode_image(pixels, masks=given, normalize=True)
            text_features = network.encode_text(tokens, masks=given, normalize=True)
        np.testing.assert_allclose(image_features, numbers["image_features"], atol=1e-5)
        np.testing.assert_allclose(text_features, numbers["text_features"], atol=1e-5)
