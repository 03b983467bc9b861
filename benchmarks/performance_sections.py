"""The sections of performance.py; each prints one table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rivals
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from rivals import Way
from side_by_side import Timing, peak_flops, ratio, side_by_side, table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tinyclip.data.loader import Batch, image_input
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig
from tinyclip.model.costs import macs
from tinyclip.recipe.stage import Stage
from tinyclip.teachers.teacher import CachedTeacher, Teacher
from tinyclip.train.run import attention
from tinyclip.train.step import Trainee
from tinyclip.zoo.checkpoint import load_checkpoint
from tinyclip.zoo.openai import Stated, config_from

MODELS = {
    "ViT-B/32": "ViT-B-32",
    "ViT-40M/32": "TinyCLIP-ViT-40M-32-Text-19M",
    "ViT-8M/16": "TinyCLIP-ViT-8M-16-Text-3M",
}
BATCHES = (1, 8, 64)
GOLDEN = Path(__file__).resolve().parent.parent / "tests/golden"


@dataclass(frozen=True)
class Setting:
    folder: Path
    rounds: int
    device: str
    dtype: torch.dtype  # the faster one on this device

    def ways(self, name: str) -> list[Way]:
        """Return every library in both precisions; ours in the faster one comes first, and the others are compared with
        it."""
        place = rivals.prepare(CLIPConfig.named(MODELS[name]), self.folder / MODELS[name])
        precisions = list(dict.fromkeys((self.dtype, torch.float32)))
        makers = (rivals.ours, rivals.open_clip, rivals.hugging_face)
        return [make(place, dtype, self.device) for make in makers for dtype in precisions]


def inference(setting: Setting) -> None:
    """Measure images, texts and pairs per second; a pair's time is its image's plus its text's."""
    peak = peak_flops(setting.dtype, setting.device)
    print(f"matrix products of {rivals.name_of(setting.dtype)}: {peak / 1e12:.2f} TFLOP/s measured\n")
    rows = []
    for name in MODELS:
        ways = setting.ways(name)
        if setting.device == "cpu":
            ways.insert(1, rivals.openvino(setting.folder / MODELS[name], setting.dtype))
        config = CLIPConfig.named(MODELS[name])
        for batch in BATCHES:
            texts, size = rivals.captions(batch), config.vision.image_size
            images = torch.randn(batch, 3, size, size)
            calls: dict[str, Callable[[], object]] = {f"{w.name} image": on(w.encode_image, images) for w in ways}
            calls |= {f"{w.name} text": on(w.encode_text, texts) for w in ways}
            timings = side_by_side(calls, setting.rounds)
            for way in ways:
                timings[f"{way.name} pair"] = timings[f"{way.name} image"] + timings[f"{way.name} text"]
            flops = 2 * batch * macs(config)["image"]
            for way in ways:
                cells = [f"{name}, batch {batch}", way.name]
                for part in ("image", "text", "pair"):
                    mine, first = (timings[f"{w.name} {part}"] for w in (way, ways[0]))
                    cells.append(f"{batch / mine.median:,.0f}")
                    cells.append("1" if way is ways[0] else ratio(first, mine))
                cells.append(f"{100 * flops / timings[f'{way.name} image'].median / peak:.0f} %")
                rows.append(cells)
    what = ["images/s", "ours is faster by", "texts/s", "ours is faster by", "pairs/s", "ours is faster by"]
    print(table(["model", "library", *what, "share of peak, images"], rows))


def on(call: Callable[[Any], object], argument: Any) -> Callable[[], object]:
    return lambda: call(argument)


def compiled(setting: Setting, batch: int = 64) -> None:
    """Measure ViT-40M/32 with and without `torch.compile`."""
    place = rivals.prepare_ours(CLIPConfig.named(MODELS["ViT-40M/32"]), setting.folder / "compiled")
    plain = rivals.ours(place, setting.dtype, setting.device)
    start = time.perf_counter()
    fast = rivals.ours(place, setting.dtype, setting.device, compile=True)
    print(f"compiled in {time.perf_counter() - start:.0f} s\n")
    images, texts = torch.randn(batch, 3, 224, 224), rivals.captions(batch)
    timings = side_by_side({way.name: pair(way, images, texts) for way in (fast, plain)}, setting.rounds)
    print(table(["way", "pairs/s", "compiled is faster by"], speeds(timings, batch, timings[fast.name])))


def pair(way: Way, images: Tensor, texts: list[str]) -> Callable[[], object]:
    return lambda: (way.encode_image(images), way.encode_text(texts))


# --- tokenisation -----------------------------------------------------------------------------------------------


