"""Search the pictures of a folder by text or by picture, with an index on disk. No torch here.

An index is a folder. Its `index.json` names the two files of the current state: `vectors-N` with the features and
`pictures-N` with the paths. They never change: a new state is two new files and then, in one atomic step, a new
`index.json`. Readers therefore always find a complete state, even after a kill (`build.py` writes the states).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, BinaryIO

import numpy as np

from tinyclip.common.files import printable, read_json_object
from tinyclip.inputs.transforms import DRAFT, open_image
from tinyclip.loading import load
from tinyclip.search.vectors import EXACT, Vectors
from tinyclip.zoo.resolve import find_export

INFO, WORK, FORMAT = "index.json", "work.sqlite", 1
COLUMNS = "id INTEGER PRIMARY KEY, path BLOB NOT NULL, size INTEGER, mtime_ns INTEGER, cause TEXT, reason TEXT"
ATTEMPTS = 5  # to open a state that may be replaced meanwhile


@dataclass(frozen=True)
class Match:
    """A picture found by a search."""

    path: str  # relative to the index's root, with `/`
    cosine: float


class Index:
    """An open index, for any number of searches from any threads. It keeps the state it was opened with, even while
    `tinyclip index` writes a new one."""

    def __init__(self, path: Path, facts: dict[str, Any], vectors: Vectors, pictures: sqlite3.Connection) -> None:
        self.path, self.facts = path, facts  # the content of index.json
        self.root = Path(facts["root"])  # the folder the paths are relative to
        self._vectors, self._pictures, self._lock = vectors, pictures, Lock()

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """Open the current state of an index.

        Raises:
            ValueError: when there is no index, it is damaged, or USearch is not installed.
        """
        path = Path(path)
        for attempt in range(ATTEMPTS):
            facts = read_facts(path)
            try:
                check_size(path, facts)
                vectors = Vectors.open(path / facts["vectors"], facts["embed_dim"])
                return cls(path, facts, vectors, open_list(path / facts["list"]))
            except (FileNotFoundError, ValueError) as error:
                if attempt + 1 < ATTEMPTS and read_facts(path) != facts:
                    continue
                if isinstance(error, ValueError):
                    raise
                raise ValueError(f"{path} is damaged: it lacks files; rebuild it with --overwrite") from None
        raise AssertionError  # unreachable: the last attempt returned or raised

    def __len__(self) -> int:
        """The number of searchable pictures."""
        return len(self._vectors)

    def search(self, features: Any, k: int = 10, exact: bool | None = None) -> list[list[Match]]:
        """Return the `k` nearest pictures for each query, best first; fewer if the index has fewer.

        Args:
            features: text or image features from the index's model, (n, embed_dim) or (embed_dim,): anything that
                NumPy takes.
            exact: compare all pictures; False follows the graph, which is faster in a large index but may miss some;
                by default exact up to `vectors.EXACT` pictures.

        Raises:
            ValueError: for features of another size or that are not finite, or `k` below 1.
        """
        queries = np.atleast_2d(np.asarray(features, np.float32))
        dim = self.facts["embed_dim"]
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise ValueError(f"features {queries.shape} do not fit: the index has (n, {dim})")
        if not (np.isfinite(queries).all() and queries.any(1).all()):
            raise ValueError("features to search for must be finite, and not all 0")
        if k < 1:
            raise ValueError(f"{k} results: must be at least 1")
        if not len(queries):
            return []
        with self._lock:
            exact = len(self) <= EXACT if exact is None else exact
            found = zip(*self._vectors.search(queries, k, exact), strict=True)
            return [self._matches(keys, cosines) for keys, cosines in found]

    def _matches(self, keys: np.ndarray, cosines: np.ndarray) -> list[Match]:
        query, matches = "SELECT path FROM pictures WHERE id = ?", []
        for key, cosine in zip(keys, cosines, strict=True):
            with told(self.path):
                row = self._pictures.execute(query, (int(key),)).fetchone()
            if row is None:
                raise ValueError(f"{self.path} is damaged: its files do not match; rebuild it with --overwrite")
            matches.append(Match(os.fsdecode(row[0]), float(cosine)))
        return matches

    def file(self, path: str) -> Path:
        """Return the path of a picture that was found, never outside the indexed folder.

        Raises:
            ValueError: for a path that leaves the folder.
        """
        below = PurePosixPath(path)
        if below.is_absolute() or ".." in below.parts:
            raise ValueError(f"{path}: not below {self.root}")
        return self.root / below

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self._pictures.close()


# --- the model ---------------------------------------------------------------------------------------------------


def open_model(name: str, device: str = "cpu", dtype: str | None = None, compile: bool = False) -> tuple[Any, str]:
    """Load a model with `tinyclip.load`, and compute its fingerprint: over the stored weights, shape, vocabulary and
    preprocessing, independent of the compute dtype.

    Args:
        device, dtype, compile: as for `tinyclip.load`.

    Raises:
        ValueError: as `tinyclip.load`.
    """
    if find_export(name):
        clip = load(name, device=device, dtype=dtype, compile=compile)
        return clip, clip.fingerprint()
    clip = load(name)  # in float32, whatever the compute dtype
    found = clip.fingerprint()

    from tinyclip.common.devices import resolve_device, resolve_dtype
    from tinyclip.inference.pipeline import compile_towers
    from tinyclip.model.model import cast

    place = resolve_device(device)
    cast(clip.model.to(place), resolve_dtype(dtype, place))
    if compile:
        compile_towers(clip.model)
    return clip, found


def check_model(facts: dict[str, Any], index: Path, model: str, fingerprint: str) -> None:
    """Refuse a model that the index was not made with: its features would be meaningless there.

    Raises:
        ValueError: when it is another model.
    """
    if facts["model_fingerprint"] != fingerprint:
        before = facts["model"]
        change = f"{before}, now {model}" if before != model else f"{model}, which has changed since"
        raise ValueError(
            f"{index} was made with another model ({change}); use that one, or rebuild the index "
            "with `tinyclip index --overwrite`"
        )


def pixels(clip: Any, file: Path | BinaryIO) -> np.ndarray:
    """Return a picture as the model sees it, uint8 (image_size, image_size, 3). Large JPEGs are decoded at a reduced
    size (docs/embed.md), in the same way for indexed pictures and for queries.

    Raises:
        ValueError: when it cannot be read.
    """
    image = open_image(file, DRAFT * clip.preprocessing.image_size)
    return clip.preprocessing.pixels(image).transpose(1, 2, 0)


def plain(features: Any) -> np.ndarray:
    """Convert features on any device to a NumPy array."""
    return np.asarray(features.cpu() if hasattr(features, "cpu") else features)


# --- files, for those who read and those who write ---------------------------------------------------------------


def read_facts(path: Path) -> dict[str, Any]:
    """Return the content of `index.json`.

    Raises:
        ValueError: when it is missing, damaged, or of another version.
    """
    if not (path / INFO).exists():
        if (path / WORK).exists():
            raise ValueError(f"{path}: its first `tinyclip index` did not finish; run it again")
        raise ValueError(f"{path}: not an index; make one with `tinyclip index MODEL FOLDER -o {path}`")
    try:
        facts = read_json_object(path / INFO)
    except ValueError as error:
        raise ValueError(f"{error}; rebuild it with --overwrite") from None
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path}: an index of format {facts.get('format')}; this tinyclip reads {FORMAT}")
    types = {"model": str, "model_fingerprint": str, "embed_dim": int, "root": str, "vectors": str, "list": str}
    types |= {"vectors_state": list, "state": int, "pictures": int}
    wrong = next((name for name, kind in types.items() if not isinstance(facts.get(name), kind)), None)
    if wrong or {Path(facts[name]).name for name in ("vectors", "list")} != {facts["vectors"], facts["list"]}:
        raise ValueError(f"{path / INFO} is damaged ({wrong or 'files outside it'}); rebuild it with --overwrite")
    return facts


def check_size(path: Path, facts: dict[str, Any]) -> None:
    """Check the size of a memory-mapped file; a truncated one would crash the process on access.

    Raises:
        FileNotFoundError: when it does not exist.
        ValueError: when it is damaged.
    """
    file = path / facts["vectors"]
    if file.stat().st_size != facts["vectors_state"][0]:
        raise ValueError(f"{file} is damaged: its size has changed; rebuild it with --overwrite")


def open_list(file: Path) -> sqlite3.Connection:
    """Open a state's list of pictures, read-only; the file no longer changes.

    Raises:
        FileNotFoundError: when it does not exist.
        ValueError: when it is damaged.
    """
    file.stat()
    connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    try:
        connection.execute("SELECT path FROM pictures LIMIT 1").fetchone()
    except sqlite3.Error as error:
        raise ValueError(f"{file} is damaged ({error}); rebuild it with --overwrite") from None
    return connection


@contextmanager
def told(file: Path) -> Iterator[None]:
    """Turn SQLite's errors into one-line messages."""
    try:
        yield
    except sqlite3.Error as error:
        raise ValueError(f"{file}: {error}") from None


def shown(path: str | Path) -> str:
    """Return a path as one line of text that any terminal or file can hold."""
    return printable(str(path))


def queries_from(texts: Sequence[str]) -> list[str]:
    """Return the query texts, stripped.

    Raises:
        ValueError: when one is empty.
    """
    stripped = [text.strip() for text in texts]
    if not all(stripped):
        raise ValueError("a query is empty; give some words")
    return stripped
