"""Find the pictures of a folder by words, or by a picture: an index on disk. No torch here.

An index is a folder. `index.json` names the two files of its present state: `vectors-N` with the features and
`pictures-N` with the paths. Neither is ever written again: a new state is two new files and then, in one step, a new
`index.json`. So whoever reads, and whatever is killed, there is always a whole state (`indexing.py` makes them).
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
ATTEMPTS = 5  # to open a state before another one takes its place


@dataclass(frozen=True)
class Match:
    """A picture that was found."""

    path: str  # below the index's root, with `/`
    cosine: float


class Index:
    """An index that was opened, for any number of searches, from any threads. It stays at the state that it had then,
    also while `tinyclip index` makes a new one."""

    def __init__(self, path: Path, facts: dict[str, Any], vectors: Vectors, pictures: sqlite3.Connection) -> None:
        self.path, self.facts = path, facts  # what index.json says
        self.root = Path(facts["root"])  # what the paths are below
        self._vectors, self._pictures, self._lock = vectors, pictures, Lock()

    @classmethod
    def open(cls, path: str | Path) -> Index:
        """The present state of an index.

        Raises:
            ValueError: when there is none, or it is damaged, or USearch is not installed.
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
        raise AssertionError  # the last attempt returned or raised

    def __len__(self) -> int:
        """Pictures that can be found."""
        return len(self._vectors)

    def search(self, features: Any, k: int = 10, exact: bool | None = None) -> list[list[Match]]:
        """For each query its `k` nearest pictures, best first; fewer when the index has no more.

        Args:
            features: (n, embed_dim) or (embed_dim,) of the index's model, of texts or of pictures: anything that
                NumPy takes.
            exact: compare all pictures; False follows the graph, which is faster in a large index and may miss some;
                by default exact up to `vectors.EXACT` pictures.

        Raises:
            ValueError: for features of another size, or that are no numbers, or `k` below 1.
        """
        queries = np.atleast_2d(np.asarray(features, np.float32))
        dim = self.facts["embed_dim"]
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise ValueError(f"features {queries.shape} do not fit: the index has (n, {dim})")
        if not (np.isfinite(queries).all() and queries.any(1).all()):
            raise ValueError("features to search for must be finite, and not all 0")
        if k < 1:
            raise ValueError(f"{k} results: at least 1 is needed")
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
                raise ValueError(
                    f"{self.path} is damaged: its files do not belong together; rebuild it with --overwrite"
                )
            matches.append(Match(os.fsdecode(row[0]), float(cosine)))
        return matches

    def file(self, path: str) -> Path:
        """Where a picture that was found is; nothing outside the indexed folder.

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
    """A model as `tinyclip.load` returns it, and its fingerprint: of weights, shape, vocabulary and preprocessing as
    they are stored, whatever it computes in.

    Args:
        device, dtype, compile: as of `tinyclip.load`.

    Raises:
        ValueError: as `tinyclip.load`.
    """
    if find_export(name):
        clip = load(name, device=device, dtype=dtype, compile=compile)
        return clip, clip.fingerprint()
    clip = load(name)  # in float32, whatever it will compute in
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
    """Refuse a model that the index was not made with: its features would mean nothing there.

    Raises:
        ValueError: when it is another one.
    """
    if facts["model_fingerprint"] != fingerprint:
        before = facts["model"]
        change = f"{before}, now {model}" if before != model else f"{model}, which has changed since"
        raise ValueError(f"{index} was made with another model ({change}); rebuild it with --overwrite")


def pixels(clip: Any, file: Path | BinaryIO) -> np.ndarray:
    """A picture as the model looks at it, uint8 (image_size, image_size, 3): large JPEGs are decoded at a reduced size
    (docs/embed.md), the same for a picture in the index and one to search by.

    Raises:
        ValueError: when it cannot be read.
    """
    image = open_image(file, DRAFT * clip.preprocessing.image_size)
    return clip.preprocessing.pixels(image).transpose(1, 2, 0)


def plain(features: Any) -> np.ndarray:
    """Features of any device as a NumPy array."""
    return np.asarray(features.cpu() if hasattr(features, "cpu") else features)


# --- files, for those who read and those who write ---------------------------------------------------------------


def read_facts(path: Path) -> dict[str, Any]:
    """What `index.json` says.

    Raises:
        ValueError: when it is missing, damaged, or of another version.
    """
    if not (path / INFO).exists():
        if (path / WORK).exists():
            raise ValueError(f"{path}: its first `tinyclip index` has not come to an end; run it again")
        raise ValueError(f"{path}: no index; make one with `tinyclip index MODEL FOLDER -o {path}`")
    try:
        facts = read_json_object(path / INFO)
    except ValueError as error:
        raise ValueError(f"{error}; rebuild it with --overwrite") from None
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path}: an index of format {facts.get('format')}, this tinyclip reads {FORMAT}")
    types = {"model": str, "model_fingerprint": str, "embed_dim": int, "root": str, "vectors": str, "list": str}
    types |= {"vectors_state": list, "state": int, "pictures": int}
    wrong = next((name for name, kind in types.items() if not isinstance(facts.get(name), kind)), None)
    if wrong or {Path(facts[name]).name for name in ("vectors", "list")} != {facts["vectors"], facts["list"]}:
        raise ValueError(f"{path / INFO} is damaged ({wrong or 'files elsewhere'}); rebuild it with --overwrite")
    return facts


def check_size(path: Path, facts: dict[str, Any]) -> None:
    """A file that was cut off would end the process once its pages are touched.

    Raises:
        FileNotFoundError: when it is not there.
        ValueError: when it is damaged.
    """
    file = path / facts["vectors"]
    if file.stat().st_size != facts["vectors_state"][0]:
        raise ValueError(f"{file} is damaged: shorter or longer than it was written; rebuild it with --overwrite")


def open_list(file: Path) -> sqlite3.Connection:
    """The pictures of a state, read only, in a file that nobody writes to any more.

    Raises:
        FileNotFoundError: when it is not there.
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
    """SQLite's errors in one line."""
    try:
        yield
    except sqlite3.Error as error:
        raise ValueError(f"{file}: {error}") from None


def shown(path: str | Path) -> str:
    """A path as text that any terminal and file can take, in one line."""
    return printable(str(path))


def queries_from(texts: Sequence[str]) -> list[str]:
    """Texts to search for, without blanks around them.

    Raises:
        ValueError: when one is empty.
    """
    stripped = [text.strip() for text in texts]
    if not all(stripped):
        raise ValueError("a query is empty; say what to look for")
    return stripped
