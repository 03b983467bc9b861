from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.models import small_config
from tinyclip.model.axes import axis_table, count_parameters
from tinyclip.model.config import CLIPConfig, TextConfig, VisionConfig
from tinyclip.model.costs import macs
from tinyclip.model.model import CLIP
from tinyclip.model.speed import measure

# TinyCLIP METHOD, model table: recounted parameters (image, text) in millions, published GMACs.
PUBLISHED = {
    "TinyCLIP-ViT-39M-16-Text-19M": (38.6, 19.2, 9.5),
    "TinyCLIP-ViT-8M-16-Text-3M": (8.3, 2.5, 2.0),
    "TinyCLIP-ViT-61M-32-Text-29M": (61.4, 28.7, 5.3),
    "TinyCLIP-ViT-40M-32-Text-19M": (39.7, 19.2, 3.5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    config, (image, text, gmacs) = CLIPConfig.named(name), PUBLISHED[name]
    counts = count_parameters(axis_table(config))
    assert counts["image"] / 1e6 == pytest.approx(image, abs=0.1)
    assert counts["text"] / 1e6 == pytest.approx(text, abs=0.1)
    assert sum(macs(config).values()) / 1e9 == pytest.approx(gmacs, abs=0.05)


def test_macs_are_what_torch_counts() -> None:
    config = small_config()
    text = config.text.model_copy(update={"heads": (None, 2), "mlp_width": (7, 0)})
    config = config.model_copy(update={"text": text})
    model = CLIP(config).eval()
    assert isinstance(config.vision, VisionConfig)
    images = torch.rand(1, 3, config.vision.image_size, config.vision.image_size)
    tokens = torch.ones(1, config.text.context_length, dtype=torch.int64)
    towers: list[tuple[str, VisionConfig | TextConfig, int, Callable[[], object]]] = [
        ("image", config.vision, config.vision.grid**2 + 1, lambda: model.encode_image(images)),
        ("text", config.text, config.text.context_length, lambda: model.encode_text(tokens)),
    ]
    for part, tower, length, call in towers:
        # The counter supports the plain attention kernel; one multiply-accumulate counts as two operations.
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            call()
        assert counter.get_total_flops() / 2 == macs(config)[part] - spared(tower, length)


def spared(tower: VisionConfig | TextConfig, length: int) -> int:
    """Return the operations that the model skips in its last block: queries, attention and everything after it, for all
    positions but one. The last block must have attention."""
    heads, mlp = tower.heads[-1], tower.mlp_width[-1]
    assert heads and mlp is not None
    inner = heads * tower.head_dim
    return (length - 1) * (2 * inner * tower.width + 2 * mlp * tower.width + 2 * length * inner)


def test_measure_counts_every_parameter_once(small_model: CLIP) -> None:
    figures = measure(small_model, batch_size=2, seconds=0.01)
    total = sum(p.numel() for p in small_model.parameters())
    assert figures["params_image"] + figures["params_text"] + figures["params_embedding"] == total
    assert figures["params_embedding"] == small_model.token_embedding.weight.numel()
    expected = 1 / (1 / figures["images_per_s"] + 1 / figures["texts_per_s"])
    assert figures["pairs_per_s"] == pytest.approx(expected)
    assert "pairs_per_s" not in measure(small_model, seconds=0)
