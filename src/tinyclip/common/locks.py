"""Locks that allow one writer per folder at a time, on any file system."""

from __future__ import annotations

import atexit
import errno
import sys
from pathlib import Path
from types import TracebackType

from filelock import FileLock, SoftFileLease, Timeout

LOCK = ".lock"  # the file's name in the folder
PATIENCE = 5.0  # seconds to wait for the processes of a killed run to end
NO_LOCKS = {
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
}  # NFS without lockd, and some FUSE file systems
LEASE = 60.0  # seconds after the last heartbeat of a holder on another machine before its lock is taken over
HEARTBEAT = 10.0  # seconds between heartbeats

_said: set[Path] = set()  # folders without locks, already warned about


class Lock:
    """A lock on a file, not yet held; its holder must release it, from any thread.

    On a file system without locks, a lease file next to it names the holder (process and machine), and its mtime shows
    that the holder is alive. The lease of a dead process is taken over at once, one of another machine after `LEASE`.
    """

    def __init__(self, file: Path, patience: float = -1) -> None:
        """Wait at most `patience` seconds for the current holder; forever when negative."""
        self.file, self._patience = file, patience
        self._native = FileLock(file, timeout=patience, thread_local=False, fallback_to_soft=False)
        self._lease: SoftFileLease | None = None

    def acquire(self) -> None:
        """Take the lock; raises `Timeout` when it is held for longer, `OSError` when the file cannot be written."""
        try:
            self._native.acquire()
        except Timeout:
            raise
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._say(error)
            self._acquire_lease()

    def _acquire_lease(self) -> None:
        place = self.file.with_name(f"{self.file.name}.lease")
        lease = SoftFileLease(
            place, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, thread_local=False, timeout=self._patience
        )
        try:
            lease.acquire()
        except Timeout:  # the holder may have died on another machine; if not, its next heartbeat is due
            before = _changed(place)
            lease.acquire(timeout=LEASE + HEARTBEAT, cancel_check=lambda: _changed(place) not in (before, None))
        self._lease = lease
        atexit.register(self.release)

    def _say(self, error: OSError) -> None:
        folder = self.file.parent.absolute()
        if folder not in _said:
            _said.add(folder)
            how = f"{self.file.name}.lease shows who is using it"
            print(f"{folder}: this file system has no locks ({error.strerror}); {how}", file=sys.stderr)

    def release(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None
            atexit.unregister(self.release)
        self._native.release()

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _changed(file: Path) -> int | None:
    """Return the mtime in ns; None when the file is gone."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def lock_of(folder: Path, patience: float | None = None) -> Lock:
    """Return the folder's lock, not yet held."""
    return Lock(folder / LOCK, PATIENCE if patience is None else patience)


def take(lock: Lock, command: str) -> None:
    """Create the folder and take its lock.

    Raises:
        ValueError: when another process holds it, or the folder cannot be written.
    """
    folder = lock.file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(f"{folder}: another `{command}` is running here; wait for it or stop it") from None
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from None
