"""Training step of the emoji teacher with PyTorch's fused and plain attention, side by side.

    python benchmarks/attention.py

The two alternate in one process. Prints the median seconds of each, and the ratio of each turn.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyclip.common.devices import best_precision
from tinyclip.inference.pipeline import load
from tinyclip.loss import contrastive_loss
from tinyclip.recipe.recipe import load_recipe
from tinyclip.train.step import make_optimizer

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {"fused": SDPBackend.FLASH_ATTENTION, "plain": SDPBackend.MATH}


def main(rounds: int = 8, batch_size: int = 256, text_length: int = 14) -> None:
    device = torch.device("cpu")  # other devices use the fused kernel in training anyway
    precision = best_precision(device)
    model = load(ROOT / "assets/emoji-teacher", device=device).model.train()
    optimizer = make_optimizer(model.parameters(), load_recipe(ROOT / "recipes/emoji-teacher.yaml").stages[0])
    size, vocabulary = model.config.vision.image_size, model.config.text.vocab_size
    images = torch.rand(batch_size, 3, size, size, device=device)
    tokens = torch.randint(vocabulary - 1, (batch_size, text_length), device=device)
    tokens[:, -1] = vocabulary - 1

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
            image_features, text_features, scale = model(images, tokens)
        contrastive_loss(image_features.float(), text_features.float(), scale.float()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {name: [] for name in KERNELS}
    for _ in range(rounds + 1):
        for name, backend in KERNELS.items():
            with sdpa_kernel(backend):
                seconds[name].append(step())
    print(f"{device}, {precision}, {torch.get_num_threads()} threads, batch {batch_size}, PyTorch {torch.__version__}")
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values[1:]):.2f} s a step")  # the first is a warm-up
    ratios = sorted(f / p for f, p in zip(seconds["fused"][1:], seconds["plain"][1:], strict=True))
    print(f"fused / plain: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
