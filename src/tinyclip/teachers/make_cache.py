"""Run a teacher over shards once and store its features (`tinyclip cache`; see `cache` for the format)."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tinyclip.common.distributed import from_main, gather_objects, rank, world_size
from tinyclip.common.faults import Fault, Skipped, Unusable
from tinyclip.common.files import flush, in_words, json_text, replacing, write_atomically
from tinyclip.common.folders import remove_leftovers
from tinyclip.common.locks import Lock, lock_of, take
from tinyclip.common.ownership import LOCKS, check_replaceable, claim, remove
from tinyclip.common.schema import Precision
from tinyclip.data.loader import AGAIN, Tokenize, bind_worker, closing, stable_hash
from tinyclip.data.samples import captions_of, image_of
from tinyclip.data.shard_index import shard_counts
from tinyclip.data.shards import find_shards, read_shard
from tinyclip.inference.pipeline import Pipeline
from tinyclip.inputs.augment import Augment, View
from tinyclip.model.model import weights_hash
from tinyclip.teachers.cache import Cache, CacheInfo, FeatureFile, ForeignInfo, content_hash, feature_file
from tinyclip.teachers.foreign import PROBES
from tinyclip.teachers.teacher import ForeignTeacher, Teacher

STORED = np.float16
FILES = ("cache.json", "config.json", "tokenizer.json", "preprocess.json", "skipped.jsonl")  # besides the features


@dataclass
class Report:
    """What a cache now contains, and how much of it this call computed."""

    shards: int
    samples: int
    captions: int
    bytes: int
    computed: int  # shards computed by this call
    skipped: list[Skipped]


def make_cache(
    clip: Pipeline | ForeignTeacher,
    name: str,
    data: str | Path,
    output: str | Path,
    *,
    augment: Augment,
    image_size: int | None = None,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 1,
    precision: Precision = "float32",
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Store a teacher's features for every sample in a folder of shards; finished shards are kept.

    Every sample gets `draws` views, which depend only on seed, shard and key. Shards are split between the processes
    of `distributed.processes`.

    Args:
        clip: the teacher, as returned by `load_teacher`, on the device to compute on.
        name: the teacher's name in the cache.
        image_size: size of the views in pixels; by default the teacher's.
        batch_size: number of views, or texts, per forward pass.
        precision: autocast precision of the computation; features are stored in float16.
        progress: called with the number of samples this process has done, and its total.

    Raises:
        ValueError: if the data or the output folder cannot be used, the folder holds a different cache or is in use by
            another call, or a decoding worker dies.
    """
    output = Path(output)
    counts = from_main(lambda: shard_counts(data))
    teacher = Teacher(clip.model, clip.preprocessing) if isinstance(clip, Pipeline) else clip
    info = CacheInfo(
        teacher=name,
        weights=weights_hash(teacher.network),
        scale=teacher.scale.item(),
        foreign=_foreign_info(clip),
        augment=augment,
        image_size=image_size or teacher.preprocess.image_size,
        draws=draws,
        seed=seed,
        precision=precision,
    )
    shards = [shard for shard in find_shards(data) if shard.name in counts]
    with _only_call(output, overwrite):
        from_main(lambda: _open_folder(output, info, clip, overwrite, shards))
        pending = from_main(lambda: [s.name for s in shards if not _is_done(output, s)])
        mine = {shard: counts[shard.name] for shard in shards if shard.name in pending[rank() :: world_size()]}
        _store(mine, output, info, teacher, _tokenize(clip), batch_size, workers, progress)
        gather_objects(None)  # wait for all processes
        return from_main(lambda: _summary(output, shards, len(pending)))


def _store(
    shards: Mapping[Path, int],
    output: Path,
    info: CacheInfo,
    teacher: Teacher | ForeignTeacher,
    tokenize: Tokenize,
    batch_size: int,
    workers: int,
    progress: Callable[[int, int], None],
) -> None:
    """Compute and write the features of this process's shards, each with its number of samples."""
    total, done = sum(shards.values()), 0
    progress(0, total)
    for shard, count in shards.items():
        views = ShardViews(shard, tokenize, info)
        features, loader = _Features(), _loader_of(views, batch_size, workers)
        with closing(loader, AGAIN):
            for block in loader:
                features.add(block, teacher, batch_size, info.precision)
                progress(done + features.seen, total)
        features.check(shard, count)
        done += features.seen
        features.write(feature_file(output, shard.name), shard, info, teacher.embed_dim)


# --- the folder -------------------------------------------------------------------------------------------------


def _tokenize(clip: Pipeline | ForeignTeacher) -> Tokenize:
    if isinstance(clip, Pipeline):
        return partial(clip.tokenizer, context_length=clip.model.config.text.context_length)
    return clip.tokenize


def _foreign_info(clip: Pipeline | ForeignTeacher) -> ForeignInfo | None:
    if isinstance(clip, Pipeline):
        return None
    tokens = hashlib.sha256(_tokenize(clip)(PROBES).tobytes()).hexdigest()
    return ForeignInfo(kind=clip.kind, embed_dim=clip.embed_dim, preprocess=clip.preprocess, tokens=tokens)


