"""Training steps with a live teacher and with its cached features, alternating in one process.

Random weights and pictures, captions of 12 tokens; decoding is not counted. On a CPU, process time is measured, so that
other work on the machine has little effect; use one thread, because waiting threads count too.

    OMP_NUM_THREADS=1 python benchmarks/cached_teacher.py
"""

from __future__ import annotations

import time
from statistics import median

import torch

from tinyclip.common.devices import best_precision, resolve_device
from tinyclip.compress.inheritance import inherit
from tinyclip.data.loader import Batch
from tinyclip.inputs.tokenizer import BYTE_TOKENS, CLIPTokenizer, clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig
from tinyclip.model.model import CLIP
from tinyclip.recipe.recipe import load_recipe
from tinyclip.recipe.stage import Stage
from tinyclip.teachers.teacher import CachedTeacher, Teacher
from tinyclip.train.run import attention
from tinyclip.train.step import Trainee
from tinyclip.zoo.checkpoint import read_config

ROUNDS, TOKENS = 4, 12


def compare(name: str, first: CLIPConfig, stage: Stage, pairs: int) -> None:
    """Print pairs/s of both, and their ratio with its range over the rounds."""
    torch.manual_seed(0)
    device = resolve_device("auto")
    precision, preprocess = best_precision(device), Preprocess(image_size=first.vision.image_size)
    tokenizer = CLIPTokenizer(clip_tokenizer().merges[: first.text.vocab_size - BYTE_TOKENS - 2], TOKENS)
    model = CLIP(first).to(device)
    teachers: dict[str, Teacher | CachedTeacher] = {
        "live": Teacher(model, preprocess),
        "stored": CachedTeacher(first.embed_dim, [model.logit_scale.exp()]),
    }
    trainees = {}
    for kind, teacher in teachers.items():
        student = inherit(model, stage.student.apply(first)).requires_grad_().train()
        trainees[kind] = Trainee(student, stage, teacher, tokenizer, preprocess, precision)
    tokens = torch.randint(1, tokenizer.end_id - 1, (pairs, first.text.context_length))
    tokens[:, TOKENS - 1] = tokenizer.end_id
    size = first.vision.image_size
    images = torch.randint(256, (pairs, 3, size, size), dtype=torch.uint8)
    features = [(torch.randn(pairs, first.embed_dim).half(), torch.randn(pairs, first.embed_dim).half())]
    batch = Batch(images, tokens, torch.arange(pairs), ["?"] * pairs, teacher=features)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    speeds: dict[str, list[float]] = {kind: [] for kind in trainees}
    with attention(device):
        for round_ in range(ROUNDS + 1):
            for kind, trainee in trainees.items():
                start = clock()
                trainee.step(batch, 1)["loss"].item()
                if round_:  # the first is a warm-up
                    speeds[kind].append(pairs / (clock() - start))
    ratios = [stored / live for live, stored in zip(speeds["live"], speeds["stored"], strict=True)]
    live, stored = median(speeds["live"]), median(speeds["stored"])
    spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{name}: live {live:.1f} pairs/s, stored {stored:.1f} pairs/s, ratio {spread}, {precision}")


if __name__ == "__main__":
    student = {"like": "TinyCLIP-ViT-40M-32-Text-19M"}
    large = Stage.model_validate({"name": "50", "steps": 10, "batch_size": 32, "student": student})
    compare("ViT-B/32 to ViT-40M/32, batch 32", CLIPConfig.named("ViT-B-32"), large, 32)
    emoji = load_recipe("recipes/emoji-50.yaml").stages[0]
    compare("emoji 75 % stage, batch 128", read_config("assets/emoji-teacher"), emoji, 128)
