"""Results of `tinyclip index` that are not in any state of the index yet, in one SQLite file. No torch here."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyclip.common.faults import Skipped
from tinyclip.search.index import told

State = tuple[int, int]  # of a file: size in bytes, modification time in ns


@dataclass(frozen=True)
class Row:
    """A picture's features, or the reason it has none."""

    path: str
    state: State
    features: np.ndarray | None  # float16 (embed_dim,)
    fault: Skipped | None = None


def began(path: Path) -> bool:
    """Whether a file comes from an unfinished first `tinyclip index`; does not change it."""
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error:
        return False
    return tables <= {"facts", "rows"}


class Pending:
    """Results that are not in any state yet."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Continue with existing results if they were computed with the same settings."""
        self.path, said = path, json.dumps(facts, sort_keys=True)
        try:
            self._open()
            same = self._db.execute("SELECT said FROM facts").fetchall() == [(said,)]
        except sqlite3.OperationalError as error:  # for example a full disk: existing results are still good
            raise ValueError(f"{path}: {error}") from None
        except sqlite3.DatabaseError:  # damaged by a run that lost its disk: recompute
            self._remove()
            with told(path):
                self._open()
            same = False
        if not same:
            with told(path), self._db:
                self._db.execute("DELETE FROM rows")
                self._db.execute("DELETE FROM facts")
                self._db.execute("INSERT INTO facts VALUES (?)", (said,))

    def _open(self) -> None:
        self._db = sqlite3.connect(self.path)
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")  # needs no shared memory, so it works on network disks
        self._db.execute("PRAGMA journal_mode = WAL")  # commits survive a kill without waiting for the disk
        self._db.execute("PRAGMA synchronous = NORMAL")
        with self._db:
            self._db.execute("CREATE TABLE IF NOT EXISTS facts (said TEXT)")
            columns = "path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, cause TEXT, reason TEXT, features BLOB"
            self._db.execute(f"CREATE TABLE IF NOT EXISTS rows ({columns})")

    def _remove(self) -> None:
        self._db.close()
        for file in (self.path, self.path.with_name(f"{self.path.name}-wal")):
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file, and remove it if it is empty."""
        with told(self.path):
            if self._db.execute("SELECT 1 FROM rows").fetchone():
                self._db.close()
            else:
                self._remove()

    def states(self) -> dict[str, State]:
        with told(self.path):
            found = self._db.execute("SELECT path, size, mtime_ns FROM rows")
            return {os.fsdecode(path): (size, mtime) for path, size, mtime in found}

    def put(self, rows: Sequence[Row]) -> None:
        values = []
        for row in rows:
            why = (row.fault.cause, row.fault.reason) if row.fault else (None, None)
            blob = None if row.features is None else row.features.tobytes()
            values.append((os.fsencode(row.path), *row.state, *why, blob))
        with told(self.path), self._db:
            self._db.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?, ?, ?)", values)

    def rows(self) -> Iterator[Row]:
        with told(self.path):
            for path, size, mtime, cause, reason, blob in self._db.execute("SELECT * FROM rows"):
                name = os.fsdecode(path)
                features = None if blob is None else np.frombuffer(blob, np.float16)
                yield Row(name, (size, mtime), features, Skipped("", name, cause, reason) if cause else None)

    def drop(self, paths: Sequence[str] | None = None) -> None:
        """Remove the results of some paths, or all."""
        with told(self.path), self._db:
            if paths is None:
                self._db.execute("DELETE FROM rows")
            else:
                self._db.executemany("DELETE FROM rows WHERE path = ?", [(os.fsencode(path),) for path in paths])
