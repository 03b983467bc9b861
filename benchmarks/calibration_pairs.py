"""How many pairs measured importance needs: what is kept, and the accuracy before any training, by number of pairs.

    python benchmarks/calibration_pairs.py                                  # the emoji teacher, to 50 and 25 %
    python benchmarks/calibration_pairs.py --shape ViT-B-32 --pairs 1024    # time on a large model, random weights

Kept in common: share of the kept size that the largest calibration with another seed keeps too; its own row shows how
much two such calibrations differ.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import torch
from performance import processor
from torch import Tensor

from tinyclip.compress.calibrate import Calibration, Sample, calibrate
from tinyclip.compress.inheritance import compact
from tinyclip.compress.size import sparsity
from tinyclip.data.loader import close_loader, training_loader
from tinyclip.evaluate.metrics import open_dataset, zero_shot
from tinyclip.inference.pipeline import Pipeline, load
from tinyclip.inputs.augment import Augment
from tinyclip.model.config import CLIPConfig
from tinyclip.model.model import CLIP
from tinyclip.train.calibration_batches import samples

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ROOT / "assets/emoji"


def main() -> None:
    parser = argparse.ArgumentParser(description="pairs that measured importance needs")
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 256, 1024, 4096, 25_600])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64, help="pairs a batch, at most the pairs of a round")
    parser.add_argument("--shape", help="time this shape with random weights and pictures instead")
    options = parser.parse_args()
    import_module("tinyclip.compress.calibrate").SETTLED = -1.0  # type: ignore[attr-defined]  # no early stop
    print(f"{processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n", flush=True)
    if options.shape:
        timed(options)
        return
    teacher = load(ROOT / "assets/emoji-teacher")
    print("| removed | pairs | kept in common, % | top-1, % | seconds |\n|--:|--:|--:|--:|--:|")
    for target in options.targets:
        found = {
            (pairs, seed): measured(teacher, pairs, target, seed, options.batch_size)
            for pairs in options.pairs
            for seed in range(options.seeds)
        }
        for pairs in options.pairs:
            mine = [found[pairs, seed] for seed in range(options.seeds)]
            others = [found[max(options.pairs), (seed + 1) % options.seeds] for seed in range(options.seeds)]
            common = [
                in_common(teacher.model.config, one, two) for (one, _), (two, _) in zip(mine, others, strict=True)
            ]
            accuracies = [100 * accuracy(teacher, masks) for masks, _ in mine]
            figures = [f"{statistics.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in (common, accuracies)]
            seconds = statistics.mean(seconds for _, seconds in mine)
            print(f"| {100 * target:.0f} % | {pairs:,} | {' | '.join(figures)} | {seconds:.1f} |", flush=True)


def settings(teacher: CLIP, pairs: int, batch_size: int, seed: int) -> tuple[Calibration, int]:
    """Return how to measure on so many pairs, without an early stop, and the pairs of a batch."""
    size = min(batch_size, max(2, pairs // Calibration(1.0).rounds))
    return Calibration(teacher.logit_scale.exp().item(), batches=pairs // size, seed=seed), size


def measured(
    teacher: Pipeline, pairs: int, target: float, seed: int, batch_size: int
) -> tuple[dict[str, Tensor], float]:
    """Return the masks, and the seconds that they took."""
    model = teacher.model.requires_grad_(False)
    how, size = settings(model, pairs, batch_size, seed)
    loader = training_loader(
        EMOJI / "train",
        tokenizer=teacher.tokenizer,
        context_length=model.config.text.context_length,
        image_size=model.config.vision.image_size,
        augment=Augment(),
        batch_size=size,
        workers=1,
        seed=seed,
    )
    source = samples(loader, EMOJI / "train", model, teacher.tokenizer, teacher.preprocessing)
    start = time.perf_counter()
    masks = calibrate(model, source, {"both": target}, how)
    seconds = time.perf_counter() - start
    close_loader(loader)
    return masks, seconds


def in_common(config: CLIPConfig, one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Return the size that both keep, in percent of what the first keeps."""
    both = {name: one[name] * two[name] for name in one}
    kept, shared = (1 - sparsity(config, config, masks, ("visual", "text"), "params").item() for masks in (one, both))
    return 100 * shared / kept


def accuracy(teacher: Pipeline, masks: dict[str, Tensor]) -> float:
    student = Pipeline(compact(teacher.model, masks), teacher.tokenizer, teacher.preprocessing)
    return float(zero_shot(student, open_dataset(EMOJI / "eval", EMOJI / "templates.txt"))["acc1"])


def timed(options: argparse.Namespace) -> None:
    config = CLIPConfig.named(options.shape)
    model = CLIP(config).eval().requires_grad_(False)
    for pairs in options.pairs:
        how, size = settings(model, pairs, options.batch_size, 0)
        start = time.perf_counter()
        calibrate(model, random_samples(config, size), {"both": options.targets[0]}, how)
        print(f"{options.shape}: {pairs:,} pairs in {time.perf_counter() - start:.0f} s", flush=True)


def random_samples(config: CLIPConfig, size: int) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)
    side, text = config.vision.image_size, config.text
    while True:
        tokens = torch.randint(1, text.vocab_size - 2, (size, 20), generator=generator)
        tokens[:, -1] = text.vocab_size - 1
        yield Sample(torch.randn(size, 3, side, side, generator=generator), tokens)


if __name__ == "__main__":
    main()
