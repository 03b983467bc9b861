"""Training data: shards -> batches, read through Megatron Energon."""

from __future__ import annotations

import ctypes
import hashlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.energon import (
    Cooker,
    Sample,
    SkipSample,
    TaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.errors import FatalSampleError
from torch import Tensor

from tinyclip.common.faults import Fault, Skipped
from tinyclip.data.samples import captions_of, class_of, image_of
from tinyclip.data.shard_index import check_readers, prepare
from tinyclip.inputs.augment import Augment, View
from tinyclip.inputs.tokenizer import CLIPTokenizer
from tinyclip.inputs.transforms import Preprocess

TOO_MANY = 1000  # consecutive bad samples
AGAIN = "run the same command again"
ALL_BAD = f"{TOO_MANY:,} samples in a row are bad"


@edataclass
class Raw(Sample):
    """A raw sample from a shard: bytes by file ending."""

    files: dict[str, Any]


@edataclass
class Pair(Sample):
    """One decoded image-text pair."""

    pixels: np.ndarray
    tokens: np.ndarray
    group: int
    teacher: list[tuple[np.ndarray, np.ndarray]]  # each teacher's stored image and text features
    teacher_tokens: np.ndarray | None


# (shard, key, number of captions, generator) -> stored view, caption index, features of each teacher
StoredDraw = Callable[[str, str, int, Random], tuple[View, int, list[tuple[np.ndarray, np.ndarray]]]]


class Encoder(TaskEncoder):
    """Turn raw samples into `Pair`s in the worker process, and pairs into a `Batch`.

    Pictures are decoded in `encode_sample`, after the shuffle buffer. The buffer therefore holds small compressed
    files, and the first batch does not wait for thousands of pictures to be decoded.
    """

    decoder = None

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        context_length: int,
        image_size: int,
        augment: Augment,
        stored: StoredDraw | None = None,
        teacher_tokenize: Tokenize | None = None,
    ):
        super().__init__()
        self.cookers = [Cooker(_raw)]
        self.tokenizer, self.context_length = tokenizer, context_length
        self.image_size, self.augment, self.stored = image_size, augment, stored
        self.teacher_tokenize = teacher_tokenize
        self.bad_in_a_row = 0
        self.skipped: list[Skipped] = []

    @stateless
    def encode_sample(self, raw: Raw) -> Pair:
        """Decode a sample. Raises `SkipSample` if it is bad, `FatalSampleError` after too many bad ones in a row."""
        sample = raw.files
        # Energon's own `restore_seeds` seeds torch for every sample, which takes longer than decoding.
        rng = Random(f"{self.worker_seed()}:{self.current_sample_index}:{sample['__key__']}")
        try:
            if "__fault__" in sample:
                raise sample["__fault__"]
            captions = captions_of(sample)
            if not captions:
                raise Fault("no_caption", "no caption")
            image = image_of(sample)
            if self.stored is not None:
                view, which, teacher = self.stored(sample["__shard__"], sample["__key__"], len(captions), rng)
                pixels, caption = view.apply(image, self.image_size), captions[which]
            else:
                pixels, teacher = self.augment.view(image, self.image_size, rng), []
                caption = rng.choice(captions)
            group = class_of(sample) or f"{sample['__shard__']}/{sample['__key__']}"
        except ValueError as error:
            self._skip(sample, getattr(error, "cause", "corrupt_image"), str(error))
            raise SkipSample from None
        self.bad_in_a_row = 0
        tokens = self.tokenizer([caption], self.context_length)[0]
        theirs = self.teacher_tokenize([caption])[0] if self.teacher_tokenize else None
        features = {"teacher": teacher, "teacher_tokens": theirs}
        return Pair.derive_from(raw, pixels=pixels, tokens=tokens, group=stable_hash(group), **features)

    @staticmethod
    def worker_seed() -> int:
        config = WorkerConfig.active_worker_config
        assert config is not None
        return int(config.worker_seed())

    def _skip(self, sample: dict[str, Any], cause: str, reason: str) -> None:
        source = (sample.get("__sources__") or [None])[0]
        shard = Path(str(getattr(source, "shard_name", "?"))).name
        last = Skipped(shard, str(sample["__key__"]), cause, reason)
        self.skipped.append(last)
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= TOO_MANY:
            raise FatalSampleError(f"{ALL_BAD}; the last: {last}")

    def batch(self, samples: list[Pair]) -> Batch:
        skipped, self.skipped = self.skipped, []
        theirs = [s.teacher_tokens for s in samples if s.teacher_tokens is not None]
        return Batch(
            images=torch.from_numpy(np.stack([s.pixels for s in samples])),
            tokens=torch.from_numpy(np.stack([s.tokens for s in samples])),
            groups=torch.tensor([s.group for s in samples]),
            keys=[s.__key__ for s in samples],
            skipped=skipped,
            teacher=[
                (_stacked(pairs, 0), _stacked(pairs, 1)) for pairs in zip(*(s.teacher for s in samples), strict=True)
            ],
            teacher_tokens=torch.from_numpy(np.stack(theirs)) if theirs else None,
        )


def _stacked(pairs: tuple[tuple[np.ndarray, np.ndarray], ...], which: int) -> Tensor:
    return torch.from_numpy(np.stack([pair[which] for pair in pairs]))


@stateless
def _raw(sample: dict[str, Any]) -> Raw:
    files = {name if name.startswith("__") else name.lower(): data for name, data in sample.items()}
    return Raw(**basic_sample_keys(sample), files=files)


