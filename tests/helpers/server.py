"""A file server for tests: ranges, versions, and everything that goes wrong with downloads."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class FileServer(ThreadingHTTPServer):
    """Serves `files` by path, redirected once as for GitHub releases; `log` holds (path, Range, If-Range)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str | None]] = {}  # extra headers by path; None: omit the header
        self.missing: dict[str, str] = {}  # headers of a 404
        self.log: list[tuple[str, str | None, str | None]] = []
        self.answers: list[int] = []  # statuses of the next requests
        self.cuts: list[int] = []  # number of bytes after which the next answers break off
        self.delay_s = 0.0  # before each answer
        self.go_on = threading.Event()  # interrupted answers wait for this
        self.go_on.set()
        self.ranges = self.honest = self.tags = True  # honest: respects If-Range
        self.content_type = "application/octet-stream"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore disconnecting clients; tests do this on purpose."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, urlsplit(self.path).path
        if path.startswith("/release/"):
            self._answer(302, {"Location": f"/file/{path.removeprefix('/release/')}"})
            return
        path = path.removeprefix("/file/").removeprefix("/")
        server.log.append((path, self.headers["Range"], self.headers["If-Range"]))
        time.sleep(server.delay_s)
        status = server.answers.pop(0) if server.answers else 200
        if status == 200 and path in server.files:
            self._send(path, server.files[path])
        else:
            fields = {"Content-Length": "0"}
            self._answer(*((404, fields | server.missing) if status == 200 else (status, fields)))

    def _send(self, path: str, data: bytes) -> None:
        server, wanted, condition = self.server, self.headers["Range"], self.headers["If-Range"]
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        fields: dict[str, str | None] = {"Content-Type": server.content_type} | ({"ETag": tag} if server.tags else {})
        start = 0
        if wanted and server.ranges and (not server.honest or condition in (None, tag)):
            found = re.fullmatch(r"bytes=(\d+)-", wanted)
            assert found, wanted
            start = int(found[1])
            if start >= len(data):
                self._answer(416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"})
                return
            fields["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        fields |= {"Content-Length": str(len(data) - start)} | server.headers.get(path, {})
        self._answer(206 if "Content-Range" in fields else 200, fields)
        if self.command == "HEAD":
            return
        if server.cuts:
            self.wfile.write(data[start : start + server.cuts.pop(0)])
            self.wfile.flush()
            server.go_on.wait(30)
        else:
            self.wfile.write(data[start:])

    def _answer(self, status: int, fields: Mapping[str, str | None]) -> None:
        self.send_response(status)
        for name, value in fields.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[FileServer]:
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
