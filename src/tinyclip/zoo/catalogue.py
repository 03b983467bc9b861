"""The published models, the shipped ones, and facts about each. Does not import torch.

The figures come from the paper's model table (ICCV 2023) and its release page, which publishes no checksums:
`common.download` records the checksum of the first download."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RELEASE = "https://github.com/wkcn/TinyCLIP-model-zoo/releases/download/checkpoints/"
EARLIER = "https://github.com/zhouzhenghong-gt/tinyclip_ckpt/releases/download/pre/"
CACHE_VARIABLE = "TINYCLIP_CACHE"


@dataclass(frozen=True)
class Entry:
    """A published model with its published figures: image + text at 224 px and 77 tokens, parameters without the token
    embedding."""

    name: str  # file name without .pt
    how: Literal["manual", "auto"]
    top1: float  # zero-shot on ImageNet-1K, %
    params_m: tuple[int, int]  # image and text, millions
    gmacs: float
    pairs_per_s: int  # on a V100
    earlier: str | None = None  # the file's name in the earlier release
    note: str = ""
    licence: str = "MIT"

    @property
    def file(self) -> str:
        return f"{self.name}.pt"

    @property
    def url(self) -> str:
        return RELEASE + self.file

    @property
    def earlier_url(self) -> str | None:
        return EARLIER + self.earlier if self.earlier else None

    @property
    def hub_id(self) -> str | None:
        """Its Hugging Face id; only the manual ViTs are on the hub."""
        return f"wkcn/{self.name}" if self.how == "manual" and "-ViT-" in self.name else None

    @property
    def data(self) -> str:
        return DATA[self.name.rpartition("-")[2]]

    @property
    def shape(self) -> str | None:
        """Its name for `CLIPConfig.named`; None if only the file has the shape."""
        return self.name.rpartition("-")[0] if self.how == "manual" else None


DATA = {"YFCC15M": "YFCC-15M", "LAION400M": "LAION-400M", "LAIONYFCC400M": "LAION+YFCC-400M"}
ENTRIES = (
    Entry("TinyCLIP-ViT-39M-16-Text-19M-YFCC15M", "manual", 63.5, (39, 19), 9.5, 1469),
    Entry("TinyCLIP-ViT-8M-16-Text-3M-YFCC15M", "manual", 41.1, (8, 3), 2.0, 4150),
    Entry(
        "TinyCLIP-ResNet-30M-Text-29M-LAION400M", "manual", 59.1, (30, 29), 6.9, 1811, "TinyCLIP-ResNet-30M_epoch_6.pt"
    ),
    Entry(
        "TinyCLIP-ResNet-19M-Text-19M-LAION400M",
        "manual",
        56.3,
        (19, 19),
        4.4,
        3024,
        "TinyCLIP-ResNet-19M_epoch_12.pt",
        "the paper's text says 56.4 % top-1",
    ),
    Entry(
        "TinyCLIP-ViT-61M-32-Text-29M-LAION400M", "manual", 62.4, (61, 29), 5.3, 3191, "TinyCLIP-ViT-61M-32_epoch_6.pt"
    ),
    Entry(
        "TinyCLIP-ViT-40M-32-Text-19M-LAION400M", "manual", 59.8, (40, 19), 3.5, 4641, "TinyCLIP-ViT-40M-32_epoch_16.pt"
    ),
    Entry(
        "TinyCLIP-auto-ViT-63M-32-Text-31M-LAION400M", "auto", 63.9, (63, 31), 5.6, 2905, "TinyCLIP-ViT-63M-32-LAION.pt"
    ),
    Entry(
        "TinyCLIP-auto-ViT-45M-32-Text-18M-LAION400M", "auto", 61.4, (45, 18), 3.7, 3682, "TinyCLIP-ViT-45M-32-LAION.pt"
    ),
    Entry(
        "TinyCLIP-auto-ViT-22M-32-Text-10M-LAION400M", "auto", 53.7, (22, 10), 1.9, 5504, "TinyCLIP-ViT-22M-32-LAION.pt"
    ),
    Entry(
        "TinyCLIP-auto-ViT-63M-32-Text-31M-LAIONYFCC400M",
        "auto",
        64.5,
        (63, 31),
        5.6,
        2909,
        "TinyCLIP-ViT-63M-32-LAION-YFCC.pt",
    ),
    Entry(
        "TinyCLIP-auto-ViT-45M-32-Text-18M-LAIONYFCC400M",
        "auto",
        62.7,
        (45, 18),
        3.7,
        3685,
        "TinyCLIP-ViT-45M-32-LAION-YFCC.pt",
        "published as 1.9 GMACs, a mistake: it has the size of its LAION-400M twin",
    ),
)
SHIPPED = ("emoji-student",)  # inside the package: a CLIP for emoji drawings, the 25 % student of `make demo`


def find(name: str) -> Entry | None:
    """Return the model for a loosely written name: with or without `TinyCLIP-`, `auto-`, `.pt` and the end of the
    name (if still unambiguous), and with `/` or spaces for `-`. None if there is none.

    Raises:
        ValueError: if several models start with the name; lists them.
    """
    wanted = _key(name)
    found = [e for e in ENTRIES if f"{_key(e.name)}-".startswith(f"{wanted}-")]
    if len(found) > 1:
        raise ValueError(f"{name} is ambiguous: {' or '.join(e.name for e in found)}; give a longer name")
    return found[0] if found else None


def _key(name: str) -> str:
    key = re.sub(r"[/_\s-]+", "-", name.lower()).removesuffix(".pt")
    return key.removeprefix("tinyclip-").removeprefix("auto-")


def cache_folder(cache: str | Path | None = None) -> Path:
    """Return the folder for downloads: the argument, else $TINYCLIP_CACHE, else the platform's cache folder."""
    from platformdirs import user_cache_path

    return Path(cache or os.environ.get(CACHE_VARIABLE) or user_cache_path("tinyclip")).expanduser()


def shipped(name: str) -> Path:
    """Return the folder of a model that ships with the package."""
    return Path(__file__).parent.parent / "models" / name


def get(name: str) -> Entry:
    """Return the model for a name; `ValueError` with similar names if there is none."""
    if entry := find(name):
        return entry
    raise ValueError(f"{name}: not in the zoo; {_hint(name)}")


def _hint(name: str) -> str:
    def likeness(entry: Entry) -> float:
        return difflib.SequenceMatcher(None, wanted, _key(entry.name)[: len(wanted)]).ratio()

    wanted = _key(name)
    if wanted and any(name.startswith(wanted) for name in SHIPPED):
        return f"did you mean {SHIPPED[0]}?"
    like = [e.name for e in sorted(ENTRIES, key=likeness, reverse=True)[:3] if likeness(e) > 0.7]
    return f"did you mean {' or '.join(like)}?" if like else "`tinyclip zoo` lists the published models"