@contextmanager
def _only_call(folder: Path, overwrite: bool) -> Iterator[None]:
    """Hold the folder's lock; the first process takes it for all that share the work."""
    lock = lock_of(folder)
    from_main(lambda: _enter(lock, folder, overwrite))
    try:
        yield
    finally:
        lock.release()


def _enter(lock: Lock, folder: Path, overwrite: bool) -> None:
    check_place(folder, overwrite)
    take(lock, "tinyclip cache")


def check_place(folder: Path, overwrite: bool) -> None:
    """Refuse a folder with other contents than a cache, and with `overwrite` one with anything besides our cache.

    Raises:
        ValueError: if something would be lost; names it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another place")
    if overwrite or not (folder / "cache.json").exists():  # no cache, or remains of one that was being removed
        check_replaceable(folder, "cache")


def _open_folder(
    folder: Path, info: CacheInfo, clip: Pipeline | ForeignTeacher, overwrite: bool, shards: list[Path]
) -> None:
    try:
        if overwrite or not (folder / "cache.json").exists():
            remove(folder, "cache", keep=LOCKS)
        else:
            _check_same(folder, info, clip)
        features = (feature_file(folder, shard.name).relative_to(folder).as_posix() for shard in shards)
        claim(folder, "cache", [*FILES, *features])
        (folder / "features").mkdir(exist_ok=True)
        remove_leftovers(folder)  # from a call killed while writing
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {in_words(error)}") from None
    if not (folder / "cache.json").exists():
        if isinstance(clip, Pipeline):
            write_atomically(folder / "config.json", clip.model.config.model_dump_json(indent=2) + "\n")
            write_atomically(folder / "preprocess.json", clip.preprocessing.model_dump_json(indent=2) + "\n")
            write_atomically(folder / "tokenizer.json", clip.tokenizer.to_json())
        write_atomically(folder / "cache.json", info.model_dump_json(indent=2) + "\n")  # last: makes it a cache


def _check_same(folder: Path, info: CacheInfo, clip: Pipeline | ForeignTeacher) -> None:
    """Refuse to continue a cache that was made with other settings."""
    try:
        cache = Cache.load(folder)
    except ValueError as error:
        raise ValueError(f"{error}; --overwrite rebuilds it") from None
    # Not compared: a teacher's name and the reason it is foreign, since both may contain its path.
    now, before = (i.model_dump(exclude={"teacher": True, "foreign": {"kind"}}) for i in (info, cache.info))
    differing = [name for name in now if now[name] != before[name]]
    if isinstance(clip, Pipeline) and cache.tokenizer is not None:
        if cache.tokenizer.merges != clip.tokenizer.merges:
            differing.append("tokenizer")
        if cache.preprocess != clip.preprocessing:
            differing.append("preprocess")
    if differing:
        raise ValueError(
            f"{folder} holds a cache of {cache.info.teacher} that differs in {', '.join(differing)}; "
            "choose another place with -o, or replace it with --overwrite"
        )


def _is_done(output: Path, shard: Path) -> bool:
    """Whether a shard's features exist, are intact and match the shard's current content."""
    place = feature_file(output, shard.name)
    try:
        if not place.is_file() or not (file := FeatureFile(place)).is_of(shard):
            return False
        file.check()
        return True
    except ValueError:  # damaged: compute again
        return False


def _summary(output: Path, shards: list[Path], computed: int) -> Report:
    report = Report(len(shards), 0, 0, 0, computed, [])
    for shard in shards:
        file = FeatureFile(feature_file(output, shard.name))
        report.samples += len(file.hashes)
        report.captions += int(file.offsets[-1])
        report.bytes += file.path.stat().st_size
        report.skipped += [Skipped(shard.name, *row) for row in file.skipped]
    lines = [json_text(asdict(s)) + "\n" for s in report.skipped]
    write_atomically(output / "skipped.jsonl", "".join(lines))
    if not report.samples:
        raise Unusable(f"no sample could be used; see {output / 'skipped.jsonl'}")
    return report


# --- decoding ---------------------------------------------------------------------------------------------------


@dataclass
class Item:
    """A decoded sample, ready for the teacher."""

    key: str
    views: list[View]
    pixels: np.ndarray  # uint8 (draws, 3, s, s)
    tokens: np.ndarray  # int64 (captions, length)


@dataclass
class Block:
    """A batch of samples."""

    keys: list[str]
    views: np.ndarray  # float64 (n, draws, 13)
    images: Tensor  # uint8 (n * draws, 3, s, s)
    tokens: Tensor  # int64 (captions, length)
    captions: list[int]  # number per sample
    skipped: list[Skipped]


class ShardViews(IterableDataset[Any]):
    """The samples of a shard with their views; each of n workers decodes every n-th sample."""

    def __init__(self, shard: Path, tokenize: Tokenize, info: CacheInfo) -> None:
        super().__init__()
        self.shard, self.tokenize, self.info = shard, tokenize, info

    def __iter__(self) -> Iterator[Item | Skipped]:
        """Yield samples, and the faults of unusable ones."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        left_out: list[Skipped] = []
        for i, sample in enumerate(read_shard(self.shard, left_out)):
            if i % step == first:
                yield self._item(sample)
        if first == 0:  # every worker sees all of them; one reports
            yield from left_out

    def _item(self, sample: dict[str, Any]) -> Item | Skipped:
        key, info = str(sample["__key__"]), self.info
        try:
            captions = captions_of(sample)
            if not captions:
                raise Fault("no_caption", "no caption")
            image = image_of(sample)
        except ValueError as error:
            return Skipped(self.shard.name, key, getattr(error, "cause", "corrupt_image"), str(error))
        rngs = [Random(f"{info.seed}:{self.shard.name}:{key}:{i}") for i in range(info.draws)]
        views = [info.augment.draw(image.width, image.height, rng) for rng in rngs]
        pixels = np.stack([view.apply(image, info.image_size) for view in views])
        return Item(key, views, pixels, self.tokenize(captions))


