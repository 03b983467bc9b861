"""One writer to a folder at a time."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"  # the file's name in the folder
PATIENCE = 5.0  # seconds for the processes of a run that was killed to end


def lock_of(folder: Path, patience: float | None = None) -> FileLock:
    """The folder's lock, not held yet; to be released by whoever takes it, from any thread."""
    return FileLock(folder / LOCK, timeout=PATIENCE if patience is None else patience, thread_local=False)


def take(lock: FileLock, command: str) -> None:
    """Make the folder and hold its lock.

    Raises:
        ValueError: when another process holds it, or the folder cannot be written.
    """
    folder = Path(lock.lock_file).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(f"{folder}: another `{command}` is at work here; wait for it or stop it") from None
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from None
