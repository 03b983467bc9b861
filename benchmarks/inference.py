"""Inference the plain way (float32, texts padded to 77, every position through every block) and ours, side by side.

    python benchmarks/inference.py [--models ViT-B-32] [--batches 1 --batches 64] [--rounds 7] [--compile]

In each round the ways take turns in one process, so that what else the machine does falls on all. Printed are items a
second from the median round, the range over the rounds in brackets, and each way's ratio to the first, formed round
by round. Weights are random, pictures are tensors, captions have about ten words; tokenisation is counted.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from tinyclip.config import CLIPConfig
from tinyclip.distributed import resolve_device, resolve_dtype
from tinyclip.model import CLIP, Transformer, VisionTransformer, cast
from tinyclip.pipeline import Pipeline, compile_towers
from tinyclip.tokenizer import clip_tokenizer
from tinyclip.transforms import Preprocess

MODELS = ["ViT-B-32", "TinyCLIP-ViT-40M-32-Text-19M", "TinyCLIP-ViT-8M-16-Text-3M"]
VOCABULARY = "a the two red small old of on in with near photo dog house tree water woman man street table train"


@dataclass(frozen=True)
class Way:
    """One way to compute features; both functions return (n, embed_dim)."""

    image: Callable[[Tensor], Tensor]  # float (n, 3, s, s)
    text: Callable[[list[str]], Tensor]


def plain(model: CLIP) -> Way:
    visual = model.visual
    assert isinstance(visual, VisionTransformer)

    def blocks(tower: Transformer, x: Tensor, causal: bool) -> Tensor:
        for block in tower.resblocks:
            x = block(x, causal)
        return x

    def image(images: Tensor) -> Tensor:
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
        x = blocks(visual.transformer, visual.ln_pre(x), causal=False)
        return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)

    def text(texts: list[str]) -> Tensor:
        tokens = torch.from_numpy(clip_tokenizer()(texts)).to(model.logit_scale.device)
        x = blocks(model.transformer, model.token_embedding(tokens) + model.positional_embedding, causal=True)
        x = model.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)]
        return F.normalize(x @ model.text_projection, dim=-1)

    return Way(image, text)


def ours(model: CLIP, dtype: str, compiled: bool = False) -> Way:
    cast(model, resolve_dtype(dtype, model.logit_scale.device))
    if compiled:
        start = time.perf_counter()
        compile_towers(model)
        print(f"compiling took {time.perf_counter() - start:.0f} s")
    clip = Pipeline(model, clip_tokenizer(), Preprocess(image_size=model.config.vision.image_size))
    return Way(clip.encode_image, clip.encode_text)


def ways(name: str, device: torch.device, compiled: bool) -> dict[str, Way]:
    """All with the same weights; the first is what the others are compared with."""

    def fresh() -> CLIP:
        torch.manual_seed(0)
        return CLIP(CLIPConfig.named(name)).to(device).eval()

    found = {"plain": plain(fresh()), "ours, float32": ours(fresh(), "float32"), "ours": ours(fresh(), "auto")}
    return found | ({"ours, compiled": ours(fresh(), "auto", compiled=True)} if compiled else {})


def timed(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def compare(name: str, batch: int, found: dict[str, Way], rounds: int, device: torch.device) -> None:
    rng = random.Random(0)
    size = CLIPConfig.named(name).vision.image_size
    images = torch.rand(batch, 3, size, size, device=device)
    texts = [" ".join(rng.choices(VOCABULARY.split(), k=rng.randint(8, 12))) for _ in range(batch)]
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds + 1):
        for label, way in found.items():
            spent = {
                "image": timed(lambda way=way: way.image(images), device),  # type: ignore[misc]
                "text": timed(lambda way=way: way.text(texts), device),  # type: ignore[misc]
            }
            for what, value in (spent | {"pair": sum(spent.values())}).items():
                seconds.setdefault((label, what), []).append(value)
    first = next(iter(found))
    for label in found:
        cells = []
        for what in ("image", "text", "pair"):
            own, base = seconds[label, what][1:], seconds[first, what][1:]  # the first round is a warm-up
            ratios = sorted(b / o for b, o in zip(base, own, strict=True))
            speeds = sorted(batch / value for value in own)
            speed = f"{statistics.median(speeds):8.1f} ({speeds[0]:.0f} to {speeds[-1]:.0f})"
            cells.append(f"{what} {speed:24} x{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        print(f"{name:29} {batch:3} {label:15} " + "   ".join(f"{cell:52}" for cell in cells), flush=True)


def main(
    models: Annotated[list[str], typer.Option(help="Names of shapes.")] = MODELS,
    batches: Annotated[list[int], typer.Option(help="Pairs at once.")] = [1, 8, 64],  # noqa: B006
    rounds: int = 7,
    device: str = "cpu",
    compile: bool = False,
) -> None:
    place = resolve_device(device)
    print(f"{place}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}; items a second")
    with torch.inference_mode():
        for name in models:
            found = ways(name, place, compile)
            for batch in batches:
                compare(name, batch, found, rounds, place)


if __name__ == "__main__":
    typer.run(main)
