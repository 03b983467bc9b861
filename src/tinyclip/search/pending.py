"""What runs of `tinyclip index` have computed and no state of the index holds yet: one SQLite file. No torch here."""

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

State = tuple[int, int]  # of a file: size in bytes, time of its last change in ns


@dataclass(frozen=True)
class Row:
    """A picture's features, or why it has none."""

    path: str
    state: State
    features: np.ndarray | None  # float16 (embed_dim,)
    fault: Skipped | None = None


def began(path: Path) -> bool:
    """Whether a file is the work of a first `tinyclip index` that has not come to an end; it is not changed."""
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error:
        return False
    return tables <= {"facts", "rows"}


class Pending:
    """What was computed and is in no state yet."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Go on with what is there, if it was computed in the same way."""
        self.path, said = path, json.dumps(facts, sort_keys=True)
        try:
            self._open()
            same = self._db.execute("SELECT said FROM facts").fetchall() == [(said,)]
        except sqlite3.OperationalError as error:  # a full disk, for one: what is there is still good
            raise ValueError(f"{path}: {error}") from None
        except sqlite3.DatabaseError:  # of a run that lost its disk: computed again
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
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")  # so that no shared memory is needed: network disks
        self._db.execute("PRAGMA journal_mode = WAL")  # a commit costs no wait for the disk and survives a kill
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
        """Leave what is there; nothing when nothing is."""
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
        """Take out those of some paths, or all."""
        with told(self.path), self._db:
            if paths is None:
                self._db.execute("DELETE FROM rows")
            else:
                self._db.executemany("DELETE FROM rows WHERE path = ?", [(os.fsencode(path),) for path in paths])
