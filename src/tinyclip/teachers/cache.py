"""Teacher features on disk: read, sample by sample, what `tinyclip cache` wrote (see `make_cache`).

A cache is a folder:

    cache.json                          how the cache was made: `CacheInfo`
    config.json, tokenizer.json, preprocess.json   the teacher's, as in a checkpoint; only for our own teachers
    features/SHARD.safetensors          features of the data shard SHARD.tar, sorted by `key_hashes`:
        key_hashes      int64 (n,)      `stable_hash` of the samples' keys
        keys            uint8           the keys themselves, as a JSON list
        views           float64 (n, draws, 13)      the numbers of each `View`
        image_features  float16 (n, draws, embed_dim)   normalised
        text_features   float16 (m, embed_dim)      normalised, of all captions, sample by sample
        text_offsets    int64 (n + 1,)  captions of sample i: rows offsets[i] to offsets[i + 1]
      The file's header identifies the data shard (`source`) and has the skipped samples (`skipped`) and the CRC-32 of
      each tensor (`checksums`).
    skipped.jsonl                       skipped samples of all shards: shard, key, cause, reason

Every file is renamed into place once it is complete, so an interrupted cache can be resumed after a kill.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from tinyclip.common.distributed import from_main
from tinyclip.common.faults import Fault
from tinyclip.common.files import read_json_object, sha256
from tinyclip.common.schema import Count, Positive, Precision, Strict, explain
from tinyclip.data.loader import stable_hash
from tinyclip.data.shard_index import shard_counts
from tinyclip.data.shards import find_shards
from tinyclip.inputs.augment import Augment, View
from tinyclip.inputs.tokenizer import CLIPTokenizer
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig
from tinyclip.zoo.checkpoint import read_preprocess

OPEN_FILES = 64  # a worker's shuffle buffer mixes samples of about 40 shards; opening a file takes 0.03 ms
THREADS = 8  # threads that check the whole cache once before it is used
TENSORS = ("key_hashes", "keys", "views", "image_features", "text_features", "text_offsets")


class ForeignInfo(Strict):
    """What a cache stores about a teacher from another library, which has no `CLIPConfig`."""

    kind: str  # see `ForeignTeacher`
    embed_dim: Positive
    preprocess: Preprocess
    tokens: str  # hash of its tokenizer's output for some texts


class CacheInfo(Strict):
    """How a cache was made. Two caches with equal `augment`, `image_size`, `draws` and `seed` hold the same views."""

    version: Literal[1] = 1
    teacher: str
    weights: str  # hash of the teacher's weights
    scale: float  # exp(logit_scale)
    precision: Precision
    augment: Augment
    image_size: Positive  # size of the views in pixels
    draws: Positive  # views per image
    seed: Count
    foreign: ForeignInfo | None = None


VIEW_SETTINGS = ("augment", "image_size", "draws", "seed")


@dataclass
class Cache:
    """A cache open for reading."""

    folder: Path
    info: CacheInfo
    config: CLIPConfig | None  # this and the next two: None for a foreign teacher
    tokenizer: CLIPTokenizer | None
    preprocess: Preprocess | None
    _files: OrderedDict[str, FeatureFile] = field(default_factory=OrderedDict, repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> Cache:
        """Open a cache; `ValueError` if the folder is not a cache or is damaged."""
        folder = Path(folder)
        if not (folder / "cache.json").is_file():
            raise ValueError(f"{folder}: not a teacher cache; make one with `tinyclip cache`")
        info = read_info(folder)
        if info.foreign is not None:
            return cls(folder, info, None, None, None)
        config = CLIPConfig.from_json(folder / "config.json")
        tokenizer = CLIPTokenizer.from_file(folder / "tokenizer.json")
        return cls(folder, info, config, tokenizer, read_preprocess(folder / "preprocess.json"))

    @property
    def own(self) -> tuple[CLIPConfig, CLIPTokenizer, Preprocess]:
        """Config, tokenizer and preprocessing of one of our own teachers."""
        assert self.config is not None and self.tokenizer is not None and self.preprocess is not None
        return self.config, self.tokenizer, self.preprocess

    @property
    def embed_dim(self) -> int:
        if self.config is not None:
            return self.config.embed_dim
        assert self.info.foreign is not None, "`load` reads one of the two"
        return self.info.foreign.embed_dim

    def check_data(self, data: str | Path) -> None:
        """Check that the cache covers all readable shards of this folder in their current state.

        Raises:
            ValueError: if a shard is missing, has changed since, or has damaged features; names the shard.
        """
        counts = shard_counts(data, keep=True)
        shards = [shard for shard in find_shards(data) if shard.name in counts]
        missing = [shard.name for shard in shards if not self.place(shard.name).is_file()]
        if missing:
            of = f"{len(missing)} of the {len(shards)} shards of {data} (the first: {missing[0]})"
            raise ValueError(f"{self.folder} lacks {of}; complete it with `tinyclip cache`")
        for shard in shards:
            file = FeatureFile(self.place(shard.name))  # open all files before reading any of them completely
            if not file.is_of(shard):
                raise ValueError(f"{self.folder}: {shard} has changed since; rebuild the cache with `tinyclip cache`")
            shapes = file.shape("image_features")[1:], file.shape("text_features")[1:]
            if shapes != ([self.info.draws, self.embed_dim], [self.embed_dim]):
                raise ValueError(f"{file.path}: its features do not fit {self.folder / 'cache.json'}")
        with ThreadPoolExecutor(THREADS) as threads:
            for _ in threads.map(lambda shard: FeatureFile(self.place(shard.name)).check(), shards):
                pass

    def place(self, shard: str) -> Path:
        return feature_file(self.folder, shard)

    def find(self, shard: str, key: str) -> tuple[FeatureFile, int]:
        """Return the file of a shard and the sample's row in it; `Fault` if the sample was skipped."""
        try:
            file = self._files.pop(shard, None) or FeatureFile(self.place(shard))
        except ValueError as error:  # it was intact when the run started
            raise Fault("not_in_cache", str(error)) from None
        self._files[shard] = file  # most recently used last
        if len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)
        return file, file.row(key)