def stable_hash(text: str) -> int:
    """Return a 63-bit hash that is the same in every process and run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def training_loader(
    folder: str | Path,
    *,
    tokenizer: CLIPTokenizer,
    context_length: int,
    image_size: int,
    augment: Augment,
    batch_size: int,
    workers: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    stored: StoredDraw | None = None,
    teacher_tokenize: Tokenize | None = None,
) -> Any:
    """Return an endless, shuffled Energon loader of `Batch`es that can be resumed from its `save_state_rank()`.

    Args:
        rank, world_size: this process, and the number of processes that share the data; each gets `batch_size` pairs.
        stored: source of views and teacher features that replaces `augment` (see `cache.draw_stored`).
        teacher_tokenize: tokenizer of a teacher that does not use the student's, for `Batch.teacher_tokens`.

    Raises:
        ValueError: when the folder has no usable shards, or fewer samples than there are workers in all processes.
    """
    samples = prepare(folder, keep=True)
    check_readers(folder, workers, world_size)
    config = WorkerConfig(rank=rank, world_size=world_size, num_workers=workers, seed_offset=seed)
    dataset = get_train_dataset(
        Path(folder).resolve(),
        worker_config=config,
        batch_size=batch_size,
        shuffle_buffer_size=min(samples, 4096),
        max_samples_per_sequence=100,
        task_encoder=Encoder(tokenizer, context_length, image_size, augment, stored, teacher_tokenize),
    )
    loader = get_savable_loader(dataset, watchdog_timeout_seconds=None)
    loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)
    loader.pin_memory = torch.cuda.is_available()  # Energon always enables it, and torch warns without a GPU
    return loader


def _init_worker(init: Callable[[int], None], worker_id: int) -> None:
    bind_worker(worker_id)
    init(worker_id)


def bind_worker(worker_id: int) -> None:
    """Bind the calling loader worker to its parent process.

    A signal to the whole process group (Ctrl-C, torchrun's SIGTERM) also reaches the workers. They ignore it and run
    until the parent has saved its state and ends them. When the parent dies, they die at once (on systems other than
    Linux within seconds, through torch's own watchdog), so they hold no resources that a resumed run needs.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def next_batch(batches: Iterator[Batch], folder: str | Path) -> Batch:
    """Return the next batch of this folder's loader; `ValueError` when a worker finds no more good samples."""
    try:
        return next(batches)
    except FatalSampleError as error:
        # Energon wraps our Encoder's message in a description of the sample.
        found = re.search(f"{ALL_BAD}.*", str(error))
        raise ValueError(f"{folder}: {found.group().rstrip('.') if found else error}") from None


@contextmanager
def closing(loader: Any, hint: str) -> Iterator[None]:
    """Stop the loader's workers at the end. If a worker died, for example out of memory, raise a readable error; torch
    raises its own wherever the process happens to be.

    Args:
        hint: what the user can do about it.

    Raises:
        ValueError: when a worker has died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        text = str(error).splitlines()[0].rstrip(". ")
        raise ValueError(f"{text}; {hint}") from None
    finally:
        close_loader(loader)


def close_loader(loader: Any) -> None:
    """Stop a loader's workers now. The garbage collector would need a 5 s timeout, since it destroys the queue that
    carries the stop message first."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()  # workers that are still busy ignore SIGTERM


@dataclass
class Batch:
    """A training batch. Images are transferred as uint8 and normalised on the device."""

    images: Tensor  # uint8 (n, 3, s, s)
    tokens: Tensor  # int64 (n, context_length)
    groups: Tensor  # int64 (n,): equal for samples of one class (JSON field `class`), else unique
    keys: list[str]
    skipped: list[Skipped] = field(default_factory=list)  # since the worker's last batch
    teacher: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # stored (n, embed_dim) image and text features
    teacher_tokens: Tensor | None = None  # int64 (n, length), for a teacher with another tokenizer

    def pin_memory(self) -> Batch:
        images, tokens, groups = (t.pin_memory() for t in (self.images, self.tokens, self.groups))
        teacher = [(image.pin_memory(), text.pin_memory()) for image, text in self.teacher]
        theirs = None if self.teacher_tokens is None else self.teacher_tokens.pin_memory()
        return Batch(images, tokens, groups, self.keys, self.skipped, teacher, theirs)


Tokenize = Callable[[Sequence[str]], np.ndarray]  # texts -> int64 (n, length)


def image_input(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 (n, 3, s, s) -> normalised float32 (n, 3, image_size, image_size) on the same device."""
    x = images.float() / 255
    if x.shape[-1] != preprocess.image_size:
        size = (preprocess.image_size, preprocess.image_size)
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    # Creating these on the device would synchronise each time.
    mean, std = (
        torch.tensor(v).view(3, 1, 1).to(x.device, non_blocking=True) for v in (preprocess.mean, preprocess.std)
    )
    return (x - mean) / std


def shorten(tokens: Tensor, end_id: int, context_length: int) -> Tensor:
    """Trim token rows to the longest text of the batch, which is exact under causal attention, and to the context
    length; a text that is too long keeps its end token. (n, length) -> (n, shorter)."""
    ends = (tokens == end_id).int().argmax(1)
    length = min(int(ends.max()) + 1, context_length)
    cut = tokens[:, :length].clone()
    cut[ends >= length, -1] = end_id
    return cut
