"""The published models, those that ship with the package, and what is known of each. No torch here."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tinyclip.model.axes import axis_table, count_parameters
from tinyclip.model.config import CLIPConfig

RELEASE = "https://github.com/wkcn/TinyCLIP-model-zoo/releases/download/checkpoints/"
EARLIER = "https://github.com/zhouzhenghong-gt/tinyclip_ckpt/releases/download/pre/"
CACHE_VARIABLE = "TINYCLIP_CACHE"


@dataclass(frozen=True)
class Entry:
    """A published model. Figures are those published: image + text at 224 px and 77 tokens, parameters without the
    token embedding."""

    name: str  # of the file, without .pt
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
        """On the Hugging Face hub there are the manual ViTs."""
        return f"wkcn/{self.name}" if self.how == "manual" and "-ViT-" in self.name else None

    @property
    def data(self) -> str:
        return DATA[self.name.rpartition("-")[2]]

    @property
    def shape(self) -> str | None:
        """What `CLIPConfig.named` knows it by; None when the shape is only in the file."""
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
        "published as 1.9 GMACs, a slip: it has the size of its LAION-400M twin",
    ),
)
SHIPPED = ("emoji-student",)  # in the package itself: a CLIP of emoji drawings, the 25 % that `make demo` makes


def find(name: str) -> Entry | None:
    """The model of a name as people write it: with or without `TinyCLIP-`, `auto-`, `.pt`, the end of the name
    (where it is the only one), and with `/` or spaces for `-`.

    Raises:
        ValueError: when several models have that beginning, naming them.
    """
    wanted = _key(name)
    found = [e for e in ENTRIES if f"{_key(e.name)}-".startswith(f"{wanted}-")]
    if len(found) > 1:
        raise ValueError(f"{name} may be {' or '.join(e.name for e in found)}; write more of the name")
    return found[0] if found else None


def _key(name: str) -> str:
    key = re.sub(r"[/_\s-]+", "-", name.lower()).removesuffix(".pt")
    return key.removeprefix("tinyclip-").removeprefix("auto-")


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where downloads are kept: the argument, else $TINYCLIP_CACHE, else the platform's place for caches."""
    from platformdirs import user_cache_path

    return Path(cache or os.environ.get(CACHE_VARIABLE) or user_cache_path("tinyclip")).expanduser()


def shipped(name: str) -> Path:
    """The folder of a model that ships with the package."""
    return Path(__file__).parent.parent / "models" / name


def describe_shipped(name: str) -> dict[str, str]:
    """What `tinyclip zoo` says of a model that ships with the package."""
    return {"name": name, "state": "shipped", "path": str(shipped(name)), "card": str(shipped(name) / "README.md")}


def get(name: str) -> Entry:
    """The model of a name; `ValueError` with those like it when there is none."""
    if entry := find(name):
        return entry
    raise ValueError(f"{name}: no model of the zoo; {_hint(name)}")


def _hint(name: str) -> str:
    def likeness(entry: Entry) -> float:
        return difflib.SequenceMatcher(None, wanted, _key(entry.name)[: len(wanted)]).ratio()

    wanted = _key(name)
    if wanted and any(name.startswith(wanted) for name in SHIPPED):
        return f"did you mean {SHIPPED[0]}?"
    like = [e.name for e in sorted(ENTRIES, key=likeness, reverse=True)[:3] if likeness(e) > 0.7]
    return f"did you mean {' or '.join(like)}?" if like else "`tinyclip zoo` lists the published models"


def verify(entry: Entry, cache: str | Path | None = None) -> str:
    """Read a cached file whole and compare it with its record; returns its SHA-256.

    Raises:
        ValueError: when it is not in the cache or has changed.
    """
    from tinyclip.common.download import check

    path = cache_folder(cache) / entry.file
    if not path.exists():
        raise ValueError(f"{path}: not downloaded yet")
    return str(check(path, full=True)["sha256"])