def feature_file(folder: Path, shard: str) -> Path:
    return folder / "features" / f"{shard.removesuffix('.tar')}.safetensors"


def read_info(folder: Path) -> CacheInfo:
    """Read `cache.json`; `ValueError` if it is damaged."""
    path = folder / "cache.json"
    try:
        return CacheInfo.model_validate(read_json_object(path))
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None


class FeatureFile:
    """Features of one data shard, mapped into memory.

    Raises:
        ValueError: if the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "np")
            self._slices = {name: self._file.get_slice(name) for name in TENSORS}
            self.hashes, self.offsets = (self._file.get_tensor(name) for name in ("key_hashes", "text_offsets"))
            header = self._file.metadata()
            self.source: dict[str, Any] = json.loads(header["source"])
            self.skipped: list[list[str]] = json.loads(header["skipped"])  # key, cause, reason
            self.checksums: dict[str, int] = json.loads(header["checksums"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({error}); run the same `tinyclip cache` again to repair it") from None

    def check(self) -> None:
        """Read all tensors; `ValueError` if one does not match its checksum."""
        try:
            found = {name: zlib.crc32(self._file.get_tensor(name)) for name in TENSORS}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path}: damaged ({error}); run the same `tinyclip cache` again to repair it"
            ) from None
        if wrong := [name for name in TENSORS if found[name] != self.checksums.get(name)]:
            raise ValueError(
                f"{self.path}: damaged ({wrong[0]} does not match its checksum); "
                "run the same `tinyclip cache` again to repair it"
            )

    def shape(self, name: str) -> list[int]:
        return list(self._slices[name].get_shape())

    def is_of(self, shard: Path) -> bool:
        """Whether the shard still has the content the features were made from. It is read again only if its
        modification time differs, as it does for a copy."""
        now = shard.stat()
        if now.st_size != self.source["size"]:
            return False
        return now.st_mtime_ns == self.source["mtime_ns"] or content_hash(shard) == self.source["sha256"]

    def row(self, key: str) -> int:
        """Return the row of a sample; `Fault` if the sample is not here."""
        wanted = stable_hash(key)
        row = int(np.searchsorted(self.hashes, wanted))
        if row == len(self.hashes) or self.hashes[row] != wanted:
            raise Fault("not_in_cache", "not in the teacher's cache")
        return row

    def view(self, row: int, draw: int) -> View:
        return View(*self._slices["views"][row, draw].tolist())

    def image_features(self, row: int, draw: int) -> np.ndarray:
        """Return the image features of one view, (embed_dim,)."""
        features: np.ndarray = self._slices["image_features"][row, draw]
        return features

    def text_features(self, row: int, caption: int) -> np.ndarray:
        """Return the text features of one caption, (embed_dim,)."""
        features: np.ndarray = self._slices["text_features"][int(self.offsets[row]) + caption]
        return features

    def captions(self, row: int) -> int:
        return int(self.offsets[row + 1] - self.offsets[row])


def draw_stored(
    caches: Sequence[Cache], shard: str, key: str, captions: int, rng: Random
) -> tuple[View, int, list[tuple[np.ndarray, np.ndarray]]]:
    """Draw one of a sample's stored views and one of its captions. Return the view, the caption's index, and each
    teacher's image and text features for them, (embed_dim,) each.

    Raises:
        Fault: if a cache lacks the sample, or has a different number of captions or a different view for it.
    """
    draw, caption = rng.randrange(caches[0].info.draws), rng.randrange(captions)
    views, features = [], []
    for cache in caches:
        file, row = cache.find(shard, key)
        if file.captions(row) != captions:
            raise Fault("not_in_cache", f"{captions} captions, but {file.captions(row)} in the teacher's cache")
        views.append(file.view(row, draw))
        features.append((file.image_features(row, draw), file.text_features(row, caption)))
    if len(set(views)) > 1:
        raise Fault("not_in_cache", "the teachers' caches hold different views of it")
    return views[0], caption, features


def open_caches(folders: Iterable[str | Path], data: str | Path) -> list[Cache]:
    """Open the caches of several teachers for the same data, with the same views.

    Raises:
        ValueError: if one is damaged, incomplete, made from other data, or has different views than the first.
    """
    caches = [Cache.load(folder) for folder in folders]
    for cache in caches:
        from_main(lambda cache=cache: cache.check_data(data))  # type: ignore[misc]
        for name in VIEW_SETTINGS:
            mine, first = getattr(cache.info, name), getattr(caches[0].info, name)
            if mine != first:
                raise ValueError(
                    f"{cache.folder} and {caches[0].folder} were made with a different {name}, so their views differ; "
                    "teachers that are averaged must see the same ones"
                )
    return caches


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return sha256(path)
