"""Training data: WebDataset shards -> batches, read through Megatron Energon.

A shard is a `.tar` of samples `KEY.jpg|jpeg|png|webp` + `KEY.txt|json`, as img2dataset writes them. Captions:
`captions` (list) or `caption` in the JSON, else the lines of the text file; of several, one is drawn a visit.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import webdataset
import yaml
from filelock import FileLock
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
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
from PIL import Image
from torch import Tensor

from tinyclip.augment import Augment
from tinyclip.tokenizer import CLIPTokenizer
from tinyclip.transforms import open_image

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
CHECKED = 1000  # of this many first samples at most half may be bad
TOO_MANY_BAD = "more than half of the first"


# --- shards on disk ---------------------------------------------------------------------------------------------


def find_shards(folder: str | Path) -> list[Path]:
    """The `.tar` and `.tar.gz` shards of a folder, sorted; of `x.tar` and `x.tar.gz` the one that is newer.

    Raises:
        ValueError: when the folder is missing or holds no shards.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such data folder")
    packed = [p for p in folder.glob("*.tar.gz") if not _unpacked(p)]
    stale = {p.with_suffix("") for p in packed}
    shards = sorted([*packed, *(p for p in folder.glob("*.tar") if p not in stale)])
    if not shards:
        raise ValueError(f"{folder}: no .tar shards in it; make some with `tinyclip data pack`")
    return shards


def _unpacked(packed: Path) -> bool:
    """Whether a `.tar.gz` has its plain `.tar` beside it, no older than itself."""
    plain = packed.with_suffix("")
    return plain.exists() and plain.stat().st_mtime >= packed.stat().st_mtime


def prepare(folder: str | Path) -> int:
    """Make a folder of shards ready for training: unpack `.tar.gz` beside themselves, write Energon's index.

    Does nothing when the index is there and newer than every shard. Returns the number of samples.

    Raises:
        ValueError: naming a shard that is damaged, empty, or repeats a key, or a folder that cannot be written.
    """
    folder = Path(folder)
    shards = find_shards(folder)
    if _is_current(folder / ".nv-meta", shards):  # also where the folder cannot be written
        return sum(_indexed(folder / ".nv-meta").values())
    try:
        with FileLock(folder / ".prepare.lock"):
            return _prepare(folder)
    except OSError as error:
        raise ValueError(f"{folder}: cannot write its index ({error.strerror or error})") from None


def _prepare(folder: Path) -> int:
    for packed in folder.glob("*.tar.gz"):
        plain = packed.with_suffix("")
        if not _unpacked(packed):
            temporary = plain.with_name(f".{plain.name}.tmp")
            try:
                with gzip.open(packed) as source, temporary.open("wb") as target:
                    shutil.copyfileobj(source, target)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                temporary.unlink()
                raise ValueError(f"{packed}: damaged shard ({error})") from None
            os.utime(temporary, ns=(packed.stat().st_mtime_ns,) * 2)
            temporary.rename(plain)
    shards = sorted(folder.glob("*.tar"))
    meta = folder / ".nv-meta"
    if _is_current(meta, shards):  # another process was faster
        return sum(_indexed(meta).values())
    for shard in shards:
        _check_shard(shard)
    shutil.rmtree(meta, ignore_errors=True)
    logging.getLogger("megatron.energon").setLevel(logging.CRITICAL)  # its faults reach the user as ValueError
    try:
        with Path(os.devnull).open("w") as quiet, contextlib.redirect_stdout(quiet):
            WebdatasetPreparator.prepare_dataset(
                folder, [p.name for p in shards], split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=2
            )
    except Exception as error:
        shutil.rmtree(meta, ignore_errors=True)
        raise ValueError(f"{folder}: cannot be indexed ({error})") from None
    (meta / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n", encoding="utf-8")
    (meta / "ready").write_text(json.dumps(_state(shards)), encoding="utf-8")
    return sum(_indexed(meta).values())


def known_samples(folder: str | Path) -> int | None:
    """Samples of a folder that is indexed as it stands, else None; writes nothing."""
    meta = Path(folder) / ".nv-meta"
    return sum(_indexed(meta).values()) if meta.exists() and _is_current(meta, find_shards(folder)) else None


def _state(shards: list[Path]) -> dict[str, list[int]]:
    """Size and time of every shard."""
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in shards}


def _is_current(meta: Path, shards: list[Path]) -> bool:
    """Whether the index is whole, of just these shards as they are now."""
    ready = meta / "ready"
    return ready.exists() and ready.read_text(encoding="utf-8") == json.dumps(_state(shards))