def unrecorded(entry: Entry, cache: str | Path | None = None) -> bool:
    """Whether a file is in the cache of which no checksum is known, as one that was put there by hand."""
    from tinyclip.common.download import read_record

    path = cache_folder(cache) / entry.file
    return path.exists() and read_record(path) is None


def recount(entry: Entry, cache: str | Path | None = None) -> dict[str, int] | None:
    """`params_image`, `params_text`, `macs_image`, `macs_text` counted here: of manual models from their shape, of
    the others from their file once it is in the cache (and then kept in its record); None before."""
    if entry.shape:
        return _count(CLIPConfig.named(entry.shape))
    path = cache_folder(cache) / entry.file
    if not path.exists():
        return None
    from tinyclip.common.download import add_to_record, check
    from tinyclip.zoo.checkpoint import load_checkpoint

    record = check(path)
    counts = record.get("recount")
    if counts is None:
        counts = add_to_record(path, recount=_count(load_checkpoint(path)[0].config))["recount"]
    return dict(counts)


def _count(config: CLIPConfig) -> dict[str, int]:
    from tinyclip.model.costs import macs

    parts, operations = count_parameters(axis_table(config)), macs(config)
    counts = {f"params_{tower}": parts[tower] for tower in ("image", "text")}
    return counts | {f"macs_{tower}": operations[tower] for tower in ("image", "text")}


def describe(entry: Entry, cache: str | Path | None = None) -> dict[str, Any]:
    """Everything known of a model, for tables and JSON. `recount` is what went wrong where its file is damaged."""
    from tinyclip.common.download import partial_size, read_record

    path = cache_folder(cache) / entry.file
    state = "cached" if path.exists() else "partial" if partial_size(path) else "remote"
    try:
        counted: dict[str, int] | str | None = recount(entry, cache)
        record: Mapping[str, Any] = (read_record(path) if state == "cached" else None) or {}
    except ValueError as error:
        counted, record, state = str(error), {}, "damaged"
    published = {"imagenet_top1": entry.top1, "params_m": list(entry.params_m), "gmacs": entry.gmacs}
    return {
        "name": entry.name,
        "how": entry.how,
        "data": entry.data,
        "licence": entry.licence,
        "published": published | {"v100_pairs_per_s": entry.pairs_per_s},
        "recount": counted,
        "note": entry.note,
        "url": entry.url,
        "earlier_url": entry.earlier_url,
        "hub_id": entry.hub_id,
        "state": state,
        "path": str(path),
        "sha256": record.get("sha256"),
    }


COLUMNS = ("model", "how", "IN-1K %", "params M", "recounted", "GMACs", "recounted", "V100 pairs/s", "here")


def row(facts: Mapping[str, Any]) -> list[str]:
    """A row of text for `COLUMNS`, of what `describe` gives."""
    published, counts = facts["published"], facts["recount"]
    recounted = ["from the file" if facts["how"] == "auto" else "-"] * 2
    if isinstance(counts, dict):
        recounted = [f"{counts['params_image'] / 1e6:.1f}+{counts['params_text'] / 1e6:.1f}"]
        recounted += [f"{counts['macs_image'] / 1e9:.2f}+{counts['macs_text'] / 1e9:.2f}"]
    image, text = published["params_m"]
    return [
        facts["name"],
        facts["how"],
        f"{published['imagenet_top1']}",
        f"{image}+{text}",
        recounted[0],
        f"{published['gmacs']}",
        recounted[1],
        f"{published['v100_pairs_per_s']:,}",
        "-" if facts["state"] == "remote" else facts["state"],
    ]


def details(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `describe` gives as lines of name and value."""
    lines: dict[str, Any] = {key: value for key, value in facts.items() if key not in ("published", "recount")}
    lines |= {f"published {key}": value for key, value in facts["published"].items()}
    counts = facts["recount"]
    if isinstance(counts, dict):
        lines |= {f"recounted {key}": f"{value:,}" for key, value in counts.items()}
    elif counts:
        lines["problem"] = counts
    return [(key, str(value)) for key, value in lines.items() if value]
