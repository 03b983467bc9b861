"""A server shuts down whatever its threads, its loop and its clients do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser.clients import raw
from tests.helpers.processes import output

SERVER = """
import asyncio, signal, sys, tempfile, threading
from tinyclip.app import serving
from tinyclip.app.guard import Gate, Refused, Uploads, answer

uploads = Uploads(1000, 1, 1000, 1000, 60)

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    print(scope["path"], flush=True)
    if scope["path"] == "/worker":
        await asyncio.to_thread(threading.Event().wait)
    if scope["path"] == "/loop":
        threading.Event().wait()
    if scope["path"] == "/pipe":
        open(sys.argv[1])
    if scope["path"] == "/upload":
        await uploads.take(scope, receive)
    await answer(send, 200)

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
place = serving.listen("127.0.0.1", 0)
try:
    with serving.ending(), tempfile.TemporaryDirectory():
        serving.run(Gate(app, place), place, lambda: print(serving.address(place), flush=True))
except KeyboardInterrupt:  # as the command does
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("path", ["idle", "worker", "loop", "pipe", "upload"])
def test_it_ends(path: str, number: int, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    os.mkfifo(tmp_path / "pipe")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, tmp_path / "pipe"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
    )
    assert process.stdout
    address = process.stdout.readline().strip()
    assert raw(address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 200"), process.stderr
    assert process.stdout.readline() == "/\n"
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        if path != "idle":
            head = f"POST /{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n"
            connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n".encode())
            assert process.stdout.readline() == f"/{path}\n"
        process.send_signal(number)
        errors = output(process)[1]
    assert process.returncode == 128 + number, errors
    assert not errors
    assert not list((tmp_path / "tmp").iterdir())
