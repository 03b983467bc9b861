"""The same weights in tinyclip, OpenCLIP and Hugging Face transformers, behind one small interface."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyclip.inference.pipeline import load
from tinyclip.inputs.tokenizer import clip_tokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.loading import load_encoder
from tinyclip.model.config import CLIPConfig
from tinyclip.model.model import CLIP
from tinyclip.zoo.checkpoint import save_checkpoint
from tinyclip.zoo.convert import convert

WORDS = ["small", "red", "old", "wooden", "round", "bright", "car", "dog", "house", "tree", "street", "river", "table"]
WORDS += ["cat", "bird", "boat", "near", "behind", "under", "with", "and", "the", "two", "people", "playing", "winter"]


@dataclass(frozen=True)
class Way:
    """One library in one precision. Ours tokenises within `encode_text`; the others get tokens that are already
    prepared."""

    name: str
    encode_image: Callable[[Tensor], Tensor]  # normalised pixels (n, 3, s, s) in float32
    encode_text: Callable[[list[str]], Tensor]


def captions(count: int, seed: int = 0) -> list[str]:
    """Return captions of 7 to 13 words."""
    generator = torch.Generator().manual_seed(seed)

    def pick(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    return [" ".join(WORDS[pick(len(WORDS))] for _ in range(7 + pick(7))) for _ in range(count)]


def prepare_ours(config: CLIPConfig, folder: Path) -> Path:
    """Save a model of this shape with random weights."""
    torch.manual_seed(0)
    looks = Preprocess(image_size=config.vision.image_size)
    save_checkpoint(folder / "tinyclip", CLIP(config), clip_tokenizer(), looks)
    return folder


def prepare(config: CLIPConfig, folder: Path) -> Path:
    """Save a model of this shape with random weights, the same for each library."""
    prepare_ours(config, folder)
    for name in ("open_clip", "hf"):
        convert(folder / "tinyclip", folder / name, name)
    return folder


def ours(folder: Path, dtype: Any, device: str = "cpu", **options: Any) -> Way:
    clip = load(folder / "tinyclip", device=device, dtype=dtype, **options)
    name = f"tinyclip {clip.computing['dtype']}" + (" compiled" if options.get("compile") else "")
    return Way(name, clip.encode_image, clip.encode_text)


def openvino(folder: Path, dtype: torch.dtype) -> Way:
    """Our model on OpenVINO, converted in memory; CPU only."""
    clip = load_encoder(folder / "tinyclip", dtype=dtype, runtime="openvino")
    return Way(f"tinyclip {clip.computing['dtype']} with OpenVINO", clip.encode_image, clip.encode_text)


def open_clip(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Way:
    package = import_open_clip()
    model = package.create_model(f"local-dir:{folder / 'open_clip'}", device=device).eval().to(dtype)
    ready: dict[tuple[str, ...], Tensor] = {}

    @torch.inference_mode()
    def encode_image(images: Tensor) -> Tensor:
        return model.encode_image(images.to(device, dtype), normalize=True).float()

    @torch.inference_mode()
    def encode_text(texts: list[str]) -> Tensor:
        if tuple(texts) not in ready:
            ready[tuple(texts)] = package.tokenize(texts).to(device)
        return model.encode_text(ready[tuple(texts)], normalize=True).float()

    return Way(f"OpenCLIP {name_of(dtype)}", encode_image, encode_text)


def hugging_face(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Way:
    import_open_clip()  # it works around a mismatched torchvision, which breaks transformers
    from transformers import AutoTokenizer, CLIPModel

    model: Any = CLIPModel.from_pretrained(folder / "hf").to(device, dtype).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "hf")
    ready: dict[tuple[str, ...], Any] = {}

    @torch.inference_mode()
    def encode_image(images: Tensor) -> Tensor:
        return features(model.get_image_features(pixel_values=images.to(device, dtype)))

    @torch.inference_mode()
    def encode_text(texts: list[str]) -> Tensor:
        if tuple(texts) not in ready:  # padded to the longest, its default
            ready[tuple(texts)] = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        return features(model.get_text_features(**ready[tuple(texts)]))

    def features(output: Any) -> Tensor:
        output = output if isinstance(output, Tensor) else output.pooler_output  # newer versions wrap it
        return torch.nn.functional.normalize(output.float(), dim=-1)

    return Way(f"transformers {name_of(dtype)}", encode_image, encode_text)


@dataclass(frozen=True)
class Trainable:
    """A library's model in training; `features` takes pixels and tokens and keeps the graph."""

    parameters: list[torch.nn.Parameter]
    features: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def open_clip_trainable(folder: Path, device: str = "cpu") -> Trainable:
    model = import_open_clip().create_model(f"local-dir:{folder / 'open_clip'}", device=device).train()

    def features(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)

    return Trainable(list(model.parameters()), features)


def hugging_face_trainable(folder: Path, device: str = "cpu") -> Trainable:
    import_open_clip()
    from transformers import CLIPModel

    model: Any = CLIPModel.from_pretrained(folder / "hf").to(device).train()

    def features(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=tokens)
        image, text = (x if isinstance(x, Tensor) else x.pooler_output for x in outputs)
        return torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)

    return Trainable(list(model.parameters()), features)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_library: Any = None  # the operators live as long as this object


def import_open_clip() -> Any:
    """Import OpenCLIP, even if the installed torchvision was built for another torch and so lacks its operators."""
    global _library
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            _library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import open_clip as package

        return package
