"""Exported models, usable without torch: what `load` returns for a folder written by `tinyclip export`.

`tinyclip.json` in the folder describes everything except the weights; `image.*` and `text.*` are the two towers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinyclip.common.files import checksum, read_json_object
from tinyclip.inference.engines import RUNS, Tower, choose, compute_dtype, start
from tinyclip.inputs.batching import (
    BATCH,
    at_once,
    batches,
    by_length,
    check_labels,
    is_tensor,
    picture_of,
    pictures,
    same_shape,
)
from tinyclip.inputs.tokenizer import CLIPTokenizer, pad
from tinyclip.inputs.transforms import Preprocess
from tinyclip.model.config import CLIPConfig
from tinyclip.zoo.resolve import ENDINGS, FACTS, TOKENIZER, find_export

FORMAT = 1  # format version of `FACTS`
NEEDED = {
    "export": str,
    "precision": str,
    "fingerprint": str,
    "config": dict,
    "preprocess": dict,
    "logit_scale": float,
    "files": dict,
}


@dataclass(repr=False)
class RuntimePipeline:
    """An exported CLIP with its tokenizer and preprocessing: a `Pipeline` on another runtime that returns NumPy arrays.

    Each tower is loaded on first use. Pickling stores only the folder's path; unpickling loads it again.
    """

    folder: Path
    facts: dict[str, Any]  # contents of `tinyclip.json`
    runtime: str  # openvino, onnxruntime or torch
    dtype: str  # compute dtype of the parts that are not int8
    config: CLIPConfig
    tokenizer: CLIPTokenizer
    preprocessing: Preprocess

    def __repr__(self) -> str:
        side, kind = self.preprocessing.image_size, self.facts["export"]
        how = f"{self.computing['dtype']} with {self.runtime} on cpu"
        return f"RuntimePipeline({kind} at {side} px, {self._context} tokens, {how})"

    @property
    def computing(self) -> dict[str, str]:
        """Dtype, device and runtime it computes with, as commands report them."""
        int8 = self.facts["precision"] == "int8"
        return {"dtype": "int8" if int8 else self.dtype, "device": "cpu", "runtime": self.runtime}

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    def logit_scale(self) -> float:
        """The logarithm of the factor on similarities in `classify`."""
        return float(self.facts["logit_scale"])

    @cached_property
    def _image_tower(self) -> Tower:
        return start(self.runtime, self._file("image"), self.dtype)

    @cached_property
    def _text_tower(self) -> Tower:
        return start(self.runtime, self._file("text"), self.dtype)

    def _file(self, tower: str) -> Path:
        return self.folder / f"{tower}{ENDINGS[self.facts['export']]}"

    def load_towers(self) -> None:
        """Load both towers now, in parallel, instead of on first use; `ValueError` if the runtime cannot load one."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(partial(getattr, self), ("_image_tower", "_text_tower")))

    def tokenize(self, texts: str | Sequence[str], context_length: int | None = None) -> np.ndarray:
        """Tokenize with the model's own vocabulary, int64 (n, context_length); by default at the model's context."""
        return self.tokenizer(texts, self._context if context_length is None else context_length)

    @property
    def _context(self) -> int:
        return self.config.text.context_length

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Convert a PIL image to float32 (3, image_size, image_size), normalised for this model."""
        return self.preprocessing(image)

    def encode_image(self, images: Any, *, batch_size: int | None = None, normalize: bool = True) -> np.ndarray:
        """Return image_features, float32 (n, embed_dim), of paths, PIL images, uint8 arrays (h, w[, 3]), or
        preprocessed images: a float array or tensor (n, 3, s, s). Any number of them, as `Pipeline.encode_image`.

        Args:
            batch_size: largest batch, 32 by default; smaller ones are used if that keeps more cores busy.

        Raises:
            ValueError: for an unreadable image or a wrong shape.
        """
        tower, most = self._image_tower, self.batch_size(batch_size)
        if _is_prepared(images):
            whole = _array(images)
            whole = whole if whole.ndim == 4 else whole[None]
            size = tower.batch(len(whole), most)
            ready: Iterator[np.ndarray] = (whole[i : i + size] for i in range(0, len(whole), size))
        else:
            items = images if isinstance(images, (list, tuple)) else [images]
            ready = map(_stacked, batches(pictures(items, self._image), tower.batch(len(items), most)))
        features = [self._empty(), *tower.run(map(self._checked, ready))]
        return _finished(np.concatenate(features), normalize)

    def encode_text(
        self, texts: str | Sequence[str], *, batch_size: int | None = None, normalize: bool = True
    ) -> np.ndarray:
        """Return text_features, float32 (n, embed_dim), of any number of texts, in batches of similar length.

        Args:
            batch_size: largest batch, 64 by default; smaller ones are used if that keeps more cores busy.

        Raises:
            ValueError: if an item is not a text.
        """
        rows, most = self.tokenizer.rows(texts, self._context), self.batch_size(batch_size) * (1 if batch_size else 2)
        tower = self._text_tower
        places = list(by_length(rows, tower.batch(len(rows), most)))
        tokens = (pad([rows[i] for i in some], len(rows[some[0]])) for some in places)
        features = self._empty(len(rows))
        for some, found in zip(places, tower.run(tokens), strict=True):
            features[some] = found
        return _finished(features, normalize)

    def similarity(self, images: Any, texts: str | Sequence[str]) -> np.ndarray:
        """Return the cosine similarity of every image with every text, (images, texts)."""
        self.load_towers()
        return self.encode_image(images) @ self.encode_text(texts).T

    def classify(self, images: Any, labels: str | Sequence[str]) -> np.ndarray:
        """Return the probability of each label for each image, (images, labels): softmax of scaled similarities.

        Raises:
            ValueError: without labels, or for an empty label.
        """
        check_labels(labels)
        logits = self.similarity(images, labels) * np.float32(math.exp(self.logit_scale))
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    def fingerprint(self) -> str:
        """Fingerprint of the exported model, so whatever was made with that model, such as an index, works here too."""
        return str(self.facts["fingerprint"])

    def size(self) -> int:
        """Bytes of its files on disk; for a model converted in memory, of its temporary files."""
        return sum(size for size, _ in self.facts["files"].values())

    def batch_size(self, given: int | None = None) -> int:
        """Return the batch size for images, 32 unless given; texts use twice as many."""
        return at_once(given, BATCH)

    def _image(self, item: Any) -> np.ndarray:
        return _array(item) if _is_prepared(item) else self.preprocess(picture_of(item))

    def _checked(self, batch: np.ndarray) -> np.ndarray:
        side = self.preprocessing.image_size
        if batch.shape[1:] != (3, side, side):
            raise ValueError(f"images have shape {batch.shape}, expected (n, 3, {side}, {side})")
        return np.ascontiguousarray(batch, np.float32)

    def _empty(self, count: int = 0) -> np.ndarray:
        return np.empty((count, self.embed_dim), np.float32)

    def __reduce__(self) -> Any:
        if not self.folder.is_dir():  # converted in memory
            raise ValueError("only exports can be pickled: `tinyclip export` the model and load its output")
        return load_export, (self.folder, self.runtime, self.dtype)


def _is_prepared(item: Any) -> bool:
    """Whether an item went through `preprocess`; raw images are uint8."""
    return is_tensor(item) or (isinstance(item, np.ndarray) and item.dtype.kind == "f" and item.ndim in (3, 4))


def _array(item: Any) -> np.ndarray:
    return item.detach().cpu().float().numpy() if is_tensor(item) else item


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    same_shape(array.shape for array in arrays)
    return np.stack(arrays)


def _finished(features: np.ndarray, normalize: bool) -> np.ndarray:
    if not normalize:
        return features
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


# --- reading a folder -------------------------------------------------------------------------------------------


def check_device(where: str, device: Any) -> None:
    """Raise `ValueError` for any device other than the CPU."""
    if str(device) not in ("cpu", "auto"):
        raise ValueError(f"{where}: exports and other runtimes run on the CPU only, not on {device}")


def read_facts(folder: Path) -> dict[str, Any]:
    """Read and check `tinyclip.json`.

    Raises:
        ValueError: if it is damaged or has a newer format, or a file does not match it.
    """
    facts = read_json_object(folder / FACTS)
    again = "export the model again"
    if facts.get("format") != FORMAT:
        newer = isinstance(facts.get("format"), int) and facts["format"] > FORMAT
        what = (
            f"format {facts['format']} from a newer tinyclip; this one reads {FORMAT}" if newer else "no export's facts"
        )
        raise ValueError(f"{folder / FACTS}: {what}; {'update tinyclip or ' if newer else ''}{again}")
    for key, kind in NEEDED.items():
        if not isinstance(facts.get(key), kind):
            raise ValueError(f"{folder / FACTS}: {key} is missing or not {kind.__name__}; {again}")
    if facts["export"] not in RUNS:
        raise ValueError(f"{folder / FACTS}: export is {facts['export']!r}, not {', '.join(RUNS)}; {again}")
    for name in (*(f"{tower}{ENDINGS[facts['export']]}" for tower in ("image", "text")), TOKENIZER):
        if name not in facts["files"]:
            raise ValueError(f"{folder / FACTS}: {name} is not among its files; {again}")
    for name, state in facts["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: no such file, though {FACTS} lists it; {again}")
        if [file.stat().st_size, checksum(file)] != state:
            raise ValueError(f"{file}: damaged: it differs from what was exported; {again}")
    return facts


def load_export(path: str | Path, runtime: str = "auto", dtype: Any = None) -> RuntimePipeline:
    """Load an exported model, ready to use.

    Args:
        runtime: openvino, onnxruntime or torch; "auto" is the fastest installed one that can run the format.
        dtype: compute dtype of the parts that are not int8: float32 by default; "auto" is bfloat16 if the runtime
            supports it on this machine.

    Raises:
        ValueError: if the folder is damaged, or the runtime is not installed or cannot run it.
    """
    folder = find_export(path)
    if folder is None:
        raise ValueError(f"{path}: not an exported model")
    facts = read_facts(folder)
    chosen = choose(facts["export"], runtime, str(folder))
    tokenizer = CLIPTokenizer.from_file(folder / TOKENIZER)
    try:
        preprocessing = Preprocess(**facts["preprocess"])
        config = CLIPConfig.from_dict(facts["config"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / FACTS}: {' '.join(str(error).split())}; export the model again") from None
    return RuntimePipeline(folder, facts, chosen, compute_dtype(chosen, dtype), config, tokenizer, preprocessing)
