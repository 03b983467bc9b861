"""Feature storage and nearest-neighbour search: a thin layer over USearch, and the only module that uses it.

A file is searched through a memory map, so its pages are in the system's cache, shared by all searching processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tinyclip.common.files import flush

# Chosen by measurement (docs/search.md, benchmarks/search.py).
DTYPE = "f16"
CONNECTIVITY = 16  # neighbours of a vector in the graph
EXPANSION_ADD = 128  # candidates examined per added vector
EXPANSION = 512  # candidates examined per query
EXACT = 100_000  # up to this many vectors, all are compared: takes milliseconds and misses none
WASTE = 0.25  # share of removed vectors at which the graph is rebuilt


class Vectors:
    """Vectors of `dim` numbers with non-negative integer keys, compared by cosine."""

    def __init__(self, dim: int) -> None:
        """Create an empty set of vectors.

        Raises:
            ValueError: when USearch is not installed.
        """
        self._index = _usearch().Index(
            ndim=dim,
            metric="cos",
            dtype=DTYPE,
            connectivity=CONNECTIVITY,
            expansion_add=EXPANSION_ADD,
            expansion_search=EXPANSION,
        )

    @classmethod
    def open(cls, path: Path, dim: int, *, view: bool = True) -> Vectors:
        """Open a file written by `save`.

        Args:
            view: open for search only, through a memory map; else read it into memory, for changes.

        Raises:
            ValueError: when USearch is not installed, or the file is damaged.
        """
        vectors = cls(dim)
        with _faults(f"{path}: damaged"):
            vectors._index.view(path) if view else vectors._index.load(path)
        if vectors._index.ndim != dim:
            raise ValueError(f"{path}: vectors of {vectors._index.ndim} numbers, not {dim}")
        vectors._index.expansion_add, vectors._index.expansion_search = EXPANSION_ADD, EXPANSION
        return vectors

    def __len__(self) -> int:
        return len(self._index)

    def keys(self) -> np.ndarray:
        """Return the keys, uint64 (n,), in no particular order."""
        return np.asarray(self._index.keys)

    def get(self, keys: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the vectors float16 (n, dim) with these keys, all of which must exist."""
        return np.concatenate([row.reshape(1, -1) for row in self._index.get(np.asarray(keys, np.uint64))])

    def add(self, keys: Sequence[int] | np.ndarray, vectors: np.ndarray) -> None:
        """Add (n, dim) vectors with new keys, on one thread: parallel insertion leaves vectors and parts of the graph
        unreachable (https://github.com/unum-cloud/USearch/pull/772).

        Raises:
            ValueError: when memory runs out.
        """
        with _faults("no room for more vectors"):
            self._index.add(np.asarray(keys, np.uint64), vectors, threads=1)

    def remove(self, keys: Sequence[int] | np.ndarray) -> None:
        """Remove vectors by key."""
        if len(keys):
            self._index.remove(np.asarray(keys, np.uint64))

    def save(self, path: Path) -> None:
        """Write all vectors to a file, synced to disk.

        Raises:
            ValueError: when it cannot be written.
        """
        with _faults(f"cannot write {path}"):
            self._index.save(path)
            flush(path)

    def search(self, queries: np.ndarray, k: int, exact: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return for each of the (n, dim) queries the keys of its `k` nearest vectors (or of all, if fewer) and their
        cosines, best first.

        Args:
            exact: compare every vector; otherwise follow the graph, which may miss some.
        """
        queries, k = np.asarray(queries, np.float32), min(k, len(self))
        found = self._index.search(queries, k, exact=exact)
        rows = [found] if len(queries) == 1 else [found[i] for i in range(len(queries))]
        if any(len(row.keys) < k for row in rows):  # the graph alone may not reach all of them
            return self.search(queries, k, exact=True)
        return [row.keys for row in rows], [1 - row.distances for row in rows]


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError:
        raise ValueError("search needs USearch: pip install tinyclip[search]") from None
    return usearch.index


@contextmanager
def _faults(what: str) -> Iterator[None]:
    """Turn USearch's errors into one-line messages."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        raise ValueError(f"{what} ({str(error) or type(error).__name__})") from None
