"""A write that fails gives a one-line error that names the path, and leaves nothing behind."""

from __future__ import annotations

import errno
import gzip
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import tinyclip
from tests.helpers.outputs import call, tree
from tests.helpers.shards import good, write_shard
from tinyclip.common import files
from tinyclip.common.files import append_text, replacing, write_atomically
from tinyclip.data.shard_index import prepare

FULL = os.strerror(errno.ENOSPC)


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, FULL)


@pytest.mark.parametrize("output", ["/proc/out.png", "photo.jpg/out.png", "folder.png"])
def test_an_impossible_output_is_named(output: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("a file")
    (tmp_path / "folder.png").mkdir()
    path = Path(output) if output.startswith("/") else tmp_path / output
    where = str(path) if output == "folder.png" else str(path.parent.resolve())
    for words in (
        ["structure", place / "teacher", "-o", path],
        ["evaluate", place / "teacher", place / "eval", "-o", path],
        ["report", place, "-o", path],
        ["search", place, "cat", "--sheet", path],
        ["compare", place / "teacher", place / "other", "--data", place / "eval", "-o", path, "--overwrite"],
        ["inherit", place / "teacher", path, "--shape", "text.layers=1", "--overwrite"],
    ):
        if output == "folder.png" and words[0] in ("compare", "inherit"):
            continue  # it may be an empty folder
        error = tinyclip(*words, code=2)
        assert where in error and "[Errno" not in error and error.count("\n") == 1, words
    assert tree(tmp_path) == {"photo.jpg": b"a file", "folder.png": None}


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    before = Path("/dev/full").stat()
    with pytest.raises(ValueError, match=f"cannot write /dev/full: {FULL}"):
        write_atomically("/dev/full", "text")
    write_atomically("/dev/null", "text")
    assert Path("/dev/full").stat().st_rdev == before.st_rdev and not list(Path("/dev").glob(".full*"))


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("command", [("zoo",), ("structure", "teacher"), ("zoo", "--json")])
def test_a_full_disk_behind_the_output_is_one_line(command: tuple[str, ...], place: Path) -> None:
    with Path("/dev/full").open("w") as output:
        run = [sys.executable, "-m", "tinyclip", *command]
        ended = subprocess.run(run, stdout=output, stderr=subprocess.PIPE, text=True, cwd=place)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and FULL in ended.stderr


def test_a_full_disk_leaves_no_half_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(ValueError, match=f"cannot write .*file: {FULL}"):
        write_atomically(tmp_path / "file", "new")
    with pytest.raises(ValueError, match=f"cannot write .*file: {FULL}"), replacing(tmp_path / "file"):
        full()
    assert tree(tmp_path) == {"file": b"old"}
    with pytest.raises(ValueError, match=f"cannot write /dev/full: {FULL}"):
        append_text(Path("/dev/full"), "line\n" * 9999)


def test_a_full_disk_leaves_nothing_of_the_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "0.tar", [good(i) for i in range(3)])
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    (tmp_path / "0.tar").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(files, "flush", full)
        with pytest.raises(ValueError, match=f"cannot write .*0.tar: {FULL}"):
            prepare(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"0.tar.gz", ".prepare.lock"}
    assert prepare(tmp_path) == 3


@pytest.mark.parametrize("command", ["inherit", "pack", "cache", "embed", "index", "compare"])
def test_a_full_disk_ends_a_command_in_one_line(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("common.files", "common.folders", "search.vectors", "search.build", "teachers.make_cache")
    modules = [import_module(f"tinyclip.{name}") for name in (*names, "search.feature_files")]
    for module in modules:  # only now: a module imported after the first patch would keep the patched function
        monkeypatch.setattr(module, "flush", full)
    error = call(place, command, tmp_path / "out", code=2).splitlines()[-1]
    assert re.search(f"cannot write {place / 'data' if command == 'cache' else tmp_path / 'out'}.*: {FULL}$", error)
    assert ".tmp" not in error
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_an_index_that_is_not_ours_is_not_written_over(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [good(i) for i in range(3)])
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CaptioningWebdataset")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"\.nv-meta was not written by tinyclip.*move it away"):
        prepare(tmp_path)
    assert tree(tmp_path) == before
