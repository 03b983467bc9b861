from __future__ import annotations

import pytest

from tests.helpers.models import golden, small_config, uneven_config
from tinyclip.model.axes import axis_sizes, axis_table, count_parameters
from tinyclip.model.config import NAMED, CLIPConfig
from tinyclip.model.model import CLIP

CONFIGS = {
    "equal blocks": small_config(),
    "unequal, missing and empty branches": uneven_config(),
    "published": NAMED["TinyCLIP-ViT-8M-16-Text-3M"],
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_table_is_the_models_state_dict(config: CLIPConfig) -> None:
    shapes = {key: tuple(value.shape) for key, value in CLIP(config).state_dict().items()}
    assert {key: entry.shape for key, entry in axis_table(config).items()} == shapes


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_axis_and_gate_is_used_and_every_used_one_has_a_size(config: CLIPConfig) -> None:
    entries = axis_table(config).values()
    axes = {axis.name for entry in entries for axis in entry.axes if axis is not None}
    gates = {entry.branch for entry in entries if entry.branch is not None}
    assert axes | gates == set(axis_sizes(config))


def test_the_table_equals_the_authors_layout() -> None:
    name = "TinyCLIP-ViT-8M-16-Text-3M"
    layout = {key: tuple(shape) for key, shape in golden(f"layout-{name}.json").items()}
    assert {key: entry.shape for key, entry in axis_table(NAMED[name]).items()} == layout


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("TinyCLIP-ViT-39M-16-Text-19M", 38.6, 19.2),
        ("TinyCLIP-ViT-8M-16-Text-3M", 8.3, 2.5),
        ("TinyCLIP-ViT-61M-32-Text-29M", 61.4, 28.7),
        ("TinyCLIP-ViT-40M-32-Text-19M", 39.7, 19.2),
    ],
)
def test_published_parameter_counts(name: str, image: float, text: float) -> None:
    counts = count_parameters(axis_table(NAMED[name]))
    assert counts["image"] / 1e6 == pytest.approx(image, abs=0.05)
    assert counts["text"] / 1e6 == pytest.approx(text, abs=0.05)
    assert counts["embedding"] == 49408 * NAMED[name].text.width


def test_parts_add_up_to_the_model() -> None:
    model = CLIP(uneven_config())
    counts = count_parameters(axis_table(model.config))
    assert counts["embedding"] == model.token_embedding.weight.numel()
    assert counts["image"] == sum(p.numel() for p in model.visual.parameters())
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
