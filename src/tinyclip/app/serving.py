"""A port, a server on it, and an end that comes whatever its threads do. Knows nothing of what is served."""

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

GRACE = 5.0  # seconds that requests have to end in
CONNECTIONS = 500  # at once; more are answered 503


def listen(host: str, port: int) -> socket.socket:
    """Take the port, before anything else takes time; 0 is any that is free.

    Raises:
        ValueError: when it is taken, or no address of this machine.
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
    """Whether only this machine reaches it."""
    return ip_address(place.getsockname()[0]).is_loopback


def host_of(place: socket.socket) -> str:
    """What a browser of this machine calls it, without the port."""
    host = place.getsockname()[0]
    if ip_address(host).is_unspecified:
        return "localhost"
    return f"[{host}]" if ":" in host else str(host)


def address(place: socket.socket) -> str:
    """Its address, for a browser of this machine."""
    return f"http://{host_of(place)}:{place.getsockname()[1]}"


def run(app: Any, place: socket.socket, ready: Callable[[], None]) -> None:
    """Serve an ASGI application until this thread, the main one, is interrupted; `ready` is called once it answers.

    The loop has a thread of its own: a signal finds the main thread waiting, whatever the loop and its workers do.
    Requests have `GRACE` seconds to end in.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    # Open pages hold connections; they must not hold up the end. Addresses are those of the connections: what proxies
    # say of others is not believed.
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
        ended.wait()
    finally:
        server.should_exit = True
        thread.join(GRACE)
    if failed:
        raise failed[0]


@contextmanager
def ending() -> Iterator[None]:
    """Leave the process when interrupted in this block, also when threads are stuck, which Python would wait for."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        for number in (signal.SIGINT, signal.SIGTERM):  # one more would have Python wait after all
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
