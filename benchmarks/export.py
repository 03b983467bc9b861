"""Exports compared with PyTorch: size, speed and accuracy of each format, alternating in one process.

    python benchmarks/export.py                    # docs/export.md uses --rounds 9, 6 minutes on two cores
    python benchmarks/export.py --rounds 3 --no-accuracy

Speed is that of a ViT-40M/32 with random weights, pictures as tensors, and captions of about ten words, including
tokenisation. Accuracy is that of the shipped emoji student on assets/emoji/eval. Ratios are computed per round; their
minimum and maximum are in brackets.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from performance import processor
from side_by_side import Timing, ratio, side_by_side, table

from tinyclip.evaluate import metrics
from tinyclip.export.export import export
from tinyclip.inference.pipeline import Pipeline, Tensors
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.loading import load_encoder
from tinyclip.model.config import CLIPConfig
from tinyclip.model.model import CLIP

SHAPE = "TinyCLIP-ViT-40M-32-Text-19M"
EMOJI = Path(__file__).parent.parent / "assets/emoji"
# Name, folder, runtime, dtype of the parts that are not int8.
WAYS = [
    ("PyTorch, float32", "model", "torch", "float32"),
    ("PyTorch, bfloat16", "model", "torch", "bfloat16"),
    ("ONNX Runtime, float32", "onnx", "onnxruntime", "float32"),
    ("ONNX Runtime, int8", "onnx-int8", "onnxruntime", "float32"),
    ("OpenVINO, float32", "openvino", "openvino", "float32"),
    ("OpenVINO, bfloat16", "openvino", "openvino", "bfloat16"),
    ("OpenVINO, int8", "openvino-int8", "openvino", "bfloat16"),
    ("OpenVINO of the int8 ONNX", "onnx-int8", "openvino", "bfloat16"),
]
WORDS = "a the two red small old of on in with near photo dog house tree water woman man street table train"


def main() -> None:
    parser = argparse.ArgumentParser(description="exports beside PyTorch")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    parser.add_argument("--no-accuracy", action="store_true", help="speed alone")
    parser.add_argument("--no-speed", action="store_true", help="accuracy alone")
    arguments = parser.parse_args()
    print(f"{processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.no_speed:
            speed(Path(folder) / "large", arguments.rounds)
        if not arguments.no_accuracy:
            accuracy(Path(folder) / "emoji")


def exports(source: str | Path, folder: Path) -> dict[str, Any]:
    """Return the model of each variant."""
    for to in ("onnx", "openvino"):
        export(source, folder / to, to)
        export(source, folder / f"{to}-int8", to, int8=True, calibration=EMOJI / "train")
    places = {"model": source} | {name: folder / name for _, name, _, _ in WAYS if name != "model"}
    return {
        name: load_encoder(places[place], dtype=dtype, runtime="auto" if place == "model" else runtime)
        for name, place, runtime, dtype in WAYS
    }


def speed(folder: Path, rounds: int) -> None:
    torch.manual_seed(0)
    model = CLIP(CLIPConfig.named(SHAPE)).eval()
    Pipeline(model, clip_tokenizer(), Preprocess(image_size=224)).save(folder / "model")
    clips = exports(folder / "model", folder)
    sizes = {name: sum(f.stat().st_size for f in (folder / place).iterdir()) for name, place, _, _ in WAYS}
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS.split(), k=rng.randint(8, 12))) for _ in range(256)]
    pixels = torch.rand(128, 3, 224, 224)
    image = side_by_side({name: partial(clip.encode_image, pixels) for name, clip in clips.items()}, rounds)
    text = side_by_side({name: partial(clip.encode_text, texts) for name, clip in clips.items()}, rounds)
    whole, half = (name for name, *_ in WAYS[:2])
    rows = []
    for name in clips:
        per_pair = Timing(
            [a / len(pixels) + b / len(texts) for a, b in zip(image[name].seconds, text[name].seconds, strict=True)]
        )
        row = [name, f"{sizes[name] / 1e6:,.0f}", f"{len(pixels) / image[name].median:,.0f}"]
        row += [ratio(image[name], image[whole]), ratio(image[name], image[half])]
        rows.append([*row, f"{len(texts) / text[name].median:,.0f}", f"{1 / per_pair.median:,.0f}"])
    header = ["ViT-40M/32", "MB", "images/s", "x PyTorch float32", "x PyTorch bfloat16", "texts/s", "pairs/s"]
    print(table(header, rows) + "\n", flush=True)


def accuracy(folder: Path) -> None:
    clips = exports("emoji-student", folder)
    dataset = metrics.open_dataset(EMOJI / "eval", EMOJI / "templates.txt")
    rows = []
    for name, clip in clips.items():
        figures = metrics.evaluate(clip, dataset)
        shown = [figures[key] for key in ("acc1", "acc5", "image_retrieval_recall@1", "text_retrieval_recall@1")]
        size = f"{clip.size() / 1e6:,.1f}" if isinstance(clip, Tensors) else "-"
        rows.append([name, size, *(f"{100 * value:.2f}" for value in shown)])
    print(table(["emoji student", "MB", "top-1 %", "top-5 %", "image R@1 %", "text R@1 %"], rows), flush=True)


if __name__ == "__main__":
    main()
