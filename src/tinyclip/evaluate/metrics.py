"""Zero-shot classification and image-text retrieval for anything with `encode_image` and `encode_text`.

Under torchrun (`distributed.processes`), the processes take turns encoding whole batches and blocks of texts, and all
of them get all features. The metrics are therefore the same as with one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tinyclip.common.distributed import gather_objects, gather_uneven, rank, world_size
from tinyclip.common.faults import Unusable, counts, why
from tinyclip.common.progress import ended, heard, tell, track
from tinyclip.data.datasets import Dataset as Dataset
from tinyclip.data.datasets import Example as Example
from tinyclip.data.datasets import open_dataset as open_dataset
from tinyclip.inputs.batching import check_finite

TEXTS = 2048  # texts encoded at once
ROWS = 1024  # rows of a similarity matrix in memory at once


class Encoder(Protocol):
    """What evaluation needs from a model: normalised image and text features (n, embed_dim), tensors or arrays."""

    def encode_image(self, images: Any, *, normalize: bool = True) -> Any: ...

    def encode_text(self, texts: Any, *, normalize: bool = True) -> Any: ...


Encoded = tuple[Tensor, list[Example]]  # what `encode_images` returns
Progress = Callable[[int], None]


# --- features ---------------------------------------------------------------------------------------------------


def encode_images(
    clip: Encoder, examples: Iterable[Example], batch_size: int = 64, progress: Progress = lambda done: None
) -> Encoded:
    """Return image_features (n, embed_dim) on the CPU in float32, and the examples without their pictures.

    Args:
        progress: called after every batch with the number of pictures that this process has encoded.

    Raises:
        ValueError: when no picture can be read, or features are not finite.
    """
    features: list[Tensor] = []
    mine: list[tuple[int, Example]] = []
    count = examples.about() if isinstance(examples, Dataset) and heard() else None
    total = None if count is None else -(-count // world_size())
    for _, numbered in groupby(_share(examples, batch_size), lambda pair: pair[0] // batch_size):
        batch = list(numbered)
        features.append(as_tensor(clip.encode_image([e.image for _, e in batch], normalize=True)))
        mine += [(n, Example(e.key, _NO_IMAGE, e.label, e.captions, e.subset, e.labels)) for n, e in batch]
        progress(len(mine))
        if isinstance(examples, Dataset):
            tell(f"evaluating on {examples.path}", len(mine), total and max(total, len(mine) + 1), "pictures")
    if isinstance(examples, Dataset):
        ended(f"evaluating on {examples.path}")
    rows = gather_uneven(torch.cat(features) if features else torch.empty(0, 0))
    everyones = [pair for part in gather_objects(mine) for pair in part]
    if isinstance(examples, Dataset):
        _join_skipped(examples)
    if not everyones:
        raise Unusable(_nothing(examples))
    check_finite(rows.numpy())
    order = sorted(range(len(everyones)), key=lambda i: everyones[i][0])
    return (rows[order] if world_size() > 1 else rows), [everyones[i][1] for i in order]


def _share(examples: Iterable[Example], batch_size: int) -> Iterator[tuple[int, Example]]:
    """Yield this process's examples with their numbers. Whole batches are dealt out, whatever the world size."""

    def mine(number: int) -> bool:
        return number // batch_size % world_size() == rank()

    if isinstance(examples, Dataset):
        return examples.share(mine)
    return ((number, example) for number, example in enumerate(examples) if mine(number))


def _join_skipped(dataset: Dataset) -> None:
    """Merge the skipped samples of all processes; every process sees the faults of shards."""
    if world_size() > 1:
        dataset.skipped[:] = dict.fromkeys(s for part in gather_objects(dataset.skipped) for s in part)


def _nothing(examples: Iterable[Example]) -> str:
    text = "no readable pictures in the evaluation data"
    if not isinstance(examples, Dataset):
        return text
    return f"{examples.path}: {text}{why(examples.skipped)}"


_NO_IMAGE = Image.new("L", (1, 1))


def as_tensor(features: Any) -> Tensor:
    """Convert features of any runtime to float32 on the CPU."""
    return (features if isinstance(features, Tensor) else torch.from_numpy(np.array(features))).float().cpu()


