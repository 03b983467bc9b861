"""Many features in one file, and the nearest of them: a thin layer over USearch, the only place that knows it.

A file is searched through a memory map: its pages are the system's cache, shared by all who search it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tinyclip.common.files import flush

# By measurement (docs/search.md, benchmarks/search.py).
DTYPE = "f16"
CONNECTIVITY = 16  # neighbours of a vector in the graph
EXPANSION_ADD = 128  # candidates looked at when one is added
EXPANSION = 512  # and when one is searched
EXACT = 100_000  # up to so many vectors every one is compared: that takes milliseconds, and misses nothing
WASTE = 0.25  # of removed vectors, until the graph is made anew


class Vectors:
    """Vectors of `dim` numbers under whole numbers from 0 as keys, compared by their cosine."""

    def __init__(self, dim: int) -> None:
        """None yet; `add` some.

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
        """Those of a file that `save` wrote.

        Args:
            view: only to be searched, through a memory map; else read into memory, to be changed.

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
        """uint64 (n,), in no particular order."""
        return np.asarray(self._index.keys)

    def get(self, keys: Sequence[int] | np.ndarray) -> np.ndarray:
        """The vectors float16 (n, dim) under these keys, all of which must be there."""
        return np.concatenate([row.reshape(1, -1) for row in self._index.get(np.asarray(keys, np.uint64))])

    def add(self, keys: Sequence[int] | np.ndarray, vectors: np.ndarray) -> None:
        """Put in (n, dim) vectors under new keys.

        Raises:
            ValueError: when there is no memory for them.
        """
        with _faults("no place for more vectors"):
            self._index.add(np.asarray(keys, np.uint64), vectors)

    def remove(self, keys: Sequence[int] | np.ndarray) -> None:
        """Take out vectors by their keys."""
        if len(keys):
            self._index.remove(np.asarray(keys, np.uint64))

    def save(self, path: Path) -> None:
        """Write all to a file, down to the disk.

        Raises:
            ValueError: when it cannot be written.
        """
        with _faults(f"cannot write {path}"):
            self._index.save(path)
            flush(path)

    def search(self, queries: np.ndarray, k: int, exact: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """For each of the (n, dim) queries the keys of its `k` nearest, or of all when there are fewer, and their
        cosines, best first.

        Args:
            exact: compare every vector; else follow the graph, which may miss some.
        """
        queries, k = np.asarray(queries, np.float32), min(k, len(self))
        found = self._index.search(queries, k, exact=exact)
        rows = [found] if len(queries) == 1 else [found[i] for i in range(len(queries))]
        if any(len(row.keys) < k for row in rows):  # by the graph alone not all can be reached
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
    """USearch's errors in one line."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        raise ValueError(f"{what} ({str(error) or type(error).__name__})") from None
