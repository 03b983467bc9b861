"""A folder has one writer at a time, even if the file system has no locks (NFS without lockd)."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.outputs import call
from tinyclip.common import locks
from tinyclip.common.locks import LOCK, lock_of, take

LEASE = f"{LOCK}.lease"
REFUSED = "another `tinyclip embed` is running here"
# A process without locks that runs the remaining arguments.
WITHOUT = """
import errno, fcntl, os, signal, socket, sys, time
from pathlib import Path
from tinyclip.common import locks
from tinyclip.common.locks import Lock, lock_of, take

def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

fcntl.flock = flock
locks.LEASE, locks.HEARTBEAT = 1.0, 0.1
folder = Path(sys.argv[1])
"""
HOLDER = "take(lock_of(folder), 'tinyclip embed'); print('held', flush=True); sys.stdin.read()"


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "LEASE", 1.0)
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    monkeypatch.setattr(locks, "PATIENCE", 0.2)


def process(script: str, folder: Path) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", WITHOUT + script, str(folder)], text=True, **pipes)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def holder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a folder, on this machine or another."""
    elsewhere = "socket.gethostname = lambda: 'elsewhere'\n" if request.param == "elsewhere" else ""
    begun = process(elsewhere + HOLDER, tmp_path)
    assert begun.stdout is not None and begun.stdout.readline() == "held\n"
    yield begun
    begun.kill()
    begun.communicate()


def test_a_file_says_who_is_at_work(no_locks: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = lock_of(tmp_path), lock_of(tmp_path)
    take(first, "tinyclip embed")
    with pytest.raises(ValueError, match=REFUSED):
        take(second, "tinyclip embed")
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "this file system has no locks" in said and LEASE in said
    assert str(os.getpid()) in (tmp_path / LEASE).read_text()
    first.release()
    take(second, "tinyclip embed")
    second.release()
    assert not (tmp_path / LEASE).exists() and not capfd.readouterr().err


@pytest.mark.parametrize("no_locks", [errno.ENOLCK], indirect=True)
@pytest.mark.parametrize("holder", ["here", "elsewhere"], indirect=True)
def test_who_was_killed_is_followed_and_who_lives_is_not(
    no_locks: None, holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    """A killed holder on this machine is replaced at once; one on another machine once its heartbeat stops."""
    with pytest.raises(ValueError, match=REFUSED):
        take(lock_of(tmp_path), "tinyclip embed")
    begun = (tmp_path / LEASE).stat().st_mtime
    while (tmp_path / LEASE).stat().st_mtime < begun + 1.2:  # longer than a lease lasts without a heartbeat
        time.sleep(0.05)
    with pytest.raises(ValueError, match=REFUSED):
        take(lock_of(tmp_path), "tinyclip embed")
    holder.kill()
    holder.wait()
    lock = lock_of(tmp_path)
    take(lock, "tinyclip embed")
    lock.release()


def test_one_of_several_that_start_at_once_has_it(tmp_path: Path) -> None:
    script = """
for _ in range(30):
    with Lock(folder / ".lock"):
        os.close(os.open(folder / "busy", os.O_CREAT | os.O_EXCL))  # fails where another one is in
        os.unlink(folder / "busy")
"""
    several = [process(script, tmp_path) for _ in range(3)]
    for one in several:
        _, errors = one.communicate()
        assert one.returncode == 0, errors
    assert not (tmp_path / LEASE).exists()


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError"])
def test_it_is_released_as_a_process_ends(end: str, tmp_path: Path) -> None:
    held = process(f"take(lock_of(folder), 'x')\nassert (folder / '{LEASE}').exists()\n{end}", tmp_path)
    held.communicate()
    assert held.returncode == {"": 0, "sys.exit(3)": 3}.get(end, 1) and not (tmp_path / LEASE).exists()


def test_a_forked_worker_does_not_give_it_away(tmp_path: Path) -> None:
    script = f"""
lock = lock_of(folder)
take(lock, 'x')
child = os.fork()
if not child:
    sys.exit(0)  # at which a process gives back what it holds
assert os.waitpid(child, 0)[1] == 0
assert (folder / '{LEASE}').exists()
lock.release()
assert not (folder / '{LEASE}').exists()
"""
    forking = process(script, tmp_path)
    _, errors = forking.communicate()
    assert forking.returncode == 0, errors


@pytest.mark.parametrize("no_locks", [errno.ENOLCK], indirect=True)
@pytest.mark.parametrize("command", ["cache", "embed", "index", "pack"])
def test_commands_work_without_locks(no_locks: None, command: str, place: Path, tmp_path: Path) -> None:
    call(place, command, tmp_path / "out")
    assert not list(tmp_path.rglob("*.lease"))
    call(place, command, tmp_path / "out", "--overwrite")


def test_another_error_of_the_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match=r"cannot write to .*: Input/output error"):
        take(lock_of(tmp_path), "tinyclip embed")
    assert not (tmp_path / LEASE).exists()