def class_features(clip: Encoder, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return prompt ensembles: the normalised mean of a class's normalised prompt features, (classes, embed_dim)."""

    def ensembles(names: Sequence[str]) -> Tensor:
        prompts = [template.replace("{c}", name) for name in names for template in templates]
        return as_tensor(clip.encode_text(prompts, normalize=True)).reshape(len(names), len(templates), -1).mean(1)

    return F.normalize(_in_blocks(ensembles, classnames, max(1, TEXTS // len(templates))), dim=-1)


def text_features(clip: Encoder, texts: Sequence[str]) -> Tensor:
    """Return normalised features of any number of texts, (n, embed_dim) on the CPU in float32."""
    return _in_blocks(lambda some: as_tensor(clip.encode_text(list(some), normalize=True)), texts, TEXTS)


def _in_blocks(encode: Callable[[Sequence[str]], Tensor], texts: Sequence[str], size: int) -> Tensor:
    """Return one row per text, in order; the processes take turns with blocks of `size`."""
    blocks = [range(start, min(start + size, len(texts))) for start in range(0, len(texts), size)]
    own = blocks[rank() :: world_size()]
    mine = [encode([texts[i] for i in block]) for block in track(own, "encoding texts", len(own), "blocks")]
    rows = gather_uneven(torch.cat(mine) if mine else torch.empty(0, 0))
    check_finite(rows.numpy())
    order = [i for r in range(world_size()) for block in blocks[r :: world_size()] for i in block]
    return rows[torch.tensor(order).argsort()] if world_size() > 1 else rows


# --- figures ----------------------------------------------------------------------------------------------------


def zero_shot(
    clip: Encoder, dataset: Dataset, encoded: Encoded | None = None, *, per_class: bool = False
) -> dict[str, Any]:
    """Return zero-shot metrics as fractions: `acc1`, `acc5`, `mean_per_class_recall` (over classes with pictures) and
    `n`, overall and per subset. For multi-label data, `mean_average_precision`.

    Args:
        encoded: the result of `encode_images`, if already computed.
        per_class: also return `per_class`, a list of `class` with its metrics.

    Raises:
        ValueError: when the data has no classes.
    """
    if not dataset.classnames:
        wanted = "samples need a `class` in their JSON or a `cls` file, and a classnames.txt with the names"
        raise ValueError(f"{dataset.path}: no classes; {wanted}")
    features, examples = encoded or encode_images(clip, dataset)
    several = any(e.labels is not None for e in examples)
    chosen = [i for i, e in enumerate(examples) if (e.labels if several else e.label) is not None]
    check_classes(dataset, len(chosen))
    classes = class_features(clip, dataset.classnames, dataset.templates)
    if several:
        truth = [examples[i].labels or () for i in chosen]
        result, each = average_precision(features[chosen], classes, truth)
    else:
        labels = torch.tensor([examples[i].label for i in chosen])
        hits = best(features[chosen], classes, 5) == labels[:, None]
        result, each = accuracies(hits, labels), _each_class(hits, labels)
        for subset, of_it in _subsets([examples[i].subset for i in chosen]).items():
            result.setdefault("subsets", {})[subset] = accuracies(hits[of_it], labels[of_it])
    if per_class:
        result["per_class"] = [{"class": dataset.classnames[c]} | figures for c, figures in each.items()]
    return result | {"classes": len(dataset.classnames), "templates": len(dataset.templates)}


def check_classes(dataset: Dataset, known: int) -> None:
    """Raise `ValueError` when no picture has a class, or more have an unknown class than a known one."""
    lacking = [s for s in dataset.skipped if s.cause == "unknown_class"]
    if len(lacking) > known:
        counted = f"{len(lacking):,} of {len(lacking) + known:,} pictures have a class that is not in its list"
        raise ValueError(f"{dataset.path}: {counted}; the first: {lacking[0]}")
    if not known:
        raise ValueError(f"{dataset.path}: no picture has a class")


def best(features: Tensor, others: Tensor, k: int) -> Tensor:
    """Return for each row of features (n, embed_dim) the k most similar others, int64 (n, at most k), best first."""
    k = min(k, len(others))
    return torch.cat([(rows @ others.T).topk(k).indices for rows in features.split(ROWS)])


def accuracies(hits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return `acc1`, `acc5`, `mean_per_class_recall` and `n` for hits (n, up to 5) and labels (n)."""
    first = hits[:, 0].double()
    total = labels.bincount()
    recall = labels.bincount(first)[total > 0] / total[total > 0]
    result = {"acc1": first.mean().item(), "acc5": hits.any(1).double().mean().item()}
    return result | {"mean_per_class_recall": recall.mean().item(), "n": len(labels)}


def _each_class(hits: Tensor, labels: Tensor) -> dict[int, dict[str, Any]]:
    """Return `acc1`, `acc5` and `n` of the classes with pictures. For a single class, `acc1` is its recall."""
    total = labels.bincount()
    first, any_of = (labels.bincount(hit.double()) / total for hit in (hits[:, 0], hits.any(1)))
    present = total.nonzero().flatten().tolist()
    return {c: {"acc1": first[c].item(), "acc5": any_of[c].item(), "n": int(total[c])} for c in present}


def average_precision(
    features: Tensor, classes: Tensor, truth: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Return `mean_average_precision` and `n`, and the `average_precision` and `n` of each class with pictures: the
    mean, over its pictures, of the precision among all pictures at least as similar to the class as that picture.

    Args:
        features: (n, embed_dim).
        classes: (classes, embed_dim).
        truth: the classes of each picture.
    """
    each: dict[int, dict[str, Any]] = {}
    owners: dict[int, list[int]] = {}
    for i, own in enumerate(truth):
        for c in own:
            owners.setdefault(c, []).append(i)
    for c, own in sorted(owners.items()):
        right = torch.zeros(len(truth), dtype=torch.float64)
        right[own] = 1
        right = right[(features @ classes[c]).argsort(descending=True, stable=True)]
        precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
        each[c] = {"average_precision": precision[right > 0].mean().item(), "n": len(own)}
    mean = sum(figures["average_precision"] for figures in each.values()) / max(1, len(each))
    return {"mean_average_precision": mean, "n": len(truth)}, each


def retrieval(
    clip: Encoder, dataset: Dataset, encoded: Encoded | None = None, subset: str | None = None
) -> dict[str, Any]:
    """Return recall at 1, 5 and 10 as fractions: `image_retrieval_recall@k` (text to image), `text_retrieval_recall@k`.

    With several captions per image, a text query has one right image; for an image query, any of its captions is right.

    Raises:
        ValueError: when no picture has a caption.
    """
    features, examples = encoded or encode_images(clip, dataset)
    chosen = [i for i, e in enumerate(examples) if e.captions and subset in (None, e.subset)]
    if not chosen:
        raise ValueError(f"{dataset.path}: no captions, which retrieval needs")
    captions = [c for i in chosen for c in examples[i].captions]
    return recalls(features[chosen], text_features(clip, captions), [len(examples[i].captions) for i in chosen])


def recalls(images: Tensor, texts: Tensor, captions: Sequence[int]) -> dict[str, Any]:
    """Return the recalls of normalised features.

    Args:
        images: (n_images, embed_dim).
        texts: (n_texts, embed_dim), captions grouped by image, in the order of the images.
        captions: number of captions of each image.
    """
    owner = torch.arange(len(images)).repeat_interleave(torch.tensor(captions))
    found = best(texts, images, 10) == owner[:, None]
    own = owner[best(images, texts, 10)] == torch.arange(len(images))[:, None]
    result: dict[str, Any] = {"n_images": len(images), "n_texts": len(texts)}
    for k in (1, 5, 10):
        result[f"image_retrieval_recall@{k}"] = found[:, :k].any(1).double().mean().item()
        result[f"text_retrieval_recall@{k}"] = own[:, :k].any(1).double().mean().item()
    return result


def evaluate(
    clip: Encoder, dataset: Dataset, *, per_class: bool = False, progress: Progress = lambda done: None
) -> dict[str, Any]:
    """Compute every metric the data allows, encoding the pictures once: zero-shot with classes, retrieval with captions
    (overall and per subset).

    Args:
        per_class: as in `zero_shot`.
        progress: as in `encode_images`.

    Raises:
        ValueError: when no picture can be read, or none has a class or a caption.
    """
    encoded = encode_images(clip, dataset, progress=progress)
    examples = encoded[1]
    result: dict[str, Any] = {"data": str(dataset.path), "skipped": len(dataset.skipped)}
    result["skipped_by_cause"] = counts(dataset.skipped)
    captioned = any(e.captions for e in examples)
    if (dataset.classnames and any(_has_class(e) for e in examples)) or not captioned:
        result |= zero_shot(clip, dataset, encoded, per_class=per_class)
    if captioned:
        result |= retrieval(clip, dataset, encoded)
        for subset in _subsets([e.subset if e.captions else None for e in examples]):
            figures = retrieval(clip, dataset, encoded, subset)
            result.setdefault("subsets", {}).setdefault(subset, {}).update(figures)
    return result


def _has_class(example: Example) -> bool:
    return example.label is not None or example.labels is not None


def _subsets(subsets: Sequence[str | None]) -> dict[str, list[int]]:
    """Return the positions of each subset."""
    return {name: [i for i, s in enumerate(subsets) if s == name] for name in sorted({s for s in subsets if s})}
