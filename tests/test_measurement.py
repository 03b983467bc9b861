from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import small_config
from tinyclip.axes import axis_table, count_parameters
from tinyclip.config import CLIPConfig
from tinyclip.measurement import macs, measure
from tinyclip.model import CLIP

# METHOD of TinyCLIP, table of models: recounted parameters (image, text) in millions, published GMACs.
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
    model = CLIP(config.model_copy(update={"text": text})).eval()
    size, length = config.vision.image_size, config.text.context_length
    for part, call in (
        ("image", lambda: model.encode_image(torch.rand(1, 3, size, size))),
        ("text", lambda: model.encode_text(torch.ones(1, length, dtype=torch.int64))),
    ):
        # The counter knows the plain attention kernel; a multiply-accumulate is two of its operations.
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            call()
        assert counter.get_total_flops() / 2 == macs(model.config)[part]


def test_measure_counts_every_parameter_once(small_model: CLIP) -> None:
    figures = measure(small_model, batch_size=2, seconds=0.01)
    total = sum(p.numel() for p in small_model.parameters())
    assert figures["params_image"] + figures["params_text"] + figures["params_embedding"] == total
    assert figures["params_embedding"] == small_model.token_embedding.weight.numel()
    expected = 1 / (1 / figures["images_per_s"] + 1 / figures["texts_per_s"])
    assert figures["pairs_per_s"] == pytest.approx(expected)
    assert "pairs_per_s" not in measure(small_model, seconds=0)