def _indexed(meta: Path) -> dict[str, int]:
    """Samples of each indexed shard; empty when there is no whole index."""
    if not (meta / "ready").exists():
        return {}
    for name in (".info.json", ".info.yaml"):
        if (meta / name).exists():
            return dict(yaml.safe_load((meta / name).read_text(encoding="utf-8"))["shard_counts"])
    return {}


def _check_shard(shard: Path) -> None:
    try:
        with tarfile.open(shard) as tar:
            keys = [member.name.split(".")[0] for member in tar if member.isfile()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{shard}: damaged shard ({error})") from None
    if not keys:
        raise ValueError(f"{shard}: an empty shard; remove it")
    runs = [key for key, before in zip(keys, [None, *keys], strict=False) if key != before]
    if len(runs) != len(set(runs)):
        repeated = next(key for i, key in enumerate(runs) if key in runs[:i])
        raise ValueError(f"{shard}: the key {repeated!r} occurs twice")


def captions_of(sample: dict[str, Any]) -> list[str]:
    """Captions of a raw sample (file endings -> bytes); empty when there is none.

    Raises:
        ValueError: when the text is no UTF-8 or the JSON does not parse.
    """
    found: Any = None
    try:
        if "json" in sample:
            data = json.loads(sample["json"])
            found = data.get("captions") or data.get("caption") if isinstance(data, dict) else None
        if not found and "txt" in sample:
            found = sample["txt"].decode("utf-8").splitlines()
    except ValueError as error:
        raise ValueError(f"caption cannot be read ({error})") from None
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list | None):
        raise ValueError(f"caption is {type(found).__name__}, not text")
    return [c.strip() for c in found or [] if isinstance(c, str) and c.strip()]


def all_captions(folder: str | Path) -> Iterator[str]:
    """Every readable caption of a folder's shards; samples without one are what training would skip too."""
    for sample in read_shards(folder):
        with contextlib.suppress(ValueError):
            yield from captions_of(sample)


def image_of(sample: dict[str, Any], at_least: int | None = None) -> Image.Image:
    """The decoded picture of a raw sample; `ValueError` when there is none or it is damaged.

    Args:
        at_least: see `open_image`.
    """
    for ending in IMAGE_TYPES:
        if ending in sample:
            return open_image(io.BytesIO(sample[ending]), at_least)
    raise ValueError(f"no picture (looked for {', '.join(IMAGE_TYPES)})")


def info_of(sample: dict[str, Any]) -> dict[str, Any]:
    """The JSON part of a raw sample, or {}."""
    data = json.loads(sample["json"]) if "json" in sample else {}
    return data if isinstance(data, dict) else {}


def read_shards(folder: str | Path) -> Iterator[dict[str, Any]]:
    """Every raw sample of a folder's shards once, in order: `__key__`, `__url__`, and bytes by file ending.

    Raises:
        ValueError: when the folder holds no shards, or naming one that is damaged.
    """
    for shard in find_shards(folder):
        yield from read_shard(shard)


def read_shard(shard: Path) -> Iterator[dict[str, Any]]:
    """Every raw sample of one shard (see `read_shards`)."""
    try:
        yield from webdataset.WebDataset([str(shard)], shardshuffle=False, empty_check=False)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{shard}: damaged shard ({error.args[0] if error.args else error})") from None


# --- batches for training ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out."""

    shard: str
    key: str
    reason: str


@dataclass
class Batch:
    """What the training loop gets. Images travel as uint8 and are normalised on the device."""

    images: Tensor  # uint8 (n, 3, s, s)
    tokens: Tensor  # int64 (n, context_length)
    groups: Tensor  # int64 (n,): equal for samples of one class (JSON field `class`), else one a sample
    keys: list[str]
    skipped: list[Skipped] = field(default_factory=list)  # since the worker's last batch

    def pin_memory(self) -> Batch:
        images, tokens, groups = (t.pin_memory() for t in (self.images, self.tokens, self.groups))
        return Batch(images, tokens, groups, self.keys, self.skipped)


@edataclass
class Raw(Sample):
    """A sample as it stands in the shard: bytes by file ending."""

    files: dict[str, Any]


@edataclass
class Pair(Sample):
    """One decoded image-text pair."""

    pixels: np.ndarray
    tokens: np.ndarray
    group: int


