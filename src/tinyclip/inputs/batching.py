"""Preparing user input for a model: images and texts in any form, one or many. No torch here."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import numpy as np
from PIL import Image

from tinyclip.inputs.transforms import open_image

if TYPE_CHECKING:
    import torch

S = TypeVar("S")
T = TypeVar("T")
BATCH = 32  # images per batch on a CPU: larger batches exceed its caches and are slower
AHEAD = 64  # images decoded in advance


def picture_of(item: Any) -> Image.Image:
    """Convert a path, a PIL image, or an array uint8 (h, w[, 3 or 4]) to a PIL image.

    Raises:
        ValueError: for anything else, or a file that cannot be read.
    """
    if isinstance(item, (str, Path)):
        return open_image(item)
    if isinstance(item, np.ndarray):
        good = item.dtype == np.uint8 and 0 not in item.shape
        if not good or not (item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (3, 4))):
            raise ValueError(f"image array is {item.dtype} {item.shape}, expected uint8 (h, w) or (h, w, 3 or 4)")
        return Image.fromarray(item)
    if not isinstance(item, Image.Image):
        raise ValueError(f"{type(item).__name__} is not an image: give a path, a PIL picture, an array or a tensor")
    return item


def pictures(items: Sequence[Any], prepare: Callable[[Any], T]) -> Iterator[T]:
    """Yield `prepare` of each item, in order; threads work slightly ahead of the consumer."""
    loaded = map(_loaded, items)
    yield from ahead(prepare, loaded) if len(items) > 1 else map(prepare, loaded)


def _loaded(item: Any) -> Any:
    """Load an image in the calling thread: the same one may be given twice, and loading is not thread-safe."""
    if isinstance(item, Image.Image):
        try:
            item.load()
        except Exception as error:  # Pillow's decoders raise almost anything on damaged files
            raise ValueError(f"damaged picture ({error or type(error).__name__})") from None
    return item


def ahead(call: Callable[[S], T], items: Iterable[S], workers: int | None = None) -> Iterator[T]:
    """Yield `call` of each item, in order, computed by threads slightly ahead of the consumer.

    Args:
        workers: threads; by default one per core of this process's share, at most 8.
    """
    share = (os.cpu_count() or 1) // int(
        os.environ.get("LOCAL_WORLD_SIZE", "1")
    )  # set by torchrun: processes on this machine
    with ThreadPoolExecutor(workers or max(1, min(8, share))) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(call, item))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last may be shorter."""
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def by_length(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield batches of `size` row indices, longest rows of tokens first: peak memory is reached at once, and padding
    stays minimal."""
    return batches(sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True), size)


def at_once(given: int | None, default: int) -> int:
    """Return the batch size; `ValueError` when it is below 1."""
    if given is not None and given < 1:
        raise ValueError(f"batch_size {given}: must be at least 1")
    return given or default


def same_shape(shapes: Iterable[tuple[int, ...]]) -> None:
    """Check that preprocessed images fit into one batch; `ValueError` if not."""
    if len(distinct := set(shapes)) > 1:
        raise ValueError(f"image tensors with different shapes: {', '.join(map(str, sorted(distinct)))}")


def check_labels(labels: str | Sequence[str]) -> None:
    """`ValueError` without labels, or for an empty one."""
    if not labels:
        raise ValueError("no labels to choose from")
    if not all(label.strip() for label in ([labels] if isinstance(labels, str) else labels)):
        raise ValueError("a label is empty")


def is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which stand for bytes that are not UTF-8."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_finite(features: np.ndarray) -> None:
    """`ValueError` for features that are not finite, which cannot be compared."""
    if not np.isfinite(features).all():
        raise ValueError("the model's features are not finite numbers; try another dtype or another checkpoint")


def is_tensor(item: Any) -> TypeGuard[torch.Tensor]:
    """Whether the item is a torch tensor; does not import torch to find out.

    Raises:
        ValueError: for an integer tensor, i.e. an image that was not preprocessed.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(item, torch.Tensor):
        return False
    if not item.is_floating_point():
        raise ValueError(f"image tensor is {item.dtype}: expected what `preprocess` returns, float (n, 3, s, s)")
    return True
