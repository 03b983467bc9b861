from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.helpers.server import FileServer, serving
from tinyclip.common import download
from tinyclip.common.download import CHUNK, check, fetch, partial_size, read_record
from tinyclip.common.progress import listening

OLD, NEW = random.Random(0).randbytes(400_000), random.Random(1).randbytes(400_000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(download, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(download, "CHUNK", 10_000)
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as running:
        running.files["model.pt"] = OLD
        yield running


def get(server: FileServer, folder: Path) -> Path:
    return fetch(f"{server.address}/release/model.pt", folder / "model.pt")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def stopped(server: FileServer, folder: Path, size: int = 150_000) -> None:
    """Leave a download that was interrupted after `size` bytes."""
    server.cuts, server.answers = [size], [200] + [503] * 9
    with pytest.raises(ValueError, match=r"cannot download model\.pt"):
        get(server, folder)
    server.answers.clear()
    server.log.clear()
    assert partial_size(folder / "model.pt") == size


def test_a_download_is_recorded(server: FileServer, tmp_path: Path) -> None:
    path = get(server, tmp_path / "new" / "cache")
    assert path.read_bytes() == OLD
    assert names(path.parent) == ["model.pt", "model.pt.json"]
    record = read_record(path)
    assert record is not None
    assert (record["sha256"], record["size"]) == (sha256(OLD).hexdigest(), len(OLD))
    assert record["url"] == f"{server.address}/release/model.pt"
    get(server, path.parent)
    assert len(server.log) == 1


def test_a_broken_connection_is_taken_up_where_it_ended(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [120_000, 0, 0, 30_000, 0, 0, 10_000]  # more consecutive failures than allowed
    assert get(server, tmp_path).read_bytes() == OLD
    starts = [wanted for _, wanted, _ in server.log]
    assert starts[:5] == [None, *["bytes=120000-"] * 3, "bytes=150000-"] and starts[-1] == "bytes=160000-"
    assert all(condition for _, _, condition in server.log[1:])


def test_a_later_run_goes_on(server: FileServer, tmp_path: Path) -> None:
    stopped(server, tmp_path)
    assert get(server, tmp_path).read_bytes() == OLD
    assert [wanted for _, wanted, _ in server.log] == ["bytes=150000-"]
    assert names(tmp_path) == ["model.pt", "model.pt.json"]


@pytest.mark.parametrize("change", ["no ranges", "changed", "changed, If-Range ignored", "shorter", "no version"])
def test_a_part_that_does_not_fit_is_not_used(server: FileServer, tmp_path: Path, change: str) -> None:
    server.tags = change != "no version"
    stopped(server, tmp_path)
    server.ranges = change != "no ranges"
    server.honest = change not in ("changed, If-Range ignored", "shorter")
    expected = {"no ranges": OLD, "no version": OLD, "shorter": NEW[:1000]}.get(change, NEW)
    server.files["model.pt"] = expected
    assert get(server, tmp_path).read_bytes() == expected
    assert names(tmp_path) == ["model.pt", "model.pt.json"]


def test_a_part_of_another_link_is_not_used(server: FileServer, tmp_path: Path) -> None:
    stopped(server, tmp_path)
    server.files["other.pt"] = OLD
    fetch(f"{server.address}/release/other.pt", tmp_path / "model.pt")
    assert server.log == [("other.pt", None, None)]


def test_a_whole_part_is_not_asked_for_again(server: FileServer, tmp_path: Path) -> None:
    stopped(server, tmp_path)
    (tmp_path / "model.pt.part").write_bytes(OLD)
    assert get(server, tmp_path).read_bytes() == OLD
    assert server.log == []


def test_a_date_serves_as_version(server: FileServer, tmp_path: Path) -> None:
    server.tags, server.honest = False, False
    server.headers["model.pt"] = {"ETag": 'W/"weak"', "Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}
    stopped(server, tmp_path)
    assert get(server, tmp_path).read_bytes() == OLD
    assert server.log == [("model.pt", "bytes=150000-", "Tue, 02 Jan 2024 00:00:00 GMT")]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_what_may_pass_is_tried_again(server: FileServer, tmp_path: Path, status: int) -> None:
    server.answers = [status, status]
    assert get(server, tmp_path).read_bytes() == OLD
    assert len(server.log) == 3


@pytest.mark.parametrize("status", [404, 403])
def test_a_refusal_is_final(server: FileServer, tmp_path: Path, status: int) -> None:
    server.answers = [status]
    with pytest.raises(ValueError, match=rf"cannot download http.*/model\.pt: HTTP {status}.* put it at .*model\.pt"):
        get(server, tmp_path)
    assert len(server.log) == 1
    assert names(tmp_path) == []


def test_a_web_page_is_no_model(server: FileServer, tmp_path: Path) -> None:
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(ValueError, match="a web page instead"):
        get(server, tmp_path)
    assert names(tmp_path) == []


def test_a_truncated_file_is_no_download(server: FileServer, tmp_path: Path) -> None:
    server.cuts = [10_100] + [0] * 9
    with pytest.raises(
        ValueError, match=r"model\.pt \(the connection broke\); 10,000 bytes are kept; run the command again"
    ):
        get(server, tmp_path)
    assert names(tmp_path) == ["model.pt.part", "model.pt.part.json"]


def test_a_reply_without_length_is_refused(server: FileServer, tmp_path: Path) -> None:
    server.headers["model.pt"] = {"Content-Length": None}
    server.cuts = [100_000]
    with pytest.raises(ValueError, match=r"no Content-Length, so a broken transfer .* put it at .*model\.pt$"):
        get(server, tmp_path)
    assert names(tmp_path) == []


def test_offline_says_what_to_fetch_and_where_to_put_it(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, path = "http://127.0.0.1:9/model.pt", tmp_path / "model.pt"
    with pytest.raises(ValueError, match=r"no connection to 127\.0\.0\.1") as caught:
        fetch(url, path)
    assert url in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_server_that_hangs(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT_S", (0.2, 0.05))
    server.delay_s = 0.2
    with pytest.raises(ValueError, match=r"127\.0\.0\.1 does not answer"):
        get(server, tmp_path)


def test_a_full_disk_keeps_what_came(server: FileServer, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (123_456, limits[1]))  # file size limit
    try:
        with pytest.raises(ValueError, match=r"cannot write .*model\.pt: .*; what was downloaded is kept"):
            get(server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert get(server, tmp_path).read_bytes() == OLD
    assert [wanted for _, wanted, _ in server.log] == [None, "bytes=123456-"]


def test_too_little_space_is_said_before(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"no space for .*model\.pt\.part: it needs 0 MB"):
        get(server, tmp_path)
    assert names(tmp_path) == []


def test_a_cache_that_cannot_be_written(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*file.model\.pt: "):
        get(server, tmp_path / "file")


FETCH = (
    "import sys; from pathlib import Path; from tinyclip.common.download import fetch; "
    "fetch(sys.argv[1], Path(sys.argv[2]))"
)


def start(server: FileServer, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", FETCH, f"{server.address}/model.pt", str(folder / "model.pt")])


def test_two_processes_download_once(server: FileServer, tmp_path: Path) -> None:
    server.delay_s = 1.0
    both = [start(server, tmp_path) for _ in range(2)]
    assert [process.wait(30) for process in both] == [0, 0]
    assert len(server.log) == 1
    assert (tmp_path / "model.pt").read_bytes() == OLD


def test_a_killed_download_goes_on(server: FileServer, tmp_path: Path) -> None:
    server.files["model.pt"] = big = OLD * 8
    server.cuts = [len(big) // 2]
    server.go_on.clear()
    process = start(server, tmp_path)
    end = time.monotonic() + 30
    kept = len(big) // 2 // CHUNK * CHUNK
    while partial_size(tmp_path / "model.pt") < kept and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert fetch(f"{server.address}/model.pt", tmp_path / "model.pt").read_bytes() == big
    assert server.log[1][1] == f"bytes={kept}-"


def test_an_environment_proxy_is_used(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.address)
    fetch("http://models.invalid/model.pt", tmp_path / "model.pt")
    assert server.log == [("model.pt", None, None)]


def test_it_tells_how_far_it_is(server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Progress is reported to a listener; without one the download is silent."""
    get(server, tmp_path / "silent")
    heard: list[tuple[object, ...]] = []
    with listening(lambda *told: heard.append(told)):
        get(server, tmp_path / "told")
    assert capsys.readouterr() == ("", "")
    assert {told[0] for told in heard} == {"downloading model.pt", "checking model.pt"}
    assert {told[3] for told in heard} == {"MB"} and heard[-1][1] == heard[-1][2]


def test_a_changed_file_is_noticed(server: FileServer, tmp_path: Path) -> None:
    path = get(server, tmp_path)
    path.write_bytes(OLD[:-1])
    with pytest.raises(
        ValueError, match=rf"model\.pt is not the file .*{sha256(OLD).hexdigest()} was recorded; delete it"
    ):
        check(path)
    path.write_bytes(OLD)  # same content, different time
    assert check(path)["mtime_ns"] == path.stat().st_mtime_ns


def test_decay_without_a_trace_is_noticed_by_a_full_check(server: FileServer, tmp_path: Path) -> None:
    path = get(server, tmp_path)
    before = path.stat()
    path.write_bytes(NEW)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    check(path)
    with pytest.raises(ValueError, match="is not the file that was downloaded"):
        check(path, full=True)


def test_a_file_put_there_by_hand_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(NEW)
    assert check(tmp_path / "model.pt")["sha256"] == sha256(NEW).hexdigest()
    assert read_record(tmp_path / "model.pt")


def test_a_cache_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise ValueError(f"cannot write {path}")

    (tmp_path / "model.pt").write_bytes(NEW)
    monkeypatch.setattr(download, "write_atomically", refuse)
    assert check(tmp_path / "model.pt")["sha256"] == sha256(NEW).hexdigest()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 1'])
def test_a_damaged_record_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(NEW)
    (tmp_path / "model.pt.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.pt\.json: damaged; delete it"):
        check(tmp_path / "model.pt")


@pytest.mark.parametrize("state", ['{"url": ', "{}", "[]", "null", '{"url": "x"}'])
def test_a_damaged_state_starts_anew(state: str, server: FileServer, tmp_path: Path) -> None:
    stopped(server, tmp_path)
    (tmp_path / "model.pt.part.json").write_text(state)
    assert get(server, tmp_path).read_bytes() == OLD
