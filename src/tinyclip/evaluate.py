"""Zero-shot classification and image-text retrieval of anything with `encode_image` and `encode_text`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from tinyclip.faults import Fault, Skipped, counts
from tinyclip.shards import captions_of, image_of, info_of, read_shards
from tinyclip.transforms import open_image

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DEFAULT_TEMPLATES = ("a photo of a {c}",)


class Encoder(Protocol):
    """What an evaluator needs: normalised features of pictures and of texts."""

    def encode_image(self, images: Any, *, normalize: bool = True) -> Tensor: ...

    def encode_text(self, texts: Any, *, normalize: bool = True) -> Tensor: ...


@dataclass(frozen=True)
class Example:
    """One labelled picture."""

    key: str
    image: Image.Image
    label: int | None = None
    captions: tuple[str, ...] = ()
    subset: str | None = None  # figures are also given for each subset


@dataclass
class Dataset:
    """Labelled pictures, read anew at every pass."""

    path: Path
    classnames: list[str]
    templates: list[str]
    skipped: list[Skipped] = field(default_factory=list)  # filled by a pass

    def __iter__(self) -> Iterator[Example]:
        self.skipped.clear()
        read = self._folders if _class_folders(self.path) else self._shards
        yield from read()

    def _folders(self) -> Iterator[Example]:
        for label, folder in enumerate(_class_folders(self.path)):
            for file in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS):
                try:
                    image = open_image(file)
                except Fault as fault:
                    name, reason = str(file.relative_to(self.path)), fault.reason.removeprefix(f"{file}: ")
                    self.skipped.append(Skipped("", name, fault.cause, reason))
                    continue
                yield Example(str(file.relative_to(self.path)), image, label)

    def _shards(self) -> Iterator[Example]:
        labels = {name: i for i, name in enumerate(self.classnames)}
        for sample in read_shards(self.path, self.skipped):
            try:
                info = info_of(sample)
                image = image_of(sample)
                label = labels.get(str(info["class"])) if info.get("class") else None
                if labels and info.get("class") and label is None:
                    raise Fault("unknown_class", f"class {info['class']!r} is not in classnames.txt")
                captions = tuple(captions_of(sample))
            except Fault as fault:
                self.skipped.append(Skipped(sample["__shard__"], sample["__key__"], fault.cause, fault.reason))
                continue
            subset = str(info["subset"]) if info.get("subset") else None
            yield Example(sample["__key__"], image, label, captions, subset)


def open_dataset(path: str | Path, templates: str | Path | None = None) -> Dataset:
    """A folder of class folders, or of shards (with `classnames.txt` when samples have a `class`).

    Args:
        templates: file of prompt templates, one a line, `{c}` for the class name; by default
            `templates.txt` in the folder, else "a photo of a {c}".

    Raises:
        ValueError: when it is missing or holds neither.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such data folder")
    folders, shards = _class_folders(path), [*path.glob("*.tar"), *path.glob("*.tar.gz")]
    if not folders and not shards:
        raise ValueError(f"{path}: neither class folders with pictures nor .tar shards in it")
    names = [folder.name.replace("_", " ") for folder in folders]
    if (path / "classnames.txt").exists():
        listed = (path / "classnames.txt").read_text(encoding="utf-8").splitlines()
        if folders and len(listed) != len(folders):
            raise ValueError(f"{path}: classnames.txt names {len(listed)} classes, there are {len(folders)} folders")
        names = listed
    return Dataset(path, names, _read_templates(path, templates))


def _class_folders(path: Path) -> list[Path]:
    if any(path.glob("*.tar")) or any(path.glob("*.tar.gz")):
        return []
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [p for p in folders if any(f.suffix.lower() in IMAGE_ENDINGS for f in p.rglob("*"))]


def _read_templates(path: Path, templates: str | Path | None) -> list[str]:
    file = Path(templates) if templates else path / "templates.txt"
    if not file.exists():
        if templates:
            raise ValueError(f"{file}: no such file of templates")
        return list(DEFAULT_TEMPLATES)
    if not file.is_file():
        raise ValueError(f"{file}: no file of templates")
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no UTF-8 text ({error.reason})") from None
    bad = next((line for line in lines if "{c}" not in line), None)
    if not lines or bad is not None:
        raise ValueError(f"{file}: each line needs {{c}} for the class name{f', {bad!r} has none' if bad else ''}")
    return lines


def encode_images(clip: Encoder, examples: Iterable[Example], batch_size: int = 64) -> tuple[Tensor, list[Example]]:
    """image_features (n, embed_dim) on the CPU in float32, and the examples without their pictures."""
    features: list[Tensor] = []
    done: list[Example] = []
    batch: list[Example] = []

    def flush() -> None:
        features.append(clip.encode_image([e.image for e in batch], normalize=True).float().cpu())
        done.extend(Example(e.key, _NO_IMAGE, e.label, e.captions, e.subset) for e in batch)
        batch.clear()

    for example in examples:
        batch.append(example)
        if len(batch) == batch_size:
            flush()
    if batch:
        flush()
    if not done:
        raise ValueError("no readable pictures in the evaluation data")
    return torch.cat(features), done


