"""Resumable downloads into a cache that records the SHA-256 of the first download.

Next to a cached file are `FILE.json` (its record), `FILE.lock`, and during a download `FILE.part` and
`FILE.part.json`: the bytes so far and the version of the file they belong to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from tinyclip.common.files import sha256, write_atomically
from tinyclip.common.locks import Lock
from tinyclip.common.progress import tell_bytes

CHUNK = 1 << 17  # bytes; the most that a broken connection can lose
TIMEOUT_S = (10, 60)  # connect timeout, read timeout
ATTEMPTS = 4  # in a row without progress
FIRST_WAIT_S = 0.5  # before the second attempt; doubles from there


class _Retry(Exception):
    """A transient failure: try again."""


def fetch(url: str, path: Path) -> Path:
    """Download a file once; other processes that need it wait, and an interrupted download resumes.

    Proxies come from the usual environment variables. Bytes received before a failure are kept.

    Raises:
        ValueError: when the server cannot be reached or refuses, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(_beside(path, ".lock")):
            if not path.exists():
                _download(url, path)
                part = _beside(path, ".part")
                part.replace(path)
                _state(part).unlink(missing_ok=True)
                check(path, url)
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; what was downloaded is kept; "
            "run the command again to resume"
        ) from None
    return path


def check(path: Path, url: str = "", *, full: bool = False) -> dict[str, Any]:
    """Return the record of a cached file (`url`, `sha256`, `size` in bytes, `mtime_ns`); create a missing one.

    The file's hash is checked when its size or mtime differ from the record, or always with `full`.

    Raises:
        ValueError: when the content does not match the record.
    """
    record, stat = read_record(path), path.stat()
    if record and not full and (record["size"], record["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
        return record
    digest = sha256(path)
    if record and record["sha256"] != digest:
        raise ValueError(
            f"{path} is not the file that was downloaded: its SHA-256 is {digest}, but {record['sha256']} was recorded;"
            f" delete it to download it again, or delete {_beside(path, '.json')} to accept it"
        )
    now = {"sha256": digest, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return add_to_record(path, **({"url": url} | (record or {}) | now))


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record of a cached file; None if it has none.

    Raises:
        ValueError: for a damaged record.
    """
    place = _beside(path, ".json")
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.keys() >= {"sha256", "size", "mtime_ns"}:
            return record
    except FileNotFoundError:
        return None
    except ValueError:
        pass
    raise ValueError(f"{place}: damaged; delete it to accept {path.name} as it is")


def add_to_record(path: Path, **items: Any) -> dict[str, Any]:
    """Add fields to a file's record and return the whole record, even if the cache is read-only."""
    record = (read_record(path) or {}) | items
    with suppress(ValueError):
        write_atomically(_beside(path, ".json"), json.dumps(record, indent=2) + "\n")
    return record


def partial_size(path: Path) -> int:
    """Return the size in bytes of an interrupted download."""
    part = _beside(path, ".part")
    return part.stat().st_size if part.exists() else 0


def _download(url: str, path: Path) -> None:
    part, failures = _beside(path, ".part"), 0
    with requests.Session() as session:
        while True:
            before = partial_size(path)
            try:
                return _attempt(session, url, part)
            except (requests.RequestException, _Retry) as error:
                failures = 1 if partial_size(path) > before else failures + 1
                if failures >= ATTEMPTS:
                    kept = (
                        f"{partial_size(path):,} bytes are kept; run the command again to resume, or "
                        if part.exists()
                        else ""
                    )
                    raise ValueError(
                        f"cannot download {path.name} ({_reason(error, url)}); {kept}"
                        f"download {url} elsewhere and put it at {path}"
                    ) from None
            time.sleep(FIRST_WAIT_S * 2 ** (failures - 1))


def _attempt(session: requests.Session, url: str, part: Path) -> None:
    """Make one request, for the whole file or for the rest of the version in `part` (RFC 9110: Range, If-Range)."""
    state = _read_state(part, url)
    start, version = (part.stat().st_size, state["version"]) if state else (0, None)
    if state and start == state["total"]:
        return
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": str(version)}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        _judge(response, url, part.with_suffix(""))
        begin, total = _span(response)
        if response.status_code == 416 or (begin and (begin != start or _version(response) != version)):
            part.unlink(missing_ok=True)
            raise _Retry("the file changed on the server")
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - begin > free:
            raise ValueError(
                f"no space for {part}: it needs {(total - begin) / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; "
                "free some space or choose another cache folder"
            )
        with part.open("ab" if begin else "wb") as file:
            # The state may describe the new version only now that the old bytes are gone.
            found = {"url": url, "version": _version(response), "total": total}
            write_atomically(_state(part), json.dumps(found))
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                tell_bytes(f"downloading {part.stem}", file.tell(), total)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    if total is not None and size != total:
        if size > total:
            part.unlink()
        raise _Retry(f"the connection ended at {size:,} of {total:,} bytes")


def _judge(response: requests.Response, url: str, path: Path) -> None:
    status = response.status_code
    if status in (408, 429) or status >= 500:
        raise _Retry(f"HTTP {status} {response.reason}")
    if status not in (200, 206, 416):
        raise ValueError(
            f"cannot download {url}: HTTP {status} {response.reason}; "
            f"if you have the file from elsewhere, put it at {path}"
        )
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise ValueError(f"{url} returned a web page instead of the file; is there a sign-in page or proxy in between?")
    headers = response.headers
    if status != 416 and "Content-Length" not in headers and headers.get("Transfer-Encoding", "") != "chunked":
        raise ValueError(
            f"{url} has no Content-Length, so a broken transfer would go unnoticed; "
            f"if you have the file from elsewhere, put it at {path}"
        )


def _span(response: requests.Response) -> tuple[int, int | None]:
    """Return the first byte of the response, and the size of the whole file if the server states it."""
    if response.status_code == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not found:
            raise _Retry("the server sent a part of the file without saying which")
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def _version(response: requests.Response) -> str | None:
    """Return a value for If-Range: a strong ETag, else the Last-Modified date."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _read_state(part: Path, url: str) -> dict[str, Any] | None:
    """Return the state of a partial download that can be resumed."""
    try:
        state = json.loads(_state(part).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(state, dict) or not state.keys() >= {"url", "version", "total"}:
        return None
    return state if part.exists() and state["url"] == url and state["version"] else None


def _reason(error: Exception, url: str) -> str:
    if isinstance(error, requests.Timeout):
        return f"{urlsplit(url).hostname} does not answer"
    if isinstance(error, requests.exceptions.SSLError):
        return f"no secure connection to {urlsplit(url).hostname}, whose certificate was not accepted"
    if isinstance(error, requests.ConnectionError):
        return f"no connection to {urlsplit(url).hostname}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    return " ".join(str(error).split())


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _state(part: Path) -> Path:
    return _beside(part, ".json")
