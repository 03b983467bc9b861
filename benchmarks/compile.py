"""Training step of ViT-40M/32 Text-19M with and without `compile: true`, side by side.

    python benchmarks/compile.py

The two alternate in one process on the same batches, with texts of 10 to 20 tokens. Prints the seconds of the first
step, the median of the others, and the ratio of each turn. Processor seconds are summed over all threads.
"""

from __future__ import annotations

import statistics
import time

import torch

from tinyclip.common.devices import best_device, best_precision
from tinyclip.data.loader import Batch
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig
from tinyclip.model.model import CLIP
from tinyclip.recipe.stage import Loss, Stage
from tinyclip.train.run import attention
from tinyclip.train.step import Trainee

END = 49407


def trainee(compiled: bool, pairs: int, device: torch.device) -> Trainee:
    torch.manual_seed(0)
    loss = Loss(affinity=0, contrastive=1)  # no teacher, since it is not compiled
    stage = Stage(name="step", steps=1000, batch_size=pairs, loss=loss, compile=compiled)
    model = CLIP(CLIPConfig.named("TinyCLIP-ViT-40M-32-Text-19M")).to(device).train()
    return Trainee(model, stage, None, clip_tokenizer(), Preprocess(image_size=224), best_precision(device))


def batch_of(pairs: int) -> Batch:
    length = int(torch.randint(10, 21, ()))
    tokens = torch.zeros(pairs, 77, dtype=torch.long)
    tokens[:, :length] = torch.randint(1, END - 1, (pairs, length))
    tokens[:, length - 1] = END
    images = torch.randint(256, (pairs, 3, 224, 224), dtype=torch.uint8)
    return Batch(images, tokens, torch.arange(pairs), ["?"] * pairs)


def main(rounds: int = 20, pairs: int = 32) -> None:
    device = best_device()
    kinds = {"plain": trainee(False, pairs, device), "compiled": trainee(True, pairs, device)}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    with attention(device):
        for step in range(rounds + 1):
            batch = batch_of(pairs)
            for name, one in kinds.items():
                wall, processor = time.perf_counter(), time.process_time()
                one.step(batch, step)["loss"].item()
                seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    precision = best_precision(device)
    print(f"{device}, {precision}, {torch.get_num_threads()} threads, batch {pairs}, PyTorch {torch.__version__}")
    for i, kind in enumerate(("elapsed", "processor")):
        for name, values in seconds.items():
            first, median = values[0][i], statistics.median(v[i] for v in values[1:])
            print(f"{name}: first step {first:.1f} s, then {median:.2f} s ({kind})")
        pairs_of_turns = zip(seconds["plain"][1:], seconds["compiled"][1:], strict=True)
        ratios = sorted(plain[i] / compiled[i] for plain, compiled in pairs_of_turns)
        print(f"plain / compiled: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) ({kind})")


if __name__ == "__main__":
    main()
