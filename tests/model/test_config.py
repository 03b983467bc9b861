from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import small_config, uneven_config
from tinyclip.model.config import AUTO_NAMES, NAMED, CLIPConfig, ResNetConfig, TextConfig, VisionConfig, vit_clip


@pytest.mark.parametrize("name", NAMED)
def test_a_named_config_survives_json(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(CLIPConfig.named(name).model_dump_json())
    assert CLIPConfig.from_json(path) == CLIPConfig.named(name)


@pytest.mark.parametrize(
    ("name", "embed_dim", "patch", "vision", "text"),
    [
        ("ViT-B-32", 512, 32, (12, 768, 12), (12, 512, 8)),
        ("ViT-B-16", 512, 16, (12, 768, 12), (12, 512, 8)),
        ("TinyCLIP-ViT-61M-32-Text-29M", 512, 32, (12, 640, 10), (9, 512, 8)),
        ("TinyCLIP-ViT-40M-32-Text-19M", 512, 32, (12, 512, 8), (6, 512, 8)),
        ("TinyCLIP-ViT-39M-16-Text-19M", 512, 16, (12, 512, 8), (6, 512, 8)),
        ("TinyCLIP-ViT-8M-16-Text-3M", 512, 16, (10, 256, 4), (3, 256, 4)),
    ],
)
def test_named_vits_have_the_papers_shapes(
    name: str, embed_dim: int, patch: int, vision: tuple[int, int, int], text: tuple[int, int, int]
) -> None:
    config = CLIPConfig.named(name)
    assert isinstance(config.vision, VisionConfig)
    assert (config.embed_dim, config.vision.patch_size, config.vision.image_size) == (embed_dim, patch, 224)
    assert (config.text.vocab_size, config.text.context_length, config.activation) == (49408, 77, "gelu")
    for tower, (layers, width, heads) in ((config.vision, vision), (config.text, text)):
        assert (tower.layers, tower.width, tower.head_dim) == (layers, width, 64)
        assert tower.heads == (heads,) * layers
        assert tower.mlp_width == (4 * width,) * layers


@pytest.mark.parametrize(
    ("name", "width", "pool_heads", "text_layers"),
    [
        ("RN50", 64, 32, 12),
        ("TinyCLIP-ResNet-30M-Text-29M", 56, 28, 9),
        ("TinyCLIP-ResNet-19M-Text-19M", 44, 22, 6),
    ],
)
def test_named_resnets_have_the_papers_shapes(name: str, width: int, pool_heads: int, text_layers: int) -> None:
    config = CLIPConfig.named(name)
    assert isinstance(config.vision, ResNetConfig)
    assert (config.vision.layers, config.vision.width, config.vision.heads) == ((3, 4, 6, 3), width, pool_heads)
    assert (config.embed_dim, config.text.layers, config.text.width) == (1024, text_layers, 512)


@pytest.mark.parametrize("name", [*AUTO_NAMES, "TinyCLIP-auto-ViT-63M-32-Text-31M"])
def test_an_auto_name_says_where_its_shape_is(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} .*checkpoint"):
        CLIPConfig.named(name)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"ViT-B-33.*ViT-B-32.*RN50"):
        CLIPConfig.named("ViT-B-33")


def test_missing_and_empty_branches_survive_json(tmp_path: Path) -> None:
    config = uneven_config()
    assert config.text.heads == (None, 2, 3)
    assert config.text.mlp_width == (0, 31, None)
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert CLIPConfig.from_json(path) == config


def test_a_block_without_branches_is_refused() -> None:
    with pytest.raises(ValueError, match="block 1 has neither"):
        TextConfig(width=8, heads=(1, None), mlp_width=(4, None))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("depth", 3, r"config: depth: unknown key"),
        ("text.colour", 3, r"config: text\.colour: unknown key"),
        ("vision.colour", 3, r"config: vision\.colour: unknown key"),
        ("embed_dim", 0, r"embed_dim: must be at least"),
        ("embed_dim", None, r"embed_dim: must be a whole number"),
        ("activation", "relu", r"activation: .*'gelu'"),
        ("text.width", "wide", r"text\.width: must be a whole number"),
        ("text.vocab_size", 1, r"text\.vocab_size: must be at least"),
        ("text.context_length", 1, r"text\.context_length: must be at least"),
        ("text.heads", [3, -1], r"text\.heads\.1: must be at least"),
        ("text.heads", [3], r"text: heads has 1 blocks and mlp_width 2"),
        ("vision.kind", "swin", r"vision: .*'swin'.*'vit'"),
        ("vision.patch_size", 33, r"vision: patch_size 33 exceeds image_size 32"),
        ("vision.mlp_width", [1, 1.5, 1], r"vision\.mlp_width\.1: must be a whole number"),
    ],
)
def test_an_error_names_the_key(key: str, value: Any, message: str) -> None:
    data = small_config().model_dump(mode="json")
    *parents, last = key.split(".")
    part = data
    for parent in parents:
        part = part[parent]
    part[last] = value
    with pytest.raises(ValueError, match=message):
        CLIPConfig.from_dict(data)


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe", b"[]", b"{}"])
def test_a_bad_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: "):
        CLIPConfig.from_json(path)


HUGE: list[dict[str, Any]] = [
    {"embed_dim": 10**400},
    {"embed_dim": 2**20 + 1},
    {"vision": {"image_size": 100_000}},
    {"vision": {"image_size": 10**400}},
    {"vision": {"patch_size": 0}},
    {"vision": {"width": 2**62}},
    {"vision": {"width": 2**20, "mlp_width": [2**20, 2**20]}},
    {"vision": {"heads": [1] * 2000, "mlp_width": [1] * 2000}},
    {"text": {"vocab_size": 2**40}},
    {"text": {"context_length": 2**40}},
    {"text": {"head_dim": 2**20, "heads": [2**20]}},
    {"vision": {"kind": "resnet", "layers": [10**9] * 4, "width": 64, "image_size": 224}},
    {"vision": {"kind": "resnet", "layers": [1] * 4, "width": 10**400, "image_size": 224}},
]


@pytest.mark.parametrize("change", HUGE, ids=lambda change: str(change)[:40])
def test_sizes_beyond_any_clip_are_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    data = vit_clip(24, (2, 64), (2, 64), 16, image_size=32).model_dump()
    for key, value in change.items():
        if not isinstance(value, dict):
            data[key] = value
        else:
            data[key] = value if "kind" in value else data[key] | value
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        CLIPConfig.from_json(tmp_path / "config.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "1" * 5000])
def test_nested_json_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        CLIPConfig.from_json(tmp_path / "config.json")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_largest_clips_that_there_are_fit() -> None:
    assert vit_clip(1280, (48, 1664), (32, 1280), 14, image_size=336).vision.layers == 48
    assert vit_clip(1024, (24, 1024), (12, 768), 14, image_size=1024).vision.grid == 73
