"""Create and update an index of a folder's pictures, which `search.py` reads.

Results go straight into `work.sqlite` and from there into the next state, so a killed run loses at most one batch of
pictures. A picture with unchanged size and time is not read again, whether good or damaged; one that could not be
reached, for example on an unmounted disk, is tried again.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tinyclip.common import faults
from tinyclip.common.faults import Fault, Skipped, Unusable
from tinyclip.common.files import check_utf8, checksum, flush, json_text, write_atomically
from tinyclip.common.folders import remove_leftovers
from tinyclip.common.locks import lock_of, take
from tinyclip.common.ownership import check_replaceable, claim, drop, is_free, read_marker
from tinyclip.data.picture_files import LeftOut, because, find_pictures, skipped_of
from tinyclip.inputs.batching import ahead, batches, check_finite
from tinyclip.search.index import (
    COLUMNS,
    FORMAT,
    INFO,
    WORK,
    check_model,
    check_size,
    open_list,
    pixels,
    plain,
    read_facts,
    shown,
    told,
)
from tinyclip.search.pending import Pending, Row, State, began
from tinyclip.search.vectors import WASTE, Vectors

SKIPPED = "skipped.jsonl"
STATE = re.compile(r"(?:vectors|pictures)-(\d+)\.(?:usearch|sqlite)")  # file names of a state
PUBLISH = 50_000  # new pictures after which a state is published, before the rest is computed
AT_ONCE = 2_000  # vectors added to the graph between two progress reports
AGAIN: State = (-1, -1)  # of an unreachable picture; matches no file, so the next run tries again
MENDABLE = {"needs_extra", "huge_image"}  # faults fixed without changing the file: by an installation, by --max-pixels
Progress = Callable[[str, int, int], None]  # task, number done, total


@dataclass(frozen=True)
class Folder:
    """A folder and the pictures below it."""

    root: Path
    files: dict[str, State]  # by path relative to the root, with `/`
    left_out: list[Skipped] = field(default_factory=list)  # places that were not searched for pictures


def scan(folder: str | Path) -> Folder:
    """Find the pictures below a folder, by file extension.

    Raises:
        ValueError: when the folder does not exist or holds no pictures.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    root = Path(folder).absolute()  # links are not resolved
    start, files, left_out = len(root.as_posix().rstrip("/")) + 1, {}, list[LeftOut]()
    for path in find_pictures(root, left_out):
        try:
            state = path.stat()
        except OSError as error:  # deleted meanwhile, or a broken or circular link
            left_out.append((path, Fault("no_image", f"cannot be read ({error.strerror})")))
            continue
        if stat.S_ISREG(state.st_mode):
            files[path.as_posix()[start:]] = (state.st_size, state.st_mtime_ns)
        else:
            left_out.append((path, Fault("no_image", "a pipe or a device, not a file")))
    if not files:
        raise ValueError(f"{folder}: contains no pictures{because(left_out)}")
    return Folder(root, files, skipped_of(left_out, root))