_NO_IMAGE = Image.new("L", (1, 1))


def class_features(clip: Encoder, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Prompt ensemble: normalised mean of a class's normalised prompt features, (classes, embed_dim)."""
    means = torch.zeros(())
    for template in templates:
        prompts = [template.replace("{c}", name) for name in classnames]
        means = means + clip.encode_text(prompts, normalize=True).float().cpu()
    return torch.nn.functional.normalize(means, dim=-1)


def zero_shot(clip: Encoder, dataset: Dataset, encoded: tuple[Tensor, list[Example]] | None = None) -> dict[str, Any]:
    """Zero-shot top-1 and top-5 accuracy, fractions: `acc1`, `acc5`, `n`, and the same for each subset.

    Args:
        encoded: what `encode_images` returned, when it is at hand.

    Raises:
        ValueError: when the data has no classes.
    """
    if not dataset.classnames:
        raise ValueError(f"{dataset.path}: no classes; shards need `class` in their JSON and a classnames.txt")
    features, examples = encoded or encode_images(clip, dataset)
    labelled = [i for i, e in enumerate(examples) if e.label is not None]
    if not labelled:
        raise ValueError(f"{dataset.path}: no picture has a class")
    logits = features[labelled] @ class_features(clip, dataset.classnames, dataset.templates).T
    labels = torch.tensor([examples[i].label for i in labelled])
    ranks = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    hits = {"acc1": ranks[:, 0].float(), "acc5": ranks.any(1).float()}
    subsets = [examples[i].subset for i in labelled]
    return _by_subset(hits, subsets) | {"classes": len(dataset.classnames), "templates": len(dataset.templates)}


def retrieval(
    clip: Encoder,
    dataset: Dataset,
    encoded: tuple[Tensor, list[Example]] | None = None,
    subset: str | None = None,
) -> dict[str, Any]:
    """Recall at 1, 5 and 10, fractions: `image_retrieval_recall@k` (text to image), `text_retrieval_recall@k`.

    With several captions an image, a text query has one right image, an image any of its captions.

    Raises:
        ValueError: when no picture has a caption.
    """
    features, examples = encoded or encode_images(clip, dataset)
    chosen = [i for i, e in enumerate(examples) if e.captions and subset in (None, e.subset)]
    if not chosen:
        raise ValueError(f"{dataset.path}: no captions to retrieve by")
    captions = [c for i in chosen for c in examples[i].captions]
    owner = torch.tensor([n for n, i in enumerate(chosen) for _ in examples[i].captions])
    similarity = clip.encode_text(captions, normalize=True).float().cpu() @ features[chosen].T  # (texts, images)
    result: dict[str, Any] = {"n_images": len(chosen), "n_texts": len(captions)}
    for k in (1, 5, 10):
        images = similarity.topk(min(k, len(chosen)), dim=1).indices
        result[f"image_retrieval_recall@{k}"] = (images == owner[:, None]).any(1).float().mean().item()
        texts = similarity.T.topk(min(k, len(captions)), dim=1).indices
        mine = owner[texts] == torch.arange(len(chosen))[:, None]
        result[f"text_retrieval_recall@{k}"] = mine.any(1).float().mean().item()
    return result


def evaluate(clip: Encoder, dataset: Dataset) -> dict[str, Any]:
    """Every figure the data allows, with the pictures encoded once: zero-shot where there are classes,
    retrieval where there are captions (over all, and over each subset)."""
    encoded = encode_images(clip, dataset)
    examples = encoded[1]
    result: dict[str, Any] = {"data": str(dataset.path), "skipped": len(dataset.skipped)}
    result["skipped_by_cause"] = counts(dataset.skipped)
    if dataset.classnames and any(e.label is not None for e in examples):
        result |= zero_shot(clip, dataset, encoded)
    if any(e.captions for e in examples):
        result |= retrieval(clip, dataset, encoded)
        for subset in sorted({e.subset for e in examples if e.subset}):
            figures = retrieval(clip, dataset, encoded, subset)
            result.setdefault("subsets", {}).setdefault(subset, {}).update(figures)
    return result


def _by_subset(hits: dict[str, Tensor], subsets: Sequence[str | None]) -> dict[str, Any]:
    result: dict[str, Any] = {name: hit.mean().item() for name, hit in hits.items()} | {"n": len(subsets)}
    for subset in sorted({s for s in subsets if s}):
        chosen = [i for i, s in enumerate(subsets) if s == subset]
        figures = {name: hit[chosen].mean().item() for name, hit in hits.items()} | {"n": len(chosen)}
        result.setdefault("subsets", {})[subset] = figures
    return result