def tokenisation(setting: Setting) -> None:
    """Measure texts per second, into padded token ids."""
    from transformers import AutoTokenizer

    place = rivals.prepare(CLIPConfig.named(MODELS["ViT-8M/16"]), setting.folder / "tokens")
    texts, ours = rivals.captions(10_000), clip_tokenizer()
    theirs, fast = rivals.import_open_clip(), AutoTokenizer.from_pretrained(place / "hf")
    calls = {
        "tinyclip": on(ours, texts),
        "OpenCLIP": on(theirs.tokenize, texts),
        "transformers": lambda: fast(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"),
    }
    timings = side_by_side(calls, setting.rounds)
    rows = [[n, f"{len(texts) / t.median:,.0f}", ratio(timings["tinyclip"], t)] for n, t in timings.items()]
    print(table(["library", "texts/s", "ours is faster by"], rows))


# --- files ------------------------------------------------------------------------------------------------------


class Files(Dataset[Tensor]):
    """Pictures through a library's own transform, as its users write it."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(Image.open(self.paths[i]).convert("RGB"))


def files(setting: Setting, count: int = 256, batch: int = 64) -> None:
    """Measure from JPEGs with a camera's aspect ratio to features: reading, decoding, resizing and the image tower of
    ViT-40M/32."""
    paths = make_pictures(setting.folder / "pictures", count)
    ways = {way.name: way for way in setting.ways("ViT-40M/32")}
    fast = rivals.name_of(setting.dtype)
    mine, theirs, third = (ways[f"{library} {fast}"] for library in ("tinyclip", "OpenCLIP", "transformers"))
    from open_clip.transform import image_transform
    from transformers import CLIPImageProcessor

    transform = image_transform(224, is_train=False)
    processor: Any = CLIPImageProcessor.from_pretrained(setting.folder / MODELS["ViT-40M/32"] / "hf")

    def loaded(workers: int) -> None:
        for images in DataLoader(Files(paths, transform), batch, num_workers=workers):
            theirs.encode_image(images)

    def processed() -> None:
        for start in range(0, count, batch):
            pictures = [Image.open(path).convert("RGB") for path in paths[start : start + batch]]
            third.encode_image(processor(pictures, return_tensors="pt")["pixel_values"])

    calls: dict[str, Callable[[], object]] = {
        "tinyclip, `encode_image(paths)`": lambda: mine.encode_image(paths),  # type: ignore[arg-type]
        "OpenCLIP, a loop": lambda: loaded(0),
        "OpenCLIP, a DataLoader of 2 workers": lambda: loaded(2),
        "transformers, `CLIPProcessor` in a loop": processed,
    }
    timings = side_by_side(calls, setting.rounds, seconds=0)
    first = next(iter(timings.values()))
    print(f"{count} JPEGs of 1280 x 960, {fast}\n")
    print(table(["way", "images/s", "ours is faster by"], speeds(timings, count, first)))


def speeds(timings: dict[str, Timing], count: int, first: Timing) -> list[list[str]]:
    return [[name, f"{count / t.median:,.1f}", ratio(first, t)] for name, t in timings.items()]


def make_pictures(folder: Path, count: int) -> list[Path]:
    """Write JPEGs with smooth colours and fine grain, as in photos."""
    folder.mkdir(parents=True)
    generator, paths = np.random.default_rng(0), []
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8))
        smooth = np.asarray(coarse.resize((1280, 960), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2)))
        grain = generator.normal(0, 6, smooth.shape)
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        paths.append(folder / f"{i:04}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


# --- pruned models ----------------------------------------------------------------------------------------------


def cut(setting: Setting, batch: int = 32) -> None:
    """Compare a ViT-B/32 that learned masks cut in half (the reference code's shape) with the whole and the manual
    one."""
    shapes = json.loads((GOLDEN / "auto-ViT-B-32.json").read_text())["layout"]
    configs = {name: CLIPConfig.named(MODELS[name]) for name in ("ViT-B/32", "ViT-40M/32")}
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    configs["ViT-B/32 cut by learned masks"] = config_from(tensors, "the golden layout", "gelu", Stated())
    ways = {}
    for name, config in configs.items():
        place = rivals.prepare_ours(config, setting.folder / name.replace("/", "-"))
        ways[name] = rivals.ours(place, setting.dtype, setting.device)
    images, texts = torch.randn(batch, 3, 224, 224), rivals.captions(batch)
    timings = side_by_side({name: pair(way, images, texts) for name, way in ways.items()}, setting.rounds)
    rows = []
    for name, timing in timings.items():
        operations = sum(macs(configs[name]).values()) / 1e9
        rows.append([name, f"{operations:.2f}", f"{batch / timing.median:,.0f}", ratio(timing, timings["ViT-B/32"])])
    print(table(["model", "GMACs a pair", "pairs/s", "faster than the whole by"], rows))


# --- a training step --------------------------------------------------------------------------------------------


def training(setting: Setting, batch: int = 32) -> None:
    """Measure a step of ViT-40M/32 with a live ViT-B/32 teacher: affinity mimicking, AdamW, captions of about ten
    words."""
    student, teacher = (
        rivals.prepare(CLIPConfig.named(MODELS[name]), setting.folder / f"step-{MODELS[name]}")
        for name in ("ViT-40M/32", "ViT-B/32")
    )
    pixels = torch.randint(256, (batch, 3, 224, 224), dtype=torch.uint8)
    tokens = torch.from_numpy(clip_tokenizer()(rivals.captions(batch), 77))
    fast = rivals.name_of(setting.dtype)
    model, tokenizer, looks = load_checkpoint(teacher / "tinyclip")
    live = Teacher(model.to(setting.device), looks)
    calls: dict[str, Callable[[], object]] = {}
    for text, precision, keys in (
        (f"tinyclip {fast}, teacher from a cache", fast, {"cached": True}),
        (f"tinyclip {fast}", fast, {}),
        ("tinyclip float32", "float32", {}),
        (f"tinyclip {fast}, micro_batch {batch // 4}", fast, {"micro_batch": batch // 4}),
        (f"tinyclip {fast}, grad_checkpointing", fast, {"grad_checkpointing": True}),
    ):
        calls[text] = our_step(student, live, pixels, tokens, precision, **keys)
    for library, make in (("OpenCLIP", rivals.open_clip_trainable), ("transformers", rivals.hugging_face_trainable)):
        models = make(student, setting.device), make(teacher, setting.device)
        for dtype in dict.fromkeys((setting.dtype, torch.float32)):
            calls[f"{library} {rivals.name_of(dtype)}"] = their_step(*models, pixels, tokens, dtype, setting.device)
    timings = side_by_side(calls, setting.rounds, seconds=0)
    first = timings[f"tinyclip {fast}"]
    rows = [[name, f"{batch / t.median:,.1f}", ratio(first, t)] for name, t in timings.items()]
    print(table(["way", "pairs/s", f"tinyclip {fast} is faster by"], rows))


def our_step(
    student: Path, live: Teacher, pixels: Tensor, tokens: Tensor, precision: str, cached: bool = False, **keys: Any
) -> Callable[[], object]:
    """Return a step as in `tinyclip distill`."""
    stage = Stage(name="step", steps=1000, batch_size=len(pixels), **keys)
    model, tokenizer, looks = load_checkpoint(student / "tinyclip")
    device = live.scale.device
    teacher = CachedTeacher(live.embed_dim, live.scales) if cached else live
    trainee = Trainee(model.to(device), stage, teacher, tokenizer, looks, precision)
    trainee.train()
    names = [str(i) for i in range(len(pixels))]
    stored = [(image, text) for image, text in [torch.randn(2, len(pixels), live.config.embed_dim).half()]]
    batch = Batch(pixels, tokens, torch.arange(len(pixels)), names, teacher=stored)

    def step() -> float:
        with attention(device):
            return trainee.step(batch, 0)["loss"].item()

    return step


def their_step(
    student: rivals.Trainable,
    teacher: rivals.Trainable,
    pixels: Tensor,
    tokens: Tensor,
    dtype: torch.dtype,
    device: str,
) -> Callable[[], object]:
    """Return the same step written by hand, as a user of the library would: texts padded to the context, whole
    matrices."""
    optimizer = torch.optim.AdamW(student.parameters, lr=1e-4)
    looks = Preprocess(image_size=pixels.shape[-1])

    def step() -> float:
        images, texts = image_input(pixels.to(device), looks), tokens.to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                image, text = teacher.features(images, texts)
                targets = 50 * image @ text.T
            image, text = student.features(images, texts)
            logits = 50 * image @ text.T
            loss = F.cross_entropy(logits, targets.softmax(1)) + F.cross_entropy(logits.T, targets.T.softmax(1))
        optimizer.zero_grad()
        (loss / 2).backward()
        optimizer.step()
        return loss.item()

    return step


SECTIONS: dict[str, Callable[[Setting], None]] = {
    "inference": inference,
    "compiled": compiled,
    "tokenisation": tokenisation,
    "files": files,
    "cut": cut,
    "training": training,
}