class Encoder(TaskEncoder):
    """Turns raw samples into `Pair`s in the worker process, and pairs into a `Batch`.

    Decoding waits for `encode_sample`, which comes after the shuffle buffer: the buffer then holds small files, and
    the first batch need not wait until thousands of pictures are decoded.
    """

    decoder = None

    def __init__(self, tokenizer: CLIPTokenizer, context_length: int, image_size: int, augment: Augment, checked: int):
        super().__init__()
        self.cookers = [Cooker(_raw)]
        self.tokenizer, self.context_length = tokenizer, context_length
        self.image_size, self.augment = image_size, augment
        self.checked, self.seen, self.bad = checked, 0, 0
        self.skipped: list[Skipped] = []

    @stateless
    def encode_sample(self, raw: Raw) -> Pair:
        """Raises `SkipSample` for a bad sample, `FatalSampleError` when over half of the first ones are bad."""
        self.seen += 1
        sample = raw.files
        # Energon's own `restore_seeds` seeds torch for every sample, which costs more than decoding does.
        rng = Random(f"{self.worker_seed()}:{self.current_sample_index}:{sample['__key__']}")
        try:
            captions = captions_of(sample)
            if not captions:
                raise ValueError("no caption")
            pixels = self.augment.view(image_of(sample), self.image_size, rng)
            group = str(info_of(sample).get("class") or sample["__key__"])
        except ValueError as error:
            self._skip(sample, str(error))
            raise SkipSample from None
        tokens = self.tokenizer([rng.choice(captions)], self.context_length)[0]
        return Pair.derive_from(raw, pixels=pixels, tokens=tokens, group=stable_hash(group))

    @staticmethod
    def worker_seed() -> int:
        config = WorkerConfig.active_worker_config
        assert config is not None
        return int(config.worker_seed())

    def _skip(self, sample: dict[str, Any], reason: str) -> None:
        self.bad += 1
        source = (sample.get("__sources__") or [None])[0]
        shard = Path(str(getattr(source, "shard_name", "?"))).name
        self.skipped.append(Skipped(shard, str(sample["__key__"]).rpartition("/")[2], reason))
        if self.bad * 2 > self.checked and self.seen <= self.checked:
            last = self.skipped[-1]
            text = f"{TOO_MANY_BAD} {self.checked} samples are bad"
            raise FatalSampleError(f"{text}; the last: {last.shard}, {last.key}: {reason}")

    def batch(self, samples: list[Pair]) -> Batch:
        skipped, self.skipped = self.skipped, []
        return Batch(
            images=torch.from_numpy(np.stack([s.pixels for s in samples])),
            tokens=torch.from_numpy(np.stack([s.tokens for s in samples])),
            groups=torch.tensor([s.group for s in samples]),
            keys=[s.__key__ for s in samples],
            skipped=skipped,
        )


@stateless
def _raw(sample: dict[str, Any]) -> Raw:
    return Raw(**basic_sample_keys(sample), files=dict(sample))


def stable_hash(text: str) -> int:
    """A 63-bit hash that is the same in every process and run."""
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
) -> Any:
    """An endless, shuffled Energon loader of `Batch`es whose `save_state_rank()` resumes it.

    Raises:
        ValueError: when the folder holds no usable shards.
    """
    samples = prepare(folder)
    config = WorkerConfig(rank=0, world_size=1, num_workers=workers, seed_offset=seed)
    checked = max(1, CHECKED // max(1, workers))
    dataset = get_train_dataset(
        Path(folder).resolve(),
        worker_config=config,
        batch_size=batch_size,
        shuffle_buffer_size=min(samples, 4096),
        max_samples_per_sequence=100,
        task_encoder=Encoder(tokenizer, context_length, image_size, augment, checked),
    )
    loader = get_savable_loader(dataset, watchdog_timeout_seconds=None)
    loader.pin_memory = torch.cuda.is_available()  # Energon asks for it always, and torch warns without a GPU
    return loader


def next_batch(batches: Iterator[Batch], folder: str | Path) -> Batch:
    """The next batch of a loader over this folder; `ValueError` when too many of its samples are bad."""
    try:
        return next(batches)
    except FatalSampleError as error:
        # Energon wraps the message of our Encoder in the sample's description.
        found = re.search(f"{TOO_MANY_BAD}.*", str(error))
        raise ValueError(f"{folder}: {found.group().rstrip('.') if found else error}") from None


def close_loader(loader: Any) -> None:
    """Stop a loader's workers now. Left to the garbage collector, they stop only after a time-out of 5 s, since it
    ends the queue that would tell them before it asks them."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()