def check(folder: Folder, out: str | Path, *, overwrite: bool = False, moved: bool = False) -> None:
    """Reject, without loading a model, what `build` would refuse.

    Raises:
        ValueError: as `build`.
    """
    out = Path(out)
    Vectors(1)  # fails if USearch is not installed
    check_utf8(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a folder for the index")
    there = (out / INFO).exists()
    if not there and not is_free(out) and read_marker(out) is None and not began(out / WORK):
        raise ValueError(f"{out} is not empty and holds no index; choose another folder")
    if overwrite and there:
        check_replaceable(out, "index")
    if (out / INFO).exists() and not overwrite:
        before = Path(read_facts(out)["root"])
        if before != folder.root and not (moved or before.resolve() == folder.root.resolve()):
            raise ValueError(
                f"{out} is the index of {before}, not of {folder.root}; use --moved if the folder has moved, "
                "or --overwrite to rebuild the index"
            )


def build(
    clip: Any,
    folder: str | Path | Folder,
    out: str | Path,
    *,
    model: str,
    fingerprint: str,
    overwrite: bool = False,
    moved: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Create the index `out` of a folder, or update it: add new pictures, recompute changed ones (by size and time),
    and remove those that no longer exist.

    Until the new state is complete, searches use the previous one; a first index becomes searchable after every
    50,000 pictures.

    Args:
        clip: the result of `tinyclip.load`.
        model: name with which `tinyclip search` reloads it; `fingerprint` as returned by `index.open_model`.
        overwrite: recompute everything; the existing index is replaced once that is done.
        moved: accept that the indexed folder is now at another path.
        workers: number of decoding threads.

    Returns:
        The content of `index.json`, and this run's `added`, `changed`, `removed`, `kept`, `computed`, `images_per_s`.

    Raises:
        ValueError: when the index belongs to another folder or model, is damaged, is being written or not writable, or
            no picture can be read.
    """
    folder, out = folder if isinstance(folder, Folder) else scan(folder), Path(out)
    check(folder, out, overwrite=overwrite, moved=moved)
    lock = lock_of(out)
    take(lock, "tinyclip index")
    try:
        claim(out, "index", (INFO, SKIPPED, WORK, f"{WORK}-wal", f"{WORK}-shm"))
        dim = plain(clip.encode_text("a")).shape[1]
        facts = {"format": FORMAT, "model": model, "model_fingerprint": fingerprint, "embed_dim": dim}
        writer = _Writer(out, folder, facts | {"root": str(folder.root)}, overwrite and (out / INFO).exists(), progress)
        computing = {"computed_in": clip.computing["dtype"], "model_fingerprint": fingerprint}
        with closing(Pending(out / WORK, computing)) as pending:
            return writer.run(pending, lambda todo: _rows(clip, folder, todo, batch_size, workers))
    finally:
        lock.release()


# --- computing ---------------------------------------------------------------------------------------------------


def _rows(
    clip: Any, folder: Folder, todo: Sequence[str], batch_size: int | None, workers: int | None
) -> Iterator[list[Row]]:
    """Yield batches of rows, in order."""

    def decode(path: str) -> tuple[np.ndarray | Skipped, State]:
        file, state = folder.root / path, folder.files[path]
        try:
            return pixels(clip, file), state
        except Fault as fault:
            found = Skipped("", path, fault.cause, fault.reason.removeprefix(f"{file}: "))
            return found, AGAIN if fault.cause in MENDABLE else state
        except ValueError as error:  # a disk or permission error
            return Skipped("", path, "corrupt_image", str(error).removeprefix(f"{file}: ")), AGAIN

    decoded = zip(todo, ahead(decode, todo, workers), strict=True)
    for some in batches(decoded, clip.batch_size(batch_size)):
        good = [found for _, (found, _) in some if isinstance(found, np.ndarray)]
        features = plain(clip.encode_image(good)).astype(np.float16) if good else np.empty(0, np.float16)
        check_finite(features)
        rest, rows = iter(features), []
        for path, (found, state) in some:
            if isinstance(found, Skipped):
                rows.append(Row(path, state, None, found))
            else:
                rows.append(Row(path, state, next(rest)))
        yield rows


# --- states ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A picture in the current state."""

    id: int
    state: State
    good: bool  # whether it has features


@dataclass
class _Writer:
    """Takes an index from one state to the next."""

    out: Path
    folder: Folder
    facts: dict[str, Any]  # for the states it writes
    replacing: bool  # the existing state stays until all is done, but is not reused
    progress: Progress
    before: dict[str, Any] | None = None  # previous content of index.json, if it is reused
    have: dict[str, Entry] = field(default_factory=dict)
    vectors: Vectors | None = None  # the current state's vectors, in memory
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("added", "changed", "removed"), 0))

    def run(self, pending: Pending, rows_of: Callable[[Sequence[str]], Iterator[list[Row]]]) -> dict[str, Any]:
        self._start()
        files, waiting = self.folder.files, pending.states()
        stale = [p for p, state in waiting.items() if files.get(p) != state or self._has(p)]
        pending.drop(stale)
        for path in stale:
            del waiting[path]
        todo = [path for path in files if path not in waiting and not self._has(path)]
        kept = sum(entry.good for path, entry in self.have.items() if self._has(path))
        start, computed = time.perf_counter(), 0
        count = len(waiting)
        self.progress("computing", 0, len(todo))
        for rows in rows_of(todo):
            news = [row for row in rows if row.state != AGAIN or not self._is_known(row.path)]
            pending.put(news)
            computed, count = computed + len(rows), count + len(news)
            self.progress("computing", computed, len(todo))
            if count >= PUBLISH and not self.replacing and computed < len(todo):
                self._publish(pending)
                count = 0
        seconds = time.perf_counter() - start
        if count or self.before is None or any(path not in files for path in self.have):
            self._publish(pending)
        elif any(self.before.get(key) != value for key, value in self.facts.items()):
            self._switch(self.before | self.facts)  # the folder moved, or the model was renamed
        assert self.before
        skipped = [*self.folder.left_out, *_skipped(self.out / self.before["list"])]
        write_atomically(self.out / SKIPPED, "".join(json_text(asdict(s)) + "\n" for s in skipped))
        told: dict[str, Any] = self.counts | {"kept": kept, "computed": computed}
        told |= {"skipped": len(skipped), "skipped_by_cause": faults.counts(skipped)}
        return self.before | told | {"images_per_s": computed / seconds if computed else None}

    def _has(self, path: str) -> bool:
        entry = self.have.get(path)
        return entry is not None and entry.state == self.folder.files.get(path)

    def _is_known(self, path: str) -> bool:
        """Whether the current state already records that the picture was unreachable."""
        entry = self.have.get(path)
        return entry is not None and entry.state == AGAIN

    def _start(self) -> None:
        """Read the existing state, and clean up after a killed run."""
        if (self.out / INFO).exists() and not self.replacing:
            facts = read_facts(self.out)
            check_model(facts, self.out, self.facts["model"], self.facts["model_fingerprint"])
            self._check_whole(facts)
            self.before, self.have = facts, _entries(self.out / facts["list"])
        marker = read_marker(self.out)
        known = {name for name in (marker.files if marker else ()) if STATE.fullmatch(name)}
        drop(self.out, known - _state_files(self.out))
        remove_leftovers(self.out)

    def _check_whole(self, facts: dict[str, Any]) -> None:
        """Check that the existing state is undamaged before building on it."""
        file = self.out / facts["vectors"]
        try:
            check_size(self.out, facts)
            damaged = checksum(file) != facts["vectors_state"][1] or not (self.out / facts["list"]).exists()
        except FileNotFoundError:
            damaged = True
        if damaged:
            raise ValueError(
                f"{self.out} is damaged: {file.name} has changed since it was written; rebuild it with --overwrite"
            )

    def _publish(self, pending: Pending) -> None:
        """Write the next state: the current one without removed and recomputed pictures, plus the pending ones."""
        waiting, number = pending.states(), self._number()
        gone = {p: e for p, e in self.have.items() if p not in self.folder.files or p in waiting}
        holes, vectors = self._without([entry.id for entry in gone.values() if entry.good])
        file, pictures = self.out / f"vectors-{number}.usearch", self.out / f"pictures-{number}.sqlite"
        claim(self.out, "index", (file.name, pictures.name))
        try:
            added = self._fill(pictures, vectors, gone, pending, len(waiting))
            skipped = _skipped(pictures)
            by_cause = faults.counts(skipped)
            if not len(vectors):
                first = f"{faults.summary(by_cause)}; the first: {skipped[0]}"
                raise Unusable(f"{self.folder.root}: nothing in it can be read: {first}")
            vectors.save(file)
        except Exception:  # no readable picture, or a full disk
            drop(self.out, (file.name, pictures.name))
            raise
        facts = self.facts | {"state": number, "vectors": file.name, "list": pictures.name, "holes": holes}
        facts |= {"vectors_state": [file.stat().st_size, checksum(file)], "pictures": len(vectors)}
        self._switch(facts | {"skipped": len(skipped), "skipped_by_cause": by_cause})
        pending.drop()
        now, was = ({p for p, e in entries.items() if e.good} for entries in (added, gone))
        for name, paths in (("added", now - was), ("changed", now & was), ("removed", was - now)):
            self.counts[name] += len(paths)
        self.vectors, self.have = vectors, {p: e for p, e in self.have.items() if p not in gone} | added

    def _fill(
        self, pictures: Path, vectors: Vectors, gone: dict[str, Entry], pending: Pending, total: int
    ) -> dict[str, Entry]:
        """Write the next state's list, add the features to `vectors`, and return what was added."""
        added = dict[str, Entry]()
        next_id = max((entry.id for entry in self.have.values()), default=-1) + 1
        if self.before:
            shutil.copyfile(self.out / self.before["list"], pictures)
        with told(pictures), closing(sqlite3.connect(pictures)) as database:
            database.execute("PRAGMA journal_mode = OFF")  # nothing refers to the file until it is complete
            database.execute("PRAGMA synchronous = OFF")
            database.execute(f"CREATE TABLE IF NOT EXISTS pictures ({COLUMNS})")
            database.executemany("DELETE FROM pictures WHERE id = ?", [(entry.id,) for entry in gone.values()])
            for some in batches(pending.rows(), AT_ONCE):
                ids = range(next_id + len(added), next_id + len(added) + len(some))
                database.executemany("INSERT INTO pictures VALUES (?, ?, ?, ?, ?, ?)", map(_record, ids, some))
                good = [(key, row.features) for key, row in zip(ids, some, strict=True) if row.features is not None]
                if good:
                    vectors.add([key for key, _ in good], np.stack([features for _, features in good]))
                added |= {
                    row.path: Entry(key, row.state, row.fault is None) for key, row in zip(ids, some, strict=True)
                }
                self.progress("linking", len(added), total)
            database.commit()
        flush(pictures)
        return added

    def _without(self, ids: Sequence[int]) -> tuple[int, Vectors]:
        """Load the current vectors without some of them; also return how many removed ones remain in the graph."""
        if self.before is None:
            return 0, Vectors(self.facts["embed_dim"])
        vectors = self.vectors or Vectors.open(self.out / self.before["vectors"], self.facts["embed_dim"], view=False)
        holes = self.before["holes"] + len(ids)
        vectors.remove(ids)
        if holes <= WASTE * len(vectors):
            return holes, vectors
        rebuilt, keys = Vectors(self.facts["embed_dim"]), np.sort(vectors.keys())
        for start in range(0, len(keys), AT_ONCE):
            some = keys[start : start + AT_ONCE]
            rebuilt.add(some, vectors.get(some))
            self.progress("rebuilding the graph", min(start + AT_ONCE, len(keys)), len(keys))
        return 0, rebuilt

    def _number(self) -> int:
        found = [STATE.fullmatch(path.name) for path in self.out.iterdir()]
        return max([int(name[1]) for name in found if name], default=0) + 1

    def _switch(self, facts: dict[str, Any]) -> None:
        """Make a state the current one, and remove the previous one's files."""
        before = _state_files(self.out)
        write_atomically(self.out / INFO, json_text(facts, indent=2) + "\n")
        flush(self.out)
        self.before = facts
        # Windows cannot remove files that are being read; a later run will.
        drop(self.out, before - {facts["vectors"], facts["list"]})


def _state_files(out: Path) -> set[str]:
    """Return the current state's files; none if there is no state, or a damaged one that will be replaced."""
    with suppress(ValueError):
        facts = read_facts(out)
        return {name for name in (facts["vectors"], facts["list"]) if STATE.fullmatch(name)}
    return set()


def _record(key: int, row: Row) -> tuple[Any, ...]:
    cause, reason = (row.fault.cause, row.fault.reason) if row.fault else (None, None)
    return key, os.fsencode(row.path), *row.state, cause, reason


def _entries(pictures: Path) -> dict[str, Entry]:
    with told(pictures), closing(open_list(pictures)) as database:
        found = database.execute("SELECT id, path, size, mtime_ns, cause FROM pictures")
        return {os.fsdecode(path): Entry(key, (size, time), cause is None) for key, path, size, time, cause in found}


def _skipped(pictures: Path) -> list[Skipped]:
    with told(pictures), closing(open_list(pictures)) as database:
        found = database.execute("SELECT path, cause, reason FROM pictures WHERE cause IS NOT NULL ORDER BY path")
        return [Skipped("", shown(os.fsdecode(path)), cause, reason) for path, cause, reason in found]
