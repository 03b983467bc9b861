"""Serve an app on a port, with a shutdown that stuck threads cannot block. Independent of the app served."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

GRACE = 5.0  # seconds that running requests get to finish
CONNECTIONS = 500  # concurrent connections; further ones get a 503


def listen(host: str, port: int) -> socket.socket:
    """Bind the port, before any slow work; 0 picks a free one.

    Raises:
        ValueError: when the port is taken, or the host is not an address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(found[4][:2], family=found[0])
    except OSError as error:
        reason = (
            "already in use; choose another with --port"
            if error.errno == errno.EADDRINUSE
            else error.strerror or str(error)
        )
        raise ValueError(f"{host}, port {port}: {reason}") from None


def is_loopback(place: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ip_address(place.getsockname()[0]).is_loopback


def host_of(place: socket.socket) -> str:
    """Return the host for a browser on this machine, without the port."""
    host = place.getsockname()[0]
    if ip_address(host).is_unspecified:
        return "localhost"
    return f"[{host}]" if ":" in host else str(host)


def address(place: socket.socket) -> str:
    """Return the server's address for a browser on this machine."""
    return f"http://{host_of(place)}:{place.getsockname()[1]}"


def run(app: Any, place: socket.socket, ready: Callable[[], None]) -> None:
    """Serve an ASGI app until this thread, the main one, is interrupted; call `ready` once it answers.

    The event loop runs in its own thread, so the main thread can always handle signals, whatever the loop and its
    workers do. Running requests get `GRACE` seconds to finish.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    # Connections of open pages must not delay the shutdown. Client addresses are those of the connections; what proxies
    # report is not trusted.
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, ws="none", proxy_headers=False)
    config.limit_concurrency, config.server_header = CONNECTIONS, False
    server, failed, ended = Server(config), [], threading.Event()

    def serve() -> None:
        try:
            server.run(sockets=[place])
        except BaseException as error:
            failed.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=serve, name="server", daemon=True)
    thread.start()
    try:
        while not ended.wait(1):  # a signal that comes just before a wait does not end it
            pass
    finally:
        server.should_exit = True
        thread.join(GRACE)
    if failed:
        raise failed[0]


@contextmanager
def ending() -> Iterator[None]:
    """Exit the process on an interrupt in this block, without waiting for stuck threads, as Python would."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        for number in (signal.SIGINT, signal.SIGTERM):  # another signal would make Python wait after all
            signal.signal(number, signal.SIG_IGN)
        if not _stuck(time.monotonic() + 1):
            raise
        code = 130 if isinstance(error, KeyboardInterrupt) else error.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _stuck(until: float) -> bool:
    others = [one for one in threading.enumerate() if one is not threading.current_thread()]
    held = [one for one in others if not one.daemon or one.name == "server"]
    for one in held:
        one.join(max(0.0, until - time.monotonic()))
    return any(one.is_alive() for one in held)
