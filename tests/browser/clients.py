"""A running page, and clients that call it without a browser."""

from __future__ import annotations

import atexit
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.helpers.processes import output

COMMAND = [sys.executable, "-m", "tinyclip"]
FILE_DATA = {"_type": "gradio.FileData"}


def start(*arguments: object, command: list[str] = COMMAND, **options: Any) -> tuple[subprocess.Popen[str], str]:
    """Start a page on a free port and return its address as printed."""
    line = [*command, "app", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    atexit.register(process.kill)  # a failed test leaves no process behind
    assert process.stdout
    said = process.stdout.readline()
    found = re.match(r"(http://[\w.]+:\d+(/\?token=\S+)?) ", said)
    if not found:
        process.kill()
        raise AssertionError(f"{said}{process.communicate()[1]}")
    return process, found[1]


def stop(process: subprocess.Popen[str], number: int = signal.SIGINT) -> str:
    """Stop the page and return its standard error, which must hold no traceback."""
    process.send_signal(number)
    errors = output(process)[1]
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors, errors
    return errors


@contextmanager
def visitor(address: str, **options: Any) -> Iterator[httpx.Client]:
    """A client with a cookie jar that has opened the page."""
    with httpx.Client(base_url=address, timeout=60, trust_env=False, **options) as client:
        client.get("/").raise_for_status()
        yield client


def upload(client: httpx.Client, *data: bytes) -> list[str]:
    answer = client.post("/gradio_api/upload", files=[("files", ("a.png", one, "image/png")) for one in data])
    assert answer.status_code == 200, answer.text
    return answer.json()


def join(client: httpx.Client, data: list[Any], function: int = 0, **more: Any) -> httpx.Response:
    body = {"fn_index": function, "session_hash": "here", "data": data, "event_data": None, "trigger_id": 8}
    return client.post("/gradio_api/queue/join", json=body | more)


def call(client: httpx.Client, data: list[Any], function: int = 0, session: str = "here") -> dict[str, Any]:
    """Call the page's API and return the last message."""
    answer = join(client, data, function, session_hash=session)
    assert answer.status_code == 200, answer.text
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                return message["output"]
    raise AssertionError("no result")


def raw(address: str, request: bytes, more: Iterable[bytes] = ()) -> bytes:
    """Return the answer to bytes that no client library would send."""
    host, port = re.findall(r"//([\w.]+):(\d+)", address)[0]
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        for piece in more:
            connection.sendall(piece)
        answer = connection.recv(65536)
        while answer and b"\r\n\r\n" not in answer:
            answer += connection.recv(65536)
        return answer