def _loader_of(views: ShardViews, batch_size: int, workers: int) -> DataLoader[Any]:
    """Return a loader of a shard's `Block`s, with about `batch_size` views each."""
    together = max(1, batch_size // views.info.draws)
    several: dict[str, Any] = {"num_workers": workers, "worker_init_fn": bind_worker}
    several["persistent_workers"] = workers > 0  # otherwise the loader keeps no reference and cannot stop them
    return DataLoader(views, together, collate_fn=_join, **several)


def _join(found: list[Item | Skipped]) -> Block:
    items = [item for item in found if isinstance(item, Item)]
    return Block(
        keys=[item.key for item in items],
        views=np.array([item.views for item in items], np.float64),
        images=torch.from_numpy(np.concatenate([i.pixels for i in items])) if items else torch.empty(0),
        tokens=torch.from_numpy(np.concatenate([i.tokens for i in items])) if items else torch.empty(0),
        captions=[len(item.tokens) for item in items],
        skipped=[item for item in found if isinstance(item, Skipped)],
    )


# --- features ---------------------------------------------------------------------------------------------------


class _Features:
    """Collects the features of a shard."""

    def __init__(self) -> None:
        self.samples: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []  # key, views, image and text features
        self.skipped: list[Skipped] = []

    @property
    def seen(self) -> int:
        """Number of samples, including bad ones."""
        return len(self.samples) + sum(bool(s.key) for s in self.skipped)

    def add(self, block: Block, teacher: Teacher | ForeignTeacher, batch_size: int, precision: Precision) -> None:
        self.skipped += block.skipped
        if not block.keys:
            return
        device = teacher.scale.device
        with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
            images = [teacher.image_features(part.to(device)) for part in block.images.split(batch_size)]
            texts = [teacher.text_features(part) for part in block.tokens.split(batch_size)]
        image, text = (torch.cat(parts).cpu() for parts in (images, texts))
        if not (image.isfinite().all() and text.isfinite().all()):
            raise ValueError(f"the teacher's features of {', '.join(block.keys[:8])}, ... are not finite")
        image_rows = image.numpy().astype(STORED).reshape(len(block.keys), -1, image.shape[1])
        text_rows = np.split(text.numpy().astype(STORED), np.cumsum(block.captions)[:-1])
        self.samples += zip(block.keys, block.views, image_rows, text_rows, strict=True)

    def check(self, shard: Path, count: int) -> None:
        """Raise `ValueError` unless all samples of the shard were seen."""
        if self.seen != count:
            found = f"{self.seen} of its {count} samples could be read"
            raise ValueError(f"{shard}: {found}, because it changed or the disk is faulty; {AGAIN}")

    def write(self, place: Path, shard: Path, info: CacheInfo, embed_dim: int) -> None:
        """Write the file atomically; `ValueError` if that fails."""
        samples = sorted((stable_hash(sample[0]), *sample) for sample in self.samples)
        hashes, keys, views, images, texts = zip(*samples, strict=True) if samples else ((),) * 5
        tensors: dict[str, np.ndarray] = {
            "key_hashes": np.array(hashes, np.int64),
            "keys": np.frombuffer(json.dumps(keys, ensure_ascii=False).encode(), np.uint8),
            "views": np.array(views, np.float64).reshape(-1, info.draws, len(View._fields)),
            "image_features": np.array(images, STORED).reshape(-1, info.draws, embed_dim),
            "text_features": np.concatenate([np.empty((0, embed_dim), STORED), *texts]),
            "text_offsets": np.cumsum([0, *map(len, texts)], dtype=np.int64),
        }
        state = shard.stat()
        source = {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": content_hash(shard)}
        left_out = [(s.key, s.cause, s.reason) for s in self.skipped]
        header = {"source": json.dumps(source), "skipped": json.dumps(left_out, ensure_ascii=False)}
        header["checksums"] = json.dumps({name: zlib.crc32(tensor.data) for name, tensor in tensors.items()})
        with replacing(place) as temporary:
            try:
                save_file(tensors, temporary, header)
            except SafetensorError as error:  # a full disk, for example
                raise ValueError(f"cannot write {place}: {error}") from None
        flush(place.parent)
